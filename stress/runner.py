"""Runs a scenario in a session of its own, watches it, looks at it from outside, and leaves nothing of it behind."""

from __future__ import annotations

import dataclasses
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, TypeVar

from stress import outside
from stress.channel import Reader
from stress.known import Objects
from stress.result import INTERRUPTED, PASSED, SKIPPED, Result
from stress.sampling import Sampler
from stress.scenario import Scenario

ROOT = Path(__file__).resolve().parent.parent
TICK = 0.1
"""Seconds between looks at the report channel."""
GRACE = 60.0
"""Seconds beyond its time after which a scenario hangs."""
LONGEST_BY_COUNT = 1800.0
"""Seconds that a scenario may take that goes by count."""
AFTERWARDS = 10.0
"""Seconds in which the last objects, journals and trackers go, which is a matter of milliseconds on an idle machine."""

TRACKERS_TIME = 2.0
"""Seconds that trackers get to remove what they can, when everything else was killed."""
ENTRY = ("-m", "stress.entry")
"""What Python is told to run for a scenario."""

_Left = TypeVar("_Left", bound=Collection[Any])
Watcher = Callable[[Result], None]


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to run a scenario."""

    seed: int
    method: str
    processes: int
    duration: float
    count: int | None = None
    fault: str = ""

    def arguments(self, scenario: Scenario) -> list[str]:
        """Of the command line that repeats the run."""
        arguments = [scenario.name, "--method", self.method, "--seed", str(self.seed)]
        arguments += ["--processes", str(self.processes)]
        arguments += ["--duration", f"{self.duration:g}s"] if self.count is None else ["--count", str(self.count)]
        return arguments + (["--fault", self.fault] if self.fault else [])


def run(
    scenario: Scenario, settings: Settings, watch: Watcher, is_stopped: Callable[[], bool] = lambda: False
) -> Result:
    """Run it to its end; `watch` is called at every sample. It ends early, as INTERRUPTED, once `is_stopped`."""
    result = Result(
        number=scenario.number,
        scenario=scenario.name,
        invariant=scenario.invariant,
        method=settings.method,
        seed=settings.seed,
        processes=settings.processes,
        unit=scenario.unit,
        repeat=settings.arguments(scenario),
    )
    with tempfile.TemporaryDirectory(prefix="stress-", ignore_cleanup_errors=True) as directory:
        _Run(scenario, settings, result, watch, is_stopped, Path(directory)).run()
    return result


class _Run:
    def __init__(
        self,
        scenario: Scenario,
        settings: Settings,
        result: Result,
        watch: Watcher,
        is_stopped: Callable[[], bool],
        directory: Path,
    ) -> None:
        self._name = scenario.name
        self._settings = settings
        self._result = result
        self._watch = watch
        self._is_stopped = is_stopped
        self._directory = directory
        self._id = secrets.token_hex(4)
        self._prefix = result.prefix = f"/st{self._id}-"
        self._objects = Objects(self._prefix)
        self._processes = outside.Processes(self._id)
        self._sampler = Sampler(result, self._objects)
        self._finished = False

    def run(self) -> None:
        result = self._result
        self._reader = Reader(str(self._directory / "channel"))
        self._began = time.monotonic()
        self._process = self._start()
        try:
            self._attend()
            if not self._is_stopped():
                self._look_at_what_is_left()
            if self._is_stopped():  # be it during that look, which is not complete then
                result.interrupted = True
                if result.status == PASSED:
                    result.status, result.reason = INTERRUPTED, "interrupted"
        finally:
            self._end()
            self._sweep_away()
            self._take_reports(0)
            self._reader.close()
        count = self._settings.count
        if result.status == PASSED and count is not None and result.operations < count:
            result.violated(f"{result.operations:,} of {count:,} {result.unit} were done in the time there is for them")
        if result.status == PASSED and not result.operations:
            result.violated(f"nothing was done: 0 {result.unit}, which shows nothing")
        result.seconds = time.monotonic() - self._began
        result.stderr = (self._directory / "stderr").read_text(errors="replace")[-4000:]
        self._sampler.end()

    # ---- its life ----

    def _start(self) -> subprocess.Popen[bytes]:
        settings = self._settings
        self._allowed = settings.duration if settings.count is None else LONGEST_BY_COUNT
        options: dict[str, Any] = {
            "seed": settings.seed,
            "allowed": self._allowed,
            "deadline": self._began + self._allowed,
            "count": settings.count,
            "processes": settings.processes,
            "method": settings.method,
            "prefix": self._prefix,
            "directory": str(self._directory),
            "channel": str(self._directory / "channel"),
        }
        self._limit = self._began + self._allowed + GRACE
        environment = {**os.environ, outside.VARIABLE: self._id, "STRESS_PREFIX": self._prefix}
        environment["STRESS_FAULT"] = settings.fault
        with open(self._directory / "stderr", "wb") as stderr:
            return subprocess.Popen(
                [sys.executable, *ENTRY, json.dumps(options), self._name],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=stderr,
                stderr=stderr,
                start_new_session=True,
            )

    def _attend(self) -> None:
        """Until the scenario says that it is done, or ends, or hangs, or is stopped."""
        while not self._finished and not self._is_stopped():
            self._take_reports(TICK)
            now = time.monotonic()
            if self._sampler.is_due():
                self._sampler.sample(now - self._began, self._processes(), self._process.pid)
                self._watch(self._result)
            if self._process.poll() is not None:
                self._take_reports(0)
                if not self._finished:
                    self._result.violated(f"the scenario's process ended with {_end_of(self._process.returncode)}")
                return
            if now > self._limit:
                self._result.violated(f"hangs: not done {GRACE:.0f} s after its time")
                self._process.send_signal(signal.SIGUSR1)  # write where it stands
                time.sleep(0.5)
                return

    def _take_reports(self, timeout: float) -> None:
        result = self._result
        for what, value in self._reader.read(timeout):
            if what in ("done", "errors", "tally"):
                getattr(result, what).update(value)
            elif what == "took":
                result.took.setdefault(value[0], []).append(value[1])
            elif what == "note":
                result.notes.append(value)
            elif what == "violation":
                result.violated(value)
            elif what == "queue":
                self._objects.know_queue(value)
            elif what == "lasting queue":
                self._objects.know_lasting_queue(value)
            elif what == "began":
                self._limit = max(self._limit, value + self._allowed + GRACE)
            elif what == "skip":
                result.status, result.reason = SKIPPED, value
            else:
                self._finished = True

    # ---- the look from outside ----

    def _look_at_what_is_left(self) -> None:
        """First while the scenario's process still lives, then after its end."""
        if self._finished and self._process.poll() is None:
            self._demand_gone(self._left_while_it_lives)
        if self._process.stdin is not None:
            self._process.stdin.close()
        _look_until_gone(lambda: [self._process] if self._process.poll() is None else [], AFTERWARDS, self._is_stopped)
        self._demand_gone(self._left_after_its_end)

    def _demand_gone(self, look: Callable[[], list[str]]) -> None:
        """What is left when there was time for it to go is a violation; when it was stopped there was not."""
        left = _look_until_gone(look, AFTERWARDS, self._is_stopped)
        if not self._is_stopped():
            for text in left:
                self._result.violated(f"left behind: {text}")

    def _left_while_it_lives(self) -> list[str]:
        left, processes = self._objects.look(), self._processes()
        left += [f"{each} in the scenario's process" for each in self._held(processes)]
        for pid in processes:
            if pid != self._process.pid and outside.role(pid) == "process":
                left.append(f"process {pid} ({outside.command(pid)})")
        return left

    def _held(self, processes: Collection[int]) -> list[str]:
        """What the scenario's process has not given back: any descriptor, but the ends of pipes to its helpers."""
        others = {str(self._directory / "channel")}
        for pid in processes:
            if pid != self._process.pid:
                others.update(outside.descriptors(pid).values())
        own = outside.descriptors(self._process.pid).items()
        left = [f"descriptor {number} ({what})" for number, what in own if number > 2 and what not in others]
        return left + self._objects.held_by(self._process.pid)

    def _left_after_its_end(self) -> list[str]:
        left = [f"process {pid} ({outside.command(pid)})" for pid in self._processes()]
        return left + self._objects.look() + [f"journal {name}" for name in outside.journals(self._prefix)]

    # ---- its end ----

    def _end(self) -> None:
        """Kill what still runs. Trackers come last: they take the objects of the others with them."""
        self._kill(lambda pid: outside.role(pid) != "tracker")
        _look_until_gone(self._processes, TRACKERS_TIME)
        self._kill(lambda pid: True)
        self._process.wait()
        if self._process.stdin is not None:
            self._process.stdin.close()

    def _kill(self, choose: Callable[[int], bool]) -> None:
        """Until there are no more: some may be making others."""
        while some := {pid: start for pid, start in self._processes().items() if choose(pid)}:
            for pid, start in some.items():
                outside.kill(pid, start)
            self._process.poll()
            self._take_reports(0.01)

    def _sweep_away(self) -> None:
        """What the package has not removed is not to stay on this machine all the same.

        Where it was stopped that may be the files of trees without an object, whose trackers were killed.
        """
        self._objects.remove()
        if self._is_stopped() or outside.journals(self._prefix):
            subprocess.run(
                [sys.executable, "-m", "posix_ipc", "reap", "--yes"],
                cwd=ROOT,
                stdout=subprocess.DEVNULL,
                start_new_session=True,  # another Ctrl-C is not for it
                check=False,
            )


def _look_until_gone(
    look: Callable[[], _Left], seconds: float, is_stopped: Callable[[], bool] = lambda: False
) -> _Left:
    """Look until nothing is there, or it is stopped; what is there in the end."""
    deadline = time.monotonic() + seconds
    while (left := look()) and time.monotonic() < deadline and not is_stopped():
        time.sleep(0.02)
    return left


def _end_of(status: int) -> str:
    return signal.Signals(-status).name if status < 0 else f"status {status}"
