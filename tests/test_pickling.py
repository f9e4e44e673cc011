"""Pickling is by name: loading opens the object that was meant, or says why it cannot, and creates nothing."""

import copy
import copyreg
import errno
import gc
import os
import pickle
import pickletools
import random
import stat
import struct

import pytest
import support
from support import CLONE_NEWIPC, CLONE_NEWNS, KINDS, MESSAGE_QUEUE, SEMAPHORE, SHARED_MEMORY, open_fds

import posix_ipc
from posix_ipc import BusyError, ExistentialError, PermissionsError, Semaphore, SharedMemory
from posix_ipc._ext import _rebuild

PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)
KIND_NAMES = [kind.type.__name__ for kind in KINDS]


def kind_named(name):
    return next(kind for kind in KINDS if kind.type.__name__ == name)


def reload(handle, protocol=None):
    return pickle.loads(pickle.dumps(handle, protocol))


def is_same_object(handle, other):
    """Does what one handle does show through the other?"""
    if isinstance(handle, Semaphore):
        before = other.value
        handle.release()
        return other.value == before + 1
    if isinstance(handle, SharedMemory):
        return os.path.samestat(os.fstat(handle.fd), os.fstat(other.fd))
    before = other.current_messages
    handle.send(b"x", 0)
    return other.current_messages == before + 1


def descriptor_of(handle):
    return handle.fd if isinstance(handle, SharedMemory) else handle.mqd


# Ways to a second handle on the same object.
WAYS = {f"protocol {protocol}": lambda handle, p=protocol: reload(handle, p) for protocol in PROTOCOLS}
WAYS |= {"copy": copy.copy, "deepcopy": copy.deepcopy}


@pytest.fixture(params=WAYS)
def way(request):
    return WAYS[request.param]


# ---- the same object, in a second handle ----


def test_second_handle_leads_to_the_same_object(way, make):
    handle = make(mode=0o640)
    second = way(handle)
    assert second is not handle
    assert type(second) is type(handle)
    assert (second.name, second.mode, repr(second)) == (handle.name, handle.mode, repr(handle))
    assert is_same_object(handle, second)
    assert is_same_object(second, handle)


def test_copies_of_copies(way, make):
    handle = make()
    last = way(way(way(handle)))
    assert is_same_object(handle, last)


def test_second_handle_is_closed_alone(way, kind, make):
    handle = make()
    second = way(handle)
    kind.close_handle(second)
    with pytest.raises(ExistentialError):
        reload(second)
    assert is_same_object(handle, way(handle))


def test_second_handle_unlinks(way, kind, make):
    handle = make()
    way(handle).unlink()
    assert not kind.exists(handle.name)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_pickle_names_only_the_type_and_the_function(protocol, make):
    """What a reader of pickles must allow, so that nobody has to allow more."""
    handle = make()
    function, arguments = handle.__reduce_ex__(protocol)[:2]
    assert function is _rebuild
    assert arguments[:2] == (type(handle), handle.name)
    text = [argument for _, argument, _ in pickletools.genops(pickle.dumps(handle, protocol)) if argument]
    named = {str(argument).replace(" ", ".") for argument in text if "posix_ipc" in str(argument)}
    assert named in (
        {"posix_ipc._ext._rebuild", f"posix_ipc.{type(handle).__name__}"},  # to protocol 3
        {"posix_ipc._ext", "posix_ipc"},  # the names stand apart
    )


def test_one_pickle_many_handles(make):
    """References within one pickle stay references; each loading makes handles anew."""
    handle = make()
    first, second = reload([handle, handle])
    assert first is second
    pickled = pickle.dumps(handle)
    handles = [pickle.loads(pickled) for _ in range(20)]
    assert len({id(each) for each in handles}) == 20
    assert all(is_same_object(handle, each) for each in handles[:1])


# ---- options ----


@pytest.mark.parametrize("read_only", [False, True])
def test_segment_keeps_read_only(way, segment, read_only):
    name = segment().name
    second = way(segment(name, 0, read_only=read_only))
    if read_only:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.pwrite(second.fd, b"x", 0)
    else:
        os.pwrite(second.fd, b"x", 0)
    assert second.size == 64


