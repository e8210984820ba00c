"""Who watches which run. Nobody asks the database whether there is news: whoever commits some says so."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class Watchers:
    """The events of one event loop; `tell` may be called from any thread."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._waiting: dict[str, set[asyncio.Event]] = {}
        self.count = 0
        self.closing = False

    @contextmanager
    def watch(self, prog_id: str) -> Iterator[asyncio.Event]:
        """Yield an event that is set whenever something of that run may be new."""
        event = asyncio.Event()
        self._waiting.setdefault(prog_id, set()).add(event)
        self.count += 1
        try:
            yield event
        finally:
            self.count -= 1
            waiting = self._waiting[prog_id]
            waiting.discard(event)
            if not waiting:
                del self._waiting[prog_id]

    def tell(self, prog_ids: Iterable[str]) -> None:
        known = [each for each in prog_ids if each in self._waiting]
        if known:
            self._loop.call_soon_threadsafe(self._set, known)

    def _set(self, prog_ids: Iterable[str]) -> None:
        for prog_id in prog_ids:
            for event in self._waiting.get(prog_id, ()):
                event.set()

    def close(self) -> None:
        """Send everybody home: the server ends."""
        self.closing = True
        self._set(list(self._waiting))
