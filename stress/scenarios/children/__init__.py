"""Scenario 13: processes that are born and end in every way that there is."""

from __future__ import annotations

import random
from collections.abc import Callable

from stress.forks import fork, wait_for
from stress.scenario import Context, Full, Scenario
from stress.scenarios.children.births import CHILDREN, fork_from_threads, nested
from stress.scenarios.children.ends import execute_another, leave_without_cleanup, orphaned_child
from stress.scenarios.children.first import first_of_a_namespace, why_not_first


def run(context: Context) -> None:
    reason = why_not_first(context)
    if reason:
        context.note(f"left out, since no PID namespace is allowed here: Python as PID 1: {reason}")
    lanes = max(1, min(4, context.processes // 2))
    pids = [fork(context, lane, context, index, lanes, not reason) for index in range(lanes)]
    for pid in pids:
        wait_for(context, pid)


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
