"""Measures operations side by side with its peers and prints each goal with its figures and ratios.

Loop overhead is not taken off. Run it as `make bench`, or `python -m benchmarks [P1 P2 …]`.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import pickle
import platform
import secrets
from collections.abc import Callable, Iterator, Mapping
from multiprocessing import shared_memory
from typing import Any

import posix_ipc
from posix_ipc import mp_integration

from . import imports, inventory, peers, pingpong, stress_ng, threads, trackers, tracking
from .measure import Runner, Timing, interleave, statement

Contest = Mapping[str, Runner]


def unused_name() -> str:
    return f"/pi-bench-{os.getpid()}-{secrets.token_hex(4)}"


@contextlib.contextmanager
def semaphores() -> Iterator[dict[str, object]]:
    """A free semaphore of each kind: ours and the original's are one object."""
    name = unused_name()
    ours = posix_ipc.Semaphore(name, posix_ipc.O_CREX, initial_value=1)
    try:
        yield {
            "ours": ours,
            "1.3.2": peers.original().Semaphore(name),
            "stdlib": multiprocessing.get_context("fork").Semaphore(1),
            "name": name,
        }
    finally:
        ours.unlink()


@contextlib.contextmanager
def p1_pair() -> Iterator[Contest]:
    """semaphore acquire + release"""
    with semaphores() as by_name:
        name = str(by_name.pop("name"))
        pairs = {
            who: statement("acquire(); release()", acquire=s.acquire, release=s.release)  # type: ignore[attr-defined]
            for who, s in by_name.items()
        }
        floor = statement("f(); f()", f=object().__sizeof__)
        yield {**pairs, "two calls": floor, "raw C": peers.raw_runner("semaphore_pair", name)}


@contextlib.contextmanager
def p2_with() -> Iterator[Contest]:
    """with semaphore: pass"""
    with semaphores() as by_name:
        del by_name["name"]
        yield {who: statement("with s: pass", s=s) for who, s in by_name.items()}


@contextlib.contextmanager
def p3_timeout() -> Iterator[Contest]:
    """acquire(timeout=1.0) + release"""
    with semaphores() as by_name:
        yield {who: statement("s.acquire(timeout=1.0); s.release()", s=by_name[who]) for who in ("ours", "1.3.2")}


@contextlib.contextmanager
def p3_zero() -> Iterator[Contest]:
    """acquire(0) + release"""
    with semaphores() as by_name:
        yield {who: statement("s.acquire(0); s.release()", s=by_name[who]) for who in ("ours", "1.3.2")}


@contextlib.contextmanager
def p4_segment() -> Iterator[Contest]:
    """segment create + size + close + unlink"""
    name = unused_name()
    code = "s = SharedMemory(name, flags, size=4096); s.close_fd(); s.unlink()"
    flags = posix_ipc.O_CREX
    yield {
        "ours": statement(code, SharedMemory=posix_ipc.SharedMemory, name=name, flags=flags),
        "1.3.2": statement(code, SharedMemory=peers.original().SharedMemory, name=name, flags=flags),
        "raw C": peers.raw_runner("segment_life", name),
    }


def queue_contest(size: int) -> Callable[[], contextlib.AbstractContextManager[Contest]]:
    @contextlib.contextmanager
    def contest() -> Iterator[Contest]:
        name = unused_name()
        ours = posix_ipc.MessageQueue(name, posix_ipc.O_CREX, max_messages=2)
        theirs = peers.original().MessageQueue(name)
        code = "send(message); receive()"
        message = bytes(size)
        try:
            yield {
                "ours": statement(code, send=ours.send, receive=ours.receive, message=message),
                "1.3.2": statement(code, send=theirs.send, receive=theirs.receive, message=message),
                "raw C": peers.raw_runner("queue_pair", name, size),
            }
        finally:
            theirs.close()
            ours.close()
            ours.unlink()

    contest.__doc__ = f"queue send + receive, {size} bytes"
    return contest


