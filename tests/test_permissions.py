"""What another user may do with objects: what their mode says, and no more.

Each scenario is a function that runs in a process of its own. It makes objects as root and then gives root's rights up.
"""

import errno
import os
import pickle
import re
import resource
import stat

import pytest
import support
from support import KINDS, SHARED_MEMORY, open_fds

import posix_ipc
from posix_ipc import BusyError, ExistentialError, MessageQueue, PermissionsError, Semaphore, SharedMemory

KIND_NAMES = [kind.type.__name__ for kind in KINDS]

pytestmark = pytest.mark.skipif(os.getuid() != 0, reason="only root can make objects as root and become another user")


def kind_named(name):
    return next(kind for kind in KINDS if kind.type.__name__ == name)


def refused(call, name):
    with pytest.raises(PermissionsError, match=re.escape(name)) as caught:
        call()
    assert caught.value.errno in (errno.EACCES, errno.EPERM)
    assert caught.value.name == name


def run(scenario, *args, remove):
    """Run the scenario in a child, and remove what it left because it gave up the right to."""
    try:
        support.run_function(scenario, *args)
    finally:
        for name in remove:
            for kind in KINDS:
                kind.remove(name)


def create_with_mode(kind, name, mode):
    """Create the object with exactly this mode."""
    old = os.umask(0)
    handle = kind.create(name, mode=mode)
    os.umask(old)
    return handle


# ---- open ----

READ_ONLY = {"SharedMemory": {"read_only": True}, "MessageQueue": {"write": False}}
WRITE_ONLY = {"MessageQueue": {"read": False}}

# Type, mode of root's object, how another user opens it, and whether that is allowed.
OPENINGS = [
    *((kind_name, mode, {}, False) for kind_name in KIND_NAMES for mode in (0, 0o600, 0o640, 0o660, 0o604, 0o602)),
    *((kind_name, mode, {}, True) for kind_name in KIND_NAMES for mode in (0o666, 0o006)),
    ("Semaphore", 0o444, {}, False),
    ("Semaphore", 0o222, {}, False),
    *((kind_name, 0o444, options, True) for kind_name, options in READ_ONLY.items()),
    *((kind_name, 0o444, {}, False) for kind_name in READ_ONLY),
    *((kind_name, 0o222, options, False) for kind_name, options in READ_ONLY.items()),
    *((kind_name, 0o600, options, False) for kind_name, options in READ_ONLY.items()),
    *((kind_name, 0o222, options, True) for kind_name, options in WRITE_ONLY.items()),
    *((kind_name, 0o444, options, False) for kind_name, options in WRITE_ONLY.items()),
]


def open_as_nobody(kind_name, openings, names):
    """One child for all of a type."""
    kind = kind_named(kind_name)
    pickles = []
    for (mode, options, _), name in zip(openings, names, strict=True):
        handle = create_with_mode(kind, name, mode)
        reopened = kind.type(name, **options)  # root may
        pickles.append(pickle.dumps(reopened))
        kind.close_handle(reopened)
        kind.close_handle(handle)
    support.become_nobody()
    for (mode, options, allowed), name, pickled in zip(openings, names, pickles, strict=True):
        for call in (lambda: kind.type(name, **options), lambda: pickle.loads(pickled)):  # noqa: B023
            where = f"{mode:04o} {options}"
            if allowed:
                handle = call()
                use(handle, options)
                kind.close_handle(handle)
            else:
                try:
                    refused(call, name)
                except BaseException as error:
                    raise AssertionError(where) from error


def use(handle, options):
    if isinstance(handle, Semaphore):
        handle.release()
        handle.acquire(0)
    elif isinstance(handle, SharedMemory):
        assert handle.size == 64
        os.pread(handle.fd, 64, 0)
        if not options:
            os.pwrite(handle.fd, b"x", 0)
    else:
        if options.get("write", True):
            handle.send(b"x", 0)
        if options.get("read", True):
            if "write" in options:
                with pytest.raises(BusyError):
                    handle.receive(0)
            else:
                assert handle.receive(0) == (b"x", 0)


