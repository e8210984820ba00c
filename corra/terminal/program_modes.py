"""The modes that a program has set in the terminal it was lent, and its output shown again.

A full-screen program sets modes that it undoes at its end. An operator who leaves before needs them
undone. An operator who comes later needs them set, as the program takes them for granted: ncurses
knows an arrow key only as application keys send it. Names are those of XTerm's "Control Sequences"
(Dickey), for the keyboard of kitty's "Comprehensive keyboard handling in terminals".
"""

from __future__ import annotations

import re
from collections.abc import Iterable

# DEC private modes that a program may leave changed, and their defaults. Modes whose default
# differs between terminals are left out: 12 (a blinking cursor), 1007 (a wheel that sends arrows).
_MODES = {
    **dict.fromkeys(
        (
            1,
            5,
            6,
            9,
            47,
            66,
            69,
            1000,
            1001,
            1002,
            1003,
            1004,
            1005,
            1006,
            1015,
            1016,
            1047,
            1049,
            2004,
            2026,
            2031,
            2048,
        ),
        False,
    ),
    **dict.fromkeys((7, 25), True),
}
_SCREENS = (47, 1047, 1049)
_SWITCH = re.compile(
    rb"\x1b(?:\[(?:\?(?P<modes>[0-9;]{1,80}[hl])|(?P<insert>4[hl])|(?P<region>[0-9;]{0,16}r)"
    rb"|(?P<shape>[0-9]{0,2} q)|(?P<other_keys>>4(?:;[0-9]?)?m)"
    rb"|(?P<flags>[<>=][0-9;]{0,8}u))|(?P<keypad>[=>])|(?P<charset>\([0-9A-Za-z])|(?P<reset>c))"
)
_BEGUN = re.compile(rb"\x1b(?:\(|\[[?<>=]?[0-9;]{0,80} ?)?\Z")
_BEGUN_MAX = 84
_SHIFTS = (b"\x0e", b"\x0f")
# The default of each other mode, and the sequence that restores it. To restore the scrolling
# region moves the cursor, so the cursor is saved around it.
_OFF = {
    "insert": (frozenset({b"4l"}), b"\x1b[4l"),
    "region": (frozenset({b"r", b";r"}), b"\x1b7\x1b[r\x1b8"),
    "shape": (frozenset({b" q", b"0 q"}), b"\x1b[0 q"),
    "other_keys": (frozenset({b">4m", b">4;m", b">4;0m"}), b"\x1b[>4m"),
    "keypad": (frozenset({b">"}), b"\x1b>"),
    "charset": (frozenset({b"(B"}), b"\x1b(B"),
    "shift": (frozenset({b"\x0f"}), b"\x0f"),
}
# A program that redraws its screen sets these itself.
_PASSING = frozenset({6, 2026, "insert", "region", "charset", "shift"})
_PUSHED_MAX = 16
# Ends a title or a picture that the program was in the middle of.
_CANCEL = b"\x18\x1b\\"

# Sequences that aren't shown a second time. A terminal answers them or takes them for an order to
# itself: ENQ; DECID; device attributes, status reports, window operations and DECREQTPARM; the
# reports with an intermediate byte (modes, checksums, settings); XTQMODKEYS, XTSMGRAPHICS, the
# keyboard's flags; XTVERSION; and all strings (OSC, DCS, APC, PM, SOS), among them the clipboard
# and the colours. And the scrolling region: in a terminal of another size it is too small, and vim,
# which is told of the new size, takes it for granted that the terminal forgets the region then.
_NOT_AGAIN = re.compile(
    rb"\x05|\x1b(?:Z|\[[0-?]*(?:[ -/]*[cnrtx]|[\"-/][ -/]*[@-~])|\[\?[0-?]*[mSu]|\[>[0-?]*q"
    rb"|[P\]X^_][^\x1b\x07]*(?:\x07|\x1b\\))"
)
_UNFINISHED = re.compile(rb"\x1b(?:\[[0-?]*[ -/]*|[P\]X^_][^\x1b\x07]*\x1b?)?\Z")
_UNFINISHED_MAX = 1 << 20


