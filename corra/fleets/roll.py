"""The roller: it has the journal, the members and the view, and does what `decide` says.

All that it decides by is in the Tally. The Tally is made of facts, and each fact comes from a host,
from the journal or from the clock. So a roller may die at any moment, and the next one, on any
machine, gathers the facts and goes on.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

from corra import render
from corra.errors import CorraError, NoRoom, NotFound, Unreachable
from corra.model.rollout import Done, Fact, Starts, Stop, Tally, Wait, What
from corra.model.state import State
from corra.remote.bootstrap import agent_digest
from corra.runbooks.journal import Journal
from corra.runs import history
from corra.runs.asking import asked_by
from corra.runs.digest import Digests
from corra.runs.events import LinkDown, LinkUp
from corra.terminal.screen import Gone
from corra.terminal.signals import Desk

from . import events as written
from .board import Board, Member, fact_of, fact_of_error, moment
from .events import LEASE_S, RENEW_S, Known, Lease
from .member import Job, Orders
from .view import View, waited_for
from .workers import Hire, Workers, hire

# A start that takes longer than this is said, with the names of all that do.
STALL_S = 5.0
# How often the clock becomes a fact where nothing else happens.
TICK_S = 0.5
# So many different reasons are said of one lost link.
WHYS_SAID = 4
# How often somebody who only watches looks into the journal for members begun by others.
LOOK_S = 2.0
# What is laid on the desk to wake a roller that is to leave: no signal has this number.
LEAVE = 0


class Way(Enum):
    """How a roll ended."""

    DONE = "all members are over"
    STOPPED = "a threshold or an operator stopped it"
    PAUSED = "nobody said yes to the next wave"
    LEFT = "the operator left"
    TIMED_OUT = "the operator's time is over"
    WATCHED = "what others had begun is over"


@dataclass(frozen=True)
class Rolled:
    """How a roll ended: its way, why, and the signal by which the operator left.

    `started`: whether it was this roll that started what was to be started.
    """

    way: Way
    why: str = ""
    signal: int = 0
    started: bool = True


class Roller:
    """Rolls one fleet, or watches it. `roll` may be called once."""

    def __init__(
        self,
        orders: Orders,
        view: View,
        *,
        journal: Journal | None = None,
        known: Iterable[Known] = (),
        starts: bool = True,
        stay: bool = True,
        take_over: bool = False,
        timeout_s: float | None = None,
        confirm: Callable[[str], bool] | None = None,
        kill: Callable[[Sequence[Member]], None] | None = None,
        hired: Hire = hire,
        last: contextlib.ExitStack | None = None,
    ) -> None:
        """`known`: what is known already. `starts`: whether to start what isn't begun.

        `stay=False`: a member is over once it has started. `take_over`: roll although another
        operator does. `timeout_s`: leave after this time. `confirm` asks for a yes;
        without it a roll pauses. `kill` ends members. `last` is that of Desk.
        """
        self.orders, self.plan, self.view = orders, orders.plan, view
        self.board = Board(self.plan)
        self.tally = Tally(replace(self.plan.rules, detached=not stay))
        self._journal = journal
        self._read = 0
        self._known = list(known)
        self._starts, self._stay, self._take_over = starts, stay, take_over
        self._confirm, self._kill, self._hire = confirm, kill, hired
        self._until = None if timeout_s is None else self.board.clock() + timeout_s
        self._desk = Desk(last=last)
        self._leaves = False
        self._workers: Workers
        self._watched: set[int] = set()  # members that a worker has or had
        self._open: set[int] = set()  # those of them that aren't over
        self._begun_elsewhere = False
        self._looked_for: set[int] = set()  # begun by others, and nobody starts them now
        self._lease_seen = Lease()
        self._writes: list[written.Written] = []
        self._remembered: dict[int, history.Entry] = {}
        self._asking: int | None = None
        self._refused = False
        self._stalled: set[int] = set()
        self._epoch = 0
        self._renew_at = self._look_at = 0.0
        self._stop_said = self._agent_said = False
        self._killed: set[int] = set()

    # -- The Sink, called by any thread
    def state(self, at: int, state: State) -> None:
        self._desk.put(("state", at, state))

    def link(self, at: int, event: LinkDown | LinkUp) -> None:
        self._desk.put(("link", at, event))

    def output(self, at: int, stream: str, data: bytes, offset: int) -> None:
        member = self.board.members[at]
        self.board.wrote(member, stream, data)
        self.view.output(member, stream, data, offset)

    def troubled(self, at: int, why: str) -> None:
        self._desk.put(("troubled", at, why))

    def note(self, at: int, text: str) -> None:
        self._desk.put(("note", at, text))

    def digested(self, at: int, digests: Digests | CorraError) -> None:
        self._desk.put(("digested", at, digests))

    def over(self, at: int, state: State | None, error: CorraError | None) -> None:
        self._desk.put(("over", at, state, error))

    def halted(self, at: int, why: str) -> None:
        self._desk.put(("halted", at, why))

    def gone(self, error: Gone) -> None:
        self._desk.put(error)

    # -- Rolling
    def roll(self) -> Rolled:
        """Roll to the end, and return how that was. Raises Gone, CorraError."""
        jobs = len(self.plan.members)
        with self._desk:
            self._workers = self._hire(self.orders, self, jobs)
            self.view.begins(self.board)
            try:
                for known in self._known:
                    self._take(known)
                self._hear_others()
                self._lease()
                return self._go()
            finally:
                self._workers.leave()
                with contextlib.suppress(CorraError, Gone):
                    self._release()
                self.view.ends()

    def leave(self) -> None:
        """End `roll`, from any thread; the programs go on."""
        self._leaves = True
        self._desk.put(LEAVE)

    def _go(self) -> Rolled:
        while not self._leaves:
            self.tally.add(Fact(What.NOW, at=moment()))
            self._give_up_the_late()
            self._flush()
            wait_s = TICK_S
            decision = self.tally.decide()
            match decision:
                case Done() if not self._open:
                    self._flush()
                    return Rolled(Way.DONE)
                case Stop(why):
                    self._watch_the_begun(starts=False)
                    self._stop(why)
                    if not self._open:
                        self._flush()
                        return Rolled(Way.STOPPED, why)
                case Starts(members) if self._starts:
                    if self._begin(members):
                        continue
                case Wait(confirm=int(wave)) if self._starts and not self._open:
                    if not self._ask(wave):
                        self._flush()
                        return Rolled(Way.PAUSED, f"before wave {wave + 1}")
                case Wait(until=float(until)):
                    wait_s = min(wait_s, max(0.01, until - self.tally.now))
            self._watch_the_begun(starts=self._starts)
            if (
                isinstance(decision, Wait)
                and decision == Wait()
                and self._starts
                and not self._open
            ):
                return Rolled(Way.WATCHED)  # of what is open nothing more will be heard here
            if not self._starts and not self._open and not self._others_roll():
                return Rolled(Way.WATCHED)
            if self._until is not None:
                left_s = self._until - self.board.clock()
                if left_s <= 0:
                    self._flush()
                    return Rolled(Way.TIMED_OUT, started=self._starts)
                wait_s = min(wait_s, left_s)
            try:
                item = self._desk.get(wait_s)
            except queue.Empty:
                continue
            while item is not None:
                if isinstance(item, Gone):
                    raise item
                if isinstance(item, int):
                    self._flush()
                    return Rolled(Way.LEFT, signal=item, started=self._starts)
                self._heed(*item)
                try:
                    item = self._desk.get(0.0)
                except queue.Empty:
                    item = None
        self._flush()
        return Rolled(Way.LEFT, started=self._starts)

    def _take(self, known: Known) -> None:
        """Take a fact, and show what it changes."""
        self.tally.add(known.fact)
        member = self.board.take(known.fact)
        if member is None:
            return
        member.state = known.state or member.state
        member.error = known.error
        if member.state is not None and member.state.prog_id != member.prog_id:
            member.attempt, member.prog_id = self._attempt_of(member), member.state.prog_id
        if member.what is What.STARTED and member.state is not None and member.state.elapsed:
            # What others have begun, or this fleet before it was resumed, runs since then.
            member.started_at = min(member.started_at, self.board.clock() - member.state.elapsed)
        if member.over or (not self._stay and member.what is What.STARTED):
            self._open.discard(member.at)
        elif member.at not in self._watched:
            self._begun_elsewhere = True
        self.view.changed(member)

    def _attempt_of(self, member: Member) -> int:
        """Return the earlier attempt whose run counts for a member: it went on, or ended well."""
        assert member.state is not None
        for attempt in range(1, self.plan.attempt):
            if self.plan.run_id(member.name, attempt) == member.state.prog_id:
                return attempt
        return member.attempt

    def _heed(self, kind: str, *words: Any) -> None:
        """Take what a member, or the operator, has said."""
        match kind, words:
            case "state", (int(at), State() as state):
                member = self.board.members[at]
                first = member.what is not What.STARTED
                self._take(Known(fact_of(state, moment(), at), state))
                if first:
                    self._remember(at, state.state)
                    facts = {"boot_id": state.boot_id, "start_time": state.start_time}
                    self._write(written.of_member(self.plan, "started", member.name, **facts))
            case "over", (int(at), state, error):
                self._over(at, state, error)
            case "digested", (int(at), digests):
                self.board.members[at].digests = digests
            case "link", (int(at), event):
                self._link(self.board.members[at], event)
            case "troubled", (int(at), str(why)):
                member = self.board.members[at]
                room = "there is room again, " if member.trouble == render.HELD_BACK else ""
                member.trouble = why
                self.view.note(why or f"{room}it goes on", member.name)
            case "note", (int(at), str(text)):
                self.view.note(text, self.board.members[at].name)
            case "halted", (int(at), str(why)):
                error = Unreachable(f"{why} before its start", host=self.board.members[at].host)
                self._over(at, None, error)
                self._take(Known(Fact(What.STOPPED, at=moment(), why=why)))
            case "answer", (int(wave), bool(yes)):
                self._asking = None
                self._refused = not yes
                if yes:
                    self._say_yes(wave)

    def _over(self, at: int, state: State | None, error: CorraError | None) -> None:
        member = self.board.members[at]
        if state is not None:
            known = Known(fact_of(state, moment(), at), state)
            if not state.ended:  # it has started, and nobody stays to its end
                self._take(known)
                self._write(written.of_member(self.plan, "started", member.name))
                self._remember(at, state.state)
                return
        else:
            assert error is not None
            if isinstance(error, NotFound) and at in self._looked_for:
                self._open.discard(at)  # it was begun, and the start never arrived
                return
            known = Known(fact_of_error(error, moment(), at), error=error)
            if known.fact.what is What.STARTED:
                # Its link was given up. The program goes on as far as anybody knows.
                self._open.discard(at)
                self.view.note(error.why, member.name)
                member.error = error
                return
        if member.over:
            return
        self._take(known)
        self._write(written.over(self.plan, member.name, known))
        if state is not None:
            self._remember(at, state.state)

    def _link(self, member: Member, event: LinkDown | LinkUp) -> None:
        from corra.model.units import duration

        if isinstance(event, LinkUp):
            member.down_since, member.down_why = 0.0, ()
            self.view.note(f"link back after {duration(event.down_s)}, nothing missed", member.name)
        elif not member.down_since:
            member.down_since = self.board.clock() - event.since_s
            known = member.what is What.STARTED
            self.view.note(
                "link lost, program unaffected as far as known; trying on"
                if known
                else f"no answer yet: {event.error}; trying again",
                member.name,
            )
        if isinstance(event, LinkDown) and event.error not in member.down_why:
            # The first says how the link broke, the others why there is no new one.
            if 0 < len(member.down_why) < WHYS_SAID and member.what is What.STARTED:
                self.view.note(f"no link yet: {event.error}; trying on", member.name)
            member.down_why = (*member.down_why, event.error)[:WHYS_SAID]

    # -- What is started
    def _begin(self, members: Sequence[int]) -> bool:
        """Begin members; return False if what the journal says of others forbids it."""
        if not self._lease():
            return False
        self._say_other_agent()
        for at in members:
            self._write(written.begun(self.plan, self.plan.members[at]))
        before = self.tally.decide()
        self._flush()
        if self.tally.decide() != before:  # another roller's facts came with the answer
            return True
        for at in members:
            self._watched.add(at)
            self._open.add(at)
            self._take(Known(Fact(What.BEGUN, at, moment())))
            self._remember(at, "starting")
            self._workers.begin(Job(at, start=True, stay=self._stay))
        return True

    def _say_other_agent(self) -> None:
        """Say once that members come to run under another agent than those before them."""
        plans, ours = self.plan.agent, agent_digest()
        if plans and plans != ours and not self._agent_said:
            self._agent_said = True
            self.view.note(
                f"begun by another corra, whose agent is {plans[:8]};"
                f" what is started now runs under {ours[:8]}"
            )

    def _watch_the_begun(self, *, starts: bool) -> None:
        """Watch what others have begun, or this fleet before it was resumed.

        `starts`: whether to start what a host may not know yet.
        """
        if not self._begun_elsewhere:
            return
        self._begun_elsewhere = False
        for member in self.board.members:
            if member.at in self._watched or member.what not in (What.BEGUN, What.STARTED):
                continue
            confirmed = member.what is What.STARTED
            if member.error is not None or (confirmed and not self._stay):
                continue
            if not confirmed and not self._starts and self._others_roll():
                self._begun_elsewhere = True  # its host may not know it yet: look again
                continue
            self._watched.add(member.at)
            self._open.add(member.at)
            start = starts and not confirmed
            if not start and not confirmed:
                self._looked_for.add(member.at)
            job = Job(member.at, start=start, stay=self._stay, confirmed=confirmed)
            self._workers.begin(job)

    def _give_up_the_late(self) -> None:
        now = self.board.clock()
        late: list[Member] = []
        for at in sorted(self._open):
            member = self.board.members[at]
            if member.what is not What.BEGUN:
                continue
            waited_s = now - member.begun_at
            if waited_s >= self.plan.start_s:
                self._workers.give_up(member.at, self.plan.start_s)
            elif waited_s >= STALL_S:
                late.append(member)
        if any(each.at not in self._stalled for each in late):
            self._stalled.update(each.at for each in late)
            self.view.note(waited_for(late, STALL_S))

    def _stop(self, why: str) -> None:
        """Say once that nothing is started any more, and with --kill-on-fail end what runs."""
        kills = self.plan.kill_on_fail and self._kill is not None
        if not self._stop_said and self._open:
            rest = "what runs is stopped" if kills else "what runs goes on"
            self.view.note(f"{why}: nothing more is started; {rest}")
        self._stop_said = True
        # A start that is under way now becomes a run later.
        running = [self.board.members[at] for at in self._open - self._killed]
        running = [each for each in running if each.what is What.STARTED]
        if kills and running and self._kill is not None:
            self._killed.update(each.at for each in running)
            threading.Thread(target=self._kill, args=(running,), daemon=True).start()

    # -- Between waves
    def _ask(self, wave: int) -> bool:
        """Ask for a yes in a thread; return False if nobody can be asked, or said no."""
        if self._refused or self._confirm is None:
            return False
        if self._asking is None:
            self._asking = wave
            size = self.plan.waves[wave]
            question = f"wave {wave + 1} of {len(self.plan.waves)}, {size} hosts: go on? [y/N] "
            confirm, desk = self._confirm, self._desk

            def ask() -> None:
                try:
                    yes = confirm(question)
                except (OSError, ValueError):
                    yes = False
                desk.put(("answer", wave, yes))

            threading.Thread(target=ask, name="question", daemon=True).start()
        return True

    def _say_yes(self, wave: int) -> None:
        self._take(Known(Fact(What.CONFIRMED, wave, moment())))
        facts = {"step": f"wave-{wave + 1}", "wave": wave, "attempt": self.plan.attempt}
        self._write(("confirmed", facts))

    # -- The journal
    def _write(self, event: written.Written) -> None:
        self._writes.append(event)

    def _remember(self, at: int, state: str) -> None:
        """Have this machine's history know a member's run."""
        name = self.plan.members[at]
        host = self.orders.agent(name).host
        template = self.orders.template
        self._remembered[at] = history.Entry(
            self.board.members[at].prog_id,
            str(host),
            self.plan.name,
            host.as_user,
            (self.orders.reach or {}).get("via"),
            self.plan.spool,
            template.program.argv if template is not None else (),
            state=state,
            inventory=host.address.source if host.address else None,
        )

    def _flush(self) -> None:
        """Write what is to be written, and take what others have written meanwhile."""
        if self._remembered:
            history.remember_runs(list(self._remembered.values()))
            self._remembered = {}
        if self._journal is None:
            self._writes = []
            return
        if self._writes:
            writes, self._writes = self._writes, []
            try:
                self._journal.write_all(writes)
            except NoRoom as error:
                if self._journal.where.host.is_local:
                    # The hosts know all that the journal would.
                    self.view.note(f"going on without a journal: {error.why}")
                    self._journal = None
                    return
                raise
        self._hear_others()

    def _hear_others(self) -> None:
        if self._journal is None:
            return
        if not self._starts and self.board.clock() >= self._look_at:
            self._look_at = self.board.clock() + LOOK_S
            self._journal.read()
        news = self._journal.book.events[self._read :]
        self._read += len(news)
        self._lease_seen = written.lease_of(news, self._lease_seen)
        for known in written.known_of(self.plan, news):
            self._take(known)

    def _lease(self) -> bool:
        """Hold the lease, or learn that another operator does; return whether we roll."""
        if self._journal is None or not self._starts:
            return self._starts
        now = moment()
        if self._epoch and now < self._renew_at and self._mine(self._lease_seen):
            return True
        lease = self._lease_seen
        taken = self._take_over and not self._epoch
        if not self._mine(lease) and _holds(lease, now) and not taken:
            self._starts = False
            self.view.note(
                f"{lease.by} rolls it; watching (--take-over rolls it from here)"
                if not self._epoch
                else f"{lease.by} has taken it over; watching"
            )
            return False
        self._epoch = lease.epoch if self._mine(lease) else lease.epoch + 1
        self._renew_at = now + RENEW_S
        self._write_lease(now + LEASE_S)
        return self._mine(self._lease_seen)

    def _mine(self, lease: Lease) -> bool:
        return self._journal is not None and lease.pass_id == self._journal.pass_id

    def _others_roll(self) -> bool:
        """Whether another operator holds the lease, so that more may be begun."""
        if self._journal is None:
            return False
        lease = self._lease_seen
        return not self._mine(lease) and _holds(lease, moment())

    def _release(self) -> None:
        """Let the next roller begin at once."""
        if self._journal is not None and self._epoch and self._mine(self._lease_seen):
            self._write_lease(0.0)

    def _write_lease(self, until: float) -> None:
        assert self._journal is not None
        facts = {
            "epoch": self._epoch,
            "until": until,
            "pass": self._journal.pass_id,
            "pid": os.getpid(),
        }
        self._write(("rolling", facts))
        self._flush()


def _holds(lease: Lease, now: float) -> bool:
    """Return whether somebody rolls by this lease, as far as is known here."""
    here = lease.by == asked_by() and lease.pid
    gone = here and not os.path.exists(f"/proc/{lease.pid}")
    return bool(lease.epoch) and lease.until > now and not gone
