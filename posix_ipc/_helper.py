"""A process of its own for looks that would change something in this one.

Closing a descriptor of a queue cancels the notification that its process has asked for, and closing one of any file
drops the record locks (fcntl) that its process has on it. See mq_notify(3), fcntl(2).
"""

from __future__ import annotations

import multiprocessing.spawn
import os
import subprocess

_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def run_python(code: str, given: str = "") -> str:
    """Run `code`, which finds this package, in an interpreter of its own; what it printed. `given` is its input."""
    code = f"import sys; sys.path.append({_PACKAGE!r})\n{code}"
    command = [multiprocessing.spawn.get_executable(), "-I", "-S", "-c", code]
    return subprocess.run(command, input=given, stdout=subprocess.PIPE, check=True, text=True).stdout
