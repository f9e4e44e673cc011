"""The classes of posix_ipc.mp_integration in one process; how objects end with processes is in test_lifetime.py."""

import contextlib
import copy
import errno
import gc
import multiprocessing
import os
import pickle
import stat
import sys

import pytest
from lifetime import DIRECTORY, die_after, in_a_worker, make, wait_until_gone
from support import KINDS, SMALL_QUEUE, open_fds, private_ipc, run_python, threads, unique_name, wait_until

import posix_ipc
from posix_ipc import O_CREAT, O_CREX, ExistentialError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="tracking is for Linux")
mp_integration = pytest.importorskip("posix_ipc.mp_integration")

IPCManager, track, untrack = mp_integration.IPCManager, mp_integration.track, mp_integration.untrack
MessageQueue, Semaphore, SharedMemory = (
    mp_integration.MessageQueue,
    mp_integration.Semaphore,
    mp_integration.SharedMemory,
)

SEGMENT, QUEUE, SEMAPHORE = "SharedMemory", "MessageQueue", "Semaphore"
OPTIONS = {SEGMENT: {"size": 64}, QUEUE: SMALL_QUEUE, SEMAPHORE: {}}
EXISTS = {kind.type.__name__: kind.exists for kind in KINDS}


@pytest.fixture(params=[SEMAPHORE, SEGMENT, QUEUE])
def kind(request):
    return request.param


@pytest.fixture
def cls(kind):
    return getattr(mp_integration, kind)


@pytest.fixture
def exists(kind):
    return EXISTS[kind]


@pytest.fixture
def handle(kind, cls):
    handle = cls(unique_name(), O_CREX, **OPTIONS[kind])
    yield handle
    handle.unlink()
    close(handle)


def close(handle):
    with contextlib.suppress(ExistentialError):  # it was
        handle.close()


def held_of(name):
    """How many descriptors and mappings of this process lead to an object."""
    links = [link for link in open_fds().values() if name[1:] in link]
    with open("/proc/self/maps") as maps:
        return len(links), sum(name[1:] in line for line in maps)


def test_it_is_a_plain_object_too(handle, kind):
    assert isinstance(handle, getattr(posix_ipc, kind))
    assert repr(handle).startswith(f'posix_ipc.mp_integration.{kind}("{handle.name}", mode=0600')


def test_name_and_flags_have_defaults(cls, kind, exists):
    created = cls(**OPTIONS[kind])
    assert exists(created.name)
    assert created.owned
    attached = cls(created.name)
    assert not attached.owned
    attached.close()
    created.unlink()
    created.close()
    assert not exists(created.name)
    with pytest.raises(ExistentialError):
        cls(created.name)


def test_explicit_twins(cls, kind):
    name = unique_name()
    created = cls.create(name, **OPTIONS[kind])
    attached = cls.attach(name)
    assert (created.owned, attached.owned) == (True, False)
    with pytest.raises(ExistentialError):
        cls.create(name, **OPTIONS[kind])
    attached.close()
    created.unlink()
    created.close()
    with pytest.raises(ExistentialError):
        cls.attach(name)
    with pytest.raises(TypeError):
        cls.attach(None)


def test_o_creat_creates_and_then_attaches(cls, kind):
    name = unique_name()
    first = cls(name, O_CREAT, **OPTIONS[kind])
    second = cls(name, O_CREAT, **OPTIONS[kind])
    assert (first.owned, second.owned) == (True, False)
    second.close()
    first.unlink()
    first.close()


def test_a_failed_create_leaves_nothing_and_touches_nothing(handle, cls, kind, exists):
    with pytest.raises(ExistentialError):
        cls(handle.name, O_CREX, **OPTIONS[kind])
    assert exists(handle.name)
    assert handle.owned


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ((None,), {"flags": 0}),
        ((None,), {"flags": O_CREAT}),
        (("/x",), {"flags": os.O_EXCL}),
        ((None,), {"mode": 0o200}),
        (("/a/b",), {"flags": O_CREX}),
    ],
)
def test_arguments_that_make_no_sense(cls, arguments, options):
    # A queue's name with a slash inside is refused by the kernel, as a matter of permission.
    with pytest.raises((ValueError, posix_ipc.PermissionsError)):
        cls(*arguments, **options)


