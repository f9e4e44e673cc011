"""A removal that somebody asked for, killed or met by others at each of its system calls: what has a name keeps one.

For an instant the name is taken from an object, to look at it again. Nothing of a plain object is in a journal, so a
sweep has to know by itself what to give back when the removal is killed then.
"""

import contextlib
import itertools
import os
from pathlib import Path

import pytest
from lifetime import BY_NAME, DIRECTORY, die_after, make
from stepping import Stepped, is_allowed
from support import mount_shm, run_privately, wait_until

from posix_ipc import _ext, _reaper, _removal, leaks

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not is_allowed(), reason="needs ptrace")]

FAMILIES = {"Semaphore": "semaphore", "SharedMemory": "shared_memory"}
NAME = "/mortal"

USES = "OPEN", "NONE"


class Target:
    """An object that nobody holds, perhaps an orphan, and the removal of it."""

    def __init__(self, family, use, orphan=False):
        self.kind, self._family, self._use = BY_NAME[family], FAMILIES[family], use
        self.path = self.kind.file_of(NAME)
        die_after(make, family, NAME) if orphan else self.make()
        self.identity = self.now()

    def make(self):
        self.kind.close_handle(self.kind.create(NAME))

    def now(self):
        """The identity of what has the name; None if nothing has."""
        with contextlib.suppress(FileNotFoundError):
            return _ext._facts_at(self.path)[:3]
        return None

    def is_hidden(self):
        return os.path.lexists(DIRECTORY / "aside" / os.path.basename(self.path))

    def removal(self):
        yield
        _removal.remove(self._family, NAME, self.identity, os.geteuid(), _removal.Use[self._use])

    def forget(self):
        self.kind.remove(NAME)


def at_each_stop(family, use, orphan=False):
    """A new object each time, the removal of it, which stands before its next system call, and its stops from there."""
    for number in itertools.count(1, 2):  # there is one stop before each call, and one after it
        target = Target(family, use, orphan)
        with Stepped(target.removal()) as removal:
            stops = removal.stops()
            if sum(1 for _ in itertools.islice(stops, number)) < number:
                return
            yield target, removal, stops
        target.forget()


def finish(stops):
    for _ in stops:
        pass


# ---- it is killed ----


def killed(family, use):
    hidden = gone = 0
    for target, removal, _ in at_each_stop(family, use):
        removal.kill()
        if target.is_hidden():
            hidden += 1
            (found,) = leaks.inventory()
            assert (found.kind, found.name, found.identity) == (FAMILIES[family], NAME, target.identity)
            assert found.verdict == "unheld"
            assert found.reason.endswith("has taken its name: reap() gives that back")
            _reaper.reap() if hidden % 2 else _removal.give_back()
            assert target.now() == target.identity
        assert target.now() in (target.identity, None)
        assert not target.is_hidden()
        gone += target.now() is None
    assert hidden > 0
    assert gone > 0


def killed_everywhere():
    for family, use in ("Semaphore", "OPEN"), ("SharedMemory", "OPEN"), ("SharedMemory", "NONE"):
        killed(family, use)


def test_what_a_killed_removal_has_hidden_gets_its_name_back():
    run_privately(killed_everywhere)


def meets_rivals():
    for use, lives in itertools.product(USES, (0, 2)):
        meets_a_rival(use, lives)


def meets_a_rival(use, lives):
    """Before each call another object takes the name; the removal is killed `lives` stops after it has taken that."""
    hidden = 0
    for target, removal, stops in at_each_stop("SharedMemory", use):
        rival = None
        if target.now() == target.identity:
            target.forget()
            target.make()
            rival = target.now()
        hidden_for = 0
        for _ in stops:
            hidden_for += target.is_hidden()
            if hidden_for > lives:
                removal.kill()
                break
        _reaper.reap()
        if rival is not None:
            assert target.now() == rival
            hidden += hidden_for > 0
    assert hidden > 0


def test_what_took_the_name_keeps_it_or_gets_it_back():
    run_privately(meets_rivals)


# ---- it goes on ----


def meets_sweeps():
    for use in USES:
        meets_a_sweep(use)


def meets_a_sweep(use):
    hidden = 0
    for target, _, stops in at_each_stop("SharedMemory", use):
        was_hidden = target.is_hidden()
        _reaper.reap()
        assert target.is_hidden() == was_hidden
        hidden += was_hidden
        finish(stops)
        assert target.now() is None
    assert hidden > 0


def test_no_sweep_gives_back_what_a_living_removal_has_hidden():
    run_privately(meets_sweeps)


def is_killed_beside_a_sweep():
    hidden = 0
    for target, removal, _ in at_each_stop("SharedMemory", "OPEN", orphan=True):
        hidden += target.is_hidden()
        _reaper.reap()
        removal.kill()
        _reaper.reap()
        assert target.now() is None
        assert not target.is_hidden()
    assert hidden > 0


def test_an_orphan_that_a_sweep_did_not_find_is_still_one_when_it_is_back():
    run_privately(is_killed_beside_a_sweep)


def meets_one_who_holds_it():
    target = Target("SharedMemory", "OPEN")
    holder = target.kind.type(NAME)
    with Stepped(target.removal()) as removal:
        for _ in removal.stops():
            assert target.now() == target.identity
    target.kind.close_handle(holder)


def test_the_name_of_what_is_held_is_never_taken():
    run_privately(meets_one_who_holds_it)


def open_it(target, answer, question):
    try:
        descriptor = os.open(target.path, os.O_RDWR)
    except FileNotFoundError:
        os.write(answer, b"n")
        return
    os.write(answer, b"y")
    os.read(question, 1)
    os.write(answer, b"y" if os.fstat(descriptor).st_nlink else b"n")


def is_waiting(pid):
    """Does it sleep, or has it ended?"""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] in "SDZ"


def meets_one_who_opens_it():
    opened = 0
    for target, _, stops in at_each_stop("SharedMemory", "OPEN"):
        (answers, answer), (questions, question) = os.pipe(), os.pipe()
        opener = os.fork()
        if opener == 0:
            open_it(target, answer, questions)
            os._exit(0)
        wait_until(lambda opener=opener: is_waiting(opener))
        finish(stops)
        has_it = os.read(answers, 1) == b"y"
        if has_it:
            os.write(question, b"?")
            assert os.read(answers, 1) == b"y", "what somebody had opened by its name was unlinked"
            assert target.now() == target.identity
            opened += 1
        os.waitpid(opener, 0)
        for descriptor in answers, answer, questions, question:
            os.close(descriptor)
    assert opened > 0


def test_who_opens_it_before_its_name_is_taken_has_it():
    run_privately(meets_one_who_opens_it)


# ---- there is no room to put it aside ----


def remove_without_an_inode(family, use):
    mount_shm("nr_inodes=8")
    target = Target(family, use)
    holder = os.open(target.path, os.O_RDONLY)
    with contextlib.suppress(OSError):
        for number in itertools.count():
            Path(f"/dev/shm/ballast-{number}").touch()
    if use == "OPEN":
        assert removed(family, target, use) == _removal.KEPT
    os.close(holder)
    assert removed(family, target, use) == _removal.REMOVED
    assert removed(family, target, use) == _removal.GONE
    assert not DIRECTORY.exists()


def removed(family, target, use):
    return _removal.remove(FAMILIES[family], NAME, target.identity, os.geteuid(), _removal.Use[use])


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_fills_dev_shm_can_be_removed_without_an_inode(family, use):
    run_privately(remove_without_an_inode, family, use)
