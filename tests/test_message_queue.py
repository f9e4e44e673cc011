"""posix_ipc.MessageQueue."""

import array
import ctypes
import errno
import math
import mmap
import os
import select
import selectors
import signal
import sys
import threading
import time
import tracemalloc

import pytest
from support import (
    MESSAGE_QUEUE,
    SMALL_QUEUE,
    Waiter,
    finish,
    libc,
    mappings,
    open_fds,
    run_python,
    start_python,
    threads,
    wait_until,
    wait_until_blocked,
    wait_until_ready,
)

import posix_ipc
from posix_ipc import O_CREAT, O_CREX, O_NONBLOCK, QUEUE_PRIORITY_MAX

# ---- attributes ----


def test_attributes_of_a_new_queue(queue):
    q = queue(max_messages=3, max_message_size=17)
    assert (q.max_messages, q.max_message_size, q.current_messages, q.block) == (3, 17, 0, True)
    assert type(q.mqd) is int
    assert q.mqd == q.fileno() >= 0


def test_default_sizes(name):
    q = posix_ipc.MessageQueue(name, O_CREX)
    try:
        assert q.max_messages == posix_ipc.QUEUE_MESSAGES_MAX_DEFAULT
        assert q.max_message_size == posix_ipc.QUEUE_MESSAGE_SIZE_MAX_DEFAULT
    finally:
        q.close()
        q.unlink()


@pytest.mark.parametrize("flags", [0, O_CREAT], ids=("open", "O_CREAT"))
def test_attributes_of_an_existing_queue_are_its_own(queue, flags):
    created = queue(max_messages=3, max_message_size=17)
    attached = queue(created.name, flags=flags, max_messages=2, max_message_size=5)
    assert (attached.max_messages, attached.max_message_size) == (3, 17)
    attached.send(b"x" * 17, 0)
    assert repr(attached).endswith(", max_message_size=17, max_messages=3, read=True, write=True)")


def test_current_messages_is_live_and_shared(queue):
    q = queue()
    other = queue(q.name, flags=0)
    for count in (1, 2):
        q.send(b"")
        assert q.current_messages == other.current_messages == count
    other.receive()
    assert q.current_messages == 1


@pytest.mark.parametrize(("read", "write"), [(True, False), (False, True), (1, 0), (0, 1)])
def test_repr_says_what_the_handle_may_do(queue, read, write):
    q = queue(read=read, write=write)
    assert repr(q).endswith(f", read={bool(read)}, write={bool(write)})")


# ---- what is sent ----


class Point(ctypes.Structure):
    _fields_ = (("x", ctypes.c_int16), ("y", ctypes.c_int16))


def mapped(data):
    memory = mmap.mmap(-1, len(data))
    memory[:] = data
    return memory


MESSAGES = {
    "bytes": (b"plain", b"plain"),
    "empty bytes": (b"", b""),
    "empty str": ("", b""),
    "str": ("grüß dich \U0001f40d", "grüß dich \U0001f40d".encode()),
    "null characters": ("\0a\0", b"\0a\0"),
    "bytearray": (bytearray(b"array"), b"array"),
    "memoryview": (memoryview(b"--view--")[2:6], b"view"),
    "array of ints": (array.array("I", [1, 2]), array.array("I", [1, 2]).tobytes()),
    "ctypes structure": (Point(1, -1), bytes(Point(1, -1))),
    "ctypes array": ((ctypes.c_char * 3)(*b"abc"), b"abc"),
    "memory map": (mapped(b"mapped"), b"mapped"),
    "two-dimensional view": (memoryview(bytes(range(6))).cast("B", (2, 3)), bytes(range(6))),
    "longest": (b"x" * 64, b"x" * 64),
}


@pytest.mark.parametrize("kind_of_message", MESSAGES)
def test_message(queue, kind_of_message):
    q = queue()
    given, expected = MESSAGES[kind_of_message]
    assert q.send(given) is None
    received = q.receive()
    assert received == (expected, 0)
    assert [type(part) for part in received] == [bytes, int]
    assert type(received) is tuple


def test_one_byte_too_long(queue):
    q = queue()
    for message in (b"x" * 65, "x" * 65, "é" * 33, bytearray(65), b"x" * 10**6):
        with pytest.raises(ValueError, match="64"):
            q.send(message, 0)
    assert q.current_messages == 0


