"""Scenario 11: descriptors, memory, space and limits run out (R7)."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
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
from stress.channel import Writer
from stress.forks import fork, wait_for
from stress.scenario import Context, Full, Scenario

KINDS = SEGMENT, SEMAPHORE, QUEUE = range(3)
OPTIONS: tuple[dict[str, Any], ...] = ({"size": 64}, {"initial_value": 1}, {"max_messages": 1, "max_message_size": 8})
NOBODY = 65534
_CLONE_NEWNS, _CLONE_NEWIPC = 0x00020000, 0x08000000
_MS_REC, _MS_PRIVATE = 1 << 14, 1 << 18


def run(context: Context) -> None:
    private = why_not_private(context)
    for reason in private:
        context.note(f"left out, since a private mount namespace is not allowed here: {reason}")
    pids = [fork(context, starve, context, index, not private) for index in range(max(1, context.processes // 2))]
    pids += [fork(context, live, context, index) for index in range(max(1, context.processes // 2))]
    for pid in pids:
        wait_for(context, pid)


def why_not_private(context: Context) -> list[str]:
    """What the system says when a process of ours asks for mounts and queues of its own; empty if it may have them."""
    reader, writer = os.pipe()

    def try_it() -> None:
        try:
            enter_private_namespaces()
        except OSError as error:
            os.write(writer, f"tmpfs bytes, tmpfs inodes, number of queues: {error}".encode())

    wait_for(context, fork(context, try_it))
    os.close(writer)
    with open(reader) as file:
        return [line for line in [file.read()] if line]


def enter_private_namespaces() -> None:
    """Mounts and queues of this process's own, for good."""
    library = ctypes.CDLL(None, use_errno=True)
    steps = (
        lambda: library.unshare(_CLONE_NEWNS | _CLONE_NEWIPC),
        lambda: library.mount(None, b"/", None, _MS_REC | _MS_PRIVATE, None),
        lambda: library.mount(b"none", b"/dev/shm", b"tmpfs", 0, b"size=64k,nr_inodes=20"),
    )
    for step in steps:
        if step() < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


# ---- the traffic beside ----


def live(context: Context, index: int) -> None:
    """Nobody else's shortage is felt here."""
    choose = context.random("live", index)
    while context.going() and not os.path.exists(f"{context.directory}/over"):
        make_use_remove(context, choose.choice(KINDS), tracked=choose.random() < 0.5)
        context.tally("objects made and used beside the shortages")


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


# ---- the shortages ----


def starve(context: Context, index: int, private: bool) -> None:
    """One shortage after the other, each in a process of its own, which keeps the limits to itself."""
    choose = context.random("starve", index)
    shortages: list[Callable[..., None]] = [
        *(no_descriptors, few_descriptors, no_queue_memory, no_address_space, no_file_size),
        *((no_bytes, no_inodes, no_more_queues) if private else ()),
    ]
    context.tally("starvers")
    context.channel.flush()  # its descriptor is there from now on
    for _ in context.steps(parts=max(1, context.processes // 2)):
        shortage = choose.choice(shortages)
        kind, tracked = choose.choice(KINDS), choose.random() < 0.5
        wait_for(context, fork(context, suffer, context, shortage, choose, kind, tracked))
        context.done("shortages")
        context.tally(shortage.__name__.replace("_", " "))
    open(f"{context.directory}/over", "w").close()


def suffer(context: Context, shortage: Callable[..., None], choose: random.Random, kind: int, tracked: bool) -> None:
    """In a process that has names of its own, so that it can tell what of them is left."""
    own = dataclasses.replace(context, prefix=f"{context.prefix}{os.getpid()}-", channel=Noting(context.channel))
    shortage(own, choose, kind, tracked)


class Noting:
    """The channel of a process that knows what it has said of queues, which cannot be listed."""

    def __init__(self, channel: Writer) -> None:
        self._channel = channel
        self.queues: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._channel, name)

    def say(self, what: str, value: Any) -> None:
        if what == "queue":
            self.queues.append(value)
        self._channel.say(what, value)


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


def warm_up(context: Context, tracked: bool) -> None:
    """What a process needs once for its first tracked object, a journal and a tracker, is there."""
    make_use_remove(context, SEMAPHORE, tracked)


def no_descriptors(context: Context, choose: random.Random, kind: int, tracked: bool) -> None:
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


def few_descriptors(context: Context, choose: random.Random, kind: int, tracked: bool) -> None:
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


def no_queue_memory(context: Context, choose: random.Random, kind: int, tracked: bool) -> None:
    warm_up(context, tracked)
    with limited(resource.RLIMIT_MSGQUEUE, choose.choice((0, 1, 50))):
        failed = expect(context, lambda: make(context, QUEUE, tracked), errno.EMFILE)
        context.check(failed, "a queue was made without memory for it")
    finish(context, QUEUE, tracked)


def no_address_space(context: Context, choose: random.Random, kind: int, tracked: bool) -> None:
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


def no_file_size(context: Context, choose: random.Random, kind: int, tracked: bool) -> None:
    warm_up(context, tracked)
    kind = choose.choice((SEGMENT, SEMAPHORE))
    with limited(resource.RLIMIT_FSIZE, 0 if kind == SEMAPHORE else 4096):
        options = {"size": 8192, "reserve": choose.random() < 0.5} if kind == SEGMENT else {}
        call = functools.partial(make, context, kind, tracked, **options)
        failed = expect(context, call, errno.EFBIG, other=(ValueError,))
        context.check(failed, "a file was made larger than the limit allows")
    finish(context, kind, tracked)


def no_bytes(context: Context, choose: random.Random, kind: int, tracked: bool) -> None:
    """A full /dev/shm of this process's own."""
    fill_up(context, choose, choose.choice((SEGMENT, SEMAPHORE)), tracked, "bytes")


def no_inodes(context: Context, choose: random.Random, kind: int, tracked: bool) -> None:
    fill_up(context, choose, choose.choice((SEGMENT, SEMAPHORE)), tracked, "inodes")


def fill_up(context: Context, choose: random.Random, kind: int, tracked: bool, what: str) -> None:
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


def no_more_queues(context: Context, choose: random.Random, kind: int, tracked: bool) -> None:
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


def check_nothing_is_left(context: Context, after: str) -> None:
    """No name that this process has tried, and no mapping of an object but that of its own journal."""
    names = [*outside.files(context.prefix), *filter(outside.queue_exists, context.channel.queues)]
    context.check(not names, f"{after} left names: {sorted(names)}")
    journals = f"{outside.SHM}/.posix_ipc-"
    mappings = [path for path in outside.mapped_paths(os.getpid()) if path.startswith(f"{outside.SHM}/")]
    left = [path for path in mappings if not path.startswith(journals)]
    context.check(not left, f"{after} left mappings: {left}")


def finish(context: Context, kind: int, tracked: bool) -> None:
    """Nothing is left, and it works again."""
    check_nothing_is_left(context, "a shortage")
    try:
        make_use_remove(context, kind, tracked)
    except Exception as error:
        context.violated(f"still no object after the shortage has ended: {error!r}")
        return
    check_nothing_is_left(context, "the use after a shortage")


SCENARIO = Scenario(
    number=11,
    name="exhaustion",
    invariant="Whatever runs out: a typed error with its errno, nothing left behind, and it works again after.",
    faults=(
        "no descriptors, queue memory, address space, file size; in a private namespace no bytes and no inodes in "
        "/dev/shm, no more queues"
    ),
    unit="shortages",
    run=run,
    methods=("fork",),
    full=Full(count=2_000),
)
