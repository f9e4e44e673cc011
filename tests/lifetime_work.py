"""What workers of test_lifetime_processes.py do: importable by name, as loky and spawn want it."""

from posix_ipc.mp_integration import MessageQueue, Semaphore, SharedMemory


def use(handles):
    semaphore, segment, _ = handles
    with semaphore:
        segment.buf[0] = 1
        return segment.buf[0]


def give():
    return [Semaphore(), SharedMemory(size=8), MessageQueue(max_messages=1, max_message_size=8)]
