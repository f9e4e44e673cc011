"""leak_check: what a block leaves behind in this process and its children is told, what others do meanwhile is not."""

import asyncio
import contextlib
import contextvars
import ctypes
import functools
import linecache
import mmap
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import leaving
import pytest
from leaving import (
    have_a_child_make,
    make_all,
    make_and_die,
    make_tracked_and_die,
    run_child,
    wait_for_it,
)
from support import (
    CLONE_NEWNS,
    KINDS,
    MESSAGE_QUEUE,
    NOBODY,
    SEMAPHORE,
    SHARED_MEMORY,
    SMALL_QUEUE,
    enter_new_namespaces,
    finish,
    libc,
    run_function,
    run_python,
    run_threads,
    start_python,
    wait_until,
    wait_until_ready,
)

import posix_ipc

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="it reads /proc")
pytest.importorskip("posix_ipc.mp_integration")

from posix_ipc import _trace, mp_integration  # noqa: E402
from posix_ipc._leak_check import Check  # noqa: E402
from posix_ipc.leaks import LeakError, leak_check  # noqa: E402

EVENT_NAMES = {SEMAPHORE: "semaphore", SHARED_MEMORY: "shared_memory", MESSAGE_QUEUE: "message_queue"}
SIZES = {SEMAPHORE: 32, SHARED_MEMORY: 64, MESSAGE_QUEUE: 128}
METHODS = ["fork", "spawn", "forkserver"]
each_method = pytest.mark.parametrize("method", METHODS)


def make(kind, name):
    leaving.make(kind.type.__name__, name)


@contextlib.contextmanager
def leaking(**flags):
    """The block leaves something behind; the report, which is there after it, says what."""
    check = leak_check(**flags)
    report = check.__enter__()
    yield report
    with pytest.raises(LeakError) as caught:
        check.__exit__(None, None, None)
    assert caught.value.report is report
    assert str(caught.value) == str(report)


def only(report, what):
    """The one thing that is reported, which is one of `what`."""
    found = {field: getattr(report, field) for field in ("objects", "fds", "mappings", "children")}
    assert {field for field, left in found.items() if left} == {what}, str(report)
    (left,) = found[what]
    return left


def told_line(left):
    """The text of the line that is said to have created an object."""
    return linecache.getline(left.where[-1].filename, left.where[-1].lineno).strip()


@pytest.fixture(autouse=True)
def nothing_is_traced_afterwards():
    before = list(_trace._active)
    yield
    assert _trace._active == before


# ---- objects ----


def test_object_of_this_process(kind, name):
    with leaking() as report:
        make(kind, name)
    left = only(report, "objects")
    assert (left.kind, left.name, left.size, left.tracked) == (EVENT_NAMES[kind], name, SIZES[kind], False)
    assert (left.pid, left.process) == (os.getpid(), "MainProcess")
    assert left.command == " ".join(sys.orig_argv)
    assert [frame.name for frame in left.where] == ["test_object_of_this_process", "make", "make"]
    assert told_line(left).startswith("handle = getattr(posix_ipc, kind)(name")
    text = str(report)
    assert text.startswith("left behind: 1 object\n")
    assert all(word in text for word in (EVENT_NAMES[kind], name, f"{SIZES[kind]} bytes", str(os.getpid()), "in make"))
    kind.remove(name)


def test_object_that_was_unlinked_is_not_left(kind, names):
    with leak_check() as report:
        for _ in range(3):
            name = names()
            handle = kind.create(name)
            handle.unlink()
            kind.close_handle(handle)
        make(kind, name)
        kind.remove(name)  # behind the back of the module
    assert not report
    assert str(report) == "nothing was left behind"


def test_object_made_anew_after_its_removal(kind, name):
    with leaking() as report:
        make(kind, name)
        kind.unlink(name)
        make(kind, name)
    assert only(report, "objects").name == name
    kind.remove(name)


@pytest.mark.slow
@pytest.mark.parametrize("spelling", ["{}é\n", "{}\udcff", "bare", "/{}"])
def test_spellings_of_a_name(kind, name, spelling):
    spelled = name[1:] if spelling == "bare" else spelling.format(name)
    if kind is MESSAGE_QUEUE and spelling in ("bare", "/{}"):
        pytest.skip("no name of a queue")
    with leaking() as report:
        make(kind, spelled)
    assert only(report, "objects").name == spelled
    assert repr(spelled) in str(report)
    with leak_check():
        make(kind, spelled + "2")
        kind.unlink(os.fsencode(spelled + "2"))
    kind.remove(spelled)


def test_object_of_another_thread(kind, name):
    with leaking() as report:
        thread = threading.Thread(target=make, args=(kind, name))
        thread.start()
        thread.join()
    assert [frame.name for frame in only(report, "objects").where] == ["make", "make"]
    kind.remove(name)


