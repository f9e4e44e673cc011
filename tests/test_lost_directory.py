"""The directory of journals is wiped, taken, out of sight, or there is no room: nothing is lost, nothing is left.

Each scenario is a function that runs in a /dev/shm of its own.
"""

import contextlib
import errno
import itertools
import os
import shutil
import stat
from pathlib import Path

import pytest
from lifetime import DIRECTORY, OPTIONS, belong_to_a_new_tree, die_after, existing, make
from stepping import Stepped, is_allowed
from support import (
    CLONE_NEWNS,
    NOBODY,
    enter_new_namespaces,
    mount_shm,
    open_fds,
    run_privately,
    set_namespace,
    skip,
    wait_until,
)

from posix_ipc import O_CREAT, _journal, _reaper, mp_integration

KINDS = list(OPTIONS)
BEFORE, AFTER = [(kind, "/before") for kind in KINDS], [(kind, "/after") for kind in KINDS]


def are_swept(objects):
    _reaper.reap()
    return not existing(objects)


# ---- wiped ----


def wiped():
    die_after(create_around_a_wipe)
    wait_until(lambda: are_swept(BEFORE + AFTER))
    wait_until(lambda: not os.listdir(DIRECTORY))  # the new tracker has ended


def create_around_a_wipe():
    for object_ in BEFORE:
        make(*object_).close()  # its record alone protects it
    shutil.rmtree(DIRECTORY)
    for object_ in AFTER:
        make(*object_).close()
    assert stat.S_IMODE(DIRECTORY.stat().st_mode) == 0o700
    assert _reaper.reap() == []
    assert existing(BEFORE + AFTER) == BEFORE + AFTER


@pytest.mark.slow
def test_g5_g10_a_wiped_directory_is_rebuilt_by_the_next_creation():
    run_privately(wiped)


def wiped_everywhere():
    """Before each call of a creation in turn: it succeeds, and the next one writes down what was lost of it."""
    deaths = 0
    for kind in KINDS:
        for stop in itertools.count(1, 2):
            wiped = False
            with Stepped(creating(kind)) as root:
                for number, _ in enumerate(root.stops(), 1):
                    if number == stop and not existing([(kind, "/wiped")]):
                        shutil.rmtree(DIRECTORY, ignore_errors=True)
                        wiped = True
                assert existing([(kind, "/wiped")]), f"{kind}: wiped at stop {stop}"
            left = [(kind, "/wiped"), ("SharedMemory", "/next")]
            wait_until(lambda left=left: are_swept(left))
            if not wiped:
                break
            deaths += 1
    print(deaths)


def creating(kind):
    tracker = belong_to_a_new_tree()
    yield
    made = make(kind, "/wiped"), make("SharedMemory", "/next")
    del made, tracker


@pytest.mark.slow
@pytest.mark.skipif(not is_allowed(), reason="needs ptrace")
def test_g2_the_directory_is_wiped_at_every_system_call_of_a_creation():
    assert int(run_privately(wiped_everywhere)) > 20


# ---- taken ----


def take_as_nobody():
    DIRECTORY.mkdir(mode=0o700)
    os.chown(DIRECTORY, NOBODY, NOBODY)


def take_with_a_link():
    Path("/dev/shm/elsewhere").mkdir(mode=0o700)
    DIRECTORY.symlink_to("/dev/shm/elsewhere")


def take_with_another_mode():
    DIRECTORY.mkdir()
    DIRECTORY.chmod(0o777)


TAKEN = {
    "of another user": take_as_nobody,
    "a link": take_with_a_link,
    "a file": DIRECTORY.touch,
    "open to all": take_with_another_mode,
}


