"""The tracker's own life: when it starts, sleeps, sweeps and leaves. What it removes: test_lifetime, test_sweep."""

import contextlib
import multiprocessing
import os
import platform
import select
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import pytest
from lifetime import die_after, existing, has_ended, make, trackers
from support import become_nobody, run_privately, start_python, wait_until, wait_until_ready

from posix_ipc import _ext, _journal, _owners, _reaper, _tracker
from posix_ipc.mp_integration import Semaphore, SharedMemory, reap

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="tracking is for Linux")

# ---- its start ----


def start_beside_lookers():
    SharedMemory(size=8).close()
    (process,) = _journal.existing()
    lock = os.fsdecode(process.tracker_lock)
    looker = (
        "import sys, time\nfrom posix_ipc import _ext\nprint('ready', flush=True)\n"
        "while True: _ext._is_locked(sys.argv[1]); time.sleep(0.0005)\n"
    )
    with start_python(looker, lock) as first, start_python(looker, lock) as second:
        wait_until_ready(first)
        wait_until_ready(second)
        for _ in range(10):
            (tracker,) = wait_until(lambda: trackers(process.token))
            tracker.kill()
            wait_until(lambda tracker=tracker: has_ended(tracker))
            SharedMemory(size=8).close()


@pytest.mark.slow
def test_g10_a_tracker_starts_while_others_look_for_it():
    run_privately(start_beside_lookers)


def create_in_a_frozen_application():
    sys.frozen = True
    tracked = Semaphore()
    (process,) = _journal.existing()
    assert not _ext._is_locked(process.tracker_lock)
    del sys.frozen
    multiprocessing.set_executable("")
    tracked.close()
    tracked = Semaphore()
    assert not _ext._is_locked(process.tracker_lock)
    multiprocessing.set_executable(sys.executable)
    tracked.close()
    tracked = Semaphore()
    assert _ext._is_locked(process.tracker_lock)


@pytest.mark.slow
def test_the_program_of_a_frozen_application_is_no_tracker():
    run_privately(create_in_a_frozen_application)


# ---- its rest ----


def work_of(tracker):
    return tracker.cpu_times(), tracker.num_ctx_switches()


def wait_until_at_rest(tracker):
    def rests():
        before = work_of(tracker)
        time.sleep(0.6)  # longer than it ever pauses between looks
        return work_of(tracker) == before

    wait_until(rests)


def watch_an_idle_tracker():
    with SharedMemory(size=8):
        token = multiprocessing.current_process()._config["posix_ipc_token"]
        (tracker,) = wait_until(lambda: trackers(token))
        wait_until_at_rest(tracker)
        before = work_of(tracker)
        reap()  # by a process of its own, beside it
        assert work_of(tracker) == before


@pytest.mark.slow
def test_the_tracker_sleeps_while_nothing_is_owed():
    run_privately(watch_an_idle_tracker)  # in the directory that all share, the journals of others wake it


DAEMON = """
import multiprocessing, os, sys
from posix_ipc.mp_integration import SharedMemory
ready, told = os.pipe()
if os.fork():
    os.read(ready, 1)
    os._exit(0)
kept = SharedMemory.create("/kept", size=8)  # under a root that still lives
os.write(told, b".")
print(multiprocessing.current_process()._config["posix_ipc_token"], os.getpid(), flush=True)
sys.stdin.read()
"""


def watch_the_tracker_of_a_daemon():
    with start_python(DAEMON) as root:
        token, daemon = root.stdout.readline().split()
        assert token.startswith(f"{root.pid}-")
        (tracker,) = wait_until(lambda: trackers(token))
        root.wait(30)
        wait_until_at_rest(tracker)
        assert existing([("SharedMemory", "/kept")])
        os.kill(int(daemon), signal.SIGKILL)
        wait_until(lambda: not existing([("SharedMemory", "/kept")]))
        wait_until(lambda: not trackers(token))


@pytest.mark.slow
def test_the_tracker_sleeps_also_when_the_root_has_ended():
    run_privately(watch_the_tracker_of_a_daemon)


# ---- its end ----


