"""What there is to call."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from typing import Any

import posix_ipc

DUNDERS = ("__init__", "__enter__", "__exit__", "__reduce__")
SLOW = {"reap", "survey", "inventory", "find_leaks"}
"""They start an interpreter and look at all processes, if their arguments are right; so they are called less often."""


def public_modules() -> list[Any]:
    """The package and its public modules, whatever they are; but the pytest plugin, which pytest alone calls."""
    found = [each.name for each in pkgutil.iter_modules(posix_ipc.__path__) if not each.name.startswith("_")]
    names = [name for name in found if name != "pytest_plugin"]
    return [posix_ipc, *(importlib.import_module(f"{posix_ipc.__name__}.{name}") for name in names)]


def public_calls() -> Iterator[tuple[str, Any, str]]:
    """(path, owner, member) of each function, class, method and attribute that the modules say is public."""
    for module in public_modules():
        for name in module.__all__:
            public = getattr(module, name)
            if not callable(public):
                continue
            yield f"{module.__name__}.{name}", module, name
            if isinstance(public, type) and not issubclass(public, Exception) and not is_record(public):
                members = {each for base in public.__mro__[:-1] for each in vars(base) if not each.startswith("_")}
                for member in sorted(members | set(DUNDERS) & set(dir(public))):
                    yield f"{module.__name__}.{name}.{member}", public, member


def is_record(cls: type) -> bool:
    """Made by calls to be read; what it says of itself depends on what it was made of."""
    return issubclass(cls, tuple) or dataclasses.is_dataclass(cls)


def parameters_of(owner: Any, member: str) -> list[str]:
    """None for an attribute; some calls of types of C say nothing of theirs."""
    try:
        names = list(inspect.signature(getattr(owner, member)).parameters)
    except (TypeError, ValueError):
        return []
    return names[1:] if names[:1] == ["self"] else names
