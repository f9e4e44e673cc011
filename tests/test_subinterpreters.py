"""Several interpreters in one process: each has its own module, types and exceptions, and they share the objects.

Each scenario is a function that runs in a process of its own, for the interpreters are in the hands of modules that are
young or private, and a fault is a crash. What runs inside an interpreter is text.
"""

import gc
import pickle
import sys
import textwrap
import threading

import pytest
import support
from support import KINDS, MESSAGE_QUEUE, SEMAPHORE, open_fds, wait_until

import posix_ipc

if sys.version_info >= (3, 14):
    import concurrent.interpreters
if sys.version_info >= (3, 13):
    import _interpreters
else:
    import _xxsubinterpreters as _interpreters

HAVE_OWN_LOCKS = sys.version_info >= (3, 12)

# An interpreter has the memory of one thread state ready. In these versions a thread that ends gives it back before it
# is cleaned, and one that begins just then takes it as it is: "init_threadstate: thread state already initialized".
CAN_END_AS_OTHERS_BEGIN = not (3, 12) <= sys.version_info < (3, 14)


class Interpreter:
    """A new interpreter, with an interpreter lock of its own or sharing the main one's; the same on all versions."""

    def __init__(self, own_lock):
        self._public = None
        if own_lock and sys.version_info >= (3, 14):
            self._public = concurrent.interpreters.create()
        elif sys.version_info >= (3, 13):
            self._id = _interpreters.create("isolated" if own_lock else "legacy")
        else:
            self._id = _interpreters.create(isolated=own_lock)

    def run(self, code, **values):
        """Run a program text, in which each {name} is replaced by the repr of the value; an exception comes up here."""
        code = textwrap.dedent(code)
        for name, value in values.items():
            code = code.replace(f"{{{name}}}", repr(value))
        if self._public is not None:
            self._public.exec(code)
        elif sys.version_info >= (3, 13):
            failure = _interpreters.run_string(self._id, code)
            if failure is not None:
                raise AssertionError(getattr(failure, "errdisplay", None) or failure)
        else:
            self._once_alone(_interpreters.run_string, code)

    def destroy(self):
        if self._public is not None:
            self._public.close()
        elif sys.version_info >= (3, 13):
            _interpreters.destroy(self._id)
        else:
            self._once_alone(_interpreters.destroy)

    def _once_alone(self, function, *args):
        """Before Python 3.12 both are refused while a callback has not quite left."""

        def attempt():
            try:
                function(self._id, *args)
            except RuntimeError as error:
                if str(error) != "interpreter has more than one thread":
                    raise
                return False
            return True

        wait_until(attempt)


@pytest.fixture(
    params=[
        pytest.param(False, id="shared lock"),
        pytest.param(True, id="own lock", marks=pytest.mark.skipif(not HAVE_OWN_LOCKS, reason="new in Python 3.12")),
    ]
)
def own_lock(request):
    return request.param


def in_thread(function, *args):
    """Start the function in a thread; return a function that waits for it and raises what it raised."""
    errors = []

    def run():
        try:
            function(*args)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()

    def finish():
        thread.join(40)
        assert not thread.is_alive()
        if errors:
            raise errors[0]

    return finish


# ---- one other interpreter ----

USE = """
    import gc, os, pickle
    import posix_ipc

    semaphore, segment, queue = (
        type(name) for type, name in zip([posix_ipc.Semaphore, posix_ipc.SharedMemory, posix_ipc.MessageQueue], {names})
    )
    semaphore.release()
    os.pwrite(segment.fd, b"from elsewhere", 0)
    queue.send(b"from elsewhere", 0, 5)

    loaded = pickle.loads({pickled})
    assert [type(handle) for handle in loaded] == [posix_ipc.Semaphore, posix_ipc.SharedMemory, posix_ipc.MessageQueue]
    loaded[0].release()
    assert os.pread(loaded[1].fd, 4, 0) == b"from"
    assert loaded[2].current_messages == 1
    assert [handle.name for handle in loaded] == list({names})

    class Job(posix_ipc.Semaphore):
        pass

    job = Job({names}[0])
    assert job.value == 2

    for call, error in [
        (lambda: semaphore.acquire(-1), TypeError),
        (lambda: posix_ipc.Semaphore("/no such"), posix_ipc.ExistentialError),
        (lambda: posix_ipc.Semaphore(semaphore.name, posix_ipc.O_CREX), posix_ipc.ExistentialError),
        (lambda: posix_ipc.SharedMemory("/no such"), posix_ipc.ExistentialError),
        (lambda: queue.send(b"x" * 65), ValueError),
        (lambda: posix_ipc.unlink_message_queue("/no such"), posix_ipc.ExistentialError),
    ]:
        try:
            call()
        except error:
            pass
        else:
            raise AssertionError(call)
    {ending}
"""

