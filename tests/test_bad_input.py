"""Every argument of every call, and every handle it can be called on: a clear error, nothing left behind, no crash."""

import inspect
import math
import mmap
import os
import pathlib

import pytest
from support import KINDS, MESSAGE_QUEUE, SEMAPHORE, SHARED_MEMORY, open_fds, run_forked

import posix_ipc
from posix_ipc import O_CREAT, O_CREX, ExistentialError


class Unhelpful:
    """Raises whatever it is asked for."""

    def _fail(self, *args):
        raise ZeroDivisionError("no answer")

    __index__ = __int__ = __float__ = __bool__ = __len__ = __fspath__ = __str__ = __bytes__ = _fail


class Misleading:
    """Gives answers of the wrong type."""

    def __index__(self):
        return "1"

    __float__ = __bool__ = __index__


def closed_map():
    memory = mmap.mmap(-1, 10)
    memory.close()
    return memory


def released_view():
    view = memoryview(b"abc")
    view.release()
    return view


def rows(error, *values):
    return [(value, error) for value in values]


# ---- bad values, by what an argument wants ----

HUGE = (2**63, 2**64, 2**64 + 1, 10**30, -(2**63) - 1, -(2**64), -(10**30))
NO_NUMBER = [
    *rows(TypeError, "1", b"1", [], (), {}, 1j, object(), int, print, Misleading()),
    *rows(ZeroDivisionError, Unhelpful()),
]
NO_INTEGER = [*NO_NUMBER, *rows(TypeError, None, 1.0, math.nan)]
NO_BOOL = [
    *rows(TypeError, "", "yes", b"", None, 1.0, [], {}, object(), Misleading()),
    *rows(ZeroDivisionError, Unhelpful()),
]
NO_NAME = [
    *rows(TypeError, 3, 3.5, [], {}, object(), bytearray(b"/x"), memoryview(b"/x"), str, pathlib.PurePath("/x")),
    *rows(TypeError, Unhelpful()),
    *rows(ValueError, "/a\0b", b"/a\0b", "\0", b"\0", "/\0", b"/\0", "/a\0", b"/a\0", "/\ud800"),
]
MALFORMED = ("", b"", "/", b"/", "/" + "x" * 256, b"/" + b"x" * 256, "/" + "é" * 200, "/" + "x" * 10**6)
WITH_SLASHES = ("/pi/a", b"/pi/a", "/pi-a/", "//", "/../pi")

NAME = [
    *NO_NAME,
    *rows(ValueError, None, *MALFORMED),
    *rows((ValueError, posix_ipc.PermissionsError), *WITH_SLASHES),
]
NAME_TO_UNLINK = [
    *NO_NAME,
    *rows(TypeError, None),
    *rows((ValueError, ExistentialError, posix_ipc.PermissionsError), *MALFORMED, *WITH_SLASHES),
]
FLAGS = [*NO_INTEGER, *rows(ValueError, 2**31, -(2**31) - 1, *HUGE)]
MODE = [*NO_INTEGER, *rows(ValueError, -1, 0o200000, 2**31, 2**32, *HUGE)]
COUNT = [*NO_INTEGER, *rows(ValueError, 0, -1, *HUGE)]
TIMEOUT = [
    *NO_NUMBER,
    *rows(TypeError, -1, -0.1, -5e-324, -math.inf, -(10**400), "nan"),
    *rows(ValueError, math.nan, -math.nan),
]
MESSAGE = [
    *rows(TypeError, None, 3, 3.5, True, [], (), {}, object(), str, ["a"], Unhelpful()),
    *rows(ValueError, "\ud800", b"x" * 65, "x" * 65, "é" * 33, bytearray(10**6), closed_map(), released_view()),
    *rows(BufferError, memoryview(b"abcdef")[::2]),
]
BUFFER = [
    *rows(TypeError, None, 3, 3.5, "x" * 64, [], (), {}, object(), bytearray, Unhelpful()),
    *rows(BufferError, b"x" * 64, memoryview(b"x" * 64), memoryview(bytearray(128))[::2]),
    *rows(ValueError, bytearray(), bytearray(63), closed_map(), released_view()),
]
NOTIFICATION = [
    *rows(ValueError, "x", b"x", 1.5, [], {}, object(), Unhelpful(), Misleading(), print),
    *rows(ValueError, (), (print,), (print, 1, 2), (1, 2), (None, None), [print, 1], ("print", 1)),
    *rows(OSError, 0, -1, 65, 1000, False, 2**31),
    *rows((OSError, ValueError), *HUGE),
]

# ---- the calls: {call: {argument: bad values}} ----

