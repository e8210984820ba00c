"""A real terminal for a program under test, and somebody who types on it: expect, with the standard library."""

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
from types import TracebackType
from typing import Any

PATIENCE_S = 60.0


class Terminal:
    """What `start` starts, on a terminal of its own, as the leader of a session. The terminal outlives it, so that what it left behind can be looked at."""

    def __init__(
        self, start: Callable[..., subprocess.Popen[bytes]], *, rows: int = 24, columns: int = 80
    ) -> None:
        self.master, self.slave = pty.openpty()
        self.resize(rows, columns, tell=False)
        self.before = self.modes()
        self.seen = b""  # all that it has shown
        self._at = 0  # in `plain`, behind what was expected last
        ends = dict.fromkeys(("stdin", "stdout", "stderr"), self.slave)
        self.process = start(env={"TERM": "xterm-256color"}, terminal=True, **ends)

    def __enter__(self) -> Terminal:  # noqa: PYI034 - Self needs Python 3.11
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(PATIENCE_S)
        os.close(self.master)
        os.close(self.slave)

    def modes(self) -> list[Any]:
        """Return what the terminal is set to."""
        return termios.tcgetattr(self.slave)

    @property
    def is_raw(self) -> bool:
        return not self.modes()[3] & (termios.ICANON | termios.ECHO)

    def resize(self, rows: int, columns: int, *, tell: bool = True) -> None:
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        if tell:
            self.process.send_signal(signal.SIGWINCH)

    def type(self, text: str | bytes) -> None:
        os.write(self.master, text.encode() if isinstance(text, str) else text)

    def expect(self, pattern: str, timeout_s: float = PATIENCE_S) -> re.Match[bytes]:
        """Return the next match in what is shown. Colours don't count. Raises AssertionError with what was shown instead."""
        deadline = time.monotonic() + timeout_s
        wanted = re.compile(pattern.encode(), re.DOTALL)
        while (found := wanted.search(self.plain, self._at)) is None:
            if not self._read(deadline - time.monotonic()):
                raise AssertionError(f"not seen: {pattern!r} in {self.plain[self._at :][-2000:]!r}")
        self._at = found.end()
        return found

    def _read(self, timeout_s: float) -> bool:
        """Read once; return whether there was anything before the end of it or of the time."""
        until = time.monotonic() + timeout_s
        while not select.select([self.master], [], [], 0.05)[0]:
            if time.monotonic() > until or self.process.poll() is not None:
                return bool(select.select([self.master], [], [], 0)[0]) and self._take()
        return self._take()

    def _take(self) -> bool:
        data = os.read(self.master, 65536)
        self.seen += data
        return bool(data)

    @property
    def plain(self) -> bytes:
        """What it has shown, without colours."""
        return re.sub(rb"\x1b\[[0-9;]*m", b"", self.seen)

    def end(self, timeout_s: float = PATIENCE_S) -> int:
        """Read until it has ended; return its exit code."""
        deadline = time.monotonic() + timeout_s
        while self.process.poll() is None:
            assert time.monotonic() < deadline, f"it doesn't end: {self.seen[-2000:]!r}"
            self._read(0.05)
        while select.select([self.master], [], [], 0)[0]:
            self._take()
        return self.process.returncode