def test_buffer_with_gaps_is_refused(queue):
    q = queue()
    with pytest.raises(BufferError):
        q.send(memoryview(b"abcdef")[::2])
    assert q.current_messages == 0


def test_str_that_utf_8_cannot_express(queue):
    q = queue()
    with pytest.raises(UnicodeEncodeError):
        q.send("\udcff")
    assert q.current_messages == 0


def test_buffer_is_released_after_send(queue):
    q = queue()
    buffer = bytearray(b"mine")
    q.send(buffer)
    buffer.append(1)  # BufferError while someone holds it
    queue_of_one = queue(max_messages=1)
    queue_of_one.send(b"")
    with pytest.raises(posix_ipc.BusyError):
        queue_of_one.send(buffer, 0)
    buffer.append(1)


# ---- priorities ----


def test_highest_priority_first_and_in_order_within_one(queue):
    q = queue(max_messages=8)
    for message, priority in ((b"a", 1), (b"b", 0), (b"c", 9), (b"d", 1), (b"e", 9), (b"f", 0)):
        q.send(message, priority=priority)
    received = [q.receive() for _ in range(6)]
    assert received == [(b"c", 9), (b"e", 9), (b"a", 1), (b"d", 1), (b"b", 0), (b"f", 0)]


@pytest.mark.parametrize("priority", [0, 1, QUEUE_PRIORITY_MAX, True])
def test_priority_arrives(queue, priority):
    q = queue()
    q.send(b"x", None, priority)
    assert q.receive() == (b"x", priority)


@pytest.mark.parametrize("priority", [-1, QUEUE_PRIORITY_MAX + 1, 2**31, 2**32, 2**64])
def test_priority_out_of_range(queue, priority):
    q = queue()
    with pytest.raises(ValueError, match=str(QUEUE_PRIORITY_MAX)):
        q.send(b"x", 0, priority)
    assert q.current_messages == 0


# ---- read, write ----


def test_queue_for_writing_alone(queue):
    q = queue(read=False)
    q.send(b"x", 0)
    for receive in (q.receive, lambda: q.receive(0), lambda: q.receive(60)):
        with pytest.raises(posix_ipc.PermissionsError) as caught:
            receive()
        assert caught.value.name == q.name
    assert queue(q.name, flags=0).receive(0) == (b"x", 0)


def test_queue_for_reading_alone(queue):
    q = queue(write=False)
    for send in (lambda: q.send(b"x"), lambda: q.send(b"x", 0), lambda: q.send(b"x", 60)):
        with pytest.raises(posix_ipc.PermissionsError) as caught:
            send()
        assert caught.value.name == q.name
    queue(q.name, flags=0).send(b"x", 0)
    assert q.receive(0) == (b"x", 0)


@pytest.mark.parametrize("flags", [0, O_CREAT, O_CREX], ids=("open", "O_CREAT", "O_CREX"))
def test_queue_for_nothing(name, flags):
    with pytest.raises(ValueError, match=r"read.*write"):
        posix_ipc.MessageQueue(name, flags, read=False, write=False, **SMALL_QUEUE)
    assert not MESSAGE_QUEUE.exists(name)


def test_rights_asked_for_are_those_needed(queue):
    """A queue that may only be read opens for reading, and for nothing else."""
    q = queue()
    os.fchmod(q.mqd, 0o444)
    run_python(
        "import os, sys, posix_ipc\n"
        "if os.geteuid() == 0: os.setgroups([]); os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534)\n"
        "posix_ipc.MessageQueue(sys.argv[1], write=False)\n"
        "for options in ({}, {'read': False}):\n"
        "    try: posix_ipc.MessageQueue(sys.argv[1], **options)\n"
        "    except posix_ipc.PermissionsError: pass\n"
        "    else: sys.exit('opened for writing')\n",
        q.name,
    )


# ---- waiting ----


@pytest.fixture
def full(queue):
    q = queue(max_messages=1)
    q.send(b"first")
    return q


@pytest.fixture(params=("send", "receive"))
def waiting(request, queue, full):
    """Return (queue, call(timeout)) where the call cannot go on until somebody else acts."""
    if request.param == "send":
        return full, lambda *timeout: full.send(b"second", *timeout)
    empty = queue()
    return empty, empty.receive


