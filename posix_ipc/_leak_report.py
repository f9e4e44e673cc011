"""What a leak check reports."""

from __future__ import annotations

import traceback
from dataclasses import dataclass

import psutil

from posix_ipc._tables import printable


@dataclass(frozen=True)
class LeftObject:
    """A named object that the block, or a child of it, created and nobody unlinked."""

    kind: str
    """semaphore, shared_memory or message_queue"""
    name: str
    size: int | None
    """bytes; of a queue what its messages may take; None if it cannot be told"""
    tracked: bool
    """Will it go away with its processes?"""
    pid: int
    process: str
    """The name of the process that created it, as multiprocessing has it."""
    command: str
    where: tuple[traceback.FrameSummary, ...]
    """The last calls before it was created, the creating one at the end."""

    def __str__(self) -> str:
        what = f"{'tracked ' if self.tracked else ''}{self.kind} {self.name!r}"
        size = "" if self.size is None else f", {self.size} bytes"
        creator = f"pid {self.pid} ({printable(self.process)}: {_shortened(self.command)})"
        where = "".join(traceback.format_list(self.where[-3:]))
        return f"{what}{size}, created by {creator} at\n{where}".rstrip()


@dataclass(frozen=True)
class LeftDescriptor:
    """A descriptor of this process that was not there before, or led elsewhere."""

    number: int
    target: str
    """What it leads to, as /proc/self/fd has it."""

    def __str__(self) -> str:
        return f"descriptor {self.number} of {self.target!r}"


@dataclass(frozen=True)
class LeftMapping:
    """Memory of this process that is more of a file in /dev/shm, be it a nameless one, than was mapped before."""

    path: str
    size: int
    """bytes"""

    def __str__(self) -> str:
        return f"mapping of {self.path!r}, {self.size} bytes"


@dataclass(frozen=True)
class LeftChild:
    """A child process that still runs, or that nobody has waited for."""

    pid: int
    name: str
    command: str
    status: str
    """as psutil calls it; "zombie" has ended"""

    def __str__(self) -> str:
        end = "a zombie: it has ended, and nobody waited for it" if self.is_zombie else self.status
        command = f": {_shortened(self.command)}" if self.command else ""
        return f"child process {self.pid} ({printable(self.name)}{command}), {end}"

    @property
    def is_zombie(self) -> bool:
        return self.status == psutil.STATUS_ZOMBIE


@dataclass
class LeakReport:
    """What was left behind; filled when the block ends. It is true if that is anything."""

    objects: tuple[LeftObject, ...] = ()
    fds: tuple[LeftDescriptor, ...] = ()
    mappings: tuple[LeftMapping, ...] = ()
    children: tuple[LeftChild, ...] = ()
    foreign: tuple[str, ...] = ()
    """Files in /dev/shm that others made meanwhile: no leak of the block."""
    incomplete: bool = False
    """Not all that children created could be kept: it was too much, or their file was removed."""
    runs: int = 1
    """How often the function ran; this is about the last time."""

    def __bool__(self) -> bool:
        return bool(self.objects or self.fds or self.mappings or self.children)

    def __str__(self) -> str:
        if not self:
            return f"nothing {'is known to have been' if self.incomplete else 'was'} left behind{self._reservation()}"
        counts = (
            _counted(len(self.objects), "object", "objects"),
            _counted(len(self.fds), "descriptor", "descriptors"),
            _counted(len(self.mappings), "mapping", "mappings"),
            _counted(len(self.children), "child process", "child processes"),
        )
        runs = "" if self.runs == 1 else f"after each of {self.runs} runs, the last time "
        lines = [f"left behind: {runs}{', '.join(filter(None, counts))}"]
        lines += map(str, (*self.objects, *self.fds, *self.mappings, *self.children))
        return "\n".join(lines) + self._reservation()

    def _reservation(self) -> str:
        return "\nnot all that children created could be kept: more may be left" if self.incomplete else ""


def _counted(count: int, one: str, many: str) -> str:
    return "" if count == 0 else f"{count} {one if count == 1 else many}"


def _shortened(command: str) -> str:
    return printable(command if len(command) <= 80 else f"{command[:77]}...")
