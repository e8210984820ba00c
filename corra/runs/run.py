"""A run that exists: its State, its output, what is sent to it, its end.

Any thread may call everything here. The runs of one target share its connection.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from corra.errors import NotFound, NotSent, StillRunning
from corra.model import ids
from corra.model.host import Host, reach_flags
from corra.model.signal_names import signal_name
from corra.model.state import State
from corra.model.units import in_seconds
from corra.remote.agent_client import Agent
from corra.remote.bootstrap import courier_source
from corra.remote.exchange import ANSWER_S, BadReply, Link

from . import history
from .asking import (
    STOP_MARGIN_S,
    answer_patience_s,
    ask_agent,
    asked_by,
    explained,
    last_word,
)
from .clock import Clock
from .events import Event
from .follow import PATIENT, Follow
from .patience import DEAD_AFTER_S, Patience
from .stdin_feed import StdinFeed
from .wanted import Wanted

if TYPE_CHECKING:
    from .disk import Freed
    from .result import Result

# The bytes of each stream that `wait` reads back for its Result; `Run.read` gives the rest.
OUTPUT_KEPT = 16 << 20
AT_ONCE = 32
# How often a sender looks whether it is done: no frame may say so.
SENDER_LOOK_S = 0.2
OnEvent = Callable[[Event], None]


class Killed(NamedTuple):
    """How `Run.kill` ended: `ended`, or the `survivors` ({pid, name, state, wchan})."""

    ended: bool
    survivors: tuple[Mapping[str, Any], ...]
    state: State


class Run:
    """One run on one host, whoever started it. Any thread may call its methods."""

    def __init__(
        self,
        agent: Agent,
        prog_id: str,
        *,
        name: str | None = None,
        spool: str | None = None,
        connection: Any = None,
        via: str | None = None,
        seen: bool = True,
    ) -> None:
        """`prog_id` may be a name or the beginning of a tail until the host has answered once.

        `seen`: the history knows the run already.
        """
        self.agent = agent
        self.id = prog_id
        self.name = name
        self.connection = connection
        self.known: State | None = None
        # Whether the run is known to have been started, though its host hasn't told us yet.
        self.begun = False
        self._spool = spool
        self._via = via
        self._seen = seen

    @property
    def host(self) -> Host:
        return self.agent.host

    @property
    def spool(self) -> str | None:
        """The spool directory that was asked for, if any was."""
        return self._spool

    @property
    def via(self) -> str | None:
        """The transport that was asked for, if any was."""
        return self._via

    @property
    def reached(self) -> str:
        """The flags by which any machine finds this run: `--host db1 --as root`."""
        return reach_flags(self.host, via=self._via, spool=self._spool)

    @property
    def label(self) -> str:
        return ids.label(self.id, self.name)

    def __repr__(self) -> str:
        return f"<Run {self.label} on {self.host}>"

    def state(self) -> State:
        """Return the State that the host tells now."""
        return self.heard(State.from_json(self._ask("status")))

    def record(self) -> tuple[dict[str, Any], bytes]:
        """Return the request as the host's record has it, and the bytes of the program's stdin."""
        with self._explained("record"), contextlib.closing(self._visit("record")) as link:
            given = link.read_all(link.reply["stdin"], DEAD_AFTER_S)
        return link.reply["record"], given

    def processes(self) -> dict[str, Any]:
        """Return its living processes and what they use: {processes: [..], spool: {free, ..}}."""
        with self._explained("tree"), contextlib.closing(self._visit("tree")) as link:
            return link.reply

    def _visit(self, verb: str) -> Link:
        request = {"prog_id": self.id, **({"spool": self._spool} if self._spool else {})}
        return self.agent.visit(verb, request, timeout_s=ANSWER_S)

    @contextlib.contextmanager
    def _explained(self, verb: str) -> Iterator[None]:
        """Raise the error that a failed answer means; a run that isn't there is gone."""
        try:
            with explained(self.host, verb, text=self.id, label=self.label):
                yield
        except NotFound:
            self._note_gone()
            raise

    def read(self, stream: str = "stdout", start: int = 0, end: int | None = None) -> bytes:
        """Return the bytes of a stream from `start` to `end` (default: all there are now).

        If `keep_output` bounds the stream, these are its last bytes, as far back as they go without
        a gap. A broken link is made again once.
        """
        parts: list[bytes] = []
        at, stop = start, end
        tried = False
        with self._explained("read"):
            while True:
                request = {"stream": stream, "start": at, "end": stop}
                try:
                    with contextlib.closing(self._stream("read", request, patient=tried)) as link:
                        begin, until, length = (
                            link.reply[name] for name in ("start", "end", "length")
                        )
                        asked = length if stop is None else stop
                        stop = min(length, asked)
                        if not min(at, length) <= begin <= until <= max(begin, asked):
                            raise BadReply(f"asked for {at}-{asked}, it sends {begin}-{until}")
                        if begin > at:
                            parts.clear()
                        parts.append(link.read_all(until - begin, DEAD_AFTER_S))
                        if until == begin < stop:
                            raise BadReply(f"nothing from {begin} on, of {stop}")
                        at = until
                    if at >= stop:
                        return b"".join(parts)
                except (ConnectionError, TimeoutError) as error:
                    self.agent.close()
                    if tried or isinstance(error, BadReply):
                        raise
                    tried = True

    def follow(
        self,
        cursor: Mapping[str, int] | None = None,
        *,
        tail: int | None = None,
        since_ns: int | None = None,
        streams: Sequence[str] | None = None,
        live: bool = True,
        late: bool = False,
        times: bool = False,
        patience: Patience = PATIENT,
        feed: StdinFeed | None = None,
        clock: Clock | None = None,
    ) -> Follow:
        """Return the run's events from `cursor` (or the last `tail` lines) on, each byte once."""
        return Follow(
            self.agent,
            self.id,
            Wanted(cursor, tail, since_ns, streams, live, late, times),
            patience,
            spool=self._spool,
            begun=self.begun or self.known is not None,
            by=asked_by(),
            feed=feed,
            told=self._told,
            clock=clock,
        )

    def __iter__(self) -> Iterator[Event]:
        return iter(self.follow())

    def wait(self, timeout: float | str | None = None, *, output: bool = True) -> Result:
        """Wait for the end and return its Result, whatever the end.

        `output`: with stdout and stderr, at most 16 MiB of each. Raises StillRunning when `timeout`
        is over first.
        """
        follow = self.follow(streams=[], patience=Patience(timeout_s=in_seconds(timeout)))
        for _ in follow:
            pass
        state = follow.state
        assert state is not None
        self.name = state.name
        texts = {"stdout": "", "stderr": ""}
        truncated = state.overdue == "output"
        for stream, facts in (state.streams or {}).items() if output else ():
            length = int(facts.get("length", 0))
            truncated = truncated or length > OUTPUT_KEPT or bool(facts.get("dropped"))
            data = self.read(stream, max(0, length - OUTPUT_KEPT), length) if length else b""
            texts["stderr" if stream == "stderr" else "stdout"] = data.decode("utf-8", "replace")
        return _result(
            state,
            self.host,
            truncated=truncated,
            connection=self.connection,
            hide=("stdout", "stderr"),
            **texts,
        )

    def signal(self, name: str | int) -> State:
        """Send that one signal to the program, and nothing after it; return the State.

        Raises CorraError with fate NOT SENT.
        """
        return self.heard(
            State.from_json(
                self._ask("signal", {"signal": signal_name(name), "by": asked_by()})["state"]
            )
        )

    def send(
        self, data: bytes | str, *, eof: bool = False, timeout: float | str | None = None
    ) -> None:
        """Send `data` to the program's stdin, and with `eof` its end; return when the host has it.

        The program may read it later. Raises NotSent where the program has no open stdin or has
        ended; some of the bytes may have been sent then, none of them twice.
        """
        feed = StdinFeed()
        feed.write(data.encode("utf-8", "surrogateescape") if isinstance(data, str) else data)
        if eof:
            feed.end()
        feed.finish()
        self.pass_on(feed, Patience(timeout_s=in_seconds(timeout)))

    def eof(self) -> None:
        """End the program's stdin; on a terminal, type its end-of-file character."""
        self.send(b"", eof=True)

    def pass_on(
        self, feed: StdinFeed, patience: Patience = PATIENT, *, watch: OnEvent | None = None
    ) -> None:
        """Send what `feed` is given, until it is finished and the host has all. Raises NotSent."""
        follow = self.follow(
            streams=[], feed=feed, patience=patience._replace(tick_s=SENDER_LOOK_S)
        )
        why = "it has ended"
        try:
            for event in follow:
                if watch is not None:
                    watch(event)
                if feed.done or feed.refused or (follow.state is not None and follow.state.ended):
                    break
        except StillRunning as error:
            why = error.why
        finally:
            follow.close()
            feed.close()
        if feed.done:
            return
        if feed.refused:
            why = (
                "the program has closed its stdin"
                if feed.closed_there
                else "its stdin was ended before"
            )
        some = f"; {feed.taken} bytes of {feed.given} were sent" if feed.taken else ""
        raise NotSent(why + some, host=str(self.host), prog_id=self.id, label=self.label)

    def kill(
        self,
        signal: str | int | None = None,
        grace: float | str | None = None,
        *,
        told: Callable[[Mapping[str, Any]], None] | None = None,
    ) -> Killed:
        """Send `signal`, after `grace` seconds KILL to all its processes, and wait for the end.

        The defaults are those the run was started with (TERM and 10 s). `grace=0` kills at once.
        `told` gets the host's first answer, {state, how, processes, signal, grace}, before the
        grace begins. Raises NotKilled when the order could not be given or its end not be seen.
        """
        request = {
            "signal": None if signal is None else signal_name(signal),
            "grace": in_seconds(grace),
            "by": asked_by(),
        }
        with self._explained("stop"):
            for last in (False, True):
                try:
                    with contextlib.closing(self._stream("stop", request, patient=last)) as link:
                        self.heard(State.from_json(link.reply["state"]))
                        if told is not None:
                            told(link.reply)
                            told = None
                        grace_s = float(link.reply.get("grace") or 0.0)
                        return self._killed(last_word(link, grace_s + STOP_MARGIN_S))
                except (ConnectionError, TimeoutError) as error:
                    self.agent.close()
                    if last or isinstance(error, BadReply):
                        raise
        raise AssertionError

    def free(self, *, dry: bool = False) -> Freed:
        """Remove the output of the run, which must have ended; its record stays. See `gc`."""
        from .disk import Freed

        state = self.state()
        request = {"ids": [state.prog_id], "dry": dry}
        return Freed.told(
            self.agent,
            ask_agent(self.agent, "gc", request, text=self.id, label=self.label, spool=self._spool),
        )

    def deliver(
        self,
        *,
        callback: Mapping[str, Any] | None = None,
        start: int | None = None,
        seconds: float = 60.0,
        route: str | None = None,
    ) -> Mapping[str, Any]:
        """Have the host send the run's output and end to its collector, or to `callback`'s, again.

        Return {state, delivered}. `start`: from this byte of each stream. `route`: where the
        courier is to connect from now on. `seconds=0` sends nothing.
        """
        request = {
            "callback": dict(callback) if callback else None,
            "from": start,
            "seconds": seconds,
            "route": route,
        }
        sent = {
            **{key: value for key, value in request.items() if value is not None},
            "prog_id": self.id,
            "courier": courier_source(),
        }
        whole = {**sent, **({"spool": self._spool} if self._spool else {})}
        with self._explained("deliver"):
            return self.agent.call("deliver", whole, timeout_s=seconds + STOP_MARGIN_S)

    def _killed(self, answer: Mapping[str, Any]) -> Killed:
        state = self.heard(State.from_json(answer["state"]))
        return Killed(bool(answer.get("ended")), tuple(answer.get("survivors") or ()), state)

    def heard(self, state: State) -> State:
        """Remember the State that the host has told, and return it. Raises Unreachable."""
        before = self.known
        if before is not None and before.prog_id != state.prog_id:
            with self._explained("status"):
                raise BadReply(f"asked for {before.prog_id}, it answers for {state.prog_id}")
        self.known = state
        self.id, self.name = state.prog_id, state.name
        if not self._seen:
            self._seen = True
            history.saw_run(self.host, state, via=self._via, spool=self._spool)
        elif before is None or before.state != state.state:
            history.note_state(self.host, self.id, state.state)
        return state

    def _told(self, state: State | None) -> None:
        if state is not None:
            self.heard(state)

    def _note_gone(self) -> None:
        if ids.is_valid(self.id):
            history.note_gone(self.id, self.host, spool=self._spool)

    def _ask(self, verb: str, request: Mapping[str, Any] | None = None) -> dict[str, Any]:
        try:
            return ask_agent(
                self.agent,
                verb,
                {"prog_id": self.id, **(request or {})},
                text=self.id,
                label=self.label,
                spool=self._spool,
            )
        except NotFound:
            self._note_gone()
            raise

    def _stream(self, verb: str, request: Mapping[str, Any], *, patient: bool) -> Link:
        whole = {"prog_id": self.id, "spool": self._spool, **request}
        told = {k: v for k, v in whole.items() if v is not None}
        return self.agent.stream(verb, told, timeout_s=answer_patience_s(patient))


def _result(state: State, host: Host, **facts: Any) -> Result:
    from .result import Result

    return Result(state, host, **facts)
