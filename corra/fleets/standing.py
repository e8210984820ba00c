"""What is known of a fleet's members, as values: events for a caller, and JSON."""

from __future__ import annotations

from typing import Any, NamedTuple

from corra.errors import CorraError
from corra.model.rollout import What
from corra.model.state import State

from .board import KINDS, Member
from .plan import host_of

_OPEN = frozenset(KINDS[what] for what in (None, What.BEGUN, What.STARTED))


class Standing(NamedTuple):
    """What is known of one member; the event that it has changed is the new Standing.

    `member` is its host's name, with `#2` behind it for a second run there. `what` is one of: not
    started, connecting, running, done, failed, lost, maybe started, unreached. `fate` says it with
    the exit (`FAILED 2`), `code` is its part of the fleet's exit code. `wave` and `attempt` count
    from 1.
    """

    member: str
    prog_id: str
    what: str
    fate: str
    code: int
    wave: int = 1
    attempt: int = 1
    state: State | None = None
    error: CorraError | None = None

    @property
    def host(self) -> str:
        """The name of its host."""
        return host_of(self.member)

    @property
    def over(self) -> bool:
        """Whether nothing more will become of it in this attempt."""
        return self.what not in _OPEN

    def to_json(self) -> dict[str, Any]:
        """Return what is known as JSON has it."""
        return {
            "host": self.member,
            "prog_id": self.prog_id,
            "fate": self.fate,
            "exit_code": self.code,
            "state": self.state.to_json() if self.state is not None else None,
            "error": self.error.to_json() if self.error is not None else None,
        }


class Wrote(NamedTuple):
    """A member has written `data` at `offset` of its `stream`."""

    member: str
    prog_id: str
    stream: str
    offset: int
    data: bytes


class Said(NamedTuple):
    """A line for people: who is waited for, whose link was lost."""

    text: str
    member: str = ""


FleetEvent = Standing | Wrote | Said


def standing_of(member: Member) -> Standing:
    """Return what is known of a member now."""
    return Standing(
        member.name,
        member.prog_id,
        KINDS[member.what],
        member.word,
        member.code,
        member.wave + 1,
        member.attempt,
        member.state,
        member.error,
    )
