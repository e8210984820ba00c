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


class Freed(NamedTuple):
    """What gc removed on a host, or would: ids of runs whose output went, ids of records that went too, and the bytes."""

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
    """Remove the output of ended runs on `host`: what is older than `older`, then the oldest beyond `max_size` bytes.

    The host's own rules hold where nothing is said (DESIGN.md, the spool). A run that isn't over, is being watched or hasn't been
    delivered keeps its output, whatever is asked. `dry` only tells.
    """
    agent = agent_to_ask(host, **reach)
    told = {"older": in_seconds(older), "max_size": max_size, "dry": dry}
    return Freed.told(
        agent,
        ask_agent(
            agent,
            "gc",
            {key: value for key, value in told.items() if value is not None},
            spool=spool,
        ),
    )
