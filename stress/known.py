"""The objects of a run as the look from outside knows them, which forgets those that have gone."""

from __future__ import annotations

import time

from stress import outside

FORGET_AFTER = 30.0
"""Seconds without a sign of an object after which it is taken for gone. A queue is made soon after its name is told."""


class Objects:
    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._queues: dict[str, float] = {}
        """Names, which cannot be listed, and when there was the last sign of each."""
        self._lasting_queues: set[str] = set()
        self._identities: dict[outside.Identity, float] = {}
        """Of segments and semaphores, by which they are known when they have no name any more."""

    def know_queue(self, name: str) -> None:
        self._queues[name] = time.monotonic()

    def know_lasting_queue(self, name: str) -> None:
        self._lasting_queues.add(name)

    def look(self) -> list[str]:
        """What is there, in words."""
        now = time.monotonic()
        files = outside.files(self._prefix)
        self._identities.update(dict.fromkeys(files.values(), now))
        aside = outside.put_aside(self._identities)
        self._identities.update(dict.fromkeys(aside.values(), now))
        queues = [name for name in (*self._queues, *self._lasting_queues) if outside.queue_exists(name)]
        self._queues.update(dict.fromkeys(self._queues.keys() & queues, now))
        return [
            *(f"object {name}" for name in files),
            *(f"object queue {name}" for name in queues),
            *(f"object {path.relative_to(outside.SHM)}" for path in aside),
        ]

    def held_by(self, pid: int) -> list[str]:
        """The mappings by which a process holds such an object, named or not."""
        return outside.mappings(pid, self._prefix, self._identities)

    def forget_the_gone(self, pid: int) -> None:
        """All of which there was no sign for long, but what this process has mapped."""
        before = time.monotonic() - FORGET_AFTER
        self._queues = {name: seen for name, seen in self._queues.items() if seen > before}
        gone = {identity for identity, seen in self._identities.items() if seen <= before}
        if gone:
            for identity in gone - outside.mapped(pid):
                del self._identities[identity]

    def remove(self) -> None:
        """What was left is not to stay on this machine."""
        outside.remove(self._prefix, {*self._queues, *self._lasting_queues})
        for path in outside.put_aside(self._identities):
            path.unlink(missing_ok=True)
