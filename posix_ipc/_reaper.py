"""Reap: remove what no living process owns, protects or leases. What that is, `_owners` tells."""

from __future__ import annotations

import contextlib
import itertools
import os
import resource
import stat
import time
from collections.abc import Callable, Collection
from typing import NamedTuple

import posix_ipc
from posix_ipc import _aside, _ext, _journal, _owners
from posix_ipc._aside import KEPT, REMOVED
from posix_ipc._journal import INTENT, Contents, Entry, Identity
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
    blind: bool = False
    """Was nothing removed, or not all, since a journal of a living process cannot be understood?"""


def _all(entry: Entry) -> bool:
    return True


Chosen = Callable[[Entry], bool]


def sweep(
    log: Log = silent,
    wait: bool = True,
    ending: Collection[str] = (),
    chosen: Chosen = _all,
    trees: Collection[str] | None = None,
) -> Swept:
    """Sweep every directory of this user. Unless `wait`, wait but shortly for another sweep that is under way.

    `ending` are tokens whose roots are about to end: they protect nothing any more. What is not `chosen` stays, and its
    record; so does what the dead of other `trees` own, if their tokens are given. Raises OSError, with nothing removed
    in that directory, when it cannot be told who is alive (no descriptor or memory left): nothing is guessed.
    """
    removed: list[Removed] = []
    owed: set[str] = set()
    blind = False
    for directory in _journal.directories():
        with _SweepLock(directory, wait):
            swept = _sweep_one(directory, log, ending, chosen, trees)
            removed += swept.removed
            owed |= swept.owed
            blind |= swept.blind
    if trees is None:
        _remove_temporaries(log)
    return Swept(removed, owed, blind)


def reap(log: Log = silent, wait: bool = True, ending: Collection[str] = (), chosen: Chosen = _all) -> list[Removed]:
    """The same, where only what was removed is of interest."""
    return sweep(log, wait, ending, chosen).removed


PATIENCE = 0.25
"""Seconds that a sweep waits for the one under way, which may be that of a process that was stopped."""
HASTE = 0.01
"""The same for one that must not wait, since its process is ending."""


class _SweepLock:
    """As a rule one sweep of a directory at a time: a lock of the directory itself.

    It spares several the same work; a sweep must be right beside another one all the same, since it does not wait for
    ever. A file to lock could not be made when there is no room left, and a sweep is needed most.
    """

    def __init__(self, directory: str, wait: bool) -> None:
        self._directory, self._wait = directory, wait

    def __enter__(self) -> None:
        self._descriptor = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        deadline, pause = time.monotonic() + (PATIENCE if self._wait else HASTE), 0.001
        while not _owners.try_lock(self._descriptor) and time.monotonic() < deadline:
            time.sleep(pause)
            pause = min(2 * pause, 0.05)  # a hundred trackers that wait are not to keep the one busy that sweeps

    def __exit__(self, *exc_info: object) -> None:
        os.close(self._descriptor)


MOST_LOCKED = 256
"""Objects that are locked at a time, before a last look at who owns them: each holds a descriptor."""


