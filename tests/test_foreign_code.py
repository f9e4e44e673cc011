"""G11: the tracker and the process that reaps load their own package and Python's library, and nothing anybody left.

Neither from the current directory, nor from where the environment leads; and they have nothing that could unpickle.
"""

import multiprocessing
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from lifetime import DIRECTORY, make, trackers, wait_until_gone, write_program
from support import run_forked, run_privately, wait_until

from posix_ipc import _journal
from posix_ipc.mp_integration import reap

pytestmark = [pytest.mark.skipif(sys.platform != "linux", reason="tracking is for Linux"), pytest.mark.slow]

IMPORTED, RAN, FOREIGN = Path("/dev/shm/imported"), Path("/dev/shm/ran"), Path("/dev/shm/foreign")
MODULES = ["contextlib", "json", "posix_ipc", "re", "struct"]
"""What both import by name; of these anybody could leave one of his own."""


def leave_modules():
    FOREIGN.mkdir()
    for name in [*MODULES, "pickle", "sitecustomize", "usercustomize"]:
        FOREIGN.joinpath(f"{name}.py").write_text(f"open({str(RAN)!r}, 'a').write(__name__)\n")
    os.environ["PYTHONPATH"] = str(FOREIGN)
    os.chdir(FOREIGN)
    subprocess.run([sys.executable, "-c", ""], capture_output=True)
    RAN.unlink()  # an ordinary program has run some of them


class Opened:
    """Unpickling it is heard of."""

    def __reduce__(self):
        return open, (str(RAN), "a")


def be_a_root_and_die():
    multiprocessing.current_process()._config["posix_ipc_token"] = _journal.own_token()
    make("SharedMemory", "/left")
    with open(f"{DIRECTORY}/{_journal.own_token()}.j0", "wb") as file:
        file.write(pickle.dumps(Opened()))
        os.fchmod(file.fileno(), 0o600)


def track_and_reap():
    leave_modules()
    write_program(f'exec "{sys.executable}" -X importtime "$@" 2>>"{IMPORTED}"')
    run_forked(be_a_root_and_die)
    wait_until_gone([("SharedMemory", "/left")])
    (pickled,) = DIRECTORY.glob("*.j0")
    wait_until(lambda: not trackers(pickled.stem))  # it has ended by itself, and loaded all that it needs
    assert reap() == []
    imported = {line.rpartition("|")[2].strip() for line in IMPORTED.read_text().splitlines()}
    assert {*MODULES, "posix_ipc._tracker", "posix_ipc._apart", "posix_ipc._reaper"} <= imported
    assert not imported & {"pickle", "_pickle", "multiprocessing", "site", "sitecustomize", "usercustomize"}
    assert pickled.exists()
    assert not RAN.exists()


def test_g11_neither_the_tracker_nor_the_reaper_runs_foreign_code():
    run_privately(track_and_reap)
