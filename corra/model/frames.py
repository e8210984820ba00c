"""Frames from the host, and the Cursor that hands out each byte once and in order.

A frame is one header line and its payload. A host is never trusted: a header has at most 256 bytes,
output at most 1 MiB, a State at most 80 MiB. An unknown kind, or a number that isn't one, ends the
stream with BadFrame.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from .light_dataclass import light_dataclass
from .shapes import read_json

# Records that each verb imports are NamedTuples: one takes a fifth of a dataclass's time to import.
HEADER_MAX = 256
PAYLOAD_MAX = 1 << 20
# A State names argv twice; the kernel takes at most 6 MiB of argv, and JSON makes 6 bytes of a byte
# that isn't ASCII.
STATE_MAX = 80 << 20

_NAME = re.compile(r"[a-z][a-z0-9_]{0,15}")


class BadFrame(ValueError):
    """The peer doesn't speak corra's protocol, or means harm."""


class Output(NamedTuple):
    """`data` at `offset` of the run's `stream`; it came to the keeper at `time_ns` (0: unknown)."""

    stream: str
    offset: int
    data: bytes
    time_ns: int = 0

    @property
    def end(self) -> int:
        return self.offset + len(self.data)


class Gap(NamedTuple):
    """The bytes from `start` to `end` of `stream` are gone."""

    stream: str
    start: int
    end: int


class Status(NamedTuple):
    """The run's State now; the last frame of a run that has ended is a final one."""

    state: Mapping[str, Any]


class Ack(NamedTuple):
    """The host has acted on the order numbered `number`."""

    number: int


class Taken(NamedTuple):
    """The host has accepted the bytes for the program up to `offset`.

    `ended`: it has accepted their end too. `closed`: it takes no more, since nobody reads stdin.
    """

    offset: int
    ended: bool = False
    closed: bool = False


class ErrorFrame(NamedTuple):
    """The host can't go on: an `{"error": KIND, ...}` object."""

    error: Mapping[str, Any]


@light_dataclass(frozen=True)
class Beat:
    """The other side is alive. (A NamedTuple without a field would be false.)"""


Frame = Output | Gap | Status | Ack | Taken | ErrorFrame | Beat


class Parser:
    """Cuts a byte stream into frames. `feed` takes whatever arrived.

    Output is handed out as it comes, if need be a frame in pieces: at 56 kbit/s a whole frame takes
    half a minute, and a link that broke meanwhile would lose it. Of any other kind the Parser holds
    one incomplete frame and no more.
    """

    def __init__(self) -> None:
        self._held = bytearray()
        self._wanted = 0  # `_held` needs no look before it is this long
        self._open: tuple[str, int, int, int] | None = (
            None  # an output frame that goes on: stream, offset, bytes left, time
        )

    def feed(self, data: bytes) -> Iterator[Frame]:
        """Yield what is complete now. Raises BadFrame."""
        source: bytes | bytearray = data
        if self._held:
            source = self._held
            source += data
            if len(source) < self._wanted:
                return
        at = 0
        try:
            while at < len(source):
                if self._open is not None:
                    begin, at = at, min(at + self._open[2], len(source))
                    yield self._piece(_cut(source, begin, at))
                    continue
                newline = source.find(b"\n", at, at + HEADER_MAX)
                if newline < 0:
                    if len(source) - at >= HEADER_MAX:
                        raise BadFrame("a header without an end")
                    self._wanted = 0
                    return
                kind, fields, size = _header(_cut(source, at, newline))
                if kind == "O" and size:
                    at, self._open = (
                        newline + 1,
                        (_stream(fields[0]), _number(fields[1]), size, _number(fields[3])),
                    )
                    continue
                end = newline + 1 + size
                if len(source) < end:
                    self._wanted = end - at
                    return
                at = end
                yield _frame(kind, fields, _cut(source, newline + 1, end))
        finally:
            self._held = (
                bytearray() if at == len(source) else bytearray(_cut(source, at, len(source)))
            )

    def _piece(self, data: bytes) -> Output:
        assert self._open is not None
        stream, offset, left, time_ns = self._open
        self._open = (
            (stream, offset + len(data), left - len(data), time_ns) if left > len(data) else None
        )
        return Output(stream, offset, data, time_ns)

    @property
    def pending(self) -> int:
        """How many bytes of an incomplete frame are held."""
        return len(self._held)