def unblock(q):
    """Let the call of `waiting` go on."""
    peer = posix_ipc.MessageQueue(q.name)
    try:
        if peer.current_messages == peer.max_messages:
            assert peer.receive(0) == (b"first", 0)
        else:
            peer.send(b"woken", 0)
    finally:
        peer.close()


@pytest.mark.parametrize("timeout", [0, 0.0, -0.0, False], ids=repr)
def test_busy_without_waiting(waiting, timeout):
    q, call = waiting
    before = q.current_messages
    with pytest.raises(posix_ipc.BusyError) as caught:
        call(timeout)
    assert caught.value.name == q.name
    assert caught.value.errno in (errno.EAGAIN, errno.ETIMEDOUT)
    assert q.current_messages == before
    assert q.block is True


@pytest.mark.parametrize("timeout", [0.05, 1e-9], ids=repr)
def test_busy_no_earlier_than_the_timeout(waiting, timeout):
    q, call = waiting
    began = time.monotonic()
    with pytest.raises(posix_ipc.BusyError) as caught:
        call(timeout)
    assert time.monotonic() - began >= timeout
    assert (caught.value.errno, caught.value.name) == (errno.ETIMEDOUT, q.name)


@pytest.mark.parametrize("timeout", [None, 60, 0.5, math.inf, 1e300, 10**400], ids=repr)
def test_no_wait_where_none_is_needed(queue, timeout):
    q = queue()
    q.send(b"x", timeout)
    q.send(b"y", timeout=timeout, priority=1)
    assert q.receive(timeout) == (b"y", 1)
    assert q.receive(timeout=timeout) == (b"x", 0)


WAITING_CODE = """
import math, signal, sys, posix_ipc

class HandlerError(Exception):
    pass

def handler(number, frame):
    if sys.argv[4] == "raises":
        raise HandlerError("from the handler")

signal.signal(signal.SIGUSR1, handler)
signal.signal(signal.SIGINT, signal.default_int_handler)
q = posix_ipc.MessageQueue(sys.argv[1])
timeout = eval(sys.argv[3])
before = q.current_messages
print("ready", flush=True)
try:
    print(q.send(b"sent", timeout) if sys.argv[2] == "send" else q.receive(timeout))
except KeyboardInterrupt:
    print("KeyboardInterrupt")
except posix_ipc.SignalError as error:
    assert error.errno == 4 and error.name == q.name
    print("SignalError", repr(error.__cause__))
else:
    sys.exit()
assert q.current_messages == before and q.block
"""

TIMEOUTS = ("None", "60", "math.inf", "1e300")


@pytest.mark.parametrize("timeout", TIMEOUTS)
def test_receiver_is_woken_by_a_message(queue, timeout):
    q = queue()
    with start_python(WAITING_CODE, q.name, "receive", timeout, "-") as child:
        wait_until_ready(child)
        wait_until_blocked(child)
        q.send("hello", priority=3)
        assert finish(child) == "(b'hello', 3)\n"


@pytest.mark.parametrize("timeout", TIMEOUTS)
def test_sender_is_woken_by_room(full, timeout):
    with start_python(WAITING_CODE, full.name, "send", timeout, "-") as child:
        wait_until_ready(child)
        wait_until_blocked(child)
        assert full.receive() == (b"first", 0)
        assert full.receive(60) == (b"sent", 0)
        assert finish(child) == "None\n"


@pytest.mark.parametrize("timeout", ["None", "60"])
@pytest.mark.parametrize("operation", ["send", "receive"])
@pytest.mark.parametrize(
    ("number", "handler", "outcome"),
    [
        (signal.SIGUSR1, "returns", "SignalError None\n"),
        (signal.SIGUSR1, "raises", "SignalError HandlerError('from the handler')\n"),
        (signal.SIGINT, "returns", "KeyboardInterrupt\n"),
    ],
    ids=("handler returns", "handler raises", "ctrl-c"),
)
def test_signal_ends_the_wait(queue, full, operation, timeout, number, handler, outcome):
    q = full if operation == "send" else queue()
    with start_python(WAITING_CODE, q.name, operation, timeout, handler) as child:
        wait_until_ready(child)
        wait_until_blocked(child)
        child.send_signal(number)
        assert finish(child) == outcome


TIMED_CALLS = {"x86_64": {242, 243}, "aarch64": {182, 183}}  # mq_timedsend and mq_timedreceive


