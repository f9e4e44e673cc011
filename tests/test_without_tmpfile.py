"""Where /dev/shm makes no files without a name (O_TMPFILE), as some file systems and old kernels do not.

The kernel refuses it by a seccomp filter, for one process and its children: see seccomp(2).
"""

import ctypes
import errno
import itertools
import os
import platform
import struct
import sys

import pytest
from lifetime import DIRECTORY, belong_to_a_new_tree, existing, make
from stepping import Stepped, is_allowed
from support import run_privately, skip

import posix_ipc
from posix_ipc import _reaper

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="tracking is for Linux"),
    pytest.mark.slow,
]

FILES = ["Semaphore", "SharedMemory"]
_OPENAT = {"x86_64": 257, "aarch64": 56, "riscv64": 56}.get(platform.machine())
_NO_NEW_PRIVILEGES, _SET_SECCOMP, _FILTER = 38, 22, 2
_LOAD, _JUMP_IF_EQUAL, _JUMP_IF_SET, _RETURN = 0x20, 0x15, 0x45, 0x06
_ALLOW, _REFUSE = 0x7FFF0000, 0x00050000


def refuse_tmpfile():
    """For good, in this process."""
    if _OPENAT is None:
        skip("the number of openat(2) is not known here")
    flags_argument = 16 + 2 * 8 + (4 if sys.byteorder == "big" else 0)  # struct seccomp_data
    program = [
        (_LOAD, 0, 0, 0),
        (_JUMP_IF_EQUAL, 0, 3, _OPENAT),
        (_LOAD, 0, 0, flags_argument),
        (_JUMP_IF_SET, 0, 1, os.O_TMPFILE & ~os.O_DIRECTORY),
        (_RETURN, 0, 0, _REFUSE | errno.EOPNOTSUPP),
        (_RETURN, 0, 0, _ALLOW),
    ]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *each) for each in program))
    head = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(program), ctypes.addressof(code)))
    library = ctypes.CDLL(None, use_errno=True)
    if library.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0) < 0 or library.prctl(_SET_SECCOMP, _FILTER, head, 0, 0) < 0:
        skip(f"prctl: {os.strerror(ctypes.get_errno())}")
    with pytest.raises(OSError, match="not supported"):
        os.open("/dev/shm", os.O_TMPFILE | os.O_RDWR)


def in_shm():
    return sorted(set(os.listdir("/dev/shm")) - {DIRECTORY.name})


def make_each():
    refuse_tmpfile()
    tracker = belong_to_a_new_tree()
    plain = posix_ipc.Semaphore("/plain", posix_ipc.O_CREX, initial_value=3)
    made = [make(kind, "/tracked") for kind in FILES]
    assert in_shm() == ["sem.plain", "sem.tracked", "tracked"]
    for kind in FILES:
        with pytest.raises(posix_ipc.ExistentialError):
            make(kind, "/tracked")
    with pytest.raises(posix_ipc.ExistentialError):
        posix_ipc.Semaphore("/plain", posix_ipc.O_CREX)
    assert in_shm() == ["sem.plain", "sem.tracked", "tracked"]
    assert [locks_of(f"/dev/shm/{name}") for name in in_shm()] == [0, 1, 1]  # a plain one has no lease
    assert _reaper.reap() == []
    for each in [plain, *made]:
        each.unlink()
    del tracker


def locks_of(path):
    with open("/proc/locks") as locks:
        return sum(line.split()[5].endswith(f":{os.stat(path).st_ino}") for line in locks)


def test_objects_are_made_without_tmpfile_too():
    run_privately(make_each)


def creating(make_one):
    refuse_tmpfile()
    tracker = belong_to_a_new_tree()
    yield
    made = make_one()
    del made, tracker


def make_plain():
    return posix_ipc.Semaphore("/made", posix_ipc.O_CREX)


def makers(kind):
    """Each stands one system call further in its creation, until one is done."""
    temporaries = 0
    for stop in itertools.count(1):
        with Stepped(creating(make_plain if kind == "plain" else lambda: make(kind, "/made"))) as maker:
            stops = maker.stops()
            if sum(1 for _ in itertools.islice(stops, stop)) < stop:
                break
            temporaries += any(name.startswith(".posix_ipc.tmp-") for name in in_shm())
            yield maker, stops
    assert temporaries > 3


def die_everywhere(kind):
    """A plain object that had got its name keeps that, and no other."""
    named = False
    for maker, _ in makers(kind):
        maker.kill()
        _reaper.reap()
        kept = kind == "plain" and existing([("Semaphore", "/made")])
        assert in_shm() == (["sem.made"] if kept else [])
        named |= bool(kept)
        if kept:
            posix_ipc.unlink_semaphore("/made")
    assert named == (kind == "plain")


def sweep_everywhere(kind):
    """What a sweep takes away before its maker has locked it is made once more."""
    file = "made" if kind == "SharedMemory" else "sem.made"
    for _, stops in makers(kind):
        assert _reaper.reap() == []
        for _ in stops:
            pass
        assert in_shm() == [file]
        os.unlink(f"/dev/shm/{file}")


@pytest.mark.no_sanitizer
@pytest.mark.skipif(not is_allowed(), reason="needs ptrace")
@pytest.mark.parametrize("kind", [*FILES, "plain"])
def test_g2_a_creation_without_tmpfile_that_is_killed_leaves_nothing(kind):
    run_privately(die_everywhere, kind)


@pytest.mark.no_sanitizer
@pytest.mark.skipif(not is_allowed(), reason="needs ptrace")
@pytest.mark.parametrize("kind", [*FILES, "plain"])
def test_a_sweep_does_not_disturb_a_creation_without_tmpfile(kind):
    run_privately(sweep_everywhere, kind)
