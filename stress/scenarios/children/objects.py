"""What is done and seen with objects."""

from __future__ import annotations

import multiprocessing
import multiprocessing.util
import time
from typing import Any

import posix_ipc
from stress import outside
from stress.scenario import Context

KINDS = range(3)
QUEUE = {"max_messages": 1, "max_message_size": 8}
GONE_WITHIN = 10.0
ANSWER_WITHIN = 60.0


def make(stem: str, number: int) -> list[Any]:
    """One of each kind, tracked; the number says whose they are."""
    from posix_ipc import mp_integration as tracked

    return [
        tracked.SharedMemory(f"{stem}{number}-0", posix_ipc.O_CREX, size=64),
        tracked.Semaphore(f"{stem}{number}-1", posix_ipc.O_CREX, initial_value=1),
        tracked.MessageQueue(f"{stem}{number}-2", posix_ipc.O_CREX, **QUEUE),
    ]


def attach(stem: str, number: int) -> list[Any]:
    from posix_ipc import mp_integration as tracked

    classes = (tracked.SharedMemory, tracked.Semaphore, tracked.MessageQueue)
    return [cls.attach(f"{stem}{number}-{kind}") for kind, cls in enumerate(classes)]


def there(stem: str, number: int) -> dict[str, Any]:
    queue = f"{stem}{number}-2"
    return {**outside.files(f"{stem}{number}-"), **({"queue": True} if outside.queue_exists(queue) else {})}


def expect_gone(context: Context, stem: str, what: str, *numbers: int) -> None:
    began = time.monotonic()
    while (left := [name for number in numbers for name in there(stem, number)]) and (
        time.monotonic() < began + GONE_WITHIN
    ):
        time.sleep(0.001)
    took = time.monotonic() - began
    context.check(not left, f"left {took:.1f} s after {what}: {left}")
    context.took(f"until gone after {what}", took)


def expect_there(context: Context, stem: str, number: int, seen: dict[str, Any], why: str) -> None:
    now = there(stem, number)
    context.check(now == seen and len(now) == len(KINDS), f"{why}, and now there is {now}, not {seen}")


def end_well() -> None:
    """What the interpreter does at its end; a forked child has none of its own."""
    multiprocessing.util._exit_function()
