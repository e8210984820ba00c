"""HTTP: check the token before reading the body, make one call, answer.

An append is on the disk before its answer. Each kind of refusal has its own status and says why in
JSON.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import json
import logging
import re
import secrets
import sys
import time
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from functools import partial
from typing import Any

import anyio.to_thread
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from corra.model import ids
from corra.on_host.agent.contract import FINAL

from . import pages, tokens
from .events import Watchers
from .limits import Rates, RequestRefusal
from .store import Store

# The deadline for a body that trickles in.
BODY_S = 60.0
# How much of a refused body is read and dropped after the answer: else its sender would get a
# reset and not the answer.
LINGER_BYTES, LINGER_S = 8 << 20, 5.0
BEAT_S = 20.0
PAGE_RUNS, PAGE_RUNS_MAX = 100, 1000
# How long a revoked token may still open.
TOKEN_CACHE_S = 5.0
# What became of a run, as `ps` says it; each has its gauge, also where it is 0.
FATES = ("starting", "running", "done", "failed", "killed", "timeout", "lost", "not_started")
METHODS = ["POST", "PUT", "PATCH", "GET"]

_STREAM = re.compile(pages.STREAM)
_APPEND = re.compile(r"/api/v1/agent/(?P<prog_id>[^/]+)/output/(?P<name>[^/]+)")
_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")
_CURSOR = re.compile(rf"({pages.STREAM}):(\d{{1,18}})")

_log = logging.getLogger("corra.collector")
Answer = Callable[["Call"], Awaitable[Response]]


class Json(JSONResponse):
    """JSON in ASCII. An argument that isn't UTF-8 came as surrogates, which need escapes."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode("ascii")


class AppendResponse(Response):
    """The answer to an append. Starlette's general one costs more time than the append does."""

    status_code = 200

    def __init__(self, length: int) -> None:
        self._length = b"%d" % length

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = b'{"offset": %b}' % self._length
        headers = [
            (b"content-length", b"%d" % len(body)),
            (b"content-type", b"application/json"),
            (b"upload-offset", self._length),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})


class Call(Request):
    """A request whose headers and body are read without Starlette's Headers and streams.

    Those cost as much time as the rest of an append.
    """

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        super().__init__(scope, receive, send)
        self.token_name = ""
        # Whether all of the body has been read.
        self.ended = False
        self._receive_part = receive
        self._said: dict[bytes, bytes] = dict(scope["headers"])

    def said(self, name: bytes) -> str | None:
        """Return the value of the header `name`, given in small letters."""
        value = self._said.get(name)
        return None if value is None else value.decode("latin-1")

    async def part(self) -> bytes:
        """Return the next part of the body. Raises ClientDisconnect."""
        message = await self._receive_part()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        self.ended = not message.get("more_body", False)
        return message.get("body", b"")  # type: ignore[no-any-return]