def test_segment_is_never_resized_by_attaching():
    with SharedMemory(size=100) as segment:
        with pytest.raises(ValueError, match="size"):
            SharedMemory(segment.name, size=50)
        with pytest.raises(ValueError, match="100 bytes"):
            SharedMemory(segment.name, O_CREAT, size=200)
        smaller = SharedMemory(segment.name, O_CREAT, size=50)
        assert (smaller.size, segment.size) == (100, 100)
        smaller.close()
        with pytest.raises(ValueError, match="truncated"):
            SharedMemory(segment.name, posix_ipc.O_TRUNC)
        with pytest.raises(ValueError, match="read_only"):
            SharedMemory(size=10, read_only=True)
        with pytest.raises(ValueError, match="reserve"):
            SharedMemory(reserve=True)
        reader = SharedMemory.attach(segment.name, read_only=True)
        assert reader.buf.readonly
        reader.close()
    with SharedMemory(size=8192, reserve=True) as segment:
        assert os.fstat(segment.fd).st_blocks * 512 >= 8192


def test_unlink_is_silent_the_second_time_and_elsewhere(handle, cls, exists):
    other = pickle.loads(pickle.dumps(handle))
    other.unlink()
    assert not exists(handle.name)
    handle.unlink()
    assert not handle.owned
    other.unlink()
    other.close()


def test_unlink_leaves_alone_what_has_the_name_by_now(handle, cls, kind, exists):
    {SEMAPHORE: posix_ipc.unlink_semaphore, SEGMENT: posix_ipc.unlink_shared_memory}.get(
        kind, posix_ipc.unlink_message_queue
    )(handle.name)
    plain = getattr(posix_ipc, kind)
    stranger = plain(handle.name, O_CREX, **OPTIONS[kind])
    handle.unlink()
    assert exists(handle.name)
    stranger.unlink()
    (stranger.close_fd if kind == SEGMENT else stranger.close)()


def test_pickle_keeps_the_class_and_owns_nothing(handle, cls):
    loaded = pickle.loads(pickle.dumps(handle))
    assert type(loaded) is cls
    assert not loaded.owned
    assert handle.owned
    loaded.close()
    with pytest.raises(ExistentialError):
        pickle.dumps(loaded)


def test_g8_handles_close_with_their_python_object(handle, cls):
    """A worker that attaches afresh for each task stays flat."""
    before = held_of(handle.name)
    for _ in range(200):
        pickle.loads(pickle.dumps(handle))
        copy.copy(handle)
        cls.attach(handle.name)
    gc.collect()
    assert held_of(handle.name) == before


def test_taking_ownership(handle, cls):
    other = cls.attach(handle.name)
    other.take_ownership()
    assert other.owned
    other.take_ownership()
    other.close()


@pytest.mark.parametrize("kind", [SEGMENT, QUEUE])
def test_with_closes_and_unlinks_what_is_owned(cls, kind, exists):
    with cls(**OPTIONS[kind]) as created:
        with cls.attach(created.name):
            pass
        assert exists(created.name)
    assert not exists(created.name)
    assert created.fileno() == -1


def test_with_on_a_semaphore_takes_a_permit():
    semaphore = Semaphore(initial_value=1)
    with semaphore:
        assert semaphore.value == 0
    assert semaphore.value == 1
    semaphore.unlink()
    semaphore.close()


class BlockError(Exception):
    pass


