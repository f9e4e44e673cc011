"""Completion as a user meets it: real shells on a terminal, in which the key is pressed and the command then runs."""

import argparse
import contextlib
import json
import os
import pty
import re
import select
import shutil
import subprocess
import sys

import pytest
from support import PACKAGE_PARENT

if sys.platform != "linux":
    pytest.skip("the command line is for Linux", allow_module_level=True)

from posix_ipc import __main__, _completion

COMMAND = f"""\
#!{sys.executable}
import json, sys
sys.path.insert(0, {str(PACKAGE_PARENT)!r})
if sys.argv[1] in ("names", "completion"):
    from posix_ipc.__main__ import main
    sys.exit(main())
print("arguments", json.dumps(sys.argv[1:]), "end")
"""
"""Completes as the real one does, and else shows the arguments that it got."""

SHELLS = {
    "bash": (["bash", "--norc", "--noprofile", "-i"], 'eval "$(posix-ipc completion bash)"'),
    "zsh": (["zsh", "-f", "-i"], 'autoload -U compinit; compinit -u -D; eval "$(posix-ipc completion zsh)"'),
    "fish": (["fish", "--no-config", "-i"], "posix-ipc completion fish | source"),
}


class Terminal:
    """That of a shell, seen from the keyboard."""

    def __init__(self, descriptor):
        self._descriptor = descriptor

    def type(self, text):
        """Type a command, in which a tab asks for completion; the arguments that it got."""
        os.write(self._descriptor, f"{text}\n".encode())
        seen = b""
        while not (found := re.search(rb"arguments (\[.*\]) end", seen)):
            assert select.select([self._descriptor], [], [], 30)[0], seen
            seen += os.read(self._descriptor, 4096)
        return json.loads(found[1])


@contextlib.contextmanager
def shell_at_terminal(shell, directory):
    """A shell that completes, at a terminal of its own."""
    command = directory / "posix-ipc"
    command.write_text(COMMAND)
    command.chmod(0o755)
    arguments, prepare = SHELLS[shell]
    environment = {
        "PATH": f"{directory}{os.pathsep}{os.environ['PATH']}",
        "HOME": str(directory),
        "INPUTRC": "/dev/null",
        "LC_ALL": "C.UTF-8",
        "TERM": "dumb",
    }
    own, others = pty.openpty()
    streams = dict.fromkeys(["stdin", "stdout", "stderr"], others)
    with subprocess.Popen(["setsid", "--ctty", *arguments], env=environment, **streams) as process:
        os.close(others)
        try:
            terminal = Terminal(own)
            assert terminal.type(f"{prepare}; posix-ipc ready") == ["ready"]
            yield terminal
        finally:
            process.kill()
            os.close(own)


def press_tab(shell, directory, name, segment):
    blank, special, first, second = (f"{name}{tail}" for tail in (":a b", "%'\"$`\\&é[1]*", "=x1", "=x2"))
    for each in blank, special, first, second:
        segment(each)
    with shell_at_terminal(shell, directory) as terminal:
        for words, completed in (
            (["wh\t", "x"], ["why", "x"]),
            (["reap", "--y\t"], ["reap", "--yes"]),
            (["ls", "--kind", "q\t", "--kind=sem\t"], ["ls", "--kind", "queue", "--kind=semaphore"]),
            (["ls", "--prefix", f"{name}:\t", f"--prefix={name}:\t"], ["ls", "--prefix", blank, f"--prefix={blank}"]),
            (["rm", f"{name}:\t", f"{name}:a\\ \t", f'"{name}:a \t', f"'{name}:\t"], ["rm", *[blank] * 4]),
            (["rm", f"{name}%\t", f"'{name}%\t", f'"{name}%\t'], ["rm", *[special] * 3]),
            (["rm", f"{name}=\t1\t", f"{name}=\t2\t"], ["rm", first, second]),
        ):
            assert terminal.type(f"posix-ipc {' '.join(words)}") == completed
        (without_slash,) = terminal.type(f"posix-ipc why {name[1:]}:\t")[1:]
        assert without_slash in (blank, blank[1:])


@pytest.mark.slow
@pytest.mark.no_sanitizer  # the shells start a program without it
@pytest.mark.parametrize("shell", SHELLS)
def test_tab_completes(shell, tmp_path, name, segment):
    for program in shell, "setsid":
        if shutil.which(program) is None:
            pytest.skip(f"needs {program}")
    press_tab(shell, tmp_path, name, segment)


def test_completion_knows_every_command_and_option():
    (commands,) = (a for a in __main__.parser()._actions if isinstance(a, argparse._SubParsersAction))
    options = {
        option
        for sub in commands.choices.values()
        for action in sub._actions
        for option in action.option_strings
        if option.startswith("--")
    }
    assert set(_completion.COMMANDS.split()) == set(commands.choices) - {"names"}
    assert set(_completion.OPTIONS.split()) == options
