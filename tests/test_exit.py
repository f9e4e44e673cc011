"""A normal exit cleans up by itself, also where no tracker outlives the process: PID 1, a frozen program, a cgroup.

The programs have a lock of their tracker, and no tracker: nobody else removes anything.
"""

import fcntl
import os
import sys

import pytest
from lifetime import DIRECTORY, die_after, existing, make
from support import run_privately, run_python

from posix_ipc import _journal, _reaper

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="tracking is for Linux")

WITHOUT_A_TRACKER = """
import logging, multiprocessing, os, pickle, sys
from lifetime import belong_to_a_new_tree
from posix_ipc.mp_integration import Semaphore, SharedMemory
tracker = belong_to_a_new_tree()
made = SharedMemory.create("/made", size=8)
"""
MADE = [("SharedMemory", "/made")]


def end(more=""):
    """Let a program make something and end; what was removed is what it removed itself, without a word."""
    done = run_python(WITHOUT_A_TRACKER + more)
    assert done.stderr == ""
    return done.stdout


def end_beside_a_sweep():
    lock = os.open(_journal.directory(), os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    end()
    assert not existing(MADE)


@pytest.mark.slow
def test_g1_an_end_beside_a_sweep():
    run_privately(end_beside_a_sweep)


def end_beside_orphans():
    die_after(make, "SharedMemory", "/orphan")
    end()
    assert not existing(MADE)
    assert existing([("SharedMemory", "/orphan")])
    assert [each.name for each in _reaper.reap()] == ["/orphan"]


@pytest.mark.slow
def test_an_end_is_not_held_up_by_what_others_have_left():
    run_privately(end_beside_orphans)


def end_with_other_handles():
    for another in (
        "second = pickle.loads(pickle.dumps(made))",
        "second = SharedMemory.attach('/made')",
        "made.close(); second = SharedMemory.attach('/made'); second.itself = [second]",
        "class Other(SharedMemory): pass\nsecond = Other.attach('/made'); second.buf[0] = 1",
    ):
        end(another)
        assert not existing(MADE), another


@pytest.mark.slow
def test_g1_an_end_with_other_handles_on_what_is_owned():
    run_privately(end_with_other_handles)


def end_with_a_view():
    end("view = made.buf")
    assert existing(MADE)
    _reaper.reap()
    assert not existing(MADE)


@pytest.mark.slow
def test_limit_a_view_of_the_memory_that_is_kept_until_the_end_needs_a_tracker():
    run_privately(end_with_a_view)


UNLINK = """
import sys, posix_ipc
posix_ipc.unlink_semaphore("/made")
posix_ipc.unlink_shared_memory("/made")
posix_ipc.unlink_message_queue("/made")
"""


def end_after_another_program_unlinked():
    """With a tracker, which has nothing to say either; one of them is unlinked by its owner too."""
    done = run_python(
        "import subprocess, sys\n"
        "from lifetime import OPTIONS, make\n"
        "made = [make(kind, '/made') for kind in OPTIONS]\n"
        "subprocess.run([sys.executable, '-c', sys.argv[1]], check=True)\n"
        "made[0].unlink()\n"
        "with made[1]: pass\n",
        UNLINK,
    )
    assert (done.stdout, done.stderr) == ("", "")


@pytest.mark.slow
def test_an_end_after_another_program_unlinked_is_silent():
    run_privately(end_after_another_program_unlinked)


# ---- what is told of it ----

TELL = """
class Teller(logging.Handler):
    def emit(self, record):
        print(os.getpid(), record.levelname, record.getMessage())
logging.getLogger("posix_ipc").setLevel("INFO")
logging.getLogger("posix_ipc").addHandler(Teller())
second = SharedMemory.attach('/made')
"""


def tell_at_the_end():
    _journal.directory()
    garbage = DIRECTORY / "999999999-1-1.root"
    garbage.write_bytes(b"garbage")
    garbage.chmod(0o600)
    skipped, removed = end(TELL).splitlines()
    pid = int(skipped.split()[0])
    start = f"{pid} INFO process {pid}, at its end: "
    assert skipped == f"{start}{garbage}: skipped: its size is 7"
    assert removed.startswith(f"{start}removed shared_memory '/made': its owner, recorded in {DIRECTORY}/{pid}-")
    assert removed.endswith("has ended, and nobody uses it")


@pytest.mark.slow
def test_what_is_removed_at_the_end_is_logged_with_by_whom_and_why():
    run_privately(tell_at_the_end)
