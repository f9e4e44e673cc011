"""What posix_ipc.leaks tells of real objects that real processes hold.

Where it matters that nobody else looks or reaps, it is asked where /dev/shm, queues and processes are private.
"""

import contextlib
import dataclasses
import errno
import fcntl
import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time

import psutil
import pytest
from lifetime import has_ended, trackers
from support import (
    KINDS,
    MESSAGE_QUEUE,
    NOBODY,
    SEMAPHORE,
    SHARED_MEMORY,
    SMALL_QUEUE,
    bad_journals,
    become_nobody,
    libc,
    living_journal,
    run_forked,
    run_function,
    run_privately,
    run_python,
    semaphore_waiters,
    start_python,
    unique_name,
    wait_until,
    wait_until_ready,
)

import posix_ipc
from posix_ipc import _describe, _helper, _holders, _journal, _owners, _probe, _reaper

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="leak detection is for Linux")
leaks = pytest.importorskip("posix_ipc.leaks")
mp_integration = pytest.importorskip("posix_ipc.mp_integration")

KIND_NAMES = {SEMAPHORE: "semaphore", SHARED_MEMORY: "shared_memory", MESSAGE_QUEUE: "message_queue"}


def look(name):
    """What is told of one object; None if it is not listed."""
    found = [each for each in leaks.inventory(prefix=os.fsdecode(name)) if each.name == os.fsdecode(name)]
    assert len(found) <= 1
    return found[0] if found else None


def how_it_is_held(name):
    """How this process holds it, which must be the only one."""
    found = look(name)
    assert found.verdict == "live"
    (holder,) = found.holders
    assert holder.pid == os.getpid()
    return holder.how


# ---- who holds it ----


def test_held_by_descriptor(segment):
    handle = segment()
    assert how_it_is_held(handle.name) == ("descriptor",)


def test_held_by_mapping_alone(segment):
    handle = segment()
    view = handle.buf
    handle.close_fd()
    assert how_it_is_held(handle.name) == ("mapping",)
    view.release()


def test_held_by_mapping_that_keeps_the_lease_of_a_descriptor():
    handle = mp_integration.SharedMemory(unique_name(), posix_ipc.O_CREX, size=64)
    view = handle.buf
    handle.close_fd()
    assert how_it_is_held(handle.name) == ("lease", "mapping")
    view.release()
    handle.unlink()


def test_held_by_descriptor_that_a_fork_inherited_with_its_lease():
    handle = mp_integration.MessageQueue(unique_name(), posix_ipc.O_CREX, **SMALL_QUEUE)
    assert how_it_is_held(handle.name) == ("descriptor", "lease")
    stay, go = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(go)
        os.read(stay, 1)
        os._exit(0)
    by_pid = {holder.pid: holder.how for holder in look(handle.name).holders}
    assert by_pid == {os.getpid(): ("descriptor", "lease"), child: ("descriptor", "lease")}
    os.close(go)
    os.close(stay)
    os.waitpid(child, 0)
    handle.unlink()
    handle.close()


def test_semaphore_held_by_its_creator_alone(name):
    """glibc maps a temporary file that then gets another name: the path of the mapping reads as deleted."""
    pointer = libc.sem_open(name.encode(), os.O_CREAT | os.O_EXCL, 0o600, 3)
    inode = os.stat(SEMAPHORE.file_of(name)).st_ino
    with open("/proc/self/maps") as maps:
        (mapping,) = [line for line in maps if line.split()[4] == str(inode)]
    assert mapping.endswith(" (deleted)\n")
    assert how_it_is_held(name) == ("mapping",)
    assert look(name).value == 3
    libc.sem_close(pointer)
    libc.sem_unlink(name.encode())


def test_tracked_semaphore_is_held_by_mapping_and_lease():
    handle = mp_integration.Semaphore(unique_name(), posix_ipc.O_CREX)
    assert how_it_is_held(handle.name) == ("lease", "mapping")
    handle.unlink()


def test_holder_is_identified(segment):
    handle = segment()
    (holder,) = look(handle.name).holders
    process = psutil.Process()
    assert holder.pid == process.pid
    assert holder.started == process.create_time()
    assert holder.command == " ".join(process.cmdline())


def test_what_is_unlinked_is_not_listed_and_does_no_harm(segment):
    handle = segment()
    view = handle.buf
    handle.unlink()
    assert look(handle.name) is None
    view.release()


@pytest.mark.slow
def test_a_name_that_is_used_again_leads_to_the_new_object_and_its_holders_alone(make, kind):
    """Who holds the old one, of which no name is left, does not hold the new one."""
    code = (
        "import sys, posix_ipc\n"
        "held = getattr(posix_ipc, sys.argv[1])(sys.argv[2])\n"
        "mapped = getattr(held, 'buf', None)\n"
        "print('ready', flush=True); sys.stdin.read()\n"
    )
    old = make()
    with start_python(code, kind.type.__name__, old.name) as holder:
        wait_until_ready(holder)
        former = look(old.name)
        assert {each.pid for each in former.holders} == {holder.pid, os.getpid()}
        kind.unlink(old.name)
        new = make(old.name)
        latter = look(old.name)
        assert latter.identity[:2] != former.identity[:2]
        assert [each.pid for each in latter.holders] == [os.getpid()]
        kind.close_handle(new)
        with start_python(code, kind.type.__name__, old.name) as other:
            wait_until_ready(other)
            assert [each.pid for each in look(old.name).holders] == [other.pid]


def test_another_process_holds_it(make, kind):
    handle = make()
    with start_python(
        "import sys, posix_ipc\n"
        "held = getattr(posix_ipc, sys.argv[1])(sys.argv[2])\n"
        "print('ready', flush=True); sys.stdin.read()\n",
        kind.type.__name__,
        handle.name,
    ) as child:
        wait_until_ready(child)
        kind.close_handle(handle)
        pids = {holder.pid for holder in look(handle.name).holders}
        assert pids == {child.pid}


