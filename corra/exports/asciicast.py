"""A run as asciinema's recording, an asciicast of version 3 or 2 (docs.asciinema.org).

The times are the spool's: when the keeper saw that output had come, to 10 ms.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Iterator
from datetime import datetime
from typing import Any, NamedTuple

from corra.model.frames import Gap, Output
from corra.model.state import State, exit_code
from corra.model.units import decimal_size
from corra.model.words import local_time


class Terminal(NamedTuple):
    """The size and the kind of the terminal that a recording is played on."""

    columns: int = 80
    rows: int = 24
    kind: str = "xterm-256color"


class Asciicast:
    """The lines of one recording. `untimed`: how many bytes had no time in the spool."""

    def __init__(
        self, state: State, *, command: str, title: str, terminal: Terminal, version: int = 3
    ) -> None:
        """`command` and `title` are written as they are; `state` gives the begin and the end."""
        self._state = state
        self._command, self._title = command, title
        self._terminal = terminal
        self._version = version
        self._begin_us = _microseconds(local_time(state.start_time))
        self._at_us = self._begin_us or 0
        self._decoders: dict[str, codecs.IncrementalDecoder] = {}
        self.untimed = 0

    def lines(self, events: Iterable[Output | Gap]) -> Iterator[bytes]:
        """Yield the recording's lines: its header, the output, marks for what is gone, the end."""
        first = True
        for event in events:
            if first and self._begin_us is None and isinstance(event, Output) and event.time_ns:
                self._begin_us = self._at_us = event.time_ns // 1000
            if first:
                yield _line(self._header())
            first = False
            if isinstance(event, Gap):
                gone = decimal_size(event.end - event.start)
                yield self._event(0, "m", f"{event.stream}: {gone} are gone")
                continue
            if not event.time_ns:
                self.untimed += len(event.data)
            if text := self._text(event.stream, event.data):
                yield self._event(event.time_ns // 1000, "o", text)
        if first:
            yield _line(self._header())
        for stream in list(self._decoders):
            if text := self._text(stream, b"", final=True):
                yield self._event(0, "o", text)
        if self._state.state == "exited" and self._version == 3:
            ended = _microseconds(local_time(self._state.end_time)) or 0
            yield self._event(ended, "x", str(exit_code(self._state)))

    def _header(self) -> dict[str, Any]:
        columns, rows, kind = self._terminal
        begun = {} if self._begin_us is None else {"timestamp": self._begin_us // 1_000_000}
        what = {**begun, "command": self._command, "title": self._title}
        if self._version == 2:
            return {"version": 2, "width": columns, "height": rows, **what, "env": {"TERM": kind}}
        return {"version": 3, "term": {"cols": columns, "rows": rows, "type": kind}, **what}

    def _event(self, time_us: int, code: str, data: str) -> bytes:
        """Return an event's line. One without a time, or before the last one, is of the last."""
        before, self._at_us = self._at_us, max(self._at_us, time_us)
        since = before if self._version == 3 else self._begin_us or 0
        return _line([round((self._at_us - since) / 1e6, 6), code, data])

    def _text(self, stream: str, data: bytes, *, final: bool = False) -> str:
        decoder = self._decoders.get(stream)
        if decoder is None:
            decoder = self._decoders[stream] = codecs.getincrementaldecoder("utf-8")("replace")
        text = decoder.decode(data, final)
        # A terminal's driver would have made a return of each line feed, as the program's own did.
        return text if self._state.pty else text.replace("\r\n", "\n").replace("\n", "\r\n")


def _microseconds(moment: datetime | None) -> int | None:
    return None if moment is None else round(moment.timestamp() * 1e6)


def _line(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
