"""The follow loop against a host in memory: links that break, freeze and repeat themselves, and
clocks that jump.
"""

from __future__ import annotations

import io
import itertools
import threading
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, BinaryIO

import pytest
from hypothesis import HealthCheck, settings, strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from corra.errors import (
    Auth,
    CorraError,
    HostKey,
    MaybeStarted,
    Misuse,
    NotFound,
    StillRunning,
    Unreachable,
)
from corra.model.frames import Gap, Output, Status
from corra.model.host import Host
from corra.model.program import Program, Request
from corra.model.signal_names import signal_name
from corra.model.state import State
from corra.remote.exchange import ANSWER_S, Refused
from corra.runs.clock import Clock
from corra.runs.events import Event, LinkDown, LinkUp, Tick
from corra.runs.follow import Follow, Start
from corra.runs.patience import AWAY_S, FIRST_PING_S, Patience
from corra.runs.wanted import SKIPS_MAX, Wanted
from corra.transport.channel import LinkLost, NoAnswer, Silent
from properties import EXACTLY_ONCE

ID = "20261123t014409z-k7m2qxwp"
STREAMS = ("stdout", "stderr")


class SetClock(Clock):
    """A clock that moves only while a caller waits."""

    def __init__(self) -> None:
        self.at = 1000.0
        self.slept = 0.0

    def now(self) -> float:
        return self.at

    def with_sleep(self) -> float:
        return self.at + self.slept

    def wait(self, event: threading.Event, timeout_s: float) -> None:
        if not event.is_set():
            self.at += timeout_s

    def random(self) -> float:
        return 0.5


class Link:
    """A link whose other end is a list: the bytes to read, or an error to raise."""

    def __init__(self, reply: dict[str, Any], clock: SetClock) -> None:
        self.reply, self.placed, self.clock = reply, 0, clock
        self.coming: list[bytes | BaseException] = []
        self.sent: list[bytes] = []
        self.broken: BaseException | None = None
        self.open = True

    def read(self, timeout_s: float | None) -> bytes:
        if not self.coming:
            assert timeout_s is not None
            self.clock.at += timeout_s
            raise TimeoutError
        first = self.coming.pop(0)
        if isinstance(first, BaseException):
            raise first
        return first

    def send(self, data: bytes) -> None:
        if self.broken is not None:
            raise self.broken
        self.sent.append(data)

    def close(self) -> None:
        self.open = False


class Agent:
    """A host that gives its `answers` one after the other: a link, an error, or a function of
    (verb, request).
    """

    host = Host("db1")

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.payloads: list[bytes] = []
        self.patience_s: list[float] = []
        self.closed = 0

    def stream(
        self,
        verb: str,
        request: Mapping[str, Any],
        *,
        payload: BinaryIO | None = None,
        timeout_s: float = 15.0,
        sending: Any = None,
    ) -> Link:
        if sending is not None:
            sending()
        self.asked.append((verb, dict(request)))
        self.patience_s.append(timeout_s)
        if payload is not None:
            self.payloads.append(payload.read())
        answer = self.answers.pop(0)
        if callable(answer):
            answer = answer(verb, request)
        if isinstance(answer, BaseException):
            raise answer
        assert isinstance(answer, Link)
        return answer

    def call(
        self, verb: str, request: Mapping[str, Any], *, timeout_s: float = 15.0
    ) -> dict[str, Any]:
        self.asked.append((verb, dict(request)))
        return {}

    def close(self) -> None:
        self.closed += 1


def state(kind: str = "running", **lengths: int) -> dict[str, Any]:
    streams = {name: {"length": length} for name, length in lengths.items()}
    over = {"return_code": 0, "reason": "exited"} if kind == "exited" else {}
    how = {"name": "migrate", "argv": ("x",), "streams": streams or None, **over}
    return State(ID, kind, **how).to_json()  # type: ignore[arg-type]


def out(stream: str, offset: int, data: bytes) -> bytes:
    return b"O %s %d %d 0\n%s" % (stream.encode(), offset, len(data), data)


def said(kind: str = "exited", **lengths: int) -> bytes:
    import json

    text = json.dumps(state(kind, **lengths)).encode()
    return b"S %d\n%s" % (len(text), text)


def request(**how: Any) -> Request:
    return Request(ID, Program(("x",)), **how)


@pytest.fixture
def clock() -> SetClock:
    return SetClock()


def link(clock: SetClock, *coming: bytes | BaseException, kind: str = "running") -> Link:
    made = Link(state(kind), clock)
    made.coming.extend(coming)
    return made


def shown(events: list[Event], stream: str = "stdout") -> bytes:
    return b"".join(e.data for e in events if isinstance(e, Output) and e.stream == stream)


def kinds(events: list[Event]) -> list[str]:
    return [type(event).__name__ for event in events]


def test_a_run_is_shown_to_its_final_state_and_its_link_is_closed(clock: SetClock) -> None:
    only = link(
        clock, out("stdout", 0, b"one\n"), out("stderr", 0, b"two\n") + said(stdout=4, stderr=4)
    )
    follow = Follow(Agent(only), ID, clock=clock)
    events = list(follow)
    assert kinds(events) == ["Status", "Output", "Output", "Status"]
    assert (shown(events), shown(events, "stderr")) == (b"one\n", b"two\n")
    assert follow.state is not None and follow.state.ended and not only.open
    assert follow.cursor == {"stdout": 4, "stderr": 4}


