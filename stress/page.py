"""The HTML report: one page that needs nothing else, with plots of rates, objects, descriptors and memory over time."""

from __future__ import annotations

import html
import itertools
import math
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from stress import report
from stress.report import seconds_as_text
from stress.result import FAILED, INTERRUPTED, PASSED, SKIPPED, Result, Sample, Series, percentiles

WIDTH, HEIGHT = 460, 170
LEFT, RIGHT, TOP, BOTTOM = 52, 8, 8, 22
MOST_POINTS = 240
"""Of a line; more would not be seen."""
ROLES = ("scenario", "process", "tracker", "fork server", "resource tracker")

STYLE = """
:root { color-scheme: light dark; --ink: #1d2733; --soft: #667788; --rule: #d8dee6; --paper: #ffffff; --card: #f6f8fa;
  --passed: #1a7f37; --failed: #c62828; --skipped: #9a6700;
  --scenario: #7b3fb5; --process: #2468c8; --tracker: #d0661a; --fork-server: #16857a; --resource-tracker: #8a8f98; }
@media (prefers-color-scheme: dark) { :root { --ink: #e2e8ef; --soft: #93a1b0; --rule: #303a46; --paper: #12171d;
  --card: #1a2129; --passed: #4cc46a; --failed: #ff7b72; --skipped: #e0b040;
  --scenario: #b98be8; --process: #6ea8f5; --tracker: #f0985a; --fork-server: #4fc3b5; --resource-tracker: #9aa3ad; } }
body { margin: 0 auto; max-width: 1000px; padding: 24px; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 22px; margin: 0 0 4px; } h2 { font-size: 17px; margin: 0; } p { margin: 4px 0; }
.soft, figcaption, text { color: var(--soft); fill: var(--soft); }
table { border-collapse: collapse; margin: 12px 0; font-variant-numeric: tabular-nums; }
th { text-align: left; color: var(--soft); font-weight: normal; }
th, td { padding: 3px 14px 3px 0; border-bottom: 1px solid var(--rule); } .number { text-align: right; }
section { background: var(--card); border: 1px solid var(--rule); border-radius: 8px; margin: 18px 0;
  padding: 14px 18px; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(380px, 1fr)); gap: 12px; margin-top: 10px; }
figure { margin: 0; } figcaption { font-size: 13px; } svg { width: 100%; height: auto; } text { font-size: 11px; }
.axis { stroke: var(--rule); } polyline { fill: none; stroke-width: 1.5; stroke-linejoin: round; }
.passed { color: var(--passed); } .failed { color: var(--failed); } .skipped, .interrupted { color: var(--skipped); }
pre { white-space: pre-wrap; overflow-wrap: anywhere; border-left: 3px solid var(--failed); padding-left: 10px; }
.key { display: inline-block; margin-right: 14px; font-size: 13px; }
.key i { display: inline-block; width: 14px; height: 3px; margin-right: 5px; vertical-align: middle; }
.tables { display: flex; flex-wrap: wrap; gap: 0 40px; align-items: flex-start; }
"""


def write_page(path: str, results: list[Result]) -> None:
    verdict = report.verdict(results)
    statuses = {result.status for result in results}
    if any(result.interrupted for result in results):
        statuses.add(INTERRUPTED)
    status = next((each for each in (FAILED, INTERRUPTED, PASSED) if each in statuses), SKIPPED)  # its colour
    seconds = sum(result.seconds for result in results)
    operations = sum(result.done.total() for result in results)
    where = f"{time.strftime('%Y-%m-%d %H:%M')}, {platform.platform()}, Python {platform.python_version()}"
    body = [
        f'<h1 class="{status}">{verdict}</h1>',
        f"<p>{seconds:,.0f} s, {operations:,} operations. A clean run gives confidence in proportion to its length.",
        f'<p class="soft">{_text(where)}',
        _summary(results),
        *map(_section, results),
    ]
    Path(path).write_text(
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>posix_ipc stress: {verdict}</title><style>{STYLE}</style><body>{''.join(body)}</html>\n",
        encoding="utf-8",
    )


# ---- text ----


def _text(text: object) -> str:
    return html.escape(str(text))


def _table(columns: Sequence[str], rows: list[list[str]], numbers: Sequence[int]) -> str:
    """`numbers` are the columns that are set flush right. Cells are HTML."""

    def cells(tag: str, row: Sequence[str]) -> str:
        marks = [' class="number"' if i in numbers else "" for i in range(len(row))]
        return "".join(f"<{tag}{mark}>{cell}</{tag}>" for mark, cell in zip(marks, row, strict=True))

    lines = [cells("th", columns), *(cells("td", row) for row in rows)]
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>" if rows else ""


def _anchor(result: Result) -> str:
    return _text(f"{result.scenario}-{result.method}-{result.seed}")


