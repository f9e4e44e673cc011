"""A sweep beside others who create, take, sweep and die: what it looked at may not be so any more when it acts.

The moments between two of its steps are met by putting what happens then into one of its functions.
"""

import contextlib
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from lifetime import (
    BY_NAME,
    DIRECTORY,
    Listener,
    belong_to_a_new_tree,
    die_after,
    existing,
    in_a_worker,
    make,
    trackers,
)
from support import (
    KINDS,
    NOBODY,
    become_nobody,
    run_function,
    run_privately,
    run_python,
    start_python,
    wait_until,
    wait_until_ready,
)

import posix_ipc
from posix_ipc import _ext, _journal, _owners, _reaper
from posix_ipc.mp_integration import SharedMemory, untrack

NAMES = [kind.type.__name__ for kind in KINDS]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="tracking is for Linux")

# ---- while it looks ----


def take_it_after_the_look(persists):
    tracker = belong_to_a_new_tree()
    stay = []
    die_after(lambda: stay.append(make("SharedMemory", "/taken")))
    attached = SharedMemory.attach("/taken")
    look, looks = _owners.Records.look, []

    def look_and_let_take(records):
        look(records)
        looks.append(records)
        if len(looks) == 1:
            attached.take_ownership()
            if persists:
                untrack(attached).close()
            attached.close()

    _owners.Records.look = look_and_let_take
    assert _reaper.reap() == []
    assert existing([("SharedMemory", "/taken")])
    del tracker


@pytest.mark.slow
@pytest.mark.parametrize("persists", [False, True], ids=["and tracked", "and untracked"])
def test_g5_what_is_taken_after_a_sweep_has_looked_stays(persists):
    run_privately(take_it_after_the_look, persists)


DIE_WITH_ONE_OBJECT = """
import os, sys
import posix_ipc
from posix_ipc import _ext, _tracker
_tracker.ensure = lambda *_: None  # nobody hears of it
from posix_ipc.mp_integration import Semaphore
journal = _ext.Journal(sys.argv[2], 1)
Semaphore.__new__(Semaphore)._create(journal, sys.argv[1], 0o600, 0)
if sys.argv[3:]:
    print("ready", flush=True)
    sys.stdin.readline()
os.kill(os.getpid(), 9)
"""


def new_journal():
    """One whose maker has not yet locked it."""
    DIRECTORY.mkdir(mode=0o700, exist_ok=True)
    path = DIRECTORY / "1-1-1.j0"
    path.touch(0o600)
    return path


def create_and_die_during_a_sweep():
    new = new_journal()
    die_after(lambda: make("Semaphore", "/first"))

    def die(line):
        if new.stat().st_size == 0:
            run_python(DIE_WITH_ONE_OBJECT, "/second", new, check=False)

    assert [removed.name for removed in _reaper.reap(die)] == ["/first"]
    assert existing([("Semaphore", "/second")])
    _reaper.reap()
    assert not existing([("Semaphore", "/second")])
    assert not new.exists()


@pytest.mark.slow
def test_g3_what_is_created_and_left_during_a_sweep_goes_at_the_next():
    run_privately(create_and_die_during_a_sweep)


def create_and_live_during_a_sweep():
    new = new_journal()
    open_for_look, makers = _journal.open_for_look, []
    with contextlib.ExitStack() as stack:

        def take_it_first(path, *args):
            if path == str(new) and not makers:
                makers.append(stack.enter_context(start_python(DIE_WITH_ONE_OBJECT, "/live", new, "and live")))
                wait_until_ready(makers[0])
            return open_for_look(path, *args)

        _journal.open_for_look = take_it_first
        _reaper.reap()
        assert existing([("Semaphore", "/live")])
        assert new.exists()


@pytest.mark.slow
def test_g5_what_is_created_during_a_sweep_by_a_process_that_lives_stays():
    run_privately(create_and_live_during_a_sweep)


