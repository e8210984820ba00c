"""What a step of a runbook is made of: its places, its work, and what each place came to."""

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
    """A host that has been down and is up again: the boots' ids, and the seconds from the order to the first answer."""

    old_boot: str
    new_boot: str
    down_s: float


@dataclass(frozen=True)
class Place:
    """A host of a step: what to reach it by, and what it is called in the journal."""

    agent: Agent
    typed: str = ""

    @property
    def host(self) -> Host:
        return self.agent.host

    @property
    def key(self) -> str:
        """The host's name whoever logs in, under inv as under fab: two people must find the same run."""
        return self.typed or str(replace(self.host, login=None, user=None, caller=None))


@dataclass(frozen=True)
class Outcome:
    """What one host's part of a step came to. `before`: when it had ended, if that was before this pass."""

    place: Place
    word: str
    result: Any = None
    error: CorraError | None = None
    took_s: float | None = None
    prog_id: str = ""
    before: str = ""


@dataclass(frozen=True)
class Work:
    """What a step is to do on each of its hosts."""

    step: StepHosts
    argv: Sequence[str]
    how: Mapping[str, Any]
    accepts: bool
    shown: Callable[[str], ProgressLines] | None = None
