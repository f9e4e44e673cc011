"""Which named objects exist: the files of /dev/shm, and the queues as far as a mount shows them."""

from __future__ import annotations

import contextlib
import os
import re
import stat
import sys
from collections.abc import Collection, Iterable, Iterator
from typing import NamedTuple

from posix_ipc import _aside, _ext, _journal
from posix_ipc._journal import Identity
from posix_ipc._mounts import Mount, mounts

SEMAPHORE_SIZE = 32 if sys.maxsize > 2**32 else 16
"""Of glibc's sem_t, which is the whole file."""

_GLIBC_TEMPORARY = re.compile(rb"/[A-Za-z0-9]{6}")


class FoundFile(NamedTuple):
    """A segment or semaphore."""

    kind: str
    name: bytes
    identity: Identity
    size: int
    allocated: int
    mode: int
    uid: int
    links: int
    path: bytes
    """Where it is: under its name, or aside."""

    @property
    def is_aside(self) -> bool:
        """Has a removal taken its name, and not come to its end?"""
        return self.path != _journal.path_of(self.kind, self.name)

    @property
    def is_our_temporary(self) -> bool:
        """Does it get its name when it is complete? So it is where O_TMPFILE is missing."""
        return self.name.startswith(b"/" + _journal.TEMPORARY.encode())

    @property
    def is_truncated(self) -> bool:
        return self.kind == "semaphore" and self.size < SEMAPHORE_SIZE

    @property
    def may_be_glibc_temporary(self) -> bool:
        """Is its name like those that sem_open(3) leaves when it is killed?"""
        return self.kind == "semaphore" and _GLIBC_TEMPORARY.fullmatch(self.name) is not None

    def still_exists(self) -> bool:
        with contextlib.suppress(OSError):
            return _ext._facts_at(self.path)[:3] == self.identity
        return False

    def value(self) -> int | None:
        """Of a semaphore; None if it cannot be read."""
        if self.kind != "semaphore" or self.is_truncated:
            return None
        try:
            with _reading(self.path) as descriptor:
                if _ext._facts(descriptor)[:3] != self.identity:
                    return None
                word = os.read(descriptor, 8)
        except OSError:
            return None
        return _value_in(word)


def _value_in(word: bytes) -> int:
    """glibc: on 64 bits the count of waiters stands above the value, on 32 bits a flag for waiters below it."""
    if SEMAPHORE_SIZE == 32:
        return int.from_bytes(word, sys.byteorder) & 0xFFFFFFFF
    return int.from_bytes(word[:4], sys.byteorder) >> 1


@contextlib.contextmanager
def _reading(path: bytes) -> Iterator[int]:
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags | os.O_NOATIME)
    except PermissionError:  # not one's own file
        descriptor = os.open(path, flags)
    with _journal.closing(descriptor):
        yield descriptor


def shm_device() -> int:
    return os.stat(_journal.SHM).st_dev


def shm_files() -> Iterator[FoundFile]:
    """The segments and semaphores, told apart by the name and, where that is the name of both, by the size.

    Also those whose name a removal of this user has taken, which may have been killed then.
    """
    shm = os.fsencode(_journal.SHM)
    paths = [shm + b"/" + name for name in os.listdir(shm)]
    for directory in _journal.directories():
        paths += _aside.leftovers(directory)
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            status = os.lstat(path)
            if stat.S_ISREG(status.st_mode):
                yield _found(path, status)


def _found(path: bytes, status: os.stat_result) -> FoundFile:
    *identity, mode, uid, links, size = _ext._facts_at(path)
    kind, name = "shared_memory", b"/" + os.path.basename(path)
    if name.startswith(b"/sem.") and len(name) > 5 and size <= SEMAPHORE_SIZE:
        kind, name = "semaphore", b"/" + name[5:]
    device, inode, born = identity
    return FoundFile(kind, name, (device, inode, born), size, status.st_blocks * 512, mode, uid, links, path)


class QueueMount(NamedTuple):
    """A mount of the mqueue file system, and what it lists."""

    mount: Mount
    queues: dict[bytes, os.stat_result]

    def still_lists(self, name: bytes) -> bool:
        return os.path.lexists(self.mount.point + name)


def queue_mounts() -> list[QueueMount]:
    """Those that can be read. That of another IPC namespace looks like that of this one, see `own_mount`."""
    found: dict[int, QueueMount] = {}
    for mount in mounts():
        if mount.type == b"mqueue" and mount.device not in found and mount.is_seen():
            with contextlib.suppress(OSError):
                found[mount.device] = QueueMount(mount, dict(_queues_in(mount.point)))
    return list(found.values())


def _queues_in(directory: bytes) -> Iterator[tuple[bytes, os.stat_result]]:
    for name in os.listdir(directory):
        with contextlib.suppress(FileNotFoundError):
            yield b"/" + name, os.lstat(directory + b"/" + name)


def own_mount(
    found: Iterable[QueueMount], here: Collection[bytes], asked: Collection[bytes], devices: Collection[int]
) -> QueueMount | None:
    """The mount of this IPC namespace; None if there is none.

    `here` are the queues that there are in this namespace, of those that were asked for by name, and `devices` is where
    those are that could be opened. A mount without queues says nothing against itself.
    """
    for each in found:
        if devices:
            if each.mount.device in devices:
                return each
        elif not any(name in asked and name not in here and each.still_lists(name) for name in each.queues):
            return each
    return None
