"""What to run, and where: the values a run is made of. No I/O here.

argv never becomes a shell string: words that aren't UTF-8 travel as surrogateescape, and whoever wants a shell asks for `["sh", "-c", ...]`.
"""

from __future__ import annotations

import enum
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, overload

from .errors import Misuse

LOCAL = "local"

# What ssh itself takes in a destination, without the leading dash that would make it an option (CVE-2017-1000117).
_HOST_NAME = re.compile(r"[A-Za-z0-9_.:%][A-Za-z0-9_.:%-]*")
_USER_NAME = re.compile(r"[A-Za-z0-9_.][A-Za-z0-9_.@\\+-]*\$?")
_PORT = re.compile(r"[0-9]{1,5}")
# 9 digits: 31 years of seconds, and never a number that float or int can't hold.
_DURATION = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)\s*(ms|s|m|min|h|d)?")
_BYTES = re.compile(r"(\d+(?:\.\d+)?)([KMGTkmgt])?(?:i?[Bb])?")
_UNITS_S = {"ms": 0.001, "s": 1.0, "": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}


class Open(enum.Enum):
    """A stdin that is held open: what the program reads is sent while it runs."""

    OPEN = "open"


OPEN = Open.OPEN


class Mode(enum.Enum):
    """In which order ssh and sudo come."""

    LOCAL = "local"
    LOCAL_SUDO = "local-sudo"
    SSH_AS = "ssh-as"
    SSH_THEN_SUDO = "ssh-then-sudo"
    SUDO_THEN_SSH = "sudo-then-ssh"
    SUDO_THEN_SSH_THEN_SUDO = "sudo-then-ssh-then-sudo"


@dataclass(frozen=True)
class Host:
    """Where a run lives. `caller` is whom sudo makes of us here, `login` who logs in by ssh, `user` whom sudo makes of them there."""

    name: str
    port: int | None = None
    login: str | None = None
    user: str | None = None
    caller: str | None = None

    def __post_init__(self) -> None:
        if not _HOST_NAME.fullmatch(self.name):
            raise Misuse(f"not a host name: {self.name!r}")
        for user in (self.login, self.user, self.caller):
            if user is not None and not _USER_NAME.fullmatch(user):
                raise Misuse(f"not a user name: {user!r}")
        if self.caller and self.is_local:
            raise Misuse(
                f"local has no ssh that {self.caller} could call: --as {self.user or self.caller} is enough"
            )
        if self.port is not None and not 0 < self.port < 65536:
            raise Misuse(f"not a port: {self.port}")
        if self.is_local and (self.login or self.port):
            as_them = f"; to run as {self.login}, say --as {self.login}" if self.login else ""
            raise Misuse(
                f"local is this machine without ssh, so it has neither login nor port{as_them}"
            )

    @classmethod
    def parse(cls, text: str, *, login: str | None = None, user: str | None = None) -> Host:
        """Read `[login@]name[:port]`, `[v6::addr]:port` or `local`; `login` is used where the text names nobody, `user` is as `as_user` has it.

        Raises Misuse for anything that ssh could take for an option or a shell for syntax.
        """
        before, at, rest = text.rpartition("@")
        name, colon, port = rest, "", ""
        if rest.startswith("["):
            name, bracket, after = rest[1:].partition("]")
            colon, port = after[:1], after[1:]
            if not bracket or colon not in ("", ":"):
                raise Misuse(f"not a host: {text!r}")
        elif rest.count(":") == 1:
            name, colon, port = rest.partition(":")
        if colon and not _PORT.fullmatch(port):
            raise Misuse(f"not a port: {port!r} in {text!r}")
        if at:
            login = before
        return cls(name, int(port) if colon else None, login).run_as(user)

    def run_as(self, text: str | None) -> Host:
        """Return this host with `text` said of it: `THERE`, `HERE,THERE` or `HERE,`; what it says already stays."""
        caller, _, user = (
            ("," + text if "," not in text else text).partition(",") if text else ("", "", "")
        )
        return replace(self, user=self.user or user or None, caller=self.caller or caller or None)

    @property
    def as_user(self) -> str | None:
        """The text that `run_as` reads back, by which a run is found again."""
        return f"{self.caller},{self.user or ''}" if self.caller else self.user

    @property
    def is_local(self) -> bool:
        return self.name == LOCAL

    @property
    def mode(self) -> Mode:
        if self.is_local:
            return Mode.LOCAL_SUDO if self.user else Mode.LOCAL
        if self.caller:
            return Mode.SUDO_THEN_SSH_THEN_SUDO if self.user else Mode.SUDO_THEN_SSH
        return Mode.SSH_THEN_SUDO if self.user else Mode.SSH_AS

    def __str__(self) -> str:
        """The text that `parse` reads back, apart from `as_user`."""
        name = f"[{self.name}]" if ":" in self.name else self.name
        return (
            (f"{self.login}@" if self.login else "") + name + (f":{self.port}" if self.port else "")
        )


