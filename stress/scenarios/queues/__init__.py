"""Scenario 3: messages, each of which arrives once, whole, and in order."""

from __future__ import annotations

import mmap
import random
import signal
import struct
import time
from typing import Any

import posix_ipc
from stress.scenario import Context, Full, Scenario

QUEUES = 2
QUEUE = {"max_messages": 4, "max_message_size": 64}
PRIORITIES = 4
HEAD = struct.Struct("HBxI")
"""Sender, priority, number; what follows is a pattern made of the number."""
MOST = 1 << 20
"""Messages of one sender; the page has a byte for each."""
WAIT = 0.005
SIGNAL_EVERY = 0.01
KILL_EVERY = {"fork": 0.1, "spawn": 1.0, "forkserver": 0.3}
"""Seconds, in the mean; who starts an interpreter needs some to get anywhere."""
LAST_MESSAGES = 20.0
"""Seconds that the receivers have for what is in the queues when the last sender has ended."""


def run(context: Context) -> None:
    senders = max(1, context.processes // 2)
    Page.create(context, senders)
    page = Page(context, senders)
    names = [context.name("queue") for _ in range(QUEUES)]
    queues = [posix_ipc.MessageQueue(name, posix_ipc.O_CREX, **QUEUE) for name in names]
    crew = Crew(context, names, senders, page)
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
    crew.finish(queues)
    crew.count()
    check_arrivals(context, page, crew)
    page.close()
    for queue in queues:
        queue.unlink()
        queue.close()


# ---- what is known of every message, whoever dies ----


class Page:
    """Shared memory of the system alone: how far each sender has come, and how often each message has arrived."""

    SENDER = struct.Struct("QQ")

    def __init__(self, context: Context, senders: int) -> None:
        with open(f"{context.directory}/page", "r+b") as file:
            self._memory = mmap.mmap(file.fileno(), 0)
        self._senders = senders

    @classmethod
    def create(cls, context: Context, senders: int) -> None:
        with open(f"{context.directory}/page", "wb") as file:
            file.truncate(1 + senders * (cls.SENDER.size + MOST))

    def close(self) -> None:
        self._memory.close()

    @property
    def over(self) -> bool:
        return bool(self._memory[0])

    def finish(self) -> None:
        self._memory[0] = 1

    def progress(self, sender: int) -> tuple[int, int]:
        """The number of the message that it is sending or will send next, and how many it has surely sent."""
        begun, sent = self.SENDER.unpack_from(self._memory, 1 + sender * self.SENDER.size)
        return begun, sent

    def set_progress(self, sender: int, begun: int, sent: int) -> None:
        at = 1 + sender * self.SENDER.size
        self._memory[at : at + self.SENDER.size] = self.SENDER.pack(begun, sent)

    def arrived(self, sender: int, number: int) -> int:
        """Note it; how often it had arrived before."""
        index = self._first(sender) + number
        before = self._memory[index]
        self._memory[index] = min(255, before + 1)
        return before

    def arrivals(self, sender: int, number: int) -> bytes:
        """How often each of the first messages of a sender has arrived."""
        first = self._first(sender)
        return self._memory[first : first + number]

    def _first(self, sender: int) -> int:
        return 1 + self._senders * self.SENDER.size + sender * MOST


# ---- senders and receivers ----


def compose(sender: int, priority: int, number: int, size: int) -> bytes:
    pattern = (number * 2654435761 % (1 << 32)).to_bytes(4, "little")
    return (HEAD.pack(sender, priority, number) + pattern * 16)[:size]


def send_all(context: Context, sender: int, senders: int, names: list[str]) -> None:
    """From where its predecessor was killed."""
    signal.signal(signal.SIGALRM, lambda number, frame: None)
    signal.setitimer(signal.ITIMER_REAL, SIGNAL_EVERY, SIGNAL_EVERY)
    queues = [posix_ipc.MessageQueue(name, read=False) for name in names]
    page = Page(context, senders)
    limit = MOST if context.count is None else min(MOST, -(-context.count // senders))
    number = page.progress(sender)[0]
    choose = context.random("sender", sender, number)
    while context.going() and number < limit:
        priority = choose.randrange(PRIORITIES)
        message = compose(sender, priority, number, choose.randint(HEAD.size, QUEUE["max_message_size"]))
        page.set_progress(sender, number + 1, number)
        if send(context, choose, choose.choice(queues), message, priority):
            number += 1
        page.set_progress(sender, number, number)
    signal.setitimer(signal.ITIMER_REAL, 0)
    for queue in queues:
        queue.close()
    page.close()


def send(context: Context, choose: random.Random, queue: Any, message: bytes, priority: int) -> bool:
    while context.going():
        try:
            queue.send(message, choose.choice((0, 0.001, WAIT, None)), priority)
            return True
        except (posix_ipc.BusyError, posix_ipc.SignalError) as error:
            context.met(error)
    return False


def receive_all(context: Context, senders: int, names: list[str], seed: int) -> None:
    """Until all senders have ended and the queues are empty."""
    queues = [posix_ipc.MessageQueue(name, write=False) for name in names]
    page = Page(context, senders)
    choose = context.random("receiver", seed)
    last: dict[tuple[int, int, int], int] = {}
    while True:
        over = page.over
        which = choose.randrange(QUEUES)
        try:
            message, priority = receive(choose, queues[which])
        except posix_ipc.BusyError as error:
            context.met(error)
            if over and not any(queue.current_messages for queue in queues):
                break
            continue
        sender, said, number = HEAD.unpack_from(message)
        if page.arrived(sender, number):
            context.violated(f"message {number} of sender {sender} arrived twice")
        whole = message == compose(sender, priority, number, len(message)) and said == priority
        context.check(whole, f"a message was torn: {message!r} came with priority {priority}")
        before = last.get((which, sender, priority), -1)
        context.check(
            before < number,
            f"out of order: of sender {sender}, priority {priority}, message {number} came after {before}",
        )
        last[which, sender, priority] = number
    for queue in queues:
        queue.close()
    page.close()


def receive(choose: random.Random, queue: Any) -> tuple[bytes, int]:
    timeout = choose.choice((0, 0.001, WAIT))
    if choose.random() < 0.5:
        message, priority = queue.receive(timeout)
        return message, priority
    buffer = bytearray(QUEUE["max_message_size"])
    length, priority = queue.receive_into(buffer, timeout)
    return bytes(buffer[:length]), priority


# ---- those who die, and those who take their places ----


class Crew:
    def __init__(self, context: Context, names: list[str], senders: int, page: Page) -> None:
        self._context, self._names, self._page = context, names, page
        self._seed = 0
        self._senders = {number: self._start_sender(number, senders) for number in range(senders)}
        self._receivers = [self._start_receiver(senders) for _ in range(max(1, context.processes - senders))]
        self.killed_receivers = 0
        self._counted = 0
        self.doubtful: set[tuple[int, int]] = set()
        """(sender, number) of messages whose sender was killed as it sent them."""

    def _start_sender(self, number: int, senders: int) -> Any:
        return self._context.start(send_all, number, senders, self._names)

    def _start_receiver(self, senders: int) -> Any:
        self._seed += 1
        return self._context.start(receive_all, senders, self._names, self._seed)

    def senders_work(self) -> bool:
        return any(process.is_alive() for process in self._senders.values())

    def count(self) -> None:
        """What was sent, by the page: who is killed takes what he has counted, but not yet written, with him."""
        sent = sum(self._page.progress(number)[1] for number in self._senders)
        self._context.done("messages", sent - self._counted)
        self._counted = sent

    def kill_one(self, choose: random.Random) -> None:
        senders = len(self._senders)
        if choose.random() < 0.5:
            index = choose.randrange(len(self._receivers))
            self._kill(self._receivers[index])
            self.killed_receivers += 1
            self._context.tally("receivers killed")
            self._receivers[index] = self._start_receiver(senders)
            return
        number = choose.randrange(senders)
        self._kill(self._senders[number])
        begun, sent = self._page.progress(number)
        if begun > sent:
            self.doubtful.add((number, sent))
        self._page.set_progress(number, begun, begun)
        self._context.tally("senders killed")
        self._senders[number] = self._start_sender(number, senders)

    def _kill(self, process: Any) -> None:
        process.kill()
        process.join()
        process.close()

    def finish(self, queues: list[Any]) -> None:
        self._context.join(*self._senders.values())
        self._page.finish()
        deadline = time.monotonic() + LAST_MESSAGES
        while any(queue.current_messages for queue in queues) and time.monotonic() < deadline:
            time.sleep(0.01)
        for queue in queues:
            left = queue.current_messages
            self._context.check(not left, f"{left} messages stay in a queue whose receivers wait")
        self._context.join(*self._receivers)


def check_arrivals(context: Context, page: Page, crew: Crew) -> None:
    """Every message has arrived, but at most one for each receiver that was killed."""
    missing = []
    for sender in range(max(1, context.processes // 2)):
        arrivals = page.arrivals(sender, page.progress(sender)[0])
        absent = [number for number, times in enumerate(arrivals) if not times]
        missing += [(sender, number) for number in absent if (sender, number) not in crew.doubtful]
    context.check(
        len(missing) <= crew.killed_receivers,
        f"{len(missing)} messages were lost, with {crew.killed_receivers} receivers killed; first (sender, number) "
        f"{missing[:5]}",
    )
    context.note(f"{len(missing)} messages lost with {crew.killed_receivers} killed receivers")


# ---- the whole order, where nobody else interferes ----


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
        "Every message arrives once, whole and in the order of its priority; at most one is lost with each receiver "
        "that is killed."
    ),
    faults="receivers and senders killed, signals during waits, waits that time out",
    unit="messages",
    run=run,
    full=Full(count=200_000),
)