@pytest.mark.skipif(os.uname().machine not in TIMED_CALLS, reason="knows the system calls of x86_64 and aarch64")
@pytest.mark.parametrize("operation", ["send", "receive"])
def test_timed_wait_does_not_follow_the_wall_clock(queue, full, operation):
    """The system's own timed calls count on the wall clock: whoever sleeps in them with a time wakes when it is set."""
    q = full if operation == "send" else queue()
    with start_python(WAITING_CODE, q.name, operation, "1000", "-") as child:
        wait_until_ready(child)
        number, _ = wait_until_blocked(child)
        assert number not in TIMED_CALLS[os.uname().machine]
        unblock(q)
        finish(child)


def test_waiting_thread_lets_others_run(waiting):
    q, call = waiting
    waiter = threading.Thread(target=call, args=(60,), daemon=True)
    waiter.start()
    unblock(q)  # cannot run while the waiter holds the interpreter
    waiter.join(30)
    assert not waiter.is_alive()


@pytest.mark.parametrize("timeout", [None, 60], ids=repr)
def test_close_while_another_thread_waits(waiting, timeout):
    """The waiter finishes on the queue it waits on, or learns that it is closed; no other descriptor is touched."""
    q, call = waiting
    results = []
    started = threading.Event()

    def wait():
        started.set()
        try:
            results.append(call(timeout))
        except posix_ipc.ExistentialError as error:
            results.append(error)

    waiter = threading.Thread(target=wait, daemon=True)
    waiter.start()
    started.wait(30)
    q.close()
    with pytest.raises(posix_ipc.ExistentialError):
        call(0)
    before = open_fds()
    others = [os.open("/dev/null", os.O_RDWR) for _ in range(4)]  # one of them gets the number if it is free
    try:
        if waiter.is_alive():
            unblock(q)
        waiter.join(30)
        assert not waiter.is_alive()
        for number in others:
            os.fstat(number)
        assert len(results) == 1
    finally:
        for number in others:
            os.close(number)
    assert wait_until(lambda: q.name not in " ".join(open_fds().values()))
    assert set(open_fds()) <= set(before)


# ---- receive_into ----


class Target:
    """A writable buffer of 64 bytes or more, and how to read what is in it."""

    def __init__(self, buffer, read=bytes):
        self.buffer, self.read = buffer, read


def numpy_target():
    numpy = pytest.importorskip("numpy")
    return Target(numpy.zeros((8, 8), "u1"), lambda array: array.tobytes())


TARGETS = {
    "bytearray": lambda: Target(bytearray(64)),
    "memoryview": lambda: Target(memoryview(bytearray(64))),
    "slice": lambda: Target(memoryview(bytearray(100))[10:90]),
    "array of ints": lambda: Target(array.array("I", bytes(64)), array.array.tobytes),
    "ctypes array": lambda: Target((ctypes.c_char * 64)()),
    "ctypes structures": lambda: Target((Point * 20)()),
    "memory map": lambda: Target(mapped(bytes(64)), lambda memory: memory[:]),
    "two-dimensional view": lambda: Target(memoryview(bytearray(64)).cast("B", (8, 8))),
    "numpy array": numpy_target,
}


@pytest.mark.parametrize("kind_of_target", TARGETS)
@pytest.mark.parametrize("message", [b"hello", b"", b"x" * 64], ids=("short", "empty", "longest"))
def test_received_into(queue, kind_of_target, message):
    q, target = queue(), TARGETS[kind_of_target]()
    size = memoryview(target.buffer).nbytes
    memoryview(target.buffer).cast("B")[:] = b"-" * size
    q.send(message, priority=3)
    received = q.receive_into(target.buffer)
    assert received == (len(message), 3)
    assert [type(part) for part in received] == [int, int]
    assert type(received) is tuple
    assert target.read(target.buffer) == message + b"-" * (size - len(message))  # nothing but the message is written
    assert q.current_messages == 0


def test_received_into_shared_memory(queue, segment):
    """From one kernel object to another, and not into a segment that may not be written."""
    q, shm = queue(), segment(size=100)
    for target in (shm, shm.buf, shm.buf[10:]):
        q.send(b"shared")
        assert q.receive_into(target) == (6, 0)
    assert os.pread(shm.fd, 100, 0) == b"shared".ljust(10, b"\0") + b"shared".ljust(90, b"\0")
    q.send(b"kept")
    with pytest.raises(BufferError):
        q.receive_into(segment(shm.name, flags=0, read_only=True))
    with pytest.raises(ValueError, match="empty"):
        q.receive_into(segment(size=0))
    shm.close()
    with pytest.raises(posix_ipc.ExistentialError):
        q.receive_into(shm)
    assert q.receive(0) == (b"kept", 0)


