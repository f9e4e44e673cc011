"""The command line: what it tells of real objects and processes, and what it removes.

What is about orphans and the unheld runs where nobody else has objects, sweeps, or is a process that cannot be read.
"""

import contextlib
import io
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from lifetime import DIRECTORY, Tree, die_after, existing, make
from support import (
    KINDS,
    MESSAGE_QUEUE,
    NOBODY,
    SEMAPHORE,
    SHARED_MEMORY,
    SMALL_QUEUE,
    bad_journals,
    become_nobody,
    living_journal,
    run_function,
    run_privately,
    run_python,
    start_python,
    wait_until,
)

import posix_ipc

pytestmark = [pytest.mark.skipif(sys.platform != "linux", reason="the command line is for Linux"), pytest.mark.slow]

MAIN = "import sys; from posix_ipc.__main__ import main; sys.exit(main())"
WORDS = {SEMAPHORE: "semaphore", SHARED_MEMORY: "segment", MESSAGE_QUEUE: "queue"}
KIND_NAMES = {SEMAPHORE: "semaphore", SHARED_MEMORY: "shared_memory", MESSAGE_QUEUE: "message_queue"}


def command(*arguments, status=None, env=None):
    """Run a command in a process of its own. Whatever happens, it does not end with a traceback."""
    done = run_python(MAIN, *arguments, check=False, env={"COLUMNS": "", **(env or {})})
    assert "Traceback" not in done.stderr, done.stderr
    if status is not None:
        assert done.returncode == status, (done.stdout, done.stderr)
    return done


def run_here(*arguments):
    """The status of a command in this process, and what it wrote to standard output and error."""
    from posix_ipc import __main__

    output, errors = io.TextIOWrapper(io.BytesIO()), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        status = __main__.main(list(arguments))
    return status, output.buffer.getvalue().decode(), errors.getvalue()


def objects(*arguments, **options):
    """What a command tells of objects, as JSON."""
    return json.loads(command(*arguments, "--json", **options).stdout)["objects"]


def verdict(name):
    (found,) = objects("why", name)
    return found["verdict"]


# ---- looking ----


def test_ls_tells_who_holds_what(make, kind, name):
    make(name)
    done = command("ls", "--prefix", name, status=0)
    heading, row = done.stdout.splitlines()
    assert heading.split()[:2] == ["NAME", "KIND"]
    assert row.split()[:2] == [name, WORDS[kind]]
    assert f" {os.getpid()} " in row
    assert row.endswith("live")
    assert done.stderr == ""


def test_ls_of_nothing(name):
    done = command("ls", "--prefix", name, status=0)
    assert done.stdout == ""


def test_ls_takes_kinds_and_prefix_without_slash(names, semaphore, segment):
    name = names()
    semaphore(name), segment(name)
    assert [each["kind"] for each in objects("ls", "--prefix", name[1:], "--kind", "segment")] == ["shared_memory"]
    both = objects("ls", "--prefix", name[1:], "--kind", "segment", "--kind", "semaphore")
    assert {each["kind"] for each in both} == {"shared_memory", "semaphore"}


def test_json_is_what_the_library_tells(name, segment):
    from posix_ipc import leaks

    segment(name)
    told = objects("ls", "--prefix", name)
    assert told == json.loads(json.dumps([each.as_dict() for each in leaks.inventory(prefix=name)]))


def test_why_tells_everything(name, segment):
    held = segment(name, size=5000, mode=0o640)
    text = command("why", name[1:], status=0).stdout
    for word in (name, "segment", "live", "5000 bytes", "rw-r-----", f"{os.getpid()} ", "descriptor", "--force"):
        assert word in text
    assert f"inode {os.fstat(held.fd).st_ino}" in text


def test_why_tells_value_and_messages(name, semaphore, queue):
    semaphore(name, initial_value=3)
    queue(name).send(b"one")
    assert "value 3" in command("why", name, "--kind", "semaphore", status=0).stdout
    assert "1 messages of at most 2, each of up to 64 bytes" in command("why", name, "--kind", "queue", status=0).stdout


def test_why_of_a_queue_does_not_claim_to_know_when_it_was_made(name, queue):
    queue(name)
    assert re.search(r"^  used +last used or made 2", command("why", name, status=0).stdout, re.MULTILINE)


def test_why_of_nothing(name):
    done = command("why", name, status=2)
    assert name in done.stderr
    assert done.stdout == ""


