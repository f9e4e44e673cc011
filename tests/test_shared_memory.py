"""posix_ipc.SharedMemory."""

import errno
import fcntl
import mmap
import os

import pytest
from support import SHARED_MEMORY, libc, open_fds, run_python

import posix_ipc
from posix_ipc import O_CREAT, O_CREX, O_TRUNC


def content(shm):
    return os.pread(shm.fd, 100, 0)


@pytest.fixture
def written(segment):
    """Return a segment of 10 bytes that are not zero."""
    shm = segment(size=10)
    assert os.pwrite(shm.fd, b"0123456789", 0) == 10
    return shm


# ---- size ----


@pytest.mark.parametrize("size", [0, 1, 10, posix_ipc.PAGE_SIZE, posix_ipc.PAGE_SIZE + 1, 2**40])
def test_size_of_a_new_segment(segment, size):
    shm = segment(size=size)
    assert shm.size == size
    assert os.fstat(shm.fd).st_size == size


def test_size_defaults_to_zero(name):
    shm = posix_ipc.SharedMemory(name, O_CREX)
    try:
        assert shm.size == 0
    finally:
        shm.close_fd()
        shm.unlink()


def test_new_segment_is_filled_with_zeros(segment):
    assert content(segment(size=10)) == bytes(10)


@pytest.mark.parametrize("flags", [0, O_CREAT], ids=("open", "O_CREAT"))
@pytest.mark.parametrize(
    ("size", "expected"),
    [(0, b"0123456789"), (4, b"0123"), (10, b"0123456789"), (12, b"0123456789\0\0")],
)
def test_size_resizes_an_existing_segment_too(segment, written, flags, size, expected):
    attached = segment(written.name, flags=flags, size=size)
    assert content(attached) == content(written) == expected
    assert attached.size == written.size == len(expected)


def test_size_is_live(written):
    os.ftruncate(written.fd, 5000)
    assert written.size == 5000
    os.ftruncate(written.fd, 0)
    assert written.size == 0


def test_o_trunc_empties_an_existing_segment(segment, written):
    segment(written.name, flags=O_TRUNC)
    assert written.size == 0


def test_o_trunc_and_a_size_give_zeros(segment, written):
    segment(written.name, flags=O_TRUNC, size=4)
    assert content(written) == bytes(4)


def test_o_trunc_creates_nothing(name):
    with pytest.raises(posix_ipc.ExistentialError):
        posix_ipc.SharedMemory(name, O_TRUNC, size=10)
    assert not SHARED_MEMORY.exists(name)


@pytest.mark.parametrize("size", [-1, -(2**63), -(2**70), 2**63, 2**64, 2**64 + 10, 10**30])
def test_impossible_size_leaves_everything_as_it_was(written, names, size):
    """2**64 + 10 is 10 for a careless conversion."""
    before = open_fds()
    new = names()
    with pytest.raises((ValueError, OverflowError)):
        posix_ipc.SharedMemory(new, O_CREX, size=size)
    assert not SHARED_MEMORY.exists(new)
    for flags in (0, O_CREAT):
        with pytest.raises((ValueError, OverflowError)):
            posix_ipc.SharedMemory(written.name, flags, size=size)
    assert SHARED_MEMORY.exists(written.name)
    assert content(written) == b"0123456789"
    assert open_fds() == before


@pytest.mark.parametrize("flags", [0, O_CREAT, O_TRUNC], ids=("open", "O_CREAT", "O_TRUNC"))
def test_read_only_with_a_size_touches_nothing(written, flags):
    before = open_fds()
    with pytest.raises(ValueError, match="read_only"):
        posix_ipc.SharedMemory(written.name, flags, size=8192, read_only=True)
    assert SHARED_MEMORY.exists(written.name)
    assert content(written) == b"0123456789"
    assert open_fds() == before


def test_read_only_with_a_size_makes_nothing(name):
    for flags in (O_CREAT, O_CREX):
        with pytest.raises(ValueError, match="read_only"):
            posix_ipc.SharedMemory(name, flags, size=10, read_only=True)
        assert not SHARED_MEMORY.exists(name)


