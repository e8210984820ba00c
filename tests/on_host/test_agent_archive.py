"""What has ended and was folded away: its State, what verbs make of it, and how it is found."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

import long_ago
import machine
from agent_door import Door, Gate, Mount, Refused, eventually
from corra import agent
from corra.model.frames import Ack
from corra.model.state import State
from long_ago import DAY_NS, SECOND_NS
from properties import PROPERTY

NOW = time.time_ns()
OUTPUT = b"a line of output\n" * 100


def fold(door: Door) -> dict[str, Any]:
    """Fold away whatever has ended, and leave nothing of it in ROOT/runs."""
    found = door.call("gc", {"older": 0, "records": 0})
    assert found["left"] == 0
    return found


def is_over(door: Door, prog_id: str) -> None:
    eventually(lambda: not agent.Run(str(door.spool), prog_id).alive())


def month(door: Door) -> Path:
    (found,) = [each for each in (door.spool / "archive").iterdir() if len(each.name) == 7]
    return found


def lines(door: Door) -> list[str]:
    """Return the ids in the archive, in the order of its files."""
    found = []
    for each in sorted((door.spool / "archive").iterdir()):
        if len(each.name) == 7:
            found += [
                line.split(b" ")[1].decode()
                for line in each.read_bytes().splitlines()
                if agent.unsealed(line) is not None
            ]
    return found


# ---------------------------------------------------------------- the State, and the verbs


@machine.DEAR
def test_a_run_that_was_folded_away_has_the_state_of_before_whatever_became_of_it(door, tmp_path):
    gate = Gate(tmp_path / "gate")
    begun = {
        "done": door.start(["sh", "-c", "echo out; echo err >&2"], prog_id="done"),
        "failed": door.start(["sh", "-c", "exit 7"], prog_id="failed", merge=True),
        "stopped": door.ready("echo ready; exec sleep 1000", prog_id="stopped"),
        "timeout": door.start(["sleep", "1000"], prog_id="timeout", run={"timeout": 0.05}),
        "unknown": door.start(["/nonexistent/program"], prog_id="unknown"),
        "elsewhere": door.start(["true"], prog_id="elsewhere", cwd="/nonexistent"),
        "fed": door.start(["cat"], prog_id="fed", stdin="some bytes"),
        "open": door.ready("echo ready; cat", prog_id="open", stdin={"open": True}),
        "terminal": door.start(["sleep", "1000"], prog_id="terminal", pty=True),
        "lost": door.ready("echo ready; exec sleep 1000", prog_id="lost"),
        "odd": door.call(
            "start",
            {
                "prog_id": "odd",
                "name": 'a name: \u00e9\u2028 "quoted"\n',
                "origin": {"user": "ops", "host": "laptop", "runbook": "kernel"},
                "program": {"argv": ["echo", "\udcff\n\t"], "env": {"A": "b", "C": None}},
                "run": {"keep": 5000, "stop_signal": "INT", "grace": 3},
            },
        ),
    }  # fmt: skip
    door.stop("stopped", 0, by="eve@elsewhere")
    door.stop("open", 0)
    door.stop("terminal", 0)
    for pid in (begun["lost"]["agent_pid"], *begun["lost"]["standby_pids"], begun["lost"]["pid"]):
        os.kill(pid, 9)
    gate.close()
    for prog_id in begun:
        door.wait(prog_id)
        is_over(door, prog_id)
    before = {prog_id: door.status(prog_id) for prog_id in begun}
    assert {each["state"] for each in before.values()} == {"exited", "not_started", "lost"}
    found = fold(door)
    assert found["folded"] == len(begun) and sorted(lines(door)) == sorted(begun)
    assert os.listdir(door.spool / "runs") == []
    for prog_id, state in before.items():
        after = door.status(prog_id)
        assert State.from_json(after).prog_id == prog_id
        assert after.pop("archived_time").startswith(time.strftime("%Y-%m-", time.gmtime()))
        for name, stream in state["streams"].items():
            # All of it went; what came after the end isn't counted any more.
            assert after["streams"][name] == {
                "length": stream["length"], "dropped": stream["length"], "late": 0
            }  # fmt: skip
        assert {**after, "streams": None} == {**state, "streams": None}
    listed = door.call("list", {})
    assert sorted(each["prog_id"] for each in listed["runs"]) == sorted(begun)
    assert all(each["archived_time"] for each in listed["runs"])


@machine.DEAR
def test_every_verb_answers_for_a_run_that_was_folded_away(door):
    request = {
        **door.program(["sh", "-c", "cat; echo done; exit 3"], prog_id="it", stdin={"open": True}),
        "name": "nightly",
    }
    door.call("start", request)
    with door.follow("it", sender=1) as follow:
        follow.send(b"I 0 3\nabcE 3\n")
        follow.drain()
    is_over(door, "it")
    assert fold(door)["removed"] == ["it"]
    state = door.status("it")
    assert (state["state"], state["return_code"], state["name"]) == ("exited", 3, "nightly")
    for how in ({}, {"tail": 5}, {"since": 0}, {"cursor": {"stdout": 2}}, {"live": False}):
        with door.follow("nightly", **how) as follow:
            follow.drain()
        assert follow.states[-1]["return_code"] == 3 and not follow.out
        if "tail" not in how and "since" not in how:
            begin = 2 if "cursor" in how else 0
            gaps = [(each.stream, each.start, each.end) for each in follow.gaps]
            assert gaps == [("stdout", begin, 8)]
    with door.follow("it", sender=2) as follow:  # nobody reads what is sent
        follow.drain()
    assert follow.states[-1]["state"] == "exited"
    assert door.wait("it")["return_code"] == 3
    assert door.read("it") == b"" and door.read("it", "stderr") == b""
    signalled = door.call("signal", {"prog_id": "it", "signal": "TERM"})
    assert (signalled["state"]["state"], signalled["how"]) == ("exited", "ended")
    stopped = door.stop("it")
    assert stopped["ended"] and stopped["survivors"] == []
    assert stopped["first"]["how"] == "ended"
    assert door.call("gc", {"ids": ["it"]})["removed"] == []
    # The same start again, in each of its two ways, is the run that has ended.
    assert door.call("start", request) == state
    with door.open("run", request) as again:
        again.drain()
    assert again.states[-1]["return_code"] == 3 and not again.out
    with pytest.raises(Refused) as refused:
        door.start(["true"], prog_id="it")
    assert refused.value.kind == "conflict"
    assert refused.value.reply["there"]["return_code"] == 3
    assert os.listdir(door.spool / "runs") == []


def test_a_run_with_a_callback_is_folded_away_once_all_is_delivered_and_sent_no_more(door):
    callback = {"url": "https://collector.test/"}
    for prog_id in ("owed", "told"):
        long_ago.ended(
            door.spool, prog_id, at_ns=NOW - 100 * DAY_NS, output=OUTPUT, callback=callback
        )
    page = {"acked": {"stdout": len(OUTPUT)}, "completed": True, "error": None}
    (door.directory("told") / "courier.json").write_text(json.dumps(page).ljust(agent.PAGE))
    before = door.status("told")
    assert fold(door)["removed"] == ["told"]
    assert door.status("told")["callback"] == before["callback"]
    assert door.directory("owed").exists()
    with pytest.raises(Refused) as refused:
        door.call("deliver", {"prog_id": "told", "seconds": 0})
    assert refused.value.kind == "removed" and "its output was removed on" in str(refused.value)


def test_a_record_is_readable_with_less_and_takes_less_than_a_kilobyte(door):
    ids = [
        long_ago.ended(
            door.spool,
            long_ago.id_at(NOW - number * SECOND_NS, number),
            at_ns=NOW - number * SECOND_NS,
            output=OUTPUT,
            name="nightly-backup",
            argv=("sh", "-c", "exec /usr/local/bin/backup --to /srv/backup --all"),
        )
        for number in range(300)
    ]
    fold(door)
    month_file = month(door)
    assert month_file.with_name(month_file.name + ".index").exists()
    used = sum(each.stat().st_size for each in (door.spool / "archive").iterdir())
    assert used / len(ids) < 1000
    assert len(os.listdir(door.spool / "archive")) == 2
    text = month_file.read_text(encoding="ascii")
    assert all(line.isprintable() for line in text.splitlines())
    assert text.splitlines()[0].startswith("# corra: CHECKSUM ID CREATED")


# ---------------------------------------------------------------- found again


def history(door: Door, count: int) -> dict[str, dict[str, Any]]:
    """Make runs of some months, most of them folded away; return what is true of each."""
    found = {}
    for number in range(count):
        at = NOW - (count - number) * 3 * DAY_NS - number % 7 * SECOND_NS
        own = number % 5 == 0
        prog_id = f"own-{number}" if own else long_ago.id_at(at, 1000 + number * 37)
        name = ["nightly", "weekly é", None][number % 3]
        long_ago.ended(
            door.spool,
            prog_id,
            at_ns=at,
            name=name,
            status=(number % 4) << 8,
            output=OUTPUT if number % 2 else b"",
        )
        found[prog_id] = {"created": at, "name": name, "code": number % 4}
    return found


def check_history(door: Door, true: dict[str, dict[str, Any]]) -> None:
    """Ask for the runs in every way."""
    newest = sorted(true, key=lambda prog_id: (true[prog_id]["created"], prog_id), reverse=True)
    listed: list[str] = []
    after: dict[str, Any] = {}
    while True:
        page = door.call("list", {"limit": 17, **after})
        assert page["total"] == len(true)
        assert sum(page["counts"].values()) == len(true)
        listed += [each["prog_id"] for each in page["runs"]]
        assert page["more"] == len(true) - len(listed)
        if not page["next"]:
            break
        after = {"before": page["next"]}
    assert listed == newest
    failed = door.call("list", {"states": ["failed 2"]})
    assert [each["prog_id"] for each in failed["runs"]] == [
        each for each in newest if true[each]["code"] == 2
    ]
    lately = NOW - 40 * DAY_NS
    since = door.call("list", {"since": lately // 1000, "limit": 5})
    inside = [each for each in newest if true[each]["created"] + SECOND_NS >= lately]
    assert [each["prog_id"] for each in since["runs"]] == inside[:5]
    assert since["more"] == len(inside) - 5 and since["total"] == len(true)
    named = door.call("list", {"name": "weekly é", "limit": 3})
    of_name = [each for each in newest if true[each]["name"] == "weekly é"]
    assert [each["prog_id"] for each in named["runs"]] == of_name[:3]
    assert named["more"] == len(of_name) - 3
    mine = door.call("list", {"mine": {"user": "ops"}, "limit": 1, "count": False})
    assert [each["prog_id"] for each in mine["runs"]] == newest[:1]
    assert "counts" not in mine and mine["next"]
    assert door.status("weekly é")["prog_id"] == of_name[0]
    for prog_id in (newest[0], newest[-1], newest[len(newest) // 2], "own-0"):
        assert door.status(prog_id)["prog_id"] == prog_id
        assert door.status(agent.tail_of(prog_id))["prog_id"] == prog_id
    with pytest.raises(Refused) as refused:
        door.status("own-")
    assert refused.value.kind == "ambiguous"
    with pytest.raises(Refused) as refused:
        door.status("nosuchrun")
    assert refused.value.reply["count"] == len(true)


@machine.DEAR
def test_runs_are_found_and_listed_alike_in_the_archive_and_beside_it(door):
    true = history(door, 60)
    check_history(door, true)
    # By their age: some stay where they are.
    door.call("gc", {"older": 60 * 86400, "records": 60 * 86400})
    assert 10 < len(os.listdir(door.spool / "runs")) < 30
    check_history(door, true)
    fold(door)
    assert os.listdir(door.spool / "runs") == []
    check_history(door, true)


def write_indexes(door: Door) -> None:
    """Write the index of each month, however small it is."""
    archive = agent.Archive(str(door.spool))
    for each in archive.months():
        each.write_index()
    archive.close()


HARMS = ("deleted", "emptied", "cut", "noise", "flipped", "stale", "another's", "zeros")


@pytest.mark.sampled
@pytest.mark.parametrize("harm", HARMS)
def test_whatever_befalls_an_index_each_run_is_found(door, harm):
    true = history(door, 60)
    door.call("gc", {"older": 100 * 86400, "records": 100 * 86400})
    write_indexes(door)
    indexes = sorted((door.spool / "archive").glob("*.index"))
    before = [each.read_bytes() for each in indexes]
    fold(door)
    write_indexes(door)
    indexes = sorted((door.spool / "archive").glob("*.index"))
    for number, each in enumerate(indexes):
        data = bytearray(each.read_bytes())
        if harm == "deleted":
            each.unlink()
            continue
        if harm == "flipped":
            data[agent.BLOCK + 500] ^= 1
        each.write_bytes(
            {
                "emptied": b"",
                "cut": bytes(data[: agent.BLOCK + 100]),
                "noise": os.urandom(len(data)),
                "flipped": bytes(data),
                "stale": before[min(number, len(before) - 1)],
                "another's": indexes[number - 1].read_bytes(),
                "zeros": bytes(data[: agent.BLOCK]) + bytes(len(data) - agent.BLOCK),
            }[harm]
        )
    check_history(door, true)
    # The next gc that folds something away into them writes what it can't use anew.
    write_indexes(door)
    check_history(door, true)


def test_a_line_that_was_torn_costs_no_other_and_the_next_begins_a_line(door):
    true = history(door, 12)
    door.call("gc", {"older": 20 * 86400, "records": 20 * 86400})
    files = [each for each in (door.spool / "archive").iterdir() if len(each.name) == 7]
    for each in files:
        data = each.read_bytes()
        each.write_bytes(data + data.splitlines()[-1][:100])
    check_history(door, true)
    fold(door)
    check_history(door, true)
    assert sorted(lines(door)) == sorted(true)


def test_a_name_means_the_open_run_else_the_newest_wherever_it_is(door):
    for number in range(3):
        at = NOW - (50 - number) * DAY_NS
        long_ago.ended(door.spool, f"old-{number}", at_ns=at, name="job")
    fold(door)
    assert door.status("job")["prog_id"] == "old-2"
    long_ago.ended(door.spool, "older", at_ns=NOW - 60 * DAY_NS, name="job")
    assert door.status("job")["prog_id"] == "old-2"
    long_ago.ended(door.spool, "newer", at_ns=NOW - DAY_NS, name="job")
    assert door.status("job")["prog_id"] == "newer"
    state = door.call("start", {**door.program(["sleep", "1000"]), "name": "job"})
    assert door.status("job")["prog_id"] == state["prog_id"]
    door.stop(state["prog_id"], 0)


@settings(PROPERTY, max_examples=30)
@given(data=st.data())
def test_an_index_answers_as_the_file_itself_does(tmp_path_factory, data):
    """Ids, tails and names of any kind, any of them twice; the index covers any part of them."""
    root = tmp_path_factory.mktemp("spool")
    ids = st.from_regex(r"[a-z0-9][a-z0-9._-]{0,12}", fullmatch=True) | st.builds(
        long_ago.id_at, st.integers(NOW - 90 * DAY_NS, NOW), st.integers(0, 27**8 - 1)
    )
    names = st.none() | st.sampled_from(["a", "b", "ab", "é", "a b", "\udcff"])
    users = st.sampled_from(["ann", "bob", "bo", "é'"])
    runs = data.draw(
        st.lists(
            st.tuples(ids, names, st.integers(NOW - 9, NOW), users), unique_by=lambda each: each[0],
            min_size=1, max_size=40,
        )
    )  # fmt: skip
    made = agent.make_archive(str(root)) if agent.prepare_root(str(root)) else None
    assert made
    for at, (prog_id, name, created, user) in enumerate(runs):
        program = {"argv": ["say", f"it's {user}"]}
        origin = {"user": user, "host": "desk" if user == "ann" else "lap"}
        body = {"request": {"name": name, "program": program, "origin": origin}, "record": []}
        words = f"{prog_id} {created} {created} {created} done {agent.to_json(body)}"
        month_name = agent.month_of(prog_id, created)
        agent.append(made, month_name, [agent.sealed(words.encode())])
        if data.draw(st.booleans()) and at < len(runs) - 1:
            made.month(month_name).write_index()
    with contextlib.closing(made):
        for prog_id, name, *_ in runs:
            assert made.with_id(prog_id).prog_id == prog_id
            tail = agent.tail_of(prog_id)
            for text in (tail, tail[:2]):
                expected = {each for each, *_ in runs if agent.tail_of(each).startswith(text)}
                assert {each.prog_id for each in made.with_tail(text, 100)} == expected
            newest = max(each[2] for each in runs if each[1] == name)
            if name is not None:
                found = made.with_name(name)
                assert (found.created, found.about().name) == (newest, name)
        listed = [each.key() for each in agent.merged([m.newest_first() for m in made.months()])]
        assert listed == sorted(((each[2], each[0]) for each in runs), reverse=True)
        for request, fits in (
            ({"mine": {"user": "bob"}}, lambda each: each[3] == "bob"),
            ({"mine": {"user": "ann", "host": "lap"}}, lambda each: False),
            ({"mine": {"host": "lap"}}, lambda each: each[3] != "ann"),
            ({"mine": {"user": "é'"}, "name": "a b"}, lambda each: each[1::2] == ("a b", "é'")),
            ({"match": "'it'\"'\"'s bo"}, lambda each: each[3] in ("bob", "bo")),
            ({"match": "é"}, lambda each: "é" in (each[1] or "") + each[3]),
        ):
            page = agent.Page(agent.Wanted(request), 3, None)
            agent.offer_archive(page, made)
            expected_keys = sorted(
                ((each[2], each[0]) for each in runs if fits(each)), reverse=True
            )
            assert [each.key() for each in page.newest()] == expected_keys[:3]
            assert (page.total, page.matching) == (len(runs), len(expected_keys))
            assert page.counts == ({"done": len(expected_keys)} if expected_keys else {})
        assert made.with_id("nosuchrun") is None


# ---------------------------------------------------------------- what stands in the way


@machine.DEAR
def test_a_full_disk_is_freed_all_the_same_and_no_record_is_lost(as_root, python, tmp_path):
    mount = Mount(tmp_path / "disk", "size=3m")
    try:
        door = Door(tmp_path, python=python, spool=mount.at / "spool")
        ids = [
            long_ago.ended(
                door.spool, f"big-{number}", at_ns=NOW - 50 * DAY_NS, output=b"x" * 200_000
            )
            for number in range(8)
        ]
        fill_up(mount.at)
        before = {each: door.status(each) for each in ids}
        assert mount.free() == 0
        found = door.call("gc", {})
        assert found["removed"] == ids and mount.free() > 1_000_000
        for each in ids:
            after = door.status(each)
            assert after["status"] == before[each]["status"]
            assert after["streams"]["stdout"]["dropped"] == 200_000
        (mount.at / "hog").unlink()
        fold(door)
        assert sorted(lines(door)) == ids and os.listdir(door.spool / "runs") == []
    finally:
        mount.close()


def fill_up(at: Path) -> None:
    with contextlib.suppress(OSError), open(at / "hog", "wb", 0) as hog:
        while hog.write(b"\0" * 4096):
            pass


def test_where_no_archive_can_be_made_the_output_goes_as_ever_and_the_record_stays(door):
    prog_id = long_ago.ended(door.spool, "it", at_ns=NOW - 50 * DAY_NS, output=OUTPUT)
    (door.spool / "archive").write_bytes(b"a file of somebody's")
    assert door.call("gc", {})["removed"] == [prog_id]
    assert door.file(prog_id) == b""
    assert door.status(prog_id)["streams"]["stdout"]["dropped"] == len(OUTPUT)
    assert door.call("gc", {})["removed"] == []


@pytest.mark.parametrize("what", ["archive", "a month"])
def test_an_archive_that_others_can_write_to_stops_a_start_and_says_why(door, what):
    long_ago.ended(door.spool, "it", at_ns=NOW - 50 * DAY_NS)
    fold(door)
    (door.spool / "archive" if what == "archive" else month(door)).chmod(0o777)
    for verb, request in (("start", door.program(["true"], prog_id="new")), ("list", {})):
        with pytest.raises(Refused) as refused:
            door.call(verb, request)
        assert refused.value.kind == "unreadable"
        assert refused.value.reply["errno"] == errno.EPERM
        assert str(door.spool / "archive") in refused.value.reply["dir"]
    assert not door.directory("new").exists()


def test_a_months_runs_are_forgotten_together_and_those_of_runbooks_stay(door):
    old, older, book = (
        "20250301t000000z-22222222",
        "20250331t000000z-22222223",
        "20250302t000000z-22222224",
    )
    for prog_id, days, origin in ((old, 410, "x"), (older, 399, "x"), (book, 405, "runbook")):
        long_ago.ended(
            door.spool, prog_id, at_ns=NOW - days * DAY_NS, origin={origin: "kernel", "user": "ops"}
        )
    assert fold(door)["forgotten"] == []
    assert sorted(lines(door)) == sorted([old, older, book])
    # Two days later all of them ended 400 days ago.
    text = month(door).read_bytes().splitlines(keepends=True)
    moved = text[:1]
    for line in text[1:]:
        words = line.rstrip(b"\n").split(b" ", 6)
        words[3] = b"%d" % (int(words[3]) - 2 * DAY_NS)
        moved.append(agent.sealed(b" ".join(words[1:])))
    month(door).write_bytes(b"".join(moved))
    assert door.call("gc", {"dry": True})["forgotten"] == sorted([old, older])
    assert door.call("gc", {})["forgotten"] == sorted([old, older])
    assert lines(door) == [book]
    assert door.status(book)["state"] == "exited"
    assert door.call("gc", {})["forgotten"] == []
    with pytest.raises(Refused):
        door.status(old)


def test_a_run_lost_long_after_its_launch_keeps_its_output_from_when_that_was_seen(door):
    prog_id = long_ago.ended(door.spool, "it", at_ns=NOW - 100 * DAY_NS, output=OUTPUT)
    # Its guards were killed before they could record an end.
    (door.directory(prog_id) / "exit").write_bytes(b"\n" * 2 * agent.PAGE)
    assert door.status(prog_id)["state"] == "lost"
    assert door.call("gc", {})["removed"] == []
    assert door.file(prog_id) == OUTPUT
    assert door.call("gc", {"older": 0})["removed"] == [prog_id]
    state = door.status(prog_id)
    assert state["state"] == "lost" and state["streams"]["stdout"]["dropped"] == len(OUTPUT)


def test_a_sender_to_a_run_that_was_folded_away_is_told_that_nobody_reads(door):
    door.start(["cat"], prog_id="it", stdin={"open": True})
    door.stop("it", 0)
    is_over(door, "it")
    fold(door)
    with door.follow("it", sender=1) as follow:
        with contextlib.suppress(BrokenPipeError):
            follow.send(b"I 0 3\nabc")
        follow.drain()
    assert follow.states[-1]["state"] == "exited"
    assert Ack(3) not in follow.frames


# ---------------------------------------------------------------- an id is started once


def test_a_claim_that_was_folded_away_as_abandoned_is_launched_by_no_late_guard(door):
    long_ago.abandoned(door.spool, "it", at_ns=NOW - 5 * DAY_NS)
    # What a guard asks that has the directory open, once it goes on: the clock may have been set.
    (door.base / "slot").hardlink_to(door.directory("it") / "exit")
    fold(door)
    assert door.status("it")["state"] == "not_started" and not door.directory("it").exists()
    assert agent.unpack((door.base / "slot").read_bytes()[agent.PAGE :]) is not None


# The last two are of runs of fleets or runbooks: their ids follow from names, and tell no month.
@pytest.mark.parametrize(
    "prog_id",
    [
        "own-name",
        "20260301t000000z-22222222",
        "00008742t709608z-tfzp8v47",
        "00000512t709608z-tfzp8v47",
    ],
)
def test_a_claim_of_an_id_that_the_archive_has_changes_nothing_and_goes(door, prog_id):
    """As a starter leaves it that was stopped while another one's run ended and was folded away."""
    long_ago.ended(door.spool, prog_id, at_ns=NOW - 90 * DAY_NS, status=3 << 8)
    fold(door)
    before = door.status(prog_id)
    long_ago.abandoned(door.spool, prog_id, at_ns=NOW - 5 * DAY_NS)
    assert door.status(prog_id) == before
    assert door.start(["true"], prog_id=prog_id, cwd="/", host="db1")["return_code"] == 3
    assert not door.directory(prog_id).exists()
    long_ago.abandoned(door.spool, prog_id, at_ns=NOW - 5 * DAY_NS)
    fold(door)
    assert not door.directory(prog_id).exists()
    assert door.status(prog_id) == before and lines(door) == [prog_id]


