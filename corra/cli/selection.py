"""Which hosts and which runs a command line means.

A verb that looks takes hosts from the history. `kill` guesses nothing: it takes ids, or all runs of
a named host, and a person says yes where the runs are another's or on several hosts.
"""

from __future__ import annotations

import os
import shlex
from collections import Counter
from collections.abc import Sequence, Set as AbstractSet
from typing import TYPE_CHECKING, Any

from invoke.context import Context

from corra.errors import CorraError, Misuse, NotKilled, Unreachable, typed
from corra.settings import setting

from .chosen import choose_hosts, inventory_path, may_read_stdin
from .flags import (
    GcFlags,
    HostFlags,
    KillFlags,
    LinkFlags,
    NewKeyFlag,
    PsFlags,
    ReachFlags,
    RunFlags,
)
from .words import Given

if TYPE_CHECKING:
    from corra.model.state import State
    from corra.remote.agent_client import Agent
    from corra.runs.history import Entry
    from corra.runs.patience import Patience
    from corra.runs.run import Run

_HISTORY_HOSTS = 32
# 80 columns, less `corra: NOT KILLED: `.
_CHOICE_WIDTH = 61


def host_reach(c: Context, given: ReachFlags) -> dict[str, Any]:
    """Return how hosts are reached: by the flags, and below them by the configuration."""
    login, as_user = _said(c, given)
    flags = {
        "user": login or given.user,
        "as_user": as_user,
        "via": given.via,
        "connect_timeout": given.connect_timeout,
        "accept_new_key": (isinstance(given, NewKeyFlag) and given.accept_new_key) or None,
    }
    told = {
        name: setting(c.config, name) if value is None else value for name, value in flags.items()
    }
    told["inventory"] = inventory_path(c, given)
    return {
        "config": c.config,
        **{name: value for name, value in told.items() if value is not None},
    }


def patience(c: Context, given: Given, *, timeout_s: float | None = None) -> Patience:
    """Return how patient a follow is: the flags, and under them what the configuration says."""
    from corra.runs.patience import Patience

    flags = (
        {"reconnect_timeout": given.reconnect_timeout, "dead_after": given.dead_after}
        if isinstance(given, LinkFlags)
        else dict.fromkeys(("reconnect_timeout", "dead_after"))
    )
    told = {
        name: setting(c.config, name) if value is None else value for name, value in flags.items()
    }
    known = {f"{name}_s": value for name, value in told.items() if value is not None}
    return Patience(**known, timeout_s=timeout_s)


def _said(c: Context, given: ReachFlags) -> tuple[str | None, str | None]:
    """Return who logs in and whom sudo makes of them, by --as and --mode. Raises Misuse."""
    from corra.model.host import Host, Mode, login_and_user, refuse_two_logins

    if given.mode and not given.as_user:
        raise Misuse(f"--mode {given.mode} needs --as USER", fate="NOT DONE")
    try:
        said = login_and_user(given.as_user, Mode(given.mode) if given.mode else None)
        for name in choose_hosts(c, given, given.host) if said[0] else ():
            refuse_two_logins(Host.parse(name), said[0])
        return said
    except Misuse as error:
        raise error.but(fate="NOT DONE") from error


def fabrics_host(c: Context) -> str:
    """Return the host that `fab -H` calls a task for, "" under `inv`."""
    from corra.remote.targets import is_a

    if not is_a(c, "fabric.connection", "Connection"):
        return ""
    from corra.transport.fabric.connection import host_of

    return str(host_of(c))


def told_hosts(
    c: Context, given: ReachFlags, *, fate: str = "NOT DONE", each: bool = False
) -> list[str]:
    """Return the hosts of the flags, else of `fab -H`, $CORRA_HOST or the configuration.

    With `each`, a host comes as often as it is named. Raises Misuse.
    """
    texts = given.host
    if not texts and not given.inventory:
        texts = [fabrics_host(c) or os.environ.get("CORRA_HOST") or setting(c.config, "host") or ""]
    return choose_hosts(c, given, texts, fate=fate, whole=True, each=each)


def hosts_in(c: Context, given: ReachFlags, texts: Sequence[str]) -> list[str]:
    """Return the hosts of sets that another flag than --host names. Raises Misuse."""
    return choose_hosts(c, given, texts, limited=False)


def _several(hosts: Sequence[str]) -> str:
    from corra.model.host_sets import fold

    return f"not {len(hosts)}: {', '.join(hosts) if len(hosts) < 4 else fold(hosts)}"


