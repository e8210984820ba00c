"""A fleet's events as its journal keeps them, and the facts that they come to. No I/O, no clock.

The journal is a runbook's, with one step. It is a cache: what became of a member, its host knows.
Of a journal's own are only a yes between two waves, an operator's stop, and who rolls.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from corra.errors import CorraError, MaybeStarted, Unreachable
from corra.model.rollout import Fact, What
from corra.model.shapes import Flag, Listed, Object, Real, Text, Whole, check
from corra.model.state import STATE, State
from corra.model.words import local_time
from corra.runbooks.book import JournalEvent

from .board import fact_of
from .plan import STEP, Plan

# What a journal remembers of the way to the hosts. (The Plan says whose program it is, and in which
# inventory they are.)
WAY = ("user", "via")
# What this machine remembers of the way to a journal that is elsewhere.
WAY_TO_JOURNAL = (*WAY, "inventory")
# A roller says that it is there this often, and counts as gone after the other time.
RENEW_S, LEASE_S = 20.0, 60.0

_EVENTS: Mapping[str, Object] = {
    "plan": Object({"plan": Text(1 << 14), "user": Text(), "via": Text()}, ("plan",)),
    "begin": Object({"host": Text(), "attempt": Whole()}, ("host", "attempt")),
    "started": Object({"host": Text(), "attempt": Whole()}, ("host", "attempt")),
    "end": Object(
        {"host": Text(), "attempt": Whole(), "state": STATE}, ("host", "attempt", "state")
    ),
    "unreached": Object(
        {
            "host": Text(),
            "attempt": Whole(),
            "why": Text(1 << 14),
            "fate": Text(64),
            "code": Whole(0, 255),
            "maybe": Flag(),
        },
        ("host", "attempt"),
    ),
    "confirmed": Object({"wave": Whole(), "attempt": Whole()}, ("wave", "attempt")),
    "halt": Object({"attempt": Whole(), "hosts": Listed(Text())}, ("attempt",)),
    "rolling": Object(
        {"epoch": Whole(), "until": Real(), "pass": Text(64), "pid": Whole()}, ("epoch", "until")
    ),
}


class Lease(NamedTuple):
    """Who rolls a fleet, and until when if nothing more is heard of them."""

    epoch: int = 0
    until: float = 0.0
    by: str = ""
    pass_id: str = ""
    pid: int = 0


NO_LEASE = Lease()


class Known(NamedTuple):
    """What one event says of a plan: a fact, and what stands behind it."""

    fact: Fact
    state: State | None = None
    error: CorraError | None = None


def plans_of(events: Iterable[JournalEvent]) -> list[Plan]:
    """Return the plans of a journal, one for each attempt, the first one first."""
    found: dict[int, Plan] = {}
    for event in events:
        if event.what == "plan" and (facts := _facts(event)) is not None:
            plan = Plan.from_text(facts["plan"])
            found.setdefault(plan.attempt, plan)
    return [found[attempt] for attempt in sorted(found)]


def way_of(events: Iterable[JournalEvent]) -> dict[str, str]:
    """Return how the hosts are reached, as the last plan's writer did."""
    found: dict[str, str] = {}
    for event in events:
        if event.what == "plan" and (facts := _facts(event)) is not None:
            found = {name: str(facts[name]) for name in WAY if facts.get(name)}
    return found


def known_of(plan: Plan, events: Iterable[JournalEvent]) -> Iterator[Known]:
    """Yield what the events say of this plan's attempt. What is damaged is left aside."""
    places = {name: at for at, name in enumerate(plan.members)}
    for event in events:
        facts = _facts(event)
        if facts is None or facts.get("attempt") != plan.attempt:
            continue
        then = local_time(event.at)
        at = then.timestamp() if then is not None else 0.0
        if event.what == "confirmed":
            yield Known(Fact(What.CONFIRMED, facts["wave"], at))
            continue
        if event.what == "halt":
            yield Known(Fact(What.STOPPED, at=at, why=f"stopped by {event.by}"))
            continue
        place = places.get(facts.get("host", ""))
        if place is None:
            continue
        match event.what:
            case "begin":
                yield Known(Fact(What.BEGUN, place, at))
            case "started":
                yield Known(Fact(What.STARTED, place, at))
            case "end":
                state = State.from_json(facts["state"])
                yield Known(fact_of(state, at, place), state)
            case "unreached":
                kind = MaybeStarted if facts.get("maybe") else Unreachable
                error = kind(
                    str(facts.get("why", "")),
                    host=plan.members[place],
                    fate=facts.get("fate"),
                    code=facts.get("code"),
                )
                what = What.MAYBE if facts.get("maybe") else What.UNREACHED
                yield Known(Fact(what, place, at), error=error)


def lease_of(events: Iterable[JournalEvent], found: Lease = NO_LEASE) -> Lease:
    """Return the lease with the largest epoch, the last one of it, `found` among them."""
    for event in events:
        facts = _facts(event) if event.what == "rolling" else None
        if facts is not None and facts["epoch"] >= found.epoch:
            holder = str(facts.get("pass", ""))
            found = Lease(
                facts["epoch"], float(facts["until"]), event.by, holder, facts.get("pid") or 0
            )
    return found


def _facts(event: JournalEvent) -> Mapping[str, Any] | None:
    """Return the facts of an event that is as its kind is, else None."""
    shape = _EVENTS.get(event.what)
    if shape is None:
        return None
    try:
        check(shape, event.facts, event.what)
    except ValueError:
        return None
    return event.facts


# What is written. Each is (what, facts), as Journal.write_all takes them.
Written = tuple[str, dict[str, Any]]


def of_member(plan: Plan, what: str, member: str, **facts: Any) -> Written:
    """Return an event of one member."""
    named = {"step": STEP, "host": member, "attempt": plan.attempt}
    return what, {**named, **facts}


def begun(plan: Plan, member: str) -> Written:
    return of_member(plan, "begin", member, prog_id=plan.run_id(member))


def told(plan: Plan, member: str, known: Known) -> Written:
    """Return the event of what a host has told of a member's run."""
    assert known.state is not None
    if known.state.ended:
        return over(plan, member, known)
    return of_member(plan, "started", member)


def over(plan: Plan, member: str, known: Known) -> Written:
    """Return the event of a member that is over."""
    if known.state is not None:
        return of_member(plan, "end", member, state=known.state.to_json())
    error = known.error
    assert error is not None
    return of_member(
        plan,
        "unreached",
        member,
        why=error.why,
        fate=error.fate,
        code=error.code,
        maybe=known.fact.what is What.MAYBE,
    )
