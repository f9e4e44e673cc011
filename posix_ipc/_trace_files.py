"""The files in which the children of a checked process report: each is named after its maker, whom it may outlive."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import stat
import tempfile
import time

from posix_ipc import _journal

_PREFIX = "posix_ipc-trace-"
_OF_PROCESS = re.compile(_PREFIX + r"(?P<token>\d+-\d+-(?P<namespace>\d+))-\w+")

UNTOUCHED = 24 * 3600.0
"""Seconds after which a file is taken to be of the dead whose maker cannot be seen from here."""


def create() -> str:
    """Make a file that only its user can open; what those left here that were killed is removed first."""
    directory = tempfile.gettempdir()
    _remove_leftovers(directory)
    descriptor, path = tempfile.mkstemp(prefix=f"{_PREFIX}{_journal.own_token()}-", dir=directory)
    os.close(descriptor)
    return path


@functools.cache  # a look at a large directory takes longer than a check
def _remove_leftovers(directory: str) -> None:
    for name in os.listdir(directory):
        if name.startswith(_PREFIX):
            path = os.path.join(directory, name)
            with contextlib.suppress(OSError):  # another one was quicker
                if _is_leftover(name, os.lstat(path)):
                    os.unlink(path)


def _is_leftover(name: str, status: os.stat_result) -> bool:
    if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
        return False
    match = _OF_PROCESS.fullmatch(name)
    if match is not None and int(match["namespace"]) == _journal.pid_namespace():
        return not _journal.root_lives(match["token"])
    return time.time() - status.st_mtime > UNTOUCHED
