"""Courier and collector, both killed at random, over real TLS: no byte lost, none twice, and every
end accepted once.

`CORRA_STORM_CRASHES` is the number of kills (20; for 1,000 see benchmarks/RESULTS.md).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import signal
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent_door import eventually, nothing_left, reap
from collector import Client, Served
from courier_home import Home
from listener import Authority

pytest.importorskip("starlette", reason="corra[collector] isn't installed")

CRASHES = int(os.environ.get("CORRA_STORM_CRASHES", "20"))
RUNS = 4
pytestmark = pytest.mark.storm
# The program writes until the storm is over.
PROGRAM = (
    'i=0; until [ -e "$HOME/over" ]; do seq $((i * 1000)) $((i * 1000 + 999)); echo $i >&2; '
    "i=$((i + 1)); sleep 0.2; done; exit {code}"
)


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    with nothing_left():
        yield Home(tmp_path)


def expected(rounds: int) -> tuple[bytes, bytes]:
    return b"".join(b"%d\n" % n for n in range(rounds * 1000)), b"".join(
        b"%d\n" % n for n in range(rounds)
    )


def test_a_collector_that_is_down_for_the_whole_run_has_all_of_it_when_it_is_up(home, tmp_path):
    authority = Authority(tmp_path)
    served = Served(tmp_path, tls=authority.server(), ca=authority.pem)
    member = Client(served, served.token())
    served.start()
    token = member.register(prog_id := "while-down").token
    served.kill()
    callback = {
        "url": f"{served.url}/api/v1/agent/PROG-ID",
        "token": token,
        "ca": authority.pem,
        "state": True,
    }
    request = {
        "prog_id": prog_id,
        "program": {"argv": ["sh", "-c", "seq 20000; echo oops >&2; exit 3"]},
    }
    home.ask("start", **request, callback=callback, config={"retry_frequency": 0.1})
    eventually(
        lambda: home.status(prog_id)["state"] == "exited" and home.callback(prog_id)["error"]
    )
    served.start()
    found = eventually(lambda: run if (run := member.run(prog_id))["state"] == "exited" else None)
    assert (found["return_code"], found["collector"]["gaps"]) == (3, [])
    assert member.output(prog_id).body == b"".join(b"%d\n" % n for n in range(1, 20001))
    assert member.output(prog_id, "stderr").body == b"oops\n"
    eventually(lambda: home.callback(prog_id)["completed"])
    assert [each["run"] for each in served.lines() if each["event"] == "completed"] == [prog_id]
    assert served.stop() == 0


@pytest.mark.timeout(90 + CRASHES * 2)
def test_courier_and_collector_killed_at_random_lose_nothing_and_double_nothing(home, tmp_path):
    rng = random.Random(1)
    authority = Authority(tmp_path)
    served = Served(tmp_path, tls=authority.server(), ca=authority.pem)
    member = Client(served, served.token())
    served.start()
    crashes = {"courier": 0, "collector": 0}
    runs = []
    for number in range(RUNS):
        token = member.register(prog_id := f"storm-{number}").token
        callback = {
            "url": f"{served.url}/api/v1/agent/PROG-ID",
            "token": token,
            "ca": authority.pem,
            "state": True,
        }
        script = PROGRAM.format(code=number)
        home.ask(
            "start",
            prog_id=prog_id,
            program={"argv": ["sh", "-c", script]},
            callback=callback,
            config={"retry_frequency": 0.1, "output_latency": 0.05, "output_buffer": 20_000},
        )
        runs.append(prog_id)
    while sum(crashes.values()) < CRASHES:
        time.sleep(rng.uniform(0, 0.1))
        reap(set())
        if rng.random() < 0.15:
            served.kill()
            served.start()
            crashes["collector"] += 1
        elif pid := home.courier(rng.choice(runs)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                crashes["courier"] += 1
    (home.base / "over").touch()
    until = time.monotonic() + 60
    while time.monotonic() < until and not all(
        member.run(each)["state"] == "exited" for each in runs
    ):
        time.sleep(0.05)
    total = 0
    for number, prog_id in enumerate(runs):
        found = member.run(prog_id)
        wanted = expected((home.directory(prog_id) / "stderr").read_bytes().count(b"\n"))
        total += sum(map(len, wanted))
        assert (found["state"], found["return_code"], found["collector"]["gaps"]) == (
            "exited",
            number,
            [],
        )
        for name, text in zip(("stdout", "stderr"), wanted, strict=True):
            body = member.output(prog_id, name).body
            assert hashlib.sha256(body).digest() == hashlib.sha256(text).digest(), (
                prog_id,
                name,
                len(body),
                len(text),
            )
    assert served.stop() == 0
    with sqlite3.connect(served.database) as database:
        # No two chunks of a stream overlap or leave a hole, and no run has a second end.
        for stream, length in database.execute("SELECT id, length FROM streams").fetchall():
            at = 0
            for start, stop, size in database.execute(
                "SELECT start, stop, length(data) FROM chunks WHERE stream = ? ORDER BY start",
                (stream,),
            ):
                assert (start, size) == (at, stop - start)
                at = stop
            assert at == length
        assert database.execute("SELECT count(*) FROM runs WHERE ended IS NOT NULL").fetchone() == (
            RUNS,
        )
    completed = [each["run"] for each in served.lines() if each["event"] == "completed"]
    assert len(completed) == len(set(completed))
    print(f"storm: {crashes}, {RUNS} runs, {total} bytes")
