"""The words at a fleet's end, or where an operator leaves it. No I/O, no clock."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from corra import render
from corra.errors import typed
from corra.model import ids
from corra.model.host_sets import fold, fold_within
from corra.model.rollout import What
from corra.model.units import duration

from .board import BAD, KINDS, Board, Member
from .roll import Rolled, Way

# More groups than this say less.
GROUPS_SHOWN = 8
_SAID_MAX = 60
# `status` has all of them.
_NAMES_MAX = 400
# On the first line, which answers alone which hosts went wrong.
_NAMES_FIRST = 60
# A threshold's own words, which the counts say too.
_FAILED = re.compile(r"(failed|not reached)$")


class Summary(NamedTuple):
    """What is said: the fate, why, a row for each group of members that isn't well, and hints."""

    fate: str
    why: str
    rows: Sequence[str]
    hint: Sequence[str]


def summary_of(board: Board, rolled: Rolled, way_to: Callable[[str], str] | None = None) -> Summary:
    """Return what to say of a fleet where a roll ended.

    `way_to` has the flags by which another machine finds a member's host.
    """
    plan, total = board.plan, len(board.members)
    counts = _counts(board.members)
    bad = [each for each in board.members if each.over and each.what is not What.WELL]
    well = len(board.of(What.WELL))
    waves = len(plan.waves)
    match rolled.way:
        case Way.STOPPED:
            where = f" in wave {board.wave + 1} of {waves}" if waves > 1 else ""
            fate = f"STOPPED{where}"
            why = counts if _FAILED.search(rolled.why) else f"{rolled.why}; {counts}"
        case Way.PAUSED:
            fate, why = f"PAUSED {rolled.why} of {waves}", counts
        case Way.LEFT | Way.TIMED_OUT:
            fate, why = _left(board, started=rolled.started)
        case _ if well == total:
            took = max((each.over_at for each in board.members), default=0.0) - board.begun_at
            fate, why = (
                render.DONE,
                f"{total} host{'s' * (total != 1)} in {duration(max(0.0, took))}",
            )
        case _ if bad:
            fate, why = _worst(bad), counts
        case _:
            running = bool(board.of(What.STARTED, What.BEGUN))
            fate, why = render.STILL_RUNNING if running else "STOPPED", counts
    return Summary(fate, why, _rows(board), _hints(board, rolled, way_to))


def _left(board: Board, *, started: bool) -> tuple[str, str]:
    running = len(board.of(What.STARTED, What.BEGUN))
    waiting = len(board.of(None))
    rest = f", {waiting} not started" + " and won't be" * started if waiting else ""
    fate = render.STILL_RUNNING if running else "STOPPED"
    return fate, f"{running} of {len(board.members)} hosts running{rest}"


def _worst(bad: Sequence[Member]) -> str:
    """Return the fate of a fleet whose members are over, not all of them well."""
    kinds = {each.what for each in bad}
    if kinds & {What.LOST, What.MAYBE}:
        return "LOST" if What.LOST in kinds else "MAYBE STARTED"
    return "FAILED" if What.FAILED in kinds else "NOT STARTED"


def _counts(members: Sequence[Member]) -> str:
    """Return `3 of 20 failed: web[7,13,19]; 17 done, 30 not started`: what went wrong, with names,
    and how many of the others.
    """
    found: dict[What | None, list[str]] = {}
    for each in members:
        found.setdefault(each.what, []).append(each.name)
    tried = len(members) - len(found.get(None, ()))
    bad = [
        f"{len(found[what])} of {tried} {word}: {fold_within(found[what], _NAMES_FIRST)}"
        for what, word in KINDS.items()
        if what in BAD and what in found
    ]
    others = [
        f"{len(found[what])} {word}"
        for what, word in KINDS.items()
        if what not in BAD and what in found
    ]
    return "; ".join([*bad, ", ".join(others)] if others else bad)


def _rows(board: Board) -> list[str]:
    """Return `FAILED 1  web[7,13,19]  "Job for app.service failed"`, a row for each group."""
    alike: dict[tuple[str, str], list[str]] = {}
    for each in board.members:
        if each.over and each.what is not What.WELL:
            alike.setdefault((each.word, _cut(each.said)), []).append(each.name)
        elif each.waits[0]:
            alike.setdefault((each.waits[0], _cut(each.waits[1])), []).append(each.name)
    most = sorted(alike.items(), key=lambda pair: -len(pair[1]))
    rows = [
        f"  {word}: {fold_within(names, _NAMES_MAX)}" + (f"  {said}" if said else "")
        for (word, said), names in most[:GROUPS_SHOWN]
    ]
    if left := most[GROUPS_SHOWN:]:
        rows.append(
            f"  and {sum(len(names) for _, names in left)} more hosts in {len(left)} groups"
        )
    return rows


def _cut(text: str) -> str:
    text = render.visible(text)
    return text if len(text) <= _SAID_MAX else text[: _SAID_MAX - 2] + ".."


def _hints(board: Board, rolled: Rolled, way_to: Callable[[str], str] | None) -> list[str]:
    short = ids.short(board.plan.id)
    hints = []
    kinds = {each.what for each in board.members}
    if rolled.way in (Way.LEFT, Way.TIMED_OUT, Way.PAUSED) or kinds & {What.STARTED, What.BEGUN}:
        hints.append(f"go on: {typed()} attach {short}     stop: {typed()} kill {short}")
    elif kinds & {What.FAILED, What.UNREACHED, None}:
        hints.append(f"what failed or was not started, once more: {typed()} again {short}")
    if kinds & {What.LOST, What.MAYBE}:
        lost = fold(each.name for each in board.of(What.LOST, What.MAYBE))
        hints.append(f"look there first; then by name: {typed()} again --redo {lost} {short}")
    reached = next((each for each in board.members if each.state is not None), None)
    if hints and reached is not None and way_to is not None:
        hints.append(f"from another machine: corra attach {way_to(reached.name)} {short}")
    return hints
