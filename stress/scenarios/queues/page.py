"""What is known of every message, whoever dies."""

from __future__ import annotations

import mmap
import struct

from stress.scenario import Context

MOST = 1 << 20
"""Messages of one sender; the page has a byte for each."""


class Page:
    """Shared memory of the system alone: how far each process has come, and how often each message has arrived.

    What is true at one instant is written in one piece. Not by pack_into(), which writes zeros first.
    """

    _OVER, _PAUSED = range(2)
    _PROGRESS, _ROUNDS = struct.Struct("QQ"), struct.Struct("Q")
    _SENDER_SIZE = _PROGRESS.size + 8
    NOT_THERE, SENDING, PAUSING = range(3)
    """What a sender does."""

    def __init__(self, context: Context, senders: int, receivers: int) -> None:
        with open(f"{context.directory}/page", "r+b") as file:
            self._memory = mmap.mmap(file.fileno(), 0)
        self.senders, self.receivers = senders, receivers

    @classmethod
    def create(cls, context: Context, senders: int, receivers: int) -> None:
        with open(f"{context.directory}/page", "wb") as file:
            file.truncate(8 + receivers * cls._ROUNDS.size + senders * (cls._SENDER_SIZE + MOST))

    def close(self) -> None:
        self._memory.close()

    @property
    def over(self) -> bool:
        return bool(self._memory[self._OVER])

    def finish(self) -> None:
        self._memory[self._OVER] = 1

    @property
    def paused(self) -> bool:
        """Are the senders to stop for a moment, before the next message?"""
        return bool(self._memory[self._PAUSED])

    def pause(self, paused: bool) -> None:
        self._memory[self._PAUSED] = paused

    # ---- senders ----

    def progress(self, sender: int) -> tuple[int, int]:
        """The number of the message that it is sending or will send next, and how many it has surely sent."""
        begun, sent = self._PROGRESS.unpack_from(self._memory, self._at(sender))
        return begun, sent

    def set_progress(self, sender: int, begun: int, sent: int) -> None:
        at = self._at(sender)
        self._memory[at : at + self._PROGRESS.size] = self._PROGRESS.pack(begun, sent)

    def doing(self, sender: int) -> int:
        return self._memory[self._at(sender) + self._PROGRESS.size]

    def do(self, sender: int, what: int) -> None:
        self._memory[self._at(sender) + self._PROGRESS.size] = what

    def _at(self, sender: int) -> int:
        return 8 + self.receivers * self._ROUNDS.size + sender * self._SENDER_SIZE

    # ---- receivers ----

    def rounds(self, receiver: int) -> int:
        """How many messages or waits in vain it has behind it, arrival noted; 0 before it begins."""
        (rounds,) = self._ROUNDS.unpack_from(self._memory, 8 + receiver * self._ROUNDS.size)
        return int(rounds)

    def set_rounds(self, receiver: int, rounds: int) -> None:
        at = 8 + receiver * self._ROUNDS.size
        self._memory[at : at + self._ROUNDS.size] = self._ROUNDS.pack(rounds)

    # ---- messages ----

    def arrived(self, sender: int, number: int) -> int:
        """Note it; how often it had arrived before."""
        index = self._first(sender) + number
        before = self._memory[index]
        self._memory[index] = min(255, before + 1)
        return before

    def absent(self, sender: int, begin: int, end: int) -> list[int]:
        """Which of the messages of a sender, from `begin` to before `end`, have not arrived."""
        first = self._first(sender)
        arrivals = self._memory[first + begin : first + end]
        return [number for number, times in enumerate(arrivals, begin) if not times]

    def _first(self, sender: int) -> int:
        return self._at(self.senders) + sender * MOST
