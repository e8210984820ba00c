"""Who watches which run. The writer tells the watchers of a commit; nobody polls the database."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class News:
    """What one watcher waits for. A wait leaves no task and no timer: idle watchers are cheap."""

    def __init__(self, token_id: int) -> None:
        self.token_id = token_id
        # Whether the watcher has to leave: the server ends, or its token was taken back.
        self.over = False
        self._fresh = False
        self._woken = asyncio.Event()

    def tell(self) -> None:
        self._fresh = True
        self._woken.set()

    def take(self) -> None:
        """Begin to look. Whatever is told from here on is news."""
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
    """All News of one event loop. `tell`, `tokens` and `dismiss` may be called from any thread."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._waiting: dict[str, set[News]] = {}
        # How many watchers each token has.
        self._by_token: dict[int, int] = {}
        self.count = 0
        self._closing = False

    @contextmanager
    def watch(self, prog_id: str, token_id: int) -> Iterator[News]:
        """Yield News that is told whenever something of that run may be new."""
        news = News(token_id)
        news.over = self._closing
        self._waiting.setdefault(prog_id, set()).add(news)
        self._by_token[token_id] = self._by_token.get(token_id, 0) + 1
        self.count += 1
        try:
            yield news
        finally:
            self.count -= 1
            self._by_token[token_id] -= 1
            if not self._by_token[token_id]:
                del self._by_token[token_id]
            waiting = self._waiting[prog_id]
            waiting.discard(news)
            if not waiting:
                del self._waiting[prog_id]

    def tell(self, prog_ids: Iterable[str]) -> None:
        known = [each for each in prog_ids if each in self._waiting]
        if known:
            self._loop.call_soon_threadsafe(self._set, known)

    def tokens(self) -> list[int]:
        """Return the ids of the tokens that watch."""
        return list(self._by_token.copy())

    def dismiss(self, token_ids: Iterable[int]) -> None:
        """Have the watchers of these tokens leave."""
        self._loop.call_soon_threadsafe(self._end, frozenset(token_ids))

    def _set(self, prog_ids: Iterable[str]) -> None:
        for prog_id in prog_ids:
            for news in self._waiting.get(prog_id, ()):
                news.tell()

    def _end(self, token_ids: frozenset[int]) -> None:
        for waiting in self._waiting.values():
            for news in waiting:
                if news.token_id in token_ids:
                    news.over = True
                    news.tell()

    def close(self) -> None:
        """Have all watchers leave: the server ends."""
        self._closing = True
        self._end(frozenset(self._by_token))
