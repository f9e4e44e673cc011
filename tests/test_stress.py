"""The stress harness itself: what it reports, and that it leaves nothing. --selftest proves the scenarios."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import psutil
import pytest
from support import SMALL_QUEUE, wait_until

import posix_ipc

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # stress/ stands beside the package, and is not installed with it

from stress import faults, known, outside, report, runner, sampling, scenario  # noqa: E402
from stress.page import write_page  # noqa: E402
from stress.result import FAILED, INTERRUPTED, PASSED, SKIPPED, together  # noqa: E402
from stress.scenarios import reaper  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.no_sanitizer,  # it runs the package that stands beside it, not the instrumented one
    pytest.mark.skipif(sys.platform != "linux", reason="tracking is for Linux"),
]


def stress(*arguments, **options):
    return subprocess.Popen(
        [sys.executable, "-m", "stress", *arguments],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def test_every_scenario_is_listed_with_its_invariant_and_can_fail():
    listing, _ = stress("--list").communicate(timeout=60)
    scenarios = scenario.all_scenarios()
    assert len({each.number for each in scenarios}) == len(scenarios)
    for each in scenarios:
        assert f"{each.number:2} {each.name}\n   holds: {each.invariant}\n" in listing
        assert scenario.load(each.name) is each
        assert any(fault.scenario == each.name for fault in faults.FAULTS.values()), (
            f"nothing proves that {each.name} fails"
        )


def test_a_failing_run_says_how_to_repeat_it(tmp_path):
    arguments = "reaper", "--method", "fork", "--seed", "7", "--processes", "2", "--count", "100"
    html = tmp_path / "page.html"
    run = stress(*arguments, "--fault", "leases-ignored", "--html", html)
    output, _ = run.communicate(timeout=60)
    assert run.returncode == 1
    assert "a live object was destroyed" in output
    assert "seed: 7\n" in output
    again = "python -m stress reaper --method fork --seed 7 --processes 2 --count 100 --fault leases-ignored"
    assert f"again: {again}\n" in output
    page = html.read_text()
    assert "a live object was destroyed" in page
    assert not re.search(r"(src|href)=.?(http|//)|@import|url\(", page)  # it needs nothing else


@pytest.mark.parametrize("option", ["--json", "--html"])
def test_a_file_that_cannot_be_written_is_said_before_the_run(option, tmp_path):
    run = stress("kill", option, tmp_path / "missing" / "file")
    output, errors = run.communicate(timeout=60)
    assert (run.returncode, output) == (2, "")
    assert errors.splitlines()[-1].endswith(
        f"argument {option}: cannot write {str(tmp_path / 'missing' / 'file')!r}: No such file or directory"
    )


def test_a_run_by_count():
    run = stress("reaper", "--method", "fork", "--processes", "2", "--count", "40")
    output, _ = run.communicate(timeout=60)
    assert run.returncode == 0, output
    assert "40 lives" in output
    assert "1 passed." in output


def test_ctrl_c_ends_with_the_summary_and_leaves_nothing(tmp_path):
    """In the midst of a storm: processes that are stopped, in sessions of their own, and objects of all of them."""
    results = tmp_path / "results.json"
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    run = stress("kill", "--json", results, env={**os.environ, "TMPDIR": str(temporary)})
    wait_until(lambda: list(temporary.glob("stress-*/0.2")))  # a killer grows its second tree
    trees = wait_until(lambda: trees_below(run.pid))
    run.send_signal(signal.SIGINT)
    output, _ = run.communicate(timeout=60)
    assert run.returncode == 130, output
    (result,) = json.loads(results.read_text())
    assert result["status"] == "interrupted"
    assert result["done"]["kills"] > 0
    assert f"{result['done']['kills']:,} kills" in output
    prefix = result["prefix"]
    assert not outside.Processes(prefix[3:-1])()
    assert not outside.files(prefix)
    assert not outside.journals(prefix)
    assert not [name for tree in trees for name in outside.tree_files(tree)]
    assert not list(temporary.iterdir())


def trees_below(pid):
    """The trees of a run's processes that have a tracker."""
    children = psutil.Process(pid).children()
    run = children[0].environ().get(outside.VARIABLE) if children else None
    trackers = [each for each in outside.Processes(run)() if outside.role(each) == "tracker"] if run else []
    tokens = [outside.command(each).rpartition(" ")[2] for each in trackers]
    return {token.rpartition("-")[0] for token in tokens}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_other_signals_stop_it_as_ctrl_c_does(number, tmp_path):
    """On a terminal that has gone, so that no line can be written."""
    results = tmp_path / "results.json"
    run = stress("reaper", "--method", "fork", "--processes", "2", "--json", results)
    trees = wait_until(lambda: trees_below(run.pid))
    run.stdout.close()
    run.stderr.close()
    run.send_signal(number)
    assert run.wait(60) == 128 + number
    (result,) = json.loads(results.read_text())
    assert result["status"] == "interrupted"
    assert not outside.Processes(result["prefix"][3:-1])()
    assert not outside.files(result["prefix"])
    assert not [name for tree in trees for name in outside.tree_files(tree)]


