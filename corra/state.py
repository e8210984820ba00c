"""What is known of a run, as the host's agent says it. Unknown is `lost`, never success."""

from __future__ import annotations

import errno
import signal as signals
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from . import ids
from .agent import FINAL, REASONS, TRANSITIONS
from .errors import LOST, NOT_EXECUTABLE, NOT_FOUND, NOTHING_DONE, STILL_RUNNING, TIMED_OUT

__all__ = ["FINAL", "REASONS", "TRANSITIONS", "State", "exit_code"]


@dataclass(frozen=True)
class State:
    """One run as its host sees it. Times are ISO 8601 with offset, durations are seconds by the host's own clock."""

    prog_id: str
    state: str
    reason: str | None = None
    name: str | None = None
    host: str = ""
    user: str = ""
    origin: Mapping[str, str] | None = None
    argv: tuple[str, ...] = ()
    cwd: str | None = None
    env: tuple[str, ...] = ()
    boot_id: str | None = None
    agent_pid: int | None = None
    standby_pids: tuple[int, ...] = ()
    supervisor: str = "gone"
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
    signals_sent: tuple[Mapping[str, Any], ...] = ()
    stragglers: tuple[Mapping[str, Any], ...] = ()
    streams: Mapping[str, Mapping[str, int]] | None = None
    blocked: Mapping[str, Any] | None = None
    last_output_time: str | None = None
    callback: Mapping[str, Any] | None = None
    spool: str | None = None
    keep_until: str | None = None
    layout: int = 1

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> State:
        """Read the agent's object; a key of a newer agent is left aside. Raises ValueError when it isn't a State."""
        if not isinstance(value.get("prog_id"), str) or not ids.is_valid(value["prog_id"]):
            raise ValueError("a State without a prog_id")
        if value.get("state") not in TRANSITIONS:
            raise ValueError(f"not a state: {value.get('state')!r}")
        known = {f.name for f in fields(cls)}
        lists = ("argv", "env", "standby_pids", "signals_sent", "stragglers")
        return cls(**{k: tuple(v) if k in lists else v for k, v in value.items() if k in known and v is not None})

    def to_json(self) -> dict[str, Any]:
        """Return all fields, and `proc_id`, the seed's name for `prog_id`."""
        whole = {f.name: getattr(self, f.name) for f in fields(self)}
        return {"proc_id": self.prog_id, **{k: list(v) if isinstance(v, tuple) else v for k, v in whole.items()}}

    @property
    def ended(self) -> bool:
        """Whether this will never change again."""
        return self.state in FINAL

    @property
    def label(self) -> str:
        return ids.label(self.prog_id, self.name)


def exit_code(state: State) -> int:
    """Return what a call that waited for `state` exits with: DESIGN.md, "exit codes"."""
    if state.state == "exited":
        if state.reason == "timeout":
            return TIMED_OUT
        if state.signal:
            return 128 + signals.Signals[state.signal].value
        return NOTHING_DONE if state.return_code is None else state.return_code
    if state.state == "not_started":
        failure = state.exception or {}
        if failure.get("stage") != "exec":
            return NOTHING_DONE
        return NOT_FOUND if failure.get("errno") == errno.ENOENT else NOT_EXECUTABLE
    return LOST if state.state == "lost" else STILL_RUNNING
