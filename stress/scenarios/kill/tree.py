"""What runs in the processes that are killed, and in those beside them."""

from __future__ import annotations

import mmap
import multiprocessing.util
import os
import random
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import posix_ipc
from stress.scenario import Context

PHASES = START, CREATE, ATTACH, PICKLE, UNLINK, EXIT = range(6)
NAMES = ("start", "create", "attach", "pickle", "unlink", "exit")
QUEUE = {"max_messages": 1, "max_message_size": 8}
KILLS = 6
"""Of each tree, before its end."""
ALIVE = 2
"""Workers of a tree at the same time."""
MOST_WORKERS = 64


@dataclass(frozen=True)
class Plan:
    """What the processes of a tree know."""

    context: Context
    stem: str
    """Of the names of all objects of this tree."""
    page: str
    """A file with two bytes for each worker: the phase that it is in, and whether it shall end."""
    seed: str


def queue_names(stem: str) -> list[str]:
    """All that a tree may have; they cannot be listed."""
    return [f"{stem}r-2", *(f"{stem}w{number}-{family}q" for number in range(1, ALIVE + KILLS + 3) for family in "ps")]


def classes() -> tuple[Any, Any, Any]:
    """Imported late: in the killers nothing is tracked, so that each process they fork is the root of a tree."""
    from posix_ipc.mp_integration import MessageQueue, Semaphore, SharedMemory

    return SharedMemory, Semaphore, MessageQueue


def make(kind: int, name: str) -> Any:
    cls = classes()[kind]
    options: dict[str, Any] = ({"size": 64}, {"initial_value": 1}, QUEUE)[kind]
    return cls(name, posix_ipc.O_CREX, **options)


def root(plan: Plan, killer: Connection) -> None:
    """Own some objects, and do what the killer says."""
    os.setsid()
    kept = tuple(make(kind, f"{plan.stem}r-{kind}") for kind in range(3))
    make(0, f"{plan.stem}r-closed").close()  # without a lease, it is the root's journal alone that says that it lives
    plan.context.multiprocessing.set_forkserver_preload([__name__]) if plan.context.method == "forkserver" else None
    killer.send("ready")
    created = 0
    while (order := killer.recv()) != "exit":
        if order == "create":
            make(0, f"{plan.stem}r-more{created}").close()
            created += 1
            killer.send("created")
        else:
            process = plan.context.multiprocessing.Process(target=work, args=(plan, order, kept), daemon=True)
            process.start()
            killer.send(process.pid)
    multiprocessing.util._exit_function()  # what the interpreter does at its end; a forked child has none of its own


def work(plan: Plan, number: int, kept: tuple[Any, ...]) -> None:
    """All that a process does with objects, in random order, always saying in which phase it is; its end when told."""
    from multiprocessing.reduction import ForkingPickler

    with open(plan.page, "r+b") as file:
        page = mmap.mmap(file.fileno(), 2 * MOST_WORKERS)
    choose = random.Random(f"{plan.seed} {number}")
    held: list[Any] = []
    has_queue: set[str] = set()
    step = 0
    while not page[MOST_WORKERS + number]:
        step += 1
        phase = choose.choice((CREATE, CREATE, ATTACH, PICKLE, UNLINK))
        page[number] = phase
        if phase == CREATE and len(held) < 8:
            kind, family = choose.randrange(3), choose.choice("ps")
            if kind == 2 and family in has_queue:
                continue
            end = "q" if kind == 2 else str(step)
            held.append(make(kind, f"{plan.stem}w{number}-{family}{end}"))
            if kind == 2:
                has_queue.add(family)
            if family == "s":
                ForkingPickler.dumps(held[-1])
        elif phase == ATTACH:
            handle = choose.choice(kept)
            type(handle).attach(handle.name).close()
        elif phase == PICKLE:
            handle = choose.choice(kept)
            ForkingPickler.loads(bytes(ForkingPickler.dumps(handle))).close()
        elif phase == UNLINK and held:
            handle = held.pop(choose.randrange(len(held)))
            handle.unlink()
            handle.close()
            if handle.name.endswith("q"):
                has_queue.discard(handle.name[-2])
    page[number] = EXIT


def attach_all(stem: str, killer: Connection) -> None:
    """A bystander: another program, which attaches what the tree owns and holds it until it is told to end."""
    handles = [cls.attach(f"{stem}r-{kind}") for kind, cls in enumerate(classes())]
    killer.send("attached")
    killer.recv()
    del handles
    os._exit(0)


def start_anew(name: str, killer: Connection) -> None:
    """The next start of a program of this user: it creates something, and that sweeps."""
    semaphore = classes()[1](name, posix_ipc.O_CREX)
    killer.send("created")
    killer.recv()
    semaphore.unlink()
    semaphore.close()
    multiprocessing.util._exit_function()