def test_arguments_of_receive_into(queue):
    q = queue()
    for call in (
        lambda buffer: q.receive_into(buffer),
        lambda buffer: q.receive_into(buffer=buffer),
        lambda buffer: q.receive_into(buffer, None),
        lambda buffer: q.receive_into(buffer, 60),
        lambda buffer: q.receive_into(timeout=0, buffer=buffer),
    ):
        q.send(b"abc", priority=1)
        buffer = bytearray(64)
        assert call(buffer) == (3, 1)
        assert buffer[:4] == b"abc\0"


def test_received_into_by_priority(queue):
    q, buffer = queue(max_messages=3), bytearray(64)
    for priority in (1, QUEUE_PRIORITY_MAX, 2):
        q.send(str(priority), priority=priority)
    received = [q.receive_into(buffer) for _ in range(3)]
    assert received == [(len(str(priority)), priority) for priority in (QUEUE_PRIORITY_MAX, 2, 1)]


@pytest.mark.parametrize("timeout", [None, 0, 60], ids=repr)
@pytest.mark.parametrize("filled", [False, True], ids=("empty queue", "message there"))
@pytest.mark.parametrize("size", [0, 1, 63])
def test_buffer_that_is_too_small(queue, size, filled, timeout):
    """However short the message: the system asks for room for the longest. It is known at once, and nothing is lost."""
    q, buffer = queue(), bytearray(b"-" * size)
    if filled:
        q.send(b"")
    with pytest.raises(ValueError, match=f"{size} bytes.*64") as caught:
        q.receive_into(buffer, timeout)
    assert q.name in str(caught.value)
    assert buffer == b"-" * size
    assert q.current_messages == filled


def test_size_is_counted_in_bytes(queue):
    q = queue()
    q.send(b"x")
    with pytest.raises(ValueError, match="60 bytes"):
        q.receive_into(array.array("I", bytes(60)))
    assert q.receive_into(array.array("I", bytes(64))) == (1, 0)


@pytest.mark.parametrize(
    ("buffer", "error"),
    [
        (b"x" * 64, BufferError),
        (memoryview(bytearray(64)).toreadonly(), BufferError),
        (memoryview(bytearray(128))[::2], BufferError),
        ("x" * 64, TypeError),
        (64, TypeError),
        (None, TypeError),
    ],
    ids=("bytes", "read-only view", "gaps", "str", "int", "None"),
)
def test_buffer_that_cannot_be_written(queue, buffer, error):
    q = queue()
    q.send(b"kept")
    for timeout in (None, 0):
        with pytest.raises(error):
            q.receive_into(buffer, timeout)
    assert q.receive(0) == (b"kept", 0)


@pytest.mark.parametrize("timeout", [0, 1e-9, 0.02], ids=repr)
def test_empty_queue_leaves_the_buffer_alone(queue, timeout):
    q, buffer = queue(), bytearray(b"-" * 64)
    began = time.monotonic()
    with pytest.raises(posix_ipc.BusyError) as caught:
        q.receive_into(buffer, timeout)
    assert time.monotonic() - began >= timeout
    assert caught.value.name == q.name
    assert buffer == b"-" * 64
    buffer.append(1)  # BufferError while someone holds it
    q.block = False
    with pytest.raises(posix_ipc.BusyError):
        q.receive_into(buffer)


def test_receive_into_on_a_queue_for_writing_alone(queue):
    """That comes before a buffer that is too small."""
    q = queue(read=False)
    q.send(b"x")
    for buffer in (bytearray(64), bytearray()):
        with pytest.raises(posix_ipc.PermissionsError) as caught:
            q.receive_into(buffer)
        assert caught.value.name == q.name
        buffer.append(1)
    assert q.current_messages == 1


def test_receive_into_on_a_closed_queue(queue):
    q, buffer = queue(), bytearray(64)
    q.close()
    for timeout in (None, 0, 60):
        with pytest.raises(posix_ipc.ExistentialError, match="closed") as caught:
            q.receive_into(buffer, timeout)
        assert (caught.value.errno, caught.value.name) == (errno.EBADF, q.name)
    buffer.append(1)


