"""Every way a call to corra can fail, one class per kind of answer.

The first line of an error says which run, on which host, its FATE and why; its attributes say the
same. An error is an Invoke `Exit`: raised in a task it prints that line, sets the exit code and
shows no traceback.
"""

from __future__ import annotations

import contextlib
import copy
import os
import shlex
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from invoke.exceptions import Exit, UnexpectedExit
from invoke.runners import Result

if TYPE_CHECKING:
    from typing_extensions import Self

Started = Literal["no", "yes", "unknown"]

MISUSE = 2
NOT_WRITTEN = 121  # what corra had to print can't be written here
STILL_RUNNING = 122
LOST = 123
TIMED_OUT = 124
NOTHING_DONE = 125
NOT_EXECUTABLE = 126
NOT_FOUND = 127
EPIPE_CODE = 141  # 128 + SIGPIPE: the reader of our output has gone

_INDENT = " " * len("corra: ")


def line(label: str, host: str, fate: str, why: str = "") -> str:
    """Return `corra: RUN on HOST: FATE: why` without the empty parts: the grammar of every line.

    A why in parentheses is an aside, and stands behind a fate without a colon.
    """
    subject = f"{label} on {host}" if label and host else label or host
    if fate and why.startswith("("):
        fate, why = f"{fate} {why}", ""
    return plain(": ".join(part for part in ("corra", subject, fate, why) if part))


# Letters and marks that show nothing, and so let one name pass for another.
_BLANK = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0") | frozenset(
    map(chr, [*range(0x180B, 0x1810), *range(0xFE00, 0xFE10), *range(0xE0100, 0xE01F0)])
)


def is_seen(char: str) -> bool:
    """Return whether `char` shows itself and changes nothing beside itself on a terminal."""
    return char.isprintable() and char not in _BLANK


def plain(text: str) -> str:
    """Return `text` as one line that does nothing to a terminal.

    What a host, ssh or sudo said is quoted, never obeyed, and none of it is invisible.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        c if is_seen(c) else " " if c.isspace() else c.encode("unicode_escape").decode()
        for c in text
    )


# The programs whose command line the verbs are.
_PROGRAMS = ("corra", "inv", "invoke")


def typed() -> str:
    """Return the program as it was typed, for hints: `inv`, or `scripts/inv` where PATH lacks it.

    In any other program it is `corra`.
    """
    path = sys.argv[0] if sys.argv else ""
    name = os.path.basename(path)
    if name not in _PROGRAMS:
        return "corra"
    return name if path == name or _found(name, path) else shlex.quote(path)


def typed_with(flag: str, most: int = 160) -> str:
    """Return the command line as it was typed, with a core flag before its verb.

    It is cut with `..` beyond `most` characters. Empty in a program that isn't of the verbs.
    """
    path = sys.argv[0] if sys.argv else ""
    if os.path.basename(path) not in _PROGRAMS and not path.endswith("corra/__main__.py"):
        return ""
    line = f"{typed()} {flag} {shlex.join(sys.argv[1:])}"
    return line if len(line) <= most else f"{line[: most - 2].rpartition(' ')[0]} .."


def _found(name: str, path: str) -> bool:
    """Return whether a shell that looks `name` up in PATH finds the file at `path`."""
    for folder in os.environ.get("PATH", "").split(os.pathsep):
        found = os.path.join(folder or ".", name)
        if os.access(found, os.X_OK):
            with contextlib.suppress(OSError):
                return os.path.samefile(found, path)
    return False


class CorraError(Exit):
    """corra did not do what it was asked for.

    `why` completes the line. `hint` is up to three lines of facts and complete commands. `started`
    says whether the program may be running because of this call.
    """

    fate = "FAILED"
    exit_code = NOTHING_DONE
    started: Started = "no"
    # The Results of all hosts, for a step on several.
    results: Any = None

    def __init__(
        self,
        why: str = "",
        *,
        host: str = "",
        prog_id: str = "",
        label: str = "",
        hint: Sequence[str] = (),
        fate: str | None = None,
        kind: str = "",
        code: int | None = None,
    ) -> None:
        self.why = why
        self.host = host
        self.prog_id = prog_id
        self.label = label
        self.hint = tuple(hint)
        self.fate = type(self).fate if fate is None else fate
        self.kind = kind or _kind(type(self).__name__)
        super().__init__(message=None, code=self.exit_code if code is None else code)

    def but(self, **facts: Any) -> Self:
        """Return this error with other facts, to be raised from it.

        An error that was raised is never changed.
        """
        error = copy.copy(self)
        unknown = facts.keys() - error.__dict__.keys() - {"results"}
        if unknown:
            raise TypeError(f"an error has no {min(unknown)}")
        error.__dict__.update(facts)
        return error

    @property
    def line(self) -> str:
        """The one line that answers at 3 a.m."""
        return line(self.label, self.host, self.fate, self.why)

    @property
    def message(self) -> str:
        """The text that Invoke prints: the line and its hints."""
        return str(self)

    @message.setter
    def message(self, value: str | None) -> None:
        """Ignore what Invoke's `Exit.__init__` assigns: the message is computed."""

    def __str__(self) -> str:
        return "\n".join([self.line, *(_INDENT + plain(each) for each in self.hint)])

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle the error by its attributes, so that a process pool can hand it on."""
        return _again, (type(self), self.__dict__)

    def to_json(self) -> dict[str, Any]:
        """Return the object that `--json` prints for this error."""
        return {
            "v": 1,
            "type": "error",
            "kind": self.kind,
            "host": self.host or None,
            "prog_id": self.prog_id or None,
            "started": self.started,
            "message": self.line,
            "hint": list(self.hint),
            "exit_code": self.code,
        }


def _again(kind: type[CorraError], facts: dict[str, Any]) -> CorraError:
    error = kind.__new__(kind)
    error.__dict__.update(facts)
    return error


def _kind(name: str) -> str:
    return "".join("_" + c.lower() if c.isupper() else c for c in name).lstrip("_")


class Misuse(CorraError):
    """The call makes no sense; no host was asked."""

    fate = "NOT STARTED"
    exit_code = MISUSE


class Stop(CorraError):
    """A runbook's own decision not to go on."""

    fate = "STOPPED"


