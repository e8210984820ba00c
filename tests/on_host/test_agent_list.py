"""The verb list: what is asked for, page by page; and the cache of what has ended, which is never
wrong.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

import long_ago
import machine
from agent_door import Door, Refused, eventually
from corra import agent
from long_ago import DAY_NS, SECOND_NS

NOW = time.time_ns()


def many(door: Door, count: int, **how: Any) -> list[str]:
    """Make `count` runs, one a minute, the last one just now; return ids, the newest first."""
    found = []
    for number in range(count):
        at = NOW - number * 60 * SECOND_NS - 10 * SECOND_NS
        found.append(long_ago.ended(door.spool, long_ago.id_at(at, number), at_ns=at, **how))
    return found


def listed(door: Door, **asked: Any) -> list[str]:
    return [each["prog_id"] for each in door.call("list", asked)["runs"]]


def pages(door: Door, **asked: Any) -> list[dict[str, Any]]:
    found = [door.call("list", asked)]
    while found[-1]["next"]:
        found.append(door.call("list", {**asked, "before": found[-1]["next"]}))
    return found


def cache(door: Door) -> Path:
    return door.spool / "ended"


@machine.EVERYWHERE
def test_a_list_is_newest_first_in_pages_that_have_each_run_once(door):
    ids = many(door, 25)
    whole = door.call("list", {})
    assert [each["prog_id"] for each in whole["runs"]] == ids
    assert (whole["more"], whole["next"], whole["total"]) == (0, None, 25)
    found = pages(door, limit=10)
    assert [len(page["runs"]) for page in found] == [10, 10, 5]
    assert [page["more"] for page in found] == [15, 5, 0]
    assert [each["prog_id"] for page in found for each in page["runs"]] == ids
    # What is started between two pages is on none of the later ones, and moves nothing.
    first = door.call("list", {"limit": 10})
    long_ago.ended(door.spool, "later", at_ns=time.time_ns())
    second = door.call("list", {"limit": 10, "before": first["next"]})
    assert [each["prog_id"] for each in second["runs"]] == ids[10:20]
    assert door.call("list", {"limit": 0})["counts"] == {"done": 26}


def test_a_page_has_four_megabytes_at_most_and_at_least_one_run(door):
    argv = ("echo", "x" * (1 << 20))
    ids = many(door, 6, argv=argv)
    found = pages(door)
    assert [each["prog_id"] for page in found for each in page["runs"]] == ids
    assert all(len(json.dumps(page)) < 5 << 20 and page["runs"] for page in found)
    assert len(found) == 6  # a State has its argv twice


@machine.DEAR
def test_states_are_asked_for_by_the_words_of_ps_and_the_others_are_counted(door):
    ends = {"a": 0, "b": 3 << 8, "c": 30 << 8, "d": 9}
    for prog_id, status in ends.items():
        long_ago.ended(door.spool, prog_id, at_ns=NOW - SECOND_NS, status=status)
    running = door.ready("echo ready; exec sleep 1000", prog_id="e")["prog_id"]
    door.start(["/nonexistent"], prog_id="f")
    counts = {"done": 1, "failed": 2, "killed": 1, "running": 1, "not_started": 1}
    for words, expected in (
        (["running"], ["e"]),
        (["starting", "running"], ["e"]),
        (["FAILED"], ["b", "c"]),
        (["failed 3"], ["b", "c"]),
        (["FAILED 30"], ["c"]),
        (["exited"], ["a", "b", "c", "d"]),
        (["kill", "done"], ["a", "d"]),
        (["NOT STARTED"], ["f"]),
        (["not_started"], ["f"]),
        (["lost"], []),
    ):
        for _ in range(2):  # read, and by the cache
            found = door.call("list", {"states": words})
            assert sorted(each["prog_id"] for each in found["runs"]) == expected, words
            assert found["counts"] == counts
    door.stop(running, 0)
    assert door.call("list", {"limit": 0})["counts"] == {
        **{kind: count for kind, count in counts.items() if kind != "running"},
        "killed": 2,
    }


def test_runs_are_asked_for_by_end_starter_name_link_and_any_part_of_their_command(door):
    hour = 3600 * SECOND_NS
    others = {"user": "eve", "host": "laptop", "version": "1"}
    long_ago.ended(
        door.spool, "old", at_ns=NOW - 3 * hour, took_ns=hour, name="nightly", origin=others
    )
    long_ago.ended(door.spool, "long", at_ns=NOW - 3 * hour, took_ns=3 * hour, name="nightly é")
    long_ago.ended(
        door.spool,
        "far",
        at_ns=NOW - hour // 2,
        program={"argv": ["sh", "-c", "echo it's"], "host": "sw1"},
    )
    for asked, expected in (
        ({"since": (NOW - hour) // 1000}, ["far", "long"]),
        ({"mine": {"user": "ops"}}, ["far", "long"]),
        ({"mine": {"user": "eve", "host": "laptop"}}, ["old"]),
        ({"mine": {"user": "eve", "host": "elsewhere"}}, []),
        ({"name": "nightly"}, ["old"]),
        ({"name": "nightly é"}, ["long"]),
        ({"link": "sw1"}, ["far"]),
        ({"match": "night"}, ["long", "old"]),
        ({"match": "ly é"}, ["long"]),
        ({"match": "ol"}, ["old"]),
        ({"match": """sh -c 'echo it'"'"'s'"""}, ["far"]),
        ({"match": "true", "since": (NOW - hour) // 1000, "mine": {"user": "ops"}}, ["long"]),
    ):
        for _ in range(2):
            assert sorted(listed(door, **asked)) == expected, asked
        assert door.call("list", asked)["total"] == 3


def test_a_command_too_long_for_the_cache_is_looked_through_to_its_end(door):
    long_ago.ended(door.spool, "long", at_ns=NOW - SECOND_NS, argv=("echo", "x" * 1000, "the end"))
    for _ in range(2):
        assert listed(door, match="the end") == ["long"]
    assert cache(door).stat().st_size < 1000


@pytest.mark.parametrize(
    "wrong",
    [
        {"before": "yesterday"},
        {"before": "12:NOT-AN-ID"},
        {"states": [1]},
        {"mine": {"user": 1}},
        {"mine": {"who": "ops"}},
        {"limit": -1},
    ],
)
def test_a_question_that_makes_no_sense_is_refused(door, wrong):
    with pytest.raises(Refused) as refused:
        door.call("list", wrong)
    assert refused.value.kind == "bad_request"


# ---------------------------------------------------------------- the cache


def test_an_ended_run_is_read_once_and_an_open_one_each_time(door):
    many(door, 5)
    state = door.ready("echo ready; read x <&-; exec sleep 1000")
    assert door.call("list", {})["counts"] == {"done": 5, "running": 1}
    lines = cache(door).read_bytes()
    assert len(lines.splitlines()) == 5
    # The record is damaged in place: only who reads the run would see that.
    for each in (door.spool / "runs").iterdir():
        if each.name != state["prog_id"]:
            (each / "program.json").write_bytes(b"")
    asked = {"states": ["running"]}
    assert door.call("list", asked)["counts"] == {"done": 5, "running": 1}
    door.stop(state["prog_id"], 0)
    eventually(lambda: not agent.Run(str(door.spool), state["prog_id"]).alive())
    assert door.call("list", asked)["counts"] == {"done": 5, "killed": 1}
    assert cache(door).read_bytes().startswith(lines)
    assert len(cache(door).read_bytes().splitlines()) == 6


@pytest.mark.sampled
@pytest.mark.parametrize(
    "harm", ["deleted", "emptied", "cut", "noise", "flipped", "doubled", "a link"]
)
def test_whatever_befalls_the_cache_a_list_and_a_look_up_say_the_same(door, harm):
    many(door, 12, name="job")
    before = door.call("list", {})
    data = bytearray(cache(door).read_bytes())
    if harm == "deleted":
        cache(door).unlink()
    elif harm == "a link":
        cache(door).rename(door.base / "moved")
        cache(door).symlink_to(door.base / "moved")
    else:
        if harm == "flipped":
            for at in range(20, len(data), 97):
                data[at] ^= 1
        changed = {
            "emptied": b"",
            "cut": bytes(data)[: len(data) // 2 + 7],
            "noise": os.urandom(3000) + bytes(data) + b"0000",
            "flipped": bytes(data),
            "doubled": bytes(data) * 2,
        }[harm]
        cache(door).write_bytes(changed)
    for _ in range(3):
        after = door.call("list", {})
        assert {**after, "runs": []} == {**before, "runs": []}
        assert after["runs"] == before["runs"]
        assert door.status("job")["prog_id"] == before["runs"][0]["prog_id"]
    assert (door.base / "moved").exists() == (harm == "a link")


def test_a_cache_that_cant_be_written_costs_only_time(door):
    ids = many(door, 3)
    cache(door).mkdir()
    for _ in range(2):
        assert listed(door) == ids
    assert door.status(ids[0])["state"] == "exited"


def test_a_run_made_anew_under_an_id_that_the_cache_has_is_seen_as_it_is(door):
    prog_id = long_ago.ended(door.spool, "again", at_ns=NOW - DAY_NS, name="old")
    door.call("list", {})
    assert cache(door).stat().st_size
    inode = door.directory(prog_id).stat().st_ino
    for number in range(50):  # until the file system gives the inode again
        shutil.rmtree(door.directory(prog_id))
        state = door.ready("echo ready; exec sleep 1000", prog_id=prog_id)
        found = door.call("list", {"states": ["running"]})
        assert [each["prog_id"] for each in found["runs"]] == [prog_id]
        assert found["counts"] == {"running": 1}
        with pytest.raises(Refused):
            door.status("old")
        same = door.directory(prog_id).stat().st_ino == inode
        door.stop(prog_id, 0)
        if same or number == 3:
            break
        door.call("list", {})
    assert state["state"] == "running"


def test_the_first_list_of_an_older_spool_keeps_what_it_has_read_when_it_is_cut_off(door):
    many(door, 600)
    process = door.popen("list")
    assert process.stdin and process.stdout
    process.stdin.write(door.encode({}))
    assert eventually(lambda: cache(door).exists() and cache(door).stat().st_size > 10_000)
    process.kill()
    process.communicate()
    assert len(cache(door).read_bytes().splitlines()) >= 256
    assert door.call("list", {"limit": 0})["counts"] == {"done": 600}