@pytest.mark.parametrize("timeout", [None, 60], ids=repr)
def test_waiting_call_holds_the_buffer(queue, timeout):
    """Its memory cannot be taken away under the kernel, and is free again afterwards."""
    q, buffer = queue(), bytearray(64)
    waiter = Waiter(lambda q: q.receive_into(buffer, timeout), q)
    with pytest.raises(BufferError):
        buffer.clear()
    q.send(b"awaited", priority=2)
    assert waiter.outcome() is None
    assert waiter.result == (7, 2)
    assert buffer == b"awaited".ljust(64, b"\0")
    buffer.clear()


def test_segment_is_closed_while_a_message_is_awaited_into_it(queue, segment):
    q, shm = queue(), segment(size=64)
    peer = segment(shm.name, flags=0)
    inode = os.fstat(shm.fd).st_ino
    waiter = Waiter(lambda q: q.receive_into(shm, 60), q)
    shm.close()
    assert len(mappings(inode)) == 1
    q.send(b"awaited")
    assert waiter.outcome() is None
    assert bytes(peer.buf[:8]) == b"awaited\0"
    assert len(mappings(inode)) == 1  # the peer's
    peer.close()
    assert mappings(inode) == []


def test_receiving_into_leaks_nothing(queue):
    q, buffer = queue(), bytearray(64)
    before = sys.getrefcount(buffer)
    for _ in range(1000):
        q.send(b"x")
        q.receive_into(buffer)
        with pytest.raises(posix_ipc.BusyError):
            q.receive_into(buffer, 0)
    assert sys.getrefcount(buffer) == before
    buffer.append(1)


# ---- block ----


def test_block_is_readable_and_writable(queue):
    q = queue()
    for given in (False, True, 0, 1, "", "x", None):
        q.block = given
        assert q.block is bool(given)


def test_o_nonblock_starts_without_waiting(queue):
    q = queue(flags=O_CREX | O_NONBLOCK)
    assert q.block is False
    assert queue(q.name, flags=O_NONBLOCK).block is False
    assert queue(q.name, flags=0).block is True


def test_block_belongs_to_the_handle(queue):
    q = queue()
    other = queue(q.name, flags=0)
    q.block = False
    assert other.block is True


@pytest.mark.parametrize("timeout", [None, 0, 60, math.inf], ids=repr)
def test_without_block_nothing_waits(waiting, timeout):
    q, call = waiting
    q.block = False
    with pytest.raises(posix_ipc.BusyError) as caught:
        call(timeout)
    assert (caught.value.errno, caught.value.name) == (errno.EAGAIN, q.name)
    unblock(q)
    call(timeout)


def test_block_cannot_be_deleted(queue):
    q = queue()
    with pytest.raises(AttributeError):
        del q.block
    assert q.block is True


# ---- waiting by descriptor ----


def readiness(q, *events):
    poller = select.poll()
    poller.register(q, sum(events))
    return dict(poller.poll(0)).get(q.fileno(), 0)


def test_poll_and_select(queue):
    q = queue(max_messages=1)
    assert readiness(q, select.POLLIN, select.POLLOUT) == select.POLLOUT
    assert select.select([q], [q], [], 0) == ([], [q], [])
    q.send(b"x")
    assert readiness(q, select.POLLIN, select.POLLOUT) == select.POLLIN
    assert select.select([q.mqd], [q.mqd], [], 0) == ([q.mqd], [], [])


def test_queue_in_a_selector(queue):
    one, other = queue(), queue()
    with selectors.DefaultSelector() as selector:
        selector.register(one, selectors.EVENT_READ, "one")
        selector.register(other, selectors.EVENT_READ, "other")
        assert selector.select(0) == []
        other.send(b"x")
        assert [(key.fileobj, key.data) for key, _ in selector.select(0)] == [(other, "other")]
        selector.unregister(one)


# ---- close, unlink, descriptors ----


