"""Deliberate faults, as in faults.py, of the scenarios whose subject is what calls do to objects.

Types of C cannot be changed, so a module gets a subclass in their place.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from typing import Any

import posix_ipc
from stress.faults import fault

# ---- 1 semaphores ----


@fault("semaphores", reported="permits were lost instead of")
def lost_release() -> None:
    """Every fiftieth release of a semaphore does nothing."""
    released = itertools.count(1)

    class Broken(posix_ipc.Semaphore):
        def release(self) -> None:
            if next(released) % 50:
                super().release()

    posix_ipc.Semaphore = Broken  # type: ignore[misc]


@fault("semaphores", reported="permit")  # too many holders, too high a value, or more given back than lost
def doubled_release() -> None:
    """Every fiftieth release of a semaphore gives two permits back."""
    released = itertools.count(1)

    class Broken(posix_ipc.Semaphore):
        def release(self) -> None:
            super().release()
            if next(released) % 50 == 0:
                super().release()

    posix_ipc.Semaphore = Broken  # type: ignore[misc]


# ---- 2 exclusion ----


@fault("exclusion", reported="increments")
def open_door() -> None:
    """Every hundredth `with` enters without a permit when none is free."""
    entered = itertools.count(1)

    class Broken(posix_ipc.Semaphore):
        def __enter__(self) -> Any:
            if next(entered) % 100:
                return super().__enter__()
            with contextlib.suppress(posix_ipc.BusyError):
                self.acquire(0)
            return self

    posix_ipc.Semaphore = Broken  # type: ignore[misc]


# ---- 3 queues ----


@fault("queues", reported="out of order")
def reordered_queue() -> None:
    """Every hundredth message is kept back until the next one was received."""
    received = itertools.count(1)

    class Broken(posix_ipc.MessageQueue):
        kept: Any = None

        def receive(self, timeout: Any = None) -> tuple[bytes, int]:
            if self.kept is not None:
                message, self.kept = self.kept, None
                return message  # type: ignore[no-any-return]
            message = super().receive(timeout)
            if next(received) % 100 == 0:
                with contextlib.suppress(posix_ipc.BusyError):
                    message, self.kept = super().receive(0), message
            return message

    posix_ipc.MessageQueue = Broken  # type: ignore[misc]


@fault("queues", reported="messages were lost")
def lost_message() -> None:
    """Every hundredth message that is sent goes nowhere."""
    sent = itertools.count(1)

    class Broken(posix_ipc.MessageQueue):
        def send(self, *args: Any, **kwargs: Any) -> None:
            if next(sent) % 100 or args[1] == 0:
                super().send(*args, **kwargs)

    posix_ipc.MessageQueue = Broken  # type: ignore[misc]


@fault("queues", reported="messages were lost: 1 as a sender was killed, which may cost 0")
def rarely_lost_message() -> None:
    """Of what a process sends one message goes nowhere: in all there are no more of them than killed receivers."""
    sent = itertools.count(1)

    class Broken(posix_ipc.MessageQueue):
        def send(self, *args: Any, **kwargs: Any) -> None:
            if args[1] == 0 or next(sent) != 50:
                super().send(*args, **kwargs)

    posix_ipc.MessageQueue = Broken  # type: ignore[misc]


@fault("queues", reported="a message was torn")
def truncated_message() -> None:
    """Of every hundredth message that is received the last byte is missing."""
    received = itertools.count(1)

    class Broken(posix_ipc.MessageQueue):
        def receive(self, timeout: Any = None) -> tuple[bytes, int]:
            message, priority = super().receive(timeout)
            return (message if not timeout or next(received) % 100 else message[:-1]), priority

    posix_ipc.MessageQueue = Broken  # type: ignore[misc]


# ---- 4 segments ----


@fault("segments", reported="lost as")
def wiped_on_close() -> None:
    """Every tenth handle that is closed takes the bytes of its segment with it."""
    closed = itertools.count(1)

    class Broken(posix_ipc.SharedMemory):
        def close(self) -> None:
            if next(closed) % 10 == 0 and self.fd >= 0 and self.size:
                os.ftruncate(self.fd, 0)
                os.ftruncate(self.fd, 4096)
            super().close()

    posix_ipc.SharedMemory = Broken  # type: ignore[misc]


@fault("segments", reported="and has")
def never_resized() -> None:
    """A segment that is opened with a size keeps the one that it has."""

    class Broken(posix_ipc.SharedMemory):
        def __init__(self, name: Any, flags: int = 0, mode: int = 0o600, size: int = 0, *args: Any, **kw: Any) -> None:
            super().__init__(name, flags, mode, size if flags else 0, *args, **kw)

    posix_ipc.SharedMemory = Broken  # type: ignore[misc]


# ---- 8 reuse ----


@fault("reuse", reported="somebody touched the new")
def unlink_by_name_alone() -> None:
    """A tracked handle's unlink() removes whatever has its name."""
    from posix_ipc import mp_integration

    def unlink(self: Any) -> None:
        remove = {0: posix_ipc.unlink_semaphore, 1: posix_ipc.unlink_shared_memory, 2: posix_ipc.unlink_message_queue}
        remove[self._kind](self.name)

    mp_integration._Tracked.unlink = unlink  # type: ignore[method-assign]
