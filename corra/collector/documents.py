"""The documents of runs: States as they are reported, checked and bounded, and as readers get them.

Who a run is, is fixed by its registration. What a run reports later about its own name, host, user,
starter and command is shown only where the registration said nothing, and no filter and no scope of
a reader ever asks for it: a host must not show its runs to readers of other hosts.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any

from corra import render
from corra.model import ids
from corra.model.state import State

from .limits import RequestRefusal

# Of a document as JSON. A list of runs loads many of them.
DOC_MAX = 256 << 10
# Of a command. Linux takes 2 MiB; nobody reads that in a list.
ARGV_MAX = 64 << 10
NUMBER_MAX = 1 << 63
DEPTH_MAX = 16
# A run that hasn't been heard of for three signs of life is silent.
SILENT_S = 900.0

IDENTITY = ("name", "host", "target", "user", "argv", "origin")
_KEYS = {field.name for field in fields(State)} | {"proc_id"}


def read_state(value: Mapping[str, Any], prog_id: str) -> dict[str, Any]:
    """Return the known keys of a State that `prog_id` reports. Raises RequestRefusal: 422."""
    doc = {key: each for key, each in value.items() if key in _KEYS}
    try:
        _check_range(doc, DEPTH_MAX)
        state = State.from_json(doc)
        word(doc)
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise RequestRefusal(422, "bad_state", str(error)[:200]) from None
    if state.prog_id != prog_id:
        raise RequestRefusal(422, "bad_state", "this is the State of another run")
    return doc


def read_registration(about: Mapping[str, Any], prog_id: str) -> dict[str, Any]:
    """Return the first document of a run that is registered. Raises RequestRefusal: 422."""
    told = {key: about[key] for key in (*IDENTITY, "cwd") if about.get(key) is not None}
    target = told.pop("target", None)
    doc = read_state({**told, "prog_id": prog_id, "state": "starting"}, prog_id)
    if target is None:
        return doc
    if not isinstance(target, str):
        raise RequestRefusal(422, "bad_state", "target is no text")
    return {**doc, "target": target}


def _check_range(value: Any, depth: int) -> None:
    """Raise ValueError for a number or a nesting that no State has."""
    if depth < 0:
        raise ValueError("a State that is nested too deep")
    if isinstance(value, (int, float)) and not -NUMBER_MAX < value < NUMBER_MAX:
        raise ValueError(f"not a number of a State: {value!r:.40}")
    members: Iterable[Any] = ()
    if isinstance(value, Mapping):
        members = value.values()
    elif isinstance(value, list):
        members = value
    for each in members:
        _check_range(each, depth - 1)


def has_identity(doc: Mapping[str, Any]) -> bool:
    return any(doc.get(key) is not None for key in IDENTITY)


def merged(doc: Mapping[str, Any], told: Mapping[str, Any]) -> dict[str, Any]:
    """Return `doc` with what a later State tells; what `doc` says of the identity stays."""
    fixed = {key: doc[key] for key in IDENTITY if doc.get(key) is not None}
    return {**doc, **told, **fixed}


def essence(doc: Mapping[str, Any]) -> list[Any]:
    """Return what never changes in a final State. Its delivery and late output may."""
    return [doc.get(key) for key in ("state", "reason", "status", "end_time", "exception")]


def word(doc: Mapping[str, Any]) -> str:
    """Return what `ps` calls the run's state, in small letters: `running`, `failed 2`, `lost`."""
    return render.word(State.from_json(doc)).lower()[:32]


def identity_columns(doc: Mapping[str, Any]) -> dict[str, Any]:
    """Return the columns that filters and scopes ask for."""
    origin = doc.get("origin") or {}
    by = filter(None, (_stored_text(origin.get("user")), _stored_text(origin.get("host"))))
    return {
        "name": None if doc.get("name") is None else _stored_text(doc["name"]),
        "host": _stored_text(doc.get("target") or doc.get("host")),
        "user": _stored_text(doc.get("user")),
        "by": "@".join(by),
        "fleet": None if origin.get("fleet") is None else _stored_text(origin["fleet"]),
        "command": " ".join(map(_stored_text, doc.get("argv") or ()))[:ARGV_MAX],
    }


def state_columns(doc: Mapping[str, Any]) -> dict[str, Any]:
    """Return the columns that change with each State. Raises RequestRefusal: 422."""
    if doc.get("argv"):
        doc = {**doc, "argv": _cut_argv(doc["argv"])}
    text = json.dumps(doc)
    if len(text) > DOC_MAX:
        message = f"a State may have {DOC_MAX} bytes; this one has {len(text)}"
        raise RequestRefusal(422, "large_state", message)
    return {"state": doc["state"], "word": word(doc), "doc": text, "doc_bytes": len(text)}


def _cut_argv(argv: Sequence[str]) -> list[str]:
    """Return the first words, and of the word that goes too far a part."""
    found: list[str] = []
    room = ARGV_MAX
    for each in argv:
        # As JSON in ASCII, where a character may be 12 bytes.
        size = len(json.dumps(each)) + 2
        if size > room:
            return [*found, each[: room // 12] + ".."]
        found.append(each)
        room -= size
    return found


def _stored_text(value: Any) -> str:
    # What isn't UTF-8 came as surrogates, which no database takes; PostgreSQL takes no NUL either.
    return str(value or "").replace("\0", "\\0").encode("utf-8", "backslashreplace").decode()


def id_tail(prog_id: str) -> str:
    return prog_id[-8:] if ids.short(prog_id) != prog_id else prog_id


def shown(
    row: Mapping[str, Any],
    lengths: Mapping[str, int],
    gaps: Sequence[Mapping[str, Any]],
    gap_count: int,
) -> dict[str, Any]:
    """Return a run as readers get it: its last State, and what the collector itself knows."""
    doc = json.loads(row["doc"])
    if row["ended"] is None:
        doc["streams"] = {
            name: {"length": length, "dropped": 0, "late": 0} for name, length in lengths.items()
        }
    if row["host"]:
        doc["host"] = row["host"]
    doc.pop("target", None)
    doc["collector"] = {
        "made": row["made"],
        "heard": row["heard"],
        "ended": row["ended"],
        "silent": row["ended"] is None and time.time() - row["heard"] > SILENT_S,
        "received": dict(lengths),
        "gaps": list(gaps),
        "gap_count": gap_count,
        "version": row["version"],
        "page": [row["made"], row["id"]],
    }
    return doc  # type: ignore[no-any-return]