# ---- the runner, with scenarios that misbehave ----


@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_no_process_outlives_a_killed_runner(method, tmp_path):
    arguments = "exclusion", "--method", method, "--processes", "2", "--duration", "60s"
    run = stress(*arguments, env={**os.environ, "TMPDIR": str(tmp_path)})
    processes = wait_until(lambda: working_below(run.pid))
    (entry,) = [each.cmdline() for each in processes if "stress.entry" in each.cmdline()][:1]
    run.kill()
    run.communicate(timeout=60)
    _, alive = psutil.wait_procs(processes, timeout=30)
    for path in outside.files(json.loads(entry[entry.index("stress.entry") + 1])["prefix"]):
        os.unlink(f"/dev/shm/{path}")
    assert not [each.cmdline() for each in alive]


def working_below(pid):
    """The descendants of a runner when both parts of its scenario have worked for a while."""
    processes = psutil.Process(pid).children(recursive=True)
    return sum(each.cpu_times().user > 0.05 for each in processes) > 2 and processes


@pytest.fixture
def run(monkeypatch):
    """A function that runs the body of a scenario, a line of Python."""

    def run(body, after=0.3, duration=5.0, count=None, is_stopped=lambda: False):
        code = (
            "import os, subprocess, sys, time, posix_ipc\n"
            "from stress import entry, scenario\n"
            f"def run(context): {body}\n"
            "entry.load = lambda name: scenario.Scenario(0, 'test', 'i', 'f', 'steps', run)\n"
            "sys.exit(entry.main())\n"
        )
        monkeypatch.setattr(runner, "ENTRY", ("-c", code))
        monkeypatch.setattr(runner, "AFTERWARDS", after)
        settings = runner.Settings(seed=1, method="fork", processes=2, duration=duration, count=count)
        test = scenario.Scenario(0, "test", "i", "f", "steps", lambda context: None)
        return runner.run(test, settings, lambda _: None, is_stopped)

    return run


def test_what_a_scenario_counts(run):
    result = run("[context.done('steps') for step in zip(range(5), context.steps())]; context.met('Oops', 2)")
    assert result.status == PASSED
    assert result.operations == 5
    assert result.errors == {"Oops": 2}


def test_a_skipped_scenario_says_why_and_is_counted_apart(run):
    passed, skipped = run("context.done('steps')"), run("context.skip('no moon tonight')")
    assert skipped.status == SKIPPED
    summary = report.summary([passed, skipped])
    assert "1 passed, 1 skipped.\nskipped: test [fork]: no moon tonight" in summary
    assert report.exit_status([passed, skipped]) == 0


