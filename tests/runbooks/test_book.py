"""The Book: the state that a list of events adds up to, and the next thing to do. No host, no
clock.
"""

from __future__ import annotations

import json
from datetime import datetime, timezone
from typing import Any

import pytest
from hypothesis import given, strategies

from corra.model.program import Program
from corra.runbooks import audit
from corra.runbooks.book import (
    EVENTS,
    Book,
    Do,
    JournalEvent,
    differences,
    journal_events,
    next_move,
    program_facts,
)
from hostile import spoiled
from properties import PROPERTY

NOW = datetime(2026, 11, 24, 12, tzinfo=timezone.utc)
ID = "00001234t123456z-k7m2qxwp"


def state(code: int | None = 0, **more: Any) -> dict[str, Any]:
    given = {
        "prog_id": ID,
        "state": "exited",
        "return_code": code,
        "status": (code or 0) << 8,
        "argv": ["x"],
        "elapsed": 3.0,
    }
    return {**given, **more}


LOST = state(None, state="lost", reason="reboot", status=None)
BEGIN: tuple[str, dict[str, Any]] = (
    "begin",
    {"prog_id": ID, "program": {"argv": ["x"]}, "user": "ops"},
)


def book(*told: tuple[str, dict[str, Any]], step: str = "s", host: str = "h") -> Book:
    made = Book()
    for n, (what, facts) in enumerate(told):
        made.add(
            JournalEvent(
                str(n),
                f"2026-11-24T10:{n:02}:00+00:00",
                "ops@laptop",
                what,
                {"step": step, "host": host, "attempt": 1, **facts},
            )
        )
    return made


def end(code: int) -> tuple[str, dict[str, Any]]:
    return "end", {"state": state(code)}


SKIP: tuple[str, dict[str, Any]] = ("skip", {"hosts": ["h"]})
REDO: tuple[str, dict[str, Any]] = ("redo", {"hosts": ["h"]})


@pytest.mark.parametrize(
    ("told", "accepts", "do", "attempt"),
    [
        ((), False, Do.BEGIN, 1),
        ((BEGIN,), False, Do.RESUME, 1),
        ((BEGIN, ("started", {})), False, Do.RESUME, 1),
        ((BEGIN, end(0)), False, Do.RETURN, 1),
        ((BEGIN, end(2)), False, Do.BEGIN, 2),
        ((BEGIN, end(2)), True, Do.RETURN, 1),
        ((BEGIN, end(2), ("begin", {**BEGIN[1], "attempt": 2})), False, Do.RESUME, 2),
        ((BEGIN, ("end", {"state": LOST})), False, Do.ASK, 1),
        ((BEGIN, ("end", {"state": LOST})), True, Do.ASK, 1),
        ((BEGIN, ("end", {"state": LOST}), REDO), False, Do.BEGIN, 2),
        ((BEGIN, ("end", {"state": LOST}), SKIP), False, Do.SKIP, 1),
        ((BEGIN, ("end", {"state": LOST}), SKIP, REDO), False, Do.BEGIN, 2),
        ((SKIP,), False, Do.SKIP, 0),
        ((("skip", {"hosts": ["*"]}),), False, Do.SKIP, 0),
        ((BEGIN, end(0), ("skip", {"hosts": ["*"]})), False, Do.RETURN, 1),
        ((BEGIN, end(0), REDO), False, Do.BEGIN, 2),
        ((BEGIN, end(0), end(2)), False, Do.RETURN, 1),  # a final State never changes
        ((BEGIN, ("rebooted", {"new_boot": "b", "down_s": 1})), False, Do.RETURN, 1),
    ],
)
def test_what_is_to_be_done_follows_from_what_was(told, accepts, do, attempt):
    assert next_move(book(*told).part("s", "h"), accepts=accepts) == (do, attempt)


def test_a_skip_of_one_host_is_no_skip_of_another():
    made = book(SKIP)
    assert next_move(made.part("s", "h"), accepts=False)[0] is Do.SKIP
    assert next_move(made.part("s", "other"), accepts=False)[0] is Do.BEGIN


