"""The pytest plugin: which tests get an error for what they leave, and which do not."""

import os
import sys

import pytest
from support import KINDS, PACKAGE_PARENT, TESTS, run_python, unique_name

pytestmark = [pytest.mark.skipif(sys.platform != "linux", reason="it reads /proc"), pytest.mark.slow]
pytest.importorskip("posix_ipc.mp_integration")


def test_this_suite_is_checked(pytestconfig):
    if not pytestconfig.pluginmanager.hasplugin("posix_ipc"):
        pytest.skip("the plugin is off")
    assert pytestconfig.getoption("ipc_leaks") == "error"


# A suite of tests that leave things behind; each gets names of its own, and a session clears up.
PRELUDE = """
import multiprocessing, os, subprocess, sys
import pytest
import posix_ipc
import leaving

@pytest.fixture
def name(request):
    return PREFIX + request.node.name.replace("[", "-").strip("]")

PREFIX = {prefix!r}
"""

LEAVING = """
def test_nothing(name):
    leaving.make_and_remove(name)

@pytest.mark.parametrize("kind", leaving.OPTIONS)
def test_object(kind, name):
    leaving.make(kind, name)

@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_object_of_child(method, name):
    leaving.run_child(method, leaving.make, "Semaphore", name)

def test_object_of_pool(name):
    with multiprocessing.get_context("fork").Pool(1) as pool:
        pool.starmap(leaving.make, [("Semaphore", name)])
        pool.close()
        pool.join()

def test_descriptor():
    os.open("/", os.O_RDONLY)

def test_mapping(name):
    global segment
    segment = posix_ipc.SharedMemory(name, posix_ipc.O_CREX, size=10)
    segment.buf[0] = 1
    segment.close_fd()
    segment.unlink()

def test_child():
    global child
    child = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
"""
LEFT = {
    "test_object[Semaphore]": "semaphore '{prefix}test_object-Semaphore', 32 bytes, created by pid *",
    "test_object[SharedMemory]": "shared_memory '{prefix}test_object-SharedMemory', 64 bytes, created by pid *",
    "test_object[MessageQueue]": "message_queue '{prefix}test_object-MessageQueue', 128 bytes, created by pid *",
    "test_object_of_child[fork]": "semaphore '{prefix}test_object_of_child-fork', * (ForkProcess-*",
    "test_object_of_child[spawn]": "semaphore '{prefix}test_object_of_child-spawn', * (SpawnProcess-*",
    "test_object_of_child[forkserver]": "semaphore '{prefix}test_object_of_child-forkserver', * (ForkServerProcess-*",
    "test_object_of_pool": "semaphore '{prefix}test_object_of_pool', * (ForkPoolWorker-*",
    "test_descriptor": "descriptor * of '/'",
    "test_mapping": "mapping of '/dev/shm{prefix}test_mapping (deleted)', 4096 bytes",
    "test_child": "child process * a zombie: it has ended, and nobody waited for it",
}


class Suite:
    """Tests that are run in a pytest of their own, in which the plugin is found as users find it."""

    def __init__(self, pytester, prefix):
        self._pytester = pytester
        self.prefix = prefix

    def run(self, code, *options):
        self._pytester.makepyfile(test_suite=PRELUDE.format(prefix=self.prefix) + code)
        return self._pytester.runpytest_subprocess("-ra", "-p", "no:cacheprovider", *options)


@pytest.fixture
def suite(pytester, monkeypatch):
    path = os.pathsep.join(filter(None, [str(PACKAGE_PARENT), str(TESTS), os.environ.get("PYTHONPATH")]))
    monkeypatch.setenv("PYTHONPATH", path)
    suite = Suite(pytester, unique_name() + "-")
    yield suite
    for kind in KINDS:
        for test in LEFT:
            kind.remove(suite.prefix + test.replace("[", "-").strip("]"))


@pytest.mark.parametrize("processes", [(), ("-n", "2")], ids=["alone", "xdist"])
def test_each_thing_left_is_an_error_of_its_test(suite, processes):
    result = suite.run(LEAVING, "--ipc-leaks=error", *processes)
    result.assert_outcomes(passed=len(LEFT) + 1, errors=len(LEFT))
    for test, text in LEFT.items():
        head = f"*ERROR at teardown of {test.replace('[', '[[]')} *"  # a bracket means something to the matcher
        result.stdout.fnmatch_lines([head, f"*{text.format(prefix=suite.prefix)}"])
    result.stdout.fnmatch_lines(["*handle = getattr(posix_ipc, kind)(name, posix_ipc.O_CREX*"])
    assert not any("ERROR" in line and "test_nothing" in line for line in result.outlines)