def taken(how):
    try:
        TAKEN[how]()
    except PermissionError:
        skip("needs another user")
    before = os.lstat(DIRECTORY)
    die_after(lambda: [make(*object_) for object_ in BEFORE])
    die_after(lambda: [make(*object_) for object_ in AFTER])
    (other,) = map(Path, _journal.directories())
    assert other.name.startswith(DIRECTORY.name + ".")
    assert stat.S_IMODE(other.stat().st_mode) == 0o700
    assert len(_reaper.reap()) == 6
    assert not existing(BEFORE + AFTER)
    assert not list(other.iterdir())
    assert os.lstat(DIRECTORY) == before
    if DIRECTORY.is_dir():
        assert not list(DIRECTORY.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("how", TAKEN)
def test_g11_a_directory_that_is_not_ours_alone_is_not_used(how):
    run_privately(taken, how)


# ---- out of sight ----


def see_another_shm():
    """Enter a mount namespace with a /dev/shm of its own, make something there, come back, and make something more."""
    here = os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    for object_ in BEFORE:
        make(*object_).close()
    (journal,) = DIRECTORY.glob("*.root")
    said = journal.read_bytes()
    enter_new_namespaces(CLONE_NEWNS)
    mount_shm()
    for object_ in AFTER:
        make(*object_).close()
    assert _reaper.reap() == []
    assert existing(AFTER) == AFTER
    set_namespace(here)
    assert journal.read_bytes() == said
    for kind in KINDS:
        make(kind, "/back").close()
    assert list(DIRECTORY.glob("*.root")) == [journal]
    assert not list(DIRECTORY.glob("*.j*"))


def out_of_sight():
    die_after(see_another_shm)
    back = [(kind, "/back") for kind in KINDS]
    wait_until(lambda: are_swept(BEFORE + back))
    wait_until(lambda: not existing(AFTER))  # the queue: the tracker that was started there sees to it


@pytest.mark.slow
def test_g1_another_dev_shm_is_no_reason_to_forget_what_is_in_this_one():
    run_privately(out_of_sight)


# ---- full ----


def fill(number):
    """Use up the bytes, or the inodes, of /dev/shm; to be called with `fill.end()`."""
    ballast = Path("/dev/shm/ballast")
    ballast.mkdir()
    with contextlib.suppress(OSError):
        for i in itertools.count():
            with open(ballast / str(i), "wb") as file:
                if number == "bytes":
                    while True:
                        file.write(bytes(4096))
                        file.flush()


def held():
    with open("/proc/self/maps") as maps:
        return open_fds(), sum("/dev/shm" in line for line in maps), sorted(os.listdir("/dev/shm"))


def recorded():
    processes = _journal.existing()
    if not processes:
        return []
    with open(processes[0].journals[0].path, "rb") as file:
        return _journal.read(file.fileno()).entries


FULL = {"bytes": "size=1m", "inodes": "nr_inodes=30"}
NEEDS_ROOM = {  # to be created when there is a journal
    "bytes": [("Semaphore", {}), ("SharedMemory", {"reserve": True})],
    "inodes": [("Semaphore", {}), ("SharedMemory", {})],
}


def full(what, first):
    mount_shm(FULL[what])
    cases = [(kind, {}) for kind in KINDS] if first else NEEDS_ROOM[what]
    tracker = None
    if not first:
        tracker = belong_to_a_new_tree()
        make("Semaphore", "/earlier").unlink()
    _journal.directory()
    fill(what)
    for kind, options in cases:
        before, records = held(), recorded()
        with pytest.raises(OSError, match="No space left on device") as caught:
            make(kind, "/new", **options)
        assert caught.value.errno == errno.ENOSPC
        del caught
        assert held() == before
        assert recorded() == records
        assert not existing([(kind, "/new")])
    shutil.rmtree("/dev/shm/ballast")
    for kind, options in cases:
        make(kind, "/new", **options).unlink()
    del tracker


@pytest.mark.slow
@pytest.mark.parametrize("what", FULL)
@pytest.mark.parametrize("first", [True, False], ids=["no journal yet", "a journal"])
def test_g2_full(what, first):
    run_privately(full, what, first)


def attach_when_full(what):
    mount_shm(FULL[what])
    die_after(lambda: [make(*object_) for object_ in BEFORE])
    fill(what)
    before = sorted(os.listdir(DIRECTORY))
    for kind, name in BEFORE:
        getattr(mp_integration, kind)(name, O_CREAT, **OPTIONS[kind]).close()
    assert sorted(os.listdir(DIRECTORY)) == before
    assert _journal.existing() == []


@pytest.mark.slow
@pytest.mark.parametrize("what", FULL)
def test_what_exists_needs_no_room_to_be_opened_by_o_creat(what):
    run_privately(attach_when_full, what)


def sweep_when_full(what):
    """What fills /dev/shm must not keep the dead from being removed, which would make room."""
    mount_shm(FULL[what])
    die_after(lambda: [make(*object_) for object_ in BEFORE])
    fill(what)
    assert len(_reaper.reap()) == 3
    assert not existing(BEFORE)


@pytest.mark.slow
@pytest.mark.parametrize("what", FULL)
def test_g3_the_dead_are_removed_from_a_full_file_system(what):
    run_privately(sweep_when_full, what)
