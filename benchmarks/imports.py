"""P12: what `import posix_ipc` takes, and what it brings along."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from pathlib import Path

from tests.original import original_directory

ROUNDS = 30

CODE = """
import os, sys, time
started = time.perf_counter()
import posix_ipc
took = time.perf_counter() - started
print(took, "multiprocessing" in sys.modules or "psutil" in sys.modules)
"""


def p12_import() -> None:
    """Each import in a new interpreter, the files in the page cache and compiled."""
    print(f"P12 import posix_ipc, {ROUNDS} new interpreters each", flush=True)
    folders = {"ours": Path(__file__).parent.parent, "1.3.2": original_directory()}
    took: dict[str, list[float]] = {who: [] for who in folders}
    for _ in range(ROUNDS):
        for who, folder in folders.items():
            environment = {**os.environ, "PYTHONPATH": str(folder)}
            done = subprocess.run(
                [sys.executable, "-c", CODE], env=environment, cwd="/", check=True, capture_output=True, text=True
            )
            seconds, heavy = done.stdout.split()
            if heavy != "False":
                raise RuntimeError(f"{who} imports multiprocessing or psutil")
            took[who].append(float(seconds) * 1e3)
    for who, samples in took.items():
        deciles = statistics.quantiles(samples, n=10)
        print(f"   {who:6} {statistics.median(samples):5.2f} ms  ({deciles[0]:.2f} to {deciles[-1]:.2f})")
