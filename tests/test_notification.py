"""MessageQueue.request_notification, by signal and by callback."""

import errno
import functools
import gc
import os
import platform
import resource
import signal
import sys
import threading
import weakref

import pytest
from support import (
    SMALL_QUEUE,
    finish,
    forbid,
    open_fds,
    run_forked,
    run_function,
    run_python,
    start_python,
    threads,
    wait_until,
    wait_until_ready,
)

import posix_ipc

SIGNAL = signal.SIGUSR1
SI_MESGQ = -3


class Recorder:
    """A callback that remembers its calls."""

    def __init__(self):
        self.calls = []
        self.threads = []

    def __call__(self, *args):
        self.threads.append(threading.get_ident())
        self.calls.append(args)

    def wait(self, count=1):
        wait_until(lambda: len(self.calls) >= count)
        return self.calls


@pytest.fixture
def called():
    return Recorder()


@pytest.fixture
def q(queue):
    return queue()


SIGNALS = {SIGNAL, signal.SIGUSR2, signal.SIGRTMIN, signal.SIGRTMAX}


def alone(test):
    """Run a test about signals in a forked child, which has one thread and blocks them: what was sent stays pending.

    The kernel sends the signal within the send() that causes it: what is not pending then is not coming. In a process
    with more threads, such as a worker of the test runner, any of them could get it. The objects of the test must come
    from fixtures, so that they are made, and removed, in the parent.
    """

    def with_signals_blocked(**fixtures):
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        test(**fixtures)

    @functools.wraps(test)
    def run(**fixtures):
        run_forked(with_signals_blocked, **fixtures)

    return run


def sent_signal():
    """Take a pending signal; None if there is none."""
    return signal.sigtimedwait(SIGNALS, 0)


def fire(q):
    """Send a message into the empty queue and take it out again."""
    q.send(b"fire", 0)
    return q.receive(0)


def is_free(q):
    """Could another process register for the queue now? (It does, and takes it back.)"""
    code = (
        "import sys, posix_ipc\n"
        "q = posix_ipc.MessageQueue(sys.argv[1])\n"
        "try: q.request_notification(10)\n"
        "except posix_ipc.BusyError as error:\n"
        "    assert (error.errno, error.name) == (16, sys.argv[1])\n"
        "    print('busy')\n"
        "else: print('free')\n"
    )
    return {"free\n": True, "busy\n": False}[run_python(code, q.name).stdout]


# ---- by signal ----


@pytest.mark.parametrize("number", [SIGNAL, signal.SIGUSR2, posix_ipc.USER_SIGNAL_MIN, posix_ipc.USER_SIGNAL_MAX])
@alone
def test_signal_arrives_once(q, number):
    assert q.request_notification(int(number)) is None
    assert sent_signal() is None
    fire(q)
    info = sent_signal()
    assert (info.si_signo, info.si_code, info.si_pid) == (number, SI_MESGQ, os.getpid())
    fire(q)
    assert sent_signal() is None


@alone
def test_signal_number_may_be_an_enum_member(q):
    q.request_notification(notification=SIGNAL)
    fire(q)
    assert sent_signal().si_signo == SIGNAL


def test_signal_reaches_a_python_handler(queue):
    q = queue()
    received = []
    previous = signal.signal(SIGNAL, lambda number, frame: received.append(number))
    try:
        q.request_notification(SIGNAL)
        fire(q)
        wait_until(lambda: received == [SIGNAL])
    finally:
        signal.signal(SIGNAL, previous)


@alone
def test_message_of_another_process_sends_the_signal(q):
    q.request_notification(SIGNAL)
    code = "import os, sys, posix_ipc\nposix_ipc.MessageQueue(sys.argv[1]).send(b'x')\nprint(os.getpid())"
    sender = int(run_python(code, q.name).stdout)
    assert sent_signal().si_pid == sender


@alone
def test_only_a_message_into_the_empty_queue_notifies(q):
    q.send(b"one")
    q.request_notification(SIGNAL)
    q.send(b"two")
    assert sent_signal() is None
    q.receive()
    q.receive()
    assert sent_signal() is None
    q.send(b"three")
    assert sent_signal().si_signo == SIGNAL


@pytest.mark.parametrize("options", [{"write": False}, {"read": False}], ids=("read only", "write only"))
@alone
def test_a_handle_of_either_direction_is_notified(q, options):
    other = posix_ipc.MessageQueue(q.name, **options)
    other.request_notification(SIGNAL)
    fire(q)
    assert sent_signal().si_signo == SIGNAL


# ---- by callback ----


