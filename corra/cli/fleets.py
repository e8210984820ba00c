"""Verbs over a fleet: one program on many hosts. See docs/fleets.md."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from invoke.context import Context

from corra.errors import NOTHING_DONE, CorraError, Misuse, NotFound, NotKilled, typed
from corra.settings import setting

from . import collectors, inputs, selection
from .flags import (
    AgainFlags,
    AttachFlags,
    FleetViewFlags,
    FoldFlags,
    HostFlags,
    KillFlags,
    LaunchFlags,
    LogsFlags,
    PsFlags,
    RunFlags,
    StatusFlags,
    WaitFlags,
)
from .words import Given

if TYPE_CHECKING:
    from corra.fleets.board import Board
    from corra.fleets.fleet import Fleet
    from corra.fleets.view import View
    from corra.model.state import State
    from corra.runs.request import Launch
    from corra.runs.run import Run

# Flags of `run` that make a fleet even of one host.
_OF_FLEETS = (
    *("batch", "canary", "confirm", "max_fail", "max_unreached", "pause", "plan", "each"),
    *("order", "output_dir", "journal", "kill_on_fail", "fold", "diff"),
)
# The last lines of each host that `attach` begins with on a terminal.
TAIL_ON_A_TERMINAL = 10


def is_fleet(given: RunFlags, hosts: Sequence[str]) -> bool:
    """Return whether a command line means a fleet and no single run."""
    return len(hosts) > 1 or any(getattr(given, name) for name in _OF_FLEETS)


# -- run, again


def roll_out(c: Context, given: RunFlags, hosts: Sequence[str]) -> int:
    """Start a program on all hosts as the flags say, show it, and return the exit code."""
    from corra.fleets.fleet import new_fleet
    from corra.fleets.plan import members_of

    _refuse_for_one(given)
    stdin, file = inputs.given_stdin(given)
    with contextlib.ExitStack() as opened:
        opened.enter_context(file)
        options: Any = {**inputs.given_options(c, given, stdin), **selection.host_reach(c, given)}
        fleet = new_fleet(
            members_of(selection.told_hosts(c, given, each=True) if given.each else hosts),
            given.argv,
            batch=given.batch,
            order=given.order,
            canary=selection.hosts_in(c, given, given.canary) if given.canary else (),
            journal=given.journal or setting(c.config, "journal"),
            patience=selection.patience(c, given),
            **_waves(given),
            pause=given.pause,
            start_timeout=given.start_timeout,
            prepare=_reported(c, given),
            **options,
        )
        opened.callback(fleet.close)
        return _launched(given, fleet, show_plan=given.plan or given.dry)


def again(c: Context, given: AgainFlags, fleet: Fleet) -> int:
    """Start once more what failed, was unreached or wasn't started, and return the exit code."""
    _refuse_for_one(given)
    answers = fleet.ask()
    plan = fleet.next_attempt(
        answers,
        only=given.only,
        redo=selection.hosts_in(c, given, given.redo) if given.redo else (),
        batch=given.batch,
        **_waves(given),
        pause_s=given.pause,
        start_s=given.start_timeout,
    )
    if plan is None:
        what = f"nothing is {given.only.replace('-', ' ')}" if given.only else "nothing to repeat"
        given.screen.say(fleet.plan.label, "", "ALREADY DONE", what)
        return 0
    if given.dry:
        return _show_plan(given, plan)
    fleet.learned(_known(fleet, answers))
    fleet.learn_program(inputs.given_secrets(given))
    return _launched(given, fleet.at_attempt(plan, _reported(c, given)), show_plan=False)


def _known(fleet: Fleet, answers: Any) -> Any:
    from corra.fleets.gather import known_from_hosts

    return [known for plan in fleet.plans for known in known_from_hosts(plan, answers)]


def _waves(given: RunFlags | AgainFlags) -> dict[str, Any]:
    names = ("at_once", "max_fail", "max_unreached", "confirm", "kill_on_fail")
    return {name: getattr(given, name) for name in names}


