"""Scenario 1: permits of semaphores under every way to wait for them."""

from __future__ import annotations

import fcntl
import mmap
import os
import random
import signal
import struct
import threading
import time
from pathlib import Path
from typing import Any

import posix_ipc
from stress.forks import fork, wait_for
from stress.scenario import Context, Full, Scenario

PERMITS = (1, 3)
"""One semaphore of each: as a mutex, and as a pool of something."""
THREADS = 2
"""In each process."""
MORTAL_PERMITS = 3
SIGNAL_EVERY = 0.01
IDLE, TAKING, HOLDING, GIVING = range(4)


def run(context: Context) -> None:
    semaphores = [posix_ipc.Semaphore(context.name(), posix_ipc.O_CREX, initial_value=permits) for permits in PERMITS]
    for number in range(len(PERMITS)):
        Path(context.directory, str(number)).write_bytes(Holders.COUNT.pack(0))
    workers = [context.start(work, index, [each.name for each in semaphores]) for index in range(context.processes)]
    kill_holders(context, workers)
    context.join(*workers)
    for semaphore, permits in zip(semaphores, PERMITS, strict=True):
        context.check(
            semaphore.value == permits, f"a semaphore ends with {semaphore.value} permits instead of {permits}"
        )
        semaphore.unlink()
        semaphore.close()


# ---- many wait, nobody dies ----


class Holders:
    """Counts who holds a permit, across processes, under a lock of the system that has nothing to do with semaphores.

    It is entered after the permit is taken and left before it is given back, so it never counts too many.
    """

    COUNT = struct.Struct("i")

    def __init__(self, path: str) -> None:
        self._file = open(path, "r+b", buffering=0)  # noqa: SIM115

    def change(self, by: int) -> int:
        fcntl.flock(self._file, fcntl.LOCK_EX)
        try:
            (count,) = self.COUNT.unpack(os.pread(self._file.fileno(), self.COUNT.size, 0))
            os.pwrite(self._file.fileno(), self.COUNT.pack(count + by), 0)
        finally:
            fcntl.flock(self._file, fcntl.LOCK_UN)
        return count + by

    def close(self) -> None:
        self._file.close()


def work(context: Context, index: int, names: list[str]) -> None:
    """Threads that share the handles; signals arrive all the time."""
    signal.signal(signal.SIGALRM, lambda number, frame: None)
    signal.setitimer(signal.ITIMER_REAL, SIGNAL_EVERY, SIGNAL_EVERY)
    handles = [posix_ipc.Semaphore(name) for name in names]
    failures: list[BaseException] = []

    def in_thread(number: int) -> None:
        try:
            rotate(context, context.random("work", index, number), handles)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=in_thread, args=(number,)) for number in range(1, THREADS)]
    for thread in threads:
        thread.start()
    in_thread(0)
    for thread in threads:
        thread.join()
    signal.setitimer(signal.ITIMER_REAL, 0)
    for handle in handles:
        handle.close()
    if failures:
        raise failures[0]


def rotate(context: Context, choose: random.Random, handles: list[Any]) -> None:
    """Take a permit in one of the ways, hold it for a moment, give it back."""
    holders = [Holders(f"{context.directory}/{number}") for number in range(len(PERMITS))]
    for _ in context.steps(parts=context.processes * THREADS):
        number = choose.randrange(len(PERMITS))
        handle, permits = handles[number], PERMITS[number]
        while context.going():
            try:
                handle.acquire(choose.choice((0, 0.0005, 0.005, None)))
                break
            except (posix_ipc.BusyError, posix_ipc.SignalError) as error:
                context.met(error)
        else:
            break
        count = holders[number].change(+1)
        context.check(count <= permits, f"{count} hold a permit of a semaphore that has {permits}")
        value = handle.value
        context.check(0 <= value < permits, f"the value is {value} while one of {permits} permits is held")
        time.sleep(choose.choice((0, 0, 0, 0.0005)))
        holders[number].change(-1)
        handle.release()
        context.done("rotations")
    for each in holders:
        each.close()


# ---- holders are killed ----


def kill_holders(context: Context, workers: list[Any]) -> None:
    """As long as the workers run: kill one process after the other on a semaphore that nobody else uses.

    Each says in which state it is, so that it is known whether it took a permit with it.
    """
    choose = context.random("killer")
    semaphore = posix_ipc.Semaphore(context.name(), posix_ipc.O_CREX, initial_value=MORTAL_PERMITS)
    with mmap.mmap(-1, 1) as state:
        while context.going() and any(worker.is_alive() for worker in workers):
            state[0] = IDLE
            pid = fork(context, rotate_until_killed, semaphore, state)
            time.sleep(choose.uniform(0, 0.02))
            os.kill(pid, signal.SIGKILL)
            wait_for(context, pid, signal.SIGKILL)
            lost = MORTAL_PERMITS - semaphore.value
            possible = {IDLE: (0,), HOLDING: (1,)}.get(state[0], (0, 1))
            if lost not in possible:
                what = f"{lost} permits were lost instead of {possible}: a process was killed in state {state[0]}"
                context.violated(what)
                break
            context.tally(f"killed {('with no permit', 'as it took one', 'with one', 'as it gave one back')[state[0]]}")
            for _ in range(lost):
                semaphore.release()
    semaphore.unlink()
    semaphore.close()


def rotate_until_killed(semaphore: Any, state: mmap.mmap) -> None:
    while True:
        state[0] = TAKING
        semaphore.acquire()
        state[0] = HOLDING
        state[0] = GIVING
        semaphore.release()
        state[0] = IDLE


SCENARIO = Scenario(
    number=1,
    name="semaphores",
    invariant="There are never more holders than permits, and no permit is lost but with a holder that is killed.",
    faults="signals during waits, waits that time out, holders killed at random instants",
    unit="rotations",
    run=run,
    full=Full(count=200_000),
)
