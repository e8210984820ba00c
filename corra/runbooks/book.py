"""The events of a runbook's journal, and the Book that they add up to. No I/O, no clock.

A journal is a list of facts, each true for ever: a begin, an end, an operator's "skip it". The next
move is computed from all of them, so two machines that read the same lines decide the same.

Reading is forgiving where that can't mislead: a line that a power cut has torn is no event, an
event that came twice counts once, and an event of a newer corra is left aside.
"""

from __future__ import annotations

import enum
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from corra.model.program import Program
from corra.model.shapes import (
    WORD_MAX,
    Flag,
    Listed,
    Object,
    Real,
    Shape,
    Text,
    Whole,
    check,
    read_json,
)
from corra.model.state import ID, STATE, State, exit_code

# The host of `do` and `confirm`, which happen on this machine.
HERE = ""
# The host of a step that was skipped before it was begun on any.
ANYWHERE = "*"

STEP = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

_STEP: dict[str, Shape] = {"step": Text(64), "host": Text()}
_ATTEMPT: dict[str, Shape] = {**_STEP, "attempt": Whole(1, 1 << 32)}
_OUTPUT = Text(64 << 20)
# What each kind of event says. A journal may lie on a host, and a host is never trusted.
EVENTS: Mapping[str, Object] = {
    "open": Object({"params": Object({})}),
    "begin": Object(
        {
            **_ATTEMPT,
            "prog_id": ID,
            "program": Object({"argv": Listed(Text(WORD_MAX)), "env": Object({})}),
            "user": Text(),
            "old_boot": Text(64),
        },
        ("step", "attempt", "prog_id"),
    ),
    "started": Object(_ATTEMPT, ("step", "host", "attempt")),
    "end": Object(
        {**_ATTEMPT, "state": STATE, "stdout": _OUTPUT, "stderr": _OUTPUT, "truncated": Flag()},
        ("step", "host", "attempt", "state"),
    ),
    "rebooted": Object(
        {**_ATTEMPT, "old_boot": Text(64), "new_boot": Text(64), "down_s": Real()},
        ("step", "host", "attempt"),
    ),
    "did": Object(_STEP, ("step",)),
    "confirmed": Object(_STEP, ("step",)),
    "skip": Object({**_STEP, "hosts": Listed(Text())}, ("step",)),
    "redo": Object({**_STEP, "hosts": Listed(Text())}, ("step",)),
    "stop": Object({"why": Text(1 << 16), "code": Whole(0, 255)}),
    "done": Object({}),
    "kept": Object({}),
}


@dataclass(frozen=True)
class JournalEvent:
    """One line of a journal."""

    id: str
    at: str
    by: str
    what: str
    facts: Mapping[str, Any]

    def to_line(self) -> str:
        return (
            json.dumps(
                {
                    "v": 1,
                    "id": self.id,
                    "at": self.at,
                    "by": self.by,
                    "what": self.what,
                    **self.facts,
                }
            )
            + "\n"
        )


def journal_events(text: str) -> Iterable[JournalEvent]:
    """Yield the events in a journal's text."""
    for line in text.splitlines():
        try:
            value = read_json(line)
            value.pop("v", None)
            who, at, by, what = (str(value.pop(name)) for name in ("id", "at", "by", "what"))
            yield JournalEvent(who, at, by, what, value)
        except (ValueError, KeyError, TypeError, AttributeError):
            continue


@dataclass
class Attempt:
    """One try of a step on a host: a run of its own, whose id follows from its names."""

    number: int
    prog_id: str
    at: str
    by: str
    program: Mapping[str, Any] = field(default_factory=dict)
    user: str = ""
    old_boot: str = ""
    confirmed: bool = False
    void: bool = False  # an operator said --redo
    state: State | None = None
    ended_at: str = ""
    stdout: str = ""
    stderr: str = ""
    truncated: bool = False
    reboot: Mapping[str, Any] | None = None

    @property
    def ended(self) -> bool:
        return self.state is not None or self.reboot is not None

    @property
    def ok(self) -> bool:
        return self.reboot is not None or (self.state is not None and exit_code(self.state) == 0)

    @property
    def lost(self) -> bool:
        return self.reboot is None and self.state is not None and self.state.state == "lost"


