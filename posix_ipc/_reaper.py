"""Reap: remove what no living process owns, protects or leases. What that is, `_owners` tells."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Collection
from typing import NamedTuple

import posix_ipc
from posix_ipc import _ext, _journal, _owners
from posix_ipc._journal import INTENT, OWNED, Contents, Entry, Identity
from posix_ipc._owners import File, Log, Records, silent


class Removed(NamedTuple):
    """An object that was reaped."""

    kind: str
    name: str
    identity: Identity
    journal: str
    """The file of the dead process that owned it: the first number in its name is the pid of its tree's root."""


class Swept(NamedTuple):
    """What a sweep did, and what it left to another one."""

    removed: list[Removed]
    owed: set[str]
    """Tokens of trees whose dead still own what is in use: when that ends nobody reports it."""


def _all(entry: Entry) -> bool:
    return True


Chosen = Callable[[Entry], bool]


def sweep(log: Log = silent, wait: bool = True, ending: Collection[str] = (), chosen: Chosen = _all) -> Swept:
    """Sweep every directory of this user. Unless `wait`, leave alone one that is being swept.

    `ending` are tokens whose roots are about to end: they protect nothing any more. What is not `chosen` stays, and its
    record. Raises OSError, with nothing removed in that directory, when it cannot be told who is alive (no descriptor
    or memory left): nothing is guessed.
    """
    removed: list[Removed] = []
    owed: set[str] = set()
    for directory in _journal.directories():
        with _SweepLock(directory, wait) as locked:
            if locked:
                swept = _sweep_one(directory, log, ending, chosen)
                removed += swept.removed
                owed |= swept.owed
    return Swept(removed, owed)


def reap(log: Log = silent, wait: bool = True, ending: Collection[str] = (), chosen: Chosen = _all) -> list[Removed]:
    """The same, where only what was removed is of interest."""
    return sweep(log, wait, ending, chosen).removed


PATIENCE = 0.25
"""Seconds that a sweep waits for the one under way, which may be that of a process that was stopped."""


class _SweepLock:
    """As a rule one sweep of a directory at a time: a lock of the directory itself.

    It spares several the same work; a sweep must be right beside another one all the same, since it does not wait for
    ever. A file to lock could not be made when there is no room left, and a sweep is needed most.
    """

    def __init__(self, directory: str, wait: bool) -> None:
        self._directory, self._wait = directory, wait

    def __enter__(self) -> bool:
        self._descriptor = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        deadline, pause = time.monotonic() + PATIENCE, 0.001
        while not _owners.try_lock(self._descriptor):
            if not self._wait or time.monotonic() > deadline:
                return self._wait
            time.sleep(pause)
            pause = min(2 * pause, 0.05)  # a hundred trackers that wait are not to keep the one busy that sweeps
        return True

    def __exit__(self, *exc_info: object) -> None:
        os.close(self._descriptor)


BATCH = 64
"""Objects that are locked at a time, before a last look at who owns them."""


def _sweep_one(directory: str, log: Log, ending: Collection[str], chosen: Chosen) -> Swept:
    """Do what the files of the dead in one directory ask for. What those in the others protect counts too."""
    records = Records(log, ending)
    if records.blind:
        return Swept([], {file.token for file in records.files})
    swept = Swept([], set())
    in_this = f"{directory}/"
    dead = {file for file in records.files if not file.live and file.path.startswith(in_this)}
    for file, contents in list(records.journals):
        if file not in dead:
            continue
        entries = [entry for entry in contents.entries if chosen(entry)]
        done = len(entries) == len(contents.entries)
        for start in range(0, len(entries), BATCH):
            done &= _finish(records, file, contents, entries[start : start + BATCH], swept, log)
        if done:
            remove_if_dead(file.path, contents)
    for file in dead:
        if not file.is_journal and file.token not in records.live_roots:
            remove_if_dead(file.path)
    return swept


def _finish(records: Records, file: File, contents: Contents, batch: list[Entry], swept: Swept, log: Log) -> bool:
    """True: nothing more is to be done for these entries."""
    with contextlib.ExitStack() as locks:
        outcomes = [_look(records, file, contents, entry, locks) for entry in batch]
        if _owners.FREE in outcomes:
            records.look()  # while this sweep was on its way, or stopped, somebody may have become an owner
        for index, entry in enumerate(batch):
            if outcomes[index] == _owners.FREE:
                outcomes[index] = _remove_if_open(records, file, contents, entry)
            if outcomes[index] == REMOVED:
                name = os.fsdecode(entry.name)
                log(f"removed {entry.kind} {name!r}: its owner, recorded in {file.path}, is dead, and nobody uses it")
                swept.removed.append(Removed(entry.kind, name, entry.identity, os.path.basename(file.path)))
    if not _OWED.isdisjoint(outcomes):
        swept.owed.add(file.token)
    return all(outcome in (REMOVED, _owners.GONE, _owners.CLAIMED) for outcome in outcomes)


