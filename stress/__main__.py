"""The command line: `python -m stress --help`."""

from __future__ import annotations

import argparse
import os
import secrets
import signal
import sys
from collections.abc import Iterator

from stress import faults, report, runner
from stress.page import write_page
from stress.progress import Progress
from stress.result import FAILED, Result
from stress.runner import Settings
from stress.scenario import METHODS, Scenario, all_scenarios, find

UNITS = {"s": 1, "m": 60, "h": 3600}
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Signals that end it with the summary so far. Shells ignore the first for what they start in the background."""


def main(argv: list[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    if arguments.list:
        print(_listing())
        return 0
    for number in STOPPING:
        if signal.getsignal(number) != signal.SIG_IGN or number == signal.SIGINT:  # a hangup, by nohup
            signal.signal(number, _stop)
    scenarios = arguments.scenarios or all_scenarios()
    if arguments.selftest:
        return _selftest(scenarios, arguments)
    results: list[Result] = []
    for scenario, settings in _plan(scenarios, arguments):
        results.append(_run(scenario, settings))
        if _stopped or (arguments.soak and results[-1].status == FAILED):
            break
    if arguments.json:
        report.write_json(arguments.json, results)
    if arguments.html:
        write_page(arguments.html, results)
    _tell(report.summary(results))
    return report.exit_status(results, _stopped)


def _tell(text: str) -> None:
    """On a terminal that may be gone, which is no reason to end otherwise."""
    try:
        print(text, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _written_file(path: str) -> str:
    """One that can be written, which is better known before a long run than after it."""
    try:
        with open(path, "a"):
            return path
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot write {path!r}: {error.strerror}") from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m stress", description="Stress posix_ipc on this machine: docs/stress.md explains it."
    )
    add = parser.add_argument
    add("scenarios", nargs="*", type=_scenario, metavar="SCENARIO", help="names or numbers; by default all")
    add("--list", action="store_true", help="say what the scenarios are, and which invariant each of them checks")
    add("--duration", type=_duration, default=600.0, metavar="10m", help="of it all, shared by what is run")
    add("--count", type=int, help="of operations under each start method, instead of a duration")
    add("--full", action="store_true", help="as much as docs/stress.md says that each scenario was proved with")
    add(
        "--processes",
        type=int,
        metavar="N",
        help="how many work at once; by default 2 for each processor, at least 4",
    )
    add("--method", choices=[*METHODS, "all"], default="all", help="the start method of multiprocessing")
    add("--seed", type=int, help="of all that is random; by default a new one, which is printed when a run fails")
    add("--soak", action="store_true", help="round after round, each with the next seed, until Ctrl-C or a failure")
    add("--json", type=_written_file, metavar="FILE", help="write all results there")
    add(
        "--html",
        type=_written_file,
        metavar="FILE",
        help="write a page there, with rates, descriptors and memory over time",
    )
    add("--selftest", action="store_true", help="put a fault into each scenario, and demand that it is reported")
    add("--fault", choices=sorted(faults.FAULTS), default="", metavar="FAULT", help="run with a fault of --selftest")
    return parser


def _scenario(word: str) -> Scenario:
    try:
        return find(word)
    except LookupError:
        raise argparse.ArgumentTypeError(f"no scenario {word!r}; --list names them") from None


def _duration(text: str) -> float:
    try:
        number, unit = (text[:-1], text[-1]) if text[-1:] in UNITS else (text, "s")
        return float(number) * UNITS[unit]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no duration such as 30s, 10m or 1.5h") from None


def _listing() -> str:
    return "\n".join(
        f"{each.number:2} {each.name}\n   holds: {each.invariant}\n   faults: {each.faults}" for each in all_scenarios()
    )


def _plan(scenarios: list[Scenario], arguments: argparse.Namespace) -> Iterator[tuple[Scenario, Settings]]:
    """What to run, in order; endless for a soak."""
    seed = arguments.seed if arguments.seed is not None else secrets.randbits(32)
    while True:
        for scenario in scenarios:
            methods = [each for each in scenario.methods if arguments.method in (each, "all")] or scenario.methods[:1]
            duration = arguments.duration / len(scenarios) / len(methods)
            for method in methods:
                yield scenario, _settings(scenario, method, duration, seed, arguments)
        if not arguments.soak:
            return
        seed += 1


def _settings(scenario: Scenario, method: str, duration: float, seed: int, arguments: argparse.Namespace) -> Settings:
    count, processes = arguments.count, arguments.processes
    if arguments.full:
        duration, count = scenario.full.duration or duration, scenario.full.count
        processes = processes or scenario.full.processes
    return Settings(seed, method, processes or max(4, 2 * (os.cpu_count() or 1)), duration, count, arguments.fault)


_stopped = 0
"""The signal that has stopped it."""


def _stop(number: int, frame: object) -> None:
    """Ctrl-C, or another signal: end with the summary so far, and leave nothing behind."""
    global _stopped
    _stopped = _stopped or number


def _run(scenario: Scenario, settings: Settings, until: str | None = None) -> Result:
    """Run it, until it is done or has reported such a violation."""
    progress = Progress()
    is_reported = False

    def watch(result: Result) -> None:
        nonlocal is_reported
        is_reported = until is not None and any(until in text for text in result.violations)
        progress(result)

    result = runner.run(scenario, settings, watch, lambda: bool(_stopped) or is_reported)
    progress.over(result)
    return result


def _selftest(scenarios: list[Scenario], arguments: argparse.Namespace) -> int:
    """Each fault must be reported by its scenario, in the words that it expects."""
    missed = []
    for name, fault in faults.FAULTS.items():
        scenario = find(fault.scenario)
        if scenario not in scenarios:
            continue
        settings = Settings(arguments.seed or 1, fault.method, fault.processes, fault.duration, fault=name)
        result = _run(scenario, settings, until=fault.reported)
        found = any(fault.reported in text for text in result.violations)
        if _stopped:
            return 128 + _stopped
        print(f"{'found ' if found else 'MISSED'} {name} [{scenario.name}]: {fault.what}", flush=True)
        if not found:
            missed.append(name)
            print(report.summary([result]))
    print(f"{len(missed)} faults were not reported: {', '.join(missed)}" if missed else "every fault was reported")
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
