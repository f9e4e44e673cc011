"""Other programs, which run beside a tree or after it."""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.util
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection

import posix_ipc
from stress import outside
from stress.forks import fork, wait_for
from stress.scenario import Context
from stress.scenarios.kill.tree import SEMAPHORE, Plan, classes
from stress.scenarios.kill.witness import ANSWER_WITHIN


class Bystander:
    """A program that has attached what a root owns, and leases it until its end."""

    def __init__(self, context: Context, plan: Plan) -> None:
        self._context = context
        self.leased = [plan.kept(kind) for kind in range(3)]
        self._link, theirs = multiprocessing.Pipe()
        self._pid = fork(context, _attach, self.leased, theirs)
        theirs.close()
        _expect(self._link, "attached")

    def kill(self) -> None:
        os.kill(self._pid, signal.SIGKILL)
        wait_for(self._context, self._pid, signal.SIGKILL)
        self._link.close()

    def end(self) -> None:
        self._link.send("end")
        wait_for(self._context, self._pid)
        self._link.close()


def _attach(names: list[str], killer: Connection) -> None:
    handles = [cls.attach(name) for cls, name in zip(classes(), names, strict=True)]
    killer.send("attached")
    killer.recv()
    del handles


@dataclass
class Started:
    """A program that has made its first object."""

    tree: str
    name: str


@contextlib.contextmanager
def next_start(context: Context, plan: Plan) -> Iterator[Started]:
    """The next start of a program of this user: it creates something, and that sweeps."""
    name = f"{plan.stem}next"
    ours, theirs = multiprocessing.Pipe()
    pid = fork(context, _start, name, theirs)
    theirs.close()
    tree = outside.tree_of(pid)
    _expect(ours, "created")
    yield Started(tree, name)
    ours.send("end")
    wait_for(context, pid)
    ours.close()


def _start(name: str, killer: Connection) -> None:
    semaphore = classes()[SEMAPHORE](name, posix_ipc.O_CREX)
    killer.send("created")
    killer.recv()
    semaphore.unlink()
    semaphore.close()
    multiprocessing.util._exit_function()


def _expect(link: Connection, wanted: str) -> None:
    if not link.poll(ANSWER_WITHIN) or link.recv() != wanted:
        raise AssertionError(f"a program beside a tree has not {wanted} anything")
