"""The look around: which objects there are, and what speaks for and against each of them."""

from __future__ import annotations

import contextlib
import functools
import os
import pwd
import stat
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from typing import Any

from posix_ipc import _holders, _journal, _objects, _owners, _probe, _verdict
from posix_ipc._findings import Holder, IPCObject, Survey
from posix_ipc._journal import Entry, Identity
from posix_ipc._objects import FoundFile, QueueMount
from posix_ipc._probe import QueueLook
from posix_ipc._verdict import Doubt, Evidence, Record

KINDS = tuple(_journal.KINDS.values())


class Wanted:
    """Which objects are asked for."""

    def __init__(self, kinds: Collection[str] | None, prefix: str | None, queues: Collection[bytes] = ()) -> None:
        """`queues` are names that may be those of queues: without a mount they are not found by looking around."""
        if isinstance(kinds, str):
            raise TypeError(f"kinds: a collection such as {[kinds]!r}, not a string")
        self.kinds = set(KINDS if kinds is None else kinds)
        for kind in self.kinds.difference(KINDS):
            raise ValueError(f"kinds: {kind!r} is none of {', '.join(KINDS)}")
        if prefix is not None and not isinstance(prefix, str):
            raise TypeError(f"prefix: a string, not {prefix!r}")
        self.queues = queues
        self._prefix = b"/" + os.fsencode(prefix or "").removeprefix(b"/")
        if b"/" in self._prefix[1:] or b"\0" in self._prefix:
            raise ValueError(f"prefix: no name begins with {prefix!r}")

    def __call__(self, kind: str, name: bytes) -> bool:
        return kind in self.kinds and name.startswith(self._prefix)


def survey(wanted: Wanted) -> Survey:
    """Look around.

    The objects come first, so that none is younger than what is said of it; the leases come last, when it is known
    which of them matter.
    """
    files = [file for file in _objects.shm_files() if wanted(file.kind, file.name)]
    mounts = _objects.queue_mounts() if "message_queue" in wanted.kinds else []
    names = {os.path.basename(file.path) for file in files} | {name[1:] for mount in mounts for name in mount.queues}
    scan = _holders.scan(_objects.shm_device(), names)
    locks = _holders.locks()
    ledger = _Ledger()
    looks, mount = _ask_helper(wanted, mounts, scan, locks, ledger)
    objects = _Objects(scan, locks, ledger)
    listed = mount.queues if mount else {}
    found = [
        *objects.of_files(files),
        *(objects.of_queue(name, look, listed.get(name)) for name, look in looks.items()),
    ]
    return Survey(
        sorted(found, key=lambda each: (each.kind, each.name)),
        tuple(doubt.text for doubt in objects.doubts),
        tuple(sorted(scan.unread)),
        ledger.failure,
        tuple(_limits(wanted, mount is not None)),
        mount is not None,
    )


def _ask_helper(
    wanted: Wanted,
    mounts: Sequence[QueueMount],
    scan: _holders.Scan,
    locks: Collection[_holders.File],
    ledger: _Ledger,
) -> tuple[dict[bytes, QueueLook | None], QueueMount | None]:
    """Have the queues looked at, and those leases tried that nobody is seen to hold. Also, which mount is ours."""
    to_be_tried = []
    for record in ledger.own_and_open():
        file = record.entry.identity[:2]
        if file in locks or any("lease" in how for how in scan.holders.get(file, {}).values()):
            record.outcome = _owners.LEASED
        elif wanted(record.entry.kind, record.entry.name):
            to_be_tried.append(record)
    mounted = {name for mount in mounts for name in mount.queues}
    names = {*wanted.queues, *mounted, *scan.queue_links, *ledger.queue_names()}
    # One of each mount, wanted or not, to tell that it is not another namespace's.
    asked = {name for name in names if wanted("message_queue", name)}
    asked |= {min(mount.queues) for mount in mounts if mount.queues and asked.isdisjoint(mount.queues)}
    answers = _probe.look(list(asked), [record.entry for record in to_be_tried], ledger.live_intents)
    for record, outcome in zip(to_be_tried, answers.outcomes, strict=True):
        record.outcome = outcome
    if _owners.FREE in answers.outcomes:
        ledger.look_again()
    looks = answers.queues
    if answers.failure is not None:
        ledger.failure = f"queues and leases could not be looked at: {answers.failure}"
        ledger.doubts.append(Doubt(ledger.failure, None))
        looks, asked = dict.fromkeys(mounted), set()
    devices = {look.identity[0] for look in looks.values() if look}
    mount = _objects.own_mount(mounts, looks, asked, devices)
    return {name: look for name, look in looks.items() if wanted("message_queue", name)}, mount


