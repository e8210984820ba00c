"""The output of ended runs, removed from a host to free its disk."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from corra.model.units import in_seconds
from corra.remote.agent_client import Agent
from corra.remote.targets import Reach, agent_to_ask

from .asking import ask_agent

if TYPE_CHECKING:
    from typing_extensions import Unpack


# A host takes some seconds for each answer, and a thousand runs at least. More is no host of ours.
ASKED_MOST = 500


class Freed(NamedTuple):
    """What gc removed on a host, or would remove.

    `emptied`: ids of runs whose output went; `forgotten`: ids whose record went, too.
    """

    host: str
    emptied: tuple[str, ...]
    forgotten: tuple[str, ...]
    bytes: int

    @classmethod
    def told(cls, agent: Agent, answer: Mapping[str, Any]) -> Freed:
        return cls(
            str(agent.host), tuple(answer["removed"]), tuple(answer["forgotten"]), answer["freed"]
        )


def free_disk(
    host: Any,
    *,
    older: float | str | None = None,
    max_size: int | None = None,
    dry: bool = False,
    spool: str | None = None,
    **reach: Unpack[Reach],
) -> Freed:
    """Remove the output of ended runs on `host`: what is older than `older`, then the oldest beyond
    `max_size` bytes.

    Without them the host's own rules hold (DESIGN.md, the spool). A run keeps its output while it
    goes on, is watched, or hasn't been delivered. `dry` only tells.
    """
    agent = agent_to_ask(host, **reach)
    told = {"older": in_seconds(older), "max_size": max_size, "dry": dry}
    asked = {key: value for key, value in told.items() if value is not None}
    found: list[Freed] = []
    before = None
    for _ in range(ASKED_MOST):
        # A host with many runs answers after some seconds, and says how many are left.
        answer = ask_agent(agent, "gc", asked, spool=spool)
        found.append(Freed.told(agent, answer))
        left = answer.get("left") or 0
        if not left or (left == before and not answer.get("folded")):
            break
        before = left
    return Freed(
        str(agent.host),
        tuple(each for part in found for each in part.emptied),
        tuple(each for part in found for each in part.forgotten),
        sum(part.bytes for part in found),
    )