def test_a_run_whose_month_cannot_be_read_stays_where_it_is(door):
    """Also beside runs of a month that can: none goes without a line."""
    first, second = "20260301t000000z-22222222", "20260401t000000z-22222223"
    long_ago.ended(door.spool, first, at_ns=NOW - 90 * DAY_NS)
    fold(door)
    month(door).chmod(0o666)
    long_ago.ended(door.spool, "20260301t000000z-22222224", at_ns=NOW - 80 * DAY_NS, output=OUTPUT)
    long_ago.ended(door.spool, second, at_ns=NOW - 90 * DAY_NS, output=OUTPUT)
    with pytest.raises(Refused) as refused:
        fold(door)
    assert refused.value.reply["errno"] == errno.EPERM
    left = {each.name for each in (door.spool / "runs").iterdir()}
    (door.spool / "archive" / "2026-03").chmod(0o600)
    assert left | set(lines(door)) == {first, second, "20260301t000000z-22222224"}
    fold(door)
    assert sorted(lines(door)) == [first, "20260301t000000z-22222224", second]


# ---------------------------------------------------------------- many at once


def test_a_spool_of_before_is_taken_over_by_the_first_start_while_runs_go_on(door):
    """An older agent has left it: with neither an archive nor the cache of ended runs."""
    (door.spool / "gc").parent.mkdir(parents=True)
    (door.spool / "gc").touch()
    door.ready("echo ready; exec sleep 1000", prog_id="going")
    ids = [
        long_ago.ended(door.spool, f"old-{number}", at_ns=NOW - 60 * DAY_NS - number, output=OUTPUT)
        for number in range(150)
    ]
    os.utime(door.spool / "gc", (NOW / 1e9 - 2 * 86400,) * 2)
    asked = iter(ids)

    def taken_over() -> bool:
        """Meanwhile a run is found, wherever it is, and another is started."""
        assert door.status(next(asked))["return_code"] == 0
        assert door.start(["true"])["state"] in ("running", "exited")
        return not set(ids) & set(os.listdir(door.spool / "runs"))

    eventually(taken_over)
    assert sorted(lines(door)) == sorted(ids)
    assert door.status("going")["state"] == "running"
    assert door.call("list", {"states": ["running"]})["counts"]["done"] >= len(ids)
    door.stop("going", 0)


