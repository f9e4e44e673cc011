"""Scenario 14: wrong arguments to every public call, mixed into traffic that must not feel them (R5)."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import inspect
import itertools
import math
import os
import pkgutil
import random
import resource
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any

import posix_ipc
from stress.scenario import Context, Full, Scenario

BATCH = 100
"""Calls after which nothing may be left."""
ENOUGH = 20_000
"""Calls of a worker from which on its memory is compared."""
WITHIN = 1.03 if getattr(sys, "_is_gil_enabled", lambda: True)() else 1.06
"""The interpreter's free lists and the allocator fill for long: measured were 1.01 of 40,000 calls and 1.02 of 250,000.
Without the GIL the allocator also keeps what other threads might still read: 1.03 to 1.04, however many calls."""
MOST_BYTES = 1 << 20
REST_WITHIN = 30.0
LONGEST_CALL = 60
"""Seconds; none of them waits."""
QUEUE = {"max_messages": 1, "max_message_size": 8}
LONG_END = "é" * 120
DUNDERS = ("__init__", "__enter__", "__exit__", "__reduce__")
SLOW = {"reap", "survey", "inventory", "find_leaks"}
"""They start an interpreter and look at all processes, if their arguments are right; so they are called less often."""
STATES = ("open", "closed", "never opened")


class Refused(Exception):
    """What an argument raises by itself."""


class Unhelpful:
    """Raises whatever it is asked for."""

    def _fail(self, *args: object) -> Any:
        raise Refused

    __index__ = __int__ = __float__ = __bool__ = __len__ = __fspath__ = __str__ = __bytes__ = _fail  # type: ignore[assignment]


class Misleading:
    """Gives answers of the wrong type."""

    def __index__(self) -> Any:
        return "1"

    __float__ = __bool__ = __index__


EXPECTED = (TypeError, ValueError, BufferError, OSError, posix_ipc.Error, Refused)


def run(context: Context) -> None:
    for name in all_names(context.prefix):
        context.know_queue(name)
    calls = len(list(public_calls()))
    context.note(
        f"{calls} public calls and attributes, found in {', '.join(each.__name__ for each in public_modules())}"
    )
    context.join(*(context.start(work, index) for index in range(context.processes)))


# ---- what there is to call ----


def public_modules() -> list[Any]:
    """The package and its public modules, whatever they are; but the pytest plugin, which pytest alone calls."""
    found = [each.name for each in pkgutil.iter_modules(posix_ipc.__path__) if not each.name.startswith("_")]
    names = [name for name in found if name != "pytest_plugin"]
    return [posix_ipc, *(importlib.import_module(f"{posix_ipc.__name__}.{name}") for name in names)]


def public_calls() -> Iterator[tuple[str, Any, str]]:
    """(path, owner, member) of each function, class, method and attribute that the modules say is public."""
    for module in public_modules():
        for name in module.__all__:
            public = getattr(module, name)
            if not callable(public):
                continue
            yield f"{module.__name__}.{name}", module, name
            if isinstance(public, type) and not issubclass(public, Exception) and not is_record(public):
                members = {each for base in public.__mro__[:-1] for each in vars(base) if not each.startswith("_")}
                for member in sorted(members | set(DUNDERS) & set(dir(public))):
                    yield f"{module.__name__}.{name}.{member}", public, member


def is_record(cls: type) -> bool:
    """Made by calls to be read; what it says of itself depends on what it was made of."""
    return issubclass(cls, tuple) or dataclasses.is_dataclass(cls)


# ---- wrong arguments ----


def parameters_of(owner: Any, member: str) -> list[str]:
    """None for an attribute; some calls of types of C say nothing of theirs."""
    try:
        names = list(inspect.signature(getattr(owner, member)).parameters)
    except (TypeError, ValueError):
        return []
    return names[1:] if names[:1] == ["self"] else names


def arguments_for(
    context: Context, choose: random.Random, parameters: list[str], near: list[Any]
) -> tuple[list[Any], dict[str, Any]]:
    """Of about the right number, by position and by name; any of them may even be a good one."""
    number = max(0, len(parameters) + choose.choice((-1, 0, 0, 0, 1)))
    positional = [value(context, choose, near) for _ in range(choose.randint(0, number))]
    keywords = {each: value(context, choose, near) for each in parameters[len(positional) :] if choose.random() < 0.6}
    if choose.random() < 0.05:
        keywords[choose.choice(("nonsense", "", "self", "größe"))] = None
    return positional, keywords


def value(context: Context, choose: random.Random, near: list[Any]) -> Any:
    kind = choose.choice((names, numbers, numbers, buffers, oddities, lambda *_: choose.choice(near)))
    return kind(context, choose)


def all_names(prefix: str) -> list[str]:
    """Every one that is legal; with the prefix of this run, so that nobody else's object is met."""
    return [f"{prefix}{number}{end}" for number in range(4) for end in ("", LONG_END)]


