"""Audit events: a hook hears of every object before it is created, opened or unlinked, and may forbid it.

A hook cannot be taken away again, so each scenario is a function that runs in a process of its own.
"""

import contextlib
import copy
import os
import pickle
import signal
import sys

import pytest
from support import KINDS, MESSAGE_QUEUE, SEMAPHORE, SHARED_MEMORY, open_fds, run_function

import posix_ipc
from posix_ipc import O_CREAT, O_CREX, O_TRUNC

EVENT_NAMES = {SEMAPHORE: "semaphore", SHARED_MEMORY: "shared_memory", MESSAGE_QUEUE: "message_queue"}


def kind_of(word):
    (kind,) = (kind for kind, name in EVENT_NAMES.items() if name == word)
    return kind


def listen():
    """Return a list that grows with the events of posix_ipc: (event, kind, name)."""
    heard = []

    def hook(event, arguments):
        if event.startswith("posix_ipc"):
            heard.append((event, *arguments))

    sys.addaudithook(hook)
    return heard


@contextlib.contextmanager
def expecting(heard, *events):
    """The block brings about these events, and no other."""
    heard.clear()
    yield
    assert heard == list(events)
    assert all(type(name) is str for _, _, name in heard)


@pytest.fixture(params=KINDS, ids=EVENT_NAMES.values())
def word(request):
    """Return what events call the kind."""
    return EVENT_NAMES[request.param]


# ---- what is told ----


def open_in_every_way(word, name):
    kind, heard = kind_of(word), listen()
    created, opened, unlinked = (
        (f"posix_ipc.{event}", word, name) for event in ("create", "open", "unlink")
    )  # fmt: skip
    with expecting(heard, created):
        handle = kind.create(name)
    with expecting(heard, created):  # that it is there already shows only afterwards
        kind.type(name, O_CREAT)
    with expecting(heard, opened):
        kind.type(name)
    with expecting(heard, opened):
        kind.type(name.encode(), posix_ipc.O_NONBLOCK)
    with expecting(heard, opened):
        kind.type.__new__(kind.type).__init__(name)
    with expecting(heard, opened):
        handle.__init__(name)
    with expecting(heard, opened):
        type("Subclass", (kind.type,), {})(name)
    with expecting(heard):
        pickled = pickle.dumps(handle)
    with expecting(heard, opened):
        pickle.loads(pickled)
    with expecting(heard, opened):
        copy.copy(handle)
    with expecting(heard, opened):
        copy.deepcopy(handle)
    with expecting(heard, created), pytest.raises(posix_ipc.ExistentialError):
        kind.create(name, O_CREX)
    with expecting(heard, unlinked):
        handle.unlink()
    with expecting(heard, opened), pytest.raises(posix_ipc.ExistentialError):
        kind.type(name)
    with expecting(heard, opened), pytest.raises(posix_ipc.ExistentialError):
        pickle.loads(pickled)
    with expecting(heard, unlinked), pytest.raises(posix_ipc.ExistentialError):
        handle.unlink()
    for spelling in (name, name.encode()):
        with expecting(heard, created):
            kind.create(spelling, O_CREAT)
        with expecting(heard, unlinked):
            kind.unlink(spelling)
    with expecting(heard, unlinked), pytest.raises(posix_ipc.ExistentialError):
        kind.unlink(name=name)
    if kind is SHARED_MEMORY:
        with expecting(heard, created, opened, opened, unlinked):
            kind.create(name, reserve=True)
            kind.type(name, O_TRUNC)
            kind.type(name, read_only=True)
            kind.unlink(name)


def test_every_way_to_create_open_and_unlink(word, name):
    run_function(open_in_every_way, word, name)


def name_as_given(word, name):
    """Bytes that are no UTF-8 arrive as Python spells file names, and a missing slash stays missing."""
    kind, heard = kind_of(word), listen()
    given = [name + "é\n", os.fsdecode(name.encode() + b"\xff")]
    if kind is not MESSAGE_QUEUE:
        given.append(name[1:])
    for text in given:
        with expecting(
            heard,
            ("posix_ipc.create", word, text),
            ("posix_ipc.open", word, text),
            ("posix_ipc.unlink", word, text),
        ):
            kind.create(os.fsencode(text))
            kind.type(text)
            kind.unlink(os.fsencode(text))


