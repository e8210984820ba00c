"""Runbooks that resume: named steps made of runs. Each step happens once, in however many passes.

    with corra.runbook("kernel", key="OPS-812", params=params, journal="ops1") as book:
        book.run(hosts, ["apt-get", "install", "-y", package], step="install", timeout="30m")
        book.reboot(hosts, step="reboot")

Each pass runs the body from its top, on any machine, and each step first reads the journal. A step
that ended well returns its recorded result; a step that runs is watched; a step that failed is
repeated; a step that is LOST waits for an operator's word. The id of a step's run follows from
runbook, key, step, host and attempt, and a host starts an id at most once. So a journal that is
behind, or two operators in one runbook, come to the same runs.

A body that depends on more than the recorded results (the time, a file here) may take another way
in its second pass.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar, cast, overload

from corra.errors import (
    Changed,
    Conflict,
    CorraError,
    Lost,
    Misuse,
    Stop,
    TimedOut,
    Unreachable,
    typed,
)
from corra.inventory.groups import hosts
from corra.model import ids
from corra.model.ends import end_error
from corra.model.host import Host, reach_flags
from corra.model.program import OPEN
from corra.model.rollout import Rules, What, share_of, wave_sizes
from corra.model.state import State, exit_code
from corra.model.units import duration, in_seconds
from corra.remote.agent_client import Agent
from corra.remote.targets import Reach, agent_for, is_a, is_one
from corra.runs import request
from corra.runs.events import LinkDown, LinkUp
from corra.runs.follow import Follow
from corra.runs.patience import Patience
from corra.runs.run import AT_ONCE, Run
from corra.settings import setting
from corra.transport.channel import LinkLost
from corra.transport.fabric.connection import name_of

from .attempt import OpenFollows, Seen, end_of, watch_attempt
from .book import HERE, STEP, Attempt, Do, differences, next_move, program_facts
from .journal import Journal
from .ledgers import Here, boot_id_of, ledger_on
from .parallel import Crew
from .progress import HostRow, Progress, last_line, repeated, took
from .step import Outcome, Place, Reboot, Work
from .stop import StepHosts, stop_error

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

    from corra.runs.result import Result, Results

T = TypeVar("T")
# The sizes of waves: 5, "10%", or several.
Sizes = int | str | Sequence[int | str]

# The journal holds so much of each stream, for the decisions of next steps. The host has the rest.
OUTPUT_IN_JOURNAL = 64 << 10
# The time between two looks at a host that reboots.
REBOOT_LOOK_S = 1.0
_REACH = ("user", "via", "config", "connect_timeout", "accept_new_key")


class Runbook:
    """One pass through a runbook, a context manager. Its methods may be called by any thread."""

    def __init__(
        self,
        name: str,
        *,
        key: str,
        params: Mapping[str, Any] | None = None,
        journal: Any = None,
        quiet: bool = False,
        at_once: int = AT_ONCE,
        reconnect_timeout: float | str | None = None,
        **how: Unpack[request.Options],
    ) -> None:
        """`journal` is the host that keeps the journal (this machine). `how` holds for every step
        that doesn't say otherwise: as_user, via, env, timeout ..

        Raises Misuse for a bad name or key.
        """
        self.name = name
        self.key = key
        self.label = f"{name} {key}"
        self._params = _plain(dict(params or {}), "params must be JSON")
        request.refuse_unknown(
            "runbook", how, request.Options
        )  # at once, and not at its first step
        self._how: dict[str, Any] = dict(how)
        self._at_once = at_once
        self._patience_s = in_seconds(reconnect_timeout)
        where = journal if journal is not None else setting(how.get("config"), "journal")
        self._progress = Progress(self.label, quiet=quiet)
        # The login and the transport are those of the journal's host too. `as_user` isn't: the
        # journal is no program of the runbook.
        reach = {each: self._how[each] for each in _REACH if each in self._how}
        self._journal = Journal(
            ledger_on(where, **reach),
            name,
            key,
            said=self._about_journal,
            patience_s=self._patience_s,
        )
        self._kept_elsewhere = where if isinstance(where, str) else None
        self._book = self._journal.book
        self._agents: dict[Any, Agent] = {}
        self._numbers: dict[str, int] = {}
        self._seen: set[tuple[str, str]] = set()
        self._lock = threading.Lock()
        self._open_follows = OpenFollows()
        self._replay = False

    def __repr__(self) -> str:
        return f"<Runbook {self.label}>"

    def _about_journal(self, text: str) -> None:
        self._progress.screen.note("", str(self._journal.where.host), f"journal: {text}")

    # -- Beginning and end
    def __enter__(self) -> Self:
        """Read the journal.

        Raises Changed if the runbook was begun with other params, Unreachable and the like if the
        journal can't be read.
        """
        book = self._journal.read()
        if book.begun is not None and (found := differences(book.params, self._params)):
            was = ", ".join(f"{name}={_shown(old)}" for name, old, _ in found)
            now = ", ".join(f"{name}={_shown(new)}" for name, _, new in found)
            raise Changed(
                f"begun with {was}, now {now}",
                label=self.label,
                hint=["another --ticket or key starts it anew"],
            )
        if book.done is not None:
            self._replay = True
            self._progress.already_done(book.done)
            return self
        self._point()
        self._progress.begins(book, str(self._journal))
        self._journal.write("open", params=self._params, pid=os.getpid())
        return self

    def _point(self) -> None:
        """Remember here where the journal is, so that `inv book` finds it by its name."""
        if self._kept_elsewhere is None or isinstance(self._journal.where, Here):
            return
        here = Journal(Here(), self.name, self.key)
        known = here.read().kept_at
        if known is None or known.facts.get("journal") != self._kept_elsewhere:
            here.write(
                "kept",
                journal=self._kept_elsewhere,
                **{name: self._how.get(name) for name in ("user", "via") if self._how.get(name)},
            )

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._open_follows.left.set()
        try:
            if error is None:
                self._finish()
            elif not self._replay:
                self._stop(error)
        finally:
            self._journal.close()
            self._progress.close()
        if isinstance(error, CorraError) and not (error.label or self._replay):
            raise error.but(label=self.label) from error

    def _finish(self) -> None:
        self._progress.flush()
        if self._replay:
            return
        self._journal.write("done")
        assert self._book.begun is not None
        assert self._book.done is not None
        steps = self._book.steps
        tries = {f"{n} {step}": self._tries(step) for n, step in enumerate(steps, 1)}
        again = repeated(tries)
        count = f"{len(steps)} step{'' if len(steps) == 1 else 's'}"
        self._progress.say(
            "done",
            f"{count} in {took(self._book.begun, self._book.done.at)}"
            + (f" ({again})" if again else ""),
        )

    def _tries(self, step: str) -> int:
        return max(
            (len(part.attempts) for (name, _), part in self._book.parts.items() if name == step),
            default=0,
        )

    def _stop(self, error: BaseException) -> None:
        self._progress.flush()
        if isinstance(error, CorraError):
            why, code = f"{error.fate}: {error.why}", error.code
        elif isinstance(error, KeyboardInterrupt):
            open_ = [
                (part, part.current)
                for part in self._book.parts.values()
                if part.open and part.host != HERE
            ]
            what = ", ".join(f"{part.step} on {part.host}" for part, _ in open_)
            why, code = "interrupted", 130
            runs = " ".join(
                ids.short(attempt.prog_id) for _, attempt in open_ if attempt is not None
            )
            hint = [
                "go on: the same command" + (f"     stop: {typed()} kill {runs}" if runs else "")
            ]
            self._progress.say("STILL RUNNING" if open_ else "STOPPED", what or "by Ctrl-C", hint)
        else:
            why, code = f"{type(error).__name__}: {error}", 1
        if isinstance(error, Unreachable) and error.host == str(self._journal.where.host):
            return  # the journal is what can't be reached
        try:
            self._journal.close()  # one try: nobody waits for a host that is away
            self._journal.write("stop", why=why, code=code)
        except CorraError:
            pass

    # -- Steps on hosts
    @overload
    def run(
        self,
        target: str | Host,
        argv: Sequence[str],
        *,
        step: str,
        warn: bool = ...,
        hide: bool = ...,
        at_once: int | None = ...,
        batch: Sizes | None = ...,
        pause: float | str | None = ...,
        max_fail: int | str = ...,
        **how: Unpack[request.Options],
    ) -> Result: ...
    @overload
    def run(
        self,
        target: Iterable[str | Host],
        argv: Sequence[str],
        *,
        step: str,
        warn: bool = ...,
        hide: bool = ...,
        at_once: int | None = ...,
        batch: Sizes | None = ...,
        pause: float | str | None = ...,
        max_fail: int | str = ...,
        **how: Unpack[request.Options],
    ) -> Results: ...
    def run(
        self,
        target: Any,
        argv: Sequence[str],
        *,
        step: str,
        warn: bool = False,
        hide: bool = True,
        at_once: int | None = None,
        batch: Sizes | None = None,
        pause: float | str | None = None,
        max_fail: int | str = 0,
        **how: Unpack[request.Options],
    ) -> Result | Results:
        """Run `argv` on a host, or on several at once, unless that was done before.

        `batch` has them run in waves: 5, "10%", or several sizes; a wave begins when the one before
        is over, and `pause` after that. Returns the Result of one host, the Results of several. A
        bad end stops the runbook, on several hosts more than `max_fail` bad ends (or "10%"); with
        `warn` it is a result like any other. LOST always stops it: an operator says whether to
        repeat the step. `hide=False` shows the output.

        Raises Failed, TimedOut, Lost, Changed, Unreachable and the other errors of a start,
        ValueError for a step that comes twice.
        """
        given: dict[str, Any] = {**self._how, **how}
        given["stdin"] = _bytes(given.get("stdin"))
        places, alone = self._places(target, given)
        named = self._claim(step, places)
        rules = self._rules(len(places), at_once, batch, pause, max_fail)
        accepts = warn or bool(rules.max_fail and self._is_over(step, places, rules.max_fail))
        shown = None if hide else lambda host: self._progress.lines(host, alone=alone)
        work = Work(named, argv, given, accepts, shown)
        for place in places:
            self._check(work, place)
        outcomes = self._together(
            named,
            places,
            lambda place: self._one(work, place),
            accepts,
            rules,
        )
        results = self._results(outcomes, rules.max_fail or 0, named, len(places))
        return next(iter(results.values())) if alone else results

    def _rules(
        self,
        total: int,
        at_once: int | None,
        batch: Sizes | None = None,
        pause: float | str | None = None,
        max_fail: int | str = 0,
    ) -> Rules:
        """Return the rules of a step over `total` hosts. Raises Misuse."""
        limit = share_of(max_fail, total)
        if limit is None or limit < 0:
            raise Misuse(f"max_fail={max_fail!r} is no number and no share", label=self.label)
        sizes = [batch] if isinstance(batch, (int, str)) else list(batch or ["100%"])
        return Rules(
            wave_sizes(total, sizes),
            at_once or self._at_once,
            max_fail=limit,
            pause_s=in_seconds(pause) or 0.0,
            lost_stops=True,
        )

    def _is_over(self, step: str, places: Sequence[Place], max_fail: int) -> bool:
        """Return whether the step ended on all hosts with at most `max_fail` bad ends.

        Such a step isn't repeated.
        """
        parts = [self._book.part(step, place.key) for place in places]
        tries = [part.current for part in parts if part.skipped is None]
        bad = sum(each is not None and not each.ok for each in tries)
        return bad <= max_fail and all(each is not None and each.ended for each in tries)

    def _places(self, target: Any, how: Mapping[str, Any]) -> tuple[list[Place], bool]:
        """Return the hosts of `target`, and whether it is one host and no list."""
        alone = is_one(target)
        if isinstance(target, str) and len(several := hosts(target)) > 1:
            raise Misuse(
                f"a text is one host, and {target!r} names {len(several)}",
                label=self.label,
                hint=[f"corra.hosts({target!r})"],
            )
        reach = {name: how[name] for name in (*_REACH, "as_user") if name in how}
        return [
            Place(self._agent(each, reach), _typed(each))
            for each in ([target] if alone else target)
        ], alone

    def _agent(self, target: Any, reach: Mapping[str, Any]) -> Agent:
        """Return the agent of `target`, the same for all steps: one connection a host."""
        if not isinstance(target, (str, Host)):
            return agent_for(target, **reach)
        key = (
            str(target),
            getattr(target, "as_user", None),
            *(str(reach.get(name)) for name in (*_REACH[:2], *_REACH[3:], "as_user")),
        )
        with self._lock:
            if key not in self._agents:
                self._agents[key] = agent_for(target, **reach)
            return self._agents[key]

    def _claim(self, step: str, places: Sequence[Place]) -> StepHosts:
        """Return the step with its number. Raises ValueError if this pass has had it."""
        if not STEP.fullmatch(step):
            raise Misuse(
                f"not the name of a step: {step!r} (letters, digits, '.', '_', '-')",
                label=self.label,
            )
        with self._lock:
            for key in [place.key for place in places] or [HERE]:
                if (step, key) in self._seen:
                    where = f" on {key}" if key != HERE else ""
                    raise ValueError(
                        f"step {step!r}{where} comes twice in one pass:"
                        " its run could not be told from the first"
                    )
                self._seen.add((step, key))
            return StepHosts(
                self.name, self.key, self._numbers.setdefault(step, len(self._numbers) + 1), step
            )

    def _check(self, work: Work, place: Place) -> None:
        """Raise Changed for a program that differs from the one that was begun."""
        step = work.step
        part = self._book.part(step.name, place.key)
        do, number = next_move(part, accepts=work.accepts)
        if self._replay and do not in (Do.RETURN, Do.SKIP):
            raise self._new_since(step.name)
        if do not in (Do.RETURN, Do.RESUME):
            return
        assert part.current is not None
        facts = self._facts(self._launch(work, place, number), work.how)
        if found := differences(part.current.program, facts):
            raise self._changed(step, place.key, found)
        if do is Do.RESUME and part.current.user != place.agent.user:
            raise self._changed(step, place.key, [("user", part.current.user, place.agent.user)])

    def _new_since(self, step: str) -> Changed:
        return Changed(
            f"it was done without a step {step}",
            label=self.label,
            hint=["nothing was started; a new key starts it anew"],
        )

    def _changed(
        self, step: StepHosts, host: str, found: Sequence[tuple[str, Any, Any]]
    ) -> Changed:
        names = ", ".join(dict.fromkeys(name for name, _, _ in found))
        hint = [f"{name}: was {_shown(old)}, now {_shown(new)}" for name, old, new in found[:2]]
        return Changed(
            f"{step.number} {step.name} was begun{f' on {host}' if host != HERE else ''}"
            f" with another {names}",
            label=self.label,
            hint=[*hint, f"put it back, or have it done anew: {step.command('redo')}"],
        )

    def _launch(self, work: Work, place: Place, number: int) -> request.Launch:
        how = dict(work.how)
        if place.host.is_local and how.get("cwd") is None:
            # The home and not the current directory: the next pass must start the same program.
            how["cwd"] = os.path.expanduser("~")
        step = work.step
        origin = {
            "runbook": self.label,
            "step": step.name,
            "attempt": str(number),
            "pass": self._journal.pass_id,
        }
        prog_id = ids.derived("runbook", self.name, self.key, step.name, place.key, number)
        return request.launch(
            place.agent, work.argv, id=prog_id, name=step.name, origin=origin, **how
        )

    def _facts(self, launch: request.Launch, how: Mapping[str, Any]) -> dict[str, Any]:
        return program_facts(launch.request.program, how.get("stdin") or b"")

    def _together(
        self,
        step: StepHosts,
        places: Sequence[Place],
        one: Callable[[Place], Outcome],
        accepts: bool,
        rules: Rules,
    ) -> list[Outcome]:
        """Do `one` on all hosts, and say the outcomes."""
        todo = {
            next_move(self._book.part(step.name, place.key), accepts=accepts)[0] for place in places
        }
        if todo & {Do.RESUME, Do.BEGIN}:
            self._progress.flush()
            self._progress.live(step.number, step.name, len(places))
        try:
            outcomes = list(Crew(one, places, rules=rules, judge=_judged).go().values())
        except BaseException:
            self._open_follows.leave()
            raise
        finally:
            self._progress.live_no_more()
        if self._replay:
            return outcomes
        if all(each.before and each.error is None for each in outcomes):
            self._progress.done_before(step.number, step.name, [each.before for each in outcomes])
        else:
            self._progress.rows(
                step.number,
                step.name,
                [
                    HostRow(each.place.key, each.word, each.took_s, each.prog_id)
                    for each in outcomes
                ],
            )
        return outcomes

    def _results(
        self, outcomes: Sequence[Outcome], max_fail: int, step: StepHosts, of: int
    ) -> Results:
        """Return the results of a step. Raises the error that stops the runbook."""
        from corra.runs.result import Results

        errors = {each.place.host: each.error for each in outcomes if each.error is not None}
        results = Results(
            {each.place.host: each.result for each in outcomes if each.result is not None},
            unreached={
                each.place.host: each.error
                for each in outcomes
                if each.result is None and each.error is not None
            },
        )
        if len(errors) > max_fail or any(isinstance(error, Lost) for error in errors.values()):
            said = next(
                (last_line(r.stderr, r.stdout) for host, r in results.items() if host in errors), ""
            )
            raise stop_error(step, errors, of=of, said=said).but(results=results)
        return results

    # -- One host's part of a step
    def _one(self, work: Work, place: Place) -> Outcome:
        step = work.step.name
        try:
            while True:
                part = self._book.part(step, place.key)
                do, number = next_move(part, accepts=work.accepts)
                current = part.current
                match do:
                    case Do.RETURN | Do.ASK:
                        assert current is not None
                        return self._recorded(work, place, current)
                    case Do.SKIP:
                        return self._skipped(work, place, current, number)
                seen = self._attempt(work, place, current, number)
                self._write_end(step, place, number, seen)
                # An attempt that failed before this pass is repeated now.
                if (
                    not seen.was_over
                    or exit_code(seen.state) == 0
                    or seen.state.state == "lost"
                    or work.accepts
                ):
                    return self._outcome(work, place, seen, held=do is Do.RESUME or seen.was_over)
        except CorraError as error:
            return Outcome(place, error.fate or "NOT REACHED", error=error)
        finally:
            self._progress.over(place.key)

    def _attempt(self, work: Work, place: Place, current: Attempt | None, number: int) -> Seen:
        launch = self._launch(work, place, number)
        if current is None or current.number != number:
            self._journal.write(
                "begin",
                step=work.step.name,
                host=place.key,
                attempt=number,
                prog_id=launch.request.prog_id,
                program=self._facts(launch, work.how),
                user=place.agent.user,
            )
        confirmed = current is not None and current.number == number and current.confirmed
        watcher = _Watcher(
            work,
            place,
            number,
            confirmed=confirmed,
            journal=self._journal,
            progress=self._progress,
            open_follows=self._open_follows,
        )
        try:
            with contextlib.closing(launch):
                return watch_attempt(
                    launch,
                    watcher,
                    confirmed=confirmed,
                    patience_s=self._patience_s,
                    pass_id=self._journal.pass_id,
                )
        except Conflict as error:
            why = f"{work.step.number} {work.step.name} was begun on {place.key} as another command"
            raise Changed(why, label=self.label, hint=error.hint) from error
        finally:
            watcher.end()

    def _write_end(self, step: str, place: Place, number: int, seen: Seen) -> None:
        out, out_cut = end_of(seen.stdout, OUTPUT_IN_JOURNAL)
        err, err_cut = end_of(seen.stderr, OUTPUT_IN_JOURNAL)
        texts = {"stdout": out, "stderr": err, "truncated": out_cut or err_cut or seen.truncated}
        self._journal.write(
            "end", step=step, host=place.key, attempt=number, state=seen.state.to_json(), **texts
        )

    def _recorded(self, work: Work, place: Place, attempt: Attempt) -> Outcome:
        """Return the outcome in the journal; long output comes from the host."""
        assert attempt.state is not None
        seen = Seen(attempt.state, attempt.stdout, attempt.stderr, attempt.truncated)
        if attempt.truncated and attempt.state.state == "exited":
            with contextlib.suppress(CorraError):
                whole = Run(place.agent, attempt.prog_id, spool=work.how.get("spool")).wait()
                seen = Seen(attempt.state, whole.stdout, whole.stderr, whole.truncated)
        return self._outcome(work, place, seen, before=attempt.ended_at)

    def _skipped(self, work: Work, place: Place, attempt: Attempt | None, number: int) -> Outcome:
        from corra.runs.result import Result

        state = attempt.state if attempt is not None else None
        if state is None:
            state = State(
                self._launch(work, place, number or 1).request.prog_id,
                "not_started",
                name=work.step.name,
            )
        out, err = (attempt.stdout, attempt.stderr) if attempt is not None else ("", "")
        result = Result(
            state, place.host, stdout=out, stderr=err, hide=("stdout", "stderr"), skipped=True
        )
        return Outcome(place, "skipped", result)

    def _outcome(
        self,
        work: Work,
        place: Place,
        seen: Seen,
        *,
        held: bool = False,
        before: str = "",
    ) -> Outcome:
        from corra.runs.result import Result

        state = seen.state
        result = Result(
            state,
            place.host,
            stdout=seen.stdout,
            stderr=seen.stderr,
            hide=("stdout", "stderr"),
            truncated=seen.truncated,
        )
        error = end_error(state, str(place.host), result, reached=self._reached(work, place))
        word = (
            "done"
            if error is None
            else f"FAILED exit {state.return_code}"
            if error.fate == "FAILED"
            else error.fate
        )
        if work.accepts and not isinstance(error, Lost):
            error = None
        if held:
            word = f"attached, {word}"
        return Outcome(place, word, result, error, state.elapsed, state.prog_id, before)

    # -- Reboots
    @overload
    def reboot(  # type: ignore[overload-overlap] # a str is one host, though it is an iterable of str too
        self,
        target: str | Host,
        *,
        step: str,
        timeout: float | str = ...,
        argv: Sequence[str] = ...,
        at_once: int | None = ...,
        **how: Unpack[Reach],
    ) -> Reboot: ...
    @overload
    def reboot(
        self,
        target: Iterable[str | Host],
        *,
        step: str,
        timeout: float | str = ...,
        argv: Sequence[str] = ...,
        at_once: int | None = ...,
        **how: Unpack[Reach],
    ) -> dict[Host, Reboot]: ...
    def reboot(
        self,
        target: Any,
        *,
        step: str,
        timeout: float | str = "15m",
        argv: Sequence[str] = ("systemctl", "reboot"),
        at_once: int | None = None,
        **how: Unpack[Reach],
    ) -> Reboot | dict[Host, Reboot]:
        """Reboot hosts and wait until they answer again, `timeout` at most.

        Returns the Reboot of one host, of several by host. The boot id tells whether a host has
        rebooted, so this is a result and no lost run, whenever the link breaks. `argv` is the
        command that reboots (`systemctl reboot`). Raises TimedOut for a host that doesn't come back
        with another boot id.
        """
        given: dict[str, Any] = {**self._how, **how}
        limit_s = in_seconds(timeout)
        places, alone = self._places(target, given)
        named = self._claim(step, places)
        work = Work(named, argv, given, accepts=False)
        for place in places:
            self._check(work, place)
        outcomes = self._together(
            named,
            places,
            lambda place: self._reboot_one(work, place, limit_s),
            False,
            self._rules(len(places), at_once),
        )
        if errors := {each.place.host: each.error for each in outcomes if each.error is not None}:
            raise stop_error(named, errors, of=len(places))
        found = {each.place.host: cast("Reboot", each.result) for each in outcomes}
        return next(iter(found.values())) if alone else found

    def _reboot_one(self, work: Work, place: Place, limit_s: float) -> Outcome:
        step = work.step.name
        part = self._book.part(step, place.key)
        do, number = next_move(part, accepts=False)
        current = part.current
        try:
            if do is Do.RETURN:
                assert current is not None
                return self._rebooted(place, current, before=current.ended_at)
            if do is Do.SKIP:
                return Outcome(
                    place, "skipped", Reboot(current.old_boot if current else "", "", 0.0)
                )
            if do is Do.BEGIN:
                launch = self._launch(work, place, number)
                facts = {
                    "prog_id": launch.request.prog_id,
                    "program": self._facts(launch, work.how),
                    "user": place.agent.user,
                }
                self._journal.write(
                    "begin",
                    step=step,
                    host=place.key,
                    attempt=number,
                    old_boot=self._boot(place),
                    **facts,
                )
            attempt = self._book.part(step, place.key).current
            assert attempt is not None
            if new := self._await_boot(work, place, attempt, number, limit_s):
                self._journal.write(
                    "rebooted",
                    step=step,
                    host=place.key,
                    attempt=number,
                    old_boot=attempt.old_boot,
                    **new,
                )
            attempt = self._book.part(step, place.key).current
            assert attempt is not None
            return self._rebooted(place, attempt)
        except CorraError as error:
            return Outcome(place, error.fate or "NOT REACHED", error=error)
        finally:
            self._progress.over(place.key)

    @staticmethod
    def _reached(work: Work, place: Place) -> str:
        return reach_flags(place.host, via=work.how.get("via"), spool=work.how.get("spool"))

    def _boot(self, place: Place) -> str:
        try:
            return boot_id_of(place.agent)
        except (LinkLost, TimeoutError) as error:
            raise Unreachable(str(error) or "no answer", host=str(place.host)) from error

    def _await_boot(
        self, work: Work, place: Place, attempt: Attempt, number: int, limit_s: float
    ) -> dict[str, Any]:
        """Order the reboot once, and wait for another boot id.

        Raises TimedOut, and Failed if the order itself failed.
        """
        began, ordered = time.monotonic(), False
        run = self._launch(work, place, number).run
        while time.monotonic() < began + limit_s and not self._open_follows.left.is_set():
            try:
                boot = boot_id_of(place.agent)
                if boot != attempt.old_boot:
                    return {"new_boot": boot, "down_s": round(_since(attempt.at), 1)}
                if not ordered:
                    state = self._order(work, place, number)
                    self._progress.begun(place.key, state)
                    ordered = True
                else:
                    state = run.state()
                if (
                    state.ended
                    and exit_code(state) != 0
                    and state.state != "lost"
                    and state.signal is None
                ):
                    seen = Seen(state, "", run.read("stderr").decode("utf-8", "replace"))
                    self._write_end(work.step.name, place, number, seen)
                    error = end_error(
                        state,
                        str(place.host),
                        self._outcome(work, place, seen).result,
                        reached=self._reached(work, place),
                    )
                    assert error is not None
                    raise error
            except (LinkLost, TimeoutError, Unreachable):
                place.agent.close()
            self._open_follows.left.wait(REBOOT_LOOK_S)
        raise TimedOut(
            f"not rebooted in {duration(limit_s)}",
            result=None,
            host=str(place.host),
            fate="NOT REBOOTED",
        )

    def _order(self, work: Work, place: Place, number: int) -> State:
        with contextlib.closing(self._launch(work, place, number)) as launch:
            follow = launch.follow(Patience(reconnect_timeout_s=0.0), stay=False)
            for _ in follow:
                pass
            if follow.state is None:
                raise LinkLost("no answer")
            return follow.state

    def _rebooted(self, place: Place, attempt: Attempt, *, before: str = "") -> Outcome:
        facts = attempt.reboot or {}
        found = Reboot(
            attempt.old_boot, str(facts.get("new_boot", "")), float(facts.get("down_s", 0.0))
        )
        return Outcome(
            place, "rebooted", found, took_s=found.down_s, prog_id=attempt.prog_id, before=before
        )

    # -- Steps here
    def do(self, step: str, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Return the result of `function(*args, **kwargs)`, from the journal if that has it.

        The function is called at least once: if this process dies between its end and the journal's
        line, the next pass calls it again. Its result must be JSON, and comes back as JSON makes
        it.
        """
        named = self._claim(step, ())
        given = {"function": _called(function), "args": _digestible([list(args), kwargs])}
        part = self._book.part(step, HERE)
        if part.value is not None:
            was = {name: part.value.facts.get(name, new) for name, new in given.items()}
            if found := differences(was, given):
                raise self._changed(
                    named,
                    HERE,
                    [
                        ({"args": "list of arguments"}.get(name, name), old, new)
                        for name, old, new in found
                    ],
                )
            if not self._replay:
                self._progress.done_before(named.number, step, [part.value.at])
            return cast("T", part.value.facts.get("result"))
        if part.skipped is not None:
            self._progress.rows(named.number, step, [HostRow("here", "skipped")])
            return cast("T", None)
        if self._replay:
            raise self._new_since(step)
        began = time.monotonic()
        result = _plain(function(*args, **kwargs), f"what step {step} returns must be JSON")
        self._journal.write("did", step=step, **given, result=result)
        self._progress.rows(named.number, step, [HostRow("here", "done", time.monotonic() - began)])
        return result

    def confirm(self, question: str, *, step: str = "") -> None:
        """Ask the operator for a yes, once; the journal keeps it.

        Without a terminal the runbook stops, and `inv book NAME KEY --skip STEP` is a yes. Raises
        Stop for any other answer, and Changed if the yes was to another question.
        """
        step = step or f"confirm-{ids.short(ids.derived(question))}"
        named = self._claim(step, ())
        part = self._book.part(step, HERE)
        if part.value is not None or part.skipped is not None:
            # A yes is to its own question only.
            if part.value is not None and (was := part.value.facts.get("question")) != question:
                raise self._changed(named, HERE, [("question", was, question)])
            if not self._replay:
                self._progress.done_before(
                    named.number, step, [part.value.at if part.value else ""]
                )
            return
        if self._replay:
            raise self._new_since(step)
        self._progress.flush()
        place = f"{named.number} {step}"
        if not (os.isatty(0) and self._progress.screen.err_is_terminal):
            hint = [f"a yes, from anywhere: {named.command('skip')}    then the same command"]
            raise Stop(
                f"{question}: nobody here to say yes",
                label=self.label,
                fate=f"STOPPED at {place}",
                hint=hint,
            )
        if not self._progress.screen.ask(self.label, "", f"{question} [y/N] "):
            raise Stop(
                f"{question}: you said no",
                label=self.label,
                fate=f"STOPPED at {place}",
                hint=["asked again by the same command"],
            )
        self._journal.write("confirmed", step=step, question=question)

    def note(self, text: str) -> None:
        """Write `text` into the journal and on stderr, once in all passes."""
        if (
            any(
                event.what == "note" and event.facts.get("text") == text
                for event in self._book.events
            )
            or self._replay
        ):
            return
        self._journal.write("note", text=text)
        self._progress.say("", text)


