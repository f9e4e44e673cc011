"""Whom we are measured beside: the original from PyPI, the standard library, and the same system calls made from C."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

from tests.original import original_directory

from .measure import Runner

RAW = ("semaphore_pair", "segment_life", "queue_pair", "semaphore_ping", "semaphore_echo", "queue_ping", "queue_echo")
BUILD = Path(__file__).parent.parent / "build"


@functools.cache
def original() -> ModuleType:
    """The original, installed into a directory of its own and loaded beside ours, which has the same name.

    Once only: the second time Python loads a module with a single-phase init into the one that has its name: ours.
    """
    (path,) = original_directory().glob("posix_ipc*.so")
    spec = importlib.util.spec_from_file_location("posix_ipc", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"cannot load {path}")
    ours = sys.modules[spec.name]
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.modules[spec.name] = ours  # a module with a single-phase init puts itself there
    return module


def raw() -> ctypes.CDLL:
    """raw.c, compiled here: each of its functions runs a loop and returns the nanoseconds it took."""
    source = Path(__file__).with_name("raw.c")
    library = BUILD / "raw.so"
    BUILD.mkdir(exist_ok=True)
    compiler = os.environ.get("CC", "cc")
    subprocess.run([compiler, "-O2", "-shared", "-fPIC", "-o", library, source, "-lrt", "-lpthread"], check=True)
    loaded = ctypes.CDLL(str(library))
    for function in RAW:
        getattr(loaded, function).restype = ctypes.c_double
    return loaded


def raw_runner(function: str, name: str, *args: int) -> Runner:
    """A contestant written in C: a function of raw.c on the objects of that name."""
    call = getattr(raw(), function)

    def run(count: int) -> float:
        nanoseconds = call(name.encode(), *(ctypes.c_long(arg) for arg in args), ctypes.c_long(count))
        if nanoseconds < 0:
            raise RuntimeError(f"{function} failed")
        return nanoseconds / 1e9

    return run