class Deadlines:
    """Tasks that are cancelled after `seconds`, by one timer for all of them.

    A timer for each would cost more than the body that it waits for.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        # The soonest first, since all tasks have the same time.
        self._until: dict[asyncio.Task[Any], float] = {}
        self._late: set[asyncio.Task[Any]] = set()
        self._timer: asyncio.TimerHandle | None = None

    def begin(self) -> asyncio.Task[Any]:
        """Start the current task's time, and return the task."""
        task = asyncio.current_task()
        assert task is not None
        loop = task.get_loop()
        self._until[task] = loop.time() + self._seconds
        if self._timer is None:
            self._timer = loop.call_later(self._seconds, self._expire, loop)
        return task

    def end(self, task: asyncio.Task[Any]) -> None:
        self._until.pop(task, None)
        self._late.discard(task)

    def passed(self, task: asyncio.Task[Any]) -> bool:
        """Return whether the task was cancelled by its deadline."""
        return task in self._late

    def _expire(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = None
        for task, until in list(self._until.items()):
            if until > loop.time():
                self._timer = loop.call_at(until, self._expire, loop)
                break
            del self._until[task]
            self._late.add(task)
            task.cancel()


class RefusedResponse(Json):
    """A refusal. It is sent before the rest of the body has come, then the rest is dropped."""

    def __init__(self, refusal: RequestRefusal, request: Call) -> None:
        super().__init__(refusal.body, refusal.status, refusal.headers)
        self._request = request

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send(
            {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
        )
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        if scope["method"] != "HEAD":
            await _linger(self._request)
        await send({"type": "http.response.body", "body": b""})


class Metrics:
    """The page for Prometheus. Anybody may read it, so no label names a run, a host or a token."""

    def __init__(self, store: Store) -> None:
        self.registry = CollectorRegistry()
        facts: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter("corra_requests", "Requests answered", ["what", "status"], **facts)
        self.bytes = Counter(
            "corra_output_bytes", "Bytes of output received, repeated ones too", **facts
        )
        self.batch = Histogram(
            "corra_batch_jobs",
            "Writes in a commit",
            buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256, 512),
            **facts,
        )
        buckets = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10)
        self.commit = Histogram(
            "corra_commit_seconds",
            "From the first write of a commit to the disk",
            buckets=buckets,
            **facts,
        )
        self.watchers = Gauge("corra_watchers", "Open event streams", **facts)
        self.runs = Gauge("corra_runs", "Runs kept, by what became of them", ["state"], **facts)
        self.kept = Gauge("corra_kept_bytes", "Bytes of output kept", **facts)
        self._store = store

    def page(self, watchers: int) -> bytes:
        self.runs.clear()
        for state, count in {**dict.fromkeys(FATES, 0), **self._store.counts()}.items():
            self.runs.labels(state).set(count)
        self.kept.set(self._store.size())
        self.watchers.set(watchers)
        return generate_latest(self.registry)


class Endpoint:
    """One of the Api's methods as an application. It answers refusals, counts and logs.

    Starlette would wrap a function twice, for exceptions that nothing here raises.
    """

    def __init__(self, api: Api, answer: Answer) -> None:
        self._api, self._answer, self._what = api, answer, answer.__name__
        self._counters: dict[int, Counter] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Call(scope, receive, send)
        began = time.monotonic()
        try:
            response = await self._answer(request)
        except RequestRefusal as refusal:
            response = RefusedResponse(refusal, request)
        except ClientDisconnect:
            response = Response(status_code=400)
        except Exception:  # noqa: BLE001 - it is logged, counted, and answered with a 500
            _log.exception(
                "a request failed", extra={"facts": {"what": self._what, "who": request.token_name}}
            )
            response = Json({"error": "defect", "message": "the collector failed at this"}, 500)
        status = response.status_code
        if status not in self._counters:
            self._counters[status] = self._api.metrics.requests.labels(self._what, status)
        self._counters[status].inc()
        if self._api.log_requests or status >= 500:
            facts = {
                "what": self._what,
                "status": status,
                "who": request.token_name,
                "ms": round((time.monotonic() - began) * 1000, 1),
            }
            _log.info(
                "request", extra={"facts": {**facts, "run": request.path_params.get("prog_id")}}
            )
        await response(scope, receive, send)


class Front:
    """The whole application: an append goes straight to its Endpoint, and the rest to Starlette.

    Starlette's routing costs as much time as an append.
    """

    def __init__(self, append: Endpoint, rest: ASGIApp) -> None:
        self._append, self._rest = append, rest

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        if (
            scope["type"] == "http"
            and scope["method"] in METHODS
            and (found := _APPEND.fullmatch(scope["path"]))
        ):
            scope["path_params"] = found.groupdict()
            return self._append(scope, receive, send)
        return self._rest(scope, receive, send)


