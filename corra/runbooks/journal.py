"""A runbook's journal, on a host where every machine can read it, or on this machine.

Lines are only added. Each answer brings the lines that others have added since, so the Book here is
never further behind than our last line. Lines that several threads write at once travel together. A
line whose answer was lost is written again, and counts once.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from typing import Any
from urllib.parse import quote

from corra.errors import CorraError, Misuse, Unreachable
from corra.runs.asking import who_asks
from corra.transport.channel import LinkLost

from .book import Book, JournalEvent, journal_events
from .ledgers import Ledger

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.25, 15.0
_FILE_NAME_MAX = 200


class Journal:
    """The journal of one runbook. `write` may be called from any thread."""

    def __init__(
        self,
        where: Ledger,
        book: str,
        key: str,
        *,
        said: Callable[[str], None] | None = None,
        patience_s: float | None = None,
    ) -> None:
        """`said` is told of a lost link and of its return.

        A write gives up after `patience_s` without a link (never).
        """
        self.book = Book()
        self.name, self.key = book, key
        self.where = where
        self.pass_id = secrets.token_hex(6)
        self._file = {"book": file_name(book), "key": file_name(key)}
        self._said = said or (lambda _: None)
        self._patience_s = patience_s
        self._at = 0
        self._count = self._written = 0
        self._pending: list[str] = []
        self._queue = threading.Lock()
        self._writing = threading.Lock()
        self._stop = threading.Event()

    def __str__(self) -> str:
        return "journal here" if self.where.host.is_local else f"journal on {self.where.host}"

    def read(self) -> Book:
        """Read the journal. Raises CorraError at once if the host can't be reached."""
        try:
            self._take(*self.where.call("read", {**self._file, "at": self._at}))
        except (LinkLost, TimeoutError) as error:
            raise Unreachable(f"{self}: {_said(error)}", host=str(self.where.host)) from error
        return self.book

    def write(self, what: str, **facts: Any) -> None:
        """Add an event; it is on the disk when this returns. A lost link is made again."""
        self.write_all([(what, facts)])

    def write_all(self, events: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
        """Add events, (what, facts) each, in one append."""
        origin = who_asks()
        with self._queue:
            now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
            for what, facts in events:
                self._count += 1
                event = JournalEvent(
                    f"{self.pass_id}-{self._count}",
                    now,
                    f"{origin['user']}@{origin['host']}",
                    what,
                    facts,
                )
                self._pending.append(event.to_line())
            mine = self._count
        with self._writing:
            if self._written >= mine:  # another thread's append took it along
                return
            with self._queue:
                lines, last = "".join(self._pending), self._count
                self._pending = []
            try:
                self._take(*self._insist({**self._file, "at": self._at, "lines": lines}))
            except BaseException:
                with self._queue:
                    self._pending.insert(0, lines)
                raise
            self._written = last

    def close(self) -> None:
        """Give up every write that still tries to reach the journal."""
        self._stop.set()

    def _insist(self, request: Mapping[str, Any]) -> tuple[dict[str, Any], bytes]:
        waited_s, pause_s = 0.0, _FIRST_PAUSE_S
        while True:
            try:
                answer = self.where.call("append", request)
            except (LinkLost, TimeoutError, Unreachable) as error:
                if not waited_s:
                    self._said("link lost, nothing new is begun meanwhile; trying on")
                if self._stop.is_set() or (
                    self._patience_s is not None and waited_s >= self._patience_s
                ):
                    raise Unreachable(
                        f"{self}: {_said(error)}", host=str(self.where.host), fate="STOPPED"
                    ) from error
                self._stop.wait(pause_s)
                waited_s, pause_s = waited_s + pause_s, min(_LONGEST_PAUSE_S, pause_s * 2)
            else:
                if waited_s:
                    self._said("link back")
                return answer

    def _take(self, reply: Mapping[str, Any], data: bytes) -> None:
        # A line is whole: an append holds the lock for all of its lines.
        try:
            for event in journal_events(data.decode("utf-8", "replace")):
                self.book.add(event)
        except ValueError as error:
            raise CorraError(
                f"{self} doesn't speak corra's protocol: {error}",
                host=str(self.where.host),
                fate="STOPPED",
            ) from error
        self._at = int(reply["end"])


def _said(error: Exception) -> str:
    return (error.why if isinstance(error, CorraError) else str(error)) or "no answer"


def file_name(text: str) -> str:
    """Return `text` as the name of a file. Raises Misuse for one that is empty or too long."""
    if not isinstance(text, str):
        raise Misuse(f"a runbook's name and key are text: {text!r}")
    name = quote(text, safe="@+=,")
    name = "%2E" + name[1:] if name.startswith(".") else name
    if not text.strip() or not text.isprintable() or len(name) > _FILE_NAME_MAX:
        raise Misuse(f"not a name for a runbook or its key: {text!r}")
    return name
