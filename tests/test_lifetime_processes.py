"""How tracked objects end in unusual company: namespaces, daemons, forks in C, pools, managers, other programs (G12).

A program is started for each test, says what it made, and is ended in some way.
"""

import contextlib
import functools
import json
import os
import signal
import subprocess
import sys

import psutil
import pytest
from lifetime import BY_NAME, OPTIONS, die_after, existing, journal_files, make, trackers, wait_until_gone
from support import finish, run_privately, run_python, start_python, wait_until

from posix_ipc import _reaper

pytestmark = [pytest.mark.slow, pytest.mark.private]

KINDS = list(OPTIONS)

PRELUDE = """
import ctypes, json, multiprocessing, os, pickle, signal, sys, threading, time

def make():
    from posix_ipc.mp_integration import MessageQueue, Semaphore, SharedMemory
    return [Semaphore(initial_value=1), SharedMemory(size=64), MessageQueue(max_messages=1, max_message_size=8)]

def tell(handles, **more):
    objects = [(type(each).__name__, each.name) for each in handles]
    print(json.dumps({"objects": objects, "pid": os.getpid(), **more}), flush=True)

def wait():
    sys.stdin.readline()
"""


@contextlib.contextmanager
def program(code, *args):
    """A program that runs, and what it told; its objects are removed in the end."""
    with start_python(PRELUDE + code, *args) as process:
        told = listen(process)
        try:
            yield process, told
        finally:
            for kind, name in told["objects"]:
                BY_NAME[kind].remove(name)


def listen(process):
    line = process.stdout.readline()
    assert line, process.stderr.read()
    told = json.loads(line)
    told["objects"] = [tuple(each) for each in told["objects"]]
    return told


def end_well(process):
    """Let it go on, to its end: with the status 0 and nothing to say about it."""
    process.stdin.write("\n")
    process.stdin.flush()
    assert process.wait(30) == 0, process.stderr.read()
    assert process.stderr.read() == ""


def kill(pid):
    os.kill(pid, signal.SIGKILL)


# ---- company of processes ----


def test_g12_normal_end_is_silent_and_leaves_no_child():
    with program("made = make(); tell(made); wait()") as (process, told):
        assert psutil.Process(process.pid).children() == []  # nor a zombie: the tracker is nobody's child
        end_well(process)
        wait_until_gone(told["objects"])


def test_g12_no_process_is_started_for_plain_objects():
    code = """
import posix_ipc
names = [f"/plain-{os.getpid()}-{i}" for i in range(3)]
made = [posix_ipc.Semaphore(names[0], posix_ipc.O_CREX), posix_ipc.SharedMemory(names[1], posix_ipc.O_CREX, size=8),
        posix_ipc.MessageQueue(names[2], posix_ipc.O_CREX, max_messages=1, max_message_size=8)]
tell(made); wait()
for each in made: each.unlink()
"""
    with program(code) as (process, _):
        assert psutil.Process(process.pid).children() == []
        assert not journal_files(f"{process.pid}-*")  # a tracker would have its lock there
        end_well(process)


@pytest.mark.parametrize("created_before", [False, True])
def test_g12_daemonised_root(created_before):
    """It forks twice, its parents are gone, and then it creates: it is the root of a tree of its own."""
    code = f"""
import posix_ipc.mp_integration
first = make() if {created_before} else []
told, tell_end = os.pipe()
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.read(told, 1)  # until its parents are gone
        made = make()
        tell(made + first)
        wait()
        os.kill(os.getpid(), 9)
    os._exit(0)
os.wait()
os.close(told)
os._exit(0)
"""
    code = code.replace("os.read(told, 1)", "os.close(tell_end); os.read(told, 1)")
    with program(code) as (process, told):
        process.wait(30)
        _reaper.reap()
        assert existing(told["objects"]) == told["objects"]
        process.stdin.write("\n")
        process.stdin.flush()
        wait_until_gone(told["objects"])


