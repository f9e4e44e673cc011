"""Tracked semaphores, segments and queues: their names go away whatever happens to their processes.

The classes are those of `posix_ipc` with a life that is bounded by the tree of processes that made them. They are
passed to `multiprocessing` processes and pools like any argument. What a process of the tree owns is removed when the
processes that use it have ended, be it by a signal that nothing survives; what somebody still uses is never removed.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import importlib
import logging
import multiprocessing
import multiprocessing.process
import multiprocessing.util
import operator
import os
import threading
import weakref
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import posix_ipc
from posix_ipc import _apart, _ext, _helper, _journal, _reaper, _tracker
from posix_ipc._reaper import Removed

if TYPE_CHECKING:
    from typing_extensions import Self

    from posix_ipc.leaks import (
        Holder,
        IPCObject,
        LeakError,
        Owner,
        Survey,
        find_leaks,
        inventory,
        leak_check,
        survey,
    )

__all__ = [
    "Holder",
    "IPCManager",
    "IPCObject",
    "LeakError",
    "MessageQueue",
    "Owner",
    "Removed",
    "Semaphore",
    "SharedMemory",
    "Survey",
    "find_leaks",
    "inventory",
    "leak_check",
    "reap",
    "survey",
    "track",
    "untrack",
]

_logger = logging.getLogger("posix_ipc")
_logger.addHandler(logging.NullHandler())

_Plain = TypeVar("_Plain", posix_ipc.Semaphore, posix_ipc.SharedMemory, posix_ipc.MessageQueue)


class _Tracked:
    """What the three classes have in common. Each is also a subclass of the plain class of its name."""

    _kind: ClassVar[int]
    _plain: ClassVar[type]

    @property
    def owned(self) -> bool:
        """Does leaving `with`, an IPCManager or the process unlink it? At first in the process that created it."""
        return bool(self._owned)  # type: ignore[attr-defined]

    def take_ownership(self) -> None:
        """Make this process the owner, and nobody else: the object stays when the process that created it ends.

        Raises ExistentialError if the object is gone.
        """
        self._take(shared=True)  # who owned it may have sent it: what is in flight is kept as it was

    def _take(self, shared: bool) -> None:
        was_owned = self.owned
        process = _prepare() if was_owned else self._write_record(own=True, shared=shared)
        struck: list[str] = []
        try:
            if not self._is_there():
                raise _gone(self)
            own = [os.fsdecode(journal.path) for journal in process.journals]
            _reaper.disown(self._identity, except_in=own, struck=struck)  # type: ignore[attr-defined]
        except Exception:
            if not was_owned and not struck:  # whoever was the owner still is, and the next try begins anew
                self._forget()  # type: ignore[attr-defined]
            raise

    def unlink(self) -> None:
        """Remove the name, if it still leads to this object. Final everywhere in the tree, and silent if it was done.

        POSIX.1-2008: sem_unlink(), shm_unlink(), mq_unlink().
        """
        self._unlink()  # type: ignore[attr-defined]

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by name, and have the object kept for whoever loads it, at least as long as this tree's root lives."""
        reduced: tuple[Any, ...] = super().__reduce__()  # type: ignore[assignment]
        tree = _journal.tree_number(_inherited_token())
        if not self._share(tree):  # type: ignore[attr-defined]
            process = self._write_record(own=False, shared=True)
            tree = _journal.tree_number(process.token)  # another one by now, if the root was dead
        return (reduced[0], (*reduced[1], tree), *reduced[2:])

    def __repr__(self) -> str:
        return super().__repr__().replace("posix_ipc.", "posix_ipc.mp_integration.", 1)

    def _is_there(self) -> bool:
        """Does its name still lead to it?"""
        entry = _journal.Entry(_journal.OWNED, _KIND_NAMES[self._kind], False, self._identity, self._encoded())  # type: ignore[attr-defined]
        return _journal.leads_to(entry)

    def _encoded(self) -> bytes:
        name: str | bytes = self.name  # type: ignore[attr-defined]
        return os.fsencode(name)

    def _write_record(self, own: bool, shared: bool) -> _journal.Process:
        process = _prepare()
        while True:
            journals = list(process.journals)
            if any(self._record(journal, self._kind, own, shared) for journal in reversed(journals)):  # type: ignore[attr-defined]
                break
            _add_journal(process, full=len(journals))
        if own:
            _owned[id(self)] = self
        return process

    def _open(
        self, name: str | bytes | None, flags: int | None, mode: int, create: tuple[Any, ...], attach: Any
    ) -> bool:
        """Create, attach, or try one after the other; True if it was created."""
        if flags is None:
            flags = posix_ipc.O_CREX if name is None else 0
        _check_flags(name, flags, mode)
        creates, new = flags & posix_ipc.O_CREAT, flags & os.O_EXCL
        if creates and not new:
            self._create(None, name, mode, *create)  # type: ignore[attr-defined]  # raises what is wrong with them
        while True:
            if not new:  # first, since to attach needs neither room nor a tracker
                try:
                    self._attach(name, mode, *attach)  # type: ignore[attr-defined]
                    return False
                except posix_ipc.ExistentialError as error:
                    if error.errno != errno.ENOENT or not creates:
                        raise
            try:
                self._make(name, mode, create)
                return True
            except posix_ipc.ExistentialError as error:
                if error.errno != errno.EEXIST or (new and name is not None):
                    raise

    def _make(self, name: str | bytes | None, mode: int, arguments: tuple[Any, ...]) -> None:
        process = _journal.ready(_inherited_token())
        if process is None:
            self._create(None, name, mode, *arguments)  # type: ignore[attr-defined]  # raises what is wrong with them
            process = _prepare()
        while True:
            journals = list(process.journals)
            for journal in reversed(journals):
                if self._create(journal, name, mode, *arguments):  # type: ignore[attr-defined]
                    _owned[id(self)] = self
                    return
            _add_journal(process, full=len(journals))


