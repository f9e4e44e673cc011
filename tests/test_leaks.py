"""Every public call, repeated: succeeding or failing, it leaves no descriptor, mapping, memory or reference behind.

CALLS has an entry for each public name; a test compares it with what the module has, so that nothing is forgotten.
"""

import copy
import ctypes
import gc
import mmap
import os
import pickle
import signal
import sys
import threading
from decimal import Decimal
from typing import NamedTuple

import pytest
import support
from support import KINDS, MESSAGE_QUEUE, SEMAPHORE, SHARED_MEMORY, SMALL_QUEUE

import posix_ipc
from posix_ipc import MessageQueue, Semaphore, SharedMemory
from posix_ipc._ext import _raise_errno, _rebuild

pytestmark = pytest.mark.no_sanitizer

# ---- what is measured ----


class _MallocInfo(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks")),
        *((name, ctypes.c_size_t) for name in ("uordblks", "fordblks", "keepcost")),
    ]


def _allocated_by_malloc():
    """Return how many bytes are in use, of all that malloc() of the C library handed out; 0 where it does not tell."""
    try:
        mallinfo = ctypes.CDLL(None).mallinfo2  # glibc 2.33
    except AttributeError:
        return lambda: 0
    mallinfo.restype = _MallocInfo

    def allocated():
        info = mallinfo()
        return info.uordblks + info.hblkhd

    return allocated


allocated_by_malloc = _allocated_by_malloc()


def resident_pages():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1])


def count_mappings():
    with open("/proc/self/maps", "rb") as file:
        return file.read().count(b"\n")


# What a reference leak of the C code would make grow without any memory growing.
SHARED_OBJECTS = [None, True, (), b"", "", Semaphore, SharedMemory, MessageQueue, _rebuild, Decimal]
SHARED_OBJECTS += [posix_ipc.Error, posix_ipc.ExistentialError, posix_ipc.BusyError, posix_ipc.PermissionsError]


class Usage(NamedTuple):
    """What grows with a leak: counts, except for malloc, which is in bytes."""

    descriptors: int
    mappings: int
    blocks: int
    malloc: int
    pages: int
    references: int

    @classmethod
    def now(cls):
        gc.collect()
        return cls(
            len(os.listdir("/proc/self/fd")),
            count_mappings(),
            sys.getallocatedblocks(),
            allocated_by_malloc(),
            resident_pages(),
            sum(sys.getrefcount(each) for each in SHARED_OBJECTS),
        )


ROUNDS, REPETITIONS = 5, 100

# In one round. Less is not a leak of the call: one in four would do, of the least that malloc gives, or of one page.
LEAST = Usage(
    descriptors=REPETITIONS // 4,
    mappings=REPETITIONS // 4,
    blocks=REPETITIONS // 4,
    malloc=REPETITIONS // 4 * 16,
    pages=1,
    references=REPETITIONS // 4,
)


def growth(call):
    """Return, for each quantity, how much it grew in each of the rounds after a first one that fills caches."""
    usage = None
    rounds = []
    for _ in range(ROUNDS):
        before, usage = usage, None
        for _ in range(REPETITIONS):
            call()
        usage = Usage.now()
        if before is not None:
            rounds.append([new - old for new, old in zip(usage, before, strict=True)])
    return dict(zip(Usage._fields, zip(*rounds, strict=True), strict=True))


def assert_flat(call):
    """Caches grow at times, and noise comes and goes: only a leak makes a quantity grow in every round.

    A suspect is tried a second time, as the rest of the process may have had its own reasons.
    """
    for _ in range(2):
        grown = growth(call)
        leaks = {name: steps for name, steps in grown.items() if min(steps) >= getattr(LEAST, name)}
        if not leaks:
            return
    raise AssertionError(f"grew in each of {ROUNDS - 1} rounds of {REPETITIONS} calls: {leaks}")


# ---- the calls ----


