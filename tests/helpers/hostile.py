"""A host that answers what it likes: documents made of the schema, and documents with one place
spoiled.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta, timezone
from typing import Any

from hypothesis import strategies as st

from corra.model import shapes
from corra.model.host import Host
from corra.model.replies import AGENT_REPLIES, DOCTOR_REPLIES, LEDGER_REPLIES, REFUSAL, STOPPED
from corra.model.state import ID, STATE
from corra.remote.bootstrap import FIRST, VISIT

SOME_ID = "20261123t014409z-k7m2qxwp"
# What has broken a verb somewhere: times without a time zone's room, numbers out of all bounds,
# half characters, containers in place of values.
HOSTILE: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    1 << 70,
    10**400,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "0001-01-01T00:00:00+00:00",
    "9999-12-31T23:59:59-12:00",
    "2026-11-23",
    "\ud800",
    "\u202e\u200b\x1b[2J\r\n",
    "x" * 200_000,
    "../../etc/passwd",
    [],
    {},
    [[]],
    [None],
    {"": None},
    {"length": {}},
)
TEXTS = st.sampled_from(
    ["", "true", "a b", "\x1b[31m", "\u202ex", "\u3164", "ü", "\udcff", "-x", "../x"]
)
_TIMES = st.datetimes(
    datetime(1970, 1, 2),  # noqa: DTZ001 - hypothesis adds the zone
    datetime(2999, 12, 30),  # noqa: DTZ001
    timezones=st.sampled_from(
        [timezone.utc, timezone(timedelta(hours=14)), timezone(-timedelta(hours=12))]
    ),
)


_MADE: dict[int, st.SearchStrategy[Any]] = {}


def documents(shape: shapes.Shape) -> st.SearchStrategy[Any]:
    """Return what fits `shape`."""
    # Made once: a State's takes longer to make than to draw from.
    if id(shape) not in _MADE:
        _MADE[id(shape)] = _documents(shape)
    return _MADE[id(shape)]


def _documents(shape: shapes.Shape) -> st.SearchStrategy[Any]:
    match shape:
        case shapes.Text(most):
            return TEXTS | st.text(max_size=min(most, 20), alphabet=st.characters(codec="utf-8"))
        case shapes.Word(pattern):
            return st.just(SOME_ID) if shape == ID else st.from_regex(pattern, fullmatch=True)
        case shapes.Whole(least, most):
            return st.sampled_from([least, most]) | st.integers(least, most)
        case shapes.Real(least, most):
            return (
                st.sampled_from([least, most])
                | st.floats(least, most)
                | st.integers(int(least), int(most))
            )
        case shapes.Flag():
            return st.booleans()
        case shapes.Moment():
            return _TIMES.map(lambda moment: moment.isoformat())
        case shapes.Listed(of, most):
            return st.lists(documents(of), max_size=min(most, 3))
        case shapes.Mapped(of, most):
            return st.dictionaries(TEXTS, documents(of), max_size=min(most, 3))
        case shapes.Maybe(of):
            return st.none() | documents(of)
        case shapes.Either(each):
            return st.one_of(*map(documents, each))
        case shapes.Object(fields, needed):
            made = {name: documents(of) for name, of in fields.items()}
            return st.fixed_dictionaries(
                {name: made[name] for name in needed},
                optional={
                    name: st.none() | each for name, each in made.items() if name not in needed
                },
            )


@st.composite
def spoiled(draw: st.DrawFn, shape: shapes.Shape) -> Any:
    """Return what fits `shape` but for one place."""
    return _spoil(draw, draw(documents(shape)))


def _spoil(draw: st.DrawFn, value: Any) -> Any:
    if isinstance(value, dict) and value and draw(st.booleans()):
        key = draw(st.sampled_from(sorted(value)))
        return {**value, key: _spoil(draw, value[key])}
    if isinstance(value, list) and value and draw(st.booleans()):
        return [_spoil(draw, value[0]), *value[1:]]
    return draw(st.sampled_from(HOSTILE))


Answer = Callable[[str, Mapping[str, Any]], bytes]


class HostileHost:
    """A Runner whose host answers each exchange with the bytes that `answer(verb, request)`
    returns.
    """

    login = "me"
    remark = ""

    def __init__(self, host: Host, answer: Answer) -> None:
        self.host = host
        self._answer = answer

    def begin(self) -> None:
        pass

    def open(self, command: str) -> HostileChannel:
        return HostileChannel(self._answer)

    def close(self) -> None:
        pass


class HostileChannel:
    """The exchange's request comes in, the answer goes out, and that is the end of it."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self._came = bytearray()
        self._said: bytes | None = None

    def write(self, data: bytes) -> None:
        self._came += data

    def read(self, timeout_s: float | None) -> bytes:
        if self._said is None:
            nonce, verb, request = self._asked()
            self._said = b"noise\ncorra 1 " + nonce + b"\n" + self._answer(verb, request)
        data, self._said = self._said[:65536], self._said[65536:]
        return data

    def _asked(self) -> tuple[bytes, str, dict[str, Any]]:
        visits = self._came.startswith(VISIT)
        line, _, rest = bytes(self._came[len(FIRST) :]).partition(b"\n")
        words = line.split()
        if visits:
            return words[0], words[1].decode(), json.loads(rest[: int(words[2])])
        size, _, body = rest.partition(b"\n")
        return words[0], words[2].decode(), json.loads(body[: int(size)])

    def close_write(self) -> None:
        pass

    def close(self) -> None:
        pass

    def stderr(self) -> bytes:
        return b""

    def exit_status(self) -> int | None:
        return 0


@st.composite
def answers(draw: st.DrawFn, verb: str, *, journal: bool = False) -> bytes:
    """Return what a host may say to `verb`: a reply with what follows it, sound or not at one
    place.
    """
    reply_shape = {**LEDGER_REPLIES, **DOCTOR_REPLIES, **AGENT_REPLIES}.get(verb, REFUSAL)
    if journal:
        reply_shape = LEDGER_REPLIES[verb]
    if draw(st.integers(0, 5)) == 0:
        reply_shape = REFUSAL
    bad = draw(st.sampled_from(["reply", "frame", "text", "nothing"]))
    reply = draw(spoiled(reply_shape) if bad == "reply" else documents(reply_shape))
    text = json.dumps(reply).encode()
    if bad == "text":
        text = draw(st.sampled_from([b"", b"no", b"[" * 5000, b"[1]", b"7", b'"x"', text[:-1]]))
    said = text + b"\n"
    if verb in ("run", "follow", "wait", "stop"):
        shape = STOPPED if verb == "stop" else STATE
        frame = draw(spoiled(shape) if bad == "frame" else documents(shape))
        if isinstance(frame, dict):
            last = frame.get("state") if verb == "stop" else frame
            if isinstance(last, dict) and last.get("prog_id") == SOME_ID:
                last["state"] = "exited"
        said += draw(
            st.sampled_from(
                [b"", b"O stdout 0 3 0\nabc", b"O x 5 1 0\na", b"H\n", b"G a 9 1\n", b"A 1\n"]
            )
        )
        body = json.dumps(frame).encode()
        said += b"S %d\n" % len(body) + body
    elif verb in ("record", "read", "append"):
        said += draw(st.binary(max_size=50))
    return said