class ProgramModes:
    """The modes that a program has set in the terminal it was lent."""

    def __init__(self) -> None:
        self._held = b""
        self._on: dict[int | str, bytes] = {}  # the sequence that set each mode, oldest first
        self._pushed: dict[bool, list[bytes]] = {
            False: [],
            True: [],
        }  # of the keyboard's flags: each of the two screens has a stack

    def see(self, data: bytes) -> None:
        """Take note of the modes that the program's `data` sets; its end may cut a sequence."""
        data, reset = self._held + data, -1
        for found in _SWITCH.finditer(data):
            kind, value = str(found.lastgroup), found[str(found.lastgroup)]
            if kind == "modes":
                for number in value[:-1].split(b";"):
                    if number and (mode := int(number)) in _MODES:
                        self._note(
                            mode,
                            (value[-1:] == b"h") != _MODES[mode],
                            b"\x1b[?%d%b" % (mode, value[-1:]),
                        )
            elif kind == "flags":
                self._note_flags(found.group(), value)
            elif kind == "reset":
                # Terminals differ in the screen that follows, and in a soft reset.
                self._on = {screen: self._on[screen] for screen in _SCREENS if screen in self._on}
                self._pushed = {False: [], True: []}
                reset = found.start()
            else:
                self._note(kind, value not in _OFF[kind][0], found.group())
        # A search of its own: a pattern that begins with one byte is found ten times as fast.
        shift = max(_SHIFTS, key=data.rfind)
        if data.rfind(shift) > reset:
            self._note("shift", shift not in _OFF["shift"][0], shift)
        begun = _BEGUN.match(data, max(0, data.rfind(b"\x1b", -_BEGUN_MAX)))
        self._held = begun.group() if begun else b""

    def _note(self, key: int | str, on: bool, done: bytes) -> None:
        self._on.pop(key, None)
        if on:
            self._on[key] = done

    def _note_flags(self, sequence: bytes, value: bytes) -> None:
        """Take note of a push, pop or set of kitty's keyboard flags."""
        pushed = self._pushed[self._elsewhere]
        if value[:1] == b">":
            pushed.append(sequence)
            del pushed[:-_PUSHED_MAX]
        elif value[:1] == b"<":
            count = int(value[1:-1].split(b";")[0] or 1)
            del pushed[max(0, len(pushed) - count) :]
        else:
            self._note("flags", not value.startswith((b"=0", b"=u")), sequence)

    @property
    def _elsewhere(self) -> bool:
        """Whether the program shows the alternate screen."""
        return any(screen in self._on for screen in _SCREENS)

    def undo(self) -> bytes:
        """Return the bytes that restore the terminal, each screen's own modes in that screen."""

        def off(keys: Iterable[int | str]) -> bytes:
            return b"".join(_undone(key) for key in keys if key in self._on)

        popped = {
            there: b"\x1b[<%du" % len(pushed) if pushed else b""
            for there, pushed in self._pushed.items()
        }
        modes = sorted(mode for mode in _MODES if mode not in _SCREENS)
        back = popped[True] + off(_SCREENS) if self._elsewhere else b""
        return (
            _CANCEL
            + off((*modes, "flags", "insert", "region", "shape", "other_keys", "keypad"))
            + back
            + popped[False]
            + off(("charset", "shift"))
            + b"\x1b[0m"
        )

    def redo(self) -> bytes:
        """Return the bytes that set the program's modes in a terminal, or again after `undo`."""
        lasting = [key for key in self._on if key not in _PASSING]
        lasting.sort(key=lambda key: key not in _SCREENS)
        return b"".join(self._on[key] for key in lasting) + b"".join(
            self._pushed[self._elsewhere][-1:]
        )


def _undone(key: int | str) -> bytes:
    if isinstance(key, str):
        return b"\x1b[=0u" if key == "flags" else _OFF[key][1]
    return b"\x1b[?%d%b" % (key, b"h" if _MODES[key] else b"l")


class Replay:
    """Removes from older output the questions that this terminal would answer.

    The program has had its answers; a second one would be typed into it. The scrolling region goes
    too, as the terminal may have had another size. New output passes unchanged.
    """

    def __init__(self, until: int) -> None:
        """Bytes from offset `until` on are new."""
        self._until = until
        self._held = b""

    def take(self, offset: int, data: bytes) -> bytes:
        """Return the part of `data`, which begins at `offset`, that may be shown.

        A possible beginning of a question waits for the rest.
        """
        old = max(0, min(len(data), self._until - offset))
        text, live = self._held + data[:old], data[old:]
        self._held = b""
        begun = _UNFINISHED.search(text)
        if begun and not live and len(begun.group()) <= _UNFINISHED_MAX:
            text, self._held = text[: begun.start()], begun.group()
        return _NOT_AGAIN.sub(b"", text) + live