def test_g12_fork_in_c_without_the_hooks_of_python():
    """The child has its own journal: its objects go with it, and its parent's stay."""
    code = """
ours = make()
told, tell_end = os.pipe()
pid = ctypes.PyDLL(None).fork()
if pid == 0:
    theirs = make()
    os.write(tell_end, json.dumps([(type(each).__name__, each.name) for each in theirs]).encode())
    signal.pause()
tell(ours, child=pid, theirs=json.loads(os.read(told, 1000)))
wait()
"""
    with program(code) as (process, told):
        theirs = [tuple(each) for each in told["theirs"]]
        assert existing(theirs) == theirs
        kill(told["child"])
        wait_until_gone(theirs)
        assert existing(told["objects"]) == told["objects"]
        kill(process.pid)
        wait_until_gone(told["objects"])


@pytest.mark.parametrize("fork", ["os.fork", "ctypes.PyDLL(None).fork"])
def test_g12_a_fork_inherits_leases_but_no_journal(fork):
    """It outlives its root: what it leases stays with it, and what only the root owned goes."""
    code = f"""
leased, closed = make(), make()
for each in closed: each.close()
pid = {fork}()
if pid == 0:
    signal.pause()
tell(closed, child=pid, leased=[(type(each).__name__, each.name) for each in leased]); wait()
"""
    with program(code) as (process, told):
        leased = [tuple(each) for each in told["leased"]]
        kill(process.pid)
        try:
            wait_until_gone(told["objects"])
            assert existing(leased) == leased
        finally:
            kill(told["child"])
        wait_until_gone(leased)


def test_g12_threads_that_create_while_others_fork():
    code = """
import warnings
warnings.simplefilter("ignore", DeprecationWarning)  # of 3.12 and later, about just this
handles, stop = make(), threading.Event()
def create():
    while not stop.is_set():
        for each in make(): each.unlink(); each.close()
def fork():
    for _ in range(20):
        pid = os.fork()
        if pid == 0:
            make()
            os._exit(0)
        os.waitpid(pid, 0)
threads = [threading.Thread(target=target) for target in (create, create, fork, fork)]
for each in threads: each.start()
for each in threads[2:]: each.join()
stop.set()
for each in threads: each.join()
tell(handles)
wait()
"""
    with program(code) as (process, told):
        _reaper.reap()
        assert existing(told["objects"]) == told["objects"]
        end_well(process)
        wait_until_gone(told["objects"])


def test_g12_closerange():
    """Descriptors are not what leases and journals hang on; those of queues are, and there the record protects."""
    with program("made = make(); os.closerange(3, 1000); tell(made); wait()") as (process, told):
        _reaper.reap()
        assert existing(told["objects"]) == told["objects"]
        assert run_python(
            "import sys; from posix_ipc.mp_integration import *\n"
            "for cls, name in zip((Semaphore, SharedMemory, MessageQueue), sys.argv[1:]): cls.attach(name)",
            *[name for _, name in told["objects"]],
        )
        assert existing(told["objects"]) == told["objects"]
        kill(process.pid)
        wait_until_gone(told["objects"])


def test_g2_a_subprocess_that_inherits_descriptors_keeps_nothing():
    code = """
import subprocess
made = make()
child = subprocess.Popen(["sleep", "100"], close_fds=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
tell(made, child=child.pid); wait()
"""
    with program(code) as (process, told):
        try:
            kill(process.pid)
            wait_until_gone(told["objects"])
            assert psutil.pid_exists(told["child"])
        finally:
            kill(told["child"])


def test_g12_interpreter_ends_with_handles_everywhere():
    code = """
made = make()
class Cycle:
    def __init__(self): self.itself, self.handles = self, make()
cycles = [Cycle() for _ in range(3)]
import builtins
builtins.kept = make()
threading.Thread(target=signal.pause, args=(), daemon=True, name="holds").start()
tell(made + builtins.kept + [handle for cycle in cycles for handle in cycle.handles]); wait()
"""
    with program(code) as (process, told):
        end_well(process)
        wait_until_gone(told["objects"])


# ---- company of multiprocessing ----


each_method = pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
WORK = """
import lifetime_work as work
if __name__ == "__main__":
    context = multiprocessing.get_context(sys.argv[1])
"""