@pytest.mark.parametrize("block", [True, False])
@pytest.mark.parametrize(("read", "write"), [(True, True), (True, False), (False, True)])
def test_queue_keeps_its_options(way, queue, read, write, block):
    name = queue().name
    handle = queue(name, 0, read=read, write=write)
    handle.block = block
    second = way(handle)
    assert repr(second) == repr(handle)
    assert second.block is block
    second.block = not block  # belongs to one opening of the queue, so the two differ from here on
    assert handle.block is block
    outcomes = []
    for call in (lambda: second.send(b"x", 0), lambda: second.receive(0)):
        try:
            outcomes.append(call())
        except posix_ipc.Error as error:
            outcomes.append(type(error))
    assert outcomes == [
        None if write else PermissionsError,
        PermissionsError if not read else (b"x", 0) if write else BusyError,
    ]


def test_queue_opened_without_blocking_stays_so(way, queue):
    handle = queue(flags=posix_ipc.O_CREX | posix_ipc.O_NONBLOCK)
    assert way(handle).block is False


@pytest.mark.parametrize("mode", [0, 0o600, 0o666, 0o1777])
def test_mode_is_kept_as_given(way, make, mode):
    if mode != 0 or os.getuid() == 0:
        assert way(make(mode=mode)).mode == mode


# ---- subclasses ----


class Plain:
    """Below: one mixin for each way in which a class can have state."""

    __slots__ = ()


class WithDict(Plain):
    def __init__(self, colour, name, **options):
        super().__init__(name, posix_ipc.O_CREX, **options)
        self.colour = colour
        self.others = [self]

    def state(self):
        return self.colour, len(self.others)


class WithSlots(Plain):
    __slots__ = ()  # those below are of the class that is mixed: two bases cannot both have some
    slots = ("colour", "unset")

    def __init__(self, colour, name, **options):
        super().__init__(name, posix_ipc.O_CREX, **options)
        self.colour = colour

    def state(self):
        return self.colour, hasattr(self, "unset"), getattr(self, "__dict__", {})


class WithSlotsAndDict(WithSlots):
    __slots__ = ()
    slots = ("colour", "unset", "__dict__")

    def __init__(self, colour, name, **options):
        super().__init__(colour, name, **options)
        self.more = {"of": colour}


class WithGetstate(Plain):
    """It says for itself what is kept."""

    def __init__(self, colour, name, **options):
        super().__init__(name, posix_ipc.O_CREX, **options)
        self.colour, self.cache = colour, object()

    def __getstate__(self):
        return [self.colour]

    def __setstate__(self, state):
        (self.colour,) = state
        self.cache = None

    def state(self):
        return self.colour


class WithNew(Plain):
    """`__new__` runs for each handle, without arguments when it is loaded; `__init__` does not."""

    def __new__(cls, *args, **kwargs):
        self = super().__new__(cls, *args, **kwargs)
        self.arguments = len(args)
        return self

    def __init__(self, colour, name, **options):
        super().__init__(name, posix_ipc.O_CREX, **options)
        self.colour = colour

    def __getstate__(self):
        return {"colour": self.colour}

    def state(self):
        return self.colour


MIXINS = [WithDict, WithSlots, WithSlotsAndDict, WithGetstate, WithNew]


def _subclass(mixin, kind):
    """Give the class a place in this module, where pickle looks for it."""
    name = f"{mixin.__name__}{kind.type.__name__}"
    namespace = {"__module__": __name__, "__qualname__": name}
    if hasattr(mixin, "slots"):
        namespace["__slots__"] = mixin.slots
    return globals().setdefault(name, type(name, (mixin, kind.type), namespace))


SUBCLASSES = {(mixin, kind.type): _subclass(mixin, kind) for mixin in MIXINS for kind in KINDS}


@pytest.fixture(params=MIXINS, ids=lambda mixin: mixin.__name__)
def subclass_handle(request, kind, name):
    handle = SUBCLASSES[request.param, kind.type]("red", name, **kind.options)
    yield handle
    kind.close_handle(handle)
    kind.remove(name)


def test_subclass_keeps_its_state(way, subclass_handle):
    second = way(subclass_handle)
    assert type(second) is type(subclass_handle)
    assert second.name == subclass_handle.name
    assert second.state() == subclass_handle.state()
    assert is_same_object(subclass_handle, second)


def test_subclass_init_is_not_called(way, subclass_handle, monkeypatch):
    def init(self, *args, **kwargs):
        raise AssertionError("__init__ was called")

    monkeypatch.setattr(type(subclass_handle), "__init__", init)
    assert way(subclass_handle).state() == subclass_handle.state()