def create_while_it_is_read():
    """In a journal that a sweep holds at that moment: its maker comes back."""
    new = new_journal()
    read, makers = _journal.read, []
    with contextlib.ExitStack() as stack:

        def read_and_let_create(descriptor):
            contents = read(descriptor)
            if not makers and os.readlink(f"/proc/self/fd/{descriptor}") == str(new):
                makers.append(stack.enter_context(start_python(CREATE_AND_LIVE, "/live", new)))
                makers[0].stdout.readline()  # it has met the lock
            return contents

        _journal.read = read_and_let_create
        _reaper.reap()
        _journal.read = read
        wait_until_ready(makers[0])
        assert new.exists()
        _reaper.reap()
        assert existing([("Semaphore", "/live")])


CREATE_AND_LIVE = """
import sys
from posix_ipc import Semaphore, _ext
met = False
while True:
    try:
        journal = _ext.Journal(sys.argv[2], 1)
        break
    except BlockingIOError:
        if not met:
            print("met", flush=True)
        met = True
assert met
from posix_ipc.mp_integration import Semaphore
Semaphore.__new__(Semaphore)._create(journal, sys.argv[1], 0o600, 0)
print("ready", flush=True)
sys.stdin.readline()
"""


@pytest.mark.slow
def test_g5_a_journal_that_is_made_while_it_is_read_is_that_of_a_living_process():
    run_privately(create_while_it_is_read)


def say_it_after_the_reading(what):
    """And die, before it is looked whether he lives."""
    tracker = belong_to_a_new_tree()
    keeper = SharedMemory(size=8)  # so that the root lives
    told, tell = os.pipe()
    done, finish = os.pipe()
    with contextlib.ExitStack() as stack:
        if what == "claim":
            other = stack.enter_context(start_python(CREATE_IN_FLIGHT))
            wait_until_ready(other)
        child = os.fork()
        if child == 0:
            make("Semaphore", "/dummy")  # so that it has a journal
            mine = SharedMemory.attach("/in-flight") if what == "claim" else make("SharedMemory", "/in-flight")
            os.write(finish, b".")
            os.read(told, 1)
            os.write(finish, pickle.dumps(mine))
            os._exit(0)
        assert os.read(done, 1) == b"."
        if what == "claim":
            for each in trackers(_journal.token_of(other.pid)):
                each.kill()
            other.kill()
            other.wait()
        (journal,) = (path for path in DIRECTORY.glob(f"{os.getpid()}-*.j*"))
        steps = []

        def at(step, function):
            def wrapped(descriptor):
                if os.readlink(f"/proc/self/fd/{descriptor}") == str(journal):
                    steps.append(step)
                    if len(steps) == 2:  # between the two
                        os.write(tell, b".")
                        os.waitpid(child, 0)
                return function(descriptor)

            return wrapped

        _journal.read = at("read", _journal.read)
        _owners._try_shared = at("look", _owners._try_shared)
        _reaper.reap()
        assert len(steps) >= 2
        assert pickle.loads(os.read(done, 10_000)).name == "/in-flight"
    del tracker, keeper


CREATE_IN_FLIGHT = """
import sys
from posix_ipc.mp_integration import SharedMemory
kept = SharedMemory.create("/in-flight", size=8)
print("ready", flush=True)
sys.stdin.readline()
"""


@pytest.mark.slow
@pytest.mark.parametrize("what", ["record", "claim"])
def test_g5_what_was_pickled_while_a_sweep_looked_stays(what):
    run_privately(say_it_after_the_reading, what)


