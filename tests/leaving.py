"""What tests of leak detection let other processes do. It imports little, so that a spawned process starts quickly."""

import multiprocessing
import os
import signal

import posix_ipc

OPTIONS = {
    "Semaphore": {},
    "SharedMemory": {"size": 64},
    "MessageQueue": {"max_messages": 2, "max_message_size": 64},
}


def make(kind, name):
    """Create an object, and let go of the handle."""
    handle = getattr(posix_ipc, kind)(name, posix_ipc.O_CREX, **OPTIONS[kind])
    handle.close()


def unlink(kind, name):
    {
        "Semaphore": posix_ipc.unlink_semaphore,
        "SharedMemory": posix_ipc.unlink_shared_memory,
        "MessageQueue": posix_ipc.unlink_message_queue,
    }[kind](name)


def make_all(names):
    for kind, name in zip(OPTIONS, names, strict=True):
        make(kind, name)


def make_and_remove(name):
    make("Semaphore", name)
    posix_ipc.unlink_semaphore(name)


def make_and_die(name):
    make("MessageQueue", name)
    os.kill(os.getpid(), signal.SIGKILL)


def make_tracked_and_die():
    from posix_ipc import mp_integration

    handle = mp_integration.SharedMemory(size=10)
    assert handle.owned
    os.kill(os.getpid(), signal.SIGKILL)


def wait_for_it(connection):
    connection.recv()


def run_child(method, target, *args):
    """Let a child do it, and end; its pid and name."""
    child = multiprocessing.get_context(method).Process(target=target, args=args)
    child.start()
    pid, name = child.pid, child.name
    child.join(60)
    child.close()
    return pid, name


def have_a_child_make(method, name):
    run_child(method, make, "Semaphore", name)
