"""Interleaved measurement: in each round every contestant runs once, so that what the machine does hits all alike."""

from __future__ import annotations

import gc
import statistics
import timeit
from collections.abc import Callable, Mapping
from dataclasses import dataclass

Runner = Callable[[int], float]
"""Runs an operation so many times and returns the seconds it took."""


@dataclass(frozen=True)
class Timing:
    """What one contestant took per operation, in nanoseconds, over all rounds."""

    median: float
    low: float
    high: float


def statement(code: str, **names: object) -> Runner:
    """A contestant written in Python: `code` in a loop, with these names at hand."""
    return timeit.Timer(code, globals=names).timeit


def interleave(contestants: Mapping[str, Runner], rounds: int, seconds: float = 0.02) -> dict[str, Timing]:
    """The median of each contestant, with the 10th and 90th percentile; `seconds` is what one turn should take."""
    counts = {name: _count_for(run, seconds) for name, run in contestants.items()}
    samples: dict[str, list[float]] = {name: [] for name in contestants}
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        for _ in range(rounds):
            for name, run in contestants.items():
                samples[name].append(run(counts[name]) / counts[name] * 1e9)
    finally:
        if was_enabled:
            gc.enable()
    timings = {}
    for name, values in samples.items():
        deciles = statistics.quantiles(values, n=10)
        timings[name] = Timing(statistics.median(values), deciles[0], deciles[-1])
    return timings


def _count_for(run: Runner, seconds: float) -> int:
    count = 1
    while (took := run(count)) < seconds / 4:
        count *= 4
    return max(1, int(count * seconds / took))
