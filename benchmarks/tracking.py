"""P7, P11, P14: what tracking costs a pool, how fast orphans are reaped, what a waiting tracker takes; and the exit."""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.pool
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from posix_ipc import _reaper
from posix_ipc.mp_integration import Semaphore, SharedMemory

ROOT = Path(__file__).parent.parent

# ---- P7 ----

TASKS, ROUNDS = 2000, 5


def nothing(task: object) -> None:
    """What a worker does with a task: its arguments have been unpickled, and attached to, by then."""


def p7_pool() -> None:
    """What tasks take that carry a tracked segment and semaphore, each attached to afresh."""
    print(f"P7 Pool.map, chunksize=1, {ROUNDS} x {TASKS} small tasks", flush=True)
    for method in ("fork", "spawn"):
        with (
            SharedMemory(size=4096) as segment,
            multiprocessing.get_context(method).Pool(2) as pool,
        ):
            semaphore = Semaphore(initial_value=1)
            tasks = {"ours": (segment, semaphore), "strings": (segment.name, semaphore.name)}
            took: dict[str, list[float]] = {what: [] for what in tasks}
            for _ in range(ROUNDS):
                for what, task in tasks.items():
                    took[what].append(_map(pool, task))
            semaphore.unlink()
            semaphore.close()
        ours, strings = (statistics.median(each) / TASKS * 1e6 for each in took.values())
        print(f"   {method:6} {ours:6.1f} us per task, two short strings {strings:6.1f} us: {ours / strings:.2f} of it")


def _map(pool: multiprocessing.pool.Pool, task: object) -> float:
    started = time.perf_counter()
    pool.map(nothing, [task] * TASKS, chunksize=1)
    return time.perf_counter() - started


# ---- P11 and P14: trees that are ended by force, in namespaces of their own ----


def run_apart(what: str) -> None:
    """Run a part of this file with a private /dev/shm and private queues, where no other tracker sees what it makes."""
    private = ["unshare", "-mi", "sh", "-c", 'mount -t tmpfs tmpfs /dev/shm && exec "$0" "$@"']
    subprocess.run([*private, sys.executable, "-m", "benchmarks.tracking", what], check=True, cwd=ROOT)


def p11_reap() -> None:
    """How long a sweep takes that removes so many; it must grow no faster than they do, nor much beside other trees."""
    print("P11 a sweep", flush=True)
    run_apart("reap")


def p14_tracker() -> None:
    """Its memory, and how often it wakes."""
    print("P14 the tracker, while nothing is owed", flush=True)
    run_apart("tracker")


def exit_delay() -> None:
    """What tracked objects add to the end of a process; it must be under 50 ms."""
    print("exit: from the last statement of a program to its end", flush=True)
    run_apart("exit")


@contextlib.contextmanager
def tree(objects: int) -> Iterator[tuple[psutil.Popen, psutil.Process]]:
    """A process that owns so many tracked objects, and its tracker."""
    code = (
        "import sys\n"
        "from posix_ipc.mp_integration import Semaphore, SharedMemory\n"
        "made = [kind(*arguments) for _ in range(int(sys.argv[1]) // 2)"
        " for kind, arguments in ((Semaphore, ()), (SharedMemory, (None, None, 0o600, 64)))]\n"
        "print(flush=True)\n"
        "sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", f"import resource; resource.setrlimit({RESOURCE})\n{code}", str(objects)]
    with psutil.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as root:
        root.stdout.readline()
        yield root, _tracker_of(root.pid)


RESOURCE = "resource.RLIMIT_NOFILE, (20000, 20000)"


def _tracker_of(root: int) -> psutil.Process:
    while True:
        for process in psutil.process_iter(["cmdline"]):
            command = process.info["cmdline"] or []
            if "tracker" in command and command[-1].startswith(f"{root}-"):
                return process
        time.sleep(0.01)


OWNER = (
    "import sys; from posix_ipc.mp_integration import Semaphore; s = Semaphore(); print(flush=True); sys.stdin.read()"
)


@contextlib.contextmanager
def other_trees(count: int) -> Iterator[None]:
    """So many processes that own something, each with its tracker."""
    with contextlib.ExitStack() as stack:
        for _ in range(count):
            command = [sys.executable, "-c", OWNER]
            owner = stack.enter_context(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
            stack.callback(owner.kill)
            assert owner.stdout is not None
            owner.stdout.readline()
        yield


def reap_orphans() -> None:
    for objects, others in ((2500, 0), (5000, 0), (10000, 0), (10000, 100)):
        with other_trees(others):
            reap_so_many(objects, others)


def reap_so_many(objects: int, others: int) -> None:
    samples = []
    for _ in range(3):
        with tree(objects) as (root, tracker):
            tracker.kill()
            root.kill()
            root.wait()
        while tracker.is_running() and tracker.status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.001)
        started = time.perf_counter()
        removed = len(_reaper.reap())
        samples.append(time.perf_counter() - started)
        assert removed == objects, removed
    took = f"{statistics.median(samples):.3f} s ({min(samples):.3f} to {max(samples):.3f})"
    print(f"   {objects:6} orphans beside {others:3} other trees: {took}", flush=True)


def watch_tracker(seconds: float = 5) -> None:
    with tree(100) as (root, tracker):
        time.sleep(1)  # longer than its start takes
        before = tracker.cpu_times(), tracker.num_ctx_switches()
        time.sleep(seconds)
        after = tracker.cpu_times(), tracker.num_ctx_switches()
        memory = tracker.memory_full_info()
        used = after[0].user + after[0].system - before[0].user - before[0].system
        switches = after[1].voluntary - before[1].voluntary
        print(f"   {memory.rss / 1e6:.1f} MB resident, {memory.uss / 1e6:.1f} MB of it its own")
        print(f"   in {seconds:.0f} s: {used:.3f} s of processor time, woken {switches} times")
        root.kill()


ENDINGS = {
    "no tracked object": "",
    "10 of them": "made = [SharedMemory(size=64) for _ in range(10)]",
    "1000 of them": "made = [SharedMemory(size=64) for _ in range(1000)]",
    "10, a second handle on each": (
        "made = [SharedMemory(size=64) for _ in range(10)]; others = [SharedMemory.attach(each.name) for each in made]"
    ),
    "10, a view of each": "made = [SharedMemory(size=64) for _ in range(10)]; views = [each.buf for each in made]",
}


def time_exits(rounds: int = 15) -> None:
    took: dict[str, list[float]] = {what: [] for what in ENDINGS}
    for _ in range(rounds):
        for what, statements in ENDINGS.items():
            took[what].append(_time_exit(statements) * 1e3)
    bare = statistics.median(took["no tracked object"])
    for what, samples in took.items():
        median = statistics.median(samples)
        print(f"   {what:28} {median:6.1f} ms ({min(samples):.1f} to {max(samples):.1f}), {median - bare:+.1f}")


def _time_exit(statements: str) -> float:
    code = (
        f"import resource; resource.setrlimit({RESOURCE})\n"
        f"from posix_ipc.mp_integration import SharedMemory\n{statements}\n"
        "import time; time.sleep(0.5)  # longer than a tracker takes to start\n"
        "print(flush=True)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        started = time.perf_counter()
        process.wait()
        return time.perf_counter() - started


if __name__ == "__main__":
    {"reap": reap_orphans, "tracker": watch_tracker, "exit": time_exits}[sys.argv[1]]()
