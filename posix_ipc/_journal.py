"""Who owns what: this process's journals, the directory they stand in, and the token of the tree it belongs to.

A journal is a file that is locked as long as exactly one process lives (see `_ext.Journal`). The files of one tree of
processes share a token, that of its root: TOKEN.root is the root's own journal, TOKEN.jRANDOM are those of the others.
TOKEN.proxy is held by the tracker for a root that holds nothing itself, and TOKEN.tracker by the tracker.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import re
import stat
import struct
import time
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, TypeVar

from posix_ipc import _ext, _file_system

NEEDS_LINUX = "posix_ipc: tracked objects and leak detection need Linux; the plain classes are there"
if not hasattr(_ext, "Journal"):
    raise ImportError(NEEDS_LINUX, name=__name__)

SHM = "/dev/shm"
TEMPORARY = ".posix_ipc.tmp-"
"""What the names of files there begin with that are to become objects, where the kernel makes none without a name."""
FIRST_SLOTS = 64
MOST_SLOTS = 8192
TOKEN_FILE = re.compile(r"(?P<token>\d+-\d+-\d+)\.(?P<role>root|proxy|tracker|j[0-9a-f]+)")

_DIRECTORY = re.compile(r"\.posix_ipc-(\d+)(\..*)?", re.DOTALL)

_Made = TypeVar("_Made")

# ---- the directory ----


def directories(uid: int | None = None) -> list[str]:
    """Every directory of journals that belongs to a user, by default the effective one."""
    uid = os.geteuid() if uid is None else uid
    prefix = f".posix_ipc-{uid}"
    names = [name for name in os.listdir(SHM) if name == prefix or name.startswith(prefix + ".")]
    return [path for path in (f"{SHM}/{name}" for name in sorted(names)) if _is_trusted(path, uid)]


def temporaries() -> list[str]:
    """Objects that are being made, or were when their maker died, where files cannot be made without a name."""
    return [f"{SHM}/{name}" for name in os.listdir(SHM) if name.startswith(TEMPORARY)]


def users() -> set[int]:
    """The users who have such directories, as the names of these say."""
    matches = map(_DIRECTORY.fullmatch, os.listdir(SHM))
    return {int(match[1]) for match in matches if match is not None}


def directory() -> str:
    """The directory for new journals, made if there is none. If somebody else has taken its name, one with another."""
    path = f"{SHM}/.posix_ipc-{os.geteuid()}"
    if _make_directory(path):
        return path
    existing = directories()
    if existing:
        return existing[0]
    while True:
        alternative = f"{path}.{os.urandom(8).hex()}"
        if _make_directory(alternative):
            return alternative


def _make_directory(path: str) -> bool:
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        return _is_trusted(path, os.geteuid())
    with contextlib.suppress(FileNotFoundError):  # wiped this instant: whoever uses it comes back
        os.chmod(path, 0o700)  # whatever the umask
    return True


def _is_trusted(path: str, uid: int) -> bool:
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return False
    return stat.S_ISDIR(status.st_mode) and status.st_uid == uid and stat.S_IMODE(status.st_mode) == 0o700


# ---- the token ----


def process_start(pid: int) -> int | None:
    """When the process started, in clock ticks since boot; None if there is none, or none to be seen. See proc(5)."""
    if pid != os.getpid() and not _proc_is_of_this_namespace():
        return None
    try:
        with open(f"/proc/{'self' if pid == os.getpid() else pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in (b"Z", b"X") else int(fields[19])


def _proc_is_of_this_namespace() -> bool:
    """Not where a PID namespace was entered without mounting /proc anew: its numbers are those of other processes."""
    return os.readlink("/proc/self") == str(os.getpid())


def tree_number(token: str) -> int:
    """What pickles call the tree of a token by: a number of 61 bits, not 0, that no other tree should have."""
    return int.from_bytes(token.encode(), "big") % (2**61 - 1) + 1


def pid_namespace() -> int:
    """The inode of the PID namespace, in which pids mean what they mean."""
    return os.stat("/proc/self/ns/pid").st_ino


def token_of(pid: int) -> str | None:
    """The token of a tree with this root; None if it has ended, or its start is not to be seen."""
    start = process_start(pid)
    return None if start is None else f"{pid}-{start}-{pid_namespace()}"


def own_token() -> str:
    """The token of a tree whose root is this process. Raises OSError where nothing tells when that was started."""
    token = token_of(os.getpid())
    if token is None:
        raise OSError(
            errno.ENOENT, "tracked objects need a mounted proc(5), which tells processes apart", "/proc/self/stat"
        )
    return token


def root_lives(token: str) -> bool:
    """Does the process that a token names still run? False also for one that cannot be seen from here.

    Where its start cannot be seen, whoever has its pid is taken for it: that destroys nothing.
    """
    pid, start, namespace = map(int, token.split("-"))
    if namespace != pid_namespace():
        return False
    if pid != os.getpid() and not _proc_is_of_this_namespace():
        return _exists(pid)
    return process_start(pid) == start


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):  # no pid is as large as what may stand in a name
        return False
    except PermissionError:
        pass
    return True


# ---- this process ----


class Process:
    """This process as an owner. After a fork the child makes its own: see `current`."""

    def __init__(self, token: str) -> None:
        self.pid = os.getpid()
        self.euid = os.geteuid()
        self.journals: list[_ext.Journal] = []
        self._elsewhere: list[_ext.Journal] = []
        self._place("", token)

    @property
    def ours(self) -> bool:
        """Is this still the process that it was made in?"""
        return self.pid == os.getpid() and all(journal.ours for journal in self.journals[:1])

    def _place(self, directory: str, token: str) -> None:
        self.directory = directory
        self.token = token
        self.is_root = token.startswith(f"{self.pid}-") and token == own_token()
        self.tracker_lock = self.path("tracker")

    def is_ready(self) -> bool:
        """Is there nothing to be done before this process may own one more object?"""
        last = next(reversed(self.journals), None)
        return last is not None and last.ready(self.tracker_lock) and self.tree_lives()

    def holds_root(self) -> bool:
        """Does its end end the tree? Not if it is a subinterpreter: the file of the root is another one's."""
        return bool(self.journals) and self.journals[0].path.endswith(b".root")

    def path(self, role: str) -> str:
        return f"{self.directory}/{self.token}.{role}"

    def tree_lives(self) -> bool:
        """Is there a root, of which this process is one of the descendants?"""
        if self.is_root or _ext._is_locked(self.path("root")) or _ext._is_locked(self.path("proxy")):
            return True
        return root_lives(self.token)  # it made nothing, and its tracker does not run yet

    def open_journals(self) -> None:
        """Have a journal, where it can be found."""
        if not self.journals:
            self._place(directory(), self.token)
            self.journals.append(self._first_journal())
        elif not self.journals[-1].in_place():
            if os.stat(directory()).st_dev == self.journals[-1].device:
                self._move_journals()  # somebody wiped the directory
            else:
                self._change_file_system()
                self.open_journals()

    def add_journal(self, full: int) -> None:
        """Another one, after `full` of them had no free slot; not if another thread was quicker.

        Nobody tells this process that an object was unlinked by somebody else, so that is looked for first.
        """
        if len(self.journals) == full and not any(map(_free_what_is_gone, self.journals)):
            slots = min(FIRST_SLOTS << full, MOST_SLOTS)
            self.journals.append(self._new_journal(slots, first=False))

    def close_journals(self) -> None:
        for journals in (self.journals, self._elsewhere):
            while journals:
                journals.pop().close()

    def move_to_tree(self, token: str) -> None:
        """Belong to another tree from now on, with all that is owned."""
        self._place(self.directory, token)
        self._move_journals()

    def _change_file_system(self) -> None:
        """Another /dev/shm: this process has entered a mount namespace, or come back.

        What the journals of the other one record is there, and so they stay, locked as long as this process lives.
        """
        known = [*self._elsewhere, *self.journals]
        self.journals = [journal for journal in known if journal.in_place()]
        self._elsewhere = [journal for journal in known if journal not in self.journals]

    def _first_journal(self) -> _ext.Journal:
        journal = self._new_journal(FIRST_SLOTS, first=True)
        path = os.fsdecode(journal.path)
        try:
            _file_system.test(SHM, path)
        except OSError:
            journal.close()
            with contextlib.suppress(FileNotFoundError):  # a sweep was quicker
                os.unlink(path)
            raise
        return journal

    def _new_journal(self, slots: int, first: bool) -> _ext.Journal:
        return self._at_free_path(first, lambda path: _ext.Journal(path, slots))

    def _move_journals(self) -> None:
        self._place(directory(), self.token)
        for index, journal in enumerate(self.journals):
            self._at_free_path(index == 0, journal.move_to)

    def _at_free_path(self, first: bool, make: Callable[[str], _Made]) -> _Made:
        deadline = time.monotonic() + 0.1
        while True:
            role = "root" if first and self.is_root and time.monotonic() < deadline else f"j{os.urandom(8).hex()}"
            try:
                return make(self.path(role))
            except (BlockingIOError, FileExistsError):  # a look at the root's file takes an instant
                time.sleep(0.001)
            except FileNotFoundError:  # somebody wiped the directory
                self._place(directory(), self.token)


