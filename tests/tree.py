"""A tree of processes to be killed: run as a program, steered by lifetime.py.

Usage: tree.py METHOD WORKERS. The root makes objects of the three families: some for itself, some that it passes to its
workers, some that stay in a queue, pickled and never unpickled. So do the workers. It prints what exists as JSON, one
line, and then does what each line on its standard input says:

    create              make one more of each
    root HOW            end, as `end` has it
    worker PID HOW      let a worker end so
    group HOW           let all end so, at the same time
"""

import json
import multiprocessing
import os
import signal
import sys
import threading
import time

from posix_ipc.mp_integration import MessageQueue, Semaphore, SharedMemory

SMALL_QUEUE = {"max_messages": 1, "max_message_size": 8}


def one_of_each():
    return SharedMemory(size=64), Semaphore(initial_value=1), MessageQueue(**SMALL_QUEUE)


def identify(handles):
    return [(handle._plain.__name__, handle.name) for handle in handles]


def work(passed, link, queue):
    """Make objects nobody else hears of, some that the root gets, and some that are in flight."""
    private, given, in_flight = one_of_each(), one_of_each(), one_of_each()
    queue.put(in_flight)
    queue.close()
    queue.join_thread()  # pickled, and in the pipe
    with passed[1]:
        passed[0].buf[0] = 1
    link.send((given, {"private": identify(private), "given": identify(given), "shared": identify(in_flight)}))
    try:
        end(link.recv())
    except EOFError:  # the root has gone, and this is where a worker stays
        threading.Event().wait()


def main():
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background ignores it
    for number in (signal.SIGHUP, signal.SIGQUIT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    method, workers = sys.argv[1], int(sys.argv[2])
    context = multiprocessing.get_context(method)
    private, passed, in_flight = one_of_each(), one_of_each(), one_of_each()
    queue = context.Queue()
    queue.put(in_flight)
    while queue.empty():  # until it is pickled
        time.sleep(0.001)
    links = {}
    for _ in range(workers):
        link, theirs = context.Pipe()
        process = context.Process(target=work, args=(passed, theirs, queue), daemon=True)
        process.start()
        links[process.pid] = link
    given, made = [], {}
    for pid, link in links.items():
        handles, made[pid] = link.recv()
        given += handles
    state = {
        "root": os.getpid(),
        "workers": made,
        "objects": [*identify(private), *identify(passed), *identify(in_flight)],
        "token": multiprocessing.current_process()._config["posix_ipc_token"],
        # Of multiprocessing, which loses them when its tracker is killed. Under fork they have no name.
        "semaphores": list(filter(None, (each._semlock.name for each in (queue._rlock, queue._wlock, queue._sem)))),
    }
    print(json.dumps(state), flush=True)
    for line in sys.stdin:
        what, *arguments = line.split()
        if what == "create":
            private += one_of_each()
            print(json.dumps(identify(private[-3:])), flush=True)
        elif what == "worker":
            links[int(arguments[0])].send(arguments[1])
        elif what == "group":
            for link in links.values():
                link.send(arguments[0])
            end(arguments[0])
        else:
            end(arguments[0])


def end(how):
    if how == "exception":
        raise RuntimeError("as asked")
    if how == "os._exit":
        os._exit(0)
    sys.exit(0)


if __name__ == "__main__":
    main()