def _refuse_for_one(given: LaunchFlags) -> None:
    """Refuse what one terminal can't be for many programs. Raises Misuse."""
    if given.interactive:
        raise Misuse(
            "-i is for one host",
            fate="NOT STARTED",
            hint=["the same for all hosts: --stdin -"],
        )
    if given.callback_through_ssh:
        raise Misuse("--callback-through-ssh is for one host", fate="NOT STARTED")


def _show_plan(given: Given, plan: Any) -> int:
    from corra.fleets.plan import plan_lines, plan_words

    if given.json:
        given.screen.event("plan", plan=plan.to_json(), words=plan_words(plan))
    else:
        given.screen.lines([plan_words(plan), *plan_lines(plan)])
    return 0


def _reported(c: Context, given: LaunchFlags) -> Callable[[Launch], Launch] | None:
    """Return what has each start report to --collector, None without it."""
    if not given.collector:
        return None
    name = given.collector
    return lambda launch: collectors.register(c, name, launch)


def _launched(given: RunFlags | AgainFlags, fleet: Fleet, *, show_plan: bool) -> int:
    if given.detach and len(fleet.plan.waves) > 1:
        raise Misuse(
            "-d leaves when all have started, and waves need somebody to stay",
            hint=[
                f"stay on a machine that stays up:  {typed()} run -d --host ops1 -- corra run .."
            ],
        )
    if show_plan:
        return _show_plan(given, fleet.plan)
    fleet.begin()
    return _rolled(given, given, fleet, stay=not given.detach, announce=True)


# -- Rolling, and its words


def _view(given: Given, shown: FleetViewFlags | None) -> View:
    from corra.fleets.view import Lines, ToFiles

    prefix = shown.prefix if shown is not None else "host"
    view: View = Lines(given.screen, prefix=prefix, hide=given.hide)
    if shown is not None and shown.output_dir:
        try:
            view = ToFiles(view, shown.output_dir)
        except OSError as error:
            raise Misuse(f"--output-dir {shown.output_dir}: {error.strerror}") from error
    return view


def _rolled(
    given: Given,
    shown: FleetViewFlags | None,
    fleet: Fleet,
    *,
    stay: bool = True,
    announce: bool = False,
    yes: bool = False,
    **how: Any,
) -> int:
    """Roll the fleet to its end, say how that was, and return the exit code."""
    from corra import render
    from corra.fleets.plan import plan_words
    from corra.fleets.roll import Way
    from corra.model import ids
    from corra.terminal.screen import Gone

    from .folding import folds, show_folded

    screen, plan = given.screen, fleet.plan
    if announce:
        screen.note(plan.label, "", plan_words(plan))
        if screen.json:
            screen.event("plan", plan=plan.to_json(), words=plan_words(plan))

    def confirm(question: str) -> bool:
        return screen.ask(plan.label, "", question)

    folded = shown is not None and folds(shown) and stay
    if folded and shown is not None and shown.output_dir:
        raise Misuse("--fold moves one output of a group, and --output-dir wants all of them")
    if folded:
        how = {**how, "shows": False, "folds": True}
    roller = fleet.roller(
        _view(given, shown),
        stay=stay,
        take_over=shown is not None and shown.take_over,
        confirm=(lambda _: True) if yes else confirm if screen.can_ask else None,
        **how,
    )
    from corra.fleets.live import frame

    board = roller.board
    screen.live_block(lambda width, height: frame(board, width, height, colour=screen.colours))
    try:
        rolled = roller.roll()
    except Gone as gone:
        if not gone.said:
            why = gone.why("their output")
            screen.say_unread(plan.label, "", render.STILL_RUNNING, why)
            gone.said = True
        raise
    finally:
        screen.live_block(None)
    with contextlib.suppress(CorraError):
        roller.release()
    _say_summary(given, roller, rolled)
    if folded and shown is not None:
        show_folded(shown, fleet, roller.board, asks=rolled.way is not Way.LEFT)
    if rolled.way is Way.LEFT:
        return 128 + rolled.signal
    code = roller.board.code
    if not stay and not code_of_starts(roller):
        code = 0
        if not screen.json:
            screen.lines([plan.id])
            screen.say(
                plan.label,
                "",
                render.STARTED,
                f"on {len(plan.members)} hosts",
                [f"watch: {typed()} attach {ids.short(plan.id)}"],
            )
    return code


