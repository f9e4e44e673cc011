"""The main job, examples/wordcount.py, as a user runs it."""

import contextlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import posix_ipc

WORDCOUNT = Path(__file__).resolve().parent.parent / "examples" / "wordcount.py"

pytestmark = pytest.mark.slow

each_method = pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])


@contextlib.contextmanager
def start(*arguments):
    """Start the program in a session of its own, so that a signal can go to its whole group and to nobody else."""
    heeding_ctrl_c = ["env", "--default-signal=INT"]  # it is ignored where the tests run in the background of a shell
    with subprocess.Popen(
        [*heeding_ctrl_c, sys.executable, WORDCOUNT, "--processes", "2", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as run:
        try:
            yield run
        finally:
            run.kill()


def names_in(output):
    """Return the names of the segment and of the semaphore, which every run tells."""
    return re.search(r'SharedMemory\("(/\w+)".*Semaphore\("(/\w+)"', output).groups()


def assert_names_are_gone(segment, mutex):
    assert not os.path.exists(f"/dev/shm{segment}")
    assert not os.path.exists(f"/dev/shm/sem.{mutex[1:]}")


@each_method
def test_counts_words_and_leaves_nothing(method, tmp_path):
    folder = tmp_path / "folder"
    (folder / "below").mkdir(parents=True)
    (folder / "first").write_text("the cat\nand the dog\n" * 500)
    (folder / "below" / "second").write_text("the caf\u00e9, _\u00fcber-the\n" * 100, encoding="utf-8")
    (folder / "below" / "empty").touch()
    (tmp_path / "third").write_text("the end")

    with start("--method", method, folder, tmp_path / "third") as run:
        output, errors = run.communicate(timeout=60)

    assert (run.returncode, errors) == (0, "")
    assert "4 files" in output
    assert re.findall(r"^ +([\d,]+)  (\w+)$", output, re.MULTILINE)[0] == ("1,201", "the")
    assert "100  café\n" in output
    assert "result      the same as the sequential count\n" in output
    assert "left over   nothing" in output
    assert_names_are_gone(*names_in(output))


@each_method
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_tidies_up_when_interrupted(method, number, tmp_path):
    (tmp_path / "corpus").write_text("the cat and the dog\n" * 200_000)  # enough to be at work for a while

    with start("--method", method, tmp_path) as run:
        for line in run.stdout:
            if line.startswith("parallel"):
                break
        segment, mutex = names_in(line)
        held = posix_ipc.Semaphore(mutex)
        with held:  # meanwhile no worker can finish a span, so that the signal meets all of them at work
            os.killpg(run.pid, number)  # as a terminal or a supervisor does
        _, errors = run.communicate(timeout=60)
        held.close()

    assert (run.returncode, errors) == (128 + number, "")
    assert_names_are_gone(segment, mutex)


def test_refuses_a_path_that_does_not_exist(tmp_path):
    with start(tmp_path / "missing") as run:
        output, errors = run.communicate(timeout=60)
    assert (run.returncode, output) == (2, "")
    assert "missing does not exist" in errors
