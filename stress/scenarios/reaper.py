"""Scenario 7: sweeps beside life (R3)."""

from __future__ import annotations

import contextlib
import errno
import io
import itertools
import json
import os
import random
import signal
import time
from typing import Any

import posix_ipc
from stress import outside
from stress.forks import fork, wait_for
from stress.scenario import Context, Full, Scenario

SWEEPERS = 2
"""Beside them the command is a third one."""
YIELDING = 5
"""Of the others, or the command, which looks at all of them and starts a helper, would not get its turn."""
LONG_HELD = 0.02
"""Seconds: the age at which the command looks at plain objects, half of which are kept longer."""
QUEUE: dict[str, Any] = {"max_messages": 1, "max_message_size": 8}
MOST_QUEUES = 30
"""A system allows 256, and not all of them for us."""
GONE_WITHIN = 10.0
READY_WITHIN = 300.0
"""Seconds in which a hundred processes start on a machine that sweeps."""
LONG_ENOUGH = 20.0
"""Seconds of life, after which there must have been each kind of sweep beside it."""
SWEEPS, SWEEPS_BY_COMMAND = "sweeps", "sweeps by the command"
SWEEPS_OF_UNHELD = f"{SWEEPS_BY_COMMAND}, of all that nobody holds"
KINDS_OF_SWEEPS = (SWEEPS, SWEEPS_BY_COMMAND, SWEEPS_OF_UNHELD)


def run(context: Context) -> None:
    of_method = context.multiprocessing
    has_begun, is_over = of_method.Event(), of_method.Event()
    sweepers = [context.start(sweep, has_begun, is_over) for _ in range(SWEEPERS)]
    is_ready = of_method.Event()
    sweepers.append(context.start(sweep_by_command, is_ready, has_begun, is_over))
    is_ready.wait(60)
    started = time.monotonic()
    ready = of_method.Semaphore(0)
    lives = [context.start(live, index, ready, has_begun) for index in range(context.processes)]
    for _ in lives:
        context.check(ready.acquire(timeout=READY_WITHIN), f"a loop is not ready within {READY_WITHIN:.0f} s")
    context.begin()
    has_begun.set()
    began = time.monotonic()
    context.join(*lives)
    seconds = time.monotonic() - began
    context.note(f"{len(lives)} loops, all of them ready after {began - started:.1f} s; from then on {seconds:.1f} s")
    is_over.set()
    context.join(*sweepers)
    check_that_it_was_swept(context, seconds)
    deadline = time.monotonic() + GONE_WITHIN
    while (left := outside.files(context.prefix)) and time.monotonic() < deadline:
        time.sleep(0.01)
    context.check(not left, f"never reaped, although nobody uses it any more: {sorted(left)}")


def check_that_it_was_swept(context: Context, seconds: float) -> None:
    """Nothing is destroyed by sweeps that never come to their end; short runs may be over before they do."""
    if seconds >= LONG_ENOUGH:
        for kind in KINDS_OF_SWEEPS:
            swept = os.path.exists(f"{context.directory}/{kind}")
            context.check(swept, f"in {seconds:.0f} s beside life there were no {kind} from beginning to end")


def has_swept(context: Context, kind: str) -> None:
    """A sweep has ended that had begun beside life; in a file, as counts are known to the runner alone."""
    open(f"{context.directory}/{kind}", "w").close()


def sweep(context: Context, has_begun: Any, is_over: Any) -> None:
    """One sweep after the other, at the same time as another sweeper and as many trackers as there are trees."""
    from posix_ipc import _reaper

    os.nice(YIELDING)
    while not is_over.is_set():
        is_beside_life = has_begun.is_set()
        removed = _reaper.reap()
        if is_beside_life:
            has_swept(context, SWEEPS)
        context.done(SWEEPS)
        context.tally("orphans removed by the sweepers", len(removed))


def sweep_by_command(context: Context, is_ready: Any, has_begun: Any, is_over: Any) -> None:
    """The same by `python -m posix_ipc reap --yes`; by turns it also removes plain objects that nobody holds.

    It is called in this process, and once before all others: beside a hundred busy ones it takes seconds to start.
    """
    from posix_ipc.__main__ import main

    unheld = ["--unheld", "--min-age", str(LONG_HELD), "--prefix", context.prefix]
    for options in itertools.cycle(([], unheld)):
        if is_over.is_set():
            return
        is_beside_life = has_begun.is_set()
        output, errors = io.TextIOWrapper(io.BytesIO()), io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
            status = main(["reap", "--yes", "--json", *options])
        is_ready.set()
        context.check(status in (0, 1, 2), f"the command ended with status {status}: {errors.getvalue()}")
        kind = SWEEPS_OF_UNHELD if options else SWEEPS_BY_COMMAND
        if is_beside_life and output.buffer.getvalue():  # also with status 2: what it could not tell is no fault of it
            has_swept(context, kind)
        context.done(kind)
        for each in json.loads(output.buffer.getvalue() or b'{"objects": []}')["objects"]:
            context.tally(
                f"{each['outcome']} by the command: {'an orphan' if 'orphan' in each['reason'] else 'unheld'}"
            )


