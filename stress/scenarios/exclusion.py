"""Scenario 2: mutual exclusion."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import struct
import time
from typing import Any

import posix_ipc
from stress.scenario import Context, Full, Scenario

COUNTERS = 4
"""Under one semaphore; they always have the same value while nobody is inside."""
COUNTER = struct.Struct("Q")
SIGNAL_EVERY = 0.005


def run(context: Context) -> None:
    segment_name, mutex_name = context.name(), context.name()
    segment = posix_ipc.SharedMemory(segment_name, posix_ipc.O_CREX, size=COUNTER.size * (COUNTERS + context.processes))
    mutex = posix_ipc.Semaphore(mutex_name, posix_ipc.O_CREX, initial_value=1)
    workers = [context.start(work, index, segment_name, mutex_name) for index in range(context.processes)]
    stop_and_continue(context, workers)
    context.join(*workers)
    counters, own = read(segment.buf, 0, COUNTERS), read(segment.buf, COUNTERS, context.processes)
    context.check(
        counters == [sum(own)] * COUNTERS, f"{sum(own)} increments, but the counters that were guarded are {counters}"
    )
    context.check(mutex.value == 1, f"the semaphore ends with {mutex.value} permits instead of 1")
    for handle in (segment, mutex):
        handle.unlink()
        handle.close()


def read(memory: memoryview, first: int, number: int) -> list[int]:
    return [COUNTER.unpack_from(memory, COUNTER.size * index)[0] for index in range(first, first + number)]


def work(context: Context, index: int, segment_name: str, mutex_name: str) -> None:
    """Read, let others have their chance, write; how often, is counted where nobody else writes."""
    signal.signal(signal.SIGALRM, lambda number, frame: None)
    signal.setitimer(signal.ITIMER_REAL, SIGNAL_EVERY, SIGNAL_EVERY)
    segment, mutex = posix_ipc.SharedMemory(segment_name), posix_ipc.Semaphore(mutex_name)
    choose = context.random("work", index)
    own = COUNTER.size * (COUNTERS + index)
    for step in context.steps(parts=context.processes):
        enter(context, mutex)
        try:
            increment(context, segment.buf, choose)
            COUNTER.pack_into(segment.buf, own, step + 1)
        finally:
            mutex.release()
        context.done("increments")
    signal.setitimer(signal.ITIMER_REAL, 0)
    segment.close()
    mutex.close()


def enter(context: Context, mutex: Any) -> None:
    """By `with`'s own way in, as often as a signal ends the wait."""
    while True:
        try:
            mutex.__enter__()
            return
        except posix_ipc.SignalError as error:
            context.met(error)


def increment(context: Context, memory: memoryview, choose: random.Random) -> None:
    before = read(memory, 0, COUNTERS)
    context.check(
        len(set(before)) == 1, f"somebody is inside already: counters are {before}, but increments come whole"
    )
    if choose.random() < 0.05:
        os.sched_yield()
    for number in range(COUNTERS):
        COUNTER.pack_into(memory, COUNTER.size * number, before[number] + 1)


def stop_and_continue(context: Context, workers: list[Any]) -> None:
    """Whoever is stopped inside keeps all others out."""
    choose = context.random("stopper")
    descriptors = [os.pidfd_open(worker.pid) for worker in workers]  # a pid may be another's later
    while context.going() and any(worker.is_alive() for worker in workers):
        descriptor = choose.choice(descriptors)
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(descriptor, signal.SIGSTOP)
            time.sleep(choose.uniform(0, 0.02))
            signal.pidfd_send_signal(descriptor, signal.SIGCONT)
            context.tally("stops")
        time.sleep(choose.uniform(0, 0.05))
    for descriptor in descriptors:
        os.close(descriptor)


SCENARIO = Scenario(
    number=2,
    name="exclusion",
    invariant="Unguarded counters that are changed under a semaphore end exact.",
    faults="workers stopped inside and outside, signals during waits",
    unit="increments",
    run=run,
    full=Full(count=200_000),
)