def test_fewer_operations_than_were_asked_for_are_a_violation(run, monkeypatch):
    assert run("[context.done('steps') for step in context.steps()]", count=5).status == PASSED
    monkeypatch.setattr(runner, "LONGEST_BY_COUNT", 0.5)
    result = run("[(context.done('steps'), time.sleep(0.1)) for step in context.steps()]", count=1000)
    assert result.status == FAILED
    assert re.fullmatch("[1-9] of 1,000 steps were done .*", result.violations[0])


def test_the_page_says_what_happened(run, tmp_path):
    page = tmp_path / "page.html"

    def title(*results):
        write_page(str(page), list(results))
        return re.search("<h1[^>]*>(.*)</h1>", page.read_text())[0]

    passed, skipped = run("context.done('steps')"), run("context.skip('no moon')")
    interrupted = run("context.done('steps'), time.sleep(9)", is_stopped=lambda: True)
    failed = run("context.violated('x')")
    assert title(passed) == '<h1 class="passed">Every invariant held</h1>'
    assert title(passed, skipped) == '<h1 class="passed">Every invariant held, but 1 skipped</h1>'
    assert title(skipped) == '<h1 class="skipped">Nothing was checked</h1>'
    assert 'class="interrupted">Interrupted' in title(passed, interrupted)
    assert title(passed, interrupted, failed) == '<h1 class="failed">Not every invariant held</h1>'


def test_ctrl_c_during_the_look_from_outside_ends_it_early(run, monkeypatch):
    """What is there then is no violation, as it might have gone yet."""
    began = time.monotonic()
    looks = []
    look = known.Objects.look
    monkeypatch.setattr(known.Objects, "look", lambda self: looks.append(time.monotonic()) or look(self))
    body = "context.done('steps'), posix_ipc.Semaphore(context.name(), posix_ipc.O_CREX).close()"
    result = run(body, after=30.0, is_stopped=lambda: len(looks) > 20)  # a sample is one look, every half a second
    assert time.monotonic() - began < 20
    assert (result.status, result.interrupted, result.operations) == (INTERRUPTED, True, 1)
    assert report.exit_status([result], signal.SIGINT) == 130
    assert not outside.files(result.prefix)


def test_when_stopped_no_file_of_a_tree_stays_either(run, tmp_path):
    """Of one without an object of the run, whose tracker does not come to its end."""
    ready = tmp_path / "ready"
    body = (
        "from posix_ipc.mp_integration import Semaphore; from stress import outside; own = Semaphore(); own.unlink(); "
        "own.close(); tree = outside.tree_of(os.getpid()); context.note(tree); "
        "list(iter(lambda: bool(outside.trackers(tree)), True)); "
        "[os.kill(pid, 19) for pid in outside.trackers(tree)]; "
        f"open({str(ready)!r}, 'w').close(); time.sleep(60)"
    )
    result = run(body, is_stopped=ready.exists)
    assert result.status == INTERRUPTED
    assert not outside.tree_files(result.notes[0])


def test_rounds_of_a_soak_are_summed_up(run):
    """The outcome is that of the worst round."""
    rounds = [
        run("context.done('steps', 2); context.took('a', 0.1)"),
        run("context.violated('x')"),
        run("context.done('steps')"),
    ]
    (total,) = together(rounds)
    assert (total.status, total.operations, total.took) == (FAILED, 3, {"a": [0.1]})
    assert [each.operations for each in rounds] == [2, 0, 1]
    summary = report.summary(rounds)
    assert "2 passed, 1 failed." in summary
    assert summary.count("violated: x") == 1


