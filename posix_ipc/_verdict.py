"""The verdict: live, orphan, unheld or unknown, from what is known of an object."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from posix_ipc import _journal, _owners
from posix_ipc._findings import Holder, Owner
from posix_ipc._journal import Entry

OTHER_NAMESPACES = "processes outside this PID namespace cannot be seen from here"


@dataclass(eq=False)
class Record:
    """An entry of a journal."""

    file: _owners.File
    entry: Entry
    fate: str | None
    """Of an entry of a dead journal, see _owners; None for a living one."""
    uid: int
    """The user whose journal it is in."""
    outcome: str | None = None
    """What a look at the object of an open entry said, see _owners."""

    @property
    def owner(self) -> Owner:
        claim = self.entry.state == _journal.CLAIM
        return Owner(self.file.path, self.root, self.file.live, self.entry.shared, claim)

    @property
    def is_open(self) -> bool:
        return self.fate == _owners.OPEN

    @property
    def root(self) -> int:
        """The pid of the root of its tree."""
        return int(self.file.token.split("-")[0])


class Doubt(NamedTuple):
    """What there is and could not be read, so that nobody can be said to hold nothing."""

    text: str
    uid: int | None
    """Whose objects it is about; None: everybody's."""


class Evidence(NamedTuple):
    """What is known of an object."""

    records: Sequence[Record]
    holders: Sequence[Holder]
    lockers: Collection[int]
    """The pids that locked its file, as far as the kernel tells; not all of them need to be alive."""
    doubts: list[Doubt]
    outside: bool
    """May there be processes that cannot be seen from here?"""
    blind: bool
    """Does reap() remove nothing, since a journal of a living process cannot be understood?"""


def judge(evidence: Evidence) -> tuple[str, str]:
    """The verdict and its reason. An orphan is what reap() removes, so its rules come before what else is seen."""
    return _by_records(evidence) or _by_holders(evidence) or _by_absence(evidence)


def _by_records(evidence: Evidence) -> tuple[str, str] | None:
    records = evidence.records
    for record in records:
        if record.fate is None:
            does = "protects" if record.owner.claim else "owns"
            return "live", f"a living process of the tree of pid {record.root} {does} it{_held(evidence)}"
    for record in records:
        if record.fate == _owners.SHARED:
            return "live", f"a pickle of it may be in flight: pid {record.root}, the root of its tree, lives"
    for record in records:
        dead = f"its owner, of the tree of pid {record.root}, is dead"
        if record.outcome == _owners.FREE and evidence.blind:
            return "unknown", f"{dead}, but another may own it: {_doubted(evidence)}"
        if record.outcome == _owners.FREE:
            return "orphan", f"{dead}, and nobody leases it: reap() removes it{_without_lease(evidence)}"
        if record.outcome == _owners.LEASED:
            return "live", f"{dead}, but it is leased{_held(evidence) or ' by a process that cannot be seen'}"
        if record.outcome == _owners.UNREADABLE:
            return "unknown", f"{dead}, but whether it is leased cannot be told"
    return None


def _by_holders(evidence: Evidence) -> tuple[str, str] | None:
    if evidence.holders:
        return "live", _held(evidence).removeprefix(", ")
    if evidence.lockers:
        return "live", f"its file is locked, by pid {', '.join(map(str, sorted(evidence.lockers)))} or its heirs"
    return None


def _by_absence(evidence: Evidence) -> tuple[str, str]:
    if evidence.doubts:
        return "unknown", f"nobody visible holds it, but {_doubted(evidence)}"
    reason = "not tracked, and no process holds it"
    for record in evidence.records:
        if record.is_open:
            owner = f"of another user's tree of pid {record.root}"
            reason = f"no process holds it, and its owner, {owner}, is dead: that user's reap() removes it"
    return "unheld", f"{reason} ({OTHER_NAMESPACES})" if evidence.outside else reason


def _doubted(evidence: Evidence) -> str:
    return "; ".join(doubt.text for doubt in evidence.doubts)


def _held(evidence: Evidence) -> str:
    return f", held by {_named(evidence.holders)}" if evidence.holders else ""


def _without_lease(evidence: Evidence) -> str:
    """A C program, or a plain handle: it keeps the memory."""
    return f"; {_named(evidence.holders)} keeps what it has open, not the name" if evidence.holders else ""


def _named(holders: Sequence[Holder]) -> str:
    first = ", ".join(f"pid {each.pid}" for each in holders[:_NAMED_AT_MOST])
    return f"{first} and {len(holders) - _NAMED_AT_MOST} more" if len(holders) > _NAMED_AT_MOST else first


_NAMED_AT_MOST = 3
