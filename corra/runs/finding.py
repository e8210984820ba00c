"""Find a run again by its id, name or tail, and list the runs of hosts."""

from __future__ import annotations

import contextlib
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from corra.errors import CorraError, NotFound, typed
from corra.inventory.groups import hosts as hosts_of
from corra.model.refusals import ambiguous_error
from corra.model.state import State
from corra.model.units import duration
from corra.model.words import WIDTH, one_line
from corra.remote.agent_client import Agent
from corra.remote.exchange import ANSWER_S
from corra.remote.targets import Reach, agent_to_ask, is_a, is_one

from . import history
from .asking import ask_agent, who_asks
from .run import AT_ONCE, Run

if TYPE_CHECKING:
    from typing_extensions import Unpack

# As many runs of one name are asked for before one more is started.
NAMESAKES = 3
# A host may answer with one more page for ever.
RUNS_MAX = 200_000
# As many pages are asked for: a hostile host could fill each with one run.
PAGES_MAX = 500


def attach(
    id: str | None = None,  # noqa: A002
    host: Any = None,
    *,
    spool: str | None = None,
    **reach: Unpack[Reach],
) -> Run:
    """Return the run that `id` means on `host`: an id, a name or the beginning of a tail.

    Without an id it is my newest run there. Without a host the history of this machine tells the
    host. Raises NotFound, Ambiguous, Unreachable and the other errors of reaching a host.
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
    """Return the run that `attach` would, without asking its host; the host's first answer tells
    whether the run is there, and its full id.

    That saves a caller with another question one exec. `verb` is the verb that hints are typed
    with. Raises NotFound and Ambiguous where the history can't tell the host.
    """
    if host is None:
        entry = recall(id, verb)
        # The host resolves a name: since the history saw it, another run may have been given it.
        text = id if id is not None and id == entry.name else entry.prog_id
        reach = {
            **reach,
            "via": reach.get("via") or entry.via,
            "as_user": reach.get("as_user") or entry.as_user,
            "inventory": reach.get("inventory") or entry.inventory,
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
    """Return the one run that `text` means in the history, the newest for None.

    Raises NotFound, Ambiguous.
    """
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
        ages = [f"{duration(time.time() - entry.seen)} ago" for entry in found]
        states = [entry.as_state() for entry in found]
        raise ambiguous_error(text, "", states, with_hosts=True, seen=ages)
    if not found:
        say = f"{typed()} {verb} --host HOST {shlex.quote(text)}"
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


def open_namesakes(run: Run) -> list[State]:
    """Return the open runs that `run`, which is about to be started, would share its name with.

    The history names them, and their host tells whether they still run.
    """
    known = history.open_under(run.name, run.host, run.spool) if run.name else []
    found: list[State] = []
    for entry in known[:NAMESAKES]:
        with contextlib.suppress(CorraError):
            state = Run(run.agent, entry.prog_id, spool=run.spool).state()
            if entry.prog_id != run.id and not state.ended:
                found.append(state)
    return found


class RunsPage(NamedTuple):
    """A page of a host's list, the newest run first.

    `counts`: of the runs that were asked for, how many there are of each kind; `total`: all runs
    there. `more` of those that were asked for come on later pages, the next of which is `next`.
    """

    states: list[State]
    damaged: list[CorraError]
    counts: Mapping[str, int]
    total: int
    more: int = 0
    next: str | None = None
    # What tells two spellings of one host: its own name, its user, and the newest run.
    place: tuple[str, str, str] = ("", "", "")


def list_page(
    agent: Agent,
    wanted: Mapping[str, Any] | None = None,
    *,
    before: str | None = None,
    limit: int | None = None,
    spool: str | None = None,
    via: str | None = None,
    once_s: float | None = None,
) -> RunsPage:
    """Return a page of the runs there, of those that `wanted` says, and correct the history by it.

    `wanted` has the keys of the agent's `list`: states, since, mine, match (docs/agent-by-hand.md).
    `once_s` is that of `ask_agent`.
    """
    wanted = dict(wanted or {})
    page = {"before": before, "limit": limit}
    asked = {**wanted, **{name: value for name, value in page.items() if value is not None}}
    answer = ask_agent(agent, "list", asked, spool=spool, once_s=once_s)
    host = str(agent.host)
    found = RunsPage(
        [State.from_checked(each) for each in answer.get("runs", ())],
        [
            CorraError(
                f"can't read {one_line(each.get('dir', ''))}: {one_line(each.get('message', ''))}",
                fate="UNREADABLE",
                host=host,
                prog_id=one_line(each.get("prog_id", "")),
                label=one_line(each.get("prog_id", "")),
            )
            for each in answer.get("unreadable") or ()
        ],
        answer.get("counts") or {},
        answer.get("total", 0),
        answer.get("more", 0),
        answer.get("next") if answer.get("runs") else None,
        (
            answer.get("host", ""),
            answer.get("user", ""),
            next((each["prog_id"] for each in answer.get("runs", ())), ""),
        ),
    )
    if before and found.next and not _is_older(found.next, before):
        raise CorraError(
            "doesn't speak corra's protocol: its list has no end", host=host, fate="NOT DONE"
        )
    whole = not before and not found.more
    history.note_list(
        agent.host,
        found.states,
        via=via,
        spool=spool,
        all_listed=whole and not wanted,
        open_listed=whole and {"states", "since"}.issuperset(wanted) and _asks_for_open(wanted),
    )
    return found


def _is_older(cursor: str, before: str) -> bool:
    """Return whether a page that ends at `cursor` lies behind one that ended at `before`."""

    def key(text: str) -> tuple[int, str]:
        created, _, prog_id = text.partition(":")
        return (int(created) if created.isdigit() else 0, prog_id)

    return key(cursor) < key(before)


def _asks_for_open(wanted: Mapping[str, Any]) -> bool:
    """Return whether every run that is running is asked for."""
    words = wanted.get("states") or ("running",)
    return any("running".startswith(word) for word in words)


def list_runs(
    agent: Agent, *, match: str | None = None, spool: str | None = None, via: str | None = None
) -> list[State]:
    """Return the State of every run there, of those with `match` in them where given.

    The answer corrects the history.
    """
    return _listed(agent, {} if match is None else {"match": match}, spool, via)[0]


def _listed(
    agent: Agent,
    wanted: Mapping[str, Any],
    spool: str | None,
    via: str | None,
    once_s: float | None = None,
) -> tuple[list[State], list[CorraError]]:
    """Return the States, and an error for each run whose files are damaged."""
    page = list_page(agent, wanted, spool=spool, via=via, once_s=once_s)
    states = list(page.states)
    damaged = page.damaged
    for _ in range(PAGES_MAX):
        if not page.next or len(states) >= RUNS_MAX:
            break
        page = list_page(agent, wanted, before=page.next, spool=spool, via=via)
        states += page.states
    return states, damaged


def newest_of_mine(agent: Agent, spool: str | None) -> State:
    asks = who_asks()
    mine = {"user": asks["user"], "host": asks["host"]}
    answer = ask_agent(agent, "list", {"mine": mine, "limit": 1}, spool=spool)
    if not answer["runs"]:
        count = answer.get("total", 0)
        raise NotFound(
            f"none of the {count} runs there was started from here; say which",
            host=str(agent.host),
        )
    return State.from_json(answer["runs"][0])


def on_host(state: State, agent: Agent) -> State:
    """Return `state` with the host that is typed. A run that this machine keeps for another host
    belongs to that host.
    """
    return replace(state, host=(state.link or str(agent.host)).partition(" as ")[0])


def _names(text: str, reach: Reach) -> Sequence[str]:
    return hosts_of(text, reach.get("config"), reach.get("inventory"))


def look_patience_s(reach: Mapping[str, Any]) -> float:
    """Return how long a host that lets us in may be silent while others have answered.

    One silent host must not keep the others' answers back. Who gives the connection more time gives
    more to the answer, too.
    """
    return max(ANSWER_S, reach.get("connect_timeout") or 0.0)


def ps(
    hosts: Any,
    *,
    match: str | None = None,
    states: Sequence[str] | None = None,
    spool: str | None = None,
    **reach: Unpack[Reach],
) -> list[State | CorraError]:
    """Return the State of every run on `hosts`, and an error for each host that doesn't answer.

    `hosts` is one target or several, or a set of hosts (`web[1-6],db1`). `match`: only those with
    this in their id, name or command. `states`: only those in these states, by the words of `corra
    ps` (`("starting", "running")`). A State's `host` is the target's text, so that it can be typed.
    """
    given = {"match": match, "states": None if states is None else list(states)}
    wanted = {name: value for name, value in given.items() if value is not None}
    once_s = look_patience_s(reach)
    targets = [hosts] if is_one(hosts) else list(hosts)
    targets = [
        name
        for each in targets
        for name in (_names(each, reach) if isinstance(each, str) else [each])
    ]

    def ask(target: Any) -> list[State | CorraError]:
        try:
            agent = agent_to_ask(target, **reach)
            states, damaged = _listed(agent, wanted, spool, reach.get("via"), once_s)
            return [*(on_host(state, agent) for state in states), *damaged]
        except CorraError as error:
            return [error]

    if not targets:
        return []
    if len(targets) == 1:
        return ask(targets[0])
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(min(AT_ONCE, len(targets))) as pool:
        return [each for found in pool.map(ask, targets) for each in found]
