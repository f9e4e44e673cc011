"""Something runs out: a typed error that names the limit and its value, nothing is left, and all is well after.

Each scenario is a function that runs in a process of its own, whose limits it lowers: the limits are real ones.
"""

import contextlib
import errno
import functools
import mmap
import os
import pickle
import platform
import re
import resource
import sys
import threading
from pathlib import Path

import pytest
import support
from support import CLONE_NEWIPC, CLONE_NEWNS, KINDS, MESSAGE_QUEUE, SEMAPHORE, SHARED_MEMORY, open_fds

import posix_ipc
from posix_ipc import MessageQueue, Semaphore, SharedMemory

KIND_NAMES = [kind.type.__name__ for kind in KINDS]


def kind_named(name):
    return next(kind for kind in KINDS if kind.type.__name__ == name)


@contextlib.contextmanager
def limit(number, value):
    """Lower a limit of this process for the time of the block."""
    soft, hard = resource.getrlimit(number)
    resource.setrlimit(number, (value, hard))
    try:
        yield
    finally:
        resource.setrlimit(number, (soft, hard))


def assert_names(error, *words):
    """The message names the limit and its value (`words`), and what was wanted."""
    for word in words:
        assert re.search(rf"(?<![\w.]){re.escape(str(word))}(?![\w])", str(error)), f"{word} is not named in: {error}"


def fails_with(number, call, *words, filename=None):
    """The call raises an OSError with this errno; return what the call left open."""
    before = open_fds()
    with pytest.raises(OSError, match=re.escape(os.strerror(number))) as caught:
        call()
    assert caught.value.errno == number
    assert caught.value.filename == filename
    assert_names(caught.value, *words)
    assert open_fds() == before


def use_and_remove(kind, name):
    handle = kind.create(name)
    pickle.loads(pickle.dumps(handle))
    kind.close_handle(handle)
    handle.unlink()


# ---- descriptors ----


@contextlib.contextmanager
def descriptors_left(count):
    """Leave this process no more than `count` descriptors to open."""
    ballast = []
    with limit(resource.RLIMIT_NOFILE, max(open_fds()) + 20):
        try:
            with contextlib.suppress(OSError):
                while True:
                    ballast.append(os.dup(0))
            for _ in range(count):
                os.close(ballast.pop())
            yield
        finally:
            for descriptor in ballast:
                os.close(descriptor)


def without_descriptors(kind_name, name):
    kind = kind_named(kind_name)
    handle = kind.create(name + "-old")
    pickled = pickle.dumps(handle)
    old, new = handle.name, name + "-new"
    calls = [
        (lambda: kind.create(new), new),
        (lambda: kind.create(new, posix_ipc.O_CREAT), new),
        (lambda: kind.create(old, posix_ipc.O_CREAT), old),
        (lambda: kind.type(old), old),
        (lambda: handle.__init__(old), old),
        (lambda: pickle.loads(pickled), old),
    ]
    try:
        with descriptors_left(0):
            number = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
            for call, filename in calls:
                before = open_fds_by_probing(number)
                with pytest.raises(OSError, match="Too many open files") as caught:
                    call()
                assert (caught.value.errno, caught.value.filename) == (errno.EMFILE, filename)
                assert_names(caught.value, "RLIMIT_NOFILE", number)
                assert open_fds_by_probing(number) == before
            # What needs no descriptor works on.
            handle.__reduce__()
            if kind is SEMAPHORE:
                handle.release()
                handle.acquire()
        assert not kind.exists(new)
        assert pickle.loads(pickled).name == old
        use_and_remove(kind, new)
    finally:
        kind.remove(old)
        kind.remove(new)


def open_fds_by_probing(count):
    """As open_fds, where there is no descriptor to read a directory by."""
    found = set()
    for number in range(count):
        with contextlib.suppress(OSError):
            os.fstat(number)
            found.add(number)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("kind_name", KIND_NAMES)
def test_no_descriptor_left(kind_name, name):
    support.run_function(without_descriptors, kind_name, name)


