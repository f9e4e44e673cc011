"""Scenario 8: a name that is taken by another object while users of the old one act late (G6)."""

from __future__ import annotations

import contextlib
import ctypes
import errno
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
library = ctypes.CDLL(None, use_errno=True)
library.sem_open.restype = ctypes.c_void_p
library.sem_close.argtypes = [ctypes.c_void_p]


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
    """An object under a name that was another's: of a plain handle, or of a program in C, which has ended since.

    Nobody but its maker may touch it.
    """

    kind: int
    handle: Any
    token: bytes
    identity: Any
    after: str = "nothing yet"

    @classmethod
    def make(cls, kind: int, name: str, token: bytes, by_c: bool) -> Successor:
        if by_c:
            make_by_c(kind, name, token)
            handle: Any = (posix_ipc.SharedMemory, posix_ipc.Semaphore, posix_ipc.MessageQueue)[kind](name)
        elif kind == SEGMENT:
            handle = posix_ipc.SharedMemory(name, posix_ipc.O_CREX, size=len(token))
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


def make_by_c(kind: int, name: str, token: bytes) -> None:
    """By the calls of the C library alone, as a program does that knows nothing of this package."""
    flags = os.O_CREAT | os.O_EXCL | os.O_RDWR
    encoded = name.encode()
    if kind == SEGMENT:
        descriptor = checked(library.shm_open(encoded, flags, 0o600))
        os.write(descriptor, token)
        os.close(descriptor)
    elif kind == SEMAPHORE:
        library.sem_close(checked(library.sem_open(encoded, flags, 0o600, 1)))
    else:
        limits = (ctypes.c_long * 8)(0, QUEUE_SIZE["max_messages"], QUEUE_SIZE["max_message_size"])
        descriptor = checked(library.mq_open(encoded, flags, 0o600, limits))
        checked(library.mq_send(descriptor, token, ctypes.c_size_t(len(token)), 0))
        os.close(descriptor)


def checked(result: Any) -> Any:
    """What a call of the C library gives, which is -1 or a null pointer when it fails."""
    if result is None or result == -1:
        number = ctypes.get_errno()
        if number == errno.EEXIST:
            raise posix_ipc.ExistentialError(number, "taken")
        raise OSError(number, os.strerror(number))
    return result


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
    kind, by_c = choose.choice(KINDS), choose.random() < 0.5
    context.tally(f"successors made by {'C' if by_c else 'a plain handle'}")
    name = context.name("queue" if kind == QUEUE else "")
    ours, theirs = multiprocessing.Pipe()
    pid = fork(context, own, kind, name, theirs)
    theirs.close()
    tree = outside.tree_of(pid)
    pickle = ask(ours)
    successor = None
    kills = choose.random() < 0.5
    if kind != QUEUE and choose.random() < 0.4:
        # The owner's death and the new owner of its name at the same instant. Not with queues: their removal cannot be
        # made one with the look that precedes it, and docs/design.md says so.
        doomed_at = time.monotonic() + choose.uniform(0, 0.001)
        if choose.random() < 0.5:
            successor = replace(kind, name, by_c)
        while time.monotonic() < doomed_at:
            pass
        end(context, pid, ours, kills)
        successor = successor or replace(kind, name, by_c)
        successor.after = f"its owner was {'killed' if kills else 'told to end'} in that instant"
    else:
        trackers = stop_trackers(context, tree) if choose.random() < 0.3 else []
        successor = replace(kind, name, by_c)
        acts = choose.sample(LATE, choose.randrange(3))
        for act in acts:
            ours.send(act)
            ask(ours)
            context.tally(f"late: {act}")
        end(context, pid, ours, kills)
        successor.after = f"{', '.join(acts)} and {'death by a signal' if kills else 'the end'} of the old owner"
        if trackers:
            wake(trackers, tree)
            successor.after += ", whose tracker was stopped meanwhile"
    load(context, pickle, successor)
    ours.close()
    return successor


def stop_trackers(context: Context, tree: str) -> list[int]:
    """So that the old owner's tracker hears of its death when the name has long been another's."""
    trackers = outside.trackers(tree)
    for pid in trackers:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
    context.tally("late: tracker", len(trackers))
    return trackers


def wake(trackers: list[int], tree: str) -> None:
    """Have them do what they have missed, to their end."""
    for pid in trackers:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
    deadline = time.monotonic() + ANSWER_WITHIN
    while outside.trackers(tree):
        if time.monotonic() > deadline:
            raise AssertionError("a tracker does not end")
        time.sleep(0.001)


def replace(kind: int, name: str, by_c: bool) -> Successor:
    """Take the name away from the old one, if it still has it, and give it to a new one."""
    unlink = (posix_ipc.unlink_shared_memory, posix_ipc.unlink_semaphore, posix_ipc.unlink_message_queue)[kind]
    deadline = time.monotonic() + ANSWER_WITHIN
    while True:
        with contextlib.suppress(posix_ipc.ExistentialError):
            unlink(name)
        try:
            return Successor.make(kind, name, os.urandom(16), by_c)
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
    faults=(
        "late unlinks, ends, deaths, pickles, sweeps and trackers of the old object, some in the instant of the "
        "succession; successors made by plain handles and by C"
    ),
    unit="successions",
    run=run,
    methods=("fork",),
    full=Full(count=2_000),
)