@pytest.mark.parametrize("param", [None, 0, "text", (1, 2), object()], ids=lambda param: type(param).__name__)
def test_callback_gets_its_param_in_another_thread(queue, called, param):
    q = queue()
    assert q.request_notification((called, param)) is None
    fire(q)
    assert called.wait() == [(param,)]
    assert called.calls[0][0] is param
    assert called.threads[0] != threading.get_ident()


def test_callback_is_called_once(queue, called):
    q = queue()
    second = Recorder()
    q.request_notification((called, "first"))
    fire(q)
    called.wait()
    fire(q)
    q.request_notification((second, "second"))
    fire(q)
    second.wait()
    assert called.calls == [("first",)]
    assert second.calls == [("second",)]


@pytest.mark.parametrize(
    "wrap",
    [
        lambda called: called.__call__,
        lambda called: functools.partial(called),
        lambda called: lambda param: called(param),
        lambda called: type("Class", (), {"__init__": lambda self, param: called(param)}),
    ],
    ids=("bound method", "partial", "lambda", "class"),
)
def test_any_callable(queue, called, wrap):
    q = queue()
    q.request_notification((wrap(called), 5))
    fire(q)
    assert called.wait() == [(5,)]


def test_tuple_subclass(queue, called):
    q = queue()
    q.request_notification(type("Pair", (tuple,), {})((called, 5)))
    fire(q)
    assert called.wait() == [(5,)]


def test_callback_by_a_message_of_another_process(queue, called):
    q = queue()
    q.request_notification((called, None))
    run_python("import sys, posix_ipc\nposix_ipc.MessageQueue(sys.argv[1]).send(b'x')", q.name)
    called.wait()
    assert q.receive(0) == (b"x", 0)


def test_callback_arms_the_queue_again(queue):
    """The documented way to get every message: arm first, then empty the queue."""
    q = queue()
    received = []

    def drain(param):
        q.request_notification((drain, param))
        try:
            while True:
                received.append(q.receive(0)[0])
        except posix_ipc.BusyError:
            pass

    q.request_notification((drain, "param"))
    sent = [b"%d" % number for number in range(200)]
    for message in sent:
        q.send(message, 60)
    wait_until(lambda: len(received) == len(sent))
    q.request_notification(None)
    assert sorted(received) == sorted(sent)


def test_two_queues_notify_independently(queue):
    queues = [queue(), queue()]
    recorders = [Recorder(), Recorder()]
    for q, recorder in zip(queues, recorders, strict=True):
        q.request_notification((recorder, recorder))
    fire(queues[1])
    recorders[1].wait()
    assert recorders[0].calls == []
    fire(queues[0])
    recorders[0].wait()
    assert [len(recorder.calls) for recorder in recorders] == [1, 1]


@pytest.mark.parametrize("action", ["request_notification", "close", "unlink"])
def test_callback_may_do_anything_with_its_queue(queue, action):
    q = queue()
    done = []
    q.request_notification((lambda param: done.append(getattr(q, action)()), None))
    fire(q)
    wait_until(lambda: done == [None])


def test_callback_sees_the_thread_module_as_every_thread(queue, called):
    q = queue()
    local = threading.local()
    local.value = "main"
    seen = []
    q.request_notification((lambda param: seen.append((hasattr(local, "value"), threading.current_thread())), None))
    fire(q)
    wait_until(lambda: seen)
    assert seen[0][0] is False
    assert seen[0][1] is not threading.main_thread()


def test_callbacks_run_while_the_main_thread_waits(queue):
    """A callback that wakes a call which waits without the interpreter lock."""
    q, answers = queue(), queue()
    q.request_notification((lambda param: answers.send(q.receive(0)[0]), None))
    q.send(b"question")
    assert answers.receive(60) == (b"question", 0)


# ---- other handles that are closed: Linux forgets the notification ----


def test_callback_is_asked_for_again(queue, called):
    q = queue()
    q.request_notification((called, None))
    for _ in range(20):
        posix_ipc.MessageQueue(q.name).close()
    wait_until(lambda: not is_free(q))
    assert called.calls == []
    fire(q)
    called.wait()
    wait_until(lambda: is_free(q))
    assert len(called.calls) == 1


@pytest.mark.parametrize("before", ["empty", "a message, which was taken out"])
def test_message_that_arrived_while_nobody_was_registered_is_told(queue, called, before):
    q = queue()
    other = queue(q.name, flags=0)
    if before != "empty":
        q.send(b"before")
    q.request_notification((called, None))
    if before != "empty":
        q.receive(0)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(30)  # nothing else runs here before we wait
    try:
        other.close()
        q.send(b"into the empty queue")
    finally:
        sys.setswitchinterval(interval)
    called.wait()
    assert q.receive(0) == (b"into the empty queue", 0)
    assert is_free(q)
    assert len(called.calls) == 1