def test_tracked_object_counts_while_its_process_lives(name):
    with leaking(fds=False, mappings=False) as report:
        segment = mp_integration.SharedMemory(name, posix_ipc.O_CREX, size=10)
    left = only(report, "objects")
    assert (left.name, left.tracked) == (name, True)
    assert told_line(left).startswith("segment = mp_integration.SharedMemory(")
    assert "tracked shared_memory" in str(report)
    with segment:
        pass


def test_manager_leaves_nothing():
    with leak_check() as report, mp_integration.IPCManager() as ipc:
        ipc.SharedMemory(size=10).buf[0] = 1
        ipc.Semaphore()
        ipc.MessageQueue(**SMALL_QUEUE)
    assert not report


def test_many_objects_take_no_memory(names):
    """Of those that are gone the trace keeps none for long; the line of one that stays is still known."""
    first = names()
    with leaking() as report:
        make(SEMAPHORE, first)
        for _ in range(500):
            name = names()
            make(SEMAPHORE, name)
            SEMAPHORE.unlink(name)
        assert len(_trace._active[-1]._events) < 300
    assert only(report, "objects").name == first
    SEMAPHORE.remove(first)


def test_objects_that_were_removed_elsewhere_take_no_memory(names, monkeypatch):
    monkeypatch.setattr(_trace, "UNDER_WAY", 0)
    with leak_check():
        for _ in range(500):
            name = names()
            make(SEMAPHORE, name)
            SEMAPHORE.remove(name)
        assert len(_trace._active[-1]._events) < 300


def test_each_of_many_objects_is_told(names):
    """Also that whose creation was heard, but had not happened, when the trace forgot others."""
    made = [names() for _ in range(150)]
    with leaking() as report:
        for name in made:
            make(SEMAPHORE, name)
    assert [left.name for left in report.objects] == made
    for name in made:
        SEMAPHORE.remove(name)


@pytest.mark.slow
def test_each_object_of_many_threads_is_told(names):
    kept = [[names() for _ in range(10)] for _ in range(6)]

    def work(names_kept, passing):
        for name in names_kept:
            make(SEMAPHORE, name)
            for _ in range(25):
                leaving.make_and_remove(passing)

    with leaking(fds=False, mappings=False) as report:
        run_threads(*(functools.partial(work, names_kept, names()) for names_kept in kept))
        assert len(_trace._active[-1]._events) < 1500
    assert {left.name for left in report.objects} == {name for names_kept in kept for name in names_kept}
    for left in report.objects:
        SEMAPHORE.remove(left.name)


def test_object_made_while_the_trace_forgets_others(names, monkeypatch):
    """As by a handler of a signal, which may come at any point of it; there the lock is not waited for."""
    exists = _trace.exists
    interrupting = [names() for _ in range(150)]
    made = []

    def interrupted(*arguments):
        if not made:
            made.append(names())
            for name in interrupting:
                make(SEMAPHORE, name)
        return exists(*arguments)

    with leaking() as report:
        make(SEMAPHORE, names())
        _trace._active[-1]._compact_at = 1
        with monkeypatch.context() as patch:
            patch.setattr(_trace, "UNDER_WAY", 0)
            patch.setattr(_trace, "exists", interrupted)
            leaving.make_and_remove(names())
        assert made
    assert [left.name for left in report.objects[1:]] == interrupting
    for left in report.objects:
        SEMAPHORE.remove(left.name)


@pytest.mark.parametrize("kind", [SEMAPHORE, SHARED_MEMORY], ids=["Semaphore", "SharedMemory"])
def test_name_that_is_taken_after_a_removal_during_which_the_trace_forgot(kind, name):
    """A removal is heard before it happens: the object is still there, and yet no longer ours."""
    with leak_check() as report:
        make(kind, name)
        _trace._active[-1]._compact_at = 1
        kind.unlink(name)
        Path(kind.file_of(name)).write_bytes(bytes(64))  # as another program would
    assert not report
    kind.remove(name)


def unlink_in_vain(name):
    """Another hook forbids to unlink: the object is still there, and still ours."""
    forbidding = True

    def hook(event, arguments):
        if event == "posix_ipc.unlink" and forbidding:
            raise PermissionError

    with leaking() as report:
        make(SHARED_MEMORY, name)
        sys.addaudithook(hook)
        with contextlib.suppress(PermissionError):
            posix_ipc.unlink_shared_memory(name)
    assert only(report, "objects").name == name
    forbidding = False
    posix_ipc.unlink_shared_memory(name)


@pytest.mark.slow
def test_failed_unlink(name):
    run_function(unlink_in_vain, name)


# ---- objects of children ----


def remove_all(names):
    for kind, name in zip(KINDS, names, strict=True):
        kind.remove(name)


