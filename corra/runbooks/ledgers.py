"""Reach the place of a journal, on this machine or on a host, behind one Protocol."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote

from corra.errors import CorraError, NoRoom
from corra.model.host import Host
from corra.model.replies import LEDGER_REPLIES
from corra.on_host import ledger
from corra.remote.agent_client import Agent
from corra.remote.exchange import ANSWER_S, Refused
from corra.remote.targets import agent_for
from corra.transport.channel import LinkLost


class Ledger(Protocol):
    """ledger.py, wherever it runs."""

    @property
    def host(self) -> Host: ...
    def call(self, verb: str, request: Mapping[str, Any]) -> tuple[dict[str, Any], bytes]: ...


class Here:
    """ledger.py in this process."""

    host = Host("local")

    def call(self, verb: str, request: Mapping[str, Any]) -> tuple[dict[str, Any], bytes]:
        try:
            answer: tuple[dict[str, Any], bytes] = ledger.answer(verb, dict(request))  # type: ignore[no-untyped-call] # ledger.py runs on 3.6 as well
        except ledger.Refusal as refusal:
            raise _refused(refusal.facts, self.host) from refusal
        return answer


class There:
    """ledger.py on another machine, through the connection of an agent."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent.beside(_source(), LEDGER_REPLIES)

    @property
    def host(self) -> Host:
        return self._agent.host

    def call(self, verb: str, request: Mapping[str, Any]) -> tuple[dict[str, Any], bytes]:
        """Raises CorraError; LinkLost or TimeoutError if the outcome is unknown."""
        try:
            link = self._agent.stream(verb, request, timeout_s=ANSWER_S)
        except Refused as refusal:
            raise _refused(refusal.facts, self.host) from refusal
        try:
            size = link.reply.get("end", 0) - link.reply.get("start", 0)
            return link.reply, link.read_all(size, ANSWER_S)
        except (LinkLost, TimeoutError):
            self._agent.close()
            raise
        finally:
            link.close()


@functools.cache
def _source() -> bytes:
    return Path(ledger.__file__).read_bytes()


def _refused(facts: Mapping[str, Any], host: Host) -> CorraError:
    kind = NoRoom if facts.get("error") == "no_room" else CorraError
    return kind(str(facts.get("message", facts.get("error"))), host=str(host), fate="NOT STARTED")


def ledger_on(target: Any = None, **reach: Any) -> Ledger:
    """Return the ledger of `target`, the one here for None and for `local` as ourselves."""
    if target is None:
        return Here()
    agent = agent_for(target, **reach)
    return Here() if agent.host == Host("local") else There(agent)


def boot_id_of(agent: Agent) -> str:
    """Return the boot id of the host. Raises CorraError, LinkLost, TimeoutError."""
    return str(There(agent).call("boot", {})[0]["boot_id"])


def all_books(where: Ledger) -> list[tuple[str, str, float]]:
    """Return (book, key, time of the last event) of every journal there, the latest first."""
    found = where.call("list", {})[0]["books"]
    return sorted(
        ((unquote(each["book"]), unquote(each["key"]), float(each["time"])) for each in found),
        key=lambda row: -row[2],
    )