FAILING_RESIZE_CODE = """
import os, resource, sys, posix_ipc
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
before = os.listdir("/proc/self/fd")
for name, flags in ((sys.argv[1], 0), (sys.argv[1], posix_ipc.O_CREAT), (sys.argv[2], posix_ipc.O_CREAT),
                    (sys.argv[2], posix_ipc.O_CREX)):
    try:
        posix_ipc.SharedMemory(name, flags, size=8192)
    except ValueError as error:
        assert "RLIMIT_FSIZE" in str(error) and "4096" in str(error) and name in str(error), error
    else:
        sys.exit("resized")
    assert os.path.exists("/dev/shm" + name) == (name == sys.argv[1])
assert os.listdir("/proc/self/fd") == before
"""


def test_resize_the_kernel_refuses(written, names):
    new = names()
    run_python(FAILING_RESIZE_CODE, written.name, new)
    assert SHARED_MEMORY.exists(written.name)
    assert content(written) == b"0123456789"
    assert not SHARED_MEMORY.exists(new)


# ---- read_only ----


@pytest.mark.parametrize("read_only", [False, 0, True, 1], ids=repr)
def test_read_only_descriptor_reads_and_does_not_write(segment, written, read_only):
    attached = segment(written.name, flags=0, read_only=read_only)
    access = fcntl.fcntl(attached.fd, fcntl.F_GETFL) & os.O_ACCMODE
    assert access == (os.O_RDONLY if read_only else os.O_RDWR)
    assert content(attached) == b"0123456789"
    with mmap.mmap(attached.fd, attached.size, access=mmap.ACCESS_READ) as memory:
        assert memory[:] == b"0123456789"
    if read_only:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.pwrite(attached.fd, b"x", 0)
        with pytest.raises(PermissionError):
            mmap.mmap(attached.fd, attached.size)


def test_read_only_segment_can_be_made(segment):
    shm = segment(size=0, read_only=True)
    assert shm.size == 0
    assert SHARED_MEMORY.exists(shm.name)


def test_read_only_attach_needs_no_right_to_write(segment):
    """As root every right is there, so it is given up first."""
    shm = segment(mode=0o600)
    os.fchmod(shm.fd, 0o444)
    run_python(
        "import os, sys, posix_ipc\n"
        "if os.geteuid() == 0: os.setgroups([]); os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534)\n"
        "posix_ipc.SharedMemory(sys.argv[1], read_only=True)\n"
        "try: posix_ipc.SharedMemory(sys.argv[1])\n"
        "except posix_ipc.PermissionsError: pass\n"
        "else: sys.exit('opened for writing')\n",
        shm.name,
    )


# ---- the descriptor ----


def test_descriptor(segment):
    shm = segment()
    assert type(shm.fd) is int
    assert shm.fd == shm.fileno() >= 0
    assert not os.get_inheritable(shm.fd)
    attached = segment(shm.name, flags=0, read_only=True)
    assert attached.fd != shm.fd
    assert not os.get_inheritable(attached.fd)
    assert os.fstat(attached.fd).st_ino == os.fstat(shm.fd).st_ino


def test_handle_is_a_file_for_functions_that_take_one(written):
    assert os.fstat(written.fileno()).st_size == 10
    fcntl.flock(written, fcntl.LOCK_EX | fcntl.LOCK_NB)
    fcntl.flock(written, fcntl.LOCK_UN)


def test_close_fd_closes_once(written):
    descriptor = written.fd
    assert written.close_fd() is None
    assert written.fd == written.fileno() == -1
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)
    replacement = os.open("/", os.O_RDONLY)
    try:
        assert replacement == descriptor  # the lowest free number: a second close would hit it
        assert written.close_fd() is None
        os.fstat(replacement)
    finally:
        os.close(replacement)


def test_after_close_fd(written):
    name = written.name
    written.close_fd()
    with pytest.raises(posix_ipc.ExistentialError) as caught:
        _ = written.size
    assert (caught.value.errno, caught.value.name) == (errno.EBADF, name)
    assert (written.name, written.mode) == (name, 0o600)
    assert written.unlink() is None


