"""Shows a Book: a table for the operator, Markdown for a ticket, JSON for a machine.

It says who did what, when and where, and how it ended. The output of programs and the values of
their environment aren't in it. No I/O, no clock.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any

from corra import render
from corra.model import ids
from corra.model.units import duration
from corra.model.words import local_time

from .book import HERE, Attempt, Book, JournalEvent, Part

STEPS_HEAD = ("", "STEP", "HOST", "STATE", "BEGUN", "FOR", "ID", "BY", "COMMAND")
BOOKS_HEAD = ("RUNBOOK", "KEY", "STATE", "BEGUN", "BY", "JOURNAL")


def book_state(book: Book) -> str:
    """Return the state of a runbook in a few words."""
    if book.done is not None:
        return "done"
    if book.stopped is not None:
        return str(book.stopped.facts.get("why", "STOPPED")).partition(": ")[0]
    return "open" if book.begun is not None else "-"


def attempt_outcome(part: Part, attempt: Attempt | None) -> str:
    """Return the state of an attempt in the words of the table of runs."""
    if attempt is None:
        if part.skipped is not None:
            return "skipped"
        return "done" if part.value is not None else "to be repeated"
    if attempt.reboot is not None:
        return "rebooted"
    if attempt.state is not None:
        word = render.word(attempt.state)
    elif attempt.old_boot:
        word = "rebooting"
    else:
        word = "running" if attempt.confirmed else "not confirmed"
    return f"{word}, redone" if attempt.void else word


def tries(book: Book) -> Iterator[tuple[int, Part, Attempt | None]]:
    """Yield (number of the step, part, attempt) in order, None for a part without a run."""
    for number, step in enumerate(book.steps, 1):
        hosts = [host for name, host in book.parts if name == step]
        for host in hosts:
            part = book.part(step, host)
            for attempt in part.attempts:
                yield number, part, attempt
            if not part.attempts or (part.skipped is not None and not part.done):
                yield number, part, None
        if not hosts:
            yield number, book.part(step, HERE), None


def screen(
    name: str, key: str, book: Book, now: datetime, where: str, width: int | None
) -> list[str]:
    """Return the lines that `inv book NAME KEY` shows."""
    if book.begun is None:
        return [render.visible(f"{name} {key}: nothing in it yet")]
    why = f": {book.stopped.facts.get('why')}" if book.stopped is not None else ""
    last = book.events[-1]
    params = ", ".join(f"{each}={value}" for each, value in book.params.items())
    facts = [
        ("begun", f"{_when(book.begun)} by {book.begun.by}, {where}"),
        ("params", params),
        ("last", f"{_when(last)} by {last.by}: {last.what}"),
    ]
    lines = [
        render.visible(
            f"{name} {key}: "
            + (f"done {_when(book.done)}" if book.done else f"{why[2:] or book_state(book)}")
        )
    ]
    lines += [f"  {label:<9}{render.visible(text)}" for label, text in facts if text]
    rows = [_row(number, part, attempt, now) for number, part, attempt in tries(book)]
    notes = [
        f"  {render.past_moment(each.at, now)}  {each.by}: {render.visible(_told(each))}"
        for each in book.events
        if _told(each)
    ]
    return [*lines, *(render.table(rows, width, STEPS_HEAD) if rows else []), *notes]


def _row(number: int, part: Part, attempt: Attempt | None, now: datetime) -> tuple[str, ...]:
    event = part.value or part.skipped
    at = attempt.at if attempt else event.at if event else None
    by = attempt.by if attempt else event.by if event else "-"
    cells = (
        f"{number:>2}",
        part.step,
        part.host or "here",
        attempt_outcome(part, attempt),
        render.past_moment(at, now) if at else "-",
        _took(attempt),
        ids.short(attempt.prog_id) if attempt else "-",
        by,
        _command(part, attempt),
    )
    return tuple(render.visible(cell) for cell in cells)


def _took(attempt: Attempt | None) -> str:
    if attempt is None:
        return "-"
    if attempt.reboot is not None:
        return duration(float(attempt.reboot.get("down_s", 0)))
    return (
        duration(attempt.state.elapsed)
        if attempt.state is not None and attempt.state.elapsed is not None
        else "-"
    )


def _command(part: Part, attempt: Attempt | None) -> str:
    """Return the command, the call or the question of a part, else `-`."""
    if attempt is not None:
        return shlex.join(map(str, attempt.program.get("argv", ())))
    facts = part.value.facts if part.value is not None else {}
    if "question" in facts:
        return str(facts["question"])
    return f"{facts['function']}({_arguments(facts.get('args'))})" if "function" in facts else "-"


def _arguments(args: Any) -> str:
    if args is None:  # they weren't JSON
        return ".."
    return ", ".join(
        [json.dumps(each) for each in args[0]]
        + [f"{name}={json.dumps(each)}" for name, each in args[1].items()]
    )


def _when(event: JournalEvent) -> str:
    then = local_time(event.at)
    return f"{then:%Y-%m-%d %H:%M:%S %z}" if then else event.at


def _told(event: JournalEvent) -> str:
    """Return the words of an event that isn't about a step; the table has the steps."""
    facts = event.facts
    hosts = ", ".join(map(str, facts.get("hosts") or ()))
    on = f" on {hosts}" if hosts and hosts != "*" else ""
    return {
        "note": f"note: {facts.get('text')}",
        "confirmed": f"said yes: {facts.get('question')}",
        "skip": f"skip {facts.get('step')}{on}",
        "redo": f"redo {facts.get('step')}{on}",
        "stop": str(facts.get("why")),
        "done": "done",
    }.get(event.what, "")