def with_few_descriptors(kind_name, name):
    """Whatever the call got done before it needed one more is undone."""
    kind = kind_named(kind_name)
    failures = 0
    try:
        for count in range(5):
            with descriptors_left(count):
                total = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
                before = open_fds_by_probing(total)
                try:
                    handle = kind.create(name)
                except OSError as error:
                    assert error.errno == errno.EMFILE  # noqa: PT017
                    failures += 1
                    assert open_fds_by_probing(total) == before
                else:
                    kind.close_handle(handle)
                    handle.unlink()
            assert not kind.exists(name)
        assert 1 <= failures < 5
    finally:
        kind.remove(name)


@pytest.mark.slow
@pytest.mark.parametrize("kind_name", KIND_NAMES)
def test_too_few_descriptors(kind_name, name):
    support.run_function(with_few_descriptors, kind_name, name)


def arm_without_descriptors(name):
    queue = MESSAGE_QUEUE.create(name)
    try:
        called = threading.Event()
        with descriptors_left(0):
            with pytest.raises(OSError, match="RLIMIT_NOFILE") as caught:
                queue.request_notification((lambda event: event.set(), called))
            assert caught.value.errno == errno.EMFILE
        queue.send(b"x")
        assert queue.receive(0) == (b"x", 0)
        assert not called.is_set()
        queue.request_notification((lambda event: event.set(), called))
        queue.send(b"x")
        assert called.wait(30)
    finally:
        queue.unlink()


@pytest.mark.slow
def test_no_descriptor_left_for_a_notification(name):
    support.run_function(arm_without_descriptors, name)


def arm_without_threads(name):
    queue = MESSAGE_QUEUE.create(name, mode=0o666)
    queue.unlink()
    support.become_nobody()
    called = threading.Event()
    before = open_fds_by_probing(100)
    with limit(resource.RLIMIT_NPROC, 0):
        with pytest.raises(OSError, match=r"cannot start a thread .*RLIMIT_NPROC is 0 .*ulimit -u") as raised:
            queue.request_notification((lambda event: event.set(), called))
        assert (raised.value.errno, raised.value.filename) == (errno.EAGAIN, name)
        assert open_fds_by_probing(100) == before
        queue.send(b"x")
        queue.receive(0)
        assert not called.is_set()
    queue.request_notification((lambda event: event.set(), called))
    queue.send(b"x")
    assert called.wait(30)


@pytest.mark.slow
def test_no_thread_left_for_a_notification(name):
    support.run_function(arm_without_threads, name)


# ---- queues ----


def without_queue_memory(name, old):
    handle = MESSAGE_QUEUE.create(old)
    try:
        with limit(resource.RLIMIT_MSGQUEUE, 100):
            for flags in (posix_ipc.O_CREX, posix_ipc.O_CREAT):
                # mq_open says EMFILE here too, which the system's text explains wrongly.
                call = functools.partial(MESSAGE_QUEUE.create, name, flags)
                fails_with(errno.EMFILE, call, "RLIMIT_MSGQUEUE", 100, filename=name)
            assert not MESSAGE_QUEUE.exists(name)
            MessageQueue(old).close()  # only new ones need memory
            handle.send(b"x")
            assert handle.receive(0) == (b"x", 0)
        use_and_remove(MESSAGE_QUEUE, name)
    finally:
        MESSAGE_QUEUE.remove(old)
        MESSAGE_QUEUE.remove(name)


@pytest.mark.slow
def test_no_queue_memory_left(names):
    support.run_function(without_queue_memory, names(), names())


def sysctl(name):
    return Path("/proc/sys/fs/mqueue", name)


