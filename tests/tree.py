"""A tree of processes to be killed: run as a program, steered by lifetime.py.

Usage: tree.py METHOD WORKERS. The root makes objects of the three families, keeps one of them to itself, passes the
others to workers, which make their own and share one. It prints what exists as JSON, one line, and then does what a
line on its standard input says.
"""

import json
import multiprocessing
import os
import sys
import threading

from posix_ipc.mp_integration import MessageQueue, Semaphore, SharedMemory

SMALL_QUEUE = {"max_messages": 1, "max_message_size": 8}


def one_of_each():
    return SharedMemory(size=64), Semaphore(initial_value=1), MessageQueue(**SMALL_QUEUE)


def identify(handle):
    return handle._plain.__name__, handle.name


def work(passed, results, in_flight):
    """Make objects nobody else hears of, and one of each that is pickled and never unpickled."""
    private, shared = one_of_each(), one_of_each()
    for handle in shared:
        in_flight.send(handle)
    results.send((os.getpid(), [identify(handle) for handle in private], [identify(handle) for handle in shared]))
    with passed[1]:
        passed[0].buf[0] = 1
    threading.Event().wait()


def main():
    method, workers = sys.argv[1], int(sys.argv[2])
    context = multiprocessing.get_context(method)
    private, passed = one_of_each(), one_of_each()
    # Pipes, for multiprocessing's queues have semaphores of its own, which it loses when everything is killed.
    _, in_flight = pipe = context.Pipe(duplex=False)
    for handle in private[:1]:
        in_flight.send(handle)  # pickled, and nobody unpickles it
    reports = []
    for _ in range(workers):
        reader, writer = context.Pipe(duplex=False)
        context.Process(target=work, args=(passed, writer, in_flight), daemon=True).start()
        reports.append(reader.recv())
    state = {
        "root": os.getpid(),
        "workers": {pid: {"private": private_, "shared": shared} for pid, private_, shared in reports},
        "objects": [identify(handle) for handle in (*private, *passed)],
        "token": multiprocessing.current_process()._config["posix_ipc_token"],
    }
    print(json.dumps(state), flush=True)
    for line in sys.stdin:
        if line.strip() != "create":
            break
        private += one_of_each()
        print(json.dumps([identify(handle) for handle in private[-3:]]), flush=True)
    end(line.strip(), pipe)


def end(how, pipe):
    """`pipe` is kept until here: it holds what is in flight."""
    if how == "exception":
        raise RuntimeError("as asked")
    if how == "os._exit":
        os._exit(0)
    if how == "wait":
        threading.Event().wait()
    sys.exit(0)


if __name__ == "__main__":
    main()
