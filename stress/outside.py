"""The independent look: what the kernel shows of a scenario, read from /proc and /dev/shm, without the package.

Objects are known by the prefix of their names, processes by a variable in their environment.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import signal
import struct
from collections.abc import Collection
from pathlib import Path

VARIABLE = "STRESS_RUN"
"""In the environment of every process of a scenario: which run it belongs to."""
SHM = Path("/dev/shm")
Identity = tuple[int, int]
"""(device, inode)"""

# ---- objects ----


class _CLibrary:
    def __init__(self) -> None:
        library = ctypes.CDLL(None, use_errno=True)
        self._mq_open, self._mq_unlink = library.mq_open, library.mq_unlink

    def queue_exists(self, name: str) -> bool:
        descriptor = self._mq_open(os.fsencode(name), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        if descriptor < 0:
            return ctypes.get_errno() not in (errno.ENOENT, errno.EACCES)
        os.close(descriptor)
        return True

    def queue_identity(self, name: str) -> Identity | None:
        descriptor = self._mq_open(os.fsencode(name), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        if descriptor < 0:
            if ctypes.get_errno() == errno.ENOENT:
                return None
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), name)
        try:
            status = os.fstat(descriptor)
        finally:
            os.close(descriptor)
        return status.st_dev, status.st_ino

    def unlink_queue(self, name: str) -> None:
        self._mq_unlink(os.fsencode(name))


_libc = _CLibrary()


def files(prefix: str) -> dict[str, Identity]:
    """The segments and semaphores whose names begin so: {file name: (device, inode)}."""
    found = {}
    stem = prefix.lstrip("/")
    for entry in os.scandir(SHM):
        if entry.name.removeprefix("sem.").startswith(stem):
            with contextlib.suppress(FileNotFoundError):
                status = os.lstat(entry.path)
                found[entry.name] = (status.st_dev, status.st_ino)
    return found


def queue_exists(name: str) -> bool:
    return _libc.queue_exists(name)


def queue_identity(name: str) -> Identity | None:
    """(device, inode); None if there is no such queue."""
    return _libc.queue_identity(name)


def remove(prefix: str, queues: Collection[str] = ()) -> None:
    """Remove what a run has left."""
    for name in files(prefix):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(SHM / name)
    for name in queues:
        _libc.unlink_queue(name)


# ---- processes ----


class Processes:
    """Finds the processes of a run, quickly when it is asked again and again."""

    def __init__(self, run: str) -> None:
        self._wanted = f"{VARIABLE}={run}".encode()
        self._strangers: dict[int, str] = {}
        """When they were started: a pid may be another's by and by."""

    def __call__(self) -> dict[int, str]:
        """Their pids and starts, without those that have ended but were not yet waited for."""
        pids = {int(entry) for entry in os.listdir("/proc") if entry.isdigit()}
        self._strangers = {pid: start for pid, start in self._strangers.items() if pid in pids}
        found = {}
        for pid in pids:
            start = start_of(pid)
            if not start or self._strangers.get(pid) == start:
                continue
            try:
                environment = Path(f"/proc/{pid}/environ").read_bytes()
            except OSError:  # gone, or another user's
                continue
            if self._wanted in environment.split(b"\0"):
                found[pid] = start
            elif environment:  # empty while it ends, or begins to execute a program
                self._strangers[pid] = start
        return found


def start_of(pid: int) -> str:
    """When a process was started, in ticks of the kernel; empty if it is gone. Pid and start are never another's."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    return ""


def kill(pid: int, start: str) -> None:
    """Kill this process, and no other one that has its pid by now."""
    with contextlib.suppress(ProcessLookupError):
        descriptor = os.pidfd_open(pid)
        try:
            if start_of(pid) == start:
                signal.pidfd_send_signal(descriptor, signal.SIGKILL)
        finally:
            os.close(descriptor)


def command(pid: int) -> str:
    """What it was started as; empty if it is gone."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    return ""


