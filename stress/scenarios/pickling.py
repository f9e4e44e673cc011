"""Scenario 5: the pickling storm (R4)."""

from __future__ import annotations

import concurrent.futures
import itertools
import os
import pickle
import signal
import struct
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import posix_ipc
from stress.scenario import Context, Full, Scenario

BATCH = 200
"""Tasks that are handed to the pool at a time."""
CHANNELS_EVERY = 100
"""Batches of which one has the other channels used beside it."""
ENOUGH = 10_000
"""Tasks from which on a pool has done enough for its memory to be compared."""
WITHIN = 1.02
COUNTER = struct.Struct("Q")
QUEUE = {"max_messages": 1, "max_message_size": 8}


def run(context: Context) -> None:
    from posix_ipc.mp_integration import IPCManager

    plain = (
        posix_ipc.SharedMemory(context.name(), posix_ipc.O_CREX, size=64),
        posix_ipc.Semaphore(context.name(), posix_ipc.O_CREX, initial_value=1),
        posix_ipc.MessageQueue(context.name("queue"), posix_ipc.O_CREX, **QUEUE),
    )
    for handle in plain:
        pickle.dumps(handle)  # its identity is looked up when it is pickled, and forked children are to know it
    with IPCManager() as ipc:
        tracked = (
            ipc.SharedMemory(context.name(), posix_ipc.O_CREX, size=64),
            ipc.Semaphore(context.name(), posix_ipc.O_CREX, initial_value=1),
            ipc.MessageQueue(context.name("queue"), posix_ipc.O_CREX, **QUEUE),
        )
        through_a_pool(context, Objects(*tracked), Objects(*plain))
    for handle in plain:
        handle.unlink()
        handle.close()


class Objects(NamedTuple):
    """One of each kind, of one of the two families."""

    segment: Any
    mutex: Any
    queue: Any


# ---- the pool ----


class Seen(NamedTuple):
    """What a worker is seen to hold, always at the same place of a task."""

    pid: int
    descriptors: int
    mappings: int
    memory: int


def task(arguments: tuple[Objects, Objects, bool]) -> Seen | None:
    """The objects were opened afresh by unpickling them; they are closed when this returns and drops them."""
    *families, is_counted = arguments
    for segment, mutex, queue in families:
        if queue.max_message_size != QUEUE["max_message_size"]:
            raise AssertionError(f"{queue!r} is another one")
        with mutex:
            (count,) = COUNTER.unpack_from(segment.buf)
            COUNTER.pack_into(segment.buf, 0, count + 1)
    return observe() if is_counted else None


def observe() -> Seen:
    maps = Path("/proc/self/maps").read_text().count("\n")
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * posix_ipc.PAGE_SIZE
    return Seen(os.getpid(), len(os.listdir("/proc/self/fd")), maps, resident)


def through_a_pool(context: Context, tracked: Objects, plain: Objects) -> None:
    """One pool for all tasks, so that whatever a task leaves adds up; now and then beside the other channels."""
    done = 0
    seen: list[tuple[int, Seen]] = []
    with context.multiprocessing.Pool(context.processes) as pool:
        for batch in itertools.count():
            if not context.going() or (context.count is not None and done >= context.count):
                break
            size = BATCH if context.count is None else min(BATCH, context.count - done)
            arguments = ((tracked, plain, number % 10 == 0) for number in range(size))
            results = pool.imap_unordered(task, arguments, chunksize=1)
            if batch % CHANNELS_EVERY == 0:
                through_other_channels(context, (*tracked, *plain))
            seen += [(done, result) for result in results if result is not None]
            done += size
            context.done("tasks", size)
        pool.close()
        pool.join()
    for segment, *_ in (tracked, plain):
        (count,) = COUNTER.unpack_from(segment.buf)
        context.check(count == done, f"{done} tasks counted themselves {count} times under the semaphore")
    check_flat(context, done, seen)