def make_anew_after_the_look(kind):
    die_after(lambda: make(kind, "/anew"))
    look, looks = _owners.Records.look, []

    def look_and_replace(records):
        look(records)
        looks.append(records)
        if len(looks) == 2:  # it is locked, and about to be removed
            BY_NAME[kind].remove("/anew")
            BY_NAME[kind].create("/anew")

    _owners.Records.look = look_and_replace
    _reaper.reap()
    assert len(looks) == 2
    assert existing([(kind, "/anew")])
    assert not list(DIRECTORY.glob("aside-*"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", NAMES)
def test_g6_what_took_the_name_while_a_sweep_looked_stays(kind):
    run_privately(make_anew_after_the_look, kind)


# ---- what the dead have sent ----


def journals_of_workers():
    return list(DIRECTORY.glob(f"{os.getpid()}-*.j*"))


def send(kind, name):
    pickle.dumps(make(kind, name))


def receive_from_workers():
    tracker = belong_to_a_new_tree()
    keeper = SharedMemory(size=8)
    sent = [(kind, f"/sent-{kind}") for kind in NAMES]
    for each in sent:
        in_a_worker(send, *each)
    _reaper.reap()
    assert existing(sent) == sent
    assert len(journals_of_workers()) == 3
    for kind, name in sent:
        BY_NAME[kind].remove(name)  # by whoever received it, or by another program
    assert _reaper.reap() == []
    assert journals_of_workers() == []
    del tracker, keeper


@pytest.mark.slow
def test_g4_nothing_stays_of_a_worker_when_all_that_it_sent_is_unlinked():
    run_privately(receive_from_workers)


def let_workers_pass_on():
    tracker = belong_to_a_new_tree()
    handles = [make(kind, f"/passed-{kind}") for kind in NAMES]
    in_a_worker(lambda: [pickle.dumps(handle) for handle in handles])
    assert len(journals_of_workers()) == 1
    _reaper.reap()
    assert journals_of_workers() == []  # for as long as they count, the root's own journal says the same
    data = [pickle.dumps(handle) for handle in handles]
    handles.clear()
    _reaper.reap()
    for pickled in data:
        pickle.loads(pickled).unlink()
    del tracker


@pytest.mark.slow
def test_g4_nothing_stays_of_a_worker_that_passed_on_what_its_root_owns():
    run_privately(let_workers_pass_on)


def send_a_queue_of_another_namespace():
    tracker = belong_to_a_new_tree()
    keeper = SharedMemory(size=8)
    in_a_worker(send, "MessageQueue", "/elsewhere")
    (journal,) = journals_of_workers()
    run_function(_reaper.reap, prefix=("unshare", "-i"))  # from where the queue cannot be seen
    assert journal.exists()
    BY_NAME["MessageQueue"].remove("/elsewhere")
    _reaper.reap()
    assert not journal.exists()
    del tracker, keeper


@pytest.mark.slow
def test_g4_what_cannot_be_seen_from_here_is_not_taken_to_be_unlinked():
    run_privately(send_a_queue_of_another_namespace)


# ---- beside another sweep ----


def rename_first():
    die_after(lambda: make("Semaphore", "/renamed"))
    path = Path(BY_NAME["Semaphore"].file_of("/renamed"))
    locked_if_free = _owners.locked_if_free

    def after_another_one(entry, *args):  # what the other sweep did before it was killed
        path.rename(DIRECTORY / "aside-{}-{}-{}".format(*entry.identity))
        return locked_if_free(entry, *args)

    _owners.locked_if_free = after_another_one
    assert [removed.name for removed in _reaper.reap()] == ["/renamed"]
    assert not list(DIRECTORY.glob("aside-*"))


@pytest.mark.slow
def test_g3_what_a_sweep_that_was_killed_has_put_aside_goes():
    run_privately(rename_first)


def replace_before_the_lock():
    SharedMemory(size=8).close()
    (process,) = _journal.existing()
    lock = os.fsdecode(process.tracker_lock)
    (tracker,) = wait_until(lambda: trackers(process.token))
    tracker.kill()
    wait_until(lambda: not _ext._is_locked(lock))
    try_lock, looks = _owners.try_lock, []

    def after_another_one(descriptor):
        if not looks and os.readlink(f"/proc/self/fd/{descriptor}") == lock:
            looks.append(lock)
            os.unlink(lock)
            SharedMemory(size=8).close()  # starts a new tracker
            wait_until(lambda: _ext._is_locked(lock))
        return try_lock(descriptor)

    _owners.try_lock = after_another_one
    _reaper.remove_if_dead(lock)
    assert looks
    assert _ext._is_locked(lock)


@pytest.mark.slow
def test_g10_the_lock_of_a_new_tracker_is_not_taken_for_that_of_the_old_one():
    run_privately(replace_before_the_lock)


# ---- what it cannot read, and what nobody will report ----


def create_under_a_umask(umask):
    os.umask(umask)
    for kind in NAMES:
        with contextlib.suppress(posix_ipc.PermissionsError):  # its owner could not read it
            make(kind, "/masked")
    early = Path(_journal.directory(), "1-1-1.j0")  # its maker died before it gave it its mode
    early.touch()
    early.chmod(0)


def sweep_after_a_umask(umask):
    become_nobody()
    die_after(create_under_a_umask, umask)
    masked = [(kind, "/masked") for kind in NAMES]
    assert len(existing(masked)) == (0 if umask & 0o400 else 3)
    _reaper.reap()
    assert not existing(masked)
    assert os.listdir(f"/dev/shm/.posix_ipc-{NOBODY}") == []


@pytest.mark.slow
@pytest.mark.parametrize("umask", [0o077, 0o400, 0o777])
def test_g3_no_umask_keeps_anything_from_being_swept(umask):
    run_privately(sweep_after_a_umask, umask)


FILL_AND_DIE = """
import os, signal
from posix_ipc.mp_integration import SharedMemory
room = os.statvfs("/dev/shm")
SharedMemory.create("/all", size=(room.f_bavail - 40) * room.f_frsize, reserve=True)
while True:
    try:
        SharedMemory.create(size=4096, reserve=True)
    except OSError:
        break
from posix_ipc import _journal, _ext
(process,) = _journal.existing()
print(process.token, flush=True)
os.kill(os.getpid(), signal.SIGSTOP)
"""


def create_where_the_dead_left_no_room():
    with subprocess.Popen([sys.executable, "-c", FILL_AND_DIE], stdout=subprocess.PIPE, text=True) as child:
        token = child.stdout.readline().strip()
        for tracker in wait_until(lambda: trackers(token)):
            tracker.kill()
        wait_until(lambda: not _ext._is_locked(f"{DIRECTORY}/{token}.tracker"))
        child.kill()
    assert existing([("SharedMemory", "/all")])
    listener = Listener()
    SharedMemory(size=4096, reserve=True).unlink()
    assert not existing([("SharedMemory", "/all")])
    told = f"process {os.getpid()}, to make room for a creation: removed shared_memory '/all': its owner, recorded in "
    assert [line for line in listener.lines if line[1].startswith(f"{told}{DIRECTORY}/{token}.root, has ended")]
    assert {level for level, _ in listener.lines} == {"INFO"}


@pytest.mark.slow
def test_g3_the_next_creation_sweeps_a_full_file_system_first():
    run_privately(create_where_the_dead_left_no_room)


# ---- who cannot tell when it was born ----

MAKE_AND_DIE = """
import os
from lifetime import BY_NAME, belong_to_a_new_tree, make
tracker = belong_to_a_new_tree()
made = [make(kind, "/made") for kind in BY_NAME]
assert [each._identity[2] for each in made] == [0, 0, 0]
os.kill(os.getpid(), 9)
"""


def sweep_what_was_made_without_statx():
    """As under a seccomp filter that has not heard of statx(2): the sweep sees a time of birth, the record has none."""
    strace = ["strace", "-f", "-qq", "-o", "/dev/null", "-e", "trace=statx", "-e", "inject=statx:error=EPERM"]
    run_python(MAKE_AND_DIE, prefix=strace, check=False)
    made = [(kind, "/made") for kind in BY_NAME]
    assert existing(made) == made
    assert sorted(each.kind for each in _reaper.reap()) == ["message_queue", "semaphore", "shared_memory"]
    assert not existing(made)


@pytest.mark.slow
@pytest.mark.no_sanitizer
@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
def test_g3_a_sweep_removes_what_was_made_where_the_time_of_birth_is_not_known():
    run_privately(sweep_what_was_made_without_statx)