ARGUMENTS = {
    "Semaphore": {
        "name": NAME,
        "flags": FLAGS,
        "mode": MODE,
        "initial_value": [*NO_INTEGER, *rows(ValueError, -1, posix_ipc.SEMAPHORE_VALUE_MAX + 1, 2**32, *HUGE)],
    },
    "Semaphore.acquire": {"timeout": TIMEOUT},
    "Semaphore.release": {},
    "Semaphore.close": {},
    "Semaphore.unlink": {},
    "SharedMemory": {
        "name": NAME,
        "flags": FLAGS,
        "mode": MODE,
        "size": [*NO_INTEGER, *rows(ValueError, -1, *HUGE)],
        "read_only": NO_BOOL,
        "reserve": NO_BOOL,
    },
    "SharedMemory.fileno": {},
    "SharedMemory.close_fd": {},
    "SharedMemory.close": {},
    "SharedMemory.unlink": {},
    "MessageQueue": {
        "name": [*NAME, *rows(ValueError, "without-slash", b"without-slash", ".")],
        "flags": FLAGS,
        "mode": MODE,
        "max_messages": COUNT,
        "max_message_size": COUNT,
        "read": NO_BOOL,
        "write": NO_BOOL,
    },
    "MessageQueue.send": {
        "message": MESSAGE,
        "timeout": TIMEOUT,
        "priority": [*NO_INTEGER, *rows(ValueError, -1, posix_ipc.QUEUE_PRIORITY_MAX + 1, 2**31, 2**32, *HUGE)],
    },
    "MessageQueue.receive": {"timeout": TIMEOUT},
    "MessageQueue.receive_into": {"buffer": BUFFER, "timeout": TIMEOUT},
    "MessageQueue.request_notification": {"notification": NOTIFICATION},
    "MessageQueue.fileno": {},
    "MessageQueue.close": {},
    "MessageQueue.unlink": {},
    "unlink_semaphore": {"name": NAME_TO_UNLINK},
    "unlink_shared_memory": {"name": NAME_TO_UNLINK},
    "unlink_message_queue": {"name": NAME_TO_UNLINK},
}

# Arguments without which a call is not complete.
REQUIRED = {"message": b"x", "name": "/x", "buffer": bytearray(64)}

# ---- the handles: {member: (outcome on a closed one, outcome on one that was never opened)} ----

WORKS = "gives what it gave before"
ITSELF = "gives the handle"

HANDLES = {
    "Semaphore.name": (WORKS, None),
    "Semaphore.mode": (0o600, 0),
    "Semaphore.value": (ExistentialError, ExistentialError),
    "Semaphore.acquire": (ExistentialError, ExistentialError),
    "Semaphore.release": (ExistentialError, ExistentialError),
    "Semaphore.close": (ExistentialError, ExistentialError),
    "Semaphore.unlink": (None, ExistentialError),
    "Semaphore.__enter__": (ExistentialError, ExistentialError),
    "Semaphore.__exit__": (ExistentialError, ExistentialError),
    "SharedMemory.name": (WORKS, None),
    "SharedMemory.mode": (0o600, 0),
    "SharedMemory.fd": (-1, -1),
    "SharedMemory.size": (ExistentialError, ExistentialError),
    "SharedMemory.buf": (ExistentialError, ExistentialError),
    "SharedMemory.fileno": (-1, -1),
    "SharedMemory.close_fd": (None, None),
    "SharedMemory.close": (None, None),
    "SharedMemory.unlink": (None, ExistentialError),
    "SharedMemory.__enter__": (ITSELF, ITSELF),
    "SharedMemory.__exit__": (None, None),
    "MessageQueue.name": (WORKS, None),
    "MessageQueue.mode": (0o600, 0),
    "MessageQueue.mqd": (-1, -1),
    "MessageQueue.block": (ExistentialError, ExistentialError),
    "MessageQueue.max_messages": (2, ExistentialError),
    "MessageQueue.max_message_size": (64, ExistentialError),
    "MessageQueue.current_messages": (ExistentialError, ExistentialError),
    "MessageQueue.send": (ExistentialError, ExistentialError),
    "MessageQueue.receive": (ExistentialError, ExistentialError),
    "MessageQueue.receive_into": (ExistentialError, ExistentialError),
    "MessageQueue.request_notification": (ExistentialError, ExistentialError),
    "MessageQueue.fileno": (-1, -1),
    "MessageQueue.close": (ExistentialError, ExistentialError),
    "MessageQueue.unlink": (None, ExistentialError),
    "MessageQueue.__enter__": (ITSELF, ITSELF),
    "MessageQueue.__exit__": (None, None),
}

