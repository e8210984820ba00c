"""Signals by name or number, as operators type them."""

from __future__ import annotations

import signal as signals

from corra.errors import Misuse


def signal_name(name: str | int) -> str:
    """Return `HUP` for `HUP`, `SIGHUP`, `hup` or 1. Raises Misuse for what is no signal."""
    try:
        if isinstance(name, int) or name.isdecimal():
            return signals.Signals(int(name)).name.removeprefix("SIG")
        return signals.Signals["SIG" + name.upper().removeprefix("SIG")].name.removeprefix("SIG")
    except (KeyError, ValueError):
        raise Misuse(
            f"not a signal: {name!r} (say HUP, INT, TERM, USR1 or a number)", fate="NOT SENT"
        ) from None
