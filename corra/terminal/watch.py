"""Watch a run, at a terminal or into a pipe: one thread moves bytes, the main thread takes signals.

The pump may hang in a read of a dead link or in a write that nobody reads, and Ctrl-C must work all
the same. So the main thread only waits at its desk for a signal or for the pump's end. A signal
handler does nothing: paramiko's locks aren't reentrant, and an exception between any two bytecodes
would cut a write in two.
"""

from __future__ import annotations

import base64
import contextlib
import queue
import signal as signals
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, Protocol

from corra import render
from corra.errors import EPIPE_CODE, CorraError, MaybeStarted, NotStarted, typed
from corra.model import ids
from corra.model.ends import end_error
from corra.model.frames import Gap, Output, Status
from corra.model.host import Host
from corra.model.state import State, exit_code
from corra.model.units import chosen_time, decimal_size, duration
from corra.model.words import now, side_by_side
from corra.runs.events import Event, LinkDown, LinkUp, SignalPassed
from corra.runs.follow import Follow
from corra.runs.run import Run

from .leave_keys import Leave
from .screen import Gone, Screen, descriptor_for, hidden_descriptors
from .signals import Desk, die_of, shutting_down

if TYPE_CHECKING:
    from .filters import Range, Sieve, Stamper
    from .keyboard import Keyboard
    from .program_modes import Replay

# A second Ctrl-C before MASHED_S belongs to the first; after SECOND_CTRL_C_S we have left.
MASHED_S = 0.3
SECOND_CTRL_C_S = 2.0
GAPS_S = 10.0
# How long a start may take to be confirmed while a TERM that is meant for the program waits.
CONFIRM_S = 5.0
# A session that ends sends SIGHUP right beside SIGTERM.
HANGUP_S = 0.3


class WatchedRun(Protocol):
    """The run on the Screen: its names and its host."""

    id: str
    name: str | None

    @property
    def host(self) -> Host | str: ...
    @property
    def label(self) -> str: ...


class WatchedEvents(Protocol):
    """The events of a run, from its host or from a collector.

    `close` may be called from any thread.
    """

    @property
    def state(self) -> State | None: ...
    @property
    def cursor(self) -> dict[str, int]: ...
    def __iter__(self) -> Iterator[Event]: ...
    def close(self) -> None: ...


class _End(NamedTuple):
    """The pump has ended, with an error or without."""

    error: BaseException | None = None


class _Gone:
    """The bytes of a stream that are gone and weren't reported yet."""

    def __init__(self, said_at: float | None = None) -> None:
        self.size = self.places = 0
        self.said_at = said_at


# A program whose output nobody reads is often about to end; its fate is worth this moment.
_END_S = 0.5


