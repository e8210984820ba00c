"""One request to a host's agent, and the error that each failed answer means."""

from __future__ import annotations

import contextlib
import getpass
import os
from collections.abc import Iterator, Mapping
from typing import Any

from corra.errors import CorraError, NotKilled, Unreachable
from corra.model import ids
from corra.model.frames import Parser, Status
from corra.model.host import Host
from corra.model.refusals import refusal_error, retold
from corra.model.replies import STOPPED
from corra.model.shapes import check
from corra.model.units import duration
from corra.on_host.agent.contract import VERSION
from corra.remote.agent_client import Agent
from corra.remote.exchange import ANSWER_S, BadReply, Refused
from corra.transport.channel import Silent

from .follow import OpenLink

# Beyond the grace: two seconds that the host gives KILL to work, and a slow line's answer.
STOP_MARGIN_S = 30.0
_READ_S = 3600.0


def who_asks() -> dict[str, str]:
    """Return the user, machine and version of this client, for a State's `origin`."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a uid without a name, as in many containers
        user = str(os.getuid())
    return {"user": user, "host": os.uname().nodename, "version": VERSION}


def asked_by() -> str:
    origin = who_asks()
    return f"{origin['user']}@{origin['host']}"


def answer_patience_s(again: bool) -> float:
    """Return how long a host may take to answer: twice as long at a second try."""
    return ANSWER_S * (2 if again else 1)


def last_word(link: OpenLink, timeout_s: float) -> Mapping[str, Any]:
    """Return the JSON of a link's last S frame. Raises TimeoutError, ConnectionError."""
    import time

    parser, until, word = Parser(), time.monotonic() + timeout_s, None
    try:
        while data := _next(link, until):
            for frame in parser.feed(data):
                if isinstance(frame, Status):
                    check(STOPPED, frame.state, "the end of the stop")
                    word = frame.state
    except ValueError as error:
        raise BadReply(error) from error
    if word is None:
        raise ConnectionError("the link was closed")
    return word


@contextlib.contextmanager
def explained(host: Host, verb: str, *, text: str = "", label: str = "") -> Iterator[None]:
    """Turn each failure of `verb` into the CorraError that says so.

    `text` is what was typed for the run: an id, a name or the beginning of a tail.
    """
    prog_id = text if ids.is_valid(text) else ""
    try:
        yield
    except Refused as refusal:
        raise refusal_error(
            refusal.kind, refusal.facts, host=host, verb=verb, text=text, label=label
        ) from refusal
    except CorraError as error:
        raise retold(error, verb=verb, label=label or text, prog_id=prog_id) from error
    except (ConnectionError, TimeoutError) as error:
        why = str(error) or "link lost"
        if isinstance(error, TimeoutError):
            why = f"no answer in {duration(ANSWER_S)}"
        kind = NotKilled if verb == "stop" else Unreachable
        raise retold(
            kind(why, host=str(host)), verb=verb, label=label or text, prog_id=prog_id
        ) from error


def _next(link: OpenLink, until: float) -> bytes:
    """Return the next bytes. Raises TimeoutError at `until`, even if bytes never cease."""
    import time

    while (left_s := until - time.monotonic()) > 0:
        try:
            # A grace may be longer than a system call can wait.
            return link.read(min(left_s, _READ_S))
        except TimeoutError:
            pass
    raise TimeoutError


def ask_agent(
    agent: Agent,
    verb: str,
    request: Mapping[str, Any],
    *,
    text: str = "",
    label: str = "",
    spool: str | None = None,
    extra_s: float = 0.0,
    once_s: float | None = None,
) -> dict[str, Any]:
    """Return the host's answer. `extra_s`: how much longer than others this one may take.

    A call whose link breaks or stays silent is made once more, over a new link. A signal isn't: it
    could arrive twice. With `once_s`, a host that has never answered and stays silent for so long
    isn't asked again.
    """
    whole = {**request, **({"spool": spool} if spool else {})}
    with explained(agent.host, verb, text=text, label=label):
        for last in (verb == "signal", True):
            try:
                limit_s = once_s or answer_patience_s(last and verb != "signal")
                return agent.call(verb, whole, timeout_s=limit_s + extra_s)
            except (ConnectionError, TimeoutError) as error:
                agent.close()
                never = once_s is not None and not agent.answered
                if last or (never and isinstance(error, Silent)) or isinstance(error, BadReply):
                    raise
    raise AssertionError
