"""Facts in words: durations, times, sizes, errnos, foreign text."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from corra.errors import plain

_ERRNO_WORDS = {
    errno.ENOENT: "not found",
    errno.EACCES: "not executable",
    errno.EPERM: "not permitted",
    errno.ENOEXEC: "neither a program nor a script with a #! line",
    errno.E2BIG: "its words and environment are too long",
    errno.ETXTBSY: "is being written",
    errno.ENOTDIR: "not a directory",
    errno.ELOOP: "a loop of symbolic links",
    errno.ENOSPC: "disk full",
    errno.EDQUOT: "quota used up",
    errno.EROFS: "read-only",
    errno.ENOMEM: "no memory",
}
_SIZES = ("B", "kB", "MB", "GB", "TB", "PB", "EB")


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


# 80 columns, less a hint's indent.
WIDTH = 73


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


def side_by_side(hints: Sequence[str], width: int = WIDTH, *, gap: str = "      ") -> list[str]:
    """Return short hints on one line, long ones below each other."""
    one = gap.join(hints)
    return [one] if len(one) <= width else list(hints)


def local_time(text: str | None) -> datetime | None:
    """Return a State's time as local time with its offset; None for a text that is no time."""
    if not text:
        return None
    try:
        # 3.10's fromisoformat doesn't know the Z that any other writer of JSON may use.
        moment = datetime.fromisoformat(text.replace("Z", "+00:00"))
    except ValueError:
        return None
    return moment.astimezone()


def clock_time(text: str | None, form: str = "%H:%M") -> str:
    """Return the local hour and minute of a State's time; `?` if there is none."""
    then = local_time(text)
    return "?" if then is None else then.strftime(form)


def bare_signal(signal: str) -> str:
    return signal.removeprefix("SIG")


def now() -> datetime:
    return datetime.now().astimezone()


def one_line(text: Any) -> str:
    """Return foreign text on one line, with control characters made visible."""
    return plain(" ".join(str(text).split()))


def errno_words(number: Any, message: str = "") -> str:
    """Return `disk full (ENOSPC)` for an errno, else the host's own words."""
    words = (
        _ERRNO_WORDS.get(number)
        or message
        or (os.strerror(number) if isinstance(number, int) and number else "")
    )
    name = errno_name(number)
    return f"{words} ({name})" if name and name not in words else words


def errno_name(number: Any) -> str:
    return errno.errorcode.get(number, "") if isinstance(number, int) else ""
