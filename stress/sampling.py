"""Samples of a running scenario: how far it has come, and what each of its processes holds."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping

import psutil

from stress import outside
from stress.known import Objects
from stress.result import Result, Sample, Series

PAUSE = 0.5
"""Seconds between samples, at first."""
MOST_SAMPLES = 2000
"""Of a run; when there are more, every other is dropped, and then there is more time between them."""
MOST_SERIES = 500
"""Processes whose samples are kept when they have ended: those that were seen most often."""
FEWEST_POINTS = 3
"""Of a process that is worth to be kept."""
SHARE = 0.1
"""Of the time, at most, that samples take."""


class Sampler:
    def __init__(self, result: Result, objects: Objects) -> None:
        self._result = result
        self._objects = objects
        self._pause = PAUSE
        self._next = 0.0

    def is_due(self) -> bool:
        return time.monotonic() >= self._next

    def sample(self, at: float, processes: Mapping[int, str], scenario: int) -> None:
        """At so many seconds; `processes` are pids and when they were started, `scenario` is the first of them."""
        began = time.monotonic()
        result = self._result
        descriptors = memory = 0
        for pid, started in processes.items():
            with contextlib.suppress(psutil.Error, OSError):
                process = psutil.Process(pid)
                open_ones, resident = process.num_fds(), process.memory_info().rss
                series = result.series.get(f"{pid}-{started}")
                if series is None:
                    role = "scenario" if pid == scenario else outside.role(pid)
                    series = result.series[f"{pid}-{started}"] = Series(role, pid)
                series.add(round(at, 2), open_ones, resident)
                descriptors, memory = descriptors + open_ones, memory + resident
        alive = len(self._objects.look())
        self._objects.forget_the_gone(scenario)
        done, errors = result.operations, result.errors.total()
        result.seconds = at
        result.samples.append(Sample(round(at, 2), done, errors, len(processes), descriptors, memory, alive))
        self._stay_small({f"{pid}-{started}" for pid, started in processes.items()})
        self._next = began + max(self._pause, (time.monotonic() - began) / SHARE)

    def end(self) -> None:
        self._drop_short_ones(set())

    def _stay_small(self, running: set[str]) -> None:
        result = self._result
        self._drop_short_ones(running)
        ended = sorted(result.series.keys() - running, key=lambda each: len(result.series[each].at))
        for each in ended[: max(0, len(ended) - MOST_SERIES)]:
            del result.series[each]
        if len(result.samples) > MOST_SAMPLES:
            result.samples = result.samples[::2]
            for series in result.series.values():
                series.thin_out()
            self._pause *= 2

    def _drop_short_ones(self, running: set[str]) -> None:
        series = self._result.series
        for each in [each for each in series.keys() - running if len(series[each].at) < FEWEST_POINTS]:
            del series[each]