def check_flat(context: Context, done: int, seen: list[tuple[int, Seen]]) -> None:
    """Compare the second tenth with the last one, for each worker: what grows, leaks."""
    context.note(f"{done:,} tasks in one pool of {context.processes}")
    early = by_worker(each for at, each in seen if done // 10 <= at < done // 5)
    late = by_worker(each for at, each in seen if at >= done - done // 10)
    for what in ("descriptors", "mappings", "memory"):
        if what == "memory" and done < ENOUGH:
            continue
        growth = [
            mean(getattr(each, what) for each in late[pid]) / mean(getattr(each, what) for each in early[pid])
            for pid in early.keys() & late.keys()
        ]
        if not growth:
            continue
        worst = max(growth)
        context.note(
            f"{what} of workers, last tenth of the tasks over the second: {mean(growth):.4f}, worst {worst:.4f}"
        )
        context.check(
            worst <= WITHIN, f"{what} of a pool's worker grow: the last tenth is {worst:.3f} times the second"
        )


def by_worker(seen: Iterator[Seen]) -> dict[int, list[Seen]]:
    found = defaultdict(list)
    for each in seen:
        found[each.pid].append(each)
    return found


# ---- the other channels ----


def through_other_channels(context: Context, objects: tuple[Any, ...]) -> None:
    """Each way that multiprocessing passes arguments, with receivers that are killed and pickles that come too late."""
    for step in (through_process, through_queue, through_pipe, through_executor, to_the_killed, too_late):
        if context.going():
            step(context, objects)
            context.tally(f"rounds {step.__name__.replace('_', ' ')}, beside the pool")


def identities(objects: tuple[Any, ...]) -> list[Any]:
    return [each._identity for each in objects]


def compare(context: Context, how: str, objects: tuple[Any, ...], found: Any) -> None:
    wanted = identities(objects)
    context.check(found == wanted, f"{how} led to other objects: {found}, not {wanted}")


def tell(context: Context, objects: tuple[Any, ...], pipe: Any) -> None:
    pipe.send(identities(objects))


def through_process(context: Context, objects: tuple[Any, ...]) -> None:
    """As arguments."""
    reader, writer = context.multiprocessing.Pipe(duplex=False)
    child = context.start(tell, objects, writer)
    writer.close()
    compare(context, "the arguments of a Process", objects, reader.recv())
    reader.close()
    context.join(child)


def answer(context: Context, asked: Any, told: Any) -> None:
    while (received := asked.get()) is not None:
        told.put(identities(received))


def through_queue(context: Context, objects: tuple[Any, ...]) -> None:
    asked, told = context.multiprocessing.Queue(), context.multiprocessing.SimpleQueue()
    child = context.start(answer, asked, told)
    for _ in range(20):
        asked.put(objects)
    for _ in range(20):
        compare(context, "a Queue", objects, told.get())
    asked.put(None)
    context.join(child)
    asked.close()
    asked.join_thread()
    told.close()


def echo(context: Context, pipe: Any) -> None:
    while (received := pipe.recv()) is not None:
        pipe.send(received)
    pipe.close()


def through_pipe(context: Context, objects: tuple[Any, ...]) -> None:
    """There and back: what comes back was pickled by who had unpickled it."""
    ours, theirs = context.multiprocessing.Pipe()
    child = context.start(echo, theirs)
    theirs.close()
    for _ in range(20):
        ours.send(objects)
        compare(context, "a Pipe, there and back", objects, identities(ours.recv()))
    ours.send(None)
    context.join(child)
    ours.close()


def through_executor(context: Context, objects: tuple[Any, ...]) -> None:
    """With one worker killed in the midst of it, which breaks the executor and must break nothing else."""
    with concurrent.futures.ProcessPoolExecutor(2, mp_context=context.multiprocessing) as executor:
        for found in executor.map(identities, [objects] * 20):
            compare(context, "a ProcessPoolExecutor", objects, found)
        futures = [executor.submit(identities, objects) for _ in range(20)]
        os.kill(next(iter(executor._processes)), signal.SIGKILL)
        for future in futures:
            try:
                compare(context, "a ProcessPoolExecutor whose worker was killed", objects, future.result())
            except BrokenProcessPool as error:
                context.met(error)


def forever(context: Context, objects: tuple[Any, ...], pipe: Any) -> None:
    while True:
        pipe.send(objects)
        pipe.recv()


def to_the_killed(context: Context, objects: tuple[Any, ...]) -> None:
    """Who received the objects is killed between any two instructions of pickling and unpickling them."""
    choose = context.random("to the killed")
    for _ in range(5):
        ours, theirs = context.multiprocessing.Pipe()
        child = context.multiprocessing.Process(target=forever, args=(context, objects, theirs))
        child.start()
        theirs.close()
        doomed_at = time.monotonic() + choose.uniform(0.05, 0.1)
        try:
            while time.monotonic() < doomed_at:
                ours.send(ours.recv())
            child.kill()
            while True:
                ours.send(ours.recv())
        except (EOFError, ConnectionError) as error:
            context.met(error)
        child.join()
        ours.close()
    compare(context, "pickles after killed receivers", objects, identities(tuple(map(reopen, objects))))


def reopen(handle: Any) -> Any:
    from multiprocessing.reduction import ForkingPickler

    return ForkingPickler.loads(bytes(ForkingPickler.dumps(handle)))


def too_late(context: Context, objects: tuple[Any, ...]) -> None:
    """Pickles of what is gone, or of what has given its name to another object, open nothing."""
    from multiprocessing.reduction import ForkingPickler

    from posix_ipc.mp_integration import Semaphore

    for family, cls in (("tracked", Semaphore), ("plain", posix_ipc.Semaphore)):
        name = context.name()
        gone = cls(name, posix_ipc.O_CREX)
        pickled = bytes(ForkingPickler.dumps(gone))
        gone.unlink()
        gone.close()
        successor = posix_ipc.Semaphore(name, posix_ipc.O_CREX)
        expect_refused(context, family, pickled, "its successor")
        successor.unlink()
        successor.close()
        expect_refused(context, family, pickled, "something")


def expect_refused(context: Context, family: str, pickled: bytes, what: str) -> None:
    from multiprocessing.reduction import ForkingPickler

    try:
        ForkingPickler.loads(pickled)
    except posix_ipc.ExistentialError as error:
        context.met(error)
    else:
        context.violated(f"a pickle of a {family} object that is gone opened {what}")


SCENARIO = Scenario(
    number=5,
    name="pickling",
    invariant=(
        "Objects, tracked and plain, arrive as themselves through every channel beside a pool, and the pool's workers "
        "stay as large as they are."
    ),
    faults="receivers killed while they pickle and unpickle, executors broken, pickles that come too late",
    unit="tasks",
    run=run,
    full=Full(count=100_000),
)
