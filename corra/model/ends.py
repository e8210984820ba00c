"""What the end of a run means for whoever waited for it: its words and its error."""

from __future__ import annotations

import errno
import shlex
from typing import Any

from corra.errors import CorraError, Failed, Lost, NotStarted, TimedOut, typed
from corra.on_host.agent.contract import AFTER_GRACE

from . import ids
from .state import State, exit_code
from .units import chosen_time, duration
from .words import bare_signal, clock_time, errno_name, errno_words, one_line, side_by_side


def outcome_words(state: State) -> str:
    """Return a run's state in a few words: `running 4 min`, `done: exit 0, 02:10`, `LOST`."""
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


# What a shell executes itself; there is no such file on most hosts.
_SHELL_WORDS = frozenset(
    [
        ".",
        "[[",
        "alias",
        "cd",
        "eval",
        "exec",
        "exit",
        "export",
        "for",
        "function",
        "if",
        "local",
        "read",
        "set",
        "shift",
        "source",
        "time",
        "trap",
        "type",
        "ulimit",
        "umask",
        "unset",
        "until",
        "while",
    ]
)


def wants_shell(program: str) -> bool:
    """Return whether only a shell could execute `program`: a word of its own, or a whole line."""
    return program in _SHELL_WORDS or any(char in program for char in " ;|&<>$`()")


def start_error(state: State, host: str) -> NotStarted:
    """Return the error for a program that the host could not start; its code is 125, 126 or 127."""
    failure = state.exception or {}
    stage, number, said = (
        failure.get("stage"),
        failure.get("errno"),
        one_line(failure.get("message", "")),
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
        why = f"cwd {one_line(state.cwd)}: " + (
            f"{words} ({errno_name(number)})" if words else errno_words(number, said)
        )
    elif stage == "exec":
        program = one_line(state.argv[0]) if state.argv else "?"
        why = f"{program}: {errno_words(number, said)}"
        # A script whose interpreter is missing is ENOENT too, though the script is there.
        if number == errno.ENOENT and "interpreter" in said:
            why = f"{program}: {said} (ENOENT)"
        elif number == errno.ENOENT and wants_shell(program):
            hint.append(f"no shell here:  sh -c {shlex.quote(' '.join(state.argv))}")
        elif path := failure.get("path"):
            hint += side_by_side(
                [f"PATH there: {path}", f"({state.user or 'you'}, not a login shell)"], gap="  "
            )
    else:
        named = said.startswith("limit ") and number
        why = (
            f"{said} ({errno_name(number)})"
            if named
            else errno_words(number, said)
            if number
            else said or "the host didn't say why"
        )
    return NotStarted(
        why, host=host, prog_id=state.prog_id, label=state.label, hint=hint, code=exit_code(state)
    )


def end_error(
    state: State, host: str, result: Any = None, *, reached: str = ""
) -> CorraError | None:
    """Return the error for a final State, None for a good end.

    `result` is what Failed and TimedOut carry. `reached` is how hints lead to the run: the flags of
    `reach_flags`.
    """
    reached = reached or f"--host {host}"
    facts: dict[str, Any] = {"host": host, "prog_id": state.prog_id, "label": state.label}
    after = "" if state.elapsed is None else f" after {duration(state.elapsed)}"
    if state.state == "not_started":
        return start_error(state, host)
    if state.state == "lost":
        # Only this machine's history leads to a run that it keeps for a host.
        logs = f"{typed()} logs {'' if state.link else f'{reached} '}{ids.short(state.prog_id)}"
        until = (
            f"output to {clock_time(state.last_output_time, '%H:%M:%S')}: "
            if state.last_output_time
            else "its output: "
        )
        hint = [f"exit status unknown; {until}{logs}"]
        if state.reason == "reboot":  # after any other end of its guards the program may still run
            hint.append(f"start it anew: {typed()} again {reached} {ids.short(state.prog_id)}")
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
    """Return `TERM from ops@laptop`, `TERM from ops@laptop; ended by KILL`, or the bare signal."""
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
