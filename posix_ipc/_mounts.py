"""What is mounted where, as /proc/self/mountinfo tells: see proc_pid_mountinfo(5)."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from typing import NamedTuple


class Mount(NamedTuple):
    """A file system at a place."""

    point: bytes
    device: int
    type: bytes

    def is_seen(self) -> bool:
        """False if something else covers it."""
        with contextlib.suppress(OSError):
            return os.stat(self.point).st_dev == self.device
        return False


def mounts() -> Iterator[Mount]:
    """All of them, covered ones too."""
    with open("/proc/self/mountinfo", "rb") as file:
        for line in file:
            fields = line.split()
            major, minor = fields[2].split(b":")
            kind = fields[fields.index(b"-", 6) + 1]
            yield Mount(_unescape(fields[4]), os.makedev(int(major), int(minor)), kind)


def type_of(path: str) -> bytes | None:
    """Of the file system that a file is on, whatever leads there; None if that is not told."""
    device = os.stat(path).st_dev
    return next((mount.type for mount in mounts() if mount.device == device), None)


def _unescape(field: bytes) -> bytes:
    """Blanks are written in octal."""
    return re.sub(rb"\\([0-7]{3})", lambda match: bytes([int(match[1], 8)]), field)