def test_manager_removes_all_of_its_objects():
    def inside():
        with IPCManager() as ipc:
            made = [ipc.SharedMemory(size=8), ipc.Semaphore(initial_value=1), ipc.MessageQueue(**SMALL_QUEUE)]
            assert all(EXISTS[type(each).__name__](each.name) for each in made)
            names.extend((type(each).__name__, each.name) for each in made)
            made[0].close()
            made[1].unlink()
            raise BlockError

    names = []
    with pytest.raises(BlockError):
        inside()
    assert len(names) == 3
    assert not any(EXISTS[kind](name) for kind, name in names)


@contextlib.contextmanager
def a_stranger_at(number):
    """Whoever closed the number behind our back, another segment of 128 bytes is there now, and must stay."""
    with posix_ipc.SharedMemory(unique_name(), O_CREX, size=128) as stranger:
        stranger.unlink()
        os.dup2(stranger.fd, number, inheritable=False)
        yield
        assert os.path.samestat(os.fstat(number), os.fstat(stranger.fd))
        os.close(number)


ENDS = {
    "close": lambda handle: handle.close(),
    "close_fd": lambda handle: handle.close_fd(),
    "with": lambda handle: handle.__exit__(None, None, None),
}


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("made", ["tracked", "loaded", "pickled"])
def test_segment_leaves_a_strangers_descriptor_alone(made, end):
    handle = SharedMemory(size=64) if made == "tracked" else posix_ipc.SharedMemory(unique_name(), O_CREX, size=64)
    if made != "tracked":
        loaded = pickle.loads(pickle.dumps(handle))  # from here on a plain handle knows what it is on
        handle, other = (loaded, handle) if made == "loaded" else (handle, loaded)
        other.close()
    with a_stranger_at(handle.fd):
        for look in (lambda: handle.size, lambda: handle.buf):
            with pytest.raises(ExistentialError) as caught:
                look()
            assert (caught.value.errno, caught.value.name) == (errno.EBADF, handle.name)
        with pytest.raises(ValueError, match="closed by somebody else"):
            ENDS[end](handle)
        assert handle.fd == -1
    with contextlib.suppress(ExistentialError):  # `with` did
        handle.unlink()


def test_manager_leaves_a_strangers_descriptor_alone():
    manager = IPCManager()
    segment = manager.SharedMemory(size=64)
    with a_stranger_at(segment.fd), pytest.raises(ValueError, match="closed by somebody else"), manager:
        pass
    assert not EXISTS[SEGMENT](segment.name)


def test_exit_leaves_a_strangers_descriptor_alone():
    child = run_python(
        "import atexit, os\n"
        "@atexit.register\n"  # before the import, so it is called after what that registers
        "def look():\n"
        "    print(os.path.samestat(os.fstat(number), os.fstat(stranger)))\n"
        "from posix_ipc import mp_integration\n"
        "segment = mp_integration.SharedMemory(size=64)\n"
        "number, stranger = segment.fd, os.open('/dev/null', os.O_RDONLY)\n"
        "os.dup2(stranger, number, inheritable=False)\n"
    )
    assert (child.stdout, child.stderr) == ("True\n", "")


@pytest.mark.parametrize("number", ["closed", "a file's", "another queue's"])
def test_queue_goes_by_name_where_its_descriptor_is_no_longer_its_own(number):
    handle, other = MessageQueue(**SMALL_QUEUE), MessageQueue(**SMALL_QUEUE)
    if number == "closed":
        os.close(handle.mqd)
    else:
        stranger = os.open("/dev/null", os.O_RDONLY) if number == "a file's" else os.dup(other.mqd)
        os.dup2(stranger, handle.mqd, inheritable=False)
        os.close(stranger)
    assert handle.owned
    handle.unlink()
    assert not handle.owned
    assert not EXISTS[QUEUE](handle.name)
    assert EXISTS[QUEUE](other.name)
    handle.unlink()  # silent the second time
    if number != "closed":
        os.close(handle.mqd)
    handle.close()
    other.unlink()
    other.close()


