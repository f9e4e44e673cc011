"""The original from PyPI, in a directory of its own, because it has the name of ours."""

import fcntl
import os
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

ORIGINAL = "posix_ipc==1.3.2"
UPSTREAM = Path(__file__).resolve().parent.parent / "build" / "upstream"


class Unavailable(Exception):
    """It cannot be had here; the text says why."""


def original_directory() -> Path:
    """Return the directory that holds the original for this interpreter, to which no other path need be added.

    It is installed on first use, by one process at a time. `Unavailable` if that fails.
    """
    target = UPSTREAM / sysconfig.get_platform() / f"{sys.implementation.cache_tag}{sys.abiflags}"
    UPSTREAM.mkdir(parents=True, exist_ok=True)
    with open(UPSTREAM / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            _install(target)
    return target


def _install(target: Path) -> None:
    target.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=UPSTREAM) as scratch:  # so that a target which is there is complete
        options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--retries", "1", "--timeout", "15"]
        _run("-m", "pip", "install", *options, "--target", f"{scratch}/new", ORIGINAL)
        _run("-c", "import posix_ipc", env={**os.environ, "PYTHONPATH": f"{scratch}/new"})
        os.rename(f"{scratch}/new", target)


def _run(*arguments: str, env: dict[str, str] | None = None) -> None:
    child = subprocess.run([sys.executable, *arguments], env=env, capture_output=True, text=True)
    if child.returncode:
        last = child.stderr.strip().rpartition("\n")[2]
        raise Unavailable(f"{ORIGINAL} cannot be installed here: {last or f'status {child.returncode}'}")
