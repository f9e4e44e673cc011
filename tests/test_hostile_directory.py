"""The directory of journals is damaged, wiped, taken by somebody else or full: nothing is followed, nothing is fatal.

Each scenario is a function that runs in a /dev/shm of its own.
"""

import errno
import os
import random
import socket
import struct
from pathlib import Path

import pytest
from lifetime import BY_NAME, DIRECTORY, OPTIONS, belong_to_a_new_tree, die_after, existing, make
from support import NOBODY, become_nobody, run_forked, run_privately, skip

import posix_ipc
from posix_ipc import _ext, _journal, _reaper

KINDS = list(OPTIONS)
TOKEN = "999999999-1-1"  # of a process that there is not


def sweep():
    """What was removed, and what was logged about the files that were not understood."""
    lines = []
    removed = _reaper.reap(lines.append)
    return removed, [line for line in lines if "skipped" in line]


def leave(*objects):
    """A process of another tree dies, which owned them."""
    die_after(lambda: [make(kind, name) for kind, name in objects])


def die_and_find_journal(*objects):
    before = {*DIRECTORY.glob("*.root")}
    leave(*objects)
    (path,) = {*DIRECTORY.glob("*.root")} - before
    return path


def journal_bytes():
    """What a dead journal contains, which is gone then."""
    content = die_and_find_journal(("SharedMemory", "/sample")).read_bytes()
    sweep()
    return content


VICTIM = Path("/dev/shm/victim")
SLOT = 288  # bytes, and where the first one begins


def with_slot(offset, value):
    content = bytearray(journal_bytes())
    content[SLOT + offset : SLOT + offset + len(value)] = value
    return bytes(content)


# ---- files that are no journals ----


def write(path, content):
    path.write_bytes(content)
    path.chmod(0o600)


def symbolic_link(path):
    write(DIRECTORY / "other", journal_bytes())
    path.symlink_to("other")


def hard_link(path):
    write(DIRECTORY / "other", journal_bytes())
    os.link(DIRECTORY / "other", path)


def give_away(path):
    write(path, journal_bytes())
    os.chown(path, NOBODY, NOBODY)


def bind_socket(path):
    os.chdir(path.parent)
    socket.socket(socket.AF_UNIX).bind(path.name)


DAMAGE = {
    "truncated header": lambda path: write(path, journal_bytes()[:100]),
    "truncated slot": lambda path: write(path, journal_bytes()[: SLOT + 40]),
    "garbage": lambda path: write(path, random.Random(1).randbytes(3 * SLOT)),
    "another version": lambda path: write(path, journal_bytes().replace(b"pipcjrn\0\1", b"pipcjrn\0\2", 1)),
    "a kind that is none": lambda path: write(path, with_slot(1, b"x")),
    "a name without bytes": lambda path: write(path, with_slot(4, bytes(2))),
    "a name too long": lambda path: write(path, with_slot(4, b"\xff\xff")),
    "a name with a zero": lambda path: write(path, with_slot(33, b"\0")),
    "symbolic link": lambda path: path.symlink_to(VICTIM),
    "symbolic link to a journal": symbolic_link,
    "symbolic link to nothing": lambda path: path.symlink_to("nowhere"),
    "hard link": hard_link,
    "fifo": os.mkfifo,
    "directory": os.mkdir,
    "socket": bind_socket,
    "of another user": give_away,
}


def stand_among_journals():
    tracker = belong_to_a_new_tree()
    live = make("SharedMemory", "/live")
    orphan = [("SharedMemory", "/orphan")]
    for role in ("root", "j0123456789abcdef"):
        for name, damage in DAMAGE.items():
            case = f"{name}, {role}"
            path = DIRECTORY / f"{TOKEN}.{role}"
            VICTIM.write_bytes(b"untouched")
            try:
                damage(path)
            except OSError as error:
                if error.errno != errno.EPERM:
                    raise
                path.unlink()  # nobody to give it to: no root, or a namespace of one user
                continue
            leave(*orphan)
            removed, skipped = sweep()
            assert [(each.kind, each.name) for each in removed] == [("shared_memory", "/orphan")], case
            assert not existing(orphan), case
            assert len(skipped) == 1, case
            assert str(path) in skipped[0], case
            assert os.path.lexists(path), case
            assert VICTIM.read_bytes() == b"untouched", case
            remove(path)
            remove(DIRECTORY / "other")
    assert sweep() == ([], [])
    assert existing([("SharedMemory", "/live")])
    del live, tracker


