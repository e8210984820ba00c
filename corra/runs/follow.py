"""Watching a run so that each byte comes once and in order, whatever the network does.

The host holds the bytes, and the client holds the next offset of each stream (`Position`). When a
link breaks or falls silent, or this machine has slept, the client drops the link and asks the next
one from that offset on. A start is the same loop: the start request goes out again with the same id
until the host confirms it, and the host starts an id at most once.

A connection that can't be made at the first try is an error at once: nobody wants a typo in a host
name tried again. A host that has never answered gets a few tries. After the first answer only the
final State, `close()` or the caller's patience ends the loop.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO, NamedTuple, Protocol

from corra.errors import CorraError, MaybeStarted, Misuse, StillRunning, Unreachable, typed
from corra.model import ids
from corra.model.frames import Ack, Beat, Gap, Output, Parser, Status, Taken
from corra.model.host import Host
from corra.model.program import Request
from corra.model.refusals import refusal_error, retold
from corra.model.signal_names import signal_name
from corra.model.state import State
from corra.model.units import duration
from corra.remote.exchange import ANSWER_S, BadReply, Refused
from corra.transport.channel import LinkLost, NoAnswer, Silent

from .attempt import Attempt
from .clock import Clock
from .events import Event, LinkDown, LinkUp, SignalPassed, Tick
from .patience import DEAD_AFTER_S, SLEPT_S, Cut, KeepAlive, Patience, pause_s
from .stdin_feed import StdinFeed
from .wanted import Hole, Position, Wanted

# A look at the clocks each second notices a wake-up within that second. It costs less than 0.01 %
# of a core.
LOOK_EVERY_S = 1.0

# A login may take longer than ANSWER_S (a slow .profile, a home on a sleepy NFS server). Each
# silent try gets twice the time of the one before, up to 8 times ANSWER_S.
PATIENCE_DOUBLED_MAX = 3
# A command that ended without an answer may have been killed by chance. Three in a row were not.
NO_ANSWERS_MAX = 3
# A host that has never answered gets so many tries: it can't be called a lost link. Three silent
# tries take 105 s.
FIRST_TRIES_MAX = 6
SILENT_TRIES_MAX = 3
# A last attempt gets so much, however little time is left: a login on a local network takes 0.2 s.
ATTEMPT_MIN_S = 0.5
# And a last link has so long to bring something new, such as the answer to a ping.
PROOF_S = 2.0
WHOLE, PATIENT = Wanted(), Patience()


class OpenLink(Protocol):
    """An open exec of the agent whose reply has come."""

    @property
    def reply(self) -> dict[str, Any]: ...
    @property
    def placed(self) -> int: ...
    def read(self, timeout_s: float | None) -> bytes: ...
    def send(self, data: bytes) -> None: ...
    def close(self) -> None: ...


class AnsweringAgent(Protocol):
    """The agent on one host, as `place` gives it."""

    @property
    def host(self) -> Host: ...
    def call(
        self, verb: str, request: Mapping[str, Any], *, timeout_s: float = ...
    ) -> dict[str, Any]: ...
    def stream(
        self,
        verb: str,
        request: Mapping[str, Any],
        *,
        payload: BinaryIO | None = ...,
        timeout_s: float = ...,
        sending: Callable[[], None] | None = ...,
    ) -> OpenLink: ...
    def close(self) -> None: ...


class Start(NamedTuple):
    """The start that a Follow makes first. `stay=False`: leave once the host has confirmed it.

    `payload` is the program's stdin, seekable. `fresh`: nobody can have started or seen the run
    before.
    """

    request: Request
    stay: bool = True
    payload: BinaryIO | None = None
    fresh: bool = False


class _Down(NamedTuple):
    """Since when no link has brought anything new, and which try to make one is next."""

    at: float
    quiet: bool
    attempt: int = 1

    def again(self, cut: Cut) -> _Down:
        return _Down(self.at, self.quiet and cut.quiet, self.attempt + 1)


class Follow:
    """The events of one run, from the cursor on, until it has ended.

    Iterate it in one thread; any thread may call `signal` and `close`. If an exception (Ctrl-C)
    breaks an iteration off, a new iteration goes on behind the last event.

    Raises Unreachable, HostKey, Auth and the other NotStarted for a first try that failed;
    MaybeStarted and StillRunning when the caller's patience is over; NotFound and the like when the
    host refuses.
    """

    def __init__(
        self,
        agent: AnsweringAgent,
        prog_id: str,
        wanted: Wanted = WHOLE,
        patience: Patience = PATIENT,
        start: Start | None = None,
        *,
        spool: str | None = None,
        begun: bool = False,
        by: str = "",
        feed: StdinFeed | None = None,
        told: Callable[[State | None], None] | None = None,
        clock: Clock | None = None,
    ) -> None:
        """`prog_id`: an id, a name, or the beginning of an id's tail. `begun`: the run is known to
        have been started, though this Follow hasn't heard of it yet. `feed` goes to the program
        meanwhile. `told` hears of each State, and of None when `start` has certainly started
        nothing.
        """
        self.prog_id = prog_id
        self.host = agent.host
        self.state: State | None = None
        self.switched = b""  # what the program switched on in its terminal before
        self.placed = 0
        self.feed = feed
        self._agent = agent
        self._wanted = wanted
        self._position = Position(wanted)
        self._patience = patience
        self._start = start
        self._spool = spool if start is None else start.request.spool
        self._begun = begun
        self._by = by
        self._told = told or (lambda _: None)
        self._clock = clock or Clock()
        self._deadline = (
            None if patience.timeout_s is None else self._clock.now() + patience.timeout_s
        )
        self._tick_at = self._clock.now() + (patience.tick_s or 0)
        self._link: OpenLink | None = None
        self._parser = Parser()
        self._alive = KeepAlive(patience, self._clock)
        self._down: _Down | None = None
        # What `_down` was before a link that has brought no more than answers to pings.
        self._idle: _Down | None = None
        self._tried = self._iterating = False
        self._sent_at: float | None = None
        self._no_answers = self._silences = 0
        self._closed = threading.Event()
        self._wake = threading.Event()
        self._order = itertools.count(1)
        self._orders: dict[int, str] = {}
        # Reentrant: a signal handler may call `signal` while its own thread is in here.
        self._lock = threading.RLock()

    @property
    def cursor(self) -> dict[str, int]:
        """The next offset of each stream, behind the last event handed out."""
        return self._position.offsets

    @property
    def first(self) -> bool:
        """Whether nobody can have seen anything of the run before us."""
        return self._start is not None and self._start.fresh

    @property
    def confirmed(self) -> bool:
        """Whether the host has said that it knows the run."""
        return self.state is not None

    @property
    def sent(self) -> bool:
        """Whether a byte has gone out to the host. Until then nothing can have been started."""
        return self._sent_at is not None

    @property
    def asked_s(self) -> float:
        """How long ago the last request went out."""
        return 0.0 if self._sent_at is None else self._clock.now() - self._sent_at

    @property
    def starting(self) -> bool:
        """Whether this is a start that the host hasn't confirmed yet."""
        return self._start is not None and self.state is None

    def forget(self) -> None:
        """Tell `told` that this start has certainly started nothing."""
        self._told(None)

    def __iter__(self) -> Iterator[Event]:
        self._drop()
        self._iterating = True
        try:
            yield from self._watch()
        finally:
            self._iterating = False
            self._drop()

    def signal(self, name: str | int) -> None:
        """Send a signal to the program: over the open link, else over the next one.

        Where nobody iterates, the signal is a call of its own. The host acts on the order at least
        once: if the link breaks before the host acknowledges the order, the next link carries it.
        """
        word = signal_name(name)
        with self._lock:
            if self._iterating or self.starting:
                number = next(self._order)
                self._orders[number] = word
                if self._link is None:
                    self._wake.set()
                self._send_order(number)
                return
        request = {"prog_id": self.prog_id, "signal": word, "by": self._by, "spool": self._spool}
        try:
            self._agent.call("signal", {k: v for k, v in request.items() if v}, timeout_s=ANSWER_S)
        except Refused as refusal:
            raise self._explained(refusal.kind, refusal.facts, verb="signal") from refusal

    @property
    def unheard(self) -> bool:
        """Whether the host has yet to say that a signal sent over the open link has arrived."""
        return bool(self._orders) and self._link is not None

    def close(self) -> None:
        """Stop watching; the program goes on. An iteration in another thread ends."""
        with self._lock:
            self._closed.set()
        self._wake.set()
        self._drop()

    # One link after the other

    def _watch(self) -> Iterator[Event]:
        self._down = self._idle = None
        while not self._closed.is_set():
            try:
                before, reply = self.state, self._connect()
                if self._is_news(before):
                    yield from self._proven()
                yield Status(reply)
                # What was never started has no output, and the host says no more of it.
                if not self._stay or reply["state"] == "not_started":
                    return
                yield from self._pump()
                return
            except Cut as cut:
                self._drop()
                if self._closed.is_set():
                    return
                if cut.dead:
                    # The next link must not wait for a connection that says nothing. Other users of
                    # that connection notice now instead of later.
                    self._agent.close()
                down: _Down | None = self._down or self._flapping()
                self._down = down.again(cut) if down else _Down(self._clock.now(), cut.quiet)
                since_s = self._clock.now() - self._down.at
                self._give_up(since_s, cut)
                if not self._down.quiet:
                    yield LinkDown(since_s, str(cut), self._down.attempt)
                yield from self._pause()

    @property
    def _stay(self) -> bool:
        return self._start is None or self._start.stay

    def _is_news(self, before: State | None) -> bool:
        """Return whether the State says anything new.

        Its clocks don't count, nor the lengths of its streams: new bytes count by themselves.
        """
        now = self.state
        if before is None or now is None:
            return True
        return (now.state, bool(now.blocked), now.hindered, len(now.signals_sent)) != (
            before.state,
            bool(before.blocked),
            before.hindered,
            len(before.signals_sent),
        )

    def _flapping(self) -> _Down | None:
        """Return the trouble of before, where the link answered pings, brought nothing, and broke
        sooner than a link may be missing. Such links one after the other are none.
        """
        limit_s = self._patience.reconnect_timeout_s
        steady_s = DEAD_AFTER_S if limit_s is None else min(limit_s, DEAD_AFTER_S)
        return self._idle if self._clock.now() - self._alive.began_at < steady_s else None

    def _proven(self, *, news: bool = True) -> Iterator[LinkUp]:
        """Note that the link works, as it has brought something new or an answer to a ping. Only
        that ends the time without a link.
        """
        down = self._down
        self._idle = None if news else down or self._idle
        self._down = None
        if down is not None and not down.quiet:
            yield LinkUp(self._clock.now() - down.at)

    def _connect(self) -> Mapping[str, Any]:
        """Make a link and return the State it begins with."""
        starting = self.starting
        verb = "follow" if not starting else "run" if self._stay else "start"
        first, self._tried = not self._tried, True
        payload = self._start.payload if self._start is not None else None
        if payload is not None:
            payload.seek(0)
        request, patience_s = self._request(starting), self._patience_s()

        def ask(sending: Callable[[], None]) -> OpenLink:
            return self._agent.stream(
                verb,
                request,
                payload=payload if starting else None,
                timeout_s=patience_s,
                sending=sending,
            )

        def takes_stdin() -> bool:
            """Whether the host has asked for the program's stdin, which may take long."""
            return payload is not None and payload.tell() > 0

        limit_s = self._attempt_s()
        try:
            if limit_s is None:
                link = ask(self._sending)
            else:
                link = Attempt(ask, self._sending).link(limit_s, takes_stdin)
        except Refused as refusal:
            if first and starting:
                self._told(None)
            raise self._explained(refusal.kind, refusal.facts, verb=verb) from refusal
        except CorraError as error:
            if first or isinstance(error, Misuse):
                if starting:
                    self._told(None)
                if self._begun and self._over:
                    raise self._left(self._unseen(error.why)) from error
                raise retold(
                    error,
                    verb=verb,
                    label=self._label if self.confirmed else "",
                    prog_id=self.prog_id,
                ) from error
            # Each of these may heal. A host key that changes in mid-run is never accepted.
            raise Cut(error.why) from error
        except NoAnswer as error:
            self._no_answers += 1
            if self._no_answers >= NO_ANSWERS_MAX or isinstance(error, BadReply):
                raise self._left(str(error)) from error
            raise Cut(str(error)) from error
        except (ConnectionError, TimeoutError) as error:
            silent = isinstance(error, (Silent, TimeoutError))
            self._silences += silent
            if first and self._over:
                raise self._left(self._unseen(str(error))) from error
            raise Cut(str(error) or "no answer", dead=silent) from error
        self._no_answers = self._silences = 0
        with self._lock:
            self._link, self._parser = link, Parser()
            for number in list(self._orders):
                self._send_order(number)
        if self.feed is not None and self._stay:
            self.feed.linked(link)
        self._alive.begin(after_a_break=self._down is not None)
        self.placed = self.placed or link.placed
        try:
            state = State.from_json(link.reply)
            if self.state is not None or self._start is not None:
                self._same_run(state)
        except ValueError as error:
            raise self._stranger(error) from error
        self.prog_id = (
            state.prog_id
        )  # until now it may have been a name, which can come to mean another run
        if self.state is None and self._wanted.begins_later:
            self._begin_tail(link.reply, state)
        self.state = state
        self._told(self.state)
        return link.reply

    def _unseen(self, why: str) -> str:
        limit = duration(self._patience.timeout_s or 0)
        return f"not seen to end in {limit}: {why}" if self._begun else f"no answer in {limit}"

    def _same_run(self, state: State) -> State:
        """Return `state`. Raises ValueError if it is another run's."""
        if state.prog_id != self.prog_id:
            raise ValueError(f"asked for {self.prog_id}, it answers for {state.prog_id}")
        return state

    def _patience_s(self) -> float:
        """Return how long the host may be silent before it answers."""
        return ANSWER_S * (1 << min(self._silences, PATIENCE_DOUBLED_MAX))

    def _attempt_s(self) -> float | None:
        """Return how long this attempt may take in all, None where only its steps are bounded."""
        ends = [] if self._deadline is None else [self._deadline]
        if self._down is not None and self._patience.reconnect_timeout_s is not None:
            ends.append(self._down.at + self._patience.reconnect_timeout_s)
        return max(ATTEMPT_MIN_S, min(ends) - self._clock.now()) if ends else None

    def _sending(self) -> None:
        """Note that a request is about to go out. Raises LinkLost once this Follow is closed."""
        with self._lock:
            if self._closed.is_set():
                raise LinkLost("closed")
            self._sent_at = self._clock.now()

    def _begin_tail(self, reply: Mapping[str, Any], state: State) -> None:
        """Learn where a tail begins, and what the program switched on in its terminal before it."""
        self._position.begin(reply, state)
        self.switched = str(reply.get("switched") or "").encode("latin-1", "replace")

    def _request(self, starting: bool) -> dict[str, Any]:
        follow = {
            **self._position.request(again=self.confirmed),
            "by": self._by or None,
            "sender": self.feed.sender if self.feed is not None else None,
        }
        if not starting:
            follow |= {"prog_id": self.prog_id, "live": self._wanted.live, "spool": self._spool}
        told = {k: v for k, v in follow.items() if v is not None}
        if starting:
            assert self._start is not None
            whole = self._start.request.to_json()
            return {**whole, **told} if self._stay else whole
        return told

    def _drop(self) -> None:
        with self._lock:
            link, self._link = self._link, None
        if self.feed is not None:
            self.feed.unlinked()
        if link is not None:
            link.close()

    def _give_up(self, since_s: float, why: Cut) -> None:
        """Raise if the caller's patience is over, or a host that never answered had its tries."""
        assert self._down is not None
        limit_s = self._patience.reconnect_timeout_s
        if limit_s is None and self.state is None:
            tries = SILENT_TRIES_MAX if why.dead else FIRST_TRIES_MAX
            if self._down.attempt >= tries:
                look = f"look: {typed()} doctor --host {self.host}"
                raise self._left(f"{why} ({self._down.attempt} tries)", look)
        if limit_s is None or since_s < limit_s:
            return
        if self.confirmed or self._start is None:
            raise self._left(f"link lost {duration(since_s)} ago, given up: {why}")
        raise self._left(f"link lost before {self.host} confirmed it")

    def _left(self, why: str, *hint: str) -> CorraError:
        """Return the error for leaving before the end."""
        if self.starting and not self.sent:
            self._told(None)
            return Unreachable(why, hint=hint, **self._facts)
        if self.starting:
            repeat = (
                f"safe to repeat, it starts at most once: the same command, --id {self.prog_id}"
            )
            return MaybeStarted(why, hint=[repeat, *hint], **self._facts)
        if self.state is None and not self._begun:
            # Nobody here knows whether that host has such a run.
            return Unreachable(why, fate="", hint=hint, **{**self._facts, "label": ""})
        return StillRunning(why, hint=hint, **self._facts)

    def _pause(self) -> Iterator[Event]:
        """Wait before the next try.

        An order, a wake-up of this machine, `close` or the end of the caller's patience cuts it
        short.
        """
        assert self._down is not None
        until, slept_s = (
            self._clock.now() + pause_s(self._down.attempt, self._clock),
            self._clock.slept_s(),
        )
        if (limit_s := self._patience.reconnect_timeout_s) is not None:
            until = min(until, self._down.at + limit_s)
        while not (self._wake.is_set() or self._closed.is_set()):
            yield from self._clockwork()
            if self._clock.now() >= until or self._clock.slept_s() - slept_s > SLEPT_S:
                break
            self._clock.wait(self._wake, self._nap(until))
        self._wake.clear()

    # One link

    def _pump(self) -> Iterator[Event]:
        """Hand out what the link brings until the run is over. Raises Cut."""
        final = last_was_status = False
        while True:
            yield from self._clockwork()
            if self._closed.is_set():
                return
            if self._alive.is_ping_due():
                self._send(b"P\n")
            self._alive.check()
            self._check_proof()
            data = self._read()
            if data is None:
                continue
            try:
                if not data:
                    if final or (last_was_status and not self._wanted.live):
                        yield from self._rest(final)
                        return
                    raise Cut("the link was closed", quiet=self._alive.away)
                self._alive.hear()
                for frame in self._parser.feed(data):
                    last_was_status = isinstance(frame, Status)
                    if isinstance(frame, (Output, Gap)):
                        for each in self._position.take(frame):
                            yield from self._proven()
                            yield each
                    elif isinstance(frame, Status):
                        before = self.state
                        self.state = self._same_run(State.from_json(frame.state))
                        self._told(self.state)
                        final = self.state.ended
                        if self._is_news(before):
                            yield from self._proven()
                        # Of a run whose output still waits for room this isn't the last State.
                        waits = self.state.overdue == "output"
                        if final and not waits and not self._wanted.late:
                            yield from self._rest(final)
                            yield frame
                            return
                        yield frame
                    elif isinstance(frame, Beat):
                        self._alive.away = False
                        yield from self._proven(news=False)
                    elif isinstance(frame, Ack):
                        if name := self._orders.pop(frame.number, None):
                            yield SignalPassed(name)
                    elif isinstance(frame, Taken):
                        if self.feed is not None and self.feed.told(frame):
                            yield from self._proven()
                        yield frame
                    else:
                        raise self._explained(
                            str(frame.error.get("error")), frame.error, verb="follow"
                        )
            except Hole as hole:
                raise Cut(str(hole), quiet=True) from hole
            except ValueError as error:
                raise self._stranger(error) from error

    def _check_proof(self) -> None:
        """Raise Cut for a link that has brought nothing new by the end of `reconnect_timeout_s`."""
        limit_s = self._patience.reconnect_timeout_s
        if self._down is None or limit_s is None:
            return
        until = max(self._down.at + limit_s, self._alive.began_at + PROOF_S)
        if self._clock.now() >= until:
            raise Cut("the link brought nothing new", dead=True)

    def _rest(self, final: bool) -> Iterator[Output | Gap]:
        if final and self.state is not None and self.state.overdue != "output":
            yield from self._position.rest(self.state)

    def _read(self) -> bytes | None:
        """Return what has come, b"" at the end, None when it is time to look at the clock."""
        link = self._link
        if link is None:
            raise Cut("the link was closed")
        try:
            return link.read(self._nap(self._alive.ping_at))
        except TimeoutError:
            return None
        except ConnectionError as error:
            raise Cut(str(error) or "the link broke", quiet=self._alive.away) from error

    def _send(self, data: bytes) -> None:
        link = self._link
        try:
            if link is not None:
                link.send(data)
        except ConnectionError as error:
            raise Cut(str(error) or "the link broke", quiet=self._alive.away) from error

    def _send_order(self, number: int) -> None:
        link = self._link
        try:
            if link is not None:
                link.send(f"K {self._orders[number]} {number}\n".encode())
        except ConnectionError:
            # The iterating thread finds the link broken too, and sends the order over the next one.
            pass

    # Time

    def _nap(self, until: float) -> float:
        """Return how long to be idle before the next look at the clocks: `until`, or sooner."""
        now = self._clock.now()
        ends = [now + LOOK_EVERY_S, until]
        if self._patience.tick_s:
            ends.append(self._tick_at)
        if self._deadline is not None:
            ends.append(self._deadline)
        return max(0.0, min(ends) - now)

    @property
    def _over(self) -> bool:
        """Whether the caller's time is over."""
        return self._deadline is not None and self._clock.now() >= self._deadline

    def _clockwork(self) -> Iterator[Tick]:
        """Yield a Tick when one is due.

        Raises StillRunning when the caller's time is over, Unreachable where nobody knows the run.
        """
        now = self._clock.now()
        if self._over:
            limit = duration(self._patience.timeout_s or 0)
            raise self._left(
                f"not over after {limit}"
                if self.confirmed or self._begun
                else f"no answer in {limit}"
            )
        if self._patience.tick_s and now >= self._tick_at:
            self._tick_at = now + self._patience.tick_s
            yield Tick()

    # Words

    @property
    def _label(self) -> str:
        return (
            self.state.label
            if self.state
            else ids.label(self.prog_id, self._start.request.name if self._start else None)
        )

    @property
    def _facts(self) -> dict[str, Any]:
        return {"host": str(self.host), "prog_id": self.prog_id, "label": self._label}

    def _explained(self, kind: str, facts: Mapping[str, Any], *, verb: str) -> CorraError:
        return refusal_error(
            kind,
            facts,
            host=self.host,
            verb=verb,
            text=self.prog_id,
            label=self._label,
            start=self._start.request if self._start else None,
        )

    def _stranger(self, error: ValueError) -> CorraError:
        why = f"{self.host} doesn't speak corra's protocol: {error}"
        if self.state is None and self._start is None:
            return Unreachable(why, fate="", **self._facts)
        kind = MaybeStarted if self.state is None else StillRunning
        return kind(why, **self._facts)
