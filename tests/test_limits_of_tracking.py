"""Where each guarantee ends: what docs/design.md says is not guaranteed, shown to be so.

A test here that fails tells that a limit has moved: then the page is to be changed with it.
"""

import contextlib
import ctypes
import fcntl
import itertools
import mmap
import os
import pickle
import shutil
import signal

import pytest
from lifetime import (
    BY_NAME,
    DIRECTORY,
    OPTIONS,
    Tree,
    belong_to_a_new_tree,
    die_after,
    existing,
    make,
    pretend_tracker,
    wait_until_gone,
)
from stepping import Stepped, is_allowed
from support import CLONE_NEWIPC, run_forked, run_privately

import posix_ipc
from posix_ipc import _journal, _reaper
from posix_ipc.mp_integration import MessageQueue, Semaphore, SharedMemory

KINDS = list(OPTIONS)
EACH = [(kind, "/limit") for kind in KINDS]


@contextlib.contextmanager
def another_root(operation, *args):
    """A process of a tree of its own that has done something, and stands still; it is killed in the end."""

    def run():
        tracker = belong_to_a_new_tree()
        kept = operation(*args)
        yield
        del kept, tracker

    with Stepped(run()) as process:
        yield process


def make_each():
    return [make(*object_) for object_ in EACH]


# ---- who is alive ----


@pytest.mark.slow
def test_g1_workers_that_outlive_their_root_keep_what_they_lease():
    with Tree("fork") as tree:
        tree.kill_root(signal.SIGKILL)
        tree.wait()
        _reaper.reap()
        passed = tree.passed
        assert existing(passed) == passed
        tree.kill_workers()
        wait_until_gone(tree.objects)


def stopped():
    with another_root(make_each):  # ptrace has stopped it
        assert _reaper.reap() == []
        assert existing(EACH) == EACH
    assert len(_reaper.reap()) == 3


