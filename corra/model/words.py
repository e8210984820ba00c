"""Facts in words: times, errnos, foreign text."""

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


# 80 columns, less a hint's indent.
WIDTH = 73


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
