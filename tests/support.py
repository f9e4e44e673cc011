"""What several test files need: names, the kinds of object, C peers, children with a deadline, waiting for events."""

import contextlib
import ctypes
import errno
import functools
import os
import platform
import secrets
import signal
import struct
import subprocess
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pytest

import posix_ipc

SKIPPED = 77  # the status of a child that cannot run here

TESTS = Path(__file__).resolve().parent
PACKAGE_PARENT = Path(posix_ipc.__file__).resolve().parent.parent

# Small: all queues of a user share one budget (RLIMIT_MSGQUEUE), and other runs of the suite draw on it too.
SMALL_QUEUE = {"max_messages": 2, "max_message_size": 64}

# ---- names ----

# Every name handed out since the running test began; conftest.py looks for what is left of them.
names_handed_out = []


def unique_name():
    """Return a legal name nobody else uses, short enough to be extended by a test."""
    name = f"/pi-{os.getpid()}-{secrets.token_hex(6)}"
    names_handed_out.append(name)
    return name


# ---- what a C program does with the same objects ----


class CLibrary:
    """The C library's own functions on named objects; a failure is an OSError."""

    class QueueAttributes(ctypes.Structure):
        _fields_ = [(name, ctypes.c_long) for name in ("flags", "maxmsg", "msgsize", "curmsgs", "r1", "r2", "r3", "r4")]

    def __init__(self):
        library = ctypes.CDLL(None, use_errno=True)
        c_int, c_uint, c_char_p, c_size_t, c_void_p = (
            ctypes.c_int, ctypes.c_uint, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_void_p,
        )  # fmt: skip
        for name, result, *arguments in (
            ("sem_open", c_void_p, c_char_p, c_int, c_uint, c_uint),
            ("sem_post", c_int, c_void_p),
            ("sem_wait", c_int, c_void_p),
            ("sem_trywait", c_int, c_void_p),
            ("sem_getvalue", c_int, c_void_p, ctypes.POINTER(c_int)),
            ("sem_close", c_int, c_void_p),
            ("sem_unlink", c_int, c_char_p),
            ("shm_open", c_int, c_char_p, c_int, c_uint),
            ("shm_unlink", c_int, c_char_p),
            ("mq_open", c_int, c_char_p, c_int, c_uint, ctypes.POINTER(self.QueueAttributes)),
            ("mq_send", c_int, c_int, c_char_p, c_size_t, c_uint),
            ("mq_receive", ctypes.c_ssize_t, c_int, c_char_p, c_size_t, ctypes.POINTER(c_uint)),
            ("mq_getattr", c_int, c_int, ctypes.POINTER(self.QueueAttributes)),
            ("mq_unlink", c_int, c_char_p),
        ):
            function = getattr(library, name)
            function.restype, function.argtypes, function.errcheck = result, arguments, self._check
            setattr(self, name, function)

    @staticmethod
    def _check(result, function, arguments):
        if result in (-1, None):  # None: sem_open's null pointer, SEM_FAILED
            number = ctypes.get_errno()
            raise OSError(number, f"{function.__name__}: {os.strerror(number)}", arguments[0])
        return result

    def semaphore_value(self, semaphore):
        value = ctypes.c_int()
        self.sem_getvalue(semaphore, value)
        return value.value

    def receive(self, queue, size):
        """Return (message, priority)."""
        buffer, priority = ctypes.create_string_buffer(size), ctypes.c_uint()
        length = self.mq_receive(queue, buffer, size, priority)
        return buffer.raw[:length], priority.value


libc = CLibrary()


# ---- the three kinds of object ----


@dataclass(frozen=True, eq=False)
class Kind:
    """One of the three types, with what differs between them where a test is about all of them."""

    type: type
    options: dict  # for a small new object
    close: str  # the name of the method
    unlink: object  # the function of the module
    path: str  # of the object's file; empty for queues, which have none without a mount
    peer_unlink: object

    def create(self, name, flags=posix_ipc.O_CREX, **options):
        return self.type(name, flags, **{**self.options, **options})

    def close_handle(self, handle):
        getattr(handle, self.close)()

    def file_of(self, name):
        return self.path + os.fsdecode(name).lstrip("/")

    def exists(self, name):
        """Ask the system, not the module under test."""
        if self.path:
            return os.path.lexists(self.file_of(name))
        try:
            os.close(libc.mq_open(os.fsencode(name), os.O_RDONLY | os.O_NONBLOCK, 0, None))
        except FileNotFoundError:
            return False
        except PermissionError:
            pass  # it is there, for others
        return True

    def remove(self, name):
        """Unlink, whether it exists or not, behind the back of the module under test."""
        try:
            self.peer_unlink(os.fsencode(name))
        except FileNotFoundError:
            return False
        return True