def test_subclass_new_is_called_without_arguments(way, kind, name):
    handle = SUBCLASSES[WithNew, kind.type]("red", name, **kind.options)
    assert handle.arguments == 2
    assert way(handle).arguments == 0
    kind.close_handle(handle)
    handle.unlink()


def test_state_that_refers_to_the_handle_itself(kind, name):
    handle = SUBCLASSES[WithDict, kind.type]("red", name, **kind.options)
    for second in (reload(handle), copy.deepcopy(handle)):
        assert second.others[0] is second
    assert copy.copy(handle).others is handle.others
    kind.close_handle(handle)
    handle.unlink()


def test_deepcopy_copies_the_state_deep(kind, name):
    handle = SUBCLASSES[WithDict, kind.type](["red"], name, **kind.options)
    shallow, deep = copy.copy(handle), copy.deepcopy(handle)
    assert shallow.colour is handle.colour
    assert deep.colour == handle.colour
    assert deep.colour is not handle.colour
    kind.close_handle(handle)
    handle.unlink()


def test_copyreg_is_heard(kind, make, monkeypatch):
    """The standard library's way to replace how a type is pickled."""
    handle = make()
    monkeypatch.setitem(copyreg.dispatch_table, kind.type, lambda handle: (str, (handle.name,)))
    assert reload(handle) == handle.name


# ---- what cannot be pickled ----


def test_closed_handle_is_refused(way, kind, make):
    handle = make()
    kind.close_handle(handle)
    with pytest.raises(ExistentialError) as caught:
        way(handle)
    assert caught.value.errno == errno.EBADF
    assert caught.value.name == handle.name
    assert kind.exists(handle.name)


def test_uninitialised_handle_is_refused(way, kind):
    with pytest.raises(ExistentialError) as caught:
        way(kind.type.__new__(kind.type))
    assert caught.value.name is None


def test_handle_whose_init_failed_is_refused(way, kind, name):
    handle = kind.type.__new__(kind.type)
    with pytest.raises(ExistentialError):
        handle.__init__(name)
    with pytest.raises(ExistentialError):
        way(handle)


# ---- gone, another, elsewhere ----


def load_fails(pickled, number, words):
    """Loading raises ExistentialError, which says why, and leaves no descriptor."""
    before = open_fds()
    with pytest.raises(ExistentialError, match=words) as caught:
        pickle.loads(pickled)
    assert caught.value.errno == number
    assert caught.value.name
    assert repr(caught.value.name) in str(caught.value)
    assert open_fds() == before


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_name_is_gone(protocol, kind, make):
    handle = make()
    pickled = pickle.dumps(handle, protocol)
    handle.unlink()
    load_fails(pickled, errno.ENOENT, "is gone")
    assert not kind.exists(handle.name)


def test_name_is_gone_although_the_object_is_in_use(make):
    """The handle from before the unlinking still works, and its pickle does not."""
    handle = make()
    handle.unlink()
    load_fails(pickle.dumps(handle), errno.ENOENT, "is gone")
    assert is_same_object(handle, handle)


@pytest.mark.no_portable
@pytest.mark.parametrize("times", [1, 20])
def test_name_leads_to_another_object(kind, make, times):
    handle = make()
    pickled = pickle.dumps(handle)
    kind.close_handle(handle)
    for _ in range(times):  # often, in case the system hands the number of the old one out again
        kind.remove(handle.name)
        other = make(handle.name)
    before = state_of(other)
    load_fails(pickled, errno.ESTALE, "another object")
    assert state_of(other) == before
    assert reload(other).name == other.name


def state_of(handle):
    if isinstance(handle, Semaphore):
        return handle.value
    if isinstance(handle, SharedMemory):
        return handle.size, os.pread(handle.fd, 100, 0)
    return handle.current_messages


@pytest.mark.no_portable
@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind_name", "options"), [("SharedMemory", {"read_only": True}), ("SharedMemory", {}), ("Semaphore", {})]
)
@pytest.mark.parametrize("intruder", ["fifo", "directory", "symbolic link", "empty file"])
def test_name_leads_to_something_else(kind_name, options, intruder, names):
    """Somebody put into /dev/shm what none of us makes: a typed error at once, and it is left alone."""
    support.run_function(load_from_intruder, kind_name, options, intruder, names(), names(), timeout=30)