def finds_and_reaps_the_unheld():
    held = SHARED_MEMORY.create("/t-held")
    with contextlib.suppress(OSError), SHARED_MEMORY.create("/t-others") as others:
        os.fchown(others.fd, NOBODY, NOBODY)  # reap is for one's own, also for root
    for kind in KINDS:
        kind.close_handle(kind.create("/t-free"))
    where = "--prefix", "/t-"
    free = {(word, "/t-free") for word in ("semaphore", "shared_memory")}
    for what in "leaks", "reap":
        assert objects(what, *where, status=0) == []
        assert objects(what, *where, "--unheld", "--min-age", 3600, status=0) == []
        told = {(each["kind"], each["name"]) for each in objects(what, *where, "--unheld", status=1)}
        assert told - {("shared_memory", "/t-others")} == free
    assert "2 objects would be removed" in command("reap", *where, "--unheld", status=1).stderr
    command("reap", *where, "--yes", status=0)
    command("reap", *where, "--yes", "--unheld", "--min-age", 3600, status=0)
    command("reap", *where, "--yes", "--unheld", "--kind", "queue", status=0)
    assert SHARED_MEMORY.exists("/t-free")
    told = objects("reap", *where, "--unheld", "--yes", status=0)
    assert {(each["kind"], each["name"]) for each in told if each["outcome"] == "removed"} == free
    assert SHARED_MEMORY.exists(held.name)
    assert SHARED_MEMORY.exists("/t-others")
    assert not any(kind.exists("/t-free") for kind in (SEMAPHORE, SHARED_MEMORY))


def test_the_unheld_are_found_and_reaped_when_asked():
    run_privately(finds_and_reaps_the_unheld)


def leaks_and_reaps_orphans():
    with Tree("fork", workers=1) as tree:
        command("leaks", status=0)
        (worker,) = tree.workers
        os.kill(worker, signal.SIGKILL)
        wait_until(lambda: not existing(tree.workers[worker]["private"]))
        kept = tree.workers[worker]["shared"]
        for _, name in kept:  # nobody holds it, but a pickle is in flight
            assert "in flight" in command("rm", name, status=1).stderr
        assert existing(kept) == kept
        tree.kill_trackers()
        tree.kill_group(signal.SIGKILL)
        tree.wait()
        tree.kill_workers()
        wait_until(lambda: all(each["verdict"] == "orphan" for each in objects("ls")))
        orphans = {(each["kind"], each["name"]) for each in objects("leaks", status=1)}
        assert len(orphans) == len(existing(tree.objects))
        dry = command("reap", status=1)
        assert all(name in dry.stdout for _, name in orphans)
        command("reap", "--yes", "--min-age", 3600, status=0)
        assert len(existing(tree.objects)) == len(orphans)
        one = min(orphans)
        done = command("reap", "--yes", "--prefix", one[1], status=0)
        assert done.stdout.startswith("removed ")
        assert {(each["kind"], each["name"]) for each in objects("leaks", status=1)} == orphans - {one}
        assert len(objects("reap", "--yes", "--kind", "segment", status=0)) > 0
        assert "shared_memory" not in {each["kind"] for each in objects("leaks", status=1)}
        command("reap", "--yes", status=0)
        command("leaks", status=0)
        assert existing(tree.objects) == []


def test_orphans_are_found_and_reaped():
    run_privately(leaks_and_reaps_orphans)


def reaps_nothing_beside_a_journal_it_does_not_understand():
    SHARED_MEMORY.create("/t-free").close_fd()
    with living_journal(bad_journals()["version"], os.geteuid()):
        assert verdict("/t-free") == "unknown"
        for unheld in [], ["--unheld"]:
            done = command("reap", "--yes", *unheld, status=2)
            assert "cannot be understood" in done.stderr
            assert done.stdout == ""
        assert SHARED_MEMORY.exists("/t-free")
    command("reap", "--yes", "--unheld", status=0)
    assert not SHARED_MEMORY.exists("/t-free")


def test_beside_a_journal_that_cannot_be_understood_nothing_is_reaped():
    run_privately(reaps_nothing_beside_a_journal_it_does_not_understand)


def says_that_it_could_not_look():
    with orphaned_queue("/t-orphan"):
        code = f"import multiprocessing; multiprocessing.set_executable('/bin/false')\n{MAIN}"
        for arguments in (
            ["ls"],
            ["leaks"],
            ["reap"],
            ["reap", "--yes", "--min-age", "1"],
            ["why", "/t-orphan"],
            ["rm", "/t-orphan"],
        ):
            done = run_python(code, *arguments, check=False)
            assert done.returncode == 2, (arguments, done.stdout, done.stderr)
            assert "could not be looked at: the helper process failed" in done.stderr
            assert "no such" not in done.stderr
        assert MESSAGE_QUEUE.exists("/t-orphan")
        command("leaks", status=1)


@contextlib.contextmanager
def orphaned_queue(name):
    die_after(make, "MessageQueue", name)
    yield
    MESSAGE_QUEUE.remove(name)


def test_what_could_not_be_looked_at_is_not_nothing():
    run_privately(says_that_it_could_not_look)


def reaps_queues_of_some_age():
    with orphaned_queue("/t-orphan"):
        command("reap", "--yes", "--min-age", 3600, status=0)
        assert MESSAGE_QUEUE.exists("/t-orphan")
        done = command("reap", "--yes", "--min-age", 0.001, status=0)
        assert done.stdout.startswith("removed queue /t-orphan")
        assert not MESSAGE_QUEUE.exists("/t-orphan")


