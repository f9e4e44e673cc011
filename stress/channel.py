"""The report channel: one named pipe, into which every process of a scenario writes lines of JSON.

A line is written in one piece (PIPE_BUF), so that a process killed at any instant never leaves half of one.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import multiprocessing.util
import os
import select
import threading
import time
from collections import Counter
from typing import Any

LONGEST = select.PIPE_BUF - 1
FLUSH = 0.1
"""Seconds after which counts are written, at the next one."""

_CAPACITY = 1 << 20


class Writer:
    """The end of a process of a scenario. It is passed to others by pickling, or inherited by fork."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._begin()

    def __reduce__(self) -> tuple[Any, ...]:
        return Writer, (self._path,)

    def _begin(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.RLock()  # re-entered by signal handlers
        self._descriptor = -1
        self._counts: dict[str, Counter[str]] = {}
        self._flushed = time.monotonic()
        multiprocessing.util.Finalize(None, self.flush, exitpriority=100)

    def _take_over(self) -> None:
        """After a fork: what the parent counted is the parent's to write."""
        if self._pid != os.getpid():
            descriptor = self._descriptor
            self._begin()
            self._descriptor = descriptor

    def say(self, what: str, value: Any) -> None:
        """Write one line now. Text that is too long is cut."""
        self._take_over()
        with self._lock:
            if self._descriptor < 0:
                self._descriptor = os.open(self._path, os.O_WRONLY | os.O_CLOEXEC)
        line = json.dumps({what: value}).encode()
        if len(line) > LONGEST:
            line = json.dumps({what: str(value)[: LONGEST // 8] + " …"}).encode()
        os.write(self._descriptor, line + b"\n")

    def count(self, kind: str, what: str, number: int) -> None:
        """Add to a count. It is written now and then, and when the process ends other than by os._exit()."""
        self._take_over()
        with self._lock:
            self._counts.setdefault(kind, Counter())[what] += number
        if time.monotonic() - self._flushed > FLUSH:
            self.flush()

    def flush(self) -> None:
        """Write what was counted. Needed before os._exit()."""
        if self._pid != os.getpid():
            return
        with self._lock:
            self._flushed = time.monotonic()
            counts, self._counts = self._counts, {}
        for kind, counter in counts.items():
            with contextlib.suppress(BrokenPipeError):
                self.say(kind, dict(counter))


class Reader:
    """The end of the runner."""

    def __init__(self, path: str) -> None:
        os.mkfifo(path, 0o600)
        self._descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        self._writer = os.open(path, os.O_WRONLY | os.O_CLOEXEC)  # never at its end
        fcntl.fcntl(self._writer, fcntl.F_SETPIPE_SZ, _CAPACITY)
        self._rest = b""

    def read(self, timeout: float) -> list[tuple[str, Any]]:
        """What was written, after at most `timeout` seconds."""
        if not select.select([self._descriptor], [], [], timeout)[0]:
            return []
        *lines, self._rest = (self._rest + os.read(self._descriptor, 1 << 20)).split(b"\n")
        return [item for line in lines for item in json.loads(line).items()]

    def close(self) -> None:
        os.close(self._descriptor)
        os.close(self._writer)
