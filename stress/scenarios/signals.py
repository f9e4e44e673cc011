"""Scenario 9: waits in a storm of signals."""

from __future__ import annotations

import json
import os
import random
import signal
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import posix_ipc
from stress.scenario import Context, Full, Scenario

QUEUE = {"max_messages": 1, "max_message_size": 8}
TIMEOUTS = (0.1, 0.2)
SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM, signal.SIGWINCH)
EARLY = 0.0005
"""Seconds; two clocks are read one after the other."""
LATE = 0.02
"""Of a timeout."""
ENOUGH = 4
"""Waits of one kind in a worker for a median."""
ENOUGH_IN_ALL = 20.0
"""Seconds of waits for a total: a busy machine holds up a few of them for long."""
AT_MOST = 5.0
"""Seconds that a wait that should have ended may take longer; more is no wait of a busy machine."""


def run(context: Context) -> None:
    workers = [context.start(work, index) for index in range(context.processes)]
    storm(context, workers)
    context.join(*workers)
    check_totals(context)


def storm(context: Context, workers: list[Any]) -> None:
    """Hundreds of signals a second to each, at random."""
    choose = context.random("storm")
    descriptors = [os.pidfd_open(worker.pid) for worker in workers]
    ready = [f"{context.directory}/{index}" for index in range(len(workers))]  # handlers stand
    while any(worker.is_alive() for worker in workers):
        for descriptor, path in zip(descriptors, ready, strict=True):
            if os.path.exists(path):
                try:
                    signal.pidfd_send_signal(descriptor, choose.choice(SIGNALS))
                except ProcessLookupError:
                    continue
                context.tally("signals sent")
        time.sleep(choose.uniform(0, 0.006))
    for descriptor in descriptors:
        os.close(descriptor)


def check_totals(context: Context) -> None:
    """All waits to a deadline together took what was asked for; the sleep() beside each says what is possible."""
    totals: Counter[str] = Counter()
    for path in Path(context.directory).glob("*.times"):
        totals.update(json.loads(path.read_text()))
    asked = totals["asked"]
    if not asked:
        return
    late, of_sleep = totals["took"] / asked - 1, totals["slept"] / asked - 1
    text = f"all waits to a deadline took {totals['took']:.2f} s instead of {asked:.2f} s, {late:.2%} more"
    text += f"; as many times of sleep() {of_sleep:.2%} more"
    context.note(text)
    context.check(asked < ENOUGH_IN_ALL or late <= LATE + of_sleep, f"too late in all: {text}")


class Interrupted(Exception):
    """Raised by a handler, as the handler of Ctrl-C does."""


def work(context: Context, index: int) -> None:
    """One wait after the other, of every kind, and beside each kind a sleep() of the system to compare with."""
    patience = Patience(context, context.random("work", index))
    path = f"{context.directory}/{index}"
    open(path, "w").close()
    steps = (patience.wait_in_vain, patience.wait_in_vain, patience.wait_for_something, patience.be_interrupted)
    for step in context.steps(parts=context.processes):
        steps[step % len(steps)]()
        context.done("waits")
    os.unlink(path)
    patience.end()
    Path(f"{path}.times").write_text(json.dumps(patience.times))


