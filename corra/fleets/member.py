"""One member of a fleet, from its start to its end, in a thread of its own.

The host decides whether a start is the first of its id. So a start that is repeated, by whomever,
comes to the same run.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, BinaryIO, NamedTuple, Protocol, cast

from corra import render
from corra.errors import Conflict, CorraError, MaybeStarted, NotFound, Unreachable
from corra.model.frames import Gap, Output
from corra.model.program import Request
from corra.model.state import State
from corra.model.units import chosen_time, decimal_size
from corra.remote.agent_client import Agent
from corra.remote.targets import agent_for
from corra.runs.asking import asked_by, who_asks
from corra.runs.digest import Digests, digests_of
from corra.runs.events import LinkDown, LinkUp
from corra.runs.follow import PATIENT, Follow, Start
from corra.runs.patience import Patience
from corra.runs.request import Launch
from corra.runs.run import Run
from corra.runs.wanted import Wanted
from corra.terminal.screen import Gone

from .claims import is_claim, settled_before, why_claimed
from .plan import Plan, host_of


class Job(NamedTuple):
    """What to do with a member: start it or only follow it, and whether to stay to its end.

    `confirmed`: its host is known to have started it, so a run that isn't there is lost.
    """

    at: int
    start: bool
    stay: bool = True
    confirmed: bool = False


class Sink(Protocol):
    """Takes what a member does. Any thread may call it."""

    def state(self, at: int, state: State) -> None: ...
    def link(self, at: int, event: LinkDown | LinkUp) -> None: ...
    def output(self, at: int, stream: str, data: bytes, offset: int) -> None: ...
    def troubled(self, at: int, why: str) -> None: ...
    def note(self, at: int, text: str) -> None: ...
    def digested(self, at: int, digests: Digests | CorraError) -> None: ...
    def over(self, at: int, state: State | None, error: CorraError | None) -> None: ...
    def halted(self, at: int, why: str) -> None: ...
    def gone(self, error: Gone) -> None: ...


class _Gaps:
    """Says what of a run's output is gone: the first gap of a stream at once, the others in sum.

    There are many where a program writes faster than a link carries.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._more: dict[str, tuple[int, int]] = {}

    def take(self, gap: Gap) -> None:
        size = gap.end - gap.start
        if gap.stream not in self._more:
            self._more[gap.stream] = 0, 0
            where = f"{gap.stream} from byte {gap.start} to {gap.end} is gone"
            self._say(f"{where}: {decimal_size(size)}")
        else:
            count, sum_ = self._more[gap.stream]
            self._more[gap.stream] = count + 1, sum_ + size

    def end(self) -> None:
        for stream, (count, size) in self._more.items():
            if count:
                self._say(f"{stream} has {count} more gaps: {decimal_size(size)}")
        self._more.clear()


class Payload:
    """A program's stdin as a file with a position of its own, over one open descriptor."""

    def __init__(self, fd: int) -> None:
        self._fd, self._at = fd, 0

    def seek(self, offset: int) -> int:
        self._at = offset
        return offset

    def read(self, size: int) -> bytes:
        data = os.pread(self._fd, size, self._at)
        self._at += len(data)
        return data

    def close(self) -> None:
        """The descriptor is shared."""


@dataclass(frozen=True)
class Orders:
    """What all members of a fleet have in common.

    `template` is the request that each start is made of, None where nothing may be started.
    `payload` is the descriptor of the program's stdin. `prepare` changes a Launch before its start.
    `tail`: how many last lines of an earlier run are shown. `shows`: whether output is wanted.
    `folds`: whether the digests of the output are asked for at the end.
    """

    plan: Plan
    template: Request | None
    payload: int | None = None
    reach: Mapping[str, Any] | None = None
    patience: Patience = PATIENT
    pass_id: str = ""
    tail: int | None = None
    shows: bool = True
    prepare: Callable[[Launch], Launch] | None = None
    folds: bool = False

    def agent(self, member: str) -> Agent:
        """Return the agent of a member's host; nothing connects yet."""
        reach = dict(self.reach or {})
        if self.plan.as_user and not reach.get("as_user"):
            reach["as_user"] = self.plan.as_user
        return agent_for(host_of(member), **reach)

    def launch(self, member: str, agent: Agent) -> Launch:
        """Return the Launch of a member."""
        assert self.template is not None
        request = replace(
            self.template,
            prog_id=self.plan.run_id(member),
            fleet=self.plan.to_text(),
            origin={
                **who_asks(),
                "fleet": self.plan.id,
                "attempt": str(self.plan.attempt),
                "pass": self.pass_id,
            },
        )
        payload = None if self.payload is None else cast("BinaryIO", Payload(self.payload))
        via = (self.reach or {}).get("via")
        made = Launch(agent, request, payload, via)
        return made if self.prepare is None else self.prepare(made)

    def run(self, member: str, agent: Agent) -> Run:
        """Return a member's run, which may not be there."""
        via = (self.reach or {}).get("via")
        run_id = self.plan.run_id(member)
        return Run(agent, run_id, name=self.plan.name, spool=self.plan.spool, via=via, seen=False)


