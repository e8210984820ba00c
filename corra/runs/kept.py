"""Parts of a stream that are kept in memory while it may grow without bound."""

from __future__ import annotations

from collections import deque


class TailKept:
    """The last `most` bytes of a stream."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._parts: deque[bytes] = deque()
        self._size = 0
        self.dropped = 0

    def add(self, data: bytes) -> None:
        self._parts.append(data)
        self._size += len(data)
        while self._size - len(self._parts[0]) >= self._most:
            gone = len(self._parts.popleft())
            self._size -= gone
            self.dropped += gone

    def bytes(self) -> bytes:
        return b"".join(self._parts)

    def text(self) -> str:
        return self.bytes().decode("utf-8", "replace")


class EndsKept:
    """A stream's first `first` bytes and its last ones, at most `most` bytes together."""

    def __init__(self, first: int, most: int) -> None:
        self._first = min(first, most)
        self._last = most - self._first
        self._head, self._tail = bytearray(), bytearray()
        self.total = 0

    def add(self, data: bytes) -> None:
        self.total += len(data)
        room = self._first - len(self._head)
        self._head += data[:room] if room > 0 else b""
        self._tail += data[max(room, 0) :]
        # Cut at twice the size, so that each byte is moved once and not at each call.
        if len(self._tail) > 2 * self._last + (1 << 16):
            del self._tail[: len(self._tail) - self._last]

    @property
    def left_out(self) -> int:
        """How many bytes between the two ends aren't kept."""
        return max(0, self.total - self._first - self._last)

    def ends(self) -> tuple[bytes, bytes]:
        """Return the beginning, and what is kept of what comes behind it."""
        begin = max(0, len(self._tail) - self._last)
        return bytes(self._head), bytes(self._tail[begin:])
