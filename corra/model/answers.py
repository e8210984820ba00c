"""What a host's answer means for whoever asked: one error for each refusal and for each bad end, with its words. No I/O, no clock.

A refusal is the agent's `{"error": KIND, ...}`; a bad end is a final State that isn't `exit 0`.
"""

from __future__ import annotations

import errno
import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from corra.errors import (
    Ambiguous,
    Conflict,
    CorraError,
    Failed,
    Lost,
    NoRoom,
    NotFound,
    NotSent,
    NotStarted,
    TimedOut,
    Unreachable,
    plain,
    typed,
)
from corra.on_host.agent.contract import AFTER_GRACE

from . import ids
from .host import Host
from .program import Request
from .state import State, exit_code
from .words import bare_signal, chosen_time, clock_time, duration, side_by_side

# Verbs that only look say no fate of the program when they fail: they didn't touch it. `corra: db9: no answer in 5 s`.
_FATES = {"start": "NOT STARTED", "run": "NOT STARTED", "signal": "NOT SENT", "stop": "NOT KILLED"}

_ERRNO_WORDS = {
    errno.ENOENT: "not found",
    errno.EACCES: "not executable",
    errno.EPERM: "not permitted",
    errno.ENOEXEC: "neither a program nor a script with a #! line",
    errno.E2BIG: "its words and environment are too long",
    errno.ETXTBSY: "is being written",
    errno.ENOTDIR: "not a directory",
    errno.ELOOP: "a loop of symbolic links",
    errno.ENOSPC: "disk full",
    errno.EDQUOT: "quota used up",
    errno.EROFS: "read-only",
    errno.ENOMEM: "no memory",
}
_ROWS_SHOWN = 10


def outcome_words(state: State) -> str:
    """Return what became of a run in two or three words: `running 4 min`, `done: exit 0, 02:10`, `LOST`."""
    if not state.ended:
        return state.state + (f" {duration(state.elapsed)}" if state.elapsed is not None else "")
    if state.state == "exited":
        at = f", {clock_time(state.end_time)}" if state.end_time else ""
        if state.reason == "timeout":
            return f"TIMEOUT{at}"
        if state.signal:
            return f"KILLED by {bare_signal(state.signal)}{at}"
        if state.return_code is None:
            return "ended"  # this machine's history doesn't know how
        return f"{'FAILED' if state.return_code else 'done'}: exit {state.return_code}{at}"
    return state.state.replace("_", " ").upper()


def _errno(number: Any, message: str = "") -> str:
    """Return `disk full (ENOSPC)` for an errno, else the host's own words."""
    words = (
        _ERRNO_WORDS.get(number)
        or message
        or (os.strerror(number) if isinstance(number, int) and number else "")
    )
    name = _errno_name(number)
    return f"{words} ({name})" if name and name not in words else words


def _errno_name(number: Any) -> str:
    return errno.errorcode.get(number, "") if isinstance(number, int) else ""


def _one_line(text: Any) -> str:
    """Return foreign text on one line, with what a terminal would act upon made visible."""
    return plain(" ".join(str(text).split()))


# Refusals


def refusal_error(
    kind: str,
    facts: Mapping[str, Any],
    *,
    host: Host,
    verb: str,
    text: str = "",
    label: str = "",
    start: Request | None = None,
) -> CorraError:
    """Return the error for a refusal of `verb`. `text` is what was typed for the run, `start` what was to be started."""
    common: dict[str, Any] = {
        "host": str(host),
        "label": label or text,
        "prog_id": text if ids.is_valid(text) else "",
        "kind": kind,
    }
    message = _one_line(facts.get("message", ""))
    answer = _ANSWERS.get(kind)
    if answer is not None:
        return retold(answer(facts, host, text, start, common), verb=verb, label=common["label"])
    starting = verb in ("start", "run")
    kind_of = NotStarted if starting else CorraError
    error = kind_of(message or kind.replace("_", " "), **common)
    error.fate = _FATES.get(verb, "")
    return error


