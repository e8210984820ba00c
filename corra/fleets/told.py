"""A view that hands on what it is told, as values, to one thread that takes them."""

from __future__ import annotations

import threading
from collections import deque
from typing import Generic, TypeVar

from .board import Board, Member
from .standing import FleetEvent, Said, Wrote, standing_of

T = TypeVar("T")

# So much output may wait for its taker. Then its readers wait, and behind them the hosts' files.
HELD_MAX = 4 << 20
# A wait without a limit may sleep through a signal that another thread took.
_LOOK_S = 1.0


class Line(Generic[T]):
    """Items on their way from many threads to one; who lays output down may have to wait."""

    def __init__(self) -> None:
        self._items: deque[tuple[T, int]] = deque()
        self._size = 0
        self._finished = self._closed = False
        self._changed = threading.Condition()

    @property
    def closed(self) -> bool:
        """Whether nobody takes anything any more."""
        return self._closed

    def put(self, item: T, size: int = 0) -> None:
        """Add an item. One of a `size` waits while there is no room; dropped once nobody takes."""
        with self._changed:
            while size and self._size >= HELD_MAX and not self._closed:
                self._changed.wait()
            if self._closed:
                return
            self._items.append((item, size))
            self._size += size
            self._changed.notify_all()

    def finish(self) -> None:
        """Say that nothing more comes."""
        with self._changed:
            self._finished = True
            self._changed.notify_all()

    def close(self) -> None:
        """Take nothing any more; who waits with an item goes on without it."""
        with self._changed:
            self._closed = True
            self._items.clear()
            self._changed.notify_all()

    def take(self) -> T | None:
        """Return the next item, None once there are no more."""
        with self._changed:
            while not self._items:
                if self._finished or self._closed:
                    return None
                self._changed.wait(_LOOK_S)
            item, size = self._items.popleft()
            self._size -= size
            self._changed.notify_all()
            return item


class Told(Line[FleetEvent]):
    """The view of a caller in Python."""

    def begins(self, board: Board) -> None:
        """The caller has the board by `Rolling.result`."""

    def changed(self, member: Member) -> None:
        self.put(standing_of(member))

    def output(self, member: Member, stream: str, data: bytes, offset: int) -> None:
        self.put(Wrote(member.name, member.prog_id, stream, offset, bytes(data)), len(data))

    def note(self, text: str, host: str = "") -> None:
        self.put(Said(text, host))

    def ends(self) -> None:
        """The end is told by `finish`, once the roller has returned."""
