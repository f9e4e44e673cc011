"""The first creation of a process makes a journal and starts a tracker: nothing else does, and nothing waits for it."""

import ctypes
import os
import signal
import sys
import threading

import pytest
from lifetime import run_privately

from posix_ipc import _tracker
from posix_ipc.mp_integration import Semaphore

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="tracking is for Linux")

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


def test_g12_a_child_that_was_forked_in_c_waits_for_no_thread_of_its_parent():
    run_privately(fork_in_c_in_the_midst)