class _Watcher:
    """Passes on what one attempt says: to the journal, to the live line and to the open follows."""

    def __init__(
        self,
        work: Work,
        place: Place,
        number: int,
        *,
        confirmed: bool,
        journal: Journal,
        progress: Progress,
        open_follows: OpenFollows,
    ) -> None:
        """`confirmed`: the journal has the start already."""
        self._step, self._place, self._number = work.step.name, place, number
        self._confirmed = confirmed
        self._journal, self._progress, self._open_follows = journal, progress, open_follows
        self._lines = work.shown(place.key) if work.shown is not None else None
        self._follow: Follow | None = None

    def follows(self, follow: Follow) -> None:
        self._follow = follow
        self._open_follows.add(follow)

    def began(self, state: State) -> None:
        self._progress.begun(self._place.key, state)
        if not self._confirmed and state.state != "not_started":
            facts = {
                "boot_id": state.boot_id,
                "start_time": state.start_time,
                "user": state.user,
                "spool": state.spool,
            }
            self._journal.write(
                "started", step=self._step, host=self._place.key, attempt=self._number, **facts
            )

    def link(self, event: LinkDown | LinkUp) -> None:
        up = isinstance(event, LinkUp)
        for_s = event.down_s if isinstance(event, LinkUp) else event.since_s
        self._progress.link(self._place.key, up=up, for_s=for_s)

    def output(self, stream: str, data: bytes) -> None:
        if self._lines is not None:
            self._lines.write(stream, data)

    def end(self) -> None:
        if self._lines is not None:
            self._lines.end()
        if self._follow is not None:
            self._open_follows.discard(self._follow)