class Api:
    """The endpoints over one Store."""

    def __init__(self, store: Store, *, log_requests: bool = False) -> None:
        self.store, self.limits = store, store.limits
        self.metrics = Metrics(store)
        self.rates = Rates(store.limits.rate)
        self.watchers: Watchers | None = None
        self.log_requests = log_requests
        self._known: dict[bytes, tuple[float, tokens.Token]] = {}
        self._chance = secrets.token_bytes(32)
        self._bodies = Deadlines(BODY_S)

    def front(self, wrapped: Callable[[ASGIApp], ASGIApp]) -> Front:
        """Return the application; `wrapped` is put around all of it but appends."""
        return Front(Endpoint(self, self.append), wrapped(self.app()))

    def app(self) -> Starlette:
        agent = "/api/v1/agent/{prog_id}"
        run = "/api/v1/runs/{prog_id}"
        routes = [
            self.route(f"{agent}/output/{{name}}", self.append, METHODS),
            self.route(f"{agent}/completed", self.completed, METHODS),
            self.route(f"{agent}/state", self.state, METHODS),
            self.route("/api/v1/runs", self.list, ["GET"]),
            self.route("/api/v1/runs", self.register, ["POST"]),
            self.route(run, self.run, ["GET"]),
            self.route(f"{run}/output/{{name}}", self.output, ["GET"]),
            self.route(f"{run}/events", self.events, ["GET"]),
            Route("/healthz", self.healthz, methods=["GET"]),
            Route("/metrics", self.page_metrics, methods=["GET"]),
            Route("/openapi.json", self.page_openapi, methods=["GET"]),
            Route("/", self.page_index, methods=["GET"]),
        ]
        return Starlette(
            routes=routes, lifespan=self.lifespan, exception_handlers={HTTPException: _not_there}
        )

    @contextlib.asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        self.watchers = Watchers()
        self.store.committed = self._committed
        yield

    def _committed(self, prog_ids: set[str], jobs: int, seconds: float) -> None:
        self.metrics.batch.observe(jobs)
        self.metrics.commit.observe(seconds)
        if self.watchers is not None:
            self.watchers.tell(prog_ids)

    def route(self, path: str, endpoint: Answer, methods: list[str]) -> Route:
        return Route(path, Endpoint(self, endpoint), methods=methods)

    # -- Reports of runs

    async def append(self, request: Call) -> Response:
        prog_id, token = await self.reporter(request)
        name = request.path_params["name"]
        if not _STREAM.fullmatch(name):
            raise RequestRefusal(
                404, "no_stream", "no such stream: a to z, 0 to 9 and _, at most 16"
            )
        offset, gap = _number(request, b"upload-offset"), _number(request, b"upload-gap")
        if offset is None:
            raise RequestRefusal(
                400, "no_offset", "Upload-Offset is missing: the place of these bytes in the stream"
            )
        data = await self.body(request)
        self.metrics.bytes.inc(len(data))
        length = await self.store.append(token, prog_id, name, offset, data, gap)
        return AppendResponse(length)

    async def state(self, request: Call) -> Response:
        prog_id, token = await self.reporter(request)
        await self.store.report(token, prog_id, _object(await self.body(request)))
        return Json({})

    async def completed(self, request: Call) -> Response:
        prog_id, token = await self.reporter(request)
        value = _object(await self.body(request))
        new = await self.store.complete(token, prog_id, value)
        if new:
            _log.info(
                "completed",
                extra={"facts": {"run": prog_id, "state": value.get("state"), "who": token.name}},
            )
        return Json({"new": new})

    async def register(self, request: Call) -> Response:
        token = await self.token(request)
        token.may_register()
        about = _object(await self.body(request))
        prog_id = about.get("prog_id")
        if not isinstance(prog_id, str) or not ids.is_valid(prog_id):
            raise RequestRefusal(422, "bad_id", "prog_id must match " + ids.PATTERN)
        made = await self.store.register(token, prog_id, about)
        url = str(request.url.replace(path=f"/api/v1/agent/{prog_id}", query=""))
        return Json({**made, "url": url}, 201)

    # -- Questions of readers

    async def list(self, request: Call) -> Response:
        token = await self.token(request)
        sight = token.may_read()
        query = _query(request, *pages.FILTERS, "limit", "page")
        wanted = {name: _filter(name, query[name]) for name in pages.FILTERS if name in query}
        limit = _bounded(query.get("limit", str(PAGE_RUNS)), "limit", 1, PAGE_RUNS_MAX)
        before = _page(query["page"]) if "page" in query else None
        found, more = await _read(self.store.runs, wanted, sight, limit=limit, before=before)
        last = found[-1]["collector"]["page"] if more else None
        return Json({"runs": found, "next": None if last is None else f"{last[0]!r},{last[1]}"})

    async def run(self, request: Call) -> Response:
        run, _ = await self.visible(request)
        _query(request)
        return Json(run)

    async def output(self, request: Call) -> Response:
        run, _ = await self.visible(request)
        _query(request)
        name = request.path_params["name"]
        length = run["collector"]["received"].get(name)
        if length is None:
            if name not in (run.get("streams") or {}):
                raise RequestRefusal(404, "no_stream", "this run has no such stream")
            length = 0
        headers = {
            "Accept-Ranges": "bytes",
            "X-Content-Type-Options": "nosniff",
            "Vary": "Accept-Encoding",
        }
        known = run["collector"]["gaps"]
        gaps = [f"{gap['from']}-{gap['to']}" for gap in known if gap["stream"] == name]
        if len(known) < run["collector"]["gap_count"]:
            gaps.append("...")
        if gaps:
            headers["Corra-Gaps"] = ", ".join(gaps)
        asked = _range(request.said(b"range"), length)
        start, stop = asked or (0, length)
        parts: Iterator[bytes] = self.store.output(run["prog_id"], name, start, stop)
        if asked:
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{length}"
        elif "gzip" in (request.said(b"accept-encoding") or ""):
            headers["Content-Encoding"] = "gzip"
            return StreamingResponse(_gzip(parts), 200, headers, "application/octet-stream")
        headers["Content-Length"] = str(stop - start)
        return StreamingResponse(parts, 206 if asked else 200, headers, "application/octet-stream")

    async def events(self, request: Call) -> Response:
        run, token = await self.visible(request)
        query = _query(request, "tail", "live")
        if query.get("live", "true") not in ("true", "false"):
            raise RequestRefusal(400, "bad_query", "live: true or false")
        text = request.said(b"last-event-id")
        if text:
            cursor = dict.fromkeys(run["collector"]["received"], 0) | _cursor(text)
        elif "tail" in query:
            cursor = await _read(
                self.store.tail, run["prog_id"], _bounded(query["tail"], "tail", 0, 100_000)
            )
        else:
            cursor = {}
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        stream = self.stream(run["prog_id"], cursor, token.id, live=query.get("live") != "false")
        return StreamingResponse(stream, 200, headers, "text/event-stream")

    async def stream(
        self, prog_id: str, cursor: dict[str, int], token_id: int, *, live: bool
    ) -> AsyncIterator[bytes]:
        """Yield a run's events from `cursor` to its end, or until its token is revoked."""
        assert self.watchers is not None
        version = -1
        yield b"retry: 2000\n\n"
        with self.watchers.watch(prog_id, token_id) as news:
            while not news.over:
                news.take()
                found, run = await _read(self.store.news, prog_id, cursor)
                if run is None:
                    return
                for name, offset, data, stop, at in found:
                    cursor[name] = stop
                    if data is None:
                        yield _event("gap", cursor, {"stream": name, "from": offset, "to": stop})
                    else:
                        body = {
                            "stream": name,
                            "offset": offset,
                            "data": base64.b64encode(data).decode(),
                            "time_ns": int(at * 1e9),
                        }
                        yield _event("output", cursor, body)
                if found:
                    continue
                if run["collector"]["version"] != version:
                    version = run["collector"]["version"]
                    final = run["state"] in FINAL
                    yield _event("end" if final else "state", cursor, run)
                    if final:
                        return
                if not live:
                    return
                # A beat makes no query, so that idle watchers are cheap.
                while not await news.wait(BEAT_S):
                    yield b":\n\n"

    # -- The server itself

    async def healthz(self, request: Request) -> Response:
        """Answer whether a write gets to the disk, for a load balancer."""
        try:
            await asyncio.wait_for(self.store.submit(lambda batch: None), 5)
        except (RequestRefusal, asyncio.TimeoutError):
            return Json({"ok": False}, 503)
        room = self.store.has_room()
        return Json({"ok": room}, 200 if room else 503)

    async def page_metrics(self, request: Request) -> Response:
        text = await _read(self.metrics.page, self.watchers.count if self.watchers else 0)
        return Response(text, media_type=CONTENT_TYPE_LATEST)

    async def page_openapi(self, request: Request) -> Response:
        return Json(pages.openapi(self.limits))

    async def page_index(self, request: Request) -> Response:
        return PlainTextResponse(pages.INDEX)

    def end_revoked(self) -> None:
        """End the event streams whose token has been revoked, by any process."""
        if self.watchers is not None and (watching := self.watchers.tokens()):
            self.watchers.dismiss(self.store.revoked(watching))

    # -- Tokens

    async def token(self, request: Call) -> tokens.Token:
        """Return the token of a request. Raises RequestRefusal: 401, 429."""
        header, now = request.said(b"authorization"), time.monotonic()
        # Known tokens are found by a hash, so that the time it takes tells nothing about them.
        hashed = hashlib.blake2b((header or "").encode(), digest_size=32, key=self._chance).digest()
        until, token = self._known.get(hashed, (0.0, None))
        if token is None or now >= until:
            key, secret = tokens.split_header(header)
            token = tokens.checked_token(await _read(self.store.token, key), secret)
            if len(self._known) > 100_000:
                self._known.clear()
            self._known[hashed] = (now + TOKEN_CACHE_S, token)
        request.token_name = token.name
        if (has_token := request.scope.get("corra.has_token")) is not None:
            has_token(token.id)
        self.rates.take(token.id)
        return token

    async def reporter(self, request: Call) -> tuple[str, tokens.Token]:
        token = await self.token(request)
        prog_id = request.path_params["prog_id"]
        if not ids.is_valid(prog_id):
            raise RequestRefusal(404, "bad_id", "not an id: " + ids.PATTERN)
        token.may_report(prog_id)
        return prog_id, token

    async def visible(self, request: Call) -> tuple[dict[str, Any], tokens.Token]:
        """Return the run of the path, and the token that sees it. Raises RequestRefusal: 404."""
        token = await self.token(request)
        run = await _read(self.store.run, request.path_params["prog_id"], token.may_read())
        if run is None:
            raise RequestRefusal(404, "not_found", "no such run here")
        return run, token

    async def body(self, request: Call) -> bytes:
        """Return the body.

        Raises RequestRefusal: 413, by the announced length where there is one; 408.
        """
        announced = request.said(b"content-length") or ""
        if announced.isdecimal() and int(announced) > self.limits.body:
            raise RequestRefusal(413, "too_large", f"a body may have {self.limits.body} bytes")
        parts, size = [], 0
        task = self._bodies.begin()
        try:
            while not request.ended:
                part = await request.part()
                size += len(part)
                if size > self.limits.body:
                    raise RequestRefusal(
                        413, "too_large", f"a body may have {self.limits.body} bytes"
                    )
                parts.append(part)
        except asyncio.CancelledError:
            if not self._bodies.passed(task):
                raise
            if sys.version_info >= (3, 11):
                task.uncancel()
            raise RequestRefusal(408, "too_slow", f"the body didn't come in {BODY_S:g} s") from None
        finally:
            self._bodies.end(task)
        return parts[0] if len(parts) == 1 else b"".join(parts)


