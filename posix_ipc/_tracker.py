"""The tracker: it sleeps until the kernel reports that a process of its tree has died, then reaps.

One for each tree, started by the first creation, in a session of its own, deaf to the signals that end a process group.
It knows nothing that is not in the journals: if it is killed, the next creation starts another.
"""

from __future__ import annotations

import contextlib
import os
import select
import struct
import sys
import time

from posix_ipc import _ext, _journal, _reaper

SETTLE = 0.002
"""Seconds from the report of a death to the release of its locks, and more."""
SHORTEST, LONGEST = 0.05, 0.5
"""Seconds between looks while something of the dead is still leased: who only attached dies unreported."""

OVERFLOW = struct.pack("iI", -1, 0x4000)
"""The head of the event IN_Q_OVERFLOW: others were lost. inotify(7)."""

# ---- in the process that creates ----


def ensure(process: _journal.Process, executable: str) -> None:
    """Have a tracker for this process's tree."""
    if _ext._is_locked(process.tracker_lock):
        return
    package = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    code = f"import sys; sys.path.append({package!r}); from posix_ipc._tracker import main; main()"
    program = (executable, "-I", "-S", "-c", code, "posix_ipc", "tracker", process.directory, process.token)
    _ext._start_tracker(process.tracker_lock, program)


# ---- in the tracker ----


def main() -> None:
    directory, token = sys.argv[-2:]
    Tracker(directory, token).run()


class Tracker:
    def __init__(self, directory: str, token: str) -> None:
        self._directory = directory
        self._token = token
        self._root = _open_root(token)
        self._proxy: _ext.Journal | None = None
        self._events = _watch(directory)
        if self._root is not None:
            self._hold_proxy()

    def run(self) -> None:
        pause = SHORTEST
        while True:
            owed = self._sweep()
            if self._root is None and not self._has_files():
                break
            # Nobody reports that a lease ends, or a doorbell that is missing; all else is waited for in peace.
            in_peace = self._root is not None and self._events is not None and not owed
            pause = SHORTEST if self._wait(None if in_peace else pause) else min(pause * 1.5, LONGEST)
        for role in ("proxy", "tracker"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(f"{self._directory}/{self._token}.{role}")

    def _sweep(self) -> bool:
        """Is there something left of this tree's dead that somebody still uses?"""
        try:
            return self._token in _reaper.sweep().owed
        except OSError:  # no descriptor or memory left in the system, or the directory is being wiped: later
            return True

    def _hold_proxy(self) -> None:
        path = f"{self._directory}/{self._token}.proxy"
        while self._proxy is None:
            try:
                self._proxy = _ext.Journal(path, 1)
            except FileExistsError:  # of a tracker that was killed
                _reaper.remove_if_dead(path)
            except BlockingIOError:
                time.sleep(0.001)

    def _has_files(self) -> bool:
        """Is there still a journal of this tree to wait for?"""
        try:
            names = os.listdir(self._directory)
        except FileNotFoundError:
            return False
        matches = filter(None, map(_journal.TOKEN_FILE.fullmatch, names))
        return any(match["token"] == self._token and match["role"] not in ("proxy", "tracker") for match in matches)

    def _wait(self, timeout: float | None) -> bool:
        """Sleep until something has happened that has to do with this tree; False if nothing did in time."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self._happens(timeout):
            if deadline is not None:
                timeout = deadline - time.monotonic()
                if timeout <= 0:
                    return False
        time.sleep(SETTLE)
        return True

    def _happens(self, timeout: float | None) -> bool:
        descriptors = [descriptor for descriptor in (self._events, self._root) if descriptor is not None]
        ready = select.select(descriptors, [], [], timeout)[0]
        happened = self._events in ready and self._read_events()
        if self._root is not None and self._root in ready:
            os.close(self._root)
            self._root = None
            if self._proxy is not None:
                self._proxy.close()
                self._proxy = None
            happened = True
        return happened

    def _read_events(self) -> bool:
        assert self._events is not None
        data = os.read(self._events, 1 << 16)
        return self._token.encode() in data or OVERFLOW in data


def _open_root(token: str) -> int | None:
    """A descriptor that tells when the root dies; None if it is dead."""
    pid = int(token.split("-")[0])
    try:
        descriptor = os.pidfd_open(pid)
    except OSError:
        return None
    if not _journal.root_lives(token):  # the pid is another's by now
        os.close(descriptor)
        return None
    return descriptor


def _watch(directory: str) -> int | None:
    try:
        return _ext._watch(directory)
    except OSError:  # fs.inotify.max_user_instances; then by looking now and then
        return None
