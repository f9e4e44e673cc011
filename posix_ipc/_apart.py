"""What helper processes do, which `_helper` starts. It imports little, for they start with it."""

from __future__ import annotations

import errno
import importlib
import json
import sys
from collections.abc import Callable
from typing import Any

from posix_ipc import _reaper

Function = Callable[[Any], Any]
"""One of a module of this package, from and to what JSON can say."""


def answer(function: Function, given: Any) -> str:
    """What a function returns or raises, as JSON: [result, None], or [None, [errno, text]]."""
    try:
        return json.dumps([function(given), None])
    except Exception as error:
        number = getattr(error, "errno", None) or errno.EIO
        return json.dumps([None, [number, f"{function.__module__}: {type(error).__name__}: {error}"]])


def main() -> None:
    """Be a helper that is an interpreter of its own."""
    module, name = sys.argv[-2:]
    sys.stdout.write(answer(getattr(importlib.import_module(module), name), json.load(sys.stdin)))


def reap(given: None) -> Any:
    """Sweep; what there is to log, and what was removed."""
    lines: list[str] = []
    removed = _reaper.reap(lines.append)
    return lines, removed