def test_queues_have_an_age_too():
    run_privately(reaps_queues_of_some_age)


def others_are_unknown(name):
    """As another user: the process that holds the object cannot be looked into, but the kernel knows that it does."""

    def run(*arguments):
        return run_here(*arguments, "--kind", "segment")[:2]

    status, text = run("ls", "--prefix", name)
    assert status == 0
    assert "live" in text
    become_nobody()
    status, text = run("ls", "--prefix", name)
    assert status == 2
    assert "unknown" in text
    assert run("leaks", "--prefix", name, "--unheld") == (2, "")
    assert run("reap", "--prefix", name, "--unheld") == (2, "")
    assert run("reap", "--prefix", name, "--unheld", "--yes") == (2, "")
    status, text = run("why", name)
    assert status == 2
    assert "root" in text
    assert run("rm", name) == (1, "")
    assert SHARED_MEMORY.exists(name)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_what_others_hold_is_unknown(name, segment):
    os.fchown(segment(name).fd, NOBODY, NOBODY)
    run_function(others_are_unknown, name)


# ---- removing ----


def test_rm_refuses_what_is_in_use(make, kind, name):
    make(name)
    done = command("rm", name, status=1)
    assert f"pid {os.getpid()}" in done.stderr
    assert kind.exists(name)
    assert command("rm", name, "--force", status=0).stdout.startswith(f"removed {WORDS[kind]} {name}")
    assert not kind.exists(name)


def test_rm_removes_what_nobody_holds(make, kind, name):
    kind.close_handle(make(name))
    command("rm", name[1:], status=0)
    assert not kind.exists(name)
    done = command("rm", name, status=2)
    assert name in done.stderr


def test_rm_of_several_kinds_of_one_name(name, semaphore, segment):
    semaphore(name).close(), segment(name).close()
    done = command("rm", name, status=2)
    assert "semaphore" in done.stderr
    assert "segment" in done.stderr
    assert SEMAPHORE.exists(name)
    assert SHARED_MEMORY.exists(name)
    command("rm", name, "--kind", "semaphore", status=0)
    assert not SEMAPHORE.exists(name)
    assert SHARED_MEMORY.exists(name)


@pytest.mark.parametrize("bad", ["", "/", "/a/b", "..", "x" * 300], ids=lambda name: name[:5])
@pytest.mark.parametrize("what", ["rm", "why"])
def test_bad_names(what, bad):
    done = command(what, bad, status=2)
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout == ""


BAD_NAMES = ["\x1b[31m", "two\nlines", "\udcff\udcfe", "'$(exit)\"`", "-x", " ", "\\", "x" * 248]


def takes_names_as_data():
    """Every command finds and removes by the very name, and shows it in a line."""
    mount_queues()
    names = [f"/t-{tail}" for tail in BAD_NAMES]
    made = set()
    for kind in KINDS:
        for name in names:
            kind.close_handle(kind.create(name))
            made.add((KIND_NAMES[kind], name))

    def told(text):
        return {(each["kind"], each["name"]) for each in json.loads(text)["objects"]}

    for what in ["ls"], ["leaks", "--unheld"], ["reap", "--unheld"]:
        assert told(run_here(*what, "--json")[1]) == made
        status, text, _ = run_here(*what)
        assert status == (0 if what == ["ls"] else 1)
        assert set(text) - {"\n"} == set(filter(str.isprintable, text))
        assert len(text.splitlines()) == 1 + len(made)
    with start_python(MAIN, "watch", "--json") as child:
        assert told(child.stdout.readline()) == made
    for name in names:
        status, text, _ = run_here("why", name)
        assert status == 0
        assert len(re.findall(r"^/.*  (?:semaphore|segment|queue), unheld$", text, re.MULTILINE)) == 3
        assert set(text) - {"\n"} == set(filter(str.isprintable, text))
    for kind in KINDS:
        status, text, _ = run_here("rm", *names, "--kind", WORDS[kind], "--json")
        assert status == 0
        assert {each["outcome"] for each in json.loads(text)["objects"]} == {"removed"}
        assert told(text) == {(KIND_NAMES[kind], name) for name in names}
        assert not any(kind.exists(name) for name in names)
    status, text, _ = run_here("rm", names[0], "--json")
    assert status == 2
    assert json.loads(text)["objects"] == [
        {"kind": None, "name": names[0], "outcome": "failed", "reason": "there is no such object"}
    ]


def mount_queues():
    os.mkdir("/dev/shm/mount")
    subprocess.run(["mount", "-t", "mqueue", "none", "/dev/shm/mount"], check=True)


def test_names_are_data():
    run_privately(takes_names_as_data)


