"""Flags, and the words of one verb's command line read with them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple

from invoke.parser.argument import Argument

from corra.errors import Misuse


class Flag(NamedTuple):
    """One flag of a verb. `read` makes its value of the text and raises ValueError or Misuse; without it the flag is a switch."""

    names: tuple[str, ...]
    help: str
    read: Callable[[str], Any] | None = None
    default: Any = None
    many: bool = False

    @property
    def key(self) -> str:
        return self.names[0].replace("-", "_")

    @property
    def typed(self) -> tuple[str, ...]:
        return tuple(_dashed(name) for name in self.names)

    def argument(self) -> Argument:
        """Return what Invoke's help and completion need to know."""
        kind: Any = list if self.many else str if self.read else bool
        return Argument(
            names=self.names,
            kind=kind,
            help=self.help,
            default=False if kind is bool else None,
            attr_name=self.key if "-" in self.names[0] else None,
        )


def switch(*names: str, help: str) -> Flag:  # noqa: A002 - Invoke's own word for it
    return Flag(names, help, default=False)


def option(*names: str, help: str, read: Callable[[str], Any] = str, default: Any = None) -> Flag:  # noqa: A002
    return Flag(names, help, read, default)


def listing(*names: str, help: str, read: Callable[[str], Any] = str) -> Flag:  # noqa: A002
    return Flag(names, help, read, [], many=True)


class _Shown(Argument):
    """An argument that is only looked at: Invoke copies each one it has, twice a call, which took longer than all else of ours."""

    def __deepcopy__(self, memo: object) -> _Shown:
        return self


class Given(SimpleNamespace):
    """What was given to a verb: its name, an attribute per flag, `ids`, and for `run` the `argv`."""

    verb: str
    ids: list[str]
    argv: list[str]
    refusal: str = ""


class Line:
    """A verb's words as typed: what they mean, how many they are and how many of Invoke's tokens, and what is wrong with them."""

    def __init__(self, given: Given) -> None:
        self.given = given
        self.taken = 0
        self.tokens = 0
        self.refusal = ""
        self.words: list[tuple[int, str]] = []

    def refuse(self, why: str) -> None:
        """Note what is wrong; the first thing is what is said."""
        self.refusal = self.refusal or why


def _dashed(name: str) -> str:
    return f"-{name}" if len(name) == 1 else f"--{name}"


def cut_flag(word: str, known: Mapping[str, Flag]) -> tuple[str | None, str | None, str]:
    """Return (flag, value, further short flags) of `--grace=5`, `-n5`, `-qa`, or (None, None, "") for a word."""
    if not word.startswith("-") or word == "-":
        return None, None, ""
    name, equals, value = word.partition("=")
    if word.startswith("--") or (equals and len(name) == 2):
        return name, value if equals else None, ""
    short, rest = word[:2], word[2:]
    flag = known.get(short)
    if flag is not None and flag.read is not None and rest:
        return short, rest, ""
    return short, None, rest if flag is not None else ""


def take_value(given: Given, flag: Flag, name: str, value: str | None, seen: set[str]) -> str:
    """Put `value` into `given`; return what is wrong with it, or nothing."""
    if not value:
        return f"{name} needs a value"
    if flag.key in seen and not flag.many:
        return f"{name} is given twice"
    seen.add(flag.key)
    assert flag.read is not None
    try:
        read = flag.read(value)
    except Misuse as error:
        return f"{name}: {error.why}"
    except ValueError:
        return f"{name}: not a number: {value!r}"
    if flag.many:
        getattr(given, flag.key).append(read)
    else:
        setattr(given, flag.key, read)
    return ""


def count_tokens(word: str) -> int:
    """Return how many tokens Invoke's parser makes of `word` while it knows none of the flags in it."""
    if not word.startswith("-"):
        return 1
    _, equals, value = word.partition("=")
    if equals:
        return 1 + count_tokens(value)
    return len(word) - 1 if len(word) > 2 and not word.startswith("--") else 1
