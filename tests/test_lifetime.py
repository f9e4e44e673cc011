"""How tracked objects end: what of G1 to G5 and G10 is not in test_kill_matrix.py, with real processes and signals."""

import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys

import psutil
import pytest
from lifetime import DIRECTORY, Tree, assert_all_is_over, existing, trackers, wait_until_gone
from support import run_python, unique_name, wait_until

from posix_ipc import _reaper

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="tracking is for Linux"),
    pytest.mark.slow,
    pytest.mark.private,
]

each_method = pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])


@each_method
def test_g3_everything_is_killed_and_the_command_sweeps(method):
    with Tree(method) as tree:
        tree.kill_trackers()
        tree.kill_group(signal.SIGKILL)
        tree.wait()
        tree.kill_workers()
        tree.wait_for_workers()
        subprocess.run([sys.executable, "-m", "posix_ipc", "reap", "--yes"], check=True, stdout=subprocess.DEVNULL)
        wait_until_gone(tree.objects)


def test_g3_a_process_that_is_stopped_in_a_sweep_does_not_keep_others_from_sweeping():
    name = unique_name()
    code = (
        "import os, sys; from posix_ipc.mp_integration import *; Semaphore.create(sys.argv[1]); os.kill(os.getpid(), 9)"
    )
    DIRECTORY.mkdir(mode=0o700, exist_ok=True)
    lock = os.open(DIRECTORY, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert run_python(code, name, check=False).returncode == -signal.SIGKILL
        wait_until_gone([("Semaphore", name)], timeout=10)
        _reaper.reap()  # here too
    finally:
        os.close(lock)


@each_method
def test_g10_tracker_is_killed_and_replaced(method):
    """The next creation in the tree starts another, which knows all that the first one knew."""
    with Tree(method) as tree:
        killed = trackers(tree.token)
        tree.kill_trackers()
        tree.create()
        wait_until(lambda: trackers(tree.token))
        assert not set(trackers(tree.token)) & set(killed)
        tree.kill_group(signal.SIGKILL)
        tree.wait()
        tree.kill_workers()
        wait_until_gone(tree.objects)
        assert_all_is_over(tree)


LEAVE_A_LEASE = """
import multiprocessing, os, sys
from posix_ipc.mp_integration import SharedMemory

def work(pipe):
    segment = SharedMemory(size=8)
    pid = os.fork()  # who inherits the lease has no journal whose end would be reported
    if pid == 0:
        pipe.close()
        os.read(int(sys.argv[1]), 1)
        os._exit(0)
    pipe.send((os.getpid(), pid, segment.name))
    os.read(int(sys.argv[1]), 1)

if __name__ == "__main__":
    reader, writer = multiprocessing.Pipe(duplex=False)
    multiprocessing.get_context("fork").Process(target=work, args=(writer,), daemon=True).start()
    print(*reader.recv(), flush=True)
    sys.stdin.readline()
"""


def test_g4_what_a_dead_worker_left_leased_goes_when_the_lease_ends():
    never, hold = os.pipe()
    with subprocess.Popen(
        [sys.executable, "-c", LEAVE_A_LEASE, str(never)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        pass_fds=[never],
    ) as root:
        worker, heir, name = root.stdout.readline().split()
        os.kill(int(worker), signal.SIGKILL)
        left = [("SharedMemory", name)]
        wait_until(lambda: psutil.Process(int(worker)).status() == psutil.STATUS_ZOMBIE)
        _reaper.reap()  # the tracker has had its turn, or this is it
        assert existing(left) == left
        os.kill(int(heir), signal.SIGKILL)
        wait_until_gone(left)
        root.communicate("\n", timeout=30)
    os.close(never)
    os.close(hold)


needs_strace = pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")


@needs_strace
@pytest.mark.no_sanitizer
@pytest.mark.parametrize("role", ["root", "proxy"])
def test_g5_a_sweep_that_cannot_tell_who_lives_removes_nothing(role):
    """No descriptor left in the system, just as it looks at one file: what is in flight under that root must stay."""
    with Tree("fork") as tree:
        victim = next(iter(tree.workers))
        proxy = DIRECTORY / f"{tree.token}.proxy"
        wait_until(proxy.exists)  # the tracker runs
        tree.kill_trackers()
        os.kill(victim, signal.SIGKILL)
        if role == "root":  # else the proxy says it too
            proxy.unlink()
        in_flight = [*tree.own_objects[6:], *tree.workers[victim]["shared"]]
        prefix = ["strace", "-f", "-qq", "-o", "/dev/null", "-P", str(DIRECTORY / f"{tree.token}.{role}")]
        inject = ["-e", "trace=openat", "-e", "inject=openat:error=ENFILE"]
        code = "from posix_ipc import _reaper\ntry: _reaper.reap()\nexcept OSError as error: print(error.errno)"
        child = run_python(code, prefix=[*prefix, *inject])
        assert child.stdout.strip() == str(errno.ENFILE)
        assert existing(in_flight) == in_flight


WITHOUT_STREAMS = """
import multiprocessing, os, sys
from posix_ipc.mp_integration import Semaphore
os.closerange(0, 3)
made = Semaphore()
tell, wait = map(int, sys.argv[1:])
os.write(tell, multiprocessing.current_process()._config["posix_ipc_token"].encode())
os.read(wait, 1)
more = Semaphore()
os.write(tell, b".")
os.read(wait, 1)
"""


def test_g12_tracker_of_a_root_without_standard_streams_holds_its_lock():
    told, tell = os.pipe()
    wait, go_on = os.pipe()
    with subprocess.Popen([sys.executable, "-c", WITHOUT_STREAMS, str(tell), str(wait)], pass_fds=[tell, wait]) as root:
        token = os.read(told, 100).decode()
        (tracker,) = wait_until(lambda: trackers(token))
        wait_until(lambda: (DIRECTORY / f"{token}.proxy").exists())  # it runs, the descriptors are in their places
        os.write(go_on, b".")
        os.read(told, 1)
        assert trackers(token) == [tracker]
        os.write(go_on, b".")
        root.wait(30)
    for descriptor in (told, tell, wait, go_on):
        os.close(descriptor)


def test_g12_journals_are_closed_while_threads_create():
    """What a process does at its end, with daemon threads still at it: no crash."""
    run_python(
        "import threading\n"
        "from posix_ipc.mp_integration import Semaphore, _journal\n"
        "done = threading.Event()\n"
        "def create():\n"
        "    while not done.is_set():\n"
        "        Semaphore()\n"
        "threads = [threading.Thread(target=create) for _ in range(2)]\n"
        "for each in threads: each.start()\n"
        "for _ in range(300):\n"
        "    for process in _journal.existing(): process.close_journals()\n"
        "done.set()\n"
        "for each in threads: each.join()\n"
    )


@each_method
def test_g5_what_another_program_leases_lives_until_it_is_free(method):
    with Tree(method) as tree:
        names = [name for _, name in tree.passed]
        foreign = (
            "import sys; from posix_ipc.mp_integration import *\n"
            "held = [cls.attach(name) for cls, name in zip((SharedMemory, Semaphore, MessageQueue), sys.argv[1:])]\n"
            "print('ready', flush=True); sys.stdin.readline()\n"
        )
        with subprocess.Popen(
            [sys.executable, "-c", foreign, *names], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as other:
            assert other.stdout.readline() == "ready\n"
            tree.kill_group(signal.SIGKILL)
            tree.wait()
            tree.kill_workers()
            wait_until_gone([each for each in tree.objects if each not in tree.passed])
            assert existing(tree.passed) == tree.passed
            other.communicate("\n", timeout=30)
        wait_until_gone(tree.passed)
        assert_all_is_over(tree)


LET_A_WORKER_CREATE = """
import multiprocessing, sys
from posix_ipc.mp_integration import SharedMemory

def work(pipe):
    pipe.send(SharedMemory(size=8))

if __name__ == "__main__":
    context = multiprocessing.get_context("fork")
    reader, writer = context.Pipe(duplex=False)
    worker = context.Process(target=work, args=(writer,))
    worker.start()
    worker.join()
    print(reader.recv().name, flush=True)
"""


def test_g5_what_a_worker_made_and_sent_outlives_it_under_a_root_that_made_nothing():
    name = run_python(LET_A_WORKER_CREATE).stdout.strip()
    wait_until_gone([("SharedMemory", name)])


CREATE_AND_WAIT = """
import sys
from posix_ipc.mp_integration import SharedMemory
print(SharedMemory(size=8).name, flush=True)
sys.stdin.readline()
"""

LET_A_WORKER_PICKLE = """
import multiprocessing, os, sys
from posix_ipc.mp_integration import SharedMemory

def work(name, pipe):
    pipe.send(SharedMemory.attach(name))
    os.read(0, 1)

if __name__ == "__main__":
    reader, writer = multiprocessing.Pipe(duplex=False)
    worker = multiprocessing.get_context("fork").Process(target=work, args=(sys.argv[1], writer), daemon=True)
    worker.start()
    reader.poll(30)
    worker.kill()
    worker.join()
    print(multiprocessing.current_process()._config["posix_ipc_token"], flush=True)
    sys.stdin.readline()
    print(reader.recv().name, flush=True)
"""


@pytest.mark.parametrize("tracker", ["runs", "is not there"])
def test_g5_a_pickle_in_flight_outlives_both_its_maker_and_the_creator(tracker):
    """Its maker, dead now, wrote a claim in another tree than the creator's, whose root lives and made nothing."""
    streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", CREATE_AND_WAIT], **streams) as creator:
        name = creator.stdout.readline().strip()
        left = [("SharedMemory", name)]
        with subprocess.Popen([sys.executable, "-c", LET_A_WORKER_PICKLE, name], **streams) as other:
            token = other.stdout.readline().strip()
            proxy = DIRECTORY / f"{token}.proxy"
            wait_until(proxy.exists)
            if tracker == "is not there":  # as in the instant before it runs
                for each in trackers(token):
                    each.kill()
                wait_until(lambda: not trackers(token))
                proxy.unlink()
            creator.kill()
            creator.wait(30)
            _reaper.reap()
            assert existing(left) == left
            assert other.communicate("\n", timeout=30)[0] == f"{name}\n"
    _reaper.reap()
    wait_until_gone(left)