QUICK = "-k", "descriptor or mapping or Semaphore or test_child"


def test_warn(suite):
    result = suite.run(LEAVING, "--ipc-leaks=warn", *QUICK)
    result.assert_outcomes(passed=4, warnings=4, deselected=7)
    result.stdout.fnmatch_lines(
        ["test_suite.py::test_object[[]Semaphore]", "*LeakWarning: left behind: 1 object", "*semaphore*"]
    )


def test_off_by_default(suite):
    suite.run(LEAVING, *QUICK).assert_outcomes(passed=4, deselected=7)


def test_option_of_the_configuration_file(suite, pytester):
    pytester.makeini("[pytest]\nipc_leaks = error")
    code = "def test(): os.open('/', os.O_RDONLY)"
    suite.run(code).assert_outcomes(passed=1, errors=1)
    suite.run(code, "--ipc-leaks=off").assert_outcomes(passed=1)
    pytester.makeini("[pytest]\nipc_leaks = always")
    result = suite.run(code)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*ipc_leaks: 'always' is none of off, warn, error"])


def test_marker(suite):
    result = suite.run(
        """
        @pytest.mark.ipc_leaks("off")
        def test_off():
            os.open("/", os.O_RDONLY)

        @pytest.mark.ipc_leaks("warn", reason="for now")
        def test_warn():
            os.open("/", os.O_RDONLY)

        @pytest.mark.ipc_leaks(fds=False)
        class TestClass:
            def test_descriptor(self):
                os.open("/", os.O_RDONLY)

            @pytest.mark.ipc_leaks(fds=True)
            def test_closest_counts(self):
                os.open("/", os.O_RDONLY)

            def test_zombie(self):
                assert os.spawnlp(os.P_NOWAIT, "true", "true")

        @pytest.mark.ipc_leaks("loudly")
        def test_mode(): pass

        @pytest.mark.ipc_leaks(files=False)
        def test_flag(): pass
        """.replace("\n        ", "\n"),
        "--ipc-leaks=error",
    )
    result.assert_outcomes(passed=5, warnings=1, errors=4)
    result.stdout.fnmatch_lines_random(
        [
            "ERROR *test_closest_counts*left behind: 1*",
            "ERROR *test_zombie*left behind: 1*",
            "ERROR *test_mode*UsageError*",
            "ERROR *test_flag*UsageError*",
        ]
    )


def test_marker_switches_on(suite):
    code = """
@pytest.mark.ipc_leaks("error")
def test_marked(): os.open("/", os.O_RDONLY)
def test_other(): os.open("/", os.O_RDONLY)
"""
    result = suite.run(code)
    result.assert_outcomes(passed=2, errors=1)
    result.stdout.fnmatch_lines(["ERROR *test_marked*"])


def test_things_of_wider_fixtures_are_not_the_tests(suite):
    """What they make at their setup is not, whenever that is; what the test's own fixtures leave is."""
    result = suite.run(
        """
def holding(name):
    descriptor = os.open("/", os.O_RDONLY)
    segment = posix_ipc.SharedMemory(name, posix_ipc.O_CREX, size=10)
    segment.buf[0] = 1
    leaving.run_child("fork", leaving.make, "Semaphore", name)
    with subprocess.Popen(["sleep", "60"]) as child:
        yield segment
        child.kill()
    segment.close()
    segment.unlink()
    posix_ipc.unlink_semaphore(name)
    os.close(descriptor)

@pytest.fixture(scope="session")
def of_session():
    yield from holding(PREFIX + "session")

@pytest.fixture(scope="module")
def of_module(of_session):
    yield from holding(PREFIX + "module")

@pytest.fixture(scope="class")
def of_class(of_module):
    yield from holding(PREFIX + "class")

def test_clean(of_module): pass
def test_asked_for_in_the_midst(request): request.getfixturevalue("of_class")
class TestClass:
    def test_clean(self, of_class): pass
    def test_also_clean(self, of_class): pass
    def test_leaving(self, of_class, name): leaving.make("Semaphore", PREFIX + "test_child")

@pytest.fixture
def of_function():
    yield os.open("/", os.O_RDONLY)

def test_own_fixture(of_session, of_function): pass
""",
        "--ipc-leaks=error",
    )
    result.assert_outcomes(passed=6, errors=2)
    result.stdout.fnmatch_lines_random(
        ["ERROR *test_leaving*left behind: 1*", "ERROR *test_own_fixture*left behind: 1*"]
    )


