"""SharedMemory(..., reserve=True): the memory is there when the constructor returns, or nothing has happened."""

import errno
import mmap
import os
import resource
import signal
import threading

import pytest
import support
from support import SHARED_MEMORY, open_fds, run_function, run_python, wait_until

from posix_ipc import O_CREAT, O_CREX, O_TRUNC, PAGE_SIZE, SharedMemory

MIB = 2**20
ROOM = 16384  # in the small file systems of these tests


def allocated(shm):
    return os.fstat(shm.fd).st_blocks * 512


def pages(size):
    return -(-size // PAGE_SIZE) * PAGE_SIZE


# ---- new segments ----


@pytest.mark.parametrize("flags", [O_CREAT, O_CREX], ids=("O_CREAT", "O_CREX"))
@pytest.mark.parametrize("size", [1, PAGE_SIZE, PAGE_SIZE + 1, MIB])
def test_pages_of_a_new_segment_are_allocated(segment, flags, size):
    shm = segment(flags=flags, size=size, reserve=True)
    assert shm.size == size
    assert allocated(shm) == pages(size)
    assert shm.buf == bytes(size)


@pytest.mark.parametrize("options", [{}, {"reserve": False}, {"reserve": 0}], ids=repr)
def test_without_it_no_page_is_allocated(segment, options):
    assert allocated(segment(size=MIB, **options)) == 0


@pytest.mark.parametrize("value", [True, 1])
def test_any_true_integer_will_do(segment, value):
    assert allocated(segment(size=MIB, reserve=value)) == MIB


def test_keyword_only(name):
    with pytest.raises(TypeError, match="5 positional"):
        SharedMemory(name, O_CREX, 0o600, 10, False, True)
    assert not SHARED_MEMORY.exists(name)


@pytest.mark.parametrize("flags", [0, O_CREAT, O_CREX, O_TRUNC], ids=("open", "O_CREAT", "O_CREX", "O_TRUNC"))
def test_nothing_to_reserve(segment, names, flags):
    """It says so before anything is made or emptied."""
    existing, new, before = segment(size=10), names(), open_fds()
    for name in (existing.name, new):
        for options in ({}, {"size": 0}, {"size": 0, "read_only": True}):
            with pytest.raises(ValueError, match=r"reserve.*size"):
                SharedMemory(name, flags, reserve=True, **options)
    assert not SHARED_MEMORY.exists(new)
    assert existing.size == 10
    assert open_fds() == before


def test_read_only(name):
    with pytest.raises(ValueError, match="read_only"):
        SharedMemory(name, O_CREX, size=10, read_only=True, reserve=True)
    assert not SHARED_MEMORY.exists(name)


# ---- existing segments ----


@pytest.fixture
def sparse(segment):
    """Return a segment of four pages of which one, the second, was written to."""
    shm = segment(size=4 * PAGE_SIZE)
    os.pwrite(shm.fd, b"written", PAGE_SIZE)
    assert allocated(shm) == PAGE_SIZE
    return shm


@pytest.mark.parametrize("flags", [0, O_CREAT], ids=("open", "O_CREAT"))
@pytest.mark.parametrize("size", [1, PAGE_SIZE + 4, 4 * PAGE_SIZE, 4 * PAGE_SIZE + 1, 10 * PAGE_SIZE])
def test_existing_segment_is_resized_and_filled_up(segment, sparse, flags, size):
    before = os.pread(sparse.fd, 4 * PAGE_SIZE, 0)
    shm = segment(sparse.name, flags=flags, size=size, reserve=True)
    assert shm.size == sparse.size == size
    assert allocated(sparse) == pages(size)
    assert shm.buf == (before + bytes(6 * PAGE_SIZE))[:size]


@pytest.mark.parametrize("size", [1, 4 * PAGE_SIZE, 6 * PAGE_SIZE])
def test_o_trunc_gives_zeros_that_are_allocated(segment, sparse, size):
    segment(sparse.name, flags=O_TRUNC, size=size, reserve=True)
    assert allocated(sparse) == pages(size)
    assert sparse.buf == bytes(size)


def test_views_that_are_out_see_what_is_kept(segment, sparse):
    view = sparse.buf
    segment(sparse.name, flags=0, size=8 * PAGE_SIZE, reserve=True)
    assert bytes(view[PAGE_SIZE : PAGE_SIZE + 7]) == b"written"
    assert sparse.buf.nbytes == 8 * PAGE_SIZE


# ---- a full file system ----


def in_little_room():
    """In a child of run_function."""
    support.enter_new_namespaces(support.CLONE_NEWNS)
    support.mount_shm(f"size={ROOM}")


def free():
    facts = os.statvfs("/dev/shm")
    return facts.f_bavail * facts.f_frsize


def refuse(name, flags, size):
    """It is refused, and the exception says how much is free."""
    room, before = free(), open_fds()
    with pytest.raises(OSError, match=rf"posix_fallocate.*/dev/shm/ has {room} bytes") as caught:
        SharedMemory(name, flags, size=size, reserve=True)
    assert type(caught.value) is OSError
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, name)
    assert free() == room
    assert open_fds() == before


