"""Sends the operator's keys, or a pipe, to the program; this terminal stands for the program's.

If both sides have a terminal, ours stands for the program's: raw, of the same size, and every key
but the leave keys is the program's. At the end, whatever caused it, our terminal is restored and
the modes that the program has set in it are undone.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import os
import select
import termios
import threading
import tty
from collections.abc import Callable
from typing import Any

from corra.model.state import State
from corra.runs.stdin_feed import StdinFeed

from .leave_keys import Keys, Leave, shown
from .screen import Screen

# So many bytes may wait for the host; then no more of a pipe is read. Keys are always read.
_HELD_MAX = 4 << 20
_READ = 256 * 1024
# Leaving waits so long for the host to confirm the keys typed before.
LEAVE_S = 3.0


class Keyboard:
    """Gives the bytes of `fd` to `feed`, from the first State on, and puts a Leave on the desk."""

    def __init__(
        self, feed: StdinFeed, screen: Screen, *, keys: bytes = b"\x1d", fd: int = 0
    ) -> None:
        self.feed = feed
        self.raw = False
        self._screen = screen
        self._keys = Keys(keys)
        self._leave = shown(keys)
        self._fd = fd
        self._saved: list[Any] | None = None
        self._lock = threading.RLock()
        self._over = False
        self._stop, self._stopped = os.pipe()

    def begin(
        self,
        state: State,
        put: Callable[[Any], None],
        say: Callable[[str], None],
        *,
        switched: bytes = b"",
    ) -> None:
        """Start to read. With a terminal on both sides set ours up, and say how to leave it.

        `switched`: the modes that the program has set in its terminal so far.
        """
        if state.ended:
            return
        if state.pty and self._screen.can_be_lent and os.isatty(self._fd):
            with self._lock:
                if self._over:
                    return
                self._saved = termios.tcgetattr(self._fd)
                atexit.register(self.restore)
                self._screen.lend(switched)
                self.raw = True
                tty.setraw(self._fd, termios.TCSADRAIN)
            say(
                f"this is its terminal; {self._leave} leaves it running"
                if self._leave
                else "this is its terminal"
            )
            self._screen.switch_on()
            self.resize()
        threading.Thread(target=self._read, args=(put,), name="keyboard", daemon=True).start()

    def resize(self) -> None:
        """Give the program's terminal the size of ours."""
        if self.raw:
            with contextlib.suppress(OSError):
                columns, rows = os.get_terminal_size(self._fd)
                if rows and columns:
                    self.feed.resize(rows, columns)

    def resume(self) -> None:
        """Set the terminal up again after a stop: the shell has changed it meanwhile."""
        with self._lock:
            if self.raw:
                with contextlib.suppress(termios.error, OSError):
                    tty.setraw(self._fd, termios.TCSADRAIN)
                self._screen.switch_on()
        self.resize()

    def restore(self) -> None:
        """Read no more, and restore the terminal. Safe to call twice, and in a signal handler."""
        with self._lock:
            if not self._over:
                self._over = True
                os.write(self._stopped, b"\0")
            if self._saved is not None:
                saved, self._saved, self.raw = self._saved, None, False
                self._screen.take_back()
                # Keys typed ahead were meant for the program. TCSADRAIN would wait for a terminal
                # that is stopped or gone.
                with contextlib.suppress(termios.error, OSError):
                    termios.tcsetattr(
                        self._fd,
                        termios.TCSAFLUSH if os.isatty(self._fd) else termios.TCSANOW,
                        saved,
                    )
                atexit.unregister(self.restore)

    def _read(self, put: Callable[[Any], None]) -> None:
        poll = select.poll()
        for fd in (self._fd, self._stop):
            poll.register(fd, select.POLLIN)
        while True:
            ready = {fd for fd, _ in poll.poll()}
            if self._stop in ready:
                return
            try:
                data = os.read(self._fd, _READ)
            except OSError:  # EIO: our terminal has gone, and a SIGHUP is on its way
                return
            if not data:
                # A terminal that has gone may read as empty too, which isn't the end of stdin. In a
                # raw terminal Ctrl-D is a key.
                if not (self.raw or _has_gone(self._fd)):
                    self.feed.end()
                return
            leave = False
            if self.raw:
                data, leave = self._keys.take(data)
            self.feed.write(data)
            if leave:
                # The keys typed before are the program's; after we have left, nobody sends them.
                self.feed.wait(0, LEAVE_S)
                put(Leave())
                return
            if not self.raw and not self.feed.wait(_HELD_MAX):
                return


def _has_gone(fd: int) -> bool:
    """Return whether `fd` is a terminal that has been hung up."""
    try:
        termios.tcgetattr(fd)
    except termios.error as error:
        return bool(error.args[0] == errno.EIO)
    return False
