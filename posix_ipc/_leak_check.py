"""What a block of code leaves behind: named objects, descriptors, mappings and child processes."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import gc
import inspect
import os
import time
import traceback
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import NoReturn, ParamSpec, TypeVar

import psutil

from posix_ipc import _probe, _resources, _trace, _trace_files
from posix_ipc._leak_report import LeakReport, LeftChild, LeftDescriptor, LeftMapping, LeftObject
from posix_ipc._resources import Resources
from posix_ipc._trace import Creation, Trace

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


class LeakError(AssertionError):
    """A block left something behind: `report` says what.

    It is an AssertionError because that is what the block was said to do: test runners count it as a failure of the
    test, not as an error in it.
    """

    __module__ = "posix_ipc.leaks"  # its public place, which a traceback shows

    def __init__(self, report: LeakReport) -> None:
        super().__init__(report)
        self.report = report


class leak_check:
    """A block, or a function, that must leave nothing behind, in this process and its children; else LeakError.

        with leak_check() as report:
            ...

        @leak_check(repeat=3)
        def test():
            ...

    `objects`: named objects; `fds`: descriptors; `mappings`: of files in /dev/shm; `children`: processes. The function
    runs up to `repeat` times, until it leaves nothing: what only its first runs leave is a cache, what every run leaves
    is a leak. An exception of the block goes on as it is; the report is there all the same.

    One instance serves blocks in blocks, and those of several threads and tasks at once, each of which has a report of
    its own. Blocks of one thread or task that overlap otherwise need an instance each.
    """

    def __init__(
        self,
        *unnamed: NoReturn,
        objects: bool = True,
        fds: bool = True,
        mappings: bool = True,
        children: bool = True,
        repeat: int = 1,
    ) -> None:
        if unnamed:
            raise TypeError(
                "leak_check: arguments are given by name, and a decorator has its parentheses: @leak_check()"
            )
        if repeat < 1:
            raise ValueError(f"repeat: {repeat} is less than one run")
        self._repeat = repeat
        self._new_check = functools.partial(Check, objects=objects, fds=fds, mappings=mappings, children=children)
        self._running: list[Check] = []

    def __enter__(self) -> LeakReport:
        if self._repeat > 1:
            raise ValueError(
                "repeat: a with block runs once; as a decorator, @leak_check(repeat=...), it can run again"
            )
        check = self._new_check()
        check.start()
        self._running.append(check)
        _entered.set((*_living(_entered.get()), weakref.ref(check)))
        return check.report

    def __exit__(
        self,
        exc_type: type[BaseException] | None = None,
        exc_value: BaseException | None = None,
        exc_traceback: TracebackType | None = None,
        /,
    ) -> None:
        __tracebackhide__ = True  # pytest: the news is the block
        check = self._innermost()
        if exc_value is not None:
            with contextlib.suppress(OSError, RuntimeWarning):  # it would mask the block's own
                check.finish()
        elif check.finish():
            raise LeakError(check.report)

    def _innermost(self) -> Check:
        """Take out the check of the block that is being left."""
        here = _entered.get()
        for reference in reversed(here):
            check = reference()
            if check is not None and check in self._running:
                _entered.set(tuple(other for other in _living(here) if other is not reference))
                break
        else:
            # Entered in one context and left in another, as fixtures of asynchronous tests are: one can only be that.
            if not self._running:
                raise ValueError("leak_check: its block was left without having been entered")
            if len(self._running) > 1:
                raise ValueError(
                    "leak_check: several tasks or threads have entered it, and this is none of them: "
                    "use an instance for each block"
                )
            (check,) = self._running
        self._running.remove(check)
        return check

    def __call__(self, function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
        """Wrap a function. What it returns is still there when the look is taken."""
        for is_other in (inspect.iscoroutinefunction, inspect.isgeneratorfunction, inspect.isasyncgenfunction):
            if is_other(function):
                raise TypeError(f"{function!r} runs after it was called: put `with leak_check()` inside")

        @functools.wraps(function)
        def checked(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
            __tracebackhide__ = True
            for _ in range(self._repeat):
                check = self._new_check()
                check.start()
                try:
                    result = function(*args, **kwargs)
                except BaseException:
                    with contextlib.suppress(OSError, RuntimeWarning):
                        check.finish()
                    raise
                if not check.finish():
                    break
            else:
                check.report.runs = self._repeat
                raise LeakError(check.report)
            return result

        return checked


_Reference = weakref.ReferenceType["Check"]

_entered: contextvars.ContextVar[tuple[_Reference, ...]] = contextvars.ContextVar("_entered", default=())
"""The blocks that this task or thread is in, and those it was in that started it; the innermost last.

