"""The Plan of a fleet: which hosts, in which waves, and when to stop. A value that never changes.

The Plan is made before anything is asked of any host, and the whole of it travels in the record of
each run. So one reached host is enough to know the fleet on a machine that never heard of it. That
is why it is small: hosts are folded, the text is deflated, and MOST bytes are the limit.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from corra.errors import Misuse
from corra.model import ids
from corra.model.host import Host
from corra.model.host_sets import HOSTS_MOST, fold, fold_in_order, unfold
from corra.model.program import Request
from corra.model.rollout import Rules, share_of, wave_sizes
from corra.model.shapes import Flag, Listed, Object, Real, Text, Whole, check
from corra.model.units import chosen_time

# A few plans beside a request must not make its record large: a list reads all records.
MOST = 4096
# A Plan comes from a host, and a host is never trusted: what 4 KB can inflate to is bounded.
_INFLATED_MOST = 1 << 20
AT_ONCE = 32
# From the first try to connect until the host has confirmed the start.
START_S = 60.0
# The name under which the runbooks' journals keep fleets, and the step that each of them has.
BOOK, STEP = "fleet", "fleet"
# Behind a host's name where it has several members of one fleet (--each).
_NTH = "#"
SHUFFLE = "shuffle"
REVERSED = "reversed"
ORDERS = ("given", "sorted", REVERSED, SHUFFLE)

_SHAPE = Object(
    {
        "id": Text(64),
        "name": Text(),
        "attempt": Whole(1, 1 << 20),
        "members": Text(_INFLATED_MOST),
        "whole": Text(_INFLATED_MOST),
        "waves": Listed(Listed(Whole(1, 1 << 20), 2), 1 << 16),
        "at_once": Whole(1, 1 << 20),
        "max_fail": Whole(0, 1 << 20),
        "max_unreached": Whole(0, 1 << 20),
        "pause": Real(0, 1e9),
        "confirm": Flag(),
        "kill_on_fail": Flag(),
        "start": Real(0, 1e9),
        "order": Text(64),
        "canary": Text(_INFLATED_MOST),
        "redo": Text(_INFLATED_MOST),
        "program": Text(64),
        "agent": Text(64),
        "as": Text(),
        "spool": Text(),
        "inventory": Text(),
        "by": Text(),
        "at": Text(64),
    },
    ("id", "members", "waves", "at_once", "program"),
)


@dataclass(frozen=True)
class Plan:
    """What a fleet will do. `members` are hosts' names in the order of their starts.

    A member's name is its host's, with `#2` behind it for the second run there. `whole` are the
    members of all attempts, where this is a later one; `redo` are those that it starts whatever
    became of them before. `waves` are sizes. `program` is the digest
    of the program, `agent` that of the agent. `start_s`: how long a member's start may take.
    `inventory` is the path of the inventory that says where the members are, on the machine of
    `by`.
    """

    id: str
    members: tuple[str, ...]
    waves: tuple[int, ...]
    program: str
    name: str | None = None
    attempt: int = 1
    whole: tuple[str, ...] = ()
    at_once: int = AT_ONCE
    max_fail: int | None = None
    max_unreached: int | None = None
    pause_s: float = 0.0
    confirm: bool = False
    kill_on_fail: bool = False
    start_s: float = START_S
    order: str = ""
    canary: tuple[str, ...] = ()
    redo: tuple[str, ...] = ()
    agent: str = ""
    as_user: str | None = None
    spool: str | None = None
    inventory: str | None = None
    by: str = ""
    at: str = ""

    @property
    def rules(self) -> Rules:
        return Rules(
            self.waves,
            self.at_once,
            max_fail=self.max_fail,
            max_unreached=self.max_unreached,
            pause_s=self.pause_s,
            confirm=self.confirm,
        )

    @property
    def label(self) -> str:
        return ids.label(self.id, self.name)

    @property
    def all_members(self) -> tuple[str, ...]:
        """The members of all attempts."""
        return self.whole or self.members

    def run_id(self, member: str, attempt: int | None = None) -> str:
        """Return the id of a member's run, the same on every machine."""
        return ids.derived("fleet", self.id, member, attempt or self.attempt)

    def to_json(self) -> dict[str, Any]:
        """Return the Plan as JSON has it, without defaults."""
        said: dict[str, Any] = {
            "id": self.id,
            "name": self.name,
            "attempt": self.attempt if self.attempt > 1 else None,
            "members": fold_in_order(_as_given(self.members, self.order)),
            "whole": fold_in_order(self.whole) or None,
            "waves": [[len(list(run)), size] for size, run in itertools.groupby(self.waves)],
            "at_once": self.at_once,
            "max_fail": self.max_fail,
            "max_unreached": self.max_unreached,
            "pause": self.pause_s or None,
            "confirm": self.confirm or None,
            "kill_on_fail": self.kill_on_fail or None,
            "start": self.start_s,
            "order": self.order or None,
            "canary": fold_in_order(self.canary) or None,
            "redo": fold_in_order(self.redo) or None,
            "program": self.program,
            "agent": self.agent or None,
            "as": self.as_user,
            "spool": self.spool,
            "inventory": self.inventory,
            "by": self.by or None,
            "at": self.at or None,
        }
        return {name: value for name, value in said.items() if value is not None}

    def to_text(self) -> str:
        """Return the Plan as it travels. Raises Misuse if that is too large."""
        data = zlib.compress(json.dumps(self.to_json(), separators=(",", ":")).encode(), 9)
        if len(data) > MOST:
            raise Misuse(
                f"the plan of {len(self.members)} hosts takes {len(data)} bytes, and at most {MOST}"
                " travel with each run: names that fold (web[1-500]) take little",
                hint=["make two fleets of it"],
            )
        return base64.urlsafe_b64encode(data).decode()

    @classmethod
    def from_text(cls, text: str) -> Plan:
        """Read a Plan that has travelled. Raises ValueError if it isn't one."""
        try:
            inflater = zlib.decompressobj()
            data = inflater.decompress(base64.urlsafe_b64decode(text), _INFLATED_MOST)
            value = json.loads(data)
        except (zlib.error, RecursionError) as error:
            raise ValueError(f"not a plan: {error}") from error
        return cls.from_json(value)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Plan:
        """Read a Plan's JSON; what a newer corra adds is left aside. Raises ValueError."""
        check(_SHAPE, value, "a plan")
        known = {each.name for each in fields(cls)}
        renamed = {"pause": "pause_s", "start": "start_s", "as": "as_user"}
        given = {renamed.get(name, name): each for name, each in value.items() if each is not None}
        given = {name: each for name, each in given.items() if name in known}
        for name in ("members", "whole", "canary", "redo"):
            given[name] = unfolded(given.get(name, ""))
        if sum(count for count, _ in value["waves"]) > HOSTS_MOST:
            raise ValueError("a plan of too many waves")
        given["waves"] = tuple(size for count, size in value["waves"] for _ in range(count))
        if given.get("order") in (SHUFFLE, REVERSED):
            names = ordered(given["members"], given["order"], given["id"])
            given["members"] = tuple(_canary_first(names, given["canary"]))
        plan = cls(**given)
        if sum(plan.waves) != len(plan.members) or not ids.is_valid(plan.id):
            raise ValueError("a plan whose waves aren't its hosts")
        return plan


