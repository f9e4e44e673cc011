"""Scenario 10: notifications of queues, from many threads."""

from __future__ import annotations

import collections
import contextlib
import copy
import gc
import itertools
import os
import random
import signal
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import posix_ipc
from stress.scenario import Context, Full, Scenario

QUEUE = {"max_messages": 1, "max_message_size": 8}
THREADS = 4
ROUND = 300
"""Operations of one thread, after which everything must come to rest."""
SIGNAL = signal.SIGUSR1
REST_WITHIN = 30.0


def run(context: Context) -> None:
    shared = posix_ipc.MessageQueue(context.name("queue"), posix_ipc.O_CREX, **QUEUE)
    workers = [context.start(work, index, shared.name) for index in range(context.processes)]
    context.join(*workers)
    shared.unlink()
    shared.close()


def work(context: Context, index: int, shared: str) -> None:
    """Round after round of threads on a queue of this process's own, and on one that all processes share."""
    signal.signal(SIGNAL, lambda number, frame: None)
    own = context.name("queue")
    descriptors, threads = opened(), running()
    choose = context.random("work", index)
    steps = context.steps(parts=context.processes)
    for step in steps:
        posix_ipc.MessageQueue(own, posix_ipc.O_CREAT, **QUEUE).close()
        storm = Storm(context, [own, shared], choose.random(), itertools.chain((step,), steps))  # its first call's
        storm.run()
        storm.come_to_rest()
        until_equal(context, "threads", running, threads)
        until_equal(context, "descriptors", opened, descriptors)
        prove_that_it_works(context, own)
        context.tally("storms")
    posix_ipc.unlink_message_queue(own)


def opened() -> set[str]:
    """The descriptors of this process; the one that lists them has the first free number, as it always had."""
    return set(os.listdir("/proc/self/fd"))


def running() -> int:
    return len(os.listdir("/proc/self/task"))


def until_equal(context: Context, what: str, look: Callable[[], Any], wanted: Any) -> None:
    deadline = time.monotonic() + REST_WITHIN
    while (found := look()) != wanted and time.monotonic() < deadline:
        time.sleep(0.001)
    context.check(found == wanted, f"{what} at rest are {found}, were {wanted}")


def prove_that_it_works(context: Context, name: str) -> None:
    """After whatever came before: ask, send, be called."""
    called = threading.Event()
    queue = posix_ipc.MessageQueue(name)
    drain(queue)
    queue.request_notification((threading.Event.set, called))
    queue.send(b"x", 0)
    context.check(called.wait(REST_WITHIN), "no callback came after a storm had come to rest")
    drain(queue)
    queue.close()


def drain(queue: Any) -> None:
    try:
        while True:
            queue.receive(0)
    except posix_ipc.BusyError:
        pass


class Parameter:
    """Of one request: its callback is called at most once, and then nobody keeps it."""

    def __init__(self) -> None:
        self.calls = 0


class Storm:
    def __init__(self, context: Context, names: list[str], seed: float, steps: Any) -> None:
        self._context, self._names, self._seed, self._steps = context, names, seed, steps
        self._handles = [posix_ipc.MessageQueue(name) for name in names for _ in range(2)]
        self._asked: weakref.WeakSet[Parameter] = weakref.WeakSet()
        self._lock = threading.Lock()
        self._called: collections.Counter[str] = collections.Counter()
        self._over = False
        self._failures: list[BaseException] = []

    def run(self) -> None:
        threads = [threading.Thread(target=self._work, args=(number,)) for number in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self._failures:
            raise self._failures[0]

    def come_to_rest(self) -> None:
        """Cancel, close, and see that nobody keeps a parameter."""
        self._over = True
        for handle in self._handles:
            with contextlib.suppress(posix_ipc.ExistentialError):  # closed already
                handle.close()
        self._handles.clear()
        until_equal(self._context, "parameters that are kept", self._kept, 0)
        for what, number in self._called.items():
            self._context.tally(what, number)

    def _kept(self) -> int:
        """A callback that was on its way may have asked again."""
        for name in self._names:  # through a handle that is surely open
            with contextlib.closing(posix_ipc.MessageQueue(name)) as queue:
                queue.request_notification(None)
        gc.collect()
        with self._lock:
            return len(self._asked)

    def _work(self, number: int) -> None:
        choose = random.Random(f"{self._seed} {number}")
        acts = (self._ask, self._ask, self._ask_for_a_signal, self._cancel, self._fire, self._fire, self._fire)
        rare = (self._close, self._collect_a_copy)
        try:
            for _ in range(ROUND):
                act = choose.choice(rare) if choose.random() < 0.1 else choose.choice(acts)
                handle = choose.choice(self._handles)
                try:
                    act(handle)
                except (posix_ipc.BusyError, posix_ipc.SignalError) as error:
                    self._context.met(error)  # another process has asked, or another thread was quicker; a signal came
                except posix_ipc.ExistentialError as error:
                    self._context.met(error)
                    self._reopen(handle)
                self._count()
        except BaseException as error:
            self._failures.append(error)

    def _count(self) -> None:
        with self._lock:
            self._context.done("calls")
            next(self._steps, None)

    # ---- what the threads do ----

    def _ask(self, handle: Any) -> None:
        parameter = Parameter()
        with self._lock:
            self._asked.add(parameter)
        handle.request_notification((self._be_called, parameter))

    def _be_called(self, parameter: Parameter) -> None:
        with self._lock:
            parameter.calls += 1
            self._called["callbacks"] += 1
            calls, again = parameter.calls, not self._over and self._called["callbacks"] % 2
        self._context.check(calls == 1, f"the callback of one request was called {calls} times instead of once")
        if again:
            try:
                self._ask(self._handles[calls % len(self._handles)])
                with self._lock:
                    self._called["asked again by a callback"] += 1
            except (posix_ipc.BusyError, posix_ipc.ExistentialError, IndexError):
                pass

    def _ask_for_a_signal(self, handle: Any) -> None:
        handle.request_notification(int(SIGNAL))

    def _cancel(self, handle: Any) -> None:
        handle.request_notification(None)

    def _fire(self, handle: Any) -> None:
        drain(handle)
        handle.send(b"x", 0)
        drain(handle)

    def _reopen(self, handle: Any) -> None:
        with self._lock:
            if handle.mqd < 0:  # else its descriptor would stay open
                handle.__init__(handle.name)

    def _close(self, handle: Any) -> None:
        handle.close()

    def _collect_a_copy(self, handle: Any) -> None:
        """Closing any descriptor of the queue makes the kernel forget the request; the callback comes all the same."""
        copied = copy.copy(handle)
        parameter = Parameter()
        with self._lock:
            self._asked.add(parameter)
        copied.request_notification((self._be_called, parameter))
        del copied, parameter


SCENARIO = Scenario(
    number=10,
    name="notifications",
    invariant=(
        "A callback is called at most once for each request, and at rest nothing is kept: no parameter, thread or "
        "descriptor."
    ),
    faults="handles closed, collected and opened again under requests, rivals that ask for the same queue",
    unit="calls",
    run=run,
    methods=("fork",),
    full=Full(count=1_000_000),
)