@dataclass
class Part:
    """A step on one host, or here: its attempts and its value."""

    step: str
    host: str
    attempts: list[Attempt] = field(default_factory=list)
    skipped: JournalEvent | None = None
    value: JournalEvent | None = None  # what `do` returned, what `confirm` was answered

    @property
    def current(self) -> Attempt | None:
        """The attempt that counts: the last, unless it is to be repeated."""
        last = self.attempts[-1] if self.attempts else None
        return None if last is None or last.void else last

    @property
    def next_number(self) -> int:
        return self.attempts[-1].number + 1 if self.attempts else 1

    @property
    def done(self) -> bool:
        return self.value is not None or (self.current is not None and self.current.ok)

    @property
    def open(self) -> bool:
        """Whether an attempt was begun and its end isn't known."""
        return self.current is not None and not self.current.ended

    @property
    def running(self) -> bool:
        """Whether it is open and its host, or a reboot's order, is known to have been reached."""
        return (
            self.open
            and self.current is not None
            and (self.current.confirmed or bool(self.current.old_boot))
        )


class Book:
    """The sum of a journal's events."""

    def __init__(self) -> None:
        self.events: list[JournalEvent] = []
        self.parts: dict[tuple[str, str], Part] = {}
        self.params: Mapping[str, Any] = {}
        self.begun: JournalEvent | None = None
        self.done: JournalEvent | None = None
        self.stopped: JournalEvent | None = None
        self.kept_at: JournalEvent | None = None
        self._seen: set[str] = set()
        self._skips: dict[tuple[str, str], JournalEvent] = {}

    def add(self, event: JournalEvent) -> None:
        """Add an event; a known one changes nothing.

        Raises ValueError for one that isn't as its kind is. To leave it out would be to guess: a
        step might be done twice.
        """
        if event.id in self._seen:
            return
        self._seen.add(event.id)
        self.events.append(event)
        take = getattr(self, f"_take_{event.what}", None)
        if take is not None:
            check(EVENTS[event.what], event.facts, event.what)
            take(event, event.facts)

    def part(self, step: str, host: str) -> Part:
        """Return the step on that host, also one that wasn't begun."""
        part = self.parts.get((step, host)) or Part(step, host)
        skip = self._skips.get((step, host)) or self._skips.get((step, ANYWHERE))
        part.skipped = None if part.done else skip
        return part

    @property
    def steps(self) -> list[str]:
        """The steps in the order they were first begun."""
        return list(dict.fromkeys(step for step, _ in [*self.parts, *self._skips]))

    def undone(self, step: str) -> list[str]:
        """Return the hosts on which `step` was begun and didn't end well."""
        return [host for (name, host), part in self.parts.items() if name == step and not part.done]

    # -- One for each kind of event
    def _take_open(self, event: JournalEvent, facts: Mapping[str, Any]) -> None:
        if self.begun is None:
            self.begun, self.params = event, dict(facts.get("params") or {})
        self.stopped = None

    def _take_begin(self, event: JournalEvent, facts: Mapping[str, Any]) -> None:
        part = self._begun(facts)
        number = int(facts["attempt"])
        if number < part.next_number:  # two passes at once: the run is the same
            return
        part.attempts.append(
            Attempt(
                number,
                str(facts["prog_id"]),
                event.at,
                event.by,
                facts.get("program") or {},
                str(facts.get("user", "")),
                str(facts.get("old_boot", "")),
            )
        )

    def _take_started(self, event: JournalEvent, facts: Mapping[str, Any]) -> None:
        if (attempt := self._attempt(facts)) is not None:
            attempt.confirmed = True

    def _take_end(self, event: JournalEvent, facts: Mapping[str, Any]) -> None:
        attempt = self._attempt(facts)
        if attempt is None or attempt.ended:  # a final State never changes
            return
        attempt.state = State.from_checked(facts["state"])
        attempt.ended_at = event.at
        attempt.stdout, attempt.stderr = str(facts.get("stdout", "")), str(facts.get("stderr", ""))
        attempt.truncated = bool(facts.get("truncated"))

    def _take_rebooted(self, event: JournalEvent, facts: Mapping[str, Any]) -> None:
        if (attempt := self._attempt(facts)) is not None and not attempt.ended:
            attempt.reboot, attempt.ended_at = facts, event.at

    def _take_did(self, event: JournalEvent, facts: Mapping[str, Any]) -> None:
        self._begun({**facts, "host": HERE}).value = event

    def _take_confirmed(self, event: JournalEvent, facts: Mapping[str, Any]) -> None:
        self._begun({**facts, "host": HERE}).value = event

    def _take_skip(self, event: JournalEvent, facts: Mapping[str, Any]) -> None:
        for host in facts.get("hosts") or [ANYWHERE]:
            self._skips[str(facts["step"]), str(host)] = event
        self.stopped = None

    def _take_redo(self, event: JournalEvent, facts: Mapping[str, Any]) -> None:
        step = str(facts["step"])
        for host in [*(facts.get("hosts") or []), ANYWHERE]:
            self._skips.pop((step, str(host)), None)
            part = self.parts.get((step, str(host)))
            if part is not None:
                part.value = None
                if part.attempts:
                    part.attempts[-1].void = True
        self.done = self.stopped = None

    def _take_stop(self, event: JournalEvent, facts: Mapping[str, Any]) -> None:
        self.stopped = event

    def _take_done(self, event: JournalEvent, facts: Mapping[str, Any]) -> None:
        self.done, self.stopped = event, None

    def _take_kept(self, event: JournalEvent, facts: Mapping[str, Any]) -> None:
        self.kept_at = event

    def _begun(self, facts: Mapping[str, Any]) -> Part:
        step, host = str(facts["step"]), str(facts.get("host", HERE))
        return self.parts.setdefault((step, host), Part(step, host))

    def _attempt(self, facts: Mapping[str, Any]) -> Attempt | None:
        part = self.parts.get((str(facts["step"]), str(facts["host"])))
        number = int(facts["attempt"])
        return (
            next((each for each in part.attempts if each.number == number), None) if part else None
        )


