"""Kills the members of trees, one by one or all at once, at random instants."""

from __future__ import annotations

import contextlib
import mmap
import multiprocessing
import os
import signal
import time
from multiprocessing.connection import Connection, wait
from typing import Any

from stress import outside
from stress.forks import fork, wait_for
from stress.scenario import Context
from stress.scenarios.kill.tree import (
    ALIVE,
    CREATE,
    EXIT,
    MOST_WORKERS,
    NAMES,
    START,
    Plan,
    attach_all,
    queue_names,
    root,
    start_anew,
)
from stress.scenarios.kill.witness import ANSWER_WITHIN, PROMISED, Member, Tree, Witness, wait_until_empty


class Killer:
    def __init__(self, context: Context, index: int) -> None:
        self._context = context
        self._choose = context.random("killer", index)
        self._index = index
        self._trees = 0
        self._roots: list[int] = []
        self._witness = Witness(context)
        self.kills = 0
        """Of single members."""
        self.groups = 0
        """That were killed at once and had a tracker, which was killed too."""

    # ---- two ways to end a tree ----

    def kill_members(self, kills: int) -> None:
        """Its workers one after the other, some with its tracker, and then its root."""
        tree = self._grow()
        tree.expect("ready")
        tree.kept = outside.files(f"{tree.plan.stem}r-")
        self._context.check(len(tree.kept) == 3, f"a new root shows {tree.kept} instead of 2 segments and a semaphore")
        for _ in range(ALIVE):
            self._add_worker(tree)
        for _ in range(kills):
            how = self._choose.choices(
                (self._kill_worker, self._stop_worker, self._kill_tracker, self._stop_tracker), (10, 3, 2, 1)
            )[0]
            how(tree)
            self._witness.check_the_living(tree)
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
        self.groups += bool(trackers)
        self._context.tally(
            "groups killed at once" + (", with their tracker" if trackers else ", before they had a tracker")
        )
        self._start_anew(tree.plan.stem)
        self._forget(tree)

    def finish(self, kills: int, groups: int) -> None:
        """Nothing of any tree stays in the directory of journals, and there were as many deaths as were demanded."""
        left = wait_until_empty(lambda: [name for pid in self._roots for name in outside.tree_files(pid)])
        self._context.check(not left, f"files of dead trees are left: {left}")
        self._context.check(
            self.kills >= kills and self.groups >= groups,
            f"{self.kills} kills and {self.groups} groups killed with their tracker; demanded: {kills} and {groups}",
        )
        demanded = f" of {kills} and {groups} demanded" if groups else ""
        self._context.note(
            f"killer {self._index}: {self.kills} kills and {self.groups} groups with their tracker{demanded}; "
            f"{self._witness.late} of {self._witness.measured} took more than {PROMISED:g} s to go"
        )

    # ---- ways to kill a member ----

    def _kill_worker(self, tree: Tree) -> None:
        worker = self._pick(tree)
        self._kill(worker, tree)
        self._witness.expect_gone(tree, worker, "G4 worker killed, its root lives")

    def _stop_worker(self, tree: Tree) -> None:
        """While it is stopped it counts as alive: a sweep takes nothing. Then it is killed, or goes on before."""
        worker = self._pick(tree)
        worker.send(signal.SIGSTOP)
        if worker.is_stopped():
            if tree.page[worker.number] != EXIT:  # there it has let go, and may itself be sweeping
                self._sweep_beside(tree, worker)
            self._context.tally("stops")
            if self._choose.random() < 0.5:
                worker.send(signal.SIGCONT)
                time.sleep(self._choose.uniform(0, 0.002))
        self._kill(worker, tree)
        self._witness.expect_gone(tree, worker, "G4 worker stopped and killed, its root lives")

    def _sweep_beside(self, tree: Tree, worker: Member) -> None:
        from posix_ipc import _reaper

        before = self._witness.objects_of(tree, worker)
        _reaper.reap()
        after = self._witness.objects_of(tree, worker)
        self._context.check(before == after, f"a stopped process lost what is alive: {before} became {after}")

    def _kill_tracker(self, tree: Tree) -> None:
        """Then a worker; the next creation has another tracker, which does what the first one owed."""
        for _ in self._kill_trackers(tree):
            self._count("tracker")
        worker = self._pick(tree)
        self._kill(worker, tree)
        tree.link.send("create")
        tree.expect("created")
        self._witness.acted = time.monotonic()
        self._witness.expect_gone(tree, worker, "G10 worker killed after its tracker, at the next creation")

    def _stop_tracker(self, tree: Tree) -> None:
        trackers = outside.trackers(tree.pid)
        for pid in trackers:
            os.kill(pid, signal.SIGSTOP)
        worker = self._pick(tree)
        self._kill(worker, tree)
        for pid in trackers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        self._witness.acted = time.monotonic()
        self._witness.expect_gone(tree, worker, "G4 worker killed while its tracker was stopped")

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
        self._witness.acted = time.monotonic()
        if bystander is None:
            self._witness.expect_all_gone(tree.plan.stem, what)
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
        self._witness.expect_all_gone(stem, what, keep=leased)
        self._witness.check_the_living(tree)
        self._context.tally("roots dead while another program holds a lease")
        if self._choose.random() < 0.5:
            os.kill(pid, signal.SIGKILL)
            wait_for(self._context, pid, signal.SIGKILL)
            self._count("bystander")
        else:
            link.send("end")
            wait_for(self._context, pid)
        link.close()
        self._witness.acted = time.monotonic()
        self._witness.expect_all_gone(stem, "G5 the last lease of another program ends")

    def _start_anew(self, stem: str) -> None:
        ours, theirs = multiprocessing.Pipe()
        pid = fork(self._context, start_anew, f"{stem}next", theirs)
        theirs.close()
        if not ours.poll(ANSWER_WITHIN) or ours.recv() != "created":
            raise AssertionError("the next program did not start")
        self._witness.acted = time.monotonic()
        self._witness.expect_all_gone(stem, "G3 everything killed, at the next start", keep=f"{stem}next")
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
        for name in queue_names(stem):
            self._context.know_queue(name)
        ours, theirs = multiprocessing.Pipe()
        pid = fork(self._context, root, plan, theirs)
        theirs.close()
        self._roots.append(pid)
        return Tree(plan, pid, ours, page)

    def _add_worker(self, tree: Tree) -> None:
        tree.started += 1
        tree.link.send(tree.started)
        pid = tree.answer()
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
        self._witness.acted = time.monotonic()
        if not worker.has_ended(ANSWER_WITHIN):
            raise AssertionError("a worker does not die")
        if alive:
            self._count(f"worker in {NAMES[tree.page[worker.number]]}")
        else:
            self._context.tally("exits before the signal")
        os.close(worker.descriptor)

    def _kill_trackers(self, tree: Tree) -> list[int]:
        """And wait until they have ended: they give back their lock after their command line."""
        killed = outside.trackers(tree.pid)
        for pid in killed:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if wait_until_empty(lambda: [pid for pid in killed if outside.state(pid) not in ("", "Z", "X")]):
            raise AssertionError("a tracker does not die")
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
