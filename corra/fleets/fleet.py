"""Fleets: one program on many hosts, with one id.

A Fleet may be rolled from any machine. What it starts, each host starts once.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from corra.errors import Conflict, CorraError, Misuse, NotFound, NotStarted, typed
from corra.inventory.groups import each_host
from corra.model import ids
from corra.model.host import Host
from corra.model.program import OPEN, Request, command_text
from corra.model.rollout import Tally, What
from corra.model.state import State, exit_code
from corra.model.units import in_seconds
from corra.on_host import ledger
from corra.remote.agent_client import Agent
from corra.remote.bootstrap import agent_source
from corra.remote.targets import Reach
from corra.runbooks.journal import Journal
from corra.runbooks.ledgers import Here, ledger_on
from corra.runs import request
from corra.runs.asking import asked_by, who_asks
from corra.runs.patience import Patience
from corra.runs.request import Launch
from corra.runs.run import Run
from corra.runs.stdin_file import shared_descriptor

from . import gather
from .board import Member
from .events import Known, known_of, plans_of
from .member import HALTED, Orders
from .plan import AT_ONCE, BOOK, START_S, Plan, host_of, members_of, new_plan, program_digest
from .roll import Roller
from .view import View

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

_REACH = tuple(Reach.__annotations__)

# A run of these words stands where an operator's stop came before a member's start. No PATH has
# such a program, so it ends as not started, and its id can never be started again.
HALTED_WORDS = ("stopped before its start",)
# So many hosts are asked for a record, should the first ones not answer.
RECORDS_SOUGHT = 5


class Fleet:
    """One fleet, new or found again. Its methods may be called by one thread at a time."""

    def __init__(
        self,
        plans: Sequence[Plan],
        *,
        reach: Mapping[str, Any],
        journal: Journal | None = None,
        template: Request | None = None,
        payload: int | None = None,
        known: Sequence[Known] = (),
        patience: Patience | None = None,
        prepare: Callable[[Launch], Launch] | None = None,
    ) -> None:
        """`plans`: one for each attempt. `template`: what a start is made of, where that is known.

        `known`: what hosts have told; the journal's events come on top.
        """
        self.plans = list(plans)
        self.journal = journal
        self._reach = _with_inventory(self.plans[-1], reach)
        self._template, self._payload = template, payload
        self._known = list(known)
        self._patience = patience or Patience()
        self._prepare = prepare

    def __repr__(self) -> str:
        return f"<Fleet {self.plan.label}: {len(self.plan.members)} hosts>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def plan(self) -> Plan:
        """The plan of the last attempt."""
        return self.plans[-1]

    @property
    def id(self) -> str:
        return self.plan.id

    @property
    def fresh(self) -> bool:
        """Whether no journal has this attempt yet."""
        return self.journal is None or self.plan.attempt not in {
            plan.attempt for plan in plans_of(self.journal.book.events)
        }

    def learned(self, known: Iterable[Known]) -> None:
        """Take what hosts have told."""
        self._known += known

    def known(self) -> list[Known]:
        """Return all that is known of the last attempt."""
        told = known_of(self.plan, self.journal.book.events) if self.journal is not None else ()
        return [*self._known, *told]

    def tally(self) -> Tally:
        tally = Tally(self.plan.rules)
        for known in self.known():
            tally.add(known.fact)
        return tally

    # -- Rolling
    def begin(self) -> None:
        """Write the plan into the journal, before anything is started.

        Raises Conflict if the id is that of another fleet.
        """
        if self.journal is None:
            return
        self.journal.read()
        plans = plans_of(self.journal.book.events)
        same = next((each for each in plans if each.attempt == self.plan.attempt), None)
        if same is not None:
            if replace(same, by="", at="", agent="") != replace(self.plan, by="", at="", agent=""):
                raise Conflict(
                    "this id already names another fleet",
                    label=self.plan.label,
                    hint=[f"look: {typed()} status {ids.short(self.id)}"],
                )
            self.plans[-1] = same
            return
        argv = self._template.program.argv if self._template is not None else ()
        params = {"hosts": len(self.plan.members), "command": command_text(argv) if argv else ""}
        self.journal.write_all(
            [("open", {"params": params}), ("plan", {"plan": self.plan.to_text()})]
        )
        self._point()

    def _point(self) -> None:
        """Remember here where the journal is, so that the fleet is found by its id."""
        assert self.journal is not None
        if not isinstance(self.journal.where, Here):
            here = Journal(Here(), BOOK, self.id)
            how = {name: self._reach[name] for name in gather.KEPT if self._reach.get(name)}
            here.write("kept", journal=str(self.journal.where.host), **how)

    def orders(self, *, tail: int | None = None, shows: bool = True, folds: bool = False) -> Orders:
        return Orders(
            self.plan,
            self._template,
            self._payload,
            self._reach,
            self._patience,
            self.journal.pass_id if self.journal is not None else "",
            tail,
            shows,
            self._prepare,
            folds,
        )

    def roller(
        self,
        view: View,
        *,
        tail: int | None = None,
        shows: bool = True,
        folds: bool = False,
        **how: Any,
    ) -> Roller:
        """Return the Roller of the last attempt. `how` are options of Roller."""
        starts = how.pop("starts", True) and self._template is not None
        return Roller(
            self.orders(tail=tail, shows=shows, folds=folds),
            view,
            journal=self.journal,
            known=self._known,
            starts=starts,
            kill=self.kill_members,
            **how,
        )

    def learn_program(self, secrets: Mapping[str, str] | None = None) -> None:
        """Learn from a host's record what further starts are made of.

        Raises NotStarted where no host has it, or a secret is missing.
        """
        if self._template is not None:
            return
        tally = self.tally()
        likely = (What.STARTED, What.WELL, What.FAILED, What.LOST, What.MAYBE, What.BEGUN)
        reached = [at for what in likely for at in tally.of_kind(what)]
        error: CorraError | None = None
        for at in reached[:RECORDS_SOUGHT]:
            run = self.run_of(self.plan.members[at])
            try:
                found = gather.recorded(run)
            except NotFound:
                continue
            except CorraError as failure:
                error = failure
                continue
            finally:
                run.agent.close()
            self._template, self._payload = gather.template_of(found, secrets or {}, self.plan)
            return
        raise error or NotStarted(
            "no host has its program, so nothing was started anywhere: use run",
            label=self.plan.label,
        )

    def next_attempt(
        self,
        answers: Mapping[str, tuple[int, State] | CorraError | None],
        *,
        only: str | None = None,
        redo: Iterable[str] = (),
        batch: Sequence[int | str] = (),
        **how: Any,
    ) -> Plan | None:
        """Return the plan that starts once more what failed, was unreached or wasn't started.

        What has ended well since then is left out, and so is what is lost, unless `redo` names it.
        None if there is nothing to do. `how` are other options of `new_plan`. Raises Misuse.
        """
        old = self.plan
        again = set(redo)
        if unknown := sorted(again - set(old.all_members)):
            raise Misuse(f"not among its hosts: {', '.join(unknown)}", fate="NOT STARTED")
        unreached = {
            old.members[known.fact.member]
            for known in self.known()
            if known.fact.what is What.UNREACHED
        }
        chosen = []
        for member in old.all_members:
            kind = _kind_of(answers.get(member), member in unreached)
            if (kind is not None and only in (None, kind)) or member in again:
                chosen.append(member)
        if not chosen:
            return None
        attempts = [each[0] for each in answers.values() if isinstance(each, tuple)]
        waves = old.waves[1:] if old.canary and len(old.waves) > 1 else old.waves
        sizes = list(batch) or ([max(waves)] if len(old.waves) > 1 else [])
        kept = {
            "at_once": old.at_once,
            "max_fail": old.max_fail,
            "max_unreached": old.max_unreached,
            "pause_s": old.pause_s,
            "confirm": old.confirm,
            "kill_on_fail": old.kill_on_fail,
            "start_s": old.start_s,
        }
        given = {name: value for name, value in how.items() if value not in (None, False)}
        return new_plan(
            chosen,
            id=old.id,
            batch=sizes,
            name=old.name,
            program=old.program,
            agent=_agent_digest(),
            as_user=old.as_user,
            spool=old.spool,
            inventory=old.inventory,
            attempt=max([old.attempt, *attempts]) + 1,
            whole=old.all_members,
            by=asked_by(),
            at=_now(),
            **{**kept, **given},
        )

    def at_attempt(self, plan: Plan, prepare: Callable[[Launch], Launch] | None = None) -> Fleet:
        """Return this fleet with a further attempt. Its program is known already.

        `prepare` changes each Launch before its start.
        """
        return Fleet(
            [*self.plans, plan],
            reach=self._reach,
            journal=self.journal,
            template=self._template,
            payload=self._payload,
            patience=self._patience,
            prepare=prepare,
        )

    # -- What isn't a roll
    def run_of(self, member: str, attempt: int | None = None) -> Run:
        """Return the run of a member, which may not be there."""
        run_id = self.plan.run_id(member, attempt)
        via = self._reach.get("via")
        agent = self._agent(member)
        return Run(agent, run_id, name=self.plan.name, spool=self.plan.spool, via=via, seen=False)

    def _agent(self, member: str) -> Agent:
        return self.orders().agent(member)

    def ask(self) -> dict[str, tuple[int, State] | CorraError | None]:
        """Ask all hosts for their runs of this fleet; return each member's last one."""
        return gather.ask_all(self.plan, self.run_of, self.plan.all_members)

    def halt(self) -> None:
        """Note in the journal that nothing is to be started any more."""
        if self.journal is not None:
            self.journal.write("halt", attempt=self.plan.attempt)

    def stop_member(
        self, member: str, end: Callable[[Run], None], *, claims: bool = True
    ) -> bool | None:
        """Stop a member: `end` its run, or see to it that nobody can start it any more.

        Returns whether there was a run; None if it had ended. A host starts an id once. So a run of
        no program under the member's id is a stop that holds for every roller, also for one that
        shares no journal with us. Raises CorraError where the host can't be asked.
        """
        run = self.run_of(member)
        try:
            if claims and self._claim(member, run.agent):
                return False
            state = run.state()
            if state.ended:
                return None
            end(run)
            return True
        finally:
            run.agent.close()

    def _claim(self, member: str, agent: Agent) -> bool:
        """Take a member's id, if no run has it. Return whether that was so."""
        launch = request.launch(
            agent,
            HALTED_WORDS,
            id=self.plan.run_id(member),
            name=self.plan.name,
            spool=self.plan.spool,
            cwd="/",
            origin={
                **who_asks(),
                "fleet": self.plan.id,
                "attempt": str(self.plan.attempt),
                HALTED: "1",
            },
        )
        marked = launch._replace(request=replace(launch.request, fleet=self.plan.to_text()))
        try:
            for _ in marked.follow(self._patience, stay=False):
                pass
        except Conflict:
            return False
        return True

    def kill_members(self, members: Sequence[Member]) -> None:
        """Stop the runs of these members; what can't be reached is left out."""

        def end(member: Member) -> None:
            run = self.run_of(member.name)
            with contextlib.suppress(CorraError):
                run.kill()
            run.agent.close()

        gather.in_parallel(end, list(members))

    def close(self) -> None:
        """Let go of the journal and of the stdin that is kept for further starts."""
        if self.journal is not None:
            self.journal.close()
        if self._payload is not None:
            os.close(self._payload)
            self._payload = None