def _not_found(
    facts: Mapping[str, Any], host: Host, text: str, start: Request | None, common: dict[str, Any]
) -> CorraError:
    count, user = facts.get("count"), facts.get("user") or host.user or host.login
    among = (
        "NOT FOUND"
        if count is None
        else f"NOT FOUND among the {count} runs"
        if count != 1
        else "NOT FOUND: there is 1 run"
    )
    kept = f" (kept since {facts['since']})" if facts.get("since") else ""
    hint = [] if host.user else ["run by another user there?  add --as USER"]
    return NotFound(
        **{**common, "label": text},
        fate=among + (f" of {user}" if user and count is not None else "") + kept,
        hint=hint,
    )


def _ambiguous(
    facts: Mapping[str, Any], host: Host, text: str, start: Request | None, common: dict[str, Any]
) -> CorraError:
    states = [State.from_json(each) for each in facts.get("runs", ())]
    return ambiguous_error(text, str(host), states)


def ambiguous_error(
    text: str, host: str, states: Sequence[State], *, with_hosts: bool = False
) -> Ambiguous:
    """Return the error for a text that means each of `states`, with a line for each."""
    rows = [
        (
            ids.short(s.prog_id),
            s.name or "-",
            s.host if with_hosts else "",
            outcome_words(s),
            shlex.join(s.argv),
        )
        for s in states
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(4)] if rows else []
    hint = [
        "  ".join(
            [
                *(cell.ljust(width) for cell, width in zip(row, widths, strict=False) if width),
                _cut(row[4]),
            ]
        )
        for row in rows
    ]
    more = [f"and {len(hint) - _ROWS_SHOWN} more"] if len(hint) > _ROWS_SHOWN else []
    return Ambiguous(
        f"{len(states)} runs, nothing done",
        host=host,
        label=text,
        hint=[*hint[:_ROWS_SHOWN], *more],
    )


def _cut(text: str, width: int = 32) -> str:
    text = _one_line(text)
    return text if len(text) <= width else text[: width - 2] + ".."


def _conflict(
    facts: Mapping[str, Any], host: Host, text: str, start: Request | None, common: dict[str, Any]
) -> CorraError:
    there = facts.get("there")
    hint = []
    if isinstance(there, Mapping):
        state = State.from_json(there)
        here = f"      here: {_cut(shlex.join(start.program.argv), 48)}" if start else ""
        hint = [f"there: {_cut(shlex.join(state.argv), 48)} ({outcome_words(state)}){here}"]
    return Conflict(
        "this id already names another command", hint=hint, **{**common, "label": ids.short(text)}
    )


def _no_room(
    facts: Mapping[str, Any], host: Host, text: str, start: Request | None, common: dict[str, Any]
) -> CorraError:
    tried = [each for each in facts.get("tried", ()) if isinstance(each, Mapping)]
    # The loader asks for room for the agent before there is one; every other answer is the agent's own, about the spool.
    what = (
        "agent"
        if facts.get("what") == "agent"
        or any("cache" in str(each.get("dir", "")) for each in tried)
        else "spool"
    )
    worst = next(
        (each for each in tried if each.get("errno") in (errno.ENOSPC, errno.EDQUOT)),
        tried[0] if tried else {},
    )
    why = _errno(worst.get("errno"), _one_line(worst.get("message", ""))) or _one_line(
        facts.get("message", "")
    )
    where = " and ".join(_one_line(each.get("dir", "")) for each in tried)
    full = worst.get("errno") in (errno.ENOSPC, errno.EDQUOT)
    hint = [
        *([f"tried {where}"] if where else []),
        f"{'free 1 MB there' if full else 'make one of them writable'}, or --spool DIR",
    ]
    return NoRoom(
        f"no room for the {what}" + (f": {why}" if why else ""),
        hint=hint,
        **{**common, "label": ""},
    )