SEMAPHORE = Kind(posix_ipc.Semaphore, {}, "close", posix_ipc.unlink_semaphore, "/dev/shm/sem.", libc.sem_unlink)
SHARED_MEMORY = Kind(
    posix_ipc.SharedMemory, {"size": 64}, "close_fd", posix_ipc.unlink_shared_memory, "/dev/shm/", libc.shm_unlink
)
MESSAGE_QUEUE = Kind(posix_ipc.MessageQueue, SMALL_QUEUE, "close", posix_ipc.unlink_message_queue, "", libc.mq_unlink)
KINDS = (SEMAPHORE, SHARED_MEMORY, MESSAGE_QUEUE)


def semaphore_waiters(name):
    """Return how many threads of all processes wait on the semaphore: the upper half of glibc's 64-bit counter."""
    with open(SEMAPHORE.file_of(name), "rb") as file:
        return int.from_bytes(file.read(8), sys.byteorder) >> 32


# ---- children ----


def _command(code, args):
    return [sys.executable, "-X", "faulthandler", "-c", code, *map(str, args)]


def _environment(env):
    path = os.pathsep.join(filter(None, [str(PACKAGE_PARENT), str(TESTS), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, **(env or {})}


def run_python(code, *args, timeout=60, env=None, check=True, prefix=()):
    """Run `code` in a new interpreter, which finds the same package and this file.

    `env` is added to the environment; `prefix` is a command that runs the interpreter. With `check` a status other
    than 0, death by a signal among them, fails the calling test with what the child printed. A child that is not done
    within `timeout` seconds is killed.
    """
    child = subprocess.run(
        [*prefix, *_command(code, args)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="surrogateescape",
        timeout=timeout,
        env=_environment(env),
    )
    if check:
        check_status(child.returncode, child.stdout, child.stderr)
    return child


def run_function(function, *args, prefix=(), timeout=60, env=None):
    """Run a function of a test file in a new interpreter, with arguments that repr() can write; return what it printed.

    Dying, an exception and not coming to an end fail the calling test, the last with the stacks of all threads; with
    the status SKIPPED the child skips it.
    """
    code = (
        "import ast, faulthandler, importlib, sys\n"
        "faulthandler.dump_traceback_later(float(sys.argv[3]), exit=True)\n"
        "function = getattr(importlib.import_module(sys.argv[1]), sys.argv[2])\n"
        "function(*map(ast.literal_eval, sys.argv[4:]))\n"
    )
    where = function.__module__, function.__name__, timeout - 10
    child = run_python(code, *where, *map(repr, args), prefix=prefix, timeout=timeout, env=env, check=False)
    if child.returncode == SKIPPED:
        pytest.skip(child.stderr.strip())
    check_status(child.returncode, child.stdout, child.stderr)
    return child.stdout


def skip(reason):
    """In a child of run_function: skip the test."""
    sys.stderr.write(f"{reason}\n")
    sys.stderr.flush()
    os._exit(SKIPPED)


def run_forked(function, *args, timeout=60, **options):
    """Call a function in a forked child, which has one thread; dying and an exception fail the calling test.

    Much quicker than a new interpreter. The child ends without running the finalizers it got from the parent; if it
    skips, so does the calling test.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(timeout)
            function(*args, **options)
            report = "passed"
        except pytest.skip.Exception as reason:
            report = f"skipped{reason}"
        except BaseException:
            report = traceback.format_exc()
        finally:
            with open(writer, "w") as pipe:
                pipe.write(report)
            os._exit(0)
    os.close(writer)
    with open(reader) as pipe:
        report = pipe.read()
    check_status(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), "", report)
    if report.startswith("skipped"):
        pytest.skip(report.removeprefix("skipped"))
    if report != "passed":
        raise AssertionError(report or "the child ended before the function did")


@functools.cache
def private_ipc():
    """Return a command that runs another one with /dev/shm and queues of its own; None where that is barred."""
    for unshare in (["unshare", "-mi"], ["unshare", "-rmi"]):
        prefix = [*unshare, "sh", "-c", 'mount -t tmpfs -o size=16m tmpfs /dev/shm && exec "$0" "$@"']
        with contextlib.suppress(FileNotFoundError):
            if subprocess.run([*prefix, "true"], capture_output=True).returncode == 0:
                return prefix
    return None


@functools.cache
def private_host():
    """Return a command as private_ipc does, with processes of its own too; all of them end with the command."""
    # The shell is process 1. A mount of other queues is covered, for nobody but root may unmount it.
    shell = (
        "mount -t tmpfs -o size=16m tmpfs /dev/shm && "
        '{ test ! -d /dev/mqueue || mount -t tmpfs tmpfs /dev/mqueue; } && "$0" "$@"'
    )
    for unshare in (["unshare", "-mipf"], ["unshare", "-rmipf"]):
        prefix = [*unshare, "--mount-proc", "--kill-child", "sh", "-c", shell]
        with contextlib.suppress(FileNotFoundError):
            if subprocess.run([*prefix, "true"], capture_output=True).returncode == 0:
                return prefix
    return None


def run_privately(function, *args):
    """Run a function of a test file as run_function does, behind private_host; skip the test where that is barred.

    A test that may as well run among the others, where it must, is marked `private` instead.
    """
    prefix = private_host()
    if prefix is None:
        pytest.skip("needs namespaces of its own: unshare -rmipf")
    return run_function(function, *args, prefix=prefix)


def bad_journals():
    """By what is wrong: journals that no sweep understands, and one of which that goes for a slot only."""
    header = struct.pack("=8sIIQ", b"pipcjrn\0", 1, 288, os.stat("/proc/self/ns/ipc").st_ino).ljust(288, b"\0")
    return {
        "version": header.replace(b"pipcjrn\0\1", b"pipcjrn\0\2") + bytes(288),
        "size": header + bytes(3),
        "intent": header + b"\1Z".ljust(288, b"\0"),
        "slot": header + b"\2Z".ljust(288, b"\0"),
        "name": header + b"\2m\0\0\6".ljust(288, b"\0"),
    }


@contextlib.contextmanager
def living_journal(data, uid):
    """A process of this user holds a journal that says this, as the living do; root may name another user."""
    code = (
        "import fcntl, os, sys\n"
        "uid, data = int(sys.argv[1]), bytes.fromhex(sys.argv[2])\n"
        "os.setresuid(uid, uid, uid)\n"
        "directory = f'/dev/shm/.posix_ipc-{uid}'\n"
        "os.makedirs(directory, 0o700, exist_ok=True)\n"
        "descriptor = os.open(f'{directory}/1-1-1.j0', os.O_CREAT | os.O_RDWR | os.O_TRUNC, 0o600)\n"
        "fcntl.flock(descriptor, fcntl.LOCK_EX)\n"
        "os.write(descriptor, data)\n"
        "print('ready', flush=True); sys.stdin.read()\n"
    )
    with start_python(code, uid, data.hex()) as child:
        wait_until_ready(child)
        yield child


@contextlib.contextmanager
def start_python(code, *args, env=None):
    """Start `code` as run_python does, with pipes to its standard streams; killed if it still runs at the end."""
    with subprocess.Popen(
        _command(code, args),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=_environment(env),
    ) as child:
        try:
            yield child
        finally:
            child.kill()


def finish(child, timeout=60):
    """Wait for a child of start_python to end well; return what it printed since."""
    stdout, stderr = child.communicate(timeout=timeout)
    check_status(child.returncode, stdout, stderr)
    return stdout


def check_status(returncode, stdout, stderr):
    if returncode != 0:
        end = signal.Signals(-returncode).name if returncode < 0 else f"status {returncode}"
        raise AssertionError(f"the child ended with {end}\n--- stdout\n{stdout}\n--- stderr\n{stderr}")


def wait_until_ready(child):
    """Wait for the line "ready" from a child of start_python."""
    line = child.stdout.readline()
    if line != "ready\n":
        raise AssertionError(f"the child said {line!r}\n--- stderr\n{child.stderr.read()}")


def wait_until_blocked(child):
    """Wait until a single-threaded child sleeps in a system call; return the call's number and its arguments."""

    def blocked():
        if child.poll() is not None:
            raise AssertionError(f"the child ended before it blocked\n--- stderr\n{child.stderr.read()}")
        words = Path(f"/proc/{child.pid}/syscall").read_text().split()
        return len(words) > 7 and [int(words[0]), *(int(word, 16) for word in words[1:7])]

    number, *arguments = wait_until(blocked)
    return number, arguments


# ---- waiting and counting ----


def wait_until(predicate, timeout=30):
    """Return the first true value of `predicate()`; fail when there is none within `timeout` seconds."""
    deadline = time.monotonic() + timeout
    pause = 0.0005
    while True:
        value = predicate()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout} s: {predicate!r}")
        time.sleep(pause)
        pause = min(pause * 2, 0.02)


def open_fds():
    """Return {descriptor: what it leads to} of this process."""
    found = {}
    for entry in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the descriptor of the listing itself
            found[int(entry)] = os.readlink(f"/proc/self/fd/{entry}")
    return found


def threads():
    """Return the kernel's ids of this process's threads, those unknown to Python among them."""
    return set(os.listdir("/proc/self/task"))


def mappings(inode):
    """Return the lines of /proc/self/maps about a file, which may have lost its name."""
    with open("/proc/self/maps") as maps:
        return [line for line in maps if line.split()[4] == str(inode)]


# ---- threads ----


def run_threads(*functions):
    """Run each in a thread of its own, all starting together, and raise what the first to fail raised."""
    start = threading.Barrier(len(functions))
    errors = []

    def run(function):
        start.wait()
        try:
            function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=[function], daemon=True) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


# ---- calls that wait ----


class BlockingCall(NamedTuple):
    """A call that waits on a handle which `prepare` has made ready for it, until `unblock` lets one such call go on."""

    kind: Kind
    prepare: object
    call: object
    unblock: object


def _fill(queue):
    for _ in range(queue.max_messages):
        queue.send(b"filling")


def _receive_into(queue, *timeout):
    """Return what receive() would."""
    buffer = bytearray(queue.max_message_size)
    length, priority = queue.receive_into(buffer, *timeout)
    return bytes(buffer[:length]), priority


def _blocking_calls():
    nothing = lambda handle: None  # noqa: E731
    release, send, receive = (
        lambda semaphore: semaphore.release(),
        lambda queue: queue.send(b"awaited"),
        lambda queue: queue.receive(60),
    )
    return {
        "acquire()": BlockingCall(SEMAPHORE, nothing, lambda semaphore: semaphore.acquire(), release),
        "acquire(60)": BlockingCall(SEMAPHORE, nothing, lambda semaphore: semaphore.acquire(60), release),
        "with": BlockingCall(SEMAPHORE, nothing, lambda semaphore: semaphore.__enter__(), release),
        "receive()": BlockingCall(MESSAGE_QUEUE, nothing, lambda queue: queue.receive(), send),
        "receive(60)": BlockingCall(MESSAGE_QUEUE, nothing, lambda queue: queue.receive(60), send),
        "receive_into()": BlockingCall(MESSAGE_QUEUE, nothing, lambda queue: _receive_into(queue), send),
        "receive_into(60)": BlockingCall(MESSAGE_QUEUE, nothing, lambda queue: _receive_into(queue, 60), send),
        "send()": BlockingCall(MESSAGE_QUEUE, _fill, lambda queue: queue.send(b"waiting"), receive),
        "send(60)": BlockingCall(MESSAGE_QUEUE, _fill, lambda queue: queue.send(b"waiting", 60), receive),
    }


BLOCKING_CALLS = _blocking_calls()

# System calls by number: first those of x86_64, then those that all younger architectures share.
_FUTEX, *_QUEUE_WAITS = (202, 7, 271, 242, 243) if platform.machine() == "x86_64" else (98, 73, 73, 182, 183)


def is_blocked(thread):
    """Does a thread of this process sleep in a call of BLOCKING_CALLS, and not, say, for the interpreter lock?"""
    words = Path(f"/proc/self/task/{thread.native_id}/syscall").read_text().split()
    if not words[0].isdigit():  # it runs
        return False
    if int(words[0]) == _FUTEX:
        return _is_in_shared_memory(int(words[1], 16))
    return int(words[0]) in _QUEUE_WAITS  # poll, ppoll, mq_timedsend, mq_timedreceive


def _is_in_shared_memory(address):
    with open("/proc/self/maps") as maps:
        for line in maps:
            start, end = (int(word, 16) for word in line.split()[0].split("-"))
            if start <= address < end:
                return " /dev/shm/" in line
    return False


class Waiter(threading.Thread):
    """A thread that makes a blocking call; it is known to wait when the constructor returns."""

    def __init__(self, call, handle):
        super().__init__(daemon=True)
        self._blocking_call, self._subject = call, handle
        self.result = self.error = None
        self.start()
        wait_until(self._is_blocked)

    def _is_blocked(self):
        try:
            return is_blocked(self)
        except FileNotFoundError:
            raise AssertionError(f"the call did not wait: {self.result!r}, {self.error!r}") from self.error

    def run(self):
        try:
            self.result = self._blocking_call(self._subject)
        except BaseException as error:  # it is the outcome
            self.error = error

    def outcome(self):
        """Wait for the call to end; return the exception it raised, None if it did not."""
        self.join(30)
        if self.is_alive():
            raise AssertionError("the call still waits")
        return self.error


# ---- namespaces ----

CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWUSER = 0x00020000, 0x08000000, 0x10000000
MS_RDONLY, MS_REMOUNT = 1, 32
_MS_REC, _MS_PRIVATE = 16384, 1 << 18


def _checked(result, call):
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{call}: {os.strerror(number)}")


def _unshare(flags):
    """Leave the namespaces of all others; OSError where that is barred."""
    library = ctypes.CDLL(None, use_errno=True)
    private = _MS_REC | _MS_PRIVATE
    _checked(library.unshare(flags), "unshare")
    # Nothing that is mounted from here on may reach the others. After a chroot "/" is not always a mount point.
    if flags & CLONE_NEWNS and library.mount(None, b"/", None, private, None) < 0:
        _checked(library.mount(None, b"/dev/shm", None, private, None), "mount")


def enter_new_namespaces(flags):
    """In a child of run_function: leave the mounts (CLONE_NEWNS) or the queues (CLONE_NEWIPC) of all others.

    The test is skipped where that is not allowed.
    """
    try:
        _unshare(flags)
    except OSError as error:
        skip(error)


def set_namespace(descriptor):
    """Enter one that a descriptor of a file in /proc/PID/ns leads to."""
    _checked(ctypes.CDLL(None, use_errno=True).setns(descriptor, 0), "setns")


def run_apart_if_allowed(function, **options):
    """Call a function as run_forked does, with a /dev/shm and queues of its own; where that is barred, just call it."""
    if private_ipc() is None:
        function(**options)
    else:
        run_forked(_call_apart, function, options)


def _call_apart(function, options):
    user, group = os.geteuid(), os.getegid()
    if user == 0:
        _unshare(CLONE_NEWNS | CLONE_NEWIPC)
    else:  # in a user namespace one may; who executes a program there is an ordinary user again
        _unshare(CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWIPC)
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    mount_shm("size=16m")
    function(**options)


def mount_shm(options="", flags=0):
    """After enter_new_namespaces(CLONE_NEWNS): put an empty file system over /dev/shm."""
    library = ctypes.CDLL(None, use_errno=True)
    _checked(library.mount(b"none", b"/dev/shm", b"tmpfs", flags, options.encode()), "mount")


def become_nobody():
    """In a child of run_function: give up the rights of root, for good; the test is skipped for other users."""
    if os.getuid() != 0:
        skip("only root can become another user")
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)


