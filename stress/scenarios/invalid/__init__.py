"""Scenario 14: wrong arguments to every public call, mixed into traffic that must not feel them (R5)."""

from __future__ import annotations

from stress.scenario import Context, Full, Scenario
from stress.scenarios.invalid.arguments import all_names
from stress.scenarios.invalid.calls import public_calls, public_modules
from stress.scenarios.invalid.worker import work


def run(context: Context) -> None:
    for name in all_names(context.prefix):
        context.know_queue(name, lasting=True)
    calls = len(list(public_calls()))
    context.note(
        f"{calls} public calls and attributes, found in {', '.join(each.__name__ for each in public_modules())}"
    )
    context.join(*(context.start(work, index) for index in range(context.processes)))


SCENARIO = Scenario(
    number=14,
    name="invalid",
    invariant=(
        "Wrong arguments to any public call are answered by TypeError, ValueError, BufferError, OSError or "
        "posix_ipc.Error; nothing crashes, waits or leaks, and calls beside them do not feel it."
    ),
    faults="random arguments to every public call, on handles that are open, closed or were never opened",
    unit="calls",
    run=run,
    methods=("fork",),
    full=Full(count=1_000_000),
)