@each_method
def test_g5_what_a_worker_shared_outlives_it_until_its_root_unpickles(method):
    """The worker is gone, a sweep has passed, and the bytes still are in the pipe, or in the parent's hands."""
    code = """
    from posix_ipc.mp_integration import reap
    with context.Pool(2, maxtasksperchild=1) as pool:
        results = pool.map(work.pickle_new, range(4), chunksize=1)
    pool.join()
    assert len({pid for _, _, pid, _ in results}) == 4
    removed = {each.name for each in reap()}
    assert not removed & {name for _, names, _, _ in results for name in names}
    queue = context.Queue()
    child = context.Process(target=work.put_new, args=(queue,))
    child.start()
    child.join()
    reap()
    handles = queue.get(timeout=30) + [handle for pickled, *_ in results for handle in pickle.loads(pickled)]
    handles[1].buf[:4] = b"used"
    tell(handles); wait()
    work.die()
"""
    with program(WORK + code, method) as (process, told):
        assert len(told["objects"]) == 15
        assert existing(told["objects"]) == told["objects"]
        process.stdin.write("\n")
        process.stdin.flush()
        wait_until_gone(told["objects"])


@each_method
def test_g5_root_that_imports_the_module_only_after_its_pool_was_made(method):
    """Its workers create before it has a journal: the tracker says for it that it lives; without one, its pid does."""
    code = """
    pool = context.Pool(1)
    pickled, _, worker, token = pool.apply(work.pickle_new, (0,))
    assert not any(name.startswith("posix_ipc") for name in sys.modules)
    pool.apply_async(work.die, (0,))
    while worker in [each.pid for each in pool._pool]:  # until it has another
        time.sleep(0.01)
    print(json.dumps({"objects": [], "token": token}), flush=True)
    wait()
    handles = pickle.loads(pickled)
    assert multiprocessing.current_process()._config["posix_ipc_token"] == token
    tell(handles); wait()
    work.die()
"""
    with program(WORK + code, method) as (process, told):
        for tracker in trackers(told["token"]):
            tracker.kill()
        _reaper.reap()
        process.stdin.write("\n")
        process.stdin.flush()
        objects = listen(process)["objects"]
        assert existing(objects) == objects
        process.stdin.write("\n")
        process.stdin.flush()
        process.wait(30)
        wait_until(lambda: are_swept(objects))


def are_swept(objects):
    _reaper.reap()
    return not existing(objects)


ATTACHED_BY_OTHERS = """
import lifetime_work as work, subprocess
if __name__ == "__main__":
    who, how = sys.argv[1:]
    made = make()
    names = [each.name for each in made]
    for each in made: each.close()  # from here on it is the journal of this process alone that keeps them
    if who == "another program":
        code = "import lifetime_work as work, sys; work.attach_and_end(sys.argv[1], sys.argv[2:])"
        status = subprocess.run([sys.executable, "-c", code, how, *names]).returncode
    else:
        process = multiprocessing.get_context(who).Process(target=work.attach_and_end, args=(how, names))
        process.start(); process.join()
        status = process.exitcode
    tell(made, status=status); wait()
"""


@pytest.mark.parametrize("how", ["exits", "exits after closing", "dies"])
@pytest.mark.parametrize("who", ["another program", "fork", "spawn", "forkserver"])
def test_g5_who_attached_takes_nothing_with_him(who, how):
    with program(ATTACHED_BY_OTHERS, who, how) as (process, told):
        assert told["status"] == (-signal.SIGKILL if how == "dies" else 0)
        _reaper.reap()
        assert existing(told["objects"]) == told["objects"]
        end_well(process)
        wait_until_gone(told["objects"])


@each_method
def test_g2_nested_children(method):
    """A grandchild makes, its parents die before the root has received, and the root is killed."""
    code = """
    from posix_ipc.mp_integration import reap
    reader, writer = context.Pipe(duplex=False)
    process = context.Process(target=work.let_a_child_send, args=(sys.argv[1], writer))
    process.start()
    process.join()
    reap()
    handles = reader.recv()
    tell(handles); wait()
"""
    with program(WORK + code, method) as (process, told):
        assert existing(told["objects"]) == told["objects"]
        kill(process.pid)
        wait_until_gone(told["objects"])


