"""Scenario 12: threads on one handle, which they use, close, open, unlink and pickle in any order.

Beside it each thread has an object of its own, so that what is written through a handle and lands elsewhere is seen.
"""

from __future__ import annotations

import contextlib
import copy
import os
import pickle
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

import posix_ipc
from stress.forks import fork, wait_for
from stress.scenario import Context, Full, Scenario
from stress.scenarios.threads.objects import (
    EXPECTED,
    KINDS,
    PRIORITY,
    QUEUE,
    SIZE,
    Opening,
    Own,
    open_new,
    reopen,
    unlink,
)

THREADS = 4
CALLS = 100
"""Of each thread, before the handle is looked at."""
MESSAGE = b"of the storm"
MARKS = b"".join(b"%15d." % number for number in range(THREADS))
"""What the segment of the storm may hold: of each thread 16 bytes."""
OFTEN = 1e-5
"""Seconds. Where there is an interpreter lock, it is handed on as often as it can be."""
Act = Callable[[], object]


def run(context: Context) -> None:
    context.join(*(context.start(work, index) for index in range(context.processes)))


def work(context: Context, index: int) -> None:
    """Storm after storm, each in a process of its own: a plain handle that is opened again keeps what it had open."""
    choose = context.random("work", index)
    steps = context.steps(parts=context.processes)
    while (step := next(steps, None)) is not None:
        kind, tracked = choose.choice(KINDS), choose.random() < 0.5
        name = context.name(kind)
        context.tally(f"storms on a {'tracked' if tracked else 'plain'} {kind}")
        context.channel.flush()  # so that its descriptor is there before any other
        wait_for(context, fork(context, storm, context, name, kind, tracked, f"{index} {step}"))
        for _ in range(THREADS * CALLS - 1):
            next(steps, None)
        context.done("calls", THREADS * CALLS)


# ---- a storm ----


def storm(context: Context, name: str, kind: str, tracked: bool, seed: str) -> None:
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(120)  # a deadlock ends it, and is a violation
    sys.setswitchinterval(OFTEN)
    handle = open_new(name, kind, tracked)
    own = [Own(context, kind, tracked, number) for number in range(THREADS)]
    failures: list[BaseException] = []

    def in_thread(number: int) -> None:
        acts = [*acts_on(context, handle, name, kind, tracked, number), *[own[number].exchange] * 4]
        try:
            for act in context.random("storm", seed, number).choices(acts, k=CALLS):
                try:
                    act()
                except EXPECTED as error:
                    context.met(error)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=in_thread, args=(number,)) for number in range(THREADS)]
    threads.append(threading.Thread(target=watch_descriptors, args=(context, threads[:])))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    try:
        if failures:
            raise failures[0]
        look_at_the_end(context, handle, name, kind, tracked)
    finally:
        unlink(name, kind)
        for each in own:
            each.end()


def close(handle: Any) -> None:
    handle.close()


def watch_descriptors(context: Context, others: list[threading.Thread]) -> None:
    """Open and close descriptors that are nobody's business: a number that is closed twice elsewhere shows here."""
    while any(thread.is_alive() for thread in others):
        try:
            reader, writer = os.pipe()
            os.write(writer, b"mine")
            read = os.read(reader, 100)
            os.close(reader)
            os.close(writer)
        except OSError as error:
            context.violated(f"a stranger's descriptor was closed: {error!r}")
            return
        context.check(read == b"mine", f"a stranger's descriptor was used: it gives {read!r}")


def look_at_the_end(context: Context, handle: Any, name: str, kind: str, tracked: bool) -> None:
    """Whatever state it was left in, it can be opened, and then name, identity and object belong together."""
    reopen(handle, name, kind)
    copied = pickle.loads(pickle.dumps(handle)) if not tracked else copy.copy(handle)
    context.check(copied.name == name, f"after a storm a pickle leads to {copied.name}, not to {name}")
    same = copied._identity == handle._identity
    context.check(same, f"after a storm a pickle leads to {copied._identity}, not to {handle._identity}")
    opening = Opening(name, kind)
    while kind == "queue" and handle.current_messages:
        handle.receive(0)
    fault = opening.exchange(handle, MARKS[:16])
    context.check(not fault, f"after a storm a write did not land in the object of its name: {fault}")
    opening.close()
    close(copied)
    close(handle)


