"""What the killer sees of a tree: by the names of its objects, from outside."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

from stress import outside
from stress.outside import Identity
from stress.scenario import Context
from stress.scenarios.kill.page import DOUBTFUL, EXIT, OWNED, SHARED, SLOTS, Page
from stress.scenarios.kill.tree import QUEUE, Plan

GONE_WITHIN = 10.0
"""Seconds; the guarantees G1 to G4 say 1 s, and the summary says what was measured."""
PROMISED = 1.0
ANSWER_WITHIN = 60.0


@dataclass
class Member:
    """A process that is to be killed, held so that its pid cannot become another's."""

    pid: int
    descriptor: int
    number: int = 0

    def send(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.descriptor, number)

    def has_ended(self, timeout: float = 0.0) -> bool:
        return bool(wait([self.descriptor], timeout))

    def is_stopped(self) -> bool:
        """Wait until it is; False if it has ended."""
        while not self.has_ended():
            if outside.state(self.pid) == "T":
                return True
            time.sleep(0.0002)
        return False


@dataclass
class Tree:
    plan: Plan
    root: Member
    token: str
    """What the names of its journals begin with."""
    link: Connection
    page: Page
    workers: list[Member] = field(default_factory=list)
    started: int = 0
    kept: dict[str, Identity] = field(default_factory=dict)
    """What the root owns until its end."""
    survivors: dict[int, dict[str, Identity]] = field(default_factory=dict)
    """What dead workers have shared, by their numbers: it is there until the root removes it or ends."""

    def answer(self) -> Any:
        if not self.link.poll(ANSWER_WITHIN):
            raise AssertionError("a root does not answer")
        return self.link.recv()

    def expect(self, wanted: str) -> None:
        answer = self.answer()
        if answer != wanted:
            raise AssertionError(f"a root said {answer!r} instead of {wanted!r}")

    def said(self, number: int, *states: int) -> dict[str, Identity]:
        """The objects of a process that are surely in such a state."""
        said = self.page.said(number).items()
        return {self.plan.name(number, slot): identity for slot, (state, identity) in said if state in states}


class Witness:
    """Looks at the trees of one killer."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self.late = self.measured = 0
        self.acted = 0.0
        """When the killer last did something."""

    # ---- what must be there ----

    def check_the_living(self, tree: Tree, *also: Member) -> None:
        """What must be there before and after a look is there, and is what it was; that of another worker too."""
        before = _sure(tree, also)
        there = _there(tree.plan.stem, [name for _, name in before])
        after = _sure(tree, also)
        lost: dict[str, list[str]] = {}
        for each, identity in before.items():
            whose, name = each
            if after.get(each) == identity and there.get(name) != identity:
                lost.setdefault(whose, []).append(f"{name} is {there.get(name)} instead of {identity}")
        for whose, names in lost.items():
            self._context.violated(f"{whose} were destroyed: {', '.join(names)}")
        self._context.tally("looks at what must be there, in objects", len(before))

    def note_kept(self, tree: Tree) -> None:
        """All that a root has made that is busy with nothing else."""
        stem = tree.plan.kept("")
        there = _there(tree.plan.stem, [tree.plan.kept(QUEUE)])
        tree.kept = {name: identity for name, identity in there.items() if name.startswith(stem)}

    def check_kept(self, tree: Tree) -> None:
        """What the root owned, and another program leases."""
        there = _there(tree.plan.stem, tree.kept)
        lost = {name: identity for name, identity in tree.kept.items() if there.get(name) != identity}
        self._context.check(not lost, f"live objects of a root were destroyed: {lost}")

    # ---- what must go ----

    def expect_gone(self, tree: Tree, worker: Member, what: str) -> None:
        """What a dead worker had goes, but what it had shared stays."""
        tree.survivors[worker.number] = tree.said(worker.number, SHARED)
        may_be_there = tree.survivors[worker.number].keys() | tree.said(worker.number, DOUBTFUL).keys()
        self._context.tally("objects shared by dead workers", len(tree.survivors[worker.number]))
        names = {tree.plan.name(worker.number, slot) for slot in range(SLOTS)} - may_be_there
        self._measure(what, lambda: sorted(names & _there(tree.plan.stem, names).keys()))

    def expect_all_gone(self, plan: Plan, what: str, keep: Collection[str] = ()) -> None:
        """All of a tree goes, but some names."""
        self._measure(what, lambda: sorted(_there(plan.stem, plan.all_queues()).keys() - set(keep)))

    def _measure(self, what: str, look: Callable[[], list[str]]) -> None:
        """The time since the last thing the killer did, unless there was nothing to go."""
        if not look():
            self._context.tally("deaths that left nothing to remove")
            return
        left = wait_until_empty(look)
        took = time.monotonic() - self.acted
        self._context.check(not left, f"left after {took:.1f} s ({what}): {left}")
        self._context.took(what, took)
        self.measured += 1
        self.late += took > PROMISED

    # ---- journals ----

    def check_journals(self, tree: Tree) -> None:
        """Of the living and of those who have just died, before a sweep removes them."""
        faults = outside.faults_of_journals(tree.token)
        corrupt = [f"{name}: {fault}" for name, fault in faults.items() if fault]
        self._context.check(not corrupt, f"a journal is corrupt: {corrupt}")
        self._context.tally("journals read right after a death", len(faults))


def _sure(tree: Tree, also: Collection[Member]) -> dict[tuple[str, str], Identity]:
    """What must be there at this instant: {(whose it is, its name): its identity}."""
    found = {("live objects of a root", name): identity for name, identity in tree.kept.items()}
    for worker in (*tree.workers, *also):
        # Who is about to exit removes what it has, but what is shared.
        states = (SHARED,) if tree.page.phase(worker.number) == EXIT else (OWNED, SHARED)
        for name, identity in tree.said(worker.number, *states).items():
            found["live objects of a worker", name] = identity
    for survivors in tree.survivors.values():
        for name, identity in survivors.items():
            found["shared objects of a dead worker, whose root lives,", name] = identity
    return found


def _there(stem: str, names: Collection[str]) -> dict[str, Identity]:
    """What of these is there, and what it is."""
    files = outside.files(stem)
    found = {"/" + name.removeprefix("sem."): identity for name, identity in files.items()}
    for name in names:
        if name not in found and (identity := outside.queue_identity(name)):
            found[name] = identity
    return found


def wait_until_empty(look: Callable[[], list[Any]]) -> list[Any]:
    """What `look` still finds in the end."""
    deadline = time.monotonic() + GONE_WITHIN
    while (left := look()) and time.monotonic() < deadline:
        time.sleep(0.0005)
    return left
