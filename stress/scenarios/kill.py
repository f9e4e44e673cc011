"""Scenario 6: the kill storm (R1, R2).

Killers, one for each lane, grow one tree of processes after the other and kill its members at random instants: workers
while they create, attach, pickle, unlink and exit, roots, trackers, and whole groups. They look by the names of the
objects what is gone, when, and whether what lives is still there.
"""

from __future__ import annotations

import contextlib
import mmap
import multiprocessing.util
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

import posix_ipc
from stress import outside
from stress.forks import fork, wait_for
from stress.scenario import Context, Full, Scenario

PHASES = START, CREATE, ATTACH, PICKLE, UNLINK, EXIT = range(6)
NAMES = ("start", "create", "attach", "pickle", "unlink", "exit")
QUEUE = {"max_messages": 1, "max_message_size": 8}
KILLS = 6
"""Of each tree, before its end."""
ALIVE = 2
"""Workers of a tree at the same time."""
MOST_WORKERS = 64
GONE_WITHIN = 10.0
"""Seconds; the guarantees G1 to G4 say 1 s, and the summary says what was measured."""
PROMISED = 1.0
ANSWER_WITHIN = 60.0


def run(context: Context) -> None:
    lanes = max(1, min(4, context.processes // 2))
    pids = [fork(context, lane, context, index, lanes) for index in range(lanes)]
    for pid in pids:
        wait_for(context, pid)


def lane(context: Context, index: int, lanes: int) -> None:
    """A tree whose members are killed one by one, a group that is killed with its tracker, and again."""
    share = None if context.count is None else -(-context.count // lanes)
    killer = Killer(context, index)
    while context.going() and (share is None or killer.kills < share):
        killer.kill_members(KILLS if share is None else min(KILLS, share - killer.kills - 1))
        if context.going():
            killer.kill_group()
    killer.finish()


# ---- a tree: what runs in the processes that are killed ----


@dataclass(frozen=True)
class Plan:
    """What the processes of a tree know."""

    context: Context
    stem: str
    """Of the names of all objects of this tree."""
    page: str
    """A file with two bytes for each worker: the phase that it is in, and whether it shall end."""
    seed: str


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


# ---- the killer ----


@dataclass
class Member:
    """A process that is to be killed, held so that its pid cannot become another's."""

    pid: int
    descriptor: int
    number: int = 0

    def send(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.descriptor, number)

    def has_ended(self, timeout: float = 0.0) -> bool:
        return bool(wait([self.descriptor], timeout))


@dataclass
class Tree:
    plan: Plan
    pid: int
    link: Connection
    page: mmap.mmap
    workers: list[Member] = field(default_factory=list)
    started: int = 0
    kept: dict[str, tuple[int, int]] = field(default_factory=dict)


class Killer:
    def __init__(self, context: Context, index: int) -> None:
        self._context = context
        self._choose = context.random("killer", index)
        self._index = index
        self._trees = 0
        self._roots: list[int] = []
        self._late = self._measured = 0
        self._acted = 0.0
        self.kills = 0

    # ---- two ways to end a tree ----

    def kill_members(self, kills: int) -> None:
        """Its workers one after the other, some with its tracker, and then its root."""
        tree = self._grow()
        self._expect(tree, "ready")
        tree.kept = outside.files(f"{tree.plan.stem}r-")
        self._context.check(len(tree.kept) == 3, f"a new root shows {tree.kept} instead of 2 segments and a semaphore")
        for _ in range(ALIVE):
            self._add_worker(tree)
        for _ in range(kills):
            how = self._choose.choices(
                (self._kill_worker, self._stop_worker, self._kill_tracker, self._stop_tracker), (10, 3, 2, 1)
            )[0]
            how(tree)
            self._check_the_living(tree)
            self._add_worker(tree)
        self._end(tree)

    def kill_group(self) -> None:
        """All at once, the tracker too, at any instant from the first one on; what is left goes at the next start."""
        tree = self._grow()
        orders: list[Any] = [1, 2, "create"]
        doomed_at = time.monotonic() + self._choose.uniform(0, 0.2 if self._context.method == "fork" else 0.3)
        while (left := doomed_at - time.monotonic()) > 0:
            if wait([tree.link], left):
                tree.link.recv()
                if orders:
                    tree.link.send(orders.pop(0))
        if self._choose.random() < 0.5:  # as when a cgroup is frozen, so that the tracker has no chance to act
            self._signal_group(tree, signal.SIGSTOP)
        trackers = self._kill_trackers(tree)
        self._signal_group(tree, signal.SIGKILL)
        wait_for(self._context, tree.pid, signal.SIGKILL)
        trackers += self._kill_trackers(tree)
        self._context.tally(
            "groups killed at once" + (", with their tracker" if trackers else ", before they had a tracker")
        )
        self._start_anew(tree.plan.stem)
        self._forget(tree)

    def finish(self) -> None:
        """Nothing of any tree stays in the directory of journals."""
        left = self._wait_until_empty(lambda: [name for pid in self._roots for name in outside.tree_files(pid)])
        self._context.check(not left, f"files of dead trees are left: {left}")
        self._context.note(
            f"killer {self._index}: {self._late} of {self._measured} took more than {PROMISED:g} s to go"
        )

    # ---- ways to kill a member ----

    def _kill_worker(self, tree: Tree) -> None:
        worker = self._pick(tree)
        self._kill(worker, tree)
        self._expect_gone(tree, worker, "G4 worker killed, its root lives")

    def _stop_worker(self, tree: Tree) -> None:
        """While it is stopped it counts as alive: a sweep takes nothing. Then it is killed, or goes on before."""
        worker = self._pick(tree)
        worker.send(signal.SIGSTOP)
        if self._is_stopped(worker):
            if tree.page[worker.number] != EXIT:  # there it has let go, and may itself be sweeping
                self._sweep_beside(tree, worker)
            self._context.tally("stops")
            if self._choose.random() < 0.5:
                worker.send(signal.SIGCONT)
                time.sleep(self._choose.uniform(0, 0.002))
        self._kill(worker, tree)
        self._expect_gone(tree, worker, "G4 worker stopped and killed, its root lives")

    def _sweep_beside(self, tree: Tree, worker: Member) -> None:
        from posix_ipc import _reaper

        before = self._objects_of(tree, worker)
        _reaper.reap()
        after = self._objects_of(tree, worker)
        self._context.check(before == after, f"a stopped process lost what is alive: {before} became {after}")

    def _kill_tracker(self, tree: Tree) -> None:
        """Then a worker; the next creation has another tracker, which does what the first one owed."""
        for _ in self._kill_trackers(tree):
            self._count("tracker")
        worker = self._pick(tree)
        self._kill(worker, tree)
        tree.link.send("create")
        self._expect(tree, "created")
        self._acted = time.monotonic()
        self._expect_gone(tree, worker, "G10 worker killed after its tracker, at the next creation")

    def _stop_tracker(self, tree: Tree) -> None:
        trackers = outside.trackers(tree.pid)
        for pid in trackers:
            os.kill(pid, signal.SIGSTOP)
        worker = self._pick(tree)
        self._kill(worker, tree)
        for pid in trackers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        self._acted = time.monotonic()
        self._expect_gone(tree, worker, "G4 worker killed while its tracker was stopped")

    def _end(self, tree: Tree) -> None:
        """The root: killed at a random instant, or it exits by itself; then what still runs of its group."""
        bystander = self._attach(tree) if self._choose.random() < 0.4 else None
        if self._choose.random() < 0.7:
            tree.link.send(tree.started + 1)  # let it be busy
            time.sleep(self._choose.uniform(0, 0.01))
            os.kill(tree.pid, signal.SIGKILL)
            wait_for(self._context, tree.pid, signal.SIGKILL)
            self._count("root")
            what = "G2 root and workers killed"
        else:
            tree.link.send("exit")
            wait_for(self._context, tree.pid)
            what = "G1 root exits"
        time.sleep(self._choose.uniform(0, 0.003))
        self._signal_group(tree, signal.SIGKILL)
        self._acted = time.monotonic()
        if bystander is None:
            self._expect_all_gone(tree.plan.stem, what)
        else:
            self._end_bystander(tree, *bystander, what)
        self._forget(tree)

    def _attach(self, tree: Tree) -> tuple[int, Connection]:
        ours, theirs = multiprocessing.Pipe()
        pid = fork(self._context, attach_all, tree.plan.stem, theirs)
        theirs.close()
        if not ours.poll(ANSWER_WITHIN) or ours.recv() != "attached":
            raise AssertionError("the bystander did not attach")
        return pid, ours

    def _end_bystander(self, tree: Tree, pid: int, link: Connection, what: str) -> None:
        """What it leases stays, the rest goes; when it is killed or ends, all of it."""
        stem = tree.plan.stem
        leased = f"{stem}r-"
        del tree.kept[f"{leased}closed".lstrip("/")]
        self._expect_all_gone(stem, what, keep=leased)
        self._check_the_living(tree)
        self._context.tally("roots dead while another program holds a lease")
        if self._choose.random() < 0.5:
            os.kill(pid, signal.SIGKILL)
            wait_for(self._context, pid, signal.SIGKILL)
            self._count("bystander")
        else:
            link.send("end")
            wait_for(self._context, pid)
        link.close()
        self._acted = time.monotonic()
        self._expect_all_gone(stem, "G5 the last lease of another program ends")

    def _start_anew(self, stem: str) -> None:
        ours, theirs = multiprocessing.Pipe()
        pid = fork(self._context, start_anew, f"{stem}next", theirs)
        theirs.close()
        if not ours.poll(ANSWER_WITHIN) or ours.recv() != "created":
            raise AssertionError("the next program did not start")
        self._acted = time.monotonic()
        self._expect_all_gone(stem, "G3 everything killed, at the next start", keep=f"{stem}next")
        ours.send("end")
        wait_for(self._context, pid)
        ours.close()
        self._roots.append(pid)

    # ---- growing and killing ----

    def _grow(self) -> Tree:
        self._trees += 1
        stem = f"{self._context.prefix}{self._index}.{self._trees}-"
        path = f"{self._context.directory}/{self._index}.{self._trees}"
        with open(path, "w+b") as file:
            file.truncate(2 * MOST_WORKERS)
            page = mmap.mmap(file.fileno(), 2 * MOST_WORKERS)
        plan = Plan(self._context, stem, path, f"{self._context.seed} {self._index} {self._trees}")
        self._context.know_queue(f"{stem}r-2")
        for number in range(1, ALIVE + KILLS + 3):
            for family in "ps":
                self._context.know_queue(f"{stem}w{number}-{family}q")
        ours, theirs = multiprocessing.Pipe()
        pid = fork(self._context, root, plan, theirs)
        theirs.close()
        self._roots.append(pid)
        return Tree(plan, pid, ours, page)

    def _add_worker(self, tree: Tree) -> None:
        tree.started += 1
        tree.link.send(tree.started)
        pid = self._answer(tree)
        with contextlib.suppress(ProcessLookupError):  # it has ended already
            tree.workers.append(Member(pid, os.pidfd_open(pid), tree.started))

    def _pick(self, tree: Tree) -> Member:
        """A worker at a random instant of its life, often at that of its exit."""
        phase = self._choose.choice((START, CREATE, CREATE, EXIT))
        worker = tree.workers.pop(-1 if phase == START else 0)
        tree.page[MOST_WORKERS + worker.number] = phase == EXIT
        deadline = time.monotonic() + ANSWER_WITHIN
        while tree.page[worker.number] < phase and not worker.has_ended():
            if time.monotonic() > deadline:
                raise AssertionError(f"a worker stays in the phase {NAMES[tree.page[worker.number]]}")
            time.sleep(0.0002)
        time.sleep(self._choose.uniform(0, 0.001 if phase == START else 0.003))
        return worker

    def _kill(self, worker: Member, tree: Tree) -> None:
        alive = not worker.has_ended()
        worker.send(signal.SIGKILL)
        self._acted = time.monotonic()
        if not worker.has_ended(ANSWER_WITHIN):
            raise AssertionError("a worker does not die")
        if alive:
            self._count(f"worker in {NAMES[tree.page[worker.number]]}")
        else:
            self._context.tally("exits before the signal")
        os.close(worker.descriptor)

    def _kill_trackers(self, tree: Tree) -> list[int]:
        killed = outside.trackers(tree.pid)
        for pid in killed:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._wait_until_empty(lambda: [pid for pid in killed if outside.command(pid)])
        return killed

    def _signal_group(self, tree: Tree, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(tree.pid, number)

    def _count(self, whom: str) -> None:
        self.kills += 1
        self._context.done("kills")
        self._context.tally(f"killed: {whom}")

    def _forget(self, tree: Tree) -> None:
        corrupt = outside.corrupt_journals([tree.pid])
        self._context.check(not corrupt, f"a journal is corrupt: {corrupt}")
        for worker in tree.workers:
            os.close(worker.descriptor)
        tree.page.close()
        tree.link.close()
        os.unlink(tree.plan.page)

    # ---- what the killer sees ----

    def _answer(self, tree: Tree) -> Any:
        if not tree.link.poll(ANSWER_WITHIN):
            raise AssertionError("a root does not answer")
        return tree.link.recv()

    def _expect(self, tree: Tree, wanted: str) -> None:
        answer = self._answer(tree)
        if answer != wanted:
            raise AssertionError(f"a root said {answer!r} instead of {wanted!r}")

    def _is_stopped(self, worker: Member) -> bool:
        while not worker.has_ended():
            with contextlib.suppress(OSError), open(f"/proc/{worker.pid}/stat") as file:
                if file.read().rpartition(")")[2].split()[0] == "T":
                    return True
            time.sleep(0.0002)
        return False

    def _objects_of(self, tree: Tree, worker: Member) -> dict[str, Any]:
        stem = f"{tree.plan.stem}w{worker.number}-"
        queues = {name: outside.queue_exists(name) for name in (f"{stem}pq", f"{stem}sq")}
        return {**outside.files(stem), **queues}

    def _check_the_living(self, tree: Tree) -> None:
        """What the root owns is there, and is what it was."""
        now = outside.files(f"{tree.plan.stem}r-")
        lost = {name: identity for name, identity in tree.kept.items() if now.get(name) != identity}
        self._context.check(not lost, f"live objects of a root were destroyed: {lost}")
        queue = f"{tree.plan.stem}r-2"
        self._context.check(outside.queue_exists(queue), f"a live queue of a root was destroyed: {queue}")

    def _expect_gone(self, tree: Tree, worker: Member, what: str) -> None:
        stem = f"{tree.plan.stem}w{worker.number}-p"
        self._measure(what, lambda: outside.objects(stem, [f"{stem}q"]))

    def _expect_all_gone(self, stem: str, what: str, keep: str = "\0") -> None:
        numbers = range(1, ALIVE + KILLS + 3)
        queues = [f"{stem}w{number}-{family}q" for number in numbers for family in "ps"] + [f"{stem}r-2"]
        queues = [name for name in queues if not name.startswith(keep)]
        kept = keep.lstrip("/")

        def look() -> list[str]:
            return [each for each in outside.objects(stem, queues) if not each.removeprefix("sem.").startswith(kept)]

        self._measure(what, look)

    def _measure(self, what: str, look: Callable[[], list[str]]) -> None:
        """The time since the last thing the killer did, unless there was nothing to go."""
        if not look():
            self._context.tally("deaths that left nothing to remove")
            return
        left = self._wait_until_empty(look)
        took = time.monotonic() - self._acted
        self._context.check(not left, f"left after {took:.1f} s ({what}): {left}")
        self._context.took(what, took)
        self._measured += 1
        self._late += took > PROMISED

    def _wait_until_empty(self, look: Callable[[], list[Any]]) -> list[Any]:
        deadline = time.monotonic() + GONE_WITHIN
        while (left := look()) and time.monotonic() < deadline:
            time.sleep(0.0005)
        return left


SCENARIO = Scenario(
    number=6,
    name="kill",
    invariant=(
        "Whoever is killed or stopped, at any instant: what only the dead used is gone, what a living process owns or "
        "leases is there, and no journal is corrupt."
    ),
    faults="SIGKILL, SIGSTOP and SIGCONT to workers, roots, trackers and whole groups",
    unit="kills",
    run=run,
    full=Full(count=667),
)