def test_name_is_told_as_it_was_given(word, name):
    run_function(name_as_given, word, name)


def make_random_names(word):
    kind, heard = kind_of(word), listen()
    for _ in range(5):
        handle = kind.create(None)
        assert heard == [("posix_ipc.create", word, handle.name)]
        heard.clear()
        handle.unlink()
        assert heard == [("posix_ipc.unlink", word, handle.name)]
        heard.clear()


def test_random_name_is_told(word):
    run_function(make_random_names, word)


def look_while_being_told(word, name):
    """At the time of the event nothing has been done yet."""
    kind, seen = kind_of(word), []

    def hook(event, arguments):
        if event.startswith("posix_ipc"):
            seen.append((event, kind.exists(name), os.path.exists("/dev/shm/" + name[1:])))

    sys.addaudithook(hook)
    kind.create(name)
    kind.unlink(name)
    in_shm = kind is SHARED_MEMORY
    assert seen == [("posix_ipc.create", False, False), ("posix_ipc.unlink", True, in_shm)]


def test_event_comes_first(word, name):
    run_function(look_while_being_told, word, name)


def hear_nothing(word, name):
    kind, heard = kind_of(word), listen()
    handle = kind.create(name)
    closed = kind.create(name, O_CREAT)
    kind.close_handle(closed)
    never = kind.type.__new__(kind.type)
    with expecting(heard):
        repr(handle), str(handle), handle.name, handle.mode, hash(handle), pickle.dumps(handle)
        if kind is SEMAPHORE:
            handle.release()
            handle.acquire(0)
            handle.release()
            with handle:
                pass
            assert handle.value == 1
        elif kind is SHARED_MEMORY:
            assert handle.buf[0] == memoryview(handle)[0] == 0
            assert (handle.size, handle.fileno()) == (64, handle.fd)
        else:
            handle.send(b"x")
            handle.receive()
            handle.send(b"x", 0, 3)
            handle.receive_into(bytearray(64), 0)
            handle.request_notification(signal.SIGWINCH)
            handle.request_notification((len, 0))
            handle.request_notification(None)
            handle.block = not handle.block
            assert (handle.current_messages, handle.fileno()) == (0, handle.mqd)
        # What is refused before a name reaches the system.
        for arguments in ((), (3,), ("/a\0b",), (None,), (name, "x"), (name, O_CREX, -1)):
            with pytest.raises((TypeError, ValueError)):
                kind.type(*arguments)
        for arguments in ((), (3,), ("/a\0b",), (None,)):
            with pytest.raises((TypeError, ValueError)):
                kind.unlink(*arguments)
        for use in (never.unlink, lambda: pickle.dumps(never), lambda: pickle.dumps(closed)):
            with pytest.raises(posix_ipc.ExistentialError):
                use()
        kind.close_handle(handle)
        if kind is not SEMAPHORE:
            with handle:  # which may be closed
                pass
    handle.unlink()


def test_no_event_for_any_other_call(word, name):
    run_function(hear_nothing, word, name)


# ---- a hook that forbids ----


class Forbidden(Exception):
    pass


class ForbiddenForGood(BaseException):
    """Nothing that catches what an ordinary call raises may swallow it."""


def forbid(error):
    """Return a set: events in it raise `error`."""
    forbidden = set()

    def hook(event, arguments):
        if event in forbidden:
            raise error

    sys.addaudithook(hook)
    return forbidden


@contextlib.contextmanager
def forbidding(forbidden, error, event):
    """Every call of the block ends with the hook's own exception."""
    forbidden.add(event)
    try:
        with pytest.raises(type(error)) as caught:
            yield
        assert caught.value is error
        error.__traceback__ = None  # it holds the frames, and their handles
    finally:
        forbidden.clear()


def state(kind, handle):
    if kind is SEMAPHORE:
        return handle.value
    if kind is SHARED_MEMORY:
        return handle.size, os.pread(handle.fd, 100, 0), os.fstat(handle.fd).st_ino
    return handle.current_messages, handle.block, handle.mqd