def markdown(name: str, key: str, book: Book) -> list[str]:
    """Return the lines of the audit trail as Markdown."""
    lines = [f"# {_md(name)} {_md(key)}", "", f"State: **{_md(book_state(book))}**"]
    if book.begun is not None:
        lines += ["", f"Begun {_when(book.begun)} by {_md(book.begun.by)}"]
    lines += [f"- {_md(each)}: `{value}`" for each, value in book.params.items()]
    lines += [
        "",
        "## Steps",
        "",
        "| # | step | host | attempt | begun | by | command | ended | state | id |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for number, part, attempt in tries(book):
        event = part.value or part.skipped
        at, by = (
            (attempt.at, attempt.by) if attempt else (event.at, event.by) if event else ("", "")
        )
        cells = [
            str(number),
            part.step,
            part.host or "here",
            str(attempt.number) if attempt else "",
            at,
            by,
            "" if (command := _command(part, attempt)) == "-" else command,
            attempt.ended_at if attempt else at,
            attempt_outcome(part, attempt),
            attempt.prog_id if attempt else "",
        ]
        lines.append("| " + " | ".join(map(_md, cells)) + " |")
    told = [
        f"- {each.at} {_md(each.by)}: {_md(_told(each))}" for each in book.events if _told(each)
    ]
    return [*lines, "", "## What was said", "", *told] if told else lines


def _md(text: str) -> str:
    return "".join("\\" + c if c in "\\|*_`<>[]#" else c for c in render.visible(text))


def as_json(name: str, key: str, book: Book, where: str) -> dict[str, Any]:
    """Return the audit trail as one object."""
    steps = [
        {
            "number": number,
            "step": part.step,
            "host": part.host or None,
            "state": attempt_outcome(part, attempt),
            **(_attempt_json(attempt) if attempt else _here_json(part)),
        }
        for number, part, attempt in tries(book)
    ]
    return {
        "name": name,
        "key": key,
        "journal": where,
        "state": book_state(book),
        "params": dict(book.params),
        "begun": book.begun.at if book.begun else None,
        "by": book.begun.by if book.begun else None,
        "done": book.done.at if book.done else None,
        "steps": steps,
        "events": [
            {"at": e.at, "by": e.by, "what": e.what, **_without_output(e.facts)}
            for e in book.events
        ],
    }


def _here_json(part: Part) -> dict[str, Any]:
    """Return the facts of a part without a run: a call, a yes, or a skip."""
    event = part.value or part.skipped
    facts = part.value.facts if part.value is not None else {}
    told = {
        name: facts[name] for name in ("function", "args", "question", "result") if name in facts
    }
    return {"ended": event.at if event else None, "by": event.by if event else None, **told}


def _attempt_json(attempt: Attempt) -> dict[str, Any]:
    return {
        "attempt": attempt.number,
        "prog_id": attempt.prog_id,
        "argv": attempt.program.get("argv"),
        "user": attempt.user,
        "begun": attempt.at,
        "by": attempt.by,
        "ended": attempt.ended_at or None,
        "return_code": attempt.state.return_code if attempt.state else None,
        "signal": attempt.state.signal if attempt.state else None,
        "reason": attempt.state.reason if attempt.state else None,
        "redone": attempt.void,
    }


def _without_output(facts: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: each for name, each in facts.items() if name not in ("stdout", "stderr", "truncated")
    }
