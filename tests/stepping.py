"""Stop a process at each of its system calls, to kill it there or to do something meanwhile: see ptrace(2).

The kernel stops a traced process twice at each call: before it and after it. A process that is killed while it stands
before a call does not make that call.
"""

import contextlib
import ctypes
import os
import signal
import traceback

_TRACEME, _DETACH, _SYSCALL, _SETOPTIONS, _GETEVENTMSG = 0, 17, 24, 0x4200, 0x4201
_O_SYSGOOD, _O_FORK, _O_VFORK, _O_CLONE, _O_EXEC, _O_EXITKILL = 0x1, 0x2, 0x4, 0x8, 0x10, 0x100000
_AT_A_CALL = signal.SIGTRAP | 0x80
_EVENT_EXEC = 4
_NEW_PROCESS = 1, 2, 3  # events of fork, vfork and clone
_WALL = 0x40000000  # children that send no SIGCHLD too

_library = ctypes.CDLL(None, use_errno=True)
_library.ptrace.restype = ctypes.c_long
_library.ptrace.argtypes = [ctypes.c_long, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p]


def _ptrace(request, pid=0, data=0):
    if _library.ptrace(request, pid, None, data) < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"ptrace: {os.strerror(number)}")


def is_allowed():
    """May a process here trace its children?"""
    child = os.fork()
    if child == 0:
        with contextlib.suppress(OSError):
            _ptrace(_TRACEME)
            os._exit(0)
        os._exit(1)
    return os.waitpid(child, 0)[1] == 0


class Stepped:
    """A forked child that runs a generator: freely up to its first `yield`, and from there stopped at each call.

    With `follow` the processes that it starts are traced too, until they run another program. Whatever is left of it
    is killed when the block ends.
    """

    def __init__(self, operation, follow=False):
        self._follow = follow
        self.pid = os.fork()
        if self.pid == 0:
            _run(operation)
        self._tracees = [self.pid]
        self._known = {self.pid}
        self._new = set()
        status = os.waitpid(self.pid, _WALL)[1]
        if not os.WIFSTOPPED(status):
            raise AssertionError("the child ended before the operation began")
        followed = _O_FORK | _O_VFORK | _O_CLONE | _O_EXEC if follow else 0
        _ptrace(_SETOPTIONS, self.pid, _O_SYSGOOD | _O_EXITKILL | followed)

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        for pid in self._known:
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, _WALL)

    def stops(self, whose=0):
        """Go on from stop to stop of the process that was the n-th to be started.

        This ends with the operation, when the processes that it started have ended too, or run another program.
        """
        _ptrace(_SYSCALL, self.pid)
        ended = False
        while not ended or self._known != {self.pid}:
            pid, status = os.waitpid(-1 if self._follow else self.pid, _WALL)
            if os.WIFEXITED(status) or os.WIFSIGNALED(status):
                self._known.discard(pid)
                if pid == self.pid:
                    raise AssertionError("the child ended in the midst of the operation")
                continue
            number, signal_to_deliver = os.WSTOPSIG(status), 0
            if self._is_new(pid):
                self._new.discard(pid)  # it begins with a stop
            elif number == _AT_A_CALL:
                if whose < len(self._tracees) and pid == self._tracees[whose]:
                    yield
                    if pid not in self._known:
                        continue
            elif number == signal.SIGTRAP:
                if status >> 16 == _EVENT_EXEC:
                    self._known.discard(pid)
                    _ptrace(_DETACH, pid)
                    continue
                if status >> 16 in _NEW_PROCESS:
                    started = ctypes.c_ulong()
                    _ptrace(_GETEVENTMSG, pid, ctypes.addressof(started))
                    self._is_new(started.value)
            elif number == signal.SIGSTOP and pid == self.pid:
                ended = True
                continue
            else:
                signal_to_deliver = number
            with contextlib.suppress(ProcessLookupError):  # somebody else killed it
                _ptrace(_SYSCALL, pid, signal_to_deliver)

    def _is_new(self, pid):
        """Does the stop of its beginning, or the report of its parent, which come in any order, still lie ahead?"""
        if pid not in self._tracees:
            self._tracees.append(pid)
            self._known.add(pid)
            self._new.add(pid)
        return pid in self._new

    def system_call(self):
        """The number of the call that it stands at."""
        with open(f"/proc/{self.pid}/syscall") as file:
            return int(file.read().split()[0])

    def kill(self, whose=0):
        """Kill the n-th of the processes where it stands."""
        pid = self._tracees[whose]
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, _WALL)
        self._known.discard(pid)


def _run(operation):
    status = 1
    try:
        next(operation)
        _ptrace(_TRACEME)
        os.kill(os.getpid(), signal.SIGSTOP)
        next(operation, None)
        os.kill(os.getpid(), signal.SIGSTOP)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)
