"""The module's face, and what the three types have in common."""

import errno
import functools
import gc
import importlib.metadata
import inspect
import os
import pickle
import re
import resource
import signal
import subprocess
import sys
import sysconfig
import weakref

import pytest
from support import KINDS, MESSAGE_QUEUE, SEMAPHORE, SHARED_MEMORY, open_fds, run_function, run_python

import posix_ipc
from posix_ipc import O_CREAT, O_CREX, O_EXCL, _ext

TYPES = ("Semaphore", "SharedMemory", "MessageQueue")
ERRORS = ("Error", "SignalError", "PermissionsError", "ExistentialError", "BusyError")
FUNCTIONS = ("unlink_semaphore", "unlink_shared_memory", "unlink_message_queue")

CONSTANTS = {
    "O_CREAT": os.O_CREAT,
    "O_EXCL": os.O_EXCL,
    "O_CREX": os.O_CREAT | os.O_EXCL,
    "O_TRUNC": os.O_TRUNC,
    "O_RDONLY": os.O_RDONLY,
    "O_WRONLY": os.O_WRONLY,
    "O_RDWR": os.O_RDWR,
    "O_NONBLOCK": os.O_NONBLOCK,
    "PAGE_SIZE": resource.getpagesize(),
    "SEMAPHORE_TIMEOUT_SUPPORTED": True,
    "SEMAPHORE_VALUE_SUPPORTED": True,
    "MESSAGE_QUEUES_SUPPORTED": True,
    "SEMAPHORE_VALUE_MAX": 2147483647,
    "QUEUE_MESSAGES_MAX_DEFAULT": 10,
    "QUEUE_MESSAGE_SIZE_MAX_DEFAULT": 8192,
    "QUEUE_PRIORITY_MAX": 32767,
    "USER_SIGNAL_MIN": int(signal.SIGRTMIN),
    "USER_SIGNAL_MAX": int(signal.SIGRTMAX),
}

SIGNATURES = {
    "Semaphore": "(name, flags=0, mode=384, initial_value=0)",
    "Semaphore.acquire": "(self, /, timeout=None)",
    "Semaphore.release": "(self, /)",
    "Semaphore.close": "(self, /)",
    "Semaphore.unlink": "(self, /)",
    "SharedMemory": "(name, flags=0, mode=384, size=0, read_only=False, *, reserve=False)",
    "SharedMemory.fileno": "(self, /)",
    "SharedMemory.close_fd": "(self, /)",
    "SharedMemory.close": "(self, /)",
    "SharedMemory.unlink": "(self, /)",
    "MessageQueue": "(name, flags=0, mode=384, max_messages=10, max_message_size=8192, read=True, write=True)",
    "MessageQueue.send": "(self, /, message, timeout=None, priority=0)",
    "MessageQueue.receive": "(self, /, timeout=None)",
    "MessageQueue.receive_into": "(self, /, buffer, timeout=None)",
    "MessageQueue.request_notification": "(self, /, notification=None)",
    "MessageQueue.fileno": "(self, /)",
    "MessageQueue.close": "(self, /)",
    "MessageQueue.unlink": "(self, /)",
    "unlink_semaphore": "(name)",
    "unlink_shared_memory": "(name)",
    "unlink_message_queue": "(name)",
}

PROPERTIES = {
    "Semaphore": {"name", "mode", "value"},
    "SharedMemory": {"name", "mode", "fd", "size", "buf"},
    "MessageQueue": {"name", "mode", "mqd", "block", "max_messages", "max_message_size", "current_messages"},
}


def look_up(path):
    return functools.reduce(getattr, path.split("."), posix_ipc)


def public_attributes(type):
    return {attribute for attribute in vars(type) if not attribute.startswith("_")}


# ---- names and documentation ----


@pytest.mark.parametrize("name", CONSTANTS)
def test_constant(name):
    value = getattr(posix_ipc, name)
    assert value == CONSTANTS[name]
    assert type(value) is type(CONSTANTS[name])


def test_public_names_are_these_and_no_others():
    public = {*CONSTANTS, *TYPES, *ERRORS, *FUNCTIONS, "VERSION", "__version__"}
    assert set(posix_ipc.__all__) == public
    assert len(posix_ipc.__all__) == len(public)
    submodules = {"leaks", "mp_integration", "pytest_plugin"}  # there once somebody has imported them
    # pytest adds names with an @ to every module of a distribution that has a plugin.
    assert {name for name in vars(posix_ipc) if not name.startswith(("_", "@"))} <= public | submodules


def test_star_import_brings_every_public_name():
    namespace = {}
    exec("from posix_ipc import *", namespace)
    assert set(posix_ipc.__all__) <= set(namespace)
    assert namespace["Semaphore"] is posix_ipc.Semaphore


def test_version_is_that_of_the_distribution():
    assert type(posix_ipc.VERSION) is str
    assert posix_ipc.VERSION == posix_ipc.__version__ == importlib.metadata.version("posix_ipc")
    assert int(posix_ipc.VERSION.split(".")[0]) >= 2