def one_host(c: Context, given: ReachFlags, *, fate: str) -> str:
    """Return the one host a command line names. Raises Misuse for none and for several."""
    hosts = told_hosts(c, given, fate=fate)
    if not hosts:
        command = shlex.join(given.argv)
        raise Misuse(f"no host:  {typed()} run --host HOST -- {command}   (here: local)", fate=fate)
    if len(hosts) > 1:
        raise Misuse(f"one host at a time, {_several(hosts)}", fate=fate)
    return hosts[0]


def begin_connecting(c: Context, given: RunFlags) -> Agent | None:
    """Return the agent of the one host that a command line names, with its connection begun.

    The keys are exchanged while the rest of corra is imported.

    None where there is nothing to begin; what is wrong with the line, `one_host` will say.
    """
    from corra.remote.targets import agent_for

    try:
        agent = (
            None
            if given.dry or given.limit or given.inventory or may_read_stdin(given)
            else agent_for(one_host(c, given, fate="NOT STARTED"), **host_reach(c, given))
        )
    except CorraError:
        return None
    if agent is not None:
        agent.begin()
    return agent


def find_run(
    c: Context, given: HostFlags, text: str | None, *, limit_s: float | None = None
) -> Run:
    """Return the run that `text` means, on --host or else on the host that the history knows.

    The host's first answer tells whether the run is there.
    """
    from corra.remote.targets import agent_to_ask
    from corra.transport.channel import CONNECT_S

    # $CORRA_HOST and the configuration say where to start programs. The history knows where a run
    # is.
    hosts = choose_hosts(c, given, given.host or [fabrics_host(c)])
    if len(hosts) > 1:
        raise Misuse(f"an id belongs to one host, {_several(hosts)}", fate="NOT DONE")
    how = host_reach(c, given)
    if limit_s is not None:
        # A look that has its own limit must not spend more than that on being let in.
        how["connect_timeout"] = max(0.1, min(limit_s, how.get("connect_timeout", CONNECT_S)))
    there = agent_to_ask(hosts[0], **how) if hosts else None
    if there is not None and not given.dry:
        there.begin()  # the way there is made while the rest is imported
    from corra.runs import finding

    return finding.named_run(text, there, spool=given.spool, verb=given.verb, **how)


def find_one_run(c: Context, given: HostFlags, *, limit_s: float | None = None) -> Run:
    """Return the run that the only id means, without one the newest of mine."""
    if len(given.ids) > 1:
        raise Misuse(f"one id at a time: {' '.join(given.ids)}", fate="NOT DONE")
    return find_run(c, given, given.ids[0] if given.ids else None, limit_s=limit_s)


def to_kill(c: Context, given: KillFlags) -> list[tuple[Run, State | None]]:
    """Return the runs to stop, and the State of those that must be known first.

    Without ids or -a it raises Misuse, which lists what runs.
    """
    from corra.model import ids
    from corra.remote.targets import agent_for
    from corra.runs import finding, history
    from corra.runs.run import Run

    from .at_once import at_once

    if given.ids:
        return _each_found(c, given)
    hosts = told_hosts(c, given, fate=NotKilled.fate)
    if given.all and not hosts:
        raise Misuse(f"-a needs --host:  {typed()} kill -a --host HOST", fate="NOT KILLED")
    if not hosts:
        raise _which_of(history.recent_entries())
    open_: list[State] = []
    how = {**host_reach(c, given), "spool": given.spool}
    asked = at_once(
        given.screen,
        lambda host: finding.ps([host], states=("starting", "running"), **how),
        hosts,
        named=str,
    )
    for answer in (answer for each in asked for answer in each):
        if isinstance(answer, CorraError):
            raise _not_killed(answer)
        if not answer.ended:
            open_.append(answer)
    if not given.all:
        labels = [f"{ids.short(each.prog_id)} ({each.name or '-'})" for each in open_]
        verb = "runs" if len(labels) <= 1 else "run"
        where = f" {verb} on {', '.join(sorted({each.host for each in open_}) or hosts)}"
        choice = _fitting(labels, _CHOICE_WIDTH - len("say which: ") - len(where))
        raise Misuse(f"say which: {choice}{where}", fate="NOT KILLED")
    if not open_:
        given.screen.note("", ",".join(hosts), "nothing runs there")
    how = host_reach(c, given)
    return [
        (
            Run(agent_for(each.host, **how), each.prog_id, name=each.name, spool=given.spool),
            each,
        )
        for each in open_
    ]