WRITABLE = {"MessageQueue.block"}


def kind_of(path):
    (kind,) = (kind for kind in KINDS if kind.type.__name__ == path.split(".")[0])
    return kind


def is_property(path):
    type, _, member = path.partition(".")
    return inspect.isgetsetdescriptor(getattr(getattr(posix_ipc, type), member))


# ---- completeness ----


def public_members():
    """Every callable and every property of the public interface, exceptions apart."""
    for name in posix_ipc.__all__:
        public = getattr(posix_ipc, name)
        if callable(public) and not (isinstance(public, type) and issubclass(public, Exception)):
            yield name
            if isinstance(public, type):
                yield from (f"{name}.{member}" for member in vars(public) if not member.startswith("_"))


def test_every_call_and_every_argument_is_in_the_table():
    calls = [path for path in public_members() if "." not in path or not is_property(path)]
    assert set(ARGUMENTS) == set(calls)
    for path in calls:
        type, _, method = path.partition(".")
        call = getattr(getattr(posix_ipc, type), method) if method else getattr(posix_ipc, type)
        assert set(ARGUMENTS[path]) == set(inspect.signature(call).parameters) - {"self"}, path


def test_every_member_of_every_handle_is_in_the_table():
    members = {path for path in public_members() if "." in path}
    assert {path for path in HANDLES if "__" not in path} == members


def test_every_argument_has_a_bad_value_of_another_type_and_one_out_of_range():
    for path, arguments in ARGUMENTS.items():
        for argument, bad in arguments.items():
            errors = {error for _, error in bad if not isinstance(error, tuple)}
            assert errors & {TypeError, ValueError}, (path, argument)
            assert len(errors) > 1, (path, argument)


# ---- bad arguments ----


def bad_arguments(wanted):
    """The rows of ARGUMENTS for those calls; a value has no name of its own, so its place in the table is its id."""
    return pytest.mark.parametrize(
        ("path", "argument", "value", "error"),
        [
            pytest.param(path, argument, value, error, id=f"{path}-{argument}-{index}")
            for path, arguments in ARGUMENTS.items()
            if wanted(path)
            for argument, bad in arguments.items()
            for index, (value, error) in enumerate(bad)
        ],
    )


def state(handle):
    """What a bad argument must not change."""
    if isinstance(handle, posix_ipc.Semaphore):
        return handle.value
    if isinstance(handle, posix_ipc.SharedMemory):
        return handle.size, os.pread(handle.fd, 1000, 0)
    return handle.current_messages, handle.block


@bad_arguments(lambda path: path in ("Semaphore", "SharedMemory", "MessageQueue"))
def test_bad_argument_of_a_constructor(names, path, argument, value, error):
    kind = kind_of(path)
    new, existing = names(), names()
    keeper = kind.create(existing)
    try:
        before = open_fds(), state(keeper)
        for name, flags in ((new, O_CREX), (new, O_CREAT), (existing, O_CREAT), (existing, 0)):
            if flags == O_CREX and argument == "name":
                continue  # None is a good one there
            if flags == 0 and argument in ("initial_value", "max_messages", "max_message_size"):
                continue  # they are for new objects
            with pytest.raises(error) as caught:
                kind.type(**{"name": name, "flags": flags, **kind.options, argument: value})
            assert str(caught.value)
            assert (kind.exists(new), kind.exists(existing)) == (False, True)
        assert (open_fds(), state(keeper)) == before
    finally:
        kind.close_handle(keeper)
        kind.remove(existing)


@bad_arguments(lambda path: "." in path)
def test_bad_argument_of_a_method(request, path, argument, value, error):
    kind = kind_of(path)
    handle = request.getfixturevalue(FACTORIES[kind])()
    before = open_fds(), state(handle)
    call = getattr(handle, path.split(".")[1])
    required = [name for name, parameter in inspect.signature(call).parameters.items() if parameter.default is NONE]
    with pytest.raises(error) as caught:
        call(**{**{name: REQUIRED[name] for name in required}, argument: value})
    assert str(caught.value)
    assert (open_fds(), state(handle)) == before


NONE = inspect.Parameter.empty
FACTORIES = {SEMAPHORE: "semaphore", SHARED_MEMORY: "segment", MESSAGE_QUEUE: "queue"}


@bad_arguments(lambda path: path.startswith("unlink_"))
def test_bad_argument_of_a_function(path, argument, value, error):
    with pytest.raises(error) as caught:
        getattr(posix_ipc, path)(**{argument: value})
    assert str(caught.value)