@pytest.mark.parametrize("type_name", TYPES)
def test_public_attributes_of_a_type_are_these_and_no_others(type_name):
    methods = {path.split(".")[1] for path in SIGNATURES if path.startswith(type_name + ".")}
    assert public_attributes(getattr(posix_ipc, type_name)) == methods | PROPERTIES[type_name]


def documented_names():
    yield from (*TYPES, *ERRORS, *FUNCTIONS)
    for type_name in TYPES:
        yield from (f"{type_name}.{attribute}" for attribute in public_attributes(getattr(posix_ipc, type_name)))


@pytest.mark.parametrize("path", sorted(documented_names()))
def test_public_name_has_a_docstring_of_its_own(path):
    docstring = look_up(path).__doc__
    assert docstring
    assert docstring.strip()
    assert docstring not in (object.__doc__, Exception.__doc__)


# What neither fails nor asks the system: what the handle remembers.
REMEMBERED = {"name", "mode", "fd", "mqd", "fileno", "max_messages", "max_message_size"}


@pytest.mark.parametrize("path", sorted(set(documented_names()) - set(ERRORS)))
def test_docstring_tells_the_errors_and_the_function_of_posix(path):
    docstring = look_up(path).__doc__
    if path.rpartition(".")[2] not in REMEMBERED:
        assert re.search(r"\bRaises\s\w+", docstring)
        assert re.search(r"\bPOSIX\.1-20\d\d: \w+\(\)", docstring)


def test_module_has_a_docstring():
    assert posix_ipc.__doc__.strip()
    assert _ext.__doc__.strip()


@pytest.mark.parametrize("path", SIGNATURES)
def test_signature(path):
    assert str(inspect.signature(look_up(path))) == SIGNATURES[path]


@pytest.mark.parametrize("type_name", TYPES)
def test_bound_methods_have_signatures(type_name):
    handle = getattr(posix_ipc, type_name).__new__(getattr(posix_ipc, type_name))
    for path, expected in SIGNATURES.items():
        if path.startswith(type_name + "."):
            signature = str(inspect.signature(getattr(handle, path.split(".")[1])))
            assert signature == expected.replace("self, /, ", "").replace("self, /", "")


@pytest.mark.parametrize("name", [*TYPES, *ERRORS])
def test_classes_say_they_live_in_posix_ipc(name):
    """Programs and their logs know them by this name, not by that of the extension inside the package."""
    assert getattr(posix_ipc, name).__module__ == "posix_ipc"
    assert getattr(posix_ipc, name).__qualname__ == name


@pytest.mark.parametrize("name", [*TYPES, *ERRORS, *FUNCTIONS])
def test_classes_and_functions_pickle_by_name(name):
    public = getattr(posix_ipc, name)
    assert pickle.loads(pickle.dumps(public)) is public


@pytest.mark.parametrize("type_name", TYPES)
def test_types_cannot_be_changed(type_name):
    type = getattr(posix_ipc, type_name)
    with pytest.raises(TypeError):
        type.extra = 1
    with pytest.raises(TypeError):
        del type.unlink
    with pytest.raises(TypeError):
        type.name = "changed"


@pytest.mark.parametrize("name", ["SEMAPHORE_TIMEOUT_SUPPORTED", "SEMAPHORE_VALUE_SUPPORTED"])
def test_capabilities_can_be_patched_as_module_attributes(name, monkeypatch):
    monkeypatch.setattr(posix_ipc, name, False)
    assert getattr(posix_ipc, name) is False


def test_import_loads_neither_multiprocessing_nor_psutil():
    run_python(
        "import sys, posix_ipc\n"
        "heavy = {'multiprocessing', 'psutil', 'asyncio', 'threading'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )


@pytest.mark.skipif(not sysconfig.get_config_var("Py_GIL_DISABLED"), reason="needs a free-threaded interpreter")
def test_import_leaves_a_free_threaded_interpreter_so():
    run_python("import sys, posix_ipc\nassert not sys._is_gil_enabled()", env={"PYTHON_GIL": ""})


# ---- exceptions ----


def test_exception_hierarchy():
    assert posix_ipc.Error.__mro__ == (posix_ipc.Error, Exception, BaseException, object)
    for name in ERRORS[1:]:
        error = getattr(posix_ipc, name)
        assert error.__bases__ == (posix_ipc.Error,)


ERRNO_TABLE = {
    posix_ipc.PermissionsError: ("EACCES", "EPERM"),
    posix_ipc.ExistentialError: ("ENOENT", "EEXIST", "EBADF", "ESTALE", "EIDRM"),
    posix_ipc.BusyError: ("EAGAIN", "ETIMEDOUT", "EBUSY"),
    posix_ipc.SignalError: ("EINTR",),
    ValueError: ("EINVAL", "ENAMETOOLONG", "EFBIG", "EMSGSIZE"),
    OSError: (
        *("EMFILE", "ENFILE", "ENOSPC", "ENOMEM", "ELOOP", "EOVERFLOW", "EISDIR", "ENOSYS", "EIO"),
        *("ENOTDIR", "EROFS", "ENXIO", "ENODEV", "EFAULT", "EDQUOT"),
    ),
}


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        pytest.param(getattr(errno, name), expected, id=name)
        for expected, numbers in ERRNO_TABLE.items()
        for name in numbers
    ],
)
def test_errno_becomes_the_right_exception(number, expected):
    with pytest.raises(expected) as caught:
        _ext._raise_errno(number, "shm_open", "/x")
    error = caught.value
    assert os.strerror(number) in str(error)
    assert "shm_open('/x')" in str(error)
    if issubclass(expected, posix_ipc.Error):
        assert type(error) is expected
        assert (error.errno, error.name) == (number, "/x")
    elif expected is OSError:
        assert (error.errno, error.filename) == (number, "/x")
        assert error.strerror.startswith("shm_open('/x'): ")