ENDINGS = {
    # Both of a constructor's descriptors are closed by nobody else.
    "closed": "semaphore.close(); segment.close_fd(); queue.close(); job.close(); del loaded",
    "left to the end": "os.close(segment.fd); os.close(queue.mqd)",
    "in a cycle": """
    os.close(segment.fd); os.close(queue.mqd)
    Job.all = [Job, job, loaded]
    loaded.append(loaded)
    """,
    "used by a finalizer": """
    os.close(segment.fd); os.close(queue.mqd)

    class Last:
        def __del__(self, semaphore=semaphore, segment=segment, error=posix_ipc.ExistentialError):
            # The module may be gone: whatever is raised, nothing crashes.
            semaphore.acquire(0)
            semaphore.release()
            repr(semaphore) + repr(segment)
            try:
                segment.size
            except error:
                semaphore.release()  # seen outside

    last = Last()
    """,
}


def use_in_another(own_lock, ending, *names):
    handles = [kind.create(name) for kind, name in zip(KINDS, names, strict=True)]
    semaphore, segment, queue = handles
    try:
        before = open_fds()
        interpreter = Interpreter(own_lock)
        program = USE.replace("    {ending}", textwrap.indent(textwrap.dedent(ENDINGS[ending]).strip(), "    "))
        interpreter.run(program, names=names, pickled=pickle.dumps(handles))
        interpreter.destroy()
        gc.collect()
        assert open_fds() == before
        assert semaphore.value == (3 if ending == "used by a finalizer" else 2)
        assert segment.size == 64
        assert queue.receive(0) == (b"from elsewhere", 5)
        assert [type(handle) for handle in pickle.loads(pickle.dumps(handles))] == [kind.type for kind in KINDS]
    finally:
        for kind, name in zip(KINDS, names, strict=True):
            kind.remove(name)


@pytest.mark.parametrize("ending", ENDINGS)
def test_another_interpreter_uses_the_same_objects(own_lock, ending, names):
    support.run_function(use_in_another, own_lock, ending, names(), names(), names())


def have_own_types(own_lock):
    interpreter = Interpreter(own_lock)
    here = [id(getattr(posix_ipc, name)) for name in ("Semaphore", "Error", "unlink_semaphore")]
    interpreter.run(
        """
        import posix_ipc
        assert not {id(getattr(posix_ipc, name)) for name in ("Semaphore", "Error", "unlink_semaphore")} & set({here})
        assert issubclass(posix_ipc.BusyError, posix_ipc.Error)
        """,
        here=here,
    )
    interpreter.destroy()
    assert posix_ipc.Semaphore.__module__ == "posix_ipc"


def test_types_and_exceptions_are_those_of_the_interpreter(own_lock):
    support.run_function(have_own_types, own_lock)


def come_and_go(own_lock):
    """Interpreters that import the module and end leave no descriptor and no thread."""

    def once():
        interpreter = Interpreter(own_lock)
        interpreter.run("import posix_ipc; posix_ipc.SEMAPHORE_VALUE_MAX")
        interpreter.destroy()

    once()
    before = open_fds(), support.threads()
    for _ in range(8):
        once()
    assert (open_fds(), support.threads()) == before


@pytest.mark.slow
def test_interpreters_come_and_go(own_lock):
    support.run_function(come_and_go, own_lock)


# ---- several at once ----

