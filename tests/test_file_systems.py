"""What is mounted at /dev/shm: where the kernel does not do there what tracking stands on, a creation says so."""

import ctypes
import errno
import os
import platform
import sys
from pathlib import Path

import psutil
import pytest
from lifetime import OPTIONS, die_after, existing, in_a_worker, make, wait_until_gone
from support import forbid, run_privately, skip

import posix_ipc
from posix_ipc import _reaper, mp_integration

pytestmark = [pytest.mark.skipif(sys.platform != "linux", reason="tracking is for Linux"), pytest.mark.slow]

SHM = Path("/dev/shm")
MADE = [(kind, "/made") for kind in OPTIONS]
LEFT = [(kind, "/left") for kind in OPTIONS]


def mount(kind, options=""):
    library = ctypes.CDLL(None, use_errno=True)
    if library.mount(kind.encode(), bytes(SHM), kind.encode(), 0, options.encode()) < 0:
        skip(f"needs the right to mount {kind}: {os.strerror(ctypes.get_errno())}")
    SHM.chmod(0o1777)


def overlay():
    """As where a container or a chroot has nothing mounted at /dev/shm, but a directory of its image."""
    folders = [SHM / name for name in ("lower", "upper", "work")]
    for each in folders:
        each.mkdir()
    mount("overlay", "lowerdir={},upperdir={},workdir={}".format(*folders))


def without_renaming():
    """Some other file system, which cannot do it."""
    mount("ramfs")
    renameat2 = 316 if platform.machine() == "x86_64" else 276
    forbid(renameat2, errno.EINVAL)


UNFIT = {
    "overlay": (overlay, "a mapping does not keep the lock of its file"),
    "ramfs without renameat2": (without_renaming, "it cannot rename without replacing"),
}


def refuse(where):
    prepare, why = UNFIT[where]
    prepare()
    processes = psutil.pids()
    for kind, name in MADE:
        with pytest.raises(OSError, match=why) as caught:
            make(kind, name)
        assert (caught.value.errno, caught.value.filename) == (errno.EOPNOTSUPP, str(SHM))
        plain = getattr(posix_ipc, kind)(name, posix_ipc.O_CREX, **OPTIONS[kind])
        attached = getattr(mp_integration, kind).attach(name)
        with pytest.raises(OSError, match=why):
            attached.take_ownership()
        assert _reaper.reap() == []
        assert existing([(kind, name)])
        plain.unlink()
    assert psutil.pids() == processes
    assert [list(each.iterdir()) for each in SHM.glob(".posix_ipc-*")] == [[]]


@pytest.mark.parametrize("where", UNFIT)
def test_g5_tracking_is_refused_where_the_living_would_be_taken_for_dead_or_nothing_could_be_removed(where):
    run_privately(refuse, where)


def leave():
    for kind, name in LEFT:
        make(kind, name)


def track_on_ramfs():
    """Which tells no times of birth, either."""
    mount("ramfs")
    kept = [make(kind, name) for kind, name in MADE]
    in_a_worker(leave)
    wait_until_gone(LEFT)  # by the tracker
    die_after(leave)
    _reaper.reap()
    wait_until_gone(LEFT)
    assert existing(MADE) == MADE
    assert not list(SHM.glob(".posix_ipc-*/*.test*"))
    for each in kept:
        each.unlink()


def test_another_file_system_that_passes_the_test_will_do():
    run_privately(track_on_ramfs)