def live(context: Context, index: int, ready: Any, has_begun: Any) -> None:
    """Create, attach, fork; what this process or its children use must be there at every look.

    The time begins when all of them have made an object, and so have a journal and a tracker.
    """
    os.nice(YIELDING)
    choose = context.random("live", index)
    kinds = ["segment", "semaphore", "queue"] if index < MOST_QUEUES else ["segment", "semaphore"]
    create_and_unlink(context, "segment", choose)
    context.begin()  # for the runner, which gives the others as long again to be ready
    ready.release()
    has_begun.wait(READY_WITHIN)
    context.begin()
    for _ in context.steps(parts=context.processes):
        kind = choose.choice(kinds)
        step = choose.choices(
            (create_and_unlink, attach_in_a_fork, die_while_another_uses_it, hold_a_plain_one), (5, 3, 2, 2)
        )[0]
        step(context, kind, choose)
        context.done("lives")


# ---- the lives of an object ----


def create_and_unlink(context: Context, kind: str, choose: random.Random) -> None:
    handle = create(context, kind)
    seen = look(handle)
    time.sleep(choose.uniform(0, 0.002))
    expect(context, handle, seen, "its creator uses it")
    handle.unlink()
    handle.close()


def attach_in_a_fork(context: Context, kind: str, choose: random.Random) -> None:
    """A child attaches by name; then the creator's handle is closed, while its process lives."""
    handle = create(context, kind)
    seen = look(handle)
    pause = choose.uniform(0, 0.002)

    def child() -> None:
        own = type(handle).attach(handle.name)
        handle.close()
        time.sleep(pause)
        expect(context, own, seen, "a forked child attached it")

    pid = fork(context, child)
    time.sleep(choose.uniform(0, 0.001))
    wait_for(context, pid)
    expect(context, handle, seen, "its creator uses it")
    handle.unlink()
    handle.close()


def die_while_another_uses_it(context: Context, kind: str, choose: random.Random) -> None:
    """The owner is killed while its child has a lease: the object stays until that child ends, and then goes."""
    pause = choose.uniform(0, 0.01)
    reader, writer = os.pipe()
    attaches = choose.random() < 0.5

    def heir(handle: Any, seen: object) -> None:
        own = type(handle).attach(handle.name) if attaches else handle
        os.write(writer, b".")
        time.sleep(pause)
        expect(context, own, seen, "the child of its killed owner uses it")

    def owner() -> None:
        handle = create(context, kind)
        fork(context, heir, handle, look(handle))
        os.read(reader, 1)
        context.channel.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    wait_for(context, fork(context, owner), signal.SIGKILL)
    os.close(writer)
    os.read(reader, 1)  # until the heir has ended too
    os.close(reader)
    context.tally("owners killed")


def hold_a_plain_one(context: Context, kind: str, choose: random.Random) -> None:
    """Without tracking, nothing but a descriptor or a mapping protects it, and that from the command alone."""
    handle = create(context, kind, tracked=False)
    seen = look(handle)
    view = None
    if isinstance(handle, posix_ipc.SharedMemory) and choose.random() < 0.5:
        view = handle.buf
        handle.close_fd()
    time.sleep(choose.uniform(0, 2 * LONG_HELD))
    expect(context, handle, seen, f"its creator holds it: {view or handle}")
    handle.unlink()
    if view is not None:
        view.release()
    handle.close()


# ---- helpers ----


def create(context: Context, kind: str, tracked: bool = True) -> Any:
    from posix_ipc import mp_integration

    module: Any = mp_integration if tracked else posix_ipc
    name = context.name(kind)
    if kind == "segment":
        return module.SharedMemory(name, posix_ipc.O_CREX, size=64)
    if kind == "semaphore":
        return module.Semaphore(name, posix_ipc.O_CREX, initial_value=1)
    try:
        return module.MessageQueue(name, posix_ipc.O_CREX, **QUEUE)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        context.met("no room for a queue")  # those of the dead wait for sweepers that wait for a processor
        return create(context, "segment", tracked)


def look(handle: Any) -> object:
    """What the name leads to, as the system tells."""
    if isinstance(handle, posix_ipc.MessageQueue):
        return outside.queue_exists(handle.name)
    prefix = "sem." if isinstance(handle, posix_ipc.Semaphore) else ""
    try:
        status = os.stat(outside.SHM / (prefix + handle.name[1:]))
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino


def expect(context: Context, handle: Any, seen: object, why: str) -> None:
    now = look(handle)
    context.check(now == seen, f"a live object was destroyed: {handle!r} is {now}, was {seen}, and {why}")


SCENARIO = Scenario(
    number=7,
    name="reaper",
    invariant="Sweeps that never pause destroy nothing that a living process owns or leases, and leave no orphan.",
    faults="owners killed while their children hold a lease; two sweepers, `reap --yes` and every tracker at once",
    unit="lives",
    run=run,
    full=Full(duration=60, processes=100),
)