# ---- cancelling and replacing ----


@alone
def test_none_cancels_any_number_of_times(q):
    for cancel in (q.request_notification, lambda: q.request_notification(None)):
        assert cancel() is None
        assert cancel() is None
        q.request_notification(SIGNAL)
        assert cancel() is None
        assert cancel() is None
        fire(q)
        assert sent_signal() is None


def test_cancelled_callback_is_never_called(queue, called):
    q = queue()
    later = Recorder()
    for _ in range(20):
        q.request_notification((called, "cancelled"))
        q.request_notification(None)
    fire(q)
    q.request_notification((later, None))
    fire(q)
    later.wait()
    assert called.calls == []


REQUESTS = {
    "signal": lambda called: signal.SIGUSR2,
    "callback": lambda called: (called, "new"),
}


@pytest.mark.parametrize("new", REQUESTS)
@pytest.mark.parametrize("old", REQUESTS)
@pytest.mark.parametrize("through", ["the same handle", "another handle"])
@alone
def test_same_process_replaces_its_request(q, called, old, new, through):
    other = q if through == "the same handle" else posix_ipc.MessageQueue(q.name)
    replaced = Recorder()
    q.request_notification({"signal": SIGNAL, "callback": (replaced, "old")}[old])
    other.request_notification(REQUESTS[new](called))
    fire(q)
    if new == "signal":
        assert sent_signal().si_signo == signal.SIGUSR2
    else:
        assert called.wait() == [("new",)]
    assert sent_signal() is None
    assert replaced.calls == []


@pytest.mark.parametrize("request_of", REQUESTS)
@alone
def test_refused_request_leaves_the_one_before_alone(q, called, request_of):
    q.request_notification(REQUESTS[request_of](called))
    for bad, error in ((65, OSError), (0, OSError), ("x", ValueError), ((called,), ValueError), ((5, 5), ValueError)):
        with pytest.raises(error):
            q.request_notification(bad)
    fire(q)
    if request_of == "signal":
        assert sent_signal().si_signo == signal.SIGUSR2
    else:
        assert called.wait() == [("new",)]


def request_without_a_descriptor_left():
    q = posix_ipc.MessageQueue(None, posix_ipc.O_CREX, **SMALL_QUEUE)
    q.unlink()
    first, second = Recorder(), Recorder()
    q.request_notification((first, None))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.open("/", os.O_RDONLY)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, hard))
    with pytest.raises(OSError, match="RLIMIT_NOFILE") as caught:
        q.request_notification((second, None))
    assert caught.value.errno == errno.EMFILE
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    fire(q)
    first.wait()
    q.request_notification((second, None))
    fire(q)
    second.wait()
    assert (len(first.calls), len(second.calls)) == (1, 1)


def test_request_without_a_descriptor_left_leaves_the_one_before_alone():
    run_forked(request_without_a_descriptor_left)


_MQ_NOTIFY = 244 if platform.machine() == "x86_64" else 184


def request_that_the_kernel_refuses(new):
    q = posix_ipc.MessageQueue(None, posix_ipc.O_CREX, **SMALL_QUEUE)
    q.unlink()
    called = Recorder()
    q.request_notification((called, "old"))
    before = threads()
    forbid(_MQ_NOTIFY, errno.ENOMEM, argument=1)  # NULL cancels
    with pytest.raises(OSError, match="mq_notify") as caught:
        q.request_notification(REQUESTS[new](Recorder()))
    assert caught.value.errno == errno.ENOMEM
    wait_until(lambda: threads() == before)
    assert called.calls == []
    wait_until(lambda: "NOTIFY:2 " in os.pread(q.mqd, 200, 0).decode())
    fire(q)
    assert called.wait() == [("old",)]


@pytest.mark.slow
@pytest.mark.parametrize("new", REQUESTS)
def test_request_that_the_kernel_refuses_leaves_the_callback_before_alone(new):
    run_function(request_that_the_kernel_refuses, new)


@pytest.mark.parametrize("number", [0, -1, 65, 1000, 2**31 - 1])
def test_invalid_signal(queue, number):
    q = queue()
    with pytest.raises(OSError, match="mq_notify") as caught:
        q.request_notification(number)
    assert (caught.value.errno, caught.value.filename) == (errno.EINVAL, q.name)
    assert is_free(q)


# ---- other processes ----


