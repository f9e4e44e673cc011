"""What the journals of living processes say is true while others end, strike out, move and pickle at the same time."""

import os
import platform
import select
import sys
import threading

import pytest
from lifetime import BY_NAME, DIRECTORY, belong_to_a_new_tree, existing, make, run_privately
from stepping import Stepped, is_allowed

from posix_ipc import _journal, _reaper

NAMES = list(BY_NAME)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="tracking is for Linux")
needs_ptrace = pytest.mark.skipif(not is_allowed(), reason="needs ptrace")

# ---- a process ends while one of its threads creates ----

# The call by which a name comes to be: first on x86_64, then on all younger architectures.
_LINKAT, _MQ_OPEN = (265, 240) if platform.machine() == "x86_64" else (37, 180)


def creating_beside_the_end(kind, go_on, ended):
    tracker = belong_to_a_new_tree()
    make("Semaphore", "/first").unlink()

    def end():
        os.read(go_on, 1)
        for process in _journal.existing():
            process.close_journals()
        _reaper.reap()
        os.write(ended, b".")

    ending = threading.Thread(target=end)
    ending.start()
    yield
    made = make(kind, "/made")
    ending.join()
    del made, tracker


def end_in_the_midst(kind):
    go_on, ended = os.pipe(), os.pipe()
    met = False
    with Stepped(creating_beside_the_end(kind, go_on[0], ended[1])) as child:
        for _ in child.stops():
            if not met and child.system_call() == (_MQ_OPEN if kind == "MessageQueue" else _LINKAT):
                met = True
                os.write(go_on[1], b".")
                select.select([ended[0]], [], [], 0.2)  # in vain: it waits for the creation
        assert existing([(kind, "/made")])
    assert met
    _reaper.reap()
    assert not existing([(kind, "/made")])
    assert not list(DIRECTORY.iterdir())


@needs_ptrace
@pytest.mark.parametrize("kind", NAMES)
def test_g1_what_a_thread_is_about_to_create_when_the_journal_closes_is_recorded(kind):
    run_privately(end_in_the_midst, kind)
