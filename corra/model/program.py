"""What to run, and where: the values a run is made of. No I/O here.

argv never becomes a shell string: words that aren't UTF-8 travel as surrogateescape, and whoever wants a shell asks for `["sh", "-c", ...]`.
"""

from __future__ import annotations

import enum
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from corra.errors import Misuse


class Open(enum.Enum):
    """A stdin that is held open: what the program reads is sent while it runs."""

    OPEN = "open"


OPEN = Open.OPEN


@dataclass(frozen=True)
class Program:
    """argv, cwd, env, stdin and the rest of what exec needs: what to run."""

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
                "on a terminal of its own there is no other stdin, and stdout and stderr are one stream anyway"
            )

    @property
    def takes_more(self) -> bool:
        """Whether something may be sent to it while it runs."""
        return self.pty or (isinstance(self.stdin, Mapping) and bool(self.stdin.get("open")))

    def to_json(self) -> dict[str, Any]:
        """Return the `program` object of program.json, without what is left at its default."""
        everything: dict[str, Any] = {
            "cwd": self.cwd,
            "env": dict(self.env),
            "env_inherit": list(self.env_inherit)
            if isinstance(self.env_inherit, tuple)
            else self.env_inherit,
            "stdin": self.stdin,
            "umask": self.umask,
            "merge": self.merge,
            "limits": {
                name: list(value) if isinstance(value, Sequence) else value
                for name, value in self.limits.items()
            },
            "pty": self.pty,
        }
        defaults: dict[str, Any] = {
            "env": {},
            "env_inherit": True,
            "merge": False,
            "limits": {},
            "pty": False,
        }
        return {
            "argv": list(self.argv),
            **{k: v for k, v in everything.items() if v != defaults.get(k)},
        }


@dataclass(frozen=True)
class Request:
    """All that `start` needs: the id made by the client, the program, and how the run is to be kept."""

    prog_id: str
    program: Program
    name: str | None = None
    origin: Mapping[str, str] = field(default_factory=dict)
    timeout_s: float | None = None
    grace_s: float | None = None
    stop_signal: str | None = None
    keep_s: float | None = None
    keep_output: int | None = None
    wait_children: bool = False
    force: bool = False
    forget_stdin: bool = False
    terminal: Mapping[str, Any] = field(
        default_factory=dict
    )  # of a program with a pty: rows, columns, term
    secrets: Mapping[str, str] = field(
        default_factory=dict, repr=False
    )  # a traceback may show what it holds
    spool: str | None = None
    callback: Mapping[str, Any] = field(default_factory=dict, repr=False)  # has a token in it
    config: Mapping[str, float] = field(default_factory=dict)
    courier: str | None = field(
        default=None, repr=False
    )  # the source of courier.py, where there is a callback

    def to_json(self) -> dict[str, Any]:
        """Return the request that the agent's `start` and `run` read."""
        run = {
            "timeout": self.timeout_s,
            "grace": self.grace_s,
            "stop_signal": self.stop_signal,
            "keep": self.keep_s,
            "keep_output": self.keep_output,
            "wait_children": self.wait_children or None,
            "force": self.force or None,
            "forget_stdin": self.forget_stdin or None,
            "terminal": dict(self.terminal) or None,
        }
        whole: dict[str, Any] = {
            "prog_id": self.prog_id,
            "name": self.name,
            # Their names alone, so that whoever starts it again can be told what is missing.
            "origin": {
                **self.origin,
                **({"secrets": ",".join(sorted(self.secrets))} if self.secrets else {}),
            },
            "program": self.program.to_json(),
            "run": {k: v for k, v in run.items() if v is not None},
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
        """Return the request that asks for the same once more, from the program.json of a run; `more` are fields it doesn't hold.

        Where it was kept, by what, and whom it reported to is left behind. Raises Misuse for what a newer corra has written.
        """
        program = {k: v for k, v in record["program"].items() if k != "host" and v is not None}
        run = {
            k: v for k, v in (record.get("run") or {}).items() if k != "carrier" and v is not None
        }
        known = {f.name for f in fields(cls)}
        told = {f"{name}_s" if f"{name}_s" in known else name: value for name, value in run.items()}
        unknown = [*(set(program) - {f.name for f in fields(Program)}), *(set(told) - known)]
        if unknown:
            raise Misuse(f"its record says {min(unknown)}, which this corra doesn't know")
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in program.items()
        }
        return cls(
            prog_id, Program(**values), name=record.get("name"), origin=origin, **told, **more
        )


def _is_bytes(text: str) -> bool:
    """Return whether `text` stands for some bytes: UTF-8, with surrogateescape for what isn't."""
    try:
        text.encode(errors="surrogateescape")
    except UnicodeEncodeError:
        return False
    return True


def argv_words(argv: Sequence[str | bytes | os.PathLike[str]]) -> tuple[str, ...]:
    """Return `argv` as a Program takes it; a bare string is refused, since it would be split into letters."""
    if isinstance(argv, (str, bytes)):
        raise Misuse(f'argv must be a list of words: ["sh", "-c", {argv!r}] asks for a shell')
    try:
        return tuple(os.fsdecode(word) for word in argv)
    except TypeError as error:
        raise Misuse(f"argv must be a list of words: {error}") from error
