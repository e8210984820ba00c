"""The agent's pure parts, imported and called: the keeper's decisions, States, records, JSON, the
index, requests.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, strategies as st

from corra import agent
from corra.model import ids
from corra.model.state import State
from properties import PROPERTY, contradictions, json_values

MS = 10**6
VIEW = {
    "stop": None, "ended": False, "recorded": False, "final": False, "alone": False,
    "wait_children": False, "timed": True,
    "timeout_at": None, "kill_ns": agent.KILL_DEADLINE_NS, "again_at": 0, "retry_at": 0,
    "blocked": False, "room_at": 0, "due": False, "told": False, "reaped": False,
    "open": True, "courier": False, "courier_at": None, "heed_at": None,
}  # fmt: skip

OVER = {"ended": True, "recorded": True, "final": True, "told": True, "reaped": True}


def view(**facts: Any) -> dict[str, Any]:
    assert set(facts) <= set(VIEW)
    return {**VIEW, **facts}


# ---------------------------------------------------------------- step


@pytest.mark.parametrize(
    "facts, expected",
    [
        ({}, (None, None)),
        ({"timeout_at": 101}, (None, 101)),
        ({"timeout_at": 100}, ("timeout", None)),
        ({"timeout_at": 100, "stop": ["n", "killed", 200, "grace"]}, (None, 200)),
        (
            {
                "timeout_at": 100,
                "timed": False,
                "ended": True,
                "recorded": True,
                "wait_children": True,
            },
            (None, None),
        ),
        ({"stop": ["n", "killed", 150, "grace"]}, (None, 150)),
        ({"stop": ["n", "killed", 100, "grace"]}, ("kill", None)),
        ({"stop": ["n", "killed", 150, "grace"], "alone": True, "ended": True}, ("stopped", None)),
        ({"stop": ["n", "killed", 100, "killing"], "again_at": 120}, (None, 120)),
        ({"stop": ["n", "killed", 90, "killing"], "again_at": 100}, ("kill", None)),
        (
            {"stop": ["n", "killed", 100 - agent.KILL_DEADLINE_NS, "killing"], "again_at": 120},
            ("stopped", None),
        ),
        ({"stop": ["n", "killed", 90, "done"]}, (None, None)),
        ({"ended": True}, ("record", None)),
        ({"ended": True, "retry_at": 130}, (None, 130)),
        ({"ended": True, "recorded": True}, ("finish", None)),
        ({"ended": True, "recorded": True, "wait_children": True}, (None, None)),
        ({"ended": True, "recorded": True, "wait_children": True, "alone": True}, ("finish", None)),
        ({"ended": True, "recorded": True, "final": True}, ("tell", None)),
        ({"ended": True, "recorded": True, "final": True, "due": True}, (None, None)),
        (
            {
                "ended": True,
                "recorded": True,
                "final": True,
                "due": True,
                "blocked": True,
                "room_at": 105,
            },
            (None, 105),
        ),
        ({"ended": True, "recorded": True, "final": True, "told": True}, ("reap", None)),
        (
            {"ended": True, "recorded": True, "final": True, "told": True, "reaped": True},
            (None, None),
        ),
        (
            {
                "ended": True,
                "recorded": True,
                "final": True,
                "told": True,
                "reaped": True,
                "open": False,
            },
            ("leave", None),
        ),
        ({**OVER, "open": False, "courier": True}, (None, None)),
        ({**OVER, "open": False, "courier": True, "courier_at": 130}, (None, 130)),
        ({"courier": True, "courier_at": 100}, ("courier", None)),
        ({"blocked": True, "room_at": 100}, ("unblock", None)),
        ({"heed_at": 100}, ("heed", None)),
        ({"heed_at": 130, "timeout_at": 120}, (None, 120)),
        ({"blocked": True, "room_at": 130, "timeout_at": 120}, (None, 120)),
    ],
)
def test_the_keeper_decides_by_what_it_sees(facts, expected):
    assert agent.step(view(**facts), 100) == expected


times = st.integers(0, 9) | st.integers(0, 9).map(lambda ns: ns + agent.KILL_DEADLINE_NS)
views = st.fixed_dictionaries({
    **{key: st.booleans() for key, value in VIEW.items() if isinstance(value, bool)},
    **dict.fromkeys(("again_at", "retry_at", "room_at"), times),
    "kill_ns": st.just(agent.KILL_DEADLINE_NS),
    "timeout_at": st.none() | times,
    "courier_at": st.none() | times,
    "heed_at": st.none() | times,
    "stop": st.none() | st.tuples(
        st.just("n"), st.just("killed"), times, st.sampled_from(["grace", "killing", "done"])
    ).map(list),
})  # fmt: skip


@PROPERTY
@given(views, times)
def test_a_keeper_that_has_nothing_to_do_sleeps_until_a_time_to_come_or_for_ever(seen, now):
    action, wake = agent.step(seen, now)
    if action is None:
        assert wake is None or wake > now
    else:
        assert hasattr(agent.Keeper, "do_" + action) or action == "leave"


@PROPERTY
@given(views, times)
def test_nobody_leaves_before_the_end_is_recorded_told_and_reaped_and_all_output_moved(seen, now):
    if agent.step(seen, now)[0] == "leave":
        assert (
            seen["ended"] and seen["recorded"] and seen["final"] and seen["told"] and seen["reaped"]
        )
        assert not seen["due"] and not seen["open"]


# ---------------------------------------------------------------- the State

REQUEST = {
    "prog_id": "20261123t014409z-k7m2qxwp",
    "program": {"argv": ["true"], "env": {"B": "secret", "A": None}},
}
HERE, START = "this-boot", 50 * 10**9
SIZE = st.integers(0, 1 << 40)


def facts(**more: Any) -> dict[str, Any]:
    base = {
        "alive": True, "launched": (4711, 99, HERE, 1_700_000_000 * 10**9, START),
        "record": agent.Record(), "failure": None,
        "sizes": {"stdout": 10, "stderr": 0}, "last_ns": 0, "gone": False, "boot_id": HERE,
        "mono_ns": START + 10**9, "spool": "/s",
    }  # fmt: skip
    return {**base, **more}


def ended(
    status: int, reason: str = "exited", phase: str = "final", **lengths: int
) -> agent.Record:
    record = agent.Record()
    record.outcome, record.phase, record.lengths = (
        (status, 1_700_000_001 * 10**9, 10**9, reason),
        phase,
        lengths,
    )
    return record


@pytest.mark.parametrize(
    "changes, state, reason",
    [
        ({"launched": None}, "starting", None),
        ({"launched": None, "alive": False}, "starting", None),
        ({}, "running", None),
        ({"alive": False}, "lost", "agent-gone"),
        ({"boot_id": "another"}, "lost", "reboot"),
        ({"gone": True}, "lost", "spool-gone"),
        ({"record": ended(0)}, "exited", "exited"),
        ({"record": ended(9, "signaled"), "alive": False}, "exited", "signaled"),
        ({"record": ended(0), "boot_id": "another", "alive": False}, "exited", "exited"),
        ({"record": ended(0, phase="ended")}, "running", None),
        ({"record": ended(0, phase="ended"), "alive": False}, "exited", "exited"),
        (
            {
                "failure": [
                    ["stage", "exec"],
                    ["errno", "2"],
                    ["type", "ENOENT"],
                    ["message", "no", "such"],
                ]
            },
            "not_started",
            "exec",
        ),
        (
            {"failure": [["stage", "cwd"], ["errno", "13"], ["type", "EACCES"], ["message", "x"]]},
            "not_started",
            "setup",
        ),
    ],
)
def test_a_state_is_computed_from_the_files_and_the_lock_alone(changes, state, reason):
    found = agent.state_of(REQUEST, facts(**changes))
    assert (found["state"], found["reason"]) == (state, reason)
    assert (found["status"] is None) == (state != "exited")
    assert State.from_json(found).state == state
    assert "secret" not in json.dumps(found) and found["env"] == ["A", "B"]


@st.composite
def seen(draw: st.DrawFn) -> dict[str, Any]:
    """Whatever a reader may find of a run, in any combination."""
    record = agent.Record()
    record.phase = draw(st.sampled_from(["live", "carrying", "ended", "final"]))
    record.agent, record.guards = draw(st.sampled_from([(0, []), (7, [(5, 1), (7, 1)])]))
    record.blocked = draw(st.sampled_from([None, (10**18, errno.ENOSPC)]))
    status = draw(st.sampled_from([0, 256, 0xFF00, 9, 15, 0x86]))
    reason = draw(st.sampled_from(["exited", "signaled", "killed", "timeout", "oom"]))
    record.outcome = draw(st.sampled_from([None, (status, 10**18 + 1, 5, reason)]))
    record.usage = draw(st.sampled_from([None, (1,) * 9]))
    record.lengths = draw(st.dictionaries(st.sampled_from(["stdout", "stderr"]), SIZE))
    launched = draw(st.sampled_from([None, (4711, 99, HERE, 10**18, START)]))
    failure = [["stage", "setup"], ["errno", "2"], ["type", "ENOENT"], ["message", "no"]]
    return facts(
        record=draw(st.sampled_from([None, record])),
        alive=draw(st.booleans()),
        launched=launched,
        failure=draw(st.sampled_from([None, failure])),
        gone=draw(st.booleans()),
        boot_id=draw(st.sampled_from([HERE, "another"])),
        sizes={"stdout": draw(SIZE), "stderr": draw(SIZE)},
        heads=draw(st.dictionaries(st.sampled_from(["stdout", "stderr"]), SIZE)),
    )


@PROPERTY
@given(seen(), st.booleans())
def test_a_state_never_says_what_cant_be_true_together(found, carried):
    run = {"carrier": ["ssh"]} if carried else {}
    assert contradictions(agent.state_of({**REQUEST, "run": run}, found)) == []


@pytest.mark.parametrize("offset_s", [-86400, 86400, -10 * 365 * 86400])
def test_durations_are_the_monotonic_clocks_whatever_the_wall_clock_does(offset_s):
    launched = (4711, 99, HERE, (1_700_000_000 + offset_s) * 10**9, START)
    assert agent.state_of(REQUEST, facts(launched=launched))["elapsed"] == 1.0
    assert agent.state_of(REQUEST, facts(launched=launched, record=ended(0)))["elapsed"] == 1.0


@pytest.mark.parametrize(
    "status, code, name, core",
    [
        (0, 0, None, False),
        (7 << 8, 7, None, False),
        (9, None, "SIGKILL", False),
        (0x8B, None, "SIGSEGV", True),
    ],
)
def test_a_wait_status_is_told_as_code_signal_and_core(status, code, name, core):
    found = agent.state_of(REQUEST, facts(record=ended(status)))
    assert (found["return_code"], found["signal"], found["core_dumped"], found["status"]) == (
        code,
        name,
        core,
        status,
    )


def test_what_the_end_covers_what_came_later_and_what_is_missing_are_told_apart():
    later = agent.state_of(REQUEST, facts(record=ended(0, stdout=8, stderr=0)))
    assert later["streams"]["stdout"] == {"length": 8, "dropped": 0, "late": 2}
    due = agent.state_of(REQUEST, facts(record=ended(0, stdout=12, stderr=0)))
    assert due["streams"]["stdout"] == {"length": 12, "dropped": 0, "late": 0}
    missing = agent.state_of(REQUEST, facts(record=ended(0, stdout=12, stderr=0), alive=False))
    assert missing["streams"]["stdout"] == {"length": 12, "dropped": 2, "late": 0}


# ---------------------------------------------------------------- records

word = st.text(
    st.characters(exclude_characters=" \n", exclude_categories=["Cs"]), min_size=1, max_size=20
)
whole = st.integers(0, 1 << 62)


@PROPERTY
@given(st.lists(st.lists(word, min_size=1, max_size=5), min_size=1, max_size=8))
def test_a_page_reads_back_as_it_was_written(lines):
    page = agent.pack(lines)
    assert len(page) == agent.PAGE
    assert agent.unpack(page) == lines


@PROPERTY
@given(st.binary(max_size=200), st.integers(0, 200), st.integers(0, 255))
def test_a_torn_or_foreign_page_is_none_and_never_an_error(data, at, value):
    assert agent.unpack(data.ljust(agent.PAGE, b"\n")) is None
    page = bytearray(agent.pack([["phase", "final"], ["outcome", "0", "1", "2", "exited"]]))
    used = len(page.rstrip(b"\n"))
    page[at % used] ^= value or 1
    found = agent.unpack(bytes(page))
    # Another notation of the checksum's digit ("a" for "A") may have the same value.
    assert found is None or found == [["phase", "final"], ["outcome", "0", "1", "2", "exited"]]


@PROPERTY
@given(
    st.lists(st.tuples(whole, word, word, word, word), max_size=200),
    st.none() | st.tuples(whole, whole, whole, word),
)
def test_a_record_reads_back_and_when_it_is_full_the_oldest_signals_go(sent, outcome):
    record = agent.Record()
    record.phase, record.agent, record.guards = "final", 7, [(1, 2), (3, 4)]
    record.sent, record.outcome, record.stop = sent, outcome, ["n", "killed", 5, "done"]
    record.survivors, record.blocked, record.lengths, record.usage = (
        [(1, 2)],
        (3, 28),
        {"stdout": 4},
        (1, 2, 3),
    )
    again = agent.Record.read(record.page())
    kept = again.sent
    assert kept == sent[len(sent) - len(kept) :]
    again.sent = sent
    assert vars(again) == vars(record)


def test_a_message_too_long_for_its_page_is_cut_and_not_lost():
    found = agent.unpack(agent.pack([("stage", "exec"), ("message", "x" * 9000)]))
    assert found[0] == ["stage", "exec"]
    assert found[1][0] == "message" and set(found[1][1]) == {"x"}


# ---------------------------------------------------------------- JSON


finite = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=10,
)


@PROPERTY
@given(finite)
def test_our_json_is_jsons_json(value):
    assert json.loads(agent.to_json(value)) == value
    assert agent.from_json(json.dumps(value).encode()) == value
    assert agent.to_json(value).isascii() and "\n" not in agent.to_json(value)


@PROPERTY
@given(st.binary(max_size=30))
def test_bytes_that_are_no_utf_8_go_through_json_unchanged(data):
    text = os.fsdecode(data)
    assert agent.octets(agent.from_json(agent.to_json(text).encode())) == data


@PROPERTY
@given(
    st.binary(max_size=40)
    | st.text('{}[]",:0123456789.eE+-\\untrfals NI', max_size=30).map(str.encode)
)
def test_what_is_no_json_is_a_value_error(data):
    try:
        expected = json.loads(data.decode())
    except ValueError:
        with pytest.raises(ValueError):
            agent.from_json(data)
    else:
        assert repr(agent.from_json(data)) == repr(expected)  # nan doesn't equal itself


# ---------------------------------------------------------------- ids and requests


@PROPERTY
@given(st.text("abcxyz0189._-/ A\0é", max_size=70))
def test_an_id_that_is_accepted_is_a_plain_file_name(text):
    if agent.valid_id(text):
        assert (
            text not in {".", ".."}
            and "/" not in text
            and "\0" not in text
            and len(text) <= 64
            and text.isascii()
        )


def test_ids_made_here_and_by_the_client_have_the_same_tail():
    for made in (agent.new_id(), ids.new_id(), "20261123t014409z-k7m2qxwp"):
        assert agent.valid_id(made) and agent.tail_of(made) == made[-8:]


@pytest.mark.parametrize(
    "text",
    [
        "nightly",
        "nightly-k7m2qxwp",
        "20261123t014409z-K7m2qxwp",
        "20261123t014409z-aaaaaaaa",
        "20261123-k7m2qxwp",
    ],
)
def test_an_id_that_somebody_gave_is_its_own_tail(text):
    assert agent.tail_of(text) == text


@PROPERTY
@given(json_values)
def test_no_request_whatever_makes_the_check_fail(value):
    assert isinstance(agent.complaints(value), list)


KEYS: Any = agent.KEYS
requests: st.SearchStrategy[Any] = st.fixed_dictionaries(
    {
        "program": st.fixed_dictionaries(
            {"argv": st.just(["a"]) | json_values},
            optional={key: json_values for key in KEYS["program"] if key != "argv"},
        )
    },
    optional={
        "run": st.fixed_dictionaries({}, optional=dict.fromkeys(KEYS["run"], json_values)),
        "secrets": json_values,
        "prog_id": json_values,
        "cursor": json_values,
    },
)


@PROPERTY
@given(requests)
def test_whatever_is_wrong_in_a_request_is_a_complaint_and_what_passes_can_be_given_to_the_kernel(
    request,
):
    if agent.start_complaints(request):
        return
    program = request["program"]
    assert program["argv"] and all(b"\0" not in agent.octets(each) for each in program["argv"])
    agent.environment({**request, "prog_id": "x"}, {b"A": b"1"})
    for key in ("timeout", "grace"):
        assert 0 <= ((request.get("run") or {}).get(key) or 0) < float("inf")


# ---------------------------------------------------------------- the index


class Directory:
    """A run's files as the keeper writes them: one index record when the stream changes, or 10 ms
    after that stream's last record.
    """

    def __init__(self, at: Path) -> None:
        self.at, self.clock, self.latest, self.stamps = at, 10**18, "", {"stdout": 0, "stderr": 0}
        self.written: list[tuple[str, bytes]] = []
        for name in ("stdout", "stderr", "index"):
            (at / name).write_bytes(b"")
        self.fd = os.open(at, os.O_RDONLY)
        self.run: Any = SimpleNamespace(directory=self.fd, streams=["stdout", "stderr"], heads=dict)

    def write(self, name: str, data: bytes, pause_ms: int) -> None:
        self.clock += pause_ms * MS
        number = ("stdout", "stderr").index(name)
        if self.latest != name or self.clock - self.stamps[name] >= agent.INDEX_EVERY_NS:
            self.latest, self.stamps[name] = name, self.clock
            with (self.at / "index").open("ab") as index:
                index.write(
                    agent.INDEX_RECORD.pack(
                        self.clock, number << agent.STREAM_SHIFT | self.size(name)
                    )
                )
        with (self.at / name).open("ab") as file:
            file.write(data)
        self.written.append((name, data))

    def size(self, name: str) -> int:
        return (self.at / name).stat().st_size

    def sizes(self) -> dict[str, int]:
        return {name: self.size(name) for name in ("stdout", "stderr")}


def plan(
    times: agent.Times, sizes: dict[str, int], cursor: dict[str, int]
) -> list[tuple[str, int, int, int]]:
    """Return what a follower takes of the spans, as Follow.plan does."""
    taken = []
    while True:
        for name, begin, end, time_ns in times.spans(sizes):
            if end > cursor[name]:
                taken.append((name, max(begin, cursor[name]), end, time_ns))
                cursor[name] = end
        if not times.behind:
            return taken


writes = st.lists(
    st.tuples(
        st.sampled_from(["stdout", "stderr"]),
        st.integers(1, 9),
        st.sampled_from([0, 1, 9, 10, 50]),
        st.booleans(),
    ),
    max_size=30,
)


@PROPERTY
@given(writes)
def test_a_follower_gets_each_byte_once_in_the_order_of_the_index_however_often_it_looks(
    tmp_path_factory, steps
):
    directory = Directory(tmp_path_factory.mktemp("run"))
    times, cursor = agent.Times(directory.run), {"stdout": 0, "stderr": 0}
    spans = []
    for name, size, pause, look in steps:
        directory.write(name, b"x" * size, pause)
        if look:
            spans += plan(times, directory.sizes(), cursor)
    spans += plan(times, directory.sizes(), cursor)
    at = {"stdout": 0, "stderr": 0}
    for name, begin, end, _ in spans:
        assert begin == at[name] and end > begin
        at[name] = end
    assert at == directory.sizes() == cursor

    def runs(pairs: list[tuple[str, int]]) -> list[list[Any]]:
        joined: list[list[Any]] = []
        for name, size in pairs:
            if joined and joined[-1][0] == name:
                joined[-1][1] += size
            else:
                joined.append([name, size])
        return joined

    order = [(name, len(data)) for name, data in directory.written]
    assert runs([(name, end - begin) for name, begin, end, _ in spans]) == runs(order)
    os.close(times.file)
    os.close(directory.fd)


@pytest.mark.parametrize("damage", ["missing", "empty", "torn", "foreign"])
def test_a_damaged_index_loses_times_and_never_a_byte(tmp_path, damage):
    directory = Directory(tmp_path)
    for number in range(20):
        directory.write(("stdout", "stderr")[number % 2], b"abc", 10)
    index = tmp_path / "index"
    if damage == "missing":
        index.unlink()
    elif damage == "foreign":
        index.write_bytes(b"\xff" * 160)
    else:
        index.write_bytes(b"" if damage == "empty" else index.read_bytes()[:-50])
    spans = plan(agent.Times(directory.run), directory.sizes(), {"stdout": 0, "stderr": 0})
    at = {"stdout": 0, "stderr": 0}
    for name, begin, end, _ in spans:
        assert begin == at[name]
        at[name] = end
    assert at == directory.sizes()


@pytest.mark.parametrize("records", [0, 1, 65_535, 65_536, 65_537, 140_000])
def test_a_tail_is_exact_however_long_the_index_is(tmp_path, records):
    """The last lines alternate between the streams. One read of the index takes 65,536 records."""
    names = ("stdout", "stderr")
    packed = [
        agent.INDEX_RECORD.pack(10**18 + at, at % 2 << agent.STREAM_SHIFT | at // 2 * 2)
        for at in range(records)
    ]
    (tmp_path / "index").write_bytes(b"".join(packed))
    for number, name in enumerate(names):
        (tmp_path / name).write_bytes(b"x\n" * ((records + 1 - number) // 2))

    run = SimpleNamespace(directory=os.open(tmp_path, os.O_RDONLY), streams=list(names), heads=dict)
    files = {name: os.open(tmp_path / name, os.O_RDONLY) for name in names}
    sizes = {name: (tmp_path / name).stat().st_size for name in names}
    index = os.open(tmp_path / "index", os.O_RDONLY)
    for lines in (0, 1, 2, 5, 200):
        cursor = agent.tail_cursor(run, files, index, lines)
        left = sum(sizes[name] - cursor[name] for name in names) // 2
        assert left == min(lines, records)
        assert abs((sizes["stdout"] - cursor["stdout"]) - (sizes["stderr"] - cursor["stderr"])) <= 2
    spans = plan(agent.Times(run), dict(sizes), {"stdout": 0, "stderr": 0})
    assert len(spans) == records
    for fd in (run.directory, index, *files.values()):
        os.close(fd)


# ---------------------------------------------------------------- moving output


def stream_into(at: Path, flags: int) -> tuple[agent.Stream, int]:
    """Return a Stream over a real FIFO and a file, and the FIFO's other end."""
    os.mkfifo(at / "fifo")
    fifo = os.open(at / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    writer = os.open(at / "fifo", os.O_WRONLY)
    return agent.Stream(
        0, "stdout", fifo, os.open(at / "stdout", os.O_WRONLY | os.O_CREAT | flags), None
    ), writer


@pytest.mark.parametrize("flags", [0, os.O_APPEND], ids=["by splice", "where splice says EINVAL"])
def test_output_is_moved_byte_for_byte_until_there_is_none_and_then_until_its_end(tmp_path, flags):
    stream, writer = stream_into(tmp_path, flags)
    assert stream.move() is None
    data = bytes(range(256)) * 200
    os.write(writer, data)
    assert stream.coming() == len(data)
    assert stream.move() == len(data) and stream.move() is None and stream.coming() == 0
    os.close(writer)
    assert stream.move() == 0
    assert (tmp_path / "stdout").read_bytes() == data


def test_bytes_that_wait_for_room_are_waited_for_and_bytes_that_are_gone_are_not(tmp_path):
    stream, writer = stream_into(tmp_path, 0)
    pump = agent.Pump.__new__(agent.Pump)
    pump.streams = [stream]
    os.write(writer, b"12345")
    assert pump.written() == {"stdout": 5} and pump.short_of({"stdout": 5})
    stream.held = b"67"  # read from the FIFO, but not yet written to the file
    assert pump.written() == {"stdout": 7}
    stream.held = b""
    stream.move()
    assert not pump.short_of({"stdout": 5})
    os.truncate(tmp_path / "stdout", 2)
    assert not pump.short_of({"stdout": 5})
    os.close(writer)


# ---------------------------------------------------------------- what it reads of the system


def test_a_process_may_have_any_name_and_is_still_told_right(tmp_path):
    pid = os.fork()
    if not pid:
        try:
            Path("/proc/self/comm").write_text("a) Z 1 1 (")
            os.read(0, 0)
            os.kill(os.getpid(), 19)
        finally:
            os._exit(0)
    os.waitpid(pid, os.WUNTRACED)
    found = agent.process(pid)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    assert found[0] == "T" and found[1] == os.getpid() and found[3] == "a) Z 1 1 ("


def test_a_signal_needs_the_right_start_time_and_never_goes_to_init_or_a_group():
    mine = agent.process(os.getpid())
    assert agent.signal_process(os.getpid(), mine[2], 0)
    assert not agent.signal_process(os.getpid(), mine[2] - 1, 0)
    assert not any(agent.signal_process(pid, 0, 0) for pid in (1, 0, -1, -os.getpid()))


@pytest.mark.parametrize("status", [0, 7, 255])
def test_the_end_of_a_child_is_seen_without_reaping_it(status):
    pid = os.fork()
    if not pid:
        os._exit(status)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert agent.ended(pid) == agent.ended(pid) == status << 8
    assert len(agent.usage(pid) or ()) in {0, 9}
    assert os.waitpid(pid, 0) == (pid, status << 8)
    with pytest.raises(ChildProcessError):
        agent.ended(pid)


def test_a_stop_under_ptrace_is_no_end_and_the_program_goes_on_with_its_signal():
    ptrace, (ours, theirs) = ctypes.CDLL(None).ptrace, os.pipe()
    pid = os.fork()
    if not pid:
        signal.signal(signal.SIGUSR1, lambda *_: os._exit(42))
        ptrace(0, 0, 0, 0)  # PTRACE_TRACEME: its parent is its tracer now
        os.close(theirs)
        os.kill(os.getpid(), signal.SIGUSR1)
        os._exit(1)
    os.close(theirs)
    info = os.waitid(os.P_PID, pid, os.WEXITED | os.WSTOPPED | os.WNOWAIT)
    assert info and info.si_code == os.CLD_TRAPPED
    agent.ended(pid)  # None, or its end: it may have gone on by now
    assert os.read(ours, 1) == b""
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert agent.ended(pid) == 42 << 8
    os.waitpid(pid, 0)
    os.close(ours)


@pytest.mark.parametrize("path", [b"", None, b"/x:", b":/x", b"/x::/y"])
def test_a_name_is_looked_for_where_exec_would_look(path):
    variables = {} if path is None else {b"PATH": path}
    found = agent.candidates(["tool"], variables)
    assert found == [
        os.path.join(each or b".", b"tool")
        for each in variables.get(b"PATH", b"/usr/local/bin:/usr/bin:/bin").split(b":")
    ]
    assert agent.candidates(["./tool"], variables) == [b"./tool"]