class Patience:
    """Waits on a semaphore that has no permit, an empty queue and a full one, all of them its own."""

    def __init__(self, context: Context, choose: random.Random) -> None:
        self._context, self._choose = context, choose
        self._raises = False
        self.times = {"asked": 0.0, "took": 0.0, "slept": 0.0}
        """Of all waits in vain, and of the sleep() beside each of them."""
        self._lateness: dict[str, list[float]] = {}
        self._of_sleep: list[float] = []
        for number in SIGNALS:
            signal.signal(number, self._handle)
        self._semaphore = posix_ipc.Semaphore(context.name(), posix_ipc.O_CREX)
        self._empty = posix_ipc.MessageQueue(context.name("queue"), posix_ipc.O_CREX, **QUEUE)
        self._full = posix_ipc.MessageQueue(context.name("queue"), posix_ipc.O_CREX, **QUEUE)
        self._full.send(b"full", 0)
        self._ways: list[tuple[str, Callable[[float], object], Callable[[], object]]] = [
            ("acquire", self._semaphore.acquire, self._semaphore.release),
            ("receive", self._empty.receive, lambda: self._empty.send(b"x", 0)),
            ("receive_into", self._receive_into, lambda: self._empty.send(b"x", 0)),
            ("send", lambda timeout: self._full.send(b"full", timeout), lambda: self._full.receive(0)),
        ]

    def _receive_into(self, timeout: float) -> object:
        return self._empty.receive_into(bytearray(8), timeout)

    def _handle(self, number: int, frame: object) -> None:
        if self._raises:
            self._raises = False
            raise Interrupted

    # ---- three ways for a wait to end ----

    def wait_in_vain(self) -> None:
        """To the deadline, going on after every signal, as the documentation says how."""
        what, wait, _ = self._choose.choice(self._ways)
        timeout = self._choose.choice(TIMEOUTS)
        began = time.monotonic()
        outcome = self._wait(wait, began + timeout)
        late = time.monotonic() - began - timeout
        self._context.check(outcome is None, f"{what}({timeout}) in vain ended with {outcome!r} instead of BusyError")
        self._context.check(late > -EARLY, f"{what}({timeout}) gave up {-late:.4f} s too early")
        self._context.check(late < AT_MOST, f"{what}({timeout}) took {late:.3f} s too long")
        self._lateness.setdefault(what, []).append(late / timeout)
        self._context.took(f"{what} beyond its deadline", max(0.0, late))
        began = time.monotonic()
        time.sleep(timeout)
        slept = time.monotonic() - began
        self._of_sleep.append(slept / timeout - 1)
        for each, seconds in (("asked", timeout), ("took", timeout + late), ("slept", slept)):
            self.times[each] += seconds

    def wait_for_something(self) -> None:
        """Another thread brings it at a random instant: exactly one comes, and is taken exactly once."""
        what, wait, bring = self._choose.choice(self._ways)
        timer = threading.Timer(self._choose.uniform(0, 0.05), bring)
        timer.start()
        outcome = self._wait(wait, time.monotonic() + 60)
        timer.join()
        self._context.check(outcome is not None, f"{what}() missed what came")
        self._check_all_is_taken(what)

    def be_interrupted(self) -> None:
        """The handler raises: the wait ends by that, at once, and takes nothing."""
        what, wait, _ = self._choose.choice(self._ways)
        began = time.monotonic()
        try:
            self._raises = True
            while True:
                try:
                    wait(60)
                    self._context.violated(f"{what}() ended, although nothing came")
                except posix_ipc.SignalError as error:
                    self._context.met(error)
                    if isinstance(error.__cause__, Interrupted):
                        break
        except Interrupted as error:
            self._context.met(error)
        finally:
            self._raises = False
        took = time.monotonic() - began
        self._context.check(took < AT_MOST, f"{what}() ended {took:.3f} s after it began, with signals all the time")
        self._check_all_is_taken(what)

    def _wait(self, wait: Callable[[float], object], deadline: float) -> object:
        """What it brought, True if that is nothing, or None when the time was over."""
        while True:
            try:
                outcome = wait(max(0.0, deadline - time.monotonic()))
                return True if outcome is None else outcome
            except posix_ipc.SignalError as error:
                self._context.met(error)
            except posix_ipc.BusyError as error:
                self._context.met(error)
                return None

    def _check_all_is_taken(self, what: str) -> None:
        found = self._semaphore.value, self._empty.current_messages, self._full.current_messages
        self._context.check(found == (0, 0, 1), f"after {what}() there are {found} permits and messages, not (0, 0, 1)")

    # ---- the end ----

    def end(self) -> None:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        for handle in (self._semaphore, self._empty, self._full):
            handle.unlink()
            handle.close()
        self._compare_with_sleep()

    def _compare_with_sleep(self) -> None:
        of_sleep = statistics.median(self._of_sleep) if self._of_sleep else 0.0
        for what, lateness in self._lateness.items():
            late = statistics.median(lateness)
            if len(lateness) >= ENOUGH:
                self._context.check(
                    late <= LATE + of_sleep,
                    f"too late: in the median {what}() took {late:.2%} longer than asked, sleep() {of_sleep:.2%}",
                )


SCENARIO = Scenario(
    number=9,
    name="signals",
    invariant=(
        "However many signals arrive, a wait ends with what it waited for, with the handler's exception, or at its "
        "deadline: never before, and in the median and in all at most 2 % after what a sleep() takes."
    ),
    faults="hundreds of signals a second to every process, handlers that raise",
    unit="waits",
    run=run,
    methods=("fork",),
    full=Full(duration=120),
)