def test_wider_fixtures_that_ask_for_each_other(suite):
    """In the midst of a setup, of any kind of object; what a test leaves after that is still told."""
    result = suite.run(
        """
MADE = {"session": [], "package": [], "module": [], "class": []}

def make_more(scope):
    for kind in leaving.OPTIONS:
        name = f"{PREFIX}{scope}-{kind}-{len(MADE[scope])}"
        leaving.make(kind, name)
        handle = getattr(posix_ipc, kind)(name)
        MADE[scope].append((handle, memoryview(handle) if kind == "SharedMemory" else None))

def remove(scope):
    for handle, view in MADE.pop(scope):
        if view is not None:
            view.release()
        handle.unlink()
        handle.close()

def holding(request, scope, *wider):
    make_more(scope)
    for fixture in wider:
        request.getfixturevalue(fixture)
        make_more(scope)
    yield
    remove(scope)

@pytest.fixture(scope="session")
def first(request): yield from holding(request, "session")
@pytest.fixture(scope="package")
def second(request): yield from holding(request, "package", "first")
@pytest.fixture(scope="module")
def third(request): yield from holding(request, "module", "second")
@pytest.fixture(scope="class")
def fourth(request): yield from holding(request, "class", "first", "third", "second")

class TestClass:
    def test_clean(self, fourth): pass
    def test_leaving(self, fourth, name): leaving.make("MessageQueue", PREFIX + "test_child")
    def test_mapping(self, fourth):
        global view
        segment = posix_ipc.SharedMemory(PREFIX + "session-SharedMemory-1")
        view = memoryview(segment)

def test_nothing_is_traced_now():
    from posix_ipc import _trace
    view.release()
    assert len(_trace._active) == 1
""",
        "--ipc-leaks=error",
    )
    result.assert_outcomes(passed=4, errors=2)
    result.stdout.fnmatch_lines_random(
        [
            "ERROR *test_leaving*left behind: 1 obj*",
            "ERROR *test_mapping*left behind: 1 desc*",
            f"mapping of '*{suite.prefix}session-SharedMemory-1', 4096 bytes",
        ]
    )


def test_handle_that_only_a_fixture_holds_is_not_left(suite):
    result = suite.run(
        """
@pytest.fixture
def segment(name):
    segment = posix_ipc.SharedMemory(name, posix_ipc.O_CREX, size=10)
    yield segment
    segment.close_fd()
    segment.unlink()

def test(segment):
    segment.buf[0] = 1
""",
        "--ipc-leaks=error",
    )
    result.assert_outcomes(passed=1)


def test_failure_is_the_news(suite):
    """A test that fails, or whose fixtures do, gets no second error; what it left stands below."""
    result = suite.run(
        """
def test_failing(): assert os.open("/", os.O_RDONLY) < 0

@pytest.mark.xfail
def test_expected(): assert os.open("/", os.O_RDONLY) < 0

@pytest.fixture
def failing(): os.open("/", os.O_RDONLY); raise ValueError("in setup")
def test_setup(failing): pass

@pytest.fixture
def failing_later(): yield os.open("/", os.O_RDONLY); raise ValueError("in teardown")
def test_teardown(failing_later): pass

def test_next(): pass
""",
        "--ipc-leaks=error",
    )
    result.assert_outcomes(failed=1, xfailed=1, errors=2, passed=2)
    result.stdout.fnmatch_lines(["*in setup*", "*in teardown*", "*Captured ipc leaks teardown*", "descriptor * of '/'"])
    result.stdout.no_fnmatch_line("*Failed: left behind*")


def test_that_empties_the_temporary_directory(suite, tmp_path, monkeypatch):
    """It cannot be told what its children leave, and that is said."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    code = """
