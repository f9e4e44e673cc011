"""reap(): what it returns, logs and raises, with and without an interpreter that can be started."""

import errno
import fcntl
import multiprocessing
import os
import signal
import sys

import pytest
from lifetime import DIRECTORY, OPTIONS, Listener, die_after, existing, make, pretend_tracker, write_program
from support import SMALL_QUEUE, open_fds, run_privately

from posix_ipc import _apart, _helper, _journal, mp_integration
from posix_ipc.mp_integration import MessageQueue, SharedMemory, reap

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="tracking is for Linux")

LEFT = [(kind, "/left") for kind in OPTIONS]


def leave_one_of_each():
    for kind, name in LEFT:
        make(kind, name)


def have_nobody_else_sweep():
    return pretend_tracker(multiprocessing.current_process()._config["posix_ipc_token"])


def freeze():
    """Be an application of which no interpreter can be started: the program is that application."""
    write_program("touch /dev/shm/started-itself")
    sys.frozen = True


# ---- what it removes ----


def remove_what_was_left():
    die_after(leave_one_of_each)
    (journal,) = DIRECTORY.glob("*.root")
    identities = {each: os.stat(each).st_ino for each in ("/dev/shm/left", "/dev/shm/sem.left")}
    removed = reap()
    assert not existing(LEFT)
    assert sorted((each.kind, each.name) for each in removed) == [
        ("message_queue", "/left"), ("semaphore", "/left"), ("shared_memory", "/left"),
    ]  # fmt: skip
    for each in removed:
        assert isinstance(each, mp_integration.Removed)
        assert each.journal == journal.name
        if each.kind != "message_queue":
            prefix = {"semaphore": "sem."}.get(each.kind, "")
            assert each.identity[1] == identities[f"/dev/shm/{prefix}left"]
    assert reap() == []


def remove_and_disturb_nothing(frozen):
    """Neither the notification that this process asked for, nor its locks by fcntl()."""
    tracker = have_nobody_else_sweep()
    queue, segment = MessageQueue(**SMALL_QUEUE), SharedMemory(size=8)
    queue.request_notification(signal.SIGUSR1)
    fcntl.lockf(segment.fd, fcntl.LOCK_EX)
    die_after(leave_one_of_each)
    if frozen:
        freeze()
    before = set(open_fds())
    assert len(reap()) == 3
    assert set(open_fds()) == before
    assert not existing(LEFT)
    assert not os.path.exists("/dev/shm/started-itself")
    with open("/proc/locks") as locks:
        assert f":{os.fstat(segment.fd).st_ino} " in "".join(line for line in locks if "POSIX" in line)
    received = []
    signal.signal(signal.SIGUSR1, lambda *_: received.append(True))
    queue.send(b"")
    assert received
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)
    for each in (queue, segment):
        each.unlink()
    del tracker


@pytest.mark.slow
def test_reap_returns_what_it_removed():
    run_privately(remove_what_was_left)


@pytest.mark.slow
@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen"])
def test_reap_disturbs_nothing_and_starts_no_application(frozen):
    run_privately(remove_and_disturb_nothing, frozen)


# ---- what it raises ----


def reap_with_too_few_descriptors():
    die_after(leave_one_of_each)
    write_program(f'ulimit -n 4; exec "{sys.executable}" "$@"')
    with pytest.raises(OSError, match=r"posix_ipc\._apart: .*Too many open files") as caught:
        reap()
    assert caught.value.errno == errno.EMFILE
    assert existing(LEFT) == LEFT


def reap_with_a_program_that_fails():
    for program, text in (
        ("echo much >&2; echo in vain >&2; exit 3", "ended with status 3: in vain"),
        ("exit 3", "ended with status 3$"),
        ("kill -9 $$", "ended with status -9"),
        ("echo something else", r"answered 'something else\\n'"),
    ):
        write_program(program)
        with pytest.raises(OSError, match=text) as caught:
            reap()
        assert caught.value.errno == errno.EIO
    multiprocessing.set_executable("/dev/shm/none")
    with pytest.raises(FileNotFoundError):
        reap()


def reap_in_vain_and_frozen():
    freeze()
    for function, number, text in (
        (lambda given: os.kill(os.getpid(), signal.SIGKILL), errno.EIO, "died"),
        (lambda given: os.open("/none", 0), errno.ENOENT, "No such file"),
        (lambda given: 1 / 0, errno.EIO, "ZeroDivisionError"),
    ):
        _apart.reap = function
        with pytest.raises(OSError, match=text) as caught:
            reap()
        assert caught.value.errno == number
    assert not os.path.exists("/dev/shm/started-itself")


def reap_without_an_end():
    _helper.TIMEOUT = 0.1
    write_program("exec sleep 100")
    with pytest.raises(TimeoutError):
        reap()
    freeze()
    _apart.reap = lambda given: signal.pause()
    with pytest.raises(TimeoutError):
        reap()
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


@pytest.mark.slow
@pytest.mark.parametrize(
    "scenario",
    [
        reap_with_too_few_descriptors,
        reap_with_a_program_that_fails,
        reap_in_vain_and_frozen,
        reap_without_an_end,
    ],
)
def test_reap_raises_oserror_and_prints_nothing(scenario):
    run_privately(silently, scenario.__name__)


def silently(scenario):
    printed = os.open("/dev/shm/printed", os.O_CREAT | os.O_RDWR, 0o600)
    stderr = os.dup(2)
    os.dup2(printed, 2)
    try:
        globals()[scenario]()
    finally:
        os.dup2(stderr, 2)
    assert os.fstat(printed).st_size == 0, os.pread(printed, 10000, 0)


def create_without_room():
    """The error is that there is no room, whatever a sweep says that might have made some."""
    multiprocessing.set_executable("/bin/false")

    def fail(process):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    _journal.Process.open_journals = fail
    with pytest.raises(OSError, match="No space left"):
        SharedMemory(size=8)


@pytest.mark.slow
def test_a_creation_without_room_raises_that_error():
    run_privately(create_without_room)


# ---- what it logs ----


def listen():
    listener = Listener()
    die_after(make, "Semaphore", "/left")
    (journal,) = DIRECTORY.glob("*.root")
    garbage = DIRECTORY / "999999999-1-1.j0"
    garbage.write_bytes(b"garbage")
    garbage.chmod(0o600)
    reap()
    by = f"process {os.getpid()}, by reap(): "
    assert listener.lines == [
        ("INFO", f"{by}{garbage}: skipped: its size is 7"),
        ("INFO", f"{by}removed semaphore '/left': its owner, recorded in {journal}, has ended, and nobody uses it"),
    ]


@pytest.mark.slow
def test_what_reap_removes_is_logged_with_by_whom_and_why():
    run_privately(listen)


def reap_unheard():
    die_after(leave_one_of_each)
    assert len(reap()) == 3


@pytest.mark.slow
def test_the_logger_is_silent_by_default():
    run_privately(silently, "reap_unheard")