BEFORE_REMOVAL = """
import fcntl, mmap, os, sys
from posix_ipc.__main__ import main
path, what = sys.argv.pop(), sys.argv.pop()

def replace():
    os.rename(path, f"{path}-moved")  # an unlink would be seen by its link count
    with open(path, "xb") as file:
        file.write(b"of a stranger")

def take():
    descriptor = os.open(path, os.O_RDWR)
    globals()["mapped"] = mmap.mmap(descriptor, 0)
    os.close(descriptor)

def hook(event, arguments):
    # The exclusive lock is the last look before the name is taken away.
    global pending
    if event == "fcntl.flock" and arguments[1] == fcntl.LOCK_EX | fcntl.LOCK_NB and pending:
        if os.readlink(f"/proc/self/fd/{arguments[0]}") != path:
            return
        pending = False
        {"replace": replace, "take": take}[what]()

pending = True
sys.addaudithook(hook)
status = main()
sys.exit(9 if pending else status)
"""


def leaves_alone_what_changed(kind, name, what, arguments):
    """Between look and removal the name goes to another object, or somebody opens it."""
    kind.close_handle(kind.create(name))
    path = kind.file_of(name)
    inode = os.stat(path).st_ino
    done = run_python(BEFORE_REMOVAL, *arguments, what, path, check=False)
    assert done.returncode == (0 if what == "replace" else 1), (done.stdout, done.stderr)
    if what == "replace":
        assert Path(path).read_bytes() == b"of a stranger"
        os.unlink(f"{path}-moved")
    else:
        assert os.stat(path).st_ino == inode
    os.unlink(path)


@pytest.mark.parametrize("what", ["replace", "take"])
@pytest.mark.parametrize("kind", [SEMAPHORE, SHARED_MEMORY], ids=lambda kind: kind.type.__name__)
def test_rm_leaves_alone_what_changed_since_it_looked(kind, name, what):
    leaves_alone_what_changed(kind, name, what, ["rm", name])


AT_REMOVAL = """
import os, sys
import posix_ipc
from posix_ipc import _aside, _removal
from posix_ipc.__main__ import main

def replace_file(path, *_):
    os.rename(path, os.fsencode(path) + b"-moved")
    with open(path, "xb") as file:
        file.write(b"of a stranger")

def replace_queue(name, *_):
    posix_ipc.unlink_message_queue(name)
    posix_ipc.MessageQueue(name, posix_ipc.O_CREX, max_messages=1, max_message_size=7).close()

def replacing_before(remove, replace):
    def replaced(*arguments):
        replace(*arguments)
        return remove(*arguments)
    return replaced

_aside.remove_by_rename = replacing_before(_aside.remove_by_rename, replace_file)
_removal._remove_queue = replacing_before(_removal._remove_queue, replace_queue)
sys.exit(main())
"""


@pytest.mark.parametrize("force", [[], ["--force"]], ids=["plain", "force"])
def test_rm_leaves_alone_what_has_the_name_at_its_last_step(kind, make, name, force):
    handle = make(name)
    if not force:
        kind.close_handle(handle)
    done = run_python(AT_REMOVAL, "rm", name, "--json", *force)
    assert [each["outcome"] for each in json.loads(done.stdout)["objects"]] == ["gone"]
    if kind is MESSAGE_QUEUE:
        with contextlib.closing(posix_ipc.MessageQueue(name)) as stranger:
            assert stranger.max_message_size == 7
    else:
        assert Path(kind.file_of(name)).read_bytes() == b"of a stranger"
        os.unlink(f"{kind.file_of(name)}-moved")


def reap_leaves_alone_what_changed():
    for what in "replace", "take":
        leaves_alone_what_changed(SHARED_MEMORY, "/t-free", what, ["reap", "--yes", "--unheld"])


def test_reap_leaves_alone_what_changed_since_it_looked():
    run_privately(reap_leaves_alone_what_changed)


def test_a_queue_that_somebody_opened_since_it_was_looked_at_stays(queue, name):
    queue(name).close()
    code = (
        BEFORE_REMOVAL.replace("descriptor = os.open(path, os.O_RDWR)", "import posix_ipc")
        .replace('globals()["mapped"] = mmap.mmap(descriptor, 0)', 'globals()["opened"] = posix_ipc.MessageQueue(path)')
        .replace("    os.close(descriptor)\n", "")
    )
    done = run_python(code, "rm", name, "take", name, check=False)
    assert done.returncode == 1, done.stderr
    assert MESSAGE_QUEUE.exists(name)


def removes_only_what_it_can_judge():
    """Without CAP_LEASE the kernel does not tell root whether another user's file is open."""
    without_lease, without_both = (["setpriv", "--bounding-set", caps] for caps in ("-lease", "-lease,-sys_ptrace"))
    with SHARED_MEMORY.create("/t-others") as others:
        os.fchown(others.fd, NOBODY, NOBODY)
    nobody = {"user": NOBODY, "group": NOBODY, "extra_groups": []}
    sleep = subprocess.Popen(["\x1b[31m", "60"], executable="/bin/sleep", **nobody)
    with sleep as unreadable, contextlib.ExitStack() as stack:
        stack.callback(unreadable.kill)
        wait_until(lambda: Path(f"/proc/{unreadable.pid}/comm").read_text() == "sleep\n")
        done = run_python(MAIN, "rm", "/t-others", prefix=without_both, check=False)
        assert done.returncode == 2, done.stderr
        assert rf"{unreadable.pid} (\x1b[31m 60, " in done.stderr
        assert SHARED_MEMORY.exists("/t-others")
    run_python(MAIN, "rm", "/t-others", prefix=without_lease)
    assert not SHARED_MEMORY.exists("/t-others")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.skipif(shutil.which("setpriv") is None, reason="needs setpriv")
