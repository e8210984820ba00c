"""What to run: the values that a start is made of.

argv never becomes a shell string; whoever wants a shell asks for `["sh", "-c", ...]`. Words that
aren't UTF-8 travel as surrogateescape.
"""

from __future__ import annotations

import enum
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, field, fields
from typing import Any

from corra.errors import Misuse

from .light_dataclass import light_dataclass
from .options import RUN_KEYS


class Open(enum.Enum):
    """A stdin that is held open: its bytes are sent while the program runs."""

    OPEN = "open"


OPEN = Open.OPEN

# Gives its next word to the user's own shell on the host, as sshd would.
USERS_SHELL = ("sh", "-c", 'exec "${SHELL:-/bin/sh}" -c "$0"')


def command_text(argv: Sequence[str]) -> str:
    """Return a command as its operator typed it: a line for the user's shell is that line."""
    if tuple(argv[:-1]) == USERS_SHELL:
        return argv[-1]
    return shlex.join(argv)


@light_dataclass(frozen=True)
class Program:
    """What to run: argv, cwd, env, stdin and the rest that exec needs."""

    argv: tuple[str, ...]
    cwd: str | None = None
    env: Mapping[str, str | None] = field(default_factory=dict)
    env_inherit: bool | tuple[str, ...] = True
    stdin: str | Mapping[str, Any] | None = None
    umask: int | None = None
    merge: bool = False
    limits: Mapping[str, int | Sequence[int]] = field(default_factory=dict)
    pty: bool = False

    def __post_init__(self) -> None:
        if not self.argv or not self.argv[0]:
            raise Misuse("no command given")
        if any("\0" in word for word in self.argv):
            raise Misuse(
                "a word of the command has a NUL byte in it, which no program can be given"
            )
        if not all(map(_is_bytes, self.argv)):
            raise Misuse(
                "a word of the command has a lone surrogate in it, which stands for no byte"
            )
        if self.cwd is not None and ("\0" in self.cwd or not _is_bytes(self.cwd)):
            raise Misuse(f"not a directory: {self.cwd!r}")
        if self.cwd and self.cwd.startswith("~") and self.cwd[1:2] not in ("", "/"):
            raise Misuse(
                f"not a directory: {self.cwd!r} (only ~ alone is a home: say ~/x or /home/x)"
            )
        for name, value in self.env.items():
            text = value or ""
            if (
                not name
                or "=" in name
                or "\0" in name
                or "\0" in text
                or not _is_bytes(name + text)
            ):
                raise Misuse(f"not an environment variable: {name!r}")
        if self.pty and (self.stdin is not None or self.merge):
            raise Misuse(
                "on a terminal of its own there is no other stdin,"
                " and stdout and stderr are one stream anyway"
            )

    @property
    def takes_more(self) -> bool:
        """Whether bytes may be sent to the program while it runs."""
        return self.pty or (isinstance(self.stdin, Mapping) and bool(self.stdin.get("open")))

    def to_json(self) -> dict[str, Any]:
        """Return the `program` object of program.json, without defaults."""
        said = {
            each.name: getattr(self, each.name)
            for each in fields(self)
            if getattr(self, each.name) != _default(each)
        }
        return {name: _plain(value) for name, value in said.items()}


def _default(each: Field[Any]) -> Any:
    return each.default if each.default_factory is MISSING else each.default_factory()


def _plain(value: Any) -> Any:
    """Return a field's value as JSON has it."""
    if isinstance(value, Mapping):
        return {name: _plain(each) for name, each in value.items()}
    return list(value) if isinstance(value, tuple) else value


@light_dataclass(frozen=True)
class Request:
    """All that `start` needs: the id made by the client, the program, how to keep the run."""

    prog_id: str
    program: Program
    name: str | None = None
    origin: Mapping[str, str] = field(default_factory=dict)
    run: Mapping[str, Any] = field(default_factory=dict)  # the options of OPTIONS, and `terminal`
    secrets: Mapping[str, str] = field(
        default_factory=dict, repr=False
    )  # a traceback may show what it holds
    spool: str | None = None
    fleet: str | None = None  # the Plan of the fleet that the run belongs to, as text
    callback: Mapping[str, Any] = field(default_factory=dict, repr=False)  # has a token in it
    config: Mapping[str, float] = field(default_factory=dict)
    courier: str | None = field(
        default=None, repr=False
    )  # the source of courier.py, where there is a callback

    def to_json(self) -> dict[str, Any]:
        """Return the request that the agent's `start` and `run` read."""
        whole: dict[str, Any] = {
            "prog_id": self.prog_id,
            "name": self.name,
            # Only the names of secrets, so that `again` can say which are missing.
            "origin": {
                **self.origin,
                **({"secrets": ",".join(sorted(self.secrets))} if self.secrets else {}),
            },
            "fleet": self.fleet,
            "program": self.program.to_json(),
            "run": {k: v for k, v in self.run.items() if v is not None and v is not False},
            "secrets": {"env": dict(self.secrets)} if self.secrets else {},
            "spool": self.spool,
            "callback": dict(self.callback),
            "config": dict(self.config),
            "courier": self.courier,
        }
        return {k: v for k, v in whole.items() if v}

    @classmethod
    def from_record(
        cls, record: Mapping[str, Any], prog_id: str, *, origin: Mapping[str, str], **more: Any
    ) -> Request:
        """Return the request for the same program again, from the program.json of a run.

        `more` are fields that the record doesn't hold. The spool, the carrier and the callback of
        the old run are left out. Raises Misuse for a record of a newer corra.
        """
        program = {k: v for k, v in record["program"].items() if k != "host" and v is not None}
        run = {
            k: v for k, v in (record.get("run") or {}).items() if k != "carrier" and v is not None
        }
        unknown = [*(set(program) - {f.name for f in fields(Program)}), *(set(run) - RUN_KEYS)]
        if unknown:
            raise Misuse(f"its record says {min(unknown)}, which this corra doesn't know")
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in program.items()
        }
        return cls(
            prog_id, Program(**values), name=record.get("name"), origin=origin, run=run, **more
        )


def _is_bytes(text: str) -> bool:
    """Return whether `text` stands for bytes: UTF-8, with surrogateescape for the rest."""
    try:
        text.encode(errors="surrogateescape")
    except UnicodeEncodeError:
        return False
    return True


def argv_words(argv: Sequence[str | bytes | os.PathLike[str]]) -> tuple[str, ...]:
    """Return `argv` as a Program takes it.

    Raises Misuse for a bare string, which would be split into letters.
    """
    if isinstance(argv, (str, bytes)):
        raise Misuse(f'argv must be a list of words: ["sh", "-c", {argv!r}] asks for a shell')
    try:
        return tuple(os.fsdecode(word) for word in argv)
    except TypeError as error:
        raise Misuse(f"argv must be a list of words: {error}") from error
