"""P10: `inventory()` of many objects beside many processes, in namespaces of their own, so that nothing is left.

A quarter of the objects is plain segments, a quarter plain semaphores, a quarter tracked by a living process, and a
quarter left by one that was killed together with its tracker; beside them are a few queues. A sixth of the processes is
of another user, where root can start them.

The time must grow no faster than objects and processes do. That is told from the processor time, since on a busy
machine others are in the wall time.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psutil

import posix_ipc
from posix_ipc import mp_integration
from posix_ipc.leaks import inventory

MOST_SECONDS = 0.5
STEPS = [(0, 0), (1000, 0), (2000, 0), (2000, 150), (2000, 300)]
TOLERANCE = 1.25
"""Twice as many may take that many times twice as long: the first ones are quicker, by the caches of the processor."""
ROUNDS = 9
QUEUES = 4
NOBODY = 65534

SLEEPER = "import posix_ipc, sys; posix_ipc.SharedMemory('/sleepers').buf; print(flush=True); sys.stdin.read()"
"""A process with the mappings of any that has imported posix_ipc, and a segment open."""

OWNER = """
import sys
from benchmarks.inventory import make_tracked
handles = make_tracked("orphan", int(sys.argv[1]))
print(flush=True)
sys.stdin.read()
"""


def run() -> None:
    """Measure where /dev/shm, queues and pids are private."""
    shell = 'mount -t tmpfs tmpfs /dev/shm && ulimit -n 8192 && "$0" "$@"'
    private = ["unshare", "-mipf", "--mount-proc", "sh", "-c", shell]
    print("P10 inventory()", flush=True)
    took = {}
    for objects, processes in STEPS:
        command = [*private, sys.executable, "-m", __name__, str(objects), str(processes)]
        done = subprocess.run(command, check=True, cwd=Path(__file__).parent.parent, stdout=subprocess.PIPE, text=True)
        wall, processor, line = json.loads(done.stdout)
        took[objects, processes] = processor
        print(f"   {line}", flush=True)
    print(
        f"   within {MOST_SECONDS} s: {_yes(wall <= MOST_SECONDS)}; processor time: {_yes(processor <= MOST_SECONDS)}"
    )
    for what, (none, half, all_) in (("objects", STEPS[:3]), ("processes", STEPS[2:])):
        ratio = (took[all_] - took[none]) / (took[half] - took[none])
        print(f"   twice as many {what} take {ratio:.2f} times as long: linear: {_yes(ratio <= 2 * TOLERANCE)}")


def _yes(is_so: bool) -> str:
    return "yes" if is_so else "NO"


# ---- one scene ----


def make_tracked(prefix: str, count: int) -> list[object]:
    """Half of them segments, half semaphores."""
    classes = mp_integration.SharedMemory, mp_integration.Semaphore
    options: tuple[dict[str, int], ...] = {"size": 64}, {}
    return [
        classes[number % 2](f"/{prefix}-{number}", posix_ipc.O_CREX, **options[number % 2]) for number in range(count)
    ]


@contextlib.contextmanager
def objects(count: int) -> Iterator[None]:
    """So many, and a few queues."""
    for number in range(count // 4):
        posix_ipc.SharedMemory(f"/plain-{number}", posix_ipc.O_CREX, size=64).close()
        posix_ipc.Semaphore(f"/plain-{number}", posix_ipc.O_CREX).close()
    for number in range(QUEUES if count else 0):
        queue = posix_ipc.MessageQueue(f"/queue-{number}", posix_ipc.O_CREX, max_messages=10, max_message_size=8192)
        queue.send(b"message")
        queue.close()
    handles = make_tracked("tracked", count // 4)
    command = [sys.executable, "-c", OWNER, str(count // 4)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as owner:
        assert owner.stdout is not None
        owner.stdout.readline()
        for process in psutil.process_iter(["cmdline"]):  # any of them would remove what the owner leaves
            if "tracker" in process.info["cmdline"]:
                process.kill()
        owner.kill()
    yield
    del handles


@contextlib.contextmanager
def sleepers(count: int) -> Iterator[None]:
    posix_ipc.SharedMemory("/sleepers", posix_ipc.O_CREX, size=64).close()
    others = count // 6 if os.geteuid() == 0 else 0
    with contextlib.ExitStack() as stack:
        started = []
        for number in range(count):
            if number < others:
                process = subprocess.Popen(["sleep", "inf"], user=NOBODY)
            else:
                command = [sys.executable, "-c", SLEEPER]
                process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
                started.append(process)
            stack.enter_context(process)
            stack.callback(process.kill)
        for process in started:
            assert process.stdout is not None
            process.stdout.readline()
        yield


def processor_time() -> float:
    """Of this process and of its helpers that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def measure(count: int, processes: int) -> tuple[float, float, str]:
    """(seconds, seconds of processor time, all of it in words)"""
    walls, processors = [], []
    with objects(count), sleepers(processes):
        for _ in range(ROUNDS):
            started, before = time.perf_counter(), processor_time()
            found = inventory()
            walls.append(time.perf_counter() - started)
            processors.append(processor_time() - before)
    verdicts = Counter(each.verdict for each in found)
    wall, processor = statistics.median(walls), statistics.median(processors)
    line = (
        f"{len(found):5} objects ({', '.join(f'{number} {verdict}' for verdict, number in sorted(verdicts.items()))}), "
        f"{processes:3} sleeping processes: {wall:.3f} s ({min(walls):.3f} to {max(walls):.3f}), "
        f"of processor time {processor:.3f} s"
    )
    return wall, processor, line


if __name__ == "__main__":
    print(json.dumps(measure(*map(int, sys.argv[1:]))))
