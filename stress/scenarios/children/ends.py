"""Ends without an end: a root that nobody cleans up after but its tracker."""

from __future__ import annotations

import multiprocessing
import multiprocessing.util
import os
import random
import signal
import time
from typing import Any

from stress.forks import fork, wait_for
from stress.scenario import Context
from stress.scenarios.children.objects import ANSWER_WITHIN, expect_gone, expect_there, make, there


def leave_without_cleanup(context: Context, stem: str, choose: random.Random) -> None:
    """os._exit() and death, of a root that nobody cleans up after but its tracker."""
    how = choose.choice(("os._exit()", "SIGKILL", "abort()"))

    def root() -> None:
        make(stem, 0)
        context.channel.flush()
        if how == "SIGKILL":
            os.kill(os.getpid(), signal.SIGKILL)
        elif how == "abort()":
            signal.signal(signal.SIGABRT, signal.SIG_DFL)
            import faulthandler

            faulthandler.disable()
            os.abort()
        os._exit(0)

    ends = {"os._exit()": (), "SIGKILL": (signal.SIGKILL,), "abort()": (signal.SIGABRT,)}[how]
    wait_for(context, fork(context, root), *ends)
    expect_gone(context, stem, f"{how} of a root", 0)


def execute_another(context: Context, stem: str, choose: random.Random) -> None:
    """exec ends the Python program, though the process lives on: what it owned goes."""
    ours, theirs = multiprocessing.Pipe()

    def root() -> None:
        make(stem, 0)
        theirs.send("ready")
        context.channel.flush()
        os.execvp("sleep", ["sleep", "600"])

    pid = fork(context, root)
    theirs.close()
    if not ours.poll(ANSWER_WITHIN) or ours.recv() != "ready":
        raise AssertionError("a root does not answer")
    expect_gone(context, stem, "exec of another program", 0)
    os.kill(pid, signal.SIGKILL)
    wait_for(context, pid, signal.SIGKILL)
    ours.close()


def orphaned_child(context: Context, stem: str, choose: random.Random) -> None:
    """A forked child goes on by itself, with inherited handles; as long as it lives they lead somewhere."""
    ours, theirs = multiprocessing.Pipe()
    kills = choose.random() < 0.5

    def heir(handles: list[Any]) -> None:
        own = make(stem, 1)
        theirs.send(there(stem, 0))
        theirs.recv()
        handles[1].acquire(0)
        del own

    def root() -> None:
        pid = fork(context, heir, make(stem, 0))
        theirs.send(pid)
        context.channel.flush()
        os.kill(os.getpid(), signal.SIGKILL) if kills else os._exit(0)

    wait_for(context, fork(context, root), *((signal.SIGKILL,) if kills else ()))
    seen = {}
    for _ in range(2):  # in any order
        if not ours.poll(ANSWER_WITHIN):
            raise AssertionError("a root or its child does not answer")
        answer = ours.recv()
        seen = answer if isinstance(answer, dict) else seen
    time.sleep(choose.uniform(0, 0.05))
    expect_there(context, stem, 0, seen, "their owner has ended, its child has leases")
    ours.send("end")
    expect_gone(context, stem, "the last child of a dead root ends", 0, 1)
    ours.close()
    theirs.close()
