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

EVENT = struct.Struct("iIII")
OVERFLOW, IGNORED = 0x4000, 0x8000
"""inotify(7): struct inotify_event, IN_Q_OVERFLOW and IN_IGNORED."""

LOCK = 3
"""The descriptor that the tracker was started with, which holds its lock."""

# ---- in the process that creates ----


def ensure(process: _journal.Process, executable: str | None) -> None:
    """Have a tracker for this process's tree.

    None where there is no interpreter to run it: the program of a frozen application is that application.
    """
    if executable is None:
        return
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
        self._root_lives = _journal.root_lives(token)
        self._root = self._open_root() if self._root_lives else None
        self._proxy: _ext.Journal | None = None
        self._events: int | None = None
        self._has_retired = False

    def run(self) -> None:
        happened, pause = True, SHORTEST
        while True:
            self._settle_in()
            # Before the sweep, which finds what is left by those who die after this look.
            somebody_lives = self._root_lives or self._lives_on()
            owed = self._sweep()
            if not (somebody_lives or owed):
                if self._has_retired:
                    break
                self._retire()
                continue
            happened = self._wait(None if self._is_in_peace(owed or happened) else pause)
            pause = SHORTEST if happened else min(pause * 1.5, LONGEST)
        _reaper.remove_if_dead(self._path("proxy"))

    def _retire(self) -> None:
        """Be no longer found. Who relied on this tracker until now has a journal already: one more look is for him."""
        self._has_retired = True
        if os.fstat(LOCK).st_nlink:  # else the path leads to that of another one
            os.unlink(self._path("tracker"))

    def _is_in_peace(self, is_busy: bool) -> bool:
        """Is all that is waited for reported?

        Not that a lease ends, nor anything without a doorbell. After a death there is one more look, for the report may
        come before the lock is released.
        """
        sources = [self._events, self._root, self._proxy] if self._root_lives else [self._events]
        return not is_busy and None not in sources

    def _path(self, role: str) -> str:
        return f"{self._directory}/{self._token}.{role}"

    def _settle_in(self) -> None:
        """Have a doorbell and, as long as the root lives, a proxy; what fails now is tried again later."""
        if self._events is None:
            with contextlib.suppress(OSError):  # fs.inotify.max_user_instances; the directory was wiped
                self._events = _ext._watch(self._directory)
        if self._proxy is None and self._root_lives:
            with contextlib.suppress(OSError):  # no room left; somebody looks at it just now
                try:
                    self._proxy = _ext.Journal(self._path("proxy"), 1)
                except FileExistsError:  # of a tracker that was killed
                    _reaper.remove_if_dead(self._path("proxy"))
                    self._proxy = _ext.Journal(self._path("proxy"), 1)

    def _sweep(self) -> bool:
        """Is there something left of this tree's dead that somebody still uses?"""
        try:
            return self._token in _reaper.sweep().owed
        except OSError:  # no descriptor or memory left in the system, or the directory is being wiped: later
            return True

    def _lives_on(self) -> bool:
        """Is there still a process of this tree that owns something?"""
        try:
            names = os.listdir(self._directory)
        except FileNotFoundError:
            return False
        matches = filter(None, map(_journal.TOKEN_FILE.fullmatch, names))
        journals = [match[0] for match in matches if match["token"] == self._token and match["role"][0] in "rj"]
        try:
            return any(_ext._is_locked(f"{self._directory}/{name}") for name in journals)
        except OSError:
            return True

    # ---- waiting ----

    def _open_root(self) -> int | None:
        """A descriptor that tells when the root dies; None where there is none, and one has to look."""
        try:
            descriptor = _ext._pidfd_open(int(self._token.split("-")[0]))
        except OSError:  # an old kernel or a filter of system calls
            return None
        if not _journal.root_lives(self._token):  # the pid may have been another's by then
            os.close(descriptor)
            return None
        return descriptor

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
        if self._root_lives and (self._root in ready or self._root is None):
            self._root_lives = self._root is None and _journal.root_lives(self._token)
            if not self._root_lives:
                self._forget_root()
                happened = True
        return happened

    def _forget_root(self) -> None:
        if self._root is not None:
            os.close(self._root)
            self._root = None
        if self._proxy is not None:
            self._proxy.close()
            self._proxy = None

    def _read_events(self) -> bool:
        """Did one have to do with this tree? See inotify(7)."""
        assert self._events is not None
        data = os.read(self._events, 1 << 16)
        happened = self._token.encode() in data
        offset = 0
        while offset < len(data):
            _, mask, _, length = EVENT.unpack_from(data, offset)
            offset += EVENT.size + length
            happened = happened or bool(mask & OVERFLOW)  # others were lost
            if mask & IGNORED:  # the directory was removed
                os.close(self._events)
                self._events = None
                return True
        return happened