class _Scoped(_Tracked):
    """A tracked handle that `with` closes and, where owned, unlinks."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None = None,
        exc_value: BaseException | None = None,
        traceback: TracebackType | None = None,
        /,
    ) -> None:
        """Close; where owned, unlink before. Never masks an exception of the block."""
        _end(self, masked=exc_value)


class Semaphore(_Tracked, posix_ipc.Semaphore):
    """A tracked semaphore. It starts with no permit unless `initial_value` says otherwise.

    `name` None takes a random name; `flags` is by default `O_CREX` for that, and 0, attach, for a name that is given.
    `with semaphore:` takes a permit and gives it back; for a life bounded by a block see IPCManager.
    If the holder of a permit is killed, nobody gives it back.
    """

    _kind = 0
    _plain = posix_ipc.Semaphore

    def __init__(
        self, name: str | bytes | None = None, flags: int | None = None, mode: int = 0o600, initial_value: int = 0
    ) -> None:
        self._open(name, flags, mode, (initial_value,), ())

    @classmethod
    def create(cls, name: str | bytes | None = None, *, mode: int = 0o600, initial_value: int = 0) -> Self:
        """Create a new one; ExistentialError if the name is taken."""
        return cls(name, posix_ipc.O_CREX, mode, initial_value)

    @classmethod
    def attach(cls, name: str | bytes) -> Self:
        """Open an existing one; ExistentialError if there is none."""
        return cls(_given(name), 0)


class SharedMemory(_Scoped, posix_ipc.SharedMemory):
    """A tracked segment.

    `name` None takes a random name; `flags` is by default `O_CREX` for that, and 0, attach, for a name that is given.
    Attaching never resizes: `size` without O_CREAT is a ValueError, and so is one that is larger than a segment that
    exists already; a smaller one is ignored then.
    """

    _kind = 1
    _plain = posix_ipc.SharedMemory

    def __init__(
        self,
        name: str | bytes | None = None,
        flags: int | None = None,
        mode: int = 0o600,
        size: int = 0,
        read_only: bool = False,
        *,
        reserve: bool = False,
    ) -> None:
        creates = name is None if flags is None else bool(flags & posix_ipc.O_CREAT)
        if size and not creates:
            raise ValueError("size: attaching does not resize; it needs O_CREAT, or None as the name")
        if flags is not None and flags & posix_ipc.O_TRUNC:
            raise ValueError("flags: a tracked segment is never truncated by opening it")
        if reserve and not size:
            raise ValueError("reserve: there is nothing to reserve without a size")
        operator.index(read_only)  # creating makes no use of it
        if read_only and (size or (creates and (flags is None or flags & posix_ipc.O_EXCL))):
            raise ValueError("read_only: nobody could write to a new segment")
        if not self._open(name, flags, mode, (size, reserve), (read_only,)) and size > self.size:
            actual = self.size
            self.close()
            raise ValueError(f"size: {size} is asked, but the segment {self.name!r} exists and has {actual} bytes")

    @classmethod
    def create(
        cls, name: str | bytes | None = None, *, mode: int = 0o600, size: int = 0, reserve: bool = False
    ) -> Self:
        """Create a new one; ExistentialError if the name is taken."""
        return cls(name, posix_ipc.O_CREX, mode, size, reserve=reserve)

    @classmethod
    def attach(cls, name: str | bytes, *, read_only: bool = False) -> Self:
        """Open an existing one; ExistentialError if there is none."""
        return cls(_given(name), 0, read_only=read_only)


class MessageQueue(_Scoped, posix_ipc.MessageQueue):
    """A tracked queue.

    `name` None takes a random name; `flags` is by default `O_CREX` for that, and 0, attach, for a name that is given.
    """

    _kind = 2
    _plain = posix_ipc.MessageQueue

    def __init__(
        self,
        name: str | bytes | None = None,
        flags: int | None = None,
        mode: int = 0o600,
        max_messages: int = posix_ipc.QUEUE_MESSAGES_MAX_DEFAULT,
        max_message_size: int = posix_ipc.QUEUE_MESSAGE_SIZE_MAX_DEFAULT,
        read: bool = True,
        write: bool = True,
    ) -> None:
        block = not (flags or 0) & posix_ipc.O_NONBLOCK
        create = (max_messages, max_message_size, read, write, block)
        self._open(name, flags, mode, create, (read, write, block))

    def _is_there(self) -> bool:
        return self.mqd >= 0 and _ext._facts(self.mqd)[5] > 0

    @classmethod
    def create(
        cls,
        name: str | bytes | None = None,
        *,
        mode: int = 0o600,
        max_messages: int = posix_ipc.QUEUE_MESSAGES_MAX_DEFAULT,
        max_message_size: int = posix_ipc.QUEUE_MESSAGE_SIZE_MAX_DEFAULT,
    ) -> Self:
        """Create a new one; ExistentialError if the name is taken."""
        return cls(name, posix_ipc.O_CREX, mode, max_messages, max_message_size)

    @classmethod
    def attach(cls, name: str | bytes, *, read: bool = True, write: bool = True) -> Self:
        """Open an existing one; ExistentialError if there is none."""
        return cls(_given(name), 0, read=read, write=write)


class IPCManager:
    """A scope: what is made through it is closed and unlinked when its block is left. It starts no process.

    with IPCManager() as ipc:
        segment = ipc.SharedMemory(size=4096)
        mutex = ipc.Semaphore(initial_value=1)
    """

    def __init__(self) -> None:
        self._handles: list[Semaphore | SharedMemory | MessageQueue] = []

    def Semaphore(self, *args: Any, **kwargs: Any) -> Semaphore:
        """A tracked semaphore of this scope; arguments as for the class."""
        self._handles.append(handle := Semaphore(*args, **kwargs))
        return handle

    def SharedMemory(self, *args: Any, **kwargs: Any) -> SharedMemory:
        """A tracked segment of this scope; arguments as for the class."""
        self._handles.append(handle := SharedMemory(*args, **kwargs))
        return handle

    def MessageQueue(self, *args: Any, **kwargs: Any) -> MessageQueue:
        """A tracked queue of this scope; arguments as for the class."""
        self._handles.append(handle := MessageQueue(*args, **kwargs))
        return handle

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None = None,
        exc_value: BaseException | None = None,
        traceback: TracebackType | None = None,
        /,
    ) -> None:
        """Unlink what is owned and close all of it, the last first. Masks no exception of the block but by Ctrl-C."""
        failure = exc_value
        while self._handles:
            try:
                _end(self._handles.pop(), masked=failure)
            except BaseException as error:  # Ctrl-C too: the others must go all the same; it is raised in the end
                failure = error
        if failure is not exc_value and failure is not None:
            raise failure


def track(handle: _Plain) -> Any:
    """Take a plain object that this process made under tracking: a tracked handle on it, owned here.

    The plain handle stays valid. Raises ValueError if the object was not made by this process through this handle: who
    wants what somebody else made attaches to it and says take_ownership(). Raises ExistentialError if its name leads to
    another object by now.
    """
    for cls in (Semaphore, SharedMemory, MessageQueue):
        if isinstance(handle, cls):
            raise ValueError(f"{handle!r} is tracked already")
        if isinstance(handle, cls._plain):
            rebuild, (_, name, identity, mode, options, *_), *_ = handle.__reduce__()
            if not handle._created_here:
                raise ValueError(f"{handle!r}: this process did not create it; attach to it and take_ownership()")
            tracked = rebuild(cls, name, identity, mode, options | _TRACKED)
            tracked._take(shared=False)
            return tracked
    raise TypeError(f"not a handle of this package: {handle!r}")


def untrack(handle: Semaphore | SharedMemory | MessageQueue) -> Any:
    """Let an object that this process owns persist: a plain handle on it. The tracked one stays valid."""
    if not isinstance(handle, _Tracked):
        raise TypeError(f"not a tracked handle: {handle!r}")
    if not handle.owned:
        raise ValueError(f"{handle!r} is not owned by this process")
    if not handle._is_there():
        raise _gone(handle)
    plain_reduce: Any = handle._plain.__reduce__
    rebuild, (_, name, identity, mode, options, *_), *_ = plain_reduce(handle)
    plain = rebuild(handle._plain, name, identity, mode, (options & ~_TRACKED) | _CREATED)
    _reaper.disown(handle._identity)
    return plain


def reap() -> list[Removed]:
    """Sweep now: remove what no living process owns, protects or leases, and tell what that was.

    The tracker of a tree does so by itself; this is for what a tree left whose tracker was killed with it.
    Raises OSError when it cannot be told who is alive (no descriptor or memory left), or after a minute.
    """
    return _reap("by reap()")


def _reap(why: str) -> list[Removed]:
    # In a process of its own, since looking at a queue cancels the notification that this one may have asked of it.
    lines, removed = _helper.ask(_apart.reap)
    _log(why, lines)
    return [Removed(kind, name, tuple(identity), journal) for kind, name, identity, journal in removed]


# ---- names of posix_ipc.leaks, which imports psutil ----

_OF_LEAKS = frozenset(
    {"Holder", "IPCObject", "LeakError", "Owner", "Survey", "find_leaks", "inventory", "leak_check", "survey"}
)


def __getattr__(name: str) -> Any:
    if name not in _OF_LEAKS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("posix_ipc.leaks"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_OF_LEAKS})


# ---- helpers ----

_TRACKED = 16
"""The option of a pickle that makes a handle a leased one; OPTION_TRACKED of ext.h."""
_CREATED = 32
"""The option that makes a handle one through which this process made the object; OPTION_CREATED of ext.h."""
_CONFIG_KEY = "posix_ipc_token"

_KIND_NAMES = ("semaphore", "shared_memory", "message_queue")

_owned: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
"""The handles whose leases must go before this process can remove, at its end, what it owns. By id(), since a subclass
may say for itself what equals what."""


def _gone(handle: Any) -> posix_ipc.ExistentialError:
    error = posix_ipc.ExistentialError(f"{handle!r} has lost its name: it was unlinked")
    error.errno, error.name = errno.ENOENT, handle.name
    return error


def _given(name: str | bytes) -> str | bytes:
    if name is None:
        raise TypeError("attach() needs a name")
    return name


def _check_flags(name: str | bytes | None, flags: int, mode: int) -> None:
    if flags & os.O_EXCL and not flags & os.O_CREAT:
        raise ValueError("flags: O_EXCL means nothing without O_CREAT; O_CREX is both")
    if name is None and not flags & os.O_EXCL:
        raise ValueError("name may be None only with O_CREX (O_CREAT | O_EXCL): that creates a new object")
    if flags & os.O_CREAT and isinstance(mode, int) and not mode & 0o400:
        raise ValueError(f"mode: {mode:#o} keeps its owner from reading it, so nothing could clean it up")


def _end(handle: Any, masked: BaseException | None) -> None:
    """Unlink what is owned, close; a failure is raised unless it would mask another exception."""
    try:
        try:
            if handle.owned:
                handle.unlink()
        finally:
            with contextlib.suppress(posix_ipc.ExistentialError):  # closed already
                handle.close()
    except Exception:
        if masked is None:
            raise
        _logger.warning("cleaning up %r failed", handle, exc_info=True)


def _inherited_token() -> str:
    """The token of the tree that this process was born into. Children find it in their configuration."""
    process = multiprocessing.current_process()
    config: dict[str, Any] = process._config  # type: ignore[attr-defined]
    try:
        token: str = config[_CONFIG_KEY]  # get() would take the dict's lock, which a fork may find held
    except KeyError:
        parent = multiprocessing.parent_process()
        born_into = _journal.token_of(parent.pid) if parent is not None and parent.pid else None
        token = born_into or _journal.own_token()
        config[_CONFIG_KEY] = token
    return token


_locks: dict[int, threading.RLock] = {}
"""By process: one that was forked in C, without the hooks of Python, is not to wait for a thread of its parent."""


def _preparing() -> threading.RLock:
    """For who prepares this process. Re-entrant: a signal handler or a finalizer may create something in its midst."""
    pid = os.getpid()
    lock = _locks.get(pid)
    if lock is None:
        lock = _locks.setdefault(pid, threading.RLock())
        for other in {*_locks} - {pid}:  # an ancestor's, whose pid may be a descendant's one day
            _locks.pop(other, None)
    return lock


def _prepare() -> _journal.Process:
    """This process, ready to own one more object: with a journal, a living root, and a tracker."""
    token = _inherited_token()
    ready = _journal.ready(token)
    if ready is not None:
        return ready
    with _preparing():
        process = _journal.current(token)
        _open_journals(process)
        if not process.tree_lives():
            process.move_to_tree(_journal.own_token())  # daemonised: its root is dead
            multiprocessing.current_process()._config[_CONFIG_KEY] = process.token  # type: ignore[attr-defined]
        _tracker.ensure(process, _helper.interpreter())
        return process


def _open_journals(process: _journal.Process) -> None:
    try:
        process.open_journals()
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        with contextlib.suppress(OSError):  # then there is no more room than before
            _reap("to make room for a creation")  # it may be what the dead have left that fills the file system
        process.open_journals()


def _add_journal(process: _journal.Process, full: int) -> None:
    with _preparing():
        process.add_journal(full)


def _clean_up_at_exit() -> None:
    """Remove what the dead of this tree own, this process among them, and nobody uses.

    What others have left is not for a process whose end somebody may wait for. The tracker does the rest.
    """
    processes = _journal.existing()
    if not processes:
        return
    with contextlib.suppress(RuntimeError):  # a daemon thread still creates; what it makes is the tracker's
        _close(list(_owned.values()))
    tokens = {process.token for process in processes}
    ending = [process.token for process in processes if process.holds_root()]
    for process in processes:
        process.close_journals()
    lines: list[str] = []
    with contextlib.suppress(OSError):
        if tokens & _reaper.sweep(lines.append, wait=False, ending=ending, trees=tokens).owed:
            # Perhaps through other handles of this process: one that attached, or came from a pickle. Nobody keeps a
            # list of these, for attaching is to cost nothing.
            _close(_all_handles())
            _reaper.sweep(lines.append, wait=False, ending=ending, trees=tokens)
    _log("at its end", lines)


def _close(handles: list[Any]) -> None:
    for handle in handles:
        with contextlib.suppress(Exception):
            handle.close()


def _all_handles() -> list[Any]:
    """Of this process, as far as the garbage collector knows them: each refers to its class."""
    return [each for each in gc.get_referrers(*_with_subclasses(_Tracked)) if issubclass(type(each), _Tracked)]


def _with_subclasses(cls: type) -> set[type]:
    return {cls}.union(*map(_with_subclasses, cls.__subclasses__()))


def _log(why: str, lines: list[str]) -> None:
    """After a sweep, not in the midst of it: nobody knows how long a handler takes."""
    for line in dict.fromkeys(lines):  # two sweeps skip the same journal
        _logger.info("process %d, %s: %s", os.getpid(), why, line)


def _register_exit(_: object = None) -> None:
    # After everything else that ends with this process, and after its children.
    multiprocessing.util.Finalize(None, _clean_up_at_exit, exitpriority=-1000)


_register_exit()
multiprocessing.util.register_after_fork(_tracker, _register_exit)  # children forget what their parent registered
_inherited_token()  # so that children made from now on inherit it
