"""A worker: wrong calls, right ones beside them, and what it keeps of both."""

from __future__ import annotations

import contextlib
import itertools
import os
import resource
import signal
import sys
import threading
import time
from pathlib import Path
from statistics import mean

import posix_ipc
from stress.scenario import Context
from stress.scenarios.invalid.arguments import MOST_BYTES
from stress.scenarios.invalid.caller import QUEUE, Caller, dispose

BATCH = 100
"""Calls after which nothing may be left."""
ENOUGH = 20_000
"""Calls of a worker from which on its memory is compared."""
WITHIN = 1.03 if getattr(sys, "_is_gil_enabled", lambda: True)() else 1.06
"""The interpreter's free lists and the allocator fill for long: measured were 1.01 of 40,000 calls and 1.02 of 250,000
(`python -m stress invalid --count 160000`, and `--full`, which say it of each worker).
Without the GIL the allocator also keeps what other threads might still read: 1.03 to 1.04, however many calls."""
REST_WITHIN = 30.0
LONGEST_CALL = 60
"""Seconds; none of them waits."""


def work(context: Context, index: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (MOST_BYTES, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    ready, over = threading.Event(), threading.Event()
    beside = threading.Thread(target=use_well, args=(context, ready, over))
    beside.start()
    ready.wait()
    try:
        memory = call_all_the_time(context, Caller(context, context.random("work", index)))
    finally:
        over.set()
        beside.join()
    if len(memory) * BATCH >= ENOUGH:
        tenth = len(memory) // 10
        growth = mean(memory[-tenth:]) / mean(memory[tenth : 2 * tenth])
        context.note(f"memory of a worker, last tenth of its calls over the second: {growth:.4f}")
        context.check(growth <= WITHIN, f"memory of a worker grows: the last tenth is {growth:.3f} times the second")


def call_all_the_time(context: Context, caller: Caller) -> list[int]:
    """Pages of memory in use, after each batch."""
    before: set[str] = set()
    memory: list[int] = []
    for step in context.steps(parts=context.processes):
        signal.alarm(LONGEST_CALL)
        caller.call_something()
        context.done("calls")
        if step % BATCH == BATCH - 1:
            before = before or opened()
            expect_same(context, before)
            memory.append(int(Path("/proc/self/statm").read_text().split()[1]))
    signal.alarm(0)
    return memory


def opened() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


def expect_same(context: Context, before: set[str]) -> None:
    """Whatever was called. A callback's thread closes what it has a moment later."""
    deadline = time.monotonic() + REST_WITHIN
    while (now := opened()) != before and time.monotonic() < deadline:
        time.sleep(0.001)
    context.check(now == before, f"wrong calls left descriptors {now - before}, closed {before - now}")


def use_well(context: Context, ready: threading.Event, over: threading.Event) -> None:
    """What a program does that is in order, in the same process at the same time."""
    try:
        with contextlib.ExitStack() as stack:
            segment = posix_ipc.SharedMemory(context.name(), posix_ipc.O_CREX, size=64)
            semaphore = posix_ipc.Semaphore(context.name(), posix_ipc.O_CREX, initial_value=1)
            queue = posix_ipc.MessageQueue(context.name("queue"), posix_ipc.O_CREX, **QUEUE)
            for handle in (segment, semaphore, queue):
                stack.callback(dispose, handle)
            ready.set()
            for number in itertools.count():
                if over.is_set():
                    break
                message = number.to_bytes(8, "little")
                with semaphore:
                    segment.buf[:8] = message
                    queue.send(message, 0)
                    received, written = queue.receive(0)[0], bytes(segment.buf[:8])
                found = received, written, semaphore.value
                context.check(found == (message, message, 1), f"beside wrong calls a right one gave {found}")
                context.tally("right calls beside them", 6)
                time.sleep(0.001)
    except Exception as error:
        context.violated(f"beside wrong calls a right one raised {error!r}")
    finally:
        ready.set()