def new_fleet(
    members: Sequence[str],
    argv: Sequence[str],
    *,
    id: str | None = None,  # noqa: A002 - run's own word
    batch: int | str | Sequence[int | str] | None = None,
    at_once: int | None = None,
    max_fail: int | str | None = None,
    max_unreached: int | str | None = None,
    pause: float | str | None = None,
    confirm: bool = False,
    order: str | None = None,
    canary: Sequence[str] = (),
    kill_on_fail: bool = False,
    start_timeout: float | str | None = None,
    journal: Any = None,
    patience: Patience | None = None,
    prepare: Callable[[Launch], Launch] | None = None,
    **options: Any,
) -> Fleet:
    """Return a new Fleet; nothing is started and nobody is asked.

    `batch` are sizes of waves: 5, "10%", or several. `prepare` changes each Launch before its
    start. `options` are those of a start. Raises Misuse.
    """
    request.refuse_unknown("fleet", options, request.StartOptions)
    if options.get("stdin") is OPEN:
        raise Misuse("a fleet's stdin can't be held open: give it whole, with --stdin")
    fleet_id = request.new_run_id(id)
    how = {name: value for name, value in options.items() if name not in _REACH}
    reach = {name: options[name] for name in _REACH if name in options}
    # A host that is none: the template is for all of them, and `local` would fill in a directory.
    launch = request.launch(Host("fleet"), argv, id=fleet_id, **how)
    sizes = [batch] if isinstance(batch, (int, str)) else list(batch or ())
    plan = new_plan(
        members,
        id=fleet_id,
        batch=sizes,
        at_once=at_once or AT_ONCE,
        max_fail=max_fail,
        max_unreached=max_unreached,
        pause_s=in_seconds(pause) or 0.0,
        confirm=confirm,
        order=order or "given",
        canary=canary,
        kill_on_fail=kill_on_fail,
        start_s=in_seconds(start_timeout) or START_S,
        name=options.get("name"),
        program=program_digest(launch.request),
        agent=_agent_digest(),
        as_user=options.get("as_user"),
        spool=options.get("spool"),
        inventory=_inventory_of(members, options.get("inventory")),
        by=asked_by(),
        at=_now(),
    )
    plan.to_text()  # too large a plan is refused here
    where = ledger_on(journal, **{k: v for k, v in reach.items() if k != "as_user"})
    payload = None if launch.payload is None else shared_descriptor(launch.payload)
    return Fleet(
        [plan],
        reach=reach,
        journal=Journal(where, BOOK, fleet_id),
        template=launch.request,
        payload=payload,
        patience=patience,
        prepare=prepare,
    )


