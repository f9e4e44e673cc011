"""What is left of a tree of processes that has ended in some way, and what was said about it: ours, and three peers.

Each peer's program makes what the peer offers, in its root and in a worker, and unlinks nothing: that is what a tracker
is for. Started with a peer's name, this file is the root of such a tree.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import posix_ipc
from tests.original import Unavailable, original_directory
from tests.support import private_ipc

ROOT = Path(__file__).parent.parent
WITHIN = 2.0
"""Seconds after the end of the last process; what is there by then is left."""
BY_ITSELF = ("exit", "exception", "os._exit")
SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGKILL")
ENDS = [
    *(("root", how) for how in (*BY_ITSELF, *SIGNALS)),
    *(("group", how) for how in SIGNALS),
    ("worker", "SIGKILL"),
]
TITLES = {
    "root": "root: {}",
    "group": "whole group: {}",
    "worker": "worker: {}, its parent lives",
}

# ---- the trees ----


def make_ours() -> tuple[list[Any], list[str]]:
    from posix_ipc.mp_integration import MessageQueue, Semaphore, SharedMemory

    made = [SharedMemory(size=64), Semaphore(), MessageQueue(max_messages=1, max_message_size=8)]
    return made, [f"segment {made[0].name}", f"semaphore {made[1].name}", f"queue {made[2].name}"]


def make_original() -> tuple[list[Any], list[str]]:
    flags = posix_ipc.O_CREX  # here that is the original's, for its directory stands first in the path
    made = [
        posix_ipc.SharedMemory(None, flags, size=64),
        posix_ipc.Semaphore(None, flags),
        posix_ipc.MessageQueue(None, flags, max_messages=1, max_message_size=8),
    ]
    return made, [f"segment {made[0].name}", f"semaphore {made[1].name}", f"queue {made[2].name}"]


def make_stdlib() -> tuple[list[Any], list[str]]:
    from multiprocessing import shared_memory

    made = [shared_memory.SharedMemory(create=True, size=64), multiprocessing.get_context("spawn").Semaphore()]
    return made, [f"segment {made[0].name}", f"semaphore {made[1]._semlock.name}"]  # type: ignore[attr-defined]


def make_loky() -> tuple[list[Any], list[str]]:
    from loky.backend import get_context

    made = [get_context("loky").Semaphore()]
    return made, [f"semaphore {made[0]._semlock.name}"]


PEERS: dict[str, Callable[[], tuple[list[Any], list[str]]]] = {
    "ours": make_ours,
    "stdlib": make_stdlib,
    "loky": make_loky,
    "1.3.2": make_original,
}


def work(peer: str, link: Any) -> None:
    kept, made = PEERS[peer]()
    link.send(made)
    threading.Event().wait()
    del kept


def grow(peer: str) -> None:
    """Be the root: tell what there is, and do what is asked."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background ignores it
    for number in (signal.SIGHUP, signal.SIGQUIT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    kept, made = PEERS[peer]()
    context = multiprocessing.get_context("spawn")
    if peer == "loky":
        from loky.backend import get_context

        context = get_context("loky")
    link, theirs = context.Pipe()
    process = context.Process(target=work, args=(peer, theirs))
    process.daemon = True
    process.start()
    print(json.dumps({"root": made, "worker": link.recv(), "pid": process.pid}), flush=True)
    how = sys.stdin.readline().strip()
    if how == "exception":
        raise RuntimeError("as asked")
    if how == "os._exit":
        os._exit(0)
    del kept


# ---- what is left of them ----

OWN_END = re.compile(r"\s|Traceback|RuntimeError: as asked|KeyboardInterrupt|Process |$")
"""A line of the traceback that the program itself has earned."""


def exists(object_: str) -> bool:
    kind, name = object_.split(" ")
    if kind == "queue":
        with contextlib.suppress(posix_ipc.ExistentialError):
            posix_ipc.MessageQueue(name).close()
            return True
        return False
    return Path("/dev/shm", ("sem." if kind == "semaphore" else "") + name.lstrip("/")).exists()


def remove(object_: str) -> None:
    kind, name = object_.split(" ")
    unlink = {
        "segment": posix_ipc.unlink_shared_memory,
        "semaphore": posix_ipc.unlink_semaphore,
        "queue": posix_ipc.unlink_message_queue,
    }[kind]
    with contextlib.suppress(posix_ipc.ExistentialError):
        unlink("/" + name.lstrip("/"))


def left_after(objects: list[str]) -> list[str]:
    deadline = time.monotonic() + WITHIN
    while (left := [each for each in objects if exists(each)]) and time.monotonic() < deadline:
        time.sleep(0.01)
    return left


def end(peer: str, whom: str, how: str) -> tuple[list[str], bool]:
    """What is left of a tree, and whether anything was said on stderr but how the program itself ended."""
    path = [str(original_directory())] if peer == "1.3.2" else []
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*path, str(ROOT)])}
    with (
        tempfile.TemporaryFile("w+") as stderr,
        subprocess.Popen(
            [sys.executable, "-m", "benchmarks.trackers", peer],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr,
            text=True, start_new_session=True, env=environment, cwd=ROOT,
        ) as root,
    ):  # fmt: skip
        assert root.stdin is not None
        assert root.stdout is not None
        told = json.loads(root.stdout.readline())
        worker, objects = told["pid"], [*told["root"], *told["worker"]]
        if whom == "worker":
            os.kill(worker, signal.SIGKILL)
            left = left_after(told["worker"])
        elif how in BY_ITSELF:
            root.stdin.write(f"{how}\n")
            root.stdin.flush()
        else:
            (os.killpg if whom == "group" else os.kill)(root.pid, signal.Signals[how])
        if whom != "worker":
            root.wait(30)
            with contextlib.suppress(ProcessLookupError):  # a daemon, whom not every root takes along
                os.kill(worker, signal.SIGKILL)
            left = left_after(objects)
        time.sleep(0.1)  # what is to be said comes before or just after the removal
        stderr.seek(0)
        said = not all(OWN_END.match(line) for line in stderr)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(root.pid, signal.SIGKILL)
        left_after(objects)
        for each in objects:
            remove(each)
    return left, said


