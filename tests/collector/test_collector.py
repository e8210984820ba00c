"""The collector's HTTP API keeps its promises, on a real server with a real database."""

from __future__ import annotations

import asyncio
import base64
import concurrent.futures
import contextlib
import functools
import gzip
import http.client
import http.server
import json
import os
import random
import resource
import signal
import socket
import sqlite3
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from agent_door import Mount, eventually
from collector import DEADLINE_S, Client, Served, ended
from corra.collector.events import Watchers
from corra.collector.tokens import checked_token, split_header
from listener import Authority

pytest.importorskip("starlette", reason="corra[collector] isn't installed")

from corra.collector.protocol import HEAD_S, STRANGERS_MAX, Connection, Places

BY = "ops@laptop"
ORIGIN = {"user": "ops", "host": "laptop"}


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Iterator[Served]:
    found = Served(tmp_path_factory.mktemp("collector")).start()
    yield found
    if found.process and found.process.poll() is None:
        found.stop()


@pytest.fixture(scope="module")
def member(served) -> Client:
    return Client(served, served.token())


@pytest.fixture
def new(tmp_path) -> Iterator[Any]:
    """Return a function that starts another collector: `new("--limits", "rate=2")`."""
    made: list[Served] = []

    def start(*flags: str, **how: Any) -> tuple[Served, Client]:
        found = Served(tmp_path, *flags, **how)
        token = found.token()
        made.append(found.start())
        return found, Client(found, token)

    yield start
    for each in made:
        if each.process and each.process.poll() is None:
            each.kill()


_numbers = iter(range(1, 10**6))


@pytest.fixture
def prog_id() -> str:
    return f"run-{next(_numbers)}"


# ---------------------------------------------------------------- appending


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "GET"])
def test_each_of_the_seeds_methods_appends(member, prog_id, method):
    answer = member.append(prog_id, 0, b"hello\n", method=method)
    assert (answer.status, answer.headers["upload-offset"]) == (200, "6")
    assert member.output(prog_id).body == b"hello\n"


def test_an_append_again_changes_nothing_an_overlap_is_trimmed_and_a_hole_is_a_409_that_says_where(
    member, prog_id
):
    for offset, data, status, length in (
        (0, b"abcdef", 200, 6), (0, b"abcdef", 200, 6), (2, b"cd", 200, 6), (4, b"efgh", 200, 8),
        (9, b"x", 409, 8), (8, b"", 200, 8),
    ):  # fmt: skip
        answer = member.append(prog_id, offset, data)
        assert (answer.status, int(answer.headers["upload-offset"])) == (status, length)
    assert member.output(prog_id).body == b"abcdefgh"


def test_pieces_in_any_order_any_number_of_times_come_to_the_same_bytes(member, prog_id):
    text = os.urandom(10_000)
    rng = random.Random(7)
    pieces = [(at, text[at : at + rng.randrange(500, 3000)]) for at in range(0, len(text), 500)] * 3
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        while len(member.output(prog_id).body if prog_id in known(member) else b"") < len(text):
            rng.shuffle(pieces)
            answers = list(pool.map(lambda each: member.append(prog_id, *each), pieces))
            assert {each.status for each in answers} <= {200, 409}
    assert member.output(prog_id).body == text


def known(member: Client) -> list[str]:
    return [each["prog_id"] for each in member("GET", "/api/v1/runs?limit=1000").json["runs"]]


def test_a_gap_is_kept_as_one_and_said(member, prog_id):
    member.append(prog_id, 0, b"abc")
    assert member.append(prog_id, 6, b"g", **{"Upload-Gap": "3"}).status == 200
    answer = member.output(prog_id)
    assert (answer.body, answer.headers["corra-gaps"]) == (b"abc\0\0\0g", "3-6")
    assert member.run(prog_id)["collector"]["gaps"] == [{"stream": "stdout", "from": 3, "to": 6}]
    assert [each["event"] for each in member.events(prog_id, "?live=false")] == [
        "output",
        "gap",
        "output",
        "state",
    ]


def test_a_gap_is_read_in_pieces_however_long_it_is(served, member, prog_id):
    member.append(prog_id, 0, b"a")
    assert member.append(prog_id, 1 << 50, b"z", **{"Upload-Gap": "1"}).status == 200
    assert member.output(prog_id, Range=f"bytes={(1 << 50) - 3}-").body == b"\0\0\0z"
    connection, answer = member.open(
        "GET", f"/api/v1/runs/{prog_id}/output/stdout", None, {"Range": f"bytes=0-{1 << 50}"}
    )
    with contextlib.closing(connection):
        assert answer.status == 206 and answer.read(5 << 20) == b"a" + bytes((5 << 20) - 1)


@pytest.mark.parametrize("offset", ["", "-1", "+1", "1_0", "x", str(1 << 60), "\uff11"])
def test_an_offset_that_is_none_is_a_400(member, prog_id, offset):
    headers = {"Upload-Offset": offset.encode("utf-8").decode("latin-1")}
    assert member("POST", f"/api/v1/agent/{prog_id}/output/stdout", b"x", headers).status == 400
    assert member("POST", f"/api/v1/agent/{prog_id}/output/stdout", b"x").status == 400


# ---------------------------------------------------------------- the end


def test_the_end_waits_for_all_output_and_is_taken_once(member, prog_id):
    streams = {
        "stdout": {"length": 4, "dropped": 0, "late": 0},
        "stderr": {"length": 2, "dropped": 0, "late": 0},
    }
    member.append(prog_id, 0, b"ab")
    answer = member.complete(prog_id, streams=streams)
    assert (answer.status, answer.json["expected"]) == (409, {"stdout": 2, "stderr": 0})
    member.append(prog_id, 2, b"cd")
    member.append(prog_id, 0, b"ef", "stderr")
    assert member.complete(prog_id, streams=streams).json == {"new": True}
    assert member.complete(prog_id, streams=streams).json == {"new": False}
    assert member.complete(prog_id, streams=streams, return_code=1, status=256).status == 409
    assert member.run(prog_id)["return_code"] == 0
    assert member.append(prog_id, 0, b"abcd").status == 200
    late = member.append(prog_id, 4, b"more")
    assert (late.status, late.headers["upload-offset"]) == (409, "4")


@pytest.mark.parametrize(
    "state",
    [
        {"state": "running"},
        {"state": "asleep"},
        {"prog_id": "another"},
        {"return_code": "0"},
        {"streams": {"stdout": 3}},
        {"state": None},
    ],
)
def test_what_is_no_end_of_this_run_is_a_422(member, prog_id, state):
    answer = member("POST", f"/api/v1/agent/{prog_id}/completed", {**ended(prog_id), **state})
    assert answer.status == 422, answer.body


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b"\xff", b'{"a": NaN}', b"[" * 100_000])
def test_what_isnt_json_is_a_400(member, prog_id, body):
    assert member("POST", f"/api/v1/agent/{prog_id}/completed", body).status == 400


NOT_UTF8 = "caf\udce9"  # as Python represents the byte E9 of an argument


