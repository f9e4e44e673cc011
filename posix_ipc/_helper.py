"""A process of its own for looks that would change something in this one.

Closing a descriptor of a queue cancels the notification that its process has asked for, and closing one of any file
drops the record locks (fcntl) that its process has on it. See mq_notify(3), fcntl(2).
"""

from __future__ import annotations

import contextlib
import errno
import json
import multiprocessing
import multiprocessing.spawn
import os
import signal
import subprocess
import sys
import warnings
from typing import Any

from posix_ipc import _apart

TIMEOUT = 60
"""Seconds: many times what the largest sweep takes."""

_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_CODE = f"import sys; sys.path.append({_PACKAGE!r}); from posix_ipc._apart import main; main()"


def interpreter() -> str | None:
    """The program that runs Python.

    None where there is none: the program of a frozen application, or of one that embeds Python, is that application.
    """
    return None if getattr(sys, "frozen", False) else multiprocessing.spawn.get_executable() or None


def ask(function: _apart.Function, given: Any = None) -> Any:
    """What a function returns that a process of its own calls: an interpreter, or else a fork of this process.

    Raises OSError: for what the function raised, when there can be no such process, when it dies, and TimeoutError.
    """
    program = interpreter()
    told = _ask_child(function, given) if program is None else _ask_interpreter(program, function, given)
    try:
        result, failure = json.loads(told)
    except ValueError:
        raise _failure(function, f"answered {told[:100]!r}") from None
    if failure is not None:
        raise OSError(*failure)
    return result


def _failure(function: _apart.Function, what: str, number: int = errno.EIO) -> OSError:
    return OSError(number, f"the process that was to run {function.__module__}.{function.__name__} {what}")


def _ask_interpreter(program: str, function: _apart.Function, given: Any) -> str:
    command = [program, "-I", "-S", "-c", _CODE, function.__module__, function.__name__]
    try:
        done = subprocess.run(command, input=json.dumps(given), capture_output=True, text=True, timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        raise _failure(function, f"was not done in {TIMEOUT} s", errno.ETIMEDOUT) from None
    if done.returncode != 0:
        last = done.stderr.strip().rpartition("\n")[2]
        raise _failure(function, f"ended with status {done.returncode}" + (last and f": {last}"))
    return done.stdout


def _ask_child(function: _apart.Function, given: Any) -> str:
    reader, writer = multiprocessing.Pipe(duplex=False)
    with reader:
        with writer, warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of other threads: the child waits for none of them
            child = os.fork()
            if child == 0:
                try:
                    writer.send_bytes(_apart.answer(function, given).encode())
                finally:
                    os._exit(0)
        try:
            if reader.poll(TIMEOUT):
                return reader.recv_bytes().decode()
            os.kill(child, signal.SIGKILL)
            raise _failure(function, f"was not done in {TIMEOUT} s", errno.ETIMEDOUT)
        except EOFError:
            raise _failure(function, "died") from None
        finally:
            with contextlib.suppress(ChildProcessError):  # the program ignores SIGCHLD
                os.waitpid(child, 0)