def veto(word, error_name, name, new):
    kind, error = kind_of(word), globals()[error_name]("of the hook")
    forbidden = forbid(error)
    handle = kind.create(name)
    pickled = pickle.dumps(handle)
    identity = repr(handle), state(kind, handle)
    before = open_fds(), sorted(entry for entry in os.listdir("/dev/shm") if name[1:] in entry or new[1:] in entry)

    ways = {
        "create": [
            lambda: kind.create(new, O_CREX),
            lambda: kind.create(new, O_CREAT),
            lambda: kind.create(name, O_CREAT),
            lambda: kind.create(None),
            lambda: handle.__init__(new, O_CREX, **kind.options),
            lambda: handle.__init__(name, O_CREAT, **kind.options),
            *([lambda: kind.create(new, size=4096, reserve=True), lambda: kind.create(name, O_CREAT | O_TRUNC)]
              if kind is SHARED_MEMORY else []),
        ],
        "open": [
            lambda: kind.type(name),
            lambda: kind.type(new),
            lambda: kind.type.__new__(kind.type).__init__(name),
            lambda: handle.__init__(name),
            lambda: pickle.loads(pickled),
            lambda: copy.copy(handle),
            lambda: copy.deepcopy(handle),
            *([lambda: kind.type(name, O_TRUNC), lambda: kind.type(name, size=10)] if kind is SHARED_MEMORY else []),
        ],
        "unlink": [handle.unlink, lambda: kind.unlink(name), lambda: kind.unlink(name.encode())],
    }  # fmt: skip
    for event, calls in ways.items():
        for call in calls:
            with forbidding(forbidden, error, f"posix_ipc.{event}"):
                call()
            assert (repr(handle), state(kind, handle)) == identity
            assert (kind.exists(name), kind.exists(new)) == (True, False)
            files = sorted(entry for entry in os.listdir("/dev/shm") if name[1:] in entry or new[1:] in entry)
            assert (open_fds(), files) == before
    # Forbidding one thing forbids nothing else.
    forbidden.update({"posix_ipc.open", "posix_ipc.unlink"})
    kind.create(new)
    forbidden.symmetric_difference_update({"posix_ipc.open", "posix_ipc.unlink", "posix_ipc.create"})
    pickle.loads(pickled)
    kind.unlink(new)
    handle.unlink()
    assert (kind.exists(name), kind.exists(new)) == (False, False)


@pytest.mark.parametrize("error_name", ["Forbidden", "ForbiddenForGood"])
def test_hook_that_raises_forbids_the_operation(word, names, error_name):
    run_function(veto, word, error_name, names(), names())


def veto_many_times(word, name):
    """A forbidden opening keeps no memory."""
    kind, error = kind_of(word), Forbidden()
    forbidden = forbid(error)
    handle = kind.create(name)
    pickled = pickle.dumps(handle)
    kind.unlink(name)
    calls = {
        "create": lambda: kind.create(None),
        "open": lambda: pickle.loads(pickled),
        "unlink": handle.unlink,
    }

    def pages():
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1])

    def refuse(times):
        for event, call in calls.items():
            forbidden.add(f"posix_ipc.{event}")
            for _ in range(times):
                with contextlib.suppress(Forbidden):
                    call()
                error.__traceback__ = None
            forbidden.clear()

    refuse(1000)
    before = pages()
    refuse(5000)
    assert (pages() - before) * posix_ipc.PAGE_SIZE < 5000 * 32  # less than the smallest block a time


@pytest.mark.skipif("asan" in os.environ.get("LD_PRELOAD", ""), reason="the sanitizer keeps freed memory aside")
def test_refusals_leak_nothing(word, name):
    run_function(veto_many_times, word, name)


def act_while_being_told(word, name):
    """A hook may use the package itself, even the handle that is about to be opened."""
    kind, acted = kind_of(word), []
    handle = kind.create(name)

    def hook(event, arguments):
        if event == "posix_ipc.open" and not acted:
            acted.append(event)
            handle.__init__(name)
            kind.close_handle(handle)
            kind.type(name)

    sys.addaudithook(hook)
    handle.__init__(name)
    assert acted
    handle.unlink()
    kind.close_handle(handle)


def test_hook_may_use_the_package(word, name):
    run_function(act_while_being_told, word, name)
