"""The rates of our stress scenarios beside those of stress-ng, which knows the same three families of objects.

stress-ng is written in C and loads the kernel; a scenario does it from Python and checks every step, so the ratio says
what the checks and the interpreter cost. An operation of the two is about, not exactly, the same amount of work.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROUNDS = 3
SECONDS = 5
ROOT = Path(__file__).parent.parent


class Pair(NamedTuple):
    """A stressor and the scenario that is its like, with what one operation of each is."""

    stressor: str
    its_operation: str
    scenario: str
    our_operation: str


PAIRS = [
    Pair("sem", "a wait and a post", "semaphores", "an acquire and a release"),
    Pair("shm", "a segment of 8 MiB made, filled and removed", "segments", "a resize, with its pages read and written"),
    Pair("mq", "a message", "queues", "a message, of random size and priority"),
]


def run() -> None:
    """Turn by turn in one run, so that what the machine does hits both."""
    program = shutil.which("stress-ng")
    if program is None:
        print("stress-ng: skipped: not installed (Debian: apt-get install stress-ng)")
        return
    print(
        f"stress-ng beside python -m stress, medians of {ROUNDS} turns of {SECONDS} s (lowest to highest)", flush=True
    )
    for pair in PAIRS:
        theirs, ours = [], []
        for _ in range(ROUNDS):
            theirs.append(_rate_of_stressor(program, pair.stressor))
            ours.append(_rate_of_scenario(pair.scenario))
        print(f"   --{pair.stressor:10} {_spread(theirs)} a second  ({pair.its_operation})")
        print(f"   {pair.scenario:12} {_spread(ours)} a second  ({pair.our_operation})", flush=True)


def _spread(rates: list[float]) -> str:
    return f"{statistics.median(rates):11,.0f}  ({min(rates):,.0f} to {max(rates):,.0f})"


def _rate_of_stressor(program: str, stressor: str) -> float:
    """Of one instance for each processor; its own processes and threads come on top."""
    with tempfile.NamedTemporaryFile("r", suffix=".yaml") as report:
        command = [program, f"--{stressor}", str(os.cpu_count()), "--timeout", str(SECONDS), "--metrics-brief"]
        subprocess.run([*command, "--yaml", report.name], check=True, capture_output=True)
        (line,) = (line for line in report if "bogo-ops-per-second-real-time:" in line)
        return float(line.rpartition(":")[2])


def _rate_of_scenario(scenario: str) -> float:
    with tempfile.NamedTemporaryFile("r", suffix=".json") as report:
        command = [sys.executable, "-m", "stress", scenario, "--method", "fork", "--duration", f"{SECONDS}s"]
        subprocess.run([*command, "--json", report.name], check=True, capture_output=True, cwd=ROOT)
        (result,) = json.load(report)
        return float(result["per_second"])
