"""P13: what two threads on two semaphores get done, beside one thread on one."""

from __future__ import annotations

import statistics
import sys
import sysconfig
import threading
import time
from typing import Any

import posix_ipc

PAIRS, ROUNDS = 300_000, 15


def p13_threads() -> None:
    """The gain of a second thread, which only an interpreter without a lock can have."""
    enabled = getattr(sys, "_is_gil_enabled", lambda: True)()
    if not sysconfig.get_config_var("Py_GIL_DISABLED"):
        build = "an interpreter with a lock, so no gain is to be had"
    else:
        build = "free-threaded, with its lock put back" if enabled else "free-threaded"
    print(f"P13 {PAIRS:,} x acquire + release in each of 1 and 2 threads, {ROUNDS} rounds ({build})", flush=True)
    pair = [posix_ipc.Semaphore(None, posix_ipc.O_CREX, initial_value=1) for _ in range(2)]
    try:
        gains = []
        for _ in range(ROUNDS):
            one, two = _time(pair[:1]), _time(pair)
            gains.append(2 * one / two)
    finally:
        for each in pair:
            each.unlink()
    print(f"   2 threads get {statistics.median(gains):.2f} x as much done as 1 ({min(gains):.2f} to {max(gains):.2f})")


def _time(semaphores: list[Any]) -> float:
    """The seconds from the start of a thread for each of them to the end of the last."""
    together = threading.Barrier(len(semaphores) + 1)

    def use(semaphore: Any) -> None:
        acquire, release = semaphore.acquire, semaphore.release
        together.wait()
        for _ in range(PAIRS):
            acquire()
            release()

    threads = [threading.Thread(target=use, args=(each,)) for each in semaphores]
    for thread in threads:
        thread.start()
    together.wait()
    started = time.perf_counter()
    for thread in threads:
        thread.join()
    return time.perf_counter() - started
