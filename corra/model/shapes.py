"""Shapes: what the JSON of a host, a journal or a collector must look like, as data.

`check` holds a value to a Shape and `read_json` reads bytes within bounds. Both raise ValueError.
The tests make documents of the same Shapes, good ones and spoiled ones.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from datetime import datetime
from typing import Any, NamedTuple

# Offsets, lengths and times in nanoseconds are the kernel's: signed 64 bits.
WHOLE_MAX = (1 << 63) - 1
# The agent takes no longer time either.
SECONDS_MAX = float(1 << 53)
# A word of argv may have 128 KiB.
WORD_MAX = 1 << 17
# A list of 10,000 runs has a million values; the largest argv that the kernel takes has 700,000
# words.
VALUES_MAX = 2 << 20
# A text of this size may have so many values that they take 25 MB.
_SMALL = 1 << 20
# Linux's clock begins in 1970. The year 9999 can't be shown in every time zone.
_YEARS = range(1970, 3000)
# A string, or a sign behind which another value comes.
_TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*"|[\[{,]', re.DOTALL)


class Text(NamedTuple):
    """A string of at most so many characters. Half a character (a lone surrogate) is none."""

    most: int = 4096


class Word(NamedTuple):
    """A string that the pattern matches."""

    pattern: re.Pattern[str]


class Whole(NamedTuple):
    least: int = 0
    most: int = WHOLE_MAX


class Real(NamedTuple):
    least: float = 0.0
    most: float = SECONDS_MAX


class Flag(NamedTuple):
    only: tuple[bool, ...] = (False, True)


class Moment(NamedTuple):
    """A time as ISO 8601."""

    years: range = _YEARS


class Listed(NamedTuple):
    of: Shape
    most: int = VALUES_MAX


class Mapped(NamedTuple):
    """An object whose keys may have any name."""

    of: Shape
    most: int = VALUES_MAX


class Maybe(NamedTuple):
    """A value of that shape, or null."""

    of: Shape


class Either(NamedTuple):
    shapes: tuple[Shape, ...]


class Object(NamedTuple):
    """An object; null stands for a missing key, and a newer peer's keys are left aside."""

    fields: Mapping[str, Shape]
    needed: tuple[str, ...] = ()


Shape = Text | Word | Whole | Real | Flag | Moment | Listed | Mapped | Maybe | Either | Object


def check(shape: Shape, value: Any, name: str = "it") -> None:
    """Raise ValueError, with the name of the value, where `value` isn't of that shape."""
    if not _fits(shape, value, name):
        raise ValueError(f"{name} is {_shown(value)}")


def _fits(shape: Shape, value: Any, name: str) -> bool:
    match shape:
        case Text(most):
            return type(value) is str and len(value) <= most and _is_sound(value)
        case Word(pattern):
            return type(value) is str and pattern.fullmatch(value) is not None
        case Whole(least, most):
            return type(value) is int and least <= value <= most
        case Real(least, most):
            return type(value) in (int, float) and least <= value <= most
        case Flag():
            return type(value) is bool
        case Moment(years):
            return type(value) is str and _is_moment(value, years)
        case Listed(of, most):
            if not isinstance(value, (list, tuple)) or len(value) > most:
                return False
            for each in value:
                check(of, each, f"{name}[]")
        case Mapped(of, most):
            if not isinstance(value, Mapping) or len(value) > most:
                return False
            for key, each in value.items():
                check(Text(WORD_MAX), key, f"a key of {name}")
                check(of, each, f"{name}.{key[:40]}")
        case Maybe(of):
            return value is None or _fits(of, value, name)
        case Either(shapes):
            return any(_fits_quietly(each, value, name) for each in shapes)
        case Object(fields, needed):
            if not isinstance(value, Mapping):
                return False
            for key in needed:
                if value.get(key) is None:
                    raise ValueError(f"{name} has no {key}")
            for key, of in fields.items():
                if (each := value.get(key)) is not None:
                    check(of, each, f"{name}.{key}")
    return True


def _fits_quietly(shape: Shape, value: Any, name: str) -> bool:
    try:
        return _fits(shape, value, name)
    except ValueError:
        return False


def _is_sound(text: str) -> bool:
    if text.isascii():
        return True
    try:
        text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return False
    return True


def _is_moment(text: str, years: range) -> bool:
    # 64 characters are more than any time has. 3.10's fromisoformat doesn't know the Z.
    try:
        return len(text) <= 64 and datetime.fromisoformat(text.replace("Z", "+00:00")).year in years
    except ValueError:
        return False


def _shown(value: Any) -> str:
    """Return the beginning of `value`: a text may have 80 million letters."""
    if isinstance(value, str):
        return repr(value[:40])
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value) if value.bit_length() < 128 else "a number out of all bounds"
    if isinstance(value, (list, tuple)):
        return "a list"
    if isinstance(value, Mapping):
        return "an object"
    return repr(value) if value is None or isinstance(value, (bool, float)) else "no JSON"


def read_json(data: bytes | bytearray) -> Any:
    """Return the value of JSON. Raises ValueError for what isn't JSON or has too many values.

    79 MiB of `{}` would take 2 GB of memory, so a large text is counted before it is read.
    """
    if len(data) > _SMALL:
        left = VALUES_MAX
        for token in _TOKEN.finditer(data):
            if token.group()[:1] != b'"':
                left -= 1
                if left < 0:
                    raise ValueError(f"more than {VALUES_MAX} values")
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except ValueError as error:
        raise ValueError("no JSON") from error