@pytest.mark.no_sanitizer  # such a process is not seen to hold anything there
def test_a_process_whose_first_thread_has_ended_holds_it(segment):
    handle = segment()
    with start_python(
        "import ctypes, sys, threading, time, posix_ipc\n"
        "held = posix_ipc.SharedMemory(sys.argv[1])\n"
        "threading.Thread(target=lambda: sys.stdin.read()).start()\n"
        "print('ready', flush=True); ctypes.CDLL(None).pthread_exit(None)\n",
        handle.name,
    ) as child:
        wait_until_ready(child)
        wait_until(lambda: psutil.Process(child.pid).status() == psutil.STATUS_ZOMBIE)
        assert child.pid in {holder.pid for holder in look(handle.name).holders}
        assert not _holders._holds_nothing(child.pid)


def test_a_zombie_and_a_thread_of_the_kernel_hold_nothing():
    with subprocess.Popen(["true"]) as zombie:
        wait_until(lambda: psutil.Process(zombie.pid).status() == psutil.STATUS_ZOMBIE)
        assert _holders._holds_nothing(zombie.pid)
    assert _holders._holds_nothing(zombie.pid)  # gone
    assert not _holders._holds_nothing(os.getpid())
    for each in psutil.process_iter(["name", "ppid"]):
        if each.info["name"] == "kthreadd" or each.info["ppid"] == 2:
            assert _holders._holds_nothing(each.pid)


# ---- what it is ----


def test_facts_of_a_segment(segment):
    before = time.time()
    handle = segment(size=100_000, mode=0o640)
    handle.buf[0] = 1
    found = look(handle.name)
    status = os.stat(SHARED_MEMORY.file_of(handle.name))
    assert (found.kind, found.size, found.allocated) == ("shared_memory", 100_000, status.st_blocks * 512)
    assert found.allocated > 0
    assert found.identity[:2] == (status.st_dev, status.st_ino)
    assert (found.mode, found.uid) == (0o640 & ~read_umask(), os.geteuid())
    assert found.owner == psutil.Process().username()
    assert before - 1 < found.created < time.time() + 1
    assert (found.value, found.messages, found.max_messages) == (None, None, None)
    assert (found.tracked, found.owners) == (False, ())


def read_umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_facts_of_a_semaphore_somebody_waits_on(semaphore):
    handle = semaphore(initial_value=5)
    found = look(handle.name)
    assert (found.kind, found.value, found.messages) == ("semaphore", 5, None)
    for _ in range(5):
        handle.acquire()
    waiter = threading.Thread(target=handle.acquire, daemon=True)
    waiter.start()
    wait_until(lambda: semaphore_waiters(handle.name))
    assert look(handle.name).value == 0  # the waiters are counted in the same word
    handle.release()
    waiter.join()


def test_facts_of_a_queue(queue):
    before = time.time()
    handle = queue(mode=0o600)
    handle.send(b"one")
    found = look(handle.name)
    status = os.fstat(handle.mqd)
    assert (found.kind, found.messages, found.size, found.value) == ("message_queue", 1, None, None)
    assert (found.max_messages, found.max_message_size) == tuple(SMALL_QUEUE.values())
    assert found.identity[:2] == (status.st_dev, status.st_ino)
    assert (found.mode, found.uid) == (0o600, os.geteuid())
    assert before - 2 < found.created < time.time() + 1  # whole seconds, of a clock that lags by a tick


def test_what_is_told_of_an_object_is_frozen(segment):
    found = look(segment().name)
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.verdict = "orphan"


def test_created_of_a_queue_follows_its_last_use(queue):
    """The kernel keeps no more. So min_age spares what was used recently, and nobody may call it the creation."""
    handle = queue()
    made = look(handle.name)
    time.sleep(1.1)
    handle.send(b"one")
    used = look(handle.name)
    assert used.created > made.created  # whole seconds
    text = "".join(span.text for line in _describe.explain(used, None) for span in line)
    assert "last used or made " + time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(used.created)) in text


def test_owners(tree_of_one):
    name, pid = tree_of_one
    found = look(name)
    assert found.tracked
    (owner,) = found.owners
    assert (owner.pid, owner.alive, owner.shared, owner.claim) == (pid, True, False, False)
    assert os.path.exists(owner.journal)
    assert "owns it" in found.reason


@pytest.fixture
def tree_of_one():
    """The name of a segment that another process owns, and its pid."""
    with start_python(
        "import sys; from posix_ipc.mp_integration import SharedMemory\n"
        "handle = SharedMemory(size=8); print('ready', flush=True); print(handle.name, flush=True); sys.stdin.read()\n"
    ) as child:
        wait_until_ready(child)
        yield child.stdout.readline().strip(), child.pid
        child.communicate(timeout=30)


def test_sharing_and_claims_are_told(tree_of_one):
    name, pid = tree_of_one
    handle = mp_integration.SharedMemory.attach(name)
    handle.__reduce__()  # what pickling does: it writes a claim
    owners = {owner.claim: owner for owner in look(name).owners}
    assert owners[False].pid == pid
    assert owners[True].shared
    handle.close()


def test_all_of_it_is_fit_for_json(make):
    handle = make()
    found = look(handle.name)
    assert json.loads(json.dumps(found.as_dict()))["name"] == handle.name
    assert json.loads(json.dumps(found.as_dict()))["holders"][0]["pid"] == os.getpid()


@pytest.mark.parametrize("tail", [":", "\n", "é", " (deleted)", b"\xff", "x" * 200])
def test_names_are_data(make, name, tail):
    name = os.fsdecode(os.fsencode(name) + os.fsencode(tail))
    handle = make(name)
    found = look(name)
    assert (found.name, found.verdict) == (handle.name, "live")


def test_other_packages_objects_have_the_right_kind():
    code = (
        "import multiprocessing, sys; from multiprocessing import shared_memory\n"
        "lock = multiprocessing.get_context('spawn').Lock()\n"
        "segment = shared_memory.SharedMemory(create=True, size=9)\n"
        "print('ready', lock._semlock.name, segment.name, sep='\\n', flush=True); sys.stdin.read(); segment.unlink()\n"
    )
    with start_python(code) as child:
        wait_until_ready(child)
        lock, segment = (child.stdout.readline().strip() for _ in range(2))
        assert lock.startswith("/mp-")
        assert segment.startswith("psm_")
        assert (look(lock).kind, look(f"/{segment}").kind) == ("semaphore", "shared_memory")
        child.communicate(timeout=30)


