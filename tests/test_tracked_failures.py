"""A tracked create that fails leaves no name, descriptor, mapping or record; a failed cleanup masks nothing."""

import errno
import logging
import multiprocessing
import os
import resource
import signal
import sys

import psutil
import pytest
from lifetime import OPTIONS, existing, make, trackers
from support import SMALL_QUEUE, open_fds, run_privately, run_python, wait_until
from test_exhaustion import limit, no_address_space_left

from posix_ipc import ExistentialError, _journal, mp_integration
from posix_ipc.mp_integration import IPCManager, Semaphore, SharedMemory

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="tracking is for Linux")

# ---- create ----


def all_that_is_kept():
    """Names, descriptors, mappings and records."""
    records = []
    for process in _journal.existing():
        for journal in process.journals:
            descriptor = os.open(journal.path, os.O_RDONLY)
            with _journal.closing(descriptor):
                records.append(_journal.read(descriptor).entries)
    with open("/proc/self/maps") as maps:
        mapped = [line.split(maxsplit=5)[5] for line in maps if "/dev/shm/" in line]
    return sorted(os.listdir("/dev/shm")), open_fds(), mapped, records


def create_in_vain(kind):
    """Of a name that is taken, and then of one without a descriptor left for it."""
    made = make(kind, "/taken")
    before = all_that_is_kept()
    assert [len(entries) for entries in before[3]] == [1]
    with pytest.raises(ExistentialError):
        make(kind, "/taken")
    assert all_that_is_kept() == before
    with limit(resource.RLIMIT_NOFILE, len(open_fds()) - 1), pytest.raises(OSError, match="Too many") as caught:
        make(kind, "/new")
    assert caught.value.errno == errno.EMFILE
    assert all_that_is_kept() == before
    assert not existing([(kind, "/new")])
    made.unlink()


@pytest.mark.slow
@pytest.mark.parametrize("kind", OPTIONS)
def test_a_failed_create_leaves_nothing(kind):
    run_privately(create_in_vain, kind)


def create_without_memory():
    """Only a semaphore is mapped when it is made."""
    made = Semaphore()
    before = all_that_is_kept()
    with no_address_space_left(), pytest.raises((OSError, MemoryError)) as caught:
        Semaphore.create("/new")
    if isinstance(caught.value, OSError):  # else Python had none itself
        assert caught.value.errno == errno.ENOMEM
    assert all_that_is_kept() == before
    assert not existing([("Semaphore", "/new")])
    made.unlink()


@pytest.mark.slow
def test_a_create_that_fails_without_memory_leaves_nothing():
    run_privately(create_without_memory)


# ---- the end of a block ----


class BlockError(Exception):
    pass


def leave_a_manager_that_fails(in_flight):
    """All of the others go, the failure is raised when nothing else is, and no process is started for any of it."""
    names, first, second = [], RuntimeError("first"), RuntimeError("second")

    def failing(handle, error):
        handle_type = type(handle)

        def unlink(self):
            handle_type.unlink(self)
            raise error

        handle.__class__ = type("Failing", (handle_type,), {"unlink": unlink})

    warnings = []
    handler = logging.Handler()
    handler.emit = lambda record: warnings.append(record.getMessage())
    logging.getLogger("posix_ipc").addHandler(handler)
    with pytest.raises(BlockError if in_flight else RuntimeError) as caught, IPCManager() as ipc:
        made = [ipc.SharedMemory(size=8), ipc.Semaphore(), ipc.MessageQueue(**SMALL_QUEUE), ipc.Semaphore()]
        names += [(type(each).__name__, each.name) for each in made]
        failing(made[1], second)
        failing(made[3], first)  # is the first to go
        assert psutil.Process().children() == []
        if in_flight:
            raise BlockError
    assert in_flight or caught.value is first
    assert not existing(names)
    assert len(warnings) == 2 - (not in_flight)
    assert all(text.startswith("cleaning up ") for text in warnings)


@pytest.mark.slow
@pytest.mark.parametrize("in_flight", [False, True], ids=["left normally", "left by an exception"])
def test_a_manager_whose_cleanup_fails(in_flight):
    run_privately(leave_a_manager_that_fails, in_flight)


def interrupt_a_manager(in_flight):
    """Ctrl-C in the midst of cleaning up: the others go all the same."""
    names = []

    class Interrupted(SharedMemory):
        def unlink(self):
            super().unlink()
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt), IPCManager() as ipc:
        made = [ipc.SharedMemory(size=8) for _ in range(3)]
        made[1].__class__ = Interrupted
        names += [("SharedMemory", each.name) for each in made]
        if in_flight:
            raise BlockError
    assert not existing(names)


@pytest.mark.slow
@pytest.mark.parametrize("in_flight", [False, True], ids=["left normally", "left by an exception"])
def test_a_manager_that_ctrl_c_interrupts_at_its_end(in_flight):
    run_privately(interrupt_a_manager, in_flight)


def manage_alone():
    """Of all processes there are, also those that nobody here is the parent of, one is new: the tracker."""
    before = set(psutil.pids())
    with IPCManager() as ipc:
        made = [ipc.SharedMemory(size=8), ipc.Semaphore(), ipc.MessageQueue(**SMALL_QUEUE)]
        assert all(each.owned for each in made)
        token = multiprocessing.current_process()._config["posix_ipc_token"]
        (tracker,) = wait_until(lambda: trackers(token))
        assert set(psutil.pids()) - before == {tracker.pid}
    assert set(psutil.pids()) - before == {tracker.pid}
    assert not any(each.owned for each in made)
    assert not existing([(type(each).__name__, each.name) for each in made])


@pytest.mark.slow
def test_a_manager_starts_no_process_but_the_tracker():
    run_privately(manage_alone)


# ---- attaching ----

ATTACH = """
import sys
from posix_ipc import mp_integration
for kind in sys.argv[1:]:
    assert not getattr(mp_integration, kind).attach("/made").owned
"""


def attach_beside_no_tracker():
    """From this process and from another one: while the tracker is stopped, and when it is dead."""
    made = [make(kind, "/made") for kind in OPTIONS]
    token = multiprocessing.current_process()._config["posix_ipc_token"]
    (tracker,) = wait_until(lambda: trackers(token))
    for end in (tracker.suspend, tracker.kill):
        end()
        if end == tracker.kill:
            wait_until(lambda: not trackers(token))
        before = sorted(os.listdir(directory := _journal.directory()))
        for kind in OPTIONS:
            getattr(mp_integration, kind).attach("/made").close()
        run_python(ATTACH, *OPTIONS, timeout=10)
        assert sorted(os.listdir(directory)) == before
        assert trackers(token) == ([tracker] if end == tracker.suspend else [])
    for each in made:
        each.unlink()


@pytest.mark.slow
def test_attaching_never_talks_to_the_tracker():
    run_privately(attach_beside_no_tracker)
