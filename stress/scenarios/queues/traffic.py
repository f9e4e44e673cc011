"""Messages, and those who send and receive them."""

from __future__ import annotations

import itertools
import random
import signal
import struct
import sys
import time
import zlib
from typing import Any

import posix_ipc
from stress.scenario import Context
from stress.scenarios.queues.page import MOST, Page

QUEUE = {"max_messages": 4, "max_message_size": 64}
PRIORITIES = 4
HEAD = struct.Struct("IHBBI")
"""Checksum of all that follows, sender, priority, length of the message, number; then a pattern made of the number."""
WAIT = 0.005
PAUSE = 0.002
"""Seconds that a sender waits, when it is told to, before it looks again."""
SIGNAL_EVERY = 0.01


def compose(sender: int, priority: int, number: int, length: int) -> bytes:
    """A message whose every byte can be checked by itself alone."""
    pattern = (number * 2654435761 % (1 << 32)).to_bytes(4, "little")
    message = bytearray(HEAD.pack(0, sender, priority, length, number) + pattern * 16)[:length]
    message[:4] = zlib.crc32(message[4:]).to_bytes(4, sys.byteorder)
    return bytes(message)


def parse(message: bytes, came_with: int) -> tuple[int, int]:
    """(sender, number). Raises ValueError with what is wrong if it is not as it was sent."""
    if len(message) < HEAD.size:
        raise ValueError(f"it has {len(message)} bytes, fewer than any that was sent")
    checksum, sender, priority, length, number = HEAD.unpack_from(message)
    if length != len(message):
        raise ValueError(f"it has {len(message)} bytes, and says that it had {length}")
    if checksum != zlib.crc32(message[4:]):
        raise ValueError("its checksum is wrong")
    if priority != came_with:
        raise ValueError(f"it was sent with priority {priority}")
    return sender, number


def send_all(context: Context, sender: int, names: list[str], senders: int, receivers: int) -> None:
    """From where its predecessor was killed."""
    signal.signal(signal.SIGALRM, lambda number, frame: None)
    signal.setitimer(signal.ITIMER_REAL, SIGNAL_EVERY, SIGNAL_EVERY)
    queues = [posix_ipc.MessageQueue(name, read=False) for name in names]
    page = Page(context, senders, receivers)
    limit = MOST if context.count is None else min(MOST, -(-context.count // senders))
    number = page.progress(sender)[0]
    choose = context.random("sender", sender, number)
    while context.going() and number < limit:
        page.do(sender, Page.SENDING)
        if page.paused:
            page.do(sender, Page.PAUSING)
            time.sleep(PAUSE)
            continue
        priority = choose.randrange(PRIORITIES)
        message = compose(sender, priority, number, choose.randint(HEAD.size, QUEUE["max_message_size"]))
        page.set_progress(sender, number + 1, number)
        if send(context, choose, choose.choice(queues), message, priority):
            number += 1
        page.set_progress(sender, number, number)
    page.do(sender, Page.NOT_THERE)
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


def receive_all(context: Context, receiver: int, seed: int, names: list[str], senders: int, receivers: int) -> None:
    """Until all senders have ended and the queues are empty."""
    queues = [posix_ipc.MessageQueue(name, write=False) for name in names]
    page = Page(context, senders, receivers)
    choose = context.random("receiver", seed)
    last: dict[tuple[int, int, int], int] = {}
    for rounds in itertools.count(1):
        page.set_rounds(receiver, rounds)
        over = page.over
        which = choose.randrange(len(queues))
        try:
            message, priority = receive(choose, queues[which])
        except posix_ipc.BusyError as error:
            context.met(error)
            if over and not any(queue.current_messages for queue in queues):
                break
            continue
        try:
            sender, number = parse(message, priority)
        except ValueError as error:
            context.violated(f"a message was torn: {error}; {message!r} came with priority {priority}")
            continue
        if page.arrived(sender, number):
            context.violated(f"message {number} of sender {sender} arrived twice")
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