async def _linger(request: Call) -> None:
    """Read and drop, within bounds, what the sender of a refused request still sends."""
    announced = request.said(b"content-length") or "0"
    if announced == "0" or (announced.isdecimal() and int(announced) > LINGER_BYTES):
        return
    with contextlib.suppress(asyncio.TimeoutError, TimeoutError, ClientDisconnect):
        await asyncio.wait_for(_drop(request), LINGER_S)


async def _drop(request: Call) -> None:
    size = 0
    while not request.ended and size <= LINGER_BYTES:
        size += len(await request.part())


async def _read(what: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return await anyio.to_thread.run_sync(partial(what, *args, **kwargs))


async def _not_there(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    kind = {404: "no_path", 405: "no_method"}.get(error.status_code, "refused")
    return Json({"error": kind, "message": error.detail}, error.status_code, error.headers)


# -- Reading a request


def _query(request: Call, *names: str) -> Mapping[str, str]:
    """Return the query. Raises RequestRefusal for a parameter that isn't one of `names`."""
    query = request.query_params
    for name in query:
        if name not in names:
            known = ", ".join(names) or "none"
            raise RequestRefusal(400, "bad_query", f"no parameter {name[:40]!r} here ({known})")
    return query


def _number(request: Call, name: bytes) -> int | None:
    text = request.said(name)
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) <= 16 and int(text) <= 1 << 53):
        raise RequestRefusal(
            400, "bad_offset", f"{name.decode().title()}: not a number from 0 to 2^53"
        )
    return int(text)