def said(user: str | None, mode: Mode | None) -> tuple[str | None, str | None]:
    """Return who logs in and, as `Host.run_as` reads it, whom sudo makes of them, when `mode` says what `user` means. Raises Misuse."""
    if mode in (Mode.SSH_AS, Mode.SSH_THEN_SUDO) and user and "," in user:
        raise Misuse(f"--mode {mode.value} has one user: --as {user} names two")
    if mode is Mode.SSH_AS:
        return user, None
    if mode is Mode.SUDO_THEN_SSH and user and "," not in user:
        return None, f"{user},"
    if mode is Mode.SUDO_THEN_SSH_THEN_SUDO and user and "," not in user:
        return None, f"{user},{user}"
    return None, user


def meant(
    host: Host | str, user: str | None, mode: Mode | None = None, *, port: int | None = None
) -> Host:
    """Return `host` with what it doesn't say itself: its user, as `mode` has it, and its port. Raises Misuse, also where the mode is another."""
    found = Host.parse(host) if isinstance(host, str) else host
    login, user = said(user, mode)
    found = replace(found, login=found.login or login, port=found.port or port).run_as(user)
    if mode and found.mode is not mode:
        raise Misuse(f"that is {found.mode.value}, not {mode.value}", host=found.name)
    return found


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


def seconds(text: str) -> float:
    """Return the seconds in `90`, `1.5`, `10s`, `5m`, `2h`, `14d`. Raises Misuse with what was meant to be there."""
    match = _DURATION.fullmatch(text.strip())
    if not match:
        raise Misuse(f"not a duration: {text!r} (say 30s, 5m, 2h or 14d)")
    return float(match.group(1)) * _UNITS_S[match.group(2) or ""]


@overload
def in_seconds(value: float | str) -> float: ...
@overload
def in_seconds(value: float | str | None) -> float | None: ...
def in_seconds(value: float | str | None) -> float | None:
    """Return a duration that was given as a number or as text. Raises Misuse."""
    return seconds(value) if isinstance(value, str) else value


def size(text: str) -> int:
    """Return the bytes in `4096`, `500M`, `2G`, `1.5G`: powers of 1024, as `df -h` has them. Raises Misuse."""
    match = _BYTES.fullmatch(text.strip())
    if not match:
        raise Misuse(f"not a size: {text!r} (say 500M or 2G)")
    return int(float(match.group(1)) * 1024 ** " KMGT".index((match.group(2) or " ").upper()))


def output_kept(value: int | str | None) -> int | None:
    """Return how many bytes of each stream a run keeps. Raises Misuse for less than the host can keep."""
    found = size(value) if isinstance(value, str) else value
    from .agent import BOUND_MIN  # 4,000 lines, which listing and completing do without

    if found is not None and found < BOUND_MIN:
        raise Misuse(f"too little to keep of an output: {value} ({BOUND_MIN >> 10}K or more)")
    return found


