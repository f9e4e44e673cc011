"""The differences from the original that are meant to be. Every other one is a fault.

Not among them, because no step can see it, is what has tests of its own: the clock of timeouts, the memory of received
messages, how random names are made, handles closed under a waiting thread, and queues collected with an armed callback.
"""

import signal
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any, NamedTuple

from posix_ipc import O_CREAT, O_CREX, O_EXCL, O_NONBLOCK, O_TRUNC, QUEUE_PRIORITY_MAX, SEMAPHORE_VALUE_MAX

from .worker import PREFIX

SIGEV_THREAD = 2  # how a callback is asked for; sigevent(3type)
A = f"/{PREFIX}a"
SMALL = {"max_messages": 1, "max_message_size": 16}
OPTIONS = {"sem0": {}, "shm0": {}, "mq0": SMALL}

PARAMETERS = {
    "sem": ("name", "flags", "mode", "initial_value"),
    "shm": ("name", "flags", "mode", "size", "read_only"),
    "mq": ("name", "flags", "mode", "max_messages", "max_message_size", "read", "write"),
    "acquire": ("timeout",),
    "receive": ("timeout",),
    "send": ("message", "timeout", "priority"),
    "request_notification": ("notification",),
}
RANGES = {
    "flags": (-(1 << 31), (1 << 31) - 1),
    "mode": (0, 0o177777),
    "size": (0, (1 << 63) - 1),
    "initial_value": (0, SEMAPHORE_VALUE_MAX),
    "max_messages": (1, (1 << 63) - 1),
    "max_message_size": (1, (1 << 63) - 1),
    "priority": (0, QUEUE_PRIORITY_MAX),
    "notification": (-(1 << 31), (1 << 31) - 1),
}

INTEGERS = {*RANGES, "read", "write", "read_only"} - {"notification"}


# ---- what a step asks for and what comes of it ----


def arguments(step):
    """Return the arguments of a constructor or a method by name; those that are too many by their position."""
    if step[0] == "open":
        _, _, positional, keywords = step
        names = PARAMETERS[kind(step)]
    elif step[0] in ("call", "wait"):
        _, _, method, positional, *rest = step
        names, keywords = PARAMETERS.get(method, ()), rest[0] if rest else {}
    else:
        return {}
    return {**dict(zip((*names, *range(len(names), len(positional))), positional, strict=False)), **keywords}


def kind(step):
    return step[1].rstrip("01")


def opens(step, *kinds):
    return step[0] == "open" and kind(step) in (kinds or ("sem", "shm", "mq"))


def calls(step, method, *kinds):
    return step[0] in ("call", "wait") and step[2] == method and kind(step) in (kinds or ("sem", "shm", "mq"))


def raised(observation, *types):
    """Did the step raise one of these, exactly?"""
    outcome, types_raised, *_ = observation.outcome
    return outcome == "error" and types_raised[0].removeprefix("builtins.") in types


def returned(observation):
    return observation.outcome[0] == "value"


def died(observation, number):
    return observation.outcome == ("death", number)


def out_of_range(step):
    """Return the names of the integers that are."""
    found = set()
    for name, value in arguments(step).items():
        if name in RANGES and isinstance(value, int):
            low, high = RANGES[name]
            if not low <= value <= high:
                found.add(name)
    return found


def faults(step):
    """Return what is wrong with the arguments of a constructor or a method, each by itself."""
    given = arguments(step)
    found = out_of_range(step)
    for name, value in given.items():
        if name == "timeout":
            legal = value is None or (isinstance(value, int | float) and value >= 0)
        elif name == "name":
            legal = isinstance(value, str | None) or (isinstance(value, bytes) and b"\0" not in value)
        elif name == "notification":
            callback = isinstance(value, tuple) and len(value) == 2 and callable(value[0])
            legal = isinstance(value, int | None) or callback
        elif name == "message":
            legal = True
        else:
            legal = name in INTEGERS and isinstance(value, int)
        if not legal:
            found.add(name)
    if not given.get("read", True) and not given.get("write", True):
        found.add("read and write")
    if given.get("read_only") and given.get("size"):
        found.add("read_only and size")
    flags = given.get("flags", 0)
    if isinstance(flags, int):
        nameless = given.get("name", "") is None
        if flags & O_CREX == O_EXCL or (nameless and flags & O_CREX != O_CREX):
            found.add("name and flags")
    return found


