"""Processes under ptrace: one that is held as a debugger holds it, one that gets a signal at a
chosen system call.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

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


class Signalled(NamedTuple):
    """How a process took a signal: its `stops` at system calls until the signal `was_sent`, if it
    was, and in all if it wasn't; when that was, the seconds until then, and from then to its end;
    its status from waitpid; what it wrote.
    """

    stops: int
    was_sent: bool
    sent_at: float
    sent_s: float
    took_s: float
    status: int
    out: bytes
    err: bytes

    @property
    def code(self) -> int:
        """As subprocess tells it: the exit code, or -N where signal N ended the process."""
        return os.waitstatus_to_exitcode(self.status)


def signalled(
    argv: list[str],
    number: int,
    point: int,
    *,
    deadline_s: float = 30,
    threads: bool = False,
    **how: str,
) -> Signalled:
    """Run `argv` and send it `number` at its `point`-th stop at a system call after its exec; with
    `threads`, of any of its threads.

    `out` is what it wrote to stdout and to the descriptor of $CORRA_REPORT; `how` is added to its
    environment. It is killed after `deadline_s`.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        ours, theirs = os.pipe()
        # A tracer is told of every child of its process, so it has a process of its own.
        tracer = os.fork()
        if not tracer:
            try:
                files = (out.fileno(), err.fileno())
                found = _trace(argv, number, point, deadline_s, threads, files, how)
                os.write(theirs, json.dumps(found).encode())
            finally:
                os._exit(0)
        os.close(theirs)
        with open(ours, "rb") as said:
            stops, sent_at, sent_s, took_s, status = json.loads(said.read())
        os.waitpid(tracer, 0)
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read())
        return Signalled(stops, stops >= point, sent_at, sent_s, took_s, status, *texts)


def _trace(
    argv: list[str],
    number: int,
    point: int,
    deadline_s: float,
    threads: bool,
    files: tuple[int, int],
    how: Mapping[str, str],
) -> tuple[int, float, float, float, int]:
    began = sent = time.monotonic()
    pid = os.fork()
    if not pid:
        os.setsid()
        os.dup2(os.open(os.devnull, os.O_RDWR), 0)
        report = os.dup(files[0])
        for target, file in enumerate(files, 1):
            os.dup2(file, target)
        os.set_inheritable(report, True)
        ptrace(PTRACE_TRACEME, 0)
        os.kill(os.getpid(), signal.SIGSTOP)
        os.execve(argv[0], argv, {**os.environ, **how, "CORRA_REPORT": str(report)})
    alarm = threading.Timer(deadline_s, os.kill, (pid, signal.SIGKILL))
    alarm.daemon = True
    os.waitpid(pid, WALL)
    alarm.start()
    ptrace(PTRACE_SETOPTIONS, pid, 1 | (1 << CLONE if threads else 0))
    ptrace(PTRACE_SYSCALL, pid)
    stops = 0
    while True:
        task, status = os.waitpid(-1, WALL)
        if os.WIFEXITED(status) or os.WIFSIGNALED(status):
            if task == pid:
                return stops, sent, sent - began, time.monotonic() - sent, status
            continue
        deliver = 0
        if os.WSTOPSIG(status) == signal.SIGTRAP | 0x80:
            stops += 1
            if stops == point:
                sent = time.monotonic()
                os.kill(pid, number)
        elif os.WSTOPSIG(status) not in (signal.SIGTRAP, signal.SIGSTOP):
            deliver = os.WSTOPSIG(status)
        # Once the signal is sent, the process runs at its own speed.
        ptrace(PTRACE_SYSCALL if stops < point else PTRACE_CONT, task, deliver)


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