WORK = """
    import contextlib, copy, os, pickle
    import posix_ipc

    shared = posix_ipc.Semaphore({shared})
    for number in range(60):
        semaphore = posix_ipc.Semaphore({own}, posix_ipc.O_CREX, initial_value=number)
        assert pickle.loads(pickle.dumps(semaphore)).value == number
        semaphore.close()
        semaphore.unlink()
        segment = posix_ipc.SharedMemory({own}, posix_ipc.O_CREX, size=number + 1)
        assert copy.copy(segment).size == number + 1
        segment.close_fd()
        segment.unlink()
        queue = posix_ipc.MessageQueue({own}, posix_ipc.O_CREX, max_messages=1, max_message_size=8)
        queue.send(b"%d" % number)
        assert pickle.loads(pickle.dumps(queue)).receive() == (b"%d" % number, 0)
        queue.close()
        queue.unlink()
        for call in (semaphore.release, queue.receive, queue.unlink, segment.unlink):
            try:
                call()
            except posix_ipc.ExistentialError as error:
                assert error.name == {own}
        with contextlib.suppress(posix_ipc.BusyError):
            shared.acquire(0.0001)
            shared.release()
    shared.release()
"""


def work_in_parallel(own_lock, shared, *own_names):
    sys.setswitchinterval(1e-5)
    semaphore = SEMAPHORE.create(shared)

    def work(own):
        interpreter = Interpreter(own_lock)
        interpreter.run(WORK, shared=shared, own=own)
        interpreter.destroy()

    try:
        before = open_fds()
        for finish in [in_thread(work, own) for own in own_names]:
            finish()
        assert semaphore.value == len(own_names)
        assert open_fds() == before
    finally:
        SEMAPHORE.remove(shared)


@pytest.mark.slow
def test_several_interpreters_work_in_parallel(own_lock, names):
    support.run_function(work_in_parallel, own_lock, *(names() for _ in range(5)))


def wait_for_each_other(own_lock, semaphore_name, queue_name):
    """A call that waits in one interpreter keeps no other from running."""
    semaphore, queue = SEMAPHORE.create(semaphore_name), MESSAGE_QUEUE.create(queue_name)
    interpreter = Interpreter(own_lock)
    try:
        finish = in_thread(
            lambda: interpreter.run(
                """
                import posix_ipc
                queue = posix_ipc.MessageQueue({queue_name})
                posix_ipc.Semaphore({semaphore_name}).acquire()
                queue.send(b"acquired")
                queue.close()
                """,
                semaphore_name=semaphore_name,
                queue_name=queue_name,
            )
        )
        wait_until(lambda: support.semaphore_waiters(semaphore_name) == 1)
        semaphore.release()
        assert queue.receive(30) == (b"acquired", 0)
        finish()
        interpreter.destroy()
    finally:
        SEMAPHORE.remove(semaphore_name)
        MESSAGE_QUEUE.remove(queue_name)


def test_interpreters_wait_for_each_other(own_lock, names):
    support.run_function(wait_for_each_other, own_lock, names(), names())


# ---- notifications ----

ARM = """
    import posix_ipc
    queue = posix_ipc.MessageQueue({queue})
    heard = posix_ipc.Semaphore({heard})
    go_on = posix_ipc.Semaphore({go_on})
    where = "in this interpreter"

    def callback(message):
        assert where == "in this interpreter" and message == ["as it was given"]
        heard.release()
        go_on.acquire(30)

    queue.request_notification((callback, ["as it was given"]))
"""


class Notified:
    """An interpreter that has armed a callback, and the objects by which to follow it."""

    def __init__(self, own_lock, queue, heard, go_on):
        self.names = {"queue": queue, "heard": heard, "go_on": go_on}
        self.queue = MESSAGE_QUEUE.create(queue)
        self.heard, self.go_on = SEMAPHORE.create(heard), SEMAPHORE.create(go_on)
        self.threads = support.threads()
        self.interpreter = Interpreter(own_lock)
        self.interpreter.run(ARM, **self.names)

    def remove(self):
        MESSAGE_QUEUE.remove(self.names["queue"])
        SEMAPHORE.remove(self.names["heard"])
        SEMAPHORE.remove(self.names["go_on"])


def destroy_an_armed_interpreter(own_lock, *names):
    """A message after its end calls nothing, and this interpreter may arm in its place."""
    armed = Notified(own_lock, *names)
    try:
        armed.interpreter.destroy()
        armed.queue.send(b"too late")
        assert armed.queue.receive(0) == (b"too late", 0)
        called = threading.Event()
        armed.queue.request_notification((lambda event: event.set(), called))
        armed.queue.send(b"for this one")
        assert called.wait(30)
        assert armed.heard.value == 0
        wait_until(lambda: support.threads() == armed.threads)
    finally:
        armed.remove()