@pytest.mark.slow
@pytest.mark.parametrize("kind_name", KIND_NAMES)
def test_opening_obeys_the_mode(kind_name, names):
    openings = [(mode, options, allowed) for each, mode, options, allowed in OPENINGS if each == kind_name]
    unique = [names() for _ in openings]
    run(open_as_nobody, kind_name, openings, unique, remove=unique)


def create_as_nobody(kind_name, name):
    """O_CREAT is no way around the mode, and O_CREX says what it says to everybody."""
    kind = kind_named(kind_name)
    kind.close_handle(kind.create(name, mode=0o600))
    support.become_nobody()
    refused(lambda: kind.create(name, posix_ipc.O_CREAT), name)
    refused(lambda: kind.create(name, posix_ipc.O_CREAT | posix_ipc.O_TRUNC), name)
    with pytest.raises(ExistentialError) as caught:
        kind.create(name, posix_ipc.O_CREX)
    assert caught.value.errno == errno.EEXIST


@pytest.mark.slow
@pytest.mark.parametrize("kind_name", KIND_NAMES)
def test_creating_over_an_object_of_root(kind_name, name):
    run(create_as_nobody, kind_name, name, remove=[name])


def create_own_as_nobody(kind_name, name, mode):
    """Without root's rights one's own mode counts too, and /proc/self belongs to root still."""
    kind = kind_named(kind_name)
    support.become_nobody()
    handle = kind.create(name, mode=mode)
    assert handle.mode == mode
    if kind.path:
        status = os.stat(kind.file_of(name))
        assert (status.st_uid, stat.S_IMODE(status.st_mode)) == (support.NOBODY, mode)
    if mode & 0o600 == 0o600:
        kind.close_handle(kind.type(name))
        assert pickle.loads(pickle.dumps(handle)).name == name
    else:
        refused(lambda: kind.type(name), name)
        refused(lambda: pickle.loads(pickle.dumps(handle)), name)
    kind.close_handle(handle)
    handle.unlink()
    assert kind.path == "" or not os.path.lexists(kind.file_of(name))


@pytest.mark.slow
@pytest.mark.parametrize("mode", [0o600, 0o400, 0o200, 0])
@pytest.mark.parametrize("kind_name", KIND_NAMES)
def test_own_objects(kind_name, mode, name):
    run(create_own_as_nobody, kind_name, name, mode, remove=[name])


def create_with_umask(kind_name, name, umask, mode, expected):
    kind = kind_named(kind_name)
    os.umask(umask)
    handle = kind.create(name, mode=mode)
    try:
        assert handle.mode == mode
        assert os.umask(umask) == umask
        actual = os.stat(kind.file_of(name) if kind.path else handle.mqd).st_mode
        assert stat.S_IMODE(actual) == expected, f"{actual:o}"
    finally:
        handle.unlink()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("umask", "mode", "expected"),
    [(0, 0o666, 0o666), (0o022, 0o666, 0o644), (0o077, 0o666, 0o600), (0o177, 0o777, 0o600), (0o777, 0o666, 0)],
    ids=lambda value: f"{value:o}",
)
@pytest.mark.parametrize("kind_name", KIND_NAMES)
def test_mode_obeys_the_umask(kind_name, umask, mode, expected, name):
    support.run_function(create_with_umask, kind_name, name, umask, mode, expected)


# ---- unlink ----


