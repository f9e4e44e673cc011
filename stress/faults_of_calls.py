"""Deliberate faults, as in faults.py, of the scenarios whose subject is what the calls do.

Types of C cannot be changed, so a module gets a subclass in their place.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import mmap
import os
import time
from collections.abc import Callable
from typing import Any

import posix_ipc
from stress.faults import fault, leases_ignored

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


# ---- 9 signals ----


@fault("signals", reported="too late", duration=15.0)
def deadline_begun_anew() -> None:
    """A timed wait for a permit that a signal interrupts begins anew, up to ten times."""

    class Broken(posix_ipc.Semaphore):
        def acquire(self, timeout: Any = None) -> None:
            for _ in range(10):
                try:
                    return super().acquire(timeout)
                except posix_ipc.SignalError as error:
                    if error.__cause__ is not None:
                        raise
            return super().acquire(timeout)

    posix_ipc.Semaphore = Broken  # type: ignore[misc]


@fault("signals", reported="too late in all", duration=15.0)
def rarely_late() -> None:
    """Every third timed wait for a permit ends 100 ms after its deadline: no median shows it."""
    ended = itertools.count(1)

    class Broken(posix_ipc.Semaphore):
        def acquire(self, timeout: Any = None) -> None:
            try:
                super().acquire(timeout)
            except posix_ipc.BusyError:
                if next(ended) % 3 == 0:
                    time.sleep(0.1)
                raise

    posix_ipc.Semaphore = Broken  # type: ignore[misc]


@fault("signals", reported="too early")
def fast_clock() -> None:
    """A timed wait for a message gives up 20 ms before its time."""

    class Broken(posix_ipc.MessageQueue):
        def receive(self, timeout: Any = None) -> tuple[bytes, int]:
            return super().receive(timeout and max(0.0, timeout - 0.02))

    posix_ipc.MessageQueue = Broken  # type: ignore[misc]


# ---- 10 notifications ----


@fault("notifications", reported="called 2 times instead of once")
def called_twice() -> None:
    """Every twentieth callback is called twice."""
    asked = itertools.count(1)

    class Broken(posix_ipc.MessageQueue):
        def request_notification(self, notification: Any = None) -> None:
            if isinstance(notification, tuple) and next(asked) % 20 == 0:
                callback, parameter = notification
                notification = (lambda parameter: (callback(parameter), callback(parameter)), parameter)
            super().request_notification(notification)

    posix_ipc.MessageQueue = Broken  # type: ignore[misc]


@fault("notifications", reported="parameters that are kept at rest", duration=1.0)
def kept_parameter() -> None:
    """Every hundredth parameter of a callback is never let go."""
    asked, kept = itertools.count(1), []

    class Broken(posix_ipc.MessageQueue):
        def request_notification(self, notification: Any = None) -> None:
            if next(asked) % 100 == 0:
                kept.append(notification)
            super().request_notification(notification)

    posix_ipc.MessageQueue = Broken  # type: ignore[misc]


# ---- 11 exhaustion ----


def _on_failure(act: Callable[[str], object]) -> None:
    """Do something with the name of a segment or semaphore that cannot be made."""

    def careless(cls: Any) -> Any:
        class Broken(cls):  # type: ignore[misc]
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                try:
                    super().__init__(*args, **kwargs)
                except (OSError, ValueError):
                    with contextlib.suppress(OSError):
                        act(args[0])
                    raise

        return Broken

    posix_ipc.SharedMemory = careless(posix_ipc.SharedMemory)  # type: ignore[misc]
    posix_ipc.Semaphore = careless(posix_ipc.Semaphore)  # type: ignore[misc]


@fault("exhaustion", reported="left descriptors")
def descriptor_of_a_failure() -> None:
    """A segment or semaphore that cannot be made leaves a descriptor behind."""
    _on_failure(lambda name: os.dup(0))


@fault("exhaustion", reported="left names")
def name_of_a_failure() -> None:
    """A segment or semaphore that cannot be made leaves an empty file with its name behind."""
    _on_failure(lambda name: os.close(os.open(f"/dev/shm{name}", os.O_CREAT | os.O_EXCL | os.O_RDWR)))


@fault("exhaustion", reported="left mappings")
def mapping_of_a_failure() -> None:
    """A segment or semaphore that cannot be made leaves a mapping of a file without a name behind."""
    library = ctypes.CDLL(None)
    library.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]

    def leave(name: str) -> None:
        descriptor = os.open("/dev/shm", os.O_TMPFILE | os.O_RDWR)
        library.mmap(None, 4096, 0, mmap.MAP_SHARED, descriptor, 0)
        os.close(descriptor)

    _on_failure(leave)


# ---- 12 threads ----


@fault("threads", reported="a stranger's descriptor was closed")
def closed_twice() -> None:
    """close() of a queue or a segment closes the number of its descriptor twice."""

    def careless(cls: Any, number_of: str) -> Any:
        class Broken(cls):  # type: ignore[misc]
            def close(self) -> None:
                number = getattr(self, number_of)
                super().close()
                os.sched_yield()
                with contextlib.suppress(OSError):
                    if not os.readlink(f"/proc/self/fd/{number}").endswith("/channel"):  # by which it is reported
                        os.close(number)

        return Broken

    posix_ipc.SharedMemory = careless(posix_ipc.SharedMemory, "fd")  # type: ignore[misc]
    posix_ipc.MessageQueue = careless(posix_ipc.MessageQueue, "mqd")  # type: ignore[misc]


@fault("threads", reported="a write of a thread did not land in its own segment")
def view_of_another() -> None:
    """Every fiftieth view of a tracked segment is one of the segment that was looked at before."""
    from posix_ipc.mp_integration import SharedMemory

    asked = itertools.count(1)
    kept: list[memoryview] = []

    def buf(self: Any) -> memoryview:
        view = posix_ipc.SharedMemory.buf.__get__(self)
        with contextlib.suppress(IndexError):
            if next(asked) % 50 == 0:
                return kept.pop()
        kept[:] = [view]
        return view  # type: ignore[no-any-return]

    SharedMemory.buf = property(buf)  # type: ignore[assignment]


# ---- 13 children ----


@fault("children", reported="leases, and now there is", duration=20.0)
def leases_of_heirs_ignored() -> None:
    """A sweep removes what the dead owned although their children have leases."""
    leases_ignored()


# ---- 14 invalid ----


@fault("invalid", reported="which is no error for a wrong argument")
def untyped_error() -> None:
    """A timeout that is no number is a RuntimeError."""

    class Broken(posix_ipc.Semaphore):
        def acquire(self, timeout: Any = None) -> None:
            try:
                super().acquire(timeout)
            except TypeError as error:
                raise RuntimeError("what is that?") from error

    posix_ipc.Semaphore = Broken  # type: ignore[misc]


@fault("invalid", reported="wrong calls left descriptors", duration=15.0)
def descriptor_of_a_wrong_call() -> None:
    """A message that is none leaves a descriptor behind."""

    class Broken(posix_ipc.MessageQueue):
        def send(self, *args: Any, **kwargs: Any) -> None:
            try:
                super().send(*args, **kwargs)
            except (TypeError, ValueError):
                os.dup(0)
                raise

    posix_ipc.MessageQueue = Broken  # type: ignore[misc]
