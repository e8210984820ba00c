"""A Channel that is the pipes of a process on this machine: a local command, or the ssh program."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import subprocess
import threading
import time
from collections.abc import Sequence
from typing import IO, cast

from .channel import READ_MAX, WRITE_S, LinkLost, Tail

# How long a process may live on after its output has ended, before it gets a TERM.
_LEAVE_S = 2.0


class Process:
    """`argv` as a Channel. It has a session of its own: a Ctrl-C at corra's terminal misses it."""

    def __init__(self, argv: Sequence[str]) -> None:
        self._closed = False
        # Re-entrant: a signal handler that closes may run in the middle of a read.
        self._reading = threading.RLock()
        self._writing = threading.RLock()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._tail = Tail()
        try:
            self._start(argv)
        except OSError:
            os.close(self._wake)
            raise

    def _start(self, argv: Sequence[str]) -> None:
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            argv, stdin=pipe, stdout=pipe, stderr=pipe, bufsize=0, start_new_session=True
        )
        process = self._process
        self._in, self._out, self._err = cast(
            "tuple[IO[bytes], IO[bytes], IO[bytes]]",
            (process.stdin, process.stdout, process.stderr),
        )
        os.set_blocking(self._in.fileno(), False)
        # EPERM: the user's allowance of pipe pages is used up. The default size serves as well.
        with contextlib.suppress(PermissionError):
            fcntl.fcntl(self._out, fcntl.F_SETPIPE_SZ, READ_MAX)
        self._poll = select.poll()
        for file in (self._out, self._err, self._wake):
            self._poll.register(file, select.POLLIN)

    def read(self, timeout_s: float | None) -> bytes:
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        with self._reading:
            while True:
                ready = self._wait(deadline)
                if self._err.fileno() in ready:
                    self._take_stderr()
                if self._out.fileno() in ready:
                    if data := os.read(self._out.fileno(), READ_MAX):
                        self._begun()
                        return data
                    if not self._ended():
                        return b""

    def _wait(self, deadline: float | None) -> set[int]:
        if self._closed:
            raise LinkLost("closed")
        left = None if deadline is None else max(0, deadline - time.monotonic())
        ready = {fd for fd, _ in self._poll.poll(None if left is None else left * 1000)}
        if self._closed:
            raise LinkLost("closed")
        if not ready:
            raise TimeoutError(f"no byte in {left} s")
        return ready

    def _take_stderr(self) -> None:
        if data := os.read(self._err.fileno(), READ_MAX):
            self._tail.add(data)
        else:
            self._poll.unregister(self._err)

    def _begun(self) -> None:
        """Take note that bytes have come."""

    def _ended(self) -> bool:
        """Take the end of the output: return True if more will come, or raise what it means."""
        self.exit_status()
        return False

    def write(self, data: bytes) -> None:
        rest = memoryview(data)
        with self._writing:
            while rest:
                if self._closed:
                    raise LinkLost("closed")
                try:
                    rest = rest[os.write(self._in.fileno(), rest) :]
                except BlockingIOError:
                    self._wait_for_room()
                except (BrokenPipeError, ValueError) as error:
                    raise LinkLost("the command has gone") from error

    def _wait_for_room(self) -> None:
        room = select.poll()
        room.register(self._in, select.POLLOUT)
        room.register(self._wake, select.POLLIN)
        if not room.poll(WRITE_S * 1000):
            raise LinkLost(f"the command took no byte for {WRITE_S:g} s")

    def close_write(self) -> None:
        with self._writing:
            self._in.close()

    def stderr(self) -> bytes:
        return bytes(self._tail)

    def exit_status(self) -> int | None:
        """Return the status, with all of stderr read before; None if the process stays."""
        with self._reading:
            if not self._closed:
                self._drain_stderr()
            try:
                return self._process.wait(_LEAVE_S)
            except subprocess.TimeoutExpired:
                return None

    def _drain_stderr(self) -> None:
        poll = select.poll()
        poll.register(self._err, select.POLLIN)
        poll.register(self._wake, select.POLLIN)
        deadline = time.monotonic() + _LEAVE_S
        while (left := deadline - time.monotonic()) > 0:
            ready = {fd for fd, _ in poll.poll(left * 1000)}
            if self._err.fileno() not in ready:
                return
            data = os.read(self._err.fileno(), READ_MAX)
            if not data:
                return
            self._tail.add(data)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        os.eventfd_write(self._wake, 1)
        with self._reading, self._writing:
            self._let_go()
            os.close(self._wake)

    def _let_go(self) -> None:
        """Close the pipes. If the process doesn't end then, it gets a TERM, and is reaped."""
        for file in (self._in, self._out, self._err):
            file.close()
        if self._process.poll() is None:
            threading.Thread(target=_see_off, args=(self._process,), daemon=True).start()


def _see_off(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_LEAVE_S)
        return
    # sudo belongs to root: who called it can't signal it.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        process.terminate()
    process.wait()
