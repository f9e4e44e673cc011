"""How tracked objects end: G1 to G5 and G10 of docs/design.md, with real processes and real signals."""

import os
import signal
import subprocess
import sys
import time

import pytest
from lifetime import Tree, existing, journal_files, trackers, wait_until_gone
from support import run_python, wait_until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="tracking is for Linux")

each_method = pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGKILL]


@pytest.fixture
def tree(method):
    with Tree(method) as tree:
        yield tree


def assert_all_is_over(tree):
    """The tracker and its files go too, once nothing is owed."""
    wait_until(lambda: not journal_files(tree.token))
    wait_until(lambda: not trackers(tree.token))


@each_method
@pytest.mark.parametrize("how", ["exit", "exception", "os._exit"])
def test_g1_root_ends_by_itself(tree, how):
    tree.ask(how)
    stderr = tree.wait()
    tree.kill_workers()  # after os._exit nobody has told them, and what they lease lives with them
    wait_until_gone(tree.objects)
    assert ("RuntimeError" in stderr) == (how == "exception")
    assert "posix_ipc" not in stderr
    assert "leaked" not in stderr
    assert_all_is_over(tree)


@each_method
@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
@pytest.mark.parametrize("whom", ["root", "group"])
def test_g2_root_or_group_is_killed(tree, whom, number):
    tree.kill_root(number) if whom == "root" else tree.kill_group(number)
    tree.wait()
    tree.kill_workers()
    wait_until_gone(tree.objects)
    assert_all_is_over(tree)


@each_method
def test_g3_everything_is_killed_and_the_next_creation_sweeps(tree):
    tree.kill_trackers()
    tree.kill_group(signal.SIGKILL)
    tree.wait()
    tree.kill_workers()
    run_python("from posix_ipc.mp_integration import Semaphore; Semaphore()")
    wait_until_gone(tree.objects)


@each_method
def test_g3_everything_is_killed_and_the_command_sweeps(tree):
    tree.kill_trackers()
    tree.kill_group(signal.SIGKILL)
    tree.wait()
    tree.kill_workers()
    time.sleep(0)
    subprocess.run([sys.executable, "-m", "posix_ipc", "reap"], check=True, stdout=subprocess.DEVNULL)
    # Another sweep may have been under way and have seen the lease of a worker that was dying.
    wait_until(
        lambda: (
            subprocess.run([sys.executable, "-m", "posix_ipc", "reap"], stdout=subprocess.DEVNULL)
            and not existing(tree.objects)
        )
    )


@each_method
def test_g4_worker_is_killed_while_its_root_lives(tree):
    victim, survivor = tree.workers
    os.kill(victim, signal.SIGKILL)
    wait_until_gone(tree.workers[victim]["private"])
    kept = [*tree.own_objects, *tree.workers[victim]["shared"], *tree.workers[survivor]["private"]]
    assert existing(kept) == kept  # what is in flight stays as long as the root lives (G5)


@each_method
def test_g10_tracker_is_killed_and_replaced(tree):
    """The next creation anywhere in the tree starts another, which knows all that the first one knew."""
    tree.kill_trackers()
    wait_until(lambda: not trackers(tree.token))
    tree.kill_group(signal.SIGKILL)
    tree.wait()
    tree.kill_workers()
    run_python("from posix_ipc.mp_integration import Semaphore; Semaphore()")
    wait_until_gone(tree.objects)


@each_method
def test_g5_what_another_program_leases_lives_until_it_is_free(tree):
    names = [name for _, name in tree.own_objects[3:]]
    foreign = (
        "import sys; from posix_ipc.mp_integration import *\n"
        "held = [cls.attach(name) for cls, name in zip((SharedMemory, Semaphore, MessageQueue), sys.argv[1:])]\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", foreign, *names], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "ready\n"
        tree.kill_group(signal.SIGKILL)
        tree.wait()
        tree.kill_workers()
        leased = tree.own_objects[3:]
        wait_until_gone([each for each in tree.objects if each not in leased])
        assert existing(leased) == leased
        other.communicate("\n", timeout=30)
    wait_until_gone(leased)
    assert_all_is_over(tree)


@each_method
def test_g5_an_attacher_that_is_killed_takes_nothing_with_it(tree):
    names = [name for _, name in tree.own_objects[3:]]
    run_python(
        "import os, sys; from posix_ipc.mp_integration import *\n"
        "held = [cls.attach(name) for cls, name in zip((SharedMemory, Semaphore, MessageQueue), sys.argv[1:])]\n"
        "os.kill(os.getpid(), 9)\n",
        *names,
        check=False,
    )
    assert existing(tree.objects) == tree.objects
