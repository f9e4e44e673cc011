"""A process that takes steps with the posix_ipc it finds and tells what came of each.

Steps arrive on standard input and replies leave on standard output, both pickled. In either direction PREFIX stands for
the prefix of this process's own names. A step is a tuple: the name of a method of Worker, and its arguments.

A slot is a variable for a handle: "sem0", "shm1", "mq0"... One that is used before a step opened something into it
leads to an object that is made then.
"""

import array  # noqa: F401 - like decimal and fractions, for the steps: what nobody cannot read, nobody cannot import
import contextlib
import copy
import ctypes
import decimal  # noqa: F401
import fcntl
import fractions  # noqa: F401
import mmap
import os
import pickle
import queue
import select
import signal
import sys
import threading

import posix_ipc

# As long as every real one, so that the limits on names stay where they are.
PREFIX = "pi-differential-PREFIX-000000000"

DEFAULTS = {
    "sem": {"initial_value": 1},
    "shm": {"size": 64},
    "mq": {"max_messages": 2, "max_message_size": 64},
}
SIGNALS = (signal.SIGUSR1, signal.SIGUSR2)
DEADLINE = 20  # for what is bound to happen
TICK = 0.003


def substitute(value, old, new):
    """Replace a part of all strings in a literal; what is no literal has none."""
    if isinstance(value, str):
        return value.replace(old, new)
    if isinstance(value, bytes):
        return value.replace(old.encode(), new.encode())
    if isinstance(value, (tuple, list)):
        return type(value)(substitute(item, old, new) for item in value)
    if isinstance(value, dict):
        return {key: substitute(item, old, new) for key, item in value.items()}
    return value


def bare(file):
    """Return the name without slash that stands behind the name of a file."""
    return file.removeprefix("sem.").removeprefix("/")