def tell(peer: str) -> None:
    """In a /dev/shm of its own: try all ends of one peer, and print a list."""
    print(json.dumps([end(peer, whom, how) for whom, how in ENDS]))


def run() -> None:
    """Try them all, the peers at the same time, and print the table."""
    print(f"what is left {WITHIN:g} s after the end of a tree that unlinks nothing; ! marks what is said on stderr")
    apart = private_ipc() or []
    running = {}
    for peer in PEERS:
        if reason := why_not(peer):
            print(f"left out: {reason}")
            continue
        command = [*apart, sys.executable, "-m", "benchmarks.trackers", "--tell", peer]
        running[peer] = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    columns = {peer: json.loads(process.communicate()[0]) for peer, process in running.items()}
    print("| | " + " | ".join(columns) + " |")
    print("|---" * (len(columns) + 1) + "|")
    for number, (whom, how) in enumerate(ENDS):
        cells = [describe(*column[number]) for column in columns.values()]
        print(f"| {TITLES[whom].format(how)} | " + " | ".join(cells) + " |")


def why_not(peer: str) -> str:
    if peer == "loky" and importlib.util.find_spec("loky") is None:
        return "loky is not installed"
    if peer == "1.3.2":
        try:
            original_directory()
        except Unavailable as error:
            return str(error)
    return ""


def describe(left: list[str], said: bool) -> str:
    kinds = [each.split(" ")[0] for each in left]
    counted = [f"{kinds.count(kind)} {kind}{'s' * (kinds.count(kind) > 1)}" for kind in sorted(set(kinds))]
    return (", ".join(counted) or "nothing") + " !" * said


if __name__ == "__main__":
    tell(sys.argv[2]) if sys.argv[1] == "--tell" else grow(sys.argv[1])
