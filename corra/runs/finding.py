"""Runs that exist: one found again by id, name or tail, and all that a host lists."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from corra.errors import CorraError, NotFound, typed
from corra.model import host_sets
from corra.model.refusals import ambiguous_error
from corra.model.state import State
from corra.model.words import WIDTH
from corra.remote.agent_client import Agent
from corra.remote.targets import Reach, agent_to_ask, is_a, is_one

from . import history
from .asking import ask_agent, who_asks
from .run import AT_ONCE, Run

if TYPE_CHECKING:
    from typing_extensions import Unpack


def attach(
    id: str | None = None,  # noqa: A002
    host: Any = None,
    *,
    spool: str | None = None,
    **reach: Unpack[Reach],
) -> Run:
    """Return the run that `id` (an id, a name or the beginning of a tail) means on `host`, the newest of mine without an id.

    Without a host this machine's history knows it. Raises NotFound, Ambiguous, Unreachable and what else may go wrong on the way.
    """
    run = named_run(id, host, spool=spool, **reach)
    if run.known is None:
        run.state()
    return run


def named_run(
    id: str | None = None,  # noqa: A002
    host: Any = None,
    *,
    spool: str | None = None,
    verb: str = "attach",
    **reach: Unpack[Reach],
) -> Run:
    """Return the run that `attach` would, without asking its host whether it is there: its first answer tells, and the run's full id with it.

    One exec less for whoever asks something else anyway. `verb` is what a hint has to be typed with. Raises NotFound and Ambiguous where history can't say which.
    """
    if host is None:
        entry = recall(id, verb)
        # A name is the host's to resolve: since we last looked it may have been given to another run.
        text = id if id is not None and id == entry.name else entry.prog_id
        reach = {
            **reach,
            "via": reach.get("via") or entry.via,
            "as_user": reach.get("as_user") or entry.as_user,
        }
        run = named_run(text, entry.host, spool=spool or entry.spool, **reach)
        run.begun = entry.begun
        return run
    agent = agent_to_ask(host, **reach)
    connection = host if is_a(host, "fabric.connection", "Connection") else None
    run = Run(agent, id or "", spool=spool, connection=connection, via=reach.get("via"), seen=False)
    if id is None:
        run.heard(newest_of_mine(agent, spool))
    return run


def recall(text: str | None, verb: str = "attach") -> history.Entry:
    """Return the one run that `text` means in this machine's history, the newest for None. Raises NotFound, Ambiguous."""
    if text is None:
        newest = history.newest_entry()
        if newest is None:
            raise NotFound(
                "no run was started from here yet; say where to look:",
                fate="NOT FOUND in this machine's history",
                hint=[f"{typed()} ps --host HOST"],
            )
        return newest
    found = history.find_entries(text)
    if len(found) > 1:
        raise ambiguous_error(text, "", [entry.as_state() for entry in found], with_hosts=True)
    if not found:
        say = f"{typed()} {verb} --host HOST {text}"
        look = f"{typed()} ps --host {','.join(history.hosts_used()[:3]) or 'HOST'}"
        raise NotFound(
            "say where it runs:",
            label=text,
            fate="NOT FOUND in this machine's history",
            hint=[one]
            if len(one := f"{say}       or look: {look}") <= WIDTH
            else [say, f"or look: {look}"],
        )
    return found[0]


def newest_of_mine(agent: Agent, spool: str | None) -> State:
    mine = who_asks()
    runs = [
        State.from_json(each) for each in ask_agent(agent, "list", {}, spool=spool).get("runs", ())
    ]
    own = [
        state
        for state in runs
        if (state.origin or {}).get("user") == mine["user"]
        and (state.origin or {}).get("host") == mine["host"]
    ]
    if not own:
        raise NotFound(
            f"none of the {len(runs)} runs there was started from here; say which",
            host=str(agent.host),
        )
    return max(own, key=lambda state: (state.start_time or "", state.prog_id))


def ps(
    hosts: Any,
    *,
    match: str | None = None,
    spool: str | None = None,
    **reach: Unpack[Reach],
) -> list[State | CorraError]:
    """Return the State of every run on `hosts`; for a host that can't tell, the error (Unreachable and the like) in their place.

    `hosts` is one target or several, or their set (`web[1-6],db1`); a State's `host` is the target's text, so that it can be typed.
    """
    targets = [hosts] if is_one(hosts) else list(hosts)
    targets = [
        name
        for each in targets
        for name in (host_sets.hosts(each) if isinstance(each, str) else [each])
    ]
    request = {} if match is None else {"match": match}

    def ask(target: Any) -> list[State | CorraError]:
        try:
            agent = agent_to_ask(target, **reach)
            answer = ask_agent(agent, "list", request, spool=spool)
            states = [State.from_json(each) for each in answer.get("runs", ())]
            # What this machine keeps for another host is that host's.
            return [
                replace(state, host=(state.link or str(agent.host)).partition(" as ")[0])
                for state in states
            ]
        except CorraError as error:
            return [error]

    if not targets:
        return []
    with ThreadPoolExecutor(min(AT_ONCE, len(targets))) as pool:
        return [each for found in pool.map(ask, targets) for each in found]
