"""Two workers, one with this package and one with the original, and what the system says while they go on."""

import contextlib
import os
import pickle
import select
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from support import MESSAGE_QUEUE, PACKAGE_PARENT, libc, unique_name, wait_until

from . import steps
from .intended import DIFFERENCES, calls
from .worker import PREFIX, bare, substitute

DEADLINE = 60  # for a step, none of which takes a second
WORKER = Path(__file__).with_name("worker.py")


class Observation(NamedTuple):
    """What a step came to, PREFIX in place of the prefix of the names."""

    outcome: tuple  # ("value", what), ("error", its types, the errno of an OSError) or ("death", number of the signal)
    event: tuple | None  # the notification that the step gave rise to
    files: dict  # in /dev/shm: name, size, mode, owner, beginning
    queues: dict  # name, or number where it has none any more: limits, messages, mode, owner, who is to be notified how
    descriptors: list  # of the worker that lead to our objects

    @property
    def state(self):
        return self[2:]


class Child:
    """A worker that imports posix_ipc from a directory, and what can be seen of its objects from outside."""

    def __init__(self, directory):
        self.prefix = unique_name()[1:].ljust(len(PREFIX), "-")
        self._random_files = {}  # in order
        self._watched = {}  # our own descriptors of the queues, by inode, which outlive their names
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-X", "faulthandler", WORKER, self.prefix],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env={**os.environ, "PYTHONPATH": str(directory), "PYTHONWARNINGS": "ignore"},
        )

    def send(self, *step):
        with contextlib.suppress(BrokenPipeError):  # receive() will tell
            pickle.dump(step, self._process.stdin)
            self._process.stdin.flush()

    def receive(self):
        """Return (outcome, descriptors) of the step that was sent."""
        in_time, _, _ = select.select([self._process.stdout], [], [], DEADLINE)
        if not in_time:
            self._process.send_signal(signal.SIGABRT)  # it tells where it hangs
        try:
            outcome, descriptors, files = pickle.load(self._process.stdout)
        except EOFError:
            status = self._process.wait()
            if status >= 0 or not in_time:
                raise AssertionError(f"the worker failed: {self._last_words()}") from None
            return ("death", -status), []
        self._random_files.update(dict.fromkeys(files))
        return outcome, descriptors

    def _last_words(self):
        self._errors.seek(0)
        return self._errors.read().decode(errors="replace")

    def ask(self, *step):
        self.send(*step)
        return self.receive()

    def dead(self):
        return self._process.poll() is not None

    def prepare(self, step):
        """Let a queue that the step makes implicitly be seen before the step can take its name away."""
        for slot in step[1:]:
            if slot in ("mq0", "mq1"):
                self.ask("prepare", slot)
                self.queues()

    # ---- what can be seen ----

    def files(self):
        names = [name for name in os.listdir("/dev/shm") if self._is_ours(name)]
        return {self._hide(name): self._file(f"/dev/shm/{name}") for name in names}

    def _is_ours(self, file):
        return self.prefix in file or file in self._random_files

    def _hide(self, name):
        for index, file in enumerate(self._random_files):
            name = name.replace(bare(file), f"random{index}")
        return name.replace(self.prefix, PREFIX)

    def _file(self, path):
        status = os.stat(path)
        try:
            with open(path, "rb") as file:
                beginning = file.read(64)
        except PermissionError:
            beginning = None
        return status.st_size, oct(status.st_mode), status.st_uid, status.st_gid, beginning

    def queues(self):
        names = {}
        for name in self._queue_names():
            try:
                descriptor = libc.mq_open(os.fsencode(name), os.O_RDONLY | os.O_NONBLOCK, 0, None)
            except FileNotFoundError:
                continue
            except PermissionError:
                names[name] = self._hide(name)
                continue
            inode = os.fstat(descriptor).st_ino
            names[inode] = self._hide(name)
            if self._watched.setdefault(inode, descriptor) != descriptor:
                os.close(descriptor)
        found = dict.fromkeys(names.values())  # None: that may not be looked at
        for number, (inode, descriptor) in enumerate(self._watched.items()):
            found[names.get(inode, number)] = self._queue(descriptor)
        return found

    def queues_rearmed(self, before):
        """Give a thread of the child, as this package has one, a moment to ask again for what was forgotten."""
        with contextlib.suppress(AssertionError):
            wait_until(lambda: not _forgets(before, self.queues()), timeout=1)
        return self.queues()

    def _queue_names(self):
        random = (file for file in self._random_files if file.startswith("/"))
        return [*(substitute(name, PREFIX, self.prefix) for name in steps.NAMES), *random]

    def _queue(self, descriptor):
        attributes = libc.QueueAttributes()
        libc.mq_getattr(descriptor, attributes)
        status = os.fstat(descriptor)
        # b"QSIZE:3  NOTIFY:0  SIGNO:10  NOTIFY_PID:1234"
        told = dict(word.split(":") for word in os.pread(descriptor, 200, 0).decode().split())
        notification = int(told["NOTIFY"]), int(told["SIGNO"]), int(told["NOTIFY_PID"]) == self._process.pid
        return {
            "limits": (attributes.maxmsg, attributes.msgsize),
            "messages": (attributes.curmsgs, int(told["QSIZE"])),
            "mode": (oct(status.st_mode), status.st_uid, status.st_gid),
            "notification": notification,
        }

    # ---- the end ----

    def reset(self):
        """Leave nothing of the sequence; return the notifications nobody expected."""
        blind = None in self.queues().values()
        outcome, descriptors = self.ask("reset") if not self.dead() else (None, [])
        self.clean_up()
        return None if blind else (outcome, descriptors)

    def clean_up(self):
        for name in os.listdir("/dev/shm"):
            if self._is_ours(name):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(f"/dev/shm/{name}")
        for name in self._queue_names():
            with contextlib.suppress(PermissionError):
                MESSAGE_QUEUE.remove(name)
        for descriptor in self._watched.values():
            os.close(descriptor)
        self._watched.clear()
        self._random_files.clear()

    def close(self):
        self._process.kill()
        self._process.wait()
        for file in (self._process.stdin, self._process.stdout, self._errors):
            with contextlib.suppress(BrokenPipeError):
                file.close()
        self.clean_up()


