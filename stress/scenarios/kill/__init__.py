"""Scenario 6: the kill storm (R1, R2).

Killers, one for each lane, grow one tree of processes after the other and kill its members at random instants: workers
and roots while they create, attach, pickle, unlink and exit, trackers, and whole groups. Every process says in a file
which objects it has, so that the killers know of every death, by the names of the objects alone, what must be gone and
what must be there: what the living own, and what the dead have shared under a living root.
"""

from __future__ import annotations

from stress.forks import fork, wait_for
from stress.scenario import Context, Full, Scenario
from stress.scenarios.kill.killer import Killer

FULL_KILLS, FULL_GROUPS = 667, 67
"""Under each of three start methods: 2,000 kills (R1), and 200 groups that are killed with their tracker (R2)."""


def run(context: Context) -> None:
    lanes = max(1, min(4, context.processes // 2))
    pids = [fork(context, lane, context, index, lanes) for index in range(lanes)]
    for pid in pids:
        wait_for(context, pid)


def lane(context: Context, index: int, lanes: int) -> None:
    """A tree whose members are killed one by one, a group that is killed with its tracker, and again."""
    share = None if context.count is None else -(-context.count // lanes)
    is_full = context.count is not None and context.count >= FULL_KILLS
    groups = -(-FULL_GROUPS // lanes) if is_full else 0
    killer = Killer(context, index)
    while context.going() and (share is None or killer.kills < share or killer.groups < groups):
        if share is None or killer.kills < share:
            killer.kill_members()
        if context.going():
            killer.kill_group()
    killer.finish(share if share and is_full else 0, groups)


SCENARIO = Scenario(
    number=6,
    name="kill",
    invariant=(
        "Whoever is killed or stopped, at any instant: what only the dead used is gone; what a living process owns or "
        "leases is there, and what the dead have shared while their root lives; no journal is corrupt."
    ),
    faults="SIGKILL, SIGSTOP and SIGCONT to workers, roots and trackers alone, and to whole groups",
    unit="kills",
    run=run,
    full=Full(count=FULL_KILLS),
)
