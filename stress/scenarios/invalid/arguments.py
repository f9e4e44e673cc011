"""Wrong arguments, and some that are right."""

from __future__ import annotations

import math
import random
from typing import Any

import posix_ipc
from stress.scenario import Context

MOST_BYTES = 1 << 20
LONG_END = "é" * 120


class Refused(Exception):
    """What an argument raises by itself."""


class Unhelpful:
    """Raises whatever it is asked for."""

    def _fail(self, *args: object) -> Any:
        raise Refused

    __index__ = __int__ = __float__ = __bool__ = __len__ = __fspath__ = __str__ = __bytes__ = _fail  # type: ignore[assignment]


class Misleading:
    """Gives answers of the wrong type."""

    def __index__(self) -> Any:
        return "1"

    __float__ = __bool__ = __index__


def arguments_for(
    context: Context, choose: random.Random, parameters: list[str], near: list[Any]
) -> tuple[list[Any], dict[str, Any]]:
    """Of about the right number, by position and by name; any of them may even be a good one."""
    number = max(0, len(parameters) + choose.choice((-1, 0, 0, 0, 1)))
    positional = [value(context, choose, near) for _ in range(choose.randint(0, number))]
    keywords = {each: value(context, choose, near) for each in parameters[len(positional) :] if choose.random() < 0.6}
    if choose.random() < 0.05:
        keywords[choose.choice(("nonsense", "", "self", "größe"))] = None
    return positional, keywords


def value(context: Context, choose: random.Random, near: list[Any]) -> Any:
    kind = choose.choice((names, numbers, numbers, buffers, oddities, lambda *_: choose.choice(near)))
    return kind(context, choose)


def all_names(prefix: str) -> list[str]:
    """Every one that is legal; with the prefix of this run, so that nobody else's object is met."""
    return [f"{prefix}{number}{end}" for number in range(4) for end in ("", LONG_END)]


def names(context: Context, choose: random.Random) -> Any:
    good = choose.choice(all_names(context.prefix))
    end = choose.choice(("", "", "\0", "/x", "x" * 300, "\ud800"))
    return choose.choice(
        (good, good + end, (good + end).encode(errors="surrogatepass"), "", b"", "/", "\0", "/" + "\0" * 9)
    )


def numbers(context: Context, choose: random.Random) -> Any:
    small = (0, 1, 2, 8, 64, 0o600, posix_ipc.O_CREAT, posix_ipc.O_CREX, posix_ipc.O_CREX | posix_ipc.O_NONBLOCK)
    large = tuple(sign * (1 << bits) + by for bits in (31, 32, 63, 64, 100) for sign in (-1, 1) for by in (-1, 0, 1))
    strange = (-1, 0.0, -0.1, 0.001, 1e300, math.inf, -math.inf, math.nan, True, False, 1j, "1", b"1")
    return choose.choice(choose.choice((small, large, strange)))


def buffers(context: Context, choose: random.Random) -> Any:
    size = choose.choice((0, 1, 7, 8, 9, 64, 10_000))
    released = memoryview(b"released")
    released.release()
    return choose.choice(
        (
            b"x" * size,
            bytearray(size),
            "x" * size,
            memoryview(bytes(size)),
            memoryview(bytearray(2 * size))[::2],
            released,
        )
    )


def oddities(context: Context, choose: random.Random) -> Any:
    """A number of a signal is none of them: those that are asked for here must not arrive."""
    return choose.choice(
        (
            None,
            None,
            [],
            (),
            {},
            object(),
            Unhelpful(),
            Misleading(),
            int,
            print,
            (print, 1),
            (len, "x"),
            (1, 2),
            Refused(),
        )
    )