def _cut(source: bytes | bytearray, begin: int, end: int) -> bytes:
    """Return a part of `source`; all of a bytes object is the object itself."""
    if isinstance(source, bytes):
        return source[begin:end]
    with memoryview(source) as view:
        return bytes(view[begin:end])


_FIELDS = {"O": 4, "G": 3, "S": 1, "A": 1, "X": 1, "H": 0}


def _header(text: bytes) -> tuple[str, list[str], int]:
    try:
        kind, *fields = text.decode("ascii").split(" ")
    except UnicodeDecodeError as error:
        raise BadFrame(f"a header that isn't ASCII: {text[:40]!r}") from error
    if _FIELDS.get(kind) != len(fields) and not (
        kind == "A" and len(fields) == 2 and fields[0] in ("I", "E", "C")
    ):
        raise BadFrame(f"not a frame: {text[:40]!r}")
    size = _number(fields[2]) if kind == "O" else _number(fields[0]) if kind in "SX" else 0
    if size > (PAYLOAD_MAX if kind == "O" else STATE_MAX):
        raise BadFrame(f"a payload of {size} bytes")
    return kind, fields, size


def _number(text: str) -> int:
    # 19 digits hold any offset or nanosecond; int() alone would also take "+1", " 1" and "1_0".
    if not (text.isascii() and text.isdigit() and len(text) <= 19):
        raise BadFrame(f"not a number: {text[:40]!r}")
    return int(text)


def _stream(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise BadFrame(f"not a stream: {name[:40]!r}")
    return name


def _frame(kind: str, fields: list[str], payload: bytes) -> Frame:
    match kind:
        case "O":
            return Output(_stream(fields[0]), _number(fields[1]), payload, _number(fields[3]))
        case "G":
            gap = Gap(_stream(fields[0]), _number(fields[1]), _number(fields[2]))
            if gap.end < gap.start:
                raise BadFrame(f"a gap that ends before it begins: {gap.start} to {gap.end}")
            return gap
        case "S":
            return Status(_object(payload))
        case "X":
            return ErrorFrame(_object(payload))
        case "A" if len(fields) == 2:
            return Taken(_number(fields[1]), ended=fields[0] == "E", closed=fields[0] == "C")
        case "A":
            return Ack(_number(fields[0]))
    return Beat()


def _object(payload: bytes) -> dict[str, Any]:
    try:
        value = read_json(payload)
    except ValueError as error:
        raise BadFrame(f"a payload with {error}") from error
    if not isinstance(value, dict):
        raise BadFrame("a payload that isn't an object")
    return value


class Cursor:
    """The next offset of each stream. It never goes back, cuts overlaps and makes Gaps of holes."""

    def __init__(self, offsets: Mapping[str, int] | None = None) -> None:
        self.offsets: dict[str, int] = dict(offsets or {})

    def take(self, frame: Output | Gap) -> Iterator[Output | Gap]:
        """Yield a Gap for what `frame` skips, then the part of it that is new.

        Afterwards the cursor stands at the frame's end.
        """
        at = self.offsets.get(frame.stream, 0)
        if frame.end <= at:
            return
        self.offsets[frame.stream] = frame.end
        if isinstance(frame, Gap):
            yield Gap(frame.stream, at, frame.end)
            return
        if frame.offset > at:
            yield Gap(frame.stream, at, frame.offset)
        if frame.offset >= at:
            yield frame
        else:
            yield Output(frame.stream, at, frame.data[at - frame.offset :], frame.time_ns)
