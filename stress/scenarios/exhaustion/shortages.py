"""The shortages. Each is suffered in a process of its own, which keeps its limits to itself."""

from __future__ import annotations

import contextlib
import errno
import functools
import mmap
import os
import random
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import posix_ipc
from stress import outside
from stress.scenarios.exhaustion.namespaces import enter_private_namespaces
from stress.scenarios.exhaustion.objects import (
    OPTIONS,
    QUEUE,
    SEGMENT,
    SEMAPHORE,
    Sufferer,
    attempt,
    class_of,
    descriptors,
    expect,
    finish,
    judge,
    make,
    make_use_remove,
)

NOBODY = 65534


@contextlib.contextmanager
def limited(number: int, value: int) -> Iterator[None]:
    """A lower limit; it is this process's own, and so is what is left when it is lifted."""
    soft, hard = resource.getrlimit(number)
    resource.setrlimit(number, (value, hard))
    try:
        yield
    finally:
        resource.setrlimit(number, (soft, hard))


@contextlib.contextmanager
def descriptors_left(count: int) -> Iterator[None]:
    ballast: list[int] = []
    with limited(resource.RLIMIT_NOFILE, max(descriptors()) + 20):
        try:
            with contextlib.suppress(OSError):
                while True:
                    ballast.append(os.dup(0))
            for _ in range(min(count, len(ballast))):
                os.close(ballast.pop())
            yield
        finally:
            for descriptor in ballast:
                os.close(descriptor)


def warm_up(context: Sufferer, tracked: bool) -> None:
    """What a process needs once for its first tracked object, a journal and a tracker, is there."""
    make_use_remove(context, SEMAPHORE, tracked)


def no_descriptors(context: Sufferer, choose: random.Random, kind: int, tracked: bool) -> None:
    """With a handle that is open: it works on."""
    warm_up(context, tracked)
    handle = make(context, SEMAPHORE, tracked)
    name = context.name("queue" if kind == QUEUE else "")
    cls = class_of(kind, tracked)
    with descriptors_left(0):
        failed = expect(context, lambda: cls(name, posix_ipc.O_CREX, **OPTIONS[kind]), errno.EMFILE)
        context.check(failed, "something was opened without a descriptor")
        handle.release()
        handle.acquire(0)
    handle.unlink()
    handle.close()
    finish(context, kind, tracked)


def few_descriptors(context: Sufferer, choose: random.Random, kind: int, tracked: bool) -> None:
    """Whatever a call got done before it needed one more is undone; without a warm start also the journal."""
    if choose.random() < 0.5:
        warm_up(context, tracked)
    else:
        class_of(kind, tracked)  # imports what needs descriptors
    name = context.name("queue" if kind == QUEUE else "")
    cls = class_of(kind, tracked)
    with descriptors_left(choose.randrange(6)):
        expect(context, lambda: cls(name, posix_ipc.O_CREX, **OPTIONS[kind]), errno.EMFILE)
    finish(context, kind, tracked)


def no_queue_memory(context: Sufferer, choose: random.Random, kind: int, tracked: bool) -> None:
    warm_up(context, tracked)
    with limited(resource.RLIMIT_MSGQUEUE, choose.choice((0, 1, 50))):
        failed = expect(context, lambda: make(context, QUEUE, tracked), errno.EMFILE)
        context.check(failed, "a queue was made without memory for it")
    finish(context, QUEUE, tracked)


def no_address_space(context: Sufferer, choose: random.Random, kind: int, tracked: bool) -> None:
    """A semaphore is mapped when it is opened, a segment when its memory is asked for, a queue never."""
    warm_up(context, tracked)
    cls = class_of(SEMAPHORE, tracked)
    call: Callable[[], Any] = functools.partial(cls, context.name(), posix_ipc.O_CREX)
    segment = make(context, SEGMENT, tracked)
    if kind == SEGMENT:
        call = functools.partial(getattr, segment, "buf")
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = descriptors()
    ballast: list[mmap.mmap] = []
    with limited(resource.RLIMIT_AS, pages * mmap.PAGESIZE + (1 << 20)):
        for size in (1 << 18, mmap.PAGESIZE):
            with contextlib.suppress(OSError):
                while True:
                    ballast.append(mmap.mmap(-1, size))
        outcome = attempt(call)
    for each in ballast:
        each.close()
    if isinstance(outcome, Exception):
        judge(context, outcome, before, errno.ENOMEM, other=(MemoryError,))
    else:
        context.violated(f"{outcome!r} was mapped without address space")
    segment.unlink()
    segment.close()
    finish(context, kind, tracked)


def no_file_size(context: Sufferer, choose: random.Random, kind: int, tracked: bool) -> None:
    warm_up(context, tracked)
    kind = choose.choice((SEGMENT, SEMAPHORE))
    with limited(resource.RLIMIT_FSIZE, 0 if kind == SEMAPHORE else 4096):
        options = {"size": 8192, "reserve": choose.random() < 0.5} if kind == SEGMENT else {}
        call = functools.partial(make, context, kind, tracked, **options)
        failed = expect(context, call, errno.EFBIG, other=(ValueError,))
        context.check(failed, "a file was made larger than the limit allows")
    finish(context, kind, tracked)


def no_bytes(context: Sufferer, choose: random.Random, kind: int, tracked: bool) -> None:
    """A full /dev/shm of this process's own."""
    fill_up(context, choose, choose.choice((SEGMENT, SEMAPHORE)), tracked, "bytes")


def no_inodes(context: Sufferer, choose: random.Random, kind: int, tracked: bool) -> None:
    fill_up(context, choose, choose.choice((SEGMENT, SEMAPHORE)), tracked, "inodes")


def fill_up(context: Sufferer, choose: random.Random, kind: int, tracked: bool, what: str) -> None:
    """Before the first tracked object, or after it; then there is room again."""
    enter_private_namespaces()
    warm_up(context, tracked and choose.random() < 0.7)
    fillings = []
    with contextlib.suppress(OSError):
        while True:
            path = outside.SHM / f"filling{len(fillings)}"
            fillings.append(path)
            with open(path, "wb", buffering=0) as file:
                while what == "bytes":
                    file.write(bytes(mmap.PAGESIZE))
    options = {"size": mmap.PAGESIZE, "reserve": True} if kind == SEGMENT else {}
    failed = expect(context, functools.partial(make, context, kind, tracked, **options), errno.ENOSPC)
    context.check(failed, f"there was room for a new object in a /dev/shm without {what}")
    for path in fillings:
        path.unlink(missing_ok=True)
    finish(context, kind, tracked)


def no_more_queues(context: Sufferer, choose: random.Random, kind: int, tracked: bool) -> None:
    """A namespace of its own has a limit of its own, which root may exceed.

    Plain queues alone: a tracker needs an interpreter, and nobody may read this one.
    """
    enter_private_namespaces()
    Path("/proc/sys/fs/mqueue/queues_max").write_text("2")
    os.chmod(outside.SHM, 0o1777)
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    queues = [make(context, QUEUE, tracked=False) for _ in range(2)]
    failed = expect(context, lambda: make(context, QUEUE, tracked=False), errno.ENOSPC)
    context.check(failed, "there is a third queue where two are allowed")
    for queue in queues:
        queue.unlink()
        queue.close()
    finish(context, QUEUE, tracked=False)


EVERYWHERE = (no_descriptors, few_descriptors, no_queue_memory, no_address_space, no_file_size)
IN_PRIVATE = (no_bytes, no_inodes, no_more_queues)
"""Only where a process may have mounts and queues of its own."""
