"""What building needs and the system lacks is named, a line each, before anything is made."""

import ensurepip
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from support import run_privately

ROOT = Path(__file__).resolve().parent.parent
INCLUDE = sysconfig.get_path("include")

pytestmark = [
    pytest.mark.skipif(not os.path.exists(f"{INCLUDE}/Python.h"), reason="the headers of this Python are not there"),
    pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler is there"),
]


def preflight(python=sys.executable, **environment):
    """Return the exit status of tools/preflight, and what it says."""
    done = subprocess.run(
        [ROOT / "tools" / "preflight", python],
        env={**{name: value for name, value in os.environ.items() if name != "CC"}, **environment},
        capture_output=True,
        text=True,
    )
    assert done.stdout == ""
    return done.returncode, done.stderr


def test_says_nothing_where_all_is_there():
    assert preflight(CC="cc") == (0, "")


def test_no_compiler():
    line = "missing: a C compiler; '/nowhere/cc' is not there (on Debian: apt-get install gcc)\n"
    assert preflight(CC="/nowhere/cc -pthread") == (1, line)


def test_no_headers_of_the_c_library():
    line = "missing: the headers of the C library (on Debian: apt-get install libc6-dev)\n"
    assert preflight(CC="cc -nostdinc") == (1, line)


def test_no_python():
    line = "missing: a Python that starts as '/nowhere/python3.11' (on Debian: apt-get install python3.11)\n"
    assert preflight("/nowhere/python3.11", CC="cc") == (1, line)


def without(directory, line):
    """In a mount namespace of its own: the directory is empty there."""
    subprocess.run(["mount", "-t", "tmpfs", "none", directory], check=True)
    assert preflight(CC="cc") == (1, line)


@pytest.mark.slow
def test_no_headers_of_python():
    line = f"the C headers of '{sys.executable}', {INCLUDE}/Python.h (on Debian: apt-get install python3-dev)"
    run_privately(without, INCLUDE, f"missing: {line}\n")


@pytest.mark.slow
def test_no_venv():
    line = f"the modules venv and ensurepip of '{sys.executable}' (on Debian: apt-get install python3-venv)"
    run_privately(without, os.path.dirname(ensurepip.__file__), f"missing: {line}\n")


@pytest.mark.skipif(not shutil.which("make"), reason="make is not there")
@pytest.mark.parametrize("target", ["demo", "test"])
def test_make_says_it_too_and_makes_nothing(target, tmp_path):
    for name in "Makefile", "pyproject.toml", "setup.py":
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "tools").symlink_to(ROOT / "tools")
    before = sorted(tmp_path.iterdir())
    done = subprocess.run(
        ["make", target, "PYTHON=/nowhere/python3"], cwd=tmp_path, env=clean_of_make(), capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith("missing: a Python that starts as '/nowhere/python3'")
    assert sorted(tmp_path.iterdir()) == before


def clean_of_make():
    """The environment without what a make above this one hands down, such as make test."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
