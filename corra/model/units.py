"""Seconds and bytes, as operators write them and as corra writes them.

Read: `90`, `5m`, `2h`, `500M`, `1.5G`, a size in powers of 1024 as `df -h` has them.
Written: `9 min`, `2 h 18 min`, and `61 kB`, in decimal units, as disks and networks are sold.
"""

from __future__ import annotations

import re
from typing import overload

from corra.errors import Misuse

# 9 digits: 31 years of seconds. Each number is one that float and int can hold.
# Text, as few verbs need them: `re` compiles a pattern where it is first used, and keeps it.
_DURATION = r"([0-9]{1,9}(?:\.[0-9]{1,9})?)\s*(ms|s|m|min|h|d)?"
_BYTES = r"([0-9]{1,19})(\.[0-9]{1,9})?\s*([KMGTkmgt])?(?:i?[Bb])?"
_UNITS_S = {"ms": 0.001, "s": 1.0, "": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
_SIZES = ("B", "kB", "MB", "GB", "TB", "PB", "EB")


# -- Reading


def parse_seconds(text: str) -> float:
    """Return the seconds in `90`, `1.5`, `10s`, `5m`, `2h`, `14d`. Raises Misuse with examples."""
    match = re.fullmatch(_DURATION, text.strip())
    if not match:
        raise Misuse(f"not a duration: {text!r} (say 30s, 5m, 2h or 14d)")
    return float(match.group(1)) * _UNITS_S[match.group(2) or ""]


@overload
def in_seconds(value: float | str) -> float: ...
@overload
def in_seconds(value: float | str | None) -> float | None: ...
def in_seconds(value: float | str | None) -> float | None:
    """Return a duration that was given as a number or as text. Raises Misuse."""
    return parse_seconds(value) if isinstance(value, str) else value


def parse_size(text: str) -> int:
    """Return the bytes in `4096`, `64k`, `500M`, `1.5G`. Raises Misuse with examples."""
    match = re.fullmatch(_BYTES, text.strip())
    if not match:
        raise Misuse(f"not a size: {text!r} (say 500M or 2G)")
    whole, fraction, unit = match.groups()
    factor = int(1024 ** " KMGT".index((unit or " ").upper()))
    return int(whole) * factor + int(float(fraction or 0) * factor)


@overload
def output_kept(value: int | str) -> int: ...
@overload
def output_kept(value: int | str | None) -> int | None: ...
def output_kept(value: int | str | None) -> int | None:
    """Return how many bytes of each stream a run keeps.

    Raises Misuse for less than the host can keep.
    """
    found = parse_size(value) if isinstance(value, str) else value
    from corra.on_host.agent.contract import BOUND_MIN

    if found is not None and found < BOUND_MIN:
        raise Misuse(f"too little to keep of an output: {value} ({BOUND_MIN >> 10}K or more)")
    return found


# -- Writing


def decimal_size(count: int) -> str:
    """Return `4 B`, `61 kB`, `1.2 MB`: decimal units, as disks and networks are sold."""
    amount = float(count)
    for unit in _SIZES:
        if amount < 999.5 or unit == _SIZES[-1]:
            return (
                f"{count} B"
                if unit == "B"
                else f"{amount:.1f} {unit}"
                if amount < 9.95
                else f"{amount:.0f} {unit}"
            )
        amount /= 1000
    return f"{count} B"


def duration(seconds: float) -> str:
    """Return `0.01 s`, `3.0 s`, `44 s`, `9 min`, `2 h 18 min` or `3 d 4 h`."""
    if seconds < 0.1:
        return f"{max(seconds, 0):.2f} s"
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = int(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return _two(whole, 60, "min", 1, "s") if whole < 600 else f"{whole // 60} min"
    if whole < 86400:
        return _two(whole, 3600, "h", 60, "min")
    return _two(whole, 86400, "d", 3600, "h")


def chosen_time(seconds: float) -> str:
    """Return a duration that somebody chose: `2 h`, `10 s`, `0.5 s`."""
    return f"{seconds:g} s" if seconds < 60 else duration(seconds)


def _two(whole: int, large: int, large_unit: str, small: int, small_unit: str) -> str:
    rest = whole % large // small
    return f"{whole // large} {large_unit}" + (f" {rest} {small_unit}" if rest else "")