def test_after_a_cut_it_goes_on_from_the_cursor_and_trims_what_comes_twice(clock: SetClock) -> None:
    first = link(clock, out("stdout", 0, b"abc"), ConnectionError("reset"))
    second = link(clock, out("stdout", 1, b"bcdef"), said(stdout=6))
    agent = Agent(first, second)
    events = list(Follow(agent, ID, clock=clock))
    assert shown(events) == b"abcdef"
    assert agent.asked[1] == ("follow", {"cursor": {"stdout": 3}, "prog_id": ID, "live": True})
    down = next(e for e in events if isinstance(e, LinkDown))
    assert (down.error, down.attempt) == ("reset", 1)
    assert kinds(events).count("LinkUp") == 1 and not any(isinstance(e, Gap) for e in events)


@pytest.mark.parametrize("cut", range(1, 40))
def test_a_frame_torn_at_any_byte_is_shown_once(clock: SetClock, cut: int) -> None:
    whole = out("stdout", 0, b"hello ") + out("stdout", 6, b"world")
    agent = Agent(
        link(clock, whole[:cut], b""), lambda _, r: link(clock, *_from(whole, r), said(stdout=11))
    )
    assert shown(list(Follow(agent, ID, clock=clock))) == b"hello world"


def _from(whole: bytes, asked: Mapping[str, Any]) -> list[bytes]:
    """Return what a host sends of `hello world` to a client with that cursor."""
    at = (asked.get("cursor") or {}).get("stdout", 0)
    return [out("stdout", at, b"hello world"[at:])]


def test_a_hole_is_an_explicit_gap(clock: SetClock) -> None:
    agent = Agent(
        link(
            clock,
            out("stdout", 0, b"ab"),
            b"G stdout 2 9\n",
            out("stdout", 9, b"z"),
            said(stdout=10),
        )
    )
    events = list(Follow(agent, ID, clock=clock))
    assert [e for e in events if isinstance(e, Gap)] == [Gap("stdout", 2, 9)]


def test_a_hole_that_nobody_announced_is_asked_for_again_without_a_word(clock: SetClock) -> None:
    agent = Agent(
        link(clock, out("stdout", 0, b"ab"), out("stdout", 4, b"ef")),
        link(clock, out("stdout", 2, b"cdef"), said(stdout=6)),
    )
    events = list(Follow(agent, ID, clock=clock))
    assert agent.asked[1][1]["cursor"] == {"stdout": 2}
    assert shown(events) == b"abcdef" and set(kinds(events)) == {"Status", "Output"}


def test_what_the_final_state_counts_and_nobody_sent_is_asked_for_again(clock: SetClock) -> None:
    agent = Agent(
        link(clock, out("stdout", 0, b"ab"), said(stdout=4)),
        link(clock, out("stdout", 2, b"cd"), said(stdout=4)),
    )
    events = list(Follow(agent, ID, clock=clock))
    assert shown(events) == b"abcd" and set(kinds(events)) == {"Status", "Output"}
    assert isinstance(events[-1], Status)


def test_a_hole_that_the_host_leaves_time_and_again_is_a_gap(clock: SetClock) -> None:
    holes = [link(clock, out("stdout", 5, b"x"), said(stdout=8)) for _ in range(SKIPS_MAX)]
    ends = [link(clock, said(stdout=8)) for _ in range(SKIPS_MAX - 1)]
    events = list(Follow(Agent(*holes, *ends), ID, clock=clock))
    assert [e for e in events if isinstance(e, Gap)] == [Gap("stdout", 0, 5), Gap("stdout", 6, 8)]
    assert shown(events) == b"x"


def test_a_first_connection_that_fails_is_an_error_at_once(clock: SetClock) -> None:
    told: list[State | None] = []
    for error in (Unreachable("refused"), Auth("denied"), HostKey("unknown")):
        with pytest.raises(type(error)):
            list(Follow(Agent(error), ID, start=Start(request()), told=told.append, clock=clock))
    assert told == [None, None, None]
    assert clock.at == 1000.0


def test_what_fails_while_reconnecting_is_shown_and_tried_again(clock: SetClock) -> None:
    agent = Agent(
        link(clock, b""),
        HostKey("HOST KEY CHANGED"),
        Auth("denied"),
        Unreachable("refused"),
        link(clock, said()),
    )
    events = list(Follow(agent, ID, clock=clock))
    downs = [e for e in events if isinstance(e, LinkDown)]
    assert [d.error for d in downs] == [
        "the link was closed",
        "HOST KEY CHANGED",
        "denied",
        "refused",
    ]
    assert [d.attempt for d in downs] == [1, 2, 3, 4]
    assert [d.since_s for d in downs] == sorted(d.since_s for d in downs)
    assert kinds(events).count("LinkUp") == 1


def test_pauses_double_up_to_a_limit_and_begin_anew_after_a_good_link(clock: SetClock) -> None:
    agent = Agent(
        link(clock, b""),
        *[Unreachable("no")] * 12,
        link(clock, out("stdout", 0, b"x"), b""),
        link(clock, said(stdout=1)),
    )
    downs = [e for e in Follow(agent, ID, clock=clock) if isinstance(e, LinkDown)]
    pauses = [b.since_s - a.since_s for a, b in itertools.pairwise(downs[:13])]
    assert pauses[:4] == pytest.approx([0.1875, 0.375, 0.75, 1.5])
    assert pauses[-1] == pytest.approx(11.25)
    assert downs[-1].attempt == 1


