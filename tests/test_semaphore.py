"""posix_ipc.Semaphore."""

import decimal
import errno
import fractions
import gc
import math
import os
import platform
import signal
import socket
import threading
import time

import pytest
from support import (
    SEMAPHORE,
    finish,
    libc,
    private_ipc,
    run_python,
    semaphore_waiters,
    start_python,
    wait_until,
    wait_until_blocked,
    wait_until_ready,
)

import posix_ipc
from posix_ipc import O_CREAT, O_CREX, SEMAPHORE_VALUE_MAX

FUTEX_CLOCK_REALTIME = 256


# ---- value, acquire, release ----


@pytest.mark.parametrize("value", [0, 1, 7, SEMAPHORE_VALUE_MAX])
def test_initial_value(semaphore, value):
    assert semaphore(initial_value=value).value == value


def test_initial_value_defaults_to_zero(semaphore):
    assert semaphore().value == 0


def test_initial_value_is_for_new_semaphores_alone(semaphore):
    created = semaphore(initial_value=2)
    assert semaphore(created.name, flags=O_CREAT, initial_value=5).value == 2
    assert semaphore(created.name, flags=0, initial_value=5).value == 2


def test_acquire_and_release_count(semaphore):
    sem = semaphore(initial_value=2)
    assert sem.acquire() is None
    assert sem.value == 1
    assert sem.acquire(0) is None
    assert sem.value == 0
    assert sem.release() is None
    assert sem.value == 1


@pytest.mark.parametrize(
    "timeout",
    [
        *(None, 0, 0.0, -0.0, 5, 0.5, True, 1e300, math.inf, 10**400, 5e-324),
        *(decimal.Decimal("0.5"), fractions.Fraction(1, 2)),
    ],
    ids=repr,
)
def test_acquire_takes_what_is_free_at_once_whatever_the_timeout(semaphore, timeout):
    sem = semaphore(initial_value=2)
    assert sem.acquire(timeout) is None
    assert sem.acquire(timeout=timeout) is None
    assert sem.value == 0


@pytest.mark.parametrize("timeout", [0, 0.0, -0.0, False, decimal.Decimal(0)], ids=repr)
def test_acquire_without_waiting(semaphore, timeout):
    sem = semaphore()
    with pytest.raises(posix_ipc.BusyError) as caught:
        sem.acquire(timeout)
    assert caught.value.errno in (errno.EAGAIN, errno.ETIMEDOUT)
    assert caught.value.name == sem.name
    assert sem.name in str(caught.value)
    assert sem.value == 0


@pytest.mark.parametrize("timeout", [0.05, 1e-9, decimal.Decimal("0.05"), fractions.Fraction(1, 20)], ids=repr)
def test_acquire_waits_no_less_than_its_timeout(semaphore, timeout):
    sem = semaphore()
    began = time.monotonic()
    with pytest.raises(posix_ipc.BusyError) as caught:
        sem.acquire(timeout)
    assert time.monotonic() - began >= timeout
    assert (caught.value.errno, caught.value.name) == (errno.ETIMEDOUT, sem.name)
    sem.release()
    sem.acquire(0)


def test_release_beyond_the_maximum(semaphore):
    sem = semaphore(initial_value=SEMAPHORE_VALUE_MAX)
    with pytest.raises(OSError, match=str(SEMAPHORE_VALUE_MAX)) as caught:
        sem.release()
    assert (caught.value.errno, caught.value.filename) == (errno.EOVERFLOW, sem.name)
    assert sem.value == SEMAPHORE_VALUE_MAX
    sem.acquire()
    sem.release()


@pytest.mark.parametrize("timeout", [None, 60, math.inf, 1e300], ids=repr)
def test_waiting_thread_is_woken_by_release(semaphore, timeout):
    sem = semaphore()
    waiter = threading.Thread(target=sem.acquire, args=(timeout,), daemon=True)
    waiter.start()
    wait_until(lambda: semaphore_waiters(sem.name) == 1)
    assert waiter.is_alive()
    sem.release()
    waiter.join(30)
    assert not waiter.is_alive()
    assert sem.value == 0


def test_one_release_wakes_one_of_many_waiters(semaphore):
    sem = semaphore()
    woken = []

    def wait():
        sem.acquire()
        woken.append(threading.get_ident())

    waiters = [threading.Thread(target=wait, daemon=True) for _ in range(4)]
    for waiter in waiters:
        waiter.start()
    wait_until(lambda: semaphore_waiters(sem.name) == 4)
    for count in range(1, 5):
        sem.release()
        wait_until(lambda: len(woken) == count)  # noqa: B023
        assert semaphore_waiters(sem.name) == 4 - count
        assert sem.value == 0
    for waiter in waiters:
        waiter.join(30)


