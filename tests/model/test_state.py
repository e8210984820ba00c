"""A State: read strictly, and an exit code that never claims success without proof."""

from __future__ import annotations

import errno
import json
from dataclasses import fields

import pytest
from hypothesis import given, strategies as st

from corra.agent import FINAL, REASONS, TRANSITIONS
from corra.model.state import State, exit_code
from properties import PROPERTY, json_values

ID = "20261123t014409z-k7m2qxwp"
KEYS = [field.name for field in fields(State)]


def ended(**facts: object) -> State:
    return State.from_json({"prog_id": ID, "state": "exited", **facts})


def not_started(stage: str, number: int) -> State:
    return State.from_json(
        {"prog_id": ID, "state": "not_started", "exception": {"stage": stage, "errno": number}}
    )


def test_the_table_of_moves_is_closed_and_final_means_final():
    assert set(FINAL) == {"exited", "not_started", "lost"}
    for after in TRANSITIONS.values():
        assert set(after) <= set(TRANSITIONS)
    assert all(not TRANSITIONS[state] for state in FINAL)
    assert len(set(REASONS)) == len(REASONS)


@pytest.mark.parametrize("code", [0, 1, 7, 125, 126, 127, 137, 255])
def test_a_program_that_exits_gives_its_own_code(code):
    assert exit_code(ended(reason="exited", return_code=code, status=code << 8)) == code


@pytest.mark.parametrize(
    "number, name",
    [(1, "SIGHUP"), (9, "SIGKILL"), (11, "SIGSEGV"), (15, "SIGTERM"), (34, "SIG34"), (64, "SIG64")],
)
@pytest.mark.parametrize("reason", ["signaled", "killed", "oom"])
def test_a_program_that_a_signal_ended_gives_128_and_its_number(number, name, reason):
    assert exit_code(ended(reason=reason, signal=name, status=number)) == 128 + number
    assert (
        exit_code(ended(reason=reason, signal=name, status=number | 0x80, core_dumped=True))
        == 128 + number
    )


def test_a_program_that_its_timeout_ended_gives_124_however_it_took_it():
    assert exit_code(ended(reason="timeout", return_code=0, status=0)) == 124
    assert exit_code(ended(reason="timeout", signal="SIGKILL", status=9)) == 124


def test_a_program_that_could_not_be_executed_gives_what_a_shell_gives():
    assert exit_code(not_started("exec", errno.ENOENT)) == 127
    assert exit_code(not_started("exec", errno.EACCES)) == 126
    assert exit_code(not_started("exec", errno.ENOEXEC)) == 126
    assert exit_code(not_started("cwd", errno.ENOENT)) == 125
    assert exit_code(not_started("setup", errno.ENOMEM)) == 125
    assert exit_code(State(ID, "not_started")) == 125


def test_what_is_open_gives_122_and_what_is_lost_123():
    assert exit_code(State(ID, "starting")) == 122
    assert exit_code(State(ID, "running")) == 122
    assert exit_code(State(ID, "lost", reason="reboot")) == 123


def test_an_end_without_a_status_is_never_a_success():
    assert exit_code(ended()) == 123
    assert exit_code(ended(reason="exited")) == 123


@PROPERTY
@given(json_values | st.dictionaries(st.sampled_from(KEYS), json_values))
def test_any_json_is_a_state_or_a_value_error(value):
    try:
        state = State.from_json(value)
    except ValueError:
        return
    assert 0 <= exit_code(state) <= 255


@PROPERTY
@given(st.sampled_from(sorted(TRANSITIONS)), st.dictionaries(st.sampled_from(KEYS), json_values))
def test_whatever_passes_can_be_counted_compared_and_shown(name, value):
    try:
        state = State.from_json({**value, "prog_id": ID, "state": name})
    except ValueError:
        return
    assert 0 <= exit_code(state) <= 255
    assert state.ended == (name in FINAL)
    assert State.from_json(json.loads(json.dumps(state.to_json()))) == state


@pytest.mark.parametrize(
    "value",
    [
        None,
        [],
        "running",
        {},
        {"prog_id": ID},
        {"state": "running"},
        {"prog_id": 5, "state": "running"},
        {"prog_id": "../../etc", "state": "running"},
        {"prog_id": ID, "state": "fine"},
        {"prog_id": ID, "state": []},
        {"prog_id": ID, "state": "exited", "return_code": 256},
        {"prog_id": ID, "state": "exited", "return_code": -1},
        {"prog_id": ID, "state": "exited", "return_code": True},
        {"prog_id": ID, "state": "exited", "return_code": "0"},
        {"prog_id": ID, "state": "exited", "status": 1.5},
        {"prog_id": ID, "state": "running", "argv": "ls"},
        {"prog_id": ID, "state": "running", "argv": [1]},
        {"prog_id": ID, "state": "running", "streams": {"stdout": 5}},
        {"prog_id": ID, "state": "running", "streams": {"stdout": {"length": "5"}}},
        {"prog_id": ID, "state": "running", "elapsed": float("nan")},
        {"prog_id": ID, "state": "running", "origin": ["ops"]},
        {"prog_id": ID, "state": "running", "stragglers": [7]},
    ],
)
def test_what_is_no_state_is_refused(value):
    with pytest.raises(ValueError, match=r"State|state|return code"):
        State.from_json(value)


def test_a_newer_agents_keys_are_left_aside_and_null_is_the_default():
    assert State.from_json(
        {"prog_id": ID, "state": "running", "mood": "fine", "host": None, "argv": None}
    ) == State(ID, "running")


def test_the_seeds_name_for_the_id_is_kept():
    state = State.from_json(
        {"prog_id": ID, "state": "running", "argv": ["true"], "name": "migrate"}
    )
    assert state.to_json()["proc_id"] == state.to_json()["prog_id"] == ID
    assert state.label == "migrate (k7m2qx)"
