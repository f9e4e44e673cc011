"""SharedMemory as a buffer: what its views show, and how long the memory behind them stays mapped."""

import contextlib
import copy
import ctypes
import errno
import gc
import io
import os
import pickle
import random
import resource
import struct
import sys
import weakref

import pytest
import support
from support import mappings, run_function, run_python, run_threads

from posix_ipc import O_CREAT, O_CREX, PAGE_SIZE, ExistentialError, SharedMemory

DIGITS = b"0123456789"


def inode_of(shm):
    return os.fstat(shm.fd).st_ino


def grow(shm, size):
    """Resize behind the back of the handle, as another process does."""
    os.truncate(support.SHARED_MEMORY.file_of(shm.name), size)


@pytest.fixture
def written(segment):
    """Return a segment of 10 bytes that are not zero."""
    shm = segment(size=10)
    os.pwrite(shm.fd, DIGITS, 0)
    return shm


WAYS_TO_VIEW = {"memoryview": memoryview, "buf": lambda shm: shm.buf}


@pytest.fixture(params=WAYS_TO_VIEW)
def view_of(request):
    return WAYS_TO_VIEW[request.param]


# ---- what a view shows ----


def test_view_is_of_the_bytes_of_the_segment(written, view_of):
    view = view_of(written)
    assert type(view) is memoryview
    assert (view.format, view.itemsize, view.shape, view.strides) == ("B", 1, (10,), (1,))
    assert (view.nbytes, view.contiguous, view.readonly) == (10, True, False)
    assert view == DIGITS
    view[0:2] = b"ab"
    assert os.pread(written.fd, 100, 0) == b"ab23456789"
    os.pwrite(written.fd, b"yz", 8)
    assert bytes(view) == b"ab234567yz"


@pytest.mark.parametrize("size", [1, PAGE_SIZE - 1, PAGE_SIZE, PAGE_SIZE + 1, 10 * PAGE_SIZE])
def test_view_ends_where_the_segment_does(segment, size):
    view = segment(size=size).buf
    assert view.nbytes == size
    view[size - 1] = 1
    with pytest.raises(IndexError):
        view[size]


def test_views_of_several_handles_show_the_same_memory(segment, written):
    other = segment(written.name, flags=0)
    written.buf[3] = ord("x")
    assert other.buf == b"012x456789"
    other.buf[4] = ord("y")
    assert written.buf == b"012xy56789"


def test_slices_and_casts_are_views_too(segment):
    shm = segment(size=16)
    numbers = shm.buf.cast("I")
    numbers[1] = 0x01020304
    assert bytes(shm.buf[4:8]) == struct.pack("=I", 0x01020304)
    grid = shm.buf.cast("B", (4, 4))
    grid[3, 3] = 9
    assert shm.buf[15] == 9
    every_second = shm.buf[::2]
    every_second[0] = 7
    assert shm.buf[:3].tolist() == [7, 0, 0]


def test_handle_serves_where_bytes_are_taken(written):
    assert bytes(written) == bytearray(written) == b"".join([written]) == DIGITS
    assert struct.unpack_from("2s", written, 1) == (b"12",)
    assert struct.pack_into("2s", written, 1, b"ab") is None
    assert io.BytesIO(b"XY").readinto(written) == 2
    file = io.BytesIO()
    file.write(written)
    assert file.getvalue() == b"XYb3456789"
    array = (ctypes.c_char * 10).from_buffer(written)
    array[9] = b"!"
    assert bytes(written) == b"XYb345678!"


def test_subclass_exports_its_memory(segment):
    class Labelled(SharedMemory):
        pass

    shm = segment(type=Labelled, size=3)
    shm.label = "mine"
    shm.buf[:] = b"abc"
    assert memoryview(shm) == b"abc"


# ---- fresh each time, mapped on first use ----


def test_nothing_is_mapped_until_somebody_looks(written, view_of):
    inode = inode_of(written)
    assert mappings(inode) == []
    first = view_of(written)
    assert len(mappings(inode)) == 1
    others = [memoryview(written), written.buf, bytes(written)]
    assert len(mappings(inode)) == 1
    del first, others


def test_each_view_is_another(written, view_of):
    first, second = view_of(written), view_of(written)
    assert first is not second
    first.release()
    assert second == written.buf == DIGITS
    with pytest.raises(ValueError, match="released"):
        bytes(first)