def test_processes_exclude_each_other(semaphore, segment):
    """A counter that is read and written non-atomically keeps every increment when a semaphore guards it."""
    lock, counter = semaphore(initial_value=1), segment(size=8)
    code = (
        "import os, sys, posix_ipc\n"
        "lock, counter = posix_ipc.Semaphore(sys.argv[1]), posix_ipc.SharedMemory(sys.argv[2])\n"
        "print('ready', flush=True)\n"
        "sys.stdin.readline()\n"
        "for _ in range(2000):\n"
        "    with lock:\n"
        "        value = int.from_bytes(os.pread(counter.fd, 8, 0), 'little')\n"
        "        os.pwrite(counter.fd, (value + 1).to_bytes(8, 'little'), 0)\n"
    )
    with start_python(code, lock.name, counter.name) as one, start_python(code, lock.name, counter.name) as other:
        for child in (one, other):
            wait_until_ready(child)
        for child in (one, other):
            child.stdin.write("go\n")
            child.stdin.flush()
        for child in (one, other):
            finish(child)
    assert int.from_bytes(os.pread(counter.fd, 8, 0), "little") == 4000
    assert lock.value == 1


# ---- with ----


def test_with_acquires_and_releases_and_nothing_else(semaphore):
    sem = semaphore(initial_value=1)
    with sem as entered:
        assert entered is sem
        assert sem.value == 0
    assert sem.value == 1
    assert SEMAPHORE.exists(sem.name)
    with sem:
        pass
    assert sem.value == 1


def test_with_releases_and_lets_exceptions_through(semaphore):
    sem = semaphore(initial_value=1)
    with pytest.raises(KeyError), sem:
        raise KeyError
    assert sem.value == 1


def test_with_waits(semaphore):
    sem = semaphore()
    entered = threading.Event()

    def guarded():
        with sem:
            entered.set()

    waiter = threading.Thread(target=guarded, daemon=True)
    waiter.start()
    wait_until(lambda: semaphore_waiters(sem.name) == 1)
    assert not entered.is_set()
    sem.release()
    waiter.join(30)
    assert entered.is_set()
    assert sem.value == 1


def test_with_on_a_closed_semaphore(semaphore):
    sem = semaphore(initial_value=1)
    sem.close()
    with pytest.raises(posix_ipc.ExistentialError), sem:
        pytest.fail("entered")


def test_closing_inside_with_shows_at_its_end(semaphore):
    sem = semaphore(initial_value=1)
    with pytest.raises(posix_ipc.ExistentialError), sem:
        sem.close()


# ---- close ----


def test_use_after_close(semaphore):
    sem = semaphore(initial_value=1)
    assert sem.close() is None
    for use in (sem.acquire, lambda: sem.acquire(0), sem.release, lambda: sem.value, sem.close):
        with pytest.raises(posix_ipc.ExistentialError, match="closed") as caught:
            use()
        assert (caught.value.errno, caught.value.name) == (errno.EBADF, sem.name)
    assert sem.name
    assert sem.mode == 0o600
    assert sem.unlink() is None


def test_two_handles_share_the_semaphore_and_closing_one_leaves_the_other(semaphore):
    first = semaphore(initial_value=1)
    second = semaphore(first.name, flags=0)
    first.acquire()
    assert second.value == 0
    second.release()
    assert first.value == 1
    first.close()
    second.acquire(0)
    second.release()
    third = semaphore(first.name, flags=0)
    second.close()
    assert third.value == 1


def test_close_while_another_thread_waits(semaphore):
    """The waiter stays on the memory it waits on; the semaphore is closed for everyone who comes later."""
    sem = semaphore()
    peer = semaphore(sem.name, flags=0)
    results = []

    def wait():
        try:
            results.append(sem.acquire())
        except posix_ipc.ExistentialError as error:
            results.append(error)

    waiter = threading.Thread(target=wait, daemon=True)
    waiter.start()
    wait_until(lambda: semaphore_waiters(sem.name) == 1)
    sem.close()
    with pytest.raises(posix_ipc.ExistentialError):
        sem.acquire(0)
    peer.release()
    waiter.join(30)
    assert not waiter.is_alive()
    assert results == [None]
    assert peer.value == 0


def mappings_of_semaphores():
    """Count the pages of /dev/shm in this process; a semaphore its creator mapped has no name there."""
    with open("/proc/self/maps") as maps:
        return sum("/dev/shm/" in line for line in maps)