LEAVE = {
    "object sem.": "posix_ipc.Semaphore(context.name(), posix_ipc.O_CREX).close()",
    "object queue ": "posix_ipc.MessageQueue(context.name('queue'), posix_ipc.O_CREX, max_messages=1).close()",
    "descriptor ": "h = posix_ipc.SharedMemory(context.name(), posix_ipc.O_CREX, size=1); h.unlink()",
    "descriptor 3 (/dev/zero)": "sys.kept = open('/dev/zero')",
    "mapping /dev/shm/st": "h = posix_ipc.SharedMemory(context.name(), posix_ipc.O_CREX, size=1); sys.kept = h.buf; "
    "h.close_fd(); h.unlink()",
    "mapping /dev/shm/#": "h = posix_ipc.Semaphore(context.name(), posix_ipc.O_CREX); sys.kept = h; time.sleep(1); "
    "h.unlink()",
    "object .posix_ipc-": "h = posix_ipc.SharedMemory(context.name(), posix_ipc.O_CREX, size=1); h.close(); "
    "time.sleep(1); path = '/dev/shm' + h.name; facts = posix_ipc._ext._facts_at(path.encode())[:3]; "
    "directory = f'/dev/shm/.posix_ipc-{os.geteuid()}'; os.makedirs(directory, 0o700, exist_ok=True); "
    "os.rename(path, directory + '/aside-%d-%d-%d' % facts)",
    "process ": "subprocess.Popen(['sleep', '60'], start_new_session=True)",
}


@pytest.mark.parametrize("what", LEAVE)
def test_what_is_left_behind_is_reported_and_removed(run, what):
    result = run(LEAVE[what])
    assert result.status == FAILED
    assert f"left behind: {what}" in "\n".join(result.violations)
    assert not outside.files(result.prefix)
    assert not outside.Processes(result.prefix[3:-1])()
    for aside in re.findall(r"\.posix_ipc-\S+/aside-\S+", "\n".join(result.violations)):
        assert not (outside.SHM / aside).exists()


@pytest.mark.parametrize(
    ("body", "reported"),
    [
        ("context.violated('so not')", "so not"),
        ("pass", "nothing was done: 0 steps"),
        ("1 / 0", "ZeroDivisionError"),
        ("os._exit(3)", "ended with status 3"),
        ("os.kill(os.getpid(), 11)", "ended with SIGSEGV"),
        ("context.join(context.start(divmod, 1))", "divmod raised"),
        ("context.join(context.start(lambda context: os._exit(5)))", "ended with status 5"),
    ],
)
def test_what_goes_wrong_is_a_violation(run, body, reported):
    result = run(body)
    assert result.status == FAILED
    assert any(reported in text for text in result.violations), result.violations
    assert report.exit_status([result]) == 1


def test_the_time_can_begin_when_all_is_prepared(run, monkeypatch):
    """Also for the runner, which takes a scenario for hung by it."""
    monkeypatch.setattr(runner, "GRACE", 0.6)
    body = "time.sleep(0.7), context.begin(), [(context.done('steps'), time.sleep(0.1)) for step in context.steps()]"
    result = run(body, duration=0.5)
    assert result.status == PASSED
    assert 3 <= result.operations <= 6


def test_names_and_identities_are_forgotten_when_they_have_gone(name, monkeypatch):
    """A long run uses millions of them."""
    monkeypatch.setattr(known, "FORGET_AFTER", 0.1)
    objects = known.Objects(f"{name}-")
    queue = posix_ipc.MessageQueue(f"{name}-there", posix_ipc.O_CREX, **SMALL_QUEUE)
    with contextlib.closing(queue):
        for which in ("there", "gone"):
            objects.know_queue(f"{name}-{which}")
        objects.know_lasting_queue(f"{name}-later")
        segment = posix_ipc.SharedMemory(f"{name}-segment", posix_ipc.O_CREX, size=1)
        assert len(objects.look()) == 2
        segment.unlink()
        view = segment.buf
        segment.close_fd()
        time.sleep(0.11)
        objects.look()
        objects.forget_the_gone(os.getpid())
        assert list(objects._queues) == [f"{name}-there"]
        assert objects._lasting_queues == {f"{name}-later"}
        assert len(objects._identities) == 1  # it is mapped here
        view.release()
        segment.close()
        objects.forget_the_gone(os.getpid())
        assert not objects._identities
        queue.unlink()


