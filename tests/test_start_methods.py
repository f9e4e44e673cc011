"""Handles reach other processes: as arguments under each start method, through queues, pipes and pools, and by fork."""

import concurrent.futures
import contextlib
import multiprocessing
import os
import pickle
import sys
import sysconfig
import threading

import pytest
import support
from support import BLOCKING_CALLS, KINDS, MESSAGE_QUEUE, SEMAPHORE, SMALL_QUEUE, Waiter

import posix_ipc
from posix_ipc import BusyError, ExistentialError, MessageQueue, Semaphore, SharedMemory

TIMEOUT = 60


class Job(Semaphore):
    """A subclass as programs write them: a signature of its own, and attributes."""

    def __init__(self, number, name):
        super().__init__(name, posix_ipc.O_CREX, initial_value=number)
        self.number = number


class Picture(SharedMemory):
    __slots__ = ("shape",)

    def __init__(self, name, width, height):
        super().__init__(name, posix_ipc.O_CREX, size=width * height)
        self.shape = width, height


class Mailbox(MessageQueue):
    def __init__(self, *, owner, name):
        super().__init__(name, posix_ipc.O_CREX, **SMALL_QUEUE)
        self.owner = owner


@pytest.fixture
def handles(names):
    """Return one handle of each type and of a subclass of each."""
    made = [kind.create(names()) for kind in KINDS]
    made += [Job(3, names()), Picture(names(), 8, 4), Mailbox(owner="somebody", name=names())]
    yield made
    for handle in made:
        handle.close_fd() if isinstance(handle, SharedMemory) else handle.close()
        handle.unlink()


def leave_traces(handles):
    """In another process: use every handle, and tell what it is."""
    facts = []
    for handle in handles:
        if isinstance(handle, Semaphore):
            handle.release()
        elif isinstance(handle, SharedMemory):
            os.pwrite(handle.fd, b"a trace", 0)
        else:
            handle.send(b"a trace", TIMEOUT)
        attributes = {name: getattr(handle, name, None) for name in ("number", "shape", "owner")}
        facts.append((type(handle).__name__, handle.name, handle.mode, attributes))
    return facts


EXPECTED = [
    ("Semaphore", {}),
    ("SharedMemory", {}),
    ("MessageQueue", {}),
    ("Job", {"number": 3}),
    ("Picture", {"shape": (8, 4)}),
    ("Mailbox", {"owner": "somebody"}),
]


def assert_traces(handles, facts):
    """Both sides had the same objects in their hands."""
    nothing = {"number": None, "shape": None, "owner": None}
    assert facts == [
        (type_name, handle.name, 0o600, {**nothing, **attributes})
        for handle, (type_name, attributes) in zip(handles, EXPECTED, strict=True)
    ]
    for handle in handles:
        if isinstance(handle, Semaphore):
            assert handle.value == (4 if isinstance(handle, Job) else 1)
        elif isinstance(handle, SharedMemory):
            assert os.pread(handle.fd, 7, 0) == b"a trace"
        else:
            assert handle.receive(0) == (b"a trace", 0)


# ---- ways to another process ----


def answer(connection, handles):
    connection.send(leave_traces(handles))
    connection.close()


def answer_what_comes(connection, source):
    """`source` is a Queue or a Connection: what comes out of it was unpickled here."""
    answer(connection, source.get(timeout=TIMEOUT) if hasattr(source, "get") else source.recv())


@contextlib.contextmanager
def process(context, target, *args):
    """Start a process; the block gets a function that waits for the answer and for the process to end well."""
    receiving, sending = context.Pipe(duplex=False)
    child = context.Process(target=target, args=(sending, *args))
    child.start()
    sending.close()

    def result():
        assert receiving.poll(TIMEOUT), "no answer"
        facts = receiving.recv()
        child.join(TIMEOUT)
        assert child.exitcode == 0
        return facts

    try:
        yield result
    finally:
        receiving.close()
        child.kill()
        child.join()
        child.close()


def by_process_arguments(context, handles):
    with process(context, answer, handles) as result:
        return result()


def by_queue(context, handles):
    queue = context.Queue()
    try:
        with process(context, answer_what_comes, queue) as result:
            queue.put(handles)
            return result()
    finally:
        queue.close()
        queue.join_thread()


def by_pipe(context, handles):
    reading, writing = context.Pipe(duplex=False)
    with reading, writing, process(context, answer_what_comes, reading) as result:
        writing.send(handles)
        return result()


def by_pool_argument(context, handles):
    with context.Pool(1) as pool:
        facts = pool.apply_async(leave_traces, [handles]).get(TIMEOUT)
        pool.close()
        pool.join()
    return facts


