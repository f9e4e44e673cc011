"""What is seen while a scenario runs: one line, written anew on a terminal, and now and then elsewhere."""

from __future__ import annotations

import contextlib
import shutil
import sys
import time
from typing import TextIO

from stress.result import FAILED, PASSED, Result, Sample

QUIET = 10.0
"""Seconds between lines where they are not written anew."""
SPAN = 5.0
"""Seconds over which a rate is taken."""


class Progress:
    def __init__(self, stream: TextIO = sys.stderr) -> None:
        self._stream = stream
        self._in_place = stream.isatty()
        self._last = time.monotonic()

    def __call__(self, result: Result) -> None:
        if self._in_place:
            line = _line(result)[: shutil.get_terminal_size().columns - 1]
            self._write(f"\r\x1b[K{line}")
        elif time.monotonic() - self._last >= QUIET:
            self._last = time.monotonic()
            self._write(f"{_line(result)}\n")

    def over(self, result: Result) -> None:
        """The line that stays."""
        start = "\r\x1b[K" if self._in_place else ""
        self._write(f"{start}{_head(result)}: {result.status}{_reason(result)}\n")
        self._last = time.monotonic()

    def _write(self, text: str) -> None:
        with contextlib.suppress(OSError):  # the terminal is gone; what runs must come to its end all the same
            self._stream.write(text)
            self._stream.flush()


def rate(samples: list[Sample]) -> float:
    """Operations per second in the last seconds."""
    last = samples[-1]
    first = next(sample for sample in samples if sample.at >= last.at - SPAN)
    return (last.done - first.done) / (last.at - first.at) if last.at > first.at else 0.0


def megabytes(number: float) -> str:
    return f"{number / 1e6:,.0f} MB"


def _line(result: Result) -> str:
    last = result.samples[-1]
    parts = [
        f"{last.at:.0f} s",
        f"{last.done:,} {result.unit} ({rate(result.samples):,.0f}/s)",
        f"{last.errors:,} errors met",
        f"{last.processes} processes",
        f"{last.descriptors:,} descriptors",
        megabytes(last.memory),
        f"{last.objects} objects",
    ]
    if result.violations:
        parts.insert(0, f"{len(result.violations) + result.more_violations} VIOLATIONS")
    return f"{_head(result)}: {', '.join(parts)}"


def _head(result: Result) -> str:
    return f"{result.number:2} {result.scenario} [{result.method}]"


def _reason(result: Result) -> str:
    if result.status == FAILED:
        return f", {result.violations[0].splitlines()[0][:200]}"
    if result.status == PASSED:
        return f", {result.operations:,} {result.unit} in {result.seconds:.1f} s"
    return f", {result.reason}"
