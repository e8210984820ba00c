"""gc: what it removes, and what it never removes."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

import machine
from agent_door import Door, Refused, eventually
from corra import agent

DAY_NS = 86400 * 10**9


def aged(door: Door, prog_id: str, days: float) -> None:
    """Make the run's record say that it ended `days` ago."""
    record = door.record(prog_id)
    status, end_ns, took_ns, reason = record.outcome
    record.outcome = (status, end_ns - int(days * DAY_NS), took_ns, reason)
    with open(door.directory(prog_id) / "exit", "r+b") as file:
        file.write(record.page())


def ended(door: Door, days: float, *, size: int = 10_000, code: int = 0, **how: object) -> str:
    """Start a run that writes `size` bytes, and make it end so long ago; return its id."""
    script = f"head -c {size} /dev/zero; exit {code}"
    state = door.start(["sh", "-c", script], **how)  # type: ignore[arg-type]
    prog_id: str = state["prog_id"]
    door.wait(prog_id)
    eventually(lambda: not agent.Run(str(door.spool), prog_id).alive())
    aged(door, prog_id, days)
    return prog_id


def lengths(door: Door, *ids: str) -> list[int | None]:
    """Return the length of each run's output, None for a run that was folded away."""
    return [len(door.file(each)) if door.directory(each).exists() else None for each in ids]


def test_output_goes_14_days_after_a_good_end_and_30_after_a_bad_one_and_the_state_stays(
    door: Door,
) -> None:
    young, well, bad, worse = (
        ended(door, 13),
        ended(door, 15),
        ended(door, 29, code=1),
        ended(door, 31, code=1),
    )
    before = door.status(well)
    assert door.call("gc", {"dry": True})["removed"] == sorted([well, worse])
    assert lengths(door, young, well, bad, worse) == [10_000] * 4
    freed = door.call("gc", {})
    assert (freed["removed"], freed["forgotten"]) == (sorted([well, worse]), [])
    assert freed["freed"] >= 20_000
    assert lengths(door, young, well, bad, worse) == [10_000, None, 10_000, None]
    after = door.status(well)
    assert (after["state"], after["status"], after["end_time"]) == ("exited", 0, before["end_time"])
    assert after["streams"]["stdout"]["length"] == 10_000
    assert door.call("gc", {})["removed"] == []


def test_a_reader_of_removed_output_is_told_what_is_gone(door: Door) -> None:
    prog_id = ended(door, 15)
    door.call("gc", {})
    with door.follow(prog_id) as follow:
        follow.drain()
    assert [(gap.stream, gap.start, gap.end) for gap in follow.gaps] == [("stdout", 0, 10_000)]
    assert follow.states[-1]["state"] == "exited"


def test_a_runs_own_keep_time_and_the_callers_age_come_before_the_rule(door: Door) -> None:
    kept, brief = ended(door, 40, run={"keep": 50 * 86400}), ended(door, 2, run={"keep": 86400})
    assert door.call("gc", {"dry": True})["removed"] == [brief]
    assert door.call("gc", {"dry": True, "older": 0})["removed"] == sorted([kept, brief])
    assert door.call("gc", {"dry": True, "ids": [kept]})["removed"] == [kept]


def test_beyond_the_size_the_oldest_go_but_none_younger_than_3_days(door: Door) -> None:
    ids = [ended(door, days, size=100_000) for days in (9, 7, 5, 1)]
    assert door.call("gc", {"dry": True, "max_size": 250_000})["removed"] == sorted(ids[:2])
    assert door.call("gc", {"dry": True, "max_size": 0})["removed"] == sorted(ids[:3])


@machine.DEAR
def test_a_record_goes_after_400_days_and_a_runbooks_never(door: Door) -> None:
    old, book = ended(door, 401), ended(door, 10)
    path = door.directory(book) / "program.json"
    request = json.loads(path.read_text())
    request["origin"] = {"runbook": "kernel"}
    path.write_text(json.dumps(request))
    aged(door, book, 401)
    freed = door.call("gc", {})
    assert (freed["forgotten"], freed["removed"]) == ([old], [book])
    assert not door.directory(old).exists()
    assert door.status(book)["state"] == "exited"


