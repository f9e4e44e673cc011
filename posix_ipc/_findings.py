"""What is told of a named object: the shapes that posix_ipc.leaks hands out."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from posix_ipc._journal import Identity


@dataclass(frozen=True)
class Holder:
    """A process that holds an object."""

    pid: int
    started: float | None
    """Seconds since the epoch: with the pid, the identity of the process."""
    command: str
    """As much of its command line as could be read."""
    how: tuple[str, ...]
    """Of "descriptor", "mapping" and "lease"."""


@dataclass(frozen=True)
class Owner:
    """A journal that lists an object."""

    journal: str
    """The path of the file."""
    pid: int
    """Of the root of the owner's tree."""
    alive: bool
    """Does the process live that wrote it?"""
    shared: bool
    """Was the object pickled at least once?"""
    claim: bool
    """Does it only protect the object, as one that did not create it?"""


@dataclass(frozen=True)
class IPCObject:
    """A named object, as it was when it was looked at."""

    kind: str
    """"semaphore", "shared_memory" or "message_queue"."""
    name: str
    """With its slash, as `posix_ipc` takes it."""
    identity: Identity | None
    """(device, inode, time of birth in ns or 0); None for a queue that cannot be opened."""
    size: int | None
    """The length in bytes; None for queues."""
    allocated: int | None
    """Bytes of memory in use; None for queues."""
    value: int | None
    """Of a semaphore that can be read."""
    messages: int | None
    """In a queue that can be opened."""
    max_messages: int | None
    max_message_size: int | None
    mode: int | None
    uid: int | None
    """Both are None for a queue that cannot be opened and that no mount shows."""
    owner: str
    """The name of the user, or the number of one that has none."""
    created: float | None
    """Seconds since the epoch; None where the file system does not tell.

    Of a queue when a message was last sent or received, or else it was made: the kernel keeps no more.
    """
    holders: tuple[Holder, ...]
    tracked: bool
    """Does a journal list it as owned?"""
    owners: tuple[Owner, ...]
    verdict: str
    """"live", "orphan", "unheld" or "unknown"."""
    reason: str
    """Why, in words."""

    def as_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Survey:
    """What a look around found, and what it could not see."""

    objects: list[IPCObject]
    unread: tuple[str, ...]
    """What there is and could not be read, a sentence each; because of it a verdict may be "unknown"."""
    unread_pids: tuple[int, ...]
    """The processes among it."""
    failure: str | None
    """Why queues and leases could not be looked at, which is then among `unread` too: there may be more queues."""
    limits: tuple[str, ...]
    """What cannot be seen from here at all, a sentence each: other PID namespaces, queues without a mount."""
    all_queues: bool
    """Were the queues listed by a mount of this IPC namespace? Else there may be others than those found."""
