"""Finding a fleet again: in a journal, or from any one host that has a run of it.

A journal is a cache. The hosts have the Plan, the program and what became of each member, so a
machine that never heard of the fleet asks one host for the Plan and then all hosts for their runs.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

from corra.errors import Ambiguous, CorraError, NotFound, NotStarted, Unreachable, typed
from corra.model import ids
from corra.model.program import Request
from corra.model.rollout import Fact, What
from corra.model.state import State
from corra.remote.targets import agent_for
from corra.runbooks.journal import Journal
from corra.runbooks.ledgers import Here, Ledger, all_books
from corra.runs.asking import who_asks
from corra.runs.finding import list_runs
from corra.runs.run import AT_ONCE, Run
from corra.runs.stdin_file import shared_descriptor

from .board import fact_of, moment
from .claims import is_claim, why_claimed
from .events import WAY_TO_JOURNAL, Known, plans_of
from .plan import BOOK, Plan, host_of, program_digest

T = TypeVar("T")
R = TypeVar("R")

# A name is looked for in so many journals, the latest first: a journal is read whole.
NAMES_SOUGHT = 100


class Recorded(NamedTuple):
    """What a host's record says of a fleet: its plan, the program, and the program's stdin."""

    plan: Plan
    template: Request
    secrets: tuple[str, ...]
    stdin: bytes


def find_journal(text: str, where: Ledger, **reach: Any) -> Journal | None:
    """Return the journal of the fleet that `text` means there, read, or None.

    `text` is an id, the beginning of an id's tail, or a name, of which the latest counts. `reach`:
    the way to a journal that is kept elsewhere. Raises Ambiguous.
    """
    keys = [key for book, key, _ in all_books(where) if book == BOOK]
    found = [key for key in keys if key == text] or [
        key for key in keys if len(text) >= 2 and ids.tail(key).startswith(text)
    ]
    if len(found) > 1:
        shown = ", ".join(ids.short(key) for key in found[:5])
        raise Ambiguous(f"{len(found)} fleets: {shown}", label=text)
    if found:
        return _read(where, found[0], reach)
    for key in keys[:NAMES_SOUGHT]:
        journal = _read(where, key, reach)
        if any(plan.name == text for plan in plans_of(journal.book.events)):
            return journal
    return None


def _read(where: Ledger, key: str, reach: Mapping[str, Any]) -> Journal:
    journal = Journal(where, BOOK, key)
    journal.read()
    if (kept := journal.book.kept_at) is not None and isinstance(where, Here):
        from corra.runbooks.ledgers import ledger_on

        known = {name: kept.facts[name] for name in WAY_TO_JOURNAL if kept.facts.get(name)}
        there = Journal(ledger_on(str(kept.facts.get("journal")), **{**known, **reach}), BOOK, key)
        there.read()
        return there
    return journal


def find_on_host(text: str, host: str, *, spool: str | None = None, **reach: Any) -> Plan:
    """Return the Plan of the fleet that `text` means on a host. Raises NotFound, Ambiguous."""
    agent = agent_for(host, **reach)
    runs = [each for each in list_runs(agent, spool=spool) if (each.origin or {}).get("fleet")]
    found: dict[str, State] = {}
    for state in sorted(runs, key=lambda each: int(_attempt(each))):
        fleet = (state.origin or {})["fleet"]
        tail = len(text) >= 2 and ids.tail(fleet).startswith(text)
        if fleet == text or tail or state.name == text:
            found[fleet] = state
    if not found:
        raise NotFound(
            f"no fleet among the {len(runs)} runs of fleets there", label=text, host=host
        )
    if text in found:
        found = {text: found[text]}
    if len(found) > 1 and all(each.name == text for each in found.values()):
        found = dict([max(found.items())])  # of a name the latest counts
    if len(found) > 1:
        shown = ", ".join(ids.short(each) for each in list(found)[:5])
        raise Ambiguous(f"{len(found)} fleets: {shown}", label=text, host=host)
    state = next(iter(found.values()))
    return recorded(Run(agent, state.prog_id, spool=spool, seen=False)).plan


def _attempt(state: State) -> str:
    text = (state.origin or {}).get("attempt", "1")
    return text if text.isdecimal() else "1"


def recorded(run: Run) -> Recorded:
    """Return what the record of a member's run says. Raises CorraError."""
    record, stdin = run.record()
    facts: dict[str, Any] = {"host": str(run.host), "prog_id": run.id}
    try:
        plan = Plan.from_text(record.get("fleet") or "")
    except ValueError as error:
        raise NotFound(f"its record has no plan: {error}", **facts) from error
    names = filter(None, ((record.get("origin") or {}).get("secrets") or "").split(","))
    request = Request.from_record(
        record, plan.run_id(plan.members[0]), origin=who_asks(), spool=plan.spool
    )
    return Recorded(plan, request, tuple(names), stdin)


