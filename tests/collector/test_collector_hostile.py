"""A collector that answers what it likes never breaks whoever asks it: each answer is read or a
CorraError.
"""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from corra.collector import client
from corra.collector.client import EVENTS, PAGE, Collected, Collector
from corra.errors import CorraError
from corra.model.state import STATE, State
from corra.runs.events import LinkDown
from hostile import SOME_ID, documents, spoiled
from properties import PROPERTY

MANY = settings(PROPERTY, suppress_health_check=[HealthCheck.function_scoped_fixture])


class Server(ThreadingHTTPServer):
    said = b""


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.server.said)))
        self.end_headers()
        self.wfile.write(self.server.said)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def collector(server: Server) -> Collector:
    return Collector("c", f"http://127.0.0.1:{server.server_address[1]}")


RUN = {"prog_id": SOME_ID, "state": "lost"}


def page(runs: list[Any], place: str) -> bytes:
    return json.dumps({"runs": runs, "next": place}).encode()


@MANY
@given(data=st.data())
def test_a_page_of_runs_is_read_or_an_error(server, data):
    said = data.draw(documents(PAGE) | spoiled(PAGE))
    server.said = json.dumps(said).encode()
    try:
        assert all(isinstance(each, State) for each in collector(server).runs())
    except CorraError as error:
        assert "Traceback" not in error.line


@pytest.mark.parametrize("place", ["5.0,7", "inf,1", "nan,1", "x", "5", "-inf,1"])
def test_pages_that_dont_go_on_to_older_runs_are_an_error(server, place):
    server.said = page([RUN], place)
    with pytest.raises(CorraError, match="its list has no end"):
        collector(server).runs()


def test_a_page_without_runs_that_names_another_is_an_error(server):
    server.said = page([], "5.0,7")
    with pytest.raises(CorraError, match="its list has no end"):
        collector(server).runs()


@pytest.mark.parametrize(
    "bound", [("LIST_RUNS_MAX", 20), ("LIST_BYTES_MAX", 1500), ("LIST_TOTAL_S", 0.2)]
)
def test_pages_that_go_on_for_ever_end_at_a_bound(server, monkeypatch, bound):
    monkeypatch.setattr(client, *bound)
    places = itertools.count(1 << 40, -1)
    monkeypatch.setattr(Server, "said", property(lambda _: page([RUN], f"1.5,{next(places)}")))
    with pytest.raises(CorraError, match=r"its list goes on after [0-9,]+ runs"):
        collector(server).runs()
    assert next(places) < (1 << 40) - 2  # it read more than one page


@MANY
@given(data=st.data())
def test_a_runs_events_are_read_or_a_lost_link(server, data):
    kind = data.draw(st.sampled_from(sorted(EVENTS)))
    event = json.dumps(data.draw(documents(EVENTS[kind]) | spoiled(EVENTS[kind])))
    end = json.dumps({"prog_id": SOME_ID, "state": "lost"})
    server.said = f"event: {kind}\ndata: {event}\n\nevent: end\ndata: {end}\n\n".encode()
    follow = Collected(collector(server), State(SOME_ID, "running")).follow(live=False)
    for heard in follow:
        if isinstance(heard, LinkDown):
            break


@MANY
@given(data=st.data())
def test_one_run_is_read_or_an_error(server, data):
    server.said = json.dumps(data.draw(documents(STATE) | spoiled(STATE))).encode()
    try:
        assert collector(server).find(SOME_ID).id
    except CorraError as error:
        assert "Traceback" not in error.line