def test_errno_of_a_call_without_an_object():
    with pytest.raises(posix_ipc.ExistentialError, match=r"^sem_close: ") as caught:
        _ext._raise_errno(errno.EBADF, "sem_close")
    assert (caught.value.errno, caught.value.name) == (errno.EBADF, None)
    with pytest.raises(OSError, match=r"sem_close: ") as caught:
        _ext._raise_errno(errno.EIO, "sem_close")
    assert (caught.value.errno, caught.value.filename) == (errno.EIO, None)


def sysctl(path):
    with open(f"/proc/sys/fs/{path}") as file:
        return file.read().strip()


@pytest.mark.parametrize(
    ("number", "call", "limit", "value"),
    [
        (errno.EMFILE, "mq_open", "RLIMIT_MSGQUEUE", lambda: resource.getrlimit(resource.RLIMIT_MSGQUEUE)[0]),
        (errno.EMFILE, "shm_open", "RLIMIT_NOFILE", lambda: resource.getrlimit(resource.RLIMIT_NOFILE)[0]),
        (errno.ENFILE, "shm_open", "fs.file-max", lambda: sysctl("file-max")),
        (errno.ENOSPC, "mq_open", "fs.mqueue.queues_max", lambda: sysctl("mqueue/queues_max")),
        (errno.ENOSPC, "ftruncate", "/dev/shm", lambda: "inodes"),
        (errno.EFBIG, "ftruncate", "RLIMIT_FSIZE", lambda: resource.getrlimit(resource.RLIMIT_FSIZE)[0]),
        (errno.ENOMEM, "mmap", "RLIMIT_AS", lambda: resource.getrlimit(resource.RLIMIT_AS)[0]),
        (errno.ENAMETOOLONG, "shm_open", "bytes", lambda: 255),
        (errno.ENAMETOOLONG, "sem_open", "bytes", lambda: 251),
        (errno.EOVERFLOW, "sem_post", "SEMAPHORE_VALUE_MAX", lambda: 2147483647),
    ],
)
def test_message_names_the_limit_and_its_value(number, call, limit, value):
    with pytest.raises((OSError, ValueError)) as caught:
        _ext._raise_errno(number, call, "/x")
    value = "unlimited" if value() == resource.RLIM_INFINITY else str(value())
    assert limit in str(caught.value)
    assert re.search(rf"\b{value}\b", str(caught.value))
    nobody_sets_it = limit in ("bytes", "SEMAPHORE_VALUE_MAX")
    assert nobody_sets_it or re.search("ulimit|sysctl|where it is mounted", str(caught.value))


@pytest.mark.parametrize("name", ERRORS)
def test_error_attributes_default_to_none(name):
    error = getattr(posix_ipc, name)("message")
    assert (error.errno, error.name, str(error)) == (None, None, "message")


@pytest.mark.parametrize("name", ERRORS)
def test_errors_can_be_subclassed_with_another_init(name):
    class Unavailable(getattr(posix_ipc, name)):
        def __init__(self, *, retry_after):
            super().__init__(f"again in {retry_after} s")
            self.retry_after = retry_after

    with pytest.raises(posix_ipc.Error, match="again in 3 s") as caught:
        raise Unavailable(retry_after=3)
    assert (caught.value.retry_after, caught.value.errno) == (3, None)


@pytest.mark.parametrize("number", [errno.EACCES, errno.ENOENT, errno.EAGAIN, errno.EINTR])
def test_errors_survive_pickling(number):
    with pytest.raises(posix_ipc.Error) as caught:
        _ext._raise_errno(number, "shm_open", "/x")
    error = caught.value
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert (str(copy), copy.errno, copy.name) == (str(error), number, "/x")


# ---- the constructors: names ----


