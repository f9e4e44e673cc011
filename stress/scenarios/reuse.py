"""Scenario 8: a name that is taken by another object while users of the old one act late (G6)."""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.util
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import posix_ipc
from stress import outside
from stress.forks import fork, wait_for
from stress.scenario import Context, Full, Scenario

KINDS = SEGMENT, SEMAPHORE, QUEUE = range(3)
QUEUE_SIZE = {"max_messages": 1, "max_message_size": 16}
SUCCESSORS = 8
"""Kept for as many rounds, since those of the past act late."""
ANSWER_WITHIN = 60.0
HIDDEN_AT_MOST = 1.0
"""Seconds; for an instant a sweep has a name aside, to look again."""
LANES = 4


def run(context: Context) -> None:
    lanes = max(1, min(LANES, context.processes // 2))
    pids = [fork(context, lane, context, index, lanes) for index in range(lanes)]
    pids.append(fork(context, sweep, context))
    for pid in pids:
        wait_for(context, pid)


def sweep(context: Context) -> None:
    """Beside all of it, and beside the trackers."""
    from posix_ipc import _reaper

    choose = context.random("sweep")
    while context.going() and not os.path.exists(f"{context.directory}/over"):
        _reaper.reap()
        context.tally("sweeps")
        time.sleep(choose.uniform(0, 0.01))


def lane(context: Context, index: int, lanes: int) -> None:
    """Round after round: an owner, a successor under its name, and then the owner and its kind come late."""
    choose = context.random("lane", index)
    successors: list[Successor] = []
    for _ in context.steps(parts=lanes):
        successors.append(play(context, choose))
        for each in successors:
            each.check(context)
        if len(successors) > SUCCESSORS:
            successors.pop(0).end()
        context.done("successions")
    for each in successors:
        each.check(context)
        each.end()
    open(f"{context.directory}/over", "w").close()


# ---- the new one ----


@dataclass
class Successor:
    """A plain object under a name that was another's. Nobody but its maker may touch it."""

    kind: int
    handle: Any
    token: bytes
    identity: Any
    after: str = "nothing yet"

    @classmethod
    def make(cls, kind: int, name: str, token: bytes) -> Successor:
        if kind == SEGMENT:
            handle: Any = posix_ipc.SharedMemory(name, posix_ipc.O_CREX, size=len(token))
            handle.buf[:] = token
        elif kind == SEMAPHORE:
            handle = posix_ipc.Semaphore(name, posix_ipc.O_CREX, initial_value=1)
        else:
            handle = posix_ipc.MessageQueue(name, posix_ipc.O_CREX, **QUEUE_SIZE)
            handle.send(token, 0)
        return cls(kind, handle, token, identity_of(kind, name))

    def check(self, context: Context) -> None:
        deadline = time.monotonic() + HIDDEN_AT_MOST
        while (fault := self._fault()) and time.monotonic() < deadline:
            time.sleep(0.001)
        context.check(not fault, f"somebody touched the new {self.handle!r}, after {self.after}: {fault}")

    def _fault(self) -> str:
        """Empty if the name still leads here, and nothing has changed here."""
        name = self.handle.name
        if self.kind != QUEUE:
            now = identity_of(self.kind, name)
            if now != self.identity:
                return f"its name leads to {now} instead of {self.identity}"
            if self.kind == SEMAPHORE:
                return "" if self.handle.value == 1 else f"its value is {self.handle.value} instead of 1"
            return "" if self.handle.buf == self.token else f"it holds {bytes(self.handle.buf)!r}, not {self.token!r}"
        try:
            with contextlib.closing(posix_ipc.MessageQueue(name)) as queue:
                message = queue.receive(0)[0]
                queue.send(message, 0)
        except posix_ipc.Error as error:
            return repr(error)
        return "" if message == self.token else f"it holds the message {message!r}, not {self.token!r}"

    def end(self) -> None:
        with contextlib.suppress(posix_ipc.ExistentialError):  # reported already
            self.handle.unlink()
        self.handle.close()


def identity_of(kind: int, name: str) -> Any:
    return outside.files(name).get(("sem." if kind == SEMAPHORE else "") + name[1:])


# ---- the old one ----


def own(kind: int, name: str, link: Connection) -> None:
    """Own an object under tracking, pass its pickle on, and act when told, which is too late."""
    from multiprocessing.reduction import ForkingPickler

    from posix_ipc import mp_integration as tracked

    cls = (tracked.SharedMemory, tracked.Semaphore, tracked.MessageQueue)[kind]
    options: dict[str, Any] = ({"size": 16}, {"initial_value": 1}, QUEUE_SIZE)[kind]
    handle: Any = cls(name, posix_ipc.O_CREX, **options)
    link.send(bytes(ForkingPickler.dumps(handle)))
    acts: dict[str, Callable[[], object]] = {
        "unlink": handle.unlink,
        "close": handle.close,
        "close and unlink": lambda: (handle.close(), handle.unlink()),
        "leave": lambda: handle.__exit__(None, None, None),
        "reap": tracked.reap,
        "take ownership": handle.take_ownership,
    }
    while (order := link.recv()) != "end":
        with contextlib.suppress(posix_ipc.ExistentialError):
            acts.get(order, lambda: None)()
        link.send(order)
    multiprocessing.util._exit_function()


LATE = ("unlink", "unlink", "close", "close and unlink", "leave", "reap", "take ownership")


def play(context: Context, choose: random.Random) -> Successor:
    """One succession, with everything that may come late to it."""
    kind = choose.choice(KINDS)
    name = context.name("queue" if kind == QUEUE else "")
    ours, theirs = multiprocessing.Pipe()
    pid = fork(context, own, kind, name, theirs)
    theirs.close()
    pickle = ask(ours)
    successor = None
    kills = choose.random() < 0.5
    if kind != QUEUE and choose.random() < 0.4:
        # The owner's death and the new owner of its name at the same instant. Not with queues: their removal cannot be
        # made one with the look that precedes it, and docs/design.md says so.
        doomed_at = time.monotonic() + choose.uniform(0, 0.001)
        if choose.random() < 0.5:
            successor = replace(kind, name)
        while time.monotonic() < doomed_at:
            pass
        end(context, pid, ours, kills)
        successor = successor or replace(kind, name)
        successor.after = f"its owner was {'killed' if kills else 'told to end'} in that instant"
    else:
        successor = replace(kind, name)
        acts = choose.sample(LATE, choose.randrange(3))
        for act in acts:
            ours.send(act)
            ask(ours)
            context.tally(f"late: {act}")
        end(context, pid, ours, kills)
        successor.after = f"{', '.join(acts)} and {'death by a signal' if kills else 'the end'} of the old owner"
    load(context, pickle, successor)
    ours.close()
    return successor


def replace(kind: int, name: str) -> Successor:
    """Take the name away from the old one, if it still has it, and give it to a new one."""
    unlink = (posix_ipc.unlink_shared_memory, posix_ipc.unlink_semaphore, posix_ipc.unlink_message_queue)[kind]
    deadline = time.monotonic() + ANSWER_WITHIN
    while True:
        with contextlib.suppress(posix_ipc.ExistentialError):
            unlink(name)
        try:
            return Successor.make(kind, name, os.urandom(16))
        except posix_ipc.ExistentialError:  # a sweep had it aside, and put it back
            if time.monotonic() > deadline:
                raise


def ask(link: Connection) -> Any:
    if not link.poll(ANSWER_WITHIN):
        raise AssertionError("an owner does not answer")
    return link.recv()


def end(context: Context, pid: int, link: Connection, kills: bool) -> None:
    if kills:
        os.kill(pid, signal.SIGKILL)
        wait_for(context, pid, signal.SIGKILL)
        context.tally("owners killed")
    else:
        link.send("end")
        wait_for(context, pid)
        context.tally("owners ended")


def load(context: Context, pickle: bytes, successor: Successor) -> None:
    """The pickle of the old one opens nothing. Tried in a process of its own, since that would be tracked."""

    def child() -> None:
        from multiprocessing.reduction import ForkingPickler

        try:
            ForkingPickler.loads(pickle)
        except posix_ipc.ExistentialError as error:
            context.met(error)
        else:
            context.violated(f"the pickle of an object that is gone opened {successor.handle!r}")

    wait_for(context, fork(context, child))


SCENARIO = Scenario(
    number=8,
    name="reuse",
    invariant="Nobody who knew the old object under a name touches the new one.",
    faults="late unlinks, ends, deaths, pickles and sweeps of the old object, some in the instant of the succession",
    unit="successions",
    run=run,
    methods=("fork",),
    full=Full(count=2_000),
)
