"""Scenario 13: processes that are born and end in every way that there is."""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.util
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import posix_ipc
from stress import outside
from stress.forks import fork, wait_for
from stress.scenario import Context, Full, Scenario

KINDS = range(3)
QUEUE = {"max_messages": 1, "max_message_size": 8}
THREADS = 3
CHILDREN = 4
GONE_WITHIN = 10.0
ANSWER_WITHIN = 60.0
NEW_PID_NAMESPACE = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child")


def run(context: Context) -> None:
    reason = why_not_first(context)
    if reason:
        context.note(f"left out, since no PID namespace is allowed here: Python as PID 1: {reason}")
    lanes = max(1, min(4, context.processes // 2))
    pids = [fork(context, lane, context, index, lanes, not reason) for index in range(lanes)]
    for pid in pids:
        wait_for(context, pid)


def why_not_first(context: Context) -> str:
    if shutil.which("unshare") is None:
        return "there is no unshare(1)"
    tried = subprocess.run([*NEW_PID_NAMESPACE, "true"], capture_output=True, text=True, check=False)
    return tried.stderr.strip() if tried.returncode else ""


def lane(context: Context, index: int, lanes: int, first_allowed: bool) -> None:
    """One tree of processes after the other. Nothing is tracked in this process: each child of it is a root."""
    choose = context.random("lane", index)
    ways: list[Callable[[Context, str, random.Random], None]] = [
        *(fork_from_threads, nested, leave_without_cleanup, execute_another, orphaned_child),
        *((first_of_a_namespace,) if first_allowed else ()),
    ]
    for step in context.steps(parts=lanes):
        stem = f"{context.prefix}{index}.{step}-"
        for number in range(CHILDREN + 3):
            context.know_queue(f"{stem}{number}-2")
        way = choose.choice(ways)
        way(context, stem, choose)
        context.done("trees")
        context.tally(way.__name__.replace("_", " "))


# ---- what is done and seen with objects ----


def make(stem: str, number: int) -> list[Any]:
    """One of each kind, tracked; the number says whose they are."""
    from posix_ipc import mp_integration as tracked

    return [
        tracked.SharedMemory(f"{stem}{number}-0", posix_ipc.O_CREX, size=64),
        tracked.Semaphore(f"{stem}{number}-1", posix_ipc.O_CREX, initial_value=1),
        tracked.MessageQueue(f"{stem}{number}-2", posix_ipc.O_CREX, **QUEUE),
    ]


def attach(stem: str, number: int) -> list[Any]:
    from posix_ipc import mp_integration as tracked

    classes = (tracked.SharedMemory, tracked.Semaphore, tracked.MessageQueue)
    return [cls.attach(f"{stem}{number}-{kind}") for kind, cls in enumerate(classes)]


def there(stem: str, number: int) -> dict[str, Any]:
    queue = f"{stem}{number}-2"
    return {**outside.files(f"{stem}{number}-"), **({"queue": True} if outside.queue_exists(queue) else {})}


def expect_gone(context: Context, stem: str, what: str, *numbers: int) -> None:
    began = time.monotonic()
    while (left := [name for number in numbers for name in there(stem, number)]) and (
        time.monotonic() < began + GONE_WITHIN
    ):
        time.sleep(0.001)
    took = time.monotonic() - began
    context.check(not left, f"left {took:.1f} s after {what}: {left}")
    context.took(f"until gone after {what}", took)


def expect_there(context: Context, stem: str, number: int, seen: dict[str, Any], why: str) -> None:
    now = there(stem, number)
    context.check(now == seen and len(now) == len(KINDS), f"{why}, and now there is {now}, not {seen}")


def end_well() -> None:
    """What the interpreter does at its end; a forked child has none of its own."""
    multiprocessing.util._exit_function()


# ---- forks from a process with threads ----


def fork_from_threads(context: Context, stem: str, choose: random.Random) -> None:
    """While threads attach, pickle and close, the process forks children that own objects and end in several ways."""
    wait_for(context, fork(context, threaded_root, context, stem, choose.random()))
    expect_gone(context, stem, "a root with threads exits", *range(CHILDREN + THREADS))


def threaded_root(context: Context, stem: str, seed: float) -> None:
    choose = random.Random(seed)
    kept = make(stem, 0)
    seen = there(stem, 0)
    over = threading.Event()
    failures: list[BaseException] = []

    def busy() -> None:
        try:
            while not over.is_set():
                attach_and_pickle(stem)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=busy) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    pids = []
    for number in range(1, CHILDREN + 1):
        time.sleep(choose.uniform(0, 0.01))
        pids.append(
            fork(context, child_of_threads, context, stem, number, kept, choose.choice(("exit", "_exit", "die")))
        )
    for pid in pids:
        wait_for(context, pid, 0, signal.SIGKILL)
    over.set()
    for thread in threads:
        thread.join()
    expect_gone(context, stem, "forked children of a process with threads end", *range(1, CHILDREN + 1))
    expect_there(context, stem, 0, seen, "its children have ended, the owner lives")
    if failures:
        raise failures[0]
    end_well()


def attach_and_pickle(stem: str) -> None:
    from multiprocessing.reduction import ForkingPickler

    for handle in attach(stem, 0):
        ForkingPickler.loads(bytes(ForkingPickler.dumps(handle))).close()
        handle.close()


def child_of_threads(context: Context, stem: str, number: int, kept: list[Any], end: str) -> None:
    """Of the threads of its parent none is here; what they held must not be in the way."""
    signal.alarm(60)  # a deadlock ends it, and is a violation
    own = make(stem, number)
    kept[1].acquire(10)
    kept[1].release()
    context.check(not kept[0].owned, "a forked child owns what its parent owns")
    for handle in attach(stem, 0):
        handle.close()
    if end == "die":
        context.channel.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    elif end == "exit":
        end_well()
    del own  # os._exit() follows


# ---- children of children ----


def nested(context: Context, stem: str, choose: random.Random) -> None:
    """Root, child, grandchild, each with its own objects and those before it. Then the one in the middle ends."""
    wait_for(context, fork(context, root_of_three, context, stem, choose.choice(("_exit", "die", "return"))))
    expect_gone(context, stem, "a root with children's children exits", 0, 1, 2)


def root_of_three(context: Context, stem: str, end: str) -> None:
    kept = make(stem, 0)
    seen = there(stem, 0)
    ours, theirs = context.multiprocessing.Pipe()
    child = context.multiprocessing.Process(target=middle, args=(context, stem, kept, theirs, end))
    child.start()
    theirs.close()
    if not ours.poll(ANSWER_WITHIN) or ours.recv() != "ready":
        raise AssertionError("the grandchild does not answer")
    of_middle = there(stem, 1)
    ours.send("go")  # to the one in the middle, by way of the grandchild
    deadline = time.monotonic() + ANSWER_WITHIN
    while child.exitcode is None and time.monotonic() < deadline:
        time.sleep(0.001)  # join() would wait for the grandchild too, which has inherited what it waits on
    expected = {"_exit": (3,), "die": (-signal.SIGKILL,), "return": (0,)}[end]
    context.check(child.exitcode in expected, f"a child that was to {end} ended with status {child.exitcode}")
    expect_there(context, stem, 0, seen, "the root lives")
    expect_there(context, stem, 1, of_middle, f"its owner did {end}, but a grandchild has leases")
    ours.send("end")
    if not ours.poll(ANSWER_WITHIN):
        raise AssertionError("the grandchild does not end")
    with contextlib.suppress(EOFError):
        ours.recv()
    ours.close()
    expect_gone(context, stem, "a grandchild ends that has no parent", 2)
    expect_there(context, stem, 0, seen, "the root lives")
    end_well()


def middle(context: Context, stem: str, of_root: list[Any], link: Connection, end: str) -> None:
    own = make(stem, 1)
    ours, theirs = context.multiprocessing.Pipe()
    process = context.multiprocessing.Process(target=grandchild, args=(context, stem, [*of_root, *own], link, theirs))
    process.start()
    ours.recv()
    context.channel.flush()
    if end == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if end == "_exit":
        os._exit(3)
    # As the end of the interpreter does, but for the wait for the grandchild.
    multiprocessing.process._children.discard(process)  # type: ignore[attr-defined]


def grandchild(context: Context, stem: str, inherited: list[Any], root: Connection, parent: Connection) -> None:
    own = make(stem, 2)
    for handle in inherited:
        attached = type(handle).attach(handle.name)
        context.check(attached._identity == handle._identity, f"{handle!r} and its name lead to two objects")
        attached.close()
    root.send("ready")
    root.recv()
    parent.send("go")
    root.recv()
    del own


# ---- ends without an end ----


def leave_without_cleanup(context: Context, stem: str, choose: random.Random) -> None:
    """os._exit() and death, of a root that nobody cleans up after but its tracker."""
    how = choose.choice(("os._exit()", "SIGKILL", "abort()"))

    def root() -> None:
        make(stem, 0)
        context.channel.flush()
        if how == "SIGKILL":
            os.kill(os.getpid(), signal.SIGKILL)
        elif how == "abort()":
            signal.signal(signal.SIGABRT, signal.SIG_DFL)
            import faulthandler

            faulthandler.disable()
            os.abort()
        os._exit(0)

    ends = {"os._exit()": (), "SIGKILL": (signal.SIGKILL,), "abort()": (signal.SIGABRT,)}[how]
    wait_for(context, fork(context, root), *ends)
    expect_gone(context, stem, f"{how} of a root", 0)


def execute_another(context: Context, stem: str, choose: random.Random) -> None:
    """exec ends the Python program, though the process lives on: what it owned goes."""
    ours, theirs = multiprocessing.Pipe()

    def root() -> None:
        make(stem, 0)
        theirs.send("ready")
        context.channel.flush()
        os.execvp("sleep", ["sleep", "600"])

    pid = fork(context, root)
    theirs.close()
    if not ours.poll(ANSWER_WITHIN) or ours.recv() != "ready":
        raise AssertionError("a root does not answer")
    expect_gone(context, stem, "exec of another program", 0)
    os.kill(pid, signal.SIGKILL)
    wait_for(context, pid, signal.SIGKILL)
    ours.close()


def orphaned_child(context: Context, stem: str, choose: random.Random) -> None:
    """A forked child goes on by itself, with inherited handles; as long as it lives they lead somewhere."""
    ours, theirs = multiprocessing.Pipe()
    kills = choose.random() < 0.5

    def heir(handles: list[Any]) -> None:
        own = make(stem, 1)
        theirs.send(there(stem, 0))
        theirs.recv()
        handles[1].acquire(0)
        del own

    def root() -> None:
        pid = fork(context, heir, make(stem, 0))
        theirs.send(pid)
        context.channel.flush()
        os.kill(os.getpid(), signal.SIGKILL) if kills else os._exit(0)

    wait_for(context, fork(context, root), *((signal.SIGKILL,) if kills else ()))
    seen = {}
    for _ in range(2):  # in any order
        if not ours.poll(ANSWER_WITHIN):
            raise AssertionError("a root or its child does not answer")
        answer = ours.recv()
        seen = answer if isinstance(answer, dict) else seen
    time.sleep(choose.uniform(0, 0.05))
    expect_there(context, stem, 0, seen, "their owner has ended, its child has leases")
    ours.send("end")
    expect_gone(context, stem, "the last child of a dead root ends", 0, 1)
    ours.close()
    theirs.close()


# ---- Python as the first process of a PID namespace, as in a container ----


def first_of_a_namespace(context: Context, stem: str, choose: random.Random) -> None:
    """It exits, and has cleaned up; or it dies, and the kernel takes all of its tree, the tracker too."""
    end = choose.choice(("exit", "die"))
    path = f"{context.directory}/{stem[1:]}first"
    with open(path, "wb") as file:
        pickle.dump((context, stem, end), file)
    code = "import sys; from stress.scenarios import children; children.be_first(sys.argv[1])"
    command = [*NEW_PID_NAMESPACE, sys.executable, "-c", code, path]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            ready = process.stdout.readline()
            if end == "die":
                process.kill()  # and with it PID 1, which no signal from inside would reach
            _, stderr = process.communicate(timeout=ANSWER_WITHIN)
        finally:
            process.kill()
    os.unlink(path)
    expected = 0 if end == "exit" else -signal.SIGKILL
    context.check(
        ready == "ready\n" and process.returncode == expected,
        f"PID 1 that was to {end} said {ready!r} and ended with status {process.returncode}\n{stderr}",
    )
    if end == "exit":
        expect_gone(context, stem, "a PID 1 exits", 0, 1)
        return
    wait_for(context, fork(context, start_anew, stem))
    expect_gone(context, stem, "a PID 1 dies, at the next start", 0, 1, 2)


def be_first(path: str) -> None:
    """Of this program, in a namespace of its own."""
    with open(path, "rb") as file:
        context, stem, end = pickle.load(file)
    from stress.scenario import guarded

    guarded(live_as_first, context, stem, end)


def live_as_first(context: Context, stem: str, end: str) -> None:
    context.check(os.getpid() == 1, f"the first process of a namespace has the pid {os.getpid()}")
    own = make(stem, 0)
    seen = there(stem, 0)
    ours, theirs = context.multiprocessing.Pipe()
    child = context.multiprocessing.Process(target=live_as_second, args=(context, stem, own, theirs))
    child.start()
    theirs.close()
    ours.recv()
    child.kill()
    child.join()
    expect_gone(context, stem, "a child of PID 1 is killed", 1)
    expect_there(context, stem, 0, seen, "PID 1 owns them and lives")
    context.channel.flush()
    print("ready", flush=True)
    if end == "die":
        signal.pause()
    del own


def live_as_second(context: Context, stem: str, handles: list[Any], link: Connection) -> None:
    own = make(stem, 1)
    link.send("ready")
    link.recv()
    del own, handles


def start_anew(stem: str) -> None:
    """The next start of a program of this user: it creates something, and that sweeps."""
    for handle in make(stem, 2):
        handle.unlink()
        handle.close()
    end_well()


SCENARIO = Scenario(
    number=13,
    name="children",
    invariant=(
        "However a process is born and however it ends, what only it used is gone, and what another one owns or leases "
        "is there."
    ),
    faults=(
        "forks in the midst of other threads' calls, os._exit, abort, SIGKILL, exec, orphans, children of children, "
        "Python as PID 1"
    ),
    unit="trees",
    run=run,
    full=Full(count=1_000),
)
