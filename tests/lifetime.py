"""Start trees of processes (tree.py), kill parts of them, and see when the names of their objects are gone."""

import contextlib
import json
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

import psutil
import pytest
from support import KINDS, PACKAGE_PARENT, SMALL_QUEUE, TESTS, wait_until

if sys.platform != "linux":
    pytest.skip("tracking is for Linux", allow_module_level=True)

from posix_ipc import _ext, _journal, mp_integration

BY_NAME = {kind.type.__name__: kind for kind in KINDS}
DIRECTORY = Path(f"/dev/shm/.posix_ipc-{os.geteuid()}")


def existing(objects):
    """Those of (kind, name) that exist."""
    return [(kind, name) for kind, name in objects if BY_NAME[kind].exists(name)]


def journal_files(token):
    """The files of a tree that are left."""
    return [path.name for path in DIRECTORY.glob(f"{token}.*")]


def trackers(token):
    """The processes that are trackers of a tree."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        command = process.info["cmdline"] or []
        if "tracker" in command and token in command:
            found.append(process)
    return found


class Tree:
    """A tree of processes in a session of its own. Whatever is left of it at the end is killed and removed."""

    def __init__(self, method, workers=2):
        path = os.pathsep.join(filter(None, [str(PACKAGE_PARENT), os.environ.get("PYTHONPATH")]))
        # Not a pipe: what outlives the root would keep it open.
        self._stderr = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, TESTS / "tree.py", method, str(workers)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": path},
        )
        line = self._process.stdout.readline()
        if not line:
            raise AssertionError(f"the tree did not grow:\n{self.stderr()}")
        state = json.loads(line)
        self.root = state["root"]
        self.token = state["token"]
        self.own_objects = [tuple(each) for each in state["objects"]]
        self.passed = self.own_objects[3:6]
        """What its workers have too; the three before are its own alone, the three after them are in flight."""
        self._semaphores = [("Semaphore", name) for name in state["semaphores"]]
        self.workers = {
            int(pid): {what: [tuple(each) for each in objects] for what, objects in made.items()}
            for pid, made in state["workers"].items()
        }
        """What each made: "private", "given" to the root, and "shared", which is in flight."""
        self._workers = [psutil.Process(pid) for pid in self.workers]

    def objects_of(self, *pids):
        """All that some workers made."""
        return [each for pid in pids for objects in self.workers[pid].values() for each in objects]

    @property
    def objects(self):
        return [*self.own_objects, *self.objects_of(*self.workers)]

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.kill_group(signal.SIGKILL)
        self._process.wait(30)
        for pid in self.workers:
            _kill(pid, signal.SIGKILL)
        for stream in (self._process.stdin, self._process.stdout, self._stderr):
            stream.close()
        for kind, name in [*self.objects, *self._semaphores]:
            BY_NAME[kind].remove(name)

    def ask(self, line):
        """Have the root do something (tree.py)."""
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()

    def create(self):
        """Have the root make one more of each."""
        self.ask("create")
        self.own_objects += [tuple(each) for each in json.loads(self._process.stdout.readline())]

    def kill_root(self, number):
        _kill(self.root, number)

    def kill_group(self, number):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def kill_trackers(self):
        """Kill them, and wait until they have given back what they held: their locks go after their command lines."""
        killed = trackers(self.token)
        for tracker in killed:
            tracker.kill()
        for tracker in killed:
            wait_until(lambda tracker=tracker: has_ended(tracker))

    def kill_workers(self, number=signal.SIGKILL):
        for pid in self.workers:
            _kill(pid, number)

    def wait(self):
        """Wait for the root to end."""
        self._process.wait(30)

    def wait_for_workers(self):
        """Wait for all of them to end, by themselves or as they were told."""
        for worker in self._workers:
            wait_until(lambda worker=worker: has_ended(worker))

    def stderr(self):
        """What all of its processes have said on stderr."""
        self._stderr.seek(0)
        return self._stderr.read()


def has_ended(process):
    """Also if nobody has waited for it yet."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _kill(pid, number):
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


OPTIONS = {"Semaphore": {"initial_value": 1}, "SharedMemory": {"size": 64}, "MessageQueue": SMALL_QUEUE}


def make(kind, name, **options):
    """A small tracked object."""
    return getattr(mp_integration, kind).create(name, **{**OPTIONS[kind], **options})


def belong_to_a_new_tree():
    """Be a root from now on, for whoever was forked; without a tracker, for the lock says that there is one.

    Returned is the lock, which must be kept.
    """
    token = _journal.own_token()
    multiprocessing.current_process()._config["posix_ipc_token"] = token
    return pretend_tracker(token)


def pretend_tracker(token):
    """The lock of a tracker that is not there, so that nobody sweeps but the test."""
    return _ext.Journal(f"{_journal.directory()}/{token}.tracker", 1)


class Listener(logging.Handler):
    """What this process tells the logger of the package from now on, as (level, text)."""

    def __init__(self):
        super().__init__()
        self.lines = []
        logger = logging.getLogger("posix_ipc")
        logger.addHandler(self)
        logger.setLevel(logging.INFO)

    def emit(self, record):
        self.lines.append((record.levelname, record.getMessage()))


def write_program(text):
    """A program to be started as if it were Python."""
    path = Path("/dev/shm/program")
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o700)
    multiprocessing.set_executable(str(path))


def in_a_worker(function, *args):
    """In a process of this tree, which ends at once and cleans nothing up."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            function(*args)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0


def die_after(function, *args):
    """In a tree of its own that ends at once, and cleans nothing up."""

    def be_a_tree():
        tracker = belong_to_a_new_tree()
        function(*args)
        del tracker

    in_a_worker(be_a_tree)


def wait_until_gone(objects, timeout=30):
    """Wait until none of the names is left; the seconds it took."""
    started = time.monotonic()
    wait_until(lambda: not existing(objects), timeout)
    return time.monotonic() - started


def assert_all_is_over(tree):
    """The tracker and its files go too, once nothing is owed."""
    wait_until(lambda: not journal_files(tree.token))
    wait_until(lambda: not trackers(tree.token))
