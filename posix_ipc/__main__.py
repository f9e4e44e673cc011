"""Semaphores, shared memory and message queues of this host: what is there, who holds it, is it safe to remove."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

import posix_ipc
from posix_ipc import _ext

_STATUS = """\
exit status:
  0  nothing was found, or all is done
  1  something was found: a leak, a fault, an object that stays because it is in use
  2  it could not be told or done: an unreadable process, no such name, no permission, wrong usage

Names may be written with or without the slash at their beginning. Without --yes, reap only tells what it would remove.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; its exit status. `arguments` are by default those of the process."""
    chosen = parser().parse_args(arguments)
    if not hasattr(_ext, "Journal"):
        return _complain("this command needs Linux")
    if sys.stdout is None:
        return _complain("standard output is closed")
    try:
        status = _run(chosen)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # whoever reads has enough
        _drop_output()
        return 128 + 13  # as if by SIGPIPE
    except KeyboardInterrupt:
        return 128 + 2  # as if by SIGINT
    except OSError as error:
        _drop_output()
        return _complain(str(error))


def _run(chosen: argparse.Namespace) -> int:
    if chosen.command == "completion":
        from posix_ipc import _completion

        print(_completion.script(chosen.shell), end="")
        return 0
    if chosen.command == "names":
        from posix_ipc import _completion

        _completion.print_names()
        return 0
    from posix_ipc import _commands, _tables

    try:
        return _commands.run(chosen, _tables.standard_output())
    except _commands.UsageError as error:
        return _complain(str(error))


def _drop_output() -> None:
    """What is still in the buffer has to go somewhere when Python ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _complain(message: str) -> int:
    if sys.stderr is not None:
        print(f"posix-ipc: {message}", file=sys.stderr)
    return 2


# ---- arguments ----


def parser() -> argparse.ArgumentParser:
    called = os.path.basename(sys.argv[0])
    result = argparse.ArgumentParser(
        prog="python -m posix_ipc" if called == "__main__.py" else "posix-ipc",
        description=__doc__,
        epilog=_STATUS,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=16),
        allow_abbrev=False,
    )
    result.add_argument("--version", action="version", version=f"posix_ipc {posix_ipc.__version__}")
    commands = result.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, purpose: str, *parents: argparse.ArgumentParser) -> argparse.ArgumentParser:
        return commands.add_parser(
            name, help=purpose, description=f"{purpose[:1].upper()}{purpose[1:]}.", parents=parents, allow_abbrev=False
        )

    json, kind, prefix, leak = _json(), _kind(), _prefix(), _leak()
    add("ls", "list all objects; status 2 if the verdict on some is unknown", json, kind, prefix)
    add("leaks", "list what dead processes left: status 1 if there is something", json, kind, prefix, leak)
    add("why", "tell everything known about an object", json, kind).add_argument("name", metavar="NAME")
    remove = add("rm", "remove objects, if nobody uses them", json, kind)
    remove.add_argument("names", metavar="NAME", nargs="+")
    remove.add_argument("--force", action="store_true", help="remove the name even of what is in use")
    reap = add("reap", "remove what dead processes of this user left", json, kind, prefix, leak)
    reap.add_argument("--yes", action="store_true", help="do it; else only tell what would be removed")
    add("doctor", "tell what this system gives to objects, and what to do about it", json)
    watch = add("watch", "list all objects again and again, until Ctrl-C", json, kind, prefix)
    watch.add_argument("--interval", metavar="SECONDS", type=_seconds, default=2.0, help="between looks (default: 2)")
    shell = add("completion", 'print the completion of a shell: eval "$(posix-ipc completion bash)"')
    shell.add_argument("shell", choices=["bash", "zsh", "fish"])
    commands.add_parser("names")  # for the shells
    return result


def _json() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(add_help=False)
    result.add_argument("--json", action="store_true", help="print JSON")
    return result


def _kind() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(add_help=False)
    result.add_argument(
        "--kind",
        action="append",
        choices=["semaphore", "segment", "queue"],
        help="only this kind; may be given several times",
    )
    return result


def _prefix() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(add_help=False)
    result.add_argument("--prefix", metavar="TEXT", help="only names that begin like this")
    return result


def _leak() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(add_help=False)
    result.add_argument(
        "--unheld", action="store_true", help="also what is not tracked and held by nobody: perhaps data somebody wants"
    )
    result.add_argument(
        "--min-age", metavar="SECONDS", type=_seconds, default=0.0, help="only those that are at least this old"
    )
    return result


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1e9:
        raise argparse.ArgumentTypeError(f"not a number of seconds: {text!r}")
    return value


if __name__ == "__main__":
    sys.exit(main())