@pytest.mark.parametrize("end", ["close", "collect"])
def test_memory_is_unmapped(semaphore, end):
    keeper = semaphore()
    gc.collect()  # of what earlier tests left, so that it does not go meanwhile
    before = mappings_of_semaphores()
    handles = [posix_ipc.Semaphore(keeper.name) for _ in range(10)]
    handles += [SEMAPHORE.create(None) for _ in range(10)]
    for handle in handles[10:]:
        handle.unlink()
    assert mappings_of_semaphores() > before
    if end == "close":
        for handle in handles:
            handle.close()
    else:
        del handles, handle
        gc.collect()
    assert mappings_of_semaphores() == before


# ---- signals and clocks ----


INTERRUPTED_CODE = """
import signal, sys, posix_ipc

class HandlerError(Exception):
    pass

def handler(number, frame):
    if sys.argv[3] == "raises":
        raise HandlerError("from the handler")

signal.signal(signal.SIGUSR1, handler)
signal.signal(signal.SIGINT, signal.default_int_handler)
sem = posix_ipc.Semaphore(sys.argv[1])
print("ready", flush=True)
try:
    sem.acquire(eval(sys.argv[2]))
except KeyboardInterrupt as error:
    print("KeyboardInterrupt")
except posix_ipc.SignalError as error:
    assert error.errno == 4 and error.name == sem.name
    print("SignalError", repr(error.__cause__))
sem.release()
sem.acquire(0)
"""


@pytest.mark.parametrize("timeout", [None, 60, math.inf], ids=repr)
@pytest.mark.parametrize(
    ("number", "handler", "outcome"),
    [
        (signal.SIGUSR1, "returns", "SignalError None\n"),
        (signal.SIGUSR1, "raises", "SignalError HandlerError('from the handler')\n"),
        (signal.SIGINT, "returns", "KeyboardInterrupt\n"),
    ],
    ids=("handler returns", "handler raises", "ctrl-c"),
)
def test_signal_ends_the_wait(semaphore, timeout, number, handler, outcome):
    sem = semaphore()
    with start_python(INTERRUPTED_CODE, sem.name, f"float('{timeout}')" if timeout else None, handler) as child:
        wait_until_ready(child)
        wait_until_blocked(child)
        child.send_signal(number)
        assert finish(child) == outcome


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="reads the arguments of glibc's futex call")
def test_timed_wait_does_not_follow_the_wall_clock(semaphore):
    """The kernel is asked to count on the monotonic clock, so that setting the time changes no wait."""
    sem = semaphore()
    code = (
        "import sys, posix_ipc\nsem = posix_ipc.Semaphore(sys.argv[1])\nprint('ready', flush=True)\nsem.acquire(1000)\n"
    )
    with start_python(code, sem.name) as child:
        wait_until_ready(child)
        _, (_, operation, _, timeout, *_) = wait_until_blocked(child)
        assert timeout != 0
        assert not operation & FUTEX_CLOCK_REALTIME
        sem.release()
        finish(child)


# ---- C programs on the same semaphore ----


@pytest.fixture
def peer_semaphore(name):
    """Return (name, semaphore) made by the C library with a value of 3."""
    handle = libc.sem_open(name.encode(), O_CREX, 0o600, 3)
    yield name, handle
    libc.sem_close(handle)
    SEMAPHORE.remove(name)


def test_file_is_byte_for_byte_what_the_c_library_makes(semaphore, peer_semaphore):
    name, _ = peer_semaphore
    ours = semaphore(initial_value=3)
    with open(SEMAPHORE.file_of(name), "rb") as theirs_file, open(SEMAPHORE.file_of(ours.name), "rb") as our_file:
        theirs, made = theirs_file.read(), our_file.read()
    assert made == theirs
    assert len(made) == 32


def test_semaphore_of_a_c_program(peer_semaphore):
    name, peer = peer_semaphore
    ours = posix_ipc.Semaphore(name)
    try:
        assert ours.value == 3
        ours.acquire()
        assert libc.semaphore_value(peer) == 2
        libc.sem_post(peer)
        assert ours.value == 3
    finally:
        ours.close()
    ours.unlink()
    with pytest.raises(FileNotFoundError):
        libc.sem_unlink(name.encode())


def test_c_program_on_our_semaphore(semaphore):
    ours = semaphore(initial_value=1)
    peer = libc.sem_open(ours.name.encode(), 0, 0, 0)
    try:
        libc.sem_trywait(peer)
        assert ours.value == 0
        with pytest.raises(BlockingIOError):
            libc.sem_trywait(peer)
        ours.release()
        assert libc.semaphore_value(peer) == 1
    finally:
        libc.sem_close(peer)


