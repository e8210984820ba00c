"""Stop a run, and say what was sent, how it ended and what survived."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from typing import Any

from corra import render
from corra.errors import NotDead, NotKilled
from corra.model.ends import end_error
from corra.model.state import State
from corra.model.units import chosen_time, duration
from corra.model.words import now
from corra.runs.run import Run

from .screen import Screen


class _Told(Exception):
    """The host has the order, and the caller doesn't wait for the end."""


class Orders:
    """The orders to stop that are under way, for an operator who leaves before their end."""

    def __init__(self) -> None:
        self._open: dict[Run, tuple[Mapping[str, Any], float] | None] = {}
        self._lock = threading.Lock()

    def begin(self, run: Run) -> None:
        with self._lock:
            self._open[run] = None

    def told(self, run: Run, answer: Mapping[str, Any]) -> None:
        with self._lock:
            self._open[run] = (answer, time.monotonic())

    def over(self, run: Run) -> None:
        with self._lock:
            self._open.pop(run, None)

    def say_left(self, screen: Screen) -> None:
        """Say of each order what the host goes on doing without us."""
        with self._lock:
            left = list(self._open.items())
        for run, answered in left:
            if answered is None:
                why = f"you left before {run.host} answered: the order may have arrived"
                screen.error(NotKilled(why, host=str(run.host), label=run.label))
                continue
            answer, at = answered
            if answer.get("how") == "ended":
                continue
            left_s = float(answer.get("grace") or 0.0) - (time.monotonic() - at)
            then = (
                f"{run.host} sends KILL in {duration(left_s)} if still there"
                if left_s > 0
                else "KILL was sent, its end was not seen"
            )
            screen.note(run.label, str(run.host), f"you left; {then}")


def stop(
    screen: Screen,
    run: Run,
    *,
    grace_s: float | None = None,
    wait: bool = True,
    orders: Orders | None = None,
) -> None:
    """Stop a run and all its processes, and say so. `grace_s` None is the run's own grace.

    Raises NotDead when a process outlives KILL, NotKilled when the order failed.
    """
    host = str(run.host)
    first: dict[str, Any] = {}
    orders = orders or Orders()
    orders.begin(run)

    def told(answer: Mapping[str, Any]) -> None:
        first.update(answer)
        _say_sent(screen, run, answer)
        orders.told(run, answer)
        if not wait:
            raise _Told

    try:
        killed = run.kill(grace=grace_s, told=told)
    except _Told:
        return
    finally:
        orders.over(run)
    state = killed.state
    count, among = len(killed.survivors), first.get("processes") or 0
    if count:
        who = (
            f"{count} of {among} processes"
            if among > count
            else f"{count} process{'' if count == 1 else 'es'}"
        )
        raise NotDead(
            f"{who} {'outlives' if count == 1 else 'outlive'} KILL",
            host=host,
            prog_id=state.prog_id,
            label=state.label,
            hint=[_survivor(each) for each in killed.survivors[:3]],
        )
    if not killed.ended:
        raise NotDead("its end was not seen", host=host, prog_id=state.prog_id, label=state.label)
    if (
        state.state == "lost"
        and first.get("how") != "ended"
        and (lost := end_error(state, host, reached=run.reached)) is not None
    ):
        raise lost  # without the link nobody can say that nothing is left
    if first.get("how") != "ended":
        screen.say(state.label, host, *render.fate(state, host), render.remedy(state, host))


def _say_sent(screen: Screen, run: Run, answer: Mapping[str, Any]) -> None:
    """Say what the host has done at once."""
    state, host = State.from_json(answer["state"]), str(run.host)
    if answer.get("how") == "ended":
        fate, why = render.fate(state, host, now=now())
        if not state.ended:
            screen.say(state.label, host, *render.fate(state, host), render.remedy(state, host))
            return
        screen.note(state.label, host, f"had ended already: {fate}: {why}")
        return
    count = int(answer.get("processes") or 0)
    whom = "it" if not count else "its 1 process" if count == 1 else f"all {count} processes"
    among = f" ({count} processes)" if count > 1 else ""
    direct = " (by pid: its keeper didn't answer)" if answer.get("how") == "direct" else ""
    grace_s = float(answer.get("grace") or 0.0)
    text = (
        f"KILL sent to {whom}"
        if grace_s <= 0
        else f"{answer.get('signal')} sent; KILL in {chosen_time(grace_s)} if still there{among}"
    )
    screen.note(state.label, host, text + direct)


def _survivor(facts: Any) -> str:
    where = f" in {facts['wchan']}" if facts.get("wchan") else ""
    when = ": ends when NFS answers" if "nfs" in str(facts.get("wchan", "")) else ""
    return (
        f"{facts.get('pid')} {facts.get('name', '')}, state {facts.get('state', '?')}{where}{when}"
    )