def test_every_argument_by_keyword(kind, names):
    options = {
        SEMAPHORE: {"initial_value": 3},
        SHARED_MEMORY: {"size": 10, "read_only": False, "reserve": True},
        MESSAGE_QUEUE: {"max_messages": 2, "max_message_size": 64, "read": True, "write": True},
    }[kind]
    name = names()
    assert inspect.signature(kind.type).parameters.keys() == {"name", "flags", "mode", *options}
    handle = kind.type(name=name, flags=O_CREX, mode=0o640, **options)
    try:
        assert (handle.name, handle.mode) == (name, 0o640)
        for option in options.keys() & public_attributes(kind.type):
            assert (getattr(handle, option)) == options[option] or option == "size"
    finally:
        kind.close_handle(handle)
        handle.unlink()


SPELLINGS = {
    "ascii": "-a_Z.9",
    "colon": ":1:",
    "newline": "\n",
    "blank": " a\tb ",
    "accent": "é",
    "beyond the basic plane": "\U0001f40d",
    "undecodable": os.fsdecode(b"\xff\x80"),
    "quote": "\"'\\",
    "longest for a semaphore": 251,
}


def spell(name, ending):
    return name.ljust(ending + 1, "x") if isinstance(ending, int) else name + ending


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("as_bytes", [False, True], ids=("str", "bytes"))
def test_any_name_the_kernel_allows(kind, make, name, spelling, as_bytes):
    text = spell(name, SPELLINGS[spelling])
    given = os.fsencode(text) if as_bytes else text
    created = make(given)
    try:
        assert created.name == text
        assert type(created.name) is str
        assert str(created) == text
        assert kind.exists(text)
        other = os.fsencode(text) if not as_bytes else text
        assert make(other, flags=0).name == text
        assert kind.unlink(other) is None
        assert not kind.exists(text)
    finally:
        kind.remove(text)


@pytest.mark.parametrize(
    ("kind", "longest"),
    [(SEMAPHORE, 251), (SHARED_MEMORY, 255), (MESSAGE_QUEUE, 255)],
    ids=("Semaphore", "SharedMemory", "MessageQueue"),
)
def test_longest_name_and_one_more(kind, longest, name):
    handle = kind.create(name.ljust(1 + longest, "x"))
    kind.close_handle(handle)
    handle.unlink()
    too_long = name.ljust(1 + longest + 1, "x")
    for flags in (0, O_CREAT, O_CREX):
        with pytest.raises(ValueError, match=rf"\b{longest} bytes"):
            kind.type(too_long, flags)
    with pytest.raises((ValueError, posix_ipc.ExistentialError)):
        kind.unlink(too_long)


@pytest.mark.parametrize(
    ("given", "queue_error"),
    [
        ("", ValueError),
        ("/", ValueError),
        ("/pi/a", posix_ipc.PermissionsError),
        ("/pi-a/", posix_ipc.PermissionsError),
        ("pi/a", ValueError),
        ("//", posix_ipc.PermissionsError),
    ],
)
@pytest.mark.parametrize("flags", [0, O_CREAT, O_CREX], ids=("open", "O_CREAT", "O_CREX"))
def test_malformed_name(kind, given, queue_error, flags):
    expected = queue_error if kind is MESSAGE_QUEUE else ValueError
    for spelling in (given, given.encode()):
        with pytest.raises(expected):
            kind.type(spelling, flags)


@pytest.mark.parametrize("kind", [SEMAPHORE, SHARED_MEMORY], ids=("Semaphore", "SharedMemory"))
def test_name_without_slash_is_the_same_object(kind, make, name):
    handle = make(name[1:])
    assert handle.name == name[1:]
    assert make(name, flags=0).name == name
    handle.unlink()
    assert not kind.exists(name)


def test_queue_name_needs_its_slash(name):
    for flags in (0, O_CREX):
        with pytest.raises(ValueError, match="slash"):
            posix_ipc.MessageQueue(name[1:], flags)


def test_doubled_slash_is_accepted_where_the_c_library_accepts_it(semaphore, segment, name):
    for make in (semaphore, segment):
        assert make("/" + name).name == "/" + name
        assert make(name, flags=0).name == name


def test_str_subclass_as_a_name(make, name):
    class Shouting(str):
        def __str__(self):
            return self.upper()

    handle = make(Shouting(name))
    assert handle.name == name
    assert type(handle.name) is str


def random_names(kind, count):
    for _ in range(count):
        handle = kind.create(None)
        try:
            kind.close_handle(handle)
            yield handle.name
        finally:
            handle.unlink()


def test_random_name_is_short_and_legal(kind):
    (name,) = random_names(kind, 1)
    assert re.fullmatch(r"/[A-Za-z0-9._-]{8,13}", name)


def test_random_name_object_works_and_exists(kind):
    handle = kind.create(None)
    try:
        assert kind.exists(handle.name)
        assert str(handle) == handle.name
        assert f'"{handle.name}"' in repr(handle)
        kind.close_handle(kind.type(handle.name))
    finally:
        kind.close_handle(handle)
        handle.unlink()


