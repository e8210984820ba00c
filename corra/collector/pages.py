"""The server's description of itself: the index for people, the OpenAPI document for programs."""

from __future__ import annotations

from typing import Any

from corra.model.ids import PATTERN
from corra.on_host.agent.contract import VERSION

from .limits import Limits

STREAM = "[a-z][a-z0-9_]{0,15}"
FILTERS = {
    "host": "The host as the client called it, or a beginning of it with * at its end.",
    "state": "What ps calls it: running, done, failed, killed, timeout, lost; or exited.",
    "name": "The run's name.",
    "user": "The user that started the run, or that it runs as.",
    "fleet": "The run's fleet.",
    "tail": "The beginning of the id's tail.",
    "text": "Part of the command.",
    "open": "true: only runs that go on; false: only runs that have ended.",
    "since": "Seconds since the epoch: runs that go on, or ended after that.",
    "until": "Seconds since the epoch: runs that were made before that.",
}

INDEX = f"""corra {VERSION}: a collector

Runs report their output and their end here. A token with `read` may ask for them.

  GET /api/v1/runs                       the newest runs: host= state= name= user= fleet= text= ..
  GET /api/v1/runs/ID                    one run
  GET /api/v1/runs/ID/output/stdout      its output, with Range
  GET /api/v1/runs/ID/events             its output and State as they come
  GET /openapi.json                      the whole API, for programs
  GET /metrics, /healthz
"""


def openapi(limits: Limits) -> dict[str, Any]:
    """Return the OpenAPI document."""
    paths: dict[str, Any] = {
        "/api/v1/agent/{prog_id}/output/{name}": _each_method(_append, limits),
        "/api/v1/agent/{prog_id}/state": _each_method(_state, limits),
        "/api/v1/agent/{prog_id}/completed": _each_method(_completed, limits),
        "/api/v1/runs": {"get": _list(), "post": _register()},
        "/api/v1/runs/{prog_id}": {"get": _one()},
        "/api/v1/runs/{prog_id}/output/{name}": {"get": _output()},
        "/api/v1/runs/{prog_id}/events": {"get": _events()},
        "/metrics": {"get": _open("metrics", "For Prometheus", "text/plain")},
        "/healthz": {"get": _open("healthz", "Whether it can write", "application/json", 503)},
    }
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "corra collector",
            "version": VERSION,
            "description": "Keeps what runs report, and answers questions about them.",
        },
        "components": {
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
            "schemas": {"Error": _ERROR, "State": _STATE, "Run": _RUN},
        },
        "security": [{"token": []}],
        "paths": paths,
    }


_ERROR = {
    "type": "object",
    "required": ["error", "message"],
    "properties": {"error": {"type": "string"}, "message": {"type": "string"}},
}
_STATE = {
    "type": "object",
    "required": ["prog_id", "state"],
    "properties": {
        "prog_id": {"type": "string", "pattern": f"^{PATTERN}$"},
        "state": {"enum": ["starting", "running", "exited", "not_started", "lost"]},
        "streams": {
            "type": "object",
            "additionalProperties": {"type": "object", "additionalProperties": {"type": "integer"}},
        },
        "argv": {"type": "array", "items": {"type": "string"}},
    },
}
_RUN = {
    "allOf": [
        {"$ref": "#/components/schemas/State"},
        {
            "type": "object",
            "required": ["collector"],
            "properties": {"collector": {"type": "object"}},
        },
    ]
}


# One event of a stream.
_SENT = {
    "type": "object",
    "required": ["event", "id", "data"],
    "properties": {
        "event": {"enum": ["output", "gap", "state", "end"]},
        "id": {"type": "string"},
        "data": {"type": "string"},
    },
}


def _answers(done: dict[str, Any], *codes: int, status: str = "200") -> dict[str, Any]:
    error = {"content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}}
    words = {
        400: "The request can't be read",
        401: "No token, or none of this server's",
        403: "Not with this token",
        404: "No such run",
        408: "The body didn't come in time",
        409: "Not now: see `offset` or `expected`",
        410: "Forgotten",
        413: "The body is too large",
        414: "The URL is too long",
        416: "No such range",
        422: "It makes no sense",
        429: "Too often: see Retry-After",
        431: "The headers are too long",
        503: "The database failed",
        507: "No room",
    }
    return {
        status: done,
        **{
            str(code): {"description": words[code], **error}
            for code in (400, 401, 403, 414, 429, 431, 503, *codes)
        },
    }


def _json(schema: dict[str, Any], description: str) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"schema": schema}}}


def _path(name: str, pattern: str) -> dict[str, Any]:
    return {
        "name": name,
        "in": "path",
        "required": True,
        "schema": {"type": "string", "pattern": f"^{pattern}$"},
    }


_PROG_ID, _NAME = _path("prog_id", PATTERN), _path("name", STREAM)


def _each_method(operation: Any, limits: Limits) -> dict[str, Any]:
    """Return one operation for each method that a callback may name.

    An OpenAPI document can't have a body for GET, so the summary says it.
    """
    found = {}
    for method in ("post", "put", "patch", "get"):
        made = operation(limits)
        made["operationId"] = f"{made['operationId']}_{method}"
        if method == "get":
            made.pop("requestBody")
            made["summary"] += ": GET with a body, kept for old agents; proxies may drop it"
        found[method] = made
    return found