def _which_of(entries: Sequence[Entry]) -> Misuse:
    """Return the refusal of a kill without an id and without a host: what ran when last seen."""
    import time

    from corra.model import ids
    from corra.model.units import duration

    open_ = [entry for entry in entries if entry.open]
    hint = [f"look: {typed()} ps"]
    if not open_:
        why = "say which: nothing ran when this machine last looked"
        return Misuse(why, fate="NOT KILLED", hint=hint)
    labels = [
        f"{ids.short(entry.prog_id)} ({entry.name or '-'} on {entry.host},"
        f" {duration(max(0.0, time.time() - entry.seen))} ago)"
        for entry in open_
    ]
    return Misuse(
        f"say which; ran when last seen: {_fitting(labels, 35)}", fate="NOT KILLED", hint=hint
    )


def _fitting(labels: Sequence[str], width: int) -> str:
    """Return as many of the labels as fit, at least one, and how many more there are."""
    text = "nothing"
    for shown in range(len(labels), 0, -1):
        more = f" and {len(labels) - shown} more" if len(labels) > shown else ""
        text = ", ".join(labels[:shown]) + more
        if len(text) <= width:
            break
    return text


def _each_found(c: Context, given: KillFlags) -> list[tuple[Run, State | None]]:
    """Return all runs that the ids mean. Raises for the first id that means none.

    A run that is stopped without a question is looked up by the stop itself.
    """
    texts = list(dict.fromkeys(given.ids))
    unasked = given.dry or (len(texts) == 1 and given.yes)
    found: list[tuple[Run, State | None]] = []
    for text in texts:
        label = ""
        try:
            run = find_run(c, given, text)
            label = run.label
            found.append((run, None if unasked else run.state()))
        except CorraError as error:
            raise _not_killed(error.but(label=error.label or label)) from error
    return found


def _not_killed(error: CorraError) -> CorraError:
    """Return `error` as the answer to a kill: who wasn't reached wasn't killed."""
    looked = error.fate in ("", "NOT STARTED", "NOT DONE")
    return error.but(fate=NotKilled.fate) if looked else error


def ask_first(given: KillFlags, runs: Sequence[tuple[Run, State | None]]) -> None:
    """Have a person say yes where the runs are another's or on several hosts.

    Raises NotKilled for a no, and where there is no terminal to ask at.
    """
    from corra.runs.asking import who_asks

    if given.yes or given.dry:
        return
    mine = who_asks()["user"]
    others = [
        (run, state)
        for run, state in runs
        if state and (state.origin or {}).get("user") not in (None, mine) and not state.ended
    ]
    hosts = {str(found.host) for found, _ in runs}
    if others:
        found, state = others[0]
        more = f", and {len(others) - 1} more of others" if len(others) > 1 else ""
        origin = state.origin or {}
        why = f"started by {origin.get('user')}@{origin.get('host')}{more}"
        label, host = state.label, str(found.host)
    elif given.all and len(hosts) > 1:
        why, label, host = f"{len(runs)} runs on {len(hosts)} hosts", "", ",".join(sorted(hosts))
    else:
        return
    if not given.screen.can_ask:
        raise NotKilled(f"{why}: add -y", label=label, host=host, hint=[f"{typed()} kill -y .."])
    if not given.screen.ask(label, host, f"{why}: stop it? [y/N] "):
        raise NotKilled("you said no", label=label, host=host)


def one_row_each(states: Sequence[State]) -> list[State]:
    """Return each run once: a host that is called by several names answers for each of them.

    The name is the one that most runs were started under, in the spelling that most were. Where a
    machine has several names, it is the name that the run itself was started under.
    """
    from corra.runs import history

    best: dict[tuple[str, str | None, str | None], State] = {}
    uses = _uses()
    began = {entry.prog_id: _bare_name(entry.host) for entry in history.recent_entries()}

    def worth(state: State) -> tuple[bool, int]:
        return began.get(state.prog_id) == _bare_name(state.host), uses[state.host]

    for state in states:
        key = (state.prog_id, state.boot_id, state.spool)
        known = best.setdefault(key, state)
        if worth(state) > worth(known):
            best[key] = state
    return list(best.values())


def one_line_each(errors: Sequence[CorraError], answered: AbstractSet[str]) -> list[CorraError]:
    """Return one error for each host that is down, under the name of most of its runs.

    `answered`: the hosts that aren't, as they are spelled.
    """
    up = {_bare_name(host) for host in answered}
    best: dict[tuple[str, str], CorraError] = {}
    uses = _uses()
    for error in errors:
        name = _bare_name(error.host)
        down = isinstance(error, Unreachable) and name not in up
        key = (name, "" if down else error.line)
        known = best.setdefault(key, error)
        if uses[error.host] > uses[known.host]:
            best[key] = error
    return list(best.values())


def _bare_name(host: str) -> str:
    """Return the name of a host without login and port."""
    from corra.model.host import Host

    return Host.parse(host).name