def test_a_long_run_stays_small(run, monkeypatch):
    monkeypatch.setattr(sampling, "PAUSE", 0.01)
    monkeypatch.setattr(sampling, "MOST_SAMPLES", 8)
    monkeypatch.setattr(sampling, "SHARE", 10.0)
    result = run("context.done('steps'), time.sleep(1)")
    assert result.status == PASSED
    assert 4 <= len(result.samples) <= 8
    assert result.samples[-1].at > 0.5
    (series,) = result.series.values()
    assert 4 <= len(series.at) == len(series.memory) == len(series.descriptors) <= 8


def test_a_pid_that_comes_again_is_another_process(monkeypatch):
    """A stranger is remembered by its start too."""
    processes = outside.Processes("none")
    processes()
    assert processes._strangers[os.getpid()] == outside.start_of(os.getpid())
    processes._wanted = b"PATH=" + os.environb[b"PATH"]
    assert os.getpid() not in processes()
    processes._strangers[os.getpid()] = "1"  # as if its pid had been that of another one
    assert processes()[os.getpid()] == outside.start_of(os.getpid())


def test_no_other_process_is_killed_than_was_meant():
    with subprocess.Popen(["sleep", "60"]) as child:
        outside.kill(child.pid, "1")
        with pytest.raises(subprocess.TimeoutExpired):
            child.wait(0.05)
        outside.kill(child.pid, outside.start_of(child.pid))
        assert child.wait(10) == -signal.SIGKILL


def test_a_scenario_that_hangs_says_where(run, monkeypatch):
    monkeypatch.setattr(runner, "GRACE", 0.3)
    result = run("__import__('threading').Event().wait()", duration=0.1)
    assert "hangs" in result.violations[0]
    assert "threading.py" in result.stderr


def test_sweeps_that_never_end_are_a_violation(tmp_path):
    """Since a reaper that does nothing destroys nothing either."""
    violations = []
    context = types.SimpleNamespace(
        directory=tmp_path, check=lambda holds, text: None if holds else violations.append(text)
    )
    reaper.check_that_it_was_swept(context, 5.0)
    assert not violations
    reaper.has_swept(context, reaper.SWEEPS)
    reaper.has_swept(context, reaper.SWEEPS_OF_UNHELD)
    reaper.check_that_it_was_swept(context, 20.0)
    assert violations == ["in 20 s beside life there were no sweeps by the command from beginning to end"]


def test_a_corrupt_journal_is_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(outside, "SHM", tmp_path)
    directory = tmp_path / f".posix_ipc-{os.geteuid()}"
    directory.mkdir()
    whole = b"pipcjrn\0" + (1).to_bytes(4, sys.byteorder) + (288).to_bytes(4, sys.byteorder)
    for name, data in {
        "7-1-1.root": whole.ljust(576, b"\0"),
        "7-1-1.j0": bytes(576),
        "7-1-1.j1": whole.ljust(570, b"\0"),
        "7-1-1.j2": b"x" + whole.ljust(575, b"\0"),
        "7-1-1.j3": whole.ljust(288, b"\0") + b"\2x".ljust(288, b"\0"),
        "7-1-1.j6": whole.ljust(288, b"\0") + b"\xffx".ljust(288, b"\0"),  # being written as its process died
        "8-1-1.j4": b"x" * 576,
        "7-12-1.j5": b"x" * 576,  # of another process with the pid of the root, later
    }.items():
        (directory / name).write_bytes(data)
    faults = outside.faults_of_journals("7-1")
    assert sorted(faults) == ["7-1-1.j0", "7-1-1.j1", "7-1-1.j2", "7-1-1.j3", "7-1-1.j6", "7-1-1.root"]
    assert sorted(name for name, fault in faults.items() if fault) == ["7-1-1.j1", "7-1-1.j2", "7-1-1.j3"]