def destroy_in_the_callback(own_lock, *names):
    """The end of an interpreter waits for its callback that runs."""
    armed = Notified(own_lock, *names)
    try:
        armed.queue.send(b"now")
        armed.heard.acquire(30)
        finish = in_thread(armed.interpreter.destroy)
        wait_until(lambda: support.semaphore_waiters(armed.names["go_on"]) == 1)
        armed.go_on.release()
        finish()
        wait_until(lambda: support.threads() == armed.threads)
    finally:
        armed.remove()


def call_in_the_interpreter_that_armed(own_lock, *names):
    """Not in the one whose code happens to run when the message comes."""
    armed = Notified(own_lock, *names)
    try:
        for _ in range(3):
            armed.queue.send(b"now")
            armed.heard.acquire(30)
            armed.go_on.release()
            assert armed.queue.receive(0) == (b"now", 0)
            wait_until(lambda: support.threads() == armed.threads)  # see CAN_END_AS_OTHERS_BEGIN
            armed.interpreter.run("queue.request_notification((callback, ['as it was given']))")
        armed.interpreter.run("queue.request_notification(None)")
        armed.interpreter.destroy()
        assert armed.heard.value == 0
        wait_until(lambda: support.threads() == armed.threads)
    finally:
        armed.remove()


def end_without_destroying(own_lock, state, *names):
    """The process ends with the interpreter in it, but not with one in which a thread still runs: CPython cannot."""
    armed = Notified(own_lock, *names)
    armed.remove()  # the names alone
    if state == "called":
        armed.queue.send(b"now")
        armed.heard.acquire(30)
        armed.go_on.release()
        wait_until(lambda: support.threads() == armed.threads)


def arm_when_it_is_too_late(own_lock, queue_name):
    """What is called at exit after this package's own end arms nothing: a message would call into freed memory."""
    queue = MESSAGE_QUEUE.create(queue_name)
    try:
        before = support.threads()
        interpreter = Interpreter(own_lock)
        interpreter.run(
            """
            import atexit

            def arm():
                queue = posix_ipc.MessageQueue({queue_name})
                try:
                    queue.request_notification((print, "from the dead"))
                except posix_ipc.Error as error:
                    queue.send(str(error).partition(": ")[2])
                queue.close()

            atexit.register(arm)  # before the import, so it is called after what that registers
            import posix_ipc
            """,
            queue_name=queue_name,
        )
        interpreter.destroy()
        assert queue.receive(0)[0] == b"the interpreter is ending, no callback can run"
        queue.send(b"too late")
        wait_until(lambda: support.threads() == before)
    finally:
        MESSAGE_QUEUE.remove(queue_name)


def races_of_message_and_end(own_lock, *names):
    """The message comes at about the time of the interpreter's end: it calls or it does not, and nothing crashes."""
    for number in range(12):
        armed = Notified(own_lock, *names)
        try:
            armed.go_on.release()
            finish = in_thread(armed.queue.send, b"now")
            if number % 3:
                armed.queue.receive(30)
            armed.interpreter.destroy()
            finish()
            wait_until(lambda armed=armed: support.threads() == armed.threads)
            assert armed.heard.value in (0, 1)
        finally:
            armed.remove()
            armed.queue.close()


@pytest.mark.parametrize(
    "scenario", [destroy_an_armed_interpreter, destroy_in_the_callback, call_in_the_interpreter_that_armed]
)
def test_callback_of_another_interpreter(scenario, own_lock, names):
    support.run_function(scenario, own_lock, names(), names(), names())


def test_nothing_is_armed_after_the_end_of_notifications(own_lock, names):
    support.run_function(arm_when_it_is_too_late, own_lock, names())


@pytest.mark.slow
@pytest.mark.parametrize("state", ["armed", "called"])
def test_process_ends_with_the_interpreter_in_it(own_lock, state, names):
    support.run_function(end_without_destroying, own_lock, state, names(), names(), names(), timeout=30)


@pytest.mark.slow
@pytest.mark.skipif(not CAN_END_AS_OTHERS_BEGIN, reason="Python's own fatal error")
def test_message_races_with_the_end_of_the_interpreter(own_lock, names):
    support.run_function(races_of_message_and_end, own_lock, names(), names(), names())
