"""The part of a run that a Follow is to bring, and how far the Follow has come with it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from corra.model.frames import Cursor, Gap, Output
from corra.model.state import State

# A hole that no G frame announced is the link's fault, until the host has left it this often.
SKIPS_MAX = 3


class Wanted(NamedTuple):
    """The part of a run to bring: from a cursor, from its last `tail` lines, or from a time on.

    `live`: go on as more comes. `late`: also the output after the end. `times`: with the time of
    each piece.
    """

    cursor: Mapping[str, int] | None = None
    tail: int | None = None
    since_ns: int | None = None
    streams: Sequence[str] | None = None
    live: bool = True
    late: bool = False
    times: bool = False

    @property
    def begins_later(self) -> bool:
        """Whether the first byte brought needn't be the first there is."""
        return self.tail is not None or self.since_ns is not None


class Hole(Exception):
    """Bytes were left out that nobody said are gone."""


class Position:
    """The next offset of each stream that is wanted. It makes the request for what comes behind."""

    def __init__(self, wanted: Wanted) -> None:
        self._wanted = wanted
        self._cursor = Cursor(wanted.cursor)
        self._before: dict[str, int] = {}
        self._skips: dict[tuple[str, int], int] = {}

    @property
    def offsets(self) -> dict[str, int]:
        """The next offset of each stream, behind the last event handed out."""
        return dict(self._cursor.offsets)

    def begin(self, reply: Mapping[str, Any], state: State) -> None:
        """Learn from the first reply where a tail begins, so that a cut before its first byte loses
        nothing: where the host says, else at the end of the output so far.
        """
        begins = reply.get("cursor")
        if isinstance(begins, Mapping):
            for stream, offset in begins.items():
                self._cursor.offsets.setdefault(str(stream), int(offset))
        self._before = {
            stream: facts.get("length", 0) for stream, facts in (state.streams or {}).items()
        }

    def request(self, *, again: bool) -> dict[str, Any]:
        """Return its part of the request; `again`: the host has said before where a tail begins."""
        wanted, offsets = self._wanted, self.offsets
        begun = wanted.begins_later and again and (bool(offsets) or wanted.tail == 0)
        if begun:
            offsets = {**self._before, **offsets}
        since = None if begun or wanted.since_ns is None else wanted.since_ns // 1000
        return {
            "cursor": offsets or None,
            "tail": None if begun else wanted.tail,
            "since": since,
            "streams": None if wanted.streams is None else list(wanted.streams),
            "late": wanted.late or None,
            "times": wanted.times or None,
        }

    def take(self, frame: Output | Gap) -> Iterator[Output | Gap]:
        """Yield what of `frame` is new. Raises Hole."""
        begin = frame.offset if isinstance(frame, Output) else frame.start
        if self._wanted.begins_later:
            self._cursor.offsets.setdefault(frame.stream, begin)
        self._expect(frame.stream, begin)
        yield from self._cursor.take(frame)

    def rest(self, state: State) -> Iterator[Output | Gap]:
        """Yield a Gap for bytes that the final State counts and the host didn't send.

        Raises Hole while the client should ask for them again.
        """
        if self._wanted.begins_later:
            return
        for stream, facts in (state.streams or {}).items():
            at = self._cursor.offsets.get(stream, 0)
            wanted = self._wanted.streams is None or stream in self._wanted.streams
            if facts.get("length", 0) > at and wanted:
                self._expect(stream, facts["length"])
                yield from self._cursor.take(Gap(stream, at, facts["length"]))

    def _expect(self, stream: str, begin: int) -> None:
        """Raise Hole where `begin` leaves bytes out, unless they were asked for often enough."""
        at = self._cursor.offsets.get(stream, 0)
        if begin <= at:
            return
        left_out = self._skips[stream, at] = self._skips.get((stream, at), 0) + 1
        if left_out < SKIPS_MAX:
            raise Hole(f"{stream} went on at byte {begin} and not at {at}")