def test_what_isnt_utf_8_is_kept_and_told_and_costs_nobody_the_list(member, prog_id):
    about = {
        "name": NOT_UTF8,
        "cwd": NOT_UTF8,
        "argv": ["cat", NOT_UTF8, "a\0b"],
        "origin": {"fleet": NOT_UTF8, "user": "o\0ps"},
    }
    own = member.register(prog_id, target=NOT_UTF8, **about)
    assert (
        own(
            "POST",
            f"/api/v1/agent/{prog_id}/state",
            ended(prog_id, state="running", reason=None, **about),
        ).status
        == 200
    )
    assert own.complete(prog_id, **about).json == {"new": True}
    assert member.run(prog_id)["argv"] == about["argv"]
    assert prog_id in known(member)
    assert [each["event"] for each in member.events(prog_id)] == ["end"]


# ---------------------------------------------------------------- scopes and tokens


def test_a_runs_own_token_reports_that_run_and_does_nothing_else(member, prog_id):
    own = member.register(prog_id, host="db1", argv=["./migrate", "--all"], origin=ORIGIN)
    assert own.append(prog_id, 0, b"x").status == 200
    assert own.append("another-run", 0, b"x").status == 403
    for path in (
        "/api/v1/runs",
        f"/api/v1/runs/{prog_id}",
        f"/api/v1/runs/{prog_id}/output/stdout",
        f"/api/v1/runs/{prog_id}/events",
    ):
        assert own("GET", path).status == 403, path
    assert own("POST", "/api/v1/runs", {"prog_id": "x"}).status == 403


@pytest.mark.parametrize("token", [None, "", "x", "corra_aaaaaaaaaaaa_" + "A" * 43, "corra__", "é"])
def test_without_a_token_of_ours_nothing_is_told(served, prog_id, token):
    stranger = Client(served, token and token.encode().decode("latin-1"))
    for method, path in (
        ("GET", "/api/v1/runs"),
        ("GET", f"/api/v1/runs/{prog_id}"),
        ("POST", f"/api/v1/agent/{prog_id}/completed"),
    ):
        answer = stranger(method, path)
        assert (answer.status, answer.headers["www-authenticate"]) == (401, "Bearer")


def test_a_right_key_with_a_wrong_secret_opens_nothing(served, member):
    forged = member.token[:-4] + ("AAAA" if member.token[-4:] != "AAAA" else "BBBB")
    assert Client(served, forged)("GET", "/api/v1/runs").status == 401


def test_who_asks_is_checked_before_the_body_is_read(served, prog_id):
    with socket.create_connection(("127.0.0.1", served.port), DEADLINE_S) as connection:
        connection.sendall(
            (
                f"POST /api/v1/agent/{prog_id}/output/stdout HTTP/1.1\r\nHost: x\r\n"
                f"Content-Length: 99999999\r\n\r\n"
            ).encode()
        )
        assert connection.recv(100).startswith(b"HTTP/1.1 401 ")


@pytest.mark.parametrize(
    ("who", "length", "status"),
    [("nobody", 100_000, 401), ("another run's", 100_000, 403), ("member", 8 << 20, 413)],
)
def test_a_refusal_doesnt_wait_for_the_body(served, member, prog_id, who, length, status):
    token = {
        "nobody": "x",
        "another run's": member.register("refused").token,
        "member": member.token,
    }[who]
    with socket.create_connection(("127.0.0.1", served.port), 3.0) as connection:
        connection.sendall(
            f"POST /api/v1/agent/{prog_id}/output/stdout HTTP/1.1\r\nHost: x\r\n"
            f"Upload-Offset: 0\r\n"
            f"Authorization: Bearer {token}\r\nContent-Length: {length}\r\n\r\n".encode()
        )
        answer = http.client.HTTPResponse(connection)
        answer.begin()
        assert (answer.status, set(json.loads(answer.read()))) == (status, {"error", "message"})


def test_another_members_run_is_not_mine_to_report(served, member, prog_id):
    other = Client(served, served.token("other=read,write"))
    member.append(prog_id, 0, b"x")
    assert other.append(prog_id, 1, b"y").status == 403
    assert other.complete(prog_id).status == 403
    assert other("POST", "/api/v1/runs", {"prog_id": prog_id}).status == 409


def test_a_reader_sees_what_its_scope_says_and_the_rest_isnt_there(served, member, prog_id):
    member.register(f"{prog_id}-a", host="db1", origin=ORIGIN)
    member.register(f"{prog_id}-b", host="web1", origin=ORIGIN)
    reader = Client(served, served.token("dba=read:host=db*"))
    assert {each["host"] for each in reader("GET", "/api/v1/runs?limit=1000").json["runs"]} == {
        "db1"
    }
    assert reader("GET", f"/api/v1/runs/{prog_id}-a").status == 200
    assert reader("GET", f"/api/v1/runs/{prog_id}-b").status == 404
    assert reader("GET", f"/api/v1/runs/{prog_id}-b/events").status == 404
    assert reader.append(prog_id, 0, b"x").status == 403


def test_a_token_that_was_taken_back_opens_nothing_and_neither_do_those_made_with_it(new):
    served, member = new()
    own = member.register("r1")
    assert served.corra("--revoke-token", "test").returncode == 0
    served.stop()
    served.start()
    assert (member("GET", "/api/v1/runs").status, own.append("r1", 0, b"x").status) == (401, 401)
    assert served.corra("--revoke-token", "nobody").returncode == 125


def test_tokens_are_nowhere_on_the_disk(new):
    served, member = new("--log-requests")
    own = member.register("r1")
    own.append("r1", 0, b"x")
    served.stop()
    held = b"".join(path.read_bytes() for path in served.base.iterdir())
    for token in (member.token, own.token):
        assert token.encode() not in held and token.rpartition("_")[2].encode() not in held
    assert served.database.stat().st_mode & 0o777 == 0o600


# ---------------------------------------------------------------- limits


def test_a_body_that_is_too_large_is_413_whether_or_not_it_says_so(new):
    _, member = new("--limits", "body=1000")
    assert member.append("r", 0, b"x" * 1000).status == 200
    assert member.append("r", 1000, b"x" * 1001).status == 413
    with contextlib.closing(
        socket.create_connection(("127.0.0.1", member.served.port), DEADLINE_S)
    ) as connection:
        head = (
            f"POST /api/v1/agent/r/output/stdout HTTP/1.1\r\nHost: x\r\n"
            f"Authorization: Bearer {member.token}\r\nUpload-Offset: 0\r\n"
        )
        connection.sendall(
            head.encode()
            + b"Transfer-Encoding: chunked\r\n\r\n"
            + b"400\r\n"
            + b"x" * 1024
            + b"\r\n0\r\n\r\n"
        )
        assert connection.recv(100).startswith(b"HTTP/1.1 413 ")


def test_too_often_is_429_and_says_when(new):
    _, member = new("--limits", "rate=2")
    answers = [member("GET", "/api/v1/runs") for _ in range(12)]
    refused = [each for each in answers if each.status == 429]
    assert refused and int(refused[0].headers["retry-after"]) >= 1