def test_use_after_close(queue):
    q = queue()
    descriptor = q.mqd
    assert q.close() is None
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)
    assert q.mqd == q.fileno() == -1
    for use in (
        q.close,
        q.receive,
        lambda: q.receive(0),
        lambda: q.receive_into(bytearray(64)),
        lambda: q.send(b"x"),
        lambda: q.send(b"x", 0),
        lambda: q.current_messages,
        lambda: q.block,
        lambda: setattr(q, "block", True),
        lambda: q.request_notification(),
        lambda: q.request_notification(None),
        lambda: q.request_notification(signal.SIGUSR1),
        lambda: q.request_notification((print, None)),
    ):
        with pytest.raises(posix_ipc.ExistentialError, match="closed") as caught:
            use()
        assert (caught.value.errno, caught.value.name) == (errno.EBADF, q.name)
    assert (q.max_messages, q.max_message_size, q.mode) == (2, 64, 0o600)
    assert q.unlink() is None


def test_second_close_spares_the_next_owner_of_the_number(queue):
    q = queue()
    descriptor = q.mqd
    q.close()
    replacement = os.open("/", os.O_RDONLY)
    try:
        assert replacement == descriptor
        with pytest.raises(posix_ipc.ExistentialError):
            q.close()
        os.fstat(replacement)
    finally:
        os.close(replacement)


def test_messages_survive_close_and_wait_for_the_next(queue):
    q = queue()
    q.send(b"kept")
    q.close()
    assert queue(q.name, flags=0).receive(0) == (b"kept", 0)


def test_descriptor_is_close_on_exec(queue):
    q = queue()
    assert not os.get_inheritable(q.mqd)
    assert not os.get_inheritable(queue(q.name, flags=0).mqd)


def test_descriptor_zero():
    run_python(
        "import os, posix_ipc\n"
        "os.close(0)\n"
        "q = posix_ipc.MessageQueue(None, posix_ipc.O_CREX, max_messages=2, max_message_size=64)\n"
        "try:\n"
        "    assert q.mqd == q.fileno() == 0\n"
        "    q.send('x')\n"
        "    assert q.receive(0) == (b'x', 0) and q.receive.__self__ is q and q.current_messages == 0\n"
        "    q.block = False\n"
        "    assert q.block is False\n"
        "    q.close()\n"
        "    assert q.mqd == -1\n"
        "    try: os.fstat(0)\n"
        "    except OSError: pass\n"
        "    else: raise AssertionError('still open')\n"
        "finally: q.unlink()\n"
    )


# ---- with ----


def test_with_closes(queue):
    q = queue()
    descriptor = q.mqd
    with q as entered:
        assert entered is q
        q.send(b"kept")
    assert q.mqd == -1
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)
    assert queue(q.name, flags=0).receive(0) == (b"kept", 0)


