"""The process of one scenario, started by the runner with what the context holds, as JSON, in its arguments.

When the scenario is done it stays, so that the runner can look at it from outside, until its standard input ends.
"""

from __future__ import annotations

import faulthandler
import gc
import json
import multiprocessing
import signal
import sys
import traceback

from stress.channel import Writer
from stress.scenario import SKIPPED, Context, Skip, end_with_parent, load


def main() -> int:
    end_with_parent()  # no scenario without a runner
    multiprocessing.set_forkserver_preload(["stress.fork_server"])
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)  # asked for by the runner when the scenario hangs
    options = json.loads(sys.argv[1])
    context = Context(channel=Writer(options.pop("channel")), **options)
    status = _run(sys.argv[2], context)
    gc.collect()
    context.channel.flush()
    context.channel.say("finished", True)
    sys.stdin.read()
    return status


def _run(name: str, context: Context) -> int:
    try:
        load(name).run(context)
    except Skip as skip:
        context.channel.say("skip", str(skip))
        return SKIPPED
    except Exception:
        context.violated(f"the scenario itself raised:\n{traceback.format_exc(limit=-6)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
