"""Verbs over a fleet: one program on many hosts. See docs/fleets.md."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from invoke.context import Context

from corra.errors import NOTHING_DONE, STILL_RUNNING, CorraError, Misuse, NotFound, NotKilled, typed
from corra.settings import setting
from corra.terminal.signals import die_of

from . import collectors, inputs, selection
from .flags import (
    AgainFlags,
    AttachFlags,
    FleetFlags,
    FleetViewFlags,
    HostFlags,
    KillFlags,
    LaunchFlags,
    LogsFlags,
    PsFlags,
    RunFlags,
    StatusFlags,
    WaitFlags,
)
from .words import Given, flags_of

if TYPE_CHECKING:
    from corra.fleets.board import Board
    from corra.fleets.fleet import Fleet
    from corra.fleets.view import View
    from corra.model.state import State
    from corra.runs.request import Launch
    from corra.runs.run import Run

# The flags of fleets that stand in the class of one verb only; those of FleetFlags are others.
_OF_FLEETS = frozenset(("plan", "order", "canary", "each", "journal", "only", "redo", "watch_only"))
# The last lines of each host that `attach` begins with on a terminal.
TAIL_ON_A_TERMINAL = 10


def fleets_flag(given: Given) -> str:
    """Return the first flag of the line that only means something to a fleet, or ""."""
    of_any_verb = {flag.key for flag in flags_of(Given)}
    names = _OF_FLEETS | {flag.key for flag in flags_of(FleetFlags)} - of_any_verb
    if isinstance(given, AttachFlags):
        names |= {"yes", "secret"}
    for flag in flags_of(type(given)):
        default = list(flag.default) if flag.many else flag.default
        if flag.key in names and getattr(given, flag.key) != default:
            return flag.typed[0]
    return ""


def is_fleet(given: RunFlags, hosts: Sequence[str]) -> bool:
    """Return whether a command line means a fleet and no single run."""
    return len(hosts) > 1 or bool(fleets_flag(given))


def refuse_for_run(given: Given, run: Run) -> None:
    """Refuse flags of fleets for one run. Raises Misuse, and NotFound where it isn't even that."""
    if flag := fleets_flag(given):
        run.state()
        raise Misuse(f"{flag} is for a fleet, and this is one run", fate="NOT DONE")


def _refuse_contradictions(given: FleetViewFlags) -> None:
    if (given.fold or given.diff) and given.output_dir:
        raise Misuse("--fold moves one output of a group, and --output-dir wants all of them")
    if given.output_dir:
        try:
            os.makedirs(given.output_dir, exist_ok=True)
        except OSError as error:
            raise Misuse(f"--output-dir {given.output_dir}: {error.strerror}") from error


# -- run, again


def roll_out(c: Context, given: RunFlags, hosts: Sequence[str]) -> int:
    """Start a program on all hosts as the flags say, show it, and return the exit code."""
    from corra.fleets.making import new_fleet
    from corra.fleets.plan import members_of

    _refuse_for_one(given)
    _refuse_contradictions(given)
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
    _refuse_contradictions(given)
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
    fleet.take_attempt(plan, answers, inputs.given_secrets(given), _reported(c, given))
    return _launched(given, fleet, show_plan=False)


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
    collectors.named_collector(c, name)  # a wrong name is refused before anything is begun
    return lambda launch: collectors.register(c, name, launch)


def _launched(given: RunFlags | AgainFlags, fleet: Fleet, *, show_plan: bool) -> int:
    if show_plan:
        return _show_plan(given, fleet.plan)
    fleet.prepare_start(stay=not given.detach)
    return _rolled(given, given, fleet, stay=not given.detach, announce=True)


# -- Rolling, and its words