class Hands:
    """Performs jobs, each in the thread that calls `perform`."""

    def __init__(self, orders: Orders, sink: Sink) -> None:
        self._orders = orders
        self._sink = sink
        self._follows: dict[int, Follow | None] = {}
        self._given_up: set[int] = set()
        self._lock = threading.Lock()
        self._left = False

    def perform(self, job: Job) -> None:
        """Start or follow a member, and tell the sink all of it."""
        member = self._orders.plan.members[job.at]
        agent = None
        with self._lock:
            if self._left:
                return
            self._follows[job.at] = None
        try:
            agent = self._orders.agent(member)
            self._watch(job, member, agent)
        except CorraError as error:
            if isinstance(error, Conflict) and agent is not None and self._is_halted(job, agent):
                return
            self._tell_over(job.at, None, error.but(host=error.host or host_of(member)))
        except Gone as gone:
            self._sink.gone(gone)
        except Exception as error:  # noqa: BLE001 - a fault of one member is no other member's
            why = f"{type(error).__name__}: {error}"
            self._tell_over(job.at, None, CorraError(why, host=host_of(member)))
        finally:
            with self._lock:
                self._follows.pop(job.at, None)
            if agent is not None:
                agent.close()

    def _watch(self, job: Job, member: str, agent: Agent) -> None:
        orders = self._orders
        run_id = orders.plan.run_id(member)
        if job.start and orders.plan.attempt > 1 and member not in orders.plan.redo:
            # An earlier attempt may have started it since its host was last asked.
            before = settled_before(orders.plan, member, agent, orders.patience)
            if before is not None:
                job, run_id = job._replace(start=False, confirmed=True), before.prog_id
        follow = self._follow(job, run_id, member, agent)
        with self._lock:
            self._follows[job.at] = follow
            if self._left or job.at in self._given_up:
                follow.close()
        heard: str | None = None
        trouble = ""
        gaps = _Gaps(partial(self._sink.note, job.at))
        try:
            for event in follow:
                state = follow.state
                if state is not None and state.state != heard and not state.ended:
                    heard = state.state
                    self._sink.state(job.at, state)
                if state is not None and (now := render.trouble(state)) != trouble:
                    trouble = now
                    self._sink.troubled(job.at, trouble)
                if isinstance(event, Output):
                    self._sink.output(job.at, event.stream, event.data, event.offset)
                elif isinstance(event, Gap):
                    gaps.take(event)
                elif isinstance(event, (LinkDown, LinkUp)):
                    self._sink.link(job.at, event)
        except NotFound:
            if not job.confirmed:
                raise
            self._tell_over(job.at, State(run_id, "lost", reason="spool-gone"), None)
            return
        finally:
            gaps.end()
        state = follow.state
        if state is not None and state.ended and orders.folds:
            try:
                run = Run(agent, run_id, name=state.name, spool=orders.plan.spool, seen=False)
                self._sink.digested(job.at, digests_of(run, state))
            except CorraError as error:
                self._sink.digested(job.at, error)
        if state is not None and (state.ended or not job.stay):
            self._tell_over(job.at, state, None)

    def _follow(self, job: Job, run_id: str, member: str, agent: Agent) -> Follow:
        # Not by way of Launch and Run: each would write its own row into the history, and some
        # tens of threads that lock one file wait for each other for seconds. The roller writes.
        orders = self._orders
        start = None
        streams: list[str] | None = None if orders.shows else []
        wanted = Wanted(tail=orders.tail, streams=streams)
        if job.start:
            launch = orders.launch(member, agent)
            start = Start(launch.request, job.stay, launch.payload)
            wanted = Wanted(streams=streams)
        return Follow(
            agent,
            run_id,
            wanted,
            orders.patience,
            start,
            spool=orders.plan.spool,
            begun=job.confirmed,
            by=asked_by(),
        )

    def _is_halted(self, job: Job, agent: Agent) -> bool:
        """Tell the sink if an operator's stop stands in the place of this run."""
        member = self._orders.plan.members[job.at]
        try:
            state = self._orders.run(member, agent).state()
        except CorraError:
            return False
        if not is_claim(state):
            return False
        self._sink.halted(job.at, why_claimed(state))
        return True

    def _tell_over(self, at: int, state: State | None, error: CorraError | None) -> None:
        with self._lock:
            if at in self._given_up:
                return
        self._sink.over(at, state, error)

    def give_up(self, at: int, after_s: float) -> None:
        """Give up a start that takes too long, and tell what may have become of it."""
        with self._lock:
            if at in self._given_up:
                return
            self._given_up.add(at)
            follow = self._follows.get(at)
        if follow is not None:
            # From here on it sends nothing any more. What it has sent, it has sent.
            follow.close()
        member = self._orders.plan.members[at]
        facts: dict[str, Any] = {
            "host": host_of(member),
            "prog_id": self._orders.plan.run_id(member),
        }
        why = f"no start confirmed in {chosen_time(after_s)}"
        sent = follow is not None and follow.sent
        kind = MaybeStarted if sent else Unreachable
        self._sink.over(at, None, kind(why, **facts))

    def leave(self) -> None:
        """Watch nothing any more. The programs go on."""
        with self._lock:
            self._left = True
            follows = list(self._follows.values())
        for each in follows:
            if each is not None:
                each.close()