def _object(data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
        json.dumps(value, allow_nan=False)
    except (ValueError, RecursionError):
        raise RequestRefusal(400, "bad_json", "the body isn't JSON") from None
    if not isinstance(value, dict):
        raise RequestRefusal(400, "bad_json", "the body isn't an object")
    return value


def _bounded(text: str, name: str, low: int, high: int) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 9 and low <= int(text) <= high):
        raise RequestRefusal(400, "bad_query", f"{name}: a number from {low} to {high}")
    return int(text)


def _filter(name: str, text: str) -> Any:
    if "\0" in text:
        raise RequestRefusal(400, "bad_query", f"{name}: has a NUL")
    if name == "open":
        if text not in ("true", "false"):
            raise RequestRefusal(400, "bad_query", "open: true or false")
        return text == "true"
    if name in ("since", "until"):
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not abs(value) < 1e12:
            raise RequestRefusal(400, "bad_query", f"{name}: seconds since the epoch")
        return value
    return text.encode("utf-8", "replace").decode()


def _page(text: str) -> tuple[float, int]:
    made, _, number = text.partition(",")
    try:
        found = float(made), int(number)
    except ValueError:
        found = float("nan"), 0
    if not (abs(found[0]) < 1e12 and 0 <= found[1] < 1 << 62):
        raise RequestRefusal(400, "bad_query", "page: what `next` of the page before said")
    return found


