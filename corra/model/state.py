"""A run as its host's agent tells it. Unknown is `lost`, never success."""

from __future__ import annotations

import errno
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from corra.errors import LOST, NOT_EXECUTABLE, NOT_FOUND, NOTHING_DONE, STILL_RUNNING, TIMED_OUT
from corra.on_host.agent.contract import FINAL, TRANSITIONS

from . import ids


@dataclass(frozen=True)
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
    layout: int = 1

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> State:
        """Read the agent's object; a newer agent's keys are left aside.

        Raises ValueError if it isn't a State.
        """
        if not isinstance(value, Mapping):
            raise ValueError("a State that isn't an object")
        given = {
            f.name: _checked(f.name, f.type, value[f.name])
            for f in fields(cls)
            if value.get(f.name) is not None
        }
        if not ids.is_valid(given.get("prog_id", "")):
            raise ValueError("a State without a prog_id")
        if given.get("state") not in TRANSITIONS:
            raise ValueError(f"not a state: {given.get('state')!r}")
        if not 0 <= given.get("return_code", 0) <= 255:
            raise ValueError(f"not a return code: {given['return_code']}")
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
    def label(self) -> str:
        return ids.label(self.prog_id, self.name)


def _is_int(value: Any) -> bool:
    return type(value) is int


def _is_str(value: Any) -> bool:
    return type(value) is str


def _is_number(value: Any) -> bool:
    return _is_int(value) or (type(value) is float and math.isfinite(value))


def _is_object(value: Any) -> bool:
    return isinstance(value, Mapping)


def _object_of(is_member: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, Mapping) and all(map(is_member, value.values()))


def _list_of(is_member: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, (list, tuple)) and all(map(is_member, value))


# A host is never trusted: a value that isn't as its field says is refused here, or it would be a
# traceback where it is shown.
_CHECKS: dict[str, Callable[[Any], bool]] = {
    "str": _is_str,
    "int": _is_int,
    "float": _is_number,
    "bool": lambda value: type(value) is bool,
    "tuple[str, ...]": _list_of(_is_str),
    "tuple[int, ...]": _list_of(_is_int),
    "tuple[Mapping[str, Any], ...]": _list_of(_is_object),
    "Mapping[str, Any]": _is_object,
    "Mapping[str, str]": _object_of(_is_str),
    "Mapping[str, Mapping[str, int]]": _object_of(_object_of(_is_int)),
}


def _checked(name: str, annotation: Any, value: Any) -> Any:
    if not _CHECKS[annotation.removesuffix(" | None")](value):
        raise ValueError(f"a State whose {name} is {value!r:.60}")
    return tuple(value) if annotation.startswith("tuple") else value


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
