"""Kernels, filters and limits that take away what tracking stands on: it goes on without, and is a little slower.

The kernel itself refuses the calls, to this process and to all that it starts: see seccomp(2).
"""

import contextlib
import errno
import fcntl
import itertools
import os
import pickle
import platform
import signal
import sys
from pathlib import Path

import pytest
from lifetime import (
    DIRECTORY,
    OPTIONS,
    belong_to_a_new_tree,
    die_after,
    existing,
    make,
    pretend_tracker,
    trackers,
    wait_until_gone,
)
from stepping import Stepped, is_allowed
from support import forbid, have_no_file_without_a_name, run_privately, start_python, wait_until

import posix_ipc
from posix_ipc import _journal, _owners, _reaper

pytestmark = [pytest.mark.skipif(sys.platform != "linux", reason="tracking is for Linux"), pytest.mark.slow]

# ---- the tracker's doorbells ----

_INOTIFY_INIT1 = 294 if platform.machine() == "x86_64" else 26
_PIDFD_OPEN = 434

WITHOUT = {
    "inotify": (_INOTIFY_INIT1, errno.EMFILE),  # fs.inotify.max_user_instances
    "pidfd": (_PIDFD_OPEN, errno.ENOSYS),
}

ROOT_THAT_MAKES_NOTHING = """
import multiprocessing, os, signal, sys
import support
from lifetime import make
from posix_ipc import mp_integration

def work(pipe):
    private, sent = make("SharedMemory", "/private"), make("SharedMemory", "/sent")
    pipe.send(sent)
    signal.pause()

if __name__ == "__main__":
    support.forbid(*map(int, sys.argv[1:]))
    reader, writer = multiprocessing.Pipe(duplex=False)
    worker = multiprocessing.get_context("fork").Process(target=work, args=(writer,), daemon=True)
    worker.start()
    reader.poll(30)
    print(multiprocessing.current_process()._config["posix_ipc_token"], worker.pid, flush=True)
    sys.stdin.readline()
"""
PRIVATE, SENT = [("SharedMemory", "/private")], [("SharedMemory", "/sent")]


