"""How much inventory() does for each object and process: counted, since seconds depend on who else is at work.

What is counted are the calls of functions written in C, and with them all that the kernel is asked.
"""

import contextlib
import functools
import itertools
import os
import subprocess
import sys

import pytest
from lifetime import has_ended, trackers
from support import (
    NOBODY,
    SMALL_QUEUE,
    become_nobody,
    run_forked,
    run_privately,
    skip,
    start_python,
    wait_until,
    wait_until_ready,
)

import posix_ipc
from posix_ipc import _journal

pytestmark = [pytest.mark.skipif(sys.platform != "linux", reason="leak detection is for Linux"), pytest.mark.slow]
leaks = pytest.importorskip("posix_ipc.leaks")
mp_integration = pytest.importorskip("posix_ipc.mp_integration")

N = 20


def calls_of_a_look(kinds=None):
    count = 0

    def count_calls(frame, event, argument):
        nonlocal count
        count += event == "c_call"

    leaks.inventory(kinds)  # fills caches
    sys.setprofile(count_calls)
    try:
        leaks.inventory(kinds)
    finally:
        sys.setprofile(None)
    return count


def assert_steady(work):
    """Each step is as much more as the one before, or less; what comes up once may come up at the first."""
    first, *more = (after - before for before, after in itertools.pairwise(work))
    assert first > N  # it does matter
    assert all(each <= 1.05 * first for each in more), work


def make_objects(first, last):
    """Plain and tracked ones, and some queues; the handles of what is tracked."""
    handles = []
    for number in range(first, last):
        posix_ipc.SharedMemory(f"/plain-{number}", posix_ipc.O_CREX, size=64).close()
        posix_ipc.Semaphore(f"/plain-{number}", posix_ipc.O_CREX).close()
        handles += [
            mp_integration.SharedMemory(f"/tracked-{number}", posix_ipc.O_CREX, size=64),
            mp_integration.Semaphore(f"/tracked-{number}", posix_ipc.O_CREX),
        ]
        if number % 10 == 0:
            posix_ipc.MessageQueue(f"/plain-{number}", posix_ipc.O_CREX, **SMALL_QUEUE).close()
    return handles


def start_holders(stack, segment, **options):
    """Processes that have it open."""
    for _ in range(N):
        process = subprocess.Popen(["sleep", "60"], pass_fds=[segment.fd], **options)
        stack.enter_context(process)
        stack.callback(process.kill)


def look_beside_more_and_more_processes(segment):
    work = [calls_of_a_look()]
    with contextlib.ExitStack() as stack:
        for _ in range(3):
            start_holders(stack, segment)
            work.append(calls_of_a_look())
    assert_steady(work)
    return work[-1] - work[0]


def look_at_more_and_more():
    segment = posix_ipc.SharedMemory("/held", posix_ipc.O_CREX, size=64)
    beside_few_objects = look_beside_more_and_more_processes(segment)
    handles = make_objects(0, 1)  # the first queue and the first journal
    work = [calls_of_a_look()]
    for step in range(3):
        handles += make_objects(1 + step * N, 1 + step * N + N)
        work.append(calls_of_a_look())
    assert_steady(work)
    assert look_beside_more_and_more_processes(segment) <= 1.05 * beside_few_objects


def test_work_grows_as_objects_and_processes_do():
    """And no process costs more because there are more objects."""
    run_privately(look_at_more_and_more)


OWNER = """
import sys
import posix_ipc
from posix_ipc.mp_integration import SharedMemory
handles = [SharedMemory(None, posix_ipc.O_CREX, size=64) for _ in range(int(sys.argv[1]))]
print("ready", flush=True)
sys.stdin.read()
"""


def look_at_more_and_more_orphans():
    work = []
    for count in (N, 2 * N, 3 * N, 4 * N):
        with start_python(OWNER, count) as owner:
            wait_until_ready(owner)
            for tracker in wait_until(functools.partial(trackers, _journal.token_of(owner.pid))):
                tracker.kill()
                wait_until(functools.partial(has_ended, tracker))
            owner.kill()
            owner.wait()
        work.append(calls_of_a_look())
        assert len(leaks.find_leaks()) == count
        mp_integration.reap()
    assert_steady(work)


def test_work_grows_as_orphans_do():
    run_privately(look_at_more_and_more_orphans)


def calls_of_a_look_as_nobody():
    reader, writer = os.pipe()

    def look():
        become_nobody()
        os.write(writer, b"%d" % calls_of_a_look(["shared_memory"]))

    run_forked(look)
    os.close(writer)
    with open(reader) as pipe:
        return int(pipe.read())


def look_at_what_cannot_be_read():
    if os.geteuid() != 0:
        skip("only root can become another user")
    segment = posix_ipc.SharedMemory("/held", posix_ipc.O_CREX, mode=0o666, size=64)
    none = calls_of_a_look_as_nobody()
    with contextlib.ExitStack() as stack:
        start_holders(stack, segment)
        unreadable = calls_of_a_look_as_nobody()
    with contextlib.ExitStack() as stack:
        start_holders(stack, segment, user=NOBODY, group=NOBODY, extra_groups=[])
        readable = calls_of_a_look_as_nobody()
    assert none + N < unreadable <= readable, (none, unreadable, readable)


def test_what_cannot_be_read_is_no_more_work():
    run_privately(look_at_what_cannot_be_read)
