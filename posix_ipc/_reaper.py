"""Reap: remove what no living process owns, protects or leases.

The kernel says who is alive, never a pid: a journal belongs to a living process as long as it is locked, and an object
is in use as long as somebody has a lease on it. An object is known by its identity, never by its name alone.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from collections.abc import Callable, Collection
from typing import NamedTuple

import posix_ipc
from posix_ipc import _ext, _journal
from posix_ipc._journal import CLAIM, INTENT, OWNED, Contents, Entry, Identity

Log = Callable[[str], object]


class Removed(NamedTuple):
    """An object that was reaped."""

    kind: str
    name: str
    identity: Identity
    journal: str
    """The file of the dead process that owned it: the first number in its name is the pid of its tree's root."""


def _silent(line: str) -> None:
    pass


class Swept(NamedTuple):
    """What a sweep did, and what it left to another one."""

    removed: list[Removed]
    owed: set[str]
    """Tokens of trees whose dead still own what is in use: when that ends nobody reports it."""


def sweep(log: Log = _silent, wait: bool = True, ending: Collection[str] = ()) -> Swept:
    """Sweep every directory of this user. Unless `wait`, leave alone one that is being swept.

    `ending` are tokens whose roots are about to end: they protect nothing any more. Raises OSError, with nothing
    removed in that directory, when it cannot be told who is alive (no descriptor or memory left): nothing is guessed.
    """
    removed: list[Removed] = []
    owed: set[str] = set()
    for directory in _journal.directories():
        with _SweepLock(directory, wait) as locked:
            if locked:
                sweep_of_one = _Sweep(directory, log, ending)
                removed += sweep_of_one.run()
                owed |= sweep_of_one.owed
    return Swept(removed, owed)


def reap(log: Log = _silent, wait: bool = True, ending: Collection[str] = ()) -> list[Removed]:
    """The same, where only what was removed is of interest."""
    return sweep(log, wait, ending).removed


class _SweepLock:
    """At most one sweep of a directory at a time."""

    def __init__(self, directory: str, wait: bool) -> None:
        self._path, self._wait = f"{directory}/reap.lock", wait

    def __enter__(self) -> bool:
        # For reading, because the end of one for writing would wake every tracker.
        self._descriptor = os.open(self._path, os.O_CREAT | os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | (0 if self._wait else fcntl.LOCK_NB))
        except BlockingIOError:
            return False
        return True

    def __exit__(self, *exc_info: object) -> None:
        os.close(self._descriptor)


class _File(NamedTuple):
    path: str
    token: str
    role: str
    live: bool

    @property
    def is_journal(self) -> bool:
        return self.role == "root" or self.role.startswith("j")