def code_of_starts(roller: Any) -> int:
    """Return the exit code of a fleet that nobody stays with: a member that runs is well."""
    from corra.model.rollout import What

    codes = [each.code for each in roller.board.members if each.what is not What.STARTED]
    untried = any(each.what is None for each in roller.board.members)
    worst: int = max(codes, default=0)
    return NOTHING_DONE if untried and not worst else worst


def _say_summary(given: Given, roller: Any, rolled: Any) -> None:
    from corra.fleets.summary import summary_of

    found = summary_of(roller.board, rolled)
    screen = given.screen
    if screen.json:
        facts = {"fate": found.fate, "why": found.why, "exit_code": roller.board.code}
        screen.event("fleet", id=roller.plan.id, name=roller.plan.name, **facts)
        return
    screen.say(roller.plan.label, "", found.fate, found.why)
    for row in found.rows:
        screen.row(row)
    if screen.err_is_terminal:
        for hint in found.hint:
            screen.row(f"  {hint}")


# -- Finding


def named(c: Context, given: HostFlags, text: str | None, *, journal: str | None = None) -> Any:
    """Return the fleet that `text` means in the journals here, or None."""
    from corra.fleets.fleet import find_fleet, journals_here

    if text is None or not (journal or setting(c.config, "journal") or journals_here()):
        return None
    told = journal or setting(c.config, "journal")
    patience = selection.patience(c, given)
    return find_fleet(text, journal=told, patience=patience, **selection.host_reach(c, given))


def on_host(c: Context, given: HostFlags, text: str | None) -> Any:
    """Return the fleet that `text` means on the first of --host that answers. Raises CorraError."""
    from corra.fleets.fleet import find_fleet

    if text is None or not given.host:
        return None
    failure: CorraError | None = None
    for host in selection.hosts_in(c, given, given.host):
        try:
            return find_fleet(
                text,
                host=host,
                spool=given.spool,
                patience=selection.patience(c, given),
                **selection.host_reach(c, given),
            )
        except CorraError as error:
            failure = failure or error
    raise failure or NotFound("", label=text)


def either(
    c: Context,
    given: HostFlags,
    text: str | None,
    one: Callable[[], int],
    many: Callable[[Fleet], int],
) -> int:
    """Do `many` with the fleet that `text` means, else `one` with the run.

    On --host a run comes first: only where no run of that name is there, a fleet is looked for. But
    who folds means a fleet.
    """
    found = named(c, given, text)
    if found is None and isinstance(given, FoldFlags) and (given.fold or given.diff):
        with contextlib.suppress(NotFound):
            found = on_host(c, given, text)
    if found is None:
        try:
            return one()
        except NotFound as error:
            if not given.host or text is None:
                raise
            try:
                found = on_host(c, given, text)
            except NotFound:
                raise error from None
    with found:
        return many(found)


# -- attach, wait, logs


def attach(given: AttachFlags, fleet: Fleet) -> int:
    """Go on with a fleet, or watch it, and return its exit code."""
    from corra.model.rollout import What

    if given.interactive or given.sig_proxy:
        raise Misuse("-i and --sig-proxy are for one run", fate="NOT DONE")
    starts = not given.watch_only
    if starts and fleet.tally().count(None, What.BEGUN):
        try:
            fleet.learn_program(inputs.given_secrets(given))
        except CorraError as error:
            given.screen.error(error.but(fate="NOT STARTED"))
    _say_begun(given, fleet)
    tail = (
        given.tail
        if given.tail != -1
        else (TAIL_ON_A_TERMINAL if given.screen.out_is_terminal else None)
    )
    return _rolled(given, given, fleet, starts=starts, tail=tail, yes=given.yes)