def exec_ends_it():
    """The process lives on, with the same pid, and owns and leases nothing any more."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        tracker = belong_to_a_new_tree()
        made = make_each()
        os.set_inheritable(writer, True)
        os.execvp("sh", ["sh", "-c", f"echo >&{writer}; exec sleep 100", repr((made, tracker))])
    os.read(reader, 1)
    try:
        assert len(_reaper.reap()) == 3
        assert os.waitpid(pid, os.WNOHANG) == (0, 0)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


# ---- what counts as shared ----


def name_as_text():
    """It says nothing to the record: what the worker made goes with it, whoever knows how it is called."""
    tracker = pretend_tracker(_journal.own_token())
    run_forked(make_each)
    _reaper.reap()
    for kind, cls in zip(KINDS, (Semaphore, SharedMemory, MessageQueue), strict=True):
        with pytest.raises(posix_ipc.ExistentialError, match="No such file"):
            cls.attach(dict(EACH)[kind])
    del tracker


def never_consumed():
    """What a dead worker shared, and nobody unpickles, lives as long as the root."""

    def live_and_die():
        root = make("SharedMemory", "/of-the-root")
        run_forked(lambda: [pickle.dumps(each) for each in make_each()])
        assert _reaper.reap() == []
        assert existing(EACH) == EACH
        del root

    die_after(live_and_die)
    _reaper.reap()
    assert not existing(EACH)


# ---- who leases nothing ----


def mapped_without_a_lease():
    """As C programs and plain handles do: the memory stays theirs, the name does not."""
    with another_root(make_each):
        descriptor = os.open("/dev/shm/limit", os.O_RDWR)
        memory = mmap.mmap(descriptor, 64)
        os.close(descriptor)
        plain = posix_ipc.Semaphore("/limit")
    assert len(_reaper.reap()) == 3
    assert not existing(EACH)
    memory[:4] = b"here"
    assert memory[:4] == b"here"
    plain.release()
    assert plain.value == 2


def lock_of_a_user():
    """flock() on the descriptor of a segment is the lease's own lock: it meets other leases, and ends this one."""
    owner = make("SharedMemory", "/limit")
    other = SharedMemory.attach("/limit")
    with pytest.raises(BlockingIOError):
        fcntl.flock(other.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    fcntl.lockf(other.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of fcntl, as the page recommends
    other.close()
    owner.unlink()
    with another_root(make, "SharedMemory", "/limit"):
        leased = SharedMemory.attach("/limit")
        fcntl.flock(leased.fd, fcntl.LOCK_UN)
    assert len(_reaper.reap()) == 1
    assert not existing([("SharedMemory", "/limit")])


def lock_of_another_program():
    """Whoever may read an object can keep others from attaching, and keep it alive."""
    with another_root(make, "SharedMemory", "/limit"):
        descriptor = os.open("/dev/shm/limit", os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_SH)
    assert _reaper.reap() == []
    assert existing([("SharedMemory", "/limit")])
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(posix_ipc.BusyError, match="another program keeps it locked"):
        SharedMemory.attach("/limit")
    os.close(descriptor)
    assert len(_reaper.reap()) == 1


# ---- what was not written down, or can be found nowhere ----


def wiped_for_good():
    """Of a wiped directory the next creation writes everything down again. Without one, nobody knows."""

    def wipe():
        kept = make_each()
        shutil.rmtree(DIRECTORY)
        del kept

    die_after(wipe)
    assert _reaper.reap() == []
    assert existing(EACH) == EACH


def queue_of_another_ipc_namespace():
    """Only there it could be removed, and with the namespace it is gone: its journal stays, as an entry too many."""

    def elsewhere():
        if ctypes.CDLL(None).unshare(CLONE_NEWIPC) == 0:
            make("MessageQueue", "/limit")

    die_after(elsewhere)
    assert _reaper.reap() == []
    assert [path.suffix for path in DIRECTORY.iterdir()] == [".root"]
    assert _reaper.reap() == []
    assert [path.suffix for path in DIRECTORY.iterdir()] == [".root"]


def killed_with_the_tracker():
    """G3 is the next sweep, not a time."""
    die_after(make_each)
    assert existing(EACH) == EACH
    die_after(make, "Semaphore", "/next-of-a-tree-without-a-tracker")
    assert existing(EACH) == EACH
    assert len(_reaper.reap()) == 4


def rival_queue():
    """A queue cannot be renamed aside: one that takes the name between the look and the removal goes in its place."""
    object_ = ("MessageQueue", "/limit")
    for stop in itertools.count(1, 2):  # before each call
        die_after(make, *object_)
        taken, rival = False, None
        with Stepped(reaping()) as reaper:
            for number, _ in enumerate(reaper.stops(), 1):
                if number == stop and existing([object_]):
                    taken = True
                    BY_NAME["MessageQueue"].remove("/limit")
                    rival = BY_NAME["MessageQueue"].create("/limit")
        lost = taken and not existing([object_])
        if rival is not None:
            rival.close()
        BY_NAME["MessageQueue"].remove("/limit")
        _reaper.reap()
        if lost:
            break
        assert taken, "the rival survives at every stop: this limit is no more"


def reaping():
    yield
    _reaper.reap()


needs_ptrace = pytest.mark.skipif(not is_allowed(), reason="needs ptrace")


@pytest.mark.slow
@pytest.mark.parametrize(
    "limit",
    [
        pytest.param(stopped, marks=needs_ptrace),
        exec_ends_it,
        name_as_text,
        never_consumed,
        pytest.param(mapped_without_a_lease, marks=needs_ptrace),
        pytest.param(lock_of_a_user, marks=needs_ptrace),
        pytest.param(lock_of_another_program, marks=needs_ptrace),
        wiped_for_good,
        queue_of_another_ipc_namespace,
        killed_with_the_tracker,
        pytest.param(rival_queue, marks=needs_ptrace),
    ],
)
def test_limit(limit):
    run_privately(limit)