def new_plan(
    members: Sequence[str],
    *,
    id: str,  # noqa: A002 - the flag's own word
    batch: Sequence[int | str] = (),
    max_fail: int | str | None = None,
    max_unreached: int | str | None = None,
    order: str = "given",
    canary: Sequence[str] = (),
    **how: Any,
) -> Plan:
    """Return the Plan of a fleet. `how` are further fields of Plan.

    Without waves there is no `max_fail` but the one that is given: all hosts are tried. With waves
    the first failure stops it. Raises Misuse.
    """
    unknown = [each for each in canary if each not in members]
    if unknown:
        raise Misuse(f"the canary isn't among the hosts: {fold(unknown)}")
    names = _canary_first(ordered(members, order, id), canary)
    total, first = len(names), len([each for each in names if each in canary])
    # A share is one of the whole plan, also behind the canary.
    sizes = [size if (n := share_of(size, total)) is None else n for size in batch or ["100%"]]
    waves = [first] * bool(first)
    waves += wave_sizes(total - first, sizes) if total > first else ()
    limit = _threshold("max-fail", max_fail, len(names))
    if limit is None and (batch or first):
        limit = 0
    return Plan(
        id,
        tuple(names),
        tuple(waves),
        max_fail=limit,
        max_unreached=_threshold("max-unreached", max_unreached, len(names)),
        order="" if order == "given" else order,
        canary=tuple(names[:first]),
        **how,
    )