def calls_on_new_handles():
    """Every callable; the methods of handles that were never opened, for which arguments are wrong in the same way."""
    for path in ARGUMENTS:
        type, _, method = path.partition(".")
        public = getattr(posix_ipc, type)
        yield path, getattr(public.__new__(public), method) if method else public


@pytest.mark.parametrize(("path", "call"), [pytest.param(*row, id=row[0]) for row in calls_on_new_handles()])
def test_wrong_number_or_names_of_arguments(path, call):
    parameters = inspect.signature(call).parameters
    required = {name: REQUIRED[name] for name, parameter in parameters.items() if parameter.default is NONE}
    complete = [REQUIRED.get(name) for name in parameters]
    with pytest.raises(TypeError):
        call(*complete, None)
    with pytest.raises(TypeError):
        call(**required, nonsense=1)
    with pytest.raises(TypeError):
        call(**required, **{"": 1})
    if required:
        with pytest.raises(TypeError, match=next(iter(required))):
            call()
    if parameters:
        with pytest.raises(TypeError):
            call(*complete, **{next(iter(parameters)): complete[0]})


# ---- handles in no state to be used ----


def outcome_of(handle, member):
    """What using a member gives: a value, or the type of the exception."""
    try:
        if is_property(f"{base_of(handle)}.{member}"):
            return getattr(handle, member)
        method = getattr(handle, member)
        arguments = {"__exit__": (None, None, None), "send": (b"x",), "receive_into": (bytearray(64),)}.get(member, ())
        value = method(*arguments)
        return ITSELF if value is handle else value
    except Exception as error:
        return type(error)


def base_of(handle):
    (kind,) = (kind for kind in KINDS if isinstance(handle, kind.type))
    return kind.type.__name__


@pytest.mark.parametrize("path", HANDLES)
def test_member_of_a_closed_handle(request, path):
    kind, member = kind_of(path), path.split(".")[1]
    handle = request.getfixturevalue(FACTORIES[kind])()
    kind.close_handle(handle)
    before = open_fds()
    expected = handle.name if HANDLES[path][0] is WORKS else HANDLES[path][0]
    assert outcome_of(handle, member) == expected
    assert open_fds() == before


@pytest.mark.parametrize("path", HANDLES)
def test_member_of_a_handle_that_was_never_opened(path):
    kind, member = kind_of(path), path.split(".")[1]
    before = open_fds()
    assert outcome_of(kind.type.__new__(kind.type), member) == HANDLES[path][1]
    assert open_fds() == before


PROPERTIES = [path for path in HANDLES if is_property(path)]


@pytest.mark.parametrize("path", PROPERTIES)
@pytest.mark.parametrize("form", ["open", "closed", "never opened"])
def test_property_cannot_be_deleted_and_is_set_only_where_it_may(request, path, form):
    kind, member = kind_of(path), path.split(".")[1]
    handle = kind.type.__new__(kind.type) if form == "never opened" else request.getfixturevalue(FACTORIES[kind])()
    before = outcome_of(handle, member)
    if form == "closed":
        kind.close_handle(handle)
    with pytest.raises(AttributeError):
        delattr(handle, member)
    if path in WRITABLE:
        with pytest.raises(ZeroDivisionError):
            setattr(handle, member, Unhelpful())
        with pytest.raises(TypeError):
            setattr(handle, member, Misleading())
    else:
        with pytest.raises(AttributeError):
            setattr(handle, member, 1)
    if form == "open":
        assert outcome_of(handle, member) == before


# ---- what has crashed the interpreter, or could ----


class Acts:
    """Does something at the moment when it is converted to a number or a truth value, and gives 0."""

    def __init__(self, act):
        self._act = act

    def __index__(self):
        self._act()
        return 0

    def __float__(self):
        return float(self.__index__())

    def __bool__(self):
        return bool(self.__index__())


def opened(kind, **options):
    handle = kind.create(None, **options)
    handle.unlink()
    return handle


def expect(error, call, *arguments, **options):
    try:
        call(*arguments, **options)
    except error:
        return
    raise AssertionError(f"no {error}")


def null_in_a_str_name():
    for kind in KINDS:
        expect(ValueError, kind.type, "/a\0b", O_CREX)


def null_in_a_bytes_name():
    for kind in KINDS:
        expect(ValueError, kind.type, b"/a\0b", O_CREX)


def sending_a_number():
    queue = opened(MESSAGE_QUEUE)
    expect(TypeError, queue.send, 3)


def deleting_block():
    queue = opened(MESSAGE_QUEUE)
    expect(AttributeError, delattr, queue, "block")