def test_a_start_is_repeated_with_the_same_request_until_it_is_confirmed(clock: SetClock) -> None:
    payload = io.BytesIO(b"stdin")
    agent = Agent(
        ConnectionError("reset"), TimeoutError(), Unreachable("refused"), link(clock, said())
    )
    follow = Follow(agent, ID, start=Start(request(), payload=payload), clock=clock)
    list(follow)
    assert [verb for verb, _ in agent.asked] == ["run"] * 4
    assert all(asked == agent.asked[0][1] for _, asked in agent.asked)
    assert agent.payloads == [b"stdin"] * 4
    assert follow.confirmed


def test_once_confirmed_it_follows_and_never_starts_again(clock: SetClock) -> None:
    agent = Agent(link(clock, out("stdout", 0, b"a"), b""), link(clock, said(stdout=1)))
    list(Follow(agent, ID, start=Start(request()), clock=clock))
    assert [verb for verb, _ in agent.asked] == ["run", "follow"]


def test_a_start_that_isnt_confirmed_in_time_may_have_started(clock: SetClock) -> None:
    agent = Agent(*[ConnectionError("reset")] * 50)
    with pytest.raises(MaybeStarted) as caught:
        list(
            Follow(
                agent,
                ID,
                start=Start(request()),
                patience=Patience(reconnect_timeout_s=30),
                clock=clock,
            )
        )
    assert (
        caught.value.started == "unknown"
        and caught.value.code == 123
        and f"--id {ID}" in caught.value.hint[0]
    )
    assert 30 <= clock.at - 1000 < 60


def test_a_command_that_ends_unanswered_time_and_again_is_given_up_and_may_have_started(
    clock: SetClock,
) -> None:
    once = Agent(NoAnswer("exit 137"), NoAnswer("exit 137"), link(clock, said()))
    assert kinds(list(Follow(once, ID, start=Start(request()), clock=clock))) == [
        "LinkDown",
        "LinkDown",
        "LinkUp",
        "Status",
        "Status",
    ]
    always = Agent(*[NoAnswer("the command on db1 ended with exit 137")] * 3)
    with pytest.raises(MaybeStarted) as caught:
        list(Follow(always, ID, start=Start(request()), clock=clock))
    assert (
        caught.value.why == "the command on db1 ended with exit 137"
        and f"--id {ID}" in caught.value.hint[0]
    )
    with pytest.raises(Unreachable):
        list(Follow(Agent(*[NoAnswer("exit 137")] * 3), ID, clock=clock))


def test_a_host_that_says_nothing_is_asked_over_a_new_connection_and_given_more_time(
    clock: SetClock,
) -> None:
    agent = Agent(
        *[Silent("no answer")] * 2,
        link(clock, b""),
        *[Silent("no answer")] * 5,
        link(clock, b""),
        link(clock, said()),
    )
    list(Follow(agent, ID, start=Start(request()), clock=clock))
    assert [patience / ANSWER_S for patience in agent.patience_s] == [
        *(1, 2, 4),
        *(1, 2, 4, 8, 8, 8),
        1,
    ]
    assert agent.closed == 7


@pytest.mark.parametrize(
    ("error", "tries"),
    [(Silent("no answer in 15 s"), 3), (LinkLost("closed"), 6), (ConnectionError("reset"), 6)],
)
def test_a_host_that_never_answered_is_given_up_after_a_few_tries(
    clock: SetClock, error: Exception, tries: int
) -> None:
    """A link that never worked isn't lost. The error says that the request may have arrived."""
    agent = Agent(*[error] * 20)
    with pytest.raises(MaybeStarted, match=rf"{error} \({tries} tries\)") as caught:
        list(Follow(agent, ID, start=Start(request()), clock=clock))
    assert len(agent.asked) == tries
    assert "doctor --host db1" in caught.value.hint[-1] and ID in caught.value.hint[0]
    with pytest.raises(Unreachable) as looked:
        list(Follow(Agent(*[error] * 20), ID, clock=clock))
    assert looked.value.fate == ""
    with pytest.raises(StillRunning):
        list(Follow(Agent(*[error] * 20), ID, begun=True, clock=clock))


def test_a_start_of_which_no_byte_was_sent_has_not_begun(clock: SetClock) -> None:
    told: list[State | None] = []
    agent = Agent()

    def unsent(*words: Any, **how: Any) -> Link:
        raise ConnectionError("reset")

    agent.stream = unsent  # type: ignore[method-assign]
    with pytest.raises(Unreachable) as caught:
        list(Follow(agent, ID, start=Start(request()), told=told.append, clock=clock))
    assert (caught.value.fate, caught.value.started, told) == ("NOT STARTED", "no", [None])


def test_once_closed_nothing_is_sent_any_more_and_it_is_known_whether_anything_was(
    clock: SetClock,
) -> None:
    early = Agent(link(clock, said()))
    closed = Follow(early, ID, start=Start(request()), clock=clock)

    def close_first(verb: str, asked: Mapping[str, Any]) -> Link:
        raise AssertionError("asked")

    early.answers = [close_first]
    connect = early.stream

    def slow(*words: Any, **how: Any) -> Link:
        closed.close()  # while the client connects
        return connect(*words, **how)

    early.stream = slow  # type: ignore[method-assign]
    assert list(closed) == [] and early.asked == [] and not closed.sent
    late = Follow(Agent(link(clock, said())), ID, start=Start(request()), clock=clock)
    assert not late.sent
    list(late)
    assert late.sent


