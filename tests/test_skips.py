"""The plugin of skips.py: which skipped tests fail where nothing may be skipped."""

LACKING = ["ptrace", "strace", "unshare"]
SUITE = """
import pytest

def test_that_runs():
    pass

@pytest.mark.skipif(True, reason="needs ptrace")
def test_that_lacks_a_right():
    pass

def test_that_lacks_a_program():
    pytest.skip("needs strace")

@pytest.mark.skipif(True, reason="new in Python 3.99")
def test_of_another_python():
    pass

@pytest.mark.xfail
def test_that_is_known_to_fail():
    assert False
"""


def test_a_skip_for_lack_of_something_fails_where_nothing_may_be_skipped(pytester, monkeypatch):
    """Elsewhere it is a skip: test_portable.py, for one, is skipped as a rule."""
    monkeypatch.setenv("POSIX_IPC_NO_SKIPS", "1")
    pytester.makepyfile(
        test_some=SUITE, test_whole_file="import pytest\npytest.skip('needs unshare', allow_module_level=True)"
    )
    plugins = "-pskips", "-pno:posix_ipc", "-pno:xdist", "-pno:hypothesispytest", "-pno:cacheprovider"
    result = pytester.runpytest(*plugins, "--continue-on-collection-errors")
    result.assert_outcomes(passed=1, errors=2, failed=1, skipped=1, xfailed=1)
    result.stdout.fnmatch_lines_random([f"*where nothing may be skipped: Skipped: needs {what}*" for what in LACKING])