@machine.DEAR
def test_what_runs_is_watched_or_is_owed_to_a_collector_is_never_touched(door: Door) -> None:
    runs = door.ready("echo ready; exec sleep 1000")["prog_id"]
    owed, watched = ended(door, 100), ended(door, 100)
    path = door.directory(owed) / "program.json"
    path.write_text(
        json.dumps({**json.loads(path.read_text()), "callback": {"url": "https://collector.test/"}})
    )
    with open(door.directory(watched) / "index", "rb") as index:
        fcntl.flock(index, fcntl.LOCK_SH)
        for request in ({}, {"older": 0, "max_size": 0}, {"ids": [runs, owed, watched]}):
            assert door.call("gc", request)["removed"] == []
    assert lengths(door, runs, owed, watched) == [6, 10_000, 10_000]
    door.stop(runs, 0)


@machine.DEAR
def test_a_follow_holds_gc_off_until_it_leaves_and_sees_every_byte(door: Door) -> None:
    prog_id = ended(door, 100, size=40 << 20)
    with door.follow(prog_id) as follow:
        # The follow's pipe is full and the test reads nothing, so the follow is in the middle of
        # its reading.
        for _ in range(3):
            assert door.call("gc", {"older": 0, "max_size": 0})["removed"] == []
        follow.drain()
    assert len(follow.stdout()) == 40 << 20 and not follow.gaps
    assert door.call("gc", {"older": 0})["removed"] == [prog_id]


def test_a_half_made_run_is_swept_after_an_hour_and_not_before(door: Door) -> None:
    runs = door.spool / "runs"
    ended(door, 0)
    old, new = runs / ".new-a-1-00", runs / ".new-b-1-00"
    for each in (old, new):
        (each / "fifo").mkdir(parents=True)
        (each / "program.json").write_text("{}")
    os.utime(old, (time.time() - 7200,) * 2)
    door.call("gc", {})
    assert (old.exists(), new.exists()) == (False, True)


def test_a_start_cleans_up_once_a_day_by_itself(door: Door) -> None:
    old = ended(door, 15)
    stamp = door.spool / "gc"
    os.utime(stamp, (time.time() - 90000,) * 2)
    door.start(["true"])
    assert eventually(lambda: lengths(door, old) == [None])
    assert eventually(lambda: time.time() - stamp.stat().st_mtime < 3600)
    again = ended(door, 15)
    door.start(["true"])
    assert lengths(door, again) == [10_000]


def test_while_one_start_cleans_up_no_other_does_and_one_that_died_is_followed_by_another(
    door: Door,
) -> None:
    old, stamp = ended(door, 15), door.spool / "gc"

    def due() -> None:
        os.utime(stamp, (time.time() - 90000,) * 2)

    due()
    with open(stamp, "rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        door.start(["true"])
        assert lengths(door, old) == [10_000]
        assert time.time() - stamp.stat().st_mtime > 86400
    # As a cleaning that was killed leaves it.
    os.utime(stamp, (time.time() - 86400 + agent.RETRY_S - 60,) * 2)
    door.start(["true"])
    assert lengths(door, old) == [10_000]
    os.utime(stamp, (time.time() - 86400 - 1,) * 2)
    door.start(["true"])
    assert eventually(lambda: lengths(door, old) == [None])


def test_agents_that_nobody_has_started_for_a_month_go_and_ours_stays(
    tmp_path: Path, door: Door
) -> None:
    source = Path(agent.__file__).read_bytes()
    cache = tmp_path / "cache"
    own = cache / hashlib.sha256(source).hexdigest()
    stale, fresh = cache / ("a" * 64), cache / ("b" * 64)
    for each in (own, stale, fresh):
        each.mkdir(parents=True)
        shutil.copy(agent.__file__, each / "agent.py")
    (stale / "__pycache__").mkdir()
    (stale / "__pycache__" / "agent.pyc").write_bytes(b"x")
    os.utime(stale / "agent.py", (time.time() - 31 * 86400,) * 2)
    done = subprocess.run(
        [door.python, "-ISE", own / "agent.py", "gc"],
        input=door.encode({}),
        capture_output=True,
        check=True,
    )
    assert json.loads(done.stdout)["removed"] == []
    assert sorted(each.name for each in cache.iterdir()) == sorted([own.name, fresh.name])


def test_gc_of_a_run_that_isnt_there_is_refused_and_removes_nothing(door: Door) -> None:
    old = ended(door, 15)
    with pytest.raises(Refused) as refused:
        door.call("gc", {"ids": [old, "nosuchrun"]})
    assert refused.value.kind == "not_found"
    assert lengths(door, old) == [10_000]
