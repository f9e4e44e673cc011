"""Who creates named objects, and where: heard from audit events, in this process and in the children it makes.

A forked child inherits what is traced. One of another start method finds it in its multiprocessing configuration, whose
unpickling begins the tracing there before its target is unpickled and runs. `__main__`, with what it imports, may be
imported before that, under spawn and forkserver: what they create in the child is missed. Children append what they do,
as lines of JSON, to a file of the process that asked.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import multiprocessing.process
import os
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any, NamedTuple

from posix_ipc import _journal

MOST_FRAMES = 8
UNDER_WAY = 1.0
"""Seconds after which a creation that was interrupted, and shows no object, is taken to have failed."""
MOST_BYTES = 16 << 20
"""Children write no more than this, so that one which creates for ever does not fill the disk."""

Frame = tuple[str, int, str]
"""(file, line, function)"""


class Creation(NamedTuple):
    """A call that creates an object, if it does what it is about to do."""

    time: int
    """ns of the monotonic clock, which is the same for all processes"""
    kind: str
    name: str
    pid: int
    thread: int
    process: str
    """the name that multiprocessing knows it by"""
    command: str
    tracked: bool
    frames: tuple[Frame, ...]
    """the calls that led to it, the innermost last; without those of what only drives them"""


class Removal(NamedTuple):
    """A call that unlinks an object, if it does."""

    time: int
    kind: str
    name: str
    identity: tuple[int, int] | None
    """(device, inode) of what the name led to; None for a queue, or nothing"""


class Trace:
    """What this process and its children do from `start` to `stop`.

    `path` is an empty file for the children, which only its user can write to; nobody else writes there.
    """

    def __init__(self, path: str, maker: int) -> None:
        self.path = path
        self._maker = maker
        self._events: list[Creation | Removal] = []
        self._compact_at = 100
        self._compacting = threading.Lock()

    def start(self) -> None:
        _install()
        _active.append(self)
        _tell_children()

    def stop(self) -> None:
        with contextlib.suppress(ValueError):  # it is not on
            _active.remove(self)
        _tell_children()

    def surviving(self) -> list[Creation]:
        """The creations of this trace whose objects exist, the oldest first."""
        return [life[0] for life in _lives([*self._events, *self._read()]) if _survives(life)]

    def is_full(self) -> bool:
        """Has a child had more to say than fits?"""
        try:
            return os.stat(self.path).st_size >= MOST_BYTES
        except OSError:
            return False

    def is_lost(self) -> bool:
        """Has somebody taken away the file of the children?"""
        return not os.path.lexists(self.path)

    def record(self, event: Creation | Removal) -> None:
        if os.getpid() != self._maker:
            self._append(event)
            return
        self._events.append(event)
        if len(self._events) >= self._compact_at:
            self._compact()

    def _compact(self) -> None:
        """Forget what says nothing any more, if nobody is about to.

        Others append meanwhile: threads, and what interrupts this one, handlers of signals and finalizers. None of them
        may wait, and two that replace the front of the list would wipe out what was appended between. A forked child
        does not come here, whoever held the lock.
        """
        if not self._compacting.acquire(blocking=False):
            return
        try:
            count = len(self._events)
            self._events[:count] = _needed(self._events[:count])
            self._compact_at = 100 + 2 * len(self._events)
        finally:
            self._compacting.release()

    def _append(self, event: Creation | Removal) -> None:
        """In a child. An end of the line goes first: what was there before may be torn, by a SIGKILL."""
        line = json.dumps([type(event).__name__, *event])
        flags = os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            descriptor = os.open(self.path, flags)
        except FileNotFoundError:  # the check is over
            with contextlib.suppress(ValueError):
                _active.remove(self)
            return
        except OSError:
            return
        try:
            status = os.fstat(descriptor)
            # After the check is over, somebody else may have taken the name.
            ours = stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid()
            if ours and status.st_size < MOST_BYTES:
                with contextlib.suppress(OSError):
                    os.write(descriptor, f"\n{line}\n".encode())
        finally:
            os.close(descriptor)

    def _read(self) -> list[Creation | Removal]:
        events: list[Creation | Removal] = []
        with contextlib.suppress(OSError), open(self.path, "rb") as file:  # it may be lost
            for line in file:
                with contextlib.suppress(ValueError):  # empty, or torn
                    what, *fields = json.loads(line)
                    events.append(_from_json(what, fields))
        return events


# ---- what exists ----


def file_of(kind: str, name: str) -> str:
    """The path of a semaphore or segment."""
    return os.fsdecode(_journal.path_of(kind, os.fsencode(name)))


def identity_of(path: str) -> tuple[int, int] | None:
    """(device, inode), or None if there is none."""
    try:
        status = os.lstat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def exists(kind: str, name: str) -> bool:
    if kind == "message_queue":
        return _queue_call(name) == errno.EEXIST
    return os.path.lexists(file_of(kind, name))


def may_be_created(kind: str, name: str) -> bool:
    """Is there surely none of that name?"""
    if kind == "message_queue":
        return _queue_call(name) in (errno.EINVAL, errno.ENOSPC)
    return not os.path.lexists(file_of(kind, name))


def _queue_call(name: str) -> int:
    """The errno of creating a queue for no messages, which is always refused: EEXIST if the name is taken.

    Nothing is opened, since closing a queue cancels the notification that this process may have asked for.
    """
    mq_open, attributes, get_errno = _mq_open()
    mq_open(os.fsencode(name), os.O_RDONLY | os.O_CREAT | os.O_EXCL, 0o600, attributes)
    return get_errno()


@functools.cache
def _mq_open() -> tuple[Callable[..., int], Any, Callable[[], int]]:
    import ctypes  # only who creates queues pays for it

    library = ctypes.CDLL(None, use_errno=True)
    library.mq_open.argtypes = [ctypes.c_char_p, ctypes.c_int, ctypes.c_uint, ctypes.c_void_p]
    return library.mq_open, (ctypes.c_long * 8)(), ctypes.get_errno


_Life = tuple[Creation, Removal | None]
"""Of one name the last creation, and what removed that."""


def _lives(events: Iterable[Creation | Removal]) -> list[_Life]:
    """Those of all names, the oldest first."""
    lives: dict[tuple[str, str], _Life] = {}
    for event in sorted(events, key=lambda event: event.time):
        key = event.kind, event.name.lstrip("/")
        if isinstance(event, Creation):
            lives.pop(key, None)
            lives[key] = event, None
        elif key in lives:
            lives[key] = lives[key][0], event
    return list(lives.values())


def _survives(life: _Life) -> bool:
    """Does the object exist, and is it not what somebody made there after its removal?"""
    creation, removal = life
    if not exists(creation.kind, creation.name):
        return False
    if removal is None:
        return True
    # A queue of that name is another: they show no identity.
    return creation.kind != "message_queue" and removal.identity == identity_of(file_of(creation.kind, creation.name))


def _needed(events: list[Creation | Removal]) -> list[Creation | Removal]:
    """The events that may still say that something is left.

    An event comes before its call. So of what was created last by each thread there may be no object yet, nor of what
    the thread was about to create when something interrupted it; and a removed object may still be there.
    """
    last_of_threads = {event.thread: event for event in events if isinstance(event, Creation)}
    long_ago = time.monotonic_ns() - int(UNDER_WAY * 1e9)
    needed: list[Creation | Removal] = []
    for life in _lives(events):
        creation, removal = life
        under_way = removal is None and (creation.time > long_ago or last_of_threads[creation.thread] is creation)
        if under_way or _survives(life):
            needed += filter(None, life)
    return needed


# ---- hearing ----

_active: list[Trace] = []
"""The traces that are on; a forked child has those of its parent."""
_installed = False
_MACHINERY = frozenset({"posix_ipc", "multiprocessing", "concurrent", "threading", "_pytest", "pluggy", "xdist"})
"""Packages whose calls tell nobody where an object was created."""


def _install() -> None:
    global _installed
    if not _installed:
        _installed = True
        sys.addaudithook(_hook)  # for ever: a hook cannot be taken away


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    # An exception of a signal handler goes through, and forbids the operation as if it had come just before.
    if not _active:
        return
    if event == "posix_ipc.create":
        kind, name = arguments
        if may_be_created(kind, name):
            _record(_creation(kind, name))
    elif event == "posix_ipc.unlink":
        kind, name = arguments
        identity = None if kind == "message_queue" else identity_of(file_of(kind, name))
        _record(Removal(time.monotonic_ns(), kind, name, identity))


def _record(event: Creation | Removal) -> None:
    for trace in list(_active):
        trace.record(event)


def _creation(kind: str, name: str) -> Creation:
    frame: FrameType | None = sys._getframe(2)
    assert frame is not None
    tracked = frame.f_globals.get("__name__") == "posix_ipc.mp_integration"
    frames: list[Frame] = []
    while frame is not None and len(frames) < MOST_FRAMES:
        if str(frame.f_globals.get("__name__")).partition(".")[0] not in _MACHINERY:
            frames.append((frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name))
        elif frames:  # from here on outwards it is not the code that creates, but what runs it
            break
        frame = frame.f_back
    process = multiprocessing.process.current_process().name
    command = " ".join(sys.orig_argv)
    return Creation(
        time.monotonic_ns(),
        kind,
        name,
        os.getpid(),
        threading.get_ident(),
        process,
        command,
        tracked,
        tuple(reversed(frames)),
    )


def _from_json(what: str, fields: list[Any]) -> Creation | Removal:
    *simple, last = fields
    if what == "Creation":
        return Creation._make([*simple, tuple((file, line, function) for file, line, function in last)])
    return Removal._make([*simple, last and tuple(last)])


# ---- children ----

_CONFIG_KEY = "posix_ipc_traces"


class _Inherited:
    """What a child finds in its configuration. To unpickle it is to trace."""

    def __init__(self, paths: tuple[str, ...]) -> None:
        self._paths = paths

    def __reduce__(self) -> tuple[Any, ...]:
        return _join, (self._paths,)


def _join(paths: tuple[str, ...]) -> _Inherited:
    """In a child: trace for its ancestors."""
    _install()
    known = {trace.path for trace in _active}
    _active.extend(Trace(path, maker=0) for path in paths if path not in known)
    return _Inherited(paths)


def _tell_children() -> None:
    """Those made from now on."""
    config: dict[str, Any] = multiprocessing.process.current_process()._config  # type: ignore[attr-defined]
    if _active:
        config[_CONFIG_KEY] = _Inherited(tuple(trace.path for trace in _active))
    else:
        config.pop(_CONFIG_KEY, None)