def beyond_queue_limits(as_root, name):
    """A namespace of its own has limits of its own, and no queues of others in it."""
    support.enter_new_namespaces(CLONE_NEWIPC)
    for each, value in {"msg_max": 5, "msgsize_max": 200, "queues_max": 2}.items():
        sysctl(each).write_text(str(value))
    if not as_root:
        support.become_nobody()
    # Root may go beyond what fs.mqueue says, to limits compiled into the kernel.
    messages, size = (65537, 16777217) if as_root else (6, 201)
    for options, words in (
        ({"max_messages": messages, "max_message_size": 1}, ["fs.mqueue.msg_max", 5, messages]),
        ({"max_messages": 1, "max_message_size": size}, ["fs.mqueue.msgsize_max", 200, size]),
    ):
        before = open_fds_by_probing(100)
        with pytest.raises(ValueError, match=re.escape(name)) as caught:
            MessageQueue(name, posix_ipc.O_CREX, **options)
        assert_names(caught.value, *words)
        assert open_fds_by_probing(100) == before
        assert not MESSAGE_QUEUE.exists(name)
    queue = MessageQueue(name, posix_ipc.O_CREX, max_messages=5, max_message_size=200)
    if not as_root:
        second = MESSAGE_QUEUE.create(name + "-2")
        with pytest.raises(OSError, match="No space left") as caught:
            MESSAGE_QUEUE.create(name + "-3")
        assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, name + "-3")
        assert_names(caught.value, "fs.mqueue.queues_max", 2)
        assert not MESSAGE_QUEUE.exists(name + "-3")
        second.close()
        second.unlink()
        use_and_remove(MESSAGE_QUEUE, name + "-3")
    for _ in range(5):
        queue.send(b"x" * 200, 0)
    with pytest.raises(posix_ipc.BusyError):
        queue.send(b"", 0)


@pytest.mark.parametrize("as_root", [True, False])
def test_beyond_the_limits_of_queues(as_root, name):
    support.run_function(beyond_queue_limits, as_root, name)


_MQ_GETSETATTR = 245 if platform.machine() == "x86_64" else 185


def create_and_ask_in_vain(name, tracked):
    from posix_ipc import mp_integration

    create = mp_integration.MessageQueue if tracked else MessageQueue
    support.forbid(_MQ_GETSETATTR, errno.EIO)
    fails_with(errno.EIO, lambda: create(name, posix_ipc.O_CREX, **support.SMALL_QUEUE), filename=name)
    assert not MESSAGE_QUEUE.exists(name)


@pytest.mark.no_portable
@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="seccomp is Linux's")
@pytest.mark.parametrize("tracked", [False, True], ids=["plain", "tracked"])
def test_a_new_queue_that_says_nothing_of_itself_does_not_stay(name, tracked):
    support.run_function(create_and_ask_in_vain, name, tracked)


# ---- a full /dev/shm ----


def with_full_shm(kind_name, exhausted, flags):
    kind = kind_named(kind_name)
    flags = getattr(posix_ipc, flags)
    support.enter_new_namespaces(CLONE_NEWNS)
    support.mount_shm("size=16k,nr_inodes=6")
    shm = Path("/dev/shm")
    use_and_remove(kind, "/first")
    assert os.listdir(shm) == []
    if exhausted == "bytes":
        (shm / "filling").write_bytes(bytes(16384))
    else:
        for number in range(5):  # the directory is the sixth
            (shm / f"filling-{number}").touch()
    names, before = sorted(os.listdir(shm)), open_fds()
    if exhausted == "bytes" and kind is SHARED_MEMORY:
        # The system gives a segment its pages when they are touched, so a size is no space yet.
        use_and_remove(kind, "/new")
    else:
        left = os.statvfs(shm)
        words = ["/dev/shm/", f"{left.f_bavail * left.f_frsize} bytes", f"{left.f_favail} inodes"]
        fails_with(errno.ENOSPC, lambda: kind.create("/new", flags), *words, filename="/new")
        fails_with(errno.ENOSPC, lambda: kind.create("/new", flags), *words, filename="/new")
    assert sorted(os.listdir(shm)) == names
    for each in names:
        (shm / each).unlink()
    use_and_remove(kind, "/new")
    assert os.listdir(shm) == []
    assert open_fds() == before


