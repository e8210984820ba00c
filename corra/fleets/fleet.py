"""Fleets: one program on many hosts, with one id.

    import corra

    fleet = corra.fleet("web[1-50]", ["systemctl", "restart", "app"], batch="10%", max_fail=2)
    for event in fleet.follow():
        match event:
            case corra.Standing(what="failed", member=member, fate=fate): ...
    corra.attach_fleet(fleet.id, "web1").wait()      # from any other machine

A Fleet may be rolled from any machine, and several times. What it starts, each host starts once.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from corra.errors import Conflict, CorraError, Misuse, NotFound, NotStarted, StillRunning, typed
from corra.model import ids
from corra.model.frames import Output
from corra.model.program import Request, command_text
from corra.model.rollout import Tally, What
from corra.model.state import State, exit_code
from corra.model.units import chosen_time, in_seconds
from corra.remote.agent_client import Agent
from corra.remote.bootstrap import agent_digest
from corra.runbooks.journal import Journal
from corra.runbooks.ledgers import Here
from corra.runs.asking import asked_by
from corra.runs.patience import Patience
from corra.runs.request import Launch
from corra.runs.run import Run

from . import events as written, gather
from .board import Board, Member, fact_of_error, moment, today
from .claims import BY_KILL, claim, is_claim, runs_there
from .events import WAY, WAY_TO_JOURNAL, Known, known_of, plans_of
from .member import Orders
from .plan import BOOK, Plan, new_plan
from .result import FleetKilled, FleetResult, result_of_answers
from .roll import Roller, Way
from .rolling import Rolling
from .standing import FleetEvent, Wrote
from .told import Line
from .view import View
from .workers import Threads

if TYPE_CHECKING:
    from typing_extensions import Self

# So many hosts are asked for a record, should the first ones not answer.
RECORDS_SOUGHT = 5
# A member's last attempt is the one after which no other is there; a hostile host has all.
ATTEMPTS_MOST = 1000
# Whose host may have the program's record, the likeliest first.
_LIKELY = (What.STARTED, What.WELL, What.FAILED, What.LOST, What.MAYBE, What.BEGUN)

# What a host answers of a member: its last attempt and that run's State, None if it has no run.
Answer = tuple[int, State] | CorraError | None
Answers = Mapping[str, Answer]


class Fleet:
    """One fleet, new or found again. Its methods may be called by one thread at a time.

    Only `kill` and `halt` may be called while another thread rolls it.
    """

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

        `known`: what hosts have told; the journal's events come on top. `prepare` changes each
        Launch before its start.
        """
        self.plans = list(plans)
        self.journal = journal
        self._reach = _with_inventory(self.plans[-1], reach)
        self._template, self._payload = template, payload
        self._known = list(known)
        self._patience = patience or Patience()
        self._prepare = prepare

    def __repr__(self) -> str:
        return f"<Fleet {self.plan.label}: {len(self.plan.all_members)} hosts>"

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
    def name(self) -> str | None:
        return self.plan.name

    @property
    def label(self) -> str:
        return self.plan.label

    def learn(self, answers: Answers) -> None:
        """Take what the hosts have answered."""
        self._known += gather.known_from_hosts(self.plan, answers)

    def note_known(self) -> None:
        """Write what the hosts have told into the journal. Raises NoRoom, Unreachable."""
        events = [
            written.told(self.plan, self.plan.members[each.fact.member], each)
            for each in self._known
            if each.state is not None
        ]
        if self.journal is not None and events:
            self.journal.write_all(events)

    def known(self) -> list[Known]:
        """Return all that is known of the last attempt."""
        told = known_of(self.plan, self.journal.book.events) if self.journal is not None else ()
        return [*self._known, *told]

    def tally(self) -> Tally:
        return _tally(self.plan, self.known())

    def _last_known(self) -> dict[str, What]:
        """Return what the journal, and here the last answers, say of each member's last attempt."""
        found: dict[str, What] = {}
        events = self.journal.book.events if self.journal is not None else ()
        for plan in self.plans:
            tally = _tally(plan, known_of(plan, events) if plan is not self.plan else self.known())
            for at, member in enumerate(plan.members):
                if (what := tally.of(at)) is not None:
                    found[member] = what
        return found

    # -- Rolling
    def follow(
        self,
        *,
        starts: bool = True,
        stay: bool = True,
        output: bool = True,
        tail: int | None = None,
        take_over: bool = False,
        timeout: float | str | None = None,
        confirm: Callable[[str], bool] | None = None,
        secrets: Mapping[str, str] | None = None,
    ) -> Rolling:
        """Return the fleet's events to its end: each Standing that changes, what members write.

        What isn't started yet is started, as the plan says, unless another operator rolls the
        fleet (`take_over`: also then) or `starts` is false. `stay=False`: to the last start.
        `output=False`: without what they write. `tail`: so many last lines of what members wrote
        before. `confirm` is asked between waves, in a thread of its own; without it the roll ends
        there, and another one goes on. `secrets`: what a fleet that was found again still starts
        needs them. The end of `timeout` ends the events. Raises NotStarted, Conflict, Misuse.
        """
        if starts:
            self.prepare_start(stay=stay, secrets=secrets)
        return Rolling(
            lambda view: self.roller(
                view,
                tail=tail,
                shows=output,
                starts=starts,
                stay=stay,
                take_over=take_over,
                confirm=confirm,
                timeout_s=in_seconds(timeout),
                hired=lambda orders, sink, _: Threads(orders, sink),
            )
        )

    def roll(self, *, watch: Callable[[FleetEvent], None] | None = None, **how: Any) -> FleetResult:
        """Roll the fleet to its end, and return how it stands then, whatever the end.

        `watch` gets each event. `how` are the options of `follow`; output comes only to a `watch`.
        Raises StillRunning when `timeout` is over first, and what `follow` raises.
        """
        rolling = self.follow(**{"output": watch is not None, **how})
        for event in rolling:
            if watch is not None:
                watch(event)
        if rolling.way is Way.TIMED_OUT:
            waited = chosen_time(in_seconds(how["timeout"]) or 0.0)
            raise StillRunning(f"not over after {waited}: {rolling.result.why}", label=self.label)
        return rolling.result

    def wait(self, timeout: float | str | None = None) -> FleetResult:
        """Wait until all that was started is over. Starts nothing. Raises StillRunning."""
        return self.roll(starts=False, timeout=timeout)

    def prepare_start(self, *, stay: bool = True, secrets: Mapping[str, str] | None = None) -> None:
        """Have all that a start needs: the plan in the journal, and the program.

        Raises Conflict if the id is another fleet's, NotStarted where no host has the program or a
        secret is missing, Misuse.
        """
        if not stay and len(self.plan.waves) > 1:
            raise Misuse(
                "waves need somebody to stay, and -d leaves once all have started",
                hint=[
                    f"stay on a machine that stays up:  {typed()} run -d --host ops1 -- corra .."
                ],
                fate="NOT STARTED",
            )
        if self._template is None and self.tally().count(None, What.BEGUN):
            self.learn_program(secrets)
        self.begin()

    def begin(self) -> None:
        """Write the plans into the journal, before anything is started.

        Raises Conflict if the id is that of another fleet.
        """
        if self.journal is None:
            return
        self.journal.read()
        there = {plan.attempt: plan for plan in plans_of(self.journal.book.events)}
        if (same := there.get(self.plan.attempt)) is not None:
            if replace(same, by="", at="", agent="") != replace(self.plan, by="", at="", agent=""):
                raise Conflict(
                    "this id already names another fleet",
                    label=self.plan.label,
                    hint=[f"look: {typed()} status {ids.short(self.id)}"],
                )
            self.plans[-1] = same
        new = [plan for plan in self.plans if plan.attempt not in there]
        if not new:
            return
        events: list[tuple[str, dict[str, Any]]] = []
        if not there:
            argv = self._template.program.argv if self._template is not None else ()
            params = {
                "hosts": len(self.plan.members),
                "command": command_text(argv) if argv else "",
            }
            events.append(("open", {"params": params}))
        events += [("plan", {"plan": plan.to_text(), **self._way(WAY)}) for plan in new]
        self.journal.write_all(events)
        self._point()

    def _way(self, names: Iterable[str]) -> dict[str, str]:
        """Return those of `names` that say how the hosts are reached."""
        return {name: self._reach[name] for name in names if self._reach.get(name)}

    def _point(self) -> None:
        """Remember here where the journal is, so that the fleet is found by its id."""
        assert self.journal is not None
        if not isinstance(self.journal.where, Here):
            here = Journal(Here(), BOOK, self.id)
            here.write("kept", journal=str(self.journal.where.host), **self._way(WAY_TO_JOURNAL))

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

    # -- Once more
    def again(
        self,
        *,
        only: str | None = None,
        redo: Iterable[str] = (),
        secrets: Mapping[str, str] | None = None,
        batch: int | str | Sequence[int | str] = (),
        at_once: int | None = None,
        max_fail: int | str | None = None,
        max_unreached: int | str | None = None,
        pause: float | str | None = None,
        confirm: bool = False,
        kill_on_fail: bool = False,
        start_timeout: float | str | None = None,
    ) -> Plan | None:
        """Plan a further attempt, which the next roll starts; None if nothing is to be repeated.

        It has what failed, was unreached or was never started, and hasn't ended well since then;
        `only` one of "failed", "unreached", "not-started". What is lost is left out, unless `redo`
        names it. A host that doesn't answer now is asked again before its start: what goes on
        there, or has ended well, isn't started. The other options replace the last plan's. Raises
        Misuse, NotStarted.
        """
        answers = self.ask()
        plan = self.next_attempt(
            answers,
            only=only,
            redo=redo,
            batch=[batch] if isinstance(batch, (int, str)) else list(batch),
            at_once=at_once,
            max_fail=max_fail,
            max_unreached=max_unreached,
            pause_s=in_seconds(pause),
            confirm=confirm,
            kill_on_fail=kill_on_fail,
            start_s=in_seconds(start_timeout),
        )
        if plan is not None:
            self.take_attempt(plan, answers, secrets)
        return plan

    def next_attempt(
        self,
        answers: Answers,
        *,
        only: str | None = None,
        redo: Iterable[str] = (),
        batch: Sequence[int | str] = (),
        **how: Any,
    ) -> Plan | None:
        """Return the plan of `again`, of what the hosts have answered. Raises Misuse."""
        old = self.plan
        again = set(redo)
        if unknown := sorted(again - set(old.all_members)):
            raise Misuse(f"not among its hosts: {', '.join(unknown)}", fate="NOT STARTED")
        known = self._last_known()
        chosen = []
        for member in old.all_members:
            kind = _kind_of(answers.get(member), known.get(member))
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
            agent=agent_digest(),
            as_user=old.as_user,
            spool=old.spool,
            inventory=old.inventory,
            attempt=max([old.attempt, *attempts]) + 1,
            whole=old.all_members,
            redo=tuple(member for member in chosen if member in again),
            by=asked_by(),
            at=today(),
            **{**kept, **given},
        )

    def take_attempt(
        self,
        plan: Plan,
        answers: Answers,
        secrets: Mapping[str, str] | None = None,
        prepare: Callable[[Launch], Launch] | None = None,
    ) -> None:
        """Add a further attempt, which the next roll starts. Raises NotStarted.

        `prepare` changes each Launch before its start.
        """
        if self._template is None:
            found = gather.last_runs(self.plan, answers)
            self._template, self._payload = self._program_of(found, plan, secrets or {})
        self.plans.append(plan)
        self._known, self._prepare = [], prepare

    def learn_program(self, secrets: Mapping[str, str] | None = None) -> None:
        """Learn from a host's record what further starts are made of.

        Raises NotStarted where no host has it, or a secret is missing.
        """
        if self._template is not None:
            return
        if not self.tally().count(*_LIKELY):
            self.learn(self.ask())  # others may have started what this journal doesn't know
        tally = self.tally()
        reached = [(self.plan.members[at], None) for what in _LIKELY for at in tally.of_kind(what)]
        self._template, self._payload = self._program_of(reached, self.plan, secrets or {})

    def _program_of(
        self, runs: Iterable[tuple[str, int | None]], plan: Plan, secrets: Mapping[str, str]
    ) -> tuple[Request, int | None]:
        """Return the program as the record of one of these runs (member, attempt) has it."""
        error: CorraError | None = None
        for member, attempt in list(runs)[:RECORDS_SOUGHT]:
            run = self.run_of(member, attempt)
            try:
                found = gather.recorded(run)
            except NotFound:
                continue
            except CorraError as failure:
                error = failure
                continue
            finally:
                run.agent.close()
            return gather.template_of(found, secrets, plan)
        raise error or NotStarted(
            "no host has its program, so nothing was started anywhere: use run",
            label=self.plan.label,
        )

    # -- What isn't a roll
    def run_of(self, member: str, attempt: int | None = None, *, agent: Agent | None = None) -> Run:
        """Return the run of a member, of the last attempt or of another; it may not be there."""
        return Run(
            agent or self.orders().agent(member),
            self.plan.run_id(member, attempt),
            name=self.plan.name,
            spool=self.plan.spool,
            via=self._reach.get("via"),
            seen=False,
        )

    def way_to(self, member: str) -> str:
        """Return the flags by which any machine finds the fleet on a member's host."""
        return self.run_of(member).reached

    def ask(self) -> dict[str, Answer]:
        """Ask all hosts for their runs of this fleet; return each member's last one.

        An attempt that another machine has begun, and this journal doesn't know, is taken over.
        """

        def ask_one(member: str) -> Answer:
            try:
                with contextlib.closing(self.orders().agent(member)) as agent:
                    return gather.last_of(self._runs(member, agent))
            except CorraError as error:
                return error

        members = self.plan.all_members
        answers = dict(zip(members, gather.in_parallel(ask_one, members), strict=True))
        self._adopt({m: each[0] for m, each in answers.items() if isinstance(each, tuple)})
        return answers

    def _adopt(self, attempts: Mapping[str, int]) -> bool:
        """Take over a newer attempt than ours, by the members that have it. Return whether so."""
        newer = [member for member, attempt in attempts.items() if attempt > self.plan.attempt]
        for member in sorted(newer, key=lambda each: -attempts[each])[:RECORDS_SOUGHT]:
            run = self.run_of(member, attempts[member])
            with contextlib.suppress(CorraError), contextlib.closing(run.agent):
                plan = gather.recorded(run).plan
                if plan.id == self.id and plan.attempt > self.plan.attempt:
                    self.plans.append(plan)
                    self._known = []
                    return True
        return False

    def state(self) -> FleetResult:
        """Ask all hosts, and return how the fleet stands: each member's last attempt."""
        answers = self.ask()
        board = self.board(answers)
        errors = {name: each for name, each in answers.items() if isinstance(each, CorraError)}
        return result_of_answers(board, errors)

    def board(self, answers: Answers) -> Board:
        """Return a Board of all members, each with its last attempt as its host has answered."""
        members = self.plan.all_members
        whole = replace(self.plan, members=members, whole=(), waves=(len(members),), canary=())
        board = Board(whole)
        for member in board.members:
            answer = answers.get(member.name)
            if isinstance(answer, CorraError):
                board.take(fact_of_error(answer, moment(), member.at))
                member.error = answer
            elif answer is not None:
                attempt, state = answer
                known = gather.known_of_run(state, member.at, member.name)
                board.take(known.fact)
                member.attempt, member.prog_id = attempt, state.prog_id
                member.state, member.error = known.state, known.error
        return board

    def logs(
        self,
        *,
        tail: int | None = None,
        since_ns: int | None = None,
        streams: Sequence[str] | None = None,
        live: bool = False,
        answers: Answers | None = None,
    ) -> Iterator[Wrote | CorraError]:
        """Yield what the members have written in their last attempts, and with `live` what comes.

        An error stands in the place of what a host that doesn't answer has. `tail`: so many last
        lines of each member. `streams`: of "stdout", "stderr" and "output". `answers`: what the
        hosts have told already.
        """
        asked = self.ask() if answers is None else answers
        line: Line[Wrote | CorraError] = Line()
        runs = []
        for member, answer in asked.items():
            if isinstance(answer, CorraError):
                line.put(answer)
            elif answer is not None and not is_claim(answer[1]):
                runs.append((member, answer[0]))

        def read(whose: tuple[str, int]) -> None:
            member, attempt = whose
            run = self.run_of(member, attempt)
            follow = run.follow(
                tail=tail,
                since_ns=since_ns,
                streams=streams,
                live=live,
                patience=self._patience,
            )
            follows.append(follow)
            try:
                for event in follow if not line.closed else ():
                    if isinstance(event, Output):
                        wrote = Wrote(member, run.id, event.stream, event.offset, event.data)
                        line.put(wrote, len(event.data))
            except CorraError as error:
                line.put(error)
            finally:
                run.agent.close()

        follows: list[Any] = []

        def read_all() -> None:
            # Who waits for what comes waits for all of them; else some tens at a time are read.
            gather.in_parallel(read, runs, at_once=len(runs) if live else None)
            line.finish()

        threading.Thread(target=read_all, name="logs", daemon=True).start()
        try:
            while (item := line.take()) is not None:
                yield item
        finally:
            line.close()
            for each in follows:
                each.close()

    # -- Stopping it
    def halt(self) -> None:
        """Note in the journal that nothing is to be started any more."""
        if self.journal is not None:
            self.journal.write("halt", attempt=self.plan.attempt)

    def kill(self, *, grace: float | str | None = None) -> FleetKilled:
        """Stop the fleet: what runs is ended, and what isn't started never will be.

        `grace` is from the stop signal to KILL; 0 kills at once. Nothing is raised for a host that
        can't be asked: its error is in the answer.
        """
        self.halt()
        return self._stop(lambda run: run.kill(grace=grace), claims=True)

    def signal(self, name: str | int) -> FleetKilled:
        """Send one signal to what runs, and nothing after it."""
        return self._stop(lambda run: run.signal(name), claims=False)

    def open_members(self) -> list[str]:
        """Return the members that may run, or be started, as far as is known without asking."""
        known = self._last_known()
        over = (What.WELL, What.FAILED, What.LOST)
        return [each for each in self.plan.all_members if known.get(each) not in over]

    def _stop(self, end: Callable[[Run], object], *, claims: bool) -> FleetKilled:
        """Stop all members that may run or be started, whatever attempt they are of."""
        answers: dict[str, bool | CorraError | None] = {}
        while True:
            members, attempts = self.open_members(), dict[str, int]()

            def stop(member: str) -> bool | CorraError | None:
                try:
                    return self._stop_member(member, end, attempts, claims=claims)  # noqa: B023
                except CorraError as error:
                    return error

            told = dict(zip(members, gather.in_parallel(stop, members), strict=True))
            answers |= {m: each for m, each in told.items() if answers.get(m) is not True}
            if not self._adopt(attempts):
                break  # else another machine has begun that attempt, and may go on with it
        return FleetKilled(
            tuple(member for member, answer in answers.items() if answer is True),
            tuple(member for member, answer in answers.items() if answer is False and claims),
            {m: answer for m, answer in answers.items() if isinstance(answer, CorraError)},
        )

    def _stop_member(
        self,
        member: str,
        end: Callable[[Run], object],
        attempts: dict[str, int],
        *,
        claims: bool,
    ) -> bool | None:
        """Stop a member: `end` its run, or see to it that nobody can start it any more.

        Returns whether there was a run; None if it had ended, or has no part in the last attempt. A
        host starts an id once. So a run of no program under the member's id is a stop that holds
        for every roller, also for one that shares no journal with us. A member that `again` left
        out may still run of an earlier attempt. Raises CorraError where the host can't be asked.
        """
        with contextlib.closing(self.orders().agent(member)) as agent:
            mine = member in self.plan.members
            claimed = (
                mine
                and claims
                and claim(self.plan, member, self.plan.attempt, agent, self._patience, why=BY_KILL)
            )
            runs = self._runs(member, agent)
            attempts[member] = max(runs, default=0)
            going = [attempt for attempt, state in runs.items() if not state.ended]
            for attempt in going:
                end(self.run_of(member, attempt, agent=agent))
            if going:
                return True
            return False if claimed or (mine and self.plan.attempt not in runs) else None

    def _runs(self, member: str, agent: Agent) -> dict[int, State]:
        """Return the State of a member's run of each attempt. Raises CorraError."""
        # Attempts that another machine has begun since then follow on the plan's.
        return runs_there(self.plan, member, agent, range(1, ATTEMPTS_MOST))

    def kill_members(self, members: Sequence[Member]) -> None:
        """Stop the runs of these members; what can't be reached is left out."""

        def end(member: Member) -> None:
            run = self.run_of(member.name, member.attempt)
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


def _tally(plan: Plan, known: Iterable[Known]) -> Tally:
    tally = Tally(plan.rules)
    for each in known:
        tally.add(each.fact)
    return tally


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


def _kind_of(answer: Answer, known: What | None) -> str | None:
    """Return what `again` calls a member: failed, unreached, not-started; None for all else.

    `known` is what the journal has. It counts where the host doesn't answer.
    """
    if isinstance(answer, CorraError):
        kinds = {What.WELL: None, What.LOST: None, What.FAILED: "failed"}
        return kinds.get(known, "unreached") if known is not None else "unreached"
    if answer is None:
        return "unreached" if known is What.UNREACHED else "not-started"
    state = answer[1]
    if not state.ended or state.state == "lost":
        return None
    if is_claim(state):
        return "not-started"
    return None if exit_code(state) == 0 else "failed"
