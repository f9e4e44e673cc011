"""`python -m posix_ipc`: what is left of processes that died, and its removal."""

from __future__ import annotations

import argparse

from posix_ipc import _reaper


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m posix_ipc", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    reap = commands.add_parser("reap", help="remove the objects of this user whose processes are dead and nobody uses")
    reap.set_defaults(run=_reap)
    arguments = parser.parse_args()
    arguments.run()


def _reap() -> None:
    removed = _reaper.reap(print)
    print(f"{len(removed)} removed")


if __name__ == "__main__":
    main()
