"""Draw the terminal pictures of command-line.md: the real commands, on a little scene in namespaces of its own.

The scene has its own /dev/shm, queues, processes and names of users, so that the pictures show the same on every
machine. Needs util-linux, rights for namespaces, and rich (the extra `cli`).
"""

import argparse
import contextlib
import io
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

DOCS = Path(__file__).resolve().parent
PICTURES = {
    "ls": ["ls"],
    "leaks": ["leaks", "--unheld"],
    "why": ["why", "/frames"],
    "doctor": ["doctor"],
}
WIDTH = 96

LIVE_TREE = """
import multiprocessing, sys, threading
from posix_ipc.mp_integration import MessageQueue, Semaphore, SharedMemory

def work(frames, mutex, started):
    started.release()
    threading.Event().wait()

frames, mutex = SharedMemory.create("/frames", size=4 << 20), Semaphore.create("/frames-lock", initial_value=1)
jobs, started = MessageQueue.create("/jobs", max_messages=8, max_message_size=128), Semaphore.create("/started")
jobs.send(b"one"), jobs.send(b"two")
frames.buf[:1 << 20] = bytes(1 << 20)
context = multiprocessing.get_context("fork")
for _ in range(2):
    context.Process(target=work, args=(frames, mutex, started), daemon=True).start()
for _ in range(2):
    started.acquire(10)
started.unlink()
print("ready", flush=True)
threading.Event().wait()
"""

KILLED_TREE = """
import threading
from posix_ipc.mp_integration import Semaphore, SharedMemory
batch, done = SharedMemory.create("/eval-batch", size=1 << 20, reserve=True), Semaphore.create("/eval-done")
print("ready", flush=True)
threading.Event().wait()
"""

PLAIN = """
import threading, mmap, posix_ipc
ring = posix_ipc.SharedMemory("/sensor-ring", posix_ipc.O_CREX, mode=0o640, size=64 << 10)
mapped = mmap.mmap(ring.fd, ring.size)
ring.close_fd()
print("ready", flush=True)
threading.Event().wait()
"""

FORGOTTEN = """
import posix_ipc
posix_ipc.SharedMemory("/import-cache", posix_ipc.O_CREX, size=512 << 10).close()
print("ready", flush=True)
"""

ENTER = """
set -e
mount --make-rprivate / 2>/dev/null || true
mkdir "$1/dev"
mount --rbind /dev "$1/dev"
mount -t tmpfs tmpfs /dev
touch /dev/null
mount --bind "$1/dev/null" /dev/null
mkdir /dev/shm
mount -t tmpfs -o size=1g tmpfs /dev/shm
echo 'alice:x:0:0::/:/bin/sh' > "$1/passwd"
mount --bind "$1/passwd" /etc/passwd
shift
exec "$@"
"""


def main():
    parser = argparse.ArgumentParser(description="Draw the terminal pictures of command-line.md.")
    parser.add_argument("--to", metavar="DIRECTORY", type=Path, default=DOCS / "pictures")
    parser.add_argument(
        "--age", metavar="SECONDS", type=float, default=5, help="of the scene; or all ages would be 0 s"
    )
    parser.add_argument("--scene", type=Path, help=argparse.SUPPRESS)  # in the namespaces
    options = parser.parse_args()
    if options.scene:
        draw(options)
        return
    with tempfile.TemporaryDirectory() as scene:
        namespaces = ["unshare", *([] if os.geteuid() == 0 else ["-r"]), "-m", "-i", "-u", "-p", "-f", "--mount-proc"]
        command = [sys.executable, __file__, *sys.argv[1:], "--scene", scene]
        subprocess.run([*namespaces, "sh", "-c", ENTER, "sh", scene, *command], check=True)


def draw(options):
    """In the namespaces."""
    scene = options.scene
    with contextlib.ExitStack() as stack:
        training = stack.enter_context(started(scene, "train.py", LIVE_TREE))
        stack.enter_context(started(scene, "recorder.py", PLAIN))
        stack.enter_context(started(scene, "import.py", FORGOTTEN)).wait()
        with started(scene, "evaluate.py", KILLED_TREE) as evaluation:
            # As when a container is killed, nobody is left to clean up; the other tree's tracker would do it, too.
            kill_tracker(training)
            kill_tracker(evaluation)
        time.sleep(options.age)
        for name, arguments in PICTURES.items():
            (options.to / f"{name}.svg").write_text(picture(arguments))


@contextlib.contextmanager
def started(scene, name, code):
    """A program of the scene, under the command line that a user would have given."""
    (scene / name).write_text(code)
    with subprocess.Popen(
        ["python3", name],
        executable=sys.executable,
        cwd=scene,
        env={**os.environ, "PYTHONPATH": str(DOCS.parent)},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            if process.stdout.readline() != "ready\n":
                raise SystemExit(f"{name} did not start")
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def kill_tracker(process):
    for entry in os.listdir("/proc"):
        if f"\0tracker\0/dev/shm/.posix_ipc-0\0{process.pid}-".encode() in read(f"/proc/{entry}/cmdline"):
            os.kill(int(entry), signal.SIGKILL)
            while read(f"/proc/{entry}/cmdline"):
                time.sleep(0.01)


def read(path):
    with contextlib.suppress(OSError), open(path, "rb") as file:
        return file.read()
    return b""


def picture(arguments):
    """What a command prints, as it looks."""
    sys.path.insert(0, str(DOCS.parent))
    from rich.console import Console
    from rich.terminal_theme import MONOKAI

    from posix_ipc import __main__, _commands, _tables

    console = Console(record=True, file=io.StringIO(), force_terminal=True, color_system="truecolor", width=WIDTH)
    console.print(f"[bold]$ posix-ipc {' '.join(arguments)}[/]", highlight=False)
    _commands.run(__main__.parser().parse_args(arguments), _tables.ColourOutput(console))
    svg = console.export_svg(title="", theme=MONOKAI, unique_id=f"posix-ipc-{arguments[0]}")
    # Nothing is fetched from elsewhere: the fonts are those of the reader.
    return re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL).replace("Fira Code, monospace", "monospace")


if __name__ == "__main__":
    main()