def _free_what_is_gone(journal: _ext.Journal) -> bool:
    """Free the slots of files whose name no longer leads to them; True if there were many."""
    descriptor = open_for_look(os.fsdecode(journal.path))
    if descriptor is None:
        return False
    with closing(descriptor):
        entries = read(descriptor).entries
    freed = sum(
        journal.free(entry.slot, entry.identity)
        for entry in entries
        if entry.kind != "message_queue" and entry.state != INTENT and not leads_to(entry)
    )
    return freed > FIRST_SLOTS // 2  # fewer are not worth the look each time


_processes: dict[int, Process] = {}
"""This process, by its effective user: what was recorded for one is no business of another."""


def _forget_parent() -> None:
    global _processes
    _processes = {}  # another one: without the GIL, a thread that is not here may hold the lock of the parent's


os.register_at_fork(after_in_child=_forget_parent)


def current(inherited_token: str) -> Process:
    """This process, as a member of the tree it was born into."""
    euid = os.geteuid()
    process = _processes.get(euid)
    if process is None or not process.ours:
        process = _processes[euid] = Process(inherited_token)
    elif process.token != inherited_token:  # it created something before multiprocessing told it where it belongs
        process.move_to_tree(inherited_token)
    return process


def ready(inherited_token: str) -> Process | None:
    """This process, if it is known to be ready: the short way."""
    try:
        process = _processes[os.geteuid()]  # get() would take the dict's lock, which a fork may find held
    except KeyError:
        return None
    return process if process.token == inherited_token and process.is_ready() else None


