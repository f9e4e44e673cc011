"""The senders and receivers of which one after the other is killed, and what is lost with each of them."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

from stress.scenario import Context
from stress.scenarios.queues.page import Page
from stress.scenarios.queues.traffic import PAUSE, receive_all, send_all

LAST_MESSAGES = 20.0
"""Seconds that the receivers have for what is in the queues when no sender sends."""


class Crew:
    """The senders and receivers, of which one after the other is killed.

    After each death the senders pause until all that was sent has been received, so that it is known what was lost with
    this one.
    """

    def __init__(self, context: Context, names: list[str], queues: list[Any], page: Page) -> None:
        self._context, self._names, self._queues, self._page = context, names, queues, page
        self._seed = 0
        self._senders = [self._start_sender(number) for number in range(page.senders)]
        self._receivers = [self._start_receiver(number) for number in range(page.receivers)]
        self._counted = self._killed_receivers = self._lost = 0
        self._checked = [0] * page.senders
        """Of each sender's messages, how many are known to have arrived or to be lost."""
        self._doubtful: set[tuple[int, int]] = set()
        """(sender, number) of messages whose sender was killed as it sent them."""

    def _start_sender(self, number: int) -> Any:
        return self._context.start(send_all, number, self._names, self._page.senders, self._page.receivers)

    def _start_receiver(self, number: int) -> Any:
        self._seed += 1
        page = self._page
        return self._context.start(receive_all, number, self._seed, self._names, page.senders, page.receivers)

    def senders_work(self) -> bool:
        return any(process.is_alive() for process in self._senders)

    def count(self) -> None:
        """What was sent, by the page: who is killed takes what he has counted, but not yet written, with him."""
        sent = sum(self._page.progress(number)[1] for number in range(self._page.senders))
        self._context.done("messages", sent - self._counted)
        self._counted = sent

    # ---- deaths ----

    def kill_one(self, choose: random.Random) -> None:
        if choose.random() < 0.5:
            self._kill_receiver(choose.randrange(self._page.receivers))
        else:
            self._kill_sender(choose.randrange(self._page.senders))

    def _kill_receiver(self, number: int) -> None:
        self._kill(self._receivers[number])
        self._page.set_rounds(number, 0)
        self._killed_receivers += 1
        self._context.tally("receivers killed")
        self._receivers[number] = self._start_receiver(number)
        self._settle("a receiver was killed", allowed=1)

    def _kill_sender(self, number: int) -> None:
        self._kill(self._senders[number])
        begun, sent = self._page.progress(number)
        if begun > sent:
            self._doubtful.add((number, sent))
        self._page.set_progress(number, begun, begun)
        self._page.do(number, Page.NOT_THERE)
        self._context.tally("senders killed")
        self._senders[number] = self._start_sender(number)
        self._settle("a sender was killed", allowed=0)

    def _kill(self, process: Any) -> None:
        process.kill()
        process.join()
        process.close()

    # ---- what was lost ----

    def _settle(self, when: str, allowed: int) -> None:
        """Let all that was sent be received, and see what was lost since the last time."""
        page = self._page
        page.pause(True)
        time.sleep(PAUSE)  # whoever has just looked whether to pause is sending by now
        self._wait("a sender does not pause", lambda: Page.SENDING in map(page.doing, range(page.senders)))
        self._wait("messages stay in a queue whose receivers wait", self._messages)
        rounds = {number: page.rounds(number) for number in range(page.receivers)}  # of 0 none has a message
        self._wait(
            "a receiver does not go on", lambda: [each for each in rounds if page.rounds(each) == rounds[each] != 0]
        )
        lost = []
        for sender in range(page.senders):
            _, sent = page.progress(sender)
            lost += [(sender, number) for number in page.absent(sender, self._checked[sender], sent)]
            self._checked[sender] = sent
        lost = [each for each in lost if each not in self._doubtful]
        self._context.check(
            len(lost) <= allowed,
            f"messages were lost: {len(lost)} as {when}, which may cost {allowed}; first (sender, number) {lost[:5]}",
        )
        self._lost += len(lost)
        page.pause(False)

    def _messages(self) -> int:
        return sum(queue.current_messages for queue in self._queues)

    def _wait(self, what: str, is_so: Callable[[], object]) -> None:
        deadline = time.monotonic() + LAST_MESSAGES
        while is_so():
            if time.monotonic() > deadline:
                self._context.violated(f"{what}, for {LAST_MESSAGES:.0f} s")
                return
            time.sleep(PAUSE / 10)

    def finish(self) -> None:
        self._context.join(*self._senders)
        self._settle("nobody was killed", allowed=0)
        self._context.note(
            f"{self._lost} messages lost with {self._killed_receivers} killed receivers, one with each at most"
        )
        self._page.finish()
        self._context.join(*self._receivers)
