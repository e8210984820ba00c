"""Runs that there are: found again, watched, sent to, stopped.

Everything here may be called from several threads; runs of one target share its connection.
"""

from __future__ import annotations

import getpass
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from . import history, hostset, ids
from .agent import VERSION
from .errors import CorraError, NotFound, NotKilled, NotSent, StillRunning, Unreachable, typed
from .feed import Feed
from .follow import ANSWER_S, DEAD_AFTER_S, Event, Follow, Link, signal_name
from .place import Agent, Refused, courier_source
from .program import Host, in_seconds
from .reach import Reach, agent_to_ask, is_a, is_one
from .state import State
from .stream import Parser, Status
from .verdict import WIDTH, ambiguous, duration, refused, retold

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .result import Result

# What `wait` reads back for its Result; `Run.read` gives any part of the rest.
OUTPUT_KEPT = 16 << 20
# Beyond the grace: the host's own two seconds for KILL to work, and a slow line's answer.
STOP_MARGIN_S = 30.0
AT_ONCE = 32
# How often a sender looks whether it is done: what it waits for may be said by no frame.
LOOK_S = 0.2
Watch = Callable[[Event], None]


class Killed(NamedTuple):
    """What `Run.kill` came to: `ended` when nothing is left, else the `survivors` ({pid, name, state, wchan})."""

    ended: bool
    survivors: tuple[Mapping[str, Any], ...]
    state: State


def me() -> dict[str, str]:
    """Return who asks, for a State's `origin`."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a uid without a name, as in many containers
        user = str(os.getuid())
    return {"user": user, "host": os.uname().nodename, "version": VERSION}


def by() -> str:
    origin = me()
    return f"{origin['user']}@{origin['host']}"


def attach(
    id: str | None = None,  # noqa: A002
    host: Any = None,
    *,
    spool: str | None = None,
    **reach: Unpack[Reach],
) -> Run:
    """Return the run that `id` (an id, a name or the beginning of a tail) means on `host`, the newest of mine without an id.

    Without a host this machine's history knows it. Raises NotFound, Ambiguous, Unreachable and what else may go wrong on the way.
    """
    run = named(id, host, spool=spool, **reach)
    if run.known is None:
        run.state()
    return run


def named(
    id: str | None = None,  # noqa: A002
    host: Any = None,
    *,
    spool: str | None = None,
    verb: str = "attach",
    **reach: Unpack[Reach],
) -> Run:
    """Return the run that `attach` would, without asking its host whether it is there: its first answer tells, and the run's full id with it.

    One exec less for whoever asks something else anyway. `verb` is what a hint has to be typed with. Raises NotFound and Ambiguous where history can't say which.
    """
    if host is None:
        entry = recall(id, verb)
        # A name is the host's to resolve: since we last looked it may have been given to another run.
        text = id if id is not None and id == entry.name else entry.prog_id
        reach = {
            **reach,
            "via": reach.get("via") or entry.via,
            "as_user": reach.get("as_user") or entry.as_user,
        }
        run = named(text, entry.host, spool=spool or entry.spool, **reach)
        run.begun = entry.begun
        return run
    agent = agent_to_ask(host, **reach)
    connection = host if is_a(host, "fabric.connection", "Connection") else None
    run = Run(agent, id or "", spool=spool, connection=connection, via=reach.get("via"), seen=False)
    if id is None:
        run.heard(_newest_of_mine(agent, spool))
    return run


def recall(text: str | None, verb: str = "attach") -> history.Entry:
    """Return the one run that `text` means in this machine's history, the newest for None. Raises NotFound, Ambiguous."""
    if text is None:
        newest = history.newest()
        if newest is None:
            raise NotFound(
                "no run was started from here yet; say where to look:",
                fate="NOT FOUND in this machine's history",
                hint=[f"{typed()} ps --host HOST"],
            )
        return newest
    found = history.find(text)
    if len(found) > 1:
        raise ambiguous(text, "", [entry.as_state() for entry in found], with_hosts=True)
    if not found:
        say = f"{typed()} {verb} --host HOST {text}"
        look = f"{typed()} ps --host {','.join(history.hosts()[:3]) or 'HOST'}"
        raise NotFound(
            "say where it runs:",
            label=text,
            fate="NOT FOUND in this machine's history",
            hint=[one]
            if len(one := f"{say}       or look: {look}") <= WIDTH
            else [say, f"or look: {look}"],
        )
    return found[0]


