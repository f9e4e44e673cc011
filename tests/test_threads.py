"""Threads share handles: they use, close, unlink, reopen and pickle them at the same time, in any order.

Each scenario is a function that runs in a process of its own, so that a crash and a deadlock are failures like others.
"""

import contextlib
import copy
import functools
import itertools
import os
import pickle
import random
import signal
import sys
import threading

import pytest
import support
from support import BLOCKING_CALLS, MESSAGE_QUEUE, SEMAPHORE, SHARED_MEMORY, SMALL_QUEUE, Waiter, run_threads

import posix_ipc
from posix_ipc import BusyError, ExistentialError, MessageQueue, Semaphore, SharedMemory

# Handing the interpreter lock on this often brings threads into each other's way as a free-threaded build does.
OFTEN = 1e-6


# ---- storms: everything at once on one handle ----


def close(handle):
    handle.close_fd() if isinstance(handle, SharedMemory) else handle.close()


def use_copy(handle, read):
    read(copy.copy(handle))


def use_pickle(handle, read):
    read(pickle.loads(pickle.dumps(handle)))


def semaphore_operations(handle, name):
    def reopen():
        handle.__init__(name, posix_ipc.O_CREAT, initial_value=1)

    def hold():
        handle.acquire(0.001)
        handle.release()

    def read(semaphore=handle):
        assert semaphore.value >= 0
        assert semaphore.name == name

    return [
        *(reopen, reopen, hold, hold, read, handle.close, handle.release, handle.unlink),
        lambda: handle.acquire(0),
        lambda: use_copy(handle, read),
        lambda: use_pickle(handle, read),
        lambda: repr(handle) + str(handle) + str(handle.mode),
    ]


def segment_operations(handle, name):
    def reopen():
        with contextlib.suppress(ExistentialError):  # so that the descriptors that reopening leaves are few
            close(handle)
        handle.__init__(name, posix_ipc.O_CREAT, size=64)

    def read(segment=handle):
        assert segment.size == 64, "the size of another file"
        assert segment.name == name

    def look(segment=handle):
        assert segment.buf == bytes(64)

    return [
        *(reopen, reopen, read, look, look, handle.close_fd, handle.close, handle.unlink),
        lambda: handle.__init__(name, posix_ipc.O_CREAT, size=64, reserve=True),
        lambda: use_copy(handle, look),
        lambda: handle.__init__(name, size=64),
        lambda: use_copy(handle, read),
        lambda: use_pickle(handle, read),
        lambda: repr(handle) + str(handle) + str(handle.mode) + str(handle.fd) + str(handle.fileno()),
    ]


def queue_operations(handle, name):
    def reopen():
        with contextlib.suppress(ExistentialError):
            close(handle)
        handle.__init__(name, posix_ipc.O_CREAT, **SMALL_QUEUE)

    def receive(timeout):
        assert handle.receive(timeout) == (b"of the storm", 7)

    def receive_into(timeout):
        buffer = bytearray(64)
        assert handle.receive_into(buffer, timeout) == (12, 7)
        assert buffer == b"of the storm".ljust(64, b"\0")

    def read(queue=handle):
        assert queue.max_message_size == 64
        assert 0 <= queue.current_messages <= 2
        assert queue.name == name

    def flip():
        handle.block = not handle.block

    return [
        *(reopen, reopen, read, flip, handle.close, handle.unlink),
        lambda: handle.send(b"of the storm", 0, 7),
        lambda: handle.send("of the storm", 0.001, 7),
        lambda: receive(0),
        lambda: receive(0.001),
        lambda: receive_into(0),
        lambda: receive_into(0.001),
        lambda: handle.request_notification((len, "in a thread of its own")),
        lambda: handle.request_notification(signal.SIGWINCH),  # which nobody notices
        lambda: handle.request_notification(None),
        lambda: use_copy(handle, read),
        lambda: use_pickle(handle, read),
        lambda: repr(handle) + str(handle) + str(handle.mqd) + str(handle.fileno()),
    ]


STORMS = {
    Semaphore: (SEMAPHORE, semaphore_operations),
    SharedMemory: (SHARED_MEMORY, segment_operations),
    MessageQueue: (MESSAGE_QUEUE, queue_operations),
}