def test_a_report_of_leaks_cannot_steer_the_terminal():
    from posix_ipc._leak_report import LeftChild, LeftObject

    bad = "\x1b]0;pwned\x07"
    left = LeftObject("semaphore", bad, 1, False, 1, bad, bad, ()), LeftChild(1, bad, bad, "sleeping")
    for each in left:
        assert r"\x1b]0;pwned\x07" in str(each)
        assert "\x1b" not in str(each)


# ---- which of them ----


@pytest.mark.slow
def test_kinds_and_prefix(kind, make, name):
    handle = make(name)
    other = unique_name()
    for each in KINDS:
        found = leaks.inventory([KIND_NAMES[each]], prefix=name)
        assert [(each.kind, each.name) for each in found] == ([(KIND_NAMES[kind], name)] if each is kind else [])
    for prefix in (name, name[1:], name[:-1]):
        assert handle.name in [each.name for each in leaks.inventory(prefix=prefix)]
    assert leaks.inventory(prefix=other) == []


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"kinds": "semaphore"}, TypeError, "kinds"),
        ({"kinds": ["semaphores"]}, ValueError, "'semaphores' is none of semaphore, "),
        ({"kinds": 3}, TypeError, "iterable"),
        ({"prefix": b"/x"}, TypeError, "prefix"),
        ({"prefix": "/a/b"}, ValueError, "prefix"),
        ({"prefix": "a\0"}, ValueError, "prefix"),
    ],
)
def test_arguments_that_make_no_sense(arguments, error, says):
    with pytest.raises(error, match=says):
        leaks.inventory(**arguments)


@pytest.mark.parametrize("min_age", [-1, float("nan")])
def test_ages_that_make_no_sense(min_age):
    with pytest.raises(ValueError, match="min_age"):
        leaks.find_leaks(min_age=min_age)


# ---- looking changes nothing ----


def test_a_notification_stays(queue):
    handle = queue()
    handle.request_notification(signal.SIGUSR1)
    told = []
    before = signal.signal(signal.SIGUSR1, lambda *_: told.append(True))
    try:
        assert look(handle.name).verdict == "live"
        handle.send(b"x")
        wait_until(lambda: told)
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_record_locks_stay(segment):
    handle = segment()
    fcntl.lockf(handle.fd, fcntl.LOCK_EX)
    assert look(handle.name).verdict == "live"
    try_lock = "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'r+b'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    child = run_python(try_lock, SHARED_MEMORY.file_of(handle.name), check=False)
    assert "BlockingIOError" in child.stderr


def test_time_of_access_stays(semaphore):
    handle = semaphore()
    os.utime(SEMAPHORE.file_of(handle.name), (1, 1))  # so old that any read would be noted
    assert look(handle.name).value == 0
    assert os.stat(SEMAPHORE.file_of(handle.name)).st_atime == 1


def test_psutil_is_imported_by_who_asks_for_it():
    run_python(
        "import sys, posix_ipc.mp_integration as mp\n"
        "assert set(mp.__all__) <= set(dir(mp))\n"
        "assert {'psutil', 'posix_ipc.leaks'}.isdisjoint(sys.modules)\n"
        "assert mp.LeakError and 'psutil' in sys.modules\n"
        "import posix_ipc.leaks as leaks\n"
        "offered = set(leaks.__all__)\n"
        "assert offered == {name for name in mp.__all__ if name not in vars(mp)}\n"
        "assert all(getattr(mp, name) is getattr(leaks, name) for name in offered)\n"
        "assert not hasattr(mp, 'no_such_name')\n"
    )


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
@pytest.mark.no_sanitizer
def test_what_lives_is_not_locked(tree_of_one, semaphore):
    """Not for an instant: only journals are, and shared."""
    name, _ = tree_of_one
    code = "from posix_ipc import leaks; import sys; print(leaks.inventory(prefix=sys.argv[1])[0].verdict)"
    for each in (name, semaphore().name):
        child = run_python(code, each, prefix=["strace", "-f", "-y", "-qq", "-o", "/dev/stderr", "-e", "trace=flock"])
        assert child.stdout == "live\n"
        locked = [line for line in child.stderr.splitlines() if "flock(" in line]
        assert locked
        assert all("LOCK_SH" in line and "/.posix_ipc-" in line for line in locked)


def trace_a_look_at_what_is_leased():
    with dead_root("leased"):
        leased = [getattr(mp_integration, cls).attach(name) for cls, name in LEASED]
    code = "from posix_ipc import leaks; print(*(each.verdict for each in leaks.inventory()))"
    child = run_python(code, prefix=["strace", "-f", "-qq", "-o", "/dev/stderr", "-e", "trace=flock"])
    assert child.stdout == "live live live\n"
    assert "flock(" in child.stderr
    assert "LOCK_EX" not in child.stderr
    for each in leased:
        each.close()


LEASED = [("SharedMemory", "/pi-leased-m"), ("Semaphore", "/pi-leased-s"), ("MessageQueue", "/pi-leased-q")]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
@pytest.mark.no_sanitizer
def test_no_lock_is_tried_where_a_lease_is_seen():
    run_privately(trace_a_look_at_what_is_leased)


CHANGES = (
    "mount,umount2,fsopen,fsmount,move_mount,open_tree,mount_setattr,pivot_root,chroot,unshare,setns,"
    "creat,mkdir,mkdirat,mknod,mknodat,link,linkat,symlink,symlinkat,rename,renameat,renameat2,unlink,unlinkat,rmdir,"
    "truncate,ftruncate,fallocate,chmod,fchmod,fchmodat,chown,fchown,fchownat,lchown,utimensat,setxattr,fsetxattr,"
    "mq_unlink,mq_notify,mq_timedsend,mq_timedreceive,kill,tgkill,ptrace"
)