class World:
    """Objects in all states, for the calls to work on; made anew for each test."""

    def __init__(self, request):
        self.names = request.getfixturevalue("names")
        make_semaphore, make_segment, make_queue = map(request.getfixturevalue, ("semaphore", "segment", "queue"))
        self.semaphore = make_semaphore(initial_value=1)
        self.segment = make_segment()
        self.queue = make_queue()
        self.handles = self.semaphore, self.segment, self.queue
        self.empty = make_semaphore()
        self.full_semaphore = make_semaphore(initial_value=posix_ipc.SEMAPHORE_VALUE_MAX)
        self.empty_queue = make_queue()
        self.full_queue = make_queue()
        for _ in range(2):
            self.full_queue.send(b"filling")
        self.closed = make_semaphore(), make_segment(), make_queue()
        for kind, handle in zip(KINDS, self.closed, strict=True):
            kind.close_handle(handle)
        self.unopened = [kind.type.__new__(kind.type) for kind in KINDS]
        self.missing, self.new = self.names(), self.names()
        self.only_read = make_queue(self.queue.name, 0, write=False)
        self.only_write = make_queue(self.queue.name, 0, read=False)
        self.read_only_segment = make_segment(self.segment.name, 0, read_only=True)
        self.buffer = bytearray(64)
        self.not_blocking = make_queue(flags=posix_ipc.O_CREX | posix_ipc.O_NONBLOCK)
        self.pickles = [pickle.dumps(handle) for handle in self.handles]
        self.gone = make_semaphore(), make_segment(), make_queue()
        self.stale_pickles = [pickle.dumps(handle) for handle in self.gone]
        for handle in self.gone:
            handle.unlink()
        self.threads = support.threads()
        self.called = threading.Semaphore(0)

    def wait_for_callbacks(self):
        support.wait_until(lambda: support.threads() <= self.threads)


def fails(function, *args, **kwargs):
    """Call it; it must raise."""
    try:
        function(*args, **kwargs)
    except Exception:
        return
    raise AssertionError(f"{function}{args} did not fail")


class Strange:
    """Raises from whatever a conversion may call."""

    def _raise(self, *args):
        raise ZeroDivisionError

    __index__ = __float__ = __bool__ = __len__ = __fspath__ = __str__ = __hash__ = __eq__ = _raise


STRANGE = Strange()
BAD_NAMES = ["", "/", "/a/b", "/x" * 200, "/a\0b", b"/a\0b", "/\ud800", 3, STRANGE, ["/a"]]
BAD_TIMEOUTS = [-1, -0.5, float("nan"), "1", STRANGE, [1], -(10**400)]


def constructor(kind, bad_options):
    """Return the calls for the constructor of a type."""

    def open_and_close(world, name, flags=0, **options):
        handle = kind.type(name, flags, **options)
        kind.close_handle(handle)
        return handle

    index = KINDS.index(kind)
    return [
        lambda world: open_and_close(world, world.handles[index].name),
        lambda world: open_and_close(world, world.handles[index].name.encode()),
        lambda world: open_and_close(world, world.new, posix_ipc.O_CREX, **kind.options).unlink(),
        lambda world: open_and_close(world, world.new, posix_ipc.O_CREAT, mode=0o640, **kind.options).unlink(),
        lambda world: open_and_close(world, None, posix_ipc.O_CREX, **kind.options).unlink(),
        lambda world: fails(kind.type, world.missing),
        lambda world: fails(kind.type, world.handles[index].name, posix_ipc.O_CREX),
        lambda world: fails(kind.type, world.missing, posix_ipc.O_EXCL),
        lambda world: fails(kind.type),
        lambda world: fails(kind.type, world.missing, nonsense=1),
        lambda world: fails(kind.type, world.missing, *[0] * 20),
        *(lambda world, bad=bad: fails(kind.type, bad, posix_ipc.O_CREX) for bad in BAD_NAMES),
        *(lambda world, bad=bad: fails(kind.type, world.new, bad) for bad in ("x", 1.5, STRANGE)),
        *(
            lambda world, bad=bad: fails(kind.type, world.new, posix_ipc.O_CREX, bad)
            for bad in ("x", -1, 2**40, STRANGE)
        ),
        *(lambda world, bad=bad: fails(kind.type, world.new, posix_ipc.O_CREX, **bad) for bad in bad_options),
        # A handle that moves from one object to another, a name that cannot be opened in between.
        lambda world: reopen(kind, world, index),
        lambda world: fails(world.handles[index].__init__, world.missing),
    ]


