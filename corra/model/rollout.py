"""Which members of a roll-out to start next, by what has happened so far. No I/O, no clock.

A reviewer can hold this module to five rules:

- A member is started at most once: one of which anything is known isn't started.
- Nothing is started once more have failed than allowed, or after a stop.
- Nothing of a wave is started before all of the wave before it is over.
- No more than `at_once` members are open.
- What a Tally says depends on the set of facts alone, not on their order or number. So two machines
  that know the same decide the same.

Time is a fact like any other: the caller adds it.
"""

from __future__ import annotations

import enum
import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from corra.errors import Misuse


@dataclass(frozen=True)
class Rules:
    """What a roll-out may do.

    `waves` are their sizes, in members. `at_once`: how many may be open. A roll-out stops beyond
    `max_fail` failures and beyond `max_unreached` members that weren't reached; without
    `max_unreached` these count as failures. `pause_s` and `confirm` stand between two waves.
    `lost_stops`: one lost member stops it. `detached`: a member is over once it has started.
    """

    waves: tuple[int, ...]
    at_once: int
    max_fail: int | None = None
    max_unreached: int | None = None
    pause_s: float = 0.0
    confirm: bool = False
    lost_stops: bool = False
    detached: bool = False

    @property
    def members(self) -> int:
        return sum(self.waves)

    def wave_of(self, member: int) -> int:
        """Return the wave of a member, both counted from 0."""
        for wave, size in enumerate(self.waves):
            member -= size
            if member < 0:
                return wave
        raise IndexError(member)


class What(enum.Enum):
    """The kinds of facts."""

    BEGUN = "begun"
    UNREACHED = "unreached"
    MAYBE = "maybe started"
    STARTED = "started"
    WELL = "well"
    FAILED = "failed"
    LOST = "lost"
    CONFIRMED = "confirmed"
    STOPPED = "stopped"
    NOW = "now"


class Fact(NamedTuple):
    """Something that has happened to a member, `at` seconds since the epoch.

    For CONFIRMED `member` is a wave, counted from 0. `why` is the reason of STOPPED.
    """

    what: What
    member: int = 0
    at: float = 0.0
    why: str = ""


# Of two facts on a member the later of this order counts. A host's word on the end comes last. The
# last two can't both be true of one run; the worse is taken.
_ORDER = (
    *(What.BEGUN, What.UNREACHED, What.MAYBE, What.STARTED),
    *(What.WELL, What.FAILED, What.LOST),
)
_RANK = {what: rank for rank, what in enumerate(_ORDER, 1)}
_OPEN, _OPEN_DETACHED = frozenset({What.BEGUN, What.STARTED}), frozenset({What.BEGUN})


class Starts(NamedTuple):
    """Start these members now."""

    members: tuple[int, ...]


class Wait(NamedTuple):
    """Start nothing before the next fact: the time `until`, or a yes to the wave `confirm`."""

    until: float | None = None
    confirm: int | None = None


class Stop(NamedTuple):
    """Start nothing any more; what is open goes on."""

    why: str


class Done(NamedTuple):
    """All members are over."""


Decision = Starts | Wait | Stop | Done


