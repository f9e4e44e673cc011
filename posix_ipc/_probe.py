"""Looks at queues, and at the leases of what the dead have left, in a helper process."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import posix_ipc
from posix_ipc import _ext, _helper, _owners
from posix_ipc._journal import Entry, Identity


class QueueLook(NamedTuple):
    """What a queue says of itself."""

    identity: Identity
    mode: int
    uid: int
    created: float
    messages: int
    max_messages: int
    max_message_size: int


class Answers(NamedTuple):
    """What was seen."""

    queues: dict[bytes, QueueLook | None]
    """By name: None for one that exists and cannot be opened. Those that do not exist are not in it."""
    outcomes: list[str]
    """For each entry, see _owners.locked_if_free()."""
    failure: str | None = None
    """Why nothing could be seen."""


def look(queues: Collection[bytes], entries: Sequence[Entry], live_intents: Collection[bytes]) -> Answers:
    """Look at queues, by name, and at the objects of open entries of journals. Starts no process for nothing."""
    if not queues and not entries:
        return Answers({}, [])
    questions = {
        "queues": [name.hex() for name in queues],
        "entries": [[*entry[:4], entry.name.hex()] for entry in entries],
        "live_intents": [name.hex() for name in live_intents],
    }
    try:
        answers = _helper.ask(answer, questions)
    except OSError as error:
        return Answers({}, [_owners.UNREADABLE] * len(entries), f"the helper process failed: {error.strerror or error}")
    return Answers(
        {bytes.fromhex(name): look and QueueLook(tuple(look[0]), *look[1:]) for name, look in answers["queues"]},
        answers["outcomes"],
    )


# ---- in the helper ----


def answer(questions: dict[str, Any]) -> dict[str, Any]:
    live_intents = {bytes.fromhex(name) for name in questions["live_intents"]}
    queues = []
    for name in questions["queues"]:
        with contextlib.suppress(posix_ipc.ExistentialError, ValueError):
            queues.append((name, _look_at_queue(bytes.fromhex(name))))
    outcomes = []
    for state, kind, shared, identity, name in questions["entries"]:
        entry = Entry(state, kind, shared, tuple(identity), bytes.fromhex(name))
        with _owners.locked_if_free(entry, live_intents) as outcome:
            outcomes.append(outcome)
    return {"queues": queues, "outcomes": outcomes}


def _look_at_queue(name: bytes) -> tuple[Any, ...] | None:
    try:
        queue = posix_ipc.MessageQueue(name, write=False)
    except posix_ipc.PermissionsError:
        return None  # other errors, such as that no descriptor is left, do not say that it exists
    with contextlib.closing(queue):
        facts = _ext._facts(queue.mqd)
        # The kernel sets all times of a queue anew with each message: none tells when it was made.
        created = os.fstat(queue.mqd).st_mtime
        return (
            facts[:3], facts[3], facts[4], created,
            queue.current_messages, queue.max_messages, queue.max_message_size,
        )  # fmt: skip