@pytest.mark.slow
@each_method
def test_objects_of_a_child(names, method):
    made = [names() for _ in KINDS]
    with leaking() as report:
        pid, process = run_child(method, make_all, made)
    assert [(left.kind, left.name, left.size) for left in report.objects] == [
        (EVENT_NAMES[kind], name, SIZES[kind]) for kind, name in zip(KINDS, made, strict=True)
    ]
    assert {(left.pid, left.process) for left in report.objects} == {(pid, process)}
    assert all(left.where[-1].name == "make" for left in report.objects)
    assert not report.fds
    remove_all(made)


@pytest.mark.slow
@pytest.mark.parametrize("methods", [("spawn", "fork"), ("fork", "spawn")], ids="-".join)
def test_object_of_a_grandchild(name, methods):
    outer, inner = methods
    with leaking() as report:
        run_child(outer, have_a_child_make, inner, name)
    assert only(report, "objects").name == name
    SEMAPHORE.remove(name)


@pytest.mark.slow
@each_method
def test_object_of_a_pool(names, method):
    made = [names(), names()]
    with leaking() as report:
        pool = multiprocessing.get_context(method).Pool(2)
        pool.map(functools.partial(leaving.make, "SharedMemory"), made)
        pool.close()
        pool.join()
        del pool
    assert {left.name for left in report.objects} == set(made)
    assert all("PoolWorker" in left.process for left in report.objects)
    for name in made:
        SHARED_MEMORY.remove(name)


@pytest.mark.slow
def test_object_of_a_loky_worker(name):
    loky = pytest.importorskip("loky")
    with leaking() as report:
        executor = loky.ProcessPoolExecutor(1)
        executor.submit(leaving.make, "Semaphore", name).result(60)
        executor.shutdown()
        del executor
    left = only(report, "objects")
    assert (left.name, left.pid != os.getpid()) == (name, True)
    SEMAPHORE.remove(name)


@pytest.mark.slow
@each_method
def test_object_of_a_child_that_was_killed(name, method):
    with leaking() as report:
        run_child(method, make_and_die, name)
    assert only(report, "objects").name == name
    MESSAGE_QUEUE.remove(name)


@pytest.mark.slow
def test_tracked_object_of_a_child_that_was_killed_is_gone():
    """Not at once: the tracker gets the time to remove it."""
    with leak_check() as report:
        run_child("fork", make_tracked_and_die)
    assert not report


@pytest.mark.slow
@each_method
def test_child_removes_what_the_parent_made(name, method):
    with leak_check() as report:
        make(MESSAGE_QUEUE, name)
        run_child(method, posix_ipc.unlink_message_queue, name)
    assert not report


@pytest.mark.slow
def test_forked_child_that_leaves_the_block(name):
    """It is the parent's check, and stays that."""
    with leaking() as report:
        child = os.fork()
        if child == 0:
            try:
                with contextlib.suppress(ZeroDivisionError), leak_check():
                    make(SEMAPHORE, name)
                    1 / 0  # noqa: B018
                assert os.path.exists(_trace._active[-1].path)
                os._exit(0)
            finally:
                os._exit(1)
        assert os.waitpid(child, 0)[1] == 0
    assert only(report, "objects").pid == child
    SEMAPHORE.remove(name)


def leave_the_block_in_a_child():
    status = None
    with leak_check() as report:
        child = os.fork()
        if child:
            status = os.waitpid(child, 0)[1]
        else:
            os.open("/", os.O_RDONLY)  # which is left in the child
    if child == 0:
        os._exit(7)
    assert os.waitstatus_to_exitcode(status) == 7
    assert not report


@pytest.mark.slow
def test_block_that_is_left_in_a_forked_child_too():
    run_function(leave_the_block_in_a_child)


def test_torn_lines_are_skipped(name):
    with leaking() as report:
        with open(_trace._active[-1].path, "ab") as file:
            file.write(b'["Creation", 17, "semaph')
        run_child("fork", make, SEMAPHORE, name)
    assert only(report, "objects").name == name
    SEMAPHORE.remove(name)


def test_more_than_can_be_written_down_is_told(names, monkeypatch, recwarn):
    monkeypatch.setattr(_trace, "MOST_BYTES", 10)
    made = [names(), names()]
    with leaking() as report:
        for name in made:
            run_child("fork", leaving.make, "Semaphore", name)
    assert only(report, "objects").name == made[0]
    assert report.incomplete
    assert "more may be left" in str(report)
    assert "more than can be kept" in str(recwarn.pop(RuntimeWarning).message)
    for name in made:
        SEMAPHORE.remove(name)


