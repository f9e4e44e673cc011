"""What runs in the processes that are killed."""

from __future__ import annotations

import multiprocessing.util
import os
import random
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import posix_ipc
from stress.scenario import Context
from stress.scenarios.kill.page import (
    ATTACH,
    CREATE,
    DOUBTFUL,
    EXIT,
    NOTHING,
    OTHER,
    OWNED,
    PICKLE,
    SHARED,
    SLOTS,
    UNLINK,
    Page,
)

SEGMENT, SEMAPHORE, QUEUE = range(3)
QUEUE_SIZE = {"max_messages": 1, "max_message_size": 8}
KIND_OF_SLOT = (QUEUE, QUEUE, *(SEGMENT,) * 3, *(SEMAPHORE,) * 3)
"""Of queues there are few: a system has 256."""
KILLS = 6
"""Of each tree, before its end."""
ALIVE = 2
"""Workers of a tree at the same time."""
MOST_WORKERS = ALIVE + KILLS + 1
"""In all; they are counted from 1."""


@dataclass(frozen=True)
class Plan:
    """What the processes of a tree know."""

    context: Context
    stem: str
    """Of the names of all objects of this tree."""
    page: str
    """The file of its Page."""
    seed: str

    def name(self, number: int, slot: int) -> str:
        """Of an object that a process has; the root is number 0."""
        return f"{self.stem}w{number}-{slot}"

    def kept(self, what: object) -> str:
        """Of an object that the root keeps until its end; of one of each kind, which it leases, by its kind."""
        return f"{self.stem}r-{what}"

    def queues(self, number: int) -> list[str]:
        """All that a process may have; they cannot be listed."""
        own = [self.name(number, slot) for slot in range(SLOTS) if KIND_OF_SLOT[slot] == QUEUE]
        return own if number else [self.kept(QUEUE), *own]

    def all_queues(self) -> list[str]:
        return [name for number in range(MOST_WORKERS + 1) for name in self.queues(number)]


def classes() -> tuple[Any, Any, Any]:
    """Imported late: in the killers nothing is tracked, so that each process they fork is the root of a tree."""
    from posix_ipc.mp_integration import MessageQueue, Semaphore, SharedMemory

    return SharedMemory, Semaphore, MessageQueue


def make(kind: int, name: str) -> Any:
    cls = classes()[kind]
    options: dict[str, Any] = ({"size": 64}, {"initial_value": 1}, QUEUE_SIZE)[kind]
    return cls(name, posix_ipc.O_CREX, **options)


# ---- a tree ----


def root(plan: Plan, killer: Connection) -> None:
    """Own some objects, and do what the killer says."""
    os.setsid()
    page = Page(plan.page)
    page.enter(0, CREATE)
    kept = tuple(make(kind, plan.kept(kind)) for kind in range(3))
    make(SEGMENT, plan.kept("closed")).close()  # without a lease, it is the root's journal alone that protects it
    page.enter(0, OTHER)
    plan.context.multiprocessing.set_forkserver_preload([__name__]) if plan.context.method == "forkserver" else None
    killer.send("ready")
    created = 0
    while (order := killer.recv()) != "exit":
        if order == "create":
            make(SEGMENT, plan.kept(f"more{created}")).close()
            created += 1
            killer.send("created")
        elif order == "act":
            Actor(plan, page, 0, kept).act()
        elif isinstance(order, tuple):
            consume(plan, page, order[1])
            killer.send("consumed")
        else:
            process = plan.context.multiprocessing.Process(target=work, args=(plan, order, kept), daemon=True)
            process.start()
            killer.send(process.pid)
    page.enter(0, EXIT)
    multiprocessing.util._exit_function()  # what the interpreter does at its end; a forked child has none of its own


def consume(plan: Plan, page: Page, number: int) -> None:
    """Load what a dead worker has shared, and remove it."""
    from multiprocessing.reduction import ForkingPickler

    for slot, (state, identity) in page.said(number).items():
        if state == SHARED:
            handle = ForkingPickler.loads(page.pickle(number, slot))
            found = handle.name, handle._identity[:2]
            wanted = plan.name(number, slot), identity
            plan.context.check(found == wanted, f"a pickle of the dead leads to {found} instead of {wanted}")
            handle.unlink()
            handle.close()


def work(plan: Plan, number: int, kept: tuple[Any, ...]) -> None:
    page = Page(plan.page)
    Actor(plan, page, number, kept).act()
    page.enter(number, EXIT)


class Actor:
    """Does all that a process does with objects, in random order, and says in which phase it is and what it has."""

    def __init__(self, plan: Plan, page: Page, number: int, kept: tuple[Any, ...]) -> None:
        self._plan, self._page, self._number, self._kept = plan, page, number, kept
        self._choose = random.Random(f"{plan.seed} {number}")
        self._handles: dict[int, Any] = {}
        """By slot."""
        self._closed: set[int] = set()
        """Slots whose handle is closed, so that it is this process's journal alone that protects the object."""

    def act(self) -> None:
        """Until it is told to end."""
        phases = {CREATE: self._create, ATTACH: self._attach, PICKLE: self._pickle, UNLINK: self._unlink}
        while not self._page.shall_end(self._number):
            phase = self._choose.choice((CREATE, CREATE, ATTACH, PICKLE, UNLINK))
            self._page.enter(self._number, phase)
            phases[phase]()

    def _create(self) -> None:
        slot = self._choose.randrange(SLOTS)
        if slot in self._handles:
            return
        handle = make(KIND_OF_SLOT[slot], self._plan.name(self._number, slot))
        self._page.describe(self._number, slot, handle)
        self._page.say(self._number, slot, OWNED)
        self._handles[slot] = handle
        if self._choose.random() < 0.3:
            handle.close()
            self._closed.add(slot)

    def _attach(self) -> None:
        handle = self._choose.choice(self._kept)
        type(handle).attach(handle.name).close()

    def _pickle(self) -> None:
        """An object of the root, there and back; or share an own one, which stays for who may load its pickle."""
        from multiprocessing.reduction import ForkingPickler

        own = self._handles.keys() - self._closed
        if not own or self._choose.random() < 0.5:
            handle = self._choose.choice(self._kept)
            ForkingPickler.loads(bytes(ForkingPickler.dumps(handle))).close()
            return
        slot = self._choose.choice(sorted(own))
        self._page.say(self._number, slot, DOUBTFUL)
        pickle = bytes(ForkingPickler.dumps(self._handles[slot]))
        self._page.describe(self._number, slot, self._handles[slot], pickle)
        self._page.say(self._number, slot, SHARED)

    def _unlink(self) -> None:
        if not self._handles:
            return
        slot = self._choose.choice(list(self._handles))
        handle = self._handles.pop(slot)
        is_shared = self._page.said(self._number)[slot].state == SHARED
        self._page.say(self._number, slot, DOUBTFUL if is_shared else NOTHING)
        handle.unlink()
        if slot in self._closed:
            self._closed.remove(slot)
        else:
            handle.close()
        self._page.say(self._number, slot, NOTHING)