They are held by the instances: contexts live longer than a block that nobody leaves.
"""


def _living(references: tuple[_Reference, ...]) -> tuple[_Reference, ...]:
    return tuple(reference for reference in references if reference() is not None)


# ---- one check ----

SETTLE = 0.1
"""Seconds for other threads of this process to close what they are about to."""
SETTLE_OTHERS = 1.0
"""The same for processes to end, and for the tracker to remove what they owned: G1 of docs/design.md."""


class Check:
    """What was there at `start`, compared with what is there at `finish`."""

    def __init__(self, *, objects: bool = True, fds: bool = True, mappings: bool = True, children: bool = True) -> None:
        self.report = LeakReport()
        self._objects, self._fds, self._mappings, self._children = objects, fds, mappings, children
        self._pid = os.getpid()
        self._trace: Trace | None = None
        self._exclusions = 0

    def start(self) -> None:
        self._before = self._look()
        if self._objects:
            self._trace = Trace(_trace_files.create(), self._pid)
            # Nobody may ever leave the block: of a generator that is not run to its end, or at the end of the program.
            self._stop = weakref.finalize(self, _stop, self._trace, self._pid)
            self._trace.start()

    def finish(self, let_go: Callable[[], object] = gc.collect) -> LeakReport:
        """Fill the report. If something is left, call `let_go`, and give it a moment to go.

        Handles may be garbage in cycles, such as those of an exception, its traceback and their frames.
        """
        if os.getpid() != self._pid:  # a fork has left the block in its child, which is not what is checked
            return self.report
        try:
            left = self._compare()
            if left:
                let_go()
                left = self._settle()
            left.describe(self.report)
            lost = self._trace is not None and self._trace.is_lost()
            full = self._trace is not None and self._trace.is_full()
        finally:
            self.abandon()
        if lost:
            warnings.warn(
                "leak_check: the block removed the file in which children report what they create", RuntimeWarning, 3
            )
        if full:  # else what nobody could hear of would pass for nothing
            warnings.warn("leak_check: children created more than can be kept: not all is known", RuntimeWarning, 3)
        return self.report

    def abandon(self) -> None:
        """Stop without a result."""
        if self._trace is not None:
            self._trace = None
            self._stop()

    @contextlib.contextmanager
    def excluding(self) -> Iterator[None]:
        """What the block makes is none of this check's, nor what the children do that it starts.

        Such blocks may nest, as wider fixtures of pytest do that ask for each other.
        """
        self._exclusions += 1
        if self._exclusions == 1:
            if self._trace is not None:
                self._trace.stop()
            self._before_exclusion = self._look()
        try:
            yield
        finally:
            self._exclusions -= 1
            if self._exclusions == 0:
                self._before.add(self._look().beyond(self._before_exclusion))
                if self._trace is not None:
                    self._trace.start()

    def _look(self) -> Resources:
        return Resources.now(self._objects or self._mappings, self._fds, self._mappings, self._children)

    def _compare(self) -> _Left:
        now = self._look()
        creations = [] if self._trace is None else self._trace.surviving()
        incomplete = self._trace is not None and (self._trace.is_full() or self._trace.is_lost())
        return _Left(creations, incomplete, now, now.beyond(self._before))

    def _settle(self) -> _Left:
        pause = 0.001
        started = quiet_since = time.monotonic()
        while left := self._compare():
            now = time.monotonic()
            if left.by_others(self._pid):
                quiet_since = now
            if now - quiet_since > SETTLE or now - started > SETTLE_OTHERS:
                break
            time.sleep(pause)
            pause = min(pause * 2, 0.05)
        return left


def _stop(trace: Trace, pid: int) -> None:
    trace.stop()
    if os.getpid() == pid:  # not that of a forked child, which has inherited it
        with contextlib.suppress(OSError):  # it is lost
            os.unlink(trace.path)


@dataclass(frozen=True)
class _Left:
    """What a look found to be left."""

    creations: list[Creation]
    incomplete: bool
    now: Resources
    new: Resources

    def __bool__(self) -> bool:
        return bool(self.creations or self.new.fds or self.new.mapped or self.new.children)

    def by_others(self, pid: int) -> bool:
        """Is it in the hands of another process, which may be about to end?"""
        children = any(not child.is_zombie for child in self._children())
        return children or any(creation.tracked and creation.pid != pid for creation in self.creations)

    def describe(self, report: LeakReport) -> None:
        report.objects = tuple(_left_objects(self.creations))
        report.incomplete = self.incomplete
        ours = {_trace.file_of(creation.kind, creation.name) for creation in self.creations}
        report.foreign = tuple(sorted(self.new.files.keys() - ours))
        report.fds = tuple(self._descriptors())
        report.mappings = tuple(self._mappings())
        report.children = tuple(self._children())

    def _descriptors(self) -> Iterator[LeftDescriptor]:
        for number in sorted(self.new.fds):
            with contextlib.suppress(OSError):  # closed by another thread
                yield LeftDescriptor(number, os.readlink(f"/proc/self/fd/{number}"))

    def _mappings(self) -> Iterator[LeftMapping]:
        names = {inode: path for path, inode in self.now.files.items()}
        for (_, inode), (size, path) in self.new.mapped.items():
            # The path of a semaphore is that of the temporary file that glibc made it under, "(deleted)".
            yield LeftMapping(names.get(inode, path), size)

    def _children(self) -> Iterator[LeftChild]:
        names = _resources.multiprocessing_children()
        for process in sorted(self.new.children, key=lambda process: process.pid):
            with contextlib.suppress(psutil.NoSuchProcess):
                name = names.get(process.pid) or process.name()
                yield LeftChild(process.pid, name, _command(process), process.status())


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:  # a zombie has none
        return ""


def _left_objects(creations: list[Creation]) -> Iterator[LeftObject]:
    queues = [os.fsencode(creation.name) for creation in creations if creation.kind == "message_queue"]
    looks = _probe.look(queues, [], []).queues
    for creation in creations:
        if creation.kind == "message_queue":
            look = looks.get(os.fsencode(creation.name))
            size = look and look.max_messages * look.max_message_size
        else:
            size = _file_size(_trace.file_of(creation.kind, creation.name))
        yield LeftObject(
            kind=creation.kind,
            name=creation.name,
            size=size,
            tracked=creation.tracked,
            pid=creation.pid,
            process=creation.process,
            command=creation.command,
            where=tuple(traceback.FrameSummary(*frame, lookup_line=False) for frame in creation.frames),
        )


def _file_size(path: str) -> int | None:
    try:
        return os.stat(path).st_size
    except OSError:
        return None