def load_from_intruder(kind_name, options, intruder, name, other):
    kind = kind_named(kind_name)
    kind.create(name)
    kind.create(other)
    pickled = pickle.dumps(kind.type(name, **options))
    path = kind.file_of(name)
    try:
        os.unlink(path)
        if intruder == "fifo":
            os.mkfifo(path)
        elif intruder == "directory":
            os.mkdir(path)
        elif intruder == "symbolic link":
            os.symlink(kind.file_of(other), path)
        else:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL, 0o600))
        before, fds = os.lstat(path), open_fds()
        with pytest.raises((posix_ipc.Error, OSError, ValueError)) as caught:  # ValueError: glibc on a directory
            pickle.loads(pickled)
        assert repr(name) in str(caught.value)
        assert open_fds() == fds
        after = os.lstat(path)
        assert (after.st_ino, after.st_size, after.st_mtime_ns) == (before.st_ino, before.st_size, before.st_mtime_ns)
    finally:
        os.rmdir(path) if intruder == "directory" else os.unlink(path)
        kind.remove(other)


BOOT_ID = slice(0, 16)  # of the identity that a pickle carries


def forge_boot_id(handle, boot_id):
    function, arguments = handle.__reduce__()[:2]
    cls, name, identity, *rest = arguments
    assert len(identity[BOOT_ID]) == len(boot_id)
    return function, (cls, name, boot_id + identity[16:], *rest)


def test_boot_id_is_that_of_the_kernel(make):
    """So that the forgery below stands for a real other host."""
    with open("/proc/sys/kernel/random/boot_id") as file:
        expected = bytes.fromhex(file.read().strip().replace("-", ""))
    assert make().__reduce__()[1][2][BOOT_ID] == expected


@pytest.mark.parametrize("gone", [False, True])
def test_made_on_another_host(kind, make, gone):
    """Even where the name exists: it can only be another object."""
    handle = make()
    function, arguments = forge_boot_id(handle, b"another kernel's")
    if gone:
        handle.unlink()
    before = open_fds()
    with pytest.raises(ExistentialError, match="another host") as caught:
        function(*arguments)
    assert caught.value.errno == errno.ESTALE
    assert caught.value.name == handle.name
    assert open_fds() == before
    assert kind.exists(handle.name) is not gone


def test_host_that_did_not_know_its_boot_id(make):
    """In some containers there is no /proc: the rest of the identity decides."""
    handle = make()
    function, arguments = forge_boot_id(handle, bytes(16))
    assert is_same_object(handle, function(*arguments))


def load_in_other_mounts(kind_name, pickled, name, recreate):
    kind = kind_named(kind_name)
    support.enter_new_namespaces(CLONE_NEWNS)
    assert pickle.loads(pickled).name == name  # another namespace, but the same /dev/shm
    support.mount_shm("size=1m")
    assert os.listdir("/dev/shm") == []
    if recreate:
        kind.create(name)
    load_fails(pickled, errno.ESTALE, "mount namespace")
    assert len(os.listdir("/dev/shm")) == recreate


@pytest.mark.no_portable
@pytest.mark.slow
@pytest.mark.parametrize("recreate", [False, True])
@pytest.mark.parametrize("kind_name", ["Semaphore", "SharedMemory"])
def test_made_in_another_mount_namespace(kind_name, recreate, request):
    handle = request.getfixturevalue({"Semaphore": "semaphore", "SharedMemory": "segment"}[kind_name])()
    support.run_function(load_in_other_mounts, kind_name, pickle.dumps(handle), handle.name, recreate)
    assert is_same_object(handle, reload(handle))


def load_in_other_ipc(pickled, name, recreate):
    support.enter_new_namespaces(CLONE_NEWIPC)
    if recreate:
        MESSAGE_QUEUE.create(name)
    load_fails(pickled, errno.ESTALE, "IPC namespace")
    assert MESSAGE_QUEUE.exists(name) is recreate


@pytest.mark.parametrize("recreate", [False, True])
def test_made_in_another_ipc_namespace(recreate, queue):
    handle = queue()
    support.run_function(load_in_other_ipc, pickle.dumps(handle), handle.name, recreate)
    assert is_same_object(handle, reload(handle))


def load_files_in_other_ipc(*pickles):
    """Segments and semaphores do not care: they are files."""
    support.enter_new_namespaces(CLONE_NEWIPC)
    for pickled in pickles:
        pickle.loads(pickled)