# ---- the list ----


class Difference(NamedTuple):
    id: str
    there: str  # what the original does, and why this package does not
    here: str
    applies: Callable[[Any, Any, Any], bool]  # to (step, what it came to here, what it came to there)
    examples: tuple  # sequences whose last steps show it
    ends: bool = False  # what follows may differ because of it, so the sequence ends
    chance: bool = False  # undefined there: it may go well


def _copied(step, ours, theirs):
    return step[0] in ("copied", "pickled") and raised(theirs, "TypeError")


def _unlink_arguments(step, ours, theirs):
    if step[0] != "function" or not raised(theirs, "TypeError"):
        return False
    _, _, positional, keywords = step
    return (positional, list(keywords)) == ((), ["name"]) or (not keywords and isinstance(positional[0], bytes))


def _out_of_range(step, ours, theirs):
    told = "OSError" if calls(step, "request_notification") else "ValueError"  # there is no such signal
    return bool(out_of_range(step)) and raised(ours, told)


ARGUMENT = "TypeError", "ValueError", "OverflowError"  # what wrong arguments raise
HANDLE = "posix_ipc.ExistentialError", "posix_ipc.PermissionsError"  # what closed handles and those of no use raise


def _two_faults(step, ours, theirs):
    if not all(raised(each, *ARGUMENT, *HANDLE) for each in (ours, theirs)):
        return False
    # One of the two may be that the handle is closed or of no use.
    barred = not opens(step) and (raised(ours, *HANDLE) or raised(theirs, *HANDLE))
    return len(faults(step)) + barred > 1


def _closed_and_barred(step, ours, theirs):
    moves = calls(step, "send") or calls(step, "receive")
    return moves and raised(ours, "posix_ipc.ExistentialError") and raised(theirs, "posix_ipc.PermissionsError")


def _not_utf8(step, ours, theirs):
    names = step[2] if step[0] == "function" else [arguments(step).get("name")]
    return any(isinstance(name, str) and "\udcff" in name for name in names) and raised(
        theirs, "UnicodeEncodeError", "UnicodeDecodeError"
    )


def _closed_unlink(step, ours, theirs):
    gone = theirs.files.keys() - ours.files.keys()
    if not (calls(step, "unlink", "sem") and returned(ours) and raised(theirs, "posix_ipc.ExistentialError")):
        return False
    return len(gone) == 1


def _closed_notification(step, ours, theirs):
    asked = step[0] == "notify" or calls(step, "request_notification")
    return asked and raised(ours, "posix_ipc.ExistentialError") and (returned(theirs) or raised(theirs, "OSError"))


def _failed_notification(step, ours, theirs):
    if not (calls(step, "request_notification") and raised(ours, "OSError") and ours.outcome == theirs.outcome):
        return False
    kept = [name for name in ours.queues if ours.queues[name] != theirs.queues[name]]
    lost = bool(kept) and all(theirs.queues[name]["notification"] == (0, 0, False) for name in kept)
    return lost and ours.descriptors == theirs.descriptors


def _kept_notification(step, ours, theirs):
    if not (calls(step, "close", "mq") and returned(ours) and returned(theirs)):
        return False
    if ours.event is not None and theirs.event is None:
        return ours.event[1][0] == "callback"
    lost = [name for name in ours.queues if ours.queues[name] != theirs.queues.get(name)]
    kept = bool(lost) and all(
        (ours.queues[name]["notification"], theirs.queues[name]["notification"])
        == ((SIGEV_THREAD, 0, True), (0, 0, False))
        for name in lost
    )
    return kept and ours.descriptors == theirs.descriptors


def _signal_0(step, ours, theirs):
    number = arguments(step).get("notification")
    cut_off = isinstance(number, int) and number % (1 << 32) == 0
    return cut_off and raised(ours, "OSError") and (returned(theirs) or raised(theirs, "OverflowError", "OSError"))


def _failed_close_fd(step, ours, theirs):
    if not (step[0] == "close_behind" and returned(ours) and returned(theirs)):
        return False
    return ours.outcome[1] == (*theirs.outcome[1][:2], True)