def print_random_names(kind):
    """Of this process and three that it forks one after another."""
    kind = {each.type.__name__: each for each in KINDS}[kind]
    for _ in range(3):
        pid = os.fork()
        if pid == 0:
            break
        assert os.waitpid(pid, 0)[1] == 0
    for name in random_names(kind, 20):
        os.write(1, f"{name}\n".encode())
    if pid == 0:
        os._exit(0)


@pytest.mark.slow
def test_random_names_cannot_be_foretold_by_a_forked_process(kind):
    """Names from a generator that is seeded once, or by the clock, repeat in processes forked one after another."""
    seen = run_function(print_random_names, kind.type.__name__).split()
    assert len(seen) == 80
    assert len(set(seen)) == 80
    for position in range(1, 5):
        assert len({name[position] for name in seen}) > 10


# ---- the constructors: flags and modes ----


def test_missing_object(kind, name):
    with pytest.raises(posix_ipc.ExistentialError, match=re.escape(repr(name))) as caught:
        kind.type(name)
    assert (caught.value.errno, caught.value.name) == (errno.ENOENT, name)
    assert not kind.exists(name)


def test_exclusive_creation_of_an_existing_object(kind, make):
    first = make()
    before = open_fds()
    with pytest.raises(posix_ipc.ExistentialError, match=re.escape(repr(first.name))) as caught:
        kind.create(first.name)
    assert (caught.value.errno, caught.value.name) == (errno.EEXIST, first.name)
    assert kind.exists(first.name)
    assert open_fds() == before


def test_o_creat_creates_and_then_opens(kind, make, name):
    make(name, flags=O_CREAT)
    make(name, flags=O_CREAT)
    with pytest.raises(posix_ipc.ExistentialError):
        kind.create(name)


@pytest.mark.parametrize("flags", [0, O_CREAT], ids=("open", "O_CREAT"))
def test_random_name_needs_exclusive_creation(kind, flags):
    with pytest.raises(ValueError, match="O_EXCL"):
        kind.type(None, flags)


def test_wrong_type_of_a_name_is_told_with_what_would_do(kind):
    """None is a name to be made, and nothing to open or to unlink."""
    with pytest.raises(TypeError, match=r"^name must be a str, bytes or None, not int$"):
        kind.type(3, posix_ipc.O_CREX)
    for given, type in ((None, "NoneType"), (3, "int")):
        with pytest.raises(TypeError, match=rf"^name must be a str or bytes, not {type}$"):
            kind.unlink(given)


def test_o_excl_needs_o_creat(kind, name, make):
    for given in (name, None, make().name):
        with pytest.raises(ValueError, match="O_CREAT"):
            kind.type(given, O_EXCL)


@pytest.mark.parametrize("extra", [os.O_RDWR, os.O_RDONLY, os.O_WRONLY, os.O_CLOEXEC, os.O_APPEND])
def test_flags_without_a_meaning_are_ignored(make, extra):
    created = make(flags=O_CREX | extra)
    make(created.name, flags=extra)
    if hasattr(created, "fd"):
        os.write(created.fd, b"writable all the same")
        assert os.lseek(created.fd, 0, os.SEEK_CUR) == 21


PERMISSION_CODE = """
import os, sys, posix_ipc
if os.geteuid() == 0:
    os.setgroups([])
    os.setresgid(65534, 65534, 65534)
    os.setresuid(65534, 65534, 65534)
for flags in (0, posix_ipc.O_CREAT):
    try:
        getattr(posix_ipc, sys.argv[1])(sys.argv[2], flags)
    except posix_ipc.PermissionsError as error:
        assert (error.errno, error.name) == (13, sys.argv[2])
        assert "Permission denied" in str(error)
    else:
        sys.exit("opened")
"""


def test_no_permission(kind, make):
    handle = make(mode=0)
    run_python(PERMISSION_CODE, kind.type.__name__, handle.name)
    assert kind.exists(handle.name)


@pytest.fixture
def umask():
    previous = os.umask(0o022)
    yield os.umask
    os.umask(previous)


def permissions(kind, handle):
    facts = os.fstat(handle.mqd) if kind is MESSAGE_QUEUE else os.stat(kind.file_of(handle.name))
    return facts.st_mode & 0o7777


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077])
@pytest.mark.parametrize("mode", [0o600, 0o666, 0o440, 0o007])
def test_mode_obeys_the_umask(kind, make, umask, mask, mode):
    umask(mask)
    handle = make(mode=mode)
    assert permissions(kind, handle) == mode & ~mask
    assert handle.mode == mode


def test_default_mode_is_for_the_owner_alone(kind, make, umask):
    umask(0)
    handle = make()
    assert permissions(kind, handle) == 0o600
    assert handle.mode == 0o600