def trace_a_look_at_everything():
    with dead_root("free"):
        pass
    for kind in KINDS:
        kind.close_handle(kind.create("/pi-plain"))
    locked = SHARED_MEMORY.create("/pi-locked")
    fcntl.lockf(locked.fd, fcntl.LOCK_EX)
    before = record_locks()
    code = "from posix_ipc import leaks; print(*sorted({each.verdict for each in leaks.inventory()}))"
    traced = f"trace=flock,fcntl,open,openat,mq_open,{CHANGES}"
    strace = ["strace", "-f", "-y", "-qq", "-o", "/dev/stderr", "-e", traced]
    child = run_python(code, prefix=strace, env={"PYTHONDONTWRITEBYTECODE": "1"})
    assert child.stdout == "live orphan unheld\n"
    assert record_locks() == before != []
    calls = re.findall(r"^\d+ +(\w+)\((.*)", child.stderr, re.MULTILINE)
    assert {"flock", "openat", "mq_open"} <= {call for call, _ in calls} <= {"flock", "fcntl", "openat", "mq_open"}
    for call, arguments in calls:
        if call == "flock":
            assert re.search(r"/\.posix_ipc-.*LOCK_SH|/(sem\.)?pi-free-[msq]>", arguments), arguments
        else:
            assert not re.search("O_CREAT|O_TRUNC|F_SETLK|F_OFD_SETLK|F_SETLEASE|F_NOTIFY", arguments), arguments


def record_locks():
    with open("/proc/locks") as file:
        return sorted(line.split()[1:] for line in file if f" {os.getpid()} " in line)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
@pytest.mark.no_sanitizer
def test_a_look_mounts_locks_and_changes_nothing():
    """Seen from outside. What the dead have left is locked for an instant, to see whether anybody leases it."""
    run_privately(trace_a_look_at_everything)


def attach_while_a_lease_is_tried():
    with dead_root("free"):
        pass
    entries = [entry for _, contents in _owners.Records().journals for entry in contents.entries]
    assert sorted(entry.kind for entry in entries) == sorted(KIND_NAMES.values())
    for entry in entries:
        # An attacher has patience for 50 ms, in which this process may not get a processor.
        assert any(rides_out_a_try(entry) for _ in range(10))


def rides_out_a_try(entry):
    """Does who attaches while the helper of a look tries the lease wait, and get one?"""
    (kind,) = (kind for kind, name in KIND_NAMES.items() if name == entry.kind)
    outcome = []

    def attach():
        try:
            getattr(mp_integration, kind.type.__name__).attach(os.fsdecode(entry.name)).close()
            outcome.append(True)
        except (posix_ipc.Error, OSError):
            outcome.append(False)

    thread = threading.Thread(target=attach)
    with _owners.locked_if_free(entry, ()) as said:
        assert said == _owners.FREE
        thread.start()
        wait_until(lambda: outcome or sleeps(thread))
    thread.join()
    return outcome[0]


def sleeps(thread):
    with contextlib.suppress(FileNotFoundError), open(f"/proc/self/task/{thread.native_id}/wchan") as file:
        return "nanosleep" in file.read()


@pytest.mark.slow
def test_an_attacher_rides_out_a_look():
    run_privately(attach_while_a_lease_is_tried)


# ---- whom one cannot see ----


def look_as_nobody(plain, leased):
    become_nobody()
    survey = leaks.survey()
    found = {each.name: each for each in survey.objects}
    assert os.getppid() in survey.unread_pids
    assert found[plain].verdict == "unknown"
    assert "cannot be read" in found[plain].reason
    assert "Permission denied" in survey.unread[0]
    assert (found[leased].verdict, found[leased].holders) == ("live", ())  # the kernel lists the lock
    assert str(os.getppid()) in found[leased].reason
    assert found[plain].value is None
    zombies = {each.pid for each in psutil.process_iter() if each.status() == psutil.STATUS_ZOMBIE}
    assert not zombies & set(survey.unread_pids)


@pytest.mark.slow
def test_another_users_processes_cannot_be_read(semaphore):
    plain = semaphore().name
    leased = mp_integration.SharedMemory(unique_name(), posix_ipc.O_CREX, size=8)
    zombie = subprocess.Popen(["true"])
    wait_until(lambda: psutil.Process(zombie.pid).status() == psutil.STATUS_ZOMBIE)
    run_function(look_as_nobody, plain, leased.name)
    zombie.wait()
    leased.unlink()
    leased.close()


def look_where_processes_are_hidden():
    posix_ipc.SharedMemory("/pi-plain", posix_ipc.O_CREX, size=8).close()
    os.chmod("/dev/shm/pi-plain", 0o666)
    subprocess.run(["mount", "-o", "remount,hidepid=2", "/proc"], check=True)
    assert look("/pi-plain").verdict == "unheld"  # root sees them all the same
    become_nobody()
    found = look("/pi-plain")
    assert (found.verdict, "hidepid" in found.reason) == ("unknown", True)


@pytest.mark.slow
def test_hidden_processes():
    run_privately(look_where_processes_are_hidden)


# ---- what nobody holds ----


def names_of(found):
    return sorted(each.name for each in found)


def look_at_what_nobody_holds():
    zombie = subprocess.Popen(["true"])  # holds nothing, and that can be told
    posix_ipc.SharedMemory("/pi-segment", posix_ipc.O_CREX, size=8).close()
    posix_ipc.Semaphore("/pi-semaphore", posix_ipc.O_CREX).close()
    posix_ipc.Semaphore("/AbC123", posix_ipc.O_CREX).close()
    with open("/dev/shm/sem.pi-truncated", "wb"), open("/dev/shm/.posix_ipc.tmp-0", "wb"):
        pass
    os.mkdir("/dev/shm/pi-directory")
    os.symlink("pi-segment", "/dev/shm/pi-link")
    found = {each.name: each for each in leaks.inventory()}
    assert sorted(found) == ["/.posix_ipc.tmp-0", "/AbC123", "/pi-segment", "/pi-semaphore", "/pi-truncated"]
    assert {each.verdict for each in found.values()} == {"unheld"}
    assert "PID namespace" in found["/pi-segment"].reason
    assert "glibc" in found["/AbC123"].reason
    assert "glibc" not in found["/pi-semaphore"].reason
    assert "truncated" in found["/pi-truncated"].reason
    assert found["/pi-truncated"].value is None
    assert "killed before" in found["/.posix_ipc.tmp-0"].reason
    assert leaks.find_leaks() == []
    assert names_of(leaks.find_leaks(unheld=True)) == sorted(found)
    assert names_of(leaks.find_leaks(unheld=True, prefix="pi-s")) == ["/pi-segment", "/pi-semaphore"]
    assert leaks.find_leaks(unheld=True, min_age=1000) == []
    time.sleep(0.2)
    posix_ipc.Semaphore("/pi-young", posix_ipc.O_CREX).close()
    assert names_of(leaks.find_leaks(unheld=True, min_age=0.2)) == sorted(found)
    with open("/dev/shm/.posix_ipc.tmp-0", "rb"):  # being made
        assert look("/.posix_ipc.tmp-0") is None
    zombie.wait()