def test_too_many_open_runs_are_403_and_too_much_output_is_507(new):
    _, member = new("--limits", "runs=2,disk=1K")
    assert [member("POST", "/api/v1/runs", {"prog_id": f"r{n}"}).status for n in range(3)] == [
        201,
        201,
        403,
    ]
    assert member("POST", "/api/v1/runs", {"prog_id": "r0"}).status == 201  # the run exists already
    assert member.append("r0", 0, b"x" * 700).status == 200
    answer = member.append("r1", 0, b"x" * 300)
    assert (answer.status, answer.json["error"]) == (507, "allowance")
    assert member.append("r0", 0, b"x" * 700).status == 200  # the request has no new bytes


# ---------------------------------------------------------------- a run's identity


def test_a_runs_own_token_never_shows_it_to_readers_of_other_hosts(served, member, prog_id):
    """Registered facts stay. The run's own reports fill in the others, but no scope relies on a
    reported fact.
    """
    reader = {
        scope: Client(served, served.token(f"{prog_id}-{number}=read:{scope}"))
        for number, scope in enumerate(("host=db9", "user=dba", "by=eve@x", "name=pay", "fleet=f9"))
    }
    told = {
        "host": "db9", "user": "dba", "name": "pay", "argv": ["/pay"],
        "origin": {"user": "eve", "host": "x", "fleet": "f9"},
    }  # fmt: skip
    whole = member.register(
        f"{prog_id}-a", target="web1", user="app", name="job", argv=["./run"], origin=ORIGIN
    )
    bare = member.register(f"{prog_id}-b")
    for own, number in ((whole, f"{prog_id}-a"), (bare, f"{prog_id}-b")):
        state = ended(number, state="running", reason=None, **told)
        assert own("POST", f"/api/v1/agent/{number}/state", state).status == 200
        assert own.complete(number, **told).json == {"new": True}
        for scope, each in reader.items():
            assert each("GET", "/api/v1/runs").json["runs"] == [], scope
            assert each("GET", f"/api/v1/runs/{number}").status == 404, scope
    run = member.run(f"{prog_id}-a")
    known = [run[key] for key in ("host", "user", "name", "argv", "origin")]
    assert known == ["web1", "app", "job", ["./run"], ORIGIN]
    assert member.run(f"{prog_id}-b")["user"] == "dba"


def test_the_first_state_says_who_a_run_is_that_nobody_registered(member, prog_id):
    member.append(prog_id, 0, b"x")
    path = f"/api/v1/agent/{prog_id}/state"
    for host in ("db7", "db8"):
        state = ended(prog_id, state="running", reason=None, host=host, argv=[prog_id])
        assert member("POST", path, state).status == 200
    assert member.run(prog_id)["host"] == "db7"
    found = member("GET", f"/api/v1/runs?text={prog_id}&host=db7").json["runs"]
    assert [each["prog_id"] for each in found] == [prog_id]


def test_a_scope_tells_capital_letters_from_small_ones(served, member, prog_id):
    member.register(f"{prog_id}-a", host="DB1", name=prog_id)
    member.register(f"{prog_id}-b", host="db1", name=prog_id)
    for scope, seen in (("host=DB*", "a"), ("host=db*", "b"), ("host=DB1", "a"), ("host=Db*", "")):
        reader = Client(served, served.token(f"case=read:{scope}"))
        found = reader("GET", f"/api/v1/runs?name={prog_id}").json["runs"]
        assert [each["prog_id"] for each in found] == [f"{prog_id}-{each}" for each in seen]


# ---------------------------------------------------------------- the States that it accepts


def test_a_state_is_its_known_keys_and_a_long_command_is_cut(member, prog_id):
    own = member.register(prog_id, host="db1", argv=["./run", *["x" * 100_000] * 10])
    state = ended(prog_id, state="running", reason=None, more="x" * 3_900_000, cwd="/srv")
    assert own("POST", f"/api/v1/agent/{prog_id}/state", state).status == 200
    run = member("GET", f"/api/v1/runs/{prog_id}")
    assert len(run.body) < 100_000
    assert (run.json["cwd"], run.json["argv"][0], run.json.get("more")) == ("/srv", "./run", None)
    assert run.json["argv"][1].endswith("x..")


@pytest.mark.parametrize(
    "told",
    [
        {"stragglers": [{"name": "x" * 1000}] * 1000},
        {"pid": 1 << 70},
        {"elapsed": 1e300},
        {"elapsed": 10**400},
        {"streams": {"stdout": {"length": 10**30}}},
        {"rusage": {"a": {"b": {"c": [[[[[[[[[[[[[[[1]]]]]]]]]]]]]]]}}}},
        {"exception": {"errno": "x", "stage": [], "message": {}}, "state": "exited", "status": "0"},
    ],
)
def test_a_state_that_is_too_large_or_has_numbers_that_none_has_is_a_422(member, prog_id, told):
    for verb, state in (("state", "running"), ("completed", "exited")):
        body = {**ended(prog_id), "state": state, **({} if "state" in told else told), **told}
        answer = member("POST", f"/api/v1/agent/{prog_id}/{verb}", body)
        assert answer.status == 422, (verb, answer.body)
        assert member("GET", "/api/v1/runs?limit=1").status == 200


def test_what_is_kept_of_states_and_gaps_counts_against_the_allowance(new):
    _, member = new("--limits", "disk=20K")
    own = member.register("r1", host="db1")
    big = ended("r1", state="running", reason=None, env=["X" * 100] * 300)
    answer = own("POST", "/api/v1/agent/r1/state", big)
    assert (answer.status, answer.json["error"]) == (507, "allowance")
    assert own.append("r1", 0, b"x").status == 200
    refused = None
    for at in range(2, 600, 2):
        answer = own.append("r1", at, b"x", **{"Upload-Gap": str(at - 1)})
        if answer.status != 200:
            refused = answer
            break
    assert refused is not None and (refused.status, refused.json["error"]) == (507, "allowance")
    assert own.complete("r1").json == {"new": True}  # the collector always accepts an end


def test_many_gaps_are_counted_and_the_first_of_them_listed(member, prog_id):
    member.append(prog_id, 0, b"x")
    for at in range(2, 402, 2):
        member.append(prog_id, at, b"x", **{"Upload-Gap": str(at - 1)})
    told = member.run(prog_id)["collector"]
    assert (len(told["gaps"]), told["gap_count"]) == (100, 200)
    assert told["gaps"][0] == {"stream": "stdout", "from": 1, "to": 2}
    header = member.output(prog_id).headers["corra-gaps"]
    assert header.startswith("1-2, 3-4, ") and header.endswith(", ...")


def test_a_list_of_long_commands_comes_in_pages_of_bytes(new):
    from corra.collector.client import Collector

    served, member = new()
    for number in range(320):
        member.register(f"r{number}", host="db1", argv=["x" * 60_000])
    page = member("GET", "/api/v1/runs?limit=1000")
    assert page.json["next"] and len(page.body) < 5 << 20
    found = Collector("c", served.url, member.token).runs()
    assert [state.prog_id for state in found] == [f"r{number}" for number in reversed(range(320))]


