"""What is out there, who holds it, and is it safe to remove: semaphores, segments and queues of this host.

Looking changes nothing, needs no rights and mounts nothing. Processes come from psutil; who holds what is told by the
kernel, by (device, inode), never by a path or a pid that something wrote down. Linux only.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable

from posix_ipc import _survey
from posix_ipc._findings import Holder, IPCObject, Owner, Survey
from posix_ipc._leak_check import LeakError, leak_check

__all__ = [
    "Holder",
    "IPCObject",
    "LeakError",
    "Owner",
    "Survey",
    "find_leaks",
    "inventory",
    "leak_check",
    "survey",
]


def survey(kinds: Collection[str] | None = None, prefix: str | None = None) -> Survey:
    """Look at the objects of this host whose kind is one of `kinds` and whose name begins with `prefix`.

    `prefix` may have its slash or not. ValueError or TypeError says what is wrong with an argument. OSError: it cannot
    be told who is alive, since there is no descriptor or memory left.
    """
    return _survey.survey(_survey.Wanted(kinds, prefix))


def inventory(kinds: Collection[str] | None = None, prefix: str | None = None) -> list[IPCObject]:
    """The objects of this host, as `survey` finds them."""
    return survey(kinds, prefix).objects


def find_leaks(unheld: bool = False, min_age: float = 0.0, prefix: str | None = None) -> list[IPCObject]:
    """The orphans, which `reap()` would remove; with `unheld` also what is not tracked and nobody visible holds.

    Those younger than `min_age` seconds, or of unknown age if that is not 0, are left out.
    """
    return leaks_among(inventory(prefix=prefix), unheld, min_age)


def leaks_among(objects: Iterable[IPCObject], unheld: bool, min_age: float) -> list[IPCObject]:
    """Those of a survey that `find_leaks` tells."""
    if not min_age >= 0:  # nan is not either
        raise ValueError(f"min_age: {min_age!r} is not a number of seconds")
    verdicts = ("orphan", "unheld") if unheld else ("orphan",)
    latest = time.time() - min_age if min_age else float("inf")
    return [
        each
        for each in objects
        if each.verdict in verdicts and (not min_age or (each.created is not None and each.created <= latest))
    ]
