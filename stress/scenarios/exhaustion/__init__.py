"""Scenario 11: descriptors, memory, space and limits run out (R7)."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from stress.forks import fork, wait_for
from stress.scenario import Context, Full, Scenario
from stress.scenarios.exhaustion.namespaces import why_not_private
from stress.scenarios.exhaustion.objects import KINDS, Sufferer, make_use_remove
from stress.scenarios.exhaustion.shortages import EVERYWHERE, IN_PRIVATE


def run(context: Context) -> None:
    private = why_not_private(context)
    for reason in private:
        context.note(f"left out, since a private mount namespace is not allowed here: {reason}")
    pids = [fork(context, starve, context, index, not private) for index in range(max(1, context.processes // 2))]
    pids += [fork(context, live, context, index) for index in range(max(1, context.processes // 2))]
    for pid in pids:
        wait_for(context, pid)


def live(context: Context, index: int) -> None:
    """Nobody else's shortage is felt here."""
    choose = context.random("live", index)
    while context.going() and not os.path.exists(f"{context.directory}/over"):
        make_use_remove(context, choose.choice(KINDS), tracked=choose.random() < 0.5)
        context.tally("objects made and used beside the shortages")


def starve(context: Context, index: int, private: bool) -> None:
    """One shortage after the other, each in a process of its own, which keeps the limits to itself."""
    choose = context.random("starve", index)
    shortages = (*EVERYWHERE, *(IN_PRIVATE if private else ()))
    context.tally("starvers")
    context.channel.flush()  # its descriptor is there from now on
    for _ in context.steps(parts=max(1, context.processes // 2)):
        shortage = choose.choice(shortages)
        kind, tracked = choose.choice(KINDS), choose.random() < 0.5
        wait_for(context, fork(context, suffer, context, shortage, choose, kind, tracked))
        context.done("shortages")
        context.tally(shortage.__name__.replace("_", " "))
    open(f"{context.directory}/over", "w").close()


def suffer(context: Context, shortage: Callable[..., None], *how: Any) -> None:
    """In a process of its own."""
    shortage(Sufferer.of(context), *how)


SCENARIO = Scenario(
    number=11,
    name="exhaustion",
    invariant="Whatever runs out: a typed error with its errno, nothing left behind, and it works again after.",
    faults=(
        "no descriptors, queue memory, address space, file size; in a private namespace no bytes and no inodes in "
        "/dev/shm, no more queues"
    ),
    unit="shortages",
    run=run,
    methods=("fork",),
    full=Full(count=2_000),
)
