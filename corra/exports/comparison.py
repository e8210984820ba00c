"""What differs between two outputs, as a unified diff, in bounded memory.

Both outputs are read side by side through a window that grows while nothing in it matches. So an
output of any size takes the memory of one window. What moved further than WINDOW_MAX lines shows
as removed here and added there.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from difflib import SequenceMatcher
from typing import NamedTuple

CONTEXT = 3
WINDOW_FIRST = 1000
WINDOW_MAX = 50_000
WINDOW_BYTES = 16 << 20
# A longer line is compared in pieces.
LINE_MAX = 64 << 10
# A hunk says its length first, so a longer one is parted.
HUNK_MAX = 10_000
# Fewer changes than this in a window are found exactly, in at most a tenth of a second.
CHANGES_MAX = 300
# So many equal lines in a row are no chance.
RESYNC = 16
# As grep and diff look for a zero byte, here in all that is compared.
_ZERO = b"\0"
_NO_NEWLINE = b"No newline at end of file"


class Binary(Exception):
    """One of the outputs isn't text, so it has no lines that could differ."""


class _Line(NamedTuple):
    sign: bytes  # b" ", b"-" or b"+"
    text: bytes


class _Side:
    """The lines of one output that were read and not yet compared, and their keys."""

    def __init__(self, pieces: Iterable[bytes], ignored: Sequence[re.Pattern[bytes]]) -> None:
        self._pieces = iter(pieces)
        self._ignored = ignored
        self._rest = b""
        self.size = 0
        self.lines: deque[bytes] = deque()
        self.keys: deque[bytes] = deque()
        self.over = False

    def fill(self, count: int) -> None:
        """Read until there are `count` lines, or WINDOW_BYTES, or the end."""
        while not self.over and len(self.lines) < count and self.size < WINDOW_BYTES:
            piece = next(self._pieces, None)
            if piece is None:
                self.over = True
                if self._rest:
                    self._add(self._rest)
                return
            if _ZERO in piece:
                raise Binary
            *whole, self._rest = (self._rest + piece).split(b"\n")
            for each in whole:
                self._add(each + b"\n")
            while len(self._rest) > LINE_MAX:
                self._add(self._rest[:LINE_MAX])
                self._rest = self._rest[LINE_MAX:]

    def _add(self, line: bytes) -> None:
        key = line
        for pattern in self._ignored:
            key = pattern.sub(b"", key)
        self.lines.append(line)
        self.keys.append(key)
        self.size += len(line)

    def take(self) -> bytes:
        """Return the first line and let go of it."""
        self.keys.popleft()
        line = self.lines.popleft()
        self.size -= len(line)
        return line


_Block = tuple[int, int, int]  # where equal lines begin here, where there, how many


def _compared(one: _Side, other: _Side) -> Iterator[_Line]:
    """Yield each line of both: common, only in the first, only in the second."""
    window = WINDOW_FIRST
    while True:
        one.fill(window)
        other.fill(window)
        while one.keys and other.keys and one.keys[0] == other.keys[0]:
            other.take()
            yield _Line(b" ", one.take())
            if not (one.keys and other.keys):
                one.fill(window)
                other.fill(window)
        if one.over and other.over and not (one.keys or other.keys):
            return
        left, right = list(one.keys), list(other.keys)
        if len(left) < window > len(right) and not (one.over and other.over):
            continue  # the common lines above have emptied the window
        blocks = _few_changes(left, right, one.over, other.over)
        whole = one.over and other.over
        if blocks is None:
            matcher = SequenceMatcher(None, left, right)
            blocks = [(each.a, each.b, each.size) for each in matcher.get_matching_blocks()]
            common = sum(size for _, _, size in blocks)
            # A few lines that match by chance, such as empty ones, are no place to go on from.
            if common * 10 < min(len(left), len(right)):
                blocks = _moved(left, right) or blocks
                common = sum(size for _, _, size in blocks)
                grows = window < WINDOW_MAX and max(one.size, other.size) < WINDOW_BYTES
                if common < RESYNC and grows and not whole:
                    window = min(WINDOW_MAX, window * 4)
                    continue
        window = WINDOW_FIRST if any(size for _, _, size in blocks) else window
        at = other_at = 0
        for begin, other_begin, size in blocks:
            if not size:
                continue
            yield from (_Line(b"-", one.take()) for _ in range(begin - at))
            yield from (_Line(b"+", other.take()) for _ in range(other_begin - other_at))
            for _ in range(size):
                other.take()
                yield _Line(b" ", one.take())
            at, other_at = begin + size, other_begin + size
        # What follows the last common line may be common with what isn't read yet.
        if whole or not at:
            yield from (_Line(b"-", one.take()) for _ in range(len(left) - at))
            yield from (_Line(b"+", other.take()) for _ in range(len(right) - other_at))