def test_buf_is_not_to_be_set(written):
    with pytest.raises(AttributeError):
        written.buf = memoryview(bytearray(10))
    with pytest.raises(AttributeError):
        del written.buf
    assert written.buf == DIGITS


@pytest.mark.parametrize("order", ["view first", "handle first"])
def test_no_cycle_waits_for_the_collector(written, view_of, order):
    """A view that the handle kept would keep the handle: with the collector off both would stay for ever."""
    gc.collect()
    gc.disable()
    try:
        handle = copy.copy(written)  # whose descriptor goes with it
        descriptor, inode = handle.fd, inode_of(handle)
        view = view_of(handle)
        assert len(mappings(inode)) == 1
        if order == "view first":
            del view
            del handle
        else:
            del handle
            assert view == DIGITS
            del view
        assert mappings(inode) == []
        assert descriptor not in support.open_fds()
    finally:
        gc.enable()


DERIVED = {
    "view": lambda view: view,
    "slice": lambda view: view[2:4],
    "cast": lambda view: view.cast("B", (2, 5)),
    "view of a view": memoryview,
    "ctypes": lambda view: (ctypes.c_char * 10).from_buffer(view),
}


@pytest.mark.parametrize("derived", DERIVED)
def test_view_keeps_its_handle_alive(written, view_of, derived):
    handle = copy.copy(written)
    inode, reference = inode_of(handle), weakref.ref(handle)
    view = DERIVED[derived](view_of(handle))
    del handle
    gc.collect()
    assert reference() is not None
    assert reference().size == 10
    assert len(mappings(inode)) == 1
    del view
    gc.collect()  # ctypes keeps what it needs in a cycle
    assert reference() is None
    assert mappings(inode) == []


class Keeper(SharedMemory):
    """What clients write: an object that keeps a view of itself."""

    def __init__(self, name):
        super().__init__(name)
        self.view = self.buf[2:4]


def test_cycle_of_a_clients_making_is_collected(written):
    gc.collect()
    inode = inode_of(written)
    keeper = Keeper(written.name)
    descriptor, reference = keeper.fd, weakref.ref(keeper)
    assert keeper.view == b"23"
    del keeper
    gc.collect()
    assert reference() is None
    assert mappings(inode) == []
    os.close(descriptor)


@pytest.mark.skipif(sys.version_info < (3, 12), reason="new in Python 3.12")
def test_subclass_with_a_buffer_method_of_its_own(written):
    class Halved(SharedMemory):
        def __buffer__(self, flags):
            return super().__buffer__(flags)[:5]

    shm = Halved(written.name)
    inode = inode_of(shm)
    for _ in range(5):  # a view given back twice would take away the memory of the next
        view, other = memoryview(shm), shm.buf
        assert view == other == b"01234"
        del view
        gc.collect()
        assert other == b"01234"
        other.release()
        assert len(mappings(inode)) == 1
    kept = memoryview(shm)
    shm.close()
    assert kept == b"01234"
    del kept
    gc.collect()
    assert mappings(inode) == []


def test_handle_that_nobody_kept_takes_its_mapping_with_it(segment, written):
    inode = inode_of(written)
    handle = SharedMemory(written.name)
    descriptor = handle.fd
    handle.buf.release()
    assert len(mappings(inode)) == 1
    del handle
    assert mappings(inode) == []
    os.close(descriptor)  # that of a constructor stays


# ---- read_only ----


class Buffer(ctypes.Structure):
    """Py_buffer, as the interpreter declares it."""

    _fields_ = (
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.c_void_p),
        ("len", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("format", ctypes.c_char_p),
        *((name, ctypes.c_void_p) for name in ("shape", "strides", "suboffsets", "internal")),
    )


@contextlib.contextmanager
def exported(shm, flags):
    """Ask for the buffer as C code does."""
    buffer = Buffer()
    buffer.obj = 1  # what a refused request has to clear
    try:
        ctypes.pythonapi.PyObject_GetBuffer(ctypes.py_object(shm), ctypes.byref(buffer), flags)
    except BaseException:
        assert buffer.obj is None
        raise
    yield buffer
    ctypes.pythonapi.PyBuffer_Release(ctypes.byref(buffer))
    assert buffer.obj is None


WRITABLE = 1
REQUESTS = {"SIMPLE": 0, "FORMAT": 4, "ND": 8, "STRIDES": 0x18, "C_CONTIGUOUS": 0x38, "F_CONTIGUOUS": 0x58,
            "ANY_CONTIGUOUS": 0x98, "INDIRECT": 0x118, "FULL_RO": 0x11C}  # fmt: skip