@pytest.mark.parametrize("flags", [O_CREX, 0], ids=("created", "attached"))
def test_callback_does_not_move_to_the_queue_that_is_opened_anew(flags):
    """`__init__` on a handle that has asked for one."""
    handle, name, calls = MessageQueue(**SMALL_QUEUE), unique_name(), []
    other = MessageQueue(name, O_CREX, **SMALL_QUEUE) if flags == 0 else None
    before = threads()
    handle.request_notification((calls.append, "asked of the first queue"))
    handle.unlink()
    handle.__init__(name, flags)
    wait_until(lambda: threads() == before)
    handle.send(b"into the second queue")
    handle.request_notification((calls.append, "asked of the second queue"))
    handle.receive(0)
    handle.send(b"into the second queue")
    wait_until(lambda: calls)
    assert calls == ["asked of the second queue"]
    for each in filter(None, (other, handle)):
        each.unlink()
        each.close()


LEAVE_A_BLOCK_TWICE = """
import os, sys
from posix_ipc import ExistentialError
from posix_ipc.mp_integration import *

def is_there(handle):
    try:
        type(handle).attach(handle.name).close()
    except ExistentialError:
        return False
    return True

with eval(sys.argv[1]) as block:
    if isinstance(block, IPCManager):
        made = [block.SharedMemory(size=8), block.Semaphore(), block.MessageQueue(max_messages=1, max_message_size=8)]
    else:
        made = [block]
    pid = os.fork()
    if pid:
        assert os.waitpid(pid, 0)[1] == 0
        assert all(map(is_there, made))
if not pid:
    os._exit(0)
assert not any(map(is_there, made))
"""


@pytest.mark.parametrize(
    "block", ["SharedMemory(size=8)", "MessageQueue(max_messages=1, max_message_size=8)", "IPCManager()"]
)
def test_forked_child_that_leaves_an_inherited_block_unlinks_nothing(block):
    assert run_python(LEAVE_A_BLOCK_TWICE, block).stderr == ""


def test_track_and_untrack(kind, cls, exists):
    plain = getattr(posix_ipc, kind)(unique_name(), O_CREX, **OPTIONS[kind])
    tracked = track(plain)
    assert type(tracked) is cls
    assert tracked.owned
    with pytest.raises(ValueError, match="already"):
        track(tracked)
    again = untrack(tracked)
    assert type(again) is getattr(posix_ipc, kind)
    assert not tracked.owned
    with pytest.raises(ValueError, match="not owned"):
        untrack(tracked)
    tracked.close()
    assert exists(plain.name)
    tracked = track(again)  # it was made here all the same
    assert tracked.owned
    tracked.close()
    again.unlink()
    for each in (again, plain):
        (each.close_fd if kind == SEGMENT else each.close)()
    with pytest.raises(TypeError):
        track(3)
    with pytest.raises(TypeError):
        untrack(plain)


@pytest.mark.parametrize("flags", [0, O_CREAT], ids=["opened", "found by O_CREAT"])
def test_track_takes_nothing_that_this_process_did_not_make(kind, exists, flags):
    plain = getattr(posix_ipc, kind)
    made = plain(unique_name(), O_CREX, **OPTIONS[kind])
    try:
        others = [plain(made.name, flags), pickle.loads(pickle.dumps(made)), copy.copy(made)]
        for handle in others:
            with pytest.raises(ValueError, match="did not create it"):
                track(handle)
            (handle.close_fd if kind == SEGMENT else handle.close)()
        in_a_worker(track_in_vain, made)
        assert exists(made.name)
    finally:
        made.unlink()
        (made.close_fd if kind == SEGMENT else made.close)()


def track_in_vain(inherited):
    with pytest.raises(ValueError, match="did not create it"):
        track(inherited)


def test_what_o_creat_made_is_tracked(kind):
    made = getattr(posix_ipc, kind)(unique_name(), O_CREAT, **OPTIONS[kind])
    with contextlib.closing(track(made)) as tracked:
        assert tracked.owned
        tracked.unlink()
    (made.close_fd if kind == SEGMENT else made.close)()


