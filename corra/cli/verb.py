"""`Verb`: the one Task class behind every verb, and the command line Invoke's parser can't read.

Invoke has no optional positionals and splits nothing after `--`. It runs `inv kill --help` as a
kill of "--help", swallows `-w` in silence, takes a list flag without its value, and takes the
second value of `-s TERM -s KILL x` for an id (all tried). So a Verb reads its own words from
sys.argv, and gives Invoke one positional that eats exactly as many tokens: Invoke still decides
which tasks run, in which order. Nothing is refused while parsing, as a word of another task may
look like a verb; only a verb that Invoke calls refuses its words.

A verb's words end at `--` or at the name of another verb, so that `inv wait a status b` runs both.
A first id is always an id.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from invoke.context import Context
from invoke.exceptions import Exit
from invoke.parser.argument import Argument
from invoke.tasks import Task

from corra.errors import EPIPE_CODE, CorraError, Misuse, typed
from corra.terminal.signals import Interrupted, die_of

from .flags import HostFlags, RawFlag
from .help_page import help_lines, shown_doc
from .process import open_standard, printed
from .words import (
    Given,
    Line,
    count_tokens,
    cut_flag,
    flags_of,
    nearest,
    own_first,
    take_value,
)

if TYPE_CHECKING:
    from corra.remote.agent_client import Agent

G = TypeVar("G", bound=Given)

# Core flags of Invoke that take the next word. Before the verb they are stepped over; after it they
# are refused with that word.
CORE_WITH_VALUE = frozenset(
    {
        "-T",
        "--command-timeout",
        "-f",
        "--config",
        "--hide",
        "-D",
        "--list-depth",
        "-F",
        "--list-format",
    }
)
CORE_WITH_VALUE |= {"-c", "--collection", "-r", "--search-root", "--print-completion-script"}
# With one of these before the verb, Invoke shows something and runs nothing.
CORE_SHOWS = frozenset(
    {"-h", "--help", "-l", "--list", "-V", "--version", "--print-completion-script"}
)

_COMPLETED = 50  # the newest; more would scroll by

# The fate of a misuse of a verb that only looks.
_LOOKED = "NOT DONE"

VERBS: dict[str, Verb] = {}


class _Tokens(Argument):
    """The positional that eats as many tokens as the verb has words; its value is their meaning."""

    def __init__(self, line: Line) -> None:
        self._line = line
        self._left = line.tokens
        super().__init__(name="given", positional=True)

    @property
    def value(self) -> Any:
        return None if self._left > 0 else self._line.given

    @value.setter
    def value(self, arg: str) -> None:
        self._left -= 1


class Verb(Task):  # type: ignore[type-arg]
    """A task whose body is called as `body(c, given)`.

    `fate` opens its refusals. `ids` is how its help writes its ids, empty if it takes none, and
    `text` says whether the words behind the first id are text. `command`: it takes a command after
    `--`. `begin` makes the agent that the body needs, before the rest is imported.
    """

    # `given` is what `body` and `begin` take; mypy can't say so of an attribute.
    body: Callable[[Context, Any], int]
    begin: Callable[[Context, Any], Agent | None] | None

    def __init__(
        self,
        body: Callable[[Context, G], int],
        *,
        flags: type[G],
        ids: str,
        command: bool,
        text: bool,
        fate: str,
        begin: Callable[[Context, G], Agent | None] | None,
    ) -> None:
        super().__init__(body, positional=[])
        self.given = flags
        self.flags = flags_of(flags)
        self.ids = ids
        self.command = command
        self.text = text
        self.fate = fate
        self.begin = begin
        VERBS[self.name] = self

    # Written anew each time, with the program's name as it was typed.
    @property
    def __doc__(self) -> str:
        return shown_doc(self.body.__doc__ or "")

    @__doc__.setter  # noqa: A003
    def __doc__(self, text: str | None) -> None:
        """Invoke sets the body's own."""

    # -- Invoke asks every task for its arguments before it parses, prints a help or completes.
    def get_arguments(self, ignore_unknown_help: bool | None = None) -> list[Argument]:
        words = list(map(str, sys.argv[1:]))
        if "--complete" in words[: _end(words)]:
            self._complete(words[_end(words) + 1 :])
        elif (start := self.starts_at(words)) is not None:
            return [
                _Tokens(
                    self.read(
                        words[start : _end(words)],
                        command=words[_end(words) + 1 :] if "--" in words else None,
                    )
                )
            ]
        elif any(verb.starts_at(words) is not None for verb in VERBS.values()):
            # Another verb is called. Invoke would copy each of the 250 arguments, 15 ms of a start.
            return []
        return [flag.argument() for flag in self.flags]

    def starts_at(self, words: Sequence[str]) -> int | None:
        """Return the place of this verb's first word on the command line, None if not called."""
        at = 0
        while at < _end(words):
            word = words[at]
            if word.partition("=")[0] in CORE_SHOWS:
                return None
            if word.rpartition(".")[2] == self.name:
                return at + 1
            at += 2 if word in CORE_WITH_VALUE else 1
        return None

    # -- Reading
    def read(self, words: Sequence[str], command: Sequence[str] | None = None) -> Line:
        """Read the words after the verb. `command` is what follows `--`, None without a `--`."""
        given = self.given(self.name, list(command or ()))
        line = Line(given)
        known = {name: flag for flag in self.flags for name in flag.typed}
        seen: set[str] = set()
        todo = deque(enumerate(words))
        while todo:
            at, word = todo.popleft()
            word, *more = given.spelled_out(word)
            todo.extendleft((at, each) for each in reversed(more))
            name, value, rest = cut_flag(word, known)
            if name is None:
                # A first word is an id even if it is a verb's name. After it, a verb's name begins
                # that verb's own words.
                if (
                    word in VERBS
                    and word != self.name
                    and not self.command
                    and not given.help
                    and not _one_verb()
                    and (line.words or not self.ids)
                ):
                    words, command = words[:at], None
                    break
                line.words.append((at, word))
                if not word and self.ids and not (self.text and line.words):
                    line.refuse("an id is empty: is a variable unset?")
                given.ids.append(word)
                if self.command:
                    break
                continue
            flag = known.get(name)
            if flag is None:
                near = nearest(name, known) if name.startswith("--") else ""
                line.refuse(
                    f"{self.name} has no {name}{near};  "
                    f"{typed()} --help {self.name} lists its flags"
                )
                if name in CORE_WITH_VALUE and value is None and todo:
                    todo.popleft()
            elif flag.read is None:
                setattr(given, flag.key, True)
                if value is not None:
                    line.refuse(f"{name} takes no value")
                if rest:
                    todo.appendleft((at, "-" + rest))
            else:
                if value is None and todo and todo[0][1] not in known:
                    value = todo.popleft()[1]
                line.refuse(take_value(given, flag, name, value, seen))
        line.taken, line.tokens = len(words), sum(map(count_tokens, words))
        self._judge(line, words, command)
        given.refusal = line.refusal
        return line

    def _judge(self, line: Line, words: Sequence[str], command: Sequence[str] | None) -> None:
        """Refuse what is wrong with the line as a whole."""
        if not self.command:
            if line.words and not self.ids:
                line.refuse(
                    f"{self.name} takes no word: {line.words[0][1]!r};  "
                    f"a host is  {typed()} {self.name} --host HOST"
                )
            if command is not None:
                line.refuse(f"{self.name} takes no -- and no command")
        elif line.words and command is None:
            at = command_at = line.words[0][0]
            host = [] if _has_host(line) else ["--host", "HOST"]
            if host and len(words) > at + 1:  # the first of several words is the host, as for ssh
                host, command_at = ["--host", words[at]], at + 1
            meant = shlex.join([self.name, *words[:at], *host, "--", *words[command_at:]])
            line.refuse(f"no -- before the command:  {typed()} {meant}")
        elif line.words:
            line.refuse(f"{line.words[0][1]!r} stands before the --;  the command goes after it")
        elif not command and not line.given.help:
            host = [] if _has_host(line) else ["--host", "HOST"]
            meant = shlex.join([self.name, *words, *host])
            line.refuse(f"no command:  {typed()} {meant} -- COMMAND")

    # -- Calling
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the verb with what was read of the command line, as Invoke does.

        From Python it is `kill(c, "k7m2qx", grace="0s")`.
        """
        open_standard()
        context = args[0] if args else None
        if not isinstance(context, Context):
            raise TypeError(
                f"{self.name} is a task: its first argument is the Context, "
                f"not {type(context).__name__}"
            )
        given = (
            kwargs["given"]
            if isinstance(kwargs.get("given"), Given)
            else self._from_python(args[1:], kwargs)
        )
        if given.help:
            with printed():
                self.show_help()
            return None
        given.dry = given.dry or bool(context.config.run.get("dry"))
        given.echo = given.echo or bool(context.config.run.get("echo"))
        given.hide = given.hide or context.config.run.get("hide")
        self.times_called += 1
        return self.perform(context, given)

    def perform(self, context: Context, given: Given) -> Any:
        """Call the body. The Screen says what goes wrong; Invoke gets the exit code alone."""
        if self.begin is not None and not given.refusal:
            given.agent = self.begin(context, given)
        from corra.terminal.screen import Gone, Screen

        raw = isinstance(given, RawFlag) and given.raw
        screen = given.screen = Screen(json=given.json, quiet=given.quiet, raw=raw)
        code = 0
        try:
            if given.refusal:
                raise Misuse(given.refusal, fate=self.fate)
            _fill(context, given)
            with screen.warnings():
                code = self.body(context, given) or 0
        except CorraError as error:
            screen.error(self.with_fate(error))
            code = error.code
        except Gone as gone:
            if not gone.said and gone.code != EPIPE_CODE:
                screen.say_unread("", "", "", gone.why("the answer"))
            code = gone.code
        except (KeyboardInterrupt, Interrupted):
            screen.close()
            die_of("SIGINT")
        finally:
            screen.close()
            screen.last.close()
        if code:
            raise Exit(code=code)

    def with_fate(self, error: CorraError) -> CorraError:
        """Return `error` with this verb's fate where what raised it didn't know the verb."""
        misused = isinstance(error, Misuse) and error.fate in (Misuse.fate, _LOOKED)
        unreached = not error.fate and self.fate != _LOOKED
        return error.but(fate=self.fate) if misused or unreached else error

    def _from_python(self, ids: Sequence[str], flags: Mapping[str, Any]) -> Given:
        line = self.read([], command=flags.get("argv") or ["-"])
        known = {flag.key: flag for flag in self.flags}
        line.given.ids = [*ids, *flags.get("ids", ())]
        line.given.argv = list(flags.get("argv") or ())
        for name, value in flags.items():
            if name in ("ids", "argv"):
                continue
            if name not in known:
                raise TypeError(f"{self.name}() got an unexpected keyword argument {name!r}")
            read = known[name].read
            setattr(
                line.given,
                name,
                read(value) if read and isinstance(value, str) and not known[name].many else value,
            )
        line.given.refusal = ""
        return line.given

    def show_help(self) -> None:
        """Print the verb's page of help."""
        words = ("-- COMMAND [WORD..]" if self.command else self.ids).strip()
        usage = f"{typed()} {self.name} [flags] {words}".rstrip()
        print("\n".join(help_lines(usage, self.__doc__, own_first(self.given))))

    # -- Completing
    def _complete(self, typed: Sequence[str]) -> None:
        """Print the ids and names that complete the typed word, or leave that to Invoke."""
        if not self.ids or not any(word.rpartition(".")[2] == self.name for word in typed):
            return
        start = self.starts_at(typed[1:])
        if start is None or (typed[-1].startswith("-")):
            return
        mine = typed[1 + start :]
        known = {name: flag for flag in self.flags for name in flag.typed}
        if len(mine) > 1 and (flag := known.get(mine[-2])) is not None and flag.read is not None:
            return
        from corra.model import ids
        from corra.runs import history

        begun = mine[-1] if mine else ""
        for entry in history.recent_entries(_COMPLETED):
            for word in {entry.name, ids.short(entry.prog_id)}:
                if word and word.startswith(begun):
                    print(word)
        raise Exit(code=0)


def _fill(context: Context, given: Given) -> None:
    """Take from the configuration what wasn't given, where it means the same to every verb."""
    if isinstance(given, HostFlags) and given.spool is None:
        from corra.settings import setting

        given.spool = setting(context.config, "spool")


def verb(
    flags: type[G],
    *,
    ids: str = "",
    command: bool = False,
    text: bool = False,
    fate: str = _LOOKED,
    begin: Callable[[Context, G], Agent | None] | None = None,
) -> Callable[[Callable[[Context, G], int]], Verb]:
    """Make a Verb of a function, as `@task` makes a Task."""
    return lambda body: Verb(
        body, flags=flags, ids=ids, command=command, text=text, fate=fate, begin=begin
    )


def _one_verb() -> bool:
    """Return whether the program is `corra`, which runs one verb a call; `inv` runs several."""
    return os.path.basename(sys.argv[0]) in ("corra", "__main__.py")


def _has_host(line: Line) -> bool:
    """Return whether a host is given, by flag or by variable."""
    return bool(getattr(line.given, "host", None) or os.environ.get("CORRA_HOST"))


def _end(words: Sequence[str]) -> int:
    """Return where the first `--` stands, as Invoke looks for it, or the end."""
    return words.index("--") if "--" in words else len(words)
