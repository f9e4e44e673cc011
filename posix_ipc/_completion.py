"""Completion of commands, options and names for shells, and the names themselves."""

from __future__ import annotations

import sys

import posix_ipc
from posix_ipc import _objects

SHELLS = ("bash", "zsh", "fish")

COMMANDS = "ls leaks why rm reap doctor watch completion"
OPTIONS = "--help --json --kind --prefix --unheld --min-age --yes --force --interval"

_BASH = rf"""# eval "$(posix-ipc completion bash)"
_posix_ipc() {{
    # The word as it is meant, and what of that stands before the part that readline puts a completion in place of: that
    # begins after a quote, or after one of COMP_WORDBREAKS, such as a colon.
    local line=${{COMP_LINE:0:COMP_POINT}} words=() typed= before= quote= character i
    for ((i = 0; i < ${{#line}}; i++)); do
        character=${{line:i:1}}
        if [[ $character == \\ && $quote != \' ]]; then
            typed+=${{line: ++i:1}}
        elif [[ $character == "$quote" ]]; then
            quote= before=$typed
        elif [[ -n $quote ]]; then
            typed+=$character
        elif [[ $character == [\'\"] ]]; then
            quote=$character before=$typed
        elif [[ $character == [[:blank:]] ]]; then
            [[ -z $typed ]] || words+=("$typed")
            typed= before=
        else
            typed+=$character
            [[ $COMP_WORDBREAKS != *"$character"* ]] || before=$typed
        fi
    done

    local previous=${{words[-1]}} option= candidates=() candidate
    if [[ $typed == --kind=* || $typed == --prefix=* ]]; then
        previous=${{typed%%=*}} option=$previous=
    fi
    if [[ $previous == --kind ]]; then
        candidates=(semaphore segment queue)
    elif [[ -z $option && $typed == -* ]]; then
        candidates=({OPTIONS})
    elif ((${{#words[@]}} == 1)); then
        candidates=({COMMANDS})
    elif [[ ${{words[1]}} == completion ]]; then
        candidates=({" ".join(SHELLS)})
    elif [[ ${{words[1]}} == why || ${{words[1]}} == rm || $previous == --prefix ]]; then
        mapfile -t candidates < <("$1" names 2>/dev/null)
        [[ ${{typed#"$option"}} != [^/]* ]] || candidates=("${{candidates[@]#/}}")
    fi

    COMPREPLY=()
    for candidate in "${{candidates[@]}}"; do
        candidate=$option$candidate
        if [[ $candidate == "$typed"* ]]; then
            candidate=${{candidate:${{#before}}}}
            case $quote in
                \') candidate=${{candidate//\'/\'\\\'\'}} ;;
                \")
                    candidate=${{candidate//\\/\\\\}}
                    candidate=${{candidate//\"/\\\"}}
                    candidate=${{candidate//\$/\\\$}}
                    candidate=${{candidate//\`/\\\`}}
                    ;;
                *) candidate=$(printf %q "$candidate") ;;
            esac
            COMPREPLY+=("$candidate")
        fi
    done
}}
complete -F _posix_ipc posix-ipc
"""

_ZSH = f"""\
#compdef posix-ipc
# eval "$(posix-ipc completion zsh)", after compinit
_posix_ipc() {{
    local previous=${{words[CURRENT-1]}}
    local -a names
    if compset -P --kind=; then
        previous=--kind
    elif compset -P --prefix=; then
        previous=--prefix
    fi
    if [[ $previous == --kind ]]; then
        compadd semaphore segment queue
    elif [[ $PREFIX == -* ]]; then
        compadd -- {OPTIONS}
    elif ((CURRENT == 2)); then
        compadd {COMMANDS}
    elif [[ ${{words[2]}} == completion ]]; then
        compadd {" ".join(SHELLS)}
    elif [[ ${{words[2]}} == (why|rm) || $previous == --prefix ]]; then
        names=("${{(@f)$("${{words[1]}}" names 2>/dev/null)}}")
        if [[ $PREFIX == [^/]* ]]; then
            names=("${{(@)names#/}}")
        fi
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
