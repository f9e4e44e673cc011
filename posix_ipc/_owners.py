"""The judgement: who owns what, which owner lives, and what may be removed.

`_reaper` removes by it and `leaks` tells by it, so that the two cannot disagree. The kernel says who is alive, never a
pid: a journal belongs to a living process as long as it is locked, and an object is in use as long as somebody has a
lease on it. An object is known by its identity, never by its name alone.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
from collections.abc import Callable, Collection, Iterator
from typing import NamedTuple

import posix_ipc
from posix_ipc import _ext, _journal
from posix_ipc._journal import CLAIM, INTENT, OWNED, Contents, Entry, Identity

Log = Callable[[str], object]


def silent(line: str) -> None:
    pass


SHARED, CLAIMED, PROTECTED, ELSEWHERE, OPEN = "shared", "claimed", "protected", "elsewhere", "open"
"""The fates of an entry of a dead journal: kept for the pickles of a living root; only a claim, so nothing; kept for a
living owner; a queue that can be found only in another IPC namespace; to be removed if nobody leases it."""

FREE, GONE, LEASED, UNREADABLE = "free", "gone", "leased", "unreadable"
"""What a look at the object of an open entry says: nobody leases it; it is not there any more; it is in use; it could
not be opened."""


class File(NamedTuple):
    """A file of a tree of processes."""

    path: str
    token: str
    role: str
    live: bool

    @property
    def is_journal(self) -> bool:
        return self.role == "root" or self.role.startswith("j")


class Records:
    """What all the files of a user, by default the effective one, say at one moment.

    `ending` are tokens whose roots are about to end: they protect nothing any more. Raises OSError when it cannot be
    told who is alive (no descriptor or memory left): nothing is guessed.
    """

    def __init__(self, log: Log = silent, ending: Collection[str] = (), uid: int | None = None) -> None:
        self._log, self._ending, self._uid = log, ending, uid
        self.ipc_namespace = os.stat("/proc/self/ns/ipc").st_ino
        self._of_the_dead: dict[str, tuple[File, Contents]] = {}
        self._others: dict[str, File] = {}
        self._dead_roots: set[str] = set()
        self.look()

    def look(self) -> None:
        """Read anew what may have changed: not the journals of the dead, which nobody takes over, nor other files.

        Whoever has locked an object before has the last word: a record is written down before its lease goes.
        """
        self.blind = False
        """Is there a journal of a living process that cannot be understood? Then nobody knows what that owns."""
        self.journals: list[tuple[File, Contents]] = []
        self.files = list(self._files())
        tokens = {file.token for file in self.files}
        held = {file.token for file in self.files if file.live and file.role in ("root", "proxy")}
        # Nobody holds a file for a root that made nothing itself before its tracker runs, or after that was killed.
        alive = held | {token for token in tokens - held - self._dead_roots if _journal.root_lives(token)}
        self._dead_roots |= tokens - alive
        self.live_roots = alive.difference(self._ending)
        self.live_intents: set[bytes] = set()
        self._protected: set[tuple[int, int]] = set()
        self._kept_anyway: dict[str, set[Identity]] = {}
        for file, contents in self.journals:
            if file.live or file.token in self.live_roots:
                # Without the time of birth, which not every process may know: too much rather than too little.
                self._protected |= {said[:2] for said in contents.identities(only_shared=not file.live)}
            if file.live:
                self.live_intents |= contents.intents()
                # What the root says holds as long as pickles count, what the others say in pickles even when they die.
                by_this = contents.identities(only_shared=file.role != "root")
                self._kept_anyway.setdefault(file.token, set()).update(by_this)
        self._log = silent  # once is enough

    def _files(self) -> Iterator[File]:
        for directory in _journal.directories(self._uid):
            try:
                names = os.listdir(directory)
            except FileNotFoundError:  # wiped just now
                continue
            for match in filter(None, map(_journal.TOKEN_FILE.fullmatch, names)):
                path = f"{directory}/{match[0]}"
                if path in self._of_the_dead:
                    self.journals.append(self._of_the_dead[path])
                    yield self._of_the_dead[path][0]
                    continue
                if path in self._others:
                    yield self._others[path]
                    continue
                file = self._file(path, match["token"], match["role"])
                if file is not None:
                    yield file

    def _file(self, path: str, token: str, role: str) -> File | None:
        file = File(path, token, role, live=False)
        try:
            descriptor = _journal.open_for_look(path, self._uid)
        except OSError as error:
            if not _is_foreign(path, self._uid):
                raise  # then it is not known whether it is locked
            self._log(f"{path}: skipped: {error.strerror}")
            return None
        if descriptor is None:
            if os.path.lexists(path):
                self._log(f"{path}: skipped: not a file of this user")
            return None
        with _journal.closing(descriptor):
            # Who is dead when it is read has written all that he ever will: it is locked by this look until then.
            file = file._replace(live=not _try_shared(descriptor))
            contents = self._understand(file, descriptor) if file.is_journal else None
        if contents is not None:
            self.journals.append((file, contents))
            if not file.live and not contents.is_empty:  # what is empty may be new, and not yet locked
                self._of_the_dead[path] = file, contents
        elif file.is_journal and file.live:
            self.blind = True
        if not file.is_journal and (file.live or role == "tracker"):
            self._others[path] = file  # that a proxy lives protects, so this may be out of date
        return file

    def _understand(self, file: File, descriptor: int) -> Contents | None:
        try:
            contents = _journal.read(descriptor)
            contents.check(file.live)
            return contents
        except _journal.NotAJournalError as error:
            self._log(f"{file.path}: skipped: {error}")
            return None

    def fate(self, file: File, contents: Contents, entry: Entry) -> str:
        """What is to become of an entry of a dead journal."""
        if entry.shared and file.token in self.live_roots:
            if entry.state == CLAIM and entry.identity in self._kept_anyway.get(file.token, ()):
                return CLAIMED
            return SHARED  # a pickle of it may be in flight
        if entry.state == CLAIM:
            return CLAIMED
        if entry.state == OWNED and entry.identity[:2] in self._protected:
            return PROTECTED
        if entry.kind == "message_queue" and contents.ipc_namespace != self.ipc_namespace:
            return ELSEWHERE
        return OPEN


# ---- is it there, and is it free? ----


def may_be_there(entry: Entry) -> bool:
    """False if the name surely leads no more to the object of an entry, in this IPC namespace.

    Looking at a queue cancels the notification that this process may have asked of it.
    """
    try:
        if entry.kind != "message_queue":
            return _journal.leads_to(entry)
        with contextlib.closing(posix_ipc.MessageQueue(entry.name, write=False)) as queue:
            return _is_said_by(_ext._facts(queue.mqd), entry)
    except (posix_ipc.ExistentialError, ValueError):
        return False
    except (posix_ipc.Error, OSError):
        return True


@contextlib.contextmanager
def locked_if_free(entry: Entry, live_intents: Collection[bytes]) -> Iterator[str]:
    """Look at the object of an open entry: FREE, GONE, LEASED or UNREADABLE. While it is FREE, nobody gets a lease.

    Looking at a queue cancels the notification that this process may have asked of it.
    """
    look = _locked_queue(entry, live_intents) if entry.kind == "message_queue" else _locked_file(entry)
    with look as outcome:
        yield outcome


@contextlib.contextmanager
def _locked_file(entry: Entry) -> Iterator[str]:
    path = _journal.path_of(entry.kind, entry.name)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except BlockingIOError:  # a removal has it alone: see F_SETLEASE in fcntl(2)
        yield LEASED
        return
    except OSError as error:
        gone = error.errno in _journal.NO_FILE or _is_foreign(path)
        if not gone and not isinstance(error, PermissionError):
            raise  # no descriptor or memory left: that says nothing of the object
        yield GONE if gone else UNREADABLE
        return
    with _journal.closing(descriptor):
        yield lock_if_free(descriptor) if _is_this(_ext._facts(descriptor), entry.identity) else GONE


@contextlib.contextmanager
def _locked_queue(entry: Entry, live_intents: Collection[bytes]) -> Iterator[str]:
    if b"/" in entry.name[1:]:
        yield GONE  # the kernel refused it after the intent was written down
        return
    try:
        queue = posix_ipc.MessageQueue(entry.name, write=False)
    except (posix_ipc.ExistentialError, ValueError):
        yield GONE
        return
    except posix_ipc.Error:
        yield UNREADABLE
        return
    with contextlib.closing(queue):
        if not _is_said_by(_ext._facts(queue.mqd), entry):
            yield GONE
        elif entry.state == INTENT and entry.name in live_intents:
            yield LEASED
        else:
            yield lock_if_free(queue.mqd)


Facts = tuple[int, int, int, int, int, int, int]


def _is_own(facts: Facts) -> bool:
    return facts[4] == os.geteuid()


def _is_this(facts: Facts, identity: Identity) -> bool:
    return _journal.same_object(facts[:3], identity) and _is_own(facts)


def _is_said_by(facts: Facts, entry: Entry) -> bool:
    """Is this queue that of the entry?"""
    if entry.state != INTENT:
        return _is_this(facts, entry.identity)
    # Whoever makes a tracked queue marks it until its identity is written down.
    return _is_own(facts) and bool(facts[3] & stat.S_ISVTX)


def _is_foreign(path: str | bytes, uid: int | None = None) -> bool:
    """Of another user than this or the effective one, who need not let us open it?"""
    try:
        return os.lstat(path).st_uid != (os.geteuid() if uid is None else uid)
    except FileNotFoundError:
        return False


def _links(facts: Facts) -> int:
    return facts[5]


def lock_if_free(descriptor: int) -> str:
    """FREE: nobody has a lease on it, or gets one any more."""
    if not try_lock(descriptor):
        return LEASED
    return FREE if _links(_ext._facts(descriptor)) else GONE


def _try_shared(descriptor: int) -> bool:
    """A look whether it is locked, which other lookers do not notice."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def try_lock(descriptor: int) -> bool:
    """Take the exclusive lock, which of an object says: nobody has a lease, and nobody gets one any more."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