class Worker:
    def __init__(self, prefix):
        self.prefix = prefix
        self.handles = {}
        self.random_names = []
        self.armed = {}  # slot: the handle through which a callback was asked for last
        self.events = queue.SimpleQueue()  # in which a signal handler may put something while its thread gets
        self.types = {"sem": posix_ipc.Semaphore, "shm": posix_ipc.SharedMemory, "mq": posix_ipc.MessageQueue}
        for number in SIGNALS:
            signal.signal(number, lambda number, frame: self.events.put(("signal", int(number))))
        signal.signal(signal.SIGALRM, lambda number, frame: None)

    # ---- replies ----

    def reply(self, step):
        """Take a step.

        Return (outcome, descriptors of our objects that are open after it, files of our random names, in which a queue
        starts with a slash).
        """
        method, *arguments = substitute(step, PREFIX, self.prefix)
        try:
            outcome = ("value", getattr(self, method)(*arguments))
        except Exception as error:
            # What a program can tell apart. The message is for people.
            types = tuple(f"{type.__module__}.{type.__qualname__}" for type in type(error).__mro__)
            outcome = ("error", types, error.errno if isinstance(error, OSError) else None)
        descriptors = sorted(self.hide_names(list(self.descriptors().values())))
        return self.hide_names(outcome), descriptors, tuple(self.random_names)

    def hide_names(self, value):
        for index, file in enumerate(self.random_names):
            value = substitute(value, bare(file), f"random{index}")
        return substitute(value, self.prefix, PREFIX)

    def descriptors(self):
        """Return {descriptor: (what it leads to, its flags, whether a new program inherits it)} for our objects."""
        found = {}
        parts = [self.prefix, *map(bare, self.random_names)]
        for entry in os.listdir("/proc/self/fd"):
            with contextlib.suppress(FileNotFoundError):  # the descriptor of the listing itself
                target = os.readlink(f"/proc/self/fd/{entry}")
                if any(part in target for part in parts):
                    found[int(entry)] = (target, *self.describe(int(entry)))
        return found

    def describe(self, descriptor):
        try:
            flags = fcntl.fcntl(descriptor, fcntl.F_GETFL) & (os.O_ACCMODE | os.O_NONBLOCK)
        except OSError:  # the original lets flags through that make this number negative
            flags = -1
        return flags, bool(fcntl.fcntl(descriptor, fcntl.F_GETFD) & fcntl.FD_CLOEXEC)

    # ---- handles ----

    def prepare(self, slot):
        self.handle(slot)

    def handle(self, slot):
        if slot not in self.handles:
            kind = slot.rstrip("01")
            self.put(slot, self.types[kind](f"/{self.prefix}a", posix_ipc.O_CREAT, **DEFAULTS[kind]))
        return self.handles[slot]

    def put(self, slot, handle):
        self.drop(slot)
        self.handles[slot] = handle

    def open(self, slot, arguments, options):
        handle = self.types[slot.rstrip("01")](*arguments, **options)
        if self.prefix not in handle.name:
            self.random_names.append({"sem": "sem.", "shm": "", "mq": "/"}[slot.rstrip("01")] + handle.name[1:])
        self.put(slot, handle)
        return type(handle).__name__

    def drop(self, slot):
        if slot.startswith("mq") and slot in self.handles:
            # The original, freed while a callback is armed, is used after that.
            with contextlib.suppress(Exception):
                self.handles[slot].request_notification(None)
        self.handles.pop(slot, None)

    def reset(self):
        """Let go of everything; return the events nobody waited for."""
        for slot in list(self.handles):
            with contextlib.suppress(Exception):
                (self.handles[slot].close_fd if slot.startswith("shm") else self.handles[slot].close)()
            self.drop(slot)
        for descriptor in self.descriptors():
            os.close(descriptor)
        self.random_names.clear()
        events = []
        with contextlib.suppress(queue.Empty):
            while True:
                events.append(self.events.get_nowait())
        return events

    # ---- steps ----

    def call(self, slot, method, arguments=(), options=None):
        return self.value_of(getattr(self.handle(slot), method)(*arguments, **(options or {})))

    def value_of(self, value):
        if isinstance(value, int) and value in self.descriptors():  # its number is chance
            return ("descriptor", *self.descriptors()[value])
        return value

    def wait(self, slot, method, arguments=(), options=None):
        """Call what may wait for ever, and interrupt it."""
        signal.setitimer(signal.ITIMER_REAL, TICK, TICK)
        try:
            return self.call(slot, method, arguments, options)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)

    def wait_with_raising_handler(self, slot, method):
        """Return the type of the cause of the SignalError that ends the wait."""

        def handler(number, frame):
            raise LookupError

        before = signal.signal(signal.SIGALRM, handler)
        try:
            while True:
                try:
                    signal.setitimer(signal.ITIMER_REAL, 10 * TICK)
                    self.call(slot, method)
                except LookupError:  # it came before the wait began
                    continue
                except posix_ipc.SignalError as error:
                    return type(error.__cause__).__name__
                finally:
                    signal.setitimer(signal.ITIMER_REAL, 0)
        finally:
            signal.signal(signal.SIGALRM, before)

    def get(self, slot, attribute):
        value = getattr(self.handle(slot), attribute)
        return self.value_of(value) if attribute in ("fd", "mqd") else value

    def set(self, slot, attribute, value):
        setattr(self.handle(slot), attribute, value)

    def delete(self, slot, attribute):
        delattr(self.handle(slot), attribute)

    def text(self, slot):
        return str(self.handle(slot)), repr(self.handle(slot))

    def enter(self, slot):
        handle = self.handle(slot)
        signal.setitimer(signal.ITIMER_REAL, TICK, TICK)
        try:
            with handle as entered:
                return entered is handle, handle.value
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)

    def compare(self, slot, other):
        left, right = self.handle(slot), self.handle(other)
        return left == right, hash(left) == hash(right)

    def copied(self, slot):
        return copy.copy(self.handle(slot)).name

    def pickled(self, slot):
        return pickle.loads(pickle.dumps(self.handle(slot))).name

    def function(self, name, arguments, options):
        return getattr(posix_ipc, name)(*arguments, **options)

    def get_module(self, name):
        return getattr(posix_ipc, name)

    def only_here(self):
        return hasattr(posix_ipc, "_ext")

    def constants(self):
        """Return the names of all constants."""
        return [name for name in dir(posix_ipc) if name.isupper()]

    # ---- steps that show one difference each ----

    def without_init(self, slot, method):
        cls = type(self.handle(slot))
        return getattr(cls.__new__(cls), method)()

    def send_number(self, slot):
        self.handle(slot).send(3)  # written out: it depends on the stack what becomes of it

    def truncate_file(self, slot):
        """Empty the file of a semaphore and forget the handle, through which it is still mapped."""
        self.handle(slot).close()
        os.truncate(f"/dev/shm/sem.{self.handle(slot).name[1:]}", 0)

    def open_and_release(self, slot):
        posix_ipc.Semaphore(f"/{self.prefix}a").release()

    # ---- steps with the descriptor ----

    def truncate(self, slot, size):
        os.ftruncate(self.handle(slot).fd, size)

    def write(self, slot, data):
        return os.pwrite(self.handle(slot).fd, data, 0)

    def map(self, slot, data):
        """Write through one mapping; return what another one shows."""
        segment = self.handle(slot)
        length = min(segment.size, 8192)
        with mmap.mmap(segment.fd, length) as first, mmap.mmap(segment.fd, length, prot=mmap.PROT_READ) as second:
            first[: len(data)] = data
            return second[: len(data) + 1]

    def close_behind(self, slot):
        """Close the descriptor of a segment behind its back; return what the handle makes of it."""
        segment = self.handle(slot)
        os.close(segment.fd)
        found = []
        for look in (lambda: segment.size, segment.close_fd):
            try:
                found.append(look())
            except Exception as error:
                found.append(type(error).__name__)
        return (*found, segment.fd == -1)

    def poll(self, slot):
        poller = select.poll()
        poller.register(self.handle(slot).fileno(), select.POLLIN | select.POLLOUT)
        return [events for descriptor, events in poller.poll(0)]

    # ---- notifications ----

    def notify(self, slot, again):
        """Ask for a callback, which asks for another one while `again` is above 0."""
        queue = self.handle(slot)

        def callback(parameter):
            if parameter > 0:
                queue.request_notification((callback, parameter - 1))
            self.events.put(("callback", parameter))

        queue.request_notification((callback, again))
        self.armed[slot] = queue

    def expects_callback(self):
        """May a handle that is still open have a callback to come?"""
        return any(handle.mqd >= 0 and self.handles.get(slot) is handle for slot, handle in self.armed.items())

    def raising_callback(self, slot):
        """Return what sys.unraisablehook hears of a callback that raises."""
        heard = queue.SimpleQueue()
        called = threading.Event()

        def callback(parameter):
            called.set()
            raise LookupError

        before, sys.unraisablehook = sys.unraisablehook, lambda unraisable: heard.put(unraisable.exc_type.__name__)
        try:
            self.handle(slot).request_notification((callback, None))
            self.handle(slot).send(b"")
            called.wait(DEADLINE)
            with contextlib.suppress(queue.Empty):
                return heard.get(timeout=0.2)
        finally:
            sys.unraisablehook = before

    def event(self):
        """Return the event that is bound to come."""
        return self.events.get(timeout=DEADLINE)

    def event_within(self, seconds):
        """Return the event that may come; None if it does not."""
        with contextlib.suppress(queue.Empty):
            return self.events.get(timeout=seconds)


def main():
    (prefix,) = sys.argv[1:]
    if os.getuid() == 0:  # so that permissions count
        os.setgroups([])
        os.setresgid(65534, 65534, 65534)
        os.setresuid(65534, 65534, 65534)
    ctypes.CDLL(None).srand(os.getpid())  # the original seeds it with the time, and so names collide among processes
    worker = Worker(prefix)
    # Away from the standard streams: the original closes descriptor 0 in a segment whose __init__ did not run.
    with open(os.dup(0), "rb") as steps, open(os.dup(1), "wb") as replies:
        os.dup2(2, 0)
        os.dup2(2, 1)
        with contextlib.suppress(EOFError):
            while True:
                pickle.dump(worker.reply(pickle.load(steps)), replies)
                replies.flush()
    worker.reset()


if __name__ == "__main__":
    main()
