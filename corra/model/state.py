"""A run as its host's agent tells it. Unknown is `lost`, never success."""

from __future__ import annotations

import errno
import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from corra.errors import LOST, NOT_EXECUTABLE, NOT_FOUND, NOTHING_DONE, STILL_RUNNING, TIMED_OUT
from corra.on_host.agent.contract import FINAL, TRANSITIONS

from . import ids
from .light_dataclass import light_dataclass
from .shapes import (
    WORD_MAX,
    Flag,
    Listed,
    Mapped,
    Moment,
    Object,
    Real,
    Text,
    Whole,
    Word,
    check,
)

ID = Word(re.compile(ids.PATTERN))
PID = Whole(0, 1 << 32)
ERRNO = Whole(0, 1 << 16)
# A word that is too long for exec is in the State of a run that couldn't be started.
ARGV = Listed(Text(6 << 20))
_SIGNAL = Text(16)
# A host is never trusted: a value that isn't as its line says is refused where it is read, or it
# would be a traceback where it is shown.
STATE = Object(
    {
        "prog_id": ID,
        "state": Word(re.compile("|".join(TRANSITIONS))),
        "reason": Text(64),
        "name": Text(),
        "host": Text(),
        "link": Text(),
        "user": Text(),
        "origin": Mapped(Text(WORD_MAX)),
        "argv": ARGV,
        "cwd": Text(1 << 14),
        "env": Listed(Text(WORD_MAX)),
        "boot_id": Text(64),
        "agent_pid": PID,
        "standby_pids": Listed(PID, 64),
        "supervisor": Text(64),
        "hindered": Object({"why": Text(64), "due": Text(64), "pid": PID, "by": PID}),
        "pid": PID,
        "pid_start": Whole(),
        "exception": Object(
            {
                "type": Text(),
                "errno": ERRNO,
                "stage": Text(64),
                "message": Text(1 << 14),
                "path": Text(WORD_MAX),
            }
        ),
        "status": Whole(0, 0xFFFF),
        "return_code": Whole(0, 255),
        "signal": _SIGNAL,
        "core_dumped": Flag(),
        "rusage": Mapped(Real(0, 1e18)),
        "start_time": Moment(),
        "end_time": Moment(),
        "elapsed": Real(0, 1e10),
        "timeout": Real(),
        "stop_signal": _SIGNAL,
        "grace": Real(),
        "signals_sent": Listed(
            Object(
                {"time": Moment(), "signal": _SIGNAL, "id": Text(64), "to": Text(64), "by": Text()}
            )
        ),
        "stragglers": Listed(Object({"pid": PID, "name": Text()})),
        "streams": Mapped(Object({"length": Whole(), "dropped": Whole(), "late": Whole()}), 8),
        "blocked": Object({"since": Moment(), "errno": ERRNO, "reason": Text(), "message": Text()}),
        "last_output_time": Moment(),
        "callback": Object({"acked": Mapped(Whole()), "error": Text(1 << 14), "over": Flag()}),
        "stdin": Object({"length": Whole(), "moved": Whole(), "ended": Flag(), "open": Flag()}),
        "pty": Flag(),
        "spool": Text(1 << 14),
        "keep_until": Moment(),
        "archived_time": Moment(),
        "layout": Whole(),
    },
    ("prog_id", "state"),
)


@light_dataclass(frozen=True)
class State:
    """One run as its host sees it.

    Times are ISO 8601 with an offset. Durations are seconds by the host's own clock.
    """

    prog_id: str
    state: str
    reason: str | None = None
    name: str | None = None
    host: str = ""
    link: str | None = None
    user: str = ""
    origin: Mapping[str, str] | None = None
    argv: tuple[str, ...] = ()
    cwd: str | None = None
    env: tuple[str, ...] = ()
    boot_id: str | None = None
    agent_pid: int | None = None
    standby_pids: tuple[int, ...] = ()
    supervisor: str = "gone"
    hindered: Mapping[str, Any] | None = None
    pid: int | None = None
    pid_start: int | None = None
    exception: Mapping[str, Any] | None = None
    status: int | None = None
    return_code: int | None = None
    signal: str | None = None
    core_dumped: bool | None = None
    rusage: Mapping[str, Any] | None = None
    start_time: str | None = None
    end_time: str | None = None
    elapsed: float | None = None
    timeout: float | None = None
    stop_signal: str = "TERM"
    grace: float = 10.0
    signals_sent: tuple[Mapping[str, Any], ...] = ()
    stragglers: tuple[Mapping[str, Any], ...] = ()
    streams: Mapping[str, Mapping[str, int]] | None = None
    blocked: Mapping[str, Any] | None = None
    last_output_time: str | None = None
    callback: Mapping[str, Any] | None = None
    stdin: Mapping[str, Any] | None = None
    pty: bool = False
    spool: str | None = None
    keep_until: str | None = None
    archived_time: str | None = None
    layout: int = 1

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> State:
        """Read the agent's object; a newer agent's keys are left aside.

        Raises ValueError if it isn't a State.
        """
        check(STATE, value, "State")
        return cls.from_checked(value)

    @classmethod
    def from_checked(cls, value: Mapping[str, Any]) -> State:
        """Read an object that was held to STATE already, as a part of a larger answer."""
        given: dict[str, Any] = {
            name: tuple(each) if isinstance(each, list) else each
            for name in STATE.fields
            if (each := value.get(name)) is not None
        }
        if streams := given.get("streams"):
            given["streams"] = {
                name: {fact: size for fact, size in facts.items() if size is not None}
                for name, facts in streams.items()
            }
        return cls(**given)

    def to_json(self) -> dict[str, Any]:
        """Return all fields, and `proc_id`, another name for `prog_id`."""
        whole = {f.name: getattr(self, f.name) for f in fields(self)}
        return {
            "proc_id": self.prog_id,
            **{k: list(v) if isinstance(v, tuple) else v for k, v in whole.items()},
        }

    @property
    def ended(self) -> bool:
        """Whether the run is over: this State never changes again."""
        return self.state in FINAL

    @property
    def overdue(self) -> str:
        """What the keeper should have done and can't do: end, output, timeout, kill; or nothing.

        `end`: the program has ended, and its status isn't recorded.
        """
        return str((self.hindered or {}).get("due") or "")

    @property
    def label(self) -> str:
        return ids.label(self.prog_id, self.name)


def exit_code(state: State) -> int:
    """Return the exit code of a verb that waited for `state` (docs/exit-codes.md)."""
    if state.state == "exited":
        if state.reason == "timeout":
            return TIMED_OUT
        if state.status is not None and state.status & 0x7F:
            # The host's number: a realtime signal has no name, and other systems' numbers differ.
            return 128 + (state.status & 0x7F)
        return LOST if state.return_code is None else state.return_code
    if state.state == "not_started":
        failure = state.exception or {}
        if failure.get("stage") != "exec":
            return NOTHING_DONE
        return NOT_FOUND if failure.get("errno") == errno.ENOENT else NOT_EXECUTABLE
    return LOST if state.state == "lost" else STILL_RUNNING