def _unreadable(
    facts: Mapping[str, Any], host: Host, text: str, start: Request | None, common: dict[str, Any]
) -> CorraError:
    where, why = (
        _one_line(facts.get("dir", "")),
        _errno(facts.get("errno"), _one_line(facts.get("message", ""))),
    )
    error = (NotStarted if start else CorraError)(
        f"can't read {where}: {why}", **{**common, "label": ""}
    )
    error.fate = NotStarted.fate if start else ""
    error.hint = ("a run of that id might be in it, so nothing was done",)
    return error


def _unsupported(
    facts: Mapping[str, Any], host: Host, text: str, start: Request | None, common: dict[str, Any]
) -> CorraError:
    error = (NotStarted if start else CorraError)(
        _one_line(facts.get("message", "")), **{**common, "label": ""}
    )
    error.fate = NotStarted.fate if start else ""
    return error


def _not_running(
    facts: Mapping[str, Any], host: Host, text: str, start: Request | None, common: dict[str, Any]
) -> CorraError:
    return CorraError(
        _one_line(facts.get("message", "")) or "it has ended", fate="NOT SENT", **common
    )


def _no_stdin(
    facts: Mapping[str, Any], host: Host, text: str, start: Request | None, common: dict[str, Any]
) -> CorraError:
    state = facts.get("state")
    label = State.from_json(state).label if isinstance(state, Mapping) else common["label"]
    return NotSent(_one_line(facts.get("message", "")), **{**common, "label": label})


def _no_linger(
    facts: Mapping[str, Any], host: Host, text: str, start: Request | None, common: dict[str, Any]
) -> CorraError:
    user = _one_line(facts.get("user", "")) or "USER"
    hint = [
        f"once:  {typed()} run --host {host.name} --as root -- loginctl enable-linger {user}",
        "or --force: it dies with the last login",
    ]
    return NotStarted(
        "logind there kills programs at logout, linger is off", hint=hint, **{**common, "label": ""}
    )


def _no_scope(
    facts: Mapping[str, Any], host: Host, text: str, start: Request | None, common: dict[str, Any]
) -> CorraError:
    user = _one_line(facts.get("user", ""))
    linger = (
        [f"once:  {typed()} run --host {host.name} --as root -- loginctl enable-linger {user}"]
        if user
        else []
    )
    hint = [*linger, "without systemd: --limit memory=SIZE, for each process"]
    return NotStarted(
        "limit " + _one_line(facts.get("message", "")), hint=hint, **{**common, "label": ""}
    )


_ANSWERS: dict[
    str, Callable[[Mapping[str, Any], Host, str, Request | None, dict[str, Any]], CorraError]
] = {
    "not_found": _not_found,
    "ambiguous": _ambiguous,
    "conflict": _conflict,
    "no_room": _no_room,
    "unreadable": _unreadable,
    "unsupported": _unsupported,
    "not_running": _not_running,
    "no_linger": _no_linger,
    "no_scope": _no_scope,
    "no_stdin": _no_stdin,
}


def retold(error: CorraError, *, verb: str, label: str = "", prog_id: str = "") -> CorraError:
    """Return `error`, which says NOT STARTED as connections do, with the fate of what `verb` was to do and the run it was about."""
    if isinstance(error, (Unreachable, NotStarted)) and verb not in ("start", "run"):
        error.fate = _FATES.get(verb, "")
    error.label = error.label or (label if error.fate else "")
    error.prog_id = error.prog_id or prog_id
    return error


# Ends


