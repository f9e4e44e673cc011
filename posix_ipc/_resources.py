"""What this process has at one moment: descriptors, mappings of files in /dev/shm, child processes."""

from __future__ import annotations

import contextlib
import multiprocessing.process
import os
import sys
from dataclasses import dataclass
from typing import Any

import psutil

from posix_ipc._journal import SHM

Identity = tuple[int, int]
"""(device, inode)"""
MappedFile = tuple[bytes, int]
"""(device, inode) as /proc/self/maps has them"""


@dataclass
class Resources:
    """What is there at one moment; what is not asked for is empty."""

    files: dict[str, int]
    """the inodes of the files in /dev/shm, whoever made them, by path"""
    fds: dict[int, Identity]
    mapped: dict[MappedFile, tuple[int, str]]
    """(bytes, path) of each file in /dev/shm that is mapped"""
    children: set[psutil.Process]

    @classmethod
    def now(cls, files: bool, fds: bool, mappings: bool, children: bool) -> Resources:
        return cls(
            _files() if files else {},
            _descriptors() if fds else {},
            _mapped() if mappings else {},
            _child_processes() if children else set(),
        )

    def beyond(self, before: Resources) -> Resources:
        """What is here and was not before. A number or name that leads elsewhere counts, and so does mapping more."""
        mapped = {}
        for key, (size, path) in self.mapped.items():
            more = size - before.mapped.get(key, (0, ""))[0]
            if more > 0:
                mapped[key] = more, path
        return Resources(
            {path: inode for path, inode in self.files.items() if before.files.get(path) != inode},
            {number: identity for number, identity in self.fds.items() if before.fds.get(number) != identity},
            mapped,
            {process for process in self.children - before.children if not _is_tracker(process)},
        )

    def add(self, more: Resources) -> None:
        self.files.update(more.files)
        self.fds.update(more.fds)
        for key, (size, path) in more.mapped.items():
            self.mapped[key] = self.mapped.get(key, (0, ""))[0] + size, path
        self.children |= more.children


def _files() -> dict[str, int]:
    with os.scandir(SHM) as entries:
        return {entry.path: entry.inode() for entry in entries if not entry.name.startswith(".posix_ipc-")}


def _descriptors() -> dict[int, Identity]:
    """What they lead to; not by path, since a file may be renamed."""
    _, helpers = _helpers()
    found = {}
    for number in map(int, os.listdir("/proc/self/fd")):
        if number not in helpers:
            with contextlib.suppress(OSError):  # the one that listed them is closed
                status = os.fstat(number)
                found[number] = status.st_dev, status.st_ino
    return found


# ---- mappings ----

_JOURNALS = b"/.posix_ipc-"


def _mapped() -> dict[MappedFile, tuple[int, str]]:
    """Without the journals of this package. A mapping may be in several parts. See proc_pid_maps(5).

    Files are told by their device: where a symbolic link or another mount leads to /dev/shm, paths read otherwise.
    """
    shm, around = os.stat(SHM), os.stat(f"{SHM}/..")
    on_device = b" %02x:%02x " % (os.major(shm.st_dev), os.minor(shm.st_dev))
    in_directory = b"/"
    if shm.st_dev == around.st_dev:  # a directory of a file system that has other files too
        in_directory = f" {os.path.realpath(SHM)}/".encode()
    with open("/proc/self/maps", "rb", buffering=0) as maps:
        text = maps.readall()
    found: dict[MappedFile, tuple[int, str]] = {}
    if on_device in text:  # a look at each line takes time
        for line in text.split(b"\n"):
            if on_device in line and in_directory in line and _JOURNALS not in line:
                addresses, _, _, device, inode, path = line.split(maxsplit=5)
                start, end = (int(address, 16) for address in addresses.split(b"-"))
                key = device, int(inode)
                found[key] = found.get(key, (0, ""))[0] + end - start, os.fsdecode(path)
    return found


# ---- child processes ----


def _child_processes() -> set[psutil.Process]:
    """Those of this process, and those that a fork server started for it."""
    found = set()
    for pid in {*_direct_children(), *multiprocessing_children()} - _helpers()[0]:
        with contextlib.suppress(psutil.NoSuchProcess):
            found.add(psutil.Process(pid))
    return found


def _direct_children() -> list[int]:
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:  # there is none, as most of the time
        return []
    if not os.path.exists(f"/proc/self/task/{os.getpid()}/children"):  # CONFIG_PROC_CHILDREN
        return [child.pid for child in psutil.Process().children()]
    found: list[int] = []
    for thread in os.listdir("/proc/self/task"):
        # A thread that ends leaves its children to another.
        with contextlib.suppress(OSError), open(f"/proc/self/task/{thread}/children") as children:
            found += map(int, children.read().split())
    return found


def multiprocessing_children() -> dict[int, str]:
    """Names by pid. Not from active_children(), which would wait for those that have ended."""
    children: set[Any] = multiprocessing.process._children  # type: ignore[attr-defined]
    return {child.pid: child.name for child in list(children) if child.pid is not None}


_HELPERS = (
    ("multiprocessing.resource_tracker", "_resource_tracker", "_pid", "_fd"),
    ("multiprocessing.forkserver", "_forkserver", "_forkserver_pid", "_forkserver_alive_fd"),
    ("loky.backend.resource_tracker", "_resource_tracker", "_pid", "_fd"),
    ("joblib.externals.loky.backend.resource_tracker", "_resource_tracker", "_pid", "_fd"),
)


def _helpers() -> tuple[set[int], set[int]]:
    """Pids and descriptors of what multiprocessing and loky keep for good once they have needed it."""
    pids: set[Any] = set()
    descriptors: set[Any] = set()
    for module, instance, pid, descriptor in _HELPERS:
        helper = getattr(sys.modules.get(module), instance, None)
        pids.add(getattr(helper, pid, None))
        descriptors.add(getattr(helper, descriptor, None))
    return pids - {None}, descriptors - {None}


def _is_tracker(process: psutil.Process) -> bool:
    """Is it the tracker of a tree? It is a child only of who takes in orphans, such as PID 1 of a container."""
    try:
        return process.cmdline()[-4:-2] == ["posix_ipc", "tracker"]
    except psutil.Error:
        return False
