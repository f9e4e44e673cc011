"""What this system gives to POSIX objects, what stands against them, and what to do about it."""

from __future__ import annotations

import glob
import os
import platform
import resource
import stat
import sys
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata

import posix_ipc
from posix_ipc import _aside, _ext, _holders, _journal, _mounts, _survey, leaks
from posix_ipc._tables import size_words
from posix_ipc.leaks import Survey

OK, ATTENTION, UNKNOWN = "ok", "attention", "unknown"
NOTHING_TO_DO = "nothing to do"


@dataclass(frozen=True)
class Finding:
    """A fact and what to do about it."""

    subject: str
    status: str
    """OK, ATTENTION or UNKNOWN."""
    fact: str
    advice: str


def examine() -> Iterator[Finding]:
    """Look at everything. Nothing is changed."""
    looks = _shared_memory, _queues, _queue_mount, _processes, _namespace, _logind, _tracking, _python
    survey = leaks.survey(kinds=["message_queue"])
    for look in looks:
        try:
            yield look(survey)
        except OSError as error:
            subject = look.__name__.strip("_").replace("_", " ")
            yield Finding(subject, UNKNOWN, f"cannot be told: {error}", "see whether this user may read that")


# ---- the kernel's objects ----

NEARLY_FULL = 0.9
DOCKERS_DEFAULT = 64 << 20


def _shared_memory(survey: Survey) -> Finding:
    subject = _journal.SHM
    status = os.statvfs(subject)
    total, free = status.f_blocks * status.f_frsize, status.f_bavail * status.f_frsize
    used = total - status.f_bfree * status.f_frsize
    fact = f"{size_words(used)} of {size_words(total)} in use"
    if total:
        fact += f" ({used / total:.0%})"
    if status.f_files:
        fact += f", {status.f_files - status.f_ffree} of {status.f_files} files"
    if _mounts.type_of(subject) != b"tmpfs":
        return Finding(subject, ATTENTION, f"{fact}; it is no tmpfs", f"mount -t tmpfs tmpfs {subject}")
    crowded = bool(total) and used >= NEARLY_FULL * total
    crowded |= bool(status.f_files) and status.f_files - status.f_ffree >= NEARLY_FULL * status.f_files
    if crowded or free == 0:
        advice = (
            f"nearly full: a write to a new page will be a SIGBUS. See `posix-ipc leaks --unheld`; create with "
            f"reserve=True; or enlarge it: mount -o remount,size=... {subject}, docker run --shm-size=..."
        )
        return Finding(subject, ATTENTION, fact, advice)
    if 0 < total <= DOCKERS_DEFAULT:
        return Finding(
            subject, OK, fact, "small, as containers have it by default: docker run --shm-size=... enlarges it"
        )
    return Finding(subject, OK, fact, NOTHING_TO_DO)


def _queues(survey: Survey) -> Finding:
    subject = "queues of this user"
    if not posix_ipc.MESSAGE_QUEUES_SUPPORTED:
        return Finding(subject, ATTENTION, "not supported by this build", "none but Linux has them here")
    own = [queue for queue in survey.objects if queue.uid == os.geteuid()]
    used = sum(_charge(queue.max_messages or 0, queue.max_message_size or 0) for queue in own)
    limit = resource.getrlimit(resource.RLIMIT_MSGQUEUE)[0]
    per_queue = _sysctl("msg_max"), _sysctl("msgsize_max")
    fact = f"{len(own)} here, {'' if survey.all_queues else 'at least '}{size_words(used)} of "
    fact += "no limit" if limit == resource.RLIM_INFINITY else f"{size_words(limit)} (RLIMIT_MSGQUEUE)"
    fact += f"; each up to {per_queue[0]} messages of {size_words(per_queue[1])} (fs.mqueue.msg_max, msgsize_max)"
    fact += f"; {_sysctl('queues_max')} in the system (queues_max)"
    default = _charge(posix_ipc.QUEUE_MESSAGES_MAX_DEFAULT, posix_ipc.QUEUE_MESSAGE_SIZE_MAX_DEFAULT)
    if limit != resource.RLIM_INFINITY and used + default > limit:
        advice = (
            "no room for a queue of default size: remove some, make them smaller, or raise it (ulimit -q, limits.conf)"
        )
        return Finding(subject, ATTENTION, fact, advice)
    return Finding(
        subject, OK, fact, "what this user has in other IPC namespaces counts too; ulimit -q and sysctl change limits"
    )


def _charge(messages: int, size: int) -> int:
    """What the kernel charges for a queue: its messages when full, and two structures for each. mq_overview(7)."""
    structures = 48 + 48  # msg_msg, posix_msg_tree_node on 64-bit systems
    return messages * (size + structures)


def _sysctl(name: str) -> int:
    with open(f"/proc/sys/fs/mqueue/{name}") as file:
        return int(file.read())


def _queue_mount(survey: Survey) -> Finding:
    subject = "queue file system"
    if survey.all_queues:
        return Finding(subject, OK, "mounted: all queues can be listed", NOTHING_TO_DO)
    advice = "as root: mkdir -p /dev/mqueue && mount -t mqueue mqueue /dev/mqueue"
    return Finding(
        subject, ATTENTION, "not mounted for this IPC namespace: plain queues that nobody holds are not seen", advice
    )


# ---- who can be seen ----


