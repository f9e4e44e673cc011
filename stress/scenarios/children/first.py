"""Python as the first process of a PID namespace, as in a container."""

from __future__ import annotations

import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
from multiprocessing.connection import Connection
from typing import Any

from stress.forks import fork, wait_for
from stress.scenario import Context
from stress.scenarios.children.objects import ANSWER_WITHIN, end_well, expect_gone, expect_there, make, there

NEW_PID_NAMESPACE = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child")


def why_not_first(context: Context) -> str:
    if shutil.which("unshare") is None:
        return "there is no unshare(1)"
    tried = subprocess.run([*NEW_PID_NAMESPACE, "true"], capture_output=True, text=True, check=False)
    return tried.stderr.strip() if tried.returncode else ""


def first_of_a_namespace(context: Context, stem: str, choose: random.Random) -> None:
    """It exits, and has cleaned up; or it dies, and the kernel takes all of its tree, the tracker too."""
    end = choose.choice(("exit", "die"))
    path = f"{context.directory}/{stem[1:]}first"
    with open(path, "wb") as file:
        pickle.dump((context, stem, end), file)
    code = "import sys; from stress.scenarios.children import first; first.be_first(sys.argv[1])"
    command = [*NEW_PID_NAMESPACE, sys.executable, "-c", code, path]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            ready = process.stdout.readline()
            if end == "die":
                process.kill()  # and with it PID 1, which no signal from inside would reach
            _, stderr = process.communicate(timeout=ANSWER_WITHIN)
        finally:
            process.kill()
    os.unlink(path)
    expected = 0 if end == "exit" else -signal.SIGKILL
    context.check(
        ready == "ready\n" and process.returncode == expected,
        f"PID 1 that was to {end} said {ready!r} and ended with status {process.returncode}\n{stderr}",
    )
    if end == "exit":
        expect_gone(context, stem, "a PID 1 exits", 0, 1)
        return
    wait_for(context, fork(context, start_anew, stem))
    expect_gone(context, stem, "a PID 1 dies, at the next start", 0, 1, 2)


def be_first(path: str) -> None:
    """Of this program, in a namespace of its own."""
    with open(path, "rb") as file:
        context, stem, end = pickle.load(file)
    from stress.scenario import guarded

    guarded(live_as_first, context, stem, end)


def live_as_first(context: Context, stem: str, end: str) -> None:
    context.check(os.getpid() == 1, f"the first process of a namespace has the pid {os.getpid()}")
    own = make(stem, 0)
    seen = there(stem, 0)
    ours, theirs = context.multiprocessing.Pipe()
    child = context.multiprocessing.Process(target=live_as_second, args=(context, stem, own, theirs))
    child.start()
    theirs.close()
    ours.recv()
    child.kill()
    child.join()
    expect_gone(context, stem, "a child of PID 1 is killed", 1)
    expect_there(context, stem, 0, seen, "PID 1 owns them and lives")
    context.channel.flush()
    print("ready", flush=True)
    if end == "die":
        signal.pause()
    del own


def live_as_second(context: Context, stem: str, handles: list[Any], link: Connection) -> None:
    own = make(stem, 1)
    link.send("ready")
    link.recv()
    del own, handles


def start_anew(stem: str) -> None:
    """The next start of a program of this user: it creates something, and that sweeps."""
    for handle in make(stem, 2):
        handle.unlink()
        handle.close()
    end_well()
