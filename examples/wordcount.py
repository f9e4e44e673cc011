#!/usr/bin/env python3
"""Count the words of many files in parallel, with the text in one segment that every worker reads.

The parent puts the text into a SharedMemory once. Each task it gives to its multiprocessing.Pool carries that segment,
a Semaphore and the span to count. Both travel by name, a few bytes whatever the size of the text, and the worker opens
them by unpickling the task, whichever start method made it. At the head of the segment the workers add up how far they
are; that is what the semaphore is for: without it two of them would now and then overwrite each other's sum.

    python examples/wordcount.py                          # the sources of Python's standard library
    python examples/wordcount.py --method fork ~/texts    # any files and folders
"""

from __future__ import annotations

import argparse
import mmap
import multiprocessing
import os
import re
import signal
import struct
import sys
import sysconfig
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from multiprocessing.pool import Pool
from pathlib import Path

import psutil

import posix_ipc

WORD = re.compile(rb"[A-Za-z_\x80-\xff]+")  # in UTF-8 a byte from 0x80 on belongs to a letter
PROGRESS = struct.Struct("=QQ")  # spans done, words counted; the text comes after it
SPANS = 40

Task = tuple[posix_ipc.SharedMemory, posix_ipc.Semaphore, int, int]


def main() -> int:
    options = parse_arguments()
    text = b"\n".join(path.read_bytes() for path in options.files)
    print(f"corpus      {len(options.files):,} files, {len(text) / 1e6:.1f} MB")

    started = time.perf_counter()
    expected = Counter(WORD.findall(text))
    sequential = time.perf_counter() - started
    print(f"sequential  {expected.total():,} words in {sequential:.2f} s")

    started = time.perf_counter()
    with shared_objects(text) as (segment, mutex), start_pool(options.method, options.processes) as pool:
        print(f"parallel    {options.processes} processes by {options.method}; {segment!r}, {mutex!r}", flush=True)
        segment_id = file_id(segment.fd)
        counted, own_sum = count_in_parallel(pool, segment, mutex)
        pool.close()
        pool.join()
    parallel = time.perf_counter() - started
    print(f"            {counted.total():,} words in {parallel:.2f} s, start of the processes included")

    print("\nthe ten most frequent words")
    for word, times in counted.most_common(10):
        print(f"{times:12,}  {word.decode(errors='replace')}")
    print()

    failures = left_behind(segment, mutex, segment_id)
    if counted != expected:
        failures.append("the parallel result is not the sequential one")
    if own_sum != expected.total():
        failures.append(f"the workers' own sum, kept under the semaphore, is {own_sum:,}")
    for failure in failures:
        print(f"FAILED      {failure}")
    if failures:
        return 1
    print("result      the same as the sequential count")
    print("left over   nothing: both names are gone, no descriptor or child process remains")
    return 0


def count_span(task: Task) -> Counter[bytes]:
    """What a worker does. It inherits nothing: unpickling the task has opened the segment and the semaphore."""
    segment, mutex, start, end = task
    with mmap.mmap(segment.fd, segment.size) as memory:
        words = Counter(WORD.findall(memory, start, end))
        with mutex:
            spans_done, words_counted = PROGRESS.unpack_from(memory)
            PROGRESS.pack_into(memory, 0, spans_done + 1, words_counted + words.total())
    return words


def count_in_parallel(
    pool: Pool, segment: posix_ipc.SharedMemory, mutex: posix_ipc.Semaphore
) -> tuple[Counter[bytes], int]:
    """Return the count of every word, and the number of words as the workers added it up in the segment."""
    counted: Counter[bytes] = Counter()
    with mmap.mmap(segment.fd, segment.size) as memory:
        tasks: list[Task] = [(segment, mutex, start, end) for start, end in spans(memory)]
        for results, words in enumerate(pool.imap_unordered(count_span, tasks), 1):
            counted.update(words)
            if results % 10 == 0:
                with mutex:
                    spans_done, words_counted = PROGRESS.unpack_from(memory)
                print(f"            {spans_done:3} of {len(tasks)} spans, {words_counted:,} words", flush=True)
        return counted, PROGRESS.unpack_from(memory)[1]