def unlink_as_nobody(kind_name, name, mode):
    """/dev/shm is sticky, and so is where the queues are: only the owner removes, whatever the mode."""
    kind = kind_named(kind_name)
    handle = create_with_mode(kind, name, mode)
    own = name + "-own"
    support.become_nobody()
    refused(handle.unlink, name)
    refused(lambda: kind.unlink(name), name)
    refused(lambda: kind.unlink(name.encode()), name)
    if mode == 0o666:
        loaded = pickle.loads(pickle.dumps(handle))
        assert loaded.name == name  # it is still there, and still the same
        refused(loaded.unlink, name)
    kind.close_handle(handle)
    refused(handle.unlink, name)
    with pytest.raises(ExistentialError):
        kind.unlink(own)
    kind.create(own).unlink()


@pytest.mark.slow
@pytest.mark.parametrize("mode", [0o600, 0o666])
@pytest.mark.parametrize("kind_name", KIND_NAMES)
def test_unlinking_what_belongs_to_root(kind_name, mode, name):
    run(unlink_as_nobody, kind_name, name, mode, remove=[name])


# ---- a failed resize ----


def resize_as_nobody(name, mode):
    """1.3.2 unlinked the segment when it could not give it the size. Here root's segment must not even change."""
    segment = create_with_mode(SHARED_MEMORY, name, mode)
    os.pwrite(segment.fd, b"root's", 0)
    before = os.fstat(segment.fd)
    support.become_nobody()

    def unchanged():
        after = os.stat(SHARED_MEMORY.file_of(name))
        assert (after.st_ino, after.st_size, after.st_mode) == (before.st_ino, before.st_size, before.st_mode)
        assert os.pread(segment.fd, 6, 0) == b"root's"

    fds = {number for number in range(100) if is_open(number)}
    with pytest.raises(ValueError, match="read_only"):
        SharedMemory(name, size=8192, read_only=True)
    unchanged()
    for flags in (0, posix_ipc.O_CREAT, posix_ipc.O_TRUNC, posix_ipc.O_CREAT | posix_ipc.O_TRUNC):
        if mode != 0o666:
            refused(lambda flags=flags: SharedMemory(name, flags, size=8192), name)
            unchanged()
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
        with pytest.raises((ValueError, PermissionsError), match=re.escape(name)):
            SharedMemory(name, flags, size=8192)
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        unchanged()
    assert {number for number in range(100) if is_open(number)} == fds


def is_open(number):
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


@pytest.mark.slow
@pytest.mark.parametrize("mode", [0o600, 0o444, 0o644, 0o666], ids=lambda mode: f"{mode:o}")
def test_failed_resize_leaves_a_segment_of_root(mode, name):
    run(resize_as_nobody, name, mode, remove=[name])


# ---- handles that were opened with root's rights ----


def go_on_as_nobody(*names):
    """The rights were checked at open, as everywhere: handles work on."""
    semaphore, segment, queue = [kind.create(name, mode=0o600) for kind, name in zip(KINDS, names, strict=True)]
    support.become_nobody()
    semaphore.release()
    semaphore.acquire(1)
    assert segment.size == 64
    os.pwrite(segment.fd, b"x", 0)
    queue.send(b"x", 1)
    assert queue.receive(1) == (b"x", 0)
    for handle in (semaphore, segment, queue):
        pickled = pickle.dumps(handle)
        refused(lambda pickled=pickled: pickle.loads(pickled), handle.name)


def test_handles_from_before_work_on(names):
    unique = [names() for _ in KINDS]
    run(go_on_as_nobody, *unique, remove=unique)


def half_open_queue(name, options):
    queue = MessageQueue(name, posix_ipc.O_CREX, **support.SMALL_QUEUE, **options)
    try:
        fds = open_fds()
        refused(queue.receive if "read" in options else lambda: queue.send(b"x"), name)
        refused((lambda: queue.receive(0)) if "read" in options else lambda: queue.send(b"x", 0), name)
        assert open_fds() == fds
    finally:
        queue.close()
        queue.unlink()


@pytest.mark.parametrize("options", [{"read": False}, {"write": False}], ids=str)
def test_queue_opened_for_one_direction(options, name):
    """Even for root."""
    half_open_queue(name, options)
