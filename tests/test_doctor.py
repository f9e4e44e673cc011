"""What doctor tells of a system, where each thing that it looks at is made so, in namespaces of the test's own."""

import contextlib
import multiprocessing.connection  # noqa: F401  what a helper needs is there before one becomes another user
import os
import resource
import secrets
import subprocess
import sys
from pathlib import Path

import pytest
from support import MESSAGE_QUEUE, SHARED_MEMORY, SMALL_QUEUE, run_forked, run_privately, skip

import posix_ipc

if sys.platform != "linux":
    pytest.skip("the command line is for Linux", allow_module_level=True)

from posix_ipc import _doctor, _holders

pytestmark = pytest.mark.slow


def told(subject):
    """The status, fact and advice of a finding."""
    finding = next(each for each in _doctor.examine() if each.subject == subject)
    return finding.status, finding.fact, finding.advice


def mount(*arguments):
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True)
    if done.returncode != 0:
        skip(f"mount {' '.join(arguments)}: {done.stderr}")


def as_a_user(function):
    """As one that has nothing yet, and no rights."""
    if os.geteuid() != 0:
        skip("only root can become another user")
    user = 2**20 + secrets.randbelow(2**29)

    def become_and_call():
        sys.frozen = True  # helpers are forks: the interpreter may lie where this user cannot go
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
        function()

    run_forked(become_and_call)


# ---- /dev/shm ----


def fill_shm():
    shm = "/dev/shm"
    mount("-o", "remount,size=128m,nr_inodes=1000", shm)
    status, fact, advice = told(shm)
    assert (status, advice) == ("ok", "nothing to do")
    assert " of 128M in use" in fact
    held = SHARED_MEMORY.create("/filling", size=116 << 20)
    os.posix_fallocate(held.fd, 0, 116 << 20)
    status, fact, advice = told(shm)
    assert (status, advice.startswith("nearly full")) == ("attention", True)
    assert "116M of 128M in use (91%)" in fact
    held.unlink()
    held.close_fd()
    mount("-o", "remount,size=64m", shm)
    status, _, advice = told(shm)
    assert (status, advice.startswith("small, as containers have it")) == ("ok", True)
    for number in range(900):
        Path(shm, f"one-of-many-{number}").touch()
    status, fact, advice = told(shm)
    assert (status, advice.startswith("nearly full")) == ("attention", True)
    assert " of 1000 files" in fact
    mount("-t", "ramfs", "none", shm)
    status, fact, advice = told(shm)
    assert (status, advice) == ("attention", "mount -t tmpfs tmpfs /dev/shm")
    assert fact.endswith("it is no tmpfs")


def test_shm():
    run_privately(fill_shm)


# ---- queues ----


def use_up_the_limit():
    """The kernel agrees: whom doctor has told of room gets a queue of default size, and who was warned gets none."""
    subject = "queues of this user"
    first = MESSAGE_QUEUE.create("/first")
    used = _doctor._charge(*SMALL_QUEUE.values())
    default = _doctor._charge(posix_ipc.QUEUE_MESSAGES_MAX_DEFAULT, posix_ipc.QUEUE_MESSAGE_SIZE_MAX_DEFAULT)
    for limit, room in ((used + default, True), (used + default - 1, False)):
        resource.setrlimit(resource.RLIMIT_MSGQUEUE, (limit, limit))
        status, fact, advice = told(subject)
        assert fact.startswith("1 here, at least 320B of ")
        assert (status == "ok", "no room for a queue" not in advice) == (room, room)
        refused = contextlib.nullcontext() if room else pytest.raises(OSError, match="RLIMIT_MSGQUEUE")
        with refused:
            posix_ipc.MessageQueue("/second", posix_ipc.O_CREX).close()
            posix_ipc.unlink_message_queue("/second")
    first.unlink()
    first.close()


def use_up_the_limit_as_a_user():
    as_a_user(use_up_the_limit)


def test_the_limit_of_queues():
    run_privately(use_up_the_limit_as_a_user)


def mount_queues():
    subject = "queue file system"
    status, fact, advice = told(subject)
    assert (status, fact.startswith("not mounted")) == ("attention", True)
    assert "mount -t mqueue" in advice
    os.mkdir("/dev/shm/mount")
    mount("-t", "mqueue", "none", "/dev/shm/mount")
    assert told(subject) == ("ok", "mounted: all queues can be listed", "nothing to do")
    assert told("queues of this user")[1].startswith("0 here, 0B of ")  # no longer "at least"


def test_the_mount_of_queues():
    run_privately(mount_queues)


# ---- who can be seen ----


def hide_processes():
    subject = "other processes"
    assert told(subject) == ("ok", "all that are visible can be looked into", "nothing to do")

    def cannot_look_into_that_of_root():
        status, fact, _ = told(subject)
        assert (status, fact.endswith(" cannot be looked into by this user")) == ("ok", True)

    def cannot_see_that_of_root():
        status, fact, advice = told(subject)
        assert (status, "hidepid" in fact, advice) == ("attention", True, "look as root")

    as_a_user(cannot_look_into_that_of_root)
    mount("-o", "remount,hidepid=2", "/proc")
    as_a_user(cannot_see_that_of_root)
    assert told(subject)[0] == "ok"  # root sees them


def test_hidden_processes():
    run_privately(hide_processes)


def is_in_a_container():
    status, fact, advice = told("PID namespace")
    assert (status, fact.startswith("a container's own")) == ("ok", True)
    assert "--ipc=host" in advice


def test_pid_namespaces():
    run_privately(is_in_a_container)
    if _holders.sees_all_namespaces():
        assert told("PID namespace") == ("ok", "that of the host: all its processes are seen", "nothing to do")


# ---- logind ----


def log_in_and_out():
    subject = "logind"
    mount("-t", "tmpfs", "none", "/run")
    assert told(subject)[1].startswith("systemd does not run here")
    os.makedirs("/run/systemd/system")
    configuration = Path("/run/systemd/logind.conf.d/zzz-last.conf")
    configuration.parent.mkdir()
    configuration.write_text("[Login]\nRemoveIPC=yes\n")
    assert told(subject)[:2] == ("ok", "RemoveIPC=yes, but not for root and other system users")

    def is_warned():
        status, fact, advice = told(subject)
        assert (status, fact.startswith("RemoveIPC=yes")) == ("attention", True)
        assert advice.startswith("RemoveIPC=no in /etc/systemd/logind.conf")

    as_a_user(is_warned)
    configuration.write_text("[Login]\nRemoveIPC=no\n")
    assert told(subject)[:2] == ("ok", "RemoveIPC=no: objects survive the logout of their user")


def test_logind():
    run_privately(log_in_and_out)