def _view(given: Given, shown: FleetViewFlags | None) -> View:
    from corra.fleets.view import Lines, ToFiles

    prefix = shown.prefix if shown is not None else "host"
    view: View = Lines(given.screen, prefix=prefix, hide=given.hide)
    if shown is not None and shown.output_dir:
        view = ToFiles(view, shown.output_dir)
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
    if folded:
        how = {**how, "shows": False, "folds": True}
    roller = fleet.roller(
        _view(given, shown),
        stay=stay,
        take_over=shown is not None and shown.take_over,
        confirm=(lambda _: True) if yes else confirm if screen.can_ask else None,
        last=screen.last,
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
    if not stay and rolled.way is Way.DONE and not code_of_starts(roller) and not screen.json:
        _say_started(given, fleet)
        return 0
    _say_summary(given, fleet, roller, rolled)
    if folded and shown is not None:
        show_folded(shown, fleet, roller.board, asks=rolled.way is not Way.LEFT)
    if rolled.way is Way.LEFT:
        screen.close()
        die_of(signal.Signals(rolled.signal).name)
    if rolled.way is Way.TIMED_OUT:
        return max(STILL_RUNNING, roller.board.code)
    return roller.board.code if stay else code_of_starts(roller)


def _say_started(given: Given, fleet: Fleet) -> None:
    from corra import render
    from corra.model import ids

    plan, short = fleet.plan, ids.short(fleet.id)
    count = len(plan.members)
    elsewhere = f"corra attach {fleet.way_to(plan.members[0])} {short}"
    given.screen.lines([plan.id])
    given.screen.say(
        plan.label,
        f"{count} host{'s' * (count != 1)}",
        render.STARTED,
        "",
        [f"watch: {typed()} attach {short}      elsewhere: {elsewhere}"],
    )


def code_of_starts(roller: Any) -> int:
    """Return the exit code of a fleet that nobody stays with: a member that runs is well."""
    from corra.model.rollout import What

    codes = [each.code for each in roller.board.members if each.what is not What.STARTED]
    untried = any(each.what is None for each in roller.board.members)
    worst: int = max(codes, default=0)
    return NOTHING_DONE if untried and not worst else worst


def _say_summary(given: Given, fleet: Fleet, roller: Any, rolled: Any) -> None:
    from corra.fleets.summary import summary_of

    found = summary_of(roller.board, rolled, fleet.way_to)
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
    from corra.fleets.finding import find_fleet, journals_here

    if text is None or not (journal or setting(c.config, "journal") or journals_here()):
        return None
    told = journal or setting(c.config, "journal")
    patience = selection.patience(c, given)
    return find_fleet(text, journal=told, patience=patience, **selection.host_reach(c, given))


def on_host(c: Context, given: HostFlags, text: str | None) -> Any:
    """Return the fleet that `text` means on the first of --host that answers. Raises CorraError."""
    from corra.fleets.finding import find_fleet

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
    who gives a flag of fleets means a fleet.
    """
    found = named(c, given, text)
    if found is None and fleets_flag(given):
        with contextlib.suppress(NotFound):
            found = on_host(c, given, text)
    if found is None:
        several = len(selection.hosts_in(c, given, given.host)) > 1
        try:
            return one()
        except (NotFound, Misuse) as error:
            # An id of a run belongs to one host. A fleet is learned from the first that answers.
            if not given.host or text is None or (isinstance(error, Misuse) and not several):
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
    _refuse_contradictions(given)
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
    how: dict[str, Any] = {"starts": starts, "tail": tail, "timeout_s": given.timeout}
    return _rolled(given, given, fleet, yes=given.yes, **how)


def _say_begun(given: Given, fleet: Fleet) -> None:
    from corra import render
    from corra.fleets.plan import plan_words
    from corra.model.words import now

    plan = fleet.plan
    at = render.past_moment(plan.at, now())
    given.screen.note(plan.label, "", f"{plan_words(plan)}; begun {at} by {plan.by}")


def wait(given: WaitFlags, fleet: Fleet) -> int:
    """Wait until all that was started is over, and return the fleet's exit code."""
    if given.any:
        raise Misuse("--any is for several runs, and this is a fleet", fate="NOT DONE")
    return _rolled(given, None, fleet, starts=False, shows=False, timeout_s=given.timeout)


def logs(given: LogsFlags, fleet: Fleet) -> int:
    """Show what the members have written; with --follow until they are over."""
    from .folding import folds

    answers = fleet.ask()
    board = fleet.board(answers)
    if folds(given):
        return _folded_logs(given, fleet, board)
    for flag, value in (("bytes", given.bytes), ("grep", given.grep), ("until", given.until)):
        if value is not None:
            raise Misuse(f"--{flag} is for one run", fate="NOT DONE")
    if given.late:
        raise Misuse("--late is for one run", fate="NOT DONE")
    view = _view(given, None)
    members = {each.name: each for each in board.members}
    errors: list[CorraError] = []
    view.begins(board)
    for item in fleet.logs(
        tail=given.tail,
        since_ns=given.since,
        streams=None if given.stream in (None, "both") else [given.stream, "output"],
        live=given.follow,
        answers=answers,
    ):
        if isinstance(item, CorraError):
            errors.append(item)
        else:
            view.output(members[item.member], item.stream, item.data, item.offset)
    view.ends()
    for error in errors:
        given.screen.error(error)
    return max((error.code for error in errors), default=0)


def _folded_logs(given: LogsFlags, fleet: Fleet, board: Board) -> int:
    from .folding import show_folded

    if given.follow or given.tail is not None or given.since is not None:
        raise Misuse("--fold is of whole outputs: it has no --follow, --tail and --since")
    show_folded(given, fleet, board)
    unreached = [each for each in board.members if each.state is None and each.error is not None]
    return max((each.code for each in unreached), default=0)


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
    if given.dry:
        members = fleet.open_members()
        screen.note(plan.label, "", f"would be stopped: {fold(members) or 'nothing runs'}")
        return 0
    killed = (
        fleet.signal(given.signal)
        if given.signal
        else fleet.kill(grace=0.0 if given.kill_now else given.grace)
    )
    done = f"{given.signal} sent to" if given.signal else "ended"
    parts = [f"{done} {fold(killed.ended)}"] if killed.ended else []
    never = killed.never_started
    parts += [f"never to be started: {fold(never)}"] if never else []
    if screen.json:
        facts = {
            "ended": list(killed.ended),
            "never_started": list(never),
            "unknown": len(killed.unknown),
        }
        screen.event("killed", id=plan.id, by=asked_by(), **facts)
    else:
        screen.note(plan.label, "", "; ".join(parts) or "nothing ran there")
    for error in killed.unknown.values():
        screen.error(error.but(fate=NotKilled.fate))
    return max((error.code for error in killed.unknown.values()), default=0)