def reopen(kind, world, index):
    handle = pickle.loads(world.pickles[index])  # so that the descriptor is the handle's, and closed by it
    handle.__init__(world.handles[index].name)
    kind.close_handle(handle)


def on_all_states(index, function, *, closed=fails):
    """Return calls of a function of a handle that is open, closed, and not opened yet."""
    return [
        lambda world: function(world.handles[index]),
        lambda world: closed(function, world.closed[index]),
        lambda world: closed(function, world.unopened[index]),
    ]


def works(function, *args):
    function(*args)


def common(index):
    """Return the calls that the three types have in common, by attribute."""
    kind = KINDS[index]

    def close_new(world):
        kind.close_handle(pickle.loads(world.pickles[index]))

    def unlink_new(world):
        handle = kind.create(world.new)
        kind.close_handle(handle)
        handle.unlink()
        fails(handle.unlink)

    def set_attribute(handle, attribute):
        fails(setattr, handle, attribute, 1)
        fails(delattr, handle, attribute)

    def reduce(handle):
        return handle.__reduce__()

    return {
        "__new__": [lambda world: kind.type.__new__(kind.type), lambda world: kind.type.__new__(kind.type, 1, x=2)],
        "__repr__": on_all_states(index, repr, closed=works),
        "__str__": on_all_states(index, str, closed=works),
        "__reduce__": [
            *on_all_states(index, reduce),
            *(
                lambda world, way=way: way(world.handles[index])
                for way in (copy.copy, copy.deepcopy, pickle.dumps, lambda handle: handle.__reduce_ex__(4))
            ),
            lambda world: fails(copy.copy, world.closed[index]),
            lambda world: fails(pickle.dumps, world.unopened[index]),
        ],
        "name": [
            *on_all_states(index, lambda handle: handle.name, closed=works),
            lambda world: set_attribute(world.handles[index], "name"),
        ],
        "mode": [
            *on_all_states(index, lambda handle: handle.mode, closed=works),
            lambda world: set_attribute(world.handles[index], "mode"),
        ],
        kind.close: [
            close_new,
            *(
                lambda world, states=states: (works if kind is SHARED_MEMORY else fails)(
                    getattr(getattr(world, states)[index], kind.close)
                )
                for states in ("closed", "unopened")
            ),
        ],
        "unlink": [
            unlink_new,
            lambda world: fails(world.gone[index].unlink),
            lambda world: fails(world.unopened[index].unlink),
        ],
    }


def busy(world):
    fails(world.empty.acquire, 0.00001)


def interrupt(function, *args):
    """A wait that a signal ends, or its time, whichever is first."""

    def handler(number, frame):
        raise ZeroDivisionError

    old = signal.signal(signal.SIGALRM, handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.0005)
        function(*args)
    except (posix_ipc.SignalError, posix_ipc.BusyError, ZeroDivisionError):
        pass
    finally:
        signal.signal(signal.SIGALRM, signal.SIG_IGN)
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


def acquire(world, *args, **kwargs):
    world.semaphore.acquire(*args, **kwargs)
    world.semaphore.release()


def enter(world):
    with world.semaphore as semaphore:
        assert semaphore is world.semaphore


def send(world, *args, **kwargs):
    world.queue.send(*args, **kwargs)
    world.queue.receive(0)


def receive_into(world, *args, **kwargs):
    world.queue.send(b"x")
    world.queue.receive_into(*args, **kwargs)


def enter_a_queue(world):
    with pickle.loads(world.pickles[2]) as queue:
        queue.send(b"x")
        queue.receive(0)


def reserve_a_new_one(world):
    segment = SharedMemory(world.new, posix_ipc.O_CREX, size=8192, reserve=True)
    segment.unlink()
    segment.close()


