"""Signals that arrive while a call waits: real ones, and most of them sent when the kernel says that it waits."""

import contextlib
import errno
import faulthandler
import gc
import os
import signal
import threading
import time
import traceback

import pytest
import support
from support import BLOCKING_CALLS, MESSAGE_QUEUE, SEMAPHORE, Waiter, is_blocked, wait_until

import posix_ipc
from posix_ipc import BusyError, ExistentialError, SignalError


@pytest.fixture(autouse=True)
def _no_test_waits_for_ever():
    """End with the stacks of all threads rather than hang; these tests run in the main thread, as handlers do."""
    assert threading.current_thread() is threading.main_thread()
    faulthandler.dump_traceback_later(60, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture
def handle_signal():
    """Return a function that sets a handler for the time of the test."""
    with contextlib.ExitStack() as restore:

        def handle(number, handler):
            restore.callback(signal.signal, number, signal.signal(number, handler))

        yield handle


@pytest.fixture(params=BLOCKING_CALLS)
def call(request):
    return BLOCKING_CALLS[request.param]


@pytest.fixture
def handle(call, request):
    """Return a handle on which the call will wait."""
    handle = request.getfixturevalue({SEMAPHORE: "semaphore", MESSAGE_QUEUE: "queue"}[call.kind])()
    call.prepare(handle)
    return handle


@contextlib.contextmanager
def signal_once_blocked(number=signal.SIGUSR1):
    """Send this thread a signal at some time in the block when it sleeps in a call of the module."""
    receiver = threading.current_thread()

    def send():
        wait_until(lambda: is_blocked(receiver))
        signal.pthread_kill(receiver.ident, number)

    sender = threading.Thread(target=send)
    sender.start()
    try:
        yield
    finally:
        sender.join()


def assert_usable(call, handle):
    call.unblock(handle)
    call.call(handle)


class HandlerError(Exception):
    pass


class HandlerBaseException(BaseException):
    """Like KeyboardInterrupt no Exception, so whoever raises it means to get through."""


# ---- what the waiting call raises ----


def test_handler_that_returns(call, handle, handle_signal):
    seen = []
    handle_signal(signal.SIGUSR1, lambda number, frame: seen.append(number))
    with signal_once_blocked(), pytest.raises(SignalError) as caught:
        call.call(handle)
    assert seen == [signal.SIGUSR1]  # the handler ran before the call raised
    assert (caught.value.errno, caught.value.name) == (errno.EINTR, handle.name)
    assert caught.value.__cause__ is None
    assert_usable(call, handle)


def test_exception_of_the_handler_is_the_cause(call, handle, handle_signal):
    error = HandlerError("of the handler")

    def raising_handler(number, frame):
        raise error

    handle_signal(signal.SIGUSR1, raising_handler)
    with signal_once_blocked(), pytest.raises(SignalError) as caught:
        call.call(handle)
    assert caught.value.__cause__ is error
    assert traceback.extract_tb(error.__traceback__)[-1].name == "raising_handler"
    assert (caught.value.errno, caught.value.name) == (errno.EINTR, handle.name)
    assert_usable(call, handle)


@pytest.mark.parametrize("exception", [KeyboardInterrupt, SystemExit, GeneratorExit, HandlerBaseException])
def test_what_is_no_exception_passes_through(call, handle, handle_signal, exception):
    error = exception("of the handler")

    def raising_handler(number, frame):
        raise error

    handle_signal(signal.SIGUSR1, raising_handler)
    with signal_once_blocked(), pytest.raises(exception) as caught:
        call.call(handle)
    assert caught.value is error
    assert_usable(call, handle)


def test_the_default_handler_of_ctrl_c(call, handle, handle_signal):
    handle_signal(signal.SIGINT, signal.default_int_handler)
    with signal_once_blocked(signal.SIGINT), pytest.raises(KeyboardInterrupt):
        call.call(handle)
    assert_usable(call, handle)


def test_signal_is_answered_although_the_call_could_go_on(call, handle, handle_signal):
    """The handler brings what the call waits for. It is not retried, and nothing is lost."""
    handle_signal(signal.SIGUSR1, lambda number, frame: call.unblock(handle))
    with signal_once_blocked(), pytest.raises(SignalError):
        call.call(handle)
    call.call(handle)


@pytest.mark.parametrize("way", ["close", "open elsewhere"])
def test_handler_takes_the_handle_away(call, handle, handle_signal, way, names):
    elsewhere = names()
    peer = call.kind.type(handle.name)

    def handler(number, frame):
        if way == "close":
            handle.close()
        else:
            leave_open = getattr(handle, "mqd", None)
            handle.__init__(elsewhere, posix_ipc.O_CREX, **call.kind.options)
            if leave_open is not None:  # reopening a constructor's handle does not close its descriptor
                os.close(leave_open)

    handle_signal(signal.SIGUSR1, handler)
    try:
        with signal_once_blocked(), pytest.raises(SignalError):
            call.call(handle)
        if way == "close":
            with pytest.raises(ExistentialError):
                call.call(handle)
        else:
            call.prepare(handle)
            assert_usable(call, handle)
            handle.close()
            handle.unlink()
        assert_usable(call, peer)
    finally:
        peer.close()
        peer.unlink()


def test_handler_makes_the_same_call(call, handle, handle_signal):
    """A handler may use the very handle that it has interrupted, and be interrupted itself."""
    errors = []

    def handler(number, frame):
        if not errors:
            errors.append(None)
            with signal_once_blocked(), pytest.raises(SignalError) as caught:
                call.call(handle)
            errors.append(caught.value)

    handle_signal(signal.SIGUSR1, handler)
    with signal_once_blocked(), pytest.raises(SignalError) as caught:
        call.call(handle)
    assert errors[1] is not caught.value
    assert_usable(call, handle)


# ---- other threads ----


def test_other_threads_go_on_waiting(call, handle, handle_signal):
    seen = []
    handle_signal(signal.SIGUSR1, lambda number, frame: seen.append(number))
    waiter = Waiter(call.call, handle)
    with signal_once_blocked(), pytest.raises(SignalError):
        call.call(handle)
    assert seen == [signal.SIGUSR1]
    assert is_blocked(waiter)
    call.unblock(handle)
    assert waiter.outcome() is None


def test_signal_to_a_thread_that_waits(call, handle, handle_signal):
    """It ends the thread's wait, but handlers run in the main thread, and what they raise comes up there."""
    error = HandlerError("of the handler")

    def handler(number, frame):
        assert threading.current_thread() is threading.main_thread()
        raise error

    handle_signal(signal.SIGUSR1, handler)
    waiter = Waiter(call.call, handle)
    with pytest.raises(HandlerError) as caught:
        signal.pthread_kill(waiter.ident, signal.SIGUSR1)
        wait_until(lambda: False)  # the handler's time comes soon
    assert caught.value is error
    outcome = waiter.outcome()
    assert type(outcome) is SignalError
    assert outcome.__cause__ is None
    assert_usable(call, handle)


# ---- many signals ----

TIMED_CALLS = {
    "acquire": (SEMAPHORE, lambda semaphore: None, lambda semaphore, timeout: semaphore.acquire(timeout)),
    "receive": (MESSAGE_QUEUE, lambda queue: None, lambda queue, timeout: queue.receive(timeout)),
    "receive_into": (
        MESSAGE_QUEUE,
        lambda queue: None,
        lambda queue, timeout: queue.receive_into(bytearray(64), timeout),
    ),
    "send": (MESSAGE_QUEUE, BLOCKING_CALLS["send()"].prepare, lambda queue, timeout: queue.send(b"waiting", timeout)),
}


@pytest.fixture(params=TIMED_CALLS)
def timed_call(request):
    """Return a function of a timeout, on a handle where it does not get what it waits for."""
    kind, prepare, call = TIMED_CALLS[request.param]
    handle = request.getfixturevalue({SEMAPHORE: "semaphore", MESSAGE_QUEUE: "queue"}[kind])()
    prepare(handle)
    return lambda timeout: call(handle, timeout)


@contextlib.contextmanager
def signals_every(interval):
    signal.setitimer(signal.ITIMER_REAL, interval, interval)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


@pytest.mark.slow
def test_wait_retried_to_its_deadline_under_200_signals_a_second(timed_call, handle_signal):
    handle_signal(signal.SIGALRM, lambda number, frame: None)
    interrupted = 0
    start = time.monotonic()
    deadline = start + 0.3
    with signals_every(0.005):
        while True:
            try:
                timed_call(max(deadline - time.monotonic(), 0))
            except SignalError:
                interrupted += 1
            except BusyError:
                break
    assert 0.3 <= time.monotonic() - start < 3
    assert interrupted >= 5


def test_wait_of_no_time_under_signals(timed_call, handle_signal):
    """Nothing but the handler's exception and the answer of the call comes up, and the answer stays the same."""

    def attempt():
        for _ in range(500):
            try:
                timed_call(0)
            except BusyError:
                continue
            raise AssertionError("it got what is not there")

    def handler(number, frame):
        while frame is not None:
            if frame.f_code is attempt.__code__:  # anywhere else nobody expects it
                raise HandlerError
            frame = frame.f_back

    handle_signal(signal.SIGALRM, handler)
    raised = 0
    deadline = time.monotonic() + 30
    gc.collect()
    gc.disable()  # what the handler raises in a finalizer would come up elsewhere
    try:
        with signals_every(0.0005):
            while raised < 20 and time.monotonic() < deadline:
                try:
                    attempt()
                except HandlerError:
                    raised += 1
    finally:
        gc.enable()
    assert raised == 20
    with pytest.raises(BusyError):
        timed_call(0)


# ---- a process of its own ----

WAITING_PROGRAM = """
import signal, sys
from support import BLOCKING_CALLS
signal.signal(signal.SIGINT, signal.default_int_handler)  # it is ignored in what a shell runs in the background
call = BLOCKING_CALLS[sys.argv[1]]
handle = call.kind.create(sys.argv[2])
call.prepare(handle)
handle.unlink()
print("ready", flush=True)
call.call(handle)
"""


def sleeping_or_dead(child):
    with open(f"/proc/{child.pid}/stat") as stat:
        state = stat.read().rpartition(") ")[2][0]
    return state in "SZ" and state


@pytest.mark.parametrize("call_name", BLOCKING_CALLS)
def test_ctrl_c_ends_a_program_that_waits(call_name, name):
    with support.start_python(WAITING_PROGRAM, call_name, name) as child:
        support.wait_until_ready(child)
        support.wait_until_blocked(child)
        # Stopped and continued, as by the job control of a shell, it waits on: no handler ran.
        os.kill(child.pid, signal.SIGSTOP)
        assert os.WIFSTOPPED(os.waitpid(child.pid, os.WUNTRACED)[1])
        os.kill(child.pid, signal.SIGCONT)
        assert wait_until(lambda: sleeping_or_dead(child)) == "S"
        os.kill(child.pid, signal.SIGINT)
        _, stderr = child.communicate(timeout=30)
    assert child.returncode == -signal.SIGINT
    assert stderr.rstrip().endswith("KeyboardInterrupt")
