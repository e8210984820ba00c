"""What a refusal means for whoever asked: the agent's `{"error": KIND, ...}` as a CorraError."""

from __future__ import annotations

import errno
import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from corra.errors import (
    Ambiguous,
    Conflict,
    CorraError,
    NoRoom,
    NotFound,
    NotSent,
    NotStarted,
    Unreachable,
    typed,
)

from . import ids
from .ends import outcome_words
from .host import Host
from .program import Request, command_text
from .state import State
from .words import errno_words, one_line

# A verb that only looks says no fate of the program: `corra: db9: no answer in 5 s`.
_FATES = {"start": "NOT STARTED", "run": "NOT STARTED", "signal": "NOT SENT", "stop": "NOT KILLED"}

_ROWS_SHOWN = 10


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
    """Return the error for a refusal of `verb`.

    `text` is what was typed for the run, `start` the request of a start.
    """
    common: dict[str, Any] = {
        "host": str(host),
        "label": label or text,
        "prog_id": text if ids.is_valid(text) else "",
        "kind": kind,
    }
    message = one_line(facts.get("message", ""))
    answer = _ANSWERS.get(kind)
    if answer is not None:
        return retold(answer(facts, host, text, start, common), verb=verb, label=common["label"])
    starting = verb in ("start", "run")
    kind_of = NotStarted if starting else CorraError
    return kind_of(message or kind.replace("_", " "), fate=_FATES.get(verb, ""), **common)


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
    text: str,
    host: str,
    states: Sequence[State],
    *,
    with_hosts: bool = False,
    seen: Sequence[str] = (),
) -> Ambiguous:
    """Return the error for a text that means each of `states`, with a line for each.

    `seen`: how old each of the states is, where the host didn't answer it just now.
    """
    ages = [f", seen {each}" for each in seen] or [""] * len(states)
    rows = [
        (
            ids.short(s.prog_id),
            s.name or "-",
            s.host if with_hosts else "",
            outcome_words(s) + age,
            command_text(s.argv),
        )
        for s, age in zip(states, ages, strict=True)
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
    text = one_line(text)
    return text if len(text) <= width else text[: width - 2] + ".."


def _conflict(
    facts: Mapping[str, Any], host: Host, text: str, start: Request | None, common: dict[str, Any]
) -> CorraError:
    there = facts.get("there")
    hint = []
    if isinstance(there, Mapping):
        state = State.from_json(there)
        here = f"      here: {_cut(command_text(start.program.argv), 48)}" if start else ""
        hint = [f"there: {_cut(command_text(state.argv), 48)} ({outcome_words(state)}){here}"]
    return Conflict(
        "this id already names another command", hint=hint, **{**common, "label": ids.short(text)}
    )


def _no_room(
    facts: Mapping[str, Any], host: Host, text: str, start: Request | None, common: dict[str, Any]
) -> CorraError:
    tried = [each for each in facts.get("tried", ()) if isinstance(each, Mapping)]
    # The loader needs room for the agent; all other answers are the agent's, about the spool.
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
    why = errno_words(worst.get("errno"), one_line(worst.get("message", ""))) or one_line(
        facts.get("message", "")
    )
    where = " and ".join(one_line(each.get("dir", "")) for each in tried)
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
        one_line(facts.get("dir", "")),
        errno_words(facts.get("errno"), one_line(facts.get("message", ""))),
    )
    return (NotStarted if start else CorraError)(
        f"can't read {where}: {why}",
        fate=NotStarted.fate if start else "",
        hint=["a run of that id might be in it, so nothing was done"],
        **{**common, "label": ""},
    )


def _unsupported(
    facts: Mapping[str, Any], host: Host, text: str, start: Request | None, common: dict[str, Any]
) -> CorraError:
    return (NotStarted if start else CorraError)(
        one_line(facts.get("message", "")),
        fate=NotStarted.fate if start else "",
        **{**common, "label": ""},
    )


def _no_callback(
    facts: Mapping[str, Any], host: Host, text: str, start: Request | None, common: dict[str, Any]
) -> CorraError:
    hint = [f"say to which collector:  {typed()} deliver --to NAME {shlex.quote(text)}"]
    return CorraError(one_line(facts.get("message", "")), fate="NOT DELIVERED", hint=hint, **common)


def _removed(
    facts: Mapping[str, Any], host: Host, text: str, start: Request | None, common: dict[str, Any]
) -> CorraError:
    return CorraError(one_line(facts.get("message", "")), fate="NOT DELIVERED", **common)


def _not_running(
    facts: Mapping[str, Any], host: Host, text: str, start: Request | None, common: dict[str, Any]
) -> CorraError:
    return CorraError(
        one_line(facts.get("message", "")) or "it has ended", fate="NOT SENT", **common
    )


def _no_stdin(
    facts: Mapping[str, Any], host: Host, text: str, start: Request | None, common: dict[str, Any]
) -> CorraError:
    state = facts.get("state")
    label = State.from_json(state).label if isinstance(state, Mapping) else common["label"]
    return NotSent(one_line(facts.get("message", "")), **{**common, "label": label})


def _no_linger(
    facts: Mapping[str, Any], host: Host, text: str, start: Request | None, common: dict[str, Any]
) -> CorraError:
    user = one_line(facts.get("user", "")) or "USER"
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
    user = one_line(facts.get("user", ""))
    linger = (
        [f"once:  {typed()} run --host {host.name} --as root -- loginctl enable-linger {user}"]
        if user
        else []
    )
    hint = [*linger, "without systemd: --ulimit memory=SIZE, for each process"]
    return NotStarted(
        "limit " + one_line(facts.get("message", "")), hint=hint, **{**common, "label": ""}
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
    "no_callback": _no_callback,
    "removed": _removed,
    "not_running": _not_running,
    "no_linger": _no_linger,
    "no_scope": _no_scope,
    "no_stdin": _no_stdin,
}


def retold(error: CorraError, *, verb: str, label: str = "", prog_id: str = "") -> CorraError:
    """Return what `error` of a connection means for `verb`: with that verb's fate, and the run it
    was about.
    """
    untouched = isinstance(error, (Unreachable, NotStarted)) and verb not in ("start", "run")
    fate = _FATES.get(verb, "") if untouched else error.fate
    return error.but(
        fate=fate,
        label=error.label or (label if fate else ""),
        prog_id=error.prog_id or prog_id,
    )
