"""What a run of a scenario yields."""

from __future__ import annotations

import shlex
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

PASSED, FAILED, SKIPPED, INTERRUPTED = "passed", "failed", "skipped", "interrupted"

_BY_WEIGHT = [SKIPPED, PASSED, INTERRUPTED, FAILED]

MOST_VIOLATIONS = 5
"""How many are kept in full; the others are counted."""


@dataclass
class Sample:
    """What was seen at an instant."""

    at: float
    """Seconds since the run began."""
    done: int
    errors: int
    processes: int
    descriptors: int
    memory: int
    """Bytes resident, of all processes together; what they share is counted in each."""
    objects: int


@dataclass
class Series:
    """A process over time: at which seconds, how many descriptors, how many bytes resident."""

    role: str
    pid: int
    at: list[float] = field(default_factory=list)
    descriptors: list[int] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)

    def add(self, at: float, descriptors: int, memory: int) -> None:
        self.at.append(at)
        self.descriptors.append(descriptors)
        self.memory.append(memory)

    def thin_out(self) -> None:
        """Keep every other point."""
        self.at, self.descriptors, self.memory = self.at[::2], self.descriptors[::2], self.memory[::2]


@dataclass
class Result:
    """A run of one scenario under one start method."""

    number: int
    scenario: str
    invariant: str
    method: str
    seed: int
    processes: int
    unit: str
    repeat: list[str]
    """The arguments of `python -m stress` that repeat it."""
    prefix: str = ""
    """Of the names of its objects."""
    status: str = PASSED
    reason: str = ""
    interrupted: bool = False
    seconds: float = 0.0
    violations: list[str] = field(default_factory=list)
    more_violations: int = 0
    done: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    tally: Counter[str] = field(default_factory=Counter)
    took: dict[str, list[float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    series: dict[str, Series] = field(default_factory=dict)
    """By pid and start, since pids come again; of processes that were seen at least three times."""
    stderr: str = ""

    @property
    def operations(self) -> int:
        return self.done[self.unit]

    @property
    def per_second(self) -> float:
        return self.operations / self.seconds if self.seconds else 0.0

    @property
    def command(self) -> str:
        return shlex.join(["python", "-m", "stress", *self.repeat])

    def violated(self, text: str) -> None:
        self.status = FAILED
        if len(self.violations) < MOST_VIOLATIONS:
            self.violations.append(text)
        else:
            self.more_violations += 1

    def as_json(self) -> dict[str, Any]:
        return {
            **vars(self),
            "took": {what: percentiles(seconds) for what, seconds in self.took.items()},
            "samples": [vars(sample) for sample in self.samples],
            "series": {process: vars(series) for process, series in self.series.items()},
            "operations": self.operations,
            "per_second": self.per_second,
            "command": self.command,
        }


def together(results: list[Result]) -> list[Result]:
    """One result for each scenario and start method, of all rounds of a soak; without samples and violations."""
    found: dict[tuple[str, str], Result] = {}
    for each in results:
        fresh = replace(
            each, seconds=0.0, done=Counter(), errors=Counter(), tally=Counter(), took={}, samples=[], series={}
        )
        total = found.setdefault((each.scenario, each.method), fresh)
        total.status = max(total.status, each.status, key=_BY_WEIGHT.index)
        total.seconds += each.seconds
        total.notes = each.notes
        for what in ("done", "errors", "tally"):
            getattr(total, what).update(getattr(each, what))
        for what, seconds in each.took.items():
            total.took.setdefault(what, []).extend(seconds)
    return list(found.values())


def percentiles(seconds: list[float]) -> dict[str, float]:
    """How often, and the median, the 99th percentile and the longest."""
    ordered = sorted(seconds)
    return {
        "count": len(ordered),
        "p50": ordered[len(ordered) // 2],
        "p99": ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)],
        "max": ordered[-1],
    }
