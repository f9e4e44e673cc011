"""Mounts and queues of a process's own."""

from __future__ import annotations

import ctypes
import os

from stress.forks import fork, wait_for
from stress.scenario import Context

_CLONE_NEWNS, _CLONE_NEWIPC = 0x00020000, 0x08000000
_MS_REC, _MS_PRIVATE = 1 << 14, 1 << 18


def why_not_private(context: Context) -> list[str]:
    """What the system says when a process of ours asks for mounts and queues of its own; empty if it may have them."""
    reader, writer = os.pipe()

    def try_it() -> None:
        try:
            enter_private_namespaces()
        except OSError as error:
            os.write(writer, f"tmpfs bytes, tmpfs inodes, number of queues: {error}".encode())

    wait_for(context, fork(context, try_it))
    os.close(writer)
    with open(reader) as file:
        return [line for line in [file.read()] if line]


def enter_private_namespaces() -> None:
    """Mounts and queues of this process's own, for good."""
    library = ctypes.CDLL(None, use_errno=True)
    steps = (
        lambda: library.unshare(_CLONE_NEWNS | _CLONE_NEWIPC),
        lambda: library.mount(None, b"/", None, _MS_REC | _MS_PRIVATE, None),
        lambda: library.mount(b"none", b"/dev/shm", b"tmpfs", 0, b"size=64k,nr_inodes=20"),
    )
    for step in steps:
        if step() < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