# Programs, and whether they are the same


def program_facts(program: Program, stdin: bytes = b"") -> dict[str, Any]:
    """Return the facts that tell programs apart, without the values of the environment."""
    facts = program.to_json()
    if "env" in facts:
        facts["env"] = {
            name: None if value is None else _digest(value.encode(errors="surrogateescape"))
            for name, value in facts["env"].items()
        }
    if stdin:
        facts["stdin"] = {"bytes": len(stdin), "sha256": _digest(stdin)}
    return facts


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Return (name, before, now) of each difference; of an environment the variables' names."""
    found: list[tuple[str, Any, Any]] = []
    for name in sorted({*before, *now}):
        old, new = before.get(name), now.get(name)
        if old == new:
            continue
        if name == "env":
            old, new = old or {}, new or {}
            changed = [
                each for each in sorted({*old, *new}) if old.get(each, "") != new.get(each, "")
            ]
            found += [(f"env {each}", _given(each, old), _given(each, new)) for each in changed]
        else:
            found.append((name, old, new))
    return found


def _given(name: str, env: Mapping[str, Any]) -> str:
    return "not set" if name not in env else "removed" if env[name] is None else "another value"


# The next move


class Do(enum.Enum):
    """The next move of a step on a host."""

    RETURN = "return its recorded result"
    SKIP = "leave it out: somebody said so"
    ASK = "stop: how it ended can't be known, and a person must say"
    RESUME = "take hold of what was begun"
    BEGIN = "begin it, or begin it again"


def next_move(part: Part, *, accepts: bool) -> tuple[Do, int]:
    """Return the next move of `part` and the number of its attempt.

    `accepts`: a bad end is a result like any other.
    """
    current = part.current
    if current is not None and current.ok:
        return Do.RETURN, current.number
    if part.skipped is not None:
        return Do.SKIP, current.number if current else 0
    if current is None:
        return Do.BEGIN, part.next_number
    if not current.ended:
        return Do.RESUME, current.number
    if current.lost:
        return Do.ASK, current.number
    return (Do.RETURN, current.number) if accepts else (Do.BEGIN, part.next_number)