def test_attaching_keeps_the_mode_of_the_object(kind, make, umask):
    umask(0)
    created = make(mode=0o640)
    attached = make(created.name, flags=O_CREAT, mode=0o666)
    assert attached.mode == 0o666
    assert permissions(kind, attached) == 0o640


def test_highest_mode_that_os_stat_can_give(make):
    assert make(mode=0o177777 & ~0o111).mode == 0o177666


# ---- handles ----


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o7, 0o100644])
def test_repr_and_str(kind, make, mode):
    handle = make(mode=mode)
    ending = ", max_message_size=64, max_messages=2, read=True, write=True" if kind is MESSAGE_QUEUE else ""
    expected = f'posix_ipc.{kind.type.__name__}("{handle.name}", mode=0{mode:o}{ending})'
    assert repr(handle) == expected
    assert str(handle) == handle.name
    kind.close_handle(handle)
    assert repr(handle) == expected
    assert str(handle) == handle.name


@pytest.mark.parametrize(
    ("kind", "attribute"),
    [
        pytest.param(kind, attribute, id=f"{kind.type.__name__}.{attribute}")
        for kind in KINDS
        for attribute in sorted(PROPERTIES[kind.type.__name__] - {"block"})
    ],
)
def test_attribute_is_read_only(kind, attribute, make):
    handle = make()
    before = getattr(handle, attribute)
    with pytest.raises(AttributeError):
        setattr(handle, attribute, before)
    with pytest.raises(AttributeError):
        delattr(handle, attribute)
    assert getattr(handle, attribute) == before


def test_plain_handles_have_no_room_for_other_attributes(make):
    with pytest.raises(AttributeError):
        make().extra = 1


def test_handles_compare_and_hash_by_identity(make):
    first = make()
    second = make(first.name, flags=0)
    assert first == first
    assert first != second
    assert len({first, second}) == 2
    with pytest.raises(TypeError):
        first < second  # noqa: B015


def test_two_handles_are_independent(kind, make):
    first = make()
    second = make(first.name, flags=0)
    kind.close_handle(first)
    use(kind, second)


def use(kind, handle):
    """Do something that only an open handle can do."""
    if kind is SEMAPHORE:
        handle.release()
        handle.acquire(0)
    elif kind is SHARED_MEMORY:
        assert os.pwrite(handle.fd, b"used", 0) == 4
        assert handle.size >= 4
    else:
        handle.send(b"used", 0)
        assert handle.receive(0) == (b"used", 0)


def test_object_outlives_its_creator_and_who_else_attached(kind, make, name):
    for flags in (O_CREX, 0):
        run_python(
            "import sys, posix_ipc\n"
            "getattr(posix_ipc, sys.argv[1])(sys.argv[2], int(sys.argv[3]), **eval(sys.argv[4]))\n",
            kind.type.__name__,
            name,
            flags,
            kind.options,
        )
        assert kind.exists(name)
    use(kind, make(name, flags=0))


@pytest.mark.ipc_leaks(fds=False)
def test_collection_of_a_handle_unlinks_nothing_and_closes_no_descriptor(kind, make):
    keeper = make()
    handle = kind.type(keeper.name)
    descriptor = handle.fileno() if hasattr(handle, "fileno") else None
    del handle
    gc.collect()
    assert kind.exists(keeper.name)
    use(kind, keeper)
    if descriptor is not None:
        os.close(descriptor)  # raises if it was closed


def test_handle_in_a_reference_cycle_is_collected(kind, make):
    handle = make(type=type("Node", (kind.type,), {}))
    kind.close_handle(handle)
    node = type(handle)(handle.name)
    kind.close_handle(node)
    node.itself = node
    probe = weakref.ref(node)
    del node
    gc.collect()
    assert probe() is None


def test_a_name_used_again_is_another_object(kind, make, name):
    old = make(name)
    old.unlink()
    new = make(name)
    use(kind, old)
    use(kind, new)
    if kind is SEMAPHORE:
        old.release()
        assert (old.value, new.value) == (1, 0)


# ---- unlinking ----


def test_unlink_by_handle(kind, make):
    handle = make()
    assert handle.unlink() is None
    assert not kind.exists(handle.name)
    use(kind, handle)
    with pytest.raises(posix_ipc.ExistentialError, match=re.escape(repr(handle.name))) as caught:
        handle.unlink()
    assert (caught.value.errno, caught.value.name) == (errno.ENOENT, handle.name)


def test_unlink_after_close(kind, make):
    handle = make()
    kind.close_handle(handle)
    assert handle.unlink() is None
    assert not kind.exists(handle.name)
    with pytest.raises(posix_ipc.ExistentialError):
        handle.unlink()


@pytest.mark.parametrize(
    "call",
    [
        lambda function, name: function(name),
        lambda function, name: function(name.encode()),
        lambda function, name: function(name=name),
    ],
    ids=("str", "bytes", "keyword"),
)
def test_unlink_by_name(kind, make, call):
    handle = make()
    assert call(kind.unlink, handle.name) is None
    assert not kind.exists(handle.name)
    with pytest.raises(posix_ipc.ExistentialError, match=re.escape(repr(handle.name))) as caught:
        call(kind.unlink, handle.name)
    assert (caught.value.errno, caught.value.name) == (errno.ENOENT, handle.name)