def test_an_older_database_is_brought_up_and_counts_nothing_that_it_never_counted(tmp_path):
    from alembic import command
    from alembic.config import Config

    from corra.collector import store as stores

    made = stores.Store(str(tmp_path / "c.sqlite3"))
    key, secret = split_header("Bearer " + made.new_token("t", ["read", "write"]))
    token = checked_token(made.token(key), secret)
    made.append(token, "r1", "stdout", 0, b"x" * 1000).result()
    made.complete(token, "r1", ended("r1", return_code=3, status=768)).result()
    config = Config()
    config.set_main_option("script_location", str(stores.MIGRATIONS))
    with made.engine.connect() as connection:
        config.attributes["connection"] = connection
        command.downgrade(config, "0001")
        connection.exec_driver_sql("UPDATE tokens SET bytes = 1000")
        connection.commit()
    made.close()
    again = stores.Store(str(tmp_path / "c.sqlite3"))
    try:
        assert again.counts() == {"failed": 1}
        assert again.prune(-1, None) == 1
        assert again.size() == 0
    finally:
        again.close()


# ---------------------------------------------------------------- before a token is shown


@pytest.fixture
def cold(tmp_path) -> Iterator[tuple[Served, Client]]:
    """A collector in its own Python interpreter, which shares no memory with a test's server."""
    found = Served(tmp_path)
    found.cold = True
    token = found.token()
    found.start()
    member = Client(found, token)
    assert member("GET", "/api/v1/runs").status == 200
    yield found, member
    found.kill()