def _newest_of_mine(agent: Agent, spool: str | None) -> State:
    mine = me()
    runs = [State.from_json(each) for each in _ask(agent, "list", {}, spool=spool).get("runs", ())]
    own = [
        state
        for state in runs
        if (state.origin or {}).get("user") == mine["user"]
        and (state.origin or {}).get("host") == mine["host"]
    ]
    if not own:
        raise NotFound(
            f"none of the {len(runs)} runs there was started from here; say which",
            host=str(agent.host),
        )
    return max(own, key=lambda state: (state.start_time or "", state.prog_id))


def ps(
    hosts: Any,
    *,
    match: str | None = None,
    spool: str | None = None,
    **reach: Unpack[Reach],
) -> list[State | CorraError]:
    """Return the State of every run on `hosts`; for a host that can't tell, the error (Unreachable and the like) in their place.

    `hosts` is one target or several, or their set (`web[1-6],db1`); a State's `host` is the target's text, so that it can be typed.
    """
    targets = [hosts] if is_one(hosts) else list(hosts)
    targets = [
        name
        for each in targets
        for name in (hostset.hosts(each) if isinstance(each, str) else [each])
    ]
    request = {} if match is None else {"match": match}

    def ask(target: Any) -> list[State | CorraError]:
        try:
            agent = agent_to_ask(target, **reach)
            answer = _ask(agent, "list", request, spool=spool)
            states = [State.from_json(each) for each in answer.get("runs", ())]
            # What this machine keeps for another host is that host's.
            return [
                replace(state, host=(state.link or str(agent.host)).partition(" as ")[0])
                for state in states
            ]
        except CorraError as error:
            return [error]

    if not targets:
        return []
    with ThreadPoolExecutor(min(AT_ONCE, len(targets))) as pool:
        return [each for found in pool.map(ask, targets) for each in found]


class Freed(NamedTuple):
    """What gc removed on a host, or would: ids of runs whose output went, ids of records that went too, and the bytes."""

    host: str
    emptied: tuple[str, ...]
    forgotten: tuple[str, ...]
    bytes: int

    @classmethod
    def told(cls, agent: Agent, answer: Mapping[str, Any]) -> Freed:
        return cls(
            str(agent.host), tuple(answer["removed"]), tuple(answer["forgotten"]), answer["freed"]
        )


def gc(
    host: Any,
    *,
    older: float | str | None = None,
    max_size: int | None = None,
    dry: bool = False,
    spool: str | None = None,
    **reach: Unpack[Reach],
) -> Freed:
    """Remove the output of ended runs on `host`: what is older than `older`, then the oldest beyond `max_size` bytes.

    The host's own rules hold where nothing is said (DESIGN.md, the spool). A run that isn't over, is being watched or hasn't been
    delivered keeps its output, whatever is asked. `dry` only tells.
    """
    agent = agent_to_ask(host, **reach)
    told = {"older": in_seconds(older), "max_size": max_size, "dry": dry}
    return Freed.told(
        agent,
        _ask(
            agent,
            "gc",
            {key: value for key, value in told.items() if value is not None},
            spool=spool,
        ),
    )


