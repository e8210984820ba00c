"""The flags that several verbs have, and how the text behind a flag becomes its value.

What a reader raises for a text it can't read is said as a misuse of its flag: ValueError, or Misuse with a reason of its own.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable

from .errors import Misuse
from .verb import listing, option, switch


def seconds(text: str) -> float:
    """Read `10s`, `1h30m`."""
    from . import program

    return program.seconds(text)


def patience(text: str) -> float:
    """Read a duration that two pings and their answers fit in."""
    found = seconds(text)
    if found < 1:
        raise Misuse(f"too short to hear from anybody: {text} (1s or more)")
    return found


def size(text: str) -> int:
    """Read `500M`, `2G`."""
    from . import program

    return program.size(text)


def signal(text: str) -> str:
    """Read `TERM`, `sigterm`, `15`."""
    from .follow import signal_name

    return signal_name(text)


def lines(text: str) -> int | None:
    """Read a number of lines; None is all."""
    return None if text == "all" else _count(text)


def _count(text: str) -> int:
    if not text.isdecimal():
        raise ValueError(text)
    return int(text)


def span(text: str) -> tuple[int, int | None]:
    """Read `A:B`, `A:` or `:B`, the bytes from A on and before B."""
    begin, colon, end = text.partition(":")
    if not colon:
        raise Misuse(f"not A:B: {text!r} (say 0:4096, 1M:2M, or 4096: to the end)")
    found = (size(begin) if begin else 0, size(end) if end else None)
    if found[1] is not None and found[1] < found[0]:
        raise Misuse(f"it ends before it begins: {text!r}")
    return found


def output_kept(text: str) -> int | None:
    """Read `64M`, at least 64K."""
    from . import program

    return program.output_kept(text)


def limit(text: str) -> str:
    """Check `NAME=VALUE`."""
    from . import program

    name, equals, value = text.partition("=")
    if not equals:
        raise Misuse(f"not NAME=VALUE: {text!r} (say files=4096)")
    try:
        program.limits({name: value})
    except Misuse as error:
        raise Misuse(error.why.removeprefix("limit ")) from None
    return text


def moment(text: str) -> int:
    """Read `10m` (ago), `14:30` (today), `2026-11-24T14:30` as ns since the epoch; a time without an offset is this machine's own."""
    import time
    from datetime import datetime

    with contextlib.suppress(Misuse):
        return int((time.time() - seconds(text)) * 1e9)
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


def pattern(text: str) -> re.Pattern[bytes]:
    """Read a regular expression that is to be found in bytes."""
    try:
        return re.compile(os.fsencode(text))
    except re.error as error:
        raise Misuse(f"not a regular expression: {text!r}: {error}") from None


def keys(text: str) -> bytes:
    """Read `ctrl-]`, `ctrl-p,ctrl-q`."""
    from .keyboard import detach_keys

    return detach_keys(text)


def one_of(*choices: str) -> Callable[[str], str]:
    """Return a reader of one of these words."""

    def read(text: str) -> str:
        if text not in choices:
            raise Misuse(f"not {', '.join(choices[:-1])} or {choices[-1]}: {text!r}")
        return text

    return read


def transport(text: str) -> str:
    """Read `fabric`, `openssh`, `chaperone`, `chaperone@HOST`."""
    by, at, keeper = text.partition("@")
    if at and by == "chaperone":
        from .program import Host

        Host.parse(keeper)
        return text
    return one_of("fabric", "openssh", "chaperone", "chaperone@HOST")(text)


# As in program.Mode, which `inv --list` has no need of.
AS_MODES = ("ssh-then-sudo", "ssh-as", "sudo-then-ssh", "sudo-then-ssh-then-sudo")

HOST = listing(
    "host",
    "H",
    "hosts",
    help="Where: HOST, user@host:port or local; db1,web[1-3] are several. Default: what history says.",
)
TARGET = listing(
    "host",
    "H",
    "hosts",
    help="Where: HOST, user@host:port, or local for this machine. Default: $CORRA_HOST.",
)
REACH = (
    option("user", "u", help="Log in as this user."),
    option("as", help="Run as this user there, by sudo."),
    option(
        "mode",
        read=one_of(*AS_MODES),
        help="What --as means: ssh-then-sudo, ssh-as, sudo-then-ssh .. (docs/sudo.md).",
    ),
    option(
        "via",
        read=transport,
        help="fabric, openssh (the ssh program), chaperone (kept by this machine), chaperone@HOST (by HOST).",
    ),
    option(
        "connect-timeout", read=seconds, help="How long a host may take to answer (15s; 5s for ps)."
    ),
    option("spool", help="Directory on the host instead of the usual one."),
)
SHOWN = (
    switch("timestamps", "t", help="Put the time of arrival before each line."),
    option("stream", read=one_of("stdout", "stderr", "both"), help="Only stdout or stderr (both)."),
    switch("raw", help="Let escape sequences through to this terminal."),
)
COLLECTED = (option("collector", help="Ask this collector of the configuration, not the host."),)
SIFTED = (
    option("grep", "g", read=pattern, help="Only lines in which this regular expression is found."),
    option("since", read=moment, help="Only what came since: 10m (ago), 14:30, 2026-11-24T14:30."),
    option("until", read=moment, help="Only what came until then."),
    option(
        "bytes",
        read=span,
        help="Only the bytes A:B of a stream (stdout's), B not included: 0:4096, 1M:, :64K.",
    ),
    switch("late", help="Also what was written after its end by processes that it left behind."),
)
LINK = (
    option("reconnect-timeout", read=seconds, help="Give a lost link up after this long (never)."),
    option(
        "dead-after", read=patience, help="Call a link dead that is silent for this long (15s)."
    ),
)
TYPED = (
    option(
        "detach-keys",
        read=keys,
        default=b"\x1d",
        help="What leaves its terminal: ctrl-p,ctrl-q and the like, or none (ctrl-]).",
    ),
)
WATCHED = (
    option(
        "timeout",
        "T",
        read=seconds,
        help="Stop watching after this long; the program goes on (none).",
    ),
    *LINK,
)