def _failed_resize(step, ours, theirs):
    if not (opens(step, "shm") and ours.outcome == theirs.outcome and raised(ours, "ValueError")):
        return False
    return theirs.files.keys() < ours.files.keys()


def _read_only_size(step, ours, theirs):
    given = arguments(step)
    return opens(step, "shm") and given.get("read_only") and given.get("size") and raised(ours, "ValueError")


def _null_byte(step, ours, theirs):
    name = arguments(step).get("name")
    return opens(step) and isinstance(name, bytes) and b"\0" in name and raised(ours, "ValueError")


def _no_name(step, ours, theirs):
    slashes = arguments(step).get("name") in ("/", "//", b"/")
    return opens(step, "mq") and slashes and raised(ours, "ValueError") and raised(theirs, "posix_ipc.ExistentialError")


def _truth(step, ours, theirs):
    given = [arguments(step).get(name, True) for name in ("read", "write")]
    return opens(step, "mq") and not all(isinstance(value, int) for value in given) and raised(ours, "TypeError")


def _other_flags(step, ours, theirs):
    flags = arguments(step).get("flags")
    known = O_CREX | (O_NONBLOCK if opens(step, "mq") else O_TRUNC)
    return opens(step) and isinstance(flags, int) and bool(flags & ~known)


def _truncated_semaphore(step, ours, theirs):
    flags = arguments(step).get("flags")
    emptied = [file for file in ours.files if ours.files[file] != theirs.files.get(file)]
    if not (opens(step, "sem") and returned(ours) and returned(theirs) and flags & O_TRUNC):
        return False
    return bool(emptied) and all(theirs.files[file][0] == 0 for file in emptied)


def _timeout(step):
    return arguments(step).get("timeout")


def _nan(step, ours, theirs):
    nan = _timeout(step) != _timeout(step)
    return nan and raised(ours, "ValueError") and raised(theirs, "posix_ipc.ExistentialError")


def _number(step, ours, theirs):
    return isinstance(_timeout(step), Decimal | Fraction) and raised(theirs, "TypeError")


def _endless(step, ours, theirs):
    return _timeout(step) in (float("inf"), 1e300, 10**400) and raised(ours, "posix_ipc.SignalError")


def _values(step_name, ours_value, theirs_value):
    """Return a predicate for what a step returns here and there."""
    return lambda step, ours, theirs: (
        step[0] == step_name and (ours.outcome, theirs.outcome) == (("value", ours_value), ("value", theirs_value))
    )


def _death(method, number, *types):
    """Return a predicate for what kills the original, and here raises one of these types, or returns for None."""
    return lambda step, ours, theirs: (
        step[0] == method and died(theirs, number) and (raised(ours, *types) or (None in types and returned(ours)))
    )


