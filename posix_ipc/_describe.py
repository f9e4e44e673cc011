"""An object as a row of a table, and everything known about it in words."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

from posix_ipc._tables import (
    Column,
    Line,
    Span,
    age_words,
    paragraph,
    permission_words,
    printable,
    shell_word,
    shorten,
    size_words,
    table,
)
from posix_ipc.leaks import Holder, IPCObject, Owner

KIND_WORDS = {"semaphore": "semaphore", "shared_memory": "segment", "message_queue": "queue"}
"""The kinds of the API as the field calls them."""

COLUMNS = [
    Column("NAME", least=24),
    Column("KIND", 2),
    Column("CONTENTS", 3),
    Column("OWNER", 5),
    Column("PERMS", 6),
    Column("AGE", 4, right=True),
    Column("HELD BY", 1, least=12),
    Column("VERDICT"),
]


def objects_table(objects: Sequence[IPCObject], width: int | None) -> list[Line]:
    """One object a line."""
    return table(COLUMNS, [_row(each) for each in objects], width)


def _row(each: IPCObject) -> list[Span]:
    return [
        Span(printable(each.name)),
        Span(KIND_WORDS[each.kind]),
        Span(contents_words(each)),
        Span(each.owner),
        Span(permission_words(each.mode), "quiet"),
        Span("" if each.created is None else age_words(time.time() - each.created)),
        Span(_holders_in_short(each.holders)),
        Span(each.verdict, each.verdict),
    ]


def contents_words(each: IPCObject) -> str:
    """The size of a segment, the value of a semaphore, the messages in a queue."""
    if each.kind == "semaphore":
        return "" if each.value is None else f"value {each.value}"
    if each.kind == "message_queue":
        return "" if each.messages is None else f"{each.messages} of {each.max_messages}"
    return "" if each.size is None else size_words(each.size)


def _holders_in_short(holders: Sequence[Holder]) -> str:
    if not holders:
        return "-"
    first = f"{holders[0].pid} {program(holders[0].command)}".rstrip()
    return first if len(holders) == 1 else f"{first} +{len(holders) - 1}"


def program(command: str) -> str:
    """The part of a command line by which people know a process: the script, of an interpreter that runs one."""
    return shorten(printable(_program(command[:_READ_AT_MOST].split())), _LONGEST_PROGRAM)


_READ_AT_MOST = 4096
"""Characters of a command line, which may have more than 100,000, and none that means anything."""
_LONGEST_PROGRAM = 80


def _program(words: Sequence[str]) -> str:
    if not words:
        return ""
    name = os.path.basename(words[0])
    if name.startswith("python"):
        for word, following in zip(words[1:], [*words[2:], ""], strict=True):
            if word == "-m":
                return following
            if word == "-c":
                break
            if not word.startswith("-"):
                return os.path.basename(word)
    return name


# ---- in words ----


def explain(each: IPCObject, width: int | None) -> list[Line]:
    """Everything known about an object."""
    name = printable(each.name)
    lines: list[Line] = [
        [Span(name, "heading"), Span(f"  {KIND_WORDS[each.kind]}, "), Span(each.verdict, each.verdict)]
    ]
    lines += paragraph(_sentence(printable(each.reason)), width, "  ")
    for label, texts in (
        ("contents", [_contents(each)]),
        ("owner", [f"{each.owner}, {permission_words(each.mode)}"]),
        ("used" if each.kind == "message_queue" else "made", [_made(each)]),
        ("identity", [_identity(each)]),
        ("held by", [_holder(holder) for holder in each.holders] or ["nobody that can be seen"]),
        ("tracked", [_owner(owner) for owner in each.owners] or ["no: it stays until somebody unlinks it"]),
        ("to do", [_to_do(each)]),
    ):
        for i, text in enumerate(texts):
            first = f"  {'' if i else label:<11}"
            # A command that is broken within a name is one about another object.
            lines += paragraph(text, width, " " * 13, first, break_words=label != "to do")
    return lines


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + ("" if text.endswith(".") else ".")


def _contents(each: IPCObject) -> str:
    if each.kind == "message_queue":
        if each.messages is None:
            return "not known: this user may not open it"
        return f"{each.messages} messages of at most {each.max_messages}, each of up to {each.max_message_size} bytes"
    if each.kind == "semaphore":
        return "not known: this user may not read it" if each.value is None else f"value {each.value}"
    size = f"{each.size} bytes" if each.size is not None else "size not known"
    return size if each.allocated is None else f"{size}, {size_words(each.allocated)} of memory in use"


def _made(each: IPCObject) -> str:
    if each.created is None:
        return "not known"
    moment = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(each.created))
    # Each message sets the time of a queue anew.
    what = "last used or made " if each.kind == "message_queue" else ""
    return f"{what}{moment}, {age_words(time.time() - each.created)} ago"


def _identity(each: IPCObject) -> str:
    if each.identity is None:
        return "not known"
    device, inode, _ = each.identity
    return f"device {os.major(device)}:{os.minor(device)}, inode {inode}"


def _holder(holder: Holder) -> str:
    since = "" if holder.started is None else f"; runs for {age_words(time.time() - holder.started)}"
    return f"{holder.pid} {printable(holder.command[:_READ_AT_MOST])} ({', '.join(holder.how)}{since})"


def _owner(owner: Owner) -> str:
    what = "protected by a process" if owner.claim else "owned by a process"
    state = "alive" if owner.alive else "dead"
    pickled = ", and was pickled" if owner.shared and not owner.claim else ""
    return f"{what} of the tree of {owner.pid}, which is {state}{pickled}"


def _to_do(each: IPCObject) -> str:
    name = shell_word(each.name)
    if each.verdict == "orphan":
        return "safe to remove: `posix-ipc reap --yes`; the next tracked creation by its owner does it too"
    if each.verdict == "unheld":
        return f"perhaps data that somebody wants; if not: `posix-ipc rm {name}`"
    if each.verdict == "unknown":
        return f"look with the rights of root: `posix-ipc why {name}`"
    if each.tracked:
        return "nothing: its name goes away with the processes that use it"
    return f"nothing; `posix-ipc rm --force {name}` takes the name away, and leaves the object to those who hold it"