def huge_timeouts():
    semaphore, queue = opened(SEMAPHORE, initial_value=3), opened(MESSAGE_QUEUE)
    for timeout in (1e300, math.inf, 10**400):
        semaphore.acquire(timeout)
        queue.send(b"x", timeout)
        queue.receive(timeout)


def timeout_that_closes_the_semaphore():
    semaphore = opened(SEMAPHORE, initial_value=1)
    expect(ExistentialError, semaphore.acquire, Acts(semaphore.close))


def timeout_that_closes_the_queue():
    for call in (
        lambda queue, timeout: queue.send(b"x", timeout),
        lambda queue, timeout: queue.receive(timeout),
        lambda queue, timeout: queue.receive_into(bytearray(64), timeout),
    ):
        queue = opened(MESSAGE_QUEUE)
        expect(ExistentialError, call, queue, Acts(queue.close))


def priority_that_closes_the_queue():
    queue = opened(MESSAGE_QUEUE)
    expect(ExistentialError, queue.send, b"x", priority=Acts(queue.close))


def truth_that_closes_the_queue():
    queue = opened(MESSAGE_QUEUE)
    expect(ExistentialError, setattr, queue, "block", Acts(queue.close))


def argument_that_opens_the_handle_itself():
    for kind in KINDS:
        first, second = opened(kind), kind.create(None)
        handle = kind.type.__new__(kind.type)
        expect(
            ExistentialError,
            handle.__init__,
            first.name,
            flags=Acts(lambda handle=handle, name=second.name: handle.__init__(name)),
        )
        assert handle.name == second.name
        second.unlink()


def argument_that_empties_the_keywords():
    """The arguments are borrowed from a dict that the conversion of one of them can clear."""
    for kind in KINDS:
        arguments = {"name": "/" + "x" * 100, "flags": None}
        arguments["flags"] = Acts(arguments.clear)
        expect(ExistentialError, kind.type, **arguments)


def buffer_that_is_resized_while_it_is_sent():
    queue, message = opened(MESSAGE_QUEUE), bytearray(b"abc")
    queue.send(message, Acts(message.clear))
    assert queue.receive(0) == (b"", 0)


def buffer_that_is_resized_while_it_is_received_into():
    queue, buffer = opened(MESSAGE_QUEUE), bytearray(64)
    queue.send(b"abc")
    expect(ValueError, queue.receive_into, buffer, Acts(buffer.clear))
    assert queue.receive(0) == (b"abc", 0)


def argument_that_views_and_closes_the_segment():
    segment = opened(SHARED_MEMORY)
    view = segment.buf
    expect(ExistentialError, segment.__init__, "/missing", Acts(segment.close))
    view[0] = 1
    expect(ExistentialError, memoryview, segment)


def deep_inheritance_without_init():
    for kind in KINDS:
        type_ = kind.type
        for depth in range(50):
            type_ = type(f"Level{depth}", (type_,), {"__slots__": ()} if depth % 2 else {})
        handle = type_.__new__(type_)
        assert handle.name is None
        del handle, type_


def calls_with_a_foreign_self():
    for path in ARGUMENTS:
        type_name, _, method = path.partition(".")
        if method:
            descriptor = getattr(getattr(posix_ipc, type_name), method)
            for other in (
                None,
                3,
                object(),
                *(kind.type.__new__(kind.type) for kind in KINDS if kind is not kind_of(path)),
            ):
                expect(TypeError, descriptor, other)


def init_of_another_type():
    for kind in KINDS:
        for other in KINDS:
            if other is not kind:
                expect(TypeError, kind.type.__init__, other.type.__new__(other.type), "/x")
                expect(TypeError, kind.type.__new__, other.type)


CRASHES = [
    null_in_a_str_name,
    null_in_a_bytes_name,
    sending_a_number,
    deleting_block,
    huge_timeouts,
    timeout_that_closes_the_semaphore,
    timeout_that_closes_the_queue,
    priority_that_closes_the_queue,
    truth_that_closes_the_queue,
    argument_that_opens_the_handle_itself,
    argument_that_empties_the_keywords,
    buffer_that_is_resized_while_it_is_sent,
    buffer_that_is_resized_while_it_is_received_into,
    argument_that_views_and_closes_the_segment,
    deep_inheritance_without_init,
    calls_with_a_foreign_self,
    init_of_another_type,
]


@pytest.mark.parametrize("scenario", CRASHES, ids=lambda scenario: scenario.__name__)
def test_interpreter_survives(scenario):
    """In a process of its own: death is one failing test, and takes no other test with it."""
    run_forked(scenario)