REMOVED, KEPT = "removed", "kept"
_OWED = {_owners.PROTECTED, _owners.LEASED, KEPT}
"""What will change without a report."""


def _look(records: Records, file: File, contents: Contents, entry: Entry, locks: contextlib.ExitStack) -> str:
    """The fate of an entry, and of an open one what its object says, which is locked if it is free."""
    fate = records.fate(file, contents, entry)
    if fate != _owners.OPEN:
        return fate
    if entry.kind != "message_queue":
        _settle(file, entry)
    outcome = locks.enter_context(_owners.locked_if_free(entry, records.live_intents))
    if outcome == _owners.GONE and entry.kind != "message_queue" and _settle(file, entry):
        return REMOVED  # by another sweep, which may have been killed since it put it aside
    return outcome


def _remove_if_open(records: Records, file: File, contents: Contents, entry: Entry) -> str:
    """Remove an object that is locked, unless somebody owns it by now."""
    fate = records.fate(file, contents, entry)
    if fate != _owners.OPEN:
        return fate
    if records.blind or (entry.state == INTENT and entry.name in records.live_intents):
        return KEPT
    if entry.kind != "message_queue":
        try:
            return remove_by_rename(_journal.path_of(entry.kind, entry.name), _aside(file, entry), entry.identity)
        except OSError:
            return KEPT
    with contextlib.suppress(posix_ipc.ExistentialError):
        posix_ipc.unlink_message_queue(entry.name)
    return REMOVED


def _aside(file: File, entry: Entry) -> bytes:
    return os.fsencode(os.path.dirname(file.path)) + b"/aside-%d-%d-%d" % entry.identity


def _settle(file: File, entry: Entry) -> bool:
    return settle_leftover(_aside(file, entry), _journal.path_of(entry.kind, entry.name), entry.identity)


def remove_by_rename(path: bytes, aside: bytes, identity: Identity, kept: Callable[[], bool] = lambda: False) -> str:
    """Unlink a file, if it is the object: REMOVED, GONE or KEPT. Raises OSError when this user may not.

    Between a check and an unlink the name may become another's; what was renamed can be looked at and given back, also
    when `kept`, which is asked when nobody can reach it by its name any more, says that it is in use.
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


def settle_leftover(aside: bytes, path: bytes, identity: Identity) -> bool:
    """Remove what was renamed aside if it is the object, else give it its name back. True: removed."""
    with contextlib.suppress(FileNotFoundError):  # there is none, or another sweep was quicker
        if _ext._facts_at(aside)[:3] == identity:
            os.unlink(aside)
            return True
        _give_back(aside, path)
    return False


def _give_back(aside: bytes, path: bytes) -> None:
    with contextlib.suppress(FileNotFoundError):  # another sweep was quicker
        try:
            _ext._rename_noreplace(aside, path)
        except FileExistsError:  # taken again, within microseconds: the name is what its owner lost to the third
            os.unlink(aside)


def remove_if_dead(path: str, read: Contents | None = None) -> None:
    """Unlink a file of a dead process, if nobody holds it meanwhile; a journal, if it says what was `read` in it.

    What was empty because it was new may have become that of a process which created something and died since.
    """
    descriptor = _journal.open_for_look(path)
    if descriptor is None:
        return
    with _journal.closing(descriptor), contextlib.suppress(FileNotFoundError, _journal.NotAJournalError):
        # Without a name it is not what the path leads to by now.
        if not _owners.try_lock(descriptor) or not os.fstat(descriptor).st_nlink:
            return
        if read is None or _journal.read(descriptor).says_the_same(read):
            os.unlink(path)


def disown(identity: Identity, except_in: Collection[str] = ()) -> None:
    """Nobody owns the object any more, as far as the journals say but those `except_in`, living and dead ones."""
    for directory in _journal.directories():
        with _SweepLock(directory, wait=True):
            for file, contents in Records().journals:
                if not file.path.startswith(f"{directory}/") or file.path in except_in:
                    continue
                for entry in contents.entries:
                    if entry.state == OWNED and entry.identity == identity:
                        with contextlib.suppress(FileNotFoundError):
                            _ext._strike(file.path, entry.slot, identity)
