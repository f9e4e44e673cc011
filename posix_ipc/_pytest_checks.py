"""What the pytest plugin does to each test, once somebody asked for it: see pytest_plugin.py.

What is left shows after the last fixture of the test has gone, so it is an error of the teardown, as if a fixture had
failed there: the test's own result stands.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Generator
from typing import Any, NamedTuple

import pytest

from posix_ipc._leak_check import Check
from posix_ipc.pytest_plugin import MARKER, MODES, LeakWarning, mode_of

FLAGS = ("objects", "fds", "mappings", "children")


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, None, None]:
    try:
        settings = settings_of(item)
    except pytest.UsageError:
        yield  # pytest tears down what it has set up
        raise
    if settings.mode != "off":
        check = Check(**settings.flags)
        check.start()
        item.config.stash[_running] = _Running(check, settings.mode)
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[Any], request: Any) -> Generator[None, object, object]:
    """What outlives the test by its scope is not left by the test."""
    running = request.config.stash.get(_running, None)
    if running is None or fixturedef.scope == "function":
        return (yield)
    with running.check.excluding():
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    running = item.config.stash.get(_running, None)
    if running is not None and (report.failed or hasattr(report, "wasxfail")):
        running.failed = True
    return report


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None, None, None]:
    running = item.config.stash.get(_running, None)
    if running is None:
        return (yield)
    try:
        result = yield
    except BaseException:
        running.failed = True
        raise
    finally:
        del item.config.stash[_running]
        report = running.check.finish(functools.partial(_let_go, item))
        if report and running.failed:  # that is the news; what its frames hold is left by no fault of the test
            item.add_report_section("teardown", "ipc leaks", str(report))
    if report and not running.failed:
        if running.mode == "error":
            pytest.fail(str(report), pytrace=False)
        item.warn(LeakWarning(str(report)))
    return result


def pytest_unconfigure(config: pytest.Config) -> None:
    running = config.stash.get(_running, None)
    if running is not None:  # interrupted
        running.check.abandon()


# ---- helpers ----


def _let_go(item: pytest.Item) -> None:
    """Drop the values of the fixtures, as pytest does after this: a handle among them may be all that is left."""
    getattr(item, "funcargs", {}).clear()
    gc.collect()


class _Running:
    """The check of the test that runs."""

    def __init__(self, check: Check, mode: str) -> None:
        self.check = check
        self.mode = mode
        self.failed = False


_running = pytest.StashKey[_Running]()


class Settings(NamedTuple):
    mode: str
    flags: dict[str, bool]


def settings_of(item: Any) -> Settings:
    """Of several markers, the closest that says it counts."""
    mode = mode_of(item.config)
    flags: dict[str, bool] = {}
    for marker in reversed(list(item.iter_markers("ipc_leaks"))):
        unknown = marker.kwargs.keys() - {*FLAGS, "reason"}
        if len(marker.args) > 1 or any(given not in MODES for given in marker.args) or unknown:
            raise pytest.UsageError(f"it is @pytest.mark.{MARKER}")
        mode = marker.args[0] if marker.args else mode
        flags.update({flag: marker.kwargs[flag] for flag in FLAGS if flag in marker.kwargs})
    return Settings(mode, flags)