def refuse_what_is_too_large(name, flags):
    in_little_room()
    assert free() == ROOM
    for size in (ROOM + 1, 3 * ROOM, MIB, 2**40):
        refuse(name, flags, size)
        assert os.listdir("/dev/shm") == []
    shm = SharedMemory(name, flags, size=ROOM, reserve=True)  # to the last byte
    assert (allocated(shm), free()) == (ROOM, 0)
    shm.buf[:] = b"x" * ROOM
    refuse(f"{name}-2", flags, 1)
    assert os.listdir("/dev/shm") == [name[1:]]
    assert shm.buf == b"x" * ROOM
    handle = SharedMemory.__new__(SharedMemory)
    with pytest.raises(OSError, match="has 0 bytes"):
        handle.__init__(f"{name}-2", flags, size=1, reserve=True)
    assert (handle.name, handle.fd) == (None, -1)
    shm.unlink()
    shm.close()
    handle.__init__(f"{name}-2", flags, size=1, reserve=True)
    assert allocated(handle) == PAGE_SIZE


@pytest.mark.parametrize("flags", [O_CREAT, O_CREX], ids=("O_CREAT", "O_CREX"))
def test_new_segment_without_room(name, flags):
    run_function(refuse_what_is_too_large, name, flags)


def leave_existing_as_it_is(name, size, written):
    for flags in (0, O_CREAT, O_TRUNC, O_CREAT | O_TRUNC):
        in_little_room()
        shm = SharedMemory(name, O_CREX, size=size)
        view = shm.buf
        view[:written] = b"x" * written
        before = os.stat(shm.fd)
        for wanted in (ROOM + 1, max(size, 2 * ROOM), MIB):
            refuse(name, flags, wanted)
            after = os.stat(shm.fd)
            assert (after.st_size, after.st_blocks, after.st_mtime_ns) == (size, before.st_blocks, before.st_mtime_ns)
            assert os.pread(shm.fd, written + 1, 0) == (b"x" * written + b"\0")[: min(size, written + 1)]
            assert bytes(view[:written]) == b"x" * written
        second = SharedMemory(name, flags, size=ROOM, reserve=True)  # what fits is given as if nothing had been
        assert (allocated(second), free()) == (ROOM, 0)
        second.buf[ROOM - 1] = 1
        assert bytes(second.buf[:written]) == (bytes(written) if flags & O_TRUNC else b"x" * written)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "written"), [(5000, 5000), (12288, 4096), (12288, 12288), (MIB, 4096)])
def test_existing_segment_without_room(name, size, written):
    run_function(leave_existing_as_it_is, name, size, written)


def write_without_reserving(name):
    """What it protects from: the constructor is content, and the writer dies."""
    in_little_room()
    shm = SharedMemory(name, O_CREX, size=2 * ROOM)
    view = shm.buf
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGBUS, signal.SIG_DFL)  # not faulthandler's
        view[:ROOM] = b"x" * ROOM
        view[ROOM] = 1
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGBUS


def test_without_it_the_writer_dies(name):
    run_function(write_without_reserving, name)


# ---- a limit of the process ----