def test_nothing_is_no_clean_bill_if_reports_were_cut_off(names, monkeypatch):
    monkeypatch.setattr(_trace, "MOST_BYTES", 0)
    made = names()
    with pytest.warns(RuntimeWarning, match="more than can be kept") as warned, leak_check() as report:
        run_child("fork", leaving.make, "Semaphore", made)
    assert [each.filename for each in warned if each.category is RuntimeWarning] == [__file__]
    assert not report
    assert report.incomplete
    assert str(report).splitlines() == [
        "nothing is known to have been left behind",
        "not all that children created could be kept: more may be left",
    ]
    SEMAPHORE.remove(made)


def test_file_of_the_children_that_the_block_removes(names, recwarn):
    """What this process leaves is told all the same, and that children are not heard."""
    made = [names(), names()]
    with leaking() as report:
        make(SEMAPHORE, made[0])
        os.unlink(_trace._active[-1].path)
        run_child("fork", make, SEMAPHORE, made[1])
        make(SHARED_MEMORY, made[1])
    assert [left.kind for left in report.objects] == ["semaphore", "shared_memory"]
    assert report.incomplete
    assert "removed the file" in str(recwarn.pop(RuntimeWarning).message)
    with leak_check() as report:
        os.unlink(_trace._active[-1].path)
    assert not report
    assert report.incomplete
    assert recwarn.pop(RuntimeWarning).filename == __file__
    for kind, name in ((SEMAPHORE, made[0]), (SEMAPHORE, made[1]), (SHARED_MEMORY, made[1])):
        kind.remove(name)


@pytest.mark.filterwarnings("error")
def test_exception_of_a_block_that_removes_the_file():
    with pytest.raises(KeyError), leak_check():
        os.unlink(_trace._active[-1].path)
        raise KeyError
    with pytest.raises(RuntimeWarning), leak_check():
        os.unlink(_trace._active[-1].path)


# ---- what the check leaves out ----


def test_excluded_blocks_in_excluded_blocks(names, segment):
    """As those of wider fixtures that ask for each other: only the outermost ends what is excluded."""
    kept = [segment(size=size) for size in (4096, 8192, 12288)]
    excluded = [names() for _ in KINDS]
    counted = names()
    heard = list(_trace._active)
    check = Check()
    check.start()
    with check.excluding():
        make(SEMAPHORE, excluded[0])
        with check.excluding(), check.excluding():
            make(SHARED_MEMORY, excluded[1])
            views = [memoryview(kept[0])]
        make(MESSAGE_QUEUE, excluded[2])
        views.append(memoryview(kept[1]))
        assert _trace._active == heard
    assert len(_trace._active) == len(heard) + 1
    make(SEMAPHORE, counted)
    views.append(memoryview(kept[2]))
    report = check.finish()
    assert [left.name for left in report.objects] == [counted]
    assert [(left.path, left.size) for left in report.mappings] == [(SHARED_MEMORY.file_of(kept[2].name), 12288)]
    for view in views:
        view.release()
    remove_all(excluded)
    SEMAPHORE.remove(counted)


def test_what_was_excluded_hides_nothing_later(segment):
    """The bytes that are excluded are counted once."""
    shm = segment(size=4096)
    check = Check()
    check.start()
    with check.excluding(), check.excluding():
        excluded = memoryview(shm)
    again = posix_ipc.SharedMemory(shm.name)
    view = memoryview(again)
    again.close_fd()
    report = check.finish()
    assert only(report, "mappings").size == 4096
    for each in (excluded, view):
        each.release()


# ---- what others do ----

FOREIGN = """
import sys, posix_ipc
from support import KINDS
for kind, name in zip(KINDS, sys.argv[1:]):
    kind.create(name)
print("ready", flush=True)
sys.stdin.read()
"""


def make_elsewhere(names):
    """In a process that has nothing to do with this one."""
    with start_python(FOREIGN, *names) as other:
        wait_until_ready(other)
        finish(other)


@pytest.mark.slow
def test_what_a_foreign_process_makes_is_not_blamed(names):
    made = [names() for _ in KINDS]
    with leak_check() as report:
        make_elsewhere(made)
    assert set(report.foreign) >= {SEMAPHORE.file_of(made[0]), SHARED_MEMORY.file_of(made[1])}
    remove_all(made)


@pytest.mark.slow
def test_opening_what_a_foreign_process_made_is_not_creating(names):
    made = [names() for _ in KINDS]
    with leak_check():
        make_elsewhere(made)
        for kind, name in zip(KINDS, made, strict=True):
            kind.close_handle(kind.create(name, posix_ipc.O_CREAT))
            with pytest.raises(posix_ipc.ExistentialError):
                kind.create(name)
    remove_all(made)


@pytest.mark.slow
def test_name_that_a_foreign_process_takes_after_us_is_not_blamed(names):
    made = [names() for _ in KINDS]
    with leak_check():
        for kind, name in zip(KINDS, made, strict=True):
            make(kind, name)
            kind.unlink(name)
        make_elsewhere(made)
    remove_all(made)