def _limits(wanted: Wanted, all_queues: bool) -> Iterator[str]:
    if not _holders.sees_all_namespaces():
        yield _verdict.OTHER_NAMESPACES
    if not all_queues and "message_queue" in wanted.kinds:
        yield (
            "queues are known only from journals and from descriptors of processes that can be read: "
            "no mqueue file system of this IPC namespace is mounted here"
        )


class _Ledger:
    """What all journals say that can be read."""

    def __init__(self) -> None:
        self.doubts: list[Doubt] = []
        self.failure: str | None = None
        self._records: dict[Identity | bytes, list[Record]] = defaultdict(list)
        self._own = _owners.Records()
        self._take_in(self._own, os.geteuid())
        for uid in _journal.users() - {os.geteuid()}:
            try:
                self._take_in(_owners.Records(uid=uid), uid)
            except OSError as error:  # he may keep others from opening what is his
                text = f"what {user_name(uid)} tracks cannot be told: {error.filename}: {error.strerror}"
                self.doubts.append(Doubt(text, uid))

    @property
    def live_intents(self) -> set[bytes]:
        return self._own.live_intents

    @property
    def blind(self) -> bool:
        """Does reap() remove nothing, since a journal of a living process cannot be understood?"""
        return self._own.blind

    def look_again(self) -> None:
        """At this user's journals, as a sweep does when it has locked what is free.

        Somebody may have become an owner since, or let the object persist, and then closed it.
        """
        open_before = self.own_and_open()
        free: dict[str, list[Record]] = defaultdict(list)
        for each in open_before:
            if each.outcome == _owners.FREE:
                free[each.file.path].append(each)
        for path, records in free.items():
            said = set(_journal.still_said(path, [each.entry for each in records]))
            for each in records:
                each.outcome = _owners.FREE if each.entry in said else _owners.GONE
        outcomes = {(each.file.path, each.entry): each.outcome for each in open_before}
        self._own.look()
        for key, records in self._records.items():
            self._records[key] = [each for each in records if each.uid != os.geteuid()]
        self.doubts = [doubt for doubt in self.doubts if doubt.uid != os.geteuid()]
        self._take_in(self._own, os.geteuid())
        for each in self.own_and_open():
            # Of who has died meanwhile it is not known.
            each.outcome = outcomes.get((each.file.path, each.entry), _owners.UNREADABLE)

    def _take_in(self, records: _owners.Records, uid: int) -> None:
        not_understood = records.blind
        for file, contents in records.journals:
            try:
                entries = _entries(file, contents, uid)
            except _journal.NotAJournalError:
                not_understood = True
                continue
            for entry in entries:
                if entry.kind == "message_queue" and contents.ipc_namespace != records.ipc_namespace:
                    continue  # it can be found only there
                fate = None if file.live else records.fate(file, contents, entry)
                # A queue in the making has no identity yet.
                key = entry.name if entry.state == _journal.INTENT else entry.identity
                self._records[key].append(Record(file, entry, fate, uid))
        if not_understood:
            text = (
                f"a journal of a living process of {user_name(uid)} cannot be understood, so what it owns is not known"
            )
            self.doubts.append(Doubt(text, uid))

    def own_and_open(self) -> list[Record]:
        """What reap() would remove if nobody leases it."""
        return [
            each for records in self._records.values() for each in records if each.is_open and each.uid == os.geteuid()
        ]

    def queue_names(self) -> set[bytes]:
        return {
            record.entry.name
            for records in self._records.values()
            for record in records
            if record.entry.kind == "message_queue" and b"/" not in record.entry.name[1:]  # the kernel refused others
        }

    def of(self, kind: str, name: bytes, identity: Identity | None, uid: int | None) -> list[Record]:
        """The records of an object. What somebody writes about the objects of another user means nothing."""
        records = list(self._records.get(identity, ())) if identity is not None else []
        if kind == "message_queue":
            records += self._records.get(name, ())
        return [record for record in records if record.uid == uid and record.outcome != _owners.GONE]


def _entries(file: _owners.File, contents: _journal.Contents, uid: int) -> list[Entry]:
    """What a journal says. Raises NotAJournalError if it is of a living process and makes no sense, again and again.

    That process may just be writing where it was read.
    """
    for _ in range(_TRIES):
        with contextlib.suppress(_journal.NotAJournalError):
            return contents.entries
        descriptor = _journal.open_for_look(file.path, uid)
        if descriptor is None:
            return []  # it has ended, and was swept
        with _journal.closing(descriptor):
            contents = _journal.read(descriptor)
    return contents.entries


_TRIES = 5