def _number(text: str) -> int:
    if not re.fullmatch(r"-?[0-9]{1,18}", text):
        raise Misuse(f"not a whole number: {text!r}")
    return int(text)


def _percent(text: str) -> int:
    if not text.endswith("%"):
        raise Misuse(f"not a percentage: {text!r} (150% is one CPU and a half)")
    return _number(text[:-1])


def _cpu(text: str) -> int:
    found = seconds(text)
    if found != int(found):
        raise Misuse(f"not whole seconds: {text!r}")
    return int(found)


_UNLIMITED = ("unlimited", "infinity")
# name: how its value is read, the least and the most there is, what it means
LIMITS: dict[str, tuple[Callable[[str], int], int, int, str]] = {
    "files": (_number, 0, 1 << 62, "open files"),
    "core": (size, 0, 1 << 62, "size of a core dump"),
    "cpu": (_cpu, 0, 1 << 62, "seconds of CPU"),
    "memory": (size, 0, 1 << 62, "address space of each process"),
    "nice": (_number, -20, 19, "from -20 (first) to 19 (last)"),
    "oom_score_adj": (
        _number,
        -1000,
        1000,
        "-1000 (never) to 1000: whom the kernel takes when memory runs out",
    ),
    "memory_max": (size, 1, 1 << 62, "memory of all its processes, by systemd"),
    "cpu_quota": (_percent, 1, 10**6, "CPU of all its processes, by systemd, such as 150%"),
}


def limits(given: Mapping[str, int | str | Sequence[int]]) -> dict[str, int | list[int]]:
    """Return limits as the agent reads them. A value is a number, its text (`4096`, `2G`, `1h`, `150%`, `unlimited`), or soft and hard: `1024:4096`.

    Raises Misuse for a name there isn't and a value that means nothing.
    """
    return {_limit_name(name): _limit(_limit_name(name), value) for name, value in given.items()}


def _limit_name(text: str) -> str:
    name = text.strip().lower().replace("-", "_")
    if name not in LIMITS:
        raise Misuse(f"no such limit: {text!r} (there are {', '.join(LIMITS)})")
    return name


def _limit(name: str, value: int | str | Sequence[int]) -> int | list[int]:
    read, least, most, _ = LIMITS[name]
    from .agent import RLIMITS

    pairs = name in RLIMITS
    parts: list[Any] = (
        list(value.split(":"))
        if isinstance(value, str)
        else list(value)
        if isinstance(value, Sequence)
        else [value]
    )
    found: list[int] = []
    for part in parts:
        try:
            number = (
                -1
                if pairs and part in (-1, *_UNLIMITED)
                else read(part.strip())
                if isinstance(part, str)
                else part
            )
        except Misuse as error:
            raise Misuse(f"limit {name}: {error.why}") from None
        if type(number) is not int or not (least <= number <= most or (number == -1 and pairs)):
            raise Misuse(
                f"limit {name}: not from {least} to {most}: {part!r}"
                if most < 1 << 62
                else f"limit {name}: not a number: {part!r}"
            )
        found.append(number)
    if len(found) > (2 if pairs else 1) or not found:
        raise Misuse(
            f"limit {name}: " + ("SOFT:HARD at most" if pairs else "one number") + f": {value!r}"
        )
    if len(found) == 2 and found[0] % (1 << 64) > found[1] % (1 << 64):
        raise Misuse(f"limit {name}: its soft limit is above its hard one: {value!r}")
    return found[0] if len(found) == 1 else found


def words(argv: Sequence[str | bytes | os.PathLike[str]]) -> tuple[str, ...]:
    """Return `argv` as a Program takes it; a bare string is refused, since it would be split into letters."""
    if isinstance(argv, (str, bytes)):
        raise Misuse(f'argv must be a list of words: ["sh", "-c", {argv!r}] asks for a shell')
    try:
        return tuple(os.fsdecode(word) for word in argv)
    except TypeError as error:
        raise Misuse(f"argv must be a list of words: {error}") from error
