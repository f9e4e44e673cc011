"""P9: how long it takes two processes to hand the turn to each other and back, by semaphores and by queues."""

from __future__ import annotations

import contextlib
import multiprocessing
from collections.abc import Callable, Iterator
from typing import Any

import posix_ipc

from . import peers
from .measure import Runner, statement

FORK = multiprocessing.get_context("fork")
MESSAGE = bytes(16)
MESSAGE_PAIR = "give(message); wait()"


@contextlib.contextmanager
def partner(echo: Callable[[], object]) -> Iterator[None]:
    """Another process, which gives each turn back for as long as this lasts."""
    process = FORK.Process(target=echo, daemon=True)
    process.start()
    try:
        yield
    finally:
        process.kill()
        process.join()


def semaphore_echo(there: Any, back: Any) -> Callable[[], object]:
    wait, give = there.acquire, back.release

    def echo() -> None:
        while True:
            wait()
            give()

    return echo


def message_echo(wait: Callable[[], object], give: Callable[[bytes], object]) -> Callable[[], object]:
    def echo() -> None:
        while True:
            wait()
            give(MESSAGE)

    return echo


def raw(kind: str, name: str) -> tuple[Runner, Callable[[], object]]:
    """The same in C, on objects called `name` with -there and -back: this side of it, and the echo."""
    return peers.raw_runner(f"{kind}_ping", name), lambda: getattr(peers.raw(), f"{kind}_echo")(name.encode())


@contextlib.contextmanager
def semaphores(name: str) -> Iterator[dict[str, Runner]]:
    with contextlib.ExitStack() as stack:
        contest = {}
        stdlib = FORK.Semaphore(0), FORK.Semaphore(0)
        pairs: dict[str, Any] = {"stdlib": stdlib}
        for who, kind in ("ours", posix_ipc.Semaphore), ("1.3.2", peers.original().Semaphore):
            pairs[who] = [_made(stack, kind, f"{name}-{who}{way}") for way in ("-there", "-back")]
        for who in "ours", "1.3.2", "stdlib":
            there, back = pairs[who]
            stack.enter_context(partner(semaphore_echo(there, back)))
            contest[who] = statement("give(); wait()", give=there.release, wait=back.acquire)
        for way in "-there", "-back":
            _made(stack, posix_ipc.Semaphore, name + way)
        contest["raw C"], echo = raw("semaphore", name)
        stack.enter_context(partner(echo))
        yield contest


@contextlib.contextmanager
def queues(name: str) -> Iterator[dict[str, Runner]]:
    with contextlib.ExitStack() as stack:
        contest = {}
        for who, kind in ("ours", posix_ipc.MessageQueue), ("1.3.2", peers.original().MessageQueue):
            there, back = (_made(stack, kind, f"{name}-{who}{way}", max_messages=1) for way in ("-there", "-back"))
            stack.enter_context(partner(message_echo(there.receive, back.send)))
            contest[who] = statement(MESSAGE_PAIR, give=there.send, wait=back.receive, message=MESSAGE)
        here, far = FORK.Pipe()
        stack.enter_context(partner(message_echo(far.recv_bytes, far.send_bytes)))
        contest["stdlib"] = statement(MESSAGE_PAIR, give=here.send_bytes, wait=here.recv_bytes, message=MESSAGE)
        for way in "-there", "-back":
            _made(stack, posix_ipc.MessageQueue, name + way, max_messages=1)
        contest["raw C"], echo = raw("queue", name)
        stack.enter_context(partner(echo))
        yield contest


def _made(stack: contextlib.ExitStack, kind: Any, name: str, **arguments: int) -> Any:
    made = kind(name, posix_ipc.O_CREX, **arguments)
    stack.callback(made.unlink)
    return made