class Watch:
    """One run being watched. `show` takes its events, `stay` its signals."""

    def __init__(
        self,
        follow: WatchedEvents,
        run: WatchedRun,
        screen: Screen,
        *,
        relay: frozenset[int] = frozenset(),
        hide: str | None = None,
        stamps: bool = False,
        tail: int | None = None,
        announce: bool = True,
        sieve: Sieve | Range | None = None,
        keyboard: Keyboard | None = None,
        again: str = "",
        shows: bool = True,
        by_id: bool = False,
    ) -> None:
        """Watch the events of `follow`.

        `relay`: the signals that are passed on to the program. `hide`: out, err or both.
        `announce`: say that the agent was placed. `keyboard`: the operator's keys go to the
        program. `again`: the flags that `attach` needs for this run. `shows`: the program's output
        is shown; `wait` doesn't. `by_id`: the name means another run too, so hints say the id.
        """
        self.follow = follow
        self.run = run
        self.screen = screen
        self.host = str(run.host)
        # Only a run's host starts it, takes signals for it and stops it. A collector only tells.
        self._by_host = follow if isinstance(follow, Follow) else None
        self._stoppable = run if isinstance(run, Run) else None
        self._again = again
        self._shows = shows
        self._by_id = by_id
        self._relay = relay
        self._hidden = hidden_descriptors(hide)
        self._stampers: dict[str, Stamper] | None = {} if stamps else None
        self._tail = tail
        self._announce = announce
        self._sieve = sieve
        self._gone: dict[str, _Gone] = {}
        self._keyboard = keyboard
        more = [signals.SIGWINCH, signals.SIGCONT] if keyboard is not None else []
        self._desk = Desk(*more, last=screen.last)
        self._state: State | None = None
        self._begun_at = self._state_at = self._output_at = time.monotonic()
        self._old: dict[str, int] = {}
        self._shown = False
        self._follows = True
        self._replay: Replay | None = None
        self._down: LinkDown | None = None
        self._down_at = 0.0
        # Until then a signal waits for the start to be confirmed.
        self._waits_until: float | None = None
        self.was_over = False

    @property
    def label(self) -> str:
        return self._state.label if self._state else self.run.label

    @property
    def short(self) -> str:
        """What to type for this run."""
        name = self._state.name if self._state else self.run.name
        return ids.typable(self.run.id, None if self._by_id else name)

    @property
    def placed(self) -> str:
        """`(agent 1.0 placed, 61 kB)` if this call has placed the agent on another machine."""
        link = self._by_host
        if link is None or not link.placed or link.host.is_local:
            return ""
        from corra.on_host.agent.contract import VERSION

        return f"(agent {VERSION} placed, {decimal_size(link.placed)})"

    def _begins(self) -> bool:
        """Return whether this call starts a run whose id was made for it, so nobody knows it."""
        made = ids.short(self.run.id) != self.run.id
        return made and self._by_host is not None and self._by_host.first

    # -- The pump
    def _pump(self) -> None:
        try:
            for event in self.follow:
                try:
                    self.show(event)
                except Gone as gone:
                    # The follow goes on in silence: the program's fate may come at once.
                    self.screen.mute()
                    self._desk.put(gone)
                if self._sieve is not None and self._sieve.over:
                    break
            for line in self._sieve.rest() if self._sieve is not None else ():
                self._show_piece(line)
            for stream in self._gone:
                self._say_gone(stream)
            self._desk.put(_End())
        except BaseException as error:  # noqa: BLE001 - the main thread raises it
            self._desk.put(_End(error))

    def show(self, event: Event) -> None:
        """Put one event on the Screen."""
        match event:
            case Output():
                if event.end > self._old.get(event.stream, 0):
                    self._output_at = time.monotonic()
                self._show_output(event)
            case Status(state):
                self._show_state(State.from_json(state))
            case Gap(stream, start, end):
                self._show_gap(stream, start, end)
                self._event("gap", stream=stream, start=start, end=end)
            case LinkDown(since_s, error, attempt):
                self._show_link_down(event)
                self._event(
                    "link", up=False, since_s=round(since_s, 3), error=error, attempt=attempt
                )
            case SignalPassed(name):
                self.screen.note(self.label, self.host, f"{name} passed on to it")
            case LinkUp(down_s):
                self._down = None
                self.screen.note(
                    "", self.host, f"link back after {duration(down_s)}, nothing missed"
                )
                self._event("link", up=True, down_s=round(down_s, 3))

    def _show_gap(self, stream: str, start: int, end: int) -> None:
        """Report the gap. Gaps that follow soon are reported together.

        There are many where the program writes faster than we can read.
        """
        gone = self._gone.setdefault(stream, _Gone())
        gone.size, gone.places = gone.size + end - start, gone.places + 1
        if gone.said_at is None or time.monotonic() - gone.said_at >= GAPS_S:
            when = render.removal_day(self._state) if self._state else ""
            where = f"{stream} from byte {start} to {end} is gone"
            self._say_gone(stream, f"its {stream} was removed on {when}" if when else where)

    def _say_gone(self, stream: str, where: str = "") -> None:
        gone = self._gone[stream]
        if gone.places:
            where = where if where and gone.places == 1 else f"{stream} has {gone.places} more gaps"
            self.screen.note(self.label, self.host, f"{where}: {decimal_size(gone.size)}")
        self._gone[stream] = _Gone(said_at=time.monotonic())

    def _show_output(self, output: Output) -> None:
        if (
            self._tail is not None
            and output.offset > 0
            and not (self._keyboard and self._keyboard.raw)
        ):
            self.screen.note(
                self.label,
                self.host,
                f"showing the last {self._tail} lines;  all: {typed()} logs {self.short}",
            )
        self._tail = None
        for piece in self._sieve.take(output) if self._sieve is not None else (output,):
            self._show_piece(piece)

    def say_nothing_shown(self, *, sifted: bool) -> None:
        """Tell a person at a terminal why the screen is empty.

        `sifted`: not all of the output was asked for.
        """
        if self._shown or self._gone or self._state is None or not self.screen.err_is_terminal:
            return
        if sifted:
            why = "it wrote nothing of that kind"
        elif self._state.state == "not_started":
            why = "it was not started, so it wrote nothing"
        else:
            why = "it wrote nothing" if self._state.ended else "it has written nothing yet"
        self.screen.note(self.label, self.host, why)

    def _show_piece(self, output: Output) -> None:
        self._shown = True
        fd = descriptor_for(output.stream)
        if fd in self._hidden:
            return
        if self.screen.json:
            data = base64.b64encode(output.data).decode()
            self._event(
                "output",
                stream=output.stream,
                offset=output.offset,
                data=data,
                time_ns=output.time_ns,
            )
        elif self._stampers is not None:
            from .filters import Stamper

            self.screen.output(
                fd, self._stampers.setdefault(output.stream, Stamper()).stamp(output)
            )
        elif self._replay is not None and self._keyboard is not None and self._keyboard.raw:
            self.screen.output(fd, self._replay.take(output.offset, output.data))
        else:
            self.screen.output(fd, output.data)

    def _show_state(self, state: State) -> None:
        first, before = self._state is None, self._state and render.trouble(self._state)
        self._state, self._state_at = state, time.monotonic()
        self._say_trouble(before or "", render.trouble(state))
        if first:
            self.run.name = state.name
            # Output from before our time is as old as the host says.
            self._old = {
                stream: facts.get("length", 0) for stream, facts in (state.streams or {}).items()
            }
            self._output_at -= (
                render.since(state.last_output_time, render.host_now(state, now())) or 0.0
            )
            # A run that this call began may have ended by now; nobody asks when.
            self.was_over = state.ended and state.state != "not_started" and not self._begins()
            placed = self._by_host.placed if self._by_host is not None else 0
            self._event("start", state=state.to_json(), placed=placed)
            remark = self._stoppable.agent.remark if self._stoppable is not None else ""
            if self._announce and remark and self.screen.err_is_terminal:
                self.screen.note("", self.host, remark)
            if self._announce and self.placed:
                self.screen.say(self.label, self.host, render.STARTED, self.placed)
            if self._keyboard is None:
                self._say_unread_keys(state)
            else:
                from .program_modes import Replay

                assert self._by_host is not None
                self._replay = Replay(0 if self._by_host.first else self._old.get("output", 0))
                self._keyboard.begin(
                    state,
                    self._desk.put,
                    lambda text: self.screen.note(self.label, self.host, text),
                    switched=self._by_host.switched,
                )

    def _say_trouble(self, before: str, now: str) -> None:
        """Say what has come over the run, where no live line shows it; and that it is over."""
        state = self._state
        if before == now or state is None:
            return
        if now and (not self.screen.live_line or state.hindered):
            self.screen.say(self.label, self.host, "", now, render.remedy(state, self.host))
        elif not now and not self.screen.live_line and not state.ended:
            room = "there is room again, " if before == render.HELD_BACK else ""
            self.screen.note(self.label, self.host, f"{room}it goes on")

    def _say_unread_keys(self, state: State) -> None:
        """Tell a person at a terminal that the program's terminal isn't this one."""
        listens = self._shows and self._follows and self.screen.can_ask
        if state.pty and not state.ended and listens:
            text = f"what you type here doesn't reach it:  {typed()} attach -i {self.short}"
            self.screen.note(self.label, self.host, text)

    def _show_link_down(self, down: LinkDown) -> None:
        if self._down is None and not self.screen.live_line:
            self.screen.note(
                "",
                self.host,
                "link lost, program unaffected as far as known; trying on"
                if self.follow.state is not None
                else f"no answer yet: {down.error}; trying again",
            )
        self._down, self._down_at = down, time.monotonic()

    def _event(self, name: str, **facts: Any) -> None:
        if self.screen.json:
            self.screen.event(name, host=self.host, prog_id=self.run.id, **facts)

    def live_line(self, width: int) -> str:
        """Return the live line of this moment."""
        now = time.monotonic()
        name = self.short
        if (down := self._down) is not None and self.follow.state is None:
            return render.cut(f"{self.host}: no answer yet; connecting (try {down.attempt})", width)
        if down is not None:
            return render.live_without_link(
                name,
                self.host,
                since_s=down.since_s + now - self._down_at,
                tries=down.attempt,
                width=width,
            )
        state = self._state
        if state is None:
            begun = render.running_time(now - self._begun_at)
            return render.cut(f"{self.host}: connecting  {begun}", width)
        elapsed = (state.elapsed or 0.0) + now - self._state_at
        trouble, ended = render.trouble(state), state.overdue in ("end", "output")
        if not self._shows:
            return render.live_waiting(
                name, self.host, elapsed=elapsed, trouble=trouble, width=width, ended=ended
            )
        amount = sum(self.follow.cursor.values())
        silent = now - self._output_at if amount else None
        return render.live(
            name,
            self.host,
            elapsed=elapsed,
            amount=amount,
            silent=silent,
            trouble=trouble,
            width=width,
            ended=ended,
        )

    # -- The desk
    def stay(self, *, live: bool = True, fate: bool = True) -> State | None:
        """Watch to the end and return the last State. None: we have left, and have said so.

        Doesn't return where a signal ends this process. Raises what ended the watch, Gone among it.
        """
        self._follows = live
        if live:
            self.screen.live(self.live_line)
        with self._desk:
            threading.Thread(target=self._pump, name="pump", daemon=True).start()
            try:
                return self._wait()
            except Gone as gone:
                if fate:
                    self._say_unread(gone)
                raise
            finally:
                self.screen.live(None)
                self.follow.close()
                if self._keyboard is not None:
                    self._keyboard.restore()

    def _next(self) -> Any:
        """Return what the desk has next: a signal that has waited CONFIRM_S in vain comes again."""
        if (until := self._waits_until) is not None:
            try:
                return self._desk.get(max(0.0, until - time.monotonic()))
            except queue.Empty:
                if self._by_host is None or not self._by_host.confirmed or self._by_host.unheard:
                    return signals.SIGTERM
            self._waits_until = None
        return self._desk.get()

    def _wait(self) -> State | None:
        while True:
            item = self._next()
            if isinstance(item, _End):
                if item.error is not None:
                    raise item.error
                return self.follow.state
            if isinstance(item, Gone):
                raise item
            if isinstance(item, Leave):
                self._detach("you have left its terminal", *self._unsent())
                return None
            if item == signals.SIGWINCH and self._keyboard is not None:
                self._keyboard.resize()
            elif item == signals.SIGCONT and self._keyboard is not None:
                self._keyboard.resume()
            elif (
                item in self._relay
                and self._may_relay()
                and not (item == signals.SIGTERM and self._session_ends())
            ):
                self._pass_on(signals.Signals(item).name.removeprefix("SIG"))
            elif item == signals.SIGINT:
                self._interrupted()
            else:
                self._leave(signals.Signals(item).name)

    def _may_relay(self) -> bool:
        """Return whether a signal to the client is for the program.

        The first signal waits for a start that was sent a moment ago to be confirmed, and not for
        long; a second one ends the client. So does a signal that has reached nobody for CONFIRM_S,
        and one that comes after the program's end.
        """
        if self._by_host is None:
            return False
        if self._state is not None and self._state.overdue in ("end", "output"):
            return False  # no program is left to take it
        if self._by_host.confirmed:
            overdue = self._waits_until is not None and time.monotonic() >= self._waits_until
            return not (overdue and self._by_host.unheard)
        begun = self._by_host.sent and self._by_host.asked_s < CONFIRM_S
        return begun and self._down is None and self._waits_until is None

    def _pass_on(self, name: str) -> None:
        assert self._by_host is not None
        self._by_host.signal(name)
        if self._by_host.confirmed:
            self._waits_until = self._waits_until or time.monotonic() + CONFIRM_S
            return
        left_s = CONFIRM_S - self._by_host.asked_s
        self._waits_until = time.monotonic() + left_s
        note = f"{name} waits {left_s:.0f} s for {self.host} to confirm the start, then ends this"
        self.screen.note(self.label, self.host, note)

    def _session_ends(self) -> bool:
        """Return whether the SIGTERM ends the session or the machine; the program outlives both."""
        with contextlib.suppress(queue.Empty):
            item = self._desk.get(HANGUP_S)
            if item == signals.SIGHUP:
                return True
            self._desk.put_back(item)
        return shutting_down()

    def _leave(self, name: str) -> NoReturn:
        self._detach("you have detached" if name == "SIGINT" else f"detached by {name}")
        self.screen.close()
        die_of(name)

    def _detach(self, why: str, *more: str) -> None:
        self.screen.mute()
        if self._keyboard is not None:
            self._keyboard.restore()
        self.screen.live(None)
        if self._by_host is not None and self._by_host.starting:
            # Nothing more is sent, so that the line stays true.
            self.follow.close()
            self.screen.error(self._left_early(self._by_host))
            return
        if self.follow.state is None:
            self.screen.note(self.label, self.host, f"you left before {self.host} answered")
            return
        self._event("detach", why=why)
        hint = self._ways_on()
        state, told = self.follow.state, render.STILL_RUNNING
        if state.overdue in ("end", "output"):
            told, how = render.fate(state, self.host)
            why, hint = f"{how}; {why}", [*hint[:1], *render.remedy(state, self.host)]
        self.screen.say(self.label, self.host, told, why, [*hint, *more])

    def say_left(self, why: str) -> None:
        """Say that a program which was only watched from here goes on."""
        if self._state is None:
            self.screen.note(self.label, self.host, f"you left before {self.host} answered")
        else:
            self.screen.say(self.label, self.host, render.STILL_RUNNING, why, self._ways_on())

    def _ways_on(self) -> list[str]:
        """Return the lines that say how to watch again, and how to stop what runs on."""
        again = self._again + (" -i" if self._keyboard is not None else "")
        hint = [f"watch: {typed()} attach{again} {self.short}"]
        if self._stoppable is not None:
            hint.append(f"stop: {typed()} kill {self.short}")
        return side_by_side(hint)

    def _unsent(self) -> list[str]:
        """Return the line about keys that the host may not have."""
        feed = self._keyboard.feed if self._keyboard is not None else None
        return (
            []
            if feed is None or feed.refused or not feed.waiting
            else [f"what you typed last may not be there: {feed.waiting} bytes"]
        )

    def _left_early(self, start: Follow) -> CorraError:
        facts: dict[str, Any] = {"label": self.label, "host": self.host, "prog_id": self.run.id}
        if not start.sent:
            start.forget()
            return NotStarted(f"you left before {self.host} was reached", **{**facts, "label": ""})
        hint = [f"safe to repeat, it starts at most once: the same command, --id {self.run.id}"]
        return MaybeStarted(f"you left before {self.host} confirmed it", hint=hint, **facts)

    def _interrupted(self) -> None:
        """Leave after Ctrl-C. On a terminal a second Ctrl-C within 2 s stops the program."""
        state = self.follow.state
        if self._stoppable is None or state is None or not self.screen.err_is_terminal:
            self._leave("SIGINT")
        how = f"{state.stop_signal}, KILL after {chosen_time(state.grace)}"
        self._detach(
            "you have detached", f"Ctrl-C again within {SECOND_CTRL_C_S:g} s stops it now ({how})"
        )
        first = time.monotonic()
        while (left := first + SECOND_CTRL_C_S - time.monotonic()) > 0:
            try:
                item = self._desk.get(left)
            except queue.Empty:
                break
            if isinstance(item, _End):
                break
            if item == signals.SIGINT and time.monotonic() - first >= MASHED_S:
                self._stop(self._stoppable)
                break
            if item != signals.SIGINT:
                break
        self.screen.close()
        die_of("SIGINT")

    def _stop(self, run: Run) -> None:
        """Stop the program as `kill` does. One more Ctrl-C leaves that to the host."""
        self.screen.echoed()
        threading.Thread(target=self._kill, args=(run,), name="kill", daemon=True).start()
        while True:
            item = self._desk.get()
            if isinstance(item, CorraError):
                self.screen.error(item)
            if not isinstance(item, _End):  # the end was ordered; the result of the order counts
                return

    def _kill(self, run: Run) -> None:
        from .stopping import stop

        try:
            stop(self.screen, run)
            self._desk.put(None)
        except CorraError as error:
            self._desk.put(error)

    # -- The end
    def outcome(self, state: State) -> int:
        """Say how the run ended and return the exit code."""
        code = exit_code(state)
        if self.screen.json:
            self._event("end", state=state.to_json(), exit_code=code)
            return code
        reached = self._stoppable.reached if self._stoppable else ""
        error = end_error(state, self.host, SimpleNamespace(), reached=reached)
        if error is None:
            self.screen.say(
                self.label,
                self.host,
                *render.fate(state, self.host, now=now() if self.was_over else None),
            )
        else:
            if self.was_over:
                error = error.but(why=render.fate(state, self.host, now=now())[1])
            self.screen.error(error)
        if state.stragglers:
            end = f";  end them: {typed()} kill {self.short}" if self._stoppable else ""
            self.screen.note(self.label, self.host, render.left_over(state) + end)
        return code

    def _say_unread(self, gone: Gone) -> None:
        """Say the run's fate where nobody reads its output any more, or it can't be written."""
        with contextlib.suppress(queue.Empty):
            while isinstance(self._desk.get(_END_S), Gone):
                pass
        gone.said = True
        state, why = self._state, gone.why("its output")
        if state is None or not state.ended:
            fate = render.STILL_RUNNING if state is not None else ""
        elif gone.code == EPIPE_CODE and render.went_well(state):
            return
        else:
            fate, how = render.fate(state, self.host)
            why = f"{how}; {why}"
        hint = self._ways_on() if fate == render.STILL_RUNNING else []
        self.screen.say_unread(self.label, self.host, fate, why, hint)
