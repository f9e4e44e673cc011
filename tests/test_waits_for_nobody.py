"""Creating, attaching, unlinking and ending wait for no other process: not for a tracker, and not for a sweep.

Stopped processes are what shows it: whoever waited for one would wait for ever. And strace tells that no call is made
that could wait, so that nothing here depends on how quick the machine is.
"""

import contextlib
import re
import shutil
import sys
from pathlib import Path

import psutil
import pytest
from lifetime import OPTIONS, existing, trackers
from support import finish, run_privately, run_python, start_python, wait_until

from posix_ipc import _ext, _journal

pytestmark = [pytest.mark.skipif(sys.platform != "linux", reason="tracking is for Linux"), pytest.mark.slow]

# ---- beside processes that are stopped ----

LIVE = """
import multiprocessing, pickle, sys
from leaving import OPTIONS
from posix_ipc import mp_integration

def live(who):
    for kind, options in OPTIONS.items():
        cls = getattr(mp_integration, kind)
        unlinked, kept = cls(**options), cls.create(f"/{who}", **options)
        cls.attach(f"/{who}").close()
        pickle.loads(pickle.dumps(unlinked)).close()
        unlinked.unlink()
        unlinked.close()
        left.append(kept)

left = []
if __name__ == "__main__":
    live("first")
    print(multiprocessing.current_process()._config["posix_ipc_token"], flush=True)
    sys.stdin.readline()
    live("root")
    worker = multiprocessing.get_context("fork").Process(target=live, args=("worker",))
    worker.start()
    worker.join()
    sys.exit(worker.exitcode)
"""

STOP_IN_THE_MIDST_OF_A_SWEEP = """
import os, signal
from posix_ipc import _reaper
_reaper.reap(lambda line: os.kill(os.getpid(), signal.SIGSTOP))
"""


@contextlib.contextmanager
def stopped_in_a_sweep():
    """A process that was about to tell of a file that is no journal, and holds the lock of its sweep for good."""
    garbage = Path(_journal.directory(), "999999999-1-1.j0")
    garbage.write_bytes(b"garbage")
    garbage.chmod(0o600)
    with start_python(STOP_IN_THE_MIDST_OF_A_SWEEP) as sweeper:
        wait_until(lambda: psutil.Process(sweeper.pid).status() == psutil.STATUS_STOPPED)
        assert _ext._is_locked(garbage.parent)
        yield
        assert psutil.Process(sweeper.pid).status() == psutil.STATUS_STOPPED


def live_beside_the_stopped():
    everything = [(kind, f"/{who}") for kind in OPTIONS for who in ("first", "root", "worker")]
    with stopped_in_a_sweep(), start_python(LIVE) as root:
        token = root.stdout.readline().strip()  # its first creation is done, its tracker tries to sweep
        (tracker,) = wait_until(lambda: trackers(token))
        tracker.suspend()
        assert finish(root, timeout=30) == ""
        assert tracker.status() == psutil.STATUS_STOPPED
        assert not existing(everything)  # by whoever made it: nobody else could


def test_nothing_waits_for_a_tracker_or_a_sweep_that_is_stopped():
    run_privately(live_beside_the_stopped)


# ---- call by call ----

TRACED = """
import os, pickle
from leaving import OPTIONS
from posix_ipc import mp_integration
first = mp_integration.Semaphore()
kept = []
os.path.exists("/it-works")
for kind, options in OPTIONS.items():
    cls = getattr(mp_integration, kind)
    unlinked = cls(**options)
    kept += [cls(**options), cls.attach(unlinked.name), pickle.loads(pickle.dumps(unlinked))]
    unlinked.unlink()
    unlinked.close()
os.path.exists("/it-ends")
"""
LOCK = re.compile(r"flock\((?!.*LOCK_NB)|F_(OFD_)?SETLKW")
SLEEP = re.compile(r"nanosleep\(|select6?\(0, NULL")
CHILD = re.compile(r"wait4\(|waitid\(|clone3?\(|v?fork\(")
EVENT = re.compile(
    r"p?select6?\(|p?poll\(|epoll_p?wait2?\(|pause\(|rt_sig(suspend|timedwait)\(|futex\(.*FUTEX_WAIT|mq_timed"
)
PEER = re.compile(r"\((\d+)<(pipe|socket|anon_inode)")  # strace -y tells what a descriptor leads to


def trace_a_life():
    """The calls of a process while it works, and while it ends."""
    trace = Path("/dev/shm/trace")
    run_python(TRACED, prefix=["strace", "-qq", "-y", "-o", str(trace)])
    lines = trace.read_text().splitlines()
    trace.unlink()
    works, ends = (next(i for i, line in enumerate(lines) if f'"/it-{what}"' in line) for what in ("works", "ends"))
    return lines[works:ends], lines[ends:]


def find_waits(calls):
    """Those that could wait for somebody; and how many only slept for a while."""
    sleeps = [call for call in calls if SLEEP.search(call)]
    waits = [call for call in calls if any(kind.search(call) for kind in (LOCK, CHILD, EVENT, PEER))]
    return [call for call in waits if call not in sleeps], len(sleeps)


def live_call_by_call():
    """With nobody else around, and so without any reason to wait; and beside a sweep that does not come to its end."""
    works, ends = trace_a_life()
    assert sum("flock(" in call for call in works) > 10
    assert sum("renameat2(" in call for call in ends) == 3
    assert (find_waits(works), find_waits(ends)) == (([], 0), ([], 0))
    with stopped_in_a_sweep():
        works, ends = trace_a_life()
    assert find_waits(works) == ([], 0)
    waits, sleeps = find_waits(ends)
    assert waits == [], waits
    assert 1 <= sleeps <= 4  # 1 ms, 2, 4, 8: until HASTE is over


@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
@pytest.mark.no_sanitizer
def test_g1_no_call_waits_for_anybody():
    run_privately(live_call_by_call)