def view_in_all_sizes(segment):
    """Each of the views keeps a mapping of its own."""
    views = []
    for size in (4096, 8192, 64):
        os.ftruncate(segment.fd, size)
        views.append(segment.buf)
    os.ftruncate(segment.fd, 0)
    fails(memoryview, segment)
    os.ftruncate(segment.fd, 64)


def close_under_views(world):
    segment = pickle.loads(world.pickles[1])
    views = [segment.buf, memoryview(segment)]
    segment.close()
    segment.close()
    fails(memoryview, segment)
    views[0][0] = 1


def leave_with_views(world):
    with pickle.loads(world.pickles[1]) as segment:
        view = segment.buf
    assert view.nbytes == 64


def get(attribute):
    return lambda handle: getattr(handle, attribute)


def cannot_be_set(index, attribute):
    return [
        lambda world: fails(setattr, world.handles[index], attribute, 1),
        lambda world: fails(delattr, world.handles[index], attribute),
    ]


def set_block(world):
    world.queue.block = False
    world.queue.block = True
    for bad in (lambda: setattr(world.queue, "block", STRANGE), lambda: delattr(world.queue, "block")):
        fails(bad)
    fails(setattr, world.closed[2], "block", True)


def notify(world, *args, **kwargs):
    world.empty_queue.request_notification(*args, **kwargs)


def be_called(world):
    """A callback that is called, with all that belongs to it."""
    notify(world, (lambda called: called.release(), world.called))
    world.empty_queue.send(b"x")
    world.called.acquire()
    world.empty_queue.receive(0)
    world.wait_for_callbacks()


def fail_in_the_callback(world):
    def callback(called):
        called.release()
        raise ZeroDivisionError

    hook, sys.unraisablehook = sys.unraisablehook, lambda unraisable: None
    notify(world, (callback, world.called))
    world.empty_queue.send(b"x")
    world.called.acquire()
    world.empty_queue.receive(0)
    world.wait_for_callbacks()
    sys.unraisablehook = hook


def cancel_the_callback(world):
    notify(world, (len, [1]))
    notify(world, None)
    world.wait_for_callbacks()


def replace_the_callback(world):
    notify(world, (len, [1]))
    notify(world, (len, [2]))
    notify(world, signal.SIGWINCH)
    notify(world)
    world.wait_for_callbacks()


def close_with_a_callback(world):
    queue = pickle.loads(world.pickles[2])
    queue.request_notification((len, [1]))
    queue.close()
    world.wait_for_callbacks()


def unlink_function(kind):
    def unlink_new(world, convert):
        kind.close_handle(kind.create(world.new))
        kind.unlink(convert(world.new))

    return [
        lambda world: unlink_new(world, str),
        lambda world: unlink_new(world, str.encode),
        lambda world: fails(kind.unlink, name=world.missing),
        lambda world: fails(kind.unlink),
        *(lambda world, bad=bad: fails(kind.unlink, bad) for bad in [None, *BAD_NAMES]),
    ]


def exception(type):
    def raised():
        error = type("message")
        error.errno, error.name = 2, "/name"
        raise error

    return [lambda world: fails(raised), lambda world: type(), lambda world: pickle.loads(pickle.dumps(type("x")))]


def rebuilt(world, index, position, value):
    arguments = list(world.handles[index].__reduce__()[1])
    arguments[position] = value
    fails(_rebuild, *arguments)