def test_what_was_there_before_is_not_blamed(kind, name):
    make(kind, name)
    with leak_check() as report:
        kind.close_handle(kind.create(name, posix_ipc.O_CREAT))
    assert not report
    assert not any(name[1:] in path for path in report.foreign)
    kind.remove(name)


@pytest.fixture
def signals_heard():
    """A list of the signals of SIGUSR1 and SIGUSR2 that came."""
    heard = []
    before = {number: signal.signal(number, lambda number, _: heard.append(number)) for number in USER_SIGNALS}
    yield heard
    for number, handler in before.items():
        signal.signal(number, handler)


# Not callbacks, which the package itself asks for again.
USER_SIGNALS = [signal.SIGUSR1, signal.SIGUSR2]


def test_notification_stays(queue, name, signals_heard):
    """The check looks at queues, also at one that is left, and cancels nothing."""
    with leaking(fds=False) as report:
        queues = [queue(), queue(name)]
        queues[0].unlink()
        for each, number in zip(queues, USER_SIGNALS, strict=True):
            each.request_notification(number)
    left = only(report, "objects")
    assert (left.name, left.size) == (name, SIZES[MESSAGE_QUEUE])
    for each in queues:
        each.send(b"x")
    wait_until(lambda: sorted(signals_heard) == USER_SIGNALS)


# ---- descriptors ----


def test_descriptor(tmp_path):
    with leaking() as report:
        descriptor = os.open(tmp_path, os.O_RDONLY)
    left = only(report, "fds")
    assert (left.number, left.target) == (descriptor, str(tmp_path))
    assert f"descriptor {descriptor} of {str(tmp_path)!r}" in str(report)
    os.close(descriptor)


def test_number_that_leads_elsewhere(tmp_path):
    descriptor = os.open(tmp_path, os.O_RDONLY)
    with leaking() as report:
        other = os.open("/", os.O_RDONLY)
        os.dup2(other, descriptor)
        os.close(other)
    assert only(report, "fds").number == descriptor
    os.close(descriptor)


def test_file_that_is_renamed_or_removed_is_the_same(tmp_path):
    with open(tmp_path / "a", "w"):
        with leak_check():
            os.rename(tmp_path / "a", tmp_path / "b")
        with leak_check():
            os.unlink(tmp_path / "b")


def test_handle_in_a_cycle_is_garbage(name):
    with leak_check():
        handle = mp_integration.SharedMemory(name, posix_ipc.O_CREX, size=10)
        handle.unlink()
        handle.buf[0] = 1
        cycle = [handle]
        cycle.append(cycle)
        del handle, cycle


# ---- mappings ----


@pytest.mark.slow
def test_mapping_of_a_segment(segment):
    shm = segment(size=5000)
    with leaking() as report:
        view = memoryview(shm)
    left = only(report, "mappings")
    assert (left.path, left.size) == (SHARED_MEMORY.file_of(shm.name), 8192)
    view.release()
    with leaking() as report:
        shm.unlink()
        shm = posix_ipc.SharedMemory(shm.name, posix_ipc.O_CREX, size=10)
        view = memoryview(shm)
        shm.unlink()
        shm.close_fd()
    assert only(report, "mappings").path.endswith(" (deleted)")
    shm.close()


def test_mapping_of_a_semaphore_has_its_name(name):
    with leaking(objects=False) as report:
        semaphore = posix_ipc.Semaphore(name, posix_ipc.O_CREX)
    assert only(report, "mappings").path == SEMAPHORE.file_of(name)
    semaphore.close()
    semaphore.unlink()


def replace_dev(directory, shm):
    """In a private /dev: what `shm`, a shell command, makes of /dev/shm."""
    enter_new_namespaces(CLONE_NEWNS)
    commands = (
        f"cd {directory} && mount -t tmpfs none . && cd {directory} && touch null && mount --bind /dev/null null && "
        f"{shm} && mount --rbind . /dev"
    )
    subprocess.run(["sh", "-c", commands], check=True)


def map_where_shm_is_a_link(directory):
    """As Debian had it for long: /dev/shm -> /run/shm."""
    replace_dev(directory, "mkdir run-shm && mount -t tmpfs none run-shm && ln -s run-shm shm")
    map_and_leave()


def map_where_shm_is_a_directory_beside_others(directory):
    replace_dev(directory, "mkdir shm")
    Path("/dev/other").write_bytes(bytes(8192))
    with leak_check(fds=False), open("/dev/other", "rb") as file:
        kept = mmap.mmap(file.fileno(), 8192, prot=mmap.PROT_READ)
    map_and_leave()
    kept.close()