@pytest.mark.parametrize("request_of", REQUESTS)
def test_queue_is_taken_and_given_back(queue, called, request_of):
    q = queue()
    assert is_free(q)
    q.request_notification(REQUESTS[request_of](called))
    assert not is_free(q)
    q.request_notification(None)
    assert is_free(q)


@pytest.mark.parametrize("request_of", ["10", "(print, None)"], ids=("signal", "callback"))
def test_queue_taken_by_another_process_until_it_ends(queue, called, request_of):
    q = queue()
    code = (
        "import sys, posix_ipc\n"
        f"posix_ipc.MessageQueue(sys.argv[1]).request_notification({request_of})\n"
        "print('ready', flush=True)\n"
        "sys.stdin.readline()\n"
    )
    with start_python(code, q.name) as child:
        wait_until_ready(child)
        for request in (SIGNAL, (called, None)):
            with pytest.raises(posix_ipc.BusyError) as caught:
                q.request_notification(request)
            assert (caught.value.errno, caught.value.name) == (errno.EBUSY, q.name)
        q.request_notification(None)  # cancels nothing of the other's
        with pytest.raises(posix_ipc.BusyError):
            q.request_notification(SIGNAL)
        finish(child)
    q.request_notification((called, None))
    fire(q)
    called.wait()


def test_firing_gives_the_queue_back(queue, called):
    q = queue()
    q.request_notification((called, None))
    fire(q)
    called.wait()
    assert is_free(q)


class Forks:
    """Garbage in a cycle, whose finalizer forks. In the child it asks again of the same queue, and then goes on."""

    def __init__(self, q):
        self.q, self.cycle = q, self

    def __del__(self):
        Forks.child = os.fork()
        if Forks.child == 0:
            self.q.request_notification(None)


def fork_while_a_refusal_is_told():
    q = posix_ipc.MessageQueue(None, posix_ipc.O_CREX, **SMALL_QUEUE)
    q.unlink()
    reader, writer = os.pipe()
    holder = os.fork()
    if holder == 0:
        q.request_notification(SIGNAL)
        os.write(writer, b"x")
        signal.pause()
    os.read(reader, 1)
    number = q.mqd
    Forks.child = None
    gc.collect()
    gc.disable()
    Forks(q)
    gc.set_threshold(1)
    gc.enable()
    try:  # noqa: SIM105 (contextlib.suppress would make objects of its own, and collect too early)
        q.request_notification(10)
    except posix_ipc.BusyError:
        pass
    gc.collect()
    if Forks.child != 0:
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)
    q.close()
    closed = number not in open_fds()
    if Forks.child == 0:
        os._exit(0 if closed else 5)
    assert closed
    assert os.waitstatus_to_exitcode(os.waitpid(Forks.child, 0)[1]) == 0


@pytest.mark.slow
def test_fork_in_a_finalizer_while_a_refusal_is_told():
    """An exception is made, garbage is collected, a finalizer forks: the queue can be closed in both processes."""
    run_function(fork_while_a_refusal_is_told)


# ---- errors in callbacks ----


@pytest.fixture
def unraisable(monkeypatch):
    reports = []
    monkeypatch.setattr(sys, "unraisablehook", lambda report: reports.append((report.exc_type, str(report.exc_value))))
    return reports


def test_exception_in_a_callback_goes_to_the_unraisable_hook(queue, called, unraisable):
    q = queue()

    def fail(param):
        raise LookupError(f"of {param}")

    q.request_notification((fail, "a callback"))
    fire(q)
    wait_until(lambda: unraisable == [(LookupError, "of a callback")])
    q.request_notification((called, None))
    fire(q)
    called.wait()
    assert len(unraisable) == 1


def test_callback_with_the_wrong_signature(queue, unraisable):
    q = queue()
    q.request_notification((lambda: None, "param"))
    fire(q)
    wait_until(lambda: [type for type, _ in unraisable] == [TypeError])


def test_report_of_an_exception_names_the_callback():
    """Without a hook of its own a program reads it on stderr."""
    child = run_python(
        "import time, posix_ipc, threading\n"
        "q = posix_ipc.MessageQueue(None, posix_ipc.O_CREX, max_messages=2, max_message_size=64)\n"
        "q.unlink()\n"
        "done = threading.Event()\n"
        "def failing_callback(param):\n"
        "    try: raise LookupError('reason')\n"
        "    finally: done.set()\n"
        "q.request_notification((failing_callback, None))\n"
        "q.send(b'x')\n"
        "done.wait(30)\n"
        "import os, sys\n"
        "while len(os.listdir('/proc/self/task')) > 1: time.sleep(0.001)\n"
    )
    assert "failing_callback" in child.stderr
    assert "LookupError: reason" in child.stderr


# ---- what an armed queue holds, and gives back ----