class Pair:
    """This package and the original."""

    def __init__(self, original_directory):
        self._directories = PACKAGE_PARENT, original_directory
        self._children = None

    def close(self):
        for child in self._children or ():
            child.close()
        self._children = None

    def run(self, sequence):
        """Yield (step, what it came to here, what it came to there); end with the sequence, or with a death."""
        if self._children is None:
            self._children = [Child(directory) for directory in self._directories]
        before = [{}, {}]
        try:
            for step in sequence:
                observations = self._take(step, before)
                yield step, *observations
                if any(child.dead() for child in self._children):
                    return
                before = [observation.queues for observation in observations]
        finally:  # not to be awaited: whoever iterates may have had enough
            left = [child.reset() for child in self._children]
            if any(child.dead() for child in self._children):
                self.close()
        assert left[0] == left[1] or None in left, f"notifications that nobody expected, and open descriptors: {left}"

    def _take(self, step, before):
        for child in self._children:
            if step[0] not in ("open", "drop"):
                child.prepare(step)
            child.send(*step)
        replies = [child.receive() for child in self._children]
        return [self._observe(step, *each) for each in zip(self._children, replies, before, strict=True)]

    def _observe(self, step, child, reply, before):
        outcome, descriptors = reply
        event = None
        queues = child.queues()
        if _closes_beside_messages(step, before) and child.ask("expects_callback")[0] == ("value", True):
            heard, descriptors = child.ask("event_within", 1)
            event = heard if heard != ("value", None) else None
            queues = child.queues()
        elif _forgets(before, queues) and child.ask("expects_callback")[0] == ("value", True):
            queues = child.queues_rearmed(before)
        if any(_notifies(before.get(name), queue) for name, queue in queues.items()):
            event, descriptors = child.ask("event")
            queues = child.queues()
        return Observation(outcome, event, child.files(), queues, descriptors)


def _notifies(before, after):
    """Is a notification on its way? It is, once, when a queue that was empty gets a message and nobody waits for it."""
    if before is None or after is None:
        return False
    how, number, registered = before["notification"]
    arrived = before["messages"][0] == 0 and after["messages"][0] == 1
    return arrived and registered and (how == 2 or number != 0)


def _closes_beside_messages(step, before):
    """May the step have a callback forgotten, although its queue is not empty? This package calls it then."""
    return calls(step, "close", "mq") and any(
        queue is not None and queue["notification"] == (2, 0, True) and queue["messages"][0] > 0
        for queue in before.values()
    )


def _forgets(before, after):
    """Has a callback that was asked for been forgotten, and not because it was called?"""
    return any(
        queue is not None
        and before.get(name) is not None
        and (before[name]["notification"], queue["notification"]) == ((2, 0, True), (0, 0, False))
        and before[name]["messages"] == queue["messages"]
        for name, queue in after.items()
    )


class Unlisted(AssertionError):
    """A difference that is not on the list of those that are meant to be."""


def compare(pair, sequence):
    """Run a sequence until its end, or a listed difference that parts the two; return the ids of listed differences."""
    found = []
    transcript = []
    run = pair.run(sequence)
    with contextlib.closing(run):
        for step, ours, theirs in run:
            transcript.append(f"  {step!r}\n      -> {ours.outcome!r}{f' and {ours.event}' if ours.event else ''}")
            if ours.outcome[0] == "death":  # of both, or of us alone: no difference is meant to be that
                raise Unlisted(_report(transcript, ours, theirs))
            if ours != theirs:
                listed = [each for each in DIFFERENCES if each.applies(step, ours, theirs)]
                ends = any(each.ends for each in listed)
                if not listed or (ours.state != theirs.state and not ends):
                    raise Unlisted(_report(transcript, ours, theirs))
                found += [each.id for each in listed]
                if ends:
                    break
            if theirs.outcome[0] == "death":  # of the original where that is not listed
                raise Unlisted(_report(transcript, ours, theirs))
    return found


def reduced(sequence, fails):
    """Leave out what is not needed for the sequence to fail."""
    before = None
    while sequence != before:
        before = sequence
        for index in reversed(range(len(sequence))):
            shorter = sequence[:index] + sequence[index + 1 :]
            if fails(shorter):
                sequence = shorter
    return sequence


def _report(transcript, ours, theirs):
    lines = ["the original does otherwise. Up to there:", *transcript, "here and there:"]
    for name, left, right in zip(Observation._fields, ours, theirs, strict=True):
        if left != right:
            lines += [f"  {name}", f"    here  {left!r}", f"    there {right!r}"]
    return "\n".join(lines)