def test_mapping_outlives_descriptor_and_name(written):
    memory = mmap.mmap(written.fd, written.size)
    written.close_fd()
    written.unlink()
    memory[0:1] = b"x"
    assert memory[:] == b"x123456789"
    memory.close()


def test_descriptor_closed_by_the_caller(written):
    """Programs call os.close(shm.fd) and drop the handle."""
    name = written.name
    os.close(written.fd)
    with pytest.raises(posix_ipc.ExistentialError) as caught:
        _ = written.size
    assert (caught.value.errno, caught.value.name) == (errno.EBADF, name)
    with pytest.raises(ValueError, match=name):
        written.close_fd()
    assert written.fd == -1
    assert written.close_fd() is None
    written.unlink()


def test_descriptor_zero():
    run_python(
        "import os, posix_ipc\n"
        "os.close(0)\n"
        "shm = posix_ipc.SharedMemory(None, posix_ipc.O_CREX, size=10)\n"
        "try:\n"
        "    assert shm.fd == shm.fileno() == 0\n"
        "    assert shm.size == 10\n"
        "    assert os.pwrite(shm.fd, b'x', 0) == 1\n"
        "    shm.close_fd()\n"
        "    assert shm.fd == -1\n"
        "    try: os.fstat(0)\n"
        "    except OSError: pass\n"
        "    else: raise AssertionError('still open')\n"
        "finally: shm.unlink()\n"
    )


def test_descriptor_is_not_inherited_by_another_program(segment):
    shm = segment()

    def is_inherited():
        command = f"readlink /proc/self/fd/{shm.fd} | grep -q {shm.name[1:]}"
        pid = os.posix_spawn("/bin/sh", ["sh", "-c", command], os.environ)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0

    assert not is_inherited()
    os.set_inheritable(shm.fd, True)
    assert is_inherited()


# ---- C programs on the same segment ----


def test_c_program_on_our_segment(written):
    peer = libc.shm_open(written.name.encode(), os.O_RDWR, 0)
    try:
        assert os.pread(peer, 10, 0) == b"0123456789"
        os.pwrite(peer, b"peer", 0)
        assert content(written) == b"peer456789"
    finally:
        os.close(peer)
    libc.shm_unlink(written.name.encode())
    with pytest.raises(posix_ipc.ExistentialError):
        written.unlink()


def test_segment_of_a_c_program(segment, name):
    peer = libc.shm_open(name.encode(), O_CREX | os.O_RDWR, 0o600)
    try:
        os.ftruncate(peer, 10)
        ours = segment(name, flags=0)
        assert ours.size == 10
        with mmap.mmap(ours.fd, ours.size) as memory:
            memory[:] = b"0123456789"
        assert os.pread(peer, 10, 0) == b"0123456789"
        ours.unlink()
        with pytest.raises(FileNotFoundError):
            libc.shm_unlink(name.encode())
    finally:
        os.close(peer)


def test_nothing_is_hidden_in_a_segment(segment):
    """What is in the file is what the program put there: another program may read it as a whole."""
    shm = segment(size=4096)
    assert os.pread(shm.fd, 8192, 0) == bytes(4096)
    assert os.listxattr(shm.fd) == []


def test_two_mappings_see_each_other(segment, written):
    attached = segment(written.name, flags=0)
    with mmap.mmap(written.fd, 10) as one, mmap.mmap(attached.fd, 10) as other:
        one[0:3] = b"abc"
        assert other[0:3] == b"abc"


# ---- files that are no segments ----


@pytest.mark.parametrize(
    ("make", "error"),
    [(os.mkdir, ValueError), (lambda path: os.symlink("/etc/passwd", path), OSError)],
    ids=("directory", "symbolic link"),
)
def test_name_of_something_else(name, make, error):
    path = SHARED_MEMORY.file_of(name)
    make(path)
    before = open_fds()
    try:
        for flags in (0, O_CREAT):
            with pytest.raises(error, match=name):
                posix_ipc.SharedMemory(name, flags, size=10)
        with pytest.raises(posix_ipc.ExistentialError):
            posix_ipc.SharedMemory(name, O_CREX)
        assert os.path.lexists(path)
    finally:
        os.unlink(path) if os.path.islink(path) else os.rmdir(path)
    assert open_fds() == before
