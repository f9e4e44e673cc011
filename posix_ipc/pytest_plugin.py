"""The pytest plugin: a test that leaves named objects, descriptors, mappings or child processes behind gets an error.

pytest finds it where posix_ipc is installed. It does nothing unless it is asked to: by --ipc-leaks=warn|error, by the
option `ipc_leaks` of the configuration file, or for some tests by a marker. So this module holds what any version of
pytest understands, and costs nothing; the rest is in _pytest_checks.py.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest

MODES = ("off", "warn", "error")
MARKER = (
    "ipc_leaks(mode, *, objects=True, fds=True, mappings=True, children=True, reason=''): what happens if the test "
    "leaves something behind (off, warn, error; as --ipc-leaks says if not given), and what is looked at"
)


class LeakWarning(pytest.PytestWarning):
    """A test left something behind."""


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("posix_ipc")
    group.addoption(
        "--ipc-leaks",
        choices=MODES,
        help="what happens if a test leaves named objects, descriptors, mappings or child processes behind",
    )
    parser.addini("ipc_leaks", "what --ipc-leaks is if it is not given: off, warn, error", default="off")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", MARKER)
    mode = mode_of(config)
    if mode not in MODES:
        raise pytest.UsageError(f"ipc_leaks: {mode!r} is none of {', '.join(MODES)}")
    if mode != "off":
        _check_tests(config)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if any(item.get_closest_marker("ipc_leaks") for item in items):
        _check_tests(config)


@pytest.fixture
def ipc_leak_check(request: pytest.FixtureRequest) -> Any:
    """posix_ipc.leaks.leak_check, with the flags of the test's marker: for a block of the test.

    with ipc_leak_check(fds=False) as report:
        ...
    """
    from posix_ipc import _leak_check, _pytest_checks

    return functools.partial(_leak_check.leak_check, **_pytest_checks.settings_of(request.node).flags)


def mode_of(config: pytest.Config) -> str:
    return str(config.getoption("ipc_leaks") or config.getini("ipc_leaks"))


def _check_tests(config: pytest.Config) -> None:
    from posix_ipc import _pytest_checks  # it brings psutil and multiprocessing along

    if not config.pluginmanager.is_registered(_pytest_checks):
        config.pluginmanager.register(_pytest_checks, "posix_ipc-checks")
