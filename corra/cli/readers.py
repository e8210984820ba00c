"""Readers of flag values: each turns typed text into a value or raises Misuse."""

from __future__ import annotations

import contextlib
import os
import re
from typing import TYPE_CHECKING

from corra.errors import Misuse

from .words import nearest, one_of

if TYPE_CHECKING:
    from corra.collector.limits import Limits as TokenLimits


def read_seconds(text: str) -> float:
    """Read `10s`, `90m`."""
    from corra.model import units

    return units.parse_seconds(text)


def read_patience(text: str) -> float:
    """Read a duration that two pings and their answers fit in."""
    found = read_seconds(text)
    if found < 1:
        raise Misuse(f"too short to hear from anybody: {text} (1s or more)")
    return found


def read_size(text: str) -> int:
    """Read `500M`, `2G`."""
    from corra.model import units

    return units.parse_size(text)


def read_signal(text: str) -> str:
    """Read `TERM`, `sigterm`, `15`."""
    from corra.model.signal_names import signal_name

    return signal_name(text)


def is_signal(text: str) -> bool:
    """Return whether `text` is a signal's name in capitals: `HUP`, `SIGHUP`."""
    if len(text) < 3 or not text.isupper():
        return False
    try:
        return bool(read_signal(text))
    except Misuse:
        return False


def read_lines(text: str) -> int | None:
    """Read a number of lines; None is all."""
    return None if text == "all" else read_offset(text)


def read_offset(text: str) -> int:
    """Read a whole number that isn't negative."""
    if not text.isdecimal():
        raise ValueError(text)
    return int(text)


def read_count(text: str) -> int:
    """Read a whole number from 1 up."""
    if not (found := read_offset(text)):
        raise Misuse(f"none at all: {text!r}")
    return found


def read_share(text: str) -> str:
    """Check `2` or `10%`."""
    from corra.model.rollout import share_of

    if share_of(text, 100) is None:
        raise Misuse(f"neither a number nor a share: {text!r} (say 2, or 10%)")
    return text


def read_batch(text: str) -> list[int | str]:
    """Read sizes of waves: `5`, `10%`, `1,10%,100%`."""
    from corra.model.rollout import wave_sizes

    sizes: list[int | str] = [each.strip() for each in text.split(",")]
    wave_sizes(100, sizes)
    return sizes


def read_byte_range(text: str) -> tuple[int, int | None]:
    """Read `A:B`, `A:` or `:B`, the bytes from A on and before B."""
    begin, colon, end = text.partition(":")
    if not colon:
        raise Misuse(f"not A:B: {text!r} (say 0:4096, 1M:2M, or 4096: to the end)")
    found = (read_size(begin) if begin else 0, read_size(end) if end else None)
    if found[1] is not None and found[1] < found[0]:
        raise Misuse(f"it ends before it begins: {text!r}")
    return found


def read_token_limits(text: str) -> TokenLimits:
    """Read `body=4M,rate=1000`."""
    from corra.collector.limits import Limits

    return Limits.parse(text)


def read_output_kept(text: str) -> int:
    """Read `64M`, at least 64K."""
    from corra.model import units

    return units.output_kept(text)


def read_host_limit(text: str) -> str:
    """Read a set of hosts."""
    if "=" in text:
        raise Misuse(f"not a set of hosts: {text!r} (what a program may use: --ulimit {text})")
    return text


def read_limit(text: str) -> str:
    """Check `NAME=VALUE`."""
    from corra.model import limits

    name, equals, value = text.partition("=")
    if not equals:
        raise Misuse(f"not NAME=VALUE: {text!r} (say files=4096)")
    try:
        limits.parse_limits({name: value})
    except Misuse as error:
        raise Misuse(error.why.removeprefix("limit ")) from None
    return text


def read_moment(text: str) -> int:
    """Read `10m` (ago), `14:30` (today), `2026-11-24T14:30` as ns since the epoch.

    A time without an offset is this machine's local time.
    """
    import time
    from datetime import datetime

    with contextlib.suppress(Misuse):
        return int((time.time() - read_seconds(text)) * 1e9)
    today = (
        f"{datetime.now().astimezone():%Y-%m-%d}T"
        if ":" in text and "-" not in text.partition(":")[0]
        else ""
    )
    try:
        # Python 3.10 reads no Z.
        when = datetime.fromisoformat(today + text.strip().replace("Z", "+00:00"))
    except ValueError:
        raise Misuse(
            f"not a time: {text!r} (say 10m for 10 minutes ago, 14:30, or 2026-11-24T14:30)"
        ) from None
    return int((when if when.tzinfo else when.astimezone()).timestamp() * 1e9)


def read_pattern(text: str) -> re.Pattern[bytes]:
    """Read a regular expression that is to be found in bytes."""
    try:
        return re.compile(os.fsencode(text))
    except re.error as error:
        raise Misuse(f"not a regular expression: {text!r}: {error}") from None


def read_detach_keys(text: str) -> bytes:
    """Read `ctrl-]`, `ctrl-p,ctrl-q`."""
    from corra.terminal.leave_keys import detach_keys

    return detach_keys(text)


# As render.word says them; more words may follow, as in `FAILED 2`.
STATES = (*("starting", "running", "done", "FAILED", "KILLED", "TIMEOUT", "LOST", "NOT STARTED"),)


def read_state(text: str) -> str:
    """Read the beginning of a state's word: `running`, `fail`, `FAILED 2`."""
    given = text.lower()
    if not any(each.lower().startswith(given) or given.startswith(each.lower()) for each in STATES):
        near = nearest(text, STATES)
        raise Misuse(f"no state {text!r}{near or ': there are ' + ', '.join(STATES)}")
    return text


def read_transport(text: str) -> str:
    """Read `fabric`, `openssh`, `chaperone`, `chaperone@HOST`."""
    by, at, keeper = text.partition("@")
    if at and by == "chaperone":
        from corra.model.host import Host

        Host.parse(keeper)
        return text
    return one_of("fabric", "openssh", "chaperone", "chaperone@HOST")(text)
