"""Reap: remove what no living process owns, protects or leases. What that is, `_owners` tells."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Collection
from typing import NamedTuple

import posix_ipc
from posix_ipc import _ext, _journal, _owners
from posix_ipc._journal import Contents, Entry, Identity
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


def sweep(log: Log = silent, wait: bool = True, ending: Collection[str] = ()) -> Swept:
    """Sweep every directory of this user. Unless `wait`, leave alone one that is being swept.

    `ending` are tokens whose roots are about to end: they protect nothing any more. Raises OSError, with nothing
    removed in that directory, when it cannot be told who is alive (no descriptor or memory left): nothing is guessed.
    """
    removed: list[Removed] = []
    owed: set[str] = set()
    for directory in _journal.directories():
        with _SweepLock(directory, wait) as locked:
            if locked:
                swept = _sweep_one(directory, log, ending)
                removed += swept.removed
                owed |= swept.owed
    return Swept(removed, owed)


def reap(log: Log = silent, wait: bool = True, ending: Collection[str] = ()) -> list[Removed]:
    """The same, where only what was removed is of interest."""
    return sweep(log, wait, ending).removed


PATIENCE = 0.25
"""Seconds that a sweep waits for the one under way, which may be that of a process that was stopped."""


class _SweepLock:
    """As a rule one sweep of a directory at a time, for several would only do the same work: a lock of the directory.

    A file for it could not be made when there is no room left, and a sweep would be needed most.
    """

    def __init__(self, directory: str, wait: bool) -> None:
        self._directory, self._wait = directory, wait

    def __enter__(self) -> bool:
        self._descriptor = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        deadline = time.monotonic() + PATIENCE
        while not _owners.try_lock(self._descriptor):
            if not self._wait or time.monotonic() > deadline:
                return self._wait
            time.sleep(0.002)
        return True

    def __exit__(self, *exc_info: object) -> None:
        os.close(self._descriptor)


def _sweep_one(directory: str, log: Log, ending: Collection[str]) -> Swept:
    """Do what the files of the dead in one directory ask for. What those in the others protect counts too."""
    records = Records(log, ending)
    in_this = f"{directory}/"
    swept = Swept([], set())
    for file, contents in records.journals:
        if file.live or not file.path.startswith(in_this):
            continue
        kept = [entry for entry in contents.entries if not _finish(records, file, contents, entry, swept, log)]
        if not kept:
            remove_if_dead(file.path)
    for file in records.files:
        if file.live or file.is_journal or not file.path.startswith(in_this):
            continue
        if file.role != "proxy" or file.token not in records.live_roots:
            remove_if_dead(file.path)
    return swept


def _finish(records: Records, file: File, contents: Contents, entry: Entry, swept: Swept, log: Log) -> bool:
    """True: nothing more is to be done for this entry."""
    fate = records.fate(file, contents, entry)
    if fate != _owners.OPEN:
        if fate == _owners.PROTECTED:
            swept.owed.add(file.token)
        return fate == _owners.CLAIMED
    outcome = _remove(file, entry, records)
    if outcome == _REMOVED:
        name = os.fsdecode(entry.name)
        log(f"removed {entry.kind} {name!r}: its owner, recorded in {file.path}, is dead, and nobody uses it")
        swept.removed.append(Removed(entry.kind, name, entry.identity, os.path.basename(file.path)))
    elif outcome != _owners.GONE:
        swept.owed.add(file.token)
    return outcome in (_REMOVED, _owners.GONE)


_REMOVED, _KEPT = "removed", "kept"


def _remove(file: File, entry: Entry, records: Records) -> str:
    """Remove the object of an open entry if it is there and nobody leases it: _REMOVED, or why not."""
    path = _owners.path_of(entry.kind, entry.name)
    aside = os.fsencode(os.path.dirname(file.path)) + b"/aside-%d-%d-%d" % entry.identity
    if entry.kind != "message_queue":
        _settle_leftover(aside, path, entry.identity)
    with _owners.locked_if_free(entry, records.live_intents) as outcome:
        if outcome != _owners.FREE:
            return outcome
        if entry.kind != "message_queue":
            return _remove_by_rename(path, aside, entry.identity)
        with contextlib.suppress(posix_ipc.ExistentialError):
            posix_ipc.unlink_message_queue(entry.name)
        return _REMOVED


def _remove_by_rename(path: bytes, aside: bytes, identity: Identity) -> str:
    """Between a check and an unlink the name may become another's; what was renamed can be looked at and given back."""
    try:
        _ext._rename_noreplace(path, aside)
    except FileNotFoundError:
        return _owners.GONE
    except OSError:
        return _KEPT
    return _REMOVED if _settle_leftover(aside, path, identity) else _owners.GONE


def _settle_leftover(aside: bytes, path: bytes, identity: Identity) -> bool:
    """Remove what was renamed aside if it is the object, else give it its name back. True: removed."""
    try:
        facts = _ext._facts_at(aside)
    except FileNotFoundError:
        return False
    with contextlib.suppress(FileNotFoundError):  # another sweep was quicker
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
        if _owners.try_lock(descriptor):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
