"""Makes the control bytes of a program's output harmless on a terminal with corra's lines."""

from __future__ import annotations

import codecs
import re

from corra import render

# SGR sequences (colours) pass, a CRLF is a line end. All else that a terminal would act on is
# made visible.
_ACTIVE = re.compile(r"\x1b\[[0-9;:]{0,64}m|\r\n|[\x00-\x08\x0b-\x1f\x7f-\x9f]")
# A possible beginning of one of those two.
_HELD = re.compile(r"(?:\x1b(?:\[[0-9;:]{0,64})?|\r)\Z")


class Sanitiser:
    """Makes the bytes of one stream harmless for a terminal, chunk by chunk.

    A character or colour that a chunk's end cuts in two stays whole.
    """

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("backslashreplace")
        self._held = ""
        self.colour = ""

    def feed(self, data: bytes, *, final: bool = False) -> str:
        """Return the text to show now; with `final` also the bytes that waited for more."""
        text = self._held + self._decoder.decode(data, final)
        held = None if final else _HELD.search(text)
        self._held = held.group() if held else ""
        return _ACTIVE.sub(self._shown, text[: held.start()] if held else text)

    def _shown(self, match: re.Match[str]) -> str:
        found = match.group()
        if found == "\r\n":
            return "\n"
        if len(found) == 1:
            return render.visible(found)
        # A reset clears the colours. The cap bounds this for a stream of nothing but colours.
        self.colour = (
            ""
            if found in ("\x1b[m", "\x1b[0m")
            else (self.colour + found)[-256:]
            if len(self.colour) < 256
            else found
        )
        return found