def test_files_are_found_in_another_ipc_namespace(semaphore, segment):
    support.run_function(load_files_in_other_ipc, pickle.dumps(semaphore()), pickle.dumps(segment()))


# ---- whose descriptor ----


def collect():
    gc.collect()  # where the reference count alone does not do it


def mapped(name):
    return len(support.mappings(os.stat(SEMAPHORE.file_of(name)).st_ino))


@pytest.mark.no_portable
def test_loaded_handle_is_closed_with_its_object(way, kind, make):
    handle = make()
    before = open_fds(), mapped(handle.name) if kind is SEMAPHORE else None
    second = way(handle)
    assert (open_fds(), mapped(handle.name) if kind is SEMAPHORE else None) != before
    del second
    collect()
    assert (open_fds(), mapped(handle.name) if kind is SEMAPHORE else None) == before


@pytest.fixture(params=[SHARED_MEMORY, MESSAGE_QUEUE], ids=lambda kind: kind.type.__name__)
def kind_with_descriptor(request):
    return request.param


@pytest.fixture
def make_with_descriptor(kind_with_descriptor, request):
    return request.getfixturevalue({SHARED_MEMORY: "segment", MESSAGE_QUEUE: "queue"}[kind_with_descriptor])


def test_handle_of_a_constructor_is_not(make_with_descriptor):
    """Programs pass its number on and drop the object."""
    name = make_with_descriptor().name
    handle = type(make_with_descriptor(name, 0))(name)  # in no other hands
    number = descriptor_of(handle)
    target = open_fds()[number]
    del handle
    collect()
    assert open_fds()[number] == target
    os.close(number)


def test_handle_that_was_opened_anew_is_a_constructor_s(make_with_descriptor):
    """`__init__` on a loaded handle: the loaded descriptor goes, the new one stays like any other."""
    first, other = make_with_descriptor(), make_with_descriptor()
    before = open_fds()
    handle = reload(first)
    handle.__init__(other.name)
    number = descriptor_of(handle)
    assert len(open_fds()) == len(before) + 1
    del handle
    collect()
    assert other.name[1:] in open_fds()[number]
    os.close(number)
    assert open_fds() == before


def strangers_for(kind, make):
    read_end, write_end = os.pipe()
    os.close(write_end)
    file = os.open("/dev/null", os.O_RDONLY)
    return {"pipe": read_end, "file": file, "other object of the kind": descriptor_of(make())}


@pytest.mark.parametrize("stranger", ["pipe", "file", "other object of the kind"])
@pytest.mark.parametrize("end", ["collected", "opened anew"])
def test_descriptor_that_became_a_strangers_is_left_alone(stranger, end, kind_with_descriptor, make_with_descriptor):
    """Somebody closed the number behind the handle's back, and somebody else was given it."""
    handle = make_with_descriptor()
    loaded = reload(handle)
    number = descriptor_of(loaded)
    strangers = strangers_for(kind_with_descriptor, make_with_descriptor)
    os.dup2(strangers[stranger], number, inheritable=False)
    if end == "opened anew":
        loaded.__init__(handle.name)
        os.close(descriptor_of(loaded))
    del loaded
    collect()
    try:
        assert os.path.samestat(os.fstat(number), os.fstat(strangers[stranger]))
    finally:
        os.close(number)
        os.close(strangers["pipe"])
        os.close(strangers["file"])


def test_descriptor_that_is_closed_already(make_with_descriptor):
    handle = make_with_descriptor()
    before = open_fds()
    loaded = reload(handle)
    os.close(descriptor_of(loaded))
    del loaded
    collect()
    assert open_fds() == before


def test_explicit_close_of_a_loaded_handle_is_final(kind_with_descriptor, make_with_descriptor):
    loaded = reload(make_with_descriptor())
    number = descriptor_of(loaded)
    kind_with_descriptor.close_handle(loaded)
    read_end, write_end = os.pipe()
    os.dup2(read_end, number, inheritable=False) if number not in (read_end, write_end) else None
    del loaded
    collect()
    assert stat.S_ISFIFO(os.fstat(number).st_mode)
    for each in {read_end, write_end, number}:
        os.close(each)