class _Sweep:
    def __init__(self, directory: str, log: Log, ending: Collection[str]) -> None:
        self._directory = directory
        self._log = log
        self._ipc_namespace = os.stat("/proc/self/ns/ipc").st_ino
        files = self._files()
        self._live_roots = {
            file.token
            for file in files
            if (file.live and file.role in ("root", "proxy"))
            # Without a tracker nobody holds the proxy of a root that made nothing itself.
            or (file.role == "proxy" and _journal.root_lives(file.token))
        }.difference(ending)
        self._dead: list[tuple[_File, Contents]] = []
        self._protected: set[Identity] = set()
        self._live_intents: set[bytes] = set()
        for file in files:
            self._take_in(file)
        self._dead_others = [file for file in files if not file.live and not file.is_journal]
        self._removed: list[Removed] = []
        self.owed: set[str] = set()

    def _files(self) -> list[_File]:
        files = []
        for name in os.listdir(self._directory):
            match = _journal.TOKEN_FILE.fullmatch(name)
            if match is None:
                continue
            path = f"{self._directory}/{name}"
            try:
                live = _ext._is_locked(path)
            except OSError as error:
                if error.errno not in _journal.NO_FILE:  # then it is not known whether it is locked
                    raise
                self._log(f"{path}: skipped: {error.strerror}")
                continue
            files.append(_File(path, match["token"], match["role"], live))
        return files

    def _take_in(self, file: _File) -> None:
        if not file.is_journal:
            return
        descriptor = _journal.open_for_look(file.path)
        if descriptor is None:
            if os.path.lexists(file.path):
                self._log(f"{file.path}: skipped: not a file of this user")
            return
        with _journal.closing(descriptor):
            try:
                contents = _journal.read(descriptor)
            except _journal.NotAJournalError as error:
                self._log(f"{file.path}: skipped: {error}")
                return
        if not file.live:
            self._dead.append((file, contents))
            return
        for entry in contents.entries:
            if entry.state == INTENT:
                self._live_intents.add(entry.name)
            else:
                self._protected.add(entry.identity)

    def run(self) -> list[Removed]:
        for file, contents in self._dead:
            kept = [entry for entry in contents.entries if not self._finish(file, contents, entry)]
            if not kept:
                remove_if_dead(file.path)
        for file in self._dead_others:
            if file.role != "proxy" or file.token not in self._live_roots:
                remove_if_dead(file.path)
        return self._removed

    def _finish(self, file: _File, contents: Contents, entry: Entry) -> bool:
        """True: nothing more is to be done for this entry."""
        if entry.shared and file.token in self._live_roots:
            return False  # a pickle of it may be in flight
        if entry.state == CLAIM:
            return True
        if entry.state == OWNED and entry.identity in self._protected:
            self.owed.add(file.token)
            return False
        if entry.kind == "message_queue":
            if contents.ipc_namespace != self._ipc_namespace:
                return False  # only there can it be found
            outcome = self._remove_queue(entry)
        else:
            outcome = self._remove_file(entry)
        if outcome is _REMOVED:
            name = os.fsdecode(entry.name)
            self._log(f"removed {entry.kind} {name!r}: its owner, recorded in {file.path}, is dead, and nobody uses it")
            self._removed.append(Removed(entry.kind, name, entry.identity, os.path.basename(file.path)))
        elif outcome is _KEPT:
            self.owed.add(file.token)
        return outcome is not _KEPT

    def _remove_file(self, entry: Entry) -> str:
        prefix = b"sem." if entry.kind == "semaphore" else b""
        path = os.fsencode(_journal.SHM) + b"/" + prefix + entry.name.lstrip(b"/")
        aside = os.fsencode(self._directory) + b"/aside-%d-%d-%d" % entry.identity
        _settle_leftover(aside, path, entry.identity)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            return _GONE if error.errno in (errno.ENOENT, errno.ELOOP) else _KEPT
        with _journal.closing(descriptor):
            if not _is_this(_ext._facts(descriptor), entry.identity):
                return _GONE
            if not _lock_for_removal(descriptor):
                return _KEPT
            if _links(_ext._facts(descriptor)) == 0:
                return _GONE
            return _remove_by_rename(path, aside, entry.identity)

    def _remove_queue(self, entry: Entry) -> str:
        try:
            queue = posix_ipc.MessageQueue(entry.name, write=False)
        except posix_ipc.ExistentialError:
            return _GONE
        except (posix_ipc.Error, OSError):
            return _KEPT
        with contextlib.closing(queue):
            facts = _ext._facts(queue.mqd)
            if entry.state == INTENT:
                # Whoever makes a tracked queue marks it until its identity is written down.
                ours = _is_own(facts) and bool(facts[3] & stat.S_ISVTX)
                if ours and entry.name in self._live_intents:
                    return _KEPT
            else:
                ours = _is_this(facts, entry.identity)
            if not ours:
                return _GONE
            if not _lock_for_removal(queue.mqd):
                return _KEPT
            if _links(_ext._facts(queue.mqd)) == 0:
                return _GONE
            with contextlib.suppress(posix_ipc.ExistentialError):
                posix_ipc.unlink_message_queue(entry.name)
            return _REMOVED


_REMOVED, _GONE, _KEPT = "removed", "gone", "kept"

Facts = tuple[int, int, int, int, int, int, int]


def _is_own(facts: Facts) -> bool:
    return facts[4] == os.geteuid()


def _is_this(facts: Facts, identity: Identity) -> bool:
    return facts[:3] == identity and _is_own(facts)


def _links(facts: Facts) -> int:
    return facts[5]


def _lock_for_removal(descriptor: int) -> bool:
    """Take the exclusive lock that says: nobody has a lease, and nobody gets one any more."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _remove_by_rename(path: bytes, aside: bytes, identity: Identity) -> str:
    """Between a check and an unlink the name may become another's; what was renamed can be looked at and given back."""
    try:
        _ext._rename_noreplace(path, aside)
    except FileNotFoundError:
        return _GONE
    except OSError:
        return _KEPT
    return _REMOVED if _settle_leftover(aside, path, identity) else _GONE


def _settle_leftover(aside: bytes, path: bytes, identity: Identity) -> bool:
    """Remove what was renamed aside if it is the object, else give it its name back. True: removed."""
    try:
        facts = _ext._facts_at(aside)
    except FileNotFoundError:
        return False
    if facts[:3] == identity:
        os.unlink(aside)
        return True
    try:
        _ext._rename_noreplace(aside, path)
    except FileExistsError:  # taken again, within microseconds: the name is what its owner lost to the third
        os.unlink(aside)
    return False


def remove_if_dead(path: str) -> None:
    """Unlink a file of a dead process, if nobody holds it meanwhile."""
    descriptor = _journal.open_for_look(path)
    if descriptor is None:
        return
    with _journal.closing(descriptor):
        if _lock_for_removal(descriptor):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
