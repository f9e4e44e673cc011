"""Objects of a process that suffers a shortage, and what is left of them."""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import posix_ipc
from stress import outside
from stress.scenario import Context

KINDS = SEGMENT, SEMAPHORE, QUEUE = range(3)
OPTIONS: tuple[dict[str, Any], ...] = ({"size": 64}, {"initial_value": 1}, {"max_messages": 1, "max_message_size": 8})


@dataclass
class Sufferer(Context):
    """The context of a process that suffers a shortage: its names are its own, and it knows those of queues."""

    queues: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, context: Context) -> Sufferer:
        """This process."""
        return cls(**{**vars(context), "prefix": f"{context.prefix}{os.getpid()}-"})

    def know_queue(self, name: str, lasting: bool = False) -> None:
        self.queues.append(name)
        super().know_queue(name, lasting)


def class_of(kind: int, tracked: bool) -> Any:
    if not tracked:
        return (posix_ipc.SharedMemory, posix_ipc.Semaphore, posix_ipc.MessageQueue)[kind]
    from posix_ipc import mp_integration

    return (mp_integration.SharedMemory, mp_integration.Semaphore, mp_integration.MessageQueue)[kind]


def make(context: Context, kind: int, tracked: bool, **options: Any) -> Any:
    name = context.name("queue" if kind == QUEUE else "")
    return class_of(kind, tracked)(name, posix_ipc.O_CREX, **{**OPTIONS[kind], **options})


def make_use_remove(context: Context, kind: int, tracked: bool) -> None:
    handle = make(context, kind, tracked)
    if kind == SEGMENT:
        handle.buf[:5] = b"bytes"
    elif kind == SEMAPHORE:
        handle.acquire(0)
    else:
        handle.send(b"x", 0)
        handle.receive(0)
    handle.unlink()
    handle.close()


# ---- right or wrong ----


def expect(context: Context, call: Callable[[], Any], *numbers: int, other: tuple[type, ...] = ()) -> bool:
    """The call fails as it should, and leaves nothing, or works; does it fail?"""
    before = descriptors()
    return judge(context, attempt(call), before, *numbers, other=other)


def attempt(call: Callable[[], Any]) -> Any:
    """What the call gives or raises."""
    try:
        return call()
    except Exception as error:
        return error


def judge(context: Context, outcome: Any, before: list[int], *numbers: int, other: tuple[type, ...] = ()) -> bool:
    if not isinstance(outcome, Exception):
        outcome.unlink()
        outcome.close()
        return False
    context.met(outcome)
    right = isinstance(outcome, other) or (isinstance(outcome, OSError) and outcome.errno in numbers)
    context.check(right, f"not the error of this shortage, errno {numbers}: {outcome!r}")
    left = set(descriptors()) - set(before)
    context.check(not left, f"a call that failed left descriptors {left}")
    return True


def descriptors() -> list[int]:
    """By asking for each: there may be none left to read a directory by."""
    found = []
    for number in range(min(resource.getrlimit(resource.RLIMIT_NOFILE)[0], 256)):
        with contextlib.suppress(OSError):
            os.fstat(number)
            found.append(number)
    return found


def check_nothing_is_left(context: Sufferer, after: str) -> None:
    """No name that this process has tried, and no mapping of an object but that of its own journal."""
    names = [*outside.files(context.prefix), *(name for name in context.queues if outside.queue_exists(name))]
    context.check(not names, f"{after} left names: {sorted(names)}")
    journals = f"{outside.SHM}/.posix_ipc-"
    mappings = [path for path in outside.mapped_paths(os.getpid()) if path.startswith(f"{outside.SHM}/")]
    left = [path for path in mappings if not path.startswith(journals)]
    context.check(not left, f"{after} left mappings: {left}")


def finish(context: Sufferer, kind: int, tracked: bool) -> None:
    """Nothing is left, and it works again."""
    check_nothing_is_left(context, "a shortage")
    try:
        make_use_remove(context, kind, tracked)
    except Exception as error:
        context.violated(f"still no object after the shortage has ended: {error!r}")
        return
    check_nothing_is_left(context, "the use after a shortage")
