"""Watching a run so that each byte comes once and in order, whatever the network does.

The host holds the bytes, we hold the next offset of each stream (`Cursor`), and a link is only a way to get from the one to the other:
whenever it breaks, falls silent or this machine has slept, it is dropped and made again from the cursor. Starting is the same loop:
the start request goes out again with the same id until the host confirms it, and the host starts a run at most once.

A connection that can't be made at the first try is an error at once (a typo in the host name shouldn't be retried for ever);
after that nothing but the final State, `close()` or a limit the caller gave ends the loop.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple, Protocol

from corra.errors import CorraError, MaybeStarted, Misuse, StillRunning, Unreachable
from corra.model import ids
from corra.model.frames import Ack, Beat, Cursor, Gap, Output, Parser, Status, Taken
from corra.model.host import Host
from corra.model.program import Request
from corra.model.refusals import refusal_error, retold
from corra.model.signal_names import signal_name
from corra.model.state import State
from corra.model.words import duration
from corra.remote.exchange import ANSWER_S, Refused
from corra.transport.channel import LinkLost, NoAnswer, Silent

from .clock import Clock
from .events import Event, LinkDown, LinkUp, Tick
from .stdin_feed import StdinFeed

PING_EVERY_S = 5.0
DEAD_AFTER_S = 15.0

# A suspended machine's clocks drift apart by the time it slept; a step of NTP may look the same and only costs one new link.
SLEPT_S = 5.0
# Looking at the clocks once a second notices a wake-up within that second and costs less than 0.01 % of a core.
LOOK_EVERY_S = 1.0
# The host's follow leaves when it has had no ping for 60 s. If we were away half as long (Ctrl-Z, a pager that doesn't scroll),
# its leaving is nobody's fault and not worth a word.
AWAY_S = 30.0

# A login may take longer than ANSWER_S (a slow .profile, a home on a sleepy NFS server): each silent try is given twice the time, up to 8 times.
PATIENCE_DOUBLED_MAX = 3
# A hole that no G frame announced is the link's fault, until the host has left the same one this often.
SKIPS_MAX = 3
# A command that ended without an answer may have been killed by chance; three in a row are no chance.
NO_ANSWERS_MAX = 3
_FIRST_PAUSE_S = 0.25
_LONGEST_PAUSE_S = 15.0


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


class _Cut(Exception):
    """A link that is no good any more.

    `quiet`: nobody needs to hear of it unless it can't be made again. `dead`: neither is the connection below it any good.
    """

    def __init__(self, why: str, *, quiet: bool = False, dead: bool = False) -> None:
        super().__init__(why)
        self.quiet = quiet
        self.dead = dead


class _Down(NamedTuple):
    """Since when there has been no link, and which try to make one is next."""

    at: float
    quiet: bool
    attempt: int = 1

    def again(self) -> _Down:
        return _Down(self.at, False, self.attempt + 1)


class Follow:
    """The events of one run, from the cursor on, until it has ended.

    Iterate it in one thread; `signal` and `close` may be called from any. An iteration that an exception broke off (Ctrl-C) can be
    taken up again by iterating anew: it goes on behind the last event that was handed out.

    Raises Unreachable, HostKey, Auth and the other NotStarted for a first try that failed; MaybeStarted and StillRunning when
    `reconnect_timeout_s` or `timeout_s` is over; NotFound and the like when the host refuses.
    """

    def __init__(
        self,
        agent: AnsweringAgent,
        prog_id: str,
        *,
        start: Request | None = None,
        stay: bool = True,
        payload: BinaryIO | None = None,
        cursor: Mapping[str, int] | None = None,
        tail: int | None = None,
        since_ns: int | None = None,
        streams: Sequence[str] | None = None,
        live: bool = True,
        late: bool = False,
        times: bool = False,
        spool: str | None = None,
        begun: bool = False,
        dead_after_s: float = DEAD_AFTER_S,
        reconnect_timeout_s: float | None = None,
        timeout_s: float | None = None,
        tick_s: float | None = None,
        by: str = "",
        feed: StdinFeed | None = None,
        told: Callable[[State | None], None] | None = None,
        clock: Clock | None = None,
    ) -> None:
        """`prog_id`: an id, or what the host is to find it by. `start`: start this first; `stay=False` then leaves as soon as the host has confirmed it. `payload` is its stdin, seekable.

        `begun`: the run is known to have been started, though this Follow hasn't heard of it yet. `dead_after_s` of silence make a link
        dead; `timeout_s` limits the whole watch. `feed` is what goes to the program meanwhile. `told` hears of each State, and None when `start`
        has certainly started nothing.
        """
        self.prog_id = prog_id
        self.host = agent.host
        self.state: State | None = None
        self.switched = b""  # what its program has switched on in its terminal before we came
        self.first = False  # nobody has seen anything of it before us
        self.placed = 0
        self._agent = agent
        self._start = start
        self._stay = stay
        self._payload = payload
        self._cursor = Cursor(cursor)
        self._tail = tail
        self._since_ns = since_ns
        self._within = (
            tail is not None or since_ns is not None
        )  # the first byte shown needn't be the first there is
        self._streams = None if streams is None else tuple(streams)
        self._live = live
        self._late = late
        self._times = times
        self._spool = spool if start is None else start.spool
        self._begun = begun
        self._by = by
        self.feed = feed
        self._told = told or (lambda _: None)
        self._clock = clock or Clock()
        self._dead_after_s = dead_after_s
        self._ping_every_s = min(PING_EVERY_S, dead_after_s / 3)
        self._reconnect_timeout_s = reconnect_timeout_s
        self._tick_s = tick_s
        self._deadline = None if timeout_s is None else self._clock.now() + timeout_s
        self._timeout_s = timeout_s
        self._tick_at = self._clock.now() + (tick_s or 0)
        self._link: OpenLink | None = None
        self._parser = Parser()
        self._before: dict[str, int] = {}
        self._tried = self._useful = self._away = self._iterating = self._sent = False
        self._no_answers = self._silences = 0
        self._skips: dict[tuple[str, int], int] = {}
        self._heard_at = self._ping_at = self._slept_s = 0.0
        self._asked_at: float | None = None
        self._closed = threading.Event()
        self._wake = threading.Event()
        self._order = itertools.count(1)
        self._orders: dict[int, str] = {}
        # Reentrant: a signal handler may call `signal` while its own thread is in here.
        self._lock = threading.RLock()

    @property
    def cursor(self) -> dict[str, int]:
        """The next offset of each stream, behind the last event handed out."""
        return dict(self._cursor.offsets)

    @property
    def confirmed(self) -> bool:
        """Whether the host has said that it knows the run."""
        return self.state is not None

    @property
    def sent(self) -> bool:
        """Whether a byte has gone out to the host: until then nothing can have been started, and after `close` it stays so."""
        return self._sent

    @property
    def starting(self) -> bool:
        """Whether this is a start that the host hasn't confirmed yet."""
        return self._start is not None and self.state is None

    def forget(self) -> None:
        """Tell whoever keeps track that this start has certainly started nothing."""
        self._told(None)

    @property
    def linked(self) -> bool:
        """Whether a link is open at the moment."""
        return self._link is not None

    def __iter__(self) -> Iterator[Event]:
        self._drop()
        self._iterating = True
        try:
            yield from self._watch()
        finally:
            self._iterating = False
            self._drop()

    def signal(self, name: str | int) -> None:
        """Send a signal to the program: over the open link, or else with the next one, or by a call of its own when nobody iterates.

        The host acts on it at least once: an order whose link broke before it was acknowledged goes out again on the next.
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

    def close(self) -> None:
        """Stop watching; the program goes on. An iteration in another thread ends, and sends nothing more."""
        with self._lock:
            self._closed.set()
        self._wake.set()
        self._drop()

    # One link after the other

    def _watch(self) -> Iterator[Event]:
        down: _Down | None = None
        fruitless = 0
        while not self._closed.is_set():
            try:
                state = self._connect()
                if down is not None and not down.quiet:
                    yield LinkUp(self._clock.now() - down.at)
                down = None
                yield Status(state)
                # What was never started has no output, and the host says no more of it.
                if not self._stay or state["state"] == "not_started":
                    return
                yield from self._pump()
                return
            except _Cut as cut:
                self._drop()
                if self._closed.is_set():
                    return
                if cut.dead:
                    # The next link must not wait for a connection that says nothing; others that use it notice now instead of later.
                    self._agent.close()
                down = down.again() if down else _Down(self._clock.now(), cut.quiet)
                fruitless = 1 if self._useful else fruitless + 1
                since_s = self._clock.now() - down.at
                self._give_up(since_s, str(cut))
                if not down.quiet:
                    yield LinkDown(since_s, str(cut), down.attempt)
                yield from self._pause(fruitless)

    def _connect(self) -> Mapping[str, Any]:
        """Make a link and return the State it begins with."""
        starting = self.starting
        verb = "follow" if not starting else "run" if self._stay else "start"
        first, self._tried, self._useful = not self._tried, True, False
        if self._payload is not None:
            self._payload.seek(0)
        try:
            link = self._agent.stream(
                verb,
                self._request(starting),
                payload=self._payload if starting else None,
                timeout_s=self._patience_s(),
                sending=self._sending,
            )
        except Refused as refusal:
            if first and starting:
                self._told(None)
            raise self._explained(refusal.kind, refusal.facts, verb=verb) from refusal
        except CorraError as error:
            if first or isinstance(error, Misuse):
                if starting:
                    self._told(None)
                if self._begun and self._over:
                    raise self._left(
                        f"not seen to end in {duration(self._timeout_s or 0)}: {error.why}"
                    ) from error
                raise retold(
                    error,
                    verb=verb,
                    label=self._label if self.confirmed else "",
                    prog_id=self.prog_id,
                ) from error
            # Any of these may heal: a host key that changes in mid-run is shown and never accepted.
            raise _Cut(error.why) from error
        except NoAnswer as error:
            self._no_answers += 1
            if self._no_answers >= NO_ANSWERS_MAX:
                raise self._left(str(error)) from error
            raise _Cut(str(error)) from error
        except (ConnectionError, TimeoutError) as error:
            silent = isinstance(error, (Silent, TimeoutError))
            self._silences += silent
            raise _Cut(str(error) or "no answer", dead=silent) from error
        self._no_answers = self._silences = 0
        with self._lock:
            self._link, self._parser = link, Parser()
            for number in list(self._orders):
                self._send_order(number)
        if self.feed is not None and self._stay:
            self.feed.linked(link)
        self._heard_at = self._clock.now()
        self._ping_at = self._heard_at + self._ping_every_s
        self._asked_at = None
        self._slept_s = self._sleep_so_far()
        self._away = False
        self.placed = self.placed or link.placed
        try:
            state = State.from_json(link.reply)
        except ValueError as error:
            raise self._stranger(error) from error
        if (self.state is not None or self._start is not None) and state.prog_id != self.prog_id:
            raise self._stranger(ValueError(f"it answers for {state.prog_id}"))
        self.prog_id = (
            state.prog_id
        )  # until now it may have been a name, which can come to mean another run
        if self.state is None and self._within:
            self._begin_tail(link.reply, state)
        self.state = state
        self._told(self.state)
        return link.reply

    def _patience_s(self) -> float:
        """Return how long the host may take to answer."""
        patience_s = ANSWER_S * (1 << min(self._silences, PATIENCE_DOUBLED_MAX))
        return (
            patience_s
            if self._deadline is None
            else max(0.1, min(patience_s, self._deadline - self._clock.now()))
        )

    def _sending(self) -> None:
        """Note that a request is about to go out; once we are closed, none does."""
        with self._lock:
            if self._closed.is_set():
                raise LinkLost("closed")
            self._sent = True

    def _begin_tail(self, reply: Mapping[str, Any], state: State) -> None:
        """Learn where a tail begins, so that a link cut before its first byte loses none: where the host says, else the end of what was.

        And what its program has switched on in a terminal, of which the tail may not tell.
        """
        begins = reply.get("cursor")
        if isinstance(begins, Mapping):
            for stream, offset in begins.items():
                self._cursor.offsets.setdefault(str(stream), int(offset))
        self.switched = str(reply.get("switched") or "").encode("latin-1", "replace")
        self._before = {
            stream: facts.get("length", 0) for stream, facts in (state.streams or {}).items()
        }

    def _request(self, starting: bool) -> dict[str, Any]:
        offsets = dict(self._cursor.offsets)
        again = self._within and self.confirmed and (bool(offsets) or self._tail == 0)
        if again:
            offsets = {**self._before, **offsets}
        follow: dict[str, Any] = {
            "cursor": offsets or None,
            "tail": None if again else self._tail,
            "since": None if again or self._since_ns is None else self._since_ns // 1000,
            "by": self._by or None,
            "streams": None if self._streams is None else list(self._streams),
            "late": self._late or None,
            "times": self._times or None,
            "sender": self.feed.sender if self.feed is not None else None,
        }
        if starting:
            assert self._start is not None
            whole = self._start.to_json()
            return (
                {**whole, **{k: v for k, v in follow.items() if v is not None}}
                if self._stay
                else whole
            )
        follow |= {"prog_id": self.prog_id, "live": self._live, "spool": self._spool}
        return {k: v for k, v in follow.items() if v is not None}

    def _drop(self) -> None:
        with self._lock:
            link, self._link = self._link, None
        if self.feed is not None:
            self.feed.unlinked()
        if link is not None:
            link.close()

    def _give_up(self, since_s: float, why: str) -> None:
        """Raise if the caller's patience with a missing link is over."""
        if self._reconnect_timeout_s is None or since_s < self._reconnect_timeout_s:
            return
        if self.confirmed or self._start is None:
            raise self._left(f"link lost {duration(since_s)} ago, given up: {why}")
        raise self._left(f"link lost before {self.host} confirmed it")

    def _left(self, why: str) -> CorraError:
        """Return what to raise when we leave before the end."""
        if self.state is None and self._start is not None:
            return MaybeStarted(
                why,
                hint=[
                    f"safe to repeat, it starts at most once: the same command, --id {self.prog_id}"
                ],
                **self._facts,
            )
        if self.state is None and not self._begun:
            return retold(Unreachable(why, **self._facts), verb="follow")
        return StillRunning(why, **self._facts)

    def _pause(self, fruitless: int) -> Iterator[Event]:
        """Wait before the next try, each time twice as long; an order, a wake-up of this machine or `close` cuts it short."""
        # Half of it by chance: a hundred followers of a host that comes back must not knock in the same moment.
        pause_s = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2 ** min(fruitless - 1, 10)) * (
            0.5 + self._clock.random() / 2
        )
        until, slept_s = self._clock.now() + pause_s, self._sleep_so_far()
        while not (self._wake.is_set() or self._closed.is_set()):
            yield from self._clockwork()
            if self._clock.now() >= until or self._sleep_so_far() - slept_s > SLEPT_S:
                break
            self._clock.wait(self._wake, self._nap(until))
        self._wake.clear()

    # One link

    def _pump(self) -> Iterator[Event]:
        """Hand out what the link brings until the run is over. Raises _Cut."""
        final = last_was_status = False
        while True:
            yield from self._clockwork()
            if self._closed.is_set():
                return
            self._keep_alive()
            data = self._read()
            if data is None:
                continue
            if not data:
                if final or (last_was_status and not self._live):
                    yield from self._shortfall(final)
                    return
                raise _Cut("the link was closed", quiet=self._away)
            self._heard_at, self._asked_at = self._clock.now(), None
            try:
                for frame in self._parser.feed(data):
                    last_was_status = isinstance(frame, Status)
                    if isinstance(frame, (Output, Gap)):
                        self._useful = True
                        begin = frame.offset if isinstance(frame, Output) else frame.start
                        if self._within:
                            self._cursor.offsets.setdefault(frame.stream, begin)
                        self._expect(frame.stream, begin)
                        yield from self._cursor.take(frame)
                    elif isinstance(frame, Status):
                        self.state = State.from_json(frame.state)
                        self._told(self.state)
                        final = self.state.ended
                        if final and not self._late:
                            yield from self._shortfall(final)
                            yield frame
                            return
                        yield frame
                    elif isinstance(frame, Beat):
                        self._useful, self._away = True, False
                    elif isinstance(frame, Ack):
                        self._orders.pop(frame.number, None)
                    elif isinstance(frame, Taken):
                        self._useful = True
                        if self.feed is not None:
                            self.feed.told(frame)
                        yield frame
                    else:
                        raise self._explained(
                            str(frame.error.get("error")), frame.error, verb="follow"
                        )
            except ValueError as error:
                raise self._stranger(error) from error

    def _read(self) -> bytes | None:
        """Return what has come, b"" at the end, None when it is time to look at the clock."""
        link = self._link
        if link is None:
            raise _Cut("the link was closed")
        try:
            return link.read(self._nap(self._ping_at))
        except TimeoutError:
            return None
        except ConnectionError as error:
            raise _Cut(str(error) or "the link broke", quiet=self._away) from error

    def _keep_alive(self) -> None:
        """Ping when it is time to; raise _Cut when the other side has been silent for too long or this machine has slept."""
        now = self._clock.now()
        if self._sleep_so_far() - self._slept_s > SLEPT_S:
            raise _Cut("this machine slept", dead=True)
        if now >= self._ping_at:
            self._away = self._away or now - self._ping_at > AWAY_S
            self._ping_at = now + self._ping_every_s
            self._asked_at = now if self._asked_at is None else self._asked_at
            self._send(b"P\n")
        # Silence counts only behind a ping: whoever was stopped for a minute must first ask and read before it calls the other side dead.
        asked_s = 0.0 if self._asked_at is None else now - self._asked_at
        if (
            now - self._heard_at >= self._dead_after_s
            and asked_s >= self._dead_after_s - self._ping_every_s
        ):
            raise _Cut(f"silent for {duration(now - self._heard_at)}", quiet=self._away, dead=True)

    def _send(self, data: bytes) -> None:
        link = self._link
        try:
            if link is not None:
                link.send(data)
        except ConnectionError as error:
            raise _Cut(str(error) or "the link broke", quiet=self._away) from error

    def _send_order(self, number: int) -> None:
        link = self._link
        try:
            if link is not None:
                link.send(f"K {self._orders[number]} {number}\n".encode())
        except ConnectionError:
            # Whoever reads the link will find it broken and make another, over which the order goes again.
            pass

    def _expect(self, stream: str, begin: int) -> None:
        """Raise _Cut where `begin` leaves bytes out that nobody said are gone: they are asked for again, and not often."""
        at = self._cursor.offsets.get(stream, 0)
        if begin <= at:
            return
        left_out = self._skips[stream, at] = self._skips.get((stream, at), 0) + 1
        if left_out < SKIPS_MAX:
            raise _Cut(f"{stream} went on at byte {begin} and not at {at}", quiet=True)

    def _shortfall(self, final: bool) -> Iterator[Output | Gap]:
        """Yield a Gap for what the final State counts and nobody sent, though asked again: a hole is never passed over in silence."""
        if not final or self._within or self.state is None:
            return
        for stream, facts in (self.state.streams or {}).items():
            at = self._cursor.offsets.get(stream, 0)
            if facts.get("length", 0) > at and (self._streams is None or stream in self._streams):
                self._expect(stream, facts["length"])
                yield from self._cursor.take(Gap(stream, at, facts["length"]))

    # Time

    def _sleep_so_far(self) -> float:
        return self._clock.with_sleep() - self._clock.now()

    def _nap(self, until: float) -> float:
        """Return how long we may be idle before a clock has to be looked at: `until`, or before."""
        now = self._clock.now()
        ends = [now + LOOK_EVERY_S, until]
        if self._tick_s:
            ends.append(self._tick_at)
        if self._deadline is not None:
            ends.append(self._deadline)
        return max(0.0, min(ends) - now)

    @property
    def _over(self) -> bool:
        """Whether the caller's time is over."""
        return self._deadline is not None and self._clock.now() >= self._deadline

    def _clockwork(self) -> Iterator[Tick]:
        """Yield a Tick when one is due. Raises StillRunning when the caller's time is over; Unreachable where nobody knows the run."""
        now = self._clock.now()
        if self._over:
            limit = duration(self._timeout_s or 0)
            raise self._left(
                f"not over after {limit}"
                if self.confirmed or self._begun
                else f"no answer in {limit}"
            )
        if self._tick_s and now >= self._tick_at:
            self._tick_at = now + self._tick_s
            yield Tick()

    # Words

    @property
    def _label(self) -> str:
        return (
            self.state.label
            if self.state
            else ids.label(self.prog_id, self._start.name if self._start else None)
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
            start=self._start,
        )

    def _stranger(self, error: ValueError) -> CorraError:
        why = f"{self.host} doesn't speak corra's protocol: {error}"
        if self.state is None and self._start is None:
            return retold(Unreachable(why, **self._facts), verb="follow")
        kind = MaybeStarted if self.state is None else StillRunning
        return kind(why, **self._facts)