def runbook(
    name: str,
    *,
    key: str,
    params: Mapping[str, Any] | None = None,
    journal: Any = None,
    quiet: bool = False,
    at_once: int = AT_ONCE,
    reconnect_timeout: float | str | None = None,
    **how: Unpack[request.Options],
) -> Runbook:
    """Return the runbook `name` for `key` (a ticket, say), for a `with`.

    The same name and key continue it, from any machine, but not with other `params`. `journal` is
    the host that keeps the journal: this machine, or one that other machines reach too. `how` holds
    for every step that doesn't say otherwise: as_user, via, env, timeout ..
    """
    return Runbook(
        name,
        key=key,
        params=params,
        journal=journal,
        quiet=quiet,
        at_once=at_once,
        reconnect_timeout=reconnect_timeout,
        **how,
    )


def _judged(outcome: Outcome) -> What:
    """Return what an outcome means for the rules of its step."""
    if outcome.error is None:
        return What.WELL
    return What.LOST if isinstance(outcome.error, Lost) else What.FAILED


def _typed(target: Any) -> str:
    """Return the name of a Connection's host, "" for other targets."""
    return name_of(target) if is_a(target, "fabric.connection", "Connection") else ""


def _bytes(stdin: Any) -> bytes | None:
    """Return the stdin of a step as bytes: the step may be started more than once."""
    if stdin is OPEN:
        raise Misuse(
            "a step's stdin can't be held open:"
            " what is sent later is not there when the step is repeated; give it whole"
        )
    if stdin is None or isinstance(stdin, bytes):
        return stdin
    data = stdin if isinstance(stdin, str) else getattr(stdin, "buffer", stdin).read()
    return data.encode("utf-8", "surrogateescape") if isinstance(data, str) else bytes(data)


def _plain(value: T, rule: str) -> T:
    """Return `value` as JSON makes it. Raises Misuse with the rule for a value that isn't JSON."""
    try:
        return cast("T", json.loads(json.dumps(value, allow_nan=False)))
    except (TypeError, ValueError) as error:
        raise Misuse(f"{rule}: {error}") from error


def _called(function: Callable[..., Any]) -> str:
    """Return the qualified name of a function, without its module."""
    return str(getattr(function, "__qualname__", type(function).__qualname__))


def _digestible(value: Any) -> Any:
    """Return `value` as JSON makes it, None for a value that isn't JSON and can't be compared."""
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError):
        return None


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 120 else text[:118] + ".."


def _since(at: str) -> float:
    from datetime import datetime, timezone

    return (datetime.now(timezone.utc) - datetime.fromisoformat(at)).total_seconds()
