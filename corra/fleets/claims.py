"""Ids that are taken so that nobody can start them any more, and what a host says of a member.

A host starts an id once. So a run of no program under a member's id is a stop that holds for every
roller, also for one that shares no journal with us. `kill` takes the ids of what isn't started, and
a further attempt those of the attempts before it: else a roller that knows only these could start a
member a second time.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from corra.errors import Conflict, NotFound
from corra.model.state import State, exit_code
from corra.remote.agent_client import Agent
from corra.runs import request
from corra.runs.asking import ask_agent, asked_by, who_asks
from corra.runs.follow import Follow, Start
from corra.runs.patience import Patience

from .plan import Plan

# In the origin of a run of no program, with why it is there.
HALTED, BY_KILL, BY_AGAIN = "halted", "kill", "again"
# No PATH has such a program, so its run ends as not started.
HALTED_WORDS = ("stopped before its start",)


def claim(
    plan: Plan, member: str, attempt: int, agent: Agent, patience: Patience, *, why: str
) -> bool:
    """Take the id of a member's attempt, if no program has it. Return whether that was so.

    Raises CorraError where the host can't be asked.
    """
    run_id = plan.run_id(member, attempt)
    origin = {**who_asks(), "fleet": plan.id, "attempt": str(attempt), HALTED: why}
    launch = request.launch(
        agent, HALTED_WORDS, id=run_id, name=plan.name, spool=plan.spool, cwd="/", origin=origin
    )
    # Not by way of Launch.follow: the history has no use for it.
    start = Start(replace(launch.request, fleet=plan.to_text()), stay=False)
    follow = Follow(agent, run_id, patience=patience, start=start, spool=plan.spool, by=asked_by())
    try:
        for _ in follow:
            pass
    except Conflict:
        return False
    return True


def is_claim(state: State) -> bool:
    """Return whether this run only takes an id."""
    return HALTED in (state.origin or {})


def why_claimed(state: State) -> str:
    """Return `stopped by ops@laptop`."""
    origin = state.origin or {}
    who = f"{origin.get('user')}@{origin.get('host')}"
    again = origin.get(HALTED) == BY_AGAIN
    return f"begun once more by {who}" if again else f"stopped by {who}"


def runs_there(plan: Plan, member: str, agent: Agent, attempts: Iterable[int]) -> dict[int, State]:
    """Return the State of a member's run of each attempt, as its host says now.

    Ends at the first attempt beyond the plan's that isn't there. Raises CorraError where the host
    doesn't answer.
    """
    # Not by way of Run: each would write its own row into the history, see `Hands`.
    found: dict[int, State] = {}
    for attempt in attempts:
        run_id = plan.run_id(member, attempt)
        try:
            told = ask_agent(
                agent, "status", {"prog_id": run_id}, text=run_id, label="", spool=plan.spool
            )
        except NotFound:
            if attempt > plan.attempt:
                break
        else:
            found[attempt] = State.from_json(told)
    return found


def settled_before(plan: Plan, member: str, agent: Agent, patience: Patience) -> State | None:
    """Return the State of a member's earlier run, after which it isn't started again.

    That is one that goes on, has ended well or is lost. None where there is none; then no roller of
    an earlier attempt can start one any more. Raises CorraError where the host can't be asked.
    """
    last: State | None = None
    for attempt in range(1, plan.attempt):
        found = runs_there(plan, member, agent, [attempt])
        if not found and not claim(plan, member, attempt, agent, patience, why=BY_AGAIN):
            found = runs_there(plan, member, agent, [attempt])  # it was started just now
        for state in found.values():
            if not state.ended:
                return state
            last = last if is_claim(state) else state
    over = last is not None and (exit_code(last) == 0 or last.state == "lost")
    return last if over else None