@pytest.mark.slow
def test_many_loads_stay_flat(make):
    """A worker attaches afresh for each of its tasks (the full length of this is a stress test)."""
    handle = make()
    pickled = pickle.dumps(handle)
    pickle.loads(pickled)
    with open("/proc/self/maps") as maps:
        before = open_fds(), len(maps.readlines())
    for _ in range(3000):
        pickle.loads(pickled)
    collect()
    with open("/proc/self/maps") as maps:
        after = open_fds(), len(maps.readlines())
    assert after[0] == before[0]
    assert abs(after[1] - before[1]) < 50  # the allocator's own


# ---- names ----

STRANGE_SUFFIXES = {
    "colon": ":1:2",
    "newline": "\nsecond line\r\n",
    "accents": "é日本",
    "undecodable": os.fsdecode(b"\xff\xfe\x80"),
    "percent": "%s%n%d",
    "quotes": "'\"\\",
    "space and dots": " .. ",
    "control characters": "\x01\x7f\t",
}


@pytest.mark.parametrize("suffix", STRANGE_SUFFIXES)
def test_any_legal_name(way, kind, name, suffix):
    strange = name + STRANGE_SUFFIXES[suffix]
    _round_trip(way, kind, strange)


def test_longest_name(way, kind, name):
    _round_trip(way, kind, name + "x" * (250 - len(name)))


def test_bytes_name(way, kind, name):
    _round_trip(way, kind, os.fsencode(name) + b"\xff")


def _round_trip(way, kind, name):
    handle = kind.create(name)
    try:
        second = way(handle)
        assert second.name == os.fsdecode(name)
        assert is_same_object(handle, second)
        pickled = pickle.dumps(handle)
    finally:
        kind.close_handle(handle)
        kind.remove(name)
    load_fails(pickled, errno.ENOENT, "is gone")


# ---- what no pickle of ours says ----


@pytest.fixture
def arguments(make):
    """Return the arguments with which the object is rebuilt."""
    return make().__reduce__()[1]


CLS, NAME, IDENTITY, MODE, OPTIONS = range(5)


class Impostor:
    def __repr__(self):
        return "an impostor"


class NewReturnsSomethingElse(Semaphore, Plain):
    def __new__(cls):
        return Impostor()


class NewNeedsArguments(Semaphore, Plain):
    def __new__(cls, needed):
        return super().__new__(cls)


MALFORMED = [
    (CLS, None, TypeError),
    (CLS, 3, TypeError),
    (CLS, "Semaphore", TypeError),
    (CLS, Impostor, TypeError),
    (CLS, Impostor(), TypeError),
    (CLS, object, TypeError),
    (CLS, posix_ipc.Error, TypeError),
    (CLS, NewReturnsSomethingElse, TypeError),
    (CLS, NewNeedsArguments, TypeError),
    (NAME, None, TypeError),
    (NAME, 3, TypeError),
    (NAME, [], TypeError),
    (NAME, "", ValueError),
    (NAME, "/", ValueError),
    (NAME, "/with\0nul", ValueError),
    (NAME, b"/with\0nul", ValueError),
    (NAME, "/\ud800", ValueError),
    (NAME, "/" + "x" * 300, ValueError),
    (NAME, "/" + "x" * 100_000, ValueError),
    (IDENTITY, None, (TypeError, ValueError)),
    (IDENTITY, "", (TypeError, ValueError)),
    (IDENTITY, b"", ValueError),
    (IDENTITY, bytes(47), ValueError),
    (IDENTITY, bytes(49), ValueError),
    (IDENTITY, bytes(48), ExistentialError),
    (IDENTITY, b"\xff" * 48, ExistentialError),
    (IDENTITY, bytearray(48), (TypeError, ValueError, ExistentialError)),
    (IDENTITY, 48, (TypeError, ValueError)),
    (MODE, None, TypeError),
    (MODE, "rw", TypeError),
    (MODE, 1.5, TypeError),
    (MODE, -1, ValueError),
    (MODE, 2**70, (ValueError, OverflowError)),
    (OPTIONS, None, TypeError),
    (OPTIONS, "", TypeError),
    (OPTIONS, 1.5, TypeError),
    (OPTIONS, -(2**70), (ValueError, OverflowError)),
    (OPTIONS, 2**31, (ValueError, OverflowError)),
]