# ---- subclasses and __init__ ----


class Attached:
    """What clients do: other arguments, more attributes, overridden methods, and a call of the unbound __init__."""

    def __init__(self, label, *, handle_name, base):
        self.label = label
        base.__init__(self, handle_name)

    def unlink(self):
        self.unlinked = True
        super().unlink()

    def __repr__(self):
        return f"<{self.label}>"


def test_subclass_with_an_unrelated_init(kind, make):
    created = make()
    subclass = type("Labelled", (Attached, kind.type), {})
    handle = subclass("left", handle_name=created.name, base=kind.type)
    assert isinstance(handle, kind.type)
    assert handle.__dict__ == {"label": "left"}
    assert (handle.name, repr(handle), str(handle)) == (created.name, "<left>", created.name)
    use(kind, handle)
    handle.unlink()
    assert handle.unlinked
    kind.close_handle(handle)


def test_subclass_without_an_init_takes_the_same_arguments(kind, make):
    subclass = type("Plain", (kind.type,), {})
    handle = make(type=subclass, mode=0o640)
    assert handle.mode == 0o640
    handle.extra = "kept"
    assert vars(handle) == {"extra": "kept"}


def test_subclass_with_slots_keeps_them(kind, make):
    subclass = type("Slotted", (kind.type,), {"__slots__": ("extra",)})
    handle = make(type=subclass)
    handle.extra = "kept"
    assert handle.extra == "kept"
    assert not hasattr(handle, "__dict__")


def test_init_is_tried_again_after_a_failure(kind, make, names):
    existing = make()
    missing = names()
    handle = kind.type.__new__(kind.type)
    with pytest.raises(posix_ipc.ExistentialError):
        handle.__init__(missing)
    with pytest.raises(TypeError):
        handle.__init__(3)
    handle.__init__(existing.name)
    assert handle.name == existing.name
    use(kind, handle)
    kind.close_handle(handle)


@pytest.mark.ipc_leaks(fds=False)
def test_second_init_moves_the_handle_to_the_new_object(kind, make):
    first, second = make(), make()
    handle = kind.type(first.name)
    old = handle.fileno() if hasattr(handle, "fileno") else None
    handle.__init__(second.name, mode=0o640)
    assert (handle.name, handle.mode) == (second.name, 0o640)
    use(kind, handle)
    if kind is SEMAPHORE:
        handle.release()
        assert (first.value, second.value) == (0, 1)
    else:
        assert handle.fileno() != old
        assert first.name[1:] in os.readlink(f"/proc/self/fd/{old}")  # left open, as when the handle is collected
    kind.close_handle(handle)
    handle.unlink()
    assert (kind.exists(first.name), kind.exists(second.name)) == (True, False)


def test_failing_second_init_leaves_the_handle_as_it_was(kind, make, names):
    handle = make(mode=0o640)
    before = repr(handle)
    descriptors = open_fds()
    for arguments, error in (
        ((names(),), posix_ipc.ExistentialError),
        ((handle.name, O_CREX), posix_ipc.ExistentialError),
        ((3,), TypeError),
        ((), TypeError),
        (("/",), ValueError),
    ):
        with pytest.raises(error):
            handle.__init__(*arguments)
        assert repr(handle) == before
        use(kind, handle)
    assert open_fds() == descriptors


def test_init_after_close_opens_again(kind, make):
    handle = make()
    kind.close_handle(handle)
    handle.__init__(handle.name)
    use(kind, handle)


def forms_of_no_handle(kind):
    yield "from __new__", kind.type.__new__(kind.type)
    failed = kind.type.__new__(kind.type)
    with pytest.raises(ValueError, match="'/'"):
        failed.__init__("/")
    yield "failed", failed
    subclass = type("Forgetful", (kind.type,), {"__init__": lambda self: None})
    yield "subclass without a call of __init__", subclass()


def test_uninitialised_handle(kind):
    type_name = kind.type.__name__
    for form, handle in forms_of_no_handle(kind):
        assert handle.name is None, form
        assert handle.mode == 0, form
        assert repr(handle) == str(handle) == f"posix_ipc.{type_name}(<not open>)", form
        for attribute in {"fd", "mqd"} & PROPERTIES[type_name]:
            assert getattr(handle, attribute) == -1, form
        if hasattr(handle, "fileno"):
            assert handle.fileno() == -1, form
        for attribute in {
            *("value", "size", "block", "current_messages", "max_messages", "max_message_size")
        } & PROPERTIES[type_name]:
            with pytest.raises(posix_ipc.ExistentialError) as caught:
                getattr(handle, attribute)
            assert (caught.value.name, caught.value.errno) == (None, None), (form, attribute)