def _inventory_of(members: Iterable[str], inventory: str | None) -> str | None:
    """Return the inventory's path if it says where any of the members is. Raises Misuse."""
    if inventory is None:
        return None
    from corra.inventory.reading import inventory_at

    found = inventory_at(inventory)
    addresses = [found.address(host_of(member)) for member in members]
    return found.source if any(addresses) else None


def _with_inventory(plan: Plan, reach: Mapping[str, Any]) -> dict[str, Any]:
    """Return `reach` with the inventory that the plan's names are of.

    Raises Misuse where it isn't here: a name without it may be another machine's.
    """
    if plan.inventory is None or reach.get("inventory") is not None:
        return dict(reach)
    if not os.path.exists(plan.inventory):
        raise Misuse(
            f"its hosts are names of the inventory {plan.inventory} of {plan.by}, which isn't"
            " here: say --inventory FILE",
            label=plan.label,
            fate="NOT DONE",
        )
    return {**reach, "inventory": plan.inventory}


def _agent_digest() -> str:
    import hashlib

    return hashlib.sha256(agent_source()).hexdigest()


def _now() -> str:
    from datetime import datetime, timezone

    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _kind_of(answer: tuple[int, State] | CorraError | None, unreached: bool) -> str | None:
    """Return what `again` calls a member: failed, unreached, not-started; None for all else."""
    if isinstance(answer, CorraError):
        return "unreached"
    if answer is None:
        return "unreached" if unreached else "not-started"
    state = answer[1]
    if not state.ended or state.state == "lost":
        return None
    if (state.origin or {}).get(HALTED):
        return "not-started"
    return None if exit_code(state) == 0 else "failed"


