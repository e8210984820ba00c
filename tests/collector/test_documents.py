"""The States that a run may report: the collector keeps or refuses each, and a kept State harms no
reader.
"""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from collector import ended
from corra.collector import documents
from corra.collector.limits import RequestRefusal
from corra.collector.notices import Hook, notice_body
from corra.model.state import State
from properties import PROPERTY

MANY = settings(PROPERTY, max_examples=10 * PROPERTY.max_examples)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8)
    | st.sampled_from(["\0\udce9", "9999-99-99T00:00:00Z", "2026-11-24T01:00:00.000+00:00"]),
    lambda each: (
        st.lists(each, max_size=3)
        | st.dictionaries(st.sampled_from(["errno", "stage", "length", "user", "fleet"]), each)
    ),
    max_leaves=4,
)
NAMES = [field.name for field in fields(State) if field.name not in ("prog_id", "state")]
STATES = st.sampled_from(["exited", "lost", "not_started", "running"])


@MANY
@given(told=st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=3), state=STATES)
def test_any_state_is_kept_or_refused_and_what_is_kept_breaks_no_reader(told, state):
    try:
        doc = documents.read_state({**ended("r1", state=state), **told}, "r1")
        columns: dict[str, Any] = {
            **documents.identity_columns(doc),
            **documents.state_columns(documents.merged({"prog_id": "r1"}, doc)),
        }
    except RequestRefusal as refusal:
        assert refusal.status == 422
        return
    for text in columns.values():
        assert not isinstance(text, str) or "\0" not in text.encode().decode()
    row = {**columns, "ended": 1.0, "made": 1.0, "heard": 1.0, "version": 1, "id": 1}
    shown = json.loads(json.dumps(documents.shown(row, {"stdout": 3}, [], 0)))
    assert State.from_json(shown).state == state
    for hook in (Hook("http://x"), Hook("http://x", "slack")):
        json.loads(notice_body(hook, shown))


@given(st.lists(st.text(max_size=20), min_size=1, max_size=5), st.integers(0, 100_000))
@PROPERTY
def test_a_command_is_kept_from_its_beginning_and_never_longer_than_64_kib(argv, more):
    argv = [*argv, "\U0001f600" * more, "end"]
    told = documents.read_state(ended("r1", argv=argv), "r1")
    kept = json.loads(documents.state_columns(told)["doc"])["argv"]
    assert len(json.dumps(kept)) <= documents.ARGV_MAX + 100
    assert kept[:-1] == argv[: len(kept) - 1]
    assert argv[len(kept) - 1].startswith(kept[-1].removesuffix(".."))


@pytest.mark.parametrize("key", documents.IDENTITY)
def test_what_was_registered_is_never_replaced(key):
    first: Any = {"origin": {"user": "a"}, "argv": ["a"]}.get(key, "a")
    then: Any = {"origin": {"user": "b"}, "argv": ["b"]}.get(key, "b")
    assert documents.merged({key: first}, {key: then})[key] == first
    assert documents.merged({}, {key: then})[key] == then