def existing() -> list[Process]:
    """This process, for each effective user as whom it has journals."""
    return [process for process in list(_processes.values()) if process.ours and process.journals]


# ---- reading ----

FREE, INTENT, OWNED, CLAIM = range(4)
KINDS = {ord("s"): "semaphore", ord("m"): "shared_memory", ord("q"): "message_queue"}

_HEADER = struct.Struct("=8sIIQ")
_SLOT = struct.Struct("=BBBxHxxQQQ")
_SLOT_SIZE = 288
_LARGEST = (MOST_SLOTS + 1) * _SLOT_SIZE
_MAGIC = b"pipcjrn\0"
_VERSION = 1

Identity = tuple[int, int, int]
"""(device, inode, time of birth in ns since the epoch or 0)"""


def same_object(one: Identity, other: Identity) -> bool:
    """Do both speak of one object? A time of birth that is not known, on whichever side, tells nothing."""
    return one[:2] == other[:2] and (one[2] == other[2] or not (one[2] and other[2]))


class Entry(NamedTuple):
    """What a slot of a journal says."""

    state: int
    kind: str
    shared: bool
    identity: Identity
    name: bytes
    slot: int = -1


class Contents:
    """What a journal says."""

    def __init__(self, ipc_namespace: int, data: bytes) -> None:
        self.ipc_namespace = ipc_namespace
        self._data = data

    @functools.cached_property
    def entries(self) -> list[Entry]:
        """All that it says. Raises NotAJournalError at what makes no sense."""
        return list(_entries(self._data))

    @property
    def is_empty(self) -> bool:
        """Not even a header: its maker is about to write that, or died before."""
        return not self._data

    def says_the_same(self, other: Contents) -> bool:
        return self._data == other._data

    def check(self, of_the_living: bool) -> None:
        """Raises NotAJournalError if it makes no sense, as far as anybody will ask: of the living, only the intents."""
        if of_the_living:
            self.intents()
        else:
            _ = self.entries

    def identities(self, only_shared: bool) -> set[Identity]:
        """What it owns or claims. Quicker than the entries, and all that is asked of a living process."""
        slots = (_SLOT.unpack_from(self._data, offset) for offset in _used(self._data))
        return {slot[4:] for slot in slots if slot[0] != INTENT and (slot[2] or not only_shared)}

    def slots_of(self, identity: Identity) -> list[tuple[int, Identity]]:
        """Those that say that this object is owned, and its identity as they write it.

        No name is read, which a living process may be writing.
        """
        slots = ((offset, _SLOT.unpack_from(self._data, offset)) for offset in _used(self._data))
        return [
            (offset // _SLOT_SIZE - 1, slot[4:])
            for offset, slot in slots
            if slot[0] == OWNED and same_object(slot[4:], identity)
        ]

    def intents(self) -> set[bytes]:
        """The names of queues that it is about to make."""
        if INTENT not in self._data[_SLOT_SIZE::_SLOT_SIZE]:
            return set()
        return {entry.name for entry in self.entries if entry.state == INTENT}


class NotAJournalError(Exception):
    """A file among the journals that is none."""


def read(descriptor: int) -> Contents:
    """Read a journal. One whose maker died before it had a header, of which the magic comes last, is empty."""
    size = os.fstat(descriptor).st_size
    if size > _LARGEST:
        raise NotAJournalError(f"its size is {size}")
    data = os.pread(descriptor, size, 0)
    if not data[: len(_MAGIC)].strip(b"\0"):
        return Contents(0, b"")
    if len(data) < _SLOT_SIZE or len(data) % _SLOT_SIZE:
        raise NotAJournalError(f"its size is {len(data)}")
    magic, version, slot_size, namespace = _HEADER.unpack_from(data)
    if (magic, version, slot_size) != (_MAGIC, _VERSION, _SLOT_SIZE):
        raise NotAJournalError(f"it begins with {data[:16]!r}")
    return Contents(namespace, data)


def _entries(data: bytes) -> Iterator[Entry]:
    for offset in _used(data):
        state, kind, shared, length, device, inode, born = _SLOT.unpack_from(data, offset)
        if kind not in KINDS or not 0 < length <= _SLOT_SIZE - _SLOT.size:
            raise NotAJournalError(f"the slot at {offset} is {data[offset : offset + 16]!r}")
        name = data[offset + _SLOT.size : offset + _SLOT.size + length]
        if b"\0" in name:
            raise NotAJournalError(f"the name at {offset} is {name!r}")
        yield Entry(state, KINDS[kind], bool(shared), (device, inode, born), name, offset // _SLOT_SIZE - 1)


def _used(data: bytes) -> list[int]:
    """Where the slots are that say something."""
    states = data[_SLOT_SIZE::_SLOT_SIZE]
    return [index * _SLOT_SIZE for index, state in enumerate(states, 1) if state in (INTENT, OWNED, CLAIM)]


def still_said(path: str, entries: Iterable[Entry]) -> list[Entry]:
    """Those of the entries read in this journal that nobody has struck out since. See `_reaper.disown`."""
    descriptor = open_for_look(path)
    if descriptor is None:
        return []
    with closing(descriptor):
        return [entry for entry in entries if _reads(descriptor, entry)]


def _reads(descriptor: int, entry: Entry) -> bool:
    slot = os.pread(descriptor, _SLOT.size, (entry.slot + 1) * _SLOT_SIZE)
    return len(slot) == _SLOT.size and (slot[0], _SLOT.unpack(slot)[4:]) == (entry.state, entry.identity)


def path_of(kind: str, name: bytes) -> bytes:
    """The file of a segment or semaphore."""
    prefix = os.fsencode(_ext._SEMAPHORE_FILE_PREFIX) if kind == "semaphore" else b""
    return os.fsencode(SHM) + b"/" + prefix + name.lstrip(b"/")


def leads_to(entry: Entry) -> bool:
    """Does the name of a segment or semaphore still lead to it?"""
    try:
        return same_object(_ext._facts_at(path_of(entry.kind, entry.name))[:3], entry.identity)
    except FileNotFoundError:
        return False


NO_FILE = errno.ENOENT, errno.ELOOP, errno.ENXIO
"""What opening says of something that is gone, a symbolic link or a socket."""


def open_for_look(path: str, uid: int | None = None) -> int | None:
    """A descriptor of a file that a user, by default the effective one, made and nobody else can have touched.

    None if it is no such file, or gone.
    Raises OSError when it cannot be told.
    """
    try:
        try:
            descriptor = os.open(path, _LOOK)
        except PermissionError:
            _give_its_mode(path)
            descriptor = os.open(path, _LOOK)
    except OSError as error:
        if error.errno not in NO_FILE:  # then it may be one that counts
            raise
        return None
    status = os.fstat(descriptor)
    if (
        not stat.S_ISREG(status.st_mode)
        or status.st_uid != (os.geteuid() if uid is None else uid)
        or status.st_nlink != 1
    ):
        os.close(descriptor)
        return None
    return descriptor


_LOOK = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


def _give_its_mode(path: str) -> None:
    """What its maker does next, whatever the umask, unless it dies before."""
    status = os.lstat(path)
    if stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid():
        os.chmod(path, 0o600)


@contextlib.contextmanager
def closing(descriptor: int) -> Iterator[int]:
    try:
        yield descriptor
    finally:
        os.close(descriptor)