def find_fleet(
    text: str,
    *,
    host: Any = None,
    journal: Any = None,
    spool: str | None = None,
    patience: Patience | None = None,
    **reach: Unpack[Reach],
) -> Fleet | None:
    """Return the fleet that `text` means: an id, the beginning of its tail, or a name.

    It is found in the journal, here or on the host `journal`, and else on a `host` that has a run
    of it; then all of its hosts are asked. None where the journal doesn't have it and no `host` is
    given. Raises NotFound, Ambiguous, Unreachable.
    """
    way = dict(reach)
    there = {name: value for name, value in way.items() if name != "as_user"}
    where, found = ledger_on(journal, **there), None
    if journal is not None or journals_here():
        found = gather.find_journal(text, where, **there)
    if found is not None and (plans := plans_of(found.book.events)):
        return Fleet(plans, reach=way, journal=found, patience=patience)
    if host is None:
        return None
    plan = gather.find_on_host(text, host, spool=spool, **way)
    kept = Journal(where, BOOK, plan.id)
    kept.read()
    fleet = Fleet([plan], reach=way, journal=kept, patience=patience)
    answers = fleet.ask()
    newest = max((each[0] for each in answers.values() if isinstance(each, tuple)), default=1)
    if newest > plan.attempt:
        member = next(
            m for m, each in answers.items() if isinstance(each, tuple) and each[0] == newest
        )
        fleet.plans.append(gather.recorded(fleet.run_of(member, newest)).plan)
    fleet.learned(gather.known_from_hosts(fleet.plan, answers))
    return fleet


def journals_here() -> bool:
    """Return whether this machine has any fleet's journal. Costs next to nothing."""
    roots = ledger.roots()  # type: ignore[no-untyped-call] # it runs on 3.6 as well
    return any(os.path.isdir(os.path.join(root, BOOK)) for root in roots)


def fleet(
    hosts: str | Iterable[str], argv: Sequence[str], *, each: bool = False, **how: Any
) -> Fleet:
    """Return a new Fleet of `argv` on all hosts; nothing is started before its `roll`.

    `hosts` is a set (`web[1-50]`) or names; with `each`, a host that comes twice has two runs.
    `how`: batch, at_once, max_fail, max_unreached, pause, confirm, order, canary, kill_on_fail,
    start_timeout, journal, and the options of `start`. Raises Misuse.
    """
    names = each_host(
        hosts if isinstance(hosts, str) else [str(host) for host in hosts],
        how.get("config"),
        how.get("inventory"),
    )
    return new_fleet(members_of(names if each else dict.fromkeys(names)), argv, **how)