@pytest.mark.slow
def test_nobody_holds_it():
    run_privately(look_at_what_nobody_holds)


def look_at_queues_with_and_without_a_mount():
    posix_ipc.MessageQueue("/pi-queue", posix_ipc.O_CREX, **SMALL_QUEUE).close()
    held = posix_ipc.MessageQueue("/pi-held", posix_ipc.O_CREX, **SMALL_QUEUE)
    survey = leaks.survey(["message_queue"])
    assert names_of(survey.objects) == ["/pi-held"]
    assert not survey.all_queues
    assert any("no mqueue file system" in limit for limit in survey.limits)
    point = "/dev/shm/a mount"
    os.mkdir(point)
    subprocess.run(["mount", "-t", "mqueue", "none", point], check=True)
    survey = leaks.survey(["message_queue"])
    assert survey.all_queues
    assert not any("mqueue" in limit for limit in survey.limits)
    assert [(each.name, each.verdict) for each in survey.objects] == [("/pi-held", "live"), ("/pi-queue", "unheld")]
    with open(f"{point}/pi-queue"):  # opened by its path it is the same queue
        assert look("/pi-queue").holders[0].pid == os.getpid()
    os.chmod(f"{point}/pi-queue", 0o640)
    become_nobody()
    survey = leaks.survey(["message_queue"])
    queue = survey.objects[1]
    assert (queue.name, queue.messages, queue.mode, queue.uid) == ("/pi-queue", None, 0o640, 0)
    assert (queue.verdict, queue.identity[1]) == ("unknown", os.stat(f"{point}/pi-queue").st_ino)
    held.close()


def look_at_queues_beside_a_mount_of_others():
    posix_ipc.MessageQueue("/pi-there", posix_ipc.O_CREX, **SMALL_QUEUE).close()
    point = "/dev/shm/mount"
    os.mkdir(point)
    subprocess.run(["mount", "-t", "mqueue", "none", point], check=True)
    assert leaks.survey(["message_queue"]).all_queues
    assert not leaks.survey(["message_queue"], prefix="/no-such").objects
    run_function(look_from_another_ipc_namespace, prefix=["unshare", "-i"])
    subprocess.run(["mount", "-t", "tmpfs", "none", point], check=True)
    with open(f"{point}/pi-there", "wb"):  # no queue, but where one was listed
        survey = leaks.survey(["message_queue"])
    assert (survey.all_queues, survey.objects) == (False, [])


def look_from_another_ipc_namespace():
    for prefix in None, "/pi-t", "/no-such":
        survey = leaks.survey(["message_queue"], prefix)
        assert (survey.all_queues, survey.objects) == (False, [])
        assert any("no mqueue file system of this IPC namespace" in limit for limit in survey.limits)
    # One that is held, then one that has the same name there.
    for name in "/pi-here", "/pi-there":
        with contextlib.closing(posix_ipc.MessageQueue(name, posix_ipc.O_CREX, **SMALL_QUEUE)) as held:
            survey = leaks.survey(["message_queue"])
            assert (survey.all_queues, names_of(survey.objects)) == (False, [name])
            assert survey.objects[0].identity[0] == os.fstat(held.mqd).st_dev
            told = run_python("from posix_ipc.__main__ import main; main(['names'])").stdout.splitlines()
            assert told == ["/pi-there"] * (name == "/pi-there")
            held.unlink()


@pytest.mark.slow
def test_a_mount_of_another_ipc_namespace_lists_nothing():
    run_privately(look_at_queues_beside_a_mount_of_others)


def look_at_a_queue_that_cannot_be_opened():
    posix_ipc.MessageQueue("/pi-queue", posix_ipc.O_CREX, mode=0, **SMALL_QUEUE).close()
    code = "from posix_ipc import _survey; print(_survey.survey(_survey.Wanted(None, None, [b'/pi-queue'])).objects)"
    told = run_python(code, prefix=["setpriv", "--bounding-set", "-dac_override,-dac_read_search"]).stdout
    for word in "verdict='unknown'", "uid=None", "owner='not known'", "mode=None", "no mount tells":
        assert word in told


@pytest.mark.skipif(shutil.which("setpriv") is None, reason="needs setpriv")
@pytest.mark.slow
def test_a_queue_that_cannot_be_opened_is_unknown():
    run_privately(look_at_a_queue_that_cannot_be_opened)


def look_while_somebody_takes_over():
    """After the leases were tried and before the end of the look, as a sweep would see it."""
    from posix_ipc import _probe

    ask = _probe.look

    def ask_and_change(*arguments):
        answers = ask(*arguments)
        with contextlib.closing(mp_integration.SharedMemory.attach("/pi-free-m")) as handle:
            handle.take_ownership()
        with contextlib.closing(mp_integration.Semaphore.attach("/pi-free-s")) as handle:
            _reaper.disown(handle._identity)  # its owner lets it persist
        return answers

    with dead_root("free"):
        pass
    _probe.look = ask_and_change
    verdicts = {each.name: each.verdict for each in leaks.inventory()}
    assert verdicts == {"/pi-free-m": "live", "/pi-free-s": "unheld", "/pi-free-q": "orphan"}


@pytest.mark.slow
def test_who_takes_over_during_the_look_is_seen():
    run_privately(look_while_somebody_takes_over)


def look_where_an_intent_was_refused():
    """The kernel refuses a queue of such a name after the intent was written down; the process died just then."""
    slot = struct.pack("=BBBxHxxQQQ", 1, ord("q"), 0, 4, 0, 0, 0) + b"/a/b"
    header = bad_journals()["slot"][:288]
    with living_journal(header + slot.ljust(288, b"\0"), os.geteuid()) as holder:
        holder.kill()
        holder.wait()
        assert leaks.inventory() == []
        assert leaks.survey().unread == ()


@pytest.mark.slow
def test_an_intent_of_an_impossible_name_is_no_queue():
    run_privately(look_where_an_intent_was_refused)