CALLS = {
    # Semaphore
    **{f"Semaphore.{attribute}": calls for attribute, calls in common(0).items()},
    "Semaphore.__init__": constructor(
        SEMAPHORE, [{"initial_value": bad} for bad in (-1, 2**31, 2**70, "1", 1.5, STRANGE)]
    ),
    "Semaphore.acquire": [
        acquire,
        lambda world: acquire(world, None),
        lambda world: acquire(world, 0),
        lambda world: acquire(world, timeout=1.5),
        lambda world: acquire(world, Decimal(1)),
        lambda world: acquire(world, 10**400),
        lambda world: fails(world.empty.acquire, 0),
        busy,
        lambda world: interrupt(world.empty.acquire, 0.05),
        lambda world: fails(world.closed[0].acquire),
        lambda world: fails(world.unopened[0].acquire),
        lambda world: fails(world.semaphore.acquire, 0, 0),
        lambda world: fails(world.semaphore.acquire, nonsense=0),
        *(lambda world, bad=bad: fails(world.semaphore.acquire, bad) for bad in BAD_TIMEOUTS),
    ],
    "Semaphore.release": [
        acquire,
        lambda world: fails(world.full_semaphore.release),
        lambda world: fails(world.closed[0].release),
        lambda world: fails(world.unopened[0].release),
        lambda world: fails(world.semaphore.release, 1),
    ],
    "Semaphore.__enter__": [enter, lambda world: fails(world.closed[0].__enter__)],
    "Semaphore.__exit__": [enter, lambda world: fails(world.closed[0].__exit__, None, None, None)],
    "Semaphore.value": [*on_all_states(0, get("value")), *cannot_be_set(0, "value")],
    # SharedMemory
    **{f"SharedMemory.{attribute}": calls for attribute, calls in common(1).items()},
    "SharedMemory.__init__": [
        reserve_a_new_one,
        lambda world: fails(SharedMemory, world.new, posix_ipc.O_CREX, size=2**62, reserve=True),
        *constructor(
            SHARED_MEMORY,
            [
                *({"size": bad} for bad in (-1, 2**63, 2**70, "1", 1.5, STRANGE)),
                *({"size": 0, "read_only": bad} for bad in ("yes", 1.5, STRANGE)),
                {"size": 10, "read_only": True},
                {"size": 0, "reserve": True},
                *({"reserve": bad} for bad in ("yes", 1.5, STRANGE)),
            ],
        ),
    ],
    "SharedMemory.buf": [
        *on_all_states(1, get("buf")),
        *on_all_states(1, memoryview),
        lambda world: bytes(world.segment),
        lambda world: world.segment.buf[1:3].cast("H"),
        lambda world: view_in_all_sizes(world.segment),
        lambda world: fails(setattr, world.segment, "buf", b""),
        lambda world: fails(world.queue.receive_into, world.read_only_segment),  # BufferError
    ],
    "SharedMemory.close": [
        close_under_views,
        *(lambda world, states=states: getattr(world, states)[1].close() for states in ("closed", "unopened")),
    ],
    "SharedMemory.__enter__": [leave_with_views, lambda world: world.closed[1].__enter__()],
    "SharedMemory.__exit__": [leave_with_views, lambda world: world.unopened[1].__exit__(None, None, None)],
    "SharedMemory.fd": [*on_all_states(1, get("fd"), closed=works), *cannot_be_set(1, "fd")],
    "SharedMemory.fileno": on_all_states(1, lambda segment: segment.fileno(), closed=works),
    "SharedMemory.size": [*on_all_states(1, get("size")), *cannot_be_set(1, "size")],
    # MessageQueue
    **{f"MessageQueue.{attribute}": calls for attribute, calls in common(2).items()},
    "MessageQueue.__init__": constructor(
        MESSAGE_QUEUE,
        [
            *({"max_messages": bad} for bad in (0, -1, 2**70, "1", 1.5, STRANGE, 2**40)),
            *({"max_message_size": bad} for bad in (0, -1, 2**70, None, STRANGE, 2**40)),
            *({**SMALL_QUEUE, "read": bad} for bad in ("yes", STRANGE)),
            {"read": False, "write": False},
        ],
    ),
    "MessageQueue.send": [
        lambda world: send(world, b"x" * 64),
        lambda world: send(world, ""),
        lambda world: send(world, "é", 1, 7),
        lambda world: send(world, bytearray(b"x"), timeout=None, priority=32767),
        lambda world: send(world, memoryview(b"abc")),
        lambda world: fails(world.full_queue.send, b"x", 0),
        lambda world: fails(world.full_queue.send, b"x", 0.00001),
        lambda world: interrupt(world.full_queue.send, b"x", 0.05),
        lambda world: fails(world.queue.send, b"x" * 65),
        lambda world: fails(world.only_read.send, b"x"),
        lambda world: fails(world.closed[2].send, b"x"),
        lambda world: fails(world.unopened[2].send, b"x"),
        *(lambda world, bad=bad: fails(world.queue.send, bad) for bad in (None, 3, "\ud800", memoryview(b"abcd")[::2])),
        *(lambda world, bad=bad: fails(world.queue.send, b"x", bad) for bad in BAD_TIMEOUTS),
        *(lambda world, bad=bad: fails(world.queue.send, b"x", 0, bad) for bad in (-1, 32768, 2**70, "1", STRANGE)),
    ],
    "MessageQueue.receive": [
        lambda world: send(world, b"x"),
        lambda world: send(world, b"x" * 64),
        lambda world: fails(world.empty_queue.receive, 0),
        lambda world: fails(world.empty_queue.receive, 0.00001),
        lambda world: fails(world.not_blocking.receive),
        lambda world: interrupt(world.empty_queue.receive, 0.05),
        lambda world: fails(world.only_write.receive),
        lambda world: fails(world.closed[2].receive),
        lambda world: fails(world.unopened[2].receive),
        *(lambda world, bad=bad: fails(world.queue.receive, bad) for bad in BAD_TIMEOUTS),
    ],
    "MessageQueue.receive_into": [
        lambda world: receive_into(world, world.buffer),
        lambda world: receive_into(world, buffer=memoryview(bytearray(100))[20:]),
        lambda world: receive_into(world, world.segment, timeout=0),
        lambda world: fails(world.empty_queue.receive_into, world.buffer, 0),
        lambda world: fails(world.empty_queue.receive_into, world.segment, 0.00001),
        lambda world: fails(world.not_blocking.receive_into, world.buffer),
        lambda world: interrupt(world.empty_queue.receive_into, world.buffer, 0.05),
        lambda world: fails(world.only_write.receive_into, world.buffer),
        lambda world: fails(world.closed[2].receive_into, world.buffer),
        lambda world: fails(world.unopened[2].receive_into, world.buffer),
        *(
            lambda world, bad=bad: fails(world.queue.receive_into, bad)
            for bad in (None, 3, "x" * 64, b"x" * 64, bytearray(63), memoryview(bytearray(128))[::2], STRANGE)
        ),
        *(lambda world, bad=bad: fails(world.queue.receive_into, world.buffer, bad) for bad in BAD_TIMEOUTS),
    ],
    "MessageQueue.__enter__": [enter_a_queue, lambda world: world.closed[2].__enter__()],
    "MessageQueue.__exit__": [enter_a_queue, lambda world: world.unopened[2].__exit__(None, None, None)],
    "MessageQueue.request_notification": [
        be_called,
        fail_in_the_callback,
        cancel_the_callback,
        replace_the_callback,
        close_with_a_callback,
        lambda world: fails(notify, world, 0),
        lambda world: fails(world.closed[2].request_notification, (len, 1)),
        lambda world: fails(world.unopened[2].request_notification),
        *(
            lambda world, bad=bad: fails(notify, world, bad)
            for bad in (1000, -1, 2**70, "x", 1.5, (1, 2), (len,), (len, 1, 2), [len, 1], STRANGE)
        ),
    ],
    "MessageQueue.block": [*on_all_states(2, get("block")), set_block],
    "MessageQueue.mqd": [*on_all_states(2, get("mqd"), closed=works), *cannot_be_set(2, "mqd")],
    "MessageQueue.fileno": on_all_states(2, lambda queue: queue.fileno(), closed=works),
    "MessageQueue.current_messages": [
        *on_all_states(2, get("current_messages")),
        *cannot_be_set(2, "current_messages"),
    ],
    **{
        f"MessageQueue.{attribute}": [
            lambda world, attribute=attribute: getattr(world.queue, attribute),
            lambda world, attribute=attribute: getattr(world.closed[2], attribute),
            lambda world, attribute=attribute: fails(getattr, world.unopened[2], attribute),
            *cannot_be_set(2, attribute),
        ]
        for attribute in ("max_messages", "max_message_size")
    },
    # the module
    **{kind.unlink.__name__: unlink_function(kind) for kind in KINDS},
    **{
        name: exception(getattr(posix_ipc, name))
        for name in ("Error", "SignalError", "PermissionsError", "ExistentialError", "BusyError")
    },
    "_rebuild": [
        *(lambda world, index=index: pickle.loads(world.pickles[index]) for index in range(3)),
        *(lambda world, index=index: fails(pickle.loads, world.stale_pickles[index]) for index in range(3)),
        *(
            lambda world, position=position, value=value, index=index: rebuilt(world, index, position, value)
            for index in range(3)
            for position, value in [(0, int), (0, 3), (1, 3), (1, "\0"), (2, b""), (2, bytes(48)), (3, -1), (4, "x")]
        ),
        *(lambda world, count=count: fails(_rebuild, *[None] * count) for count in (0, 5)),
    ],
    "_raise_errno": [
        *(
            lambda world, number=number: fails(_raise_errno, number, "call", "/name")
            for number in (1, 2, 4, 11, 17, 22, 24, 28)
        ),
        lambda world: fails(_raise_errno, 22, "call"),
        lambda world: fails(_raise_errno, "x", "call"),
    ],
}