class Run:
    """One run on one host, whoever started it. All methods may be called from any thread."""

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
        """`prog_id` may be a name or the beginning of a tail until the host has answered once. `seen`: history has it already."""
        self.agent = agent
        self.id = prog_id
        self.name = name
        self.connection = connection
        self.known: State | None = None
        # Whether it is known to have been started, though its host hasn't told us yet.
        self.begun = False
        self._spool = spool
        self._via = via
        self._seen = seen

    @property
    def host(self) -> Host:
        return self.agent.host

    @property
    def spool(self) -> str | None:
        """The directory it was told to be spooled in, if any was."""
        return self._spool

    @property
    def via(self) -> str | None:
        """What carries its bytes, where that was said."""
        return self._via

    @property
    def label(self) -> str:
        return ids.label(self.id, self.name)

    def __repr__(self) -> str:
        return f"<Run {self.label} on {self.host}>"

    def state(self) -> State:
        """Return what the host says of it now."""
        return self.heard(State.from_json(self._ask("status")))

    def record(self) -> tuple[dict[str, Any], bytes]:
        """Return what was asked of it, as its host has written it down, and what it was given to read."""
        link = self._visit("record")
        try:
            parts, left = [], int(link.reply["stdin"])
            while left > 0:
                data = link.read(DEAD_AFTER_S)
                if not data:
                    raise Unreachable(
                        "link lost", host=str(self.host), label=self.label, fate="NOT DONE"
                    )
                parts.append(data)
                left -= len(data)
        except (ConnectionError, TimeoutError) as error:
            raise retold(
                _silent(error, self.host), verb="record", label=self.label, prog_id=self.id
            ) from error
        finally:
            link.close()
        return link.reply["record"], b"".join(parts)

    def processes(self) -> dict[str, Any]:
        """Return what its living processes are and use: {processes: [..], spool: {free, floor, ..}}, as doctor.py has it."""
        link = self._visit("tree")
        link.close()
        return link.reply

    def _visit(self, verb: str) -> Link:
        request = {"prog_id": self.id, **({"spool": self._spool} if self._spool else {})}
        try:
            return self.agent.visit(verb, request, timeout_s=ANSWER_S)
        except Refused as refusal:
            raise refused(
                refusal.kind,
                refusal.facts,
                host=self.host,
                verb=verb,
                text=self.id,
                label=self.label,
            ) from refusal
        except (ConnectionError, TimeoutError) as error:
            raise retold(
                _silent(error, self.host), verb=verb, label=self.label, prog_id=self.id
            ) from error

    def read(self, stream: str = "stdout", start: int = 0, end: int | None = None) -> bytes:
        """Return the bytes from `start` to `end` (default: all there are now) of a stream. A broken link is made again once.

        Of a stream that `keep_output` bounds these are the last of them, as far back as they are still there without a gap.
        """
        parts: list[bytes] = []
        at, stop = start, end
        tried = False
        while True:
            try:
                with _Closing(
                    self._stream(
                        "read", {"stream": stream, "start": at, "end": stop}, patient=tried
                    )
                ) as link:
                    begin, until, length = (
                        int(link.reply[name]) for name in ("start", "end", "length")
                    )
                    stop = min(length, length if stop is None else stop)
                    if begin > at:
                        parts.clear()
                    at = begin
                    while at < until:
                        data = link.read(DEAD_AFTER_S)
                        if not data:
                            raise ConnectionError("the link was closed")
                        parts.append(data)
                        at += len(data)
                if at >= stop:
                    return b"".join(parts)
            except (ConnectionError, TimeoutError) as error:
                self._relink(error, "read", last=tried)
                tried = True

    def follow(
        self,
        cursor: Mapping[str, int] | None = None,
        *,
        tail: int | None = None,
        streams: Sequence[str] | None = None,
        live: bool = True,
        late: bool = False,
        times: bool = False,
        **how: Any,
    ) -> Follow:
        """Return its events from `cursor` (or the last `tail` lines) on, each byte once, to its end. `how`: the rest Follow takes."""
        return Follow(
            self.agent,
            self.id,
            cursor=cursor,
            tail=tail,
            streams=streams,
            live=live,
            late=late,
            times=times,
            spool=self._spool,
            begun=self.begun or self.known is not None,
            by=by(),
            told=self._told,
            **how,
        )

    def __iter__(self) -> Iterator[Event]:
        return iter(self.follow())

    def wait(self, timeout: float | str | None = None, *, output: bool = True) -> Result:
        """Wait until it has ended and return its Result, whatever the end; `output`: with its stdout and stderr, at most 16 MiB of each.

        Raises StillRunning when `timeout` is over first.
        """
        follow = self.follow(streams=[], timeout_s=in_seconds(timeout))
        for _ in follow:
            pass
        state = follow.state
        assert state is not None
        self.name = state.name
        texts = {"stdout": "", "stderr": ""}
        truncated = False
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
        """Send that one signal to the program, nothing after it, and return the State. Raises CorraError with fate NOT SENT."""
        return self.heard(
            State.from_json(self._ask("signal", {"signal": signal_name(name), "by": by()})["state"])
        )

    def send(
        self, data: bytes | str, *, eof: bool = False, timeout: float | str | None = None
    ) -> None:
        """Have the program read `data`, and with `eof` its end behind that; return when the host has it, which the program may read later.

        Raises NotSent where it has no stdin to send to, has ended or has closed it; some of the bytes may have been sent then, never any twice.
        """
        feed = Feed()
        feed.write(data.encode("utf-8", "surrogateescape") if isinstance(data, str) else data)
        if eof:
            feed.end()
        feed.finish()
        self.pass_on(feed, timeout_s=in_seconds(timeout))

    def eof(self) -> None:
        """End the program's stdin; on a terminal, type what means that there."""
        self.send(b"", eof=True)

    def pass_on(
        self, feed: Feed, *, timeout_s: float | None = None, watch: Watch | None = None, **how: Any
    ) -> None:
        """Send what `feed` is given, until it is finished and the host has all of it. `how`: the rest Follow takes. Raises NotSent."""
        follow = self.follow(streams=[], feed=feed, timeout_s=timeout_s, tick_s=LOOK_S, **how)
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
        """Send `signal`, after `grace` seconds KILL to all its processes, and wait until that is over.

        Without them: what the run was started with (TERM and 10 s). `grace=0` kills at once. `told` gets the host's first answer,
        {state, how, processes, signal, grace}, before the grace begins. Raises NotKilled when the order could not be given or its end not
        be seen.
        """
        request = {
            "signal": None if signal is None else signal_name(signal),
            "grace": in_seconds(grace),
            "by": by(),
        }
        for last in (False, True):
            try:
                with _Closing(self._stream("stop", request, patient=last)) as link:
                    self.heard(State.from_json(link.reply["state"]))
                    if told is not None:
                        told(link.reply)
                        told = None
                    return self._killed(
                        _last_word(link, float(link.reply.get("grace") or 0.0) + STOP_MARGIN_S)
                    )
            except (ConnectionError, TimeoutError) as error:
                self._relink(error, "stop", last=last)
        raise AssertionError

    def free(self, *, dry: bool = False) -> Freed:
        """Remove its output, once it has ended; its record stays. See `gc`."""
        state = self.state()
        request = {"ids": [state.prog_id], "dry": dry}
        return Freed.told(
            self.agent,
            _ask(self.agent, "gc", request, text=self.id, label=self.label, spool=self._spool),
        )

    def deliver(
        self,
        *,
        callback: Mapping[str, Any] | None = None,
        start: int | None = None,
        seconds: float = 60.0,
        route: str | None = None,
    ) -> Mapping[str, Any]:
        """Have its output and end sent to its collector once more, or to the one of `callback`; return {state, delivered}.

        `start`: from this byte of each stream. `route`: where its courier is to connect to from now on. `seconds=0` sends nothing.
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
        try:
            whole = {**sent, **({"spool": self._spool} if self._spool else {})}
            return self.agent.call("deliver", whole, timeout_s=seconds + STOP_MARGIN_S)
        except Refused as refusal:
            raise refused(
                refusal.kind,
                refusal.facts,
                host=self.host,
                verb="deliver",
                text=self.id,
                label=self.label,
            ) from refusal
        except (ConnectionError, TimeoutError) as error:
            raise retold(
                _silent(error, self.host), verb="deliver", label=self.label, prog_id=self.id
            ) from error

    def _killed(self, answer: Mapping[str, Any]) -> Killed:
        state = self.heard(State.from_json(answer["state"]))
        return Killed(bool(answer.get("ended")), tuple(answer.get("survivors", ())), state)

    def heard(self, state: State) -> State:
        """Take in and return what the host has told of it."""
        before, self.known = self.known, state
        self.id, self.name = state.prog_id, state.name
        if not self._seen:
            self._seen = True
            history.saw(self.host, state, via=self._via, spool=self._spool)
        elif before is None or before.state != state.state:
            history.note(self.id, state.state)
        return state

    def _told(self, state: State | None) -> None:
        if state is not None:
            self.heard(state)

    def _ask(self, verb: str, request: Mapping[str, Any] | None = None) -> dict[str, Any]:
        return _ask(
            self.agent,
            verb,
            {"prog_id": self.id, **(request or {})},
            text=self.id,
            label=self.label,
            spool=self._spool,
        )

    def _stream(self, verb: str, request: Mapping[str, Any], *, patient: bool) -> Link:
        whole = {"prog_id": self.id, "spool": self._spool, **request}
        try:
            return self.agent.stream(
                verb,
                {k: v for k, v in whole.items() if v is not None},
                timeout_s=_patience_s(patient),
            )
        except Refused as refusal:
            raise refused(
                refusal.kind,
                refusal.facts,
                host=self.host,
                verb=verb,
                text=self.id,
                label=self.label,
            ) from refusal
        except CorraError as error:
            raise retold(error, verb=verb, label=self.label, prog_id=self.id) from error

    def _relink(self, error: Exception, verb: str, *, last: bool) -> None:
        """Let go of a link that has failed `verb`; raise if that was the last try."""
        self.agent.close()
        if last:
            kind = NotKilled if verb == "stop" else Unreachable
            raise retold(
                _silent(error, self.host, kind), verb=verb, label=self.label, prog_id=self.id
            ) from error


def _result(state: State, host: Host, **facts: Any) -> Result:
    from .result import Result

    return Result(state, host, **facts)


def _patience_s(again: bool) -> float:
    """Return how long a host may take to answer: a second try has twice the time, since a login may be slow and not dead."""
    return ANSWER_S * (2 if again else 1)


class _Closing:
    """A link for the length of a `with`."""

    def __init__(self, link: Link) -> None:
        self._link = link

    def __enter__(self) -> Link:
        return self._link

    def __exit__(self, *_: object) -> None:
        self._link.close()


def _last_word(link: Link, timeout_s: float) -> Mapping[str, Any]:
    """Return the JSON of the last S frame of a link. Raises TimeoutError, ConnectionError when there is none."""
    import time

    parser, until, word = Parser(), time.monotonic() + timeout_s, None
    while data := link.read(max(0.0, until - time.monotonic())):
        for frame in parser.feed(data):
            if isinstance(frame, Status):
                word = frame.state
    if word is None:
        raise ConnectionError("the link was closed")
    return word


def _silent(error: Exception, host: Host, kind: type[CorraError] = Unreachable) -> CorraError:
    why = (
        f"no answer in {duration(ANSWER_S)}"
        if isinstance(error, TimeoutError)
        else str(error) or "link lost"
    )
    return kind(why, host=str(host))


def _ask(
    agent: Agent,
    verb: str,
    request: Mapping[str, Any],
    *,
    text: str = "",
    label: str = "",
    spool: str | None = None,
) -> dict[str, Any]:
    """Return the host's answer. A call that goes silent is made once more, over a new link; a signal isn't, as it could arrive twice."""
    whole = {**request, **({"spool": spool} if spool else {})}
    for last in (verb == "signal", True):
        try:
            return agent.call(verb, whole, timeout_s=_patience_s(last and verb != "signal"))
        except Refused as refusal:
            raise refused(
                refusal.kind, refusal.facts, host=agent.host, verb=verb, text=text, label=label
            ) from refusal
        except CorraError as error:
            raise retold(
                error, verb=verb, label=label or text, prog_id=text if ids.is_valid(text) else ""
            ) from error
        except (ConnectionError, TimeoutError) as error:
            agent.close()
            if last:
                raise retold(_silent(error, agent.host), verb=verb, label=label or text) from error
    raise AssertionError
