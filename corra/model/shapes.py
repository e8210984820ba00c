"""Shapes: what the JSON of a host, a journal or a collector must look like, as data.

`check` holds a value to a Shape and `read_json` reads bytes within bounds. Both raise ValueError.
The tests make documents of the same Shapes, good ones and spoiled ones.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
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
_TOKEN = rb'"(?:[^"\\]|\\.)*"|[\[{,]'


class Text(NamedTuple):
    """A string of at most so many characters. Half a character (a lone surrogate) is none."""

    most: int = 4096

    def holds(self, value: Any) -> bool:
        return (
            type(value) is str and len(value) <= self.most and (value.isascii() or _is_sound(value))
        )


class Word(NamedTuple):
    """A string that the pattern matches."""

    pattern: re.Pattern[str]

    def holds(self, value: Any) -> bool:
        return type(value) is str and self.pattern.fullmatch(value) is not None


class Whole(NamedTuple):
    least: int = 0
    most: int = WHOLE_MAX

    def holds(self, value: Any) -> bool:
        return type(value) is int and self.least <= value <= self.most


class Real(NamedTuple):
    least: float = 0.0
    most: float = SECONDS_MAX

    def holds(self, value: Any) -> bool:
        return type(value) in (int, float) and self.least <= value <= self.most


class Flag(NamedTuple):
    only: tuple[bool, ...] = (False, True)

    def holds(self, value: Any) -> bool:
        return type(value) is bool


class Moment(NamedTuple):
    """A time as ISO 8601."""

    years: range = _YEARS

    def holds(self, value: Any) -> bool:
        # 64 characters are more than any time has. 3.10's fromisoformat doesn't know the Z.
        try:
            return (
                type(value) is str
                and len(value) <= 64
                and datetime.fromisoformat(value.replace("Z", "+00:00")).year in self.years
            )
        except ValueError:
            return False


class Listed(NamedTuple):
    of: Shape
    most: int = VALUES_MAX

    def holds(self, value: Any) -> bool:
        return (
            isinstance(value, (list, tuple))
            and len(value) <= self.most
            and all(map(self.of.holds, value))
        )


class Mapped(NamedTuple):
    """An object whose keys may have any name."""

    of: Shape
    most: int = VALUES_MAX

    def holds(self, value: Any) -> bool:
        return (
            isinstance(value, Mapping)
            and len(value) <= self.most
            and all(map(_KEY.holds, value))
            and all(map(self.of.holds, value.values()))
        )


class Maybe(NamedTuple):
    """A value of that shape, or null."""

    of: Shape

    def holds(self, value: Any) -> bool:
        return value is None or self.of.holds(value)


class Either(NamedTuple):
    shapes: tuple[Shape, ...]

    def holds(self, value: Any) -> bool:
        return any(each.holds(value) for each in self.shapes)


class Object(NamedTuple):
    """An object; null stands for a missing key, and a newer peer's keys are left aside."""

    fields: Mapping[str, Shape]
    needed: tuple[str, ...] = ()

    def holds(self, value: Any) -> bool:
        if not isinstance(value, Mapping):
            return False
        for key in self.needed:
            if value.get(key) is None:
                return False
        for key, of in self.fields.items():
            if (each := value.get(key)) is not None and not of.holds(each):
                return False
        return True


Shape = Text | Word | Whole | Real | Flag | Moment | Listed | Mapped | Maybe | Either | Object
_KEY = Text(WORD_MAX)


def check(shape: Shape, value: Any, name: str = "it") -> None:
    """Raise ValueError, with the name of the value, where `value` isn't of that shape."""
    # A list has a million values, and nearly all lists are right: names are made for wrong ones.
    if not shape.holds(value):
        raise ValueError(_complaint(shape, value, name))


def _complaint(shape: Shape, value: Any, name: str) -> str:
    """Return which part of `value`, which isn't of that shape, is wrong."""
    parts: Iterable[tuple[Shape, Any, str]] = ()
    match shape:
        case Listed(of, most) if isinstance(value, (list, tuple)) and len(value) <= most:
            parts = ((of, each, f"{name}[]") for each in value)
        case Mapped(of, most) if isinstance(value, Mapping) and len(value) <= most:
            parts = (
                part
                for key, each in value.items()
                for part in (
                    (_KEY, key, f"a key of {name}"),
                    (of, each, f"{name}.{str(key)[:40]}"),
                )
            )
        case Maybe(of):
            return _complaint(of, value, name)
        case Object(fields, needed) if isinstance(value, Mapping):
            for key in needed:
                if value.get(key) is None:
                    return f"{name} has no {key}"
            parts = (
                (of, each, f"{name}.{key}")
                for key, of in fields.items()
                if (each := value.get(key)) is not None
            )
    for of, each, where in parts:
        if not of.holds(each):
            return _complaint(of, each, where)
    return f"{name} is {_shown(value)}"


def _is_sound(text: str) -> bool:
    try:
        text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return False
    return True


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


def read_json(data: bytes | bytearray | str) -> Any:
    """Return the value of JSON. Raises ValueError for what isn't JSON or has too many values.

    79 MiB of `{}` would take 2 GB of memory, so a large text is counted before it is read.
    """
    if len(data) > _SMALL:
        if isinstance(data, str):
            data = data.encode()
        left = VALUES_MAX
        for token in re.finditer(_TOKEN, data, re.DOTALL):
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