def spans(memory: mmap.mmap) -> Iterator[tuple[int, int]]:
    """Cut the text into about SPANS pieces, each at the end of a line, so that no word is cut."""
    start, length = PROGRESS.size, len(memory)
    step = (length - start) // SPANS + 1
    while start < length:
        newline = memory.find(b"\n", start + step)
        end = length if newline < 0 else newline
        yield start, end
        start = end


@contextmanager
def shared_objects(text: bytes) -> Iterator[tuple[posix_ipc.SharedMemory, posix_ipc.Semaphore]]:
    """A segment that holds the text, and a free mutex. Both names go away with the block, however it ends."""
    segment = posix_ipc.SharedMemory(None, posix_ipc.O_CREX, size=PROGRESS.size + len(text))
    try:
        mutex = posix_ipc.Semaphore(None, posix_ipc.O_CREX, initial_value=1)
        try:
            with mmap.mmap(segment.fd, segment.size) as memory:
                memory[PROGRESS.size :] = text
            yield segment, mutex
        finally:
            mutex.unlink()
            mutex.close()
    finally:
        segment.unlink()
        segment.close_fd()


def start_pool(method: str, processes: int) -> Pool:
    """A pool that this process alone ends, in good order: all that start here have the signals for it blocked."""
    resource_tracker.ensure_running()  # before the pool does it, for it unblocks both
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        return multiprocessing.get_context(method).Pool(processes, initializer=prepare_worker)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})


def prepare_worker() -> None:
    os.setpgrp()  # out of reach of what a terminal or a supervisor sends to the whole group
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # Pool.terminate() relies on it
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def left_behind(segment: posix_ipc.SharedMemory, mutex: posix_ipc.Semaphore, segment_id: tuple[int, int]) -> list[str]:
    """Say what this run has left on the system; an empty list if all is gone."""
    found = []
    for kind, name in (posix_ipc.SharedMemory, segment.name), (posix_ipc.Semaphore, mutex.name):
        with suppress(posix_ipc.ExistentialError):
            found.append(f"{kind(name)!r} is still there")
    for descriptor in map(int, os.listdir("/dev/fd")):
        with suppress(OSError):  # of the descriptor that listed the folder
            if file_id(descriptor) == segment_id:
                found.append(f"descriptor {descriptor} is still open on the segment")
    # multiprocessing keeps two helpers of its own as direct children until this process ends.
    this = psutil.Process()
    helpers = {child for child in this.children() if re.search("resource_tracker|forkserver", str(child.cmdline()))}
    found += [f"{child} is still running" for child in set(this.children(recursive=True)) - helpers]
    return found


def file_id(descriptor: int) -> tuple[int, int]:
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Count the words of many files in parallel.")
    parser.add_argument("paths", nargs="*", type=Path, help="files and folders (default: Python's standard library)")
    parser.add_argument("--method", choices=("fork", "spawn", "forkserver"), default="spawn", help="how workers start")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="how many (default: one per processor)")
    options = parser.parse_args()
    if options.processes < 1:
        parser.error("--processes must be 1 or more")
    for path in options.paths:
        if not path.exists():
            parser.error(f"{path} does not exist")
    options.files = list(files_in(options.paths) if options.paths else standard_library())
    return options


def files_in(paths: list[Path]) -> Iterator[Path]:
    for path in paths:
        if path.is_dir():
            yield from sorted(entry for entry in path.rglob("*") if entry.is_file())
        else:
            yield path


def standard_library() -> Iterator[Path]:
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        if "site-packages" not in path.parts:
            yield path


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # tidies up, as Ctrl-C does
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