NOBODY = 65534

# ---- system calls that are refused ----


def forbid(system_call, error, argument=None, bits=0xFFFFFFFF):
    """In a child: from here on the kernel answers a call of this thread, and of all that it starts, with an error.

    With `argument`, a number from 0, only where any of these of its lower 32 bits is set. See seccomp(2), bpf(2).
    """
    load, equal, any_bit, answer = 0x20, 0x15, 0x45, 0x06
    asks = []
    if argument is not None:
        asks = [(load, 0, 0, 16 + 8 * argument + (0 if sys.byteorder == "little" else 4)), (any_bit, 0, 1, bits)]
    instructions = [
        (load, 0, 0, 0),
        (equal, 0, len(asks) + 1, system_call),
        *asks,
        (answer, 0, 0, 0x00050000 | error),
        (answer, 0, 0, 0x7FFF0000),
    ]
    filters = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *each) for each in instructions))
    program = ctypes.create_string_buffer(struct.pack("HP", len(instructions), ctypes.addressof(filters)))
    library = ctypes.CDLL(None, use_errno=True)
    if library.prctl(38, 1, 0, 0, 0) < 0 or library.prctl(22, 2, program, 0, 0) < 0:
        skip(f"no right to a seccomp filter: {os.strerror(ctypes.get_errno())}")


_OPENAT = 257 if platform.machine() == "x86_64" else 56


def have_no_file_without_a_name():
    """In a child: as on a file system that cannot make them, see O_TMPFILE in open(2)."""
    forbid(_OPENAT, errno.EOPNOTSUPP, argument=2, bits=os.O_TMPFILE & ~os.O_DIRECTORY)
    with pytest.raises(OSError, match="not supported"):
        os.open("/dev/shm", os.O_TMPFILE | os.O_RDWR)
