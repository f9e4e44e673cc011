"""Take the name of a file away for an instant, so that it can be looked at again before it is unlinked or gets it back.

Between a check and an unlink a name may become another file's. What was renamed stays what it is.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterator

from posix_ipc import _ext, _journal, _owners
from posix_ipc._journal import Identity

REMOVED, KEPT = "removed", "kept"


def remove_by_rename(path: bytes, aside: bytes, identity: Identity, kept: Callable[[], bool] = lambda: False) -> str:
    """Unlink a file, if it is the object: REMOVED, GONE or KEPT. Raises OSError when this user may not.

    It is given back, also when `kept`, which is asked when nobody can reach it by its name any more, says that it is in
    use.
    """
    try:
        _ext._rename_noreplace(path, aside)
    except FileNotFoundError:
        return _owners.GONE
    try:
        in_use = kept()
    except BaseException:
        _give_back(aside, path)
        raise
    if in_use:
        _give_back(aside, path)
        return KEPT
    return REMOVED if settle_leftover(aside, path, identity) else _owners.GONE


def remove_at_once(path: bytes, identity: Identity, kept: Callable[[], bool]) -> str:
    """The same where no inode is left to put it aside: nobody can make another file of its name there either."""
    try:
        if not _journal.same_object(_ext._facts_at(path)[:3], identity):
            return _owners.GONE
        if kept():
            return KEPT
        os.unlink(path)
    except FileNotFoundError:
        return _owners.GONE
    return REMOVED


def settle_leftover(aside: bytes, path: bytes, identity: Identity) -> bool:
    """Remove what was renamed aside if it is the object, else give it its name back. True: removed."""
    with contextlib.suppress(FileNotFoundError):  # there is none, or another sweep was quicker
        if _journal.same_object(_ext._facts_at(aside)[:3], identity):
            os.unlink(aside)
            return True
        _give_back(aside, path)
    return False


def _give_back(aside: bytes, path: bytes) -> None:
    with contextlib.suppress(FileNotFoundError):  # another sweep was quicker
        try:
            _ext._rename_noreplace(aside, path)
        except FileExistsError:  # taken again: the name is what its owner lost to the third
            os.unlink(aside)


# ---- what no journal tells of ----


@contextlib.contextmanager
def place_of(path: bytes) -> Iterator[bytes]:
    """A path to rename a file to which no journal tells of: that alone tells a sweep which name to give back.

    As long as this is entered, no sweep does. Raises OSError when there is no room for the directory, or a sweep that
    gives something back does not end.
    """
    place = _place(_journal.directory())
    with contextlib.suppress(FileExistsError):
        os.mkdir(place, 0o700)
    with _journal.closing(_open(place)) as descriptor:
        _lock_shared(descriptor)
        yield _in(place, path)


def give_back_leftovers(directory: str) -> None:
    """Give the names back that removals took away which were killed then. Nothing is done while one is at work."""
    place = _place(directory)
    try:
        descriptor = _open(place)
    except FileNotFoundError:  # no removal ever needed it
        return
    with _journal.closing(descriptor):
        names = os.listdir(place)
        if names and _owners.try_lock(descriptor):
            for name in names:
                _give_back(place + b"/" + name, os.fsencode(_journal.SHM) + b"/" + name)


def leftovers(directory: str) -> list[bytes]:
    """The paths of what is aside now: give_back_leftovers() is about those that stay there."""
    place = _place(directory)
    with contextlib.suppress(FileNotFoundError):
        return [place + b"/" + name for name in os.listdir(place)]
    return []


def is_there(directory: str, path: bytes) -> bool:
    """Has a removal that no journal tells of put something of this name aside?"""
    return os.path.lexists(_in(_place(directory), path))


def _place(directory: str) -> bytes:
    return os.fsencode(directory) + b"/aside"


def _in(place: bytes, path: bytes) -> bytes:
    return place + b"/" + os.path.basename(path)


def _open(place: bytes) -> int:
    return os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)


PATIENCE = 0.25
"""Seconds that a removal waits for a sweep which gives something back, and which may have been stopped."""


def _lock_shared(descriptor: int) -> None:
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.001)
