"""What workers of test_lifetime_processes.py do: importable by name, as loky and spawn want it.

The package is imported late, for one root there does not import it until its workers have used it.
"""

import multiprocessing
import os
import pickle
import signal


def use(handles):
    semaphore, segment, _ = handles
    with semaphore:
        segment.buf[0] = 1
        return segment.buf[0]


def give():
    from posix_ipc.mp_integration import MessageQueue, Semaphore, SharedMemory

    return [Semaphore(), SharedMemory(size=8), MessageQueue(max_messages=1, max_message_size=8)]


def pickle_new(_):
    """As many bytes as the root likes to keep; also the names, and who did it in which tree."""
    handles = give()
    token = multiprocessing.current_process()._config["posix_ipc_token"]
    return pickle.dumps(handles), [handle.name for handle in handles], os.getpid(), token


def put_new(queue):
    queue.put(give())


kept = []


def keep(handles):
    """As long as this process lives, what it got and what it makes; the names of the latter."""
    made = give()
    kept.extend([*handles, *made])
    return [(type(each).__name__, each.name) for each in made], os.getpid()


def die(_=None):
    os.kill(os.getpid(), signal.SIGKILL)


def attach_and_end(how, names):
    from posix_ipc.mp_integration import MessageQueue, Semaphore, SharedMemory

    made = give()  # so that it has a journal, and is swept after
    held = [cls.attach(name) for cls, name in zip((Semaphore, SharedMemory, MessageQueue), names, strict=True)]
    if how == "dies":
        die()
    if how == "exits after closing":
        for each in made + held:
            each.close()


def let_a_child_send(method, pipe):
    """And end before anybody has received it."""
    process = multiprocessing.get_context(method).Process(target=send_new, args=(pipe,))
    process.start()
    process.join()
    die()


def send_new(pipe):
    pipe.send(give())
