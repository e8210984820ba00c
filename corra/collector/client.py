"""The client of a collector: runs on hosts that can't be reached by ssh, or are gone.

A collector is behind its hosts by a second, or by as long as a host can't reach it. It takes no
orders. The configuration names collectors (`corra: {collectors: {NAME: {url, token | token_file,
ca}}}`); a URL works, too, with the token in $CORRA_COLLECTOR_TOKEN.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import math
import os
import random
import socket
import ssl
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

from corra.errors import Auth, CorraError, Misuse, NotFound, StillRunning, Unreachable
from corra.model import ids
from corra.model.frames import Cursor, Gap, Output, Status
from corra.model.refusals import ambiguous_error
from corra.model.shapes import Listed, Object, Shape, Text, Whole, check, read_json
from corra.model.state import STATE, State
from corra.model.units import decimal_size, duration
from corra.remote.bootstrap import courier_source
from corra.runs.events import Event, LinkDown, LinkUp
from corra.runs.request import Launch

COLLECTOR_ANSWER_S = 15.0
# The server sends a sign of life every 20 s.
COLLECTOR_SILENT_S = 60.0
LINE_MAX = 16 << 20
COLLECTOR_TOTAL_S = 60.0
# What a collector may answer, and the events it may send.
TOKEN = Object({"token": Text()}, ("token",))
PAGE = Object({"runs": Listed(STATE), "next": Text()}, ("runs",))
EVENTS: Mapping[str, Object] = {
    "output": Object(
        {"stream": Text(64), "offset": Whole(), "data": Text(LINE_MAX), "time_ns": Whole()},
        ("stream", "offset", "data"),
    ),
    "gap": Object({"stream": Text(64), "from": Whole(), "to": Whole()}, ("stream", "from", "to")),
    "state": STATE,
    "end": STATE,
}
ASKED_RUNS = 1000
# A list in pages: as many runs as a host may list, with 2.5 kB each. Pages of 1,000 runs take a
# second or less each.
LIST_RUNS_MAX = 200_000
LIST_BYTES_MAX = 512 << 20
LIST_TOTAL_S = 600.0
_EXAMPLE = "{url: https://HOST:8050, token_file: FILE}"
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 30.0


@dataclass(frozen=True)
class Collector:
    """One collector and its token. `name` is what the operator typed."""

    name: str
    url: str
    token: str | None = field(default=None, repr=False)
    ca: str | None = None

    @classmethod
    def named(cls, name: str, configured: Mapping[str, Any] | None) -> Collector:
        """Return the collector that `name` means. Raises Misuse.

        `configured` is the configuration's `corra.collectors`.
        """
        known = (configured or {}).get(name)
        if known is None and "://" not in name:
            others = ", ".join(sorted(configured or {})) or "none"
            raise Misuse(
                f"no collector {name!r} in the configuration (there: {others})",
                fate="NOT DONE",
                hint=[f"in ~/.invoke.yaml:  corra: {{collectors: {{{name}: {_EXAMPLE}}}}}"],
            )
        told = {"url": name} if known is None else dict(known)
        token = told.get("token") or os.environ.get("CORRA_COLLECTOR_TOKEN")
        if told.get("token_file"):
            token = _read(str(told["token_file"]))
        ca = told.get("ca")
        parts = urlsplit(str(told.get("url") or ""))
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise Misuse(f"collector {name}: not a URL: {told.get('url')!r}", fate="NOT DONE")
        return cls(
            name, str(told["url"]).rstrip("/"), token, None if ca is None else _read(str(ca))
        )

    @property
    def is_private(self) -> bool:
        """Whether nobody on the way can read what is sent there."""
        parts = urlsplit(self.url)
        return parts.scheme == "https" or parts.hostname in ("127.0.0.1", "::1", "localhost")

    def callback(self, prog_id: str, token: str) -> dict[str, Any]:
        """Return the callback with which a run reports here."""
        found = {
            "url": f"{self.url}/api/v1/agent/{prog_id}",
            "method": "POST",
            "token": token,
            "ca": self.ca,
            "state": True,
        }
        return {key: value for key, value in found.items() if value is not None}

    # -- Asking

    def ask(
        self,
        path: str,
        shape: Shape,
        query: Mapping[str, Any] | None = None,
        body: Any = None,
    ) -> Any:
        """Return the JSON of an answer that has that shape. Raises CorraError."""
        return self._ask(path, shape, query, body)[0]

    def _ask(
        self, path: str, shape: Shape, query: Mapping[str, Any] | None, body: Any
    ) -> tuple[Any, int]:
        """Return what `ask` does, and its length in bytes."""
        connection, answer = self.open(path, query, body)
        # A server that sends a byte now and then is silent, too.
        over = threading.Timer(COLLECTOR_TOTAL_S, _cut, [connection])
        over.daemon = True
        over.start()
        try:
            said = answer.read(LINE_MAX)
            found = read_json(said)
            check(shape, found, "the answer")
            return found, len(said)
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise self.unreachable(error) from error
        finally:
            over.cancel()
            connection.close()

    def open(
        self,
        path: str,
        query: Mapping[str, Any] | None = None,
        body: Any = None,
        headers: Mapping[str, str] | None = None,
    ) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        """Return a connection and its answer, still to be read. Raises CorraError.

        It follows no redirect.
        """
        if not self.is_private:
            raise Misuse(
                f"{self.url} is http: tokens would travel in the clear",
                fate="NOT DONE",
                hint=["use an https URL"],
            )
        parts = urlsplit(self.url)
        connection: http.client.HTTPConnection
        if parts.scheme == "https":
            context = ssl.create_default_context(cadata=self.ca)
            connection = http.client.HTTPSConnection(
                parts.netloc, timeout=COLLECTOR_ANSWER_S, context=context
            )
        else:
            connection = http.client.HTTPConnection(parts.netloc, timeout=COLLECTOR_ANSWER_S)
        sent = {
            **({"Authorization": f"Bearer {self.token}"} if self.token else {}),
            "User-Agent": "corra",
            **(headers or {}),
        }
        text = f"{parts.path}/api/v1{path}" + (f"?{urlencode(query)}" if query else "")
        try:
            data = None if body is None else json.dumps(body).encode()
            connection.request("GET" if body is None else "POST", text, data, sent)
            answer = connection.getresponse()
            if answer.status < 300:
                return connection, answer
            said = answer.read(65536)
        except (OSError, ValueError, http.client.HTTPException) as error:
            connection.close()
            raise self.unreachable(error) from error
        connection.close()
        raise self._refused(answer.status, said)

    def unreachable(self, error: BaseException) -> CorraError:
        why = (
            getattr(error, "verify_message", None)
            or getattr(error, "strerror", None)
            or str(error)
            or type(error).__name__
        )
        return Unreachable(
            f"no answer from {urlsplit(self.url).netloc}: {why}",
            host=f"collector {self.name}",
            fate="NOT DONE",
        )

    def _refused(self, status: int, said: bytes) -> CorraError:
        try:
            found = json.loads(said)
            message = str(found["message"])
        except (ValueError, KeyError, TypeError):
            message = f"answered {status}"
        facts: dict[str, Any] = {"host": f"collector {self.name}", "fate": "NOT DONE"}
        if status in (401, 403):
            return Auth(
                message,
                hint=["its token: corra.collectors in ~/.invoke.yaml, or $CORRA_COLLECTOR_TOKEN"],
                **facts,
            )
        return (
            NotFound(message, **{**facts, "fate": "NOT FOUND"})
            if status == 404
            else CorraError(message, **facts)
        )

    # -- Runs

    def register(self, launch: Launch) -> Launch:
        """Make a run known before it starts, and return its Launch with a callback.

        Raises CorraError with the fate NOT STARTED.
        """
        request, host = launch.request, launch.agent.host
        about = {
            "prog_id": request.prog_id,
            "name": request.name,
            "target": str(host),
            "user": host.user,
            "origin": dict(request.origin),
            "argv": [
                word.encode("utf-8", "backslashreplace").decode() for word in request.program.argv
            ],
        }
        try:
            token = self._token(about)
        except CorraError as error:
            leave = "nothing was started; without a collector:  leave --collector out"
            raise error.but(fate="NOT STARTED", hint=(*error.hint, leave)) from error
        callback = self.callback(request.prog_id, token)
        return launch._replace(
            request=replace(request, callback=callback, courier=courier_source())
        )

    def admit(self, state: State, host: str) -> str:
        """Make a run known that has been started already, and return a token for it."""
        about = {
            "prog_id": state.prog_id,
            "name": state.name,
            "target": host,
            "user": state.user,
            "origin": state.origin,
        }
        return self._token({**about, "argv": list(state.argv)})

    def _token(self, about: Mapping[str, Any]) -> str:
        return str(
            self.ask(
                "/runs",
                TOKEN,
                body={key: value for key, value in about.items() if value is not None},
            )["token"]
        )

    def runs(self, **wanted: Any) -> list[State]:
        """Return the runs that match `wanted`, the newest first; with `limit`, one page of them.

        Raises CorraError, also where the pages don't go on to older runs, or are too many.
        """
        query = {
            "limit": ASKED_RUNS,
            **{key: value for key, value in wanted.items() if value is not None},
        }
        found: list[State] = []
        size, until = 0, time.monotonic() + LIST_TOTAL_S
        before = (math.inf, 0)
        while True:
            page, length = self._ask("/runs", PAGE, query, None)
            found += [_state(each) for each in page["runs"]]
            if not page.get("next") or "limit" in wanted:
                return found
            size += length
            if not (page["runs"] and (reached := _place(page["next"])) < before):
                raise self._not_listed("doesn't speak corra's protocol: its list has no end")
            if len(found) > LIST_RUNS_MAX or size > LIST_BYTES_MAX or time.monotonic() > until:
                raise self._not_listed(
                    f"its list goes on after {len(found):,} runs and {decimal_size(size)}"
                )
            before = reached
            query["page"] = page["next"]

    def _not_listed(self, why: str) -> CorraError:
        return CorraError(why, host=f"collector {self.name}", fate="NOT DONE")

    def find(self, text: str | None) -> Collected:
        """Return the run that `text` means, without it the newest run.

        A full id goes before a name (the open run, else the newest), and a name before a tail.
        """
        if text is None:
            return self._only(self.runs(limit=1), "", newest=True)
        if ids.is_valid(text):
            try:
                return Collected(self, _state(self.ask(f"/runs/{quote(text)}", STATE)))
            except NotFound:
                pass
        for wanted in ({"name": text, "open": "true"}, {"name": text}):
            if found := self.runs(**wanted, limit=1):
                return self._only(found, text, newest=True)
        return self._only(self.runs(tail=text) if len(text) > 1 else [], text, newest=False)

    def _only(self, found: list[State], text: str, *, newest: bool) -> Collected:
        if not found:
            raise NotFound("", label=text, fate="NOT FOUND there", host=f"collector {self.name}")
        if len(found) > 1 and not newest:
            raise ambiguous_error(text, f"collector {self.name}", found, with_hosts=True)
        return Collected(self, found[0])


def _place(text: str) -> tuple[float, int]:
    """Return where a page ends, (made, number); infinitely late where `text` is no place."""
    made, _, number = text.partition(",")
    try:
        found = float(made), int(number)
    except ValueError:
        found = math.inf, 0
    return found if math.isfinite(found[0]) else (math.inf, 0)


class Collected:
    """One run as the collector knows it. A collector takes no orders."""

    def __init__(self, collector: Collector, state: State) -> None:
        self.collector, self.known = collector, state
        self.id, self.name = state.prog_id, state.name

    @property
    def host(self) -> str:
        return self.known.host or "?"

    @property
    def label(self) -> str:
        return self.known.label

    def follow(
        self,
        *,
        tail: int | None = None,
        live: bool = True,
        timeout_s: float | None = None,
        streams: list[str] | None = None,
    ) -> CollectedFollow:
        """Return the run's events; with `tail`, from its last lines on."""
        return CollectedFollow(self, tail=tail, live=live, timeout_s=timeout_s, streams=streams)


