"""Scenario 3: messages, each of which arrives once, whole, and in order."""

from __future__ import annotations

import random
import time

import posix_ipc
from stress.scenario import Context, Full, Scenario
from stress.scenarios.queues.crew import Crew
from stress.scenarios.queues.page import Page
from stress.scenarios.queues.traffic import HEAD, PRIORITIES, QUEUE, compose

QUEUES = 2
KILL_EVERY = {"fork": 0.1, "spawn": 1.0, "forkserver": 0.3}
"""Seconds, in the mean; who starts an interpreter needs some to get anywhere."""


def run(context: Context) -> None:
    senders = max(1, context.processes // 2)
    receivers = max(1, context.processes - senders)
    Page.create(context, senders, receivers)
    page = Page(context, senders, receivers)
    names = [context.name("queue") for _ in range(QUEUES)]
    queues = [posix_ipc.MessageQueue(name, posix_ipc.O_CREX, **QUEUE) for name in names]
    crew = Crew(context, names, queues, page)
    choose = context.random("killer")
    kill_every = KILL_EVERY[context.method]
    next_kill = time.monotonic() + kill_every
    while crew.senders_work():
        put_in_order(context, choose)
        if time.monotonic() >= next_kill:
            crew.kill_one(choose)
            next_kill = time.monotonic() + choose.uniform(0, 2 * kill_every)
        crew.count()
        time.sleep(0.005)
    crew.finish()
    crew.count()
    page.close()
    for queue in queues:
        queue.unlink()
        queue.close()


def put_in_order(context: Context, choose: random.Random) -> None:
    """A queue gives the highest priority first, and within it what was sent first."""
    queue = posix_ipc.MessageQueue(context.name("queue"), posix_ipc.O_CREX, **QUEUE)
    queue.unlink()
    sent = []
    for number in range(QUEUE["max_messages"]):
        priority = choose.choice((*range(PRIORITIES), posix_ipc.QUEUE_PRIORITY_MAX))
        message = compose(0, priority % 256, number, choose.randint(HEAD.size, QUEUE["max_message_size"]))
        queue.send(message, 0, priority)
        sent.append((message, priority))
    received = [queue.receive(0) for _ in sent]
    context.check(
        received == sorted(sent, key=lambda each: -each[1]),
        f"out of order: sent {sent}, received {received}",
    )
    queue.close()
    context.tally("queues filled and emptied in order")


SCENARIO = Scenario(
    number=3,
    name="queues",
    invariant=(
        "Every message arrives once, whole and in the order of its priority; with each receiver that is killed at most "
        "one is lost, and at no other time any, but what a killed sender was sending."
    ),
    faults="receivers and senders killed, signals during waits, waits that time out",
    unit="messages",
    run=run,
    full=Full(count=200_000),
)
