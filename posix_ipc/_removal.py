"""Remove one object that somebody has chosen, tracked or not, if its name still leads to it and nobody uses it."""

from __future__ import annotations

import contextlib
import enum
import errno
import fcntl
import os
import signal
from collections.abc import Callable, Iterator

import posix_ipc
from posix_ipc import _aside, _ext, _journal, _owners
from posix_ipc._aside import KEPT, REMOVED
from posix_ipc._journal import Identity
from posix_ipc._owners import FREE, GONE, LEASED

__all__ = ["GONE", "KEPT", "REMOVED", "UntoldError", "Use", "give_back", "remove"]


class Use(enum.Enum):
    """What keeps an object from being removed."""

    LEASE = "a lease: some process of this package attached to it"
    OPEN = "any descriptor or mapping of it, in any process"
    NONE = "nothing"


class UntoldError(Exception):
    """The kernel does not tell whether an object is open in another process."""


def remove(kind: str, name: str, identity: Identity, uid: int, use: Use) -> str:
    """Remove the object of this identity and owner: REMOVED; GONE, and another may have its name; KEPT, it is in use.

    A file is removed by way of a rename, so that this is certain. A queue cannot be renamed: some microseconds remain
    between the look and the unlink. Raises OSError or Error when this user may not, UntoldError when the kernel does
    not tell whether it is open.
    """
    encoded = os.fsencode(name)
    with _without_interruption():
        if kind == "message_queue":
            return _remove_queue(encoded, identity, uid, use)
        return _remove_file(kind, encoded, identity, uid, use)


def give_back() -> None:
    """Give the names back that were taken by removals of this user which were killed then."""
    for directory in _journal.directories():
        _aside.give_back_leftovers(directory)


def _remove_file(kind: str, name: bytes, identity: Identity, uid: int, use: Use) -> str:
    """Its name is taken only when all has been looked at that can be told before."""
    path = _journal.path_of(kind, name)
    if use is Use.NONE:
        if not _leads_to(path, identity, uid):
            return GONE
        return _take(path, identity, lambda: False)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP):
            return GONE
        raise
    with _journal.closing(descriptor):
        state = _state(descriptor, identity, uid, use)
        if state != FREE:
            return state
        return _take(path, identity, lambda: use is Use.OPEN and _is_awaited(descriptor))


def _take(path: bytes, identity: Identity, kept: Callable[[], bool]) -> str:
    try:
        with _aside.place_of(path) as aside:
            return _aside.remove_by_rename(path, aside, identity, kept)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        return _aside.remove_at_once(path, identity, kept)


def _remove_queue(name: bytes, identity: Identity, uid: int, use: Use) -> str:
    try:
        queue = posix_ipc.MessageQueue(name, write=False)
    except posix_ipc.ExistentialError:
        return GONE
    with contextlib.closing(queue):
        state = _state(queue.mqd, identity, uid, use)
        if state != FREE:
            return state
        with contextlib.suppress(posix_ipc.ExistentialError):
            posix_ipc.unlink_message_queue(name)
        return REMOVED


def _state(descriptor: int, identity: Identity, uid: int, use: Use) -> str:
    """FREE: it is the object, and what would keep it is not there. Nobody gets a lease any more."""
    if not _is_it(_ext._facts(descriptor), identity, uid):
        return GONE
    if use is Use.NONE:
        return FREE
    state = _owners.lock_if_free(descriptor)
    if state == LEASED or (state == FREE and use is Use.OPEN and not _have_alone(descriptor)):
        return KEPT
    return state


def _leads_to(path: bytes, identity: Identity, uid: int) -> bool:
    try:
        return _is_it(_ext._facts_at(path), identity, uid)
    except FileNotFoundError:
        return False


def _is_it(facts: _owners.Facts, identity: Identity, uid: int) -> bool:
    return (facts[:3], facts[4]) == (identity, uid)


def _have_alone(descriptor: int) -> bool:
    """Is there no other descriptor and no mapping of the file, in any process of any user and namespace?

    As long as the answer is yes and the descriptor is open, whoever opens the file waits. fcntl(2), F_SETLEASE
    """
    fcntl.fcntl(descriptor, fcntl.F_SETSIG, signal.SIGURG)  # who opens it meanwhile would else kill us, by SIGIO
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    except BlockingIOError:
        return False
    except OSError as error:  # another user's file without CAP_LEASE, a file system that has no file leases
        raise UntoldError from error
    return True


def _is_awaited(descriptor: int) -> bool:
    """Does somebody wait for a file that this process has alone, or have it since it let go?"""
    return fcntl.fcntl(descriptor, fcntl.F_GETLEASE) != fcntl.F_WRLCK


@contextlib.contextmanager
def _without_interruption() -> Iterator[None]:
    """Put off what ends a process: the object must not be left without its name."""
    ends = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ends)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