# ---- what threads do ----


def acts_on(context: Context, handle: Any, name: str, kind: str, tracked: bool, number: int) -> list[Act]:
    specific = {"segment": segment_acts, "semaphore": semaphore_acts, "queue": queue_acts}[kind]
    acts: list[Act] = [
        *(lambda: reopen_closed(handle, name, kind) for _ in range(3)),
        *(lambda: close(handle) for _ in range(2)),
        handle.unlink,
        lambda: close(copy.copy(handle)),
        lambda: round_trip(context, handle, name, tracked),
        lambda: repr(handle) + str(handle) + str(handle.mode),
        *specific(context, handle, number),
    ]
    if tracked:
        acts += [handle.take_ownership, lambda: handle.owned, handle.__reduce__]
    return acts


def reopen_closed(handle: Any, name: str, kind: str) -> None:
    with contextlib.suppress(posix_ipc.ExistentialError):
        close(handle)
    reopen(handle, name, kind)


def round_trip(context: Context, handle: Any, name: str, tracked: bool) -> None:
    if tracked:
        from multiprocessing.reduction import ForkingPickler

        copied = ForkingPickler.loads(bytes(ForkingPickler.dumps(handle)))
    else:
        copied = pickle.loads(pickle.dumps(handle))
    context.check(copied.name == name, f"a pickle leads to {copied.name}, not to {name}")
    close(copied)


def segment_acts(context: Context, handle: Any, number: int) -> list[Act]:
    mine = slice(number * 16, number * 16 + 16)

    def write() -> None:
        handle.buf[mine] = MARKS[mine]

    def look() -> None:
        """Each byte is as it was made, or as its thread writes it."""
        content = bytes(handle.buf)
        whole = len(content) == SIZE and all(byte in (0, mark) for byte, mark in zip(content, MARKS, strict=True))
        context.check(whole, f"a segment shows {content!r} instead of zeros and {MARKS!r}")

    def measure() -> None:
        size = handle.size
        context.check(size == SIZE, f"a segment of {SIZE} bytes has {size}: it is another one")

    return [look, write, write, measure, handle.close_fd, handle.fileno, lambda: memoryview(handle).release()]


def semaphore_acts(context: Context, handle: Any, number: int) -> list[Act]:
    def hold() -> None:
        handle.acquire(0.001)
        handle.release()

    def measure() -> None:
        value = handle.value
        context.check(value >= 0, f"the value of a semaphore is {value}")

    return [hold, hold, measure, handle.release, lambda: handle.acquire(0)]


def queue_acts(context: Context, handle: Any, number: int) -> list[Act]:
    def expect(received: Any) -> None:
        context.check(received == (MESSAGE, PRIORITY), f"a queue gave {received!r} instead of what was sent")

    def receive_into(timeout: float) -> None:
        buffer = bytearray(QUEUE["max_message_size"])
        length, priority = handle.receive_into(buffer, timeout)
        expect((bytes(buffer[:length]), priority))

    def measure() -> None:
        found = handle.max_message_size, handle.current_messages
        context.check(found[0] == 16 and 0 <= found[1] <= 2, f"a queue says of itself {found}: it is another one")

    def flip() -> None:
        handle.block = not handle.block

    return [
        *(lambda timeout=timeout: handle.send(MESSAGE, timeout, PRIORITY) for timeout in (0, 0, 0.001)),
        *(lambda timeout=timeout: expect(handle.receive(timeout)) for timeout in (0, 0.001)),
        *(lambda timeout=timeout: receive_into(timeout) for timeout in (0, 0.001)),
        lambda: handle.request_notification((len, "in a thread of its own")),
        lambda: handle.request_notification(None),
        measure,
        flip,
        handle.fileno,
    ]


SCENARIO = Scenario(
    number=12,
    name="threads",
    invariant=(
        "Threads may do anything to one handle at any time: it leads to the object it was opened on or says that it is "
        "closed, and touches no stranger's descriptor; what a thread writes lands in its own object and nowhere else."
    ),
    faults="handles closed, opened anew, unlinked and pickled under the calls of other threads",
    unit="calls",
    run=run,
    methods=("fork",),
    full=Full(count=1_000_000),
)