class NotStarted(CorraError):
    """The program was not started, for certain; the code is 126 or 127 where exec refused it."""

    fate = "NOT STARTED"


class HostKey(NotStarted):
    """The host's key is unknown, or differs from the known one."""


class Auth(NotStarted):
    """ssh or sudo didn't let us in. `here`: it was this machine's own sudo."""

    here: bool = False


class NoPython(NotStarted):
    """The host has no Python 3.6 or later, so the agent can't run there."""


class NoRoom(NotStarted):
    """No directory on the host can hold the agent or the spool."""


class Conflict(NotStarted):
    """The id names a run of another program already."""


class Unreachable(CorraError):
    """ssh failed before anything was asked; starting again with the same id is safe."""

    fate = "NOT STARTED"


class MaybeStarted(CorraError):
    """The link broke before the host confirmed the start; repeat it only with the same id."""

    fate = "MAYBE STARTED"
    exit_code = LOST
    started: Started = "unknown"


class Lost(CorraError):
    """How the run ended can't be known; corra never guesses."""

    fate = "LOST"
    exit_code = LOST
    started: Started = "yes"


class StillRunning(CorraError):
    """We stopped watching; the program goes on."""

    fate = "STILL RUNNING"
    exit_code = STILL_RUNNING
    started: Started = "yes"


class NotFound(CorraError):
    """No run answers to that id or name."""

    fate = "NOT FOUND"


class Ambiguous(CorraError):
    """Several runs answer to that name or prefix; nothing was done."""

    fate = "AMBIGUOUS"


class NotKilled(CorraError):
    """The order to stop could not be given."""

    fate = "NOT KILLED"
    started: Started = "yes"


class NotDead(CorraError):
    """KILL was sent and some processes live on."""

    fate = "NOT DEAD"
    exit_code = 1
    started: Started = "yes"


class NotSent(CorraError):
    """The bytes for the program's stdin were not delivered."""

    fate = "NOT SENT"
    started: Started = "yes"


class Changed(CorraError):
    """A runbook was continued with other parameters than it was begun with."""

    fate = "NOT CONTINUED"


class Failed(CorraError, UnexpectedExit):
    """The program ended badly; `except UnexpectedExit` catches it too.

    `result` is the `corra.Result`, with everything Invoke's own results have.
    """

    fate = "FAILED"
    started: Started = "yes"

    def __init__(self, why: str = "", *, result: Any, **facts: Any) -> None:
        CorraError.__init__(self, why, **facts)
        self.reason = None  # Invoke's UnexpectedExit has one
        # Invoke exits with the result's code and not with ours, and prints a hidden result's error
        # a second time. These two lines undo both.
        self.result = Result() if result is None else copy.copy(result)
        self.result.exited = self.code
        self.result.hide = ()

    def __str__(self) -> str:
        return CorraError.__str__(self)

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self.line}>"


class TimedOut(Failed):
    """The program's own timeout ended it."""

    fate = "TIMEOUT"
    exit_code = TIMED_OUT
