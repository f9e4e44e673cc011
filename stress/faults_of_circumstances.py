"""Deliberate faults, as in faults_of_calls.py, of the scenarios whose subject is what happens around the calls."""

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
