"""Bytes for a program's stdin while it runs: kept here until the host has them, taken there once.

A feed travels over the link of a Follow. It has a number made here and counts its own bytes from 0.
So the host knows which of them it has, whichever link brought them and whoever else sends.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from typing import Protocol

from corra.model.frames import Taken
from corra.transport.channel import LinkLost

# The most in one frame; an acknowledgement moves on by as much.
_STEP = 256 * 1024
# Keystrokes are joined up to this size.
_SMALL = 4096
# The most that may be under way unacknowledged: twice the window of sshd. The host holds as much
# where the program or the disk has no room.
FEED_WINDOW = 4 << 20


class SendingLink(Protocol):
    def send(self, data: bytes) -> None: ...


class StdinFeed:
    """The sending side. Any thread may call its methods; only `wait` waits for the host."""

    def __init__(self) -> None:
        self.sender = 1 + (int.from_bytes(os.urandom(7), "big") >> 4)
        # From `taken` on. One buffer, filled behind and emptied in front, would be copied often.
        self._pieces: deque[bytes] = deque()
        self._taken = self._given = 0
        self._end: int | None = None
        self._over = False  # the end is taken
        self._finished = False
        # The host takes no more: another sender has ended stdin, or the program has closed it.
        self.refused = False
        self.closed_there = False
        # Over the open link, once the host has said which bytes it has.
        self._sent: int | None = None
        self._end_sent = False
        self._size: tuple[int, int] | None = None
        self._size_sent = False
        self._changed = threading.Condition()
        self._closed = False
        self._link: SendingLink | None = None
        self._thread: threading.Thread | None = None

    # For the sender

    @property
    def given(self) -> int:
        """The offset behind the last byte given."""
        return self._given

    @property
    def taken(self) -> int:
        """How many bytes the host has taken."""
        return self._taken

    @property
    def waiting(self) -> int:
        """How many bytes the host hasn't taken yet."""
        return self._given - self._taken

    @property
    def done(self) -> bool:
        """Whether nothing more will be given and the host has all, the end included."""
        return (
            self._finished
            and not self.refused
            and not self.waiting
            and (self._end is None or self._over)
        )

    def write(self, data: bytes) -> None:
        """Send `data`; behind an end nothing more goes out."""
        with self._changed:
            if self._end is None and not self.refused:
                self._keep(data)
            self._changed.notify_all()

    def _keep(self, data: bytes) -> None:
        self._given += len(data)
        if self._pieces and len(self._pieces[-1]) + len(data) <= _SMALL:
            data = self._pieces.pop() + data
        if data:
            self._pieces.append(data)

    def _drop(self, size: int) -> None:
        """Let go of the first `size` bytes."""
        self._taken += size
        while size:
            first = self._pieces.popleft()
            if len(first) > size:
                self._pieces.appendleft(first[size:])
            size -= min(size, len(first))

    def _from(self, at: int) -> bytes:
        """Return what goes into one frame from the offset `at` on."""
        found, size, begin = [], 0, self._taken
        for piece in self._pieces:
            if begin + len(piece) > at:
                found.append(piece[max(0, at - begin) :][: _STEP - size])
                size += len(found[-1])
            if size == _STEP:
                break
            begin += len(piece)
        return b"".join(found)

    def end(self) -> None:
        """Send the end; on a terminal, its end-of-file character."""
        with self._changed:
            self._end = self.given if self._end is None else self._end
            self._changed.notify_all()

    def finish(self) -> None:
        """Say that nothing more will be given."""
        self._finished = True

    def resize(self, rows: int, columns: int) -> None:
        """Say which size the program's terminal is to have: now, and to each new link."""
        with self._changed:
            self._size, self._size_sent = (rows, columns), False
            self._changed.notify_all()

    def wait(self, most: int, timeout_s: float | None = None) -> bool:
        """Wait until at most `most` bytes wait for the host; return whether more may be sent."""
        with self._changed:
            self._changed.wait_for(
                lambda: self.waiting <= most or self.refused or self._closed, timeout_s
            )
            return self.waiting <= most and not self.refused and not self._closed

    def close(self) -> None:
        """Send no more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    # For the Follow that has the link

    def linked(self, link: SendingLink) -> None:
        """Send over `link` from now on, as soon as the host has said what it has."""
        with self._changed:
            self._link, self._sent, self._end_sent, self._size_sent = link, None, False, False
            if self._thread is None:
                self._thread = threading.Thread(target=self._send_all, name="feed", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def unlinked(self) -> None:
        with self._changed:
            self._link = None
            self._changed.notify_all()

    def told(self, taken: Taken) -> bool:
        """Take note of what the host has taken; return whether it has taken more than it had."""
        with self._changed:
            # On a terminal the end is a byte, too, which isn't among those counted here.
            fresh = min(taken.offset, self.given) - self._taken
            if fresh > 0:
                self._drop(fresh)
            self._over = self._over or (self._end is not None and taken.ended)
            self.closed_there = self.closed_there or taken.closed
            self.refused = (
                self.refused
                or taken.closed
                or (taken.ended and (self._end is None or bool(self.waiting)))
            )
            self._sent = self._taken if self._sent is None else self._sent
            self._changed.notify_all()
            return fresh > 0

    def _send_all(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(
                    lambda: self._closed or (self._link is not None and self._is_due)
                )
                if self._closed:
                    return
                link, frames = self._link, self._next()
            assert link is not None
            try:
                link.send(frames)
            except (LinkLost, OSError, ValueError):
                # The Follow finds the link broken, too, and makes another.
                with self._changed:
                    self._link = None if self._link is link else self._link

    @property
    def _is_due(self) -> bool:
        if self._size is not None and not self._size_sent:
            return True
        # The first acknowledgement tells where to begin.
        if self._sent is None or self.refused:
            return False
        more = self._sent < self.given and self._sent - self._taken < FEED_WINDOW
        return more or (self._end == self._sent and not self._end_sent and not self._over)

    def _next(self) -> bytes:
        frames = b""
        if self._size is not None and not self._size_sent:
            self._size_sent = True
            frames += b"W %d %d\n" % self._size
        if self._sent is None or self.refused:
            return frames
        at = max(self._sent, self._taken)
        data = self._from(at)
        self._sent = at + len(data)
        if data:
            frames += b"I %d %d\n%b" % (at, len(data), data)
        if self._end == self._sent and not self._end_sent and not self._over:
            self._end_sent = True
            frames += b"E %d\n" % self._end
        return frames