def run_tracker(token, cls=_tracker.Tracker):
    """In this process, until it has nothing more to wait for."""
    (directory,) = _journal.directories()
    held = Path(directory, f"{token}.tracker")
    lock = os.open(held, os.O_CREAT | os.O_RDWR, 0o600)
    assert _owners.try_lock(lock)
    os.dup2(lock, _tracker.LOCK)
    cls(directory, token).run()
    assert not held.exists()


def leave_what_cannot_be_read():
    segment = make("SharedMemory", "/unreadable")
    os.chmod("/dev/shm/unreadable", 0)
    segment.close()


def track_what_cannot_be_read():
    become_nobody()
    die_after(leave_what_cannot_be_read)
    (directory,) = _journal.directories()
    (journal,) = Path(directory).glob("*.root")
    run_tracker(journal.stem)
    assert existing([("SharedMemory", "/unreadable")])
    assert journal.exists()  # for a sweep by somebody who may read it


@pytest.mark.slow
def test_a_tracker_does_not_wait_for_what_it_cannot_read():
    run_privately(track_what_cannot_be_read)


def fork_a_member(token, then):
    """A process of a tree, which has a tracker as far as it can see; the pid."""
    ready, told = os.pipe()
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            multiprocessing.current_process()._config["posix_ipc_token"] = token
            make("SharedMemory", "/of-a-member")
            os.write(told, b".")
            then()
        os._exit(1)
    os.close(told)
    assert os.read(ready, 1) == b"."
    os.close(ready)
    return child


def kill(child):
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def token_of_the_dead():
    with start_python("import sys; sys.stdin.read()") as root:
        token = _journal.token_of(root.pid)
        root.kill()
    return token


def die_after_the_sweep():
    """The last one of a tree, which the tracker's sweep has still seen alive."""
    token = token_of_the_dead()
    _tracker.ensure = lambda *_: None
    child = fork_a_member(token, signal.pause)
    sweep, sweeps = _reaper.sweep, []

    def sweep_then_kill():
        sweeps.append(sweep())
        if len(sweeps) == 1:
            kill(child)
        return sweeps[-1]

    _reaper.sweep = sweep_then_kill
    run_tracker(token)
    assert not existing([("SharedMemory", "/of-a-member")])


@pytest.mark.slow
def test_g2_the_tracker_stays_for_whoever_dies_between_its_looks():
    run_privately(die_after_the_sweep)


def create_before_it_retires():
    """In a process that still finds the lock of the tracker, and so starts none."""
    token = token_of_the_dead()
    _journal.directory()
    members = []

    class Retiring(_tracker.Tracker):
        def _retire(self):
            members.append(fork_a_member(token, signal.pause))
            super()._retire()
            kill(members[0])

    run_tracker(token, Retiring)
    assert members
    assert not existing([("SharedMemory", "/of-a-member")])


@pytest.mark.slow
def test_g2_the_tracker_stays_for_whoever_relied_on_it_as_it_left():
    run_privately(create_before_it_retires)


# ---- signals while it starts ----


_WAIT4 = 61 if platform.machine() == "x86_64" else 260


def signal_the_group_meanwhile():
    """Each signal is noted once: the process that prepares the tracker still has this one's handlers."""
    os.setpgid(0, 0)
    noted, note = socket.socketpair()
    noted.setblocking(False)
    note.setblocking(False)
    signal.signal(signal.SIGWINCH, lambda *_: None)
    signal.set_wakeup_fd(note.fileno())
    lock = _ext.Journal("/dev/shm/lock", 1)  # it waits for that, in vain
    calls = Path(f"/proc/self/task/{threading.get_native_id()}/syscall")
    sent = []

    def waits_for_the_child():
        return calls.read_text().startswith(f"{_WAIT4} ")

    def send():
        wait_until(waits_for_the_child)
        os.killpg(0, signal.SIGWINCH)
        sent.append(waits_for_the_child())

    deadline = time.monotonic() + 30
    while not any(sent):
        assert time.monotonic() < deadline
        sender = threading.Thread(target=send)
        sender.start()
        while sender.is_alive():
            _ext._start_tracker(lock.path, ("/bin/true",))
        assert select.select([noted], [], [], 30)[0]
        assert noted.recv(100) == bytes([signal.SIGWINCH])


@pytest.mark.slow
def test_a_signal_while_the_tracker_starts_is_noted_once():
    run_privately(signal_the_group_meanwhile)