def _processes(survey: Survey) -> Finding:
    subject = "other processes"
    if _holders.processes_are_hidden():
        fact = "/proc hides those of other users (hidepid): what they could hold has the verdict unknown"
        return Finding(subject, ATTENTION, fact, "look as root")
    unread = len(survey.unread_pids)
    if unread:
        fact = f"{unread} cannot be looked into by this user"
        return Finding(subject, OK, fact, "what they could hold has the verdict unknown; root sees more")
    return Finding(subject, OK, "all that are visible can be looked into", NOTHING_TO_DO)


def _namespace(survey: Survey) -> Finding:
    subject = "PID namespace"
    if _holders.sees_all_namespaces():
        return Finding(subject, OK, "that of the host: all its processes are seen", NOTHING_TO_DO)
    fact = "a container's own: processes outside of it are not seen"
    advice = (
        "nothing, as long as /dev/shm is the container's own too. Where others share it (docker run --ipc=host, "
        "--ipc=container:...), what they hold can look unheld: remove orphans only, those are judged by locks"
    )
    return Finding(subject, OK, fact, advice)


LAST_SYSTEM_UID = 999


def _logind(survey: Survey) -> Finding:
    subject = "logind"
    if not os.path.isdir("/run/systemd/system"):
        return Finding(subject, OK, "systemd does not run here: nobody removes objects at logout", NOTHING_TO_DO)
    removes = remove_ipc("/")
    if not removes:
        return Finding(subject, OK, "RemoveIPC=no: objects survive the logout of their user", NOTHING_TO_DO)
    if os.geteuid() <= LAST_SYSTEM_UID:
        return Finding(subject, OK, "RemoveIPC=yes, but not for root and other system users", NOTHING_TO_DO)
    fact = "RemoveIPC=yes: when this user's last session ends, all objects of the user are removed, used or not"
    return Finding(
        subject, ATTENTION, fact, "RemoveIPC=no in /etc/systemd/logind.conf, or run services as a system user"
    )


def remove_ipc(root: str) -> bool:
    """Does logind remove the objects of a user who has logged out? logind.conf(5)"""
    directories = [os.path.join(root, each, "systemd") for each in ("etc", "run", "usr/local/lib", "usr/lib")]
    main = [path for path in (f"{directory}/logind.conf" for directory in directories) if os.path.exists(path)]
    fragments: dict[str, str] = {}
    for directory in reversed(directories):
        fragments |= {os.path.basename(path): path for path in glob.glob(f"{directory}/logind.conf.d/*.conf")}
    answer = True
    for path in [*main[:1], *(fragments[name] for name in sorted(fragments))]:
        with open(path, errors="replace") as file:
            for line in file:
                key, _, value = (part.strip() for part in line.partition("="))
                if key == "RemoveIPC":
                    answer = value.lower() in ("", "1", "yes", "y", "true", "t", "on")
    return answer


# ---- this package ----


def _tracking(survey: Survey) -> Finding:
    subject = "tracking"
    preferred = f"{_journal.SHM}/.posix_ipc-{os.geteuid()}"
    directories = _journal.directories()
    if os.path.lexists(preferred) and preferred not in directories:
        status = os.lstat(preferred)
        whose = f"{_survey.user_name(status.st_uid)}, {stat.filemode(status.st_mode)}"
        fact = f"{preferred} is not a directory of this user alone ({whose})"
        return Finding(subject, ATTENTION, fact, "another name is used instead; find out who took this one")
    journals = sum(_is_journal(name) for directory in directories for name in os.listdir(directory))
    fact = f"supported; {journals} journal{'s' * (journals != 1)} of this user"
    aside = sum(len(_aside.leftovers(directory)) for directory in directories)
    if aside:
        fact += f"; {aside} object{'s' * (aside != 1)} without the name, which a removal took that was killed"
        return Finding(subject, ATTENTION, fact, "posix-ipc reap --yes gives that back")
    try:
        os.close(os.open(_journal.SHM, os.O_TMPFILE | os.O_RDWR, 0o600))
        os.close(_ext._watch(_journal.SHM))
    except OSError as error:
        advice = "objects are cleaned up all the same, a little later; see fs.inotify.max_user_instances, ulimit -n"
        return Finding(subject, ATTENTION, f"{fact}, but: {error}", advice)
    return Finding(subject, OK, fact, NOTHING_TO_DO)


def _is_journal(name: str) -> bool:
    match = _journal.TOKEN_FILE.fullmatch(name)
    return match is not None and match["role"] not in ("proxy", "tracker")


def _python(survey: Survey) -> Finding:
    free_threaded = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))
    locked: Callable[[], bool] = getattr(sys, "_is_gil_enabled", lambda: True)
    lock = "free-threaded" if free_threaded else "with the interpreter lock"
    versions = [f"{package} {_version(package)}" for package in ("psutil", "rich")]
    fact = (
        f"posix_ipc {posix_ipc.__version__}, {platform.python_implementation()} {platform.python_version()} ({lock}), "
        f"{_c_library()}, "
        f"{platform.system()} {platform.release().partition('-')[0]} on {platform.machine()}, {', '.join(versions)}"
    )
    if free_threaded and locked():
        advice = "the interpreter lock is on, since PYTHON_GIL=1, -X gil=1 or some extension module asked for it"
        return Finding("Python", ATTENTION, fact, advice)
    return Finding("Python", OK, fact, NOTHING_TO_DO)


def _c_library() -> str:
    known = "CS_GNU_LIBC_VERSION" in os.confstr_names
    return os.confstr("CS_GNU_LIBC_VERSION") or "unknown" if known else "a C library other than glibc"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
