"""Which tree a process belongs to, where that is hard to tell: an orphan, and /proc of another PID namespace."""

import multiprocessing
import os
import signal
import subprocess
import sys

import pytest
from lifetime import DIRECTORY, existing
from support import private_ipc, run_function, run_privately, run_python, start_python, wait_until, wait_until_ready

from posix_ipc import _journal, _reaper

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="tracking is for Linux")

IMPORT_AS_AN_ORPHAN = """
import multiprocessing, os, sys, time
def child(pipe):
    os.read(pipe, 1)  # nobody writes: the parent has died
    while os.getppid() == parent:
        time.sleep(0.001)
    from posix_ipc import _journal
    from posix_ipc.mp_integration import SharedMemory
    kept = SharedMemory.create("/of-an-orphan", size=8)
    (process,) = _journal.existing()
    assert process.is_root
    assert _journal.TOKEN_FILE.fullmatch(os.path.basename(os.fsdecode(process.journals[0].path)))
    print("ready", flush=True)
    os.read(standard_input, 1)
parent = os.getpid()
standard_input = os.dup(0)  # multiprocessing gives its children another one
reader, writer = os.pipe()
process = multiprocessing.get_context("fork").Process(target=lambda: (os.close(writer), child(reader)))
process.start()
os._exit(0)
"""


def create_as_an_orphan():
    with start_python(IMPORT_AS_AN_ORPHAN) as root:
        wait_until_ready(root)
        root.wait(30)
        assert existing([("SharedMemory", "/of-an-orphan")])
        root.stdin.close()
        wait_until(lambda: not existing([("SharedMemory", "/of-an-orphan")]))


@pytest.mark.slow
def test_g2_an_orphan_that_imports_the_module_late_is_a_root():
    run_privately(create_as_an_orphan)


def without_proc_of_its_own():
    """The command prefix of a PID namespace whose /proc is that of its parent, as `unshare -p -f` makes it."""
    return [*private_ipc(), "unshare", "--pid", "--fork", "--kill-child"]


CREATE = (
    "from posix_ipc.mp_integration import Semaphore; kept = Semaphore.create(f'/normal-{__import__(\"os\").getpid()}')"
)
CREATE_AND_WAIT = """
import sys
from posix_ipc.mp_integration import Semaphore
kept = Semaphore.create("/killed")
print("ready", flush=True)
sys.stdin.read()
"""


def live_without_proc():
    """Pids mean nothing in this /proc: some are of nobody, some of strangers, or of kernel threads."""
    assert os.readlink("/proc/self") != str(os.getpid())
    assert _journal.root_lives(_journal.own_token())
    for _ in range(10):
        run_python(CREATE)
    with start_python(CREATE_AND_WAIT) as root:
        wait_until_ready(root)
        assert _journal.token_of(root.pid) is None
        assert _reaper.reap() == []
        root.kill()
        wait_until(lambda: not existing([("Semaphore", "/killed")]))
    wait_until(lambda: os.listdir(DIRECTORY) == [])  # each tracker has gone
    assert [name for name in os.listdir("/dev/shm") if name.startswith("sem.")] == []


@pytest.mark.slow
def test_g1_g2_proc_is_that_of_another_pid_namespace():
    if private_ipc() is None:
        pytest.skip("needs namespaces of its own: unshare -rmip")
    run_function(live_without_proc, prefix=without_proc_of_its_own())


def share_with_workers_without_proc(method):
    """What a worker sent lives as long as the root, which has made nothing itself."""
    with multiprocessing.get_context(method).Pool(1, maxtasksperchild=1) as pool:
        results = pool.map(create_in_a_worker, range(2), chunksize=1)
        _reaper.reap()
        for handle in results:
            handle.release()
    results.clear()


def create_in_a_worker(_):
    from posix_ipc.mp_integration import Semaphore

    return Semaphore()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_g5_shared_in_a_pid_namespace_with_the_proc_of_another(method):
    if private_ipc() is None:
        pytest.skip("needs namespaces of its own: unshare -rmip")
    run_function(share_with_workers_without_proc, method, prefix=without_proc_of_its_own())


def test_a_process_that_is_gone_has_no_token():
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    assert _journal.token_of(child) is None  # a zombie
    os.waitpid(child, 0)
    assert _journal.token_of(child) is None
    with start_python(CREATE_AND_WAIT.replace("/killed", f"/token-{os.getpid()}")) as root:
        wait_until_ready(root)
        token = _journal.token_of(root.pid)
        assert _journal.root_lives(token)
        root.send_signal(signal.SIGKILL)
        root.wait()
        assert not _journal.root_lives(token)


def import_without_proc():
    subprocess.run(["mount", "-t", "tmpfs", "none", "/proc"], check=True)
    done = run_python("import posix_ipc.mp_integration", check=False)
    assert done.returncode == 1
    last_line = done.stderr.splitlines()[-1]
    assert last_line.startswith("FileNotFoundError: ")
    assert "tracked objects need a mounted proc(5)" in last_line


@pytest.mark.slow
@pytest.mark.no_sanitizer  # it needs /proc for itself
def test_without_proc_tracking_says_so():
    run_privately(import_without_proc)
