"""The error that stops a runbook, made of the errors of its hosts."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from corra.errors import CorraError, Failed, Lost, Misuse, NotStarted, TimedOut, typed
from corra.model import ids
from corra.model.host import Host
from corra.model.host_sets import fold


@dataclass(frozen=True)
class StepHosts:
    """A step of a runbook, with its number."""

    book: str
    key: str
    number: int
    name: str

    @property
    def label(self) -> str:
        return f"{self.book} {self.key}"

    def command(self, what: str) -> str:
        return (
            f"{typed()} book {shlex.quote(self.book)} {shlex.quote(self.key)} --{what} {self.name}"
        )


def stop_error(
    step: StepHosts, errors: Mapping[Host, CorraError], *, of: int, said: str = ""
) -> CorraError:
    """Return the error for a step that some of its `of` hosts stopped.

    `said` is a last line of the program's output.
    """
    worst = max(
        errors.values(),
        key=lambda error: (isinstance(error, Lost), isinstance(error, Failed), error.code),
    )
    facts: dict[str, Any] = {
        "label": step.label,
        "fate": f"STOPPED at {step.number} {step.name}",
        "prog_id": worst.prog_id,
        "code": max(error.code for error in errors.values()),
    }
    why = "; ".join(_groups(errors))
    if of > 1:
        why += f" ({len(errors)} of {of} hosts)"
    if isinstance(worst, Lost):
        output = f"its output: {typed()} logs {ids.short(worst.prog_id)}"
        look = f"look whether it finished ({output}), then say so:"
        return Lost(
            why,
            hint=[look, f"{step.command('redo')}    (or --skip {step.name})"],
            **{**facts, "code": worst.code},
        )
    if isinstance(worst, Misuse):  # the same command would come to the same
        return Misuse(why, hint=worst.hint, **facts)
    again = f"repeat {step.number} and go on: the same command."
    if worst.prog_id and isinstance(worst, (Failed, NotStarted)):
        again += (
            f"   All output: {typed()} logs {ids.short(worst.prog_id)}"
            if isinstance(worst, Failed)
            else ""
        )
    hint = [said, again, f"leave {step.number} out: {step.command('skip')}"]
    hint = [each for each in hint if each]
    if isinstance(worst, Failed):
        kind = TimedOut if isinstance(worst, TimedOut) else Failed
        return kind(why, result=worst.result, hint=hint, **facts)
    return type(worst)(why, hint=[*worst.hint[:1], again], **facts)


def _groups(errors: Mapping[Host, CorraError]) -> Sequence[str]:
    """Return `web[1,3] FAILED: exit 2`, once for hosts with the same error."""
    alike: dict[tuple[str, str], list[Host]] = {}
    for host, error in errors.items():
        # The duration differs from host to host; the rows have it.
        alike.setdefault(
            (error.fate, error.why.split(" after ")[0] if isinstance(error, Failed) else error.why),
            [],
        ).append(host)
    return [
        f"{fold(hosts)} {fate}{': ' if fate and why else ''}{why}"
        for (fate, why), hosts in alike.items()
    ]