def test_where_the_kernel_does_not_tell_the_processes_must():
    run_privately(removes_only_what_it_can_judge)


def tells_and_removes_what_is_hidden():
    """As a removal leaves it that is killed while it looks: see test_removal.py."""
    SHARED_MEMORY.create("/t-hidden").close_fd()
    (DIRECTORY / "aside").mkdir(mode=0o700, parents=True)
    DIRECTORY.chmod(0o700)
    os.rename("/dev/shm/t-hidden", DIRECTORY / "aside" / "t-hidden")
    (found,) = json.loads(run_here("leaks", "--unheld", "--json")[1])["objects"]
    assert found["name"] == "/t-hidden"
    assert "reap() gives that back" in run_here("why", "t-hidden")[1].replace("\n", " ")
    tracking = next(
        each for each in json.loads(run_here("doctor", "--json")[1])["findings"] if each["subject"] == "tracking"
    )
    assert tracking["status"] == "attention"
    assert "1 object without the name" in tracking["fact"]
    assert run_here("rm", "t-hidden")[0] == 0
    assert not os.listdir(DIRECTORY / "aside")
    assert not SHARED_MEMORY.exists("/t-hidden")


def test_what_a_killed_removal_has_hidden_is_told_and_removed():
    run_privately(tells_and_removes_what_is_hidden)


# ---- looking changes nothing ----


def looks_and_changes_nothing():
    mount_queues()
    for kind in KINDS:
        kind.close_handle(kind.create("/t-plain"))
        for name in "/t-orphan", "/t-leased":
            die_after(make, kind.type.__name__, name)
    from posix_ipc import mp_integration

    leased = [getattr(mp_integration, kind.type.__name__).attach("/t-leased") for kind in KINDS]
    before = all_of_shm()
    for arguments in ["ls"], ["leaks", "--unheld"], ["reap", "--unheld"], ["why", "/t-orphan"], ["doctor"], ["names"]:
        run_here(*arguments)
        after = all_of_shm()
        changed = [path for path in before | after if before.get(path) != after.get(path)]
        assert not changed, (arguments, changed)
    verdicts = {each["name"]: each["verdict"] for each in json.loads(run_here("ls", "--json")[1])["objects"]}
    assert verdicts == {"/t-plain": "unheld", "/t-orphan": "orphan", "/t-leased": "live"}
    for each in leased:
        each.close()


def all_of_shm():
    """By path: what stat(2) says but for the time of access, and the bytes; of queues, which note who reads, none."""
    found = {}
    for directory, names, files in os.walk("/dev/shm"):
        for path in (directory, *(f"{directory}/{each}" for each in (*names, *files))):
            status = os.lstat(path)
            is_read = os.path.isfile(path) and directory != "/dev/shm/mount"
            content = Path(path).read_bytes() if is_read else b""
            found[path] = (*status[:7], status.st_mtime_ns, status.st_ctime_ns, content)
    return found


def test_looking_changes_nothing():
    run_privately(looks_and_changes_nothing)


CHURN = """
import contextlib, os, sys, posix_ipc
from posix_ipc.mp_integration import MessageQueue, Semaphore, SharedMemory
number = 0
while True:
    number += 1
    name = f"/t-{os.getpid()}-{number % 7}"
    if (child := os.fork()) == 0:
        kept = SharedMemory(size=8), Semaphore(), MessageQueue(max_messages=1, max_message_size=8)
        posix_ipc.Semaphore(name, posix_ipc.O_CREAT).close()
        os._exit(0)
    posix_ipc.SharedMemory(name, posix_ipc.O_CREAT, size=8).close_fd()
    os.waitpid(child, 0)
    for unlink in posix_ipc.unlink_semaphore, posix_ipc.unlink_shared_memory:
        with contextlib.suppress(posix_ipc.ExistentialError):
            unlink(name)
"""


def runs_while_all_comes_and_goes():
    SHARED_MEMORY.create("/t-steady")
    with start_python(CHURN) as one, start_python(CHURN) as other:
        name = f"/t-{one.pid}-1"
        wait_until(lambda: SHARED_MEMORY.exists(name))
        for arguments in (
            ["ls"], ["leaks", "--unheld"], ["why", name], ["rm", name], ["reap"], ["reap", "--yes"], ["doctor"],
            ["reap", "--yes", "--unheld", "--min-age", "0.001"], ["rm", "--force", "--kind", "segment", name],
        ):  # fmt: skip
            status, _, errors = run_here(*arguments)
            assert status in (0, 1, 2), (arguments, errors)
        assert (one.poll(), other.poll()) == (None, None)
        assert SHARED_MEMORY.exists("/t-steady")