TOO_LARGE_CODE = """
import os, resource, sys, posix_ipc
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
before = os.listdir("/proc/self/fd")
for name, flags in ((sys.argv[1], 0), (sys.argv[1], posix_ipc.O_CREAT), (sys.argv[1], posix_ipc.O_TRUNC),
                    (sys.argv[2], posix_ipc.O_CREAT), (sys.argv[2], posix_ipc.O_CREX)):
    try:
        posix_ipc.SharedMemory(name, flags, size=8192, reserve=True)
    except ValueError as error:
        assert "RLIMIT_FSIZE" in str(error) and "4096" in str(error) and name in str(error), error
    else:
        sys.exit("reserved")
    assert os.path.exists("/dev/shm" + name) == (name == sys.argv[1])
assert os.listdir("/proc/self/fd") == before
posix_ipc.SharedMemory(sys.argv[1], size=4096, reserve=True)
"""


def test_beyond_the_file_size_limit(segment, names):
    existing, new = segment(size=10), names()
    existing.buf[:] = b"0123456789"
    run_python(TOO_LARGE_CODE, existing.name, new)
    assert not SHARED_MEMORY.exists(new)
    assert existing.size == allocated(existing) == 4096
    assert bytes(existing.buf[:10]) == b"0123456789"


# ---- signals ----


def blocked_signals(thread):
    """Return the mask of a thread of this process, as the kernel has it."""
    with open(f"/proc/self/task/{thread}/status") as status:
        return next(int(line.split()[1], 16) for line in status if line.startswith("SigBlk:"))


def reserve_under_signals(name, size, interval):
    """On many kernels each signal undoes what is allocated so far: the call would not end before the timer does.

    Others take no notice of signals that do not kill, so it is looked whether they are held back.
    """
    count = 0

    def handler(number, frame):
        nonlocal count
        count += 1

    signal.signal(signal.SIGALRM, handler)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    signal.setitimer(signal.ITIMER_REAL, interval, interval)
    wait_until(lambda: count)
    for flags in (O_CREX, 0, O_TRUNC):
        shm = SharedMemory(name, flags, size=size, reserve=True)
        assert allocated(shm) == size
        before = count
        wait_until(lambda: count > before)  # noqa: B023
        assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == mask
    held_back = threading.Event()
    reserving = threading.get_native_id()

    def watch():
        wait_until(lambda: blocked_signals(reserving) & 1 << signal.SIGALRM - 1)
        held_back.set()

    watcher = threading.Thread(target=watch)
    watcher.start()
    while watcher.is_alive():
        SharedMemory(name, O_TRUNC, size=size, reserve=True).close()
    assert held_back.is_set()
    # The mask is put back after a failure as well.
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    with pytest.raises(ValueError, match="RLIMIT_FSIZE"):
        SharedMemory(name, size=size + 1, reserve=True)
    before = count
    wait_until(lambda: count > before)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == mask
    signal.setitimer(signal.ITIMER_REAL, 0)
    shm.unlink()


@pytest.mark.slow
def test_reservation_comes_to_its_end_under_a_fast_timer(name):
    if free() < 300 * MIB:
        pytest.skip("needs 300 MiB of free room in /dev/shm")
    run_function(reserve_under_signals, name, 256 * MIB, 0.001, timeout=50)


INTERRUPTED_CODE = """
import signal, sys, posix_ipc
signal.signal(signal.SIGINT, signal.default_int_handler)
print("ready", flush=True)
try:
    sys.stdin.readline()
    while True:
        shm = posix_ipc.SharedMemory(sys.argv[1], posix_ipc.O_CREAT | posix_ipc.O_TRUNC, size=2**24, reserve=True)
        shm.close()
except KeyboardInterrupt:
    print("KeyboardInterrupt")
"""


def test_ctrl_c_is_heard_afterwards(segment):
    """It is held back, not lost."""
    shm = segment(size=1)
    with support.start_python(INTERRUPTED_CODE, shm.name) as child:
        support.wait_until_ready(child)
        child.stdin.write("go\n")
        child.stdin.flush()
        wait_until(lambda: shm.size == 2**24)
        child.send_signal(signal.SIGINT)
        assert support.finish(child) == "KeyboardInterrupt\n"


def test_reserved_memory_is_ordinary_memory(segment):
    shm = segment(size=PAGE_SIZE, reserve=True)
    with mmap.mmap(shm.fd, shm.size) as memory:
        memory[0:3] = b"abc"
    assert bytes(shm.buf[:3]) == b"abc"