def _few_changes(
    left: Sequence[bytes], right: Sequence[bytes], left_over: bool, right_over: bool
) -> list[_Block] | None:
    """Return the common lines of a shortest edit, None where it takes more than CHANGES_MAX.

    Myers' greedy algorithm. It stops at the end of both, or of one that goes on beyond the window.
    """
    ends = {1: 0}  # diagonal: how far it goes in `left`
    trail = []
    for changes in range(CHANGES_MAX + 1):
        trail.append(dict(ends))
        for diagonal in range(-changes, changes + 1, 2):
            down = diagonal == -changes or (
                diagonal != changes and ends[diagonal - 1] < ends[diagonal + 1]
            )
            x = ends[diagonal + 1] if down else ends[diagonal - 1] + 1
            y = x - diagonal
            if x > len(left) or y > len(right):
                ends[diagonal] = x
                continue
            while x < len(left) and y < len(right) and left[x] == right[y]:
                x, y = x + 1, y + 1
            ends[diagonal] = x
            at_end = x == len(left) and y == len(right)
            goes_on = (x == len(left) and not left_over) or (y == len(right) and not right_over)
            if at_end or goes_on:
                return _blocks(trail, x, y)
    return None


def _blocks(trail: Sequence[dict[int, int]], x: int, y: int) -> list[_Block]:
    """Walk back from (x, y) through the ends of each number of changes."""
    found = []
    for changes in range(len(trail) - 1, -1, -1):
        ends, diagonal = trail[changes], x - y
        down = diagonal == -changes or (
            diagonal != changes and ends[diagonal - 1] < ends[diagonal + 1]
        )
        before = diagonal + 1 if down else diagonal - 1
        begin = ends[before]
        other = begin - before
        size = x - (begin if down else begin + 1) if changes else x
        if size:
            found.append((x - size, y - size, size))
        x, y = begin, other
    return found[::-1]


def _moved(left: Sequence[bytes], right: Sequence[bytes]) -> list[_Block]:
    """Return where the first lines of one stand in the other: something long was put before them.

    SequenceMatcher leaves out what occurs often, and with `ignored` that may be all lines.
    """

    def found(head: Sequence[bytes], there: Sequence[bytes]) -> int | None:
        places = range(len(there) - RESYNC + 1) if len(head) == RESYNC else ()
        same = (at for at in places if there[at] == head[0] and there[at : at + RESYNC] == head)
        return next(same, None)

    after, before = found(left[:RESYNC], right), found(right[:RESYNC], left)
    if after is not None and (before is None or after <= before):
        return [(0, after, RESYNC)]
    return [] if before is None else [(before, 0, RESYNC)]


def unified(
    one: Iterable[bytes],
    other: Iterable[bytes],
    *,
    names: tuple[str, str],
    ignored: Sequence[re.Pattern[bytes]] = (),
) -> Iterator[bytes]:
    """Yield the lines of a unified diff of two outputs that come in pieces; nothing if equal.

    What matches a pattern of `ignored` isn't compared; a line that is equal without it is shown as
    the first output has it. Raises Binary.
    """
    before: deque[_Line] = deque(maxlen=CONTEXT)
    hunk: list[_Line] = []
    begins = [1, 1]
    at = [1, 1]
    quiet = 0  # common lines at the hunk's end
    first = True

    def whole() -> Iterator[bytes]:
        nonlocal first, quiet
        if first:
            yield f"--- {names[0]}\n+++ {names[1]}\n".encode("utf-8", "replace")
            first = False
        surplus = max(0, quiet - CONTEXT)
        shown = hunk[: len(hunk) - surplus]
        before.extend(hunk[len(hunk) - surplus :])
        counts = [sum(line.sign != sign for line in shown) for sign in (b"+", b"-")]
        spans = [
            f"{begin if count else begin - 1}" + ("" if count == 1 else f",{count}")
            for begin, count in zip(begins, counts, strict=True)
        ]
        yield f"@@ -{spans[0]} +{spans[1]} @@\n".encode()
        for sign, text in shown:
            yield sign + text
            if not text.endswith(b"\n"):
                goes_on = len(text) == LINE_MAX
                yield b"\n\\ " + (b"The line goes on" if goes_on else _NO_NEWLINE) + b"\n"
        hunk.clear()
        quiet = 0

    for line in _compared(_Side(one, ignored), _Side(other, ignored)):
        if line.sign == b" " and not hunk:
            before.append(line)
        else:
            if not hunk:
                hunk.extend(before)
                begins = [at[0] - len(before), at[1] - len(before)]
                before.clear()
            hunk.append(line)
            quiet = quiet + 1 if line.sign == b" " else 0
        at[0] += line.sign != b"+"
        at[1] += line.sign != b"-"
        if quiet > 2 * CONTEXT or len(hunk) >= HUNK_MAX:
            yield from whole()
    if hunk:
        yield from whole()