def peak_memory(served: Served) -> int:
    assert served.process is not None
    text = Path(f"/proc/{served.process.pid}/status").read_text()
    return int(text.partition("VmHWM:")[2].split()[0]) << 10


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("first", "piece", "status"),
    [
        (b"GET /", b"a" * 65536, 414),
        (b"GET / HTTP/1.1\r\nHost: x\r\n", b"a: b\r\n" * 10_000, 431),
        (b"GET / HTTP/1.1\r\nX: ", b"a" * 65536, 431),
        (b"GET / HTTP/1.1\r\n", b"a" * 65536, 431),
        (b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nX: ", b"a" * 65536, None),
        (b"", b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" * 6000, None),
    ],
)
def test_a_head_that_doesnt_end_is_refused_and_costs_hardly_any_memory(cold, first, piece, status):
    served, member = cold
    before = peak_memory(served)
    with socket.create_connection(("127.0.0.1", served.port), DEADLINE_S) as connection:
        taken = b""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.sendall(first)
            for _ in range(1000):  # 64 MB
                connection.sendall(piece)
        with contextlib.suppress(ConnectionResetError):
            while data := connection.recv(65536):
                taken += data
        if taken and status:
            assert taken.startswith(b"HTTP/1.1 %d " % status)
    assert peak_memory(served) - before < 8 << 20
    assert member("GET", "/api/v1/runs").status == 200


def test_a_head_just_too_large_is_refused_in_json(served):
    for head, status in (
        (b"GET /?a=%b HTTP/1.1\r\n\r\n" % (b"a" * 9000), 414),
        (b"GET / HTTP/1.1\r\n%b\r\n" % (b"a: b\r\n" * 101), 431),
        (b"GET / HTTP/1.1\r\nA: %b\r\n\r\n" % (b"a" * 40_000), 431),
        (b"nonsense\r\n\r\n", 400),
    ):
        with socket.create_connection(("127.0.0.1", served.port), DEADLINE_S) as connection:
            connection.sendall(head)
            answer = http.client.HTTPResponse(connection)
            answer.begin()
            assert (answer.status, set(json.loads(answer.read()))) == (status, {"error", "message"})


def test_a_second_head_has_its_deadline_as_the_first():
    """With uvicorn as it runs, and a shorter deadline."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def main(second: bytes) -> bytes:
        async with hasty_server(app) as where:
            reader, writer = await asyncio.open_connection(*where)
            writer.write(b"GET / HTTP/1.1\r\n\r\n")
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 204 ")
            writer.write(second)
            found = await asyncio.wait_for(reader.read(), DEADLINE_S)
            writer.close()
            return found

    for second in (b"GET / HTTP/1.1\r\nX: ", b"\r\n"):
        assert asyncio.run(main(second)) == b""


def test_a_thousand_silent_connections_shut_out_nobody_who_has_a_token(cold):
    served, member = cold
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 4096:
        pytest.skip("needs 4,096 descriptors")
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    connection, answer = member.open("GET", "/api/v1/runs")
    answer.read()
    silent = []
    try:
        for _ in range(1500):
            silent.append(socket.create_connection(("127.0.0.1", served.port), DEADLINE_S))
            silent[-1].sendall(b"GET / HTTP/1.1\r\nX: ")
        assert member.append("r", 0, b"x").status == 200
        connection.request(
            "GET", "/api/v1/runs", headers={"Authorization": f"Bearer {member.token}"}
        )
        assert connection.getresponse().status == 200  # this connection had shown its token
        fds = len(os.listdir(f"/proc/{served.process.pid}/fd"))
        assert fds < STRANGERS_MAX + 100
    finally:
        connection.close()
        for each in silent:
            each.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


class FewDescriptors(Served):
    """A collector that may have 256 descriptors: 64 for strangers, 64 for each token, 128 for all
    tokens.
    """

    cold = True

    def argv(self, *words: str) -> list[str]:
        return ["sh", "-c", 'ulimit -n 256; exec "$@"', "sh", *super().argv(*words)]


@pytest.mark.parametrize("holders", [1, 5], ids=["one token", "five tokens"])
def test_the_connections_of_token_holders_shut_out_nobody(tmp_path, holders):
    served = FewDescriptors(tmp_path)
    member = Client(served, served.token())
    others = [Client(served, served.token(f"other{at}=read")) for at in range(holders)]
    served.start()
    held = []
    try:
        mine, answer = member.open("GET", "/api/v1/runs")
        answer.read()
        held.append(mine)
        for at in range(300):
            connection, answer = others[at % holders].open("GET", "/api/v1/runs")
            held.append(connection)
            assert answer.status == 200, at
            answer.read()
        assert served.process is not None
        fds = len(os.listdir(f"/proc/{served.process.pid}/fd"))
        # Of one token no more than its 64 are held, of five no more than 128 together; the server
        # has 30 files of its own.
        assert fds < (64 if holders == 1 else 128) + 64
        assert member("GET", "/api/v1/runs").status == 200
        if holders == 1:  # the connections of another token were left alone
            mine.request("GET", "/api/v1/runs", headers={"Authorization": f"Bearer {member.token}"})
            assert mine.getresponse().status == 200
    finally:
        for connection in held:
            connection.close()
        served.kill()


def test_an_event_stream_ends_when_its_token_is_revoked_and_the_others_go_on(new):
    served, member = new()
    member.append("r", 0, b"x")
    reader = Client(served, served.token("wall=read"))
    ending, going_on = reader.events("r"), member.events("r")
    for events in (ending, going_on):
        assert [next(events)["event"] for _ in range(2)] == ["output", "state"]
    assert served.corra("--revoke-token", "wall").returncode == 0
    assert list(ending) == []
    assert member.append("r", 1, b"y").status == 200
    assert next(going_on)["event"] == "output"
    eventually(lambda: reader("GET", "/api/v1/runs").status == 401)


# ---------------------------------------------------------------- reading


def test_runs_are_found_by_what_is_known_of_them_and_come_in_pages(new):
    _, member = new()
    for n in range(5):
        member.register(
            f"r{n}",
            host=f"db{n % 2}",
            name=f"job{n}",
            user="app",
            argv=["./run", f"--part={n}%"],
            origin={**ORIGIN, "fleet": "f1"},
        )
    member.append("r1", 0, b"x")
    member.complete(
        "r2",
        host="x",
        argv=["./run", "--part=2%"],
        origin={**ORIGIN, "fleet": "f1"},
        user="app",
        name="job2",
    )

    def found(query: str) -> list[str]:
        return [each["prog_id"] for each in member("GET", f"/api/v1/runs?{query}").json["runs"]]

    assert found("") == ["r4", "r3", "r2", "r1", "r0"]
    assert found("host=db1") == ["r3", "r1"]
    assert found("host=db*") == ["r4", "r3", "r2", "r1", "r0"]
    assert found("host=DB*") == found("name=JOB3") == found("text=PART") == []
    assert found("state=exited") == ["r2"]
    assert found("state=running") == ["r1"]
    assert found("open=true") == ["r4", "r3", "r1", "r0"]
    assert found("name=job3") == ["r3"]
    assert found("user=ops") == found("user=app") == found("fleet=f1") == found("")
    assert found("text=part%3D3%25") == ["r3"]
    assert found("text=part_3") == []
    assert found("tail=r4") == ["r4"]
    assert found(f"since={time.time() + 100}") == ["r4", "r3", "r1", "r0"]
    assert found(f"until={time.time() - 100}") == []
    pages, query = [], "limit=2"
    while True:
        page = member("GET", f"/api/v1/runs?{query}").json
        pages.append([each["prog_id"] for each in page["runs"]])
        if not page["next"]:
            break
        query = f"limit=2&page={page['next']}"
    assert pages == [["r4", "r3"], ["r2", "r1"], ["r0"]]


@pytest.mark.parametrize(
    "query",
    [
        "limit=0",
        "limit=x",
        "limit=99999",
        "since=x",
        "since=nan",
        "open=yes",
        "page=x",
        "page=1e400,1",
        "name=%00",
        "stat=failed",
        "Host=db1",
    ],
)
def test_a_question_that_makes_no_sense_is_a_400(member, query):
    assert member("GET", f"/api/v1/runs?{query}").status == 400


def test_a_parameter_that_isnt_known_is_a_400_everywhere(member, prog_id):
    member.append(prog_id, 0, b"x")
    for path in ("", "/output/stdout", "/events"):
        answer = member("GET", f"/api/v1/runs/{prog_id}{path}?tial=3")
        assert (answer.status, answer.json["error"]) == (400, "bad_query"), path


ENDS: dict[str, dict[str, Any]] = {
    "done": {},
    "failed": {"return_code": 3, "status": 768},
    "killed": {"signal": "SIGKILL", "status": 9, "return_code": None, "reason": "signaled"},
    "timeout": {"reason": "timeout", "status": 15, "signal": "SIGTERM", "return_code": None},
    "lost": {"state": "lost", "reason": "reboot", "status": None, "return_code": None},
    "not started": {
        "state": "not_started",
        "reason": "exec",
        "exception": {"errno": 2, "stage": "exec", "message": "no such file"},
    },
}


def test_a_state_is_asked_for_in_the_words_of_ps_and_metrics_count_by_them(new):
    from corra import render
    from corra.model.state import State

    _, member = new()
    for name, facts in ENDS.items():
        state = ended(name.replace(" ", "-"), **facts)
        assert member.complete(state["prog_id"], **facts).status == 200
        assert render.word(State.from_json(state)).lower().startswith(name)
    member.append("running", 0, b"x")
    for name in [*ENDS, "running"]:
        for word in (name, name.upper(), name[:3]):
            query = word.replace(" ", "%20")
            found = member("GET", f"/api/v1/runs?state={query}").json["runs"]
            assert [each["prog_id"] for each in found] == [name.replace(" ", "-")], word
    assert len(member("GET", "/api/v1/runs?state=exited").json["runs"]) == 4
    assert len(member("GET", "/api/v1/runs?state=FAILED%203").json["runs"]) == 1
    text = Client(member.served, None)("GET", "/metrics").body.decode()
    for name in [*ENDS, "running"]:
        assert f'corra_runs{{state="{name.replace(" ", "_")}"}} 1.0' in text
    assert 'corra_runs{state="starting"} 0.0' in text


@pytest.mark.parametrize(
    "asked, status, expected",
    [
        ("bytes=0-2", 206, b"abc"), ("bytes=3-", 206, b"defghij"), ("bytes=-2", 206, b"ij"),
        ("bytes=8-99", 206, b"ij"),
        ("bytes=-99", 206, b"abcdefghij"), ("bytes=10-", 416, None), ("bytes=-0", 416, None),
        ("bytes=5-2", 200, b"abcdefghij"), ("lines=1-2", 200, b"abcdefghij"),
        ("bytes=0-1,4-5", 200, b"abcdefghij"),
    ],
)  # fmt: skip
def test_a_range_is_what_it_says(member, prog_id, asked, status, expected):
    for at in range(0, 10, 3):
        member.append(prog_id, at, b"abcdefghij"[at : at + 3])
    answer = member.output(prog_id, Range=asked)
    assert answer.status == status
    assert expected is None or answer.body == expected
    if status == 206:
        start = b"abcdefghij".index(expected)
        assert answer.headers["content-range"] == f"bytes {start}-{start + len(expected) - 1}/10"
    if status == 416:
        assert answer.headers["content-range"] == "bytes */10"


def test_output_is_sent_gzipped_to_who_takes_it(member, prog_id):
    text = b"again and again\n" * 10_000
    member.append(prog_id, 0, text)
    answer = member.output(prog_id, **{"Accept-Encoding": "gzip"})
    assert answer.headers["content-encoding"] == "gzip"
    assert gzip.decompress(answer.body) == text
    assert len(answer.body) < len(text) / 20


def test_what_isnt_there_is_a_404(member, prog_id):
    for path in (
        f"/api/v1/runs/{prog_id}",
        f"/api/v1/runs/{prog_id}/output/stdout",
        "/api/v1/runs/..%2f..",
        "/nothing",
    ):
        assert member("GET", path).status == 404, path
    member.append(prog_id, 0, b"x")
    assert member.output(prog_id, "stderr").status == 404
    assert member.append(prog_id, 0, b"x", "UPPER").status == 404


def test_events_come_as_they_happen_and_go_on_from_the_last_one_that_was_seen(member, prog_id):
    member.append(prog_id, 0, b"one\n")
    events = member.events(prog_id)
    first = next(events)
    assert (first["event"], base64.b64decode(first["data"]["data"]), first["id"]) == (
        "output",
        b"one\n",
        "stdout:4",
    )
    assert next(events)["event"] == "state"
    member.append(prog_id, 4, b"two\n")
    member.append(prog_id, 0, b"err\n", "stderr")
    second = next(events)
    assert base64.b64decode(second["data"]["data"]) == b"two\n"
    again = member.events(prog_id, **{"Last-Event-ID": second["id"]})
    assert base64.b64decode(next(again)["data"]["data"]) == b"err\n"
    member.complete(prog_id, streams={"stdout": {"length": 8}, "stderr": {"length": 4}})
    assert [each["event"] for each in again][-1] == "end"
    assert [each["event"] for each in events][-1] == "end"
    tail = [
        base64.b64decode(each["data"]["data"])
        for each in member.events(prog_id, "?tail=1")
        if each["event"] == "output"
    ]
    assert tail == [b"two\n", b"err\n"]


def test_a_state_report_is_kept_until_the_end_and_never_after_it(member, prog_id):
    path = f"/api/v1/agent/{prog_id}/state"
    assert member("POST", path, ended(prog_id, state="running", reason=None, pid=77)).status == 200
    assert member.run(prog_id)["pid"] == 77
    assert member("POST", path, ended(prog_id)).status == 422
    member.complete(prog_id)
    assert member("POST", path, ended(prog_id, state="running")).status == 200
    assert member.run(prog_id)["state"] == "exited"


# ---------------------------------------------------------------- the server


def test_what_was_acknowledged_outlives_a_kill(new):
    served, member = new()
    acked = [0] * 8
    over = threading.Event()

    def write(number: int) -> None:
        with contextlib.suppress(OSError, http.client.HTTPException):
            while not over.is_set():
                answer = member.append(f"r{number}", acked[number], b"0123456789" * 10)
                if answer.status == 200:
                    acked[number] = int(answer.headers["upload-offset"])

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    eventually(lambda: min(acked) >= 2000)
    served.kill()
    over.set()
    for thread in threads:
        thread.join()
    served.start()
    for number, length in enumerate(acked):
        body = member.output(f"r{number}").body
        assert len(body) >= length >= 2000
        assert body == (b"0123456789" * len(body))[: len(body)]


def test_a_term_ends_it_in_order_watchers_and_all(new):
    served, member = new()
    member.append("r", 0, b"x")
    events = member.events("r")
    assert next(events)["event"] == "output"
    assert served.stop() == 0
    assert [each["event"] for each in events] in ([], ["state"])
    assert [each["event"] for each in served.lines()][-2:] == ["stopping", "stopped"]
    with sqlite3.connect(served.database) as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_a_request_that_is_half_there_at_a_term_is_finished(new):
    served, member = new()
    with socket.create_connection(("127.0.0.1", served.port), DEADLINE_S) as connection:
        connection.sendall(
            f"POST /api/v1/agent/r/output/stdout HTTP/1.1\r\nHost: x\r\nUpload-Offset: 0\r\n"
            f"Authorization: Bearer {member.token}\r\nExpect: 100-continue\r\n"
            f"Content-Length: 10\r\n\r\n".encode()
        )
        assert connection.recv(100).startswith(b"HTTP/1.1 100 ")  # the server has begun to read
        served.process.send_signal(signal.SIGTERM)
        eventually(lambda: "stopping" in [each["event"] for each in served.lines()])
        connection.sendall(b"0123456789")
        assert connection.recv(400).startswith(b"HTTP/1.1 200 ")
    assert served.process.wait(DEADLINE_S) == 0
    served.start()
    assert member.output("r").body == b"0123456789"


def test_it_starts_with_nothing_and_says_where_it_listens_where_its_data_is_and_how_to_get_a_token(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    served = Served(tmp_path)
    served.cold = True
    monkeypatch.setattr(
        served, "argv", lambda *words: [sys.executable, "-m", "corra", "serve", *words]
    )
    served.start()
    try:
        data = tmp_path / "state" / "corra" / "collector.sqlite3"
        assert served.log.read_text().splitlines() == [
            f"corra: listening at {served.url}", f"corra: data in {data}",
            "corra: a token:  corra serve --new-token NAME=read,write",
        ]  # fmt: skip
        assert (data.stat().st_mode & 0o777, data.parent.stat().st_mode & 0o777) == (0o600, 0o700)
        done = served.corra("--new-token", "me=read")
        assert Client(served, done.stdout.decode().strip())("GET", "/api/v1/runs").json == {
            "runs": [],
            "next": None,
        }
    finally:
        assert served.stop() == 0


def test_a_full_disk_is_507_for_what_is_new_and_heals(tmp_path):
    if os.getuid():
        pytest.skip("needs root: it mounts a tmpfs")
    small = Mount(tmp_path / "small", "size=16m,mode=700")
    served = Served(small.at)
    try:
        member = Client(served, served.token())
        served.start()
        assert member.append("r", 0, b"x" * 1000).status == 200
        filler = small.at / "filler"
        filler.write_bytes(bytes(small.free() - (600 << 10)))  # the floor is 5 %
        eventually(lambda: not healthy(member))
        answer = member.append("r", 1000, b"y" * 1000)
        assert (answer.status, answer.json["error"]) == (507, "disk_full")
        member.register("r2")  # without a place there, the run would not be started
        assert member.append("r", 0, b"x" * 1000).status == 200  # the collector has these bytes
        filler.unlink()
        eventually(lambda: healthy(member))
        assert member.append("r", 1000, b"y" * 1000).status == 200
        assert member.output("r").body == b"x" * 1000 + b"y" * 1000
    finally:
        served.kill()
        small.close()


def healthy(member: Client) -> bool:
    return bool(member("GET", "/healthz").json["ok"])


def test_metrics_and_health_are_open_and_name_no_run(served, member, prog_id):
    member.append(prog_id, 0, b"x")
    anybody = Client(served, None)
    text = anybody("GET", "/metrics").body.decode()
    assert 'corra_requests_total{status="200",what="append"}' in text
    assert 'corra_runs{state="running"}' in text
    assert prog_id not in text and "test" not in text
    assert anybody("GET", "/healthz").json == {"ok": True}
    assert "/api/v1/runs" in anybody("GET", "/").body.decode()


def test_the_openapi_names_every_path(served):
    document = Client(served, None)("GET", "/openapi.json").json
    assert document["openapi"].startswith("3.1")
    from corra.collector.app import Api
    from corra.collector.store import Store

    store = Store(str(served.base / "other.sqlite3"))
    paths = {getattr(route, "path", "") for route in Api(store).app().routes}
    store.close()
    assert paths - {"/", "/openapi.json"} == set(document["paths"])


def test_it_leaves_this_machine_only_with_tls_or_when_told_to(served):
    for host in ("0.0.0.0", "[::]", "10.1.2.3"):
        done = served.corra("--listen", f"{host}:0")
        assert done.returncode == 2
        assert b"NOT SERVED" in done.stderr and b"TLS" in done.stderr


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--listen", "nonsense"], "not HOST:PORT"), (["--tls-cert", "x"], "belong together"),
        (["--limits", "x=1"], "not a limit"),
        (["--new-token", "x"], "not NAME=SCOPES"), (["--new-token", "x=fly"], "not a scope"),
        (["--webhook", "ftp://x"], "not a webhook"),
        (["--database", "postgresql://x/y"], "not a database"),
        (["--database", "/proc/no/such"], "/proc/no/such"),
        (["--listen", "127.0.0.1:0", "--tls-cert", "/dev/null", "--tls-key", "/dev/null"], "TLS"),
        (["--max-size", "big"], "not a size"),
    ],
)  # fmt: skip
def test_what_it_cant_do_is_said_in_a_line(tmp_path, flags, said):
    served = Served(tmp_path)
    if flags[0] == "--database":
        served.database, flags = Path(flags[1]) if flags[1].startswith("/") else flags[1], []
    done = served.corra(*flags)
    assert done.returncode in (2, 125), done.stderr
    assert b"Traceback" not in done.stderr and said in done.stderr.decode()


def test_a_port_that_is_taken_is_said(served, tmp_path):
    done = Served(tmp_path).corra("--listen", f"127.0.0.1:{served.port}")
    assert done.returncode == 125 and b"can't listen" in done.stderr


# ---------------------------------------------------------------- retention and notices


def test_what_is_old_or_too_much_is_forgotten_and_what_is_open_is_not(tmp_path):
    from corra.collector.store import Store

    store = Store(str(tmp_path / "c.sqlite3"))
    try:
        key, secret = split_header("Bearer " + store.new_token("t", ["read", "write"]))
        token = checked_token(store.token(key), secret)
        for number in range(4):
            store.append(token, f"r{number}", "stdout", 0, b"x" * 1000).result()
            if number:
                store.complete(token, f"r{number}", ended(f"r{number}")).result()
        documents = store.size() - 4000
        assert 0 < documents < 4 * 1000
        assert store.prune(3600, None) == 0
        assert store.prune(3600, 2500 + documents // 2) == 2  # the two runs that ended first
        assert [each["prog_id"] for each in store.runs({}, [{}], limit=9)[0]] == ["r3", "r0"]
        assert 2000 < store.size() < 2000 + documents
        assert store.prune(0, None) == 2
        assert store.size() == 0
    finally:
        store.close()


def test_what_is_committed_is_moved_out_of_the_log_beside_the_writer(tmp_path):
    from corra.collector.store import MOVE_BYTES, Store

    store = Store(str(tmp_path / "c.sqlite3"))
    try:
        key, secret = split_header("Bearer " + store.new_token("t", ["read", "write"]))
        token = checked_token(store.token(key), secret)
        data = bytes(range(256)) * 4096  # 1 MiB; SQLite's own checkpoint comes after 64
        for number in range(2 * MOVE_BYTES // len(data)):
            store.append(token, "r1", "stdout", number * len(data), data).result()
        eventually(lambda: store.file.stat().st_size > MOVE_BYTES)
        assert b"".join(store.output("r1", "stdout", 0, 2 * MOVE_BYTES)) == data * (
            2 * MOVE_BYTES // len(data)
        )
    finally:
        store.close()


# ---------------------------------------------------------------- the writer's memory


@pytest.fixture
def two(tmp_path):
    """Yield two Stores over one database, as two processes have them, and a token."""
    from corra.collector.store import Store

    stores = [Store(str(tmp_path / "c.sqlite3")) for _ in range(2)]
    key, secret = split_header("Bearer " + stores[0].new_token("t", ["read", "write"]))
    yield *stores, checked_token(stores[0].token(key), secret)
    for store in stores:
        store.close()


def test_what_another_process_has_written_is_noticed_before_the_answer(two):
    from corra.collector.limits import RequestRefusal

    one, other, token = two
    for offset, data in ((0, b"ab"), (2, b"cd"), (4, b"ef")):
        assert one.append(token, "r1", "stdout", offset, data).result() == offset + 2
    assert other.append(token, "r1", "stdout", 6, b"gh").result() == 8
    before = one.size()
    assert one.append(token, "r1", "stdout", 6, b"ghi").result() == 9
    with pytest.raises(RequestRefusal, match="have not come yet"):
        other.append(token, "r1", "stdout", 10, b"k").result()
    assert b"".join(one.output("r1", "stdout", 0, 9)) == b"abcdefghi"
    assert one.size() == before + 1
    assert other.complete(token, "r1", ended("r1", streams={"stdout": {"length": 9}})).result()
    with pytest.raises(RequestRefusal, match="has ended"):
        one.append(token, "r1", "stdout", 9, b"j").result()
    assert other.prune(0, None) == 1
    with pytest.raises(RequestRefusal, match="begins with a hole"):
        one.append(token, "r1", "stdout", 9, b"j").result()


def test_a_run_that_was_forgotten_elsewhere_is_not_gone_on_with_from_memory(two):
    from corra.collector.limits import RequestRefusal

    one, other, token = two
    for offset in range(3):
        one.append(token, "r1", "stdout", offset, b"x").result()
    assert other.prune(-1, None) == 1
    with pytest.raises(RequestRefusal, match="begins with a hole"):
        one.append(token, "r1", "stdout", 3, b"x").result()
    assert one.append(token, "r1", "stdout", 0, b"y").result() == 1


def test_what_is_refused_costs_nothing_of_the_allowance(two):
    from corra.collector.limits import RequestRefusal
    from corra.collector.store import STREAMS_MAX

    store, _, token = two
    for number in range(STREAMS_MAX):
        store.append(token, "r1", f"s{number}", 0, b"x").result()
    size = store.size()
    with pytest.raises(RequestRefusal, match="at most"):
        store.append(token, "r1", "one_more", 0, b"x").result()
    assert store.size() == size


def test_what_comes_in_one_turn_of_the_loop_is_taken_in_its_order_with_few_commits(two):
    from corra.collector.limits import RequestRefusal

    store, _, token = two
    commits = []
    store.committed = lambda prog_ids, jobs, seconds: commits.append(jobs)

    async def turn() -> list[Any]:
        appends = [store.append(token, "r1", "stdout", 3 * number, b"abc") for number in range(100)]
        end = store.complete(token, "r1", ended("r1", streams={"stdout": {"length": 300}}))
        late = store.append(token, "r1", "stdout", 300, b"d")
        return await asyncio.gather(*appends, end, late, return_exceptions=True)

    *lengths, end, late = asyncio.run(turn())
    assert lengths == [3 * number + 3 for number in range(100)] and end is True
    assert isinstance(late, RequestRefusal) and late.body["error"] == "ended"
    assert sum(commits) == 102 and len(commits) < 10
    assert b"".join(store.output("r1", "stdout", 0, 300)) == b"abc" * 100


def test_one_timer_ends_what_is_late_and_nothing_else():
    from corra.collector.app import Deadlines

    async def main() -> list[str]:
        deadlines, never, soon = Deadlines(0.05), asyncio.Event(), asyncio.Event()

        async def wait(event: asyncio.Event) -> str:
            task = deadlines.begin()
            try:
                await event.wait()
            except asyncio.CancelledError:
                return "late" if deadlines.passed(task) else "cancelled"
            finally:
                deadlines.end(task)
            return "in time"

        tasks = [asyncio.create_task(wait(event)) for event in (soon, never, never)]
        await asyncio.sleep(0)
        soon.set()
        tasks[2].cancel()
        return await asyncio.gather(*tasks)

    assert asyncio.run(main()) == ["in time", "late", "cancelled"]


class Hooked(http.server.BaseHTTPRequestHandler):
    """A server that accepts notices; it answers the first with a 500."""

    taken: ClassVar[list[Any]] = []
    statuses: ClassVar[list[int]] = [500, 200, 200, 200]

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        status = self.statuses.pop(0)
        if status == 200:
            self.taken.append((self.path, body))
        self.send_response(status)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def test_each_end_is_told_to_every_webhook_once_it_takes_it(tmp_path, monkeypatch):
    from corra.collector import notices, webhooks
    from corra.collector.store import Store

    monkeypatch.setattr(webhooks, "FIRST_PAUSE_S", 0.0)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hooked)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    store = Store(
        str(tmp_path / "c.sqlite3"),
        hooks=[notices.parse_hook(f"{url}/plain"), notices.parse_hook(f"slack={url}/slack")],
    )
    try:
        key, secret = split_header("Bearer " + store.new_token("t", ["write"]))
        token = checked_token(store.token(key), secret)
        for _ in range(2):  # the second report isn't new
            store.complete(
                token, "r1", ended("r1", return_code=3, status=768, argv=["./migrate", "a b"])
            ).result()
        until = time.monotonic() + DEADLINE_S
        while len(Hooked.taken) < 2 and time.monotonic() < until:
            webhooks.send_due(store)
        webhooks.send_due(store)
        assert sorted(path for path, _ in Hooked.taken) == ["/plain", "/slack"]
        told = dict(Hooked.taken)
        assert told["/slack"] == {"text": "r1 on db1: FAILED: exit 3: ./migrate 'a b'"}
        assert (told["/plain"]["type"], told["/plain"]["state"]["return_code"]) == ("end", 3)
        assert store.due(time.time() + 1e9) == []
    finally:
        store.close()
        server.shutdown()
        server.server_close()


def test_an_end_that_was_taken_is_told_by_the_server_that_comes_after_a_kill(new):
    taken: list[tuple[str, Any]] = []
    changed = threading.Condition()

    class Hook(http.server.BaseHTTPRequestHandler):
        status = 503

        def do_POST(self) -> None:
            text = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with changed:
                taken.append((self.path, text))
                changed.notify_all()
            self.send_response(self.status)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    def told() -> list[str]:
        with changed:
            assert changed.wait_for(lambda: len(taken) >= 2, DEADLINE_S)
            found = sorted(path for path, _ in taken)
            taken.clear()
        return found

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hook)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    served, member = new("--webhook", f"{url}/plain", "--webhook", f"slack={url}/slack")
    try:
        member.complete("r1")
        assert told() == ["/plain", "/slack"]
        eventually(lambda: [each["event"] for each in served.lines()].count("webhook failed") == 2)
        served.kill()
        Hook.status = 200
        with sqlite3.connect(served.database) as database:
            database.execute(
                "UPDATE notices SET due = 0"
            )  # instead of waiting for the pause after a failure
        served.start()
        assert told() == ["/plain", "/slack"]
        eventually(lambda: [each["event"] for each in served.lines()].count("webhook") == 2)
        assert "/slack" not in served.log.read_text()  # a Slack hook's path is a secret
    finally:
        server.shutdown()
        server.server_close()


def test_a_watcher_is_woken_by_news_and_by_a_beat_and_tells_them_apart():
    async def main() -> None:
        watchers = Watchers()
        with watchers.watch("r1", 1) as news, watchers.watch("r2", 2) as other:
            news.take()
            assert await news.wait(0.001) is False
            watchers.tell({"r1"})
            assert await news.wait(DEADLINE_S) is True
            # it stays true until the watcher takes the news
            assert await news.wait(DEADLINE_S) is True
            news.take()
            assert await news.wait(0.001) is False
            assert await other.wait(0.001) is False
            watchers.close()
            assert news.over and other.over and await other.wait(DEADLINE_S) is True
        assert watchers.count == 0

    asyncio.run(main())


def test_the_migrations_make_the_tables_that_the_code_uses(tmp_path):
    from alembic.autogenerate import compare_metadata
    from alembic.config import Config
    from alembic.runtime.migration import MigrationContext
    from alembic.script import ScriptDirectory

    from corra.collector import schema, store

    config = Config()
    config.set_main_option("script_location", str(store.MIGRATIONS))
    assert ScriptDirectory.from_config(config).get_heads() == [store.HEAD]
    made = store.Store(str(tmp_path / "c.sqlite3"))
    with made.engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), schema.metadata) == []
    made.close()


@pytest.mark.parametrize(
    "wanted",
    [{}, {"name": "job"}, {"host": "db1"}, {"name": "job", "open": True}, {"tail": "abc*"}],
    ids=str,
)
def test_a_list_reads_an_index_and_sorts_nothing(tmp_path, wanted):
    """A year has 100,000 runs of one name."""
    from sqlalchemy import event

    from corra.collector import store

    made = store.Store(str(tmp_path / "c.sqlite3"))
    asked: list[tuple[str, Any]] = []
    event.listen(
        made.engine, "before_cursor_execute", lambda *each: asked.append((each[2], each[3]))
    )
    made.runs(wanted, [{}], limit=100)
    ((text, values),) = [each for each in asked if "FROM runs" in each[0]]
    with made.engine.connect() as connection:
        plan = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {text}", values).all()
    made.close()
    said = " ".join(str(row[-1]) for row in plan)
    assert "USING INDEX runs_" in said
    assert wanted.get("tail") or "TEMP B-TREE" not in said, said


@contextlib.asynccontextmanager
async def hasty_server(app: Any) -> AsyncIterator[Any]:
    """Yield the address of a server that waits 0.2 s for a head."""
    import uvicorn

    class Hasty(Connection):
        head_s = 0.2

    hasty: Any = functools.partial(Hasty, places=Places())
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(
            uvicorn.Config(app, http=hasty, lifespan="off", log_config=None, ws="none")
        )
        running = asyncio.create_task(server.serve(sockets=[listener]))
        yield listener.getsockname()
        server.should_exit = True
        await running


@pytest.mark.storm
def test_a_tls_handshake_that_doesnt_end_is_ended_and_keeps_nobody_out(tmp_path):
    """More of them than the share of connections without a token."""
    authority = Authority(tmp_path)
    served = Served(tmp_path, tls=authority.server(), ca=authority.pem)
    member = Client(served, served.token())
    served.start()
    try:
        with contextlib.ExitStack() as kept:
            silent = [
                kept.enter_context(socket.create_connection(("127.0.0.1", served.port)))
                for _ in range(STRANGERS_MAX + 100)
            ]
            assert member("GET", "/api/v1/runs").status == 200
            for each in silent:
                each.settimeout(HEAD_S + DEADLINE_S)
                assert each.recv(1) == b""
    finally:
        served.kill()


def test_who_says_nothing_is_not_kept_for_ever():
    async def main() -> bytes:
        async def app(scope: Any, receive: Any, send: Any) -> None:
            raise AssertionError

        async with hasty_server(app) as where:
            reader, writer = await asyncio.open_connection(*where)
            writer.write(b"GET / HTTP/1.1\r\nX: ")
            found = await asyncio.wait_for(reader.read(), DEADLINE_S)
            writer.close()
            return found

    assert asyncio.run(main()) == b""