DIFFERENCES = (
    Difference(
        "copy-pickle",
        "TypeError: handles cannot be passed to another process",
        "by name",
        _copied,
        ((("copied", "sem0"),), (("pickled", "sem0"),), (("pickled", "shm0"),), (("pickled", "mq0"),)),
    ),
    Difference(
        "unlink-arguments",
        "unlink_*() takes neither bytes, which the constructors do, nor a keyword",
        "both",
        _unlink_arguments,
        (
            (("get", "sem0", "value"), ("function", "unlink_semaphore", (A.encode(),), {})),
            (("get", "shm0", "size"), ("function", "unlink_shared_memory", (), {"name": A})),
            (("function", "unlink_message_queue", (A.encode(),), {}),),
        ),
        ends=True,
    ),
    Difference(
        "out-of-range",
        "numbers are cut off silently, or an OverflowError, or told when something else was done already",
        "ValueError (of a signal: OSError), before anything else",
        _out_of_range,
        (
            (("open", "shm0", (A, O_CREX), {"size": 1 << 64}),),
            (("open", "sem0", (A, O_CREX, -1), {}),),
            (("open", "sem0", (A, O_CREX), {"initial_value": 1 << 70}),),
            (("open", "mq0", (A, O_CREX), {**SMALL, "max_messages": 1 << 70}),),
            (("get", "mq0", "mode"), ("open", "mq1", (A, O_CREAT), {**SMALL, "max_messages": 0})),
            (("call", "mq0", "send", (b"", 0, 1 << 70)),),
            (("call", "mq0", "request_notification", (1 << 70,)),),
        ),
        ends=True,
    ),
    Difference(
        "two-faults",
        "of two faults, such as a wrong argument to a handle that is closed, one is told",
        "perhaps the other one",
        _two_faults,
        (
            (("open", "mq0", (3, 0), {**SMALL, "read": False, "write": False}),),
            (
                ("open", "mq0", (A, O_CREX), {**SMALL, "write": False}),
                ("call", "mq0", "send", (b"", float("nan"))),
            ),
            (("call", "sem0", "close"), ("call", "sem0", "acquire", (-1,))),
            (("call", "mq0", "send", (b"", float("nan"), "x")),),
        ),
    ),
    Difference(
        "closed-and-barred",
        "on a closed queue send() and receive() may tell first that they were not allowed before either",
        "ExistentialError, as for all that is closed",
        _closed_and_barred,
        (
            (
                ("open", "mq0", (A, O_CREX), {**SMALL, "write": False}),
                ("call", "mq0", "close"),
                ("call", "mq0", "send", (b"",)),
            ),
        ),
    ),
    Difference(
        "not-utf8",
        "a name that is no UTF-8: the constructor makes the object and fails, or cannot find it",
        "names are those of files",
        _not_utf8,
        (
            (("open", "shm0", (f"/{PREFIX}\udcff", O_CREX), {}),),
            (("function", "unlink_semaphore", (f"/{PREFIX}\udcff",), {}),),
        ),
        ends=True,
    ),
    Difference(
        "unlink-after-close",
        "Semaphore.unlink() after close() is an ExistentialError, unlike that of queues and segments",
        "unlinks",
        _closed_unlink,
        ((("call", "sem0", "close"), ("call", "sem0", "unlink")),),
        ends=True,
    ),
    Difference(
        "notification-after-close",
        "on a closed queue nothing happens, or OSError",
        "ExistentialError, as every use of it",
        _closed_notification,
        (
            (("call", "mq0", "close"), ("call", "mq0", "request_notification")),
            (("call", "mq0", "close"), ("notify", "mq0", 0)),
        ),
    ),
    Difference(
        "failed-notification",
        "a request that fails takes the notification away that was asked for before",
        "a failed call changes nothing",
        _failed_notification,
        ((("notify", "mq0", 0), ("call", "mq0", "request_notification", (65,))),),
        ends=True,
    ),
    Difference(
        "other-handle-closed",
        "a callback is forgotten when the process closes any handle on its queue",
        "asked for again, or called if there are messages: one of them may have come while nobody was told",
        _kept_notification,
        tuple(
            (("open", "mq1", (A, O_CREAT), SMALL), *before, ("notify", "mq0", 0), ("call", "mq1", "close"))
            for before in ((), (("call", "mq0", "send", (b"",)),))
        ),
        ends=True,
    ),
    Difference(
        "signal-0",
        "signal 0, and what is cut off to it, occupies the queue and notifies nobody",
        "OSError, as for all invalid signals",
        _signal_0,
        ((("call", "mq0", "request_notification", (0,)),), (("call", "mq0", "request_notification", (1 << 32,)),)),
        ends=True,
    ),
    Difference(
        "failed-close-fd",
        "after a close_fd() that failed, fd is a number that may be somebody else's",
        "-1",
        _failed_close_fd,
        ((("close_behind", "shm0"),),),
        ends=True,
    ),
    Difference(
        "failed-resize",
        "unlinks the segment, one that existed before too",
        "an existing segment is untouched",
        _failed_resize,
        ((("get", "shm0", "size"), ("open", "shm1", (A,), {"size": 8192, "read_only": True})),),
        ends=True,
    ),
    Difference(
        "read-only-size",
        "tries to resize, and tells first what else is wrong",
        "ValueError, before anything is opened",
        _read_only_size,
        ((("open", "shm0", (A,), {"size": 8192, "read_only": True}),),),
        ends=True,
    ),
    Difference(
        "null-byte",
        "bytes with a null character: what is before it is the name",
        "ValueError",
        _null_byte,
        tuple((("open", slot, (A.encode() + b"\0b", O_CREX), options),) for slot, options in OPTIONS.items()),
        ends=True,
    ),
    Difference(
        "queue-without-name",
        "MessageQueue('/') is an ExistentialError",
        "ValueError, as for the other types",
        _no_name,
        ((("open", "mq0", ("/", O_CREX), SMALL),),),
    ),
    Difference(
        "read-write-truth",
        "read and write may be anything, such as the text 'no'",
        "TypeError, as for read_only",
        _truth,
        ((("open", "mq0", (A, O_CREX), {**SMALL, "write": "no"}),),),
        ends=True,
    ),
    Difference(
        "other-flags",
        "other flags are passed on: with O_WRONLY a descriptor without any access, or errors of open(2)",
        "ignored",
        _other_flags,
        ((("open", "shm0", (A, O_CREX | 1), {}),),),
        ends=True,
    ),
    Difference(
        "semaphore-truncate",
        "O_TRUNC empties the file of an existing semaphore, which kills whoever uses it",
        "ignored",
        _truncated_semaphore,
        ((("get", "sem0", "value"), ("open", "sem1", (A, O_TRUNC), {})),),
        ends=True,
    ),
    Difference(
        "timeout-nan",
        "ExistentialError",
        "ValueError",
        _nan,
        ((("call", "sem0", "acquire", (float("nan"),)),), (("call", "mq0", "receive", (float("nan"),)),)),
    ),
    Difference(
        "timeout-number",
        "only int and float",
        "all numbers",
        _number,
        ((("call", "sem0", "acquire", (Decimal("0.001"),)),), (("call", "mq0", "send", (b"", Fraction(1, 1000))),)),
        ends=True,
    ),
    Difference(
        "timeout-endless",
        "infinite and huge ones are undefined",
        "for ever: here until the signal",
        _endless,
        tuple(
            (("call", "sem0", "acquire", (0,)), ("wait", "sem0", "acquire", (timeout,)))
            for timeout in (float("inf"), 1e300, 10**400)
        ),
        ends=True,
        chance=True,
    ),
    Difference(
        "handler-exception",
        "the exception of a signal handler that ended a wait is lost",
        "the cause of the SignalError",
        _values("wait_with_raising_handler", "LookupError", "NoneType"),
        (
            (("call", "sem0", "acquire", (0,)), ("wait_with_raising_handler", "sem0", "acquire")),
            (("wait_with_raising_handler", "mq0", "receive"),),
        ),
    ),
    Difference(
        "callback-exception",
        "the exception of a callback is lost",
        "sys.unraisablehook",
        _values("raising_callback", "LookupError", None),
        ((("raising_callback", "mq0"),),),
    ),
    Difference(
        "version",
        "1.3.2",
        "another",
        lambda step, ours, theirs: step == ("get_module", "VERSION") and theirs.outcome == ("value", "1.3.2"),
        ((("get_module", "VERSION"),),),
    ),
    # From here on the original dies. What leads to these is not among the random steps.
    Difference(
        "null-character",
        "SIGSEGV",
        "ValueError",
        _death("open", signal.SIGSEGV, "ValueError", "UnicodeEncodeError"),
        tuple(
            (("open", slot, (f"/{PREFIX}{bad}", O_CREX), options),)
            for slot, options in OPTIONS.items()
            for bad in ("\0b", "\ud800")
        ),
    ),
    Difference(
        "message-type",
        "SIGSEGV, or not: it frees what it never allocated",
        "TypeError",
        _death("send_number", signal.SIGSEGV, "TypeError"),
        ((("send_number", "mq0"),),),
        chance=True,
    ),
    Difference(
        "delete-block",
        "SIGSEGV",
        "AttributeError",
        _death("delete", signal.SIGSEGV, "AttributeError"),
        ((("delete", "mq0", "block"),),),
    ),
    Difference(
        "without-init",
        "SIGSEGV",
        "ExistentialError, and a repr",
        _death("without_init", signal.SIGSEGV, "posix_ipc.ExistentialError", None),
        (
            (("without_init", "sem0", "__repr__"),),
            (("without_init", "shm0", "unlink"),),
            (("without_init", "mq0", "unlink"),),
        ),
    ),
    Difference(
        "short-semaphore-file",
        "SIGBUS at the first use",
        "Error at open",
        _death("open_and_release", signal.SIGBUS, "posix_ipc.Error"),
        ((("truncate_file", "sem0"), ("open_and_release", "sem1")),),
    ),
)