class CollectedFollow:
    """A run's events as they come, each byte once.

    A connection that breaks is made again, from the cursor on.
    """

    def __init__(
        self,
        run: Collected,
        *,
        tail: int | None,
        live: bool,
        timeout_s: float | None,
        streams: list[str] | None,
    ) -> None:
        self.run, self._tail, self._live, self._streams = run, tail, live, streams
        self.state = run.known
        self._ended = False
        self._cursor = Cursor()
        self._event_id: str | None = None
        self._until = None if timeout_s is None else time.monotonic() + timeout_s
        self._timeout_s = timeout_s
        self._closed = threading.Event()
        self._connection: http.client.HTTPConnection | None = None

    @property
    def cursor(self) -> dict[str, int]:
        return dict(self._cursor.offsets)

    def close(self) -> None:
        """Stop at once. A read in another thread ends."""
        self._closed.set()
        self._cut()

    def _cut(self) -> None:
        if self._connection is not None:
            _cut(self._connection)

    def __iter__(self) -> Iterator[Event]:
        lost_at, tries, why, reached = 0.0, 0, "", False
        if self._timeout_s is not None:
            clock = threading.Timer(self._timeout_s, self._cut)
            clock.daemon = True
            clock.start()
        while not self._closed.is_set():
            try:
                answer = self._open()
                reached = True
                if tries:
                    yield LinkUp(time.monotonic() - lost_at)
                    tries = 0
                yield from self._events(answer)
                if not self._live or self._ended or self._closed.is_set():
                    return
                why = "the stream ended"
            except (OSError, ValueError, http.client.HTTPException, AttributeError) as error:
                why = str(error) or type(error).__name__
            except Unreachable as error:
                if not reached:
                    raise
                why = error.why
            self._over()
            lost_at = lost_at if tries else time.monotonic()
            tries += 1
            yield LinkDown(time.monotonic() - lost_at, why, tries)
            # Half of the pause is random: a server that comes back must not get all its watchers
            # in the same moment.
            longest = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2 ** min(tries - 1, 10))
            pause = longest * (0.5 + random.random() / 2)  # noqa: S311
            self._closed.wait(pause)

    def _open(self) -> http.client.HTTPResponse:
        query: dict[str, Any] = {} if self._live else {"live": "false"}
        headers = {}
        if self._event_id is not None:
            headers["Last-Event-ID"] = self._event_id
        elif self._tail is not None:
            query["tail"] = self._tail
        self._connection, answer = self.run.collector.open(
            f"/runs/{quote(self.run.id)}/events", query, headers=headers
        )
        if self._connection.sock is not None:
            self._connection.sock.settimeout(COLLECTOR_SILENT_S)
        return answer

    def _events(self, answer: http.client.HTTPResponse) -> Iterator[Event]:
        """Yield the server's events until the answer ends or breaks."""
        fields: dict[str, str] = {}
        while line := answer.readline(LINE_MAX):
            if text := line.decode().rstrip("\n"):
                name, _, value = text.partition(":")
                fields[name] = value.removeprefix(" ")
                continue
            if "event" in fields:
                kind, data = fields["event"], read_json(fields.get("data", "null").encode())
                if kind in EVENTS:
                    check(EVENTS[kind], data, kind)
                    yield from self._event(kind, data)
                self._event_id = fields.get("id", self._event_id)
                if self._ended:
                    return
            fields = {}

    def _event(self, kind: str, data: Mapping[str, Any]) -> Iterator[Event]:
        if kind in ("output", "gap"):
            name = str(data["stream"])
            frame: Output | Gap
            if kind == "gap":
                frame = Gap(name, int(data["from"]), int(data["to"]))
            else:
                frame = Output(
                    name,
                    int(data["offset"]),
                    base64.b64decode(data["data"]),
                    int(data.get("time_ns") or 0),
                )
            if self._event_id is None and self._tail is not None:
                self._cursor.offsets.setdefault(
                    name, frame.offset if isinstance(frame, Output) else frame.start
                )
            if self._streams is None or name in self._streams:
                yield from self._cursor.take(frame)
        elif kind in ("state", "end"):
            self.state = self.run.known = _state(data)
            self.run.name = self.state.name
            self._ended = kind == "end"
            yield Status(self.state.to_json())

    def _over(self) -> None:
        if self._until is not None and time.monotonic() >= self._until:
            raise StillRunning(
                f"not over after {duration(self._timeout_s or 0)}",
                label=self.run.label,
                host=self.run.host,
                prog_id=self.run.id,
            )


def _cut(connection: http.client.HTTPConnection) -> None:
    if connection.sock is not None:
        with contextlib.suppress(OSError):
            connection.sock.shutdown(socket.SHUT_RDWR)


def _state(value: Any) -> State:
    try:
        return State.from_json(value)
    except (ValueError, TypeError) as error:
        raise CorraError(f"the collector sent no State: {error}", fate="NOT DONE") from error


def _read(path: str) -> str:
    try:
        return Path(path).expanduser().read_text(encoding="utf-8").strip()
    except OSError as error:
        raise Misuse(f"can't read {path}: {error.strerror}", fate="NOT DONE") from error