def state(pid: int) -> str:
    """The letter of the kernel for what a process does, such as T for stopped and Z for ended; empty if it is gone."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return ""


HELPERS = {
    "posix_ipc tracker": "tracker",
    "multiprocessing.resource_tracker": "resource tracker",
    "multiprocessing.forkserver": "fork server",
}
"""What a process of the standard library or the package starts for itself: a part of its command line."""


def role(pid: int) -> str:
    """The helper that a process is, or "process"."""
    line = command(pid)
    return next((role for part, role in HELPERS.items() if part in line), "process")


def descriptors(pid: int) -> dict[int, str]:
    """What a process has open, by number."""
    found = {}
    with contextlib.suppress(OSError):
        for number in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                found[int(number)] = os.readlink(f"/proc/{pid}/fd/{number}")
    return found


def mappings(pid: int, prefix: str, identities: Collection[Identity] = ()) -> list[str]:
    """The mappings by which a process holds objects of a run, those without a name among them.

    Some do not tell the name, such as those of a semaphore in the process that made it: for these, the identities of
    objects that were seen.
    """
    stem = prefix.lstrip("/")
    return [f"mapping {path}" for identity, path in _mappings(pid) if stem in path or identity in identities]


def mapped(pid: int) -> set[Identity]:
    """The files that a process has mapped."""
    return {identity for identity, _ in _mappings(pid)}


def mapped_paths(pid: int) -> list[str]:
    """What a process has mapped, as the kernel names it; without a name as the number of its inode."""
    return [path for _, path in _mappings(pid)]


def _mappings(pid: int) -> list[tuple[Identity, str]]:
    found = []
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            _, _, _, device, inode, *path = line.split(maxsplit=5)
            major, minor = (int(part, 16) for part in device.split(":"))
            found.append(((os.makedev(major, minor), int(inode)), " ".join(path)))
    return found


# ---- journals ----

_HEADER, _SLOT_SIZE = struct.Struct("=8sII"), 288
_WRITING = 255
"""The state of a slot whose rest nobody is to look at."""
_ASIDE = re.compile(r"aside-(\d+)-(\d+)-\d+")
_JOURNAL = re.compile(r"\d+-\d+-\d+\.(root|j[0-9a-f]+)")


def journal_directories() -> list[Path]:
    stem = f".posix_ipc-{os.geteuid()}"
    return [path for path in SHM.glob(f"{stem}*") if path.name == stem or path.name.startswith(f"{stem}.")]


def journals(prefix: str) -> list[str]:
    """The journals in which such names stand, be it as a trace of what was removed."""
    wanted = prefix.lstrip("/").encode()
    return [name for name, data in _read_journals() if wanted in data]


def put_aside(identities: Collection[Identity]) -> dict[Path, Identity]:
    """Objects among these that a sweep has renamed, to look whether they are used: they stay so if it is killed."""
    found = {}
    for directory in journal_directories():
        for path in directory.glob("aside-*"):
            if match := _ASIDE.fullmatch(path.name):
                identity = int(match[1]), int(match[2])
                if identity in identities:
                    found[path] = identity
    return found


def tree_of(pid: int) -> str:
    """What the names of the files of a tree begin with, of which this process is the root.

    It has the start of the process in it, since another one may have its pid by and by.
    """
    return f"{pid}-{start_of(pid)}"


def faults_of_journals(tree: str) -> dict[str, str | None]:
    """What is wrong with each journal of a tree; None if it is whole."""
    return {name: _fault_of(data) for name, data in _read_journals() if name.startswith(f"{tree}-")}


def tree_files(tree: str) -> list[str]:
    """All that is left in the directories of journals of a tree."""
    return [path.name for directory in journal_directories() for path in directory.glob(f"{tree}-*")]


def trackers(tree: str) -> list[int]:
    """The trackers of a tree."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            words = command(int(entry)).split(" ")
            if "tracker" in words and words[-1].startswith(f"{tree}-"):
                found.append(int(entry))
    return found


def _read_journals() -> list[tuple[str, bytes]]:
    found = []
    for directory in journal_directories():
        for name in os.listdir(directory):
            if _JOURNAL.fullmatch(name):
                with contextlib.suppress(FileNotFoundError):
                    found.append((name, (directory / name).read_bytes()))
    return found


def _fault_of(data: bytes) -> str | None:
    """An empty file, or one without the magic, which is written last, is a journal whose maker has not come further."""
    if not data[:8].strip(b"\0"):
        return None
    if len(data) % _SLOT_SIZE:
        return f"{len(data)} bytes are no whole number of slots"
    magic, version, slot_size = _HEADER.unpack_from(data)
    if (magic, version, slot_size) != (b"pipcjrn\0", 1, _SLOT_SIZE):
        return f"begins with {data[:16]!r}"
    for offset in range(_SLOT_SIZE, len(data), _SLOT_SIZE):
        state, kind, shared = data[offset : offset + 3]
        length = int.from_bytes(data[offset + 4 : offset + 6], "little")
        if state == _WRITING:
            continue
        if state > 3 or (state and (kind not in b"smq" or shared > 1 or not 0 < length <= 255)):
            return f"slot {offset // _SLOT_SIZE} begins with {data[offset : offset + 16]!r}"
    return None