def test_c_program_wakes_our_waiter_and_we_wake_its(semaphore):
    ours = semaphore()
    peer = libc.sem_open(ours.name.encode(), 0, 0, 0)
    try:
        for wait, post in ((ours.acquire, lambda: libc.sem_post(peer)), (lambda: libc.sem_wait(peer), ours.release)):
            waiter = threading.Thread(target=wait, daemon=True)
            waiter.start()
            wait_until(lambda: semaphore_waiters(ours.name) == 1)
            post()
            waiter.join(30)
            assert not waiter.is_alive()
            assert ours.value == 0
    finally:
        libc.sem_close(peer)


def test_handles_of_both_sides_in_one_process_close_independently(semaphore):
    """The C library counts its own handles on a semaphore; ours are not among them, nor are they theirs."""
    ours = semaphore(initial_value=1)
    peer = libc.sem_open(ours.name.encode(), 0, 0, 0)
    again = semaphore(ours.name, flags=0)
    ours.close()
    libc.sem_close(peer)
    again.acquire(0)
    again.release()
    assert again.value == 1


# ---- files that are no semaphores ----


def truncated_to(size):
    def spoil(path):
        os.truncate(path, size)

    return spoil


def replaced_by(make):
    def spoil(path):
        os.unlink(path)
        make(path)

    return spoil


def unix_socket(path):
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)


SPOILT = {
    "empty": truncated_to(0),
    "one byte": truncated_to(1),
    "one byte missing": truncated_to(31),
    "directory": replaced_by(os.mkdir),
    "pipe": replaced_by(os.mkfifo),
    "socket": replaced_by(unix_socket),
}


@pytest.mark.no_portable
@pytest.mark.parametrize("flags", [0, O_CREAT], ids=("open", "O_CREAT"))
@pytest.mark.parametrize("how", SPOILT)
def test_file_that_is_no_semaphore(semaphore, how, flags):
    path = SEMAPHORE.file_of(semaphore().name)
    name = path.removeprefix(SEMAPHORE.path)
    SPOILT[how](path)
    try:
        with pytest.raises(posix_ipc.Error, match=name) as caught:
            posix_ipc.Semaphore("/" + name, flags)
        assert type(caught.value) is posix_ipc.Error
        assert caught.value.name == "/" + name
        assert os.path.lexists(path)
    finally:
        os.rmdir(path) if os.path.isdir(path) else os.unlink(path)


def test_symbolic_link_is_not_followed(semaphore, names):
    """Nobody can make us write into another file by placing a link under the name."""
    target, link = semaphore(), names()
    os.symlink(SEMAPHORE.file_of(target.name), SEMAPHORE.file_of(link))
    try:
        for flags in (0, O_CREAT):
            with pytest.raises((OSError, posix_ipc.Error)):
                posix_ipc.Semaphore(link, flags)
        with pytest.raises(posix_ipc.ExistentialError):
            posix_ipc.Semaphore(link, O_CREX)
    finally:
        SEMAPHORE.remove(link)
    assert target.value == 0


def test_file_longer_than_a_semaphore_still_opens(semaphore):
    """Longer is harmless, and C libraries with another layout have it."""
    sem = semaphore(initial_value=4)
    os.truncate(SEMAPHORE.file_of(sem.name), 64)
    assert semaphore(sem.name, flags=0).value == 4


# ---- descriptors ----


def test_semaphores_hold_no_descriptor():
    run_python(
        "import os, posix_ipc\n"
        "before = os.listdir('/proc/self/fd')\n"
        "sem = posix_ipc.Semaphore(None, posix_ipc.O_CREX)\n"
        "again = posix_ipc.Semaphore(sem.name)\n"
        "sem.unlink()\n"
        "assert os.listdir('/proc/self/fd') == before\n"
    )


def test_descriptor_zero_is_free_for_the_moment_of_opening():
    run_python(
        "import os, posix_ipc\n"
        "os.close(0)\n"
        "sem = posix_ipc.Semaphore(None, posix_ipc.O_CREX, initial_value=2)\n"
        "try: assert posix_ipc.Semaphore(sem.name).value == 2\n"
        "finally: sem.unlink()\n"
    )


def test_failing_creation_leaves_no_temporary_file():
    """A semaphore is complete before it gets its name; what it was built in must go when the name is taken."""
    if private_ipc() is None:
        pytest.skip("needs the right to mount an empty /dev/shm")
    run_python(
        "import os, posix_ipc\n"
        "posix_ipc.Semaphore('/taken', posix_ipc.O_CREX)\n"
        "before = os.stat('/dev/shm/sem.taken')\n"
        "try: posix_ipc.Semaphore('/taken', posix_ipc.O_CREX)\n"
        "except posix_ipc.ExistentialError: pass\n"
        "assert os.listdir('/dev/shm') == ['sem.taken']\n"
        "assert os.stat('/dev/shm/sem.taken') == before\n",
        prefix=private_ipc(),
    )
