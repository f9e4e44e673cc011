"""What a scenario declares, and the context that it runs in."""

from __future__ import annotations

import ctypes
import importlib
import multiprocessing
import pkgutil
import random
import secrets
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

from stress import scenarios
from stress.channel import Writer

METHODS = ("fork", "spawn", "forkserver")
SKIPPED = 77
"""The status of a scenario's process that cannot run here."""


@dataclass(frozen=True)
class Full:
    """How much `--full` runs of a scenario, under each start method."""

    count: int | None = None
    duration: float | None = None
    processes: int | None = None


@dataclass(frozen=True)
class Scenario:
    """A scenario: a module or package of stress.scenarios has one as SCENARIO."""

    number: int
    name: str
    """One word, that of the module; for the command line."""
    invariant: str
    """One sentence: what holds at every instant, or in the end."""
    faults: str
    """What is mixed into the live traffic."""
    unit: str
    """What an operation is, in the plural; the first argument of Context.done() that counts towards `--count`."""
    run: Callable[[Context], None]
    methods: tuple[str, ...] = METHODS
    """The start methods it is run under; ("fork",) where they make no difference."""
    full: Full = Full(duration=60)


class Skip(Exception):
    """The scenario cannot run here; its text says why."""


@dataclass
class Context:
    """What a scenario gets. Pass it to other processes as an argument: it pickles."""

    seed: int
    allowed: float
    """Seconds."""
    deadline: float
    """On the clock of time.monotonic(), which all processes share."""
    count: int | None
    processes: int
    method: str
    prefix: str
    """Of every name that is made: the look from outside finds objects by it."""
    directory: str
    """For files of the scenario; removed in the end."""
    channel: Writer

    # ---- what to do, and how long ----

    @property
    def multiprocessing(self) -> Any:
        """The multiprocessing context of the start method."""
        return multiprocessing.get_context(self.method)

    def random(self, *who: object) -> random.Random:
        """A generator of its own for each `who`, the same in every run with this seed."""
        return random.Random(f"{self.seed} {self.method} {who}")

    def going(self) -> bool:
        """Is there time left?"""
        return time.monotonic() < self.deadline

    def steps(self, parts: int = 1) -> Iterator[int]:
        """0, 1, 2, … until the time is over, or one of `parts` processes has done its part of the count.

        One step at least: where all is slow, a start may take as long as a short run.
        """
        limit = None if self.count is None else -(-self.count // parts)
        step = 0
        while (step == 0 or self.going()) and (limit is None or step < limit):
            yield step
            step += 1

    def begin(self) -> None:
        """Have the time begin now, in this process: what came before was preparation. Also in a child with its copy."""
        began = time.monotonic()
        self.deadline = began + self.allowed
        self.channel.say("began", began)

    def name(self, kind: str = "") -> str:
        """A legal name that nobody else has. `kind` "queue" tells the look from outside, which cannot list queues."""
        name = f"{self.prefix}{secrets.token_hex(6)}"
        if kind == "queue":
            self.know_queue(name)
        return name

    def know_queue(self, name: str, lasting: bool = False) -> None:
        """Tell the look from outside of a queue's name that did not come from name(), before the queue is made.

        That is to be soon: what is not seen for half a minute is forgotten, since there may be millions. Unless it is
        `lasting`, one of few that may be made at any time.
        """
        self.channel.say("lasting queue" if lasting else "queue", name)

    # ---- what happened ----

    def done(self, what: str, number: int = 1) -> None:
        """Count operations."""
        self.channel.count("done", what, number)

    def met(self, error: BaseException | str, number: int = 1) -> None:
        """Count an error that is right to happen here."""
        self.channel.count("errors", error if isinstance(error, str) else type(error).__name__, number)

    def tally(self, what: str, number: int = 1) -> None:
        """Count something for the summary that is no operation, such as the phase in which a process died."""
        self.channel.count("tally", what, number)

    def took(self, what: str, seconds: float) -> None:
        """Record a time; the summary has the percentiles of each `what`."""
        self.channel.say("took", [what, seconds])

    def note(self, text: str) -> None:
        """A line for the summary."""
        self.channel.say("note", text)

    def violated(self, text: str) -> None:
        """The invariant does not hold: say what was seen and what should have been. The run goes on."""
        self.channel.say("violation", text)

    def check(self, holds: bool, text: str) -> None:
        """Report a violation unless it holds."""
        if not holds:
            self.violated(text)

    def skip(self, reason: str) -> NoReturn:
        raise Skip(reason)

    # ---- processes ----

    def start(self, function: Callable[..., None], *args: Any) -> Any:
        """Start a process that runs function(context, *args); an exception in it is a violation."""
        process = self.multiprocessing.Process(target=guarded, args=(function, self, *args))
        process.start()
        return process

    def join(self, *processes: Any, grace: float = 30) -> None:
        """Wait until they have ended by themselves, at most `grace` seconds beyond the deadline."""
        for process in processes:
            process.join(max(0.0, self.deadline - time.monotonic()) + grace)
            if process.is_alive():
                self.violated(f"{process.name} hangs: it still runs {grace} s after the end")
                process.kill()
                process.join()
            elif process.exitcode:
                self.violated(f"{process.name} ended with status {process.exitcode}")
            process.close()


def guarded(function: Callable[..., None], context: Context, *args: Any) -> None:
    """Run a part of a scenario in a process of its own."""
    end_with_parent()  # nor parts without a scenario
    try:
        function(context, *args)
    except Exception:
        context.violated(f"{function.__name__} raised:\n{traceback.format_exc(limit=-4)}")
    finally:
        context.channel.flush()


_PR_SET_PDEATHSIG = 1


def end_with_parent() -> None:
    """Be killed when the thread that started this process ends: see prctl(2). A runner may be killed, too."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def load(name: str) -> Scenario:
    """The scenario of a module, without importing the others."""
    scenario: Scenario = importlib.import_module(f"{scenarios.__name__}.{name}").SCENARIO
    return scenario


def all_scenarios() -> list[Scenario]:
    """Every scenario, by number."""
    return sorted((load(each.name) for each in pkgutil.iter_modules(scenarios.__path__)), key=lambda each: each.number)


def find(word: str) -> Scenario:
    """A scenario by its name or number; LookupError if there is none."""
    for scenario in all_scenarios():
        if word in (scenario.name, str(scenario.number)):
            return scenario
    raise LookupError(word)