def _say_begun(given: Given, fleet: Fleet) -> None:
    from corra import render
    from corra.fleets.plan import plan_words
    from corra.model.words import now

    plan = fleet.plan
    at = render.past_moment(plan.at, now())
    given.screen.note(plan.label, "", f"{plan_words(plan)}; begun {at} by {plan.by}")


def wait(given: WaitFlags, fleet: Fleet) -> int:
    """Wait until all that was started is over, and return the fleet's exit code."""
    return _rolled(given, None, fleet, starts=False, shows=False)


def logs(given: LogsFlags, fleet: Fleet) -> int:
    """Show what the members have written; with --follow until they are over."""
    from corra.fleets.board import Board
    from corra.fleets.gather import in_parallel
    from corra.model.frames import Output

    from .folding import folds

    board, view = Board(fleet.plan), _view(given, None)
    if folds(given):
        return _folded_logs(given, fleet, board)
    view.begins(board)
    streams = None if given.stream in (None, "both") else [given.stream, "output"]

    def show(member: Any) -> CorraError | None:
        run = fleet.run_of(member.name)
        try:
            for event in run.follow(
                tail=given.tail, since_ns=given.since, streams=streams, live=given.follow
            ):
                if isinstance(event, Output):
                    view.output(member, event.stream, event.data, event.offset)
        except NotFound:
            return None  # it wasn't started
        except CorraError as error:
            return error
        finally:
            run.agent.close()
        return None

    errors = [each for each in in_parallel(show, board.members) if each is not None]
    view.ends()
    for error in errors:
        given.screen.error(error)
    return max((error.code for error in errors), default=0)


def _folded_logs(given: LogsFlags, fleet: Fleet, board: Board) -> int:
    from corra.fleets.board import fact_of, fact_of_error, moment

    from .folding import show_folded

    if given.follow or given.tail is not None or given.since is not None:
        raise Misuse("--fold is of whole outputs: it has no --follow, --tail and --since")
    code, answers = 0, fleet.ask()
    for member in board.members:
        answer = answers.get(member.name)
        if isinstance(answer, CorraError):
            board.take(fact_of_error(answer, moment(), member.at))
            member.error, code = answer, max(code, answer.code)
        elif answer is not None and answer[0] == fleet.plan.attempt:
            board.take(fact_of(answer[1], moment(), member.at))
            member.state = answer[1]
    show_folded(given, fleet, board)
    return code


# -- status, ps, kill


def status(given: StatusFlags | PsFlags, fleet: Fleet) -> int:
    """Show what became of each member, as its host says now."""
    from corra import render
    from corra.fleets.plan import host_of, plan_words
    from corra.model.host_sets import fold
    from corra.model.words import now

    plan, screen = fleet.plan, given.screen
    answers = fleet.ask()
    states: list[tuple[str, State]] = []
    alike: dict[str, list[str]] = {}
    errors = []
    for member, answer in answers.items():
        if isinstance(answer, CorraError):
            errors.append(answer)
            alike.setdefault(f"unknown: {answer.why}", []).append(member)
        elif answer is None:
            alike.setdefault("not started", []).append(member)
        else:
            states.append((member, answer[1]))
            alike.setdefault(render.word(answer[1]), []).append(member)
    code = max((error.code for error in errors), default=0)
    if screen.json:
        screen.event("plan", plan=plan.to_json(), words=plan_words(plan))
        for member, state in states:
            screen.event("state", **{**state.to_json(), "host": host_of(member)})
        for error in errors:
            screen.error(error)
        return code
    if isinstance(given, PsFlags):
        if given.quiet:
            screen.lines([state.prog_id for _, state in states])
            return code
        rows = [render.row(state, now(), member) for member, state in states]
        width = screen.width if screen.out_is_terminal and not given.no_trunc else None
        screen.lines(render.table(rows, width))
        for error in errors:
            screen.error(error)
        return code
    begun = f"begun {render.past_moment(plan.at, now())} by {plan.by}"
    attempt = f", attempt {plan.attempt}" if plan.attempt > 1 else ""
    lines = [f"{plan.label}: {len(plan.all_members)} hosts, {begun}{attempt}"]
    lines.append(f"  plan      {plan_words(plan)}")
    for word, members in sorted(alike.items(), key=lambda pair: -len(pair[1])):
        lines.append(f"  {len(members):>4} {word}: {fold(members)}")
    lines.append(f"  id        {plan.id}")
    screen.lines([render.visible(line) for line in lines])
    return code