@pytest.mark.parametrize("exception", [KeyError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("before", ["nothing", "close", "os.close"])
def test_exception_of_the_block_comes_through(queue, exception, before):
    """Whatever closing has to say."""
    q, error = queue(), exception("of the block")
    with pytest.raises(exception) as caught, q:
        if before == "close":
            q.close()
        elif before == "os.close":
            os.close(q.mqd)
        raise error
    assert caught.value is error
    assert error.__context__ is None
    assert q.mqd == -1


def test_block_may_close_the_queue(queue):
    q = queue()
    with q:
        q.close()
        replacement = os.open("/", os.O_RDONLY)
    os.close(replacement)  # OSError if the queue closed a number that was no longer its own
    with q:  # closed already, and so it stays
        assert q.mqd == -1
    with pytest.raises(posix_ipc.ExistentialError):
        q.close()


def test_with_cancels_the_notification(queue):
    called, before = [], threads()
    with queue() as q:
        q.request_notification((called.append, 1))
    wait_until(lambda: threads() <= before)
    peer = queue(q.name, flags=0)
    peer.request_notification((called.append, 2))  # BusyError while another's is armed
    peer.send(b"x")
    wait_until(lambda: called)
    assert called == [2]


# ---- limits ----


def sysctl(name):
    with open(f"/proc/sys/fs/mqueue/{name}") as file:
        return int(file.read())


@pytest.mark.parametrize(
    ("option", "limit"), [("max_messages", "msg_max"), ("max_message_size", "msgsize_max")], ids=("messages", "size")
)
def test_queue_beyond_the_limits_of_the_system(name, option, limit):
    """2**30 is beyond what even a privileged process may ask for."""
    with pytest.raises(ValueError, match=rf"fs\.mqueue\.{limit}\b.*\b{sysctl(limit)}\b") as caught:
        posix_ipc.MessageQueue(name, O_CREX, **{**SMALL_QUEUE, option: 2**30})
    assert str(2**30) in str(caught.value)
    assert not MESSAGE_QUEUE.exists(name)


def test_queue_beyond_the_memory_of_the_user(name):
    code = (
        "import resource, sys, posix_ipc\n"
        "resource.setrlimit(resource.RLIMIT_MSGQUEUE, (1000, 1000))\n"
        "try: posix_ipc.MessageQueue(sys.argv[1], posix_ipc.O_CREX)\n"
        "except OSError as error:\n"
        "    assert (error.errno, error.filename) == (24, sys.argv[1])\n"
        "    assert 'RLIMIT_MSGQUEUE' in str(error) and '1000' in str(error), error\n"
        "else: sys.exit('created')\n"
    )
    run_python(code, name)
    assert not MESSAGE_QUEUE.exists(name)


@pytest.mark.parametrize("value", [0, -1, 2**63, 2**64 + 2])
@pytest.mark.parametrize("option", ["max_messages", "max_message_size"])
def test_impossible_sizes(name, option, value):
    for flags in (O_CREAT, O_CREX):
        with pytest.raises(ValueError, match=option):
            posix_ipc.MessageQueue(name, flags, **{**SMALL_QUEUE, option: value})
        assert not MESSAGE_QUEUE.exists(name)


# ---- memory ----


HELD_MESSAGES_CODE = """
import sys, posix_ipc

def resident():
    with open("/proc/self/smaps_rollup") as file:
        return sum(int(line.split()[1]) for line in file if line.startswith("Anonymous:")) * 1024

q = posix_ipc.MessageQueue(None, posix_ipc.O_CREX, max_messages=1, max_message_size=8192)
q.unlink()

def receive():
    q.send(b"0123456789abcdef")
    return q.receive()[0]

count = 50_000
held = [None] * count
for _ in range(100):
    receive()
before = resident()
for index in range(count):
    held[index] = receive()
print((resident() - before) / count)
"""


@pytest.mark.slow
@pytest.mark.skipif("asan" in os.environ.get("LD_PRELOAD", ""), reason="the sanitizer pads every allocation")
def test_short_message_holds_its_own_bytes_alone():
    """Measured by the pages of the process, so that nothing an allocator keeps aside is overlooked."""
    held = float(run_python(HELD_MESSAGES_CODE).stdout)
    assert 16 <= held < 100


def test_sending_and_receiving_leak_nothing(queue):
    q = queue(max_message_size=4096)

    def allocated_after(rounds):
        for _ in range(rounds):
            q.send(bytes(4096), priority=1000)
            q.send("x" * 100)
            q.receive()
            q.receive()
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        before = allocated_after(10)
        assert allocated_after(1000) - before < 4096
    finally:
        tracemalloc.stop()


# ---- C programs on the same queue ----


def test_c_program_on_our_queue(queue):
    ours = queue()
    peer = libc.mq_open(ours.name.encode(), os.O_RDWR, 0, None)
    try:
        attributes = libc.QueueAttributes()
        libc.mq_getattr(peer, attributes)
        assert (attributes.maxmsg, attributes.msgsize) == (2, 64)
        ours.send("to c", priority=5)
        assert libc.receive(peer, 64) == (b"to c", 5)
        libc.mq_send(peer, b"from c", 6, 7)
        assert ours.receive(0) == (b"from c", 7)
    finally:
        os.close(peer)
    libc.mq_unlink(ours.name.encode())
    with pytest.raises(posix_ipc.ExistentialError):
        ours.unlink()


def test_queue_of_a_c_program(queue, name):
    attributes = libc.QueueAttributes(maxmsg=1, msgsize=10)
    peer = libc.mq_open(name.encode(), O_CREX | os.O_RDWR, 0o600, attributes)
    try:
        ours = queue(name, flags=0)
        assert (ours.max_messages, ours.max_message_size) == (1, 10)
        libc.mq_send(peer, b"from c", 6, 7)
        assert ours.receive(0) == (b"from c", 7)
        ours.send("to c")
        assert libc.receive(peer, 10) == (b"to c", 0)
        ours.unlink()
        with pytest.raises(FileNotFoundError):
            libc.mq_unlink(name.encode())
    finally:
        os.close(peer)
