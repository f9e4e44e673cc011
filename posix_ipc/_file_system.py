"""Does the file system at /dev/shm do what tracking stands on?

tmpfs does. Another one has to show it at the first creation of each process: on overlayfs, for one, a mapping does not
keep the lock of its file, so that every owner would be taken for dead, and what lives removed.
"""

from __future__ import annotations

import errno
import os

from posix_ipc import _ext


def test(mounted: str, journal: str) -> None:
    """Raise OSError if tracking cannot work there. `journal` is the path of one that this process has just made."""
    if _ext._is_tmpfs(mounted):
        return
    if not _ext._is_locked(journal):
        raise _refusal(mounted, "a mapping does not keep the lock of its file")
    if not _renames_without_replacing(f"{journal}.test"):
        raise _refusal(mounted, "it cannot rename without replacing")


def _renames_without_replacing(path: str) -> bool:
    os.close(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o600))
    renamed = f"{path}ed"
    try:
        _ext._rename_noreplace(path, renamed)
    except OSError as error:
        os.unlink(path)
        if error.errno in (errno.EINVAL, errno.ENOSYS):  # of the file system, of the kernel
            return False
        raise
    os.unlink(renamed)
    return True


def _refusal(mounted: str, why: str) -> OSError:
    text = f"tracked objects need a tmpfs (mount -t tmpfs tmpfs {mounted}): {why}"
    return OSError(errno.EOPNOTSUPP, text, mounted)
