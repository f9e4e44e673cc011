"""One worker's calls."""

from __future__ import annotations

import contextlib
import random
from typing import Any

import posix_ipc
from stress.scenario import Context
from stress.scenarios.invalid.arguments import Refused, arguments_for, value
from stress.scenarios.invalid.calls import SLOW, parameters_of, public_calls

QUEUE = {"max_messages": 1, "max_message_size": 8}
STATES = ("open", "closed", "never opened")
EXPECTED = (TypeError, ValueError, BufferError, OSError, posix_ipc.Error, Refused)


class Caller:
    """One worker's calls, each on a handle that was opened for it."""

    def __init__(self, context: Context, choose: random.Random) -> None:
        self._context, self._choose = context, choose
        self._calls = [(*each, parameters_of(*each[1:])) for each in public_calls()]
        for _, owner, member, _ in self._calls:
            if member in SLOW:
                getattr(owner, member)()  # imports what it needs, so that its memory is counted from the beginning

    def call_something(self) -> None:
        path, owner, member, parameters = self._choose.choice(self._calls)
        if member in SLOW and self._choose.random() < 0.95:
            return
        subject, handles = owner, []
        if isinstance(owner, type):
            # The descriptor of a plain handle that is opened once more stays open: that is as it should be.
            subject = self._handle_of(owner, "never opened" if member == "__init__" else self._choose.choice(STATES))
            handles.append(subject)
        near = [self._semaphore(), subject]
        handles.append(near[0])
        try:
            self._call(path, owner, subject, member, parameters, near, handles)
        finally:
            for handle in handles:
                dispose(handle)

    def _call(
        self,
        path: str,
        owner: Any,
        subject: Any,
        member: str,
        parameters: list[str],
        near: list[Any],
        handles: list[Any],
    ) -> None:
        is_attribute = isinstance(owner, type) and not callable(getattr(owner, member))
        said = path
        try:
            if is_attribute:
                self._use_attribute(subject, member, near)
            else:
                positional, keywords = arguments_for(self._context, self._choose, parameters, near)
                said += as_text(positional, keywords)
                handles.append(getattr(subject, member)(*positional, **keywords))
                self._context.tally("of them valid")
        except Exception as error:
            if isinstance(error, EXPECTED) or (is_attribute and isinstance(error, AttributeError)):
                self._context.met(error)
            else:
                self._context.violated(f"{said} raised {error!r}, which is no error for a wrong argument")

    def _use_attribute(self, subject: Any, member: str, near: list[Any]) -> None:
        how = self._choose.randrange(3)
        if how == 0:
            getattr(subject, member)
        elif how == 1:
            setattr(subject, member, value(self._context, self._choose, near))
        else:
            delattr(subject, member)

    def _semaphore(self) -> Any:
        return posix_ipc.Semaphore(self._context.name(), posix_ipc.O_CREX, initial_value=9)

    def _handle_of(self, cls: type, state: str) -> Any:
        """None of its calls waits: it has permits, and does not block."""
        if not issubclass(cls, (posix_ipc.Semaphore, posix_ipc.SharedMemory, posix_ipc.MessageQueue)):
            return cls()
        if state == "never opened":
            return cls.__new__(cls)
        if issubclass(cls, posix_ipc.Semaphore):
            handle: Any = cls(self._context.name(), posix_ipc.O_CREX, initial_value=9)
        elif issubclass(cls, posix_ipc.SharedMemory):
            handle = cls(self._context.name(), posix_ipc.O_CREX, size=64)
        else:
            flags = posix_ipc.O_CREX | posix_ipc.O_NONBLOCK
            handle = cls(self._context.name("queue"), flags, **QUEUE)
        if state == "closed":
            handle.unlink()
            handle.close()
        return handle


def as_text(positional: list[Any], keywords: dict[str, Any]) -> str:
    try:
        return f"(*{positional!r:.300}, **{keywords!r:.300})"
    except Refused:
        return "(…)"


def dispose(handle: Any) -> None:
    """Of whatever a call was made on, or gave."""
    if isinstance(handle, (posix_ipc.Semaphore, posix_ipc.SharedMemory, posix_ipc.MessageQueue)):
        for end in (handle.unlink, handle.close):
            with contextlib.suppress(posix_ipc.Error):
                end()