def test_several_that_fold_away_and_start_at_once_lose_no_run_and_write_each_once(door):
    ids = [
        long_ago.ended(door.spool, f"old-{number}", at_ns=NOW - 60 * DAY_NS - number, output=OUTPUT)
        for number in range(100)
    ]
    requests = [("gc", {"older": 0, "records": 0}), ("list", {}), ("status", {"prog_id": "old-5"})]
    requests += [("start", door.program(["true"], prog_id="old-7", cwd="/", host="db1"))]
    with ThreadPoolExecutor(16) as pool:
        replies = pool.map(lambda each: (each[0], door.call(*each)), requests * 4)
    for verb, reply in replies:
        if verb == "list":
            assert {each["prog_id"] for each in reply["runs"]} == set(ids)
        elif verb != "gc":
            assert (reply["state"], reply["return_code"]) == ("exited", 0)
    fold(door)
    assert sorted(lines(door)) == sorted(ids)


def test_a_run_that_was_damaged_after_it_was_noted_as_ended_is_named_by_a_list(door):
    for prog_id in ("bad", "good"):
        long_ago.ended(door.spool, prog_id, at_ns=NOW - DAY_NS)
    assert door.call("list", {})["counts"] == {"done": 2}
    (door.directory("bad") / "program.json").write_bytes(b"null")
    listed = door.call("list", {})
    assert [each["prog_id"] for each in listed["runs"]] == ["good"]
    assert [each["prog_id"] for each in listed["unreadable"]] == ["bad"]


def test_a_list_of_a_state_that_no_archived_run_has_reads_none_of_them(door):
    """What a year of ended runs would cost each look at the open ones."""
    true = history(door, 30)
    fold(door)
    for states, count in ((["running"], 0), (["failed 2"], 7), (["failed"], 22), ([], 30)):
        listed = door.call("list", {"states": states, "limit": 4})
        assert len(listed["runs"]) == min(4, count)
        assert listed["more"] == max(0, count - 4) and listed["total"] == len(true)
    mine = door.call("list", {"mine": {"user": "nobody"}})
    assert (mine["runs"], mine["counts"], mine["total"]) == ([], {}, 30)
