"""Completion of commands, options and names for shells, and the names themselves."""

from __future__ import annotations

import sys

import posix_ipc
from posix_ipc import _objects

SHELLS = ("bash", "zsh", "fish")

COMMANDS = "ls leaks why rm reap doctor watch completion"
OPTIONS = "--help --json --kind --prefix --unheld --min-age --yes --force --interval"

_BASH = f"""\
# eval "$(posix-ipc completion bash)"
_posix_ipc() {{
    local current=${{COMP_WORDS[COMP_CWORD]}} previous=${{COMP_WORDS[COMP_CWORD-1]}} names name
    COMPREPLY=()
    if [[ $previous == --kind ]]; then
        COMPREPLY=($(compgen -W "semaphore segment queue" -- "$current"))
    elif [[ $current == -* ]]; then
        COMPREPLY=($(compgen -W "{OPTIONS}" -- "$current"))
    elif ((COMP_CWORD == 1)); then
        COMPREPLY=($(compgen -W "{COMMANDS}" -- "$current"))
    elif [[ ${{COMP_WORDS[1]}} == completion ]]; then
        COMPREPLY=($(compgen -W "{" ".join(SHELLS)}" -- "$current"))
    elif [[ ${{COMP_WORDS[1]}} == why || ${{COMP_WORDS[1]}} == rm || $previous == --prefix ]]; then
        mapfile -t names < <("$1" names 2>/dev/null)
        for name in "${{names[@]}}"; do
            if [[ $name == "$current"* ]]; then
                COMPREPLY+=("$(printf %q "$name")")
            fi
        done
    fi
}}
complete -F _posix_ipc posix-ipc
"""

_ZSH = f"""\
#compdef posix-ipc
# eval "$(posix-ipc completion zsh)", after compinit
_posix_ipc() {{
    local -a names
    if [[ ${{words[CURRENT-1]}} == --kind ]]; then
        compadd semaphore segment queue
    elif [[ $PREFIX == -* ]]; then
        compadd -- {OPTIONS}
    elif ((CURRENT == 2)); then
        compadd {COMMANDS}
    elif [[ ${{words[2]}} == completion ]]; then
        compadd {" ".join(SHELLS)}
    elif [[ ${{words[2]}} == (why|rm) || ${{words[CURRENT-1]}} == --prefix ]]; then
        names=("${{(@f)$("${{words[1]}}" names 2>/dev/null)}}")
        compadd -a names
    fi
}}
compdef _posix_ipc posix-ipc
"""

_FISH = f"""\
# posix-ipc completion fish | source
complete -c posix-ipc -f
complete -c posix-ipc -n __fish_use_subcommand -a "{COMMANDS}"
complete -c posix-ipc -n "__fish_seen_subcommand_from why rm" -a "(posix-ipc names 2>/dev/null)"
complete -c posix-ipc -n "__fish_seen_subcommand_from completion" -a "{" ".join(SHELLS)}"
complete -c posix-ipc -l help -l json
complete -c posix-ipc -l kind -x -a "semaphore segment queue"
complete -c posix-ipc -l prefix -x -a "(posix-ipc names 2>/dev/null)"
complete -c posix-ipc -n "__fish_seen_subcommand_from leaks reap" -l unheld -l min-age
complete -c posix-ipc -n "__fish_seen_subcommand_from reap" -l yes
complete -c posix-ipc -n "__fish_seen_subcommand_from rm" -l force
complete -c posix-ipc -n "__fish_seen_subcommand_from watch" -l interval
"""


def script(shell: str) -> str:
    """What the shell has to read."""
    return {"bash": _BASH, "zsh": _ZSH, "fish": _FISH}[shell]


def print_names() -> None:
    """All names that can be seen without a look at processes, one a line."""
    names = {file.name for file in _objects.shm_files()}
    names |= {name for mount in _objects.queue_mounts() for name in mount.queues if _is_here(name)}
    sys.stdout.buffer.write(b"".join(name + b"\n" for name in sorted(names) if b"\n" not in name))


def _is_here(queue: bytes) -> bool:
    """A mount may be that of another IPC namespace."""
    try:
        posix_ipc.MessageQueue(queue, write=False).close()
    except posix_ipc.ExistentialError:
        return False
    except (posix_ipc.Error, OSError):
        return True
    return True