def names(context: Context, choose: random.Random) -> Any:
    good = choose.choice(all_names(context.prefix))
    end = choose.choice(("", "", "\0", "/x", "x" * 300, "\ud800"))
    return choose.choice(
        (good, good + end, (good + end).encode(errors="surrogatepass"), "", b"", "/", "\0", "/" + "\0" * 9)
    )


def numbers(context: Context, choose: random.Random) -> Any:
    small = (0, 1, 2, 8, 64, 0o600, posix_ipc.O_CREAT, posix_ipc.O_CREX, posix_ipc.O_CREX | posix_ipc.O_NONBLOCK)
    large = tuple(sign * (1 << bits) + by for bits in (31, 32, 63, 64, 100) for sign in (-1, 1) for by in (-1, 0, 1))
    strange = (-1, 0.0, -0.1, 0.001, 1e300, math.inf, -math.inf, math.nan, True, False, 1j, "1", b"1")
    return choose.choice(choose.choice((small, large, strange)))


def buffers(context: Context, choose: random.Random) -> Any:
    size = choose.choice((0, 1, 7, 8, 9, 64, 10_000))
    released = memoryview(b"released")
    released.release()
    return choose.choice(
        (
            b"x" * size,
            bytearray(size),
            "x" * size,
            memoryview(bytes(size)),
            memoryview(bytearray(2 * size))[::2],
            released,
        )
    )


def oddities(context: Context, choose: random.Random) -> Any:
    """A number of a signal is none of them: those that are asked for here must not arrive."""
    return choose.choice(
        (
            None,
            None,
            [],
            (),
            {},
            object(),
            Unhelpful(),
            Misleading(),
            int,
            print,
            (print, 1),
            (len, "x"),
            (1, 2),
            Refused(),
        )
    )


# ---- calling ----


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


# ---- a worker ----


def work(context: Context, index: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (MOST_BYTES, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    ready, over = threading.Event(), threading.Event()
    beside = threading.Thread(target=use_well, args=(context, ready, over))
    beside.start()
    ready.wait()
    try:
        memory = call_all_the_time(context, Caller(context, context.random("work", index)))
    finally:
        over.set()
        beside.join()
    if len(memory) * BATCH >= ENOUGH:
        tenth = len(memory) // 10
        growth = mean(memory[-tenth:]) / mean(memory[tenth : 2 * tenth])
        context.note(f"memory of a worker, last tenth of its calls over the second: {growth:.4f}")
        context.check(growth <= WITHIN, f"memory of a worker grows: the last tenth is {growth:.3f} times the second")


def call_all_the_time(context: Context, caller: Caller) -> list[int]:
    """Pages of memory in use, after each batch."""
    before: set[str] = set()
    memory: list[int] = []
    for step in context.steps(parts=context.processes):
        signal.alarm(LONGEST_CALL)
        caller.call_something()
        context.done("calls")
        if step % BATCH == BATCH - 1:
            before = before or opened()
            expect_same(context, before)
            memory.append(int(Path("/proc/self/statm").read_text().split()[1]))
    signal.alarm(0)
    return memory


def opened() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


def expect_same(context: Context, before: set[str]) -> None:
    """Whatever was called. A callback's thread closes what it has a moment later."""
    deadline = time.monotonic() + REST_WITHIN
    while (now := opened()) != before and time.monotonic() < deadline:
        time.sleep(0.001)
    context.check(now == before, f"wrong calls left descriptors {now - before}, closed {before - now}")


def use_well(context: Context, ready: threading.Event, over: threading.Event) -> None:
    """What a program does that is in order, in the same process at the same time."""
    try:
        with contextlib.ExitStack() as stack:
            segment = posix_ipc.SharedMemory(context.name(), posix_ipc.O_CREX, size=64)
            semaphore = posix_ipc.Semaphore(context.name(), posix_ipc.O_CREX, initial_value=1)
            queue = posix_ipc.MessageQueue(context.name("queue"), posix_ipc.O_CREX, **QUEUE)
            for handle in (segment, semaphore, queue):
                stack.callback(dispose, handle)
            ready.set()
            for number in itertools.count():
                if over.is_set():
                    break
                message = number.to_bytes(8, "little")
                with semaphore:
                    segment.buf[:8] = message
                    queue.send(message, 0)
                    received, written = queue.receive(0)[0], bytes(segment.buf[:8])
                found = received, written, semaphore.value
                context.check(found == (message, message, 1), f"beside wrong calls a right one gave {found}")
                context.tally("right calls beside them", 6)
                time.sleep(0.001)
    except Exception as error:
        context.violated(f"beside wrong calls a right one raised {error!r}")
    finally:
        ready.set()


SCENARIO = Scenario(
    number=14,
    name="invalid",
    invariant=(
        "Wrong arguments to any public call are answered by TypeError, ValueError, BufferError, OSError or "
        "posix_ipc.Error; nothing crashes, waits or leaks, and calls beside them do not feel it."
    ),
    faults="random arguments to every public call, on handles that are open, closed or were never opened",
    unit="calls",
    run=run,
    methods=("fork",),
    full=Full(count=1_000_000),
)