def _append(limits: Limits) -> dict[str, Any]:
    number = {"type": "integer", "minimum": 0, "maximum": 1 << 53}
    return {
        "operationId": "append",
        "summary": "Append output",
        "description": (
            f"At most {limits.body} bytes. The collector trims the bytes that it has already; "
            "a hole is a 409 with the offset that it expects."
        ),
        "parameters": [
            _PROG_ID,
            _NAME,
            {"name": "Upload-Offset", "in": "header", "required": True, "schema": number},
            {
                "name": "Upload-Gap",
                "in": "header",
                "schema": number,
                "description": "From here to Upload-Offset the bytes are gone.",
            },
        ],
        "requestBody": {
            "content": {
                "application/octet-stream": {"schema": {"type": "string", "format": "binary"}}
            }
        },
        "responses": _answers(
            {
                **_json(
                    {"type": "object", "properties": {"offset": {"type": "integer"}}},
                    "Kept, on the disk",
                ),
                "headers": {
                    "Upload-Offset": {
                        "schema": {"type": "integer"},
                        "description": "How long the stream is now",
                    }
                },
            },
            *(404, 408, 409, 410, 413, 422, 507),
        ),
    }


def _state(limits: Limits) -> dict[str, Any]:
    return {
        "operationId": "report",
        "summary": "Report the State of a run that goes on",
        "parameters": [_PROG_ID],
        "requestBody": {
            "content": {"application/json": {"schema": {"$ref": "#/components/schemas/State"}}}
        },
        "responses": _answers(_json({"type": "object"}, "Kept"), 404, 408, 410, 413, 422, 507),
    }


def _completed(limits: Limits) -> dict[str, Any]:
    return {
        "operationId": "complete",
        "summary": "Report the final State, once all output is there",
        "parameters": [_PROG_ID],
        "requestBody": {
            "content": {"application/json": {"schema": {"$ref": "#/components/schemas/State"}}}
        },
        "responses": _answers(
            _json({"type": "object", "properties": {"new": {"type": "boolean"}}}, "Kept"),
            404,
            408,
            409,
            410,
            413,
            422,
            507,
        ),
    }


def _list() -> dict[str, Any]:
    kinds = {
        "open": {"enum": ["true", "false"]},
        "since": {"type": "number"},
        "until": {"type": "number"},
    }
    parameters = [
        {
            "name": name,
            "in": "query",
            "description": text,
            "schema": kinds.get(name, {"type": "string"}),
        }
        for name, text in FILTERS.items()
    ]
    parameters += [
        {
            "name": "limit",
            "in": "query",
            "schema": {"type": "integer", "minimum": 1, "maximum": 1000},
        },
        {
            "name": "page",
            "in": "query",
            "schema": {"type": "string"},
            "description": "`next` of the page before.",
        },
    ]
    properties = {
        "runs": {"type": "array", "items": {"$ref": "#/components/schemas/Run"}},
        "next": {"type": ["string", "null"]},
    }
    found = _json(
        {"type": "object", "required": ["runs", "next"], "properties": properties},
        "The newest first",
    )
    return {
        "operationId": "list",
        "summary": "Runs",
        "parameters": parameters,
        "responses": _answers(found),
    }


def _register() -> dict[str, Any]:
    about = {**_STATE, "required": ["prog_id"]}
    properties = {
        "prog_id": {"type": "string"},
        "token": {"type": "string"},
        "url": {"type": "string"},
        "expires": {"type": "number"},
    }
    found = _json(
        {"type": "object", "required": ["prog_id", "token", "url"], "properties": properties},
        "The run is known; a token that opens it",
    )
    return {
        "operationId": "register",
        "summary": "Make a run known before it starts, and get a token that opens this run only",
        "requestBody": {"required": True, "content": {"application/json": {"schema": about}}},
        "responses": _answers(found, 408, 409, 413, 422, 507, status="201"),
    }


def _one() -> dict[str, Any]:
    found = _json({"$ref": "#/components/schemas/Run"}, "Its last State")
    return {
        "operationId": "run",
        "summary": "One run",
        "parameters": [_PROG_ID],
        "responses": _answers(found, 404),
    }


def _output() -> dict[str, Any]:
    parameters = [_PROG_ID, _NAME, {"name": "Range", "in": "header", "schema": {"type": "string"}}]
    binary = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
    answers = _answers({"description": "The whole output", "content": binary}, 404, 416)
    answers["206"] = {"description": "The range", "content": binary}
    return {
        "operationId": "output",
        "summary": "Its output",
        "parameters": parameters,
        "responses": answers,
    }


def _events() -> dict[str, Any]:
    parameters = [
        _PROG_ID,
        {"name": "Last-Event-ID", "in": "header", "schema": {"type": "string"}},
        {
            "name": "tail",
            "in": "query",
            "schema": {"type": "integer", "minimum": 0, "maximum": 100000},
        },
        {
            "name": "live",
            "in": "query",
            "schema": {"enum": ["true", "false"]},
            "description": "false: end with what there is now.",
        },
    ]
    found = {
        "description": "Server-sent events: output, gap, state, end",
        "content": {"text/event-stream": {"schema": _SENT}},
    }
    return {
        "operationId": "events",
        "summary": "Its output and State as they come",
        "parameters": parameters,
        "responses": _answers(found, 404),
    }


def _open(name: str, summary: str, kind: str, *codes: int) -> dict[str, Any]:
    found = {
        "description": summary,
        "content": {kind: {"schema": {"type": "string" if kind.startswith("text") else "object"}}},
    }
    return {
        "operationId": name,
        "summary": summary,
        "security": [],
        "responses": {str(code): found for code in (200, *codes)},
    }