@pytest.mark.slow
@pytest.mark.parametrize("flags", ["O_CREX", "O_CREAT"])
@pytest.mark.parametrize("exhausted", ["bytes", "inodes"])
@pytest.mark.parametrize("kind_name", ["Semaphore", "SharedMemory"])
def test_full_shm(kind_name, exhausted, flags):
    support.run_function(with_full_shm, kind_name, exhausted, flags)


def with_read_only_shm(kind_name):
    kind = kind_named(kind_name)
    support.enter_new_namespaces(CLONE_NEWNS)
    support.mount_shm()
    kind.close_handle(kind.create("/old"))
    support.mount_shm(flags=support.MS_REMOUNT | support.MS_RDONLY)
    fails_with(errno.EROFS, lambda: kind.create("/new"), filename="/new")
    if kind is SHARED_MEMORY:
        assert kind.type("/old", read_only=True).size == 64


@pytest.mark.parametrize("kind_name", ["Semaphore", "SharedMemory"])
def test_read_only_shm(kind_name):
    support.run_function(with_read_only_shm, kind_name)


# ---- sizes ----


def beyond_file_size(name, old):
    existing = SharedMemory(old, posix_ipc.O_CREX, size=100)
    os.pwrite(existing.fd, b"kept", 0)
    before = os.fstat(existing.fd)
    try:
        with limit(resource.RLIMIT_FSIZE, 4096):
            for path, flags in ((name, "O_CREX"), (name, "O_CREAT"), (old, "O_CREAT"), (old, "O_TRUNC")):
                fds = open_fds()
                with pytest.raises(ValueError, match=re.escape(path)) as caught:
                    SharedMemory(path, getattr(posix_ipc, flags), size=8192)
                assert_names(caught.value, "RLIMIT_FSIZE", 4096)
                assert open_fds() == fds
                assert not SHARED_MEMORY.exists(name)
            after = os.stat(SHARED_MEMORY.file_of(old))
            assert (after.st_ino, after.st_size) == (before.st_ino, 100)
            assert os.pread(existing.fd, 4, 0) == b"kept"
            SharedMemory(name, posix_ipc.O_CREX, size=4096).unlink()
        use_and_remove(SHARED_MEMORY, name)
    finally:
        SHARED_MEMORY.remove(old)
        SHARED_MEMORY.remove(name)


def test_beyond_the_file_size_limit(names):
    support.run_function(beyond_file_size, names(), names())


def semaphore_beyond_file_size(name):
    try:
        with limit(resource.RLIMIT_FSIZE, 0):
            fds = open_fds()
            with pytest.raises((OSError, ValueError), match=re.escape(name)) as caught:
                Semaphore(name, posix_ipc.O_CREX)
            assert_names(caught.value, "RLIMIT_FSIZE", 0)
            assert open_fds() == fds
            assert not SEMAPHORE.exists(name)
        use_and_remove(SEMAPHORE, name)
    finally:
        SEMAPHORE.remove(name)


def test_semaphore_beyond_the_file_size_limit(name):
    support.run_function(semaphore_beyond_file_size, name)


# ---- address space ----


def virtual_memory():
    return int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE


@contextlib.contextmanager
def no_address_space_left(spare=0):
    """Leave this process not a single page to map, but the memory that the allocators hold already."""
    ballast = []
    with limit(resource.RLIMIT_AS, virtual_memory() + spare + (1 << 20)):
        try:
            for size in (1 << 18, mmap.PAGESIZE):
                with contextlib.suppress(OSError):
                    while True:
                        ballast.append(mmap.mmap(-1, size))
            yield
        finally:
            for each in ballast:
                each.close()


