"""What workers of test_lifetime_processes.py do: importable by name, as loky and spawn want it."""

import os
import signal

from posix_ipc.mp_integration import MessageQueue, Semaphore, SharedMemory


def use(handles):
    semaphore, segment, _ = handles
    with semaphore:
        segment.buf[0] = 1
        return segment.buf[0]


def give():
    return [Semaphore(), SharedMemory(size=8), MessageQueue(max_messages=1, max_message_size=8)]


def attach_and_end(how, names):
    made = give()  # so that it has a journal, and is swept after
    held = [cls.attach(name) for cls, name in zip((Semaphore, SharedMemory, MessageQueue), names, strict=True)]
    if how == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "exits after closing":
        for each in made + held:
            each.close()
