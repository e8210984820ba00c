"""The values of a step of a runbook: its places, its work, and the outcome of each place."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from corra.errors import CorraError
from corra.model.host import Host
from corra.remote.agent_client import Agent

from .progress import ProgressLines
from .stop import StepHosts


class Reboot(NamedTuple):
    """A reboot: the boot ids, and the seconds from the order to the first answer."""

    old_boot: str
    new_boot: str
    down_s: float


@dataclass(frozen=True)
class Place:
    """A host of a step: its agent, and its name in the journal."""

    agent: Agent
    typed: str = ""

    @property
    def host(self) -> Host:
        return self.agent.host

    @property
    def key(self) -> str:
        """The host's name without the login: two operators must find the same run."""
        return self.typed or str(replace(self.host, login=None, user=None, caller=None))


@dataclass(frozen=True)
class Outcome:
    """The outcome of a step on one host. `before`: its end, if that was before this pass."""

    place: Place
    word: str
    result: Any = None
    error: CorraError | None = None
    took_s: float | None = None
    prog_id: str = ""
    before: str = ""


@dataclass(frozen=True)
class Work:
    """The work of a step on each of its hosts."""

    step: StepHosts
    argv: Sequence[str]
    how: Mapping[str, Any]
    accepts: bool
    shown: Callable[[str], ProgressLines] | None = None
