"""What a sequence may be made of. Steps are literals, so that one that failed can be pasted into a test.

Left out because the original dies of it, surely or by chance: text names with a null character or that cannot be
encoded, messages that are neither text nor bytes-like or cannot be encoded, deleting `block`, handles whose __init__
did not run. Because it is undefined there: timeouts that do not fit into a time_t.
"""

import os
from array import array
from decimal import Decimal
from fractions import Fraction

from hypothesis import strategies as st

from posix_ipc import O_CREAT, O_CREX, O_EXCL, O_NONBLOCK, O_RDWR, O_TRUNC, QUEUE_PRIORITY_MAX, SEMAPHORE_VALUE_MAX

from .worker import DEFAULTS, PREFIX, SIGNALS

A, B = f"/{PREFIX}a", f"/{PREFIX}b"
LONGEST = f"/{PREFIX}".ljust(256, "x")  # a segment or a queue
LONGEST_SEMAPHORE = LONGEST[:252]
NAMES = (A, B, f"{A}é", f"/{PREFIX}\udcff", LONGEST, LONGEST_SEMAPHORE, LONGEST_SEMAPHORE + "x")  # of objects
SLOTS = ("sem0", "sem1", "shm0", "shm1", "mq0", "mq1")


def often(common, rare):
    """Draw one of `common`, or now and then one of `rare`."""
    return st.sampled_from([*common * (1 + 4 * len(rare) // len(common)), *rare])


names = often(
    [A, A, B],
    [
        *(A[1:], "/" + A, A.encode(), A[1:].encode(), f"{A}é", f"{A}é".encode(), f"/{PREFIX}\udcff"),
        *(LONGEST, LONGEST + "x", LONGEST_SEMAPHORE, LONGEST_SEMAPHORE + "x", LONGEST[1:], LONGEST * 20),
        *("", b"", "/", "//", f"{A}/b", f"{A}/", b"/%s\0b" % A[1:].encode(), None, None, None, 3, 1.5, (A,)),
    ],
)
flags = often(
    [O_CREAT, O_CREAT, O_CREX, 0],
    [
        *(O_EXCL, O_TRUNC, O_CREAT | O_TRUNC, O_CREX | O_TRUNC, O_NONBLOCK, O_CREAT | O_NONBLOCK, O_CREAT | O_RDWR),
        *(O_CREX | O_NONBLOCK, O_CREAT | os.O_WRONLY, os.O_CLOEXEC, 1 << 20, 1 << 31, 1 << 40, 1 << 70, None, "x", 1.5),
    ],
)
modes = often(
    [0o600, 0o600, 0o644, 0o666, 0o400, 0o200, 0],
    [0o777, 0o7777, 0o177777, 0o200000, -1, 1 << 31, 1 << 40, 1 << 70, None, "x", 1.5, True],
)
truths = often([True, False], [0, 1, 2, None, "x", 1.5])
initial_values = often(
    [0, 1, 2], [SEMAPHORE_VALUE_MAX, SEMAPHORE_VALUE_MAX + 1, -1, 1 << 32, 1 << 64, None, "x", 1.5, True]
)
sizes = often(
    [0, 1, 64, 4096, 10000],
    [-1, 1 << 31, 1 << 32, 1 << 62, (1 << 63) - 1, 1 << 63, 1 << 64, (1 << 64) + 5, -(1 << 70), None, "x", 1.5, True],
)
# All queues of a user share one budget, so none is ever made without these two.
max_messages = often([1, 2, 3], [0, -1, 11, 1 << 31, (1 << 32) + 1, 1 << 62, 1 << 63, 1 << 64, None, "x", 1.5])
max_message_sizes = often([16, 64], [0, 1, -1, 8193, 1 << 31, (1 << 32) + 1, 1 << 62, 1 << 63, 1 << 64, None, "x", 1.5])
timeouts = often([0, 0, 0.001], [0.0, True, -1, -0.001, float("nan"), "x", (), Decimal("0.001"), Fraction(1, 1000)])
messages = often(
    [b"", b"a", b"bc", "é"],
    [bytearray(b"ba"), array("h", [1, 2]), "x" * 16, b"x" * 64, b"x" * 65, "é" * 33, b"\0"],
)
priorities = often(
    [0, 1, 5], [QUEUE_PRIORITY_MAX, QUEUE_PRIORITY_MAX + 1, -1, 1 << 31, 1 << 32, 1 << 70, None, "x", 1.5, True]
)
notifications = often(
    [None, *map(int, SIGNALS)],
    [0, -1, 65, 1000, 1 << 32, 1 << 70, 1.5, "x", (), (len,), (1, 2), (len, 1, 2), [len, 1]],
)
attributes = {
    "sem": ["name", "mode", "value"],
    "shm": ["name", "mode", "fd", "size"],
    "mq": ["name", "mode", "mqd", "max_messages", "max_message_size", "current_messages", "block"],
}
methods = {  # with wrong arguments
    "sem": ["acquire", "release", "close", "unlink", "__enter__"],
    "shm": ["close_fd", "fileno", "unlink"],
    "mq": ["receive", "close", "unlink", "fileno", "request_notification"],
}


def slots(kind):
    return st.sampled_from([slot for slot in SLOTS if slot.startswith(kind)])


def step(*arguments):
    return st.tuples(*(arg if isinstance(arg, st.SearchStrategy) else st.just(arg) for arg in arguments))


def opening(kind, required=None, **options):
    without_mode = st.fixed_dictionaries(required or {}, optional={k: v for k, v in options.items() if k != "mode"})
    some = st.fixed_dictionaries(required or {}, optional=options)
    return st.one_of(
        step("open", slots(kind), st.tuples(names, flags), some),
        step("open", slots(kind), (), st.builds(lambda name, more: {"name": name, **more}, names, some)),
        step("open", slots(kind), st.tuples(names, flags, modes), without_mode),
    ) | step("open", slots(kind), st.tuples(st.just(None), st.sampled_from([O_CREX, O_CREX, O_CREAT, 0])), some)


def calling(kind, method, *arguments):
    return step("call", slots(kind), method, st.tuples(*arguments))


def common(kind, close):
    """Return what there is for every type."""
    unlink = {"sem": "unlink_semaphore", "shm": "unlink_shared_memory", "mq": "unlink_message_queue"}[kind]
    values = st.sampled_from([0, 1, -1, "x", None, False])
    fixed = st.sampled_from([*(name for name in attributes[kind] if name != "block"), "nothing"])
    return [
        calling(kind, close),
        calling(kind, "unlink"),
        step("drop", slots(kind)),
        step("text", slots(kind)),
        step("get", slots(kind), st.sampled_from([*attributes[kind], "nothing"])),
        step("set", slots(kind), fixed, values),
        step("delete", slots(kind), fixed),
        step("compare", slots(kind), slots(kind)),
        step("function", unlink, st.tuples(names), st.just({})),
        step("function", unlink, st.sampled_from([(), (A, A)]), st.sampled_from([{}, {"name": A}, {"x": 1}])),
        step("call", slots(kind), st.sampled_from(methods[kind]), (1, 2, 3, 4)),
        step("call", slots(kind), st.sampled_from(methods[kind]), (), {"x": 1}),
        # Not queues: a copy that goes away takes the notifications of its process with it.
        *([step(st.sampled_from(["copied", "pickled"]), slots(kind))] if kind != "mq" else []),
    ]


def one_of(*weighted):
    return st.one_of([strategy for weight, strategies in weighted for strategy in strategies for _ in range(weight)])


def waiting(*arguments):
    """Return a timeout, by itself or by keyword."""
    return step(*arguments, st.tuples(timeouts)) | step(*arguments, (), st.fixed_dictionaries({"timeout": timeouts}))


def endless(*arguments):
    """Return no timeout, or a long one."""
    return step("wait", *arguments, st.sampled_from([(), (None,), (60,)]))


semaphore_steps = one_of(
    (4, [opening("sem", mode=modes, initial_value=initial_values)]),
    (4, [waiting("call", slots("sem"), "acquire"), calling("sem", "release"), step("get", slots("sem"), "value")]),
    (2, [endless(slots("sem"), "acquire"), step("enter", slots("sem"))]),
    (1, common("sem", "close")),
)
segment_steps = one_of(
    (6, [opening("shm", mode=modes, size=sizes), opening("shm", size=sizes, read_only=truths)]),
    (2, [calling("shm", "fileno"), step("get", slots("shm"), "size"), step("get", slots("shm"), "fd")]),
    (2, [step("truncate", slots("shm"), st.sampled_from([0, 1, 5000]))]),
    (2, [step(method, slots("shm"), st.sampled_from([b"abc", b"d"])) for method in ("write", "map")]),
    (1, [step("close_behind", slots("shm"))]),
    (1, common("shm", "close_fd")),
)
queue_steps = one_of(
    (6, [opening("mq", {"max_messages": max_messages, "max_message_size": max_message_sizes}, mode=modes)]),
    (6, [opening("mq", {key: st.just(value) for key, value in DEFAULTS["mq"].items()}, read=truths, write=truths)]),
    (4, [calling("mq", "send", messages, timeouts, priorities), waiting("call", slots("mq"), "receive")]),
    (
        4,
        [
            step(
                *("call", slots("mq"), "send", st.tuples(messages)),
                st.fixed_dictionaries({"timeout": timeouts}, optional={"priority": priorities}),
            )
        ],
    ),
    (2, [step("wait", slots("mq"), "send", st.tuples(messages)), endless(slots("mq"), "receive")]),
    (2, [step("get", slots("mq"), "current_messages"), step("poll", slots("mq"))]),
    (2, [step("set", slots("mq"), "block", truths)]),
    (3, [step("notify", slots("mq"), st.sampled_from([0, 1])), calling("mq", "request_notification", notifications)]),
    (1, [calling("mq", "request_notification"), calling("mq", "fileno")]),
    (1, common("mq", "close")),
)
steps = st.one_of(semaphore_steps, segment_steps, queue_steps)


def lists(steps):
    """Short sequences, and some long ones, whose average Hypothesis keeps low otherwise."""
    return st.lists(steps, min_size=1, max_size=30) | st.lists(steps, min_size=12, max_size=30)


# Most steps are about one type, so that they meet; some sequences mix them.
sequences = st.one_of(lists(semaphore_steps), lists(segment_steps), lists(queue_steps), lists(steps))

# Every sequence ends with a look at every handle it used.
LOOKS = {slot: [("get", slot, name) for name in attributes[slot.rstrip("01")]] + [("text", slot)] for slot in SLOTS}


def with_looks(sequence):
    used = {argument for _, *arguments in sequence for argument in arguments if isinstance(argument, str)}
    return [*sequence, *(look for slot in SLOTS if slot in used for look in LOOKS[slot])]