@pytest.mark.parametrize("request_name", REQUESTS)
@pytest.mark.parametrize("read_only", [False, True])
def test_every_request_of_the_protocol(segment, written, request_name, read_only):
    shm = segment(written.name, flags=0, read_only=read_only)
    inode, flags = inode_of(shm), REQUESTS[request_name]
    with exported(shm, flags) as buffer:
        assert (buffer.len, buffer.itemsize, buffer.readonly) == (10, 1, read_only)
        assert ctypes.string_at(buffer.buf, buffer.len) == DIGITS
        assert buffer.format == (b"B" if flags & 4 else None)
        assert (buffer.shape is not None, buffer.strides is not None) == (bool(flags & 8), flags & 0x18 == 0x18)
    if read_only:
        with pytest.raises(BufferError), exported(shm, flags | WRITABLE):
            pass
    else:
        with exported(shm, flags | WRITABLE) as buffer:
            ctypes.memset(buffer.buf, ord("x"), 1)
        assert os.pread(shm.fd, 2, 0) == b"x1"
    shm.close()
    if request_name != "ANY_CONTIGUOUS":
        assert mappings(inode) == []


def test_view_of_a_read_only_handle(segment, written, view_of):
    shm = segment(written.name, flags=0, read_only=True)
    inode = inode_of(shm)
    view = view_of(shm)
    assert view.readonly
    assert view == DIGITS
    with pytest.raises(TypeError):
        view[0] = 0
    with pytest.raises(TypeError):
        struct.pack_into("B", shm, 0, 1)
    with pytest.raises(TypeError):
        (ctypes.c_char * 10).from_buffer(shm)
    (line,) = mappings(inode)
    assert line.split()[1] == "r--s"  # the kernel refuses too, whatever is done with the address
    written.buf[0] = ord("x")
    assert view[0] == ord("x")


# ---- nothing to view ----


def test_empty_segment(segment, view_of):
    shm = segment(size=0)
    with pytest.raises(ValueError, match="empty") as caught:
        view_of(shm)
    assert shm.name in str(caught.value)
    assert mappings(inode_of(shm)) == []
    grow(shm, 3)
    assert view_of(shm) == bytes(3)


def test_segment_that_was_emptied(written, view_of):
    before = written.buf
    grow(written, 0)
    for _ in range(2):
        with pytest.raises(ValueError, match="empty"):
            view_of(written)
    assert before.nbytes == 10  # its bytes are gone: to touch them would be a SIGBUS
    grow(written, 5)
    assert view_of(written) == bytes(5)


def test_handle_that_was_never_opened(view_of):
    shm = SharedMemory.__new__(SharedMemory)
    with pytest.raises(ExistentialError) as caught:
        view_of(shm)
    assert (caught.value.errno, caught.value.name) == (None, None)
    assert shm.close() is None
    with shm as entered:
        assert entered is shm


@pytest.mark.parametrize("close", ["close", "close_fd"])
def test_first_view_after_closing(written, view_of, close):
    inode = inode_of(written)
    getattr(written, close)()
    for _ in range(2):
        with pytest.raises(ExistentialError, match="closed") as caught:
            view_of(written)
        assert (caught.value.errno, caught.value.name) == (errno.EBADF, written.name)
    assert mappings(inode) == []


def run_out_of_addresses(name):
    """RLIMIT_AS; afterwards the same handle works."""
    shm = SharedMemory(name, O_CREX, size=2**40)
    shm.unlink()
    inode = inode_of(shm)
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (2**39, before[1]))
    for view_of in WAYS_TO_VIEW.values():
        with pytest.raises(OSError, match=f"RLIMIT_AS is {2**39}") as caught:
            view_of(shm)
        assert (caught.value.errno, caught.value.filename) == (errno.ENOMEM, name)
        assert type(caught.value) is OSError
    assert mappings(inode) == []
    os.ftruncate(shm.fd, 10)
    small = shm.buf
    os.ftruncate(shm.fd, 2**40)
    with pytest.raises(OSError, match="RLIMIT_AS"):
        _ = shm.buf
    small[9] = 1  # a refused remapping leaves what was there
    assert len(mappings(inode)) == 1
    resource.setrlimit(resource.RLIMIT_AS, before)
    view = shm.buf
    view[2**40 - 1] = 1
    assert (view.nbytes, view[9]) == (2**40, 1)