def ps(c: Context, given: PsFlags) -> int:
    """List the runs of a fleet. Raises NotFound, Misuse."""
    if len(given.ids) > 1:
        raise Misuse(f"one fleet at a time: {' '.join(given.ids)}", fate="NOT DONE")
    text = given.ids[0]
    found = named(c, given, text) or on_host(c, given, text)
    if found is None:
        raise NotFound(
            "no fleet of that name;",
            label=text,
            hint=[f"a host's runs: {typed()} ps --host {text}"],
        )
    with found:
        return status(given, found)


def kill(given: KillFlags, fleet: Fleet) -> int:
    """Stop a fleet: what runs is ended, and what isn't started never will be."""
    from corra.fleets.gather import in_parallel
    from corra.model.host_sets import fold
    from corra.runs.asking import asked_by, who_asks

    plan, screen = fleet.plan, given.screen
    mine = plan.by.partition("@")[0] == who_asks()["user"]
    if not (mine or given.yes or given.dry):
        why = f"started by {plan.by}"
        if not screen.can_ask:
            raise NotKilled(f"{why}: add -y", label=plan.label)
        if not screen.ask(plan.label, "", f"{why}: stop it? [y/N] "):
            raise NotKilled("you said no", label=plan.label)
    over = {plan.members[known.fact.member] for known in fleet.known() if _is_over(known)}
    members = [each for each in plan.members if each not in over]
    if given.dry:
        screen.note(plan.label, "", f"would be stopped: {fold(members) or 'nothing runs'}")
        return 0
    claims = given.signal is None
    if claims:
        fleet.halt()

    def end(run: Run) -> None:
        if given.signal:
            run.signal(given.signal)
        else:
            run.kill(grace=0.0 if given.kill_now else given.grace)

    def stop(member: str) -> bool | CorraError | None:
        try:
            return fleet.stop_member(member, end, claims=claims)
        except NotFound:
            return False
        except CorraError as error:
            return error

    answers = dict(zip(members, in_parallel(stop, members), strict=True))
    errors = [each for each in answers.values() if isinstance(each, CorraError)]
    ended = [member for member, answer in answers.items() if answer is True]
    never = [member for member, answer in answers.items() if answer is False]
    done = f"{given.signal} sent to" if given.signal else "ended"
    parts = [f"{done} {fold(ended)}"] if ended else []
    parts += [f"never to be started: {fold(never)}"] if never and claims else []
    text = "; ".join(parts) or "nothing ran there"
    if screen.json:
        facts = {"ended": ended, "never_started": never, "unknown": len(errors)}
        screen.event("killed", id=plan.id, by=asked_by(), **facts)
    else:
        screen.note(plan.label, "", text)
    for error in errors:
        screen.error(error.but(fate=NotKilled.fate))
    return max((error.code for error in errors), default=0)


def _is_over(known: Any) -> bool:
    from corra.model.rollout import What

    return known.fact.what in (What.WELL, What.FAILED, What.LOST)
