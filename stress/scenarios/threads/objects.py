"""The objects of a storm, and whether what is written through a handle lands in its own."""

from __future__ import annotations

import contextlib
import os
from typing import Any

import posix_ipc
from stress import outside
from stress.scenario import Context

KINDS = ("segment", "semaphore", "queue")
SIZE = 64
QUEUE = {"max_messages": 2, "max_message_size": 16}
PRIORITY = 7
EXPECTED = (posix_ipc.BusyError, posix_ipc.ExistentialError)
"""Of the handle that threads share: it is full, empty or taken, or another thread has closed or unlinked it."""


def class_of(kind: str, tracked: bool) -> Any:
    name = {"segment": "SharedMemory", "semaphore": "Semaphore", "queue": "MessageQueue"}[kind]
    if not tracked:
        return getattr(posix_ipc, name)
    from posix_ipc import mp_integration

    return getattr(mp_integration, name)


def open_new(name: str, kind: str, tracked: bool, permits: int = 1) -> Any:
    cls = class_of(kind, tracked)
    handle = cls.__new__(cls)
    reopen(handle, name, kind, permits)
    return handle


def reopen(handle: Any, name: str, kind: str, permits: int = 1) -> None:
    options: dict[str, Any] = {"segment": {"size": SIZE}, "semaphore": {"initial_value": permits}, "queue": QUEUE}[kind]
    handle.__init__(name, posix_ipc.O_CREAT, **options)


def unlink(name: str, kind: str) -> None:
    with contextlib.suppress(posix_ipc.ExistentialError):
        {
            "segment": posix_ipc.unlink_shared_memory,
            "semaphore": posix_ipc.unlink_semaphore,
            "queue": posix_ipc.unlink_message_queue,
        }[kind](name)


# ---- another way to an object ----


class Opening:
    """An opening of an object that shares nothing with the handle that is tried; of a segment by the system alone."""

    def __init__(self, name: str, kind: str) -> None:
        self._kind = kind
        if kind == "segment":
            self._descriptor = os.open(outside.SHM / name[1:], os.O_RDONLY | os.O_CLOEXEC)
        else:
            self._handle = class_of(kind, tracked=False)(name)

    def close(self) -> None:
        if self._kind == "segment":
            os.close(self._descriptor)
        else:
            self._handle.close()

    def content(self) -> Any:
        """The bytes of a segment, the permits of a semaphore, the number of messages in a queue."""
        if self._kind == "segment":
            return os.pread(self._descriptor, SIZE, 0)
        return self._handle.value if self._kind == "semaphore" else self._handle.current_messages

    def exchange(self, handle: Any, pattern: bytes) -> str:
        """Write through a handle, and see it arrive here. Empty, or what was found instead."""
        found: Any
        wanted: Any
        if self._kind == "segment":
            handle.buf[:] = pattern * (SIZE // len(pattern))
            found, wanted = self.content(), pattern * (SIZE // len(pattern))
        elif self._kind == "semaphore":
            before = self.content()
            handle.release()
            found, wanted = self.content(), before + 1
            handle.acquire(0)
        else:
            handle.send(pattern, 0, PRIORITY)
            found, wanted = self._handle.receive(0), (pattern, PRIORITY)
            if found == wanted:
                self._handle.send(pattern[::-1], 0)
                found, wanted = handle.receive(0), (pattern[::-1], 0)
        return "" if found == wanted else f"it was {found!r} instead of {wanted!r}"


class Own:
    """An object that one thread alone uses, through handles that it opens and closes beside the storm.

    Their descriptors and mappings are those that another thread has given back in this instant.
    """

    def __init__(self, context: Context, kind: str, tracked: bool, number: int) -> None:
        self._context, self._kind, self._tracked, self._number = context, kind, tracked, number
        self._name = context.name(kind)
        self._exchanges = 0
        open_new(self._name, kind, tracked, permits=0).close()
        self._opening = Opening(self._name, kind)
        self._content = self._opening.content()

    def exchange(self) -> None:
        try:
            self._check_untouched()
            handle = class_of(self._kind, self._tracked)(self._name, 0)
            self._exchanges += 1
            fault = self._opening.exchange(handle, self._pattern())
            self._content = self._opening.content()
            handle.close()
        except EXPECTED as error:
            fault = repr(error)
        self._context.check(not fault, f"a write of a thread did not land in its own {self._kind}: {fault}")

    def _check_untouched(self) -> None:
        found = self._opening.content()
        self._context.check(
            found == self._content,
            f"another write landed in a thread's own {self._kind}: {found!r}, was {self._content!r}",
        )

    def _pattern(self) -> bytes:
        """16 bytes, each of them one that no other object of the storm may have there."""
        return bytes(0x80 | byte for byte in (self._number, self._exchanges & 0x7F, self._exchanges >> 7 & 0x7F, 1)) * 4

    def end(self) -> None:
        self._check_untouched()
        self._opening.close()
        unlink(self._name, self._kind)