def _summary(results: list[Result]) -> str:
    rows = [
        [
            str(result.number),
            f'<a href="#{_anchor(result)}">{_text(result.scenario)}</a>',
            result.method,
            f'<span class="{result.status}">{result.status}</span>',
            f"{result.seconds:.1f}",
            f"{result.operations:,} {_text(result.unit)}",
            f"{result.operations / result.seconds:,.0f}" if result.seconds else "",
            f"{result.errors.total():,}",
        ]
        for result in results
    ]
    columns = ("", "scenario", "method", "outcome", "seconds", "operations", "per second", "errors met")
    return _table(columns, rows, (0, 4, 5, 6, 7))


def _section(result: Result) -> str:
    parts = [
        f'<section id="{_anchor(result)}"><h2>{result.number} {_text(result.scenario)}',
        f' <span class="soft">{result.method}</span> <span class="{result.status}">{result.status}</span></h2>',
        f"<p>{_text(result.invariant)}",
        f'<p class="soft">{_text(result.reason)}' if result.reason else "",
        *(f"<pre>{_text(violation)}</pre>" for violation in result.violations),
        f"<p>and {result.more_violations} more" if result.more_violations else "",
        f"<p><code>{_text(result.command)}</code>",
        f'<div class="tables">{_times(result)}{_counts(result)}</div>',
        *(f'<p class="soft">{_text(note)}' for note in result.notes),
        _plots(result) if len(result.samples) > 2 else "",
    ]
    return "".join(parts) + "</section>"


def _times(result: Result) -> str:
    rows = []
    for what, seconds in sorted(result.took.items()):
        times = percentiles(seconds)
        figures = [seconds_as_text(times[each]) for each in ("p50", "p99", "max")]
        rows.append([_text(what), f"{times['count']:,}", *figures])
    return _table(("time of", "times", "p50", "p99", "max"), rows, (1, 2, 3, 4))


def _counts(result: Result) -> str:
    counts = {**(result.tally + result.done), **{f"met: {what}": number for what, number in result.errors.items()}}
    return _table(("count of", ""), [[_text(what), f"{number:,}"] for what, number in sorted(counts.items())], (1,))


# ---- plots ----


class Line(NamedTuple):
    role: str
    label: str
    points: list[tuple[float, float]]


def _plots(result: Result) -> str:
    samples = result.samples

    def over_time(label: str, value: Callable[[Sample], float], role: str = "process") -> Line:
        return Line(role, label, [(sample.at, value(sample)) for sample in samples])

    rates = [
        (later.at, (later.done - earlier.done) / (later.at - earlier.at))
        for earlier, later in itertools.pairwise(samples)
    ]
    processes = result.series.values()
    figures = [
        _figure(f"{result.unit} per second", [Line("process", "rate", rates)]),
        _figure(
            "objects alive (blue) and processes (orange)",
            [
                over_time("objects", lambda each: each.objects),
                over_time("processes", lambda each: each.processes, "tracker"),
            ],
        ),
        _figure("descriptors of each process", [_line_of(each, each.descriptors) for each in processes]),
        _figure(
            "megabytes resident of each process",
            [_line_of(each, [number / 1e6 for number in each.memory]) for each in processes],
        ),
    ]
    roles = [role for role in ROLES if any(series.role == role for series in result.series.values())]
    keys = "".join(
        f'<span class="key"><i style="background:var(--{_colour(role)})"></i>{role}</span>' for role in roles
    )
    return f'<div class="plots">{"".join(figures)}</div>{keys}'


def _figure(title: str, lines: list[Line]) -> str:
    lines = [line for line in lines if line.points]
    if not lines:
        return ""
    last = max(x for line in lines for x, _ in line.points)
    step = _round_step(max(y for line in lines for _, y in line.points) / 4)
    top = step * max(1, math.ceil(max(y for line in lines for _, y in line.points) / step))
    across, down = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def place(x: float, y: float) -> str:
        return f"{LEFT + across * x / last:.1f},{TOP + down * (1 - y / top):.1f}"

    drawn = []
    for number in range(round(top / step) + 1):
        y = TOP + down * (1 - number * step / top)
        drawn.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        drawn.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{number * step:,g}</text>')
    across_step = _round_step(last / 5)
    for number in range(int(last / across_step) + 1):
        x = LEFT + across * number * across_step / last
        drawn.append(f'<text x="{x:.1f}" y="{HEIGHT - 6}" text-anchor="middle">{number * across_step:g} s</text>')
    for line in lines:
        points = " ".join(place(x, y) for x, y in line.points[:: math.ceil(len(line.points) / MOST_POINTS)])
        colour = f"stroke:var(--{_colour(line.role)})"
        drawn.append(f'<polyline points="{points}" style="{colour}"><title>{_text(line.label)}</title></polyline>')
    picture = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{_text(title)}">{"".join(drawn)}</svg>'
    return f"<figure><figcaption>{_text(title)}</figcaption>{picture}</figure>"


def _line_of(series: Series, values: Sequence[float]) -> Line:
    return Line(series.role, f"{series.role} {series.pid}", list(zip(series.at, values, strict=True)))


def _colour(role: str) -> str:
    return role.replace(" ", "-")


def _round_step(size: float) -> float:
    """The next of 1, 2, 5, 10, … that is not smaller."""
    if size <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(size))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= size * 0.999)
