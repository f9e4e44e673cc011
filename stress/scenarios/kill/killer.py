"""Kills the members of trees, one by one or all at once, at random instants."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
from collections import Counter
from multiprocessing.connection import wait
from typing import Any

from posix_ipc import _reaper
from stress import outside
from stress.forks import fork, wait_for
from stress.scenario import Context
from stress.scenarios.kill import beside
from stress.scenarios.kill.page import EXIT, NAMES, OTHER, PHASES, Page
from stress.scenarios.kill.tree import ALIVE, KILLS, MOST_WORKERS, Plan, root
from stress.scenarios.kill.witness import ANSWER_WITHIN, PROMISED, Member, Tree, Witness, wait_until_empty

AS_A_GROUP = {"fork": 0.2, "spawn": 0.3, "forkserver": 0.3}
"""Seconds in which a group is killed; who starts an interpreter needs some to get anywhere."""


class Killer:
    def __init__(self, context: Context, index: int) -> None:
        self._context = context
        self._choose = context.random("killer", index)
        self._index = index
        self._grown = 0
        self._past: list[str] = []
        """Trees whose files may still be there."""
        self._witness = Witness(context)
        self._phases: Counter[str] = Counter()
        self.groups = 0
        """That were killed at once and had a tracker, which was killed too."""

    @property
    def kills(self) -> int:
        """Of workers and roots, in a phase that R1 names."""
        return self._phases.total()

    # ---- two ways to end a tree ----

    def kill_members(self) -> None:
        """Its workers one after the other, some with its tracker, and then its root."""
        tree = self._grow()
        tree.expect("ready")
        self._witness.note_kept(tree)
        self._context.check(len(tree.kept) == 4, f"a new root shows {tree.kept}, not 4 objects")
        for _ in range(ALIVE):
            self._add_worker(tree)
        ways = (self._kill_worker, self._stop_worker, self._stop_root, self._kill_tracker, self._stop_tracker)
        for _ in range(KILLS):
            worker = self._pick(tree)
            self._choose.choices(ways, (10, 3, 2, 2, 1))[0](tree, worker)
            self._witness.check_the_living(tree)
            if self._choose.random() < 0.3:
                self._have_consumed(tree)
            self._add_worker(tree)
        self._end(tree)

    def kill_group(self) -> None:
        """All at once, the tracker too, at any instant from the first one on; what is left goes at the next start."""
        tree = self._grow()
        orders: list[Any] = [1, 2, "create", "act"]
        for number in orders[:2]:
            for name in tree.plan.queues(number):
                self._context.know_queue(name)
        doomed_at = time.monotonic() + self._choose.uniform(0, AS_A_GROUP[self._context.method])
        while (left := doomed_at - time.monotonic()) > 0:
            if wait([tree.link], left):
                tree.link.recv()
                if orders:
                    tree.link.send(orders.pop(0))
        if self._choose.random() < 0.5:  # as when a cgroup is frozen, so that the tracker has no chance to act
            self._signal_group(tree, signal.SIGSTOP)
        trackers = self._kill_trackers(tree)
        self._signal_group(tree, signal.SIGKILL)
        wait_for(self._context, tree.root.pid, signal.SIGKILL)
        self._witness.check_journals(tree)
        trackers += self._kill_trackers(tree)
        self.groups += bool(trackers)
        self._context.tally(
            "groups killed at once" + (", with their tracker" if trackers else ", before they had a tracker")
        )
        self._context.tally(f"killed: root of a group, in {NAMES[tree.page.phase(0)]}")
        with beside.next_start(self._context, tree.plan) as started:
            self._past.append(started.tree)
            self._witness.acted = time.monotonic()
            self._witness.expect_all_gone(tree.plan, "G3 everything killed, at the next start", keep=[started.name])
        self._forget(tree)

    def finish(self, kills: int, groups: int) -> None:
        """Nothing of any tree stays in the directory of journals, and there were as many deaths as were demanded."""
        left = wait_until_empty(lambda: [name for tree in self._past for name in outside.tree_files(tree)])
        self._context.check(not left, f"files of dead trees are left: {left}")
        self._context.check(
            self.kills >= kills and self.groups >= groups,
            f"{self.kills} kills and {self.groups} groups killed with their tracker; demanded: {kills} and {groups}",
        )
        missed = [NAMES[phase] for phase in PHASES if kills and not self._phases[NAMES[phase]]]
        self._context.check(not missed, f"among {self.kills} kills there was none in {missed}")
        demanded = f" of {kills} and {groups} demanded" if groups else ""
        self._context.note(
            f"killer {self._index}: {self.kills} kills and {self.groups} groups with their tracker{demanded}; "
            f"{self._witness.late} of {self._witness.measured} took more than {PROMISED:g} s to go"
        )

    # ---- ways to kill a member ----

    def _kill_worker(self, tree: Tree, worker: Member) -> None:
        self._kill(worker, tree)
        self._witness.expect_gone(tree, worker, "G4 worker killed, its root lives")

    def _stop_worker(self, tree: Tree, worker: Member) -> None:
        """While it is stopped it counts as alive: a sweep takes nothing. Then it is killed, or goes on before."""
        worker.send(signal.SIGSTOP)
        if worker.is_stopped():
            self._context.tally("stopped: worker")
            _reaper.reap()
            self._witness.check_the_living(tree, worker)
            if self._choose.random() < 0.5:
                worker.send(signal.SIGCONT)
                time.sleep(self._choose.uniform(0, 0.002))
        self._kill(worker, tree)
        self._witness.expect_gone(tree, worker, "G4 worker stopped and killed, its root lives")

    def _stop_root(self, tree: Tree, worker: Member) -> None:
        """Alone: it counts as alive, so that what it and its workers, living and dead, count on is there."""
        tree.root.send(signal.SIGSTOP)
        if not tree.root.is_stopped():
            raise AssertionError("a root has ended by itself")
        self._context.tally("stopped: root")
        self._kill(worker, tree)
        self._witness.expect_gone(tree, worker, "G4 worker killed while its root is stopped")
        _reaper.reap()
        self._witness.check_the_living(tree)
        tree.root.send(signal.SIGCONT)

    def _kill_tracker(self, tree: Tree, worker: Member) -> None:
        """Then a worker; the next creation has another tracker, which does what the first one owed."""
        self._context.tally("killed: tracker", len(self._kill_trackers(tree)))
        self._kill(worker, tree)
        tree.link.send("create")
        tree.expect("created")
        self._witness.acted = time.monotonic()
        self._witness.note_kept(tree)
        self._witness.expect_gone(tree, worker, "G10 worker killed after its tracker, at the next creation")

    def _stop_tracker(self, tree: Tree, worker: Member) -> None:
        trackers = outside.trackers(tree.token)
        for pid in trackers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
        self._context.tally("stopped: tracker", len(trackers))
        self._kill(worker, tree)
        for pid in trackers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        self._witness.acted = time.monotonic()
        self._witness.expect_gone(tree, worker, "G4 worker killed while its tracker was stopped")

    def _have_consumed(self, tree: Tree) -> None:
        """The root removes what a dead worker has shared, and finds all of it."""
        for number in list(tree.survivors)[:1]:
            tree.link.send(("consume", number))
            tree.expect("consumed")
            self._context.tally("shared objects of dead workers loaded by their root", len(tree.survivors.pop(number)))

    def _end(self, tree: Tree) -> None:
        """The root: killed at a random instant, or it exits by itself; then what still runs of its group."""
        bystander = None
        if self._choose.random() < 0.4:
            bystander = beside.Bystander(self._context, tree.plan)
        what = self._end_root(tree)
        time.sleep(self._choose.uniform(0, 0.003))
        self._signal_group(tree, signal.SIGKILL)
        self._witness.acted = time.monotonic()
        if bystander is None:
            self._witness.expect_all_gone(tree.plan, what)
        else:
            self._end_bystander(tree, bystander, what)
        self._forget(tree)

    def _end_root(self, tree: Tree) -> str:
        """How it ended: as it does what its workers do, as it exits or starts a worker, or by itself."""
        order, phase = self._choose.choice(
            [
                *(("act", phase) for phase in PHASES if phase != EXIT),
                ("exit", EXIT),
                ("exit", None),
                (MOST_WORKERS, OTHER),
            ]
        )
        tree.link.send(order)
        if phase is not None:
            self._await_phase(tree, tree.root, phase)
            tree.root.send(signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(tree.root.pid, 0)[1])
        self._context.check(status in (0, -signal.SIGKILL), f"a root ended with status {status}")
        if not status:
            return "G1 root exits"
        self._count("root", tree.page.phase(0))
        self._witness.check_journals(tree)
        return "G2 root and workers killed"

    def _end_bystander(self, tree: Tree, bystander: beside.Bystander, what: str) -> None:
        """What it leases stays, the rest goes; when it is killed or ends, all of it."""
        tree.kept = {name: identity for name, identity in tree.kept.items() if name in bystander.leased}
        self._witness.expect_all_gone(tree.plan, what, keep=bystander.leased)
        self._witness.check_kept(tree)
        self._context.tally("roots dead while another program holds a lease")
        if self._choose.random() < 0.5:
            bystander.kill()
            self._context.tally("killed: bystander")
        else:
            bystander.end()
        self._witness.acted = time.monotonic()
        self._witness.expect_all_gone(tree.plan, "G5 the last lease of another program ends")

    # ---- growing and killing ----

    def _grow(self) -> Tree:
        self._grown += 1
        stem = f"{self._context.prefix}{self._index}.{self._grown}-"
        path = f"{self._context.directory}/{self._index}.{self._grown}"
        page = Page.create(path, MOST_WORKERS + 1)
        plan = Plan(self._context, stem, path, f"{self._context.seed} {self._index} {self._grown}")
        for name in plan.queues(0):
            self._context.know_queue(name)
        ours, theirs = multiprocessing.Pipe()
        pid = fork(self._context, root, plan, theirs)
        theirs.close()
        tree = Tree(plan, Member(pid, os.pidfd_open(pid)), outside.tree_of(pid), ours, page)
        self._past.append(tree.token)
        return tree

    def _add_worker(self, tree: Tree) -> None:
        tree.started += 1
        for name in tree.plan.queues(tree.started):
            self._context.know_queue(name)
        tree.link.send(tree.started)
        pid = tree.answer()
        with contextlib.suppress(ProcessLookupError):  # it has ended already
            tree.workers.append(Member(pid, os.pidfd_open(pid), tree.started))

    def _pick(self, tree: Tree) -> Member:
        """A worker, in a phase of its life that R1 names, or as it starts."""
        phase = self._choose.choice((OTHER, *PHASES, *PHASES))
        worker = tree.workers.pop(-1 if phase == OTHER else 0)
        if phase == EXIT:
            tree.page.tell_to_end(worker.number)
        self._await_phase(tree, worker, phase)
        return worker

    def _await_phase(self, tree: Tree, member: Member, phase: int) -> None:
        """Wait until it is there or at its exit, and then for a random time about as long as a phase."""
        deadline = time.monotonic() + ANSWER_WITHIN
        while (
            phase != OTHER and not member.has_ended() and (now := tree.page.phase(member.number)) not in (phase, EXIT)
        ):
            if time.monotonic() > deadline:
                raise AssertionError(f"a process stays in the phase {NAMES[now]}")
            if now == OTHER:  # else look as often as can be: a phase takes microseconds
                time.sleep(0.0002)
        time.sleep(self._choose.uniform(0, {OTHER: 0.01, EXIT: 0.001}.get(phase, 0.0003)))

    def _kill(self, worker: Member, tree: Tree) -> None:
        alive = not worker.has_ended()
        worker.send(signal.SIGKILL)
        self._witness.acted = time.monotonic()
        if not worker.has_ended(ANSWER_WITHIN):
            raise AssertionError("a worker does not die")
        self._witness.check_journals(tree)
        if alive:
            self._count("worker", tree.page.phase(worker.number))
        else:
            self._context.tally("exits before the signal")
        os.close(worker.descriptor)

    def _kill_trackers(self, tree: Tree) -> list[int]:
        """And wait until they have ended: they give back their lock after their command line."""
        killed = outside.trackers(tree.token)
        for pid in killed:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if wait_until_empty(lambda: [pid for pid in killed if outside.state(pid) not in ("", "Z", "X")]):
            raise AssertionError("a tracker does not die")
        return killed

    def _signal_group(self, tree: Tree, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(tree.root.pid, number)

    def _count(self, whom: str, phase: int) -> None:
        """R1 counts those in its phases; the others are told."""
        self._context.tally(f"killed: {whom} in {NAMES[phase]}")
        if phase in PHASES:
            self._phases[NAMES[phase]] += 1
            self._context.done("kills")

    def _forget(self, tree: Tree) -> None:
        for member in (tree.root, *tree.workers):
            os.close(member.descriptor)
        tree.page.close()
        tree.link.close()
        os.unlink(tree.plan.page)
        self._past = [each for each in self._past if outside.tree_files(each)]