initial_handles = None


def keep(handles):
    global initial_handles
    initial_handles = handles


def leave_traces_on_initial_handles():
    return leave_traces(initial_handles)


def by_pool_initializer(context, handles):
    with context.Pool(1, keep, [handles]) as pool:
        facts = pool.apply_async(leave_traces_on_initial_handles).get(TIMEOUT)
        pool.close()
        pool.join()
    return facts


def by_executor(context, handles):
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as executor:
        return executor.submit(leave_traces, handles).result(TIMEOUT)


WAYS = [by_process_arguments, by_queue, by_pipe, by_pool_argument, by_pool_initializer, by_executor]


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_handles_reach_another_process(method, way, handles):
    before = set(support.open_fds())
    assert_traces(handles, way(multiprocessing.get_context(method), handles))
    new = {fd: target for fd, target in support.open_fds().items() if fd not in before}
    assert not [target for target in new.values() if any(handle.name in target for handle in handles)]


@pytest.mark.slow
def test_handles_reach_a_loky_worker(handles):
    loky = pytest.importorskip("loky")
    executor = loky.ProcessPoolExecutor(1, timeout=TIMEOUT)
    try:
        assert_traces(handles, executor.submit(leave_traces, handles).result(TIMEOUT))
    finally:
        executor.shutdown(kill_workers=True)


def give_back(handles):
    """The worker's own pickling, of handles that came by pickle themselves."""
    return handles


@pytest.mark.slow
def test_handles_come_back_from_a_worker(handles):
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as executor:
        returned = executor.submit(give_back, handles).result(TIMEOUT)
    assert_traces(handles, leave_traces(returned))
    assert not any(new is old for new, old in zip(returned, handles, strict=True))


def try_to_load(connection, pickled):
    try:
        pickle.loads(pickled)
    except ExistentialError as error:
        connection.send((type(error).__module__, type(error).__name__, error.errno, error.name, str(error)))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_error_in_another_process_is_the_same(method, kind, make):
    """A name that is gone: the process says so, and creates nothing."""
    handle = make()
    pickled = pickle.dumps(handle)
    handle.unlink()
    with process(multiprocessing.get_context(method), try_to_load, pickled) as result:
        module, type_name, number, name, text = result()
    assert (module, type_name, name) == ("posix_ipc", "ExistentialError", handle.name)
    assert "is gone" in text
    assert number is not None
    assert not kind.exists(handle.name)


# ---- fork, with nothing but os.fork ----


def fork(function):
    """Run the function in a forked child; return its exit status, which tells of an exception and of a crash."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            function()
            status = 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(status)
    return os.waitpid(pid, 0)[1]


def fork_beside_a_waiter(call_name, name):
    """The child has the handle but not the thread that waits on it in the parent: its close really closes."""
    call = BLOCKING_CALLS[call_name]
    handle = call.kind.create(name)
    try:
        call.prepare(handle)
        waiter = Waiter(call.call, handle)
        descriptor = getattr(handle, "mqd", None)
        if descriptor is None:
            inode = os.stat(SEMAPHORE.file_of(name)).st_ino

        def use():
            if descriptor is None:
                with pytest.raises(BusyError):
                    handle.acquire(0.001)  # a wait of its own, in the same count of users
            else:
                assert handle.current_messages == (0 if call_name.startswith("receive") else 2)

        def close():
            if descriptor is None:
                assert len(support.mappings(inode)) == 1
                handle.close()
                assert not support.mappings(inode)
            else:
                assert name in support.open_fds()[descriptor]
                handle.close()
                assert descriptor not in support.open_fds()
            with pytest.raises(ExistentialError):
                handle.close()

        def use_and_close():
            use()
            close()

        assert fork(close) == 0
        assert fork(use_and_close) == 0
        assert support.is_blocked(waiter)
        call.unblock(handle)
        assert waiter.outcome() is None
        handle.close()
        assert not [target for target in support.open_fds().values() if name in target]
    finally:
        call.kind.remove(name)


@pytest.mark.slow
@pytest.mark.parametrize("call_name", BLOCKING_CALLS)
def test_fork_while_a_thread_waits(call_name, name):
    support.run_function(fork_beside_a_waiter, call_name, name)


def fork_closed_beside_a_waiter(name):
    """Closed in the parent under its waiter: the child inherits a descriptor that nobody can reach, and no crash."""
    call = BLOCKING_CALLS["receive()"]
    handle, peer = MESSAGE_QUEUE.create(name), MessageQueue(name)
    try:
        waiter = Waiter(call.call, handle)
        handle.close()

        def child():
            with pytest.raises(ExistentialError):
                handle.receive(0)
            handle.__init__(name)
            handle.send(b"from the child")
            handle.close()

        assert fork(child) == 0
        assert waiter.outcome() is None
        assert waiter.result == (b"from the child", 0)
        assert [name in target for target in support.open_fds().values()].count(True) == 1  # the peer's
    finally:
        peer.unlink()


def test_fork_while_a_thread_waits_on_a_closed_handle(name):
    support.run_function(fork_closed_beside_a_waiter, name)


def test_fork_while_holding_a_permit(semaphore):
    """The permit is not there twice, and the child's end does not give it back."""
    handle = semaphore(initial_value=1)

    def child():
        assert handle.value == 0
        with pytest.raises(BusyError):
            handle.acquire(0)

    with handle:
        assert fork(child) == 0
        assert handle.value == 0
    assert handle.value == 1