def test_processes_and_objects_come_and_go():
    run_privately(runs_while_all_comes_and_goes)


# ---- how it looks ----


def test_narrow_and_wide(names, segment):
    name = names() + "-with-a-very-long-name" * 4
    segment(name)
    narrow = command("ls", "--prefix", name, env={"COLUMNS": "40"}, status=0).stdout.splitlines()
    assert max(map(len, narrow)) <= 40
    assert narrow[1].endswith("live")
    for wide in ({"COLUMNS": "200"}, {"COLUMNS": ""}):
        assert name in command("ls", "--prefix", name, env=wide, status=0).stdout
    why = command("why", name, env={"COLUMNS": "60"}, status=0).stdout.splitlines()
    assert all(len(line) <= 60 or name in line for line in why)


def test_names_cannot_steer_the_terminal(names, segment):
    name = names() + "\x1b[31m\n\udcff é"
    segment(name)
    done = command("ls", "--prefix", name, status=0)
    assert "\x1b" not in done.stdout
    assert len(done.stdout.splitlines()) == 2
    assert r"\x1b[31m\n\xff é" in done.stdout
    (told,) = objects("ls", "--prefix", name)
    assert told["name"] == name


def names_a_process_that_would_steer_the_terminal():
    SHARED_MEMORY.create("/t-plain").close_fd()
    os.chmod("/dev/shm/t-plain", 0o666)
    process = subprocess.Popen(["\x1b]0;pwned\x07", "60"], executable="/bin/sleep")  # it ends with this namespace
    wait_until(lambda: Path(f"/proc/{process.pid}/comm").read_text() == "sleep\n")
    run_here("why", "/t-plain")  # nobody may not read what this imports
    become_nobody()
    status, text, _ = run_here("why", "/t-plain")
    assert status == 2
    assert "\x1b" not in text
    assert r"\x1b]0;pwned\x07" in text
    process.returncode = 0  # nobody waits for it


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_processes_cannot_steer_the_terminal():
    run_privately(names_a_process_that_would_steer_the_terminal)


def test_names_that_look_alike_are_told_apart(names, segment):
    stem = names()
    alike = [stem + tail for tail in ("\x1b[31m", r"\x1b[31m", "\udcff", r"\xff", "\\", r"\\", "é", "  b' \n$x")]
    for name in alike:
        segment(name)
    rows = command("ls", "--prefix", stem, status=0).stdout.splitlines()[1:]
    assert len({row.split("  segment")[0] for row in rows}) == len(alike)


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_an_advised_command_is_about_this_object(names, segment):
    stem = names()
    for tail in ("\x1b[31m1", r"\x1b[31m", "\udcff0", "a  b' \n$x`\"", "é", " " * 30, "x" * 100):
        segment(stem + tail)
        text = command("why", stem + tail, status=0, env={"COLUMNS": "40"}).stdout
        (advised,) = re.findall("`([^`]*(?:`[^`]*)?)` takes", " ".join(text.split()))
        shell = 'posix-ipc() { printf %s "$3"; }; ' + advised
        told = subprocess.run(["bash", "-c", shell], capture_output=True, check=True).stdout
        assert os.fsdecode(told) == stem + tail


def test_a_long_command_line_is_cut(name, segment):
    from posix_ipc import _tables

    held = segment(name)
    with subprocess.Popen(["x" * 100_000, "60"], executable="/bin/sleep", pass_fds=[held.fd]) as child:
        held.close_fd()
        wait_until(lambda: Path(f"/proc/{child.pid}/comm").read_text() == "sleep\n")
        (row,) = command("ls", "--prefix", name, status=0).stdout.splitlines()[1:]
        assert f" {child.pid} xxx" in row
        assert len(row) < 300
        assert len(command("why", name, status=0).stdout) < 10_000
        child.kill()
    assert _tables.shorten("x" * 1_000_000, 5) == "xxxx…"
    assert [_tables.shorten("añ漢字e\u0301", width) for width in (1, 2, 3, 4, 5, 6, 7)] == [
        "…", "a…", "añ…", "añ…", "añ漢…", "añ漢…", "añ漢字e\u0301",
    ]  # fmt: skip


def on_terminal(*arguments, columns=80, until=None, end=None, env=None):
    """Run a command on a terminal; its status and all that it wrote.

    `until` is what it shows before Ctrl-C or, if given, the signal `end`.
    """
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ.update({"COLUMNS": str(columns), "TERM": "xterm-256color", **(env or {})})
        os.execv(sys.executable, [sys.executable, "-c", MAIN, *map(str, arguments)])
    written = b""
    with contextlib.suppress(OSError):  # EIO is the end of a terminal
        while select.select([terminal], [], [], 60)[0] and (chunk := os.read(terminal, 4096)):
            written += chunk
            if until is not None and until in written:
                os.kill(pid, end) if end else os.write(terminal, b"\x03")
                until = None
    os.close(terminal)  # which ends what still runs, by SIGHUP
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), written.decode()