def test_more_objects_than_a_journal_has_slots():
    run_python(
        "import os\n"
        "from posix_ipc.mp_integration import Semaphore, _journal\n"
        "made = [Semaphore() for _ in range(300)]\n"
        "assert len(_journal.existing()[0].journals) > 1\n"
        "assert all(each.owned for each in made)\n"
        "print(*(each.name for each in made))\n"
    )


def strange_names():
    base = unique_name()
    return f"{base}:\n", f"{base}é", os.fsencode(base) + b"\xff", base + "x" * (250 - len(base))


def test_g9_any_legal_name_works(cls, kind):
    for name in strange_names():
        handle = cls(name, O_CREX, **OPTIONS[kind])
        loaded = pickle.loads(pickle.dumps(handle))
        assert loaded.name == handle.name == os.fsdecode(name)
        loaded.close()
        handle.unlink()
        handle.close()


@pytest.mark.private
def test_g9_whatever_their_names_orphans_are_reaped(kind):
    objects = [(kind, name) for name in strange_names()]
    for each in objects:
        die_after(make, *each)
    removed = {os.fsencode(each.name) for each in mp_integration.reap()}
    if private_ipc() is not None:  # else a neighbour may have been first
        assert removed == {os.fsencode(name) for _, name in objects}
    wait_until_gone(objects)


def test_a_name_too_long_for_the_record_is_refused_at_once(cls, kind):
    """As it is where nothing is recorded: no journal has room for it."""
    longest = unique_name().ljust(257, "x")
    plain = getattr(posix_ipc, kind)
    with pytest.raises(ValueError, match="name too long") as expected:
        plain(longest, O_CREX, **OPTIONS[kind])
    with pytest.raises(ValueError, match="name too long") as caught:
        cls.create(longest, **OPTIONS[kind])
    assert str(caught.value) == str(expected.value)


@pytest.mark.parametrize("kind", [SEMAPHORE, SEGMENT])
def test_slashes_before_a_name_are_as_good_as_one(cls, kind, exists):
    name = "/" * 300 + unique_name()
    created = cls.create(name, **OPTIONS[kind])
    attached = cls.attach("/" + name)
    pickle.loads(pickle.dumps(attached)).close()
    attached.take_ownership()
    attached.close()
    created.unlink()
    created.close()
    assert not exists(name)


def test_mode_obeys_the_umask_and_a_queue_loses_its_mark():
    queue = MessageQueue(mode=0o666, **SMALL_QUEUE)
    assert stat.S_IMODE(os.fstat(queue.mqd).st_mode) == 0o666 & ~_umask()
    queue.unlink()
    queue.close()


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.private
def test_g11_the_journals_are_for_their_user_alone():
    """Whatever the umask: the directory, and in it the files of this process and of its tracker."""
    os.umask(0)
    with SharedMemory(size=1):
        token = multiprocessing.current_process()._config["posix_ipc_token"]
        wait_until((DIRECTORY / f"{token}.proxy").exists)
        status = os.lstat(DIRECTORY)
        assert (stat.S_IMODE(status.st_mode), status.st_uid) == (0o700, os.geteuid())
        assert stat.S_ISDIR(status.st_mode)
        files = [os.lstat(path) for path in DIRECTORY.glob(f"{token}.*")]
        assert len(files) >= 3
        for each in files:
            assert stat.S_ISREG(each.st_mode)
            assert (stat.S_IMODE(each.st_mode), each.st_uid) == (0o600, os.geteuid())


def test_nothing_is_imported_or_started_for_plain_objects():
    run_python(
        "import sys, posix_ipc, os\n"
        "posix_ipc.Semaphore(None, posix_ipc.O_CREX).unlink()\n"
        "assert not {'multiprocessing', 'psutil', 'logging'} & set(sys.modules)\n"
        "import posix_ipc.mp_integration\n"
        "assert 'psutil' not in sys.modules\n"
    )
