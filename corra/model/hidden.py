"""Which of a program's streams aren't shown, by the words of Invoke's `hide`."""

from __future__ import annotations

from corra.errors import Misuse

_BOTH = ("stdout", "stderr")
_HIDDEN: dict[bool | str | None, tuple[str, ...]] = {
    None: (),
    False: (),
    True: _BOTH,
    "both": _BOTH,
    "out": _BOTH[:1],
    "stdout": _BOTH[:1],
    "err": _BOTH[1:],
    "stderr": _BOTH[1:],
}


def hidden_streams(hide: bool | str | None) -> tuple[str, ...]:
    """Return the streams that `hide` means: of "stdout" and "stderr". Raises Misuse."""
    if hide not in _HIDDEN:
        raise Misuse(f"not a stream to hide: {hide!r} (out, err or both)")
    return _HIDDEN[hide]