def test_two_passes_that_begin_the_same_attempt_mean_the_same_run():
    made = book(BEGIN, BEGIN, end(0))
    assert [each.number for each in made.part("s", "h").attempts] == [1]


WHATS = [
    "open",
    "begin",
    "started",
    "end",
    "did",
    "confirmed",
    "skip",
    "redo",
    "stop",
    "done",
    "note",
    "kept",
    "rebooted",
    "of the future",
]


@given(
    strategies.lists(
        strategies.tuples(
            strategies.sampled_from(WHATS),
            strategies.integers(1, 3),
            strategies.sampled_from(["", "h", "*"]),
        ),
        max_size=12,
    )
)
@PROPERTY
def test_any_sequence_of_events_adds_up_and_twice_is_once(sequence):
    once, twice = Book(), Book()
    for n, (what, attempt, host) in enumerate(sequence):
        facts = {
            "step": "s",
            "host": host,
            "attempt": attempt,
            "prog_id": ID,
            "state": state(),
            "hosts": [host],
            "params": {},
            "why": "w",
        }
        event = JournalEvent(str(n), "2026-11-24T10:00:00+00:00", "o@l", what, facts)
        again = next(iter(journal_events(event.to_line())))
        assert again == JournalEvent(
            event.id, event.at, event.by, event.what, json.loads(json.dumps(facts))
        )
        once.add(event)
        twice.add(again)
        twice.add(again)
    assert once.parts == twice.parts and [
        next_move(p, accepts=False) for p in once.parts.values()
    ] == [next_move(p, accepts=False) for p in twice.parts.values()]
    audit.screen("n", "k", once, NOW, "here", 80)
    audit.markdown("n", "k", once)
    json.dumps(audit.as_json("n", "k", once, "here"))


@given(strategies.text())
@PROPERTY
def test_lines_that_are_no_events_are_left_aside(text):
    good = JournalEvent("1", "t", "by", "note", {"text": "x"})
    assert good in list(journal_events(text + "\n" + good.to_line()))


def test_the_difference_between_two_programs_names_no_value_of_the_environment():
    before = program_facts(Program(("a",), env={"TOKEN": "old", "SAME": "s"}))
    now = program_facts(Program(("b",), cwd="/x", env={"TOKEN": "new", "SAME": "s"}), b"in")
    assert "old" not in json.dumps(before)
    told = differences(before, now)
    assert [name for name, _, _ in told] == ["argv", "cwd", "env TOKEN", "stdin"]
    assert told[2][1:] == ("another value", "another value")


def test_markdown_shows_what_was_done_and_nothing_of_it_is_markup():
    made = book(
        ("open", {"params": {"v": "1"}}),
        BEGIN,
        end(2),
        ("note", {"text": "<b> | `x` *"}),
        ("stop", {"why": "STOPPED at 1 s"}),
    )
    text = "\n".join(audit.markdown("k", "OPS-1", made))
    assert (
        "| 1 | s | h | 1 | 2026-11-24T10:01:00+00:00 | ops@laptop | x |" in text
        and "FAILED 2" in text
    )
    assert "note: \\<b\\> \\| \\`x\\` \\*" in text


@PROPERTY
@given(strategies.sampled_from(sorted(EVENTS)), strategies.data())
def test_an_event_that_isnt_as_its_kind_is_is_a_value_error_and_no_other(what, data):
    facts = data.draw(spoiled(EVENTS[what]))
    made = Book()
    made.add(JournalEvent("1", "2026-11-23T01:44:09+00:00", "ops@h", "open", {}))
    try:
        made.add(JournalEvent("2", "2026-11-23T01:44:09+00:00", "ops@h", what, facts))
    except ValueError:
        return
    for (step, host), part in made.parts.items():
        next_move(made.part(step, host), accepts=False)
        assert part.next_number > 0