def remove(path):
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    else:
        path.unlink(missing_ok=True)


@pytest.mark.slow
def test_g11_a_file_that_is_no_journal_is_skipped_with_one_line():
    run_privately(stand_among_journals)


def read_garbage():
    """A journal with some bytes of its slots replaced, 500 times: it may be understood or not."""
    tracker = belong_to_a_new_tree()
    live = [make(kind, "/live") for kind in KINDS]
    objects = [(kind, "/orphan") for kind in KINDS]
    path = die_and_find_journal(*objects)
    content = path.read_bytes()
    generator = random.Random(4)
    for _ in range(500):
        damaged = bytearray(content)
        for _ in range(generator.randrange(1, 6)):
            damaged[generator.randrange(SLOT, SLOT * 4)] = generator.choice(
                [0, 1, 2, 3, 47, 255, generator.randrange(256)]
            )
        write(path, damaged)
        sweep()
        assert existing([(kind, "/live") for kind in KINDS])
    write(path, content)
    sweep()
    assert not existing(objects)
    assert not path.exists()
    del live, tracker


@pytest.mark.slow
def test_g11_garbage_in_a_journal_is_never_fatal():
    run_privately(read_garbage)


def record_what_is_not_ours():
    """A journal may say what it likes: what belongs to somebody else, or is another object, stays."""
    stranger = posix_ipc.SharedMemory("/orphan", posix_ipc.O_CREX, size=8)
    try:
        os.fchown(stranger.fd, NOBODY, NOBODY)
    except OSError:
        skip("needs another user to give a segment to")
    path = die_and_find_journal(("SharedMemory", "/sample"))
    facts = _ext._facts(stranger.fd)
    slot = struct.pack("=BBBxHxxQQQ", _journal.OWNED, ord("m"), 0, len("/orphan"), *facts[:3]) + b"/orphan"
    content = bytearray(path.read_bytes())
    content[SLOT : SLOT + len(slot)] = slot
    write(path, content)
    stranger.close_fd()
    assert sweep() == ([], [])
    assert existing([("SharedMemory", "/orphan")])


@pytest.mark.slow
def test_g11_what_belongs_to_another_user_is_never_removed():
    run_privately(record_what_is_not_ours)


def read_as_nobody():
    """Where the user cannot even read the file: only a privileged one can have put it there."""
    directory = Path(f"/dev/shm/.posix_ipc-{NOBODY}")
    directory.mkdir(mode=0o700)
    path = directory / f"{TOKEN}.j0123456789abcdef"
    write(path, b"secret")
    os.chown(directory, NOBODY, NOBODY)
    become_nobody()
    orphan = [("SharedMemory", "/orphan")]
    leave(*orphan)
    removed, skipped = sweep()
    assert len(removed) == 1
    assert not existing(orphan)
    assert len(skipped) == 1
    assert str(path) in skipped[0]


def lose_a_name_to_another_user():
    """Who may not even open the object that has the name by now: nothing is owed, the journal goes."""
    objects = [("SharedMemory", "/orphan"), ("Semaphore", "/orphan")]
    run_forked(leave_as_nobody, objects)
    for kind, name in objects:
        BY_NAME[kind].remove(name)
        BY_NAME[kind].create(name)
    run_forked(sweep_as_nobody)
    assert existing(objects) == objects


def leave_as_nobody(objects):
    become_nobody()
    leave(*objects)


def sweep_as_nobody():
    become_nobody()
    assert sweep() == ([], [])
    assert not os.listdir(_journal.directory())


@pytest.mark.slow
@pytest.mark.parametrize("scenario", [read_as_nobody, lose_a_name_to_another_user])
def test_g6_g11_what_cannot_be_read_because_it_is_another_users_is_left_alone(scenario):
    if os.getuid() != 0:
        pytest.skip("needs root, to become another user")
    run_privately(scenario)
