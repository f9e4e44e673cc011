"""Forks from a process with threads, and children of children."""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.util
import os
import random
import signal
import threading
import time
from multiprocessing.connection import Connection
from typing import Any

from stress.forks import fork, wait_for
from stress.scenario import Context
from stress.scenarios.children.objects import ANSWER_WITHIN, attach, end_well, expect_gone, expect_there, make, there

THREADS = 3
CHILDREN = 4

# ---- forks from a process with threads ----


def fork_from_threads(context: Context, stem: str, choose: random.Random) -> None:
    """While threads attach, pickle and close, the process forks children that own objects and end in several ways."""
    wait_for(context, fork(context, threaded_root, context, stem, choose.random()))
    expect_gone(context, stem, "a root with threads exits", *range(CHILDREN + THREADS))


def threaded_root(context: Context, stem: str, seed: float) -> None:
    choose = random.Random(seed)
    kept = make(stem, 0)
    seen = there(stem, 0)
    over = threading.Event()
    failures: list[BaseException] = []

    def busy() -> None:
        try:
            while not over.is_set():
                attach_and_pickle(stem)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=busy) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    pids = []
    for number in range(1, CHILDREN + 1):
        time.sleep(choose.uniform(0, 0.01))
        pids.append(
            fork(context, child_of_threads, context, stem, number, kept, choose.choice(("exit", "_exit", "die")))
        )
    for pid in pids:
        wait_for(context, pid, 0, signal.SIGKILL)
    over.set()
    for thread in threads:
        thread.join()
    expect_gone(context, stem, "forked children of a process with threads end", *range(1, CHILDREN + 1))
    expect_there(context, stem, 0, seen, "its children have ended, the owner lives")
    if failures:
        raise failures[0]
    end_well()


def attach_and_pickle(stem: str) -> None:
    from multiprocessing.reduction import ForkingPickler

    for handle in attach(stem, 0):
        ForkingPickler.loads(bytes(ForkingPickler.dumps(handle))).close()
        handle.close()


def child_of_threads(context: Context, stem: str, number: int, kept: list[Any], end: str) -> None:
    """Of the threads of its parent none is here; what they held must not be in the way."""
    signal.alarm(60)  # a deadlock ends it, and is a violation
    own = make(stem, number)
    kept[1].acquire(10)
    kept[1].release()
    context.check(not kept[0].owned, "a forked child owns what its parent owns")
    for handle in attach(stem, 0):
        handle.close()
    if end == "die":
        context.channel.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    elif end == "exit":
        end_well()
    del own  # os._exit() follows


# ---- children of children ----


def nested(context: Context, stem: str, choose: random.Random) -> None:
    """Root, child, grandchild, each with its own objects and those before it. Then the one in the middle ends."""
    wait_for(context, fork(context, root_of_three, context, stem, choose.choice(("_exit", "die", "return"))))
    expect_gone(context, stem, "a root with children's children exits", 0, 1, 2)


def root_of_three(context: Context, stem: str, end: str) -> None:
    kept = make(stem, 0)
    seen = there(stem, 0)
    ours, theirs = context.multiprocessing.Pipe()
    child = context.multiprocessing.Process(target=middle, args=(context, stem, kept, theirs, end))
    child.start()
    theirs.close()
    if not ours.poll(ANSWER_WITHIN) or ours.recv() != "ready":
        raise AssertionError("the grandchild does not answer")
    of_middle = there(stem, 1)
    ours.send("go")  # to the one in the middle, by way of the grandchild
    deadline = time.monotonic() + ANSWER_WITHIN
    while child.exitcode is None and time.monotonic() < deadline:
        time.sleep(0.001)  # join() would wait for the grandchild too, which has inherited what it waits on
    expected = {"_exit": (3,), "die": (-signal.SIGKILL,), "return": (0,)}[end]
    context.check(child.exitcode in expected, f"a child that was to {end} ended with status {child.exitcode}")
    expect_there(context, stem, 0, seen, "the root lives")
    expect_there(context, stem, 1, of_middle, f"its owner did {end}, but a grandchild has leases")
    ours.send("end")
    if not ours.poll(ANSWER_WITHIN):
        raise AssertionError("the grandchild does not end")
    with contextlib.suppress(EOFError):
        ours.recv()
    ours.close()
    expect_gone(context, stem, "a grandchild ends that has no parent", 2)
    expect_there(context, stem, 0, seen, "the root lives")
    end_well()


def middle(context: Context, stem: str, of_root: list[Any], link: Connection, end: str) -> None:
    own = make(stem, 1)
    ours, theirs = context.multiprocessing.Pipe()
    process = context.multiprocessing.Process(target=grandchild, args=(context, stem, [*of_root, *own], link, theirs))
    process.start()
    ours.recv()
    context.channel.flush()
    if end == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if end == "_exit":
        os._exit(3)
    # As the end of the interpreter does, but for the wait for the grandchild.
    multiprocessing.process._children.discard(process)  # type: ignore[attr-defined]


def grandchild(context: Context, stem: str, inherited: list[Any], root: Connection, parent: Connection) -> None:
    own = make(stem, 2)
    for handle in inherited:
        attached = type(handle).attach(handle.name)
        context.check(attached._identity == handle._identity, f"{handle!r} and its name lead to two objects")
        attached.close()
    root.send("ready")
    root.recv()
    parent.send("go")
    root.recv()
    del own
