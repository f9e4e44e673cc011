"""What the killer sees of a tree: by the names of its objects, from outside."""

from __future__ import annotations

import contextlib
import mmap
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

from stress import outside
from stress.scenario import Context
from stress.scenarios.kill.tree import Plan, queue_names

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
    pid: int
    link: Connection
    page: mmap.mmap
    workers: list[Member] = field(default_factory=list)
    started: int = 0
    kept: dict[str, tuple[int, int]] = field(default_factory=dict)

    def answer(self) -> Any:
        if not self.link.poll(ANSWER_WITHIN):
            raise AssertionError("a root does not answer")
        return self.link.recv()

    def expect(self, wanted: str) -> None:
        answer = self.answer()
        if answer != wanted:
            raise AssertionError(f"a root said {answer!r} instead of {wanted!r}")


class Witness:
    """Looks at the trees of one killer."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self.late = self.measured = 0
        self.acted = 0.0
        """When the killer last did something."""

    def objects_of(self, tree: Tree, worker: Member) -> dict[str, Any]:
        stem = f"{tree.plan.stem}w{worker.number}-"
        queues = {name: outside.queue_exists(name) for name in (f"{stem}pq", f"{stem}sq")}
        return {**outside.files(stem), **queues}

    def check_the_living(self, tree: Tree) -> None:
        """What the root owns is there, and is what it was."""
        now = outside.files(f"{tree.plan.stem}r-")
        lost = {name: identity for name, identity in tree.kept.items() if now.get(name) != identity}
        self._context.check(not lost, f"live objects of a root were destroyed: {lost}")
        queue = f"{tree.plan.stem}r-2"
        self._context.check(outside.queue_exists(queue), f"a live queue of a root was destroyed: {queue}")

    def expect_gone(self, tree: Tree, worker: Member, what: str) -> None:
        stem = f"{tree.plan.stem}w{worker.number}-p"
        self._measure(what, lambda: outside.objects(stem, [f"{stem}q"]))

    def expect_all_gone(self, stem: str, what: str, keep: str = "\0") -> None:
        queues = [name for name in queue_names(stem) if not name.startswith(keep)]
        kept = keep.lstrip("/")

        def look() -> list[str]:
            return [each for each in outside.objects(stem, queues) if not each.removeprefix("sem.").startswith(kept)]

        self._measure(what, look)

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


def wait_until_empty(look: Callable[[], list[Any]]) -> list[Any]:
    """What `look` still finds in the end."""
    deadline = time.monotonic() + GONE_WITHIN
    while (left := look()) and time.monotonic() < deadline:
        time.sleep(0.0005)
    return left
