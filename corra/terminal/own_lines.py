"""The lines of a terminal that a program's output may still change, and where its cursor stands.

A progress bar goes back to the beginning of its line, and a list of bars goes up some lines. They
may do so among the lines that the program itself has written since corra's last words, as far as
those are on the screen. So this counts rows and columns as the terminal does; what is in them it
needn't know.
"""

from __future__ import annotations

import unicodedata

# Below a program's lines there is room for corra's line.
_OURS = 2
# Of a chunk with more line ends than any screen has lines, only the last lines count.
_LINES_MAX = 500


class OwnLines:
    """The rows below corra's last words: `rows` of them, with the cursor in `row` and `column`.

    `column` is `columns` where the cursor waits behind a full row: only the next character wraps.
    """

    def __init__(self, columns: int = 80, lines: int = 24) -> None:
        self.columns, self.lines = columns, lines
        self.begin()

    def begin(self) -> None:
        """Note that corra has written a line: what is above it isn't the program's any more."""
        self.rows, self.row, self.column = 1, 0, 0
        # Whether there may be anything in the last row.
        self.used = False

    def resize(self, columns: int, lines: int) -> None:
        """Take the terminal's new size. It may have moved every line, so all above are left."""
        if (columns, lines) != (self.columns, self.lines):
            self.columns, self.lines = max(1, columns), max(1, lines)
            self.rows, self.row, self.used = 1, 0, True
            self.column = min(self.column, self.columns - 1)

    @property
    def below(self) -> int:
        """How many of the program's rows are below the cursor."""
        return self.rows - 1 - self.row

    @property
    def fresh(self) -> bool:
        """Whether the cursor stands at the beginning of an empty row, below all others."""
        return not self.below and not self.column and not self.used

    def print(self, text: str) -> None:
        """Count text without control characters."""
        if text:
            self._print(text)
            # It may have wrapped into the last row.
            self.used = self.used or not self.below

    def _print(self, text: str) -> None:
        if not self.below:
            self.used = True
        if text.isascii():
            total = self.column + len(text)
            down = (total - 1) // self.columns
            self.column = total - down * self.columns
            self._go_down(down)
            return
        for char in text:
            wide = _columns(char)
            if wide and self.column + wide > self.columns:
                self._go_down(1)
                self.column = 0
            self.column = min(self.column + wide, self.columns)

    def newline(self) -> None:
        """Count a line end, which a terminal takes for a carriage return, too."""
        self.column = 0
        self._go_down(1)
        if not self.below:
            self.used = False

    def lines_of(self, text: str) -> None:
        """Count text whose only control characters are line ends."""
        parts = text.split("\n")
        if len(parts) > _LINES_MAX:
            self.rows += len(parts) - _LINES_MAX
            self.row = self.rows - 1
            self.column = 0
            parts = parts[-_LINES_MAX:]
        for part in parts[:-1]:
            self.print(part)
            self.newline()
        self.print(parts[-1])

    def control(self, char: str) -> str | None:
        """Return what to write for a control character that edits the line; None for another."""
        if char == "\r":
            self.column = 0
        elif char == "\b":
            # Behind a full row the cursor is drawn on its last character.
            self.column = max(0, min(self.column, self.columns - 1) - 1)
        elif char == "\t":
            self.column = min((self.column // 8 + 1) * 8, self.columns - 1)
        elif char == "\n":
            self.newline()
        else:
            return None
        return char

    def sequence(self, numbers: str, final: str) -> str | None:
        """Return what to write for CSI `numbers` `final`, "" for nothing; None for one that reaches
        beyond the program's lines.
        """
        first = numbers.partition(";")[0]
        count = int(first) if first else 0
        # Behind a full row terminals differ in what they do, so the cursor is put on its last
        # character.
        full = f"\x1b[{self.columns}G" if self.column >= self.columns else ""
        self.column = min(self.column, self.columns - 1)
        if final in "KJ":
            erased = self._erase(count, final)
            return None if erased is None else full + erased
        if final in "PX@":
            return f"{full}\x1b[{max(1, count)}{final}"
        if final in "ABEF":
            return full + self._move(max(1, count), final)
        return self._turn(max(1, count), final)

    def _move(self, count: int, final: str) -> str:
        if final in "AF":
            return self._go(-min(count, self.row - self._top()), final)
        return self._go(min(count, self.below), final)

    def _turn(self, count: int, final: str) -> str:
        at = self.column
        if final == "C":
            at += count
        elif final == "D":
            at -= count
        else:  # G
            at = count - 1
        self.column = max(0, min(at, self.columns - 1))
        return f"\x1b[{self.column + 1}G"

    def _erase(self, count: int, final: str) -> str | None:
        if count > 2 or (final == "J" and count):
            return None
        if final == "J":
            self.rows = self.row + 1
        if not self.below and (count == 2 or (not self.column and count == 0)):
            self.used = False
        if final == "J" and not self.below:
            self.used = self.column > 0
        return f"\x1b[{count or ''}{final}"

    def _go(self, rows: int, final: str) -> str:
        self.row += rows
        self.column = 0 if final in "EF" else self.column
        moved = f"\x1b[{abs(rows)}{'A' if rows < 0 else 'B'}" if rows else ""
        return moved + ("\r" if final in "EF" else "")

    def _top(self) -> int:
        """Return the first row that is certainly on the screen."""
        return min(self.row, max(0, self.rows - max(1, self.lines - _OURS)))

    def _go_down(self, rows: int) -> None:
        self.row += rows
        if self.row >= self.rows:
            if rows and self.row > self.rows - 1 and self.column:
                self.used = True
            self.rows = self.row + 1


def _columns(char: str) -> int:
    if unicodedata.combining(char) or unicodedata.category(char) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1
