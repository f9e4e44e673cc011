"""Who holds what: the processes that psutil lists, and what /proc tells of their mappings and descriptors.

A mapping names its file by device and inode. The path beside them is no help: a semaphore's creator, for one, maps a
file whose path reads as deleted. Descriptors of queues look like files in the root directory, on a device of their own.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import psutil

File = tuple[int, int]
"""(device, inode)"""

_SHM = b"/dev/shm/"

_KERNEL_THREAD = 0x00200000  # PF_KTHREAD of the kernel's sched.h


@dataclass
class Scan:
    """What the processes hold."""

    holders: dict[File, dict[int, set[str]]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(set)))
    """By file and pid: how, of "descriptor", "mapping" and "lease"."""
    queue_links: dict[bytes, os.stat_result] = field(default_factory=dict)
    """By the name that a descriptor shows: what may be a queue."""
    unread: dict[int, OSError] = field(default_factory=dict)
    """By pid: why a process that runs could not be read."""


def scan(shm: int, names: Collection[bytes]) -> Scan:
    """Look through all processes for what is on the device `shm`, and for queues.

    Only descriptors whose link ends in one of `names` are followed, wherever the device is mounted, and those that may
    lead to queues or to files without a name: others may lead to a server that does not answer.
    """
    found = Scan()
    look = _Look(shm, names, found)
    seen: set[int] = set()
    for _ in range(_ROUNDS):
        new = set(psutil.pids()) - seen
        for pid in new:
            look.at(pid)
        seen |= new
        if not new:
            break
    return found


_ROUNDS = 5
"""What is forked meanwhile may have what its parent let go, so another look follows until there is nobody new."""


class _Look:
    def __init__(self, shm: int, names: Collection[bytes], found: Scan) -> None:
        self._shm, self._names, self._found = shm, names, found
        device = b"%02x:%02x" % (os.major(shm), os.minor(shm))
        self._needle = b" " + device + b" "
        self._mapping = re.compile(rb"^\S+ \S+ \S+ " + device + rb" (\d+)", re.MULTILINE)
        self._root = os.stat("/").st_dev

    def at(self, pid: int) -> None:
        try:
            if not self._holds(pid, f"/proc/{pid}"):
                self._look_at_threads(pid)
        except (FileNotFoundError, ProcessLookupError):
            pass  # it has ended
        except OSError as error:
            if not _holds_nothing(pid):
                self._found.unread[pid] = error

    def _look_at_threads(self, pid: int) -> None:
        """A process whose first thread has ended shows what it holds at the others, which share it."""
        for thread in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                if self._holds(pid, f"/proc/{pid}/task/{thread}"):
                    break

    def _holds(self, pid: int, directory: str) -> bool:
        """False if there are no mappings: then it is a thread of the kernel, or has ended."""
        with open(f"{directory}/maps", "rb", buffering=0) as file:
            maps = file.readall()
        if self._needle in maps:
            for inode in self._mapping.findall(maps):
                self._found.holders[self._shm, int(inode)][pid].add("mapping")
        if maps:
            self._look_at_descriptors(pid, os.fsencode(directory))
        return bool(maps)

    def _look_at_descriptors(self, pid: int, directory: bytes) -> None:
        for number in os.listdir(directory + b"/fd"):
            path = directory + b"/fd/" + number
            try:
                link = os.readlink(path)
                if link[:1] == b"/" and self._may_matter(link):
                    self._look_at_descriptor(pid, path, link)
            except FileNotFoundError:
                continue  # it was closed

    def _may_matter(self, link: bytes) -> bool:
        last = link.rpartition(b"/")[2]
        return link.startswith(_SHM) or last in self._names or last[:1] == b"#" or link.count(b"/") == 1

    def _look_at_descriptor(self, pid: int, path: bytes, link: bytes) -> None:
        status = os.stat(path)
        file = status.st_dev, status.st_ino
        if link.count(b"/") == 1 and status.st_dev not in (self._shm, self._root):
            self._found.queue_links[link] = status
        how = self._found.holders[file][pid]
        how.add("descriptor")
        with open(path.replace(b"/fd/", b"/fdinfo/"), "rb", buffering=0) as info:
            if b" FLOCK " in info.readall():
                how.add("lease")


def _holds_nothing(pid: int) -> bool:
    """Is it a zombie, gone, or a thread of the kernel? That can be read of any process."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
        threads = len(os.listdir(f"/proc/{pid}/task"))
    except (FileNotFoundError, ProcessLookupError):
        return True
    except OSError:
        return False
    return (fields[0] in (b"Z", b"X") and threads == 1) or bool(int(fields[6]) & _KERNEL_THREAD)


def locks() -> dict[File, set[int]]:
    """The files that are locked with flock(2), and the pids that locked them, which may have ended since.

    Only those that were locked from within this PID namespace. On a busy machine one may be missing.
    """
    locked: dict[File, set[int]] = defaultdict(set)
    with contextlib.suppress(FileNotFoundError), open("/proc/locks", "rb") as file:
        for line in file:
            fields = line.split()
            if fields[1] == b"FLOCK":
                major, minor, inode = fields[5].split(b":")
                locked[os.makedev(int(major, 16), int(minor, 16)), int(inode)].add(int(fields[4]))
    return locked


# ---- which process is that? ----


class Process(NamedTuple):
    """A process, identified by its pid and when it started."""

    pid: int
    started: float | None
    command: str
    user: str


def describe(pid: int) -> Process | None:
    """What psutil knows of a process; None if it has ended."""
    try:
        process = psutil.Process(pid)
    except psutil.NoSuchProcess:
        return None
    except psutil.Error:
        return Process(pid, None, "", "")
    words = _asked(process.cmdline)
    command = " ".join(words) if words else _asked(process.name) or ""
    return Process(pid, _asked(process.create_time), command, _asked(process.username) or "")


def _asked(question: Callable[[], Any]) -> Any:
    try:
        return question()
    except psutil.Error:
        return None


# ---- what cannot be seen ----

_FIRST_PID_NAMESPACE = 0xEFFFFFFC  # PROC_PID_INIT_INO of the kernel's proc_ns.h
_FIRST_USER_NAMESPACE = 0xEFFFFFFD  # PROC_USER_INIT_INO
_CAP_SYS_PTRACE = 19  # of the kernel's capability.h


def sees_all_namespaces() -> bool:
    """Is this the first PID namespace, from which the processes of all others are seen?"""
    return os.stat("/proc/self/ns/pid").st_ino == _FIRST_PID_NAMESPACE


def processes_are_hidden() -> bool:
    """Does /proc keep the processes of other users out of sight? See hidepid in proc(5)."""
    return any(_hides(options) for options in _options_of_proc()) and not _may_look_into_all()


def _may_look_into_all() -> bool:
    """Has this process the rights of root over all others? The root of a user namespace has not."""
    if os.stat("/proc/self/ns/user").st_ino != _FIRST_USER_NAMESPACE:
        return False
    with open("/proc/self/status", "rb") as file:
        (capabilities,) = (int(line.split()[1], 16) for line in file if line.startswith(b"CapEff:"))
    return bool(capabilities >> _CAP_SYS_PTRACE & 1)


def _hides(options: list[bytes]) -> bool:
    return any(each.startswith(b"hidepid=") and each not in (b"hidepid=0", b"hidepid=off") for each in options)


def _options_of_proc() -> Iterator[list[bytes]]:
    with open("/proc/self/mounts", "rb") as mounts:
        for line in mounts:
            fields = line.split()
            if fields[1:3] == [b"/proc", b"proc"]:
                yield fields[3].split(b",")
