"""Processes under ptrace: one that is held as a debugger holds it, one that gets a signal at a
chosen system call.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator

(
    PTRACE_TRACEME,
    PTRACE_CONT,
    PTRACE_DETACH,
    PTRACE_SETOPTIONS,
    PTRACE_SYSCALL,
    PTRACE_GETEVENTMSG,
    PTRACE_SEIZE,
    PTRACE_INTERRUPT,
) = 0, 7, 17, 0x4200, 24, 0x4201, 0x4206, 0x4207
FORK, VFORK, CLONE, EXEC = 1, 2, 3, 4
OPTIONS = 1 | 1 << FORK | 1 << VFORK | 1 << CLONE | 1 << EXEC  # TRACESYSGOOD with the four events
WALL = 0x40000000

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
_libc.ptrace.restype = ctypes.c_long


def ptrace(request: int, pid: int, data: int | ctypes.c_ulong = 0) -> int:
    pointer = (
        ctypes.cast(ctypes.byref(data), ctypes.c_void_p)
        if isinstance(data, ctypes.c_ulong)
        else ctypes.c_void_p(data)
    )
    return int(_libc.ptrace(request, pid, None, pointer))


@contextlib.contextmanager
def held(pid: int) -> Iterator[None]:
    """Hold a process as a debugger does: nothing but us, or SIGKILL, lets it go on.

    Only the thread that entered may leave.
    """
    if ptrace(PTRACE_SEIZE, pid) < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    ptrace(PTRACE_INTERRUPT, pid)
    os.waitpid(pid, WALL)
    try:
        yield
    finally:
        if ptrace(PTRACE_DETACH, pid) < 0:  # it was killed, and nobody else gets to know that
            os.waitpid(pid, WALL)


def signalled(
    argv: list[str], number: int, point: int, deadline_s: float = 30, **how: str
) -> tuple[int, float, int, bytes]:
    """Run `argv` and send it `number` at its `point`-th stop at a system call after its exec.

    Return the number of stops, the seconds until the signal was sent, the status from waitpid, and
    what `argv` wrote to stdout and to the descriptor of $CORRA_REPORT. `argv` is killed after
    `deadline_s`.
    """
    began = sent = time.monotonic()
    ours, theirs = os.pipe()
    pid = os.fork()
    if not pid:
        os.setsid()
        os.dup2(os.open(os.devnull, os.O_RDWR), 0)
        os.dup2(theirs, 1)
        os.dup2(0, 2)
        os.set_inheritable(theirs, True)
        ptrace(PTRACE_TRACEME, 0)
        os.kill(os.getpid(), signal.SIGSTOP)
        os.execve(argv[0], argv, {**os.environ, **how, "CORRA_REPORT": str(theirs)})
    os.close(theirs)
    alarm = threading.Timer(deadline_s, os.kill, (pid, signal.SIGKILL))
    os.waitpid(pid, WALL)
    alarm.start()
    ptrace(PTRACE_SETOPTIONS, pid, 1)
    stops = deliver = 0
    while True:
        # Once the signal is sent, the process runs at its own speed.
        ptrace(PTRACE_SYSCALL if stops < point else PTRACE_CONT, pid, deliver)
        _, status = os.waitpid(pid, WALL)
        if os.WIFEXITED(status) or os.WIFSIGNALED(status):
            break
        deliver = 0
        if os.WSTOPSIG(status) == signal.SIGTRAP | 0x80:
            stops += 1
            if stops == point:
                sent = time.monotonic()
                os.kill(pid, number)
        elif os.WSTOPSIG(status) not in (signal.SIGTRAP, signal.SIGSTOP):
            deliver = os.WSTOPSIG(status)
    alarm.cancel()
    with open(ours, "rb") as said:
        return stops, sent - began, status, said.read()


def killed_at(point: int, work: Callable[[], object]) -> bool:
    """Do `work` in a child that is killed at its `point`-th stop at a system call.

    Return whether it was, and hadn't ended before. Entry and exit of a call are two stops.
    """
    pid = os.fork()
    if not pid:
        ptrace(PTRACE_TRACEME, 0)
        os.kill(os.getpid(), signal.SIGSTOP)
        try:
            work()
        finally:
            os._exit(0)
    os.waitpid(pid, WALL)
    ptrace(PTRACE_SETOPTIONS, pid, 1)  # TRACESYSGOOD
    ptrace(PTRACE_SYSCALL, pid)
    while True:
        _, status = os.waitpid(pid, WALL)
        if os.WIFEXITED(status) or os.WIFSIGNALED(status):
            return False
        number = os.WSTOPSIG(status)
        point -= number == signal.SIGTRAP | 0x80
        if not point:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, WALL)
            return True
        ptrace(PTRACE_SYSCALL, pid, 0 if number == signal.SIGTRAP | 0x80 else number)