def test_a_link_given_up_after_a_confirmed_start_leaves_the_program_running(
    clock: SetClock,
) -> None:
    agent = Agent(link(clock, b""), *[Unreachable("refused")] * 50)
    with pytest.raises(StillRunning) as caught:
        list(
            Follow(
                agent,
                ID,
                start=Start(request()),
                patience=Patience(reconnect_timeout_s=30),
                clock=clock,
            )
        )
    assert (
        "refused" in caught.value.why
        and caught.value.code == 122
        and caught.value.label == "migrate (k7m2qx)"
    )


def test_start_without_staying_ends_with_the_confirmation(clock: SetClock) -> None:
    agent = Agent(link(clock))
    assert kinds(
        list(Follow(agent, ID, start=Start(request(spool="/s"), stay=False), clock=clock))
    ) == ["Status"]
    assert agent.asked[0][0] == "start"


def test_a_refusal_becomes_its_error(clock: SetClock) -> None:
    with pytest.raises(NotFound) as caught:
        list(
            Follow(
                Agent(Refused({"error": "not_found", "count": 14, "user": "ops"})),
                "zz9",
                clock=clock,
            )
        )
    assert caught.value.line == "corra: zz9 on db1: NOT FOUND among the 14 runs of ops"


def test_an_error_frame_ends_it(clock: SetClock) -> None:
    text = b'{"error": "not_found", "count": 3, "user": "ops"}'
    with pytest.raises(NotFound):
        list(Follow(Agent(link(clock, b"X %d\n%s" % (len(text), text))), ID, clock=clock))


def test_a_peer_that_speaks_no_frames_is_left(clock: SetClock) -> None:
    with pytest.raises(StillRunning, match="protocol"):
        list(Follow(Agent(link(clock, b"Q 1 2 3\n")), ID, clock=clock))


@pytest.mark.parametrize(("limit", "every"), [(15.0, 5.0), (3.0, 1.0)])
def test_a_silent_link_is_pinged_and_then_called_dead(
    clock: SetClock, limit: float, every: float
) -> None:
    silent, good = link(clock), link(clock, said())
    events = list(
        Follow(Agent(silent, good), ID, patience=Patience(dead_after_s=limit), clock=clock)
    )
    assert silent.sent == [b"P\n"] * round(limit / every)
    assert not silent.open
    assert next(e for e in events if isinstance(e, LinkDown)).error.startswith("silent for")
    assert limit <= clock.at - 1000 <= limit + every + 0.5


def test_answered_pings_keep_a_silent_run_followed(clock: SetClock) -> None:
    class Answering(Link):
        def send(self, data: bytes) -> None:
            super().send(data)
            self.coming.append(b"H\n" if len(self.sent) < 20 else said())

    quiet = Answering(state(), clock)
    assert kinds(list(Follow(Agent(quiet), ID, clock=clock))) == ["Status", "Status"]
    assert clock.at - 1000 == pytest.approx(100, abs=1)


def test_after_the_machine_slept_the_link_is_made_again_at_once(clock: SetClock) -> None:
    class Sleeps(Link):
        def read(self, timeout_s: float | None) -> bytes:
            clock.slept += 1800
            raise TimeoutError

    events = list(Follow(Agent(Sleeps(state(), clock), link(clock, said())), ID, clock=clock))
    assert next(e for e in events if isinstance(e, LinkDown)).error == "this machine slept"
    assert clock.at - 1000 < 1


def test_a_wake_up_cuts_a_pause_short(clock: SetClock) -> None:
    waits = clock.wait

    def wait(event: threading.Event, timeout_s: float) -> None:
        clock.slept += 60
        waits(event, 0.01)

    clock.wait = wait  # type: ignore[method-assign]
    agent = Agent(link(clock, b""), *[Unreachable("no")] * 20, link(clock, said()))
    list(Follow(agent, ID, clock=clock))
    assert clock.at - 1000 < 1


def test_whoever_was_away_too_long_comes_back_without_a_word(clock: SetClock) -> None:
    """A pager stands still for a minute: the host's follow has left, and nothing is wrong."""
    first, second = (
        link(clock, out("stdout", 0, b"a"), b""),
        link(clock, out("stdout", 1, b"b"), said(stdout=2)),
    )
    events: list[Event] = []
    for event in Follow(Agent(first, second), ID, clock=clock):
        events.append(event)
        if event == Output("stdout", 0, b"a"):
            clock.at += AWAY_S + 60
    assert kinds(events) == ["Status", "Output", "Status", "Output", "Status"]
    assert shown(events) == b"ab"


def test_whoever_was_stopped_asks_before_it_calls_the_other_side_dead(clock: SetClock) -> None:
    class Answering(Link):
        def send(self, data: bytes) -> None:
            super().send(data)
            self.coming.append(said(stdout=1))

    only = Answering(state(), clock)
    only.coming.append(out("stdout", 0, b"a"))
    follow = Follow(Agent(only), ID, clock=clock)
    for event in follow:
        if isinstance(event, Output):
            clock.at += 40
    assert follow.state is not None and follow.state.ended


def test_a_tick_comes_as_often_as_asked_for(clock: SetClock) -> None:
    only = link(clock)
    follow = Follow(Agent(only), ID, patience=Patience(tick_s=0.5), clock=clock)
    ticks = 0
    for event in follow:
        ticks += isinstance(event, Tick)
        if ticks == 6:
            only.coming.append(said())
    assert clock.at - 1000 == pytest.approx(3.0)


