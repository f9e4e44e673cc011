"""The commands of the command line, and what they print."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import posix_ipc
from posix_ipc import _describe, _reaper, _removal, _survey, leaks
from posix_ipc._describe import KIND_WORDS
from posix_ipc._journal import INTENT, Entry
from posix_ipc._removal import Use
from posix_ipc._tables import Line, Output, Span, paragraph, printable
from posix_ipc.leaks import IPCObject, Survey

if TYPE_CHECKING:
    from posix_ipc._doctor import Finding

NOTHING, FOUND, UNTOLD = 0, 1, 2
"""Exit statuses."""

KINDS = {word: kind for kind, word in KIND_WORDS.items()}


def run(chosen: argparse.Namespace, output: Output) -> int:
    """Run a command; its exit status. Raises UsageError."""
    return _COMMANDS[chosen.command](chosen, output)


# ---- looking ----


def _ls(chosen: argparse.Namespace, output: Output) -> int:
    survey = _look(chosen)
    _show(survey, survey.objects, chosen, output)
    _note_untold(survey, [])
    return UNTOLD if survey.failure or _untold(survey.objects) else NOTHING


def _leaks(chosen: argparse.Namespace, output: Output) -> int:
    survey = _look(chosen)
    found = leaks.leaks_among(survey.objects, chosen.unheld, chosen.min_age)
    _show(survey, found, chosen, output)
    untold = _untold(survey.objects)
    _note_untold(survey, untold)
    return FOUND if found else UNTOLD if untold or survey.failure else NOTHING


def _why(chosen: argparse.Namespace, output: Output) -> int:
    name = _name(chosen.name)
    survey = _survey_of([name], chosen)
    found = [each for each in survey.objects if each.name == name]
    if chosen.json:
        _show(survey, found, chosen, output)
    else:
        for i, each in enumerate(found):
            output.print([*([[]] if i else []), *_describe.explain(each, output.width)])
    if not found:
        _note(f"{printable(name)}: {printable(survey.failure or 'there is no such object')}")
    return UNTOLD if not found or _untold(found) else NOTHING


def _watch(chosen: argparse.Namespace, output: Output) -> int:
    screen = output.is_terminal and not chosen.json
    if screen:
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that the screen is given back
        output.file.write("\x1b[?1049h\x1b[?25l")  # a screen of its own, no cursor
    lines: list[Line] = []
    try:
        while True:
            survey = _look(chosen)
            if chosen.json:
                output.file.write(json.dumps(_as_json(survey, survey.objects)) + "\n")
            else:
                title = f"{time.strftime('%H:%M:%S')}  {_number(survey.objects)}, every {chosen.interval:g} s"
                failure = [[Span(printable(survey.failure), "unknown")]] if survey.failure else []
                table = _describe.objects_table(survey.objects, output.width)
                lines = [[Span(title, "quiet")], *failure, [], *table]
                _refresh(lines, output) if screen else output.print([*lines, []])
            output.file.flush()
            time.sleep(chosen.interval)
    except KeyboardInterrupt:
        return NOTHING  # the way to end it
    finally:
        if screen:
            output.file.write("\x1b[?25h\x1b[?1049l")
            output.print(lines)


def _refresh(lines: Sequence[Line], output: Output) -> None:
    """Write over what is there, so that nothing flickers."""
    height = shutil.get_terminal_size().lines
    if len(lines) > height:
        lines = [*lines[: height - 1], [Span(f"and {len(lines) - height + 1} more", "quiet")]]
    output.file.write("\x1b[H" + "\n".join(f"{line}\x1b[K" for line in output.paint(lines)) + "\x1b[J")


def _doctor(chosen: argparse.Namespace, output: Output) -> int:
    from posix_ipc import _doctor

    findings = []
    for finding in _doctor.examine():
        findings.append(finding)
        if not chosen.json:
            output.print(_finding_lines(finding, output.width))
    if chosen.json:
        _print_json({"findings": [asdict(finding) for finding in findings]}, output)
    statuses = {finding.status for finding in findings}
    return FOUND if _doctor.ATTENTION in statuses else UNTOLD if _doctor.UNKNOWN in statuses else NOTHING


def _finding_lines(finding: Finding, width: int | None) -> list[Line]:
    from posix_ipc import _doctor

    style = "good" if finding.status == _doctor.OK else finding.status
    indent = " " * 11
    lines = paragraph(f"{finding.subject}: {finding.fact}", width, indent)
    fact = lines[0][0].text.strip().removeprefix(finding.subject)
    lines[0] = [Span(f"{finding.status:<9}  ", style), Span(finding.subject, "heading"), Span(fact)]
    if finding.advice != _doctor.NOTHING_TO_DO:
        lines += paragraph(finding.advice, width, indent + "  ", first=indent + "> ")
    return lines


# ---- removing ----


def _rm(chosen: argparse.Namespace, output: Output) -> int:
    names = list(dict.fromkeys(map(_name, chosen.names)))
    _removal.give_back()
    survey = _survey_of(names, chosen)
    by_name = defaultdict(list)
    for each in survey.objects:
        by_name[each.name].append(each)
    outcomes = []
    for name in names:
        found = by_name[name]
        if len(found) == 1:
            outcomes.append(_remove(found[0], chosen.force))
        else:
            kinds = " and a ".join(KIND_WORDS[each.kind] for each in found)
            nothing = survey.failure or "there is no such object"
            reason = f"there is a {kinds} of this name; choose with --kind" if found else nothing
            outcomes.append(Outcome(None, name, FAILED, reason))
    return _report(outcomes, chosen, output)


def _reap(chosen: argparse.Namespace, output: Output) -> int:
    if not chosen.yes:
        return _reap_dry(chosen, output)
    swept = _reaper.sweep(chosen=_chosen_entries(chosen))
    outcomes = [Outcome(each.kind, each.name, _removal.REMOVED, "it was an orphan") for each in swept.removed]
    untold = swept.blind
    if swept.blind:
        _note("a journal of a living process cannot be understood, so orphans were left alone")
    if chosen.unheld or chosen.min_age:
        survey = _look(chosen)
        unheld = [each for each in _reapable(survey, chosen) if each.verdict == "unheld"]
        outcomes += [_remove(each, force=False) for each in unheld]
        unknown = _untold(_of_this_user(survey.objects))
        _note_untold(survey, unknown)
        untold |= survey.failure is not None or bool(unknown)
    return _report(outcomes, chosen, output, untold=untold)


def _chosen_entries(chosen: argparse.Namespace) -> Callable[[Entry], bool]:
    """Which entries of journals a sweep is about."""
    prefix, kinds = os.fsencode(_prefix(chosen) or "/"), _kinds(chosen)

    def is_chosen(entry: Entry) -> bool:
        return (kinds is None or entry.kind in kinds) and entry.name.startswith(prefix)

    if not chosen.min_age:
        return is_chosen
    # A journal does not tell the age of a queue, nor the identity of one that was in the making.
    orphans = leaks.leaks_among(_look(chosen).objects, unheld=False, min_age=chosen.min_age)
    old = {(each.kind, each.identity) for each in orphans}
    old_names = {(each.kind, os.fsencode(each.name)) for each in orphans}

    def is_old(entry: Entry) -> bool:
        return (entry.kind, entry.name) in old_names if entry.state == INTENT else (entry.kind, entry.identity) in old

    return lambda entry: is_chosen(entry) and is_old(entry)


def _reap_dry(chosen: argparse.Namespace, output: Output) -> int:
    survey = _look(chosen)
    found = _reapable(survey, chosen)
    _show(survey, found, chosen, output)
    if found:
        _note(f"{_number(found)} would be removed; with --yes they are")
    unknown = _untold(_of_this_user(survey.objects))
    _note_untold(survey, unknown)
    return FOUND if found else UNTOLD if unknown or survey.failure else NOTHING


def _reapable(survey: Survey, chosen: argparse.Namespace) -> list[IPCObject]:
    return leaks.leaks_among(_of_this_user(survey.objects), chosen.unheld, chosen.min_age)


def _of_this_user(objects: Iterable[IPCObject]) -> list[IPCObject]:
    """Those that reap is for, also if root calls it."""
    return [each for each in objects if each.uid == os.geteuid()]


@dataclass(frozen=True)
class Outcome:
    """What became of an object that was to be removed."""

    kind: str | None
    name: str
    outcome: str
    """REMOVED, GONE or KEPT of `_removal`, or "failed"."""
    reason: str


FAILED = "failed"


def _remove(each: IPCObject, force: bool) -> Outcome:
    outcome, reason = _try_to_remove(each, force)
    return Outcome(each.kind, each.name, outcome, reason)


def _try_to_remove(each: IPCObject, force: bool) -> tuple[str, str]:
    if each.identity is None or each.uid is None:
        return FAILED, "it cannot be opened, so that it is not known which object this is"
    if each.verdict == "live" and not force:
        return _removal.KEPT, f"{each.reason}; --force removes the name all the same"

    def attempt(use: Use) -> str:
        assert each.identity is not None
        assert each.uid is not None
        return _removal.remove(each.kind, each.name, each.identity, each.uid, use)

    try:
        try:
            outcome = attempt(Use.NONE if force else Use.OPEN)
        except _removal.UntoldError:
            if each.verdict == "unknown":
                return FAILED, f"{each.reason}; --force removes it all the same"
            outcome = attempt(Use.LEASE)  # no process that could be seen holds it, and all could be
    except (OSError, posix_ipc.Error) as error:
        return FAILED, os.strerror(error.errno) if error.errno else str(error)
    return outcome, {
        _removal.REMOVED: f"it was {each.verdict}",
        _removal.GONE: "the name is gone, or leads to another object by now",
        _removal.KEPT: "somebody has opened it meanwhile, or is out of sight",
    }[outcome]


def _report(outcomes: Sequence[Outcome], chosen: argparse.Namespace, output: Output, *, untold: bool = False) -> int:
    """What became of objects; the exit status. `untold`: there may be others."""
    if chosen.json:
        _print_json({"objects": [asdict(each) for each in outcomes]}, output)
    for each in outcomes:
        kind = KIND_WORDS[each.kind] + " " if each.kind else ""
        text = f"{each.outcome} {kind}{printable(each.name)}: {printable(each.reason)}"
        if each.outcome in (FAILED, _removal.KEPT):
            _note(text)
        elif not chosen.json:
            output.print([[Span(text)]])
    if not outcomes and not untold and not chosen.json:
        output.print([[Span("nothing to remove")]])
    what = {each.outcome for each in outcomes}
    return UNTOLD if untold or FAILED in what else FOUND if _removal.KEPT in what else NOTHING


# ---- helpers ----


def _look(chosen: argparse.Namespace) -> Survey:
    return leaks.survey(_kinds(chosen), _prefix(chosen))


def _survey_of(names: Sequence[str], chosen: argparse.Namespace) -> Survey:
    prefix = names[0] if len(names) == 1 else None
    return _survey.survey(_survey.Wanted(_kinds(chosen), prefix, [os.fsencode(name) for name in names]))


def _kinds(chosen: argparse.Namespace) -> list[str] | None:
    return None if chosen.kind is None else [KINDS[word] for word in chosen.kind]


def _prefix(chosen: argparse.Namespace) -> str | None:
    return None if chosen.prefix is None else "/" + chosen.prefix.removeprefix("/")


def _name(text: str) -> str:
    """A legal name, with its slash."""
    bare = text.removeprefix("/")
    if not bare or "/" in bare or bare in (".", "..") or len(os.fsencode(bare)) > LONGEST_NAME:
        raise UsageError(f"no object can have the name {printable(text)!r}")
    return f"/{bare}"


LONGEST_NAME = 255  # NAME_MAX, in bytes


class UsageError(Exception):
    """What was asked makes no sense."""


def _untold(objects: Iterable[IPCObject]) -> list[IPCObject]:
    return [each for each in objects if each.verdict == "unknown"]


def _note_untold(survey: Survey, unknown: Sequence[IPCObject]) -> None:
    """What the answer does not say."""
    if unknown:
        _note(f"of {len(unknown)} more it is not known who holds them: see `posix-ipc ls`")
    if survey.failure:
        _note(f"{printable(survey.failure)}; there may be more")


def _number(objects: Sequence[object]) -> str:
    return "1 object" if len(objects) == 1 else f"{len(objects)} objects"


def _show(survey: Survey, objects: Sequence[IPCObject], chosen: argparse.Namespace, output: Output) -> None:
    if chosen.json:
        _print_json(_as_json(survey, objects), output)
    elif objects:
        output.print(_describe.objects_table(objects, output.width))


def _as_json(survey: Survey, objects: Sequence[IPCObject]) -> dict[str, Any]:
    return {
        "objects": [each.as_dict() for each in objects],
        "unread": survey.unread,
        "limits": survey.limits,
        "all_queues": survey.all_queues,
    }


def _print_json(value: object, output: Output) -> None:
    output.file.write(json.dumps(value, indent=2) + "\n")


def _note(text: str) -> None:
    """What is not the answer goes to standard error, if that is open."""
    if sys.stderr is not None:
        print(f"posix-ipc: {text}", file=sys.stderr)


_COMMANDS: dict[str, Callable[[argparse.Namespace, Output], int]] = {
    "ls": _ls,
    "leaks": _leaks,
    "why": _why,
    "rm": _rm,
    "reap": _reap,
    "doctor": _doctor,
    "watch": _watch,
}
