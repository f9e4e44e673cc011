"""Scenario 4: segments that grow, shrink, and are replaced under their readers."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import posix_ipc
from stress.scenario import Context, Full, Scenario

HEAD = 64
"""Bytes at the beginning that are written once, by the maker of a segment; no size is ever smaller."""
MOST_PAGES = 16
KEPT = 8
"""Views and mappings of segments that are closed, and mostly gone, of each process."""
KILL_EVERY = {"fork": 0.05, "spawn": 1.0, "forkserver": 0.3}
"""Seconds, in the mean; who starts an interpreter needs some to get anywhere."""
RESIZES = 30
"""Of one segment at most."""


def run(context: Context) -> None:
    makers = max(1, context.processes // 2)
    names = [context.name() for _ in range(makers)]
    made = [context.start(make, index, makers, name) for index, name in enumerate(names)]
    readers = [context.start(read, index, names) for index in range(max(1, context.processes - makers))]
    kill_readers(context, readers, made, names)
    context.join(*made, *readers)


def head_of(mark: int) -> bytes:
    """What a segment begins with; the last byte is written last."""
    return bytes([mark]) * HEAD


def page_size(choose: random.Random) -> int:
    size = choose.randint(1, MOST_PAGES) * posix_ipc.PAGE_SIZE
    return size if choose.random() < 0.5 else max(HEAD, size - choose.randrange(posix_ipc.PAGE_SIZE))


# ---- who makes them ----


def make(context: Context, index: int, makers: int, name: str) -> None:
    """One segment after the other under one name. Every byte beyond the head is the mark of this segment, or 0."""
    choose = context.random("make", index)
    kept: list[tuple[memoryview, int]] = []
    steps = context.steps(parts=makers)
    step = next(steps, None)  # of the next resize
    mark = 0
    while step is not None:
        mark = mark % 255 + 1
        segment = create(context, choose, name, mark)
        for _ in range(choose.randrange(RESIZES)):
            resize(context, choose, segment, mark)
            context.done("resizes")
            step = next(steps, None)
            if step is None:
                break
        kept.append((segment.buf[:HEAD], mark))
        segment.unlink()
        segment.close()  # the views hold their memory
        check_kept(context, choose, kept)
    for view, _ in kept:
        view.release()


def create(context: Context, choose: random.Random, name: str, mark: int) -> Any:
    size = page_size(choose)
    segment = posix_ipc.SharedMemory(name, posix_ipc.O_CREX, size=size, reserve=choose.random() < 0.3)
    context.check(segment.size == size, f"a segment was made with {size} bytes and has {segment.size}")
    memory = segment.buf
    context.check(not any(memory), "a new segment is not all zeros")
    memory[HEAD:] = bytes([mark]) * (size - HEAD)
    memory[: HEAD - 1] = head_of(mark)[:-1]
    memory[HEAD - 1] = mark
    return segment


def resize(context: Context, choose: random.Random, segment: Any, mark: int) -> None:
    """By opening it again with a size, or by ftruncate() on the descriptor; what is new is zero, what stays is kept."""
    before, size = segment.size, page_size(choose)
    if choose.random() < 0.5:
        with contextlib.closing(posix_ipc.SharedMemory(segment.name, size=size)) as other:
            context.check(other.size == size, f"a segment opened with {size} bytes has {other.size}")
    else:
        os.ftruncate(segment.fd, size)
    context.check(segment.size == size, f"a segment of {before} bytes was resized to {size} and has {segment.size}")
    with contextlib.closing(posix_ipc.SharedMemory(segment.name)) as other:
        memory = other.buf
        context.check(len(memory) == size, f"a view of a segment of {size} bytes has {len(memory)}")
        common = min(before, size)
        context.check(bytes(memory[:HEAD]) == head_of(mark), "what the segment begins with was lost as it was resized")
        context.check(
            bytes(memory[HEAD:common]) == bytes([mark]) * (common - HEAD),
            f"bytes were lost as a segment was resized from {before} to {size}",
        )
        context.check(not any(memory[common:]), f"what is new is not zero, from {before} to {size} bytes")
        memory[common:] = bytes([mark]) * (size - common)


# ---- who reads them ----


def read(context: Context, index: int, names: list[str]) -> None:
    """Attach whatever is there, look at it, keep a view longer than the handle."""
    choose = context.random("read", index)
    kept: list[tuple[memoryview, int]] = []
    while context.going() and not is_over(context).exists():
        try:
            segment = posix_ipc.SharedMemory(choose.choice(names), read_only=choose.random() < 0.5)
        except posix_ipc.ExistentialError as error:
            context.met(error)
            continue
        with contextlib.closing(segment):
            look(context, choose, segment, kept)
        check_kept(context, choose, kept)
        context.tally("looks of readers")
    for view, _ in kept:
        view.release()


def look(context: Context, choose: random.Random, segment: Any, kept: list[tuple[memoryview, int]]) -> None:
    """Only the head is touched by way of memory: beyond it, a segment may shrink at any instant."""
    try:
        view = segment.buf[:HEAD]
    except ValueError as error:  # it has its name, but not yet a size
        context.met(error)
        return
    mark = view[HEAD - 1]
    if not mark:
        context.met("not yet written")
        view.release()
        return
    context.check(bytes(view) == head_of(mark), f"a reader sees {bytes(view)!r} in a segment with the mark {mark}")
    beyond = os.pread(segment.fd, 256, choose.randrange(HEAD, MOST_PAGES * posix_ipc.PAGE_SIZE))
    context.check(set(beyond) <= {0, mark}, f"a reader sees bytes {set(beyond)} in a segment with the mark {mark}")
    kept.append((view, mark))


def check_kept(context: Context, choose: random.Random, kept: list[tuple[memoryview, int]]) -> None:
    """Views of closed handles, whose segments may be gone or replaced, show what they showed."""
    for view, mark in kept:
        context.check(
            bytes(view) == head_of(mark), f"a view kept across close shows {bytes(view)!r}, not the mark {mark}"
        )
    if len(kept) > KEPT:
        kept.pop(choose.randrange(len(kept)))[0].release()


def kill_readers(context: Context, readers: list[Any], makers: list[Any], names: list[str]) -> None:
    """One of them after the other, at any instant, to be replaced."""
    choose = context.random("killer")
    started = len(readers)
    while any(maker.is_alive() for maker in makers):
        time.sleep(choose.uniform(0, 2 * KILL_EVERY[context.method]))
        index = choose.randrange(len(readers))
        readers[index].kill()
        readers[index].join()
        context.check(
            readers[index].exitcode in (-signal.SIGKILL, 0), f"a reader ended with status {readers[index].exitcode}"
        )
        readers[index].close()
        context.tally("readers killed")
        readers[index] = context.start(read, started, names)
        started += 1
    is_over(context).touch()


def is_over(context: Context) -> Path:
    """It exists when the makers have ended."""
    return Path(context.directory, "over")


SCENARIO = Scenario(
    number=4,
    name="segments",
    invariant="A segment keeps its bytes as it grows, shrinks and is replaced, and views of it outlive its handles.",
    faults="segments resized, unlinked and made anew under their readers, readers killed",
    unit="resizes",
    run=run,
    full=Full(count=100_000),
)
