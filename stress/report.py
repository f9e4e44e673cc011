"""The summary at the end: a table, what was violated with the command that repeats it, and how far to trust it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from stress.result import FAILED, INTERRUPTED, PASSED, SKIPPED, Result, percentiles, together

COLUMNS = ("", "scenario", "method", "outcome", "seconds", "operations", "per second", "errors met")


def summary(results: list[Result]) -> str:
    """Everything to be read, as text."""
    totals = together(results)
    parts = [_table(COLUMNS, [_row(total) for total in totals]), _times(totals), _tallies(totals), _notes(totals)]
    parts += [_failure(result) for result in results if result.status == FAILED]
    parts.append(_verdict(results))
    return "\n\n".join(part for part in parts if part)


def write_json(path: str, results: list[Result]) -> None:
    Path(path).write_text(json.dumps([result.as_json() for result in results], indent=1))


def exit_status(results: list[Result], stopped: int = 0) -> int:
    """0 only when every invariant held; when a signal cut it short and nothing had failed, as shells have it."""
    if any(result.status == FAILED for result in results):
        return 1
    return 128 + stopped if stopped else 0


def seconds_as_text(seconds: float) -> str:
    return f"{seconds * 1000:.1f} ms" if seconds < 10 else f"{seconds:.1f} s"


def _row(result: Result) -> list[str]:
    return [
        str(result.number),
        result.scenario,
        result.method,
        result.status,
        f"{result.seconds:.1f}",
        f"{result.operations:,} {result.unit}",
        f"{result.per_second:,.0f}",
        ", ".join(f"{number:,} {what}" for what, number in sorted(result.errors.items())) or "none",
    ]


def _times(results: list[Result]) -> str:
    rows = []
    for result in results:
        for what, seconds in sorted(result.took.items()):
            times = percentiles(seconds)
            figures = [seconds_as_text(times[each]) for each in ("p50", "p99", "max")]
            rows.append([result.scenario, result.method, what, f"{times['count']:,}", *figures])
    return _table(("scenario", "method", "time of", "times", "p50", "p99", "max"), rows) if rows else ""


def _tallies(results: list[Result]) -> str:
    rows = [
        [result.scenario, result.method, what, f"{number:,}"]
        for result in results
        for what, number in sorted((result.tally + result.done).items())
        if what != result.unit
    ]
    return _table(("scenario", "method", "of these", "number"), rows) if rows else ""


def _notes(results: list[Result]) -> str:
    return "\n".join(f"{result.scenario} [{result.method}]: {note}" for result in results for note in result.notes)


def _failure(result: Result) -> str:
    lines = [f"FAILED: {result.scenario} [{result.method}]", f"  invariant: {result.invariant}"]
    for violation in result.violations:
        lines.append("  violated: " + violation.strip().replace("\n", "\n    "))
    if result.more_violations:
        lines.append(f"  and {result.more_violations} more")
    if result.stderr.strip():
        lines.append("  on its standard error:\n    " + "\n    ".join(result.stderr.strip().splitlines()[-20:]))
    lines += [f"  seed: {result.seed}", f"  again: {result.command}"]
    return "\n".join(lines)


def verdict(results: list[Result]) -> str:
    """In a few words. That every invariant held says only a run of which nothing failed and all was done."""
    some = {result.status for result in results}
    if FAILED in some:
        return "Not every invariant held"
    if any(result.interrupted for result in results):
        return "Interrupted: every invariant held until then"
    if PASSED not in some:
        return "Nothing was checked"
    skipped = sum(result.status == SKIPPED for result in results)
    return f"Every invariant held, but {skipped} skipped" if skipped else "Every invariant held"


def _verdict(results: list[Result]) -> str:
    of = {
        status: [each for each in results if each.status == status] for status in (PASSED, FAILED, SKIPPED, INTERRUPTED)
    }
    counts = ", ".join(f"{len(some)} {status}" for status, some in of.items() if some)
    lines = [f"{counts or 'nothing was run'}."]
    lines += [f"skipped: {result.scenario} [{result.method}]: {result.reason}" for result in of[SKIPPED]]
    ran = [*of[PASSED], *of[FAILED], *of[INTERRUPTED]]
    if ran:
        seconds = sum(result.seconds for result in ran)
        operations = sum(result.done.total() for result in ran)
        lines.append(
            f"{verdict(results)}, in {seconds:,.0f} s and {operations:,} operations: "
            "a clean run gives confidence in proportion to how long it ran."
        )
    return "\n".join(lines)


def _table(columns: tuple[str, ...], rows: list[list[str]]) -> str:
    """By rich where it is installed."""
    try:
        return _rich_table(columns, rows)
    except ImportError:
        widths = [max(len(row[i]) for row in [list(columns), *rows]) for i in range(len(columns))]
        lines = [columns, ["-" * width for width in widths], *rows]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
        )


def _rich_table(columns: tuple[str, ...], rows: list[list[str]]) -> str:
    import rich.box
    import rich.console
    import rich.table

    table = rich.table.Table(*columns, box=rich.box.SIMPLE_HEAD)
    for row in rows:
        table.add_row(*map(_coloured, row))
    console: Any = rich.console.Console(width=160)
    with console.capture() as capture:
        console.print(table)
    return "\n".join(line.rstrip() for line in capture.get().splitlines() if line.strip())


def _coloured(cell: str) -> Any:
    import rich.text

    styles = {PASSED: "green", FAILED: "bold red", SKIPPED: "yellow", INTERRUPTED: "yellow"}
    return rich.text.Text(cell, style=styles.get(cell, ""))