class WeakQueue(posix_ipc.MessageQueue):
    """Subclasses can be referred to weakly."""


def collected(reference):
    gc.collect()
    return reference() is None


def test_armed_queue_is_kept_alive_until_it_fires(queue, called):
    peer = queue()
    armed = WeakQueue(peer.name)
    descriptor, reference = armed.mqd, weakref.ref(armed)
    armed.request_notification((called, "param"))
    del armed
    assert not collected(reference)
    fire(peer)
    assert called.wait() == [("param",)]
    wait_until(lambda: collected(reference))
    os.close(descriptor)


@pytest.mark.parametrize(
    "disarm",
    [
        lambda q: fire(q),
        lambda q: q.request_notification(None),
        lambda q: q.request_notification(SIGNAL),
        lambda q: q.close(),
    ],
    ids=("fired", "cancelled", "replaced", "closed"),
)
def test_queue_and_callback_are_let_go(queue, disarm):
    q = queue(type=WeakQueue)
    recorder, param = Recorder(), Recorder()
    references = [weakref.ref(recorder), weakref.ref(param)]
    q.request_notification((recorder, param))
    del recorder, param
    assert not any(map(collected, references))
    disarm(q)
    wait_until(lambda: all(map(collected, references)))


def test_close_while_armed(queue, called):
    q = queue()
    peer = queue(q.name, flags=0)
    q.request_notification((called, None))
    assert not is_free(peer)
    q.close()
    assert is_free(peer)
    fire(peer)
    later = Recorder()
    peer.request_notification((later, None))
    fire(peer)
    later.wait()
    assert called.calls == []


def test_unlink_while_armed(queue, called):
    q = queue()
    q.request_notification((called, None))
    q.unlink()
    fire(q)
    called.wait()


@pytest.mark.parametrize("end", ["fire", "cancel", "replace", "close"])
def test_no_thread_and_no_descriptor_stays(queue, end):
    q = queue()
    recorder = Recorder()

    def cycle():
        handle = posix_ipc.MessageQueue(q.name) if end == "close" else q
        handle.request_notification((recorder, None))
        if end == "fire":
            expected = len(recorder.calls) + 1
            fire(q)
            recorder.wait(expected)
        elif end == "cancel":
            q.request_notification(None)
        elif end == "close":
            handle.close()

    cycle()  # what stays after one, a helper thread for all of them say, may stay
    before = len(threads()), len(open_fds())
    for _ in range(50):
        cycle()
    q.request_notification(None)
    wait_until(lambda: len(threads()) <= before[0] and len(open_fds()) <= before[1])


# ---- the end of the interpreter ----


@pytest.mark.parametrize("moment", ["armed", "running", "fired"])
def test_interpreter_ends_in_time_and_quietly(moment):
    code = (
        "import sys, threading, posix_ipc\n"
        "q = posix_ipc.MessageQueue(None, posix_ipc.O_CREX, max_messages=2, max_message_size=64)\n"
        "q.unlink()\n"
        "entered, never = threading.Event(), threading.Event()\n"
        "def callback(param):\n"
        "    entered.set()\n"
        "    if sys.argv[1] == 'running': never.wait()\n"
        "q.request_notification((callback, None))\n"
        "if sys.argv[1] != 'armed':\n"
        "    q.send(b'x')\n"
        "    entered.wait(30)\n"
    )
    child = run_python(code, moment)
    assert (child.stdout, child.stderr) == ("", "")


IN_A_CHILD = pytest.param(
    "in a forked child",
    marks=pytest.mark.skipif(sys.version_info[:2] == (3, 12), reason="it does not fork at its end"),
)


@pytest.mark.parametrize("where", ["here", IN_A_CHILD])
def test_nothing_is_armed_after_the_end_of_notifications(where):
    """Nor in a child, which begins without the callbacks of its parent, but not anew."""
    child = run_python(
        "import atexit, os, sys\n"
        "def arm():\n"
        "    if sys.argv[1] != 'here' and os.fork() != 0:\n"
        "        os.wait()\n"
        "        return\n"
        "    q = posix_ipc.MessageQueue(None, posix_ipc.O_CREX, max_messages=2, max_message_size=64)\n"
        "    q.unlink()\n"
        "    try: q.request_notification((print, 'called'))\n"
        "    except posix_ipc.Error as error: print(str(error).partition(': ')[2])\n"
        "    q.close()\n"
        "atexit.register(arm)\n"  # before the import, so it is called after what that registers
        "import posix_ipc\n",
        where,
    )
    assert (child.stdout, child.stderr) == ("the interpreter is ending, no callback can run\n", "")