def doorbells(tracker):
    """What it waits for, as the kernel calls it."""
    found = set()
    for path in Path(f"/proc/{tracker.pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # it looks at files meanwhile
            found.add(os.readlink(path))
    return {link.removeprefix("anon_inode:").strip("[]") for link in found if link.startswith("anon_inode:")}


def wait_until_it_looks_again(tracker):
    looks = tracker.num_ctx_switches().voluntary + 1
    wait_until(lambda: tracker.num_ctx_switches().voluntary > looks)


def notice_deaths_without(what):
    with start_python(ROOT_THAT_MAKES_NOTHING, *WITHOUT[what]) as root:
        token, worker = root.stdout.readline().split()
        (tracker,) = wait_until(lambda: trackers(token))
        wait_until(Path(DIRECTORY, f"{token}.proxy").exists)
        assert doorbells(tracker) == {"inotify", "pidfd"} - {what}
        wait_until_it_looks_again(tracker)
        os.kill(int(worker), signal.SIGKILL)
        wait_until_gone(PRIVATE)
        assert existing(SENT) == SENT  # in flight, and the root lives
        wait_until_it_looks_again(tracker)
        root.kill()
        root.wait(30)
        wait_until_gone(SENT)
        wait_until(lambda: not trackers(token))


@pytest.mark.parametrize("what", WITHOUT)
def test_g1_g4_the_tracker_looks_where_nobody_rings(what):
    run_privately(notice_deaths_without, what)


# ---- files without a name ----

_LINKAT = 265 if platform.machine() == "x86_64" else 37
_AT_EMPTY_PATH = 0x1000
FILES = ["Semaphore", "SharedMemory"]


def have_an_older_kernel():
    """Before Linux 6.10 a file gets its first name through /proc only."""
    forbid(_LINKAT, errno.ENOENT, argument=4, bits=_AT_EMPTY_PATH)


CIRCUMSTANCES = {each.__name__: each for each in (have_no_file_without_a_name, have_an_older_kernel)}


def files():
    return [path for path in Path("/dev/shm").iterdir() if path.is_file()]


def create_plain(kind, name, **options):
    return getattr(posix_ipc, kind)(name, posix_ipc.O_CREX, **OPTIONS[kind], **options)


def is_leased(path):
    with _journal.closing(os.open(path, os.O_RDONLY)) as descriptor:
        return not _owners.try_lock(descriptor)


def create_all_the_same(circumstances):
    CIRCUMSTANCES[circumstances]()
    os.umask(0o027)
    tracker = pretend_tracker(_journal.own_token())  # so that nobody else sweeps
    for kind in FILES:
        for create in (make, create_plain):
            made = create(kind, "/made", mode=0o666)
            (path,) = files()
            assert (path.stat().st_mode & 0o777, path.stat().st_nlink) == (0o640, 1)
            assert is_leased(path) == (create is make)
            with pytest.raises(posix_ipc.ExistentialError):
                create(kind, "/made")
            assert files() == [path]
            loaded = pickle.loads(pickle.dumps(made))
            if kind == "Semaphore":
                made.acquire(0)
                assert loaded.value == 0
            else:
                made.buf[0] = 1
                assert loaded.buf[0] == 1
            made.unlink()
            assert files() == []
        die_after(make, kind, "/made")
        assert [each.name for each in _reaper.reap()] == ["/made"]
        assert files() == []
    del tracker


@pytest.mark.parametrize("circumstances", CIRCUMSTANCES)
def test_objects_are_made_where_the_kernel_has_no_files_without_a_name(circumstances):
    run_privately(create_all_the_same, circumstances)


def create_second(kind):
    tracker = belong_to_a_new_tree()
    first = make("Semaphore", "/first")
    yield
    made = make(kind, "/made")
    yield
    del made, first, tracker


def sweep_at_each_call():
    """At each in turn. Between the making of a file and its lock the sweep takes it, and another one is made."""
    have_no_file_without_a_name()
    for stop in itertools.count(1):
        with Stepped(create_second("SharedMemory")) as creator:
            stops = [_reaper.reap() for number, _ in enumerate(creator.stops(), 1) if number == stop]
            assert existing([("SharedMemory", "/made")]), stop
            assert len(files()) == 2, stop
        wait_until(lambda: _reaper.reap() == files() == [])
        if not stops:
            break
    assert stop > 20


@pytest.mark.skipif(not is_allowed(), reason="needs ptrace")
def test_g5_a_creation_beside_sweeps_where_the_kernel_has_no_files_without_a_name():
    run_privately(sweep_at_each_call)


def create_one_that_persists():
    yield
    create_plain("Semaphore", "/made")
    yield


def die_at_each_call():
    have_no_file_without_a_name()
    ends = []
    for stop in itertools.count(1):
        with Stepped(create_one_that_persists()) as creator:
            if sum(1 for _ in itertools.islice(creator.stops(), stop)) < stop:
                break
            creator.kill()
        _reaper.reap()
        ends.append([path.name for path in files()])
        if existing([("Semaphore", "/made")]):
            posix_ipc.unlink_semaphore("/made")
    named = ends.index(["sem.made"])
    assert named > 10
    assert ends == [[]] * named + [["sem.made"]] * (len(ends) - named)


@pytest.mark.skipif(not is_allowed(), reason="needs ptrace")
def test_a_killed_creation_of_a_plain_semaphore_leaves_all_of_it_or_nothing():
    run_privately(die_at_each_call)


def leave_unfinished():
    """What nobody has locked is nobody's."""
    left = Path("/dev/shm/.posix_ipc.tmp-0")
    left.touch()
    with left.open() as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        _reaper.reap()
        assert left.exists()
    lines = []
    _reaper.reap(lines.append)
    assert not left.exists()
    assert lines == [f"removed {left}: its creation was killed before the object had its name"]


def test_g3_what_a_killed_creation_left_unfinished_goes_with_a_sweep():
    run_privately(leave_unfinished)
