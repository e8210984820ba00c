"""The keys that leave the program's terminal (Ctrl-]), in every form a terminal sends them."""

from __future__ import annotations

import re

from corra.errors import Misuse

LEAVE = "ctrl-]"
_KEY = r"ctrl-([a-z@\[\\\]^_])|([ -~])"


class Leave:
    """The operator typed the keys that leave the program's terminal."""


def detach_keys(text: str) -> bytes:
    """Read `ctrl-]`, `ctrl-p,ctrl-q`, or `none` for no keys. Raises Misuse."""
    if text == "none":
        return b""
    keys = b""
    for each in text.split(","):
        found = re.fullmatch(_KEY, each)
        if found is None:
            raise Misuse(
                f"not keys: {text!r} (say ctrl-], or several with commas: ctrl-p,ctrl-q; or none)"
            )
        keys += bytes([ord(found[1].upper()) & 0x1F]) if found[1] else found[2].encode()
    return keys


def shown(keys: bytes) -> str:
    """Return keys as people write them."""
    return " ".join(f"Ctrl-{chr(key | 0x40)}" if key < 32 else chr(key) for key in keys)


def _typed(key: int) -> bytes:
    """Return the pattern of all that a terminal may send for a key.

    That is its byte, or the sequence that a program has asked for instead: `CSI 27;modifiers;code~`
    by XTerm's modifyOtherKeys, or `CSI code;modifiers u` by kitty's protocol. Kitty adds more codes
    of the same key, the locks among the modifiers, and whether the key was pressed or repeated.
    """
    control = key < 32
    code = ord(chr(key | 0x40).lower()) if control else key
    # Some keyboards need Shift for a sign.
    held = (4, 5) if control and not chr(code).isalpha() else (4,) if control else (0, 1)
    modifiers = b"|".join(b"%d" % (1 + each + lock) for each in held for lock in (0, 64, 128, 192))
    given = b"" if control else b"?"
    return rb"(?:%b|\x1b\[27;(?:%b);%d~" % (
        re.escape(bytes([key])),
        modifiers,
        code,
    ) + rb"|\x1b\[(?:[0-9]+:)?%d(?::[0-9]*)*(?:;(?:%b)(?::[12]?)?(?:;[0-9:]*)?)%bu)" % (
        code,
        modifiers,
        given,
    )


# A key that is released, or a modifier.
_BESIDE = rb"(?:\x1b\[[0-9:]+;[0-9]+:3[~A-Su]|\x1b\[574[45][0-9](?:;[0-9:]*)*u)*"


class Keys:
    """Finds the leave keys among the keys typed, in every form and also when they come singly."""

    def __init__(self, keys: bytes) -> None:
        begun = b""
        for key in reversed(keys[:-1]):
            begun = rb"(?:%b%b%b)?" % (_typed(key), _BESIDE, begun)
        # Escape alone is a key of its own; a terminal sends a sequence in one piece.
        self._begun = re.compile(begun + rb"(?:\x1b\[[0-9][0-9;:]*)?\Z")
        self._keys = re.compile(_BESIDE.join(map(_typed, keys))) if keys else None
        self._held = b""

    def take(self, data: bytes) -> tuple[bytes, bool]:
        """Return (bytes for the program, whether the leave keys came).

        A possible beginning of the leave keys waits for the next bytes.
        """
        data, self._held = self._held + data, b""
        if self._keys is None:
            return data, False
        if found := self._keys.search(data):
            return data[: found.start()], True
        if begun := self._begun.search(data):
            data, self._held = data[: begun.start()], begun.group()
        return data, False
