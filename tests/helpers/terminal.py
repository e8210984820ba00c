"""A real terminal for a program under test, and a test that types on it: `expect` with the standard
library.
"""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing_extensions import Self

PATIENCE_S = 60.0
# The environment that corra's command line gets at a terminal.
KIND = {"TERM": "xterm-256color"}


class Pty:
    """A pseudo-terminal and everything that was written to it. The slave stays open in this
    process.
    """

    def __init__(self, *, rows: int = 24, columns: int = 80) -> None:
        self.master, self.slave = pty.openpty()
        self._size(rows, columns)
        self.before = self.modes()
        self.seen = b""
        self._at = 0  # a position in `plain`: the end of the last match of `expect`

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for end in (self.master, self.slave):
            if end >= 0:
                os.close(end)
        self.master = self.slave = -1

    def hang_up(self) -> None:
        """Close the window: the kernel hangs the terminal up."""
        os.close(self.master)
        self.master = -1

    def _size(self, rows: int, columns: int) -> None:
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def modes(self) -> list[Any]:
        """Return the terminal's settings."""
        return termios.tcgetattr(self.slave)

    @property
    def is_raw(self) -> bool:
        return not self.modes()[3] & (termios.ICANON | termios.ECHO)

    def type(self, text: str | bytes) -> None:
        os.write(self.master, text.encode() if isinstance(text, str) else text)

    def expect(self, pattern: str, timeout_s: float = PATIENCE_S) -> re.Match[bytes]:
        """Return the next match in the shown text, without colours. Raises AssertionError."""
        deadline = time.monotonic() + timeout_s
        wanted = re.compile(pattern.encode(), re.DOTALL)
        while (found := wanted.search(self.plain, self._at)) is None:
            if not self.read(deadline - time.monotonic()):
                raise AssertionError(f"not seen: {pattern!r} in {self.plain[self._at :][-2000:]!r}")
        self._at = found.end()
        return found

    def until(self, *texts: str, timeout_s: float = PATIENCE_S) -> str:
        """Return the shown text, without colours, once it holds every one of `texts`."""
        deadline = time.monotonic() + timeout_s
        while not all(text.encode() in self.plain for text in texts):
            assert self.read(deadline - time.monotonic()), f"{texts} never came: {self.text}"
        return self.text

    def read(self, timeout_s: float) -> bool:
        """Read once; return whether data came before the program's end and in time."""
        until = time.monotonic() + timeout_s
        while not self._readable(0.05):
            if self.has_ended or time.monotonic() > until:
                return self._readable(0) and self._take()
        return self._take()

    @property
    def has_ended(self) -> bool:
        return False

    def _readable(self, timeout_s: float) -> bool:
        return bool(select.select([self.master], [], [], timeout_s)[0])

    def _take(self) -> bool:
        data = os.read(self.master, 65536)
        self.seen += data
        return bool(data)

    @property
    def plain(self) -> bytes:
        """All that the terminal showed, without colours."""
        return re.sub(rb"\x1b\[[0-9;]*m", b"", self.seen)

    @property
    def text(self) -> str:
        return self.plain.decode(errors="replace")


class Terminal(Pty):
    """A program on a terminal. The terminal outlives the program, so that a test can look at it.

    `start(stdin=, stdout=, stderr=)` starts the program with these streams.
    """

    def __init__(
        self,
        start: Callable[..., subprocess.Popen[Any]],
        *,
        rows: int = 24,
        columns: int = 80,
        stdin: int | None = None,
    ) -> None:
        super().__init__(rows=rows, columns=columns)
        keys = self.slave if stdin is None else stdin
        self.process = start(stdin=keys, stdout=self.slave, stderr=self.slave)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(PATIENCE_S)
        super().close()

    @property
    def has_ended(self) -> bool:
        return self.process.poll() is not None

    def resize(self, rows: int, columns: int) -> None:
        self._size(rows, columns)
        self.process.send_signal(signal.SIGWINCH)

    def end(self, timeout_s: float = PATIENCE_S) -> int:
        """Read until the program has ended; return its exit code, negative for a signal."""
        deadline = time.monotonic() + timeout_s
        while not self.has_ended:
            assert time.monotonic() < deadline, f"the program doesn't end: {self.seen[-2000:]!r}"
            self.read(0.05)
        while self._readable(0):
            self._take()
        return int(self.process.returncode)
