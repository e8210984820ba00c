"""Who watches which run. Nobody asks the database whether there is news: whoever commits some says so."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class News:
    """What one watcher waits for. No task and no timer outlives a wait: a thousand of these are to cost nothing."""

    def __init__(self) -> None:
        self._fresh = False
        self._woken = asyncio.Event()

    def tell(self) -> None:
        self._fresh = True
        self._woken.set()

    def take(self) -> None:
        """Begin to look: what is told from here on is news."""
        self._fresh = False
        self._woken.clear()

    async def wait(self, seconds: float) -> bool:
        """Return whether there is news, after `seconds` at the latest."""
        timer = asyncio.get_running_loop().call_later(seconds, self._woken.set)
        try:
            await self._woken.wait()
        finally:
            timer.cancel()
        if not self._fresh:
            self._woken.clear()
        return self._fresh


class Watchers:
    """The News of one event loop; `tell` may be called from any thread."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._waiting: dict[str, set[News]] = {}
        self.count = 0
        self.closing = False

    @contextmanager
    def watch(self, prog_id: str) -> Iterator[News]:
        """Yield News that is told whenever something of that run may be new."""
        news = News()
        self._waiting.setdefault(prog_id, set()).add(news)
        self.count += 1
        try:
            yield news
        finally:
            self.count -= 1
            waiting = self._waiting[prog_id]
            waiting.discard(news)
            if not waiting:
                del self._waiting[prog_id]

    def tell(self, prog_ids: Iterable[str]) -> None:
        known = [each for each in prog_ids if each in self._waiting]
        if known:
            self._loop.call_soon_threadsafe(self._set, known)

    def _set(self, prog_ids: Iterable[str]) -> None:
        for prog_id in prog_ids:
            for news in self._waiting.get(prog_id, ()):
                news.tell()

    def close(self) -> None:
        """Send everybody home: the server ends."""
        self.closing = True
        self._set(list(self._waiting))
