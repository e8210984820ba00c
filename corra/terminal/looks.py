"""A program's line as it looks once it is whole: what it has overwritten or erased is gone.

For a line that stands behind a host's name among others'. There a carriage return would take the
name with it, and what follows could pass for another host's line.
"""

from __future__ import annotations

import re

# A colour, a sequence that edits the line, any other one, a control that moves, or a character.
_PIECE = re.compile(
    r"(\x1b\[[0-9;:]{0,64}m)|\x1b\[([0-9]{0,4})([CDGKPX])|(\x1b\[[0-9;?]{0,64}[@-~])|([\r\b])|(.)",
    re.DOTALL,
)
_COLUMNS_MAX = 4096


def settled(line: bytes) -> bytes:
    """Return a line without what moves the cursor or erases, as it looks in the end.

    Colours stay, and are reset at the end. Wide characters count as one here: a line that is
    overwritten column by column may keep a piece too many.
    """
    if not any(each in line for each in (b"\r", b"\b", b"\x1b")):
        return line
    cells: list[str] = []
    colours: dict[int, str] = {}
    at = 0
    for colour, count, move, _, control, char in _PIECE.findall(
        line.decode("utf-8", "surrogateescape")
    ):
        number = int(count or 0)
        if colour:
            colours[at] = colours.get(at, "") + colour
        elif control == "\r":
            at = 0
        elif control == "\b":
            at = max(0, at - 1)
        elif move == "C":
            at = min(_COLUMNS_MAX, at + max(1, number))
        elif move == "D":
            at = max(0, at - max(1, number))
        elif move == "G":
            at = min(_COLUMNS_MAX, max(1, number) - 1)
        elif move == "K":
            if number == 0:
                del cells[at:]
            else:
                cells[: len(cells) if number == 2 else at + 1] = (
                    [] if number == 2 else [" "] * min(len(cells), at + 1)
                )
        elif move == "P":
            del cells[at : at + max(1, number)]
        elif move == "X":
            for place in range(at, min(len(cells), at + max(1, number))):
                cells[place] = " "
        elif char:
            cells += [" "] * (at - len(cells))
            cells[at : at + 1] = [char]
            at += 1
    text = "".join(colours.get(place, "") + cell for place, cell in enumerate(cells))
    return (text + ("\x1b[0m" if colours else "")).encode("utf-8", "surrogateescape")