@pytest.fixture
def without_rich(tmp_path):
    """The environment of a process that cannot import rich."""
    (tmp_path / "rich").mkdir()
    (tmp_path / "rich/__init__.py").write_text("raise ImportError('not installed')")
    return {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}


def test_colour_is_for_terminals_with_rich(name, segment, without_rich):
    pytest.importorskip("rich")
    segment(name)
    status, painted = on_terminal("ls", "--prefix", name)
    assert status == 0
    assert "\x1b[32mlive" in painted
    for env in (without_rich, {"NO_COLOR": "1"}):
        status, plain = on_terminal("ls", "--prefix", name, env=env)
        assert status == 0
        assert "\x1b" not in plain
        without_colour_and_age = re.sub(r"\x1b\[[0-9;]*m|\d+ s", "", painted)
        assert without_colour_and_age.split() == re.sub(r"\d+ s", "", plain).split()


def test_watch_shows_what_comes_and_ends_at_ctrl_c(name, segment):
    segment(name)
    status, written = on_terminal("watch", "--interval", "0.1", "--prefix", name, columns=100, until=name.encode())
    assert status == 0
    assert written.startswith("\x1b[?1049h")
    assert "\x1b[?1049l" in written
    assert name in written.rpartition("\x1b[?1049l")[2]  # what was there last stays to be read
    assert "Traceback" not in written


def test_watch_gives_the_screen_back_when_it_is_terminated(name, segment):
    segment(name)
    arguments = "watch", "--interval", "0.1", "--prefix", name
    status, written = on_terminal(*arguments, columns=100, until=name.encode(), end=signal.SIGTERM)
    assert status == 128 + signal.SIGTERM
    assert "\x1b[?25h\x1b[?1049l" in written
    assert "Traceback" not in written


def test_watch_as_json_is_one_look_a_line(name, segment):
    with start_python(MAIN, "watch", "--json", "--interval", "0.05", "--prefix", name) as child:
        assert json.loads(child.stdout.readline())["objects"] == []
        segment(name)
        wait_until(lambda: [each["name"] for each in json.loads(child.stdout.readline())["objects"]] == [name])
        child.send_signal(signal.SIGINT)
        child.stdout.read()
        assert child.wait(30) == 0
        assert child.stderr.read() == ""


# ---- the end of a command ----


def test_a_reader_that_goes_away_is_no_news(name, segment):
    segment(name)
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-c", MAIN, "ls", "--prefix", name], stdout=writer, stderr=subprocess.PIPE, text=True
    )
    os.close(writer)
    assert done.returncode == 128 + signal.SIGPIPE
    assert done.stderr == ""


@pytest.mark.parametrize("where", ["/dev/full", "&-"])
def test_an_output_that_takes_nothing_is_an_error(where, name, segment):
    segment(name)
    shell = f'exec "$0" -c "$1" ls --prefix "$2" >{where}'
    done = subprocess.run(["sh", "-c", shell, sys.executable, MAIN, name], stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1


def test_notes_do_not_go_where_the_answer_goes(name):
    for arguments in ["why", name, "--json"], ["why", "/a/b"], ["rm", name, "--json"]:
        shell = 'exec "$0" -c "$@" 2>&-'
        done = subprocess.run(["sh", "-c", shell, sys.executable, MAIN, *arguments], stdout=subprocess.PIPE)
        assert done.returncode == 2
        assert b"posix-ipc:" not in done.stdout
        assert not done.stdout or json.loads(done.stdout)


def test_ctrl_c():
    code = (
        "import os, signal, sys\n"
        "from posix_ipc.__main__ import main\n"
        "def hook(event, arguments):\n"
        "    if event == 'os.listdir' and arguments[0] == '/dev/shm': os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.addaudithook(hook)\n"
        "sys.exit(main())"
    )
    done = run_python(code, "ls", check=False)
    assert done.returncode == 128 + signal.SIGINT
    assert (done.stdout, done.stderr) == ("", "")


def with_helper(path, *lines):
    """The command line with a helper process that does this instead."""
    path.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    path.chmod(0o755)
    return f"import multiprocessing; multiprocessing.set_executable({str(path)!r})\n{MAIN}"


def test_a_helper_at_ctrl_c_says_nothing(tmp_path, name):
    code = with_helper(tmp_path / "helper", "echo Traceback >&2", "kill -INT $PPID", "exec sleep 60")
    done = run_python(code, "why", name, check=False)
    assert done.returncode == 128 + signal.SIGINT
    assert (done.stdout, done.stderr) == ("", "")


def test_a_helper_that_fails_says_why_in_a_line(tmp_path, name):
    code = with_helper(tmp_path / "helper", "echo Traceback >&2", "echo 'OSError: no memory' >&2", "exit 1")
    done = run_python(code, "why", name, check=False)
    assert done.returncode == 2
    assert done.stderr == (
        f"posix-ipc: {name}: queues and leases could not be looked at: the helper process failed: "
        "the process that was to run posix_ipc._probe.answer ended with status 1: OSError: no memory\n"
    )


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["rm"], ["ls", "--kind", "file"], ["leaks", "--min-age", "x"]])
def test_wrong_usage(arguments):
    done = command(*arguments, status=2)
    assert "usage: posix-ipc" in done.stderr