def template_of(
    found: Recorded, secrets: Mapping[str, str], plan: Plan
) -> tuple[Request, int | None]:
    """Return the request of further starts and the descriptor of their stdin.

    Raises NotStarted where a secret is missing, or the record is of another program.
    """
    from dataclasses import replace

    missing = sorted(set(found.secrets) - set(secrets))
    if missing:
        flags = " ".join(f"--secret {name}" for name in missing)
        raise NotStarted(
            f"nobody has kept its secret{'s' * (len(missing) != 1)} {', '.join(missing)}: "
            "what isn't started stays so",
            label=plan.label,
            hint=[f"give it again:  {typed()} attach {flags} {ids.short(plan.id)}"],
        )
    request = replace(
        found.template, secrets={name: secrets[name] for name in found.secrets}, name=plan.name
    )
    if program_digest(request) != plan.program:
        raise NotStarted("a host's record is of another program", label=plan.label)
    source = request.program.stdin
    if not (isinstance(source, Mapping) and "bytes" in source):
        return request, None
    if len(found.stdin) != source["bytes"]:
        raise NotStarted("what it read is gone from the host: use run", label=plan.label)
    return request, shared_descriptor(io.BytesIO(found.stdin))


def last_of(runs: Mapping[int, State]) -> tuple[int, State] | None:
    """Return the last attempt of a member and its State, None if it has no run."""
    return max(runs.items()) if runs else None


def in_parallel(do: Callable[[T], R], whom: Sequence[T], *, at_once: int | None = None) -> list[R]:
    """Return what `do` returns for each, some tens at a time."""
    if not whom:
        return []
    with ThreadPoolExecutor(min(at_once or AT_ONCE, len(whom))) as pool:
        return list(pool.map(do, whom))


def known_of_run(state: State, at: int, member: str) -> Known:
    """Return what a run's State says of a member; a stop may stand in the place of its run."""
    if not is_claim(state):
        return Known(fact_of(state, moment(), at), state)
    error = Unreachable(f"{why_claimed(state)} before its start", host=host_of(member))
    return Known(Fact(What.UNREACHED, at, moment()), error=error)


def known_from_hosts(
    plan: Plan, answers: Mapping[str, tuple[int, State] | CorraError | None]
) -> list[Known]:
    """Return what the hosts' answers say of this plan's attempt.

    Nothing is said of a host that didn't answer: a start finds out, and its id is started once.
    """
    found = []
    for at, member in enumerate(plan.members):
        answer = answers.get(member)
        if not isinstance(answer, tuple) or answer[0] != plan.attempt:
            continue
        state = answer[1]
        if is_claim(state):
            found.append(Known(Fact(What.STOPPED, at=moment(), why=why_claimed(state))))
        found.append(known_of_run(state, at, member))
    return found


def last_runs(
    plan: Plan, answers: Mapping[str, tuple[int, State] | CorraError | None]
) -> list[tuple[str, int]]:
    """Return (member, attempt) of each run that hosts have told of, stops left out."""
    return [
        (member, answer[0])
        for member in plan.all_members
        if isinstance(answer := answers.get(member), tuple) and not is_claim(answer[1])
    ]