def test_its_own_time_is_a_limit_while_linked_and_while_not(clock: SetClock) -> None:
    with pytest.raises(StillRunning) as caught:
        list(Follow(Agent(link(clock)), ID, patience=Patience(timeout_s=4), clock=clock))
    assert "4.0 s" in caught.value.why and clock.at == pytest.approx(1004)
    with pytest.raises(StillRunning):
        list(
            Follow(
                Agent(link(clock, b""), *[Unreachable("no")] * 20),
                ID,
                patience=Patience(timeout_s=4),
                clock=clock,
            )
        )
    assert clock.at == pytest.approx(1008)


@pytest.mark.parametrize(
    ("begun", "kind", "why"), [(True, StillRunning, "not "), (False, Unreachable, "no answer")]
)
def test_a_limit_that_ends_a_first_try_says_still_running_only_of_what_is_known_to_have_begun(
    clock: SetClock, begun: bool, kind: type[CorraError], why: str
) -> None:
    def late(error: BaseException, verb: str, asked: Mapping[str, Any]) -> BaseException:
        clock.at += 4
        return error

    for first in (
        Unreachable("no answer from db1 port 22 in 4 s"),
        LinkLost("db1 gave no answer in 4 s"),
    ):
        with pytest.raises(kind) as caught:
            list(
                Follow(
                    Agent(partial(late, first)),
                    ID,
                    patience=Patience(timeout_s=4),
                    begun=begun,
                    clock=clock,
                )
            )
        assert caught.value.why.startswith(why) and "4" in caught.value.why
        assert caught.value.code == (122 if begun else 125)
    with pytest.raises(Unreachable):  # the wait's time isn't over, so this isn't its end
        list(
            Follow(
                Agent(Unreachable("connection refused")),
                ID,
                patience=Patience(timeout_s=4),
                begun=begun,
                clock=clock,
            )
        )


def test_a_signal_goes_over_the_open_link_and_again_only_if_nobody_acknowledged_it(
    clock: SetClock,
) -> None:
    first, second = link(clock), link(clock)
    follow = Follow(Agent(first, second), ID, clock=clock)
    events = iter(follow)
    next(events)
    follow.signal("SIGHUP")
    follow.signal(10)
    assert first.sent == [b"K HUP 1\n", b"K USR1 2\n"]
    first.coming += [b"A 1\n", ConnectionError("reset")]
    second.coming.append(said())
    list(events)
    assert second.sent == [b"K USR1 2\n"]


def test_a_signal_while_there_is_no_link_hurries_the_next_one_and_goes_with_it(
    clock: SetClock,
) -> None:
    second = link(clock, said())
    follow = Follow(
        Agent(link(clock, b""), Unreachable("no"), Unreachable("no"), second), ID, clock=clock
    )
    for event in follow:
        if isinstance(event, LinkDown) and event.attempt == 3:
            before = clock.at
            follow.signal("TERM")
    assert second.sent == [b"K TERM 1\n"]
    assert clock.at == before


def test_a_signal_while_nobody_iterates_is_a_call_of_its_own(clock: SetClock) -> None:
    agent = Agent()
    Follow(agent, ID, by="ops@laptop", clock=clock).signal("term")
    assert agent.asked == [("signal", {"prog_id": ID, "signal": "TERM", "by": "ops@laptop"})]


@pytest.mark.parametrize("name", ["NOPE", "SIG", "", "0", "999", -3])
def test_what_is_no_signal_is_refused(name: str | int) -> None:
    with pytest.raises(Misuse):
        signal_name(name)


def test_ctrl_c_leaves_at_once_and_iterating_again_goes_on_without_a_lost_byte(
    clock: SetClock,
) -> None:
    first = link(clock, out("stdout", 0, b"ab"), KeyboardInterrupt())
    agent = Agent(first, link(clock, out("stdout", 2, b"cd"), said(stdout=4)))
    follow = Follow(agent, ID, clock=clock)
    events: list[Event] = []
    with pytest.raises(KeyboardInterrupt):
        events.extend(follow)
    assert not first.open
    got = list(follow)
    assert agent.asked[1][1]["cursor"] == {"stdout": 2}
    assert shown(got) == b"cd"


def test_close_ends_the_iteration_of_another_thread(clock: SetClock) -> None:
    reading, closed = threading.Event(), threading.Event()

    class Blocking(Link):
        def read(self, timeout_s: float | None) -> bytes:
            reading.set()
            assert closed.wait(10)
            raise ConnectionError("closed")

        def close(self) -> None:
            super().close()
            closed.set()

    follow = Follow(Agent(Blocking(state(), clock)), ID, clock=clock)
    events: list[Event] = []
    thread = threading.Thread(target=lambda: events.extend(follow))
    thread.start()
    assert reading.wait(10)
    follow.close()
    thread.join(10)
    assert not thread.is_alive()
    assert kinds(events) == ["Status"]


def test_what_is_there_now_and_no_more_ends_with_the_link(clock: SetClock) -> None:
    agent = Agent(link(clock, out("stdout", 0, b"a"), said("running", stdout=1), b""))
    assert kinds(list(Follow(agent, ID, Wanted(live=False), clock=clock))) == [
        "Status",
        "Output",
        "Status",
    ]


def test_what_is_there_now_is_asked_for_again_if_it_was_cut_short(clock: SetClock) -> None:
    agent = Agent(
        link(clock, out("stdout", 0, b"a"), b""),
        link(clock, out("stdout", 1, b"b"), said("running", stdout=2), b""),
    )
    assert shown(list(Follow(agent, ID, Wanted(live=False), clock=clock))) == b"ab"


