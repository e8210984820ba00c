"""Durations and sizes as operators write them: `90`, `5m`, `2h`, `500M`, `1.5G`."""

from __future__ import annotations

import re
from typing import overload

from corra.errors import Misuse

# 9 digits: 31 years of seconds, and never a number that float or int can't hold.
_DURATION = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)\s*(ms|s|m|min|h|d)?")
_BYTES = re.compile(r"(\d+(?:\.\d+)?)([KMGTkmgt])?(?:i?[Bb])?")
_UNITS_S = {"ms": 0.001, "s": 1.0, "": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}


def parse_seconds(text: str) -> float:
    """Return the seconds in `90`, `1.5`, `10s`, `5m`, `2h`, `14d`. Raises Misuse with what was meant to be there."""
    match = _DURATION.fullmatch(text.strip())
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
    """Return the bytes in `4096`, `500M`, `2G`, `1.5G`: powers of 1024, as `df -h` has them. Raises Misuse."""
    match = _BYTES.fullmatch(text.strip())
    if not match:
        raise Misuse(f"not a size: {text!r} (say 500M or 2G)")
    return int(float(match.group(1)) * 1024 ** " KMGT".index((match.group(2) or " ").upper()))


@overload
def output_kept(value: int | str) -> int: ...
@overload
def output_kept(value: int | str | None) -> int | None: ...
def output_kept(value: int | str | None) -> int | None:
    """Return how many bytes of each stream a run keeps. Raises Misuse for less than the host can keep."""
    found = parse_size(value) if isinstance(value, str) else value
    from corra.on_host.agent.contract import (
        BOUND_MIN,  # 4,000 lines, which listing and completing do without
    )

    if found is not None and found < BOUND_MIN:
        raise Misuse(f"too little to keep of an output: {value} ({BOUND_MIN >> 10}K or more)")
    return found