def test_emptying(name):
    leaving.make("Semaphore", PREFIX + "test_child")
    for path in os.scandir(os.environ["TMPDIR"]):
        if path.name.startswith("posix_ipc-trace-"):
            os.unlink(path)

def test_next(): pass
"""
    result = suite.run(code, "--ipc-leaks=error")
    result.assert_outcomes(passed=2, errors=1, warnings=1)
    result.stdout.fnmatch_lines(["semaphore '*", "*RuntimeWarning: leak_check: the block removed the file*"])
    result.stdout.no_fnmatch_line("*FileNotFoundError*")


def test_skipped_test_is_looked_at(suite):
    code = "def test(): os.open('/', os.O_RDONLY); pytest.skip('now')"
    suite.run(code, "--ipc-leaks=error").assert_outcomes(skipped=1, errors=1)


def test_fixture_gives_a_check_with_the_flags_of_the_test(suite):
    result = suite.run(
        """
@pytest.mark.ipc_leaks(fds=False)
def test_fixture(ipc_leak_check, name):
    with ipc_leak_check() as report:
        os.open("/", os.O_RDONLY)
    assert not report
    with pytest.raises(AssertionError), ipc_leak_check() as report:
        leaving.make("Semaphore", name)
    assert [left.name for left in report.objects] == [name]
    posix_ipc.unlink_semaphore(name)
    with pytest.raises(AssertionError, match="left behind: 1 descriptor"), ipc_leak_check(fds=True):
        os.open("/", os.O_RDONLY)
""",
        "--ipc-leaks=error",
    )
    result.assert_outcomes(passed=1)


def test_foreign_program_is_not_blamed(suite):
    """Beside the tests it creates and removes all three kinds as fast as it can, and keeps some of each all the while.

    Each test waits until it has gone round once more.
    """
    code = f"""
import os, sys, threading
import leaving
import posix_ipc
prefix = {suite.prefix!r} + str(os.getpid())
kept = [prefix + kind for kind in leaving.OPTIONS]
leaving.make_all(kept)
asked, stopping = threading.Semaphore(0), []

def listen():
    for line in sys.stdin:
        asked.release()
    stopping.append(True)

threading.Thread(target=listen).start()
while not stopping:
    for kind in leaving.OPTIONS:
        leaving.make(kind, prefix)
        leaving.unlink(kind, prefix)
    if asked.acquire(blocking=False):
        print("went on", flush=True)
for kind, name in zip(leaving.OPTIONS, kept):
    leaving.unlink(kind, name)
"""
    result = suite.run(
        f"""
@pytest.fixture(scope="session")
def program():
    with subprocess.Popen([sys.executable, "-c", {code!r}], stdin=-1, stdout=-1, text=True) as child:
        yield child
        child.communicate()

@pytest.mark.parametrize("number", range(50))
def test_beside(program, number, name):
    for kind in leaving.OPTIONS:
        leaving.make(kind, name)
        leaving.unlink(kind, name)
    print(file=program.stdin, flush=True)
    assert program.stdout.readline() == "went on\\n"
""",
        "--ipc-leaks=error",
        "-n",
        "2",
    )
    result.assert_outcomes(passed=50)


def test_plugin_that_is_off_imports_little():
    run_python("import sys, posix_ipc.pytest_plugin; assert not {'multiprocessing', 'psutil'} & set(sys.modules)")


@pytest.mark.parametrize("options", [(), ("--ipc-leaks=off",)], ids=["by default", "on request"])
def test_run_with_the_plugin_off_imports_no_check(pytester, options):
    """Nor does it hear of anything: a run costs what it costs without the plugin."""
    pytester.makepyfile("""
import sys
import posix_ipc

def test():
    heavy = {"psutil", "multiprocessing", "posix_ipc._leak_check", "posix_ipc._pytest_checks", "posix_ipc._trace"}
    assert not heavy & set(sys.modules)

def test_plugin_is_there(pytestconfig):
    plugins = pytestconfig.pluginmanager
    assert plugins.get_plugin("posix_ipc").__name__ == "posix_ipc.pytest_plugin"
    assert not plugins.has_plugin("posix_ipc-checks")
""")
    pytester.runpytest_subprocess("-p", "no:cacheprovider", *options).assert_outcomes(passed=2)
