"""P10: `inventory()` of many objects beside many processes, in namespaces of its own, so that nothing is left.

The time must grow no faster than objects and processes do. The processor time stands beside the wall time, since on a
busy machine others are in the latter.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import posix_ipc
from posix_ipc.leaks import inventory

STEPS = [(0, 0), (1000, 0), (2000, 0), (2000, 150), (2000, 300)]
ROUNDS = 9

SLEEPER = "import posix_ipc, sys; posix_ipc.SharedMemory('/m0').buf; print(flush=True); sys.stdin.read()"
"""A process with the mappings of any that has imported posix_ipc, and a segment open."""


def run() -> None:
    """Measure where /dev/shm, queues and pids are private."""
    private = ["unshare", "-mipf", "--mount-proc", "sh", "-c", 'mount -t tmpfs tmpfs /dev/shm && "$0" "$@"']
    print("P10 inventory()", flush=True)
    subprocess.run([*private, sys.executable, "-m", __name__], check=True, cwd=Path(__file__).parent.parent)


@contextlib.contextmanager
def sleepers(count: int) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        started = []
        for _ in range(count):
            process = subprocess.Popen([sys.executable, "-c", SLEEPER], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            stack.enter_context(process)
            stack.callback(process.kill)
            started.append(process)
        for process in started:
            assert process.stdout is not None
            process.stdout.readline()
        yield


def make(first: int, last: int) -> None:
    """Half of them segments, half semaphores."""
    for number in range(first // 2, last // 2):
        posix_ipc.SharedMemory(f"/m{number}", posix_ipc.O_CREX, size=64).close()
        posix_ipc.Semaphore(f"/s{number}", posix_ipc.O_CREX).close()


def measure(processes: int) -> None:
    walls, processors = [], []
    with sleepers(processes):
        for _ in range(ROUNDS):
            started, before = time.perf_counter(), os.times()
            found = len(inventory())
            walls.append(time.perf_counter() - started)
            processors.append(sum(os.times()[:4]) - sum(before[:4]))
    print(
        f"   {found:5} objects, {processes:3} sleeping processes: {statistics.median(walls):.3f} s"
        f"  ({min(walls):.3f} to {max(walls):.3f}), of processor time {statistics.median(processors):.3f} s",
        flush=True,
    )


def main() -> None:
    made = 0
    for objects, processes in STEPS:
        make(made, objects)
        made = objects
        measure(processes)


if __name__ == "__main__":
    main()