def _canary_first(names: Sequence[str], canary: Sequence[str]) -> list[str]:
    first = set(canary)
    return [
        *(each for each in names if each in first),
        *(each for each in names if each not in first),
    ]


def _threshold(name: str, text: int | str | None, total: int) -> int | None:
    if text is None:
        return None
    found = share_of(text, total)
    if found is None or found < 0:
        raise Misuse(f"--{name}: neither a number nor a share: {text!r} (say 2, or 10%)")
    return found


def ordered(members: Sequence[str], order: str, seed: str) -> list[str]:
    """Return members in the order in which they start. A shuffle follows from `seed`."""
    match order:
        case "sorted":
            return sorted(members, key=_natural)
        case _ if order == REVERSED:
            return list(reversed(members))
        case _ if order == SHUFFLE:
            return sorted(
                members, key=lambda each: hashlib.sha256(f"{seed} {each}".encode()).digest()
            )
    return list(members)


def _as_given(members: Sequence[str], order: str) -> Sequence[str]:
    """Return members in an order that folds, and that `ordered` makes the plan's order of."""
    if order == SHUFFLE:
        return sorted(members, key=_natural)
    return members[::-1] if order == REVERSED else members


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part) if part.isdecimal() else -1, part) for part in re.split(r"(\d+)", name)]


def program_digest(request: Request) -> str:
    """Return the digest of what all members run: two starts of one fleet must agree on it."""
    whole = request.to_json()
    facts = {name: whole.get(name) for name in ("program", "run", "name")}
    facts["secrets"] = sorted(request.secrets)
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


# Members as text


def members_of(names: Iterable[str]) -> tuple[str, ...]:
    """Return members by the hosts' names; a host's second member is `web1#2`."""
    counts: dict[str, int] = {}
    found = []
    for name in names:
        counts[name] = counts.get(name, 0) + 1
        found.append(name if counts[name] == 1 else f"{name}{_NTH}{counts[name]}")
    return tuple(found)


def host_of(member: str) -> str:
    """Return the name of a member's host."""
    return member.partition(_NTH)[0]


def unfolded(text: str) -> tuple[str, ...]:
    """Return the members of a text that `fold_in_order` made. Raises ValueError."""
    try:
        found = unfold(text)
        for name in found:
            Host.parse(host_of(name))
    except Misuse as error:
        raise ValueError(f"not members: {error.why}") from error
    return tuple(found)


# Words


def plan_words(plan: Plan) -> str:
    """Return `50 hosts in 10 waves of 5; stops at the 3rd failure`."""
    total = len(plan.members)
    text = f"{total} host{'s' * (total != 1)}"
    if len(plan.waves) > 1:
        text += f" in {len(plan.waves)} waves {_sizes(plan.waves)}"
    if plan.at_once < max(plan.waves):
        text += f", {plan.at_once} at once"
    rules = [
        f"stops at the {_nth(limit + 1)} {what}"
        for limit, what in ((plan.max_fail, "failure"), (plan.max_unreached, "unreached host"))
        if limit is not None and limit < total
    ]
    if plan.pause_s:
        rules.append(f"{chosen_time(plan.pause_s)} between waves")
    if plan.confirm:
        rules.append("asks before each wave but the first")
    if plan.kill_on_fail:
        rules.append("kills what runs when it stops")
    return "; ".join([text, *rules])


def _sizes(waves: Sequence[int]) -> str:
    alike = waves[0] == max(waves) and set(waves[:-1]) == {waves[0]}
    return (
        f"of {waves[0]}"
        if alike
        else f"({', '.join(map(str, waves[:6]))}{', ..' * (len(waves) > 6)})"
    )


def _nth(number: int) -> str:
    ending = {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{'th' if 10 < number % 100 < 14 else ending}"


def plan_lines(plan: Plan) -> list[str]:
    """Return the lines of `--plan`: each wave with its hosts."""
    lines, at = [], 0
    for number, size in enumerate(plan.waves, 1):
        lines.append(f"  wave {number:<3} {size:>4}  {fold_in_order(plan.members[at : at + size])}")
        at += size
    return lines