def test_late_output_is_read_to_the_end_of_the_link(clock: SetClock) -> None:
    agent = Agent(link(clock, said(stdout=0), out("stdout", 0, b"late"), b""))
    events = list(Follow(agent, ID, Wanted(late=True), clock=clock))
    assert shown(events) == b"late"


def test_a_tail_begins_where_the_host_says_without_a_gap(clock: SetClock) -> None:
    agent = Agent(link(clock, out("stdout", 500, b"end\n"), b""), link(clock, said(stdout=504)))
    events = list(Follow(agent, ID, Wanted(tail=1), clock=clock))
    assert not any(isinstance(e, Gap) for e in events) and shown(events) == b"end\n"
    assert agent.asked[0][1]["tail"] == 1
    assert agent.asked[1][1]["cursor"] == {"stdout": 504}


def test_from_now_on_stays_from_now_on_when_the_link_breaks(clock: SetClock) -> None:
    first = Link(state(stdout=500, stderr=7), clock)
    first.coming += [out("stdout", 510, b"new"), b""]
    agent = Agent(first, link(clock, said(stdout=513, stderr=7)))
    events = list(Follow(agent, ID, Wanted(tail=0), clock=clock))
    assert shown(events) == b"new" and not any(isinstance(e, Gap) for e in events)
    assert agent.asked[1][1]["cursor"] == {"stdout": 513, "stderr": 7}


def test_only_the_streams_asked_for_are_missed(clock: SetClock) -> None:
    agent = Agent(link(clock, said(stdout=5, stderr=0)))
    assert kinds(list(Follow(agent, ID, Wanted(streams=[]), clock=clock))) == ["Status", "Status"]


class Spool:
    """A host that keeps a run's bytes and sends them over links that a test may hurt."""

    host = Host("db1")

    def __init__(self, clock: SetClock) -> None:
        self.clock = clock
        self.bytes = {name: bytearray() for name in STREAMS}
        self.gone = dict.fromkeys(STREAMS, 0)
        self.sent = dict.fromkeys(STREAMS, 0)
        self.ended = False
        self.refusals: list[BaseException] = []
        self.rewind = 0
        self.link: _Pinged | None = None

    def stream(
        self,
        verb: str,
        asked: Mapping[str, Any],
        *,
        payload: BinaryIO | None = None,
        timeout_s: float = 15.0,
        sending: Any = None,
    ) -> Link:
        if self.refusals:
            raise self.refusals.pop()
        cursor = asked.get("cursor") or {}
        # A host may begin before the requested offset: the client is the one that counts.
        self.sent = {name: max(0, cursor.get(name, 0) - self.rewind) for name in STREAMS}
        self.rewind = 0
        self.link = _Pinged(state(), self.clock)
        self.flush()
        return self.link

    def call(
        self, verb: str, asked: Mapping[str, Any], *, timeout_s: float = 15.0
    ) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        pass

    def flush(self) -> None:
        """Put all bytes that the link's end hasn't been sent yet on their way."""
        if self.link is None or self.link.frozen:
            return
        for name, data in self.bytes.items():
            at = self.sent[name]
            if at < self.gone[name]:
                self.link.coming.append(b"G %s %d %d\n" % (name.encode(), at, self.gone[name]))
                at = self.gone[name]
            if at < len(data):
                self.link.coming.append(out(name, at, bytes(data[at:])))
            self.sent[name] = len(data)
        if self.ended:
            self.link.coming.append(
                said("exited", **{name: len(data) for name, data in self.bytes.items()})
            )


class _Pinged(Link):
    frozen = torn = False

    def send(self, data: bytes) -> None:
        super().send(data)
        if data == b"P\n" and not self.frozen:
            self.coming.append(b"H\n")


