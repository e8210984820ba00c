"""corra's command line on a pseudo-terminal."""

from __future__ import annotations

import contextlib
import os
import pty
import select
import signal
import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from conftest import Cli

DEADLINE_S = 30.0


class Terminal:
    """corra in a pseudo-terminal, as a person has it before them."""

    def __init__(self, cli: Cli, *words: str) -> None:
        pid, self.master = pty.fork()
        if pid == 0:
            os.chdir(cli.home)
            os.execve(sys.executable, [*cli.program, *words], {**cli.environment(), "TERM": "xterm", "NO_COLOR": "1"})
        self.pid = pid
        self.seen = b""
        self.code: int | None = None

    def until(self, *texts: str) -> str:
        """Return all that was shown, once every one of `texts` is in it."""
        until = time.monotonic() + DEADLINE_S
        while not all(text.encode() in self.seen for text in texts):
            ready = select.select([self.master], [], [], max(0, until - time.monotonic()))[0]
            assert ready, f"{texts} never came: {self.seen.decode()}"
            assert self.read(), f"{texts} never came before the end: {self.seen.decode()}"
        return self.seen.decode()

    def read(self) -> bytes:
        try:
            data = os.read(self.master, 65536)
        except OSError:  # EIO: the other side is closed
            data = b""
        self.seen += data
        return data

    def type(self, keys: str) -> None:
        os.write(self.master, keys.encode())

    def end(self) -> int:
        """Read to the end and return the code as a shell has it, negative for a signal."""
        while self.read():
            pass
        if self.code is None:
            self.code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.code

    def close(self) -> None:
        if self.code is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            self.end()
        os.close(self.master)