@pytest.mark.skipif("asan" in os.environ.get("LD_PRELOAD", ""), reason="the sanitizer itself reserves terabytes")
def test_no_room_in_the_address_space(name):
    run_function(run_out_of_addresses, name)


# ---- close_fd() ----


@pytest.mark.parametrize("kept", [True, False], ids=("a view is out", "no view is out"))
def test_mapping_outlives_the_descriptor(written, view_of, kept):
    inode = inode_of(written)
    first = view_of(written)
    if not kept:
        first.release()
    written.close_fd()
    written.unlink()
    second = view_of(written)
    second[0] = ord("x")
    assert view_of(written) == b"x123456789"
    if kept:
        assert first == b"x123456789"
    assert len(mappings(inode)) == 1
    del first, second
    assert len(mappings(inode)) == 1  # it is the handle's until close()
    written.close()
    assert mappings(inode) == []
    with pytest.raises(ExistentialError):
        view_of(written)


def test_descriptor_closed_by_the_caller(written, view_of):
    """Programs call os.close(shm.fd) and drop the handle."""
    inode, view = inode_of(written), written.buf
    os.close(written.fd)
    with pytest.raises(ExistentialError):
        view_of(written)
    assert view == DIGITS
    with pytest.raises(ValueError, match=written.name):
        written.close()
    assert written.fd == -1
    assert written.close() is None
    assert view == DIGITS
    del view
    assert mappings(inode) == []


# ---- close() ----


def test_close_without_views(written):
    inode, descriptor = inode_of(written), written.fd
    written.buf.release()
    assert written.close() is None
    assert mappings(inode) == []
    assert written.fd == written.fileno() == -1
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)
    assert support.SHARED_MEMORY.exists(written.name)
    assert written.unlink() is None


@pytest.mark.parametrize("order", [(0, 1, 2, 3, 4), (4, 3, 2, 1, 0), (2, 0, 4, 1, 3)], ids=repr)
def test_memory_goes_exactly_with_the_last_view(written, order):
    inode = inode_of(written)
    views = dict(enumerate(derive(written.buf) for derive in DERIVED.values()))
    assert len(views) == len(order)
    written.close()
    assert written.fd == -1
    for number in order:
        assert len(mappings(inode)) == 1
        assert bytes(views[number])[:1] in (b"0", b"2")
        del views[number]
        gc.collect()
    assert mappings(inode) == []


def test_views_stay_writable_after_close(segment, written, view_of):
    peer = segment(written.name, flags=0)
    view = view_of(written)
    written.close()
    view[0] = ord("x")
    assert peer.buf[0] == ord("x")
    peer.buf[1] = ord("y")
    assert bytes(view[:3]) == b"xy2"
    view[2:4].cast("H")[0] = 0
    assert peer.buf[2:4] == b"\0\0"


@pytest.mark.parametrize("calls", [
    ("close", "close"), ("close_fd", "close"), ("close", "close_fd"), ("close", "__exit__"), ("__exit__", "close"),
])  # fmt: skip
@pytest.mark.parametrize("viewed", [False, True])
def test_second_close_does_nothing(written, calls, viewed):
    view = written.buf if viewed else None
    inode = inode_of(written)
    first, second = calls
    assert getattr(written, first)() is None
    replacement = os.open("/", os.O_RDONLY)  # on the lowest free number: a descriptor closed twice would be this one
    try:
        assert getattr(written, second)() is None
        os.fstat(replacement)
    finally:
        os.close(replacement)
    assert len(mappings(inode)) == viewed
    if viewed:
        assert view == DIGITS


def test_no_view_comes_from_a_closed_handle_although_others_are_out(written, view_of):
    view = written.buf
    written.close()
    with pytest.raises(ExistentialError):
        view_of(written)
    assert view == DIGITS


# ---- with ----


def test_with_closes(written):
    inode = inode_of(written)
    with written as entered:
        assert entered is written
        written.buf[0] = ord("x")
        assert len(mappings(inode)) == 1
    assert written.fd == -1
    assert mappings(inode) == []
    with pytest.raises(ExistentialError):
        _ = written.buf