USE = """
    from concurrent.futures import ProcessPoolExecutor
    made = make()
    if sys.argv[2] == "True":
        import loky
        executor = loky.ProcessPoolExecutor(2)
    else:
        executor = ProcessPoolExecutor(2, mp_context=context)
    with executor:
        assert list(executor.map(work.use, [made] * 6)) == [1] * 6
        theirs = executor.submit(work.give).result()
    tell(made + theirs); wait()
"""


@pytest.mark.parametrize("end", [end_well, lambda process: kill(process.pid)], ids=["normal end", "SIGKILL"])
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver", "loky"])
def test_g2_executors(method, end):
    if method == "loky":
        pytest.importorskip("loky")
    with program(WORK + USE, "spawn" if method == "loky" else method, method == "loky") as (process, told):
        assert existing(told["objects"]) == told["objects"]
        end(process)
        wait_until_gone(told["objects"])


def test_g2_joblib():
    pytest.importorskip("joblib")
    code = """
import joblib, lifetime_work as work
made = make()
assert joblib.Parallel(n_jobs=2)(joblib.delayed(work.use)(made) for _ in range(6)) == [1] * 6
tell(made); wait()
"""
    with program(code) as (process, told):
        end_well(process)
        wait_until_gone(told["objects"])


OPEN = """
    os.setsid()
    if sys.argv[2] == "joblib":
        import joblib
        parallel = joblib.Parallel(n_jobs=2).__enter__()
        call = lambda function, *args: parallel([joblib.delayed(function)(*args)])[0]
    else:
        if sys.argv[2] == "loky":
            from loky import ProcessPoolExecutor
            executor = ProcessPoolExecutor(2)
        else:
            from concurrent.futures import ProcessPoolExecutor
            executor = ProcessPoolExecutor(2, mp_context=context)
        call = lambda function, *args: executor.submit(function, *args).result()
    held = make()
    given = call(work.give)
    private, worker = call(work.keep, held)
    own = make()
    tell(held + given + own, own=[each.name for each in own], private=private, worker=worker)
    signal.pause()
"""


@contextlib.contextmanager
def open_executor(company):
    """A root whose worker uses what the root made, has given something to it, and made something for itself."""
    method = company
    if company in ("loky", "joblib"):
        pytest.importorskip(company)
        method = "spawn"
    with program(WORK + OPEN, method, company) as (root, told):
        told["private"] = [tuple(each) for each in told["private"]]
        told["objects"] += told["private"]
        others = psutil.Process(root.pid).children(recursive=True)
        try:
            yield root, told
        finally:
            for each in others:
                with contextlib.suppress(psutil.NoSuchProcess):
                    each.kill()


@pytest.mark.parametrize("company", ["fork", "spawn", "forkserver", "loky", "joblib"])
def test_g2_g4_an_open_executor_whose_worker_is_killed_and_then_all(company):
    with open_executor(company) as (root, told):
        kill(told["worker"])
        wait_until_gone(told["private"])
        shared = [each for each in told["objects"] if each not in told["private"]]
        assert existing(shared) == shared
        os.killpg(root.pid, signal.SIGKILL)
        wait_until_gone(told["objects"])


@pytest.mark.parametrize("company", ["fork", "spawn", "loky"])  # joblib's workers are loky's
def test_g2_an_open_executor_whose_root_is_killed(company):
    """Its workers wait for work for ever, and what they use stays for so long: as docs/design.md has it."""
    with open_executor(company) as (root, told):
        workers = psutil.Process(root.pid).children(recursive=True)
        root.kill()
        root.wait(30)
        used = [each for each in told["objects"] if each[1] not in told["own"]]
        wait_until_gone([each for each in told["objects"] if each not in used])
        _reaper.reap()
        assert existing(used) == used
        assert psutil.pid_exists(told["worker"])
        for each in workers:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        wait_until_gone(told["objects"])


MANAGER = """
    made = make()
    manager = context.Manager()
    held = manager.dict(handles=made)
    assert [each.name for each in held["handles"]] == [each.name for each in made]
    tell(made, server=manager._process.pid); wait()
"""


@each_method
def test_g1_manager(method):
    """A server process holds handles, and ends with its root."""
    with program(WORK + MANAGER, method) as (process, told):
        end_well(process)
        wait_until_gone(told["objects"])


