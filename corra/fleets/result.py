"""How a fleet stood where a roll or a look at it ended, as a value."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from corra import render
from corra.errors import NOTHING_DONE, CorraError
from corra.model.rollout import What

from .board import KINDS, Board
from .plan import Plan
from .roll import Rolled
from .standing import Standing, standing_of
from .summary import summary_of

# Of a host that doesn't answer.
UNKNOWN = "unknown"


@dataclass(frozen=True)
class FleetResult:
    """How a fleet stood where a roll or a look at it ended.

    `fate` and `why` are the words of its last line, `code` is its exit code. `members` are the
    Standings by member, in the order of the plan.
    """

    plan: Plan
    fate: str
    why: str
    code: int
    members: Mapping[str, Standing]

    @property
    def ok(self) -> bool:
        """Whether all have ended well."""
        return self.code == 0

    @property
    def done(self) -> tuple[str, ...]:
        """Those that have ended well."""
        return self._of(What.WELL)

    @property
    def failed(self) -> tuple[str, ...]:
        """Those that have ended badly."""
        return self._of(What.FAILED)

    @property
    def unreached(self) -> tuple[str, ...]:
        """Those on which nothing was started, since that was refused or nobody answered."""
        return self._of(What.UNREACHED)

    @property
    def lost(self) -> tuple[str, ...]:
        """Those of which it isn't known how they ended, or whether they were started."""
        return self._of(What.LOST, What.MAYBE)

    @property
    def running(self) -> tuple[str, ...]:
        """Those that go on, or were begun."""
        return self._of(What.STARTED, What.BEGUN)

    @property
    def not_started(self) -> tuple[str, ...]:
        """Those that nobody has tried to start."""
        return self._of(None)

    @property
    def unknown(self) -> tuple[str, ...]:
        """Those whose hosts didn't answer when they were asked."""
        return tuple(name for name, each in self.members.items() if each.what == UNKNOWN)

    def _of(self, *kinds: What | None) -> tuple[str, ...]:
        words = {KINDS[what] for what in kinds}
        return tuple(name for name, each in self.members.items() if each.what in words)


class FleetKilled(NamedTuple):
    """How a fleet was stopped: which members were ended, and which will never be started.

    `unknown`: the error of each member whose host couldn't be asked.
    """

    ended: tuple[str, ...]
    never_started: tuple[str, ...]
    unknown: Mapping[str, CorraError]


def result_of(board: Board, rolled: Rolled) -> FleetResult:
    """Return how a fleet stands where a roll has ended."""
    said = summary_of(board, rolled)
    members = {each.name: standing_of(each) for each in board.members}
    return FleetResult(board.plan, said.fate, said.why, board.code, members)


def result_of_answers(board: Board, errors: Mapping[str, CorraError]) -> FleetResult:
    """Return how a fleet stands by what its hosts have answered.

    `errors`: of the members whose hosts don't answer. Of them nothing is known.
    """
    members = {}
    for each in board.members:
        found = standing_of(each)
        if (error := errors.get(each.name)) is not None:
            found = found._replace(what=UNKNOWN, fate=error.fate, code=error.code, error=error)
        members[each.name] = found
    counts = Counter(each.what for each in members.values())
    why = ", ".join(f"{counts[what]} {what}" for what in (*KINDS.values(), UNKNOWN) if counts[what])
    worst = max((each.code for each in members.values()), default=0)
    untried = KINDS[None] in counts
    fates = (
        (counts[UNKNOWN], "UNKNOWN"),
        (counts[KINDS[What.STARTED]], render.STILL_RUNNING),
        (counts[KINDS[What.LOST]], "LOST"),
        (counts[KINDS[What.FAILED]], "FAILED"),
        (counts[KINDS[What.UNREACHED]] or untried, "NOT STARTED"),
        (True, render.DONE),
    )
    fate = next(fate for holds, fate in fates if holds)
    return FleetResult(
        board.plan, fate, why, NOTHING_DONE if untried and not worst else worst, members
    )