def _batch_size() -> int:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return max(1, min(MOST_LOCKED, limit // 4 if limit != resource.RLIM_INFINITY else MOST_LOCKED))


class _Item(NamedTuple):
    """What a dead process has written down."""

    file: File
    contents: Contents
    entry: Entry


def _sweep_one(
    directory: str, log: Log, ending: Collection[str], chosen: Chosen, trees: Collection[str] | None
) -> Swept:
    """Do what the files of the dead in one directory ask for. What those in the others protect counts too."""
    _aside.give_back_leftovers(directory)
    records = Records(log, ending)
    if records.blind:
        return Swept([], {file.token for file in records.files}, blind=True)
    swept = Swept([], set())
    in_this = f"{directory}/"
    dead = {file for file in records.files if not file.live and file.path.startswith(in_this)}
    if trees is not None:
        dead = {file for file in dead if file.token in trees}
    journals = [each for each in records.journals if each[0] in dead]
    items = [_Item(file, contents, entry) for file, contents in journals for entry in contents.entries]
    kept = {item.file for item in items if not chosen(item.entry)}
    items = [item for item in items if chosen(item.entry)]
    size = _batch_size()
    for start in range(0, len(items), size):
        kept |= _finish(records, items[start : start + size], swept, log)
    for file, contents in journals:
        if file not in kept:
            remove_if_dead(file.path, contents)
    for file in dead:
        if not file.is_journal and file.token not in records.live_roots:
            remove_if_dead(file.path)
    return swept._replace(blind=records.blind)


def _finish(records: Records, batch: list[_Item], swept: Swept, log: Log) -> set[File]:
    """The journals that have to stay, because something is still to be done for one of these."""
    kept = set()
    with contextlib.ExitStack() as locks:
        outcomes = [_look(records, item, locks) for item in batch]
        # While this sweep was on its way, or stopped, somebody may have become an owner, or then let it persist. He who
        # takes an object writes his record before he strikes out the others, so look in this order.
        free = [item for item, outcome in zip(batch, outcomes, strict=True) if outcome == _owners.FREE]
        if free:
            records.look()
        said = _still_said(free)
        for item, outcome in zip(batch, outcomes, strict=True):
            if outcome == _owners.FREE:
                outcome = _remove_if_open(records, item) if item in said else KEPT
            if outcome == REMOVED:
                _tell(item, swept, log)
            if outcome in _OWED:
                swept.owed.add(item.file.token)
            if outcome not in (REMOVED, _owners.GONE, _owners.CLAIMED):
                kept.add(item.file)
    return kept


def _still_said(items: list[_Item]) -> set[_Item]:
    said = set()
    for path, group in itertools.groupby(items, key=lambda item: item.file.path):
        of_one = list(group)
        entries = set(_journal.still_said(path, [item.entry for item in of_one]))
        said |= {item for item in of_one if item.entry in entries}
    return said


def _tell(item: _Item, swept: Swept, log: Log) -> None:
    entry, path = item.entry, item.file.path
    name = os.fsdecode(entry.name)
    log(f"removed {entry.kind} {name!r}: its owner, recorded in {path}, has ended, and nobody uses it")
    swept.removed.append(Removed(entry.kind, name, entry.identity, os.path.basename(path)))


_OWED = {_owners.PROTECTED, _owners.LEASED, KEPT}
"""What will change without a report."""


def _look(records: Records, item: _Item, locks: contextlib.ExitStack) -> str:
    """The fate of an entry, and of an open one what its object says, which is locked if it is free."""
    fate = records.fate(*item)
    if fate == _owners.SHARED and _is_gone(records, item):
        return _owners.GONE  # else the journals of a pool's workers, each of which sent one object, would pile up
    if fate != _owners.OPEN:
        return fate
    is_file = item.entry.kind != "message_queue"
    if is_file:
        _settle(item)
    outcome = locks.enter_context(_owners.locked_if_free(item.entry, records.live_intents))
    if outcome == _owners.GONE and is_file:
        if _settle(item):
            return REMOVED  # by another sweep, which may have been killed since it put it aside
        if _is_put_aside(item):
            return KEPT  # by a removal, which may have to give it back
    return outcome


def _is_gone(records: Records, item: _Item) -> bool:
    """Has an object that is kept been unlinked by somebody, rather than put aside to look whether it is used?"""
    entry = item.entry
    if entry.kind == "message_queue":
        return item.contents.ipc_namespace == records.ipc_namespace and not _owners.may_be_there(entry)
    return not (_owners.may_be_there(entry) or _is_put_aside(item) or _owners.may_be_there(entry))


def _remove_if_open(records: Records, item: _Item) -> str:
    """Remove an object that is locked, unless somebody owns it by now."""
    fate = records.fate(*item)
    if fate != _owners.OPEN:
        return fate
    entry = item.entry
    if records.blind or (entry.state == INTENT and entry.name in records.live_intents):
        return KEPT
    if entry.kind != "message_queue":
        try:
            return _aside.remove_by_rename(_path(item), _path_aside(item), entry.identity)
        except OSError:
            return KEPT
    if not _owners.may_be_there(entry):  # somebody removed it since the first look, and its name may be another's
        return _owners.GONE
    try:
        posix_ipc.unlink_message_queue(entry.name)
    except posix_ipc.ExistentialError:
        return _owners.GONE
    except posix_ipc.Error:
        return KEPT
    return REMOVED


def _path_aside(item: _Item) -> bytes:
    return os.fsencode(os.path.dirname(item.file.path)) + b"/aside-%d-%d-%d" % item.entry.identity


def _settle(item: _Item) -> bool:
    return _aside.settle_leftover(_path_aside(item), _path(item), item.entry.identity)


def _is_put_aside(item: _Item) -> bool:
    """By a sweep, or by a removal that somebody asked for?"""
    directory = os.path.dirname(item.file.path)
    return os.path.lexists(_path_aside(item)) or _aside.is_there(directory, _path(item))


def _path(item: _Item) -> bytes:
    return _journal.path_of(item.entry.kind, item.entry.name)


def _remove_temporaries(log: Log) -> None:
    """Remove what nobody will ever give its name; its maker would hold a lock of it. See shm_file.c."""
    for path in _journal.temporaries():
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:  # gone, not ours, or no descriptor left: the next sweep will see
            continue
        with _journal.closing(descriptor), contextlib.suppress(FileNotFoundError):
            status = os.fstat(descriptor)
            if stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid() and _owners.try_lock(descriptor):
                os.unlink(path)
                log(f"removed {path}: its creation was killed before the object had its name")


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


def disown(identity: Identity, except_in: Collection[str] = (), struck: list[str] | None = None) -> None:
    """Nobody owns the object any more, as far as the journals say but those `except_in`, living and dead ones.

    `struck` receives the journals in which something was struck out, also when this fails half way.
    """
    struck = [] if struck is None else struck
    while not all(_disown_in(directory, identity, except_in, struck) for directory in _journal.directories()):
        pass  # a record was no longer where it was read: its owner has moved it, so look again


def _disown_in(directory: str, identity: Identity, except_in: Collection[str], struck: list[str]) -> bool:
    """Could everything that was found be struck out?"""
    found = done = 0
    with _SweepLock(directory, wait=True):
        for file, contents in Records().journals:
            if not file.path.startswith(f"{directory}/") or file.path in except_in:
                continue
            for slot, said in contents.slots_of(identity):
                found += 1
                with contextlib.suppress(FileNotFoundError):
                    if _ext._strike(file.path, slot, said):
                        struck.append(file.path)
                        done += 1
    return found == done