@each_method
def test_g2_manager_that_outlives_its_root(method):
    """Nobody tells it when its root is killed: what it leases lives as long as it does."""
    with program(WORK + MANAGER, method) as (process, told):
        kill(process.pid)
        process.wait(30)
        try:
            _reaper.reap()
            assert existing(told["objects"]) == told["objects"]
        finally:
            kill(told["server"])
        wait_until_gone(told["objects"])


# ---- other namespaces ----


@functools.cache
def other_pids(*options):
    """A command that runs another one as the first process of a new PID namespace; None where that is barred."""
    prefix = ["unshare", "-p", "-f", *options]
    with contextlib.suppress(FileNotFoundError):
        if subprocess.run([*prefix, "true"], capture_output=True).returncode == 0:
            return prefix
    return None


@pytest.mark.parametrize("options", [[], ["--mount-proc"]], ids=["/proc of the other", "/proc of its own"])
def test_g5_a_sweep_in_another_pid_namespace_touches_nothing_live(options):
    """And what died there is reaped from here, though nobody there was left to do it."""
    if other_pids(*options) is None:
        pytest.skip("needs a PID namespace: root")
    code = """
from posix_ipc import _reaper
for _ in range(20):
    _reaper.reap()
assert os.getpid() == 1
made = make()
tell(made)
signal.pause()
"""
    with program("made = make(); closed = make(); [each.close() for each in closed]; tell(made + closed); wait()") as (
        process,
        told,
    ):
        command = [*other_pids(*options), "--kill-child", sys.executable, "-c", PRELUDE + code]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
            theirs = [tuple(each) for each in json.loads(other.stdout.readline())["objects"]]
            assert existing(told["objects"]) == told["objects"]
            _reaper.reap()
            assert existing(theirs) == theirs
            other.kill()
        wait_until(lambda: are_swept(theirs))
        assert existing(told["objects"]) == told["objects"]
        end_well(process)
        wait_until_gone(told["objects"])


def test_g12_python_as_pid_1_cleans_up_by_itself():
    """At its end the kernel takes the tracker too, so nobody else can."""
    if other_pids() is None:
        pytest.skip("needs a PID namespace: root")
    code = PRELUDE + "made = make()\nassert os.getpid() == 1\ntell(made)"
    done = run_python(code, prefix=other_pids())
    objects = [tuple(each) for each in json.loads(done.stdout)["objects"]]
    assert not existing(objects)
    assert done.stderr == ""


# ---- other programs ----


def take_a_name(kind):
    """Somebody else has it by the time the dead are reaped: it is another object, and stays."""
    die_after(make, kind, "/name")
    BY_NAME[kind].remove("/name")
    stranger = BY_NAME[kind].create("/name")
    assert _reaper.reap() == []
    assert existing([(kind, "/name")])
    BY_NAME[kind].close_handle(stranger)
    assert _reaper.reap() == []
    assert existing([(kind, "/name")])


@pytest.mark.parametrize("kind", KINDS)
def test_g6_a_name_taken_over_between_death_and_reaping(kind):
    run_privately(take_a_name, kind)


REAP = """
from posix_ipc import _reaper
print("ready", flush=True)
while True: _reaper.reap()
"""
LIVE = """
import random
made, deadline = 0, time.monotonic() + float(sys.argv[1])
while time.monotonic() < deadline:
    handles = make()
    made += len(handles)
    loaded = pickle.loads(pickle.dumps(handles))
    for each in handles[:2]: each.close()  # from here on other leases keep them, and the record
    if random.random() < 0.3:
        pid = os.fork()
        if pid == 0:
            make()  # and leave it behind
            os._exit(0)
        os.waitpid(pid, 0)
    for each in handles:
        type(each).attach(each.name).close()  # fails if somebody has removed it
    for each in loaded:
        each.unlink()
        each.close()
print(made)
"""


def test_g5_a_reaper_that_never_rests_beside_creation():
    """A short form of what the stress harness does for a minute: nothing live is removed."""
    with start_python(REAP) as reaper:
        assert reaper.stdout.readline() == "ready\n"
        with start_python(PRELUDE + LIVE, 1.5) as one, start_python(PRELUDE + LIVE, 1.5) as other:
            assert int(finish(one)) > 30
            assert int(finish(other)) > 30
        assert reaper.poll() is None, reaper.stderr.read()