def watch_descriptors(times):
    """Open, use and close descriptors of no concern to anybody: a number closed twice elsewhere shows here."""
    for _ in range(times):
        read_end, write_end = os.pipe()
        os.write(write_end, b"mine")
        assert os.read(read_end, 100) == b"mine"
        os.close(read_end)
        os.close(write_end)


def storm(type_name, name, seed, threads, times):
    kind, make_operations = STORMS[getattr(posix_ipc, type_name)]
    sys.setswitchinterval(OFTEN)
    handle = kind.create(name)
    operations = make_operations(handle, name)

    def work(number):
        chooser = random.Random(f"{seed} {number}")
        for operation in chooser.choices(operations, k=times):
            # Closed or unlinked by another thread, full, empty, taken: nothing else can be in the way.
            with contextlib.suppress(ExistentialError, BusyError):
                operation()

    workers = [lambda number=number: work(number) for number in range(threads)]
    try:
        run_threads(*workers, lambda: watch_descriptors(times))
        handle.__init__(name, posix_ipc.O_CREAT, **kind.options)
        pickle.loads(pickle.dumps(handle))  # the handle, its name and its identity belong together
    finally:
        kind.remove(name)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("type_name", [type.__name__ for type in STORMS])
def test_a_storm_of_all_calls_on_one_handle(type_name, seed, name):
    support.run_function(storm, type_name, name, seed, 4, 250)