def map_and_leave():
    with leaking() as report:
        segment = posix_ipc.SharedMemory("/mapped", posix_ipc.O_CREX, size=5000)
        view = memoryview(segment)
        segment.close_fd()
        semaphore = posix_ipc.Semaphore("/mapped", posix_ipc.O_CREX)
        with mp_integration.SharedMemory(size=10):
            pass
    assert {(left.path, left.size) for left in report.mappings} == {
        ("/dev/shm/mapped", 8192),
        ("/dev/shm/sem.mapped", 4096),
    }
    view.release()
    semaphore.close()


@pytest.mark.slow
@pytest.mark.parametrize("map_there", [map_where_shm_is_a_link, map_where_shm_is_a_directory_beside_others])
def test_mappings_wherever_shm_is(map_there, tmp_path):
    run_function(map_there, str(tmp_path))


@pytest.mark.slow
def test_journal_is_no_leak():
    run_function(make_first_tracked_object)


def make_first_tracked_object():
    with leak_check(), mp_integration.SharedMemory(size=10):
        pass


# ---- children ----


@pytest.mark.slow
def test_running_child():
    with leaking() as report:
        child = subprocess.Popen(["sleep", "60"])
    left = only(report, "children")
    assert (left.pid, left.name, left.command) == (child.pid, "sleep", "sleep 60")
    assert not left.is_zombie
    child.kill()
    child.wait()


def test_zombie():
    with leaking() as report:
        child = os.fork()
        if child == 0:
            os._exit(0)
        os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    left = only(report, "children")
    assert (left.pid, left.is_zombie) == (child, True)
    assert "zombie" in str(report)
    os.waitpid(child, 0)


@pytest.mark.slow
@each_method
def test_multiprocessing_child(method):
    context = multiprocessing.get_context(method)
    with leaking(fds=False, mappings=False) as report:
        receiver, sender = context.Pipe(duplex=False)
        child = context.Process(target=wait_for_it, args=(receiver,))
        child.start()
    left = only(report, "children")
    assert (left.pid, left.name) == (child.pid, child.name)
    sender.send(0)
    child.join()
    child.close()
    receiver.close()
    sender.close()


@pytest.mark.slow
def test_child_that_is_about_to_end_is_not_left():
    with leak_check() as report:
        child = os.fork()
        if child == 0:
            os.execvp("sleep", ["sleep", "0.3"])
        threading.Thread(target=os.waitpid, args=(child, 0)).start()
    assert not report


def test_child_from_before_is_not_blamed():
    with subprocess.Popen(["sleep", "60"]) as child:
        with leak_check():
            subprocess.run(["true"], check=True)
        child.kill()


def use_the_helpers_of_multiprocessing():
    with leak_check() as report:
        run_child("forkserver", os.getpid)
        run_child("spawn", os.getpid)
    assert not report


@pytest.mark.slow
def test_helpers_of_multiprocessing_are_no_leak():
    run_function(use_the_helpers_of_multiprocessing)


def take_in_orphans():
    """So that the tracker of tracked objects is a child here, as under PID 1 of a container."""
    pr_set_child_subreaper = 36
    assert ctypes.CDLL(None).prctl(pr_set_child_subreaper, 1, 0, 0, 0) == 0
    with leak_check() as report, mp_integration.SharedMemory(size=10):
        pass
    wait_until(lambda: Path(f"/proc/self/task/{os.getpid()}/children").read_text())
    assert not report


@pytest.mark.slow
def test_tracker_is_no_leak():
    run_function(take_in_orphans)


# ---- flags ----


@pytest.mark.slow
@pytest.mark.parametrize("flag", ["objects", "fds", "mappings", "children"])
def test_flag(flag, name):
    with leaking(**{each: each == flag for each in ("objects", "fds", "mappings", "children")}) as report:
        shm = posix_ipc.SharedMemory(name, posix_ipc.O_CREX, size=10)
        view = memoryview(shm)
        child = subprocess.Popen(["sleep", "60"])
    assert only(report, flag)
    with leak_check(objects=False, fds=False, mappings=False, children=False) as report:
        leaking_all = posix_ipc.SharedMemory(name), memoryview(shm)
    assert not report
    child.kill()
    child.wait()
    view.release()
    for handle in (shm, leaking_all[0]):
        handle.close()
    shm.unlink()


# ---- blocks and functions ----


@pytest.mark.slow
def test_exception_of_the_block_goes_on(name):
    error = KeyError("of the block")
    with pytest.raises(KeyError) as caught, leak_check() as report:
        make(SEMAPHORE, name)
        raise error
    assert caught.value is error
    assert only(report, "objects").name == name
    with pytest.raises(KeyError):
        leak_check()(lambda: make(SHARED_MEMORY, name) or {}["missing"])()
    SEMAPHORE.remove(name)
    SHARED_MEMORY.remove(name)