def test_as_module_and_as_script():
    script = Path(sys.executable).with_name("posix-ipc")
    told = [
        subprocess.run([*start, "--version"], capture_output=True, text=True, check=True).stdout
        for start in ([sys.executable, "-m", "posix_ipc"], [script])
    ]
    assert told == [f"posix_ipc {posix_ipc.__version__}\n"] * 2


def test_start_is_light():
    """Those that a shell runs at every key must not read all of /proc."""
    run_python(
        "import sys\nfrom posix_ipc.__main__ import main\n"
        "for arguments in (['completion', 'bash'], ['names']): assert main(arguments) == 0\n"
        "assert not {'psutil', 'multiprocessing', 'rich'} & set(sys.modules)"
    )


# ---- doctor ----


def test_doctor_has_an_advice_for_everything():
    done = command("doctor", "--json")
    findings = json.loads(done.stdout)["findings"]
    assert [each["subject"] for each in findings] == [
        "/dev/shm",
        "queues of this user",
        "queue file system",
        "other processes",
        "PID namespace",
        "logind",
        "tracking",
        "Python",
    ]
    assert all(each["fact"] and each["advice"] for each in findings)
    statuses = {each["status"] for each in findings}
    assert statuses <= {"ok", "attention", "unknown"}
    assert done.returncode == (1 if "attention" in statuses else 2 if "unknown" in statuses else 0)
    text = command("doctor", env={"COLUMNS": "70"}).stdout
    assert max(map(len, text.splitlines())) <= 70
    assert f"posix_ipc {posix_ipc.__version__}" in text


def doctor_sees_what_is_short():
    findings = {each["subject"]: each for each in json.loads(command("doctor", "--json", status=1).stdout)["findings"]}
    assert findings["/dev/shm"]["status"] == "ok"
    assert "0 here" in findings["queues of this user"]["fact"]
    with open("/dev/shm/filling", "wb") as file:
        file.write(bytes(15 << 20))  # of 16 MiB
    queue = posix_ipc.MessageQueue("/filling", posix_ipc.O_CREX, **SMALL_QUEUE)
    findings = {each["subject"]: each for each in json.loads(command("doctor", "--json", status=1).stdout)["findings"]}
    assert findings["/dev/shm"]["status"] == "attention"
    assert "15M of 16M in use" in findings["/dev/shm"]["fact"]
    assert "1 here, at least 320B of" in findings["queues of this user"]["fact"]
    queue.unlink()
    os.chmod("/dev/shm/.posix_ipc-0", 0o755) if os.path.exists("/dev/shm/.posix_ipc-0") else os.mkdir(
        f"/dev/shm/.posix_ipc-{os.geteuid()}", 0o755
    )
    findings = {each["subject"]: each for each in json.loads(command("doctor", "--json", status=1).stdout)["findings"]}
    assert findings["tracking"]["status"] == "attention"


def test_doctor_sees_what_is_short():
    run_privately(doctor_sees_what_is_short)


def test_the_file_system_of_shm_is_told_whatever_leads_there(tmp_path):
    from posix_ipc import _mounts

    (tmp_path / "link").symlink_to("/dev/shm")
    told = subprocess.run(["stat", "-f", "-c", "%T", "/dev/shm"], capture_output=True, text=True, check=True).stdout
    assert _mounts.type_of(tmp_path / "link") == told.strip().encode()


@pytest.mark.parametrize(
    ("files", "answer"),
    [
        ({}, True),
        ({"etc/systemd/logind.conf": "[Login]\n#RemoveIPC=yes\n"}, True),
        ({"etc/systemd/logind.conf": "[Login]\nRemoveIPC=no\n"}, False),
        ({"usr/lib/systemd/logind.conf": "RemoveIPC=no", "etc/systemd/logind.conf": "[Login]"}, True),
        ({"etc/systemd/logind.conf": "RemoveIPC=yes", "usr/lib/systemd/logind.conf.d/a.conf": "RemoveIPC=no"}, False),
        ({"etc/systemd/logind.conf.d/a.conf": "", "usr/lib/systemd/logind.conf.d/a.conf": "RemoveIPC=no"}, True),
    ],
)
def test_logind_configuration(tmp_path, files, answer):
    from posix_ipc import _doctor

    for path, text in files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    assert _doctor.remove_ipc(str(tmp_path)) is answer
