"""Deliberate faults, one at a time put into the processes of a scenario, to see that the scenario reports it.

A fault is a function that replaces a part of the package by a broken one, in memory. `python -m stress --selftest`
runs them all. A fault must harm nothing outside its run: what it breaks is confined to names with the run's prefix.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """A fault, and how it must be reported."""

    scenario: str
    what: str
    """In one sentence, what is broken."""
    reported: str
    """A part of the violation that the scenario must report."""
    put_in: Callable[[], None]
    duration: float = 5.0
    method: str = "fork"
    processes: int = 4


FAULTS: dict[str, Fault] = {}


def fault(scenario: str, reported: str, **how: object) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Make a function a fault, by its name; its docstring says what it breaks."""

    def register(function: Callable[[], None]) -> Callable[[], None]:
        what = (function.__doc__ or "").strip()
        FAULTS[function.__name__.replace("_", "-")] = Fault(scenario, what, reported, function, **how)  # type: ignore[arg-type]
        return function

    return register


def put_in(name: str) -> None:
    """Put the fault into this process."""
    FAULTS[name].put_in()


def _is_of_this_run(name: str | bytes) -> bool:
    return os.fsdecode(name).startswith(os.environ["STRESS_PREFIX"])
