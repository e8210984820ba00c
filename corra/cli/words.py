"""Flags, and one verb's command line read by them.

A verb's flags are the attributes of a class below `Given`:

    class KillFlags(HostFlags):
        grace = option("grace", read=read_seconds, help="From the stop signal to KILL (10s).")

That one line is the flag's spelling, its help, its reader, the keyword from Python
(`kill(c, "k7m2qx", grace="0s")`) and the type of `given.grace`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Generic, TypeVar, overload

from invoke.parser.argument import Argument

from corra.errors import Misuse, typed

if TYPE_CHECKING:
    from corra.remote.agent_client import Agent
    from corra.terminal.screen import Screen

T = TypeVar("T")


class Flag(Generic[T]):
    """One flag of a verb, and the attribute of `Given` that holds its value.

    `read` turns text into the value and raises ValueError or Misuse. Without `read` it is a switch.
    `takes` stands for the value in the help: `SIZE`.
    """

    key: str

    def __init__(
        self,
        names: tuple[str, ...],
        help: str,  # noqa: A002 - Invoke's own word for it
        read: Callable[[str], Any] | None,
        default: Any,
        *,
        takes: str = "",
        many: bool = False,
    ) -> None:
        self.names = names
        self.takes = takes
        self.help = help
        self.read = read
        self.default = default
        self.many = many

    def __set_name__(self, owner: type[Given], name: str) -> None:
        self.key = name

    @overload
    def __get__(self, given: None, owner: type[Given]) -> Flag[T]: ...
    @overload
    def __get__(self, given: Given, owner: type[Given]) -> T: ...
    def __get__(self, given: Given | None, owner: type[Given]) -> Flag[T] | T:
        if given is None:
            return self
        value: T = given.__dict__[self.key]
        return value

    def __set__(self, given: Given, value: T) -> None:
        given.__dict__[self.key] = value

    @property
    def typed(self) -> tuple[str, ...]:
        return tuple(_dashed(name) for name in self.names)

    def argument(self) -> Argument:
        """Return what Invoke's help and completion need to know."""
        kind: Any = list if self.many else str if self.read else bool
        return Argument(
            names=self.names,
            kind=kind,
            help=as_typed(self.help),
            default=False if kind is bool else None,
            attr_name=self.names[0].replace("-", "_") if "-" in self.names[0] else None,
        )


# `help` is Invoke's own word for it.
def switch(*names: str, help: str) -> Flag[bool]:  # noqa: A002
    return Flag(names, help, None, default=False)


@overload
def option(*names: str, takes: str, help: str) -> Flag[str | None]: ...
@overload
def option(*names: str, takes: str, help: str, default: str) -> Flag[str]: ...
@overload
def option(*names: str, takes: str, help: str, read: Callable[[str], T]) -> Flag[T | None]: ...
@overload
def option(*names: str, takes: str, help: str, read: Callable[[str], T], default: T) -> Flag[T]: ...
def option(
    *names: str,
    takes: str,
    help: str,  # noqa: A002
    read: Callable[[str], Any] = str,
    default: Any = None,
) -> Flag[Any]:
    return Flag(names, help, read, default, takes=takes)


@overload
def listing(*names: str, takes: str, help: str) -> Flag[list[str]]: ...
@overload
def listing(*names: str, takes: str, help: str, read: Callable[[str], T]) -> Flag[list[T]]: ...
def listing(
    *names: str,
    takes: str,
    help: str,  # noqa: A002
    read: Callable[[str], Any] = str,
) -> Flag[Any]:
    return Flag(names, help, read, [], takes=takes, many=True)


def one_of(*choices: str) -> Callable[[str], str]:
    """Return a reader of one of these words."""

    def read(text: str) -> str:
        if text not in choices:
            raise Misuse(
                f"not {', '.join(choices[:-1])} or {choices[-1]}: {text!r}{nearest(text, choices)}"
            )
        return text

    return read


read_hidden = one_of("stdout", "stderr", "both", "out", "err")