def open_together(type_name, name):
    """Many threads call __init__ on one handle at once; it holds what the last of them opened, whole."""
    kind, _ = STORMS[getattr(posix_ipc, type_name)]
    sys.setswitchinterval(OFTEN)
    names = [f"{name}-{number}" for number in range(4)] if kind is not MESSAGE_QUEUE else [name]
    for each in names:
        kind.create(each)
    try:
        for _ in range(30):
            handle = kind.type.__new__(kind.type)
            run_threads(*(functools.partial(handle.__init__, each) for each in names * (4 // len(names))))
            assert handle.name in names
            assert pickle.loads(pickle.dumps(handle)).name == handle.name
            close(handle)
            with pytest.raises(ExistentialError):
                pickle.dumps(handle)
    finally:
        for each in names:
            kind.remove(each)


@pytest.mark.parametrize("type_name", [type.__name__ for type in STORMS])
def test_threads_open_one_handle_at_once(type_name, name):
    support.run_function(open_together, type_name, name)


# ---- one thread waits ----


def run_while_another_waits(call_name, name):
    call = BLOCKING_CALLS[call_name]
    handle = call.kind.create(name)
    try:
        call.prepare(handle)
        waiter = Waiter(call.call, handle)
        # That this thread gets so far shows that the waiter does not keep the interpreter lock.
        call.unblock(handle)
        assert waiter.outcome() is None
    finally:
        call.kind.remove(name)


@pytest.mark.parametrize("call_name", BLOCKING_CALLS)
def test_other_threads_run_while_one_waits(call_name, name):
    support.run_function(run_while_another_waits, call_name, name, timeout=40)


def wait_together(call_name, name):
    """All of the many that wait on one handle come through, each by one unblocking."""
    call = BLOCKING_CALLS[call_name]
    handle = call.kind.create(name)
    try:
        call.prepare(handle)
        waiters = [Waiter(call.call, handle) for _ in range(5)]
        for _ in waiters:
            call.unblock(handle)
        assert [waiter.outcome() for waiter in waiters] == [None] * 5
    finally:
        call.kind.remove(name)


@pytest.mark.parametrize("call_name", BLOCKING_CALLS)
def test_many_threads_wait_on_one_handle(call_name, name):
    support.run_function(wait_together, call_name, name)


# ---- a handle goes away under those who wait on it ----

WAYS_TO_LEAVE = {
    "close": lambda handle, elsewhere: handle.close(),
    "open elsewhere": lambda handle, elsewhere: handle.__init__(elsewhere),
}


def leave_a_semaphore(call_name, way, name, elsewhere):
    call = BLOCKING_CALLS[call_name]
    handle, peer, other = Semaphore(name, posix_ipc.O_CREX), Semaphore(name), Semaphore(elsewhere, posix_ipc.O_CREX)
    inode = os.stat(SEMAPHORE.file_of(name)).st_ino
    try:
        waiters = [Waiter(call.call, handle) for _ in range(3)]
        WAYS_TO_LEAVE[way](handle, elsewhere)
        assert all(support.is_blocked(waiter) for waiter in waiters)
        assert len(support.mappings(inode)) == 2, "the waiters stand on memory that is not there"
        for _ in waiters:
            call.unblock(peer)
        assert [waiter.outcome() for waiter in waiters] == [None] * 3
        assert peer.value == other.value == 0
        assert len(support.mappings(inode)) == 1, "the last waiter did not take the mapping with it"
        if way == "close":
            with pytest.raises(ExistentialError):
                handle.acquire(0)
        else:
            other.release()
            handle.acquire(0)
    finally:
        SEMAPHORE.remove(name)
        SEMAPHORE.remove(elsewhere)


@pytest.mark.no_portable
@pytest.mark.parametrize("way", WAYS_TO_LEAVE)
@pytest.mark.parametrize("call_name", [key for key, call in BLOCKING_CALLS.items() if call.kind is SEMAPHORE])
def test_a_semaphore_handle_goes_under_its_waiters(call_name, way, names):
    support.run_function(leave_a_semaphore, call_name, way, names(), names())


def leave_a_queue(call_name, way, name, *stranger_names):
    """The waiters must not meet a stranger, which gets the number of the descriptor as soon as that is free."""
    call = BLOCKING_CALLS[call_name]
    handle, peer = MESSAGE_QUEUE.create(name), MessageQueue(name)
    number = handle.mqd
    strangers = [MESSAGE_QUEUE.create(each) for each in stranger_names]
    try:
        call.prepare(handle)
        waiters = [Waiter(call.call, handle) for _ in range(3)]
        WAYS_TO_LEAVE[way](handle, stranger_names[0])
        # Now the number must still be taken; were it free, these would take it: the queues first, then the pipes.
        opened = [MessageQueue(each) for each in stranger_names[1:]]
        pipes = [os.pipe() for _ in range(4)]
        assert number not in {queue.mqd for queue in opened} | set(itertools.chain(*pipes))
        for queue in strangers:
            if call_name.startswith("receive"):
                queue.send(b"for somebody else")  # a receiver would take it, and be content
        for _, write_end in pipes:
            os.write(write_end, b"for somebody else")
        for _ in waiters:
            call.unblock(peer)
        for waiter in waiters:
            # Either is in order: it goes on to its end, or it learns of the close.
            error = waiter.outcome()
            assert error is None or (way == "close" and isinstance(error, ExistentialError))
            if call_name.startswith("receive") and error is None:
                assert waiter.result == (b"awaited", 0)
        for queue in strangers:
            assert queue.current_messages == (1 if call_name.startswith("receive") else 0)
        for read_end, _ in pipes:
            assert os.read(read_end, 100) == b"for somebody else"
        if way == "close":  # of a constructor's descriptor nobody but close() disposes
            assert number not in support.open_fds(), "the last waiter did not take the descriptor with it"
    finally:
        for each in (name, *stranger_names):
            MESSAGE_QUEUE.remove(each)


@pytest.mark.parametrize("way", WAYS_TO_LEAVE)
@pytest.mark.parametrize("call_name", [key for key, call in BLOCKING_CALLS.items() if call.kind is MESSAGE_QUEUE])
def test_a_queue_handle_goes_under_its_waiters(call_name, way, names):
    support.run_function(leave_a_queue, call_name, way, *(names() for _ in range(4)))


def unlink_under_a_waiter(call_name, name):
    call = BLOCKING_CALLS[call_name]
    handle, peer = call.kind.create(name), call.kind.type(name)
    try:
        call.prepare(handle)
        waiter = Waiter(call.call, handle)
        handle.unlink()
        assert support.is_blocked(waiter)
        call.unblock(peer)
        assert waiter.outcome() is None
    finally:
        call.kind.remove(name)


@pytest.mark.parametrize("call_name", BLOCKING_CALLS)
def test_the_name_goes_under_a_waiter(call_name, name):
    support.run_function(unlink_under_a_waiter, call_name, name)


def close_under_waiters_again_and_again(type_name, name):
    """The instant between the decision to wait and the wait itself, often."""
    sys.setswitchinterval(OFTEN)
    kind, _ = STORMS[getattr(posix_ipc, type_name)]
    peer = kind.create(name)
    try:
        for _ in range(100):
            handle = kind.type(name)

            def wait(handle=handle):
                with contextlib.suppress(ExistentialError, BusyError):
                    handle.acquire(0.002) if kind is SEMAPHORE else handle.receive(0.002)

            run_threads(wait, wait, handle.close, lambda: watch_descriptors(3))
        assert (peer.value if kind is SEMAPHORE else peer.current_messages) == 0
        leads_there = [target for target in support.open_fds().values() if name in target]
        assert len(leads_there) == (0 if kind is SEMAPHORE else 1)
    finally:
        kind.remove(name)


@pytest.mark.slow
@pytest.mark.parametrize("type_name", ["Semaphore", "MessageQueue"])
def test_close_races_with_waiting(type_name, name):
    support.run_function(close_under_waiters_again_and_again, type_name, name)


# ---- nothing is lost, nothing is there twice ----


def share_permits(name):
    """More threads than permits, by all ways to take one: at no time more holders than permits, and all come back."""
    sys.setswitchinterval(OFTEN)
    permits, workers, times = 3, 8, 150
    semaphore = Semaphore(name, posix_ipc.O_CREX, initial_value=permits)
    lock, holders, most, taken = threading.Lock(), 0, 0, 0

    def hold():
        nonlocal holders, most, taken
        with lock:
            holders += 1
            taken += 1
            most = max(most, holders)
        with lock:
            holders -= 1

    def by_with():
        with semaphore:
            hold()

    def by_timeout(timeout):
        try:
            semaphore.acquire(timeout)
        except BusyError:
            return
        hold()
        semaphore.release()

    def work(number):
        chooser = random.Random(number)
        for _ in range(times):
            chooser.choice([by_with, lambda: by_timeout(None), lambda: by_timeout(0.0001), lambda: by_timeout(0)])()

    try:
        run_threads(*(lambda number=number: work(number) for number in range(workers)))
        assert semaphore.value == permits
        assert 1 <= most <= permits
        assert taken > workers * times / 4
    finally:
        SEMAPHORE.remove(name)


@pytest.mark.slow
def test_permits_are_neither_lost_nor_multiplied(name):
    support.run_function(share_permits, name)


def pass_messages(name):
    """Three senders and three receivers on one handle: every message arrives once."""
    sys.setswitchinterval(OFTEN)
    queue = MESSAGE_QUEUE.create(name)
    senders = receivers = 3
    times = 200
    received = []

    def send(sender):
        for number in range(times):
            queue.send(f"{sender} {number}", None if number % 2 else 60)

    def receive():
        for number in range(senders * times // receivers):
            received.append(queue.receive(60 if number % 2 else None)[0])

    try:
        run_threads(*(lambda sender=sender: send(sender) for sender in range(senders)), *[receive] * receivers)
        expected = [f"{sender} {number}".encode() for sender in range(senders) for number in range(times)]
        assert sorted(received) == sorted(expected)
        assert queue.current_messages == 0
    finally:
        MESSAGE_QUEUE.remove(name)


@pytest.mark.slow
def test_every_message_arrives_once(name):
    support.run_function(pass_messages, name)


def end_under_waiters(call_name, name):
    """The interpreter ends while a daemon thread waits on a handle of it."""
    call = BLOCKING_CALLS[call_name]
    handle = call.kind.create(name)
    call.prepare(handle)
    Waiter(call.call, handle)
    handle.unlink()


@pytest.mark.slow
@pytest.mark.parametrize("call_name", BLOCKING_CALLS)
def test_the_interpreter_ends_under_a_waiter(call_name, name):
    support.run_function(end_under_waiters, call_name, name, timeout=40)