def _range(text: str | None, length: int) -> tuple[int, int] | None:
    """Return (start, stop) of a single range of bytes, None for all. Raises RequestRefusal: 416."""
    match = _RANGE.fullmatch(text.strip()) if text else None
    if not match or not (match[1] or match[2]):
        return None  # the standard wants a range that isn't understood to be ignored
    if not match[1]:
        start, stop = max(0, length - int(match[2])), length
    else:
        start, stop = int(match[1]), min(length, int(match[2]) + 1) if match[2] else length
        if match[2] and int(match[2]) < int(match[1]):
            return None
    if start >= stop:
        raise RequestRefusal(
            416,
            "no_range",
            f"there are {length} bytes",
            headers={"Content-Range": f"bytes */{length}"},
        )
    return start, stop


def _cursor(text: str) -> dict[str, int]:
    """Read an id that `_event` has written. Raises RequestRefusal."""
    found = {}
    for part in filter(None, text.strip().strip("-").split(",")):
        match = _CURSOR.fullmatch(part)
        if not match:
            raise RequestRefusal(400, "bad_cursor", "Last-Event-ID: not one of this server's")
        found[match[1]] = int(match[2])
    return found


# -- Writing an answer


def _event(kind: str, cursor: Mapping[str, int], body: Mapping[str, Any]) -> bytes:
    # "-": an empty id would mean no id.
    at = ",".join(f"{name}:{offset}" for name, offset in sorted(cursor.items())) or "-"
    return f"id: {at}\nevent: {kind}\ndata: {json.dumps(body)}\n\n".encode()


def _gzip(parts: Iterator[bytes]) -> Iterator[bytes]:
    packer = zlib.compressobj(6, zlib.DEFLATED, 31)
    for part in parts:
        if data := packer.compress(part):
            yield data
    yield packer.flush()