@pytest.mark.slow
@pytest.mark.ipc_leaks(objects=False, fds=False, reason="the trace takes memory, and a constructor's descriptor stays")
@pytest.mark.parametrize("name", CALLS)
def test_call_leaks_nothing(name, request):
    world = World(request)
    calls = CALLS[name]

    def all_calls():
        for call in calls:
            call(world)

    try:
        assert_flat(all_calls)
    finally:
        for handle in world.gone:
            os.close(handle.fileno()) if hasattr(handle, "fileno") else handle.close()


# ---- is everything there? ----


def public_calls():
    """Return the names of all that can be called, read or written of the module."""
    found = {"_rebuild", "_raise_errno"}
    for name in posix_ipc.__all__:
        value = getattr(posix_ipc, name)
        if isinstance(value, type) and not issubclass(value, Exception):
            found |= {f"{name}.{attribute}" for attribute in vars(value) if not is_no_call(attribute)}
        elif callable(value):
            found.add(name)
        else:
            assert isinstance(value, (int, str)), name  # a constant has nothing to leak
    return found


def is_no_call(attribute):
    """The buffer's methods are names that Python has, since 3.12, for what memoryview() does: see SharedMemory.buf.

    The private methods are what the tracked classes stand on: see test_tracked.py.
    """
    if attribute.startswith("_") and not attribute.startswith("__"):
        return True
    return attribute in ("__doc__", "__module__", "__buffer__", "__release_buffer__")


def test_every_public_call_has_a_leak_test():
    assert public_calls() - set(CALLS) == set()
    assert set(CALLS) - public_calls() == set(), "tested, but not there"


# ---- does it see a leak? ----


def map_a_file():
    """Return a mapping that does not become one with its neighbours."""
    with open(__file__, "rb") as file:
        return mmap.mmap(file.fileno(), mmap.PAGESIZE, prot=mmap.PROT_READ)


@pytest.mark.parametrize(
    ("quantity", "leak"),
    [
        ("descriptors", lambda kept: kept.append(os.dup(0))),
        ("blocks", lambda kept: kept.append(object())),
        ("references", lambda kept: kept.append(Semaphore)),
        ("malloc", lambda kept: kept.append(ctypes.CDLL(None).malloc(100))),
        ("mappings", lambda kept: kept.append(map_a_file())),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_leak_is_seen(quantity, leak):
    if quantity == "malloc" and allocated_by_malloc() == 0:
        pytest.skip("this C library does not tell")
    kept = []
    try:
        with pytest.raises(AssertionError, match=quantity):
            assert_flat(lambda: leak(kept))
    finally:
        if quantity == "descriptors":
            for descriptor in kept:
                os.close(descriptor)