class Tally:
    """The sum of the facts on one roll-out. A fact that comes twice changes nothing."""

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self._open_kinds = _OPEN_DETACHED if rules.detached else _OPEN
        self.now = 0.0
        self.stopped: str | None = None
        self._stopped_at = 0.0
        self._what: list[What | None] = [None] * rules.members
        self._counts: dict[What | None, int] = {None: rules.members}
        self._left = list(rules.waves)
        self._over_at = [0.0] * len(rules.waves)
        self._begun = [False] * len(rules.waves)
        self._confirmed: set[int] = set()
        self._first = [sum(rules.waves[:wave]) for wave in range(len(rules.waves))]
        self._wave = [wave for wave, size in enumerate(rules.waves) for _ in range(size)]

    def of(self, member: int) -> What | None:
        """Return what is known of a member, None if nothing is."""
        return self._what[member]

    def count(self, *kinds: What | None) -> int:
        """Return how many members these facts hold for."""
        return sum(self._counts.get(kind, 0) for kind in kinds)

    def of_kind(self, what: What | None) -> list[int]:
        """Return the members that this fact holds for."""
        return [at for at, known in enumerate(self._what) if known is what]

    @property
    def open(self) -> int:
        """How many members were begun and aren't over."""
        return self.count(*self._open_kinds)

    @property
    def failures(self) -> int:
        """How many members failed; unreached ones only where they have no limit of their own."""
        unreached = () if self.rules.max_unreached is not None else (What.UNREACHED,)
        return self.count(What.FAILED, What.LOST, What.MAYBE, *unreached)

    def add(self, fact: Fact) -> None:
        """Add a fact. Raises IndexError for a member that the roll-out doesn't have."""
        match fact.what:
            case What.NOW:
                self.now = max(self.now, fact.at)
            case What.CONFIRMED:
                self._confirmed.add(fact.member)
            case What.STOPPED:
                if self.stopped is None or fact.at < self._stopped_at:
                    self.stopped, self._stopped_at = fact.why, fact.at
            case _:
                self._know(fact)

    def _know(self, fact: Fact) -> None:
        if fact.member < 0:
            raise IndexError(fact.member)
        before = self._what[fact.member]
        wave = self._wave[fact.member]
        self._begun[wave] = True
        if self._is_over(fact.what):
            self._over_at[wave] = max(self._over_at[wave], fact.at)
        if before is not None and _RANK[fact.what] <= _RANK[before]:
            return
        self._what[fact.member] = fact.what
        self._counts[before] = self._counts.get(before, 0) - 1
        self._counts[fact.what] = self._counts.get(fact.what, 0) + 1
        self._left[wave] += self._is_over(before) - self._is_over(fact.what)

    def _is_over(self, what: What | None) -> bool:
        return what is not None and what not in self._open_kinds

    def decide(self) -> Decision:
        """Return what to do next."""
        rules = self.rules
        if self.stopped is not None:
            return Stop(self.stopped)
        if rules.max_fail is not None and self.failures > rules.max_fail:
            return Stop(f"{self.failures} of {rules.members} failed")
        unreached = self.count(What.UNREACHED)
        if rules.max_unreached is not None and unreached > rules.max_unreached:
            return Stop(f"{unreached} of {rules.members} not reached")
        if rules.lost_stops and (lost := self.count(What.LOST)):
            return Stop(f"{lost} of {rules.members} lost")
        wave = next((at for at, left in enumerate(self._left) if left), None)
        if wave is None:
            return Done()
        if wave and not self._begun[wave]:
            until = self._over_at[wave - 1] + rules.pause_s
            if rules.pause_s and self.now < until:
                return Wait(until=until)
            if rules.confirm and wave not in self._confirmed:
                return Wait(confirm=wave)
        end = sum(rules.waves[: wave + 1])
        first = self._first[wave]
        while first < end and self._what[first] is not None:
            first += 1
        self._first[wave] = first  # nothing is ever forgotten of a member
        waiting = (each for each in range(first, end) if self._what[each] is None)
        found = tuple(itertools.islice(waiting, max(0, rules.at_once - self.open)))
        return Starts(found) if found else Wait()


def next_starts(rules: Rules, facts: Iterable[Fact]) -> Decision:
    """Return what to do next, by all that has happened."""
    tally = Tally(rules)
    for fact in facts:
        tally.add(fact)
    return tally.decide()


# Sizes and thresholds as they are typed


def share_of(text: int | str, total: int) -> int | None:
    """Return a number, or the share `10%` of `total`, rounded down and at least 1.

    None for what is neither.
    """
    if type(text) is int:
        return text
    percent = re.fullmatch(r"(\d{1,3})%", text) if isinstance(text, str) else None
    if percent:
        return max(1, total * int(percent.group(1)) // 100)
    return int(text) if isinstance(text, str) and text.isdecimal() else None


def wave_sizes(total: int, sizes: Sequence[int | str]) -> tuple[int, ...]:
    """Return the sizes of waves of `total` members; the last size is repeated to the end.

    A size is a number, or a share of all members such as "25%". Raises Misuse.
    """
    if not sizes:
        raise Misuse('waves of what size? say 1, 2, "100%"')
    counts = []
    for size in sizes:
        count = share_of(size, total)
        if count is None or count < 1:
            raise Misuse(f'not the size of a wave: {size!r} (say 2, or "25%")')
        counts.append(count)
    found: list[int] = []
    left = total
    while left:
        found.append(min(left, counts[min(len(found), len(counts) - 1)]))
        left -= found[-1]
    return tuple(found)
