"""Deliberate faults, one at a time put into the processes of a scenario, to see that the scenario reports it.

A fault is a function that replaces a part of the package by a broken one, in memory. `python -m stress --selftest`
runs them all. A fault must harm nothing outside its run: what it breaks is confined to names with the run's prefix.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Fault:
    """A fault, and how it must be reported."""

    scenario: str
    what: str
    """In one sentence, what is broken."""
    reported: str
    """A part of the violation that the scenario must report."""
    put_in: Callable[[], None]
    duration: float = 10.0
    """Seconds; it ends once the fault is reported."""
    method: str = "fork"
    processes: int = 4


FAULTS: dict[str, Fault] = {}


def fault(scenario: str, reported: str, **how: object) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Make a function a fault, by its name; its docstring says what it breaks."""

    def register(function: Callable[[], None]) -> Callable[[], None]:
        what = (function.__doc__ or "").strip()
        FAULTS[function.__name__.replace("_", "-")] = Fault(scenario, what, reported, function, **how)
        return function

    return register


def put_in(name: str) -> None:
    """Put the fault into this process."""
    FAULTS[name].put_in()


# ---- 5 pickling ----


@fault("pickling", reported="descriptors of a pool's worker grow", method="forkserver", duration=12.0)
def leaked_descriptor() -> None:
    """Every hundredth segment that is unpickled leaves a descriptor behind."""
    from posix_ipc.mp_integration import SharedMemory

    new, made = SharedMemory.__new__, itertools.count(1)

    def leaky(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if next(made) % 100 == 0:
            os.dup(0)
        return new(cls, *args, **kwargs)

    SharedMemory.__new__ = leaky


@fault("pickling", reported="memory of a pool's worker grow", duration=15.0)
def leaked_memory() -> None:
    """Every segment that is unpickled leaves a kilobyte behind."""
    from posix_ipc.mp_integration import SharedMemory

    new, kept = SharedMemory.__new__, []

    def leaky(cls: Any, *args: Any, **kwargs: Any) -> Any:
        kept.append(bytearray(1024))
        return new(cls, *args, **kwargs)

    SharedMemory.__new__ = leaky


@fault("pickling", reported="a tracked object that is gone opened its successor")
def pickle_by_name_alone() -> None:
    """A pickle opens whatever has its name, without a look at the identity."""
    from posix_ipc.mp_integration import Semaphore

    Semaphore.__reduce__ = lambda self: (Semaphore, (self.name,))


@fault("pickling", reported="a plain object that is gone opened its successor")
def plain_pickle_by_name_alone() -> None:
    """A pickle of a plain semaphore opens whatever has its name."""
    import posix_ipc
    from posix_ipc import mp_integration  # noqa: F401 - whose class is made of the whole one

    class Broken(posix_ipc.Semaphore):
        def __reduce__(self) -> tuple[Any, ...]:
            return _open_semaphore, (self.name,)

    posix_ipc.Semaphore = Broken  # type: ignore[misc]


def _open_semaphore(name: str) -> Any:
    import posix_ipc

    return posix_ipc.Semaphore(name)


# ---- 6 kill ----


@fault("kill", reported="left after")
def deaf_tracker() -> None:
    """No tracker is started, so that nobody hears of a death."""
    from posix_ipc import _tracker

    _tracker.ensure = lambda process, executable: None


@fault("kill", reported="live objects of a root were destroyed")
def living_roots_taken_for_dead() -> None:
    """A sweep takes every journal of a root for that of a dead process."""
    _take_for_dead(lambda role: role == "root")


@fault("kill", reported="live objects of a worker were destroyed")
def living_workers_taken_for_dead() -> None:
    """A sweep takes every journal of a worker for that of a dead process."""
    _take_for_dead(lambda role: role.startswith("j"))


def _take_for_dead(is_meant: Callable[[str], bool]) -> None:
    from posix_ipc import _journal, _owners

    try_shared = _owners._try_shared
    stem = os.environ["STRESS_PREFIX"][1:].encode()

    def careless(descriptor: int) -> bool:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        match = _journal.TOKEN_FILE.fullmatch(path.name)
        return try_shared(descriptor) or (match is not None and is_meant(match["role"]) and stem in path.read_bytes())

    _owners._try_shared = careless


@fault("kill", reported="shared objects of a dead worker, whose root lives, were destroyed")
def sharing_forgotten() -> None:
    """A sweep removes what the dead have shared, although their root lives."""
    from posix_ipc import _owners

    fate = _owners.Records.fate
    stem = os.environ["STRESS_PREFIX"].encode()

    def careless(self: Any, file: Any, contents: Any, entry: Any) -> str:
        found = fate(self, file, contents, entry)
        return _owners.OPEN if found == _owners.SHARED and entry.name.startswith(stem) else found

    _owners.Records.fate = careless


@fault("kill", reported="a journal is corrupt")
def scribbled_journal() -> None:
    """Every new journal has nonsense in its last slot, which sweeps pass over."""
    from posix_ipc import _journal

    make, slot_size = _journal.Process._new_journal, 288

    def careless(self: Any, slots: int, first: bool) -> Any:
        journal = make(self, slots, first)
        with open(journal.path, "r+b") as file:
            file.seek(-slot_size, os.SEEK_END)
            file.write(b"\xfe")
        return journal

    _journal.Process._new_journal = careless


# ---- 7 reaper ----


@fault("reaper", reported="a live object was destroyed")
def leases_ignored() -> None:
    """A sweep removes what the dead owned although somebody has a lease on it."""
    from posix_ipc import _owners

    lock = _owners.try_lock
    stem = os.environ["STRESS_PREFIX"][1:]

    def careless(descriptor: int) -> bool:
        return lock(descriptor) or stem in os.readlink(f"/proc/self/fd/{descriptor}")

    _owners.try_lock = careless


@fault("reaper", reported="never reaped")
def blind_reaper() -> None:
    """A sweep finds no file to remove, and no tracker does either. Queues it removes, of which the system has few."""
    from posix_ipc import _reaper, _tracker

    _tracker.ensure = lambda process, executable: None
    finish = _reaper._finish

    def blind(records: Any, batch: list[Any], swept: Any, log: Any) -> set[Any]:
        queues = [item for item in batch if item.entry.kind == "message_queue"]
        return finish(records, queues, swept, log) | {item.file for item in batch if item not in queues}

    _reaper._finish = blind


# ---- 8 reuse ----


@fault("reuse", reported="somebody touched the new")
def swept_by_name_alone() -> None:
    """A sweep unlinks whatever has the name of what the dead owned."""
    from posix_ipc import _journal, _reaper

    finish = _reaper._finish
    stem = os.environ["STRESS_PREFIX"].encode()

    def careless(records: Any, batch: list[Any], swept: Any, log: Any) -> Any:
        for item in batch:
            entry = item.entry
            if entry.kind != "message_queue" and entry.name.startswith(stem):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(_journal.path_of(entry.kind, entry.name))
        return finish(records, batch, swept, log)

    _reaper._finish = careless


from stress import faults_of_calls, faults_of_circumstances  # noqa: E402, F401 - they register theirs by the above
