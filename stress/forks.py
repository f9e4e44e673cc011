"""Children by os.fork(), for scenarios that need processes multiprocessing knows nothing of."""

from __future__ import annotations

import os
import signal
import traceback
from collections.abc import Callable
from typing import Any

from stress.scenario import Context


def fork(context: Context, function: Callable[..., object], *args: Any) -> int:
    """Run function(*args) in a child, which ends with it; an exception is a violation. The pid."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        function(*args)
        status = 0
    except BaseException:
        context.violated(f"{function.__name__} raised:\n{traceback.format_exc(limit=-4)}")
    finally:
        try:
            context.channel.flush()
        finally:
            os._exit(status)


def wait_for(context: Context, pid: int, *expected: int) -> None:
    """Wait for the end of a child. `expected` are signals that may have ended it; none: it ends by itself, well."""
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    wanted = [-number for number in expected] or [0]
    if status not in wanted:
        end = signal.Signals(-status).name if status < 0 else f"status {status}"
        context.violated(f"a forked child ended with {end}")