@pytest.mark.slow
def test_checks_in_checks(names):
    inner_name, outer_name = names(), names()
    check = leak_check()
    with leaking() as outer:
        make(SEMAPHORE, outer_name)
        with pytest.raises(LeakError) as caught, check as inner, contextlib.suppress(LeakError), check:
            make(SEMAPHORE, inner_name)
        assert only(inner, "objects").name == inner_name
        del caught
    assert [left.name for left in outer.objects] == [outer_name, inner_name]
    for name in (inner_name, outer_name):
        SEMAPHORE.remove(name)


def test_nothing_stays_of_a_check():
    config = multiprocessing.current_process()._config
    before = dict(config)
    with leak_check():
        path = _trace._active[-1].path
        assert os.stat(path).st_mode & 0o777 == 0o600
        assert config != before
    assert not os.path.exists(path)
    assert config.keys() == before.keys()


def traces(directory):
    return [path.name for path in directory.glob("posix_ipc-trace-*")]


BE_CHECKED = """
import sys
from posix_ipc import _trace
from posix_ipc.leaks import leak_check
with leak_check():
    print(_trace._active[0].path, flush=True)
    sys.stdin.read()
"""


@pytest.mark.slow
def test_what_a_killed_process_left_goes_at_the_next_check(tmp_path):
    environment = {"TMPDIR": str(tmp_path)}
    with start_python(BE_CHECKED, env=environment) as killed, start_python(BE_CHECKED, env=environment) as living:
        left, used = (Path(child.stdout.readline().rstrip()) for child in (killed, living))
        killed.kill()
        killed.wait()
        out_of_sight = left.with_name(f"posix_ipc-trace-1-1-{os.stat('/proc/self/ns/pid').st_ino + 1}-new")
        out_of_sight.touch()
        link = left.with_name(f"{left.name}_link")
        link.symlink_to(used)
        stay = [used, out_of_sight, link]
        if os.geteuid() == 0:
            stay.append(left.with_name(f"{left.name}_other"))
            stay[-1].touch()
            os.chown(stay[-1], NOBODY, NOBODY)
        old = out_of_sight.with_name(f"{out_of_sight.name}_but_old")
        old.touch()
        os.utime(old, (0, 0))
        run_python("from posix_ipc.leaks import leak_check\nwith leak_check(): pass", env=environment)
        assert sorted(traces(tmp_path)) == sorted(path.name for path in stay)
        finish(living)