def _uses() -> Counter[str]:
    """Return how many runs were started under each spelling of a host."""
    from corra.runs import history

    return Counter(entry.host for entry in history.recent_entries())


def places(
    c: Context, given: HostFlags, verb: str, since_s: float
) -> list[tuple[str, dict[str, Any]]]:
    """Return each host to look at, and how it is reached.

    They are the hosts that were named, else those where something ran in the last `since_s`.
    """
    import time

    from corra.runs import history

    how = {**host_reach(c, given), "spool": given.spool}
    hosts = told_hosts(c, given)
    if hosts:
        return [(host, how) for host in dict.fromkeys(hosts)]
    known: dict[tuple[str, str | None, str | None], tuple[str, dict[str, Any]]] = {}
    for entry in history.recent_entries(500):
        if entry.open or entry.started > time.time() - since_s:
            there = {
                "as_user": _said(c, given)[1] or entry.as_user,
                "via": how.get("via") or entry.via,
                "spool": given.spool or entry.spool,
                "inventory": how.get("inventory") or entry.inventory,
            }
            known.setdefault(
                (entry.host, entry.as_user, entry.spool), (entry.host, {**how, **there})
            )
    if not known:
        raise Misuse(
            f"no host, and no history of any:  {typed()} {verb} --host HOST", fate="NOT DONE"
        )
    return list(known.values())[:_HISTORY_HOSTS]


def ended_runs(c: Context, given: GcFlags) -> list[Run]:
    """Return the runs that the ids mean.

    Raises CorraError for a run that isn't there, still runs or still has output to come, before
    anything is done to any.
    """
    from corra import render

    found = [find_run(c, given, text) for text in dict.fromkeys(given.ids)]
    for each in found:
        state = each.state()
        if not state.ended:
            raise CorraError(
                "it is still running", label=state.label, host=str(each.host), fate="NOT DONE"
            )
        if state.overdue:
            raise CorraError(
                render.trouble(state),
                label=state.label,
                host=str(each.host),
                fate="NOT DONE",
                hint=render.remedy(state, str(each.host)),
            )
    return found


def last_seen(error: CorraError, as_user: str | None, spool: str | None) -> CorraError:
    """Add what the history knows of a host that doesn't answer: of this user's runs there."""
    from datetime import datetime

    from corra import render
    from corra.model import ids
    from corra.model.words import now
    from corra.runs import history

    def when(entry: history.Entry) -> str:
        seen = datetime.fromtimestamp(entry.seen).astimezone().isoformat()
        return render.past_moment(seen, now())

    entries = [
        entry
        for entry in history.entries_on(error.host)
        if (entry.as_user, entry.spool) == (as_user, spool)
    ]
    if entries:
        latest = when(max(entries, key=lambda entry: entry.seen))
        running = [
            f"{ids.short(entry.prog_id)}{' ' + entry.name if entry.name else ''}"
            + (f" at {when(entry)}" if when(entry) != latest else "")
            for entry in entries
            if entry.open
        ]
        more = f", {len(running) - 3} more" if len(running) > 3 else ""
        seen = f"last seen {latest}" + (
            f" with {len(running)} running ({', '.join(running[:3])}{more})" if running else ""
        )
        return error.but(why=f"{error.why}; {seen}")
    return error


def is_listed(state: State, given: PsFlags) -> bool:
    """Return whether ps was asked for it: by its words, its state, its starter."""
    from corra import render
    from corra.model.program import command_text
    from corra.runs.asking import who_asks

    words = (state.prog_id, state.name or "", command_text(state.argv))
    return (
        (not given.grep or any(given.grep in each for each in words))
        and (not given.state or render.word(state).lower().startswith(given.state.lower()))
        and (not given.mine or (state.origin or {}).get("user") == who_asks()["user"])
    )


LATELY_S = 86400.0


def since(given: PsFlags) -> float | None:
    """Return how many seconds back an end counts, None for ever."""
    return LATELY_S if given.since is None and not (given.all or given.state) else given.since


def is_shown(state: State, given: PsFlags) -> bool:
    """Return whether a listed run is shown: it runs, or went wrong lately, or was asked for."""
    from corra import render

    if not state.ended:
        return True
    asked = bool(given.all or given.state) or not render.went_well(state)
    return asked and ended_lately(state, since(given))


def ended_lately(state: State, since_s: float | None) -> bool:
    """Return whether it ended no longer ago than `since_s`; one whose end is unknown counts."""
    from corra import render
    from corra.model.words import now

    ago = render.since(render.ended_at(state), now())
    return ago is None or since_s is None or ago <= since_s
