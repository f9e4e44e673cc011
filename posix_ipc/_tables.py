"""Text for a terminal or a file: tables that fit, paragraphs, and colour where it is wanted.

What is shown is laid out here, so that it reads the same everywhere; rich, where it is installed, only paints it.
"""

from __future__ import annotations

import os
import shlex
import shutil
import string
import sys
import textwrap
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from rich.console import Console


class Span(NamedTuple):
    """A piece of a line, in one of STYLES."""

    text: str
    style: str = ""


Line = Sequence[Span]

STYLES = {
    "": "",
    "heading": "bold",
    "quiet": "dim",
    "live": "green",
    "orphan": "bold red",
    "unheld": "yellow",
    "unknown": "magenta",
    "good": "green",
    "attention": "bold yellow",
}


@dataclass(frozen=True)
class Column:
    """A column of a table. Where room is short, those with the highest `rank` are left out first, never rank 0."""

    heading: str
    rank: int = 0
    least: int | None = None
    """How narrow it may get; None: as wide as its widest cell."""
    right: bool = False


GAP = 2

# ---- output ----


class Output:
    """A stream, plain."""

    def __init__(self, file: IO[str]) -> None:
        self.file = file
        self.is_terminal = file.isatty()

    @property
    def width(self) -> int | None:
        """Of a line; None: what goes to a file is not cut, unless COLUMNS says so."""
        if self.is_terminal or os.environ.get("COLUMNS", "").isdigit():
            return max(shutil.get_terminal_size().columns, 1)
        return None

    def print(self, lines: Iterable[Line]) -> None:
        self.file.write("".join(f"{line}\n" for line in self.paint(lines)))
        self.file.flush()

    def paint(self, lines: Iterable[Line]) -> list[str]:
        return ["".join(span.text for span in line).rstrip() for line in lines]


class ColourOutput(Output):
    """A terminal, painted by rich."""

    def __init__(self, console: Console) -> None:
        super().__init__(console.file)
        self._console = console

    @property
    def width(self) -> int:
        return self._console.width

    def print(self, lines: Iterable[Line]) -> None:
        from rich.text import Text

        text = Text("\n").join(Text.assemble(*((span.text, STYLES[span.style]) for span in line)) for line in lines)
        self._console.print(text, no_wrap=True, overflow="ignore", crop=False, soft_wrap=True)

    def paint(self, lines: Iterable[Line]) -> list[str]:
        with self._console.capture() as captured:
            self.print(lines)
        return captured.get().splitlines()


def standard_output() -> Output:
    """Painted on a terminal, if rich is there and NO_COLOR is not."""
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    if sys.stdout.isatty() and not os.environ.get("NO_COLOR"):
        try:
            from rich.console import Console
        except ImportError:
            pass
        else:
            return ColourOutput(Console())
    return Output(sys.stdout)


# ---- layout ----


def table(columns: Sequence[Column], rows: Sequence[Sequence[Span]], width: int | None) -> list[Line]:
    """Lay out a table, each row with a cell for each column: no line is wider than `width`."""
    natural = [
        max(cells(text) for text in (column.heading, *(row[i].text for row in rows)))
        for i, column in enumerate(columns)
    ]
    widths = _fit(columns, natural, width)
    heading = [Span(column.heading, "heading") for column in columns]
    return [_row(row, columns, widths) for row in (heading, *rows)]


def _fit(columns: Sequence[Column], natural: list[int], width: int | None) -> dict[int, int]:
    """How wide each column is for which there is room."""
    shown = dict(enumerate(natural))
    while width is not None:
        excess = sum(shown.values()) + GAP * (len(shown) - 1) - width
        last = max(shown, key=lambda i: (columns[i].rank, shown[i]))
        for i in sorted(shown, key=lambda i: -columns[i].rank):
            least = 1 if i == last and not columns[last].rank else columns[i].least or shown[i]
            cut = max(min(excess, shown[i] - least), 0)
            shown[i] -= cut
            excess -= cut
        if excess <= 0 or columns[last].rank == 0:
            break
        shown = {i: natural[i] for i in shown if i != last}
    return shown


def _row(row: Sequence[Span], columns: Sequence[Column], widths: dict[int, int]) -> Line:
    spans: list[Span] = []
    for i, width in widths.items():
        if spans:
            spans.append(Span(" " * GAP))
        text = shorten(row[i].text, width)
        room = Span(" " * (width - cells(text)))
        painted = Span(text, row[i].style)
        spans += [room, painted] if columns[i].right else [painted, room]
    return spans


def paragraph(
    text: str, width: int | None, indent: str = "", first: str | None = None, break_words: bool = True
) -> list[Line]:
    """Break a text into lines; `first` is what the first begins with instead of `indent`."""
    if width is None:
        width = 100
    lines = textwrap.wrap(
        text,
        max(width, len(indent) + 20),
        initial_indent=indent if first is None else first,
        subsequent_indent=indent,
        break_on_hyphens=False,
        break_long_words=break_words,
    )
    return [[Span(line)] for line in lines]


def cells(text: str) -> int:
    """How many columns of a terminal a text takes."""
    return sum(map(_cells_of, text))


def _cells_of(character: str) -> int:
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def shorten(text: str, width: int) -> str:
    """What fits, with a mark if that is not all."""
    used, end = 0, None
    for i, character in enumerate(text):
        used += _cells_of(character)
        if end is None and used >= width:
            end = i
        if used > width:
            return f"{text[:end]}…"
    return text


# ---- words ----


def printable(text: str) -> str:
    """A name as it can be shown: what would steer a terminal, or is no text, is escaped as Python does it.

    So are backslashes: no two names look the same.
    """
    readable = os.fsencode(text).replace(b"\\", rb"\\").decode(errors="backslashreplace")
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in readable)


def shell_word(text: str) -> str:
    """A name as bash, zsh and ksh read it, without a blank at which a line could be broken."""
    if text.isprintable() and " " not in text:
        return shlex.quote(text)
    plain = string.ascii_letters + string.digits + string.punctuation.replace("\\", "").replace("'", "")
    return "$'" + "".join(chr(b) if chr(b) in plain else f"\\{b:03o}" for b in os.fsencode(text)) + "'"


def size_words(size: int) -> str:
    """A number of bytes, as lsipc(1) writes it: 64B, 4K, 1.5M."""
    if size < 1024:
        return f"{size}B"
    value = float(size)
    for unit in "KMGTPE":
        value /= 1024
        if value < 1023.95 or unit == "E":
            break
    return f"{value:.1f}".removesuffix(".0") + unit


def age_words(seconds: float) -> str:
    """How long ago, roughly."""
    seconds = max(seconds, 0)
    for limit, divisor, unit in ((60, 1, "s"), (3600, 60, "min"), (48 * 3600, 3600, "h")):
        if seconds < limit:
            return f"{int(seconds // divisor)} {unit}"
    return f"{int(seconds // 86400)} d"


def permission_words(mode: int | None) -> str:
    """rw-r-----"""
    if mode is None:
        return "not known"
    return "".join(letter if mode >> (8 - i) & 1 else "-" for i, letter in enumerate("rwxrwxrwx"))