@pytest.mark.no_portable
@pytest.mark.parametrize(("position", "value", "error"), MALFORMED, ids=lambda value: repr(value)[:30])
def test_malformed_argument(arguments, position, value, error):
    changed = [*arguments[:position], value, *arguments[position + 1 :]]
    before = open_fds()
    with pytest.raises(error) as caught:
        _rebuild(*changed)
    assert str(caught.value)
    del caught
    collect()
    assert open_fds() == before


@pytest.mark.parametrize("count", [0, 1, 4, 6])
def test_wrong_number_of_arguments(arguments, count):
    with pytest.raises(TypeError):
        _rebuild(*[*arguments, None][:count])


def test_no_keywords(arguments):
    with pytest.raises(TypeError):
        _rebuild(*arguments[:4], options=arguments[4])


@pytest.mark.parametrize("options", [0, 8, 16, -16])
def test_options_of_no_queue(queue, options):
    """Neither reading nor writing: the constructor refuses it, and so does a pickle."""
    cls, name, identity, mode, _ = queue().__reduce__()[1]
    before = open_fds()
    with pytest.raises(ValueError, match=r"option|read"):
        _rebuild(cls, name, identity, mode, options)
    assert open_fds() == before


def test_identity_of_an_object_of_another_kind(semaphore, segment, queue):
    handles = [semaphore(), segment(), queue()]
    for handle in handles:
        for other in handles:
            if other is not handle:
                cls, name, _, mode, options = handle.__reduce__()[1]
                with pytest.raises(ExistentialError):
                    _rebuild(cls, name, other.__reduce__()[1][IDENTITY], mode, options)


@pytest.mark.no_portable
def test_every_part_of_the_identity_counts(arguments):
    """Device, inode, time of birth: one bit wrong in any of them, and it is another object."""
    identity = arguments[IDENTITY]
    device, inode, born = struct.unpack_from("=3Q", identity, 16)
    assert device
    assert inode
    for offset, known in ((16, device), (24, inode), (32, born)):
        if known:
            forged = bytearray(identity)
            forged[offset] ^= 1
            with pytest.raises(ExistentialError):
                _rebuild(*arguments[:IDENTITY], bytes(forged), *arguments[MODE:])


def test_fuzzed_arguments(arguments, kind, names):
    """Whatever is put together from parts right and wrong: a handle on the object that was meant, or a typed error."""
    chooser = random.Random(20)
    existing, missing = arguments[NAME], names()
    identity = arguments[IDENTITY]
    parts = [
        [kind.type, kind.type, kind.type, *(other.type for other in KINDS), Impostor, None, 7, NewNeedsArguments],
        [existing, existing, existing, existing.encode(), missing, "", "/", "a/b", "\0", "\ud800", None, 7, "x" * 999],
        [identity, identity, identity, identity[:-1], identity + b"\0", bytes(48), b"", None, "", 7],
        [0o600, 0o600, 0, 0o7777, -1, 2**16, 2**80, None, "", 1.5, True],
        [arguments[OPTIONS], arguments[OPTIONS], *range(16), -1, 2**31 - 1, 2**80, None, "", 1.5, True],
    ]
    before, opened, refused = open_fds(), 0, 0
    for _ in range(4000):
        chosen = [chooser.choice(part) for part in parts]
        if chooser.random() < 0.2 and isinstance(chosen[IDENTITY], bytes):
            noise = bytearray(chosen[IDENTITY])
            for _ in range(chooser.randrange(4)):
                if noise:
                    noise[chooser.randrange(len(noise))] = chooser.randrange(256)
            chosen[IDENTITY] = bytes(noise)
        try:
            handle = _rebuild(*chosen)
        except (TypeError, ValueError, OverflowError, posix_ipc.Error):
            refused += 1
        else:
            assert handle.name == existing
            opened += 1
            del handle
    collect()
    assert opened > 20
    assert refused > 1000
    assert open_fds() == before
    assert not any(each.exists(missing) for each in KINDS)


def test_cut_and_damaged_pickles(make):
    """pickle's own errors or ours, and no crash: for each byte, cut off there, and with that byte changed."""
    pickled = pickle.dumps(make())
    before = open_fds()
    for position in range(len(pickled)):
        damaged = bytearray(pickled)
        damaged[position] ^= 0x55
        for broken in (pickled[:position], bytes(damaged)):
            try:
                pickle.loads(broken)
            except Exception as error:
                # Damage can make other opcodes of it, so that anything at all is called; not inside our function.
                assert not isinstance(error, SystemError)  # noqa: PT017
    collect()
    assert open_fds() == before
