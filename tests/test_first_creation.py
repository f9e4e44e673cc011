"""What a process is the first to answer for gives it a journal, and its tree a tracker; nothing else does.

That it waits for nobody then: test_waits_for_nobody.py.
"""

import ctypes
import multiprocessing
import os
import pickle
import signal
import sys
import threading

import psutil
import pytest
from lifetime import DIRECTORY, OPTIONS, existing, trackers
from support import run_forked, run_privately, wait_until

import posix_ipc
from posix_ipc import O_CREAT, O_CREX, O_TRUNC, _journal, _tracker, leaks, mp_integration
from posix_ipc.mp_integration import Semaphore, reap, track

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="tracking is for Linux")

# ---- what it takes ----

PLAIN = [(kind, "/plain") for kind in OPTIONS]


def create_plain():
    return [getattr(posix_ipc, kind)(name, O_CREX, **OPTIONS[kind]) for kind, name in PLAIN]


def attach():
    return [getattr(mp_integration, kind).attach(name) for kind, name in PLAIN]


def use_and_close():
    semaphore, segment, queue = attach()
    semaphore.release()
    segment.buf[0] = 1
    queue.send(b"")
    for each in (semaphore, segment, queue):
        each.close()


def unlink():
    for each in attach():
        each.unlink()
        assert not each.owned


ANSWERS_FOR_NOTHING = {
    "plain objects": lambda: pickle.loads(pickle.dumps(create_plain())),
    "use": use_and_close,
    "a sweep": reap,
    "a look": leaks.inventory,
    "unlinking": unlink,
}


def answer_for_nothing():
    processes = set(psutil.pids())
    for what, act in ANSWERS_FOR_NOTHING.items():
        act()
        assert set(psutil.pids()) == processes, what
        assert not [name for name in os.listdir("/dev/shm") if name.startswith(".posix_ipc")], what
    assert not existing(PLAIN)


@pytest.mark.slow
def test_attaching_looking_and_unlinking_make_no_journal_and_start_no_tracker():
    run_privately(answer_for_nothing)


ANSWERS_FOR_SOMETHING = {
    "creating": lambda name: Semaphore(),
    "sending": lambda name: pickle.dumps(Semaphore.attach(name)),
    "taking": lambda name: Semaphore.attach(name).take_ownership(),
    "tracking": lambda name: track(posix_ipc.Semaphore(f"{name}-tracked", O_CREX)),
}


def be_a_root(act):
    token = _journal.own_token()
    multiprocessing.current_process()._config["posix_ipc_token"] = token
    kept = act("/plain")
    assert DIRECTORY.joinpath(f"{token}.root").exists()
    assert len(wait_until(lambda: trackers(token))) == 1
    del kept


def answer_for_something():
    posix_ipc.Semaphore("/plain", O_CREX)
    for act in ANSWERS_FOR_SOMETHING.values():
        run_forked(be_a_root, act)


@pytest.mark.slow
def test_creating_sending_taking_and_tracking_make_a_journal_and_start_a_tracker():
    run_privately(answer_for_something)


# ---- beside a fork ----


def fork_in_c_in_the_midst():
    """Another thread prepares the parent just then, and will never be done in the child."""
    inside, forked = threading.Event(), threading.Event()
    parent, ensure = os.getpid(), _tracker.ensure

    def ensure_later(*arguments):
        if os.getpid() == parent:
            inside.set()
            forked.wait(30)
        ensure(*arguments)

    _tracker.ensure = ensure_later
    thread = threading.Thread(target=Semaphore)
    thread.start()
    assert inside.wait(30)
    child = ctypes.PyDLL(None).fork()
    if child == 0:
        signal.alarm(10)
        os._exit(0 if Semaphore().owned else 1)
    _, status = os.waitpid(child, 0)
    forked.set()
    thread.join()
    assert os.waitstatus_to_exitcode(status) == 0


@pytest.mark.slow
def test_g12_a_child_that_was_forked_in_c_waits_for_no_thread_of_its_parent():
    run_privately(fork_in_c_in_the_midst)


# ---- arguments that make no sense ----

WRONG = {
    "Semaphore": [
        {"name": 3},
        {"name": "/a\0b"},
        {"name": "/" + 300 * "x"},
        {"name": "/a/b"},
        {"name": "/"},
        {"name": None, "flags": O_CREAT},
        {"flags": "x"},
        {"flags": os.O_EXCL},
        {"mode": "x"},
        {"mode": 0o200},
        {"mode": 1 << 20},
        {"initial_value": "x"},
        {"initial_value": -1},
        {"initial_value": 1 << 40},
    ],
    "SharedMemory": [
        {"size": "x"},
        {"size": -1},
        {"size": 1 << 70},
        {"size": 8, "reserve": "x"},
        {"reserve": True},
        {"size": 8, "read_only": True},
        {"read_only": []},
        {"flags": O_CREX | O_TRUNC},
        {"name": "/x", "flags": 0, "size": 8},
    ],
    "MessageQueue": [
        {"max_messages": "x"},
        {"max_messages": 0},
        {"max_messages": 1 << 70},
        {"max_message_size": "x"},
        {"max_message_size": 0},
        {"read": "x"},
        {"write": "x"},
        {"read": False, "write": False},
    ],
}
FOR_ALL = WRONG["Semaphore"][:-3]


def create_wrongly():
    for kind, all_arguments in WRONG.items():
        for arguments in [*FOR_ALL, *all_arguments]:
            if (kind, arguments) == ("MessageQueue", {"name": "/a/b"}):
                continue  # the kernel says so
            if "name" in arguments:
                arguments = {"flags": O_CREX, **arguments}
            with pytest.raises((TypeError, ValueError)):
                getattr(mp_integration, kind)(**arguments)
            assert os.listdir("/dev/shm") == [], (kind, arguments)


@pytest.mark.slow
def test_arguments_that_make_no_sense_make_no_journal_and_start_no_tracker():
    run_privately(create_wrongly)


def create_and_listen():
    """The look at the arguments of a first creation is none of the events that are audited."""
    events = []
    sys.addaudithook(lambda event, arguments: events.append(event) if event.startswith("posix_ipc") else None)
    for number in (1, 2):
        for kind, options in OPTIONS.items():
            getattr(mp_integration, kind)(**options)
        made = [event for event in events if event.endswith("create")]
        assert len(made) == 3 * number, events


@pytest.mark.slow
def test_a_first_creation_is_audited_once():
    run_privately(create_and_listen)