class AnyNetwork(RuleBasedStateMachine):
    """Whatever the network does, output and gaps tile each stream: every byte once, in order, and
    never a wrong one.
    """

    @initialize(chunk=st.integers(1, 50))
    def begin(self, chunk: int) -> None:
        self.clock = SetClock()
        self.spool = Spool(self.clock)
        self.chunk = chunk
        self.next = dict.fromkeys(STREAMS, 0)
        self.reordered: dict[tuple[str, int], int] = {}
        self.events: Iterator[Event] = iter(
            Follow(self.spool, ID, patience=Patience(tick_s=1.0), clock=self.clock)
        )
        self.over = False
        self.pull()

    @rule(
        pieces=st.lists(
            st.tuples(st.sampled_from(STREAMS), st.binary(min_size=1, max_size=80)),
            min_size=1,
            max_size=5,
        )
    )
    def write(self, pieces: list[tuple[str, bytes]]) -> None:
        for name, data in pieces:
            self.spool.bytes[name] += data
            self.spool.flush()

    @rule(name=st.sampled_from(STREAMS), back=st.integers(1, 300), length=st.integers(1, 300))
    def duplicate(self, name: str, back: int, length: int) -> None:
        """A frame that was shown comes once more, with or without the frames behind it."""
        link = self.spool.link
        at = max(0, self.next[name] - back)
        data = bytes(self.spool.bytes[name][at : min(at + length, self.next[name])])
        if data and link is not None and not link.torn:
            link.coming.insert(0, out(name, at, data))

    @rule(which=st.floats(0, 1))
    def reorder(self, which: float) -> None:
        """A frame overtakes all frames on their way. It doesn't do so each time that the same bytes
        are requested: then no client could ever show them.
        """
        link = self.spool.link
        at = 0 if link is None or link.torn else round(which * (len(link.coming) - 1))
        if link is None or at <= 0:
            return
        frame = link.coming[at]
        assert isinstance(frame, bytes)
        places = [
            (name, self.next[name])
            for name in STREAMS
            if frame.startswith((b"O %s " % name.encode(), b"G %s " % name.encode(), b"S "))
        ]
        if any(self.reordered.get(place, 0) >= SKIPS_MAX - 1 for place in places):
            return
        for place in places:
            self.reordered[place] = self.reordered.get(place, 0) + 1
        link.coming.insert(0, link.coming.pop(at))

    @rule(keep=st.integers(0, 400), how=st.sampled_from(["reset", "closed", "freeze"]))
    def cut(self, keep: int, how: str) -> None:
        link = self.spool.link
        if link is None:
            return
        link.torn = True
        flat = b"".join(part for part in link.coming if isinstance(part, bytes))[:keep]
        link.coming[:] = [flat[i : i + self.chunk] for i in range(0, len(flat), self.chunk)]
        if how == "freeze":
            link.frozen = True
        else:
            link.coming.append(ConnectionError("reset") if how == "reset" else b"")
            self.spool.link = None

    @rule(
        count=st.integers(1, 4),
        error=st.sampled_from([Unreachable("refused"), ConnectionError("reset"), TimeoutError()]),
    )
    def refuse(self, count: int, error: BaseException) -> None:
        if self.next["stdout"] or self.next["stderr"]:  # the first try isn't repeated
            self.spool.refusals = [error] * count

    @rule(back=st.integers(1, 500))
    def repeat_from_before(self, back: int) -> None:
        self.spool.rewind = back

    @rule(seconds=st.sampled_from([1.0, 20.0, 3600.0]))
    def sleep(self, seconds: float) -> None:
        self.clock.slept += seconds

    @rule(name=st.sampled_from(STREAMS), share=st.floats(0, 1))
    def punch(self, name: str, share: float) -> None:
        """The host gives up the head of a stream (--keep-output): of the bytes before it, only
        those under way may still come.
        """
        self.spool.gone[name] = max(self.spool.gone[name], int(share * len(self.spool.bytes[name])))

    @precondition(lambda self: not self.over)
    @rule()
    def pull(self) -> None:
        for event in self.events:
            self.check(event)
            if isinstance(event, Tick):
                return
        self.over = True

    def check(self, event: Event) -> None:
        if isinstance(event, (Output, Gap)):
            start = event.offset if isinstance(event, Output) else event.start
            assert start == self.next[event.stream]
            assert event.end > start
            if isinstance(event, Output):
                assert event.data == self.spool.bytes[event.stream][start : event.end]
            else:
                assert event.end <= self.spool.gone[event.stream]
            self.next[event.stream] = event.end

    @invariant()
    def nothing_is_made_up(self) -> None:
        if hasattr(self, "spool"):
            assert all(self.next[name] <= len(self.spool.bytes[name]) for name in STREAMS)

    def teardown(self) -> None:
        if not hasattr(self, "spool"):
            return
        self.spool.ended = True
        self.spool.flush()
        for _ in range(500):
            if self.over:
                break
            self.pull()
        assert self.over
        assert self.next == {name: len(data) for name, data in self.spool.bytes.items()}


@pytest.mark.storm
@pytest.mark.timeout(600)  # 2,000 examples, while another test uses the other core
def test_each_byte_comes_once_through_any_network() -> None:
    run_state_machine_as_test(
        AnyNetwork,
        settings=settings(
            EXACTLY_ONCE, stateful_step_count=25, suppress_health_check=list(HealthCheck)
        ),
    )


def test_the_state_of_each_frame_is_told(clock: SetClock) -> None:
    told: list[State | None] = []
    list(Follow(Agent(link(clock, said("running"), said())), ID, told=told.append, clock=clock))
    assert [each.state for each in told if each] == ["running", "running", "exited"]


def test_large_frames_are_handed_on_as_they_come(clock: SetClock) -> None:
    """The client does no work per line and grows no buffer: it shows each piece as it read it, cut
    at the end of a frame at most.
    """
    payload = bytes(range(256)) * 1024
    frames = b"".join(out("stdout", i * len(payload), payload) for i in range(8))
    pieces = [frames[i : i + 65536] for i in range(0, len(frames), 65536)]
    events = list(
        Follow(Agent(link(clock, *pieces, said(stdout=8 * len(payload)))), ID, clock=clock)
    )
    sizes = [len(e.data) for e in events if isinstance(e, Output)]
    assert max(sizes) <= 65536
    assert len(sizes) <= len(pieces) + 8
    assert shown(events) == payload * 8


def test_what_came_of_a_torn_frame_needs_not_come_again(clock: SetClock) -> None:
    """On a line that breaks more often than it carries a whole frame, the output still goes on."""
    payload = bytes(range(256)) * 1024
    torn = out("stdout", 0, payload)[:100_000]
    agent = Agent(
        link(clock, torn, ConnectionError("reset")),
        lambda _, asked: link(clock, *_rest(payload, asked), said(stdout=len(payload))),
    )
    assert shown(list(Follow(agent, ID, clock=clock))) == payload
    assert agent.asked[1][1]["cursor"]["stdout"] > 99_000


def _rest(payload: bytes, asked: Mapping[str, Any]) -> list[bytes]:
    at = asked["cursor"]["stdout"]
    return [out("stdout", at, payload[at:])]