def semaphore_without_address_space(name, old):
    handle = SEMAPHORE.create(old)
    pickled = pickle.dumps(handle)
    calls = [
        (lambda: Semaphore(old), old),
        (lambda: pickle.loads(pickled), old),
        (lambda: Semaphore(name, posix_ipc.O_CREX), name),
        (lambda: Semaphore(name, posix_ipc.O_CREAT), name),
    ]
    try:
        for call, filename in calls:
            before, caught = open_fds(), None
            with no_address_space_left():
                number = resource.getrlimit(resource.RLIMIT_AS)[0]
                try:
                    call()
                except (OSError, MemoryError) as error:
                    caught = error
            if isinstance(caught, OSError):
                assert (caught.errno, caught.filename) == (errno.ENOMEM, filename)
                assert_names(caught, "RLIMIT_AS", number)
            else:
                assert isinstance(caught, MemoryError)
            assert open_fds() == before
            assert not SEMAPHORE.exists(name)
        handle.release()
        assert pickle.loads(pickled).value == 1
        use_and_remove(SEMAPHORE, name)
    finally:
        SEMAPHORE.remove(old)
        SEMAPHORE.remove(name)


@pytest.mark.no_portable
def test_no_address_space_left_for_a_semaphore(names):
    support.run_function(semaphore_without_address_space, names(), names())


def receive_without_memory(name):
    """The message is not taken out of the queue for nothing."""
    queue = MessageQueue(name, posix_ipc.O_CREX, max_messages=1, max_message_size=8192)
    queue.unlink()
    message = os.urandom(8000)
    queue.send(message, priority=9)
    hoard, raised = [], []
    with no_address_space_left():
        # The allocators hold memory that nobody uses. All that would do for a message of this size is taken.
        for size in (1 << 16, 8192, 4000, 2000, 1000):
            try:
                while True:
                    hoard.append(bytes(size))
            except MemoryError:
                pass
        for timeout in (None, 0, 10):
            try:
                queue.receive(timeout)
            except MemoryError as error:
                raised.append(error)
        hoard.clear()
    assert len(raised) == 3
    assert queue.current_messages == 1
    assert queue.receive(0) == (message, 9)


@pytest.mark.no_sanitizer
def test_no_memory_left_for_a_message(name):
    support.run_function(receive_without_memory, name)


def all_calls_without_memory(*names):
    """Whatever fails first for want of memory: a typed error, and everything works again after."""
    handles = semaphore, segment, queue = [kind.create(name) for kind, name in zip(KINDS, names, strict=True)]
    pickled = [pickle.dumps(handle) for handle in handles]
    calls = [
        *(lambda handle=handle: (repr(handle), str(handle), handle.name) for handle in handles),
        *(lambda handle=handle: handle.__reduce__() for handle in handles),
        *(lambda each=each: pickle.loads(each) for each in pickled),
        *(lambda kind=kind: kind.type("/no such object") for kind in KINDS),
        lambda: (semaphore.release(), semaphore.value, semaphore.acquire(0.5)),
        lambda: segment.size,
        lambda: (queue.send(b"x" * 64, 0), queue.receive(0)),
        lambda: queue.request_notification((len, "x")),
        lambda: queue.request_notification(None),
        lambda: semaphore.acquire(-1),
    ]
    try:
        pickle.loads(pickled[0])
        before, unexpected, failed = open_fds(), [], 0
        with no_address_space_left():
            hoard = []
            for size in (1 << 16, 4000, 1000, 500, 200, 64, 32):
                try:
                    while True:
                        hoard.append(bytes(size))
                except MemoryError:
                    pass
            for call in calls:
                try:
                    call()
                except (MemoryError, OSError):
                    failed += 1
                except (posix_ipc.Error, TypeError):
                    pass
                except BaseException as error:
                    unexpected.append(error)
            hoard.clear()
        assert unexpected == [], repr(unexpected)
        assert failed
        queue.request_notification(None)
        support.wait_until(lambda: open_fds() == before)
        for handle, kind in zip(handles, KINDS, strict=True):
            assert pickle.loads(pickle.dumps(handle)).name == handle.name
            kind.close_handle(handle)
    finally:
        for kind, name in zip(KINDS, names, strict=True):
            kind.remove(name)


@pytest.mark.no_sanitizer
def test_no_memory_left_at_all(names):
    support.run_function(all_calls_without_memory, names(), names(), names())
