"""Stopping a run from its watcher: what is sent, what is said, what survived."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from corra import render
from corra.errors import NotDead
from corra.model.ends import end_error
from corra.model.state import State
from corra.model.units import chosen_time
from corra.model.words import now
from corra.runs.run import Run

from .screen import Screen

# -- Stopping, as `kill` and the second Ctrl-C do it


class _Told(Exception):
    """The host has the order, and nobody wants to see what becomes of it."""


def stop(screen: Screen, run: Run, *, grace_s: float | None = None, wait: bool = True) -> None:
    """Stop a run and all its processes, and say so; `grace_s` None is the run's own. Raises NotDead when something outlives KILL, NotKilled when the order failed."""
    host = str(run.host)
    first: dict[str, Any] = {}

    def told(answer: Mapping[str, Any]) -> None:
        first.update(answer)
        _say_sent(screen, run, answer)
        if not wait:
            raise _Told

    try:
        killed = run.kill(grace=grace_s, told=told)
    except _Told:
        return
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
        and (lost := end_error(state, host)) is not None
    ):
        raise lost  # the link to it is gone: nobody can say that nothing is left
    if first.get("how") != "ended":
        screen.say(state.label, host, *render.fate(state, host))


def _say_sent(screen: Screen, run: Run, answer: Mapping[str, Any]) -> None:
    """Say what the host did at once."""
    state, host = State.from_json(answer["state"]), str(run.host)
    if answer.get("how") == "ended":
        fate, why = render.fate(state, host, now=now())
        screen.note(state.label, host, f"had ended already: {fate}: {why}")
        return
    count = answer.get("processes")
    whom = "it" if not count else "its 1 process" if count == 1 else f"all {count} processes"
    direct = " (by pid: its keeper didn't answer)" if answer.get("how") == "direct" else ""
    grace_s = float(answer.get("grace") or 0.0)
    text = (
        f"KILL sent to {whom}"
        if grace_s <= 0
        else f"{answer.get('signal')} sent; KILL to {whom} in {chosen_time(grace_s)}"
    )
    screen.note(state.label, host, text + direct)


def _survivor(facts: Any) -> str:
    where = f" in {facts['wchan']}" if facts.get("wchan") else ""
    when = ": ends when NFS answers" if "nfs" in str(facts.get("wchan", "")) else ""
    return (
        f"{facts.get('pid')} {facts.get('name', '')}, state {facts.get('state', '?')}{where}{when}"
    )
