"""A plugin of pytest: with POSIX_IPC_NO_SKIPS=1, as .ci/run sets it, a test that is skipped fails.

So no guarantee is lost without a word where a right or a program is missing that the test needs. What a Python, this
build or this machine need not have is listed here.
"""

import os
import re

import pytest

MAY_BE_MISSED = re.compile(
    r"new in Python 3"
    r"|needs a free-threaded interpreter"
    r"|Python's own fatal error|free-threaded Python itself can hang|it does not fork at its end"
    r"|could not import 'numpy'"
    r"|tracking is there: make test-portable"
    r"|no name of a queue|it went well in the original"  # a combination that there is not
    r"|needs (zsh|fish)$"
    r"|needs [\d.]+ [GM]iB of free room"
)


def pytest_configure(config):
    if os.environ.get("POSIX_IPC_NO_SKIPS") == "1":
        config.pluginmanager.register(_NoSkips())


class _NoSkips:
    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self):
        return _fail_if_skipped((yield))

    @pytest.hookimpl(wrapper=True)
    def pytest_make_collect_report(self):
        return _fail_if_skipped((yield))


def _fail_if_skipped(report):
    if report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2]
        if not MAY_BE_MISSED.search(reason):
            report.outcome, report.longrepr = "failed", f"where nothing may be skipped: {reason}"
    return report
