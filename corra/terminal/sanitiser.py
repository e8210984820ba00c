"""Makes the control bytes of a program's output harmless on a terminal with corra's lines.

What edits the program's own lines is done, as progress bars need it: carriage return, backspace,
and the sequences that erase in a line or move within those lines (`own_lines`). Colours pass. All
else that a terminal would act on is made visible.
"""

from __future__ import annotations

import codecs
import re

from corra import render

from .own_lines import OwnLines

# A colour; a sequence that edits lines; one that switches a mode of the screen, such as the
# cursor's look; another control character. A CSI has at most 64 bytes of numbers here.
_ACTIVE = re.compile(
    r"\x1b\[[0-9;:]{0,64}m|\x1b\[([0-9]{0,4}(?:;[0-9]{0,4})?)([A-GJKPX@])"
    r"|\x1b\[\?[0-9;]{1,32}[hl]|[\x00-\x09\x0b-\x1f\x7f-\x9f]"
)
# A possible beginning of one of those sequences.
_HELD = re.compile(r"\x1b(?:\[\??[0-9;:]{0,64})?\Z")


class Sanitiser:
    """Makes the bytes of one stream harmless for a terminal, chunk by chunk.

    A character or sequence that a chunk's end cuts in two stays whole.
    """

    def __init__(self, lines: OwnLines | None = None) -> None:
        """`lines`: those of the terminal, which all of its streams share."""
        self._decoder = codecs.getincrementaldecoder("utf-8")("backslashreplace")
        self._lines = lines or OwnLines()
        self._held = ""
        self.colour = ""

    def feed(self, data: bytes, *, final: bool = False) -> str:
        """Return the text to show now; with `final` also the bytes that waited for more."""
        text = self._held + self._decoder.decode(data, final)
        held = None if final else _HELD.search(text)
        self._held = held.group() if held else ""
        text = text[: held.start()] if held else text
        shown, at = [], 0
        for match in _ACTIVE.finditer(text):
            plain = text[at : match.start()]
            self._lines.lines_of(plain)
            shown += [plain, self._done(match)]
            at = match.end()
        self._lines.lines_of(text[at:])
        return "".join([*shown, text[at:]])

    def _done(self, match: re.Match[str]) -> str:
        """Return what to write in the place of something that a terminal acts on."""
        found = match.group()
        if len(found) == 1:
            done = self._lines.control(found)
        elif found.endswith("m"):
            self._mix(found)
            return found
        elif found[2] == "?":
            return ""  # it has no look, and what is switched on would have to be switched off
        else:
            done = self._lines.sequence(match.group(1), match.group(2))
        if done is None:
            done = "".join(map(render.visible, found))
            self._lines.print(done)
        return done

    def _mix(self, colour: str) -> None:
        # A reset clears the colours. The cap bounds this for a stream of nothing but colours.
        self.colour = (
            ""
            if colour in ("\x1b[m", "\x1b[0m")
            else (self.colour + colour)[-256:]
            if len(self.colour) < 256
            else colour
        )