class _Objects:
    """Puts together what is told of each object."""

    def __init__(self, scan: _holders.Scan, locks: dict[_holders.File, set[int]], ledger: _Ledger) -> None:
        self._scan, self._locks, self._ledger = scan, locks, ledger
        self._process = functools.cache(_holders.describe)
        self._user = functools.cache(user_name)
        self._outside = not _holders.sees_all_namespaces()
        self.doubts = [*_doubts_about_processes(scan), *ledger.doubts]

    def of_files(self, files: list[FoundFile]) -> Iterator[IPCObject]:
        for file in files:
            evidence = self._evidence(file.kind, file.name, file.identity, file.uid)
            if file.is_our_temporary and (evidence.holders or evidence.lockers):
                continue  # it gets its name in an instant
            found = IPCObject(
                kind=file.kind,
                name=os.fsdecode(file.name),
                identity=file.identity,
                size=file.size,
                allocated=file.allocated,
                value=file.value(),
                messages=None,
                max_messages=None,
                max_message_size=None,
                mode=stat.S_IMODE(file.mode),
                uid=file.uid,
                owner=self._user(file.uid),
                created=file.identity[2] / 1e9 or None,
                **self._judged(evidence, _peculiarity(file)),
            )
            if file.is_aside:
                found = replace(found, reason=f"{found.reason}; {_ASIDE}")
            if file.still_exists() or (found.verdict == "live" and not file.is_aside):
                yield found

    def of_queue(self, name: bytes, look: QueueLook | None, listed: os.stat_result | None) -> IPCObject:
        """`look` is None if it cannot be opened; `listed` is what the mount says of it, where there is one."""
        status = listed or self._scan.queue_links.get(name)
        identity = look.identity if look else (status.st_dev, status.st_ino, 0) if status else None
        uid = look.uid if look else status.st_uid if status else None
        mode = look.mode if look else status.st_mode if status else None
        evidence = self._evidence("message_queue", name, identity, uid)
        if identity is None:
            evidence.doubts.append(Doubt("this user may not open it, and no mount tells more of it", None))
        return IPCObject(
            kind="message_queue",
            name=os.fsdecode(name),
            identity=identity,
            size=None,
            allocated=None,
            value=None,
            messages=look.messages if look else None,
            max_messages=look.max_messages if look else None,
            max_message_size=look.max_message_size if look else None,
            mode=None if mode is None else stat.S_IMODE(mode),
            uid=uid,
            owner="not known" if uid is None else self._user(uid),
            created=look.created if look else status.st_mtime if status else None,
            **self._judged(evidence, ""),
        )

    def _evidence(self, kind: str, name: bytes, identity: Identity | None, uid: int | None) -> Evidence:
        file = identity[:2] if identity else (-1, -1)
        lockers = self._locks.get(file, set())
        holders = []
        for pid, how in self._scan.holders.get(file, {}).items():
            process = self._process(pid)
            if process is not None:
                how = how | {"lease"} if pid in lockers else how
                holders.append(Holder(pid, process.started, process.command, tuple(sorted(how))))
        records = self._ledger.of(kind, name, identity, uid)
        doubts = [doubt for doubt in self.doubts if doubt.uid in (None, uid)]
        return Evidence(
            records, sorted(holders, key=lambda each: each.pid), lockers, doubts, self._outside, self._ledger.blind
        )

    def _judged(self, evidence: Evidence, peculiarity: str) -> dict[str, Any]:
        verdict, reason = _verdict.judge(evidence)
        return {
            "holders": tuple(evidence.holders),
            "tracked": any(not record.owner.claim for record in evidence.records),
            "owners": tuple(record.owner for record in evidence.records),
            "verdict": verdict,
            "reason": f"{reason}; {peculiarity}" if peculiarity and verdict != "live" else reason,
        }


def _peculiarity(file: FoundFile) -> str:
    if file.is_our_temporary:
        return "left by a creation that was killed before the object had its name"
    if file.is_truncated:
        return f"its file was truncated: no semaphore has {file.size} bytes"
    if file.may_be_glibc_temporary:
        return "named like what glibc leaves when it is killed inside sem_open()"
    return ""


_ASIDE = "a removal that did not come to its end has taken its name: reap() gives that back"


def _doubts_about_processes(scan: _holders.Scan) -> Iterator[Doubt]:
    if _holders.processes_are_hidden():
        yield Doubt("the processes of other users are hidden here (hidepid)", None)
    if not scan.unread:
        return
    first = sorted(scan.unread)[:_NAMED_AT_MOST]
    named = [f"{pid} ({process.command[:40]}, {process.user})" for pid in first if (process := _holders.describe(pid))]
    more = [f"{len(scan.unread) - len(first)} more"] if len(scan.unread) > len(first) else []
    why = " and ".join(sorted({error.strerror or str(error) for error in scan.unread.values()}))
    yield Doubt(f"processes that cannot be read: {', '.join(named + more)}: {why}", None)


_NAMED_AT_MOST = 3


def user_name(uid: int) -> str:
    """The name of a user, or the number of one that has none."""
    try:
        return pwd.getpwuid(uid).pw_name
    except (KeyError, OverflowError):
        return str(uid)