def test_a_check_that_is_never_left_goes_with_its_block(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def stop_in_the_midst():
        with leak_check():
            yield

    heard = list(_trace._active)
    halfway = stop_in_the_midst()
    next(halfway)
    assert traces(tmp_path)
    assert len(_trace._active) == len(heard) + 1
    leak_check().__enter__()  # nobody can leave it
    assert len(_trace._active) == len(heard) + 1
    del halfway
    assert _trace._active == heard
    assert not traces(tmp_path)


END_IN_THE_MIDST = """
import os, sys
from posix_ipc.leaks import leak_check
check = leak_check()
check.__enter__()
if os.fork() == 0:
    sys.exit()  # a child that ends in an orderly way
os.wait()
assert len(os.listdir(sys.argv[1])) == 1
"""


def test_a_check_that_is_never_left_goes_with_its_program(tmp_path):
    run_python(END_IN_THE_MIDST, tmp_path, env={"TMPDIR": str(tmp_path)})
    assert not traces(tmp_path)


def test_function(name):
    @leak_check(fds=False)
    def function(base, *, exponent):
        """Compute."""
        return base**exponent

    assert function(2, exponent=3) == 8
    assert (function.__name__, function.__doc__) == ("function", "Compute.")

    class Class:
        @leak_check()
        def method(self, kind):
            make(kind, name)

    with pytest.raises(LeakError):
        Class().method(SEMAPHORE)
    SEMAPHORE.remove(name)


def test_result_of_the_function_is_left(tmp_path):
    opened = []
    with pytest.raises(LeakError) as caught:
        leak_check()(lambda: opened.append(os.open(tmp_path, os.O_RDONLY)))()
    assert only(caught.value.report, "fds").number == opened[0]
    os.close(opened[0])


@pytest.mark.slow
def test_repeat_tells_a_leak_from_a_cache():
    caches = []

    @leak_check(repeat=3)
    def fill(most):
        caches.append(os.open("/", os.O_RDONLY) if len(caches) < most else None)

    def close():
        for number in filter(None, caches):
            os.close(number)
        caches.clear()

    fill(0)
    assert caches == [None]  # once is enough, when nothing is left
    close()
    fill(2)
    assert len(caches) == 3
    close()
    with pytest.raises(LeakError, match="after each of 3 runs, the last time 1 descriptor") as caught:
        fill(10)
    assert (len(caches), caught.value.report.runs) == (3, 3)
    assert only(caught.value.report, "fds").number == caches[-1]
    close()


def test_repeat_needs_a_function():
    with pytest.raises(ValueError, match="decorator"), leak_check(repeat=2):
        pass
    with pytest.raises(ValueError, match="repeat"):
        leak_check(repeat=0)


@pytest.mark.parametrize("unnamed", [(lambda: None,), (True,), (True, True)], ids=["function", "flag", "flags"])
def test_arguments_without_a_name_are_refused(unnamed):
    """Nobody can tell which is which, and a decorator without its parentheses would check nothing."""
    with pytest.raises(TypeError, match=r"by name, .* parentheses: @leak_check\(\)"):
        leak_check(*unnamed)


def test_a_block_is_entered_before_it_is_left():
    with pytest.raises(ValueError, match="without having been entered"):
        leak_check().__exit__()


@pytest.mark.slow
def test_instance_that_threads_share(names):
    """Each leaves its own block, whoever entered last."""
    check = leak_check(fds=False, mappings=False)
    entered, left = threading.Barrier(2, timeout=60), threading.Event()
    name = names()

    def innocent():
        with check as report:
            entered.wait()
        left.set()
        assert not report

    def leaving_one():
        with pytest.raises(LeakError) as caught, check as report:
            entered.wait()
            assert left.wait(60)
            make(SEMAPHORE, name)
        assert caught.value.report is report
        assert only(report, "objects").name == name

    for _ in range(5):  # either may enter last
        run_threads(leaving_one, innocent)
        SEMAPHORE.remove(name)
        left.clear()


@pytest.mark.slow
def test_instance_that_tasks_share(names):
    """So do tasks, also one that was started inside a block of the instance."""
    check = leak_check(fds=False)
    made = [names(), names()]
    reports = []

    async def leave(name, entered, go):
        with pytest.raises(LeakError) as caught, check as report:
            entered.set()
            await go.wait()
            make(SEMAPHORE, name)
        assert caught.value.report is report
        reports.append(report)

    async def main():
        entered, go = asyncio.Event(), asyncio.Event()
        with check as innocent:
            task = asyncio.create_task(leave(made[0], entered, go))
            await entered.wait()
        assert not innocent
        go.set()
        await task
        tasks = []
        for _ in range(2):
            entered = asyncio.Event()
            tasks.append((asyncio.create_task(leave(made[1], entered, go := asyncio.Event())), go))
            await entered.wait()
        for task, go in tasks:  # the one that entered first leaves first
            go.set()
            await task
            SEMAPHORE.remove(made[1])

    asyncio.run(main())
    assert [[left.name for left in report.objects] for report in reports] == [[made[0]], [made[1]], [made[1]]]
    SEMAPHORE.remove(made[0])


def test_block_in_a_coroutine(name):
    async def main():
        with leak_check() as report:
            await asyncio.to_thread(leaving.make_and_remove, name)
        assert not report
        with leaking(mappings=False) as report:
            await asyncio.sleep(0)
            make(SHARED_MEMORY, name)
        left = only(report, "objects")
        assert left.name == name
        assert "main" in [frame.name for frame in left.where]
        SHARED_MEMORY.remove(name)

    with leak_check():  # and a loop leaves nothing
        asyncio.run(main())


def test_block_that_is_left_in_another_context(names):
    """As those of asynchronous fixtures are. If it may be one of several it is refused."""
    check = leak_check()
    context = contextvars.copy_context()
    report = context.run(check.__enter__)
    check.__exit__()
    assert not report
    contexts = [contextvars.copy_context(), contextvars.copy_context()]
    for context in contexts:
        context.run(check.__enter__)
    with pytest.raises(ValueError, match="an instance for each block"):
        check.__exit__()
    for context in contexts:
        context.run(check.__exit__)
    with pytest.raises(ValueError, match="without having been entered"):
        check.__exit__()


async def coroutine():
    pass


async def asynchronous_generator():
    yield


def generator():
    yield


@pytest.mark.parametrize("function", [coroutine, asynchronous_generator, generator])
def test_function_that_runs_later_is_refused(function):
    with pytest.raises(TypeError, match="inside"):
        leak_check()(function)


def test_error_can_be_pickled(name):
    with pytest.raises(LeakError) as caught, leak_check():
        make(SEMAPHORE, name)
    loaded = pickle.loads(pickle.dumps(caught.value))
    assert isinstance(loaded, AssertionError)
    assert str(loaded) == str(caught.value)
    assert only(loaded.report, "objects").name == name
    SEMAPHORE.remove(name)


def test_existence_of_a_queue_is_asked_without_opening_it(queue, names):
    there = queue(mode=0)
    assert _trace.exists("message_queue", there.name)
    assert not _trace.may_be_created("message_queue", there.name)
    missing = names()
    assert not _trace.exists("message_queue", missing)
    assert _trace.may_be_created("message_queue", missing)
    with pytest.raises(FileNotFoundError):
        libc.mq_open(missing.encode(), os.O_RDONLY, 0, None)