def test_final_status_is_the_last_event(clock: SetClock) -> None:
    events = list(
        Follow(Agent(link(clock, said(stdout=0) + out("stdout", 0, b"never"))), ID, clock=clock)
    )
    assert isinstance(events[-1], Status) and shown(events) == b""


def test_link_up_says_how_long_it_was_down(clock: SetClock) -> None:
    agent = Agent(link(clock, b""), Unreachable("no"), link(clock, said()))
    up = next(e for e in Follow(agent, ID, clock=clock) if isinstance(e, LinkUp))
    assert up.down_s == pytest.approx(clock.at - 1000)


def test_a_link_that_brings_nothing_new_is_no_link(clock: SetClock) -> None:
    """The host answers each time with bytes that the client has, and each link breaks before it
    brings more.
    """
    links = [link(clock, out("stdout", 0, b"ab"), b"")]
    links += [link(clock, out("stdout", 0, b"ab"), b"") for _ in range(100)]
    events: list[Event] = []
    with pytest.raises(StillRunning, match="given up: the link was closed"):
        events.extend(
            Follow(Agent(*links), ID, patience=Patience(reconnect_timeout_s=30), clock=clock)
        )
    assert 30 <= clock.at - 1000 <= 31
    assert "LinkUp" not in kinds(events)
    downs = [e for e in events if isinstance(e, LinkDown)]
    assert [e.attempt for e in downs] == list(range(1, len(downs) + 1))


@pytest.mark.parametrize(
    "news",
    [out("stdout", 2, b"c"), b"G stdout 2 9\n", said("starting")],
    ids=["output", "gap", "state"],
)
def test_the_link_is_back_with_the_first_thing_that_is_new(clock: SetClock, news: bytes) -> None:
    old = link(clock, out("stdout", 0, b"ab"), b"")
    again = link(clock, out("stdout", 0, b"ab"), news, said())
    events = kinds(list(Follow(Agent(old, again), ID, clock=clock)))
    assert events[:4] == ["Status", "Output", "LinkDown", "Status"]
    assert events[4] == "LinkUp"


class Answering(Link):
    """A link that answers two pings and then says `end`."""

    def __init__(self, reply: dict[str, Any], clock: SetClock, end: bytes) -> None:
        super().__init__(reply, clock)
        self.end = end

    def send(self, data: bytes) -> None:
        super().send(data)
        self.coming.append(b"H\n" if len(self.sent) < 3 else self.end)


def test_links_that_answer_a_ping_each_and_break_are_given_up_together(clock: SetClock) -> None:
    """None is missing for long; and none stands for as long as a link may be missing."""
    links = [Answering(state(), clock, b"") for _ in range(100)]
    events: list[Event] = []
    with pytest.raises(StillRunning, match="given up: the link was closed"):
        events.extend(
            Follow(
                Agent(link(clock, b""), *links),
                ID,
                patience=Patience(reconnect_timeout_s=30),
                clock=clock,
            )
        )
    assert 30 <= clock.at - 1000 <= 45
    downs = [e for e in events if isinstance(e, LinkDown)]
    assert [e.attempt for e in downs] == list(range(1, len(downs) + 1))


def test_a_link_that_stood_for_long_is_missed_anew(clock: SetClock) -> None:
    class Steady(Answering):
        def send(self, data: bytes) -> None:
            super().send(data)
            self.coming[-1] = b"H\n" if len(self.sent) < 20 else self.end

    agent = Agent(link(clock, b""), Steady(state(), clock, b""), link(clock, said()))
    events = list(Follow(agent, ID, patience=Patience(reconnect_timeout_s=30), clock=clock))
    assert [e.attempt for e in events if isinstance(e, LinkDown)] == [1, 1]


def test_a_quiet_run_s_link_is_back_when_it_has_answered_a_ping(clock: SetClock) -> None:
    agent = Agent(link(clock, b""), Answering(state(), clock, said()))
    events = list(Follow(agent, ID, clock=clock))
    up = next(e for e in events if isinstance(e, LinkUp))
    assert up.down_s == pytest.approx(FIRST_PING_S, abs=0.25)
    assert kinds(events) == ["Status", "LinkDown", "Status", "LinkUp", "Status"]


def test_no_pause_outlasts_the_patience_with_a_missing_link(clock: SetClock) -> None:
    agent = Agent(link(clock, b""), *[Unreachable("refused")] * 50)
    with pytest.raises(StillRunning):
        list(Follow(agent, ID, patience=Patience(reconnect_timeout_s=20), clock=clock))
    assert clock.at == pytest.approx(1020, abs=0.1)


def test_from_a_time_on_begins_where_the_host_says_and_stays_there_when_the_link_breaks(
    clock: SetClock,
) -> None:
    first = Link({**state(stdout=500, stderr=70), "cursor": {"stdout": 400, "stderr": 70}}, clock)
    first.coming += [out("stdout", 400, b"late"), b""]
    agent = Agent(
        first,
        link(clock, out("stdout", 404, b"r"), out("stderr", 70, b"e"), said(stdout=405, stderr=71)),
    )
    events = list(Follow(agent, ID, Wanted(since_ns=5_000_000), clock=clock))
    assert (agent.asked[0][1]["since"], "cursor" in agent.asked[0][1]) == (5000, False)
    assert (
        agent.asked[1][1]["cursor"] == {"stdout": 404, "stderr": 70}
        and "since" not in agent.asked[1][1]
    )
    assert (shown(events), shown(events, "stderr")) == (b"later", b"e") and not any(
        isinstance(e, Gap) for e in events
    )