def test_fork_passes_a_permit_on(semaphore):
    """A child may give back what its parent took, and take what it gives."""
    handle = semaphore(initial_value=1)
    handle.acquire()
    assert fork(handle.release) == 0
    handle.acquire(0)
    ready, go = os.pipe()

    def child():
        os.read(ready, 1)
        handle.acquire(TIMEOUT)

    releaser = threading.Thread(target=lambda: (os.write(go, b"!"), handle.release()))
    releaser.start()
    assert fork(child) == 0
    releaser.join()
    assert handle.value == 0
    os.close(ready)
    os.close(go)


def test_child_of_a_fork_collects_what_it_inherited(kind, make):
    """What came by pickle is closed by each process for itself."""
    handle = make()
    loaded = [pickle.loads(pickle.dumps(handle))]

    def descriptors():
        return [target for target in support.open_fds().values() if handle.name[1:] in target]

    def child():
        before = len(descriptors())
        loaded.clear()
        assert len(descriptors()) == before - (kind is not SEMAPHORE)

    before = descriptors()
    assert fork(child) == 0
    assert descriptors() == before
    assert pickle.loads(pickle.dumps(loaded[0])).name == handle.name


def fork_in_a_storm(name, *other_names):
    """Threads keep the locks of three handles busy while children are forked that need them."""
    sys.setswitchinterval(1e-6)
    semaphore, segment, queue = (
        kind.create(each) for kind, each in zip(KINDS, (name, *other_names), strict=True)
    )  # fmt: skip
    done = False

    def use():
        semaphore.release()
        semaphore.acquire(TIMEOUT)
        assert segment.size == 64
        with contextlib.suppress(BusyError):
            queue.send(b"x", 0.001)
            queue.receive(0.001)

    def work():
        while not done:
            use()

    def child():
        for _ in range(10):
            use()
        semaphore.close()
        segment.close_fd()
        queue.close()

    workers = [threading.Thread(target=work, daemon=True) for _ in range(3)]
    try:
        for worker in workers:
            worker.start()
        for _ in range(25):
            assert fork(child) == 0
        done = True
        for worker in workers:
            worker.join()
        assert semaphore.value == 0
    finally:
        for kind, each in zip(KINDS, (name, *other_names), strict=True):
            kind.remove(each)


@pytest.mark.slow
@pytest.mark.skipif(
    sysconfig.get_config_var("Py_GIL_DISABLED") == 1,
    reason="free-threaded Python itself can hang: a forked child finds the lock of an object held by a thread it lacks",
)
def test_fork_while_other_threads_use_the_handles(names):
    support.run_function(fork_in_a_storm, names(), names(), names())


def test_exec_closes_the_descriptors(segment, queue):
    """Neither descriptor reaches another program unasked."""
    handles = segment(), queue()
    code = "import os, sys; sys.exit(any(os.path.exists(f'/proc/self/fd/{fd}') for fd in sys.argv[1:]))"
    for number in (handles[0].fd, handles[1].mqd):
        assert not os.get_inheritable(number)
    pid = os.posix_spawn(
        sys.executable, [sys.executable, "-c", code, str(handles[0].fd), str(handles[1].mqd)], os.environ
    )
    assert os.waitpid(pid, 0)[1] == 0


def test_handle_for_another_program_needs_no_pickle(kind, make):
    """All that it takes is the name."""
    handle = make()
    code = "import sys, posix_ipc; print(getattr(posix_ipc, sys.argv[1])(sys.argv[2]).name)"
    assert support.run_python(code, kind.type.__name__, handle.name).stdout.strip() == handle.name


def test_importing_the_module_imports_no_multiprocessing():
    """Programs that do not use it do not pay for it; nor for psutil."""
    code = "import sys, posix_ipc; print({'multiprocessing', 'psutil', 'pickle'} & set(sys.modules))"
    assert support.run_python(code).stdout.strip() == "set()"
