"""What a host may answer, verb by verb: the Shapes of its replies, refusals and frames.

Every reply is checked where it is read (corra/remote/agent_client.py), so a verb has to do with
none but sound ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from corra.on_host.agent.contract import REQUEST_MAX

from . import ids
from .shapes import (
    WORD_MAX,
    Either,
    Flag,
    Listed,
    Mapped,
    Maybe,
    Object,
    Real,
    Shape,
    Text,
    Whole,
    check,
)
from .state import ARGV, ERRNO, ID, PID, STATE

MESSAGE = Text(1 << 16)
# A runbook's journal: 100,000 events of a few kB each.
JOURNAL_MAX = 256 << 20
_FOLLOWED = Object(
    {**STATE.fields, "cursor": Mapped(Whole(), 8), "switched": Text(1 << 16)}, STATE.needed
)
_LIMIT = Whole(-(1 << 63), 1 << 64)
_RECORD = Object(
    {
        "name": Text(),
        "fleet": Text(1 << 14),
        "program": Object(
            {
                "argv": ARGV,
                "cwd": Text(1 << 14),
                "env": Mapped(Maybe(Text(1 << 20))),
                "env_inherit": Either((Flag(), Listed(Text(WORD_MAX)))),
                "stdin": Either(
                    (
                        Text(1 << 20),
                        Object(
                            {"bytes": Whole(0, REQUEST_MAX), "open": Flag(), "sha256": Text(64)}
                        ),
                    )
                ),
                "umask": Whole(0, 0o7777),
                "merge": Flag(),
                "limits": Mapped(Either((_LIMIT, Listed(_LIMIT, 2))), 64),
                "pty": Flag(),
            },
            ("argv",),
        ),
        "run": Object(
            {
                "timeout": Real(),
                "grace": Real(),
                "stop_signal": Text(16),
                "keep": Real(),
                "keep_output": Whole(),
                "wait_children": Flag(),
                "force": Flag(),
                "forget_stdin": Flag(),
                "terminal": Object(
                    {"rows": Whole(0, 0xFFFF), "columns": Whole(0, 0xFFFF), "term": Text()}
                ),
            }
        ),
        "callback": Object({"url": Text(1 << 14)}),
    },
    ("program",),
)
_ROOM: dict[str, Shape] = {
    "dir": Text(1 << 14),
    "problem": Text(1 << 14),
    "free": Whole(),
    "size": Whole(),
}
_DISK = Object(
    {"free": Whole(), "size": Whole(), "floor": Whole(), "inodes": Whole()},
    ("free", "size", "floor"),
)
_PROCESS = Object(
    {
        "pid": PID,
        "parent": PID,
        "name": Text(),
        "state": Text(8),
        "argv": ARGV,
        "cpu_s": Real(0, 1e12),
        "cpus": Real(0, 1e6),
        "memory": Whole(),
        "wchan": Text(),
    },
    ("pid", "parent", "name", "state", "argv", "cpus", "memory"),
)

AGENT_REPLIES: Mapping[str, Object] = {
    "start": STATE,
    "run": _FOLLOWED,
    "follow": _FOLLOWED,
    "wait": STATE,
    "status": STATE,
    "signal": Object({"state": STATE}, ("state",)),
    "stop": Object(
        {
            "state": STATE,
            "how": Text(64),
            "processes": Whole(0, 1 << 32),
            "signal": Text(16),
            "grace": Real(),
        },
        ("state",),
    ),
    "read": Object(
        {"stream": Text(64), "start": Whole(), "end": Whole(), "length": Whole()},
        ("start", "end", "length"),
    ),
    "digest": Object(
        {
            "state": STATE,
            "digests": Mapped(
                Object(
                    {"start": Whole(), "end": Whole(), "length": Whole(), "blake2b": Text(64)},
                    ("start", "end", "length", "blake2b"),
                ),
                8,
            ),
        },
        ("state", "digests"),
    ),
    "list": Object(
        {
            "host": Text(),
            "user": Text(),
            "runs": Listed(STATE),
            "more": Whole(),
            "next": Text(128),
            "counts": Mapped(Whole(), 64),
            "total": Whole(),
            "unreadable": Listed(
                Object(
                    {"prog_id": Text(), "dir": Text(), "message": Text()},
                    ("prog_id", "dir", "message"),
                )
            ),
        },
        ("runs",),
    ),
    "gc": Object(
        {
            "removed": Listed(ID),
            "forgotten": Listed(ID),
            "folded": Whole(),
            "freed": Whole(),
            "left": Whole(),
            "dry": Flag(),
        },
        ("removed", "forgotten", "freed"),
    ),
    "deliver": Object(
        {
            "state": STATE,
            "delivered": Object({"acked": Mapped(Whole(), 8), "error": Text(1 << 14)}),
        },
        ("state",),
    ),
}
STOPPED = Object(
    {
        "state": STATE,
        "ended": Flag(),
        "survivors": Listed(
            Object({"pid": PID, "name": Text(), "state": Text(8), "wchan": Text()})
        ),
    },
    ("state", "ended"),
)
DOCTOR_REPLIES: Mapping[str, Object] = {
    "examine": Object(
        {
            "python": Text(64),
            "executable": Text(1 << 14),
            "user": Text(),
            "uid": Whole(0, 1 << 32),
            "home": Text(1 << 14),
            "cache": Listed(
                Object({**_ROOM, "inodes": Whole(), "agent": Flag()}, ("dir", "free", "agent")), 16
            ),
            "spool": Listed(
                Object(
                    {**_ROOM, "inodes": Whole(), "floor": Whole()}, ("dir", "free", "size", "floor")
                ),
                16,
            ),
            "logout": Object({"scope": Flag(), "ends": Flag(), "user": Text()}, ("ends",)),
            "processes": Listed(
                Object({"of": Text(), "now": Whole(), "most": Whole()}, ("of", "now", "most")), 64
            ),
            "file_size": Whole(),
            "files": Whole(),
            "time": Real(0, 1e11),
        },
        ("python", "executable", "cache", "spool", "logout", "processes", "time"),
    ),
    "record": Object({"record": _RECORD, "stdin": Whole(0, REQUEST_MAX)}, ("record", "stdin")),
    "tree": Object({"processes": Listed(_PROCESS), "spool": _DISK}, ("processes", "spool")),
}
LEDGER_REPLIES: Mapping[str, Object] = {
    "append": Object(
        {"start": Whole(0, JOURNAL_MAX), "end": Whole(0, JOURNAL_MAX)}, ("start", "end")
    ),
    "read": Object(
        {"start": Whole(0, JOURNAL_MAX), "end": Whole(0, JOURNAL_MAX)}, ("start", "end")
    ),
    "list": Object(
        {
            "books": Listed(
                Object(
                    {"book": Text(), "key": Text(), "size": Whole(), "time": Real(0, 1e11)},
                    ("book", "key", "time"),
                )
            )
        },
        ("books",),
    ),
    "boot": Object({"boot_id": Text(64)}, ("boot_id",)),
}
REFUSAL = Object(
    {
        "error": Text(64),
        "message": MESSAGE,
        "what": Text(64),
        "dir": Text(1 << 14),
        "errno": ERRNO,
        "tried": Listed(Object({"dir": Text(1 << 14), "errno": ERRNO, "message": MESSAGE}), 64),
        "count": Whole(),
        "user": Text(),
        "since": Text(64),
        "runs": Listed(STATE, 1000),
        "there": STATE,
        "state": STATE,
    },
    ("error",),
)


def check_reply(
    shapes: Mapping[str, Shape], verb: str, request: Mapping[str, Any], reply: Any
) -> None:
    """Raise ValueError for a reply, or a refusal, that isn't as `shapes` has it for `verb`.

    A reply must also be about the run that `request` asks for.
    """
    if isinstance(reply, Mapping) and "error" in reply:
        check(REFUSAL, reply, "the refusal")
        return
    shape = shapes.get(verb)
    if shape is None:
        return
    check(shape, reply, "the reply")
    asked = request.get("prog_id")
    state = reply if isinstance(shape, Object) and "prog_id" in shape.fields else reply.get("state")
    if asked and isinstance(state, Mapping) and not answers_for(str(asked), state):
        raise ValueError(f"asked for {asked}, it answers for {state['prog_id']}")


def answers_for(text: str, state: Mapping[str, Any]) -> bool:
    """Return whether `state` may be of the run that `text` means: an id, a name, a tail's
    beginning.
    """
    prog_id = str(state["prog_id"])
    return text in (prog_id, state.get("name")) or (
        len(text) >= 2 and ids.tail(prog_id).startswith(text)
    )
