"""Filters for the lines of a run's output: by pattern, by time of arrival, by bytes.

Output that is shown whole is never taken apart into lines.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime

from corra.model.frames import Output


@dataclass
class Range:
    """Passes the output of one stream up to byte `end`."""

    end: int | None = None
    over: bool = field(default=False, init=False)

    def take(self, output: Output) -> Iterator[Output]:
        """Yield the part of `output` before the end."""
        if self.end is None or output.end < self.end:
            yield output
            return
        self.over = True
        if output.offset < self.end:
            yield Output(
                output.stream,
                output.offset,
                output.data[: self.end - output.offset],
                output.time_ns,
            )

    def rest(self) -> Iterator[Output]:
        """Yield nothing; a Range holds no output back."""
        return iter(())


# A longer line is judged in pieces of this size, so that 1 GB without a newline needs no more
# memory.
FILTERED_LINE_MAX = 1 << 20


@dataclass
class Sieve:
    """Passes the lines that match, each as an Output of its own. Times are in ns, bounds included.

    A line's time is that of its first byte. A line without a known time passes: the index was lost.
    """

    grep: re.Pattern[bytes] | None = None
    since_ns: int | None = None
    until_ns: int | None = None
    over: bool = field(
        default=False, init=False
    )  # all that is still to come is later than `until_ns`
    _begun: dict[str, tuple[int, int, bytearray]] = field(
        default_factory=dict, init=False
    )  # stream: time and offset of an open line

    @property
    def idle(self) -> bool:
        """Whether every line passes."""
        return self.grep is None and self.since_ns is None and self.until_ns is None

    def take(self, output: Output) -> Iterator[Output]:
        """Yield the matching lines that are complete now."""
        if self.until_ns is not None and output.time_ns > self.until_ns:
            self.over = True
        at = 0
        while at < len(output.data):
            time_ns, offset, line = self._begun.setdefault(
                output.stream, (output.time_ns, output.offset + at, bytearray())
            )
            newline = output.data.find(b"\n", at, at + FILTERED_LINE_MAX - len(line))
            end = (
                newline + 1
                if newline >= 0
                else min(len(output.data), at + FILTERED_LINE_MAX - len(line))
            )
            line += output.data[at:end]
            at = end
            if newline >= 0 or len(line) == FILTERED_LINE_MAX:
                del self._begun[output.stream]
                yield from self._wanted(Output(output.stream, offset, bytes(line), time_ns))

    def rest(self) -> Iterator[Output]:
        """Yield the last lines, without a newline, that match."""
        begun, self._begun = self._begun, {}
        for stream, (time_ns, offset, line) in begun.items():
            yield from self._wanted(Output(stream, offset, bytes(line), time_ns))

    def _wanted(self, line: Output) -> Iterator[Output]:
        if line.time_ns and self.since_ns is not None and line.time_ns < self.since_ns:
            return
        if line.time_ns and self.until_ns is not None and line.time_ns > self.until_ns:
            return
        if self.grep is None or self.grep.search(line.data):
            yield line


class Stamper:
    """Puts its time of arrival before each line of one stream."""

    def __init__(self) -> None:
        self._at_start = True

    def stamp(self, output: Output) -> bytes:
        when = datetime.fromtimestamp(output.time_ns / 1e9).astimezone() if output.time_ns else None
        prefix = f"{when.isoformat(timespec='milliseconds')} ".encode() if when else b"- "
        lines = output.data.split(b"\n")
        last = lines.pop()
        text = b"".join(
            (prefix if self._at_start or i else b"") + line + b"\n" for i, line in enumerate(lines)
        )
        if last:
            text += (prefix if lines or self._at_start else b"") + last
        self._at_start = not last
        return text
