"""corra's command line on a pseudo-terminal."""

from __future__ import annotations

import os
import pty
import select
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from conftest import Cli

DEADLINE_S = 30.0


class Terminal:
    """corra in a pseudo-terminal, as a person has it before them."""

    def __init__(self, cli: Cli, *words: str) -> None:
        self.master, slave = pty.openpty()
        with open(slave, "r+b", 0) as own:
            self.process = cli.popen(
                *words,
                env={"TERM": "xterm", "NO_COLOR": "1"},
                terminal=True,
                stdin=own,
                stdout=own,
                stderr=own,
            )
        self.seen = b""

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
        return self.process.wait(DEADLINE_S)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.end()
        os.close(self.master)