def test_arguments_are_checked_before_anything_is_made(kind, name):
    parameters = list(inspect.signature(kind.type).parameters)
    for parameter in parameters[2:]:
        with pytest.raises(TypeError):
            kind.type(name, O_CREX, **{parameter: "no number"})
        assert not kind.exists(name)


# ---- weak references ----


@pytest.mark.parametrize("derived", [False, True], ids=("the type itself", "a subclass with slots"))
def test_weak_reference(kind, make, derived):
    """It does not keep the handle, and tells its end once, when there is nothing left to use."""
    created = make()
    type_ = type("Slotted", (kind.type,), {"__slots__": ()}) if derived else kind.type
    handle = type_(created.name)
    descriptor = handle.fileno() if hasattr(handle, "fileno") else None
    told = []
    references = [weakref.ref(handle, lambda reference: told.append(reference())), weakref.proxy(handle)]
    assert references[0]() is handle
    assert references[1].name == created.name
    assert weakref.getweakrefcount(handle) == 2
    finalizer = weakref.finalize(handle, told.append, "final")
    del handle
    assert references[0]() is None
    assert sorted(told, key=str) == [None, "final"]
    assert not finalizer.alive
    with pytest.raises(ReferenceError):
        _ = references[1].name
    if descriptor is not None:
        os.close(descriptor)  # a constructor's is not closed with its handle
    use(kind, created)


def test_weak_dictionaries(kind, make):
    created = make()
    first, second = pickle.loads(pickle.dumps(created)), pickle.loads(pickle.dumps(created))
    by_handle = weakref.WeakKeyDictionary({first: 1, second: 2})
    by_name = weakref.WeakValueDictionary({"first": first, "second": second})
    assert (by_handle[first], by_handle[second], created in by_handle) == (1, 2, False)
    del first
    assert list(by_handle.items()) == [(second, 2)]
    assert dict(by_name) == {"second": second}
    del second
    assert len(by_handle) == len(by_name) == 0
    assert list(weakref.WeakSet([created])) == [created]


def test_weak_reference_to_a_handle_in_no_state_to_be_used(kind, make):
    """Never opened, failed, closed: the end is told all the same."""
    closed = make()
    kind.close_handle(closed)
    told = []
    for _, handle in forms_of_no_handle(kind):
        weakref.finalize(handle, told.append, 1)
        del handle
    assert told == [1, 1, 1]
    with pytest.raises(posix_ipc.ExistentialError):
        kind.type.__init__(closed, closed.name, O_CREX, **kind.options)
    assert weakref.ref(closed)() is closed


def test_callback_may_use_the_package(kind, make):
    """It runs in the middle of taking the handle apart."""
    created, told = make(), []

    def use_another(reference):
        gc.collect()
        told.append(pickle.loads(pickle.dumps(created)).name)

    handle = pickle.loads(pickle.dumps(created))
    reference = weakref.ref(handle, use_another)
    del handle
    assert told == [created.name]
    assert reference() is None


# ---- interpreters and builds ----


def test_module_is_rebuilt_in_a_fresh_import():
    """Two instances of the extension in one interpreter have types and errors of their own."""
    run_python(
        "import sys, posix_ipc\n"
        "first = posix_ipc.Error\n"
        "del sys.modules['posix_ipc'], sys.modules['posix_ipc._ext'], posix_ipc\n"
        "import posix_ipc\n"
        "assert posix_ipc.Error is not first\n"
        "try: posix_ipc.Semaphore('/pi-missing-%d' % __import__('os').getpid())\n"
        "except posix_ipc.ExistentialError: pass\n"
        "else: sys.exit('opened')"
    )


def test_interpreter_ends_quietly_with_open_handles(kind, name):
    code = (
        "import sys, posix_ipc\n"
        "kind = getattr(posix_ipc, sys.argv[1])\n"
        "handle = kind(sys.argv[2], posix_ipc.O_CREX, **eval(sys.argv[3]))\n"
        "handle.unlink()\n"
        "sys.keeper = [handle]\n"
    )
    child = run_python(code, kind.type.__name__, name, kind.options, env={"PYTHONDEVMODE": "1"})
    assert (child.stdout, child.stderr) == ("", "")


@pytest.mark.skipif(sys.platform != "linux", reason="uses the file names of Linux")
def test_extension_exports_its_init_function_alone():
    """Hidden visibility: no helper of the extension can clash with a symbol of another library."""
    try:
        symbols = subprocess.run(["nm", "-D", "--defined-only", _ext.__file__], capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("needs nm")
    defined = [line.split()[-1] for line in symbols.stdout.splitlines() if line.split()[-2] in "TDB"]
    assert defined == ["PyInit__ext"]


def test_each_constant_is_explained():
    constants = {name for name in posix_ipc.__all__ if name.isupper() or name == "__version__"}
    assert len(constants) > 15
    assert not {name for name in constants if name not in posix_ipc.__doc__}