@contextlib.contextmanager
def p5_tracked() -> Iterator[Contest]:
    """segment create + size + close + unlink, tracked"""
    code = "s = SharedMemory(size=4096); s.close(); s.unlink()"
    stdlib = "s = SharedMemory(create=True, size=4096); s.close(); s.unlink()"
    yield {
        "ours": statement(code, SharedMemory=mp_integration.SharedMemory),
        "stdlib": statement(stdlib, SharedMemory=shared_memory.SharedMemory),
    }


@contextlib.contextmanager
def attach_contest(ours: Any) -> Iterator[Contest]:
    theirs = shared_memory.SharedMemory(create=True, size=4096)
    code = "loads(dumps(s)).close()"
    try:
        yield {
            who: statement(code, s=s, loads=pickle.loads, dumps=pickle.dumps)
            for who, s in (("ours", ours), ("stdlib", theirs))
        }
    finally:
        theirs.close()
        theirs.unlink()
        ours.close()
        ours.unlink()


def p6_plain() -> contextlib.AbstractContextManager[Contest]:
    """pickle, unpickle (attach) and close a segment, plain"""
    return attach_contest(posix_ipc.SharedMemory(None, posix_ipc.O_CREX, size=4096))


def p6_tracked() -> contextlib.AbstractContextManager[Contest]:
    """pickle, unpickle (attach) and close a segment, tracked"""
    return attach_contest(mp_integration.SharedMemory(size=4096))


def p9_semaphores() -> contextlib.AbstractContextManager[Contest]:
    """ping-pong between two processes, semaphores"""
    return pingpong.semaphores(unused_name())


def p9_queues() -> contextlib.AbstractContextManager[Contest]:
    """ping-pong between two processes, queues, 16 bytes; the stdlib's is a Pipe"""
    return pingpong.queues(unused_name())


CONTESTS: dict[str, list[Callable[[], contextlib.AbstractContextManager[Contest]]]] = {
    "P1": [p1_pair],
    "P2": [p2_with],
    "P3": [p3_timeout, p3_zero],
    "P4": [p4_segment],
    "P5": [p5_tracked],
    "P6": [p6_plain, p6_tracked],
    "P8": [queue_contest(16), queue_contest(1024), queue_contest(8192)],
    "P9": [p9_semaphores, p9_queues],
}

SCENARIOS: dict[str, Callable[[], None]] = {
    "P7": tracking.p7_pool,
    "P10": inventory.run,
    "P11": tracking.p11_reap,
    "P12": imports.p12_import,
    "P13": threads.p13_threads,
    "P14": tracking.p14_tracker,
    "exit": tracking.exit_delay,
    "stress-ng": stress_ng.run,
    "trackers": trackers.run,
}
"""Goals without peers, which print their own report."""


def report(goal: str, title: str, timings: Mapping[str, Timing]) -> None:
    print(f"{goal} {title}")
    ours = timings["ours"].median
    for who, timing in timings.items():
        ratio = ours / timing.median
        comparison = "" if who == "ours" else f"  ours takes {ratio:.2f} of this, is {1 / ratio:.2f} x as fast"
        print(f"   {who:10} {timing.median:9.1f} ns  ({timing.low:.1f} to {timing.high:.1f}){comparison}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "goals", nargs="*", metavar="GOAL", help=f"of {', '.join({**CONTESTS, **SCENARIOS})}; default: all"
    )
    parser.add_argument("--rounds", type=int, default=200, help="turns of each contestant (default %(default)s)")
    arguments = parser.parse_args()
    print(f"Python {platform.python_version()}, {platform.system()} {platform.release()}, {os.cpu_count()} processors:")
    print(f"medians of {arguments.rounds} interleaved rounds (10th to 90th percentile)")
    for goal in arguments.goals or {**CONTESTS, **SCENARIOS}:
        if goal in SCENARIOS:
            SCENARIOS[goal]()
            continue
        for contest in CONTESTS[goal]:
            with contest() as contestants:
                report(goal, contest.__doc__ or "", interleave(contestants, arguments.rounds))


if __name__ == "__main__":
    main()