class Given:
    """What a verb was given: its words, and the value of each of its flags.

    The flags here are those of every verb. Invoke's own -e, -R and --hide count behind the verb as
    well as before it.
    """

    json = switch("json", help="One JSON object per line on stdout, errors too.")
    quiet = switch("quiet", "q", help="Say nothing on stderr unless something is wrong.")
    dry = switch("dry", "R", help="Say what would be done; ask no host.")
    echo = switch("echo", "e", help="Say what is done before doing it.")
    hide = option(
        "hide",
        takes="STREAM",
        read=read_hidden,
        help="Hide the program's stdout, stderr or both.",
    )
    help = switch("help", "h", help="Show this and exit.")

    screen: Screen
    # The way to the one host that a command line names, begun before the verb's body.
    agent: Agent | None = None
    refusal = ""

    def __init__(self, verb: str, argv: list[str]) -> None:
        self.verb = verb
        self.ids: list[str] = []
        self.argv = argv
        for flag in flags_of(type(self)):
            self.__dict__[flag.key] = list(flag.default) if flag.many else flag.default

    @classmethod
    def spelled_out(cls, word: str) -> tuple[str, ...]:
        """Return the words that a word of this verb is short for, most often itself."""
        return (word,)


def refuse_without_id(given: Given) -> None:
    """Raise Misuse for a verb that was given no id."""
    if not given.ids:
        raise Misuse(f"{given.verb} needs an id;  look: {typed()} ps", fate="NOT DONE")


def flags_of(kind: type[Given]) -> tuple[Flag[Any], ...]:
    """Return the flags of a class and of those it inherits from."""
    found = {
        name: flag
        for each in reversed(kind.__mro__)
        for name, flag in vars(each).items()
        if isinstance(flag, Flag)
    }
    return tuple(found.values())


def own_first(kind: type[Given]) -> tuple[Flag[Any], ...]:
    """Return the same flags for a reader: the verb's own first, those of every verb last."""
    found: dict[str, Flag[Any]] = {}
    for each in kind.__mro__:
        for name, flag in vars(each).items():
            if isinstance(flag, Flag):
                found.setdefault(name, flag)
    return tuple(found.values())


class Line:
    """A verb's words as typed: their meaning, their number, and what is wrong with them.

    `tokens` is how many words Invoke's parser takes them for.
    """

    def __init__(self, given: Given) -> None:
        self.given = given
        self.taken = 0
        self.tokens = 0
        self.refusal = ""
        self.words: list[tuple[int, str]] = []

    def refuse(self, why: str) -> None:
        """Note what is wrong; the verb reports the first refusal."""
        self.refusal = self.refusal or why


def as_typed(text: str) -> str:
    """Return a help text with the program's name as it was typed."""
    return re.sub(r"\binv\b", typed(), text)


def nearest(word: str, known: Iterable[str]) -> str:
    """Return ` (did you mean KNOWN?)` for the known word that is most like it, or nothing."""
    import difflib

    found = {each.lower().lstrip("-"): each for each in known}
    # `rum` is 0.67 of `run`.
    near = difflib.get_close_matches(word.lower().lstrip("-"), found, 1, 0.66)
    return f" (did you mean {found[near[0]]}?)" if near else ""


def _dashed(name: str) -> str:
    return f"-{name}" if len(name) == 1 else f"--{name}"


def cut_flag(word: str, known: Mapping[str, Flag[Any]]) -> tuple[str | None, str | None, str]:
    """Return (flag, value, further short flags) of `--grace=5`, `-n5`, `-qa`.

    A word that is no flag gives (None, None, "").
    """
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


def take_value(given: Given, flag: Flag[Any], name: str, value: str | None, seen: set[str]) -> str:
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
        given.__dict__[flag.key].append(read)
    else:
        given.__dict__[flag.key] = read
    return ""


def count_tokens(word: str) -> int:
    """Return how many tokens Invoke's parser makes of `word` while it knows none of its flags."""
    if not word.startswith("-"):
        return 1
    _, equals, value = word.partition("=")
    if equals:
        return 1 + count_tokens(value)
    return len(word) - 1 if len(word) > 2 and not word.startswith("--") else 1
