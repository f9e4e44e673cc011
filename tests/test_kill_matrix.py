"""G1 to G4: each way to end, of a root, a worker, a whole group and a group with its tracker, under each start method.

In every tree root and workers have made objects of the three families: some nobody else heard of, some that are shared,
some in flight in a queue of multiprocessing.
"""

import itertools
import os
import signal
import sys

import psutil
import pytest
from lifetime import Tree, assert_all_is_over, existing, trackers, wait_until_gone
from support import finish, private_ipc, start_python, wait_until_ready

from posix_ipc import _reaper

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="tracking is for Linux"),
    pytest.mark.slow,
    pytest.mark.private,
]

BY_ITSELF = ["exit", "exception", "os._exit"]
SIGNALS = ["SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGKILL"]
TELLS_WORKERS = ["exit", "exception", "SIGINT"]
"""Here multiprocessing ends the daemons of the root, which otherwise live on."""

each_method = pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
by_itself = pytest.mark.parametrize("how", BY_ITSELF)
by_signal = pytest.mark.parametrize("how", SIGNALS)


def end(tree, whom, how):
    if how in BY_ITSELF:
        tree.ask(f"{whom} {how}")
    else:
        {"root": tree.kill_root, "group": tree.kill_group}[whom](signal.Signals[how])
    tree.wait()


def assert_silent(tree, how):
    """The program's own end is told, and what the tracker of multiprocessing thinks of its own semaphores."""
    said = tree.stderr()
    assert "posix_ipc" not in said
    assert not [name for _, name in tree.objects if name in said]
    if how == "exit":
        assert said == ""
    elif how not in ("exception", "SIGINT"):
        assert not [line for line in said.splitlines() if "resource_tracker" not in line and line[:1] != " "]


# ---- the root ----


def root_ends(method, how):
    with Tree(method, workers=1) as tree:
        end(tree, "root", how)
        (worker,) = tree.workers
        if how in TELLS_WORKERS:
            tree.wait_for_workers()
        else:  # it lives on, and with it what it leases; a fork has inherited the leases of its root
            leased = tree.objects if method == "fork" else [*tree.passed, *tree.objects_of(worker)]
            wait_until_gone([each for each in tree.objects if each not in leased])
            _reaper.reap()
            assert existing(leased) == leased
            tree.kill_workers(signal.SIGKILL if how in BY_ITSELF else signal.Signals[how])
            tree.wait_for_workers()
        wait_until_gone(tree.objects)
        assert_all_is_over(tree)
        assert_silent(tree, how)


# ---- a worker, while its root lives ----


@each_method
def test_g1_g2_g4_worker_ends_in_each_way(method):
    """What it shared, be it in flight, stays as long as the root (G5), and so does what it attached."""
    ways = [*BY_ITSELF, *SIGNALS]
    with Tree(method, workers=len(ways)) as tree:
        living = list(tree.workers)
        for how in ways:
            worker = living.pop()
            if how in BY_ITSELF:
                tree.ask(f"worker {worker} {how}")
            else:
                os.kill(worker, signal.Signals[how])
            wait_until_gone(tree.workers[worker]["private"])
            kept = [*tree.own_objects, *tree.objects_of(*living)]
            kept += itertools.chain(*(made["given"] + made["shared"] for made in tree.workers.values()))
            assert not [each for each in kept if each not in existing(kept)]
        tree.wait_for_workers()
        end(tree, "root", "exit")
        wait_until_gone(tree.objects)
        assert_all_is_over(tree)
        assert "posix_ipc" not in tree.stderr()
        assert tree.stderr().count("RuntimeError: as asked") == 1
        assert "leaked" not in tree.stderr()


# ---- the whole group ----


def group_ends(method, how):
    with Tree(method, workers=1) as tree:
        end(tree, "group", how)
        tree.wait_for_workers()
        wait_until_gone(tree.objects)
        assert_all_is_over(tree)
        assert_silent(tree, how)


each_end = pytest.mark.parametrize("ends", [root_ends, group_ends], ids=["root", "group"])


@each_end
@each_method
@by_itself
def test_g1_root_or_group_ends_by_itself(ends, method, how):
    ends(method, how)


@each_end
@each_method
@by_signal
def test_g2_root_or_group_gets_a_signal(ends, method, how):
    ends(method, how)


def test_g2_tracker_is_deaf_to_the_signals_of_groups():
    """It has a session of its own, and if it gets them all the same it goes on, and does what it is there for."""
    with Tree("fork") as tree:
        (tracker,) = trackers(tree.token)
        assert tracker.pid not in [process.pid for process in psutil.Process(tree.root).children(recursive=True)]
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
            tracker.send_signal(number)
        worker = next(iter(tree.workers))
        psutil.Process(worker).kill()
        wait_until_gone(tree.workers[worker]["private"])
        assert trackers(tree.token) == [tracker]
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
            tracker.send_signal(number)
        tree.kill_group(signal.SIGKILL)
        wait_until_gone(tree.objects)
        assert_all_is_over(tree)


# ---- the whole group, and the tracker ----

NEXT_CREATION = """
import sys
from posix_ipc.mp_integration import Semaphore
made = Semaphore()
print("ready", flush=True)
sys.stdin.read()
"""


@each_method
@pytest.mark.parametrize("how", [*BY_ITSELF, *SIGNALS])
def test_g3_group_ends_after_its_tracker(method, how):
    """Who ends in good order cleans up by himself; the rest goes when somebody creates something."""
    with Tree(method, workers=1) as tree:
        tree.kill_trackers()
        end(tree, "group", how)
        tree.wait_for_workers()
        if how == "SIGKILL" and private_ipc() is not None:  # else a neighbour may have swept
            assert existing(tree.objects) == tree.objects
        if how == "exit":
            wait_until_gone(tree.own_objects)
        with start_python(NEXT_CREATION) as another:
            wait_until_ready(another)
            wait_until_gone(tree.objects)  # while it lives: it is not its end that did it
            assert finish(another) == ""
        assert_silent(tree, how)