@pytest.mark.parametrize("exception", [KeyError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("before", ["nothing", "close", "os.close"])
def test_exception_of_the_block_comes_through(written, exception, before):
    """Whatever closing has to say."""
    error = exception("of the block")
    inode, view = inode_of(written), written.buf
    with pytest.raises(exception) as caught, written:
        if before == "close":
            written.close()
        elif before == "os.close":
            os.close(written.fd)
        raise error
    assert caught.value is error
    assert error.__context__ is None
    assert written.fd == -1
    assert view == DIGITS
    del view
    assert mappings(inode) == []


def test_descriptor_closed_in_the_block_by_the_caller(written):
    """No exception is in the way here, so close() says what it found."""
    with pytest.raises(ValueError, match=written.name), written:
        os.close(written.fd)
    assert written.fd == -1


# ---- resizing ----


RESIZES = {
    "ftruncate": lambda shm, size: os.ftruncate(shm.fd, size),
    "another handle": lambda shm, size: SharedMemory(shm.name, size=size).close(),
}


@pytest.mark.parametrize("resize", RESIZES)
@pytest.mark.parametrize("sizes", [(10, 20), (10, 3 * PAGE_SIZE), (3 * PAGE_SIZE, 10), (20, 10)], ids=repr)
def test_new_view_after_a_resize(segment, view_of, resize, sizes):
    before, after = sizes
    shm = segment(size=before)
    inode = inode_of(shm)
    old = view_of(shm)
    old[:10] = DIGITS
    RESIZES[resize](shm, after)
    assert len(mappings(inode)) == 1
    new = view_of(shm)
    assert (old.nbytes, new.nbytes) == (before, after)
    assert len(mappings(inode)) == 2
    new[0], new[after - 1] = b"xz"
    assert old[0] == ord("x")
    assert bytes(old[1:9]) == bytes(new[1:9]) == DIGITS[1:9]
    assert os.pread(shm.fd, 1, after - 1) == b"z"
    assert view_of(shm).nbytes == after
    assert len(mappings(inode)) == 2
    del old
    assert len(mappings(inode)) == 1
    del new
    shm.close()
    assert mappings(inode) == []


def test_resize_there_and_back(written):
    inode = inode_of(written)
    first = written.buf
    grow(written, 20)
    second = written.buf
    grow(written, 10)
    third = written.buf
    assert [view.nbytes for view in (first, second, third)] == [10, 20, 10]
    third[0] = ord("x")
    assert first[0] == second[0] == ord("x")
    assert len(mappings(inode)) == 3
    del second
    assert len(mappings(inode)) == 2
    del first, third
    assert len(mappings(inode)) == 1


def test_resizing_often_leaks_no_mapping(written):
    inode = inode_of(written)
    for round in range(300):
        grow(written, 10 + round % 7 * PAGE_SIZE)
        written.buf[0] = 1
        assert len(mappings(inode)) == 1
    held = []
    for round in range(50):
        grow(written, PAGE_SIZE * (round + 1))
        held.append(written.buf)
    assert len(mappings(inode)) == 50
    assert [view.nbytes for view in held] == [PAGE_SIZE * (round + 1) for round in range(50)]
    random.Random(1).shuffle(held)
    while held:
        held.pop()
        assert len(mappings(inode)) in (len(held), len(held) + 1)  # and that of the handle
    assert len(mappings(inode)) == 1
    written.close()
    assert mappings(inode) == []


def test_close_after_a_resize_lets_go_of_everything(written):
    inode = inode_of(written)
    old = written.buf
    grow(written, 20)
    new = written.buf
    grow(written, 30)
    written.close()
    assert len(mappings(inode)) == 2
    del new
    assert len(mappings(inode)) == 1
    assert old == DIGITS
    del old
    assert mappings(inode) == []


# ---- __init__ again ----


@pytest.mark.parametrize("viewed", [False, True])
@pytest.mark.parametrize("read_only", [False, True])
@pytest.mark.ipc_leaks(fds=False)
def test_handle_opened_anew(segment, written, view_of, viewed, read_only):
    other = segment(size=5)
    shm = SharedMemory(written.name)
    old_inode, new_inode = inode_of(written), inode_of(other)
    view = view_of(shm)
    if not viewed:
        view.release()
    shm.__init__(other.name, read_only=read_only)
    assert len(mappings(old_inode)) == viewed
    assert mappings(new_inode) == []
    new = view_of(shm)
    assert new == bytes(5)
    assert new.readonly is read_only
    if viewed:
        view[0] = ord("x")
        assert written.buf[0] == ord("x")
        assert not view.readonly
        del written
        written = None
    del view, new
    shm.close()
    assert mappings(new_inode) == []


def test_failing_init_leaves_the_views(written, names, view_of):
    inode, view = inode_of(written), written.buf
    for arguments, error in (((names(),), ExistentialError), ((3,), TypeError), (("/",), ValueError)):
        with pytest.raises(error):
            written.__init__(*arguments)
        assert view == view_of(written) == DIGITS
        assert len(mappings(inode)) == 1


def test_handle_opened_anew_after_close(written, view_of):
    view = written.buf
    written.close()
    written.__init__(written.name)
    view_of(written)[0] = ord("x")
    assert view[0] == ord("x")
    assert len(mappings(inode_of(written))) == 2


# ---- copies ----


@pytest.mark.parametrize("read_only", [False, True])
@pytest.mark.parametrize("way", [copy.copy, lambda shm: pickle.loads(pickle.dumps(shm))], ids=("copy", "pickle"))
def test_copied_handle(segment, written, view_of, way, read_only):
    shm = segment(written.name, flags=0, read_only=read_only)
    inode, original = inode_of(shm), view_of(shm)
    duplicate = way(shm)  # a view that is out is in nobody's way
    assert len(mappings(inode)) == 1  # a handle has its own
    view = view_of(duplicate)
    assert view.readonly is read_only
    assert len(mappings(inode)) == 2
    written.buf[0] = ord("x")
    assert view[0] == original[0] == ord("x")
    written.close()
    shm.close()
    assert view[0] == original[0] == ord("x")
    del original
    assert len(mappings(inode)) == 1
    del duplicate
    assert view[9] == ord("9")
    del view
    assert mappings(inode) == []


# ---- processes ----


def view_in_a_forked_child(name):
    shm = SharedMemory(name, O_CREX, size=10)
    shm.unlink()
    inode, view = inode_of(shm), shm.buf
    view[:] = DIGITS
    child = os.fork()
    if child == 0:
        try:
            assert view == DIGITS
            view[0] = ord("c")
            shm.buf[1] = ord("d")  # through the mapping that was inherited
            assert len(mappings(inode)) == 1
            shm.close()
            assert len(mappings(inode)) == 1
            view[2] = ord("e")
            del view
            assert mappings(inode) == []
            os._exit(0)
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    assert view == shm.buf == b"cde3456789"
    assert len(mappings(inode)) == 1


def test_forked_child_with_an_inherited_view(name):
    run_function(view_in_a_forked_child, name)


@pytest.mark.parametrize("kept", ["handle, view", "view", "slice, view, handle", "handle.buf, handle, view, view"])
def test_interpreter_ends_quietly_with_views_out(name, kept):
    code = (
        "import sys, posix_ipc\n"
        "handle = posix_ipc.SharedMemory(sys.argv[1], posix_ipc.O_CREX, size=100)\n"
        "handle.unlink()\n"
        "view = handle.buf\n"
        "slice = view[10:20]\n"
        "sys.keeper = [eval(sys.argv[2])]\n"
        "sys.keeper.append(sys.keeper)\n"
    )
    child = run_python(code, name, kept, env={"PYTHONDEVMODE": "1"})
    assert (child.stdout, child.stderr) == ("", "")


# ---- threads ----


def storm(name, seed, threads, times):
    """Threads view, close, resize and reopen one handle at once: every view shows the segment, and nothing stays."""
    sys.setswitchinterval(1e-6)
    shm = SharedMemory(name, O_CREX, size=PAGE_SIZE)
    inode, path = inode_of(shm), support.SHARED_MEMORY.file_of(name)
    os.pwrite(shm.fd, DIGITS, 0)
    sizes = [PAGE_SIZE * pages for pages in (1, 2, 3)]

    def look(handle=shm):
        view = handle.buf
        assert view.nbytes in sizes
        assert bytes(view[:10]) == DIGITS  # what no resize takes away
        return view

    def keep(kept):
        kept.append(look())
        if len(kept) > 3:
            assert bytes(kept.pop(0)[:10]) == DIGITS

    def reopen():
        shm.close()
        shm.__init__(name)

    def work(number):
        chooser, kept = random.Random(f"{seed} {number}"), []
        operations = [
            *(look, look, reopen, reopen, shm.close, shm.close_fd),
            lambda: struct.unpack_from("10s", shm),  # not more: the rest may be cut off at any time
            lambda: keep(kept),
            lambda: keep(kept),
            lambda: shm.__init__(name, O_CREAT, read_only=chooser.random() < 0.5),
            lambda: os.truncate(path, chooser.choice(sizes)),
            lambda: os.truncate(path, chooser.choice(sizes)),
            lambda: look(copy.copy(shm)),
            lambda: shm.__exit__(None, None, None),
        ]
        for operation in chooser.choices(operations, k=times):
            with contextlib.suppress(ExistentialError):  # it is closed, or somebody closes it
                operation()

    try:
        run_threads(*(lambda number=number: work(number) for number in range(threads)))
        gc.collect()
        shm.close()
        assert mappings(inode) == []
        shm.__init__(name)
        look()
    finally:
        os.unlink(path)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_a_storm_of_views_on_one_handle(name, seed):
    run_function(storm, name, seed, 4, 400)


def let_go_together(name, rounds):
    """Threads go through the same handles and views one after the other, so that they meet again and again."""
    sys.setswitchinterval(1e-6)
    shm = SharedMemory(name, O_CREX, size=10)
    inode = inode_of(shm)
    os.pwrite(shm.fd, DIGITS, 0)

    def each(call, items):
        def loop():
            for item in items:
                call(item)

        return loop

    def close(handle):
        handle.close()  # ValueError if another thread closed the same number

    def look(handle):
        with contextlib.suppress(ExistentialError):
            assert handle.buf == DIGITS

    for _ in range(rounds):
        # The views of one mapping, released by four threads; whoever miscounts leaves it mapped or takes it too early.
        shares = [[shm.buf for _ in range(500)] for _ in range(4)]
        run_threads(*(each(memoryview.release, share) for share in shares), each(look, [shm] * 500))
        assert len(mappings(inode)) == 1
        shm.close()
        assert mappings(inode) == []
        shm.__init__(name)
        # Handles closed by two threads while others look.
        handles = [copy.copy(shm) for _ in range(100)]
        views = [handle.buf for handle in handles[::2]]
        run_threads(*[each(close, handles)] * 2, *[each(look, handles)] * 2)
        assert [bytes(view) for view in views] == [DIGITS] * 50
        del views[:]
        assert mappings(inode) == []
        assert sum(name in target for target in support.open_fds().values()) == 1
        # Handles opened anew by two threads.
        handles = [copy.copy(shm) for _ in range(20)]
        views = [handle.buf for handle in handles]
        run_threads(*[each(lambda handle: handle.__init__(name), handles)] * 2, *[each(look, handles)] * 2)
        del views[:]
        for handle in handles:
            handle.close()
        assert mappings(inode) == []
        for descriptor, target in support.open_fds().items():  # those of constructors, which __init__ replaced
            if name in target and descriptor != shm.fd:
                os.close(descriptor)
    shm.unlink()


@pytest.mark.slow
def test_threads_let_go_at_the_same_time(name):
    run_function(let_go_together, name, 5)


def first_view_together(name):
    """Threads that look first at the same time share one mapping."""
    sys.setswitchinterval(1e-6)
    shm = SharedMemory(name, O_CREX, size=10)
    shm.unlink()
    inode = inode_of(shm)
    for size in range(10, 110):
        os.ftruncate(shm.fd, size)
        views = []
        run_threads(*[lambda: views.append(shm.buf)] * 4)  # noqa: B023
        assert [view.nbytes for view in views] == [size] * 4
        assert len(mappings(inode)) == 1
        views.clear()


def test_threads_look_first_at_the_same_time(name):
    run_function(first_view_together, name)


# ---- numpy ----


@pytest.fixture
def numpy():
    return pytest.importorskip("numpy")


def numpy_ways():
    """A test that gets one asks for the fixture first; these are looked up by name where numpy may be missing."""
    import numpy

    return {
        "frombuffer": lambda shm: numpy.frombuffer(shm, "u1"),
        "frombuffer of buf": lambda shm: numpy.frombuffer(shm.buf, "u1"),
        "asarray": numpy.asarray,
        "array without a copy": lambda shm: numpy.array(shm.buf, copy=False),
        "ndarray": lambda shm: numpy.ndarray((10,), "u1", buffer=shm),
        "ndarray of buf": lambda shm: numpy.ndarray((10,), "u1", buffer=shm.buf),
    }


ARRAYS = ("frombuffer", "frombuffer of buf", "asarray", "array without a copy", "ndarray", "ndarray of buf")


@pytest.mark.parametrize("way", ARRAYS)
@pytest.mark.parametrize("read_only", [False, True])
def test_array_is_the_memory_itself(numpy, segment, written, way, read_only):
    shm = segment(written.name, flags=0, read_only=read_only)
    array = numpy_ways()[way](shm)
    assert (array.shape, array.dtype, array.flags.writeable) == ((10,), numpy.uint8, not read_only)
    assert array.tobytes() == DIGITS
    os.pwrite(written.fd, b"x", 0)
    assert array[0] == ord("x")
    if read_only:
        with pytest.raises(ValueError, match="read-only"):
            array[1] = 0
    else:
        array[1:3] = 255
        assert os.pread(written.fd, 4, 0) == b"x\xff\xff3"


def test_array_of_another_shape_and_type(numpy, segment):
    shm = segment(size=2 * 3 * 8 + 8)
    array = numpy.ndarray((2, 3), "f8", buffer=shm, offset=8)
    array[1, 2] = 2.5
    assert struct.unpack_from("d", shm, 8 + 5 * 8) == (2.5,)
    assert numpy.frombuffer(shm)[-1] == 2.5
    with pytest.raises(TypeError, match="too small"):
        numpy.ndarray((2, 4), "f8", buffer=shm, offset=8)


def use_an_array_after_close(way, shm, name):
    shm.close()
    with pytest.raises(ExistentialError):
        memoryview(shm)


def use_an_array_after_a_resize(way, shm, name):
    os.ftruncate(shm.fd, 20)
    assert memoryview(shm).nbytes == 20


def use_an_array_after_opening_elsewhere(way, shm, name):
    shm.__init__(name, O_CREX, size=10)
    shm.unlink()
    assert memoryview(shm) == bytes(10)


def use_arrays(way, name):
    """An array stays what it was, whatever becomes of the handle, and its memory goes with it."""
    import numpy

    for event in (use_an_array_after_close, use_an_array_after_a_resize, use_an_array_after_opening_elsewhere):
        shm = SharedMemory(name, O_CREX, size=10)
        shm.unlink()
        inode = inode_of(shm)
        shm.buf[:] = DIGITS
        array = numpy_ways()[way](shm)
        event(way, shm, name)
        # Memory that was unmapped too early may be given to another mapping, whose content must not show here.
        others = [numpy.ones(2**20, "u1") for _ in range(20)]
        assert array.tobytes() == DIGITS, event
        array[0] = ord("x")
        part = array[2:4]
        del array, others
        assert part.tobytes() == b"23", event
        assert len(mappings(inode)) >= 1
        del part
        shm.close()
        if way == "ndarray":  # it holds nothing but the handle, which therefore has to hold the memory
            del shm
        assert mappings(inode) == [], event


@pytest.mark.slow
@pytest.mark.parametrize("way", ARRAYS)
def test_array_never_dangles(numpy, name, way):
    run_function(use_arrays, way, name)


def memory_of(pid):
    """Return (bytes of shared memory, bytes of its own) that are resident for a process."""
    with open(f"/proc/{pid}/status") as status:
        fields = dict(line.split(":", 1) for line in status)
    return [int(fields[name].split()[0]) * 1024 for name in ("RssShmem", "RssAnon")]


GIB = 2**30

HALF_CODE = """
import os, sys, numpy, posix_ipc
shm = posix_ipc.SharedMemory(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
array = numpy.frombuffer(shm, "u8")
if sys.argv[2] == "writer":
    array[:] = 7
print(int(array.sum()), flush=True)
sys.stdin.readline()
"""


@pytest.mark.slow
def test_gibibyte_is_viewed_in_two_processes_without_a_copy(numpy, segment):
    """Each has all of it resident as shared memory, neither has more of its own than before, and it is there once."""
    facts = os.statvfs("/dev/shm")
    if facts.f_bavail * facts.f_frsize < 1.5 * GIB:
        pytest.skip("needs 1.5 GiB of free room in /dev/shm")
    shm = segment(size=GIB)
    with (
        support.start_python(HALF_CODE, shm.name, "writer") as writer,
        support.start_python(HALF_CODE, shm.name, "reader") as reader,
    ):
        children = (writer, reader)
        for child in children:
            support.wait_until_ready(child)
        before = [memory_of(child.pid) for child in children]
        assert os.fstat(shm.fd).st_blocks == 0
        for child in children:  # one after the other: the reader sees what the writer wrote
            child.stdin.write("go\n")
            child.stdin.flush()
            assert child.stdout.readline() == f"{GIB // 8 * 7}\n"
        after = [memory_of(child.pid) for child in children]
        for (shared, own), (shared_before, own_before) in zip(after, before, strict=True):
            assert GIB <= shared - shared_before < 1.01 * GIB
            assert own - own_before < GIB / 100
        assert os.fstat(shm.fd).st_blocks * 512 == GIB
        for child in children:
            support.finish(child)