def start_error(state: State, host: str) -> NotStarted:
    """Return the error for a program that the host could not start; its code is 125, 126 or 127."""
    failure = state.exception or {}
    stage, number, said = (
        failure.get("stage"),
        failure.get("errno"),
        _one_line(failure.get("message", "")),
    )
    hint: list[str] = []
    if stage == "cwd":
        words = (
            "no such directory"
            if number == errno.ENOENT
            else "not allowed there"
            if number == errno.EACCES
            else ""
        )
        why = f"cwd {_one_line(state.cwd)}: " + (
            f"{words} ({_errno_name(number)})" if words else _errno(number, said)
        )
    elif stage == "exec":
        program = _one_line(state.argv[0]) if state.argv else "?"
        why = f"{program}: {_errno(number, said)}"
        # A script whose interpreter is missing is ENOENT too, though the script is there.
        if number == errno.ENOENT and "interpreter" in said:
            why = f"{program}: {said} (ENOENT)"
        elif path := failure.get("path"):
            hint += side_by_side(
                [f"PATH there: {path}", f"({state.user or 'you'}, not a login shell)"], gap="  "
            )
    else:
        named = said.startswith("limit ") and number
        why = (
            f"{said} ({_errno_name(number)})"
            if named
            else _errno(number, said)
            if number
            else said or "the host didn't say why"
        )
    return NotStarted(
        why, host=host, prog_id=state.prog_id, label=state.label, hint=hint, code=exit_code(state)
    )


def end_error(state: State, host: str, result: Any = None) -> CorraError | None:
    """Return the error for a final State, None for a good end. `result` is what Failed and TimedOut carry."""
    facts: dict[str, Any] = {"host": host, "prog_id": state.prog_id, "label": state.label}
    after = "" if state.elapsed is None else f" after {duration(state.elapsed)}"
    if state.state == "not_started":
        return start_error(state, host)
    if state.state == "lost":
        # What this machine keeps for a host, only its own history leads to.
        logs = f"{typed()} logs {'' if state.link else f'--host {host} '}{ids.short(state.prog_id)}"
        until = (
            f"output to {clock_time(state.last_output_time, '%H:%M:%S')}: "
            if state.last_output_time
            else "its output: "
        )
        hint = [f"exit status unknown; {until}{logs}"]
        if state.reason == "reboot":  # after any other end of its guards it may be running still
            hint.append(f"start it anew: {typed()} again --host {host} {ids.short(state.prog_id)}")
        return Lost(_lost(state, host), hint=hint, **facts)
    if state.reason == "timeout":
        limit = chosen_time(state.timeout) if state.timeout else "its time was over"
        by = (
            f"; ended by {bare_signal(state.signal)}"
            if state.signal
            else f"; ended with exit {state.return_code}"
        )
        over = (
            ""
            if not state.timeout or state.elapsed is None
            else f" after {duration(max(0.0, state.elapsed - state.timeout))}"
        )
        return TimedOut(limit + by + over, result=result, **facts)
    if state.signal:
        core = ", core dumped" if state.core_dumped else ""
        why = f"{_sender(state)}{after}{core}"
        return Failed(why, result=result, fate="KILLED", code=exit_code(state), **facts)
    if exit_code(state) == 0:
        return None
    return Failed(f"exit {state.return_code}{after}", result=result, code=exit_code(state), **facts)


def _sender(state: State) -> str:
    """Return `TERM from ops@laptop`, `TERM from ops@laptop; ended by KILL`, or the bare signal where nobody is known to have sent it."""
    name = bare_signal(state.signal or "")
    sent = [each for each in state.signals_sent if each.get("by")]
    if len(sent) > 1 and sent[-1]["by"] == AFTER_GRACE and name == "KILL":
        return f"{bare_signal(str(sent[-2].get('signal')))} from {sent[-2]['by']}; ended by KILL"
    senders = [str(each["by"]) for each in sent if each.get("signal") == state.signal]
    return name + (f" from {senders[-1]}" if senders else "")


def _lost(state: State, host: str) -> str:
    if state.reason == "reboot":
        at = f" at {clock_time(state.end_time)}" if state.end_time else ""
        return f"{host} rebooted{at} while it ran"
    return {
        "agent-gone": "all of its guards were killed",
        "spool-gone": "its spool was deleted",
        "link": f"link to {host} broke at {clock_time(state.end_time)}; it may still run",
    }.get(state.reason or "", "how it ended can't be known")