def look_where_processes_are_hidden_from_the_root_of_a_user_namespace():
    posix_ipc.SharedMemory("/pi-plain", posix_ipc.O_CREX, size=8).close()
    subprocess.run(["mount", "-o", "remount,hidepid=2", "/proc"], check=True)
    code = "from posix_ipc import leaks; print(*((each.verdict, each.reason) for each in leaks.inventory()))"
    without = ["setpriv", "--bounding-set", "-sys_ptrace"]
    for prefix in ["unshare", "-U", "--map-root-user"], without:
        told = run_python(code, prefix=prefix).stdout
        assert told.startswith("('unknown', ")
        assert "hidepid" in told


@pytest.mark.skipif(shutil.which("setpriv") is None, reason="needs setpriv")
@pytest.mark.slow
def test_processes_hidden_from_the_root_of_a_user_namespace():
    run_privately(look_where_processes_are_hidden_from_the_root_of_a_user_namespace)


def look_without_a_helper():
    """Then neither queues nor leases can be told, and nothing is called an orphan."""
    with dead_root("free"):
        held = posix_ipc.MessageQueue("/pi-held", posix_ipc.O_CREX, **SMALL_QUEUE)
    multiprocessing.set_executable("/bin/false")
    survey = leaks.survey()
    assert {each.name: each.verdict for each in survey.objects} == {"/pi-free-m": "unknown", "/pi-free-s": "unknown"}
    assert "the helper process failed" in survey.unread[0]
    assert survey.failure == survey.unread[0]
    held.close()


def look_from_a_frozen_application():
    """The program is that application, not an interpreter: the helper is a fork, and starts nothing."""
    with dead_root("free"):
        pass
    sys.frozen = True
    multiprocessing.set_executable("/bin/false")
    survey = leaks.survey()
    assert {each.name: each.verdict for each in survey.objects}["/pi-free-s"] == "orphan"
    assert survey.unread == ()


@pytest.mark.slow
def test_helper_of_a_frozen_application():
    run_privately(look_from_a_frozen_application)


@pytest.mark.slow
def test_helper_fails():
    run_privately(look_without_a_helper)


def test_a_look_without_descriptors_lists_no_queue_that_may_not_exist(monkeypatch, queue):
    """Which error came first says nothing of the queue: it could not be looked at."""
    names = [os.fsencode(queue().name), b"/" + unique_name().lstrip("/").encode()]

    def ask(function, given):
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
        try:
            return function(given)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    monkeypatch.setattr(_helper, "ask", ask)
    answers = _probe.look(names, [], [])
    assert answers.queues == {}
    assert os.strerror(errno.EMFILE) in answers.failure


@pytest.mark.slow
def test_queues_with_and_without_a_mount():
    run_privately(look_at_queues_with_and_without_a_mount)


# ---- orphans, and what reap() makes of them ----

