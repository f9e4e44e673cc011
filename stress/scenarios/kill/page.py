"""What each process of a tree says of itself, in a file that its killer reads while it lives, and after its death."""

from __future__ import annotations

import mmap
import struct
from typing import Any, NamedTuple

from stress.outside import Identity

OTHER, CREATE, ATTACH, PICKLE, UNLINK, EXIT = range(6)
NAMES = ("start or wait", "create", "attach", "pickle", "unlink", "exit")
PHASES = (CREATE, ATTACH, PICKLE, UNLINK, EXIT)
"""In which R1 has processes killed."""

SLOTS = 8
"""Objects that a process has at the same time."""
NOTHING, OWNED, DOUBTFUL, SHARED = range(4)
"""What is sure of a slot's object: nothing; it is there as long as its process lives; it may have been shared or be
removed by now; it is there until the root removes it or ends, since its pickle may be loaded."""


class Said(NamedTuple):
    """What is sure of an object."""

    state: int
    identity: Identity


class Page:
    """A part for each process, of which the root has the number 0.

    A process writes the state of a slot, a byte, apart from what it is true of, so that it is so at whatever instant it
    is killed. Not by pack_into(), which writes zeros first.
    """

    _HEAD_SIZE = 8
    _OBJECT = struct.Struct("QQQ480s")
    _SLOT_SIZE = 8 + _OBJECT.size
    _PROCESS_SIZE = _HEAD_SIZE + SLOTS * _SLOT_SIZE

    def __init__(self, path: str) -> None:
        with open(path, "r+b") as file:
            self._memory = mmap.mmap(file.fileno(), 0)

    @classmethod
    def create(cls, path: str, processes: int) -> Page:
        with open(path, "wb") as file:
            file.truncate(processes * cls._PROCESS_SIZE)
        return cls(path)

    def close(self) -> None:
        self._memory.close()

    # ---- where it is ----

    def phase(self, number: int) -> int:
        return self._memory[number * self._PROCESS_SIZE]

    def enter(self, number: int, phase: int) -> None:
        self._memory[number * self._PROCESS_SIZE] = phase

    def shall_end(self, number: int) -> bool:
        return bool(self._memory[number * self._PROCESS_SIZE + 1])

    def tell_to_end(self, number: int) -> None:
        self._memory[number * self._PROCESS_SIZE + 1] = 1

    # ---- what it has ----

    def say(self, number: int, slot: int, state: int) -> None:
        self._memory[self._at(number, slot)] = state

    def describe(self, number: int, slot: int, handle: Any, pickle: bytes = b"") -> None:
        """Of what the next state is true. Say NOTHING or DOUBTFUL before."""
        at = self._at(number, slot) + 8
        device, inode, *_ = handle._identity
        self._memory[at : at + self._OBJECT.size] = self._OBJECT.pack(device, inode, len(pickle), pickle)

    def said(self, number: int) -> dict[int, Said]:
        """By slot, without those of which nothing is sure."""
        found = {}
        for slot in range(SLOTS):
            state = self._memory[self._at(number, slot)]
            if state != NOTHING:
                device, inode, _, _ = self._object(number, slot)
                found[slot] = Said(state, (device, inode))
        return found

    def pickle(self, number: int, slot: int) -> bytes:
        """Of a shared object."""
        _, _, length, pickle = self._object(number, slot)
        return bytes(pickle[:length])

    def _object(self, number: int, slot: int) -> tuple[Any, ...]:
        return self._OBJECT.unpack_from(self._memory, self._at(number, slot) + 8)

    def _at(self, number: int, slot: int) -> int:
        return number * self._PROCESS_SIZE + self._HEAD_SIZE + slot * self._SLOT_SIZE