ROOT = """
import os, sys
from posix_ipc.mp_integration import MessageQueue, Semaphore, SharedMemory
small = {"max_messages": 1, "max_message_size": 8}
made = [(SharedMemory(f"/pi-{each}-m", 64 | 128, size=8), Semaphore(f"/pi-{each}-s", 64 | 128),
         MessageQueue(f"/pi-{each}-q", 64 | 128, **small)) for each in sys.argv[1:]]
print("ready", flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def dead_root(*names):
    """Let a process make one object of each kind for each name; then it is killed, and its tracker before."""
    with start_python(ROOT, *names) as root:
        wait_until_ready(root)
        yield root
        kill_trackers(root.pid)
        root.kill()
        root.wait()


def kill_trackers(root):
    for each in wait_until(lambda: trackers(_journal.token_of(root))):
        each.kill()
        wait_until(lambda each=each: has_ended(each))


def look_at_orphans():
    attach = mp_integration.SharedMemory.attach, mp_integration.Semaphore.attach, mp_integration.MessageQueue.attach
    with dead_root("free", "leased", "held", "claimed", "sent", "taken") as root:
        leased = [cls(f"/pi-leased-{kind}") for cls, kind in zip(attach, "msq", strict=True)]
        # Without a lease: it keeps the memory, not the name.
        held = (
            posix_ipc.SharedMemory("/pi-held-m"),
            posix_ipc.Semaphore("/pi-held-s"),
            posix_ipc.MessageQueue("/pi-held-q"),
        )
        for cls, kind in zip(attach, "msq", strict=True):
            with contextlib.closing(cls(f"/pi-claimed-{kind}")) as claimed:
                claimed.__reduce__()
            with contextlib.closing(cls(f"/pi-taken-{kind}")) as taken:
                taken.take_ownership()
        assert leaks.find_leaks() == []
        assert {each.verdict for each in leaks.inventory()} == {"live"}
        assert {owner.pid for owner in look("/pi-free-m").owners} == {root.pid}
    posix_ipc.unlink_shared_memory("/pi-sent-m")
    posix_ipc.SharedMemory("/pi-sent-m", posix_ipc.O_CREX, size=8).close()  # another one of that name
    verdicts = {each.name: each.verdict for each in leaks.inventory()}
    orphans = leaks.find_leaks()
    assert names_of(orphans) == sorted(
        [*(f"/pi-{each}-{kind}" for each in ("free", "held") for kind in "msq"), "/pi-sent-s", "/pi-sent-q"]
    )
    assert verdicts["/pi-sent-m"] == "unheld"
    assert verdicts["/pi-leased-m"] == verdicts["/pi-claimed-q"] == verdicts["/pi-taken-s"] == "live"
    for each in orphans:
        assert each.tracked
        assert [(owner.pid, owner.alive) for owner in each.owners] == [(root.pid, False)]
        holds = each.name.startswith("/pi-held")
        assert [holder.pid for holder in each.holders] == [os.getpid()] * holds
        assert ("not the name" in each.reason) == holds
    assert names_of(leaks.find_leaks(prefix="pi-held")) == ["/pi-held-m", "/pi-held-q", "/pi-held-s"]
    assert leaks.find_leaks(min_age=1000) == []
    removed = mp_integration.reap()
    assert sorted((each.kind, each.name, each.identity) for each in removed) == sorted(
        (each.kind, each.name, each.identity) for each in orphans
    )
    assert names_of(leaks.inventory()) == sorted(set(verdicts) - set(names_of(orphans)) - {"/pi-held-q"})
    assert leaks.find_leaks() == []
    for each in (*leased, *held):
        each.close()
    assert names_of(leaks.find_leaks()) == ["/pi-leased-m", "/pi-leased-q", "/pi-leased-s"]
    assert len(mp_integration.reap()) == 3
    for kind, unlink in zip("msq", (kind.unlink for kind in (SHARED_MEMORY, SEMAPHORE, MESSAGE_QUEUE)), strict=True):
        for each in ("claimed", "taken"):
            unlink(f"/pi-{each}-{kind}")


@pytest.mark.slow
def test_orphans_are_what_reap_removes():
    run_privately(look_at_orphans)


# ---- journals that make no sense ----


def look_beside_bad_journals_of_another_user():
    posix_ipc.SharedMemory("/pi-of-root", posix_ipc.O_CREX, size=8).close()
    posix_ipc.SharedMemory("/pi-of-nobody", posix_ipc.O_CREX, size=8).close()
    os.chown("/dev/shm/pi-of-nobody", NOBODY, NOBODY)
    for data in bad_journals().values():
        with living_journal(data, NOBODY):
            survey = leaks.survey()
            found = {each.name: each for each in survey.objects}
            assert (found["/pi-of-root"].verdict, found["/pi-of-nobody"].verdict) == ("unheld", "unknown")
            assert "cannot be understood" in found["/pi-of-nobody"].reason
            assert len(survey.unread) == 1


def look_beside_a_journal_that_another_user_bars():
    """A lease of fcntl(2) lets nobody open the file, not even root, without waiting for who has it."""
    posix_ipc.SharedMemory("/pi-of-root", posix_ipc.O_CREX, size=8).close()
    code = (
        "import fcntl, os, signal, sys\n"
        "signal.signal(signal.SIGIO, signal.SIG_IGN)\n"
        f"os.setresuid({NOBODY}, {NOBODY}, {NOBODY})\n"
        f"os.mkdir('/dev/shm/.posix_ipc-{NOBODY}', 0o700)\n"
        f"descriptor = os.open('/dev/shm/.posix_ipc-{NOBODY}/1-1-1.j0', os.O_CREAT | os.O_RDWR, 0o600)\n"
        "fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_WRLCK)\n"
        "print('ready', flush=True); sys.stdin.read()\n"
    )
    with start_python(code) as child:
        wait_until_ready(child)
        survey = leaks.survey()
    assert [(each.name, each.verdict) for each in survey.objects] == [("/pi-of-root", "unheld")]
    assert "cannot be told" in survey.unread[0]


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_journal_that_another_user_bars():
    run_privately(look_beside_a_journal_that_another_user_bars)


def test_no_process_has_so_large_a_pid():
    assert not _journal._exists(10**30)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.slow
def test_bad_journals_of_another_user_say_nothing_of_ones_own():
    run_privately(look_beside_bad_journals_of_another_user)


def look_beside_bad_journals():
    """What a living process owns, as one that no version here understands may say, is not known."""
    with dead_root("free"):
        posix_ipc.SharedMemory("/pi-plain", posix_ipc.O_CREX, size=8).close()
    for what, data in bad_journals().items():
        with living_journal(data, os.geteuid()):
            verdicts = {each.name: each.verdict for each in leaks.inventory()}
            assert verdicts.pop("/pi-plain") == "unknown"
            # A sweep asks the slots of the living only what they protect, and those can be read.
            orphans = "orphan" if what in ("slot", "name") else "unknown"
            assert set(verdicts.values()) == {orphans}
            if orphans == "unknown":
                assert mp_integration.reap() == []
    with living_journal(bad_journals()["slot"], os.geteuid()):
        assert len(mp_integration.reap()) == 3


@pytest.mark.slow
def test_beside_bad_journals_nothing_is_unheld():
    run_privately(look_beside_bad_journals)


def kill_a_worker_whose_object_is_in_flight():
    code = (
        "import multiprocessing, os, sys; from posix_ipc.mp_integration import SharedMemory\n"
        "def work(pipe):\n"
        "    kept, sent = SharedMemory('/pi-kept', 64 | 128, size=8), SharedMemory('/pi-sent', 64 | 128, size=8)\n"
        "    pipe.send(sent); os.kill(os.getpid(), 9)\n"
        "reader, writer = multiprocessing.Pipe(duplex=False)\n"
        "mine = SharedMemory(size=8)\n"
        "worker = multiprocessing.get_context('fork').Process(target=work, args=(writer,))\n"
        "worker.start(); worker.join()\n"
        "print('ready', flush=True); sys.stdin.read()\n"
    )
    with start_python(code) as root:
        wait_until_ready(root)
        wait_until(lambda: look("/pi-kept") is None)  # the tracker has done its work
        found = look("/pi-sent")
        assert (found.verdict, found.holders) == ("live", ())
        assert f"in flight: pid {root.pid}" in found.reason
        kill_trackers(root.pid)
    assert look("/pi-sent").verdict == "orphan"
    assert "/pi-sent" in [each.name for each in mp_integration.reap()]


@pytest.mark.slow
def test_a_pickle_in_flight_is_live_as_long_as_the_root():
    run_privately(kill_a_worker_whose_object_is_in_flight)


def look_from_another_pid_namespace():
    attach = "import sys; from posix_ipc.mp_integration import SharedMemory; import posix_ipc\n"
    with dead_root("free", "leased"):
        lease = attach + "held = SharedMemory.attach('/pi-leased-m'); print('ready', flush=True); sys.stdin.read()"
        holder = start_python(lease)
        child = holder.__enter__()
        wait_until_ready(child)
    plain = posix_ipc.SharedMemory("/pi-plain", posix_ipc.O_CREX, size=8)
    inside = (
        "from posix_ipc import leaks\n"
        "survey = leaks.survey(['shared_memory'])\n"
        "print({each.name: (each.verdict, each.holders, each.reason) for each in survey.objects}, survey.limits)\n"
    )
    told = run_python(inside, prefix=["unshare", "-pf", "--mount-proc"]).stdout
    assert "'/pi-free-m': ('orphan', ()," in told
    assert "'/pi-leased-m': ('live', ()," in told
    assert "by a process that cannot be seen" in told
    assert "'/pi-plain': ('unheld', ()," in told  # visible holders are all that can be told
    assert told.count("outside this PID namespace") == 2
    plain.close()
    holder.__exit__(None, None, None)
    mp_integration.reap()


@pytest.mark.slow
def test_another_pid_namespace():
    run_privately(look_from_another_pid_namespace)


def create_as_nobody():
    become_nobody()
    mp_integration.SharedMemory("/pi-m", posix_ipc.O_CREX, size=8)
    mp_integration.Semaphore("/pi-s", posix_ipc.O_CREX)
    mp_integration.MessageQueue("/pi-q", posix_ipc.O_CREX, **SMALL_QUEUE)
    # This child ends without a word, and whom it started cannot have started: nobody may run this interpreter.


def reap_as_nobody(count):
    become_nobody()
    assert len(_reaper.reap()) == count


def look_at_what_another_user_left():
    run_forked(create_as_nobody)
    found = {each.name: each for each in leaks.inventory()}
    assert sorted(found) == ["/pi-m", "/pi-q", "/pi-s"]
    assert all((each.verdict, each.tracked) == ("unheld", True) for each in found.values())
    assert "that user's reap()" in found["/pi-m"].reason
    assert leaks.find_leaks() == []
    run_forked(reap_as_nobody, 3)


@pytest.mark.slow
def test_what_another_user_left():
    run_privately(look_at_what_another_user_left)


def pretend_to_own_as_nobody():
    become_nobody()
    mp_integration.SharedMemory.attach("/pi-of-root").take_ownership()


def look_at_what_another_user_pretends_to_own():
    posix_ipc.SharedMemory("/pi-of-root", posix_ipc.O_CREX, size=8).close()
    os.chmod("/dev/shm/pi-of-root", 0o666)
    run_forked(pretend_to_own_as_nobody)
    found = look("/pi-of-root")
    assert (found.verdict, found.tracked, found.owners) == ("unheld", False, ())


@pytest.mark.slow
def test_what_another_user_pretends_to_own():
    run_privately(look_at_what_another_user_pretends_to_own)


# ---- while everything moves ----


def look_while_files_come_and_go():
    code = (
        "import os, sys\n"
        "steady = os.open(f'/dev/shm/steady-{sys.argv[1]}', os.O_CREAT | os.O_RDWR)\n"
        "os.dup2(steady, 900); os.close(steady)\n"  # it is looked at after those that come and go
        "while True:\n"
        "    held = [os.open(f'/dev/shm/{sys.argv[1]}{each}', os.O_CREAT | os.O_RDWR) for each in range(200)]\n"
        "    for each, fd in enumerate(held): os.unlink(f'/dev/shm/{sys.argv[1]}{each}'); os.close(fd)\n"
    )
    with start_python(code, "a"), start_python(code, "b"):
        wait_until(lambda: look("/steady-a") and look("/steady-b"))
        for _ in range(10):
            found = {each.name: each.verdict for each in leaks.inventory()}
            assert found["/steady-a"] == found["/steady-b"] == "live"


@pytest.mark.slow
def test_files_and_descriptors_come_and_go():
    run_privately(look_while_files_come_and_go)


class Mortal:
    """Objects, or a process that holds some, which cease to be in the midst of a look."""

    def __init__(self, is_process):
        handles = [kind.create("/pi-mortal") for kind in KINDS]
        self._pid = os.fork() if is_process else None
        if self._pid == 0:
            signal.pause()
        for kind, handle in zip(KINDS, handles, strict=True):
            kind.close_handle(handle)

    def is_in(self, values):
        """Is one of some local variables about it?"""
        return any(self._is_about(value) for value in values)

    def _is_about(self, value):
        if self._pid is None:
            return isinstance(value, (str, bytes, tuple)) and "pi-mortal" in repr(value)
        if isinstance(value, (str, bytes)):
            return f"/{self._pid}/" in os.fsdecode(value)
        return self._pid in (value, getattr(value, "pid", None))

    def vanish(self):
        if self._pid is None:
            self.remove()
        else:
            self.end()

    def end(self):
        if self._pid is not None:
            with contextlib.suppress(ProcessLookupError, ChildProcessError):  # it has ended
                os.kill(self._pid, signal.SIGKILL)
                os.waitpid(self._pid, 0)

    def remove(self):
        for kind in KINDS:
            kind.remove("/pi-mortal")


def survey_without(mortal, moment):
    """Look around, while it vanishes before the call about it that is the n-th; and whether there were so many."""
    calls = 0

    def count(frame, event, argument):
        nonlocal calls
        if event == "c_call" and mortal.is_in(frame.f_locals.values()):
            calls += 1
            if calls == moment:
                mortal.vanish()

    sys.setprofile(count)
    try:
        survey = leaks.survey()
    finally:
        sys.setprofile(None)
    return survey, calls >= moment


def look_while_it_vanishes(is_process):
    sys.frozen = True  # helpers are forks, which this look goes on in
    os.mkdir("/dev/shm/mount")
    subprocess.run(["mount", "-t", "mqueue", "none", "/dev/shm/mount"], check=True)
    steady = [kind.create("/pi-steady") for kind in KINDS]
    moment, reached = 0, True
    while reached:
        moment += 1
        mortal = Mortal(is_process)
        survey, reached = survey_without(mortal, moment)
        assert survey.failure is None
        assert survey.unread == ()
        verdicts = {(each.kind, each.name): each.verdict for each in survey.objects}
        assert [verdicts.pop((KIND_NAMES[kind], "/pi-steady")) for kind in KINDS] == ["live"] * 3
        assert {name for _, name in verdicts} <= {"/pi-mortal"}
        assert set(verdicts.values()) <= {"live", "unheld"}
        assert len(verdicts) == 3 or not is_process
        assert all(holder.started for each in survey.objects for holder in each.holders)
        mortal.end()
        mortal.remove()
    assert moment > 20
    for kind, handle in zip(KINDS, steady, strict=True):
        kind.close_handle(handle)


@pytest.mark.slow
@pytest.mark.parametrize("is_process", [False, True], ids=["objects", "process"])
def test_what_vanishes_in_the_midst_of_a_look(is_process):
    """Before each call of the look that is about it."""
    run_privately(look_while_it_vanishes, is_process)
