"""The verbs: `inv run`, and the same as `corra run`.

Each verb parses, makes one call, renders, and returns an exit code. In your own tasks.py:
`from corra.tasks import attach, kill, ps, run`, or `ns.add_collection(corra.tasks.ns, "corra")`.
"""

from __future__ import annotations

import contextlib
import shlex
import signal as signals
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from invoke.collection import Collection
from invoke.context import Context

from corra.cli import collectors, fleets, inputs, selection
from corra.cli.flags import (
    TAIL_BY_TERMINAL,
    AgainFlags,
    AttachFlags,
    BookFlags,
    DiffFlags,
    DoctorFlags,
    ExportFlags,
    GcFlags,
    KillFlags,
    LaunchFlags,
    LogsFlags,
    PsFlags,
    RunFlags,
    SendFlags,
    ShowFlags,
    StatusFlags,
    WaitFlags,
)
from corra.cli.verb import verb
from corra.cli.words import Given, refuse_without_id

from .errors import NOTHING_DONE, STILL_RUNNING, CorraError, Misuse, NotFound, typed
from .settings import setting

if TYPE_CHECKING:
    from corra.cli import listing
    from corra.model.state import State
    from corra.runs.disk import Freed
    from corra.runs.follow import Follow
    from corra.runs.request import Launch
    from corra.runs.run import Run
    from corra.terminal.watch import Watch

T = TypeVar("T")

TAIL_ON_A_TERMINAL = 200
MERGED = "output"
# For looking, a host that is down must not keep the others' answers back.
LOOK_TIMEOUT_S = 5.0

# -- The verbs


@verb(RunFlags, command=True, fate="NOT STARTED", begin=selection.begin_connecting)
def run(c: Context, given: RunFlags) -> int:
    """Start a program that outlives ssh, and show it

        inv run --host db1 -- uptime
        inv run -d --name nightly --host db1 -- ./migrate --all
        inv run --host web[1-50] --batch 10% -- systemctl restart app

    Ctrl-C leaves the program running. corra exits as it does: its own code, 128+N by signal N, 124
    by --timeout, 126 or 127 when it can't be executed. 125: nothing was started. 123: it may have
    started (repeat it with the same --id), or how it ended is unknown. 122: it still runs, and
    corra stopped watching.
    """
    from corra.remote.targets import agent_for
    from corra.runs import request

    hosts = selection.told_hosts(c, given, fate="NOT STARTED")
    if fleets.is_fleet(given, hosts):
        return fleets.roll_out(c, given, hosts)
    target = selection.one_host(c, given, fate="NOT STARTED")
    stdin, file = inputs.given_stdin(given)
    reach = selection.host_reach(c, given)
    agent = given.agent or agent_for(target, **reach)

    with contextlib.ExitStack() as opened:
        opened.enter_context(file)
        options = inputs.given_options(c, given, stdin)
        launch = request.launch(agent, given.argv, **options, **reach)
        opened.callback(launch.close)
        unread = given.stdin is None and stdin is None
        said = unread and _say_unread_pipe(given, launch.run)
        code = _launched(c, given, launch, opened, target)
        if unread and not said:
            _say_unread_pipe(given, launch.run)  # what came while the program ran
        return code


@verb(AgainFlags, ids="ID", fate="NOT STARTED")
def again(c: Context, given: AgainFlags) -> int:
    """Start a run's program once more, as a new run on its host

        inv again k7m2qx
        inv again --secret DB_PASSWORD k7m2qx

    The host's record has its command, directory, given variables, stdin, limits and name. The
    login's environment is that of now, and secrets must be given again. A run that still runs isn't
    started again. corra exits as run does.
    """
    refuse_without_id(given)
    if len(given.ids) > 1:
        raise Misuse(f"one id at a time: {' '.join(given.ids)}", fate="NOT STARTED")
    text = given.ids[0]
    return fleets.either(
        c, given, text, lambda: _again_one(c, given), lambda fleet: fleets.again(c, given, fleet)
    )


def _again_one(c: Context, given: AgainFlags) -> int:
    from corra.runs import starting

    found = selection.find_one_run(c, given)
    fleets.refuse_for_run(given, found)
    with contextlib.ExitStack() as opened:
        launch, reported = starting.again(found, id=given.id, secrets=inputs.given_secrets(given))
        opened.callback(launch.close)
        if reported and not given.collector:
            given.screen.note(
                found.label,
                str(found.host),
                f"reported to {reported}, the new run won't: add --collector NAME",
            )
        given.argv = list(launch.request.program.argv)
        return _launched(c, given, launch, opened, str(found.host))


@verb(AttachFlags, ids="[ID]")
def attach(c: Context, given: AttachFlags) -> int:
    """Show a run's output and go on live, from anywhere

        inv attach nightly
        inv attach --host db1 k7m2qx        from a machine that never saw the run

    ID is an id, the beginning of its tail, or a name; without it, the newest run of mine. Ctrl-C
    leaves the program running. corra exits as run does.
    """
    if given.collector or len(given.ids) != 1:
        return _attach_one(c, given)
    text = given.ids[0]
    return fleets.either(
        c, given, text, lambda: _attach_one(c, given), lambda fleet: fleets.attach(given, fleet)
    )


def _attach_one(c: Context, given: AttachFlags) -> int:
    from corra.terminal.watch import Watch

    tail = given.tail
    if tail == TAIL_BY_TERMINAL:
        tail = TAIL_ON_A_TERMINAL if given.screen.out_is_terminal else None
    if given.collector and given.interactive:
        raise Misuse(
            "-i and --collector exclude each other: a collector only listens", fate="NOT DONE"
        )
    if given.collector and not given.callback_through_ssh:
        return collectors.attach_by_collector(c, given, given.collector, tail)
    found = selection.find_one_run(c, given, limit_s=given.timeout)
    fleets.refuse_for_run(given, found)
    keyboard = inputs.given_keyboard(given) if given.interactive else None
    if keyboard is not None and tail is not None and given.tail == TAIL_BY_TERMINAL:
        tail = given.screen.height  # a screenful: on a terminal it is drawn over
    feed = keyboard.feed if keyboard is not None else None
    follow = _follow(
        given,
        found,
        tail=tail,
        feed=feed,
        patience=selection.patience(c, given, timeout_s=given.timeout),
    )
    relay = frozenset({signals.SIGINT, signals.SIGTERM}) if given.sig_proxy else frozenset[int]()
    how: dict[str, Any] = {
        "relay": relay,
        "hide": given.hide,
        "stamps": given.timestamps,
        "tail": tail,
        "keyboard": keyboard,
    }
    watch = Watch(follow, found, given.screen, **how)
    with collectors.led_through_ssh(c, given, found):
        state = watch.stay()
    return STILL_RUNNING if state is None else watch.outcome(state)


@verb(SendFlags, ids="ID [TEXT]", text=True, fate="NOT SENT")
def send(c: Context, given: SendFlags) -> int:
    """Send TEXT or stdin to a program started with -i or --pty

        inv send --line k7m2qx yes
        inv send --eof k7m2qx < more.sql

    Each byte arrives once, whatever the network does. Exits 0 when the host has all of it, which
    the program may read later; 125 when the program has ended or closed its stdin.
    """
    feed, source = inputs.given_to_send(given)
    found = selection.find_run(c, given, given.ids[0], limit_s=given.timeout)
    if given.dry:
        given.screen.note(
            found.label,
            str(found.host),
            "would be sent " + ("what is piped in here" if source else repr(given.ids[1:])),
        )
        return 0
    if source:
        source.start()
    found.pass_on(
        feed,
        selection.patience(c, given, timeout_s=given.timeout),
        watch=partial(_said_of_link, given, found),
    )
    if given.json:
        given.screen.event("sent", host=str(found.host), prog_id=found.id, bytes=feed.taken)
    return 0


@verb(LogsFlags, ids="[ID]")
def logs(c: Context, given: LogsFlags) -> int:
    """Show what a run has written

        inv logs -f nightly
        inv logs -g ERROR --since 10m nightly
        inv logs --bytes 0:4K nightly

    Without ID, the newest run of mine. Exits 0 when the output could be shown, whatever became of
    the program.
    """
    if len(given.ids) != 1:
        return _logs_of_one(c, given)
    text = given.ids[0]
    return fleets.either(
        c, given, text, lambda: _logs_of_one(c, given), lambda fleet: fleets.logs(given, fleet)
    )


def _logs_of_one(c: Context, given: LogsFlags) -> int:
    from corra.terminal.filters import Range, Sieve
    from corra.terminal.watch import Watch

    # A time read off our own screen has milliseconds, and means all of that one.
    sieve = Sieve(given.grep, given.since, None if given.until is None else given.until + 999_999)
    if given.bytes is not None and (given.tail is not None or not sieve.idle):
        raise Misuse(
            "--bytes and --tail, --grep, --since or --until exclude each other", fate="NOT DONE"
        )
    found = selection.find_one_run(c, given)
    fleets.refuse_for_run(given, found)
    timed = given.since is not None or given.until is not None
    how: dict[str, Any] = {
        "live": given.follow,
        "late": given.late,
        "times": timed,
        "patience": selection.patience(c, given),
    }
    if given.bytes is not None:
        begin, end = given.bytes
        stream = "stderr" if given.stream == "stderr" else "stdout"
        follow = _follow(
            given, found, streams=[stream], cursor=dict.fromkeys((stream, MERGED), begin), **how
        )
        sifted: Sieve | Range | None = Range(end)
    else:
        follow = _follow(given, found, tail=given.tail, since_ns=given.since, **how)
        sifted = None if sieve.idle else sieve
    watch = Watch(
        follow, found, given.screen, hide=given.hide, stamps=given.timestamps, sieve=sifted
    )
    watch.stay(live=given.follow, fate=False)
    watch.say_nothing_shown(sifted=sifted is not None or timed or given.stream is not None)
    return 0


@verb(ExportFlags, ids="[ID]", fate="NOT EXPORTED")
def export(c: Context, given: ExportFlags) -> int:
    """Write a run's output into a file for others

        inv export nightly
        inv export --format html -o nightly.html k7m2qx
        inv export -o - k7m2qx | asciinema play -

    A recording for asciinema, an HTML page, or a tar of the State and the streams. Passwords,
    tokens and keys are cut out before anything is written, and counted. The file is readable by
    its owner alone.
    """
    from corra.cli import exporting

    form, rules = exporting.form_of(given), exporting.rules_of(given)
    found = selection.find_one_run(c, given)
    return exporting.Export(given, found, form=form, rules=rules).perform()


@verb(DiffFlags, ids="A B")
def diff(c: Context, given: DiffFlags) -> int:
    """Show what differs between the outputs of two runs

        inv diff nightly k7m2qx
        inv diff --ignore '[0-9:.]+ ?s' k7m2qx w9c4tr

    A unified diff, of stdout and then of stderr. Exits 0 when they are alike, 1 when they differ.
    """
    from corra.cli import exporting

    if len(given.ids) != 2:
        raise Misuse(f"say two runs:  {typed()} diff A B", fate="NOT DONE")
    one, other = (selection.find_run(c, given, text) for text in given.ids)
    return exporting.show_diff(given, (one, other))


@verb(KillFlags, ids="ID..", fate="NOT KILLED")
def kill(c: Context, given: KillFlags) -> int:
    """Stop runs: TERM, and after --grace KILL to the whole tree

        inv kill nightly
        inv kill -9 k7m2qx                  at once, without TERM
        inv kill -s HUP nightly             just this signal, and no KILL

    Exits 0 when nothing is left, also when the run had ended already; 1 when something outlives
    KILL; 125 when nothing could be done.
    """
    _refuse_contradictions(given)
    if len(given.ids) == 1:
        text = given.ids[0]
        return fleets.either(
            c, given, text, lambda: _kill_runs(c, given), lambda fleet: fleets.kill(given, fleet)
        )
    return _kill_runs(c, given)


def _kill_runs(c: Context, given: KillFlags) -> int:
    from corra.cli.at_once import at_once
    from corra.terminal.stopping import Orders, stop

    runs = selection.to_kill(c, given)
    selection.ask_first(given, runs)
    if given.dry:
        for found, _ in runs:
            given.screen.note(
                found.label,
                str(found.host),
                f"would be sent {_to_be_sent(given, found)}",
            )
        return 0

    orders = Orders()

    def end(each: tuple[Run, State | None]) -> int:
        found, before = each
        with _said(given) as code:
            if given.signal:
                after = found.signal(given.signal)
                over = before.ended if before else after.ended and not after.signals_sent
                given.screen.note(
                    after.label,
                    str(found.host),
                    "had ended already" if over else f"{given.signal} sent",
                )
            else:
                stop(
                    given.screen,
                    found,
                    grace_s=0.0 if given.kill_now else given.grace,
                    wait=not given.no_wait,
                    orders=orders,
                )
            if given.json:
                given.screen.event("state", **_at(found.known or found.state(), found).to_json())
        return code[0]

    left = partial(orders.say_left, given.screen)
    return max(
        at_once(given.screen, end, runs, left, named=lambda each: str(each[0].host)), default=0
    )


@verb(PsFlags, ids="[FLEET]")
def ps(c: Context, given: PsFlags) -> int:
    """List runs: what runs, then what went wrong lately

        inv ps
        inv ps --host db1,db2 -a
        inv ps --state FAILED --since 2h

    Without --host it asks the hosts of this machine's history. Exits 125 when a host didn't answer;
    the runs of the others are shown all the same. With the id of a fleet, its hosts one by one.
    """
    from corra.cli import listing
    from corra.model.words import now

    from . import render

    if given.connect_timeout is None:
        given.connect_timeout = setting(c.config, "connect_timeout") or LOOK_TIMEOUT_S
    if given.ids:
        return fleets.ps(c, given)
    screen = given.screen
    quietly = bool(given.quiet or given.json or given.format)
    folded = screen.out_is_terminal and not quietly
    listed = (
        listing.CollectorsRuns(c, given)
        if given.collector
        else listing.HostsRuns(c, given, folded=folded)
    )
    width = screen.width if screen.out_is_terminal and not given.no_trunc else None
    table, count = render.Table(width), 0
    for states in listed.chunks():
        moment = now()
        rows = [render.row(state, moment) for state in states]
        if given.json:
            for state in states:
                screen.event("state", **state.to_json())
        elif given.quiet:
            screen.lines([state.prog_id for state in states])
        elif given.format:
            screen.lines(_formatted(given.format, states, rows))
        elif rows:
            screen.lines(table.lines(rows))
        count += len(states)
    for error in listed.errors:
        screen.error(error)
    if screen.err_is_terminal and not quietly and (said := _left_out(listed, given, count)):
        screen.note("", "", said)
    return max((error.code for error in listed.errors), default=0)


def _formatted(layout: str, states: Sequence[State], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of --format. Raises Misuse."""
    from . import render

    try:
        return [
            render.formatted(layout, state, row) for state, row in zip(states, rows, strict=True)
        ]
    except KeyError as unknown:
        known = ", ".join(column.lower() for column in render.RUNS_HEAD)
        hint = [f"there are {known}, and --json's keys"]
        raise Misuse(
            f"--format has no {{{unknown.args[0]}}}", fate="NOT DONE", hint=hint
        ) from unknown


@verb(StatusFlags, ids="[ID..]")
def status(c: Context, given: StatusFlags) -> int:
    """Show all that is known of runs

        inv status nightly
        inv status --tree nightly           its processes, and what each uses

    Without ID, the newest run of mine. Exits 0 when the host could tell, whatever became of the
    program; see --exit-code.
    """
    if len(given.ids) == 1:
        text = given.ids[0]
        return fleets.either(
            c, given, text, lambda: _status_of(c, given), lambda fleet: fleets.status(given, fleet)
        )
    return _status_of(c, given)


def _status_of(c: Context, given: StatusFlags) -> int:
    from corra.cli.at_once import at_once
    from corra.model.state import exit_code
    from corra.model.words import now

    from . import render

    width = given.screen.width if given.screen.out_is_terminal else None

    def look(text: str | None) -> Callable[[], int]:
        """Ask for one run; return what shows the answer, so that the answers come in order."""
        try:
            found = selection.find_run(c, given, text)
            state = found.state()
            looks = given.tree or (state.state == "running" and not given.json)
            return partial(show, found, state, found.processes() if looks else None)
        except CorraError as error:
            if isinstance(error, NotFound) and len(given.ids) == 1:
                raise  # it may name a fleet
            return partial(fail, error)

    def show(found: Run, state: State, looked: dict[str, Any] | None) -> int:
        if given.json:
            more = {"processes": looked["processes"]} if looked else {}
            given.screen.event("state", **_at(state, found).to_json(), **more)
        else:
            given.screen.lines(render.status(_at(state, found), now(), looked, width))
            if given.tree and looked:
                given.screen.lines(render.tree(looked["processes"], width))
        return exit_code(state) if given.exit_code else 0

    def fail(error: CorraError) -> int:
        given.screen.error(error)
        return error.code

    answers = at_once(
        given.screen, look, given.ids or [None], named=lambda text: text or "the newest run"
    )
    return max(answer() for answer in answers)


@verb(WaitFlags, ids="ID..")
def wait(c: Context, given: WaitFlags) -> int:
    """Wait until runs have ended

        inv wait nightly
        inv wait --timeout 1h --any nightly k7m2qx

    Exits as the program did; of several runs with the largest code, with --any as the first to end,
    whose id is then on stdout. 122: --timeout was over.
    """
    refuse_without_id(given)
    if len(given.ids) == 1:
        text = given.ids[0]
        return fleets.either(
            c, given, text, lambda: _wait_for(c, given), lambda fleet: fleets.wait(given, fleet)
        )
    return _wait_for(c, given)


def _wait_for(c: Context, given: WaitFlags) -> int:
    import threading

    from corra.cli.at_once import as_they_end
    from corra.model.state import exit_code
    from corra.terminal.watch import Watch

    left = len(given.ids)
    follows: list[Follow] = []
    over = threading.Event()
    open_: list[Watch] = []

    def stopped_waiting() -> None:
        if len(open_) == 1:
            open_[0].say_left("you stopped waiting")
        elif open_:
            text = f"you stopped waiting; {len(open_)} of {len(given.ids)} runs go on"
            given.screen.note("", "", text)

    def end(text: str) -> tuple[int, str]:
        ended, watch = "", None
        with _said(given) as code:
            found = selection.find_run(c, given, text, limit_s=given.timeout)
            follow = found.follow(
                streams=[], patience=selection.patience(c, given, timeout_s=given.timeout)
            )
            follows.append(follow)
            watch = Watch(follow, found, given.screen, shows=False)
            open_.append(watch)
            if len(given.ids) == 1:
                given.screen.live(watch.live_line)
            for event in follow:
                if over.is_set():
                    break
                if not given.json:
                    watch.show(event)
            if len(given.ids) == 1:
                given.screen.live(None)
            state = follow.state
            if state is not None and not over.is_set():
                ended = state.prog_id
                if given.json:
                    given.screen.event("state", **_at(state, found).to_json())
                    code[0] = exit_code(state)
                else:
                    code[0] = watch.outcome(state)
        if watch is not None:
            open_.remove(watch)
        return code[0], ended

    if left > 1:
        given.screen.live(lambda _: f"waiting for {left} of {len(given.ids)} runs")
    worst = 0
    for _, (code, ended) in as_they_end(given.screen, end, given.ids, stopped_waiting):
        left -= 1
        worst = max(worst, code)
        if given.any and ended:
            over.set()
            # What is left is watched no more, and has nothing to say.
            for follow in follows:
                follow.close()
            if not given.json:
                given.screen.lines([ended])
            return code
    return worst


@verb(GcFlags, ids="[ID..]")
def gc(c: Context, given: GcFlags) -> int:
    """Free the disk that ended runs' output takes on hosts

        inv gc -R --host db1                what would go
        inv gc --host db1

    What is unfinished, watched, or not yet delivered stays. The record of a run outlives its
    output, so that status still tells how it ended. Without --host it asks the hosts of this
    machine's history.
    """
    from corra.cli.at_once import at_once
    from corra.runs import disk

    if given.ids and (given.older is not None or given.max_size is not None):
        raise Misuse("an id and --older or --max-size exclude each other", fate="NOT DONE")
    if not (given.yes or given.dry or given.screen.can_ask):
        raise Misuse("nobody here to say yes: add -y, or -R to see what would go", fate="NOT DONE")
    wanted: list[tuple[str, str, Callable[..., Freed]]]
    if given.ids:
        wanted = [
            (found.label, str(found.host), found.free) for found in selection.ended_runs(c, given)
        ]
    else:
        known = selection.places(c, given, "gc", 90 * 86400.0)
        wanted = [
            (
                "",
                host,
                partial(disk.free_disk, host, older=given.older, max_size=given.max_size, **how),
            )
            for host, how in known
        ]

    def clean(each: tuple[str, str, Callable[..., Freed]]) -> int:
        label, host, free = each
        with _said(given) as code:
            freed = free(dry=True)
            if not given.dry and (freed.emptied or freed.forgotten):
                if not given.yes and not given.screen.ask(
                    label, host, _freed(freed, "would free") + ": free it? [y/N] "
                ):
                    return 0
                freed = free()
            if given.json:
                given.screen.event("freed", **freed._asdict(), dry=given.dry)
            else:
                given.screen.note(
                    label, host, _freed(freed, "would free" if given.dry else "freed")
                )
        return code[0]

    # One question at a time.
    if given.yes or given.dry:
        return max(at_once(given.screen, clean, wanted, named=lambda each: each[1]), default=0)
    return max(clean(each) for each in wanted)


@verb(DoctorFlags)
def doctor(c: Context, given: DoctorFlags) -> int:
    """Check whether hosts have all that corra needs

        inv doctor --host db1

    A line for each thing and what to do about it. Nothing is written on the host, unless --place
    says so. Without --host it asks the hosts of this machine's history. Exits 1 when there is a
    problem.
    """
    from corra.cli.at_once import at_once
    from corra.remote import checkup

    from . import render

    known = selection.places(c, given, "doctor", 90 * 86400.0)

    def look(each: tuple[str, dict[str, Any]]) -> int:
        host, how = each
        with _said(given) as code:
            checks = checkup.examine_host(host, place=given.place, **how)
            good = checkup.all_passed(checks)
            if given.json:
                given.screen.event(
                    "doctor", host=host, ready=good, checks=[check.to_json() for check in checks]
                )
            else:
                given.screen.lines(
                    [
                        render.visible(line)
                        for line in checkup.check_lines(host, checks, bad_only=given.quiet)
                    ]
                )
            code[0] = 0 if good else 1
        return code[0]

    if given.dry:
        given.screen.note("", ",".join(host for host, _ in known), "would be looked at")
        return 0
    return max(at_once(given.screen, look, known, named=lambda each: each[0]))


# -- What the verbs share


def _freed(freed: Freed, begin: str) -> str:
    from corra.model import units

    if not (freed.emptied or freed.forgotten):
        return "nothing to free"
    parts = (
        [f"the output of {len(freed.emptied)} run{'s' * (len(freed.emptied) != 1)}"]
        if freed.emptied
        else []
    )
    parts += (
        [f"{len(freed.forgotten)} old record{'s' * (len(freed.forgotten) != 1)}"]
        if freed.forgotten
        else []
    )
    return f"{begin} {units.decimal_size(freed.bytes)}: {' and '.join(parts)}"


def _said_of_link(given: Given, found: Run, event: Any) -> None:
    from corra.model.units import duration
    from corra.runs.events import LinkDown, LinkUp

    if isinstance(event, LinkDown) and event.attempt == 1:
        given.screen.note("", str(found.host), "link lost, nothing is sent twice; trying on")
    elif isinstance(event, LinkUp):
        given.screen.note("", str(found.host), f"link back after {duration(event.down_s)}")


def _follow(
    given: ShowFlags,
    found: Run,
    *,
    times: bool = False,
    streams: Sequence[str] | None = None,
    **how: Any,
) -> Follow:
    wanted = streams or (None if given.stream in (None, "both") else [given.stream])
    # A merged run has one stream, which is shown whole.
    return found.follow(
        streams=None if wanted is None else [*wanted, MERGED],
        times=times or given.timestamps,
        **how,
    )


@contextlib.contextmanager
def _said(given: Given) -> Iterator[list[int]]:
    """Say a CorraError and leave its code in the list, so that the other runs go on.

    That the only id names no run is raised: it may name a fleet.
    """
    code = [0]
    try:
        yield code
    except CorraError as error:
        if isinstance(error, NotFound) and len(given.ids) == 1:
            raise
        given.screen.error(error)
        code[0] = error.code


def _at(state: State, found: Run) -> State:
    """Return `state` with its host called as it is typed."""
    from dataclasses import replace

    return replace(state, host=str(found.host))


def _launched(
    c: Context, given: LaunchFlags, launch: Launch, opened: contextlib.ExitStack, target: str
) -> int:
    """Start it, show it unless --detach, and return the exit code."""
    from corra.model import ids
    from corra.runs import finding
    from corra.terminal.watch import Watch

    if given.echo or given.dry:
        given.screen.note(
            "", target, ("would start: " if given.dry else "") + shlex.join(given.argv)
        )
    if given.dry:
        return 0
    if namesakes := finding.open_namesakes(launch.run):
        running = ", ".join(ids.short(each.prog_id) for each in namesakes)
        text = f"{launch.run.name} runs there already: {running};  kill and attach need an id"
        given.screen.note("", str(launch.run.host), text)
    if given.collector:
        launch = collectors.register(c, given.collector, launch)
    keyboard = (
        inputs.given_keyboard(given)
        if launch.request.program.takes_more and given.interactive and not given.detach
        else None
    )
    feed = keyboard.feed if keyboard is not None else None
    follow = launch.follow(selection.patience(c, given), stay=not given.detach, feed=feed)
    how: dict[str, Any] = {
        "relay": frozenset({signals.SIGTERM}),
        "hide": given.hide,
        "announce": not given.detach,
        "keyboard": keyboard,
        "by_id": bool(namesakes),
    }
    watch = Watch(follow, launch.run, given.screen, **how)
    opened.enter_context(collectors.led_through_ssh(c, given, launch.run))
    state = watch.stay()
    if given.detach and state is not None and state.state != "not_started":
        return _detached(given, watch, state, launch.run)
    return STILL_RUNNING if state is None else watch.outcome(state)


def _say_unread_pipe(given: Given, run: Run) -> bool:
    """Say that nothing reads what waits in our stdin; return whether anything does."""
    if not inputs.unread_pipe():
        return False
    text = "nothing reads what is piped in here: --stdin - sends it, --stdin none is silent"
    given.screen.note("", str(run.host), text)
    return True


def _detached(given: LaunchFlags, watch: Watch, state: State, started: Run) -> int:
    from corra.model import ids
    from corra.model.words import side_by_side
    from corra.terminal.screen import Gone

    from . import render

    if given.json:
        return 0  # the start event has said it
    try:
        given.screen.lines([state.prog_id])
    except Gone as gone:
        why = f"{state.prog_id}, but {gone.why('the id')}"
        given.screen.say_unread(watch.label, str(started.host), render.STARTED, why)
        gone.said = True
        raise
    short = ids.short(state.prog_id)
    hint = [f"watch: {typed()} attach {watch.short}"]
    fate, why = render.STARTED, watch.placed
    elsewhere = f"elsewhere: corra attach {started.reached} {short}"
    if keeper := (started.via or "").partition("@")[2]:
        fate, why = f"{render.STARTED}, kept by {keeper}", ""
        hint.append(elsewhere)
    elif state.link:
        # A warning, so it is said to logs and pipes as well.
        fate, why = f"{render.STARTED}, kept by THIS machine", "don't let it sleep"
        hint.append("safer on a machine that stays up: --via chaperone@HOST")
    elif not started.host.is_local:
        hint.append(elsewhere)
    given.screen.say(watch.label, str(started.host), fate, why, side_by_side(hint))
    return 0


def _to_be_sent(given: KillFlags, found: Run) -> str:
    from corra.model.units import chosen_time

    if given.signal or given.kill_now:
        return given.signal or "KILL"
    signal, grace = (found.known.stop_signal, found.known.grace) if found.known else ("TERM", 10.0)
    grace = grace if given.grace is None else given.grace
    return f"{signal}; KILL in {chosen_time(grace)} if still there"


def _refuse_contradictions(given: KillFlags) -> None:
    given_flags = [
        name
        for name, value in (("-s", given.signal), ("-9", given.kill_now), ("--grace", given.grace))
        if value
    ]
    if len(given_flags) > 1:
        raise Misuse(f"{given_flags[0]} and {given_flags[1]} exclude each other", fate="NOT KILLED")
    if given.all and given.ids:
        raise Misuse("-a and an id exclude each other", fate="NOT KILLED")


def _left_out(
    listed: listing.HostsRuns | listing.CollectorsRuns, given: PsFlags, count: int
) -> str:
    """Return what `ps` has left out, and how to see it."""
    from corra.model.units import chosen_time

    if listed.more:
        return f"and {listed.more:,} more: say --since or --grep, or  | less"
    well, before = listed.left_out()
    since = selection.since(given)
    if well:
        last = "24 h" if since == selection.LATELY_S else chosen_time(since or 0.0)
        return f"{well:,} more ended well in the last {last}: add -a"
    if before > 0:
        how = "add -a" if given.since is None else "say a longer --since"
        return f"{before:,} more ended before that: {how}"
    return "" if count or listed.errors else "no runs there"


@verb(Given, ids="[forget WORD..]")
def history(c: Context, given: Given) -> int:
    """Show the hosts remembered here, or forget runs

        inv history
        inv history forget nightly

    WORD is an id, a name or a host. Forgotten runs go on, and their hosts keep them: ps --host
    lists them still.
    """
    import time

    from corra.model.units import duration
    from corra.runs import history as remembered

    from . import render

    if given.ids and given.ids[0] != "forget":
        raise Misuse(f"history has no {given.ids[0]};  it has forget", fate="NOT DONE")
    if given.ids:
        if not given.ids[1:]:
            raise Misuse("say which: an id, a name or a host", fate="NOT DONE")
        found = {text: remembered.entries_of(text) for text in given.ids[1:]}
        for text, entries in found.items():
            if not entries:
                raise NotFound("", label=text, fate="NOT FOUND in this machine's history")
        for text, entries in found.items():
            if not given.dry:
                remembered.forget_entries(entries)
            count = f"{len(entries)} run{'s' * (len(entries) != 1)}"
            given.screen.note(text, "", f"{'would forget' if given.dry else 'forgot'} {count}")
        return 0
    rows: dict[tuple[str, str], list[remembered.Entry]] = {}
    for entry in remembered.recent_entries(1_000_000):
        rows.setdefault((entry.host, entry.as_user or "-"), []).append(entry)
    lines = []
    for (host, user), entries in rows.items():
        seen = time.time() - max(entry.seen for entry in entries)
        running = sum(entry.open for entry in entries)
        lines.append((host, user, str(len(entries)), str(running), f"{duration(seen)} ago"))
        facts = {"runs": len(entries), "running": running, "seen_s": round(seen, 3)}
        if given.json:
            given.screen.event("history", host=host, as_user=user, **facts)
    if lines and not given.json:
        head = ("HOST", "AS", "RUNS", "RUNNING", "SEEN")
        given.screen.lines(
            render.table([[render.visible(each) for each in row] for row in lines], head=head)
        )
    elif not lines:
        given.screen.note("", "", "no run was started from here yet")
    return 0


@verb(BookFlags, ids="[NAME [KEY]]")
def book(c: Context, given: BookFlags) -> int:
    """List runbooks, show one, or decide about a step

        inv book
        inv book upgrade OPS-790
        inv book upgrade OPS-790 --skip analyze

    --redo and --skip start nothing: the runbook's own command goes on with what they say. --json
    and --markdown print the audit trail.
    """
    from corra.cli import journals
    from corra.model.words import now
    from corra.runbooks import audit

    if len(given.ids) > 2:
        raise Misuse(f"one runbook at a time: {' '.join(given.ids)}", fate="NOT DONE")
    if (given.redo or given.skip) and len(given.ids) != 2:
        raise Misuse("say which: --redo and --skip need NAME and KEY", fate="NOT DONE")
    if len(given.ids) < 2:
        return _list_books(c, given)
    name, key = given.ids
    found = journals.one_journal(c, given, name, key)
    for what, steps in (("redo", given.redo), ("skip", given.skip)):
        for step in steps:
            if given.dry:
                given.screen.note(f"{name} {key}", "", f"would {what} {step}")
            else:
                given.screen.note(f"{name} {key}", "", journals.record_decision(found, what, step))
    if given.redo or given.skip:
        given.screen.note(f"{name} {key}", "", "go on: the runbook's own command")
        return 0
    where = str(found.where.host)
    if given.json:
        given.screen.event("book", **audit.as_json(name, key, found.book, where))
    elif given.markdown:
        given.screen.lines(audit.markdown(name, key, found.book))
    else:
        width = given.screen.width if given.screen.out_is_terminal else None
        given.screen.lines(audit.screen(name, key, found.book, now(), str(found), width))
    return 0


def _list_books(c: Context, given: BookFlags) -> int:
    from corra.cli import journals
    from corra.model.words import now
    from corra.runbooks import audit

    from . import render

    rows: list[tuple[str, ...]] = []
    code = 0
    for found, name, key, error in journals.all_journals(
        c, given, name=given.ids[0] if given.ids else None
    ):
        if error is not None or found is None:
            code = NOTHING_DONE
            rows.append(
                (
                    render.visible(name),
                    render.visible(key),
                    "?",
                    "-",
                    "-",
                    render.visible(error.why if error else "-"),
                )
            )
            continue
        begun, where = found.book.begun, str(found.where.host)
        if given.json:
            given.screen.event("book", **audit.as_json(name, key, found.book, where))
        cells = (
            name,
            key,
            audit.book_state(found.book),
            render.past_moment(begun.at if begun else None, now()),
            begun.by if begun else "-",
        )
        rows.append(
            tuple(render.visible(cell) for cell in (*cells, "here" if where == "local" else where))
        )
    if rows and not given.json:
        width = given.screen.width if given.screen.out_is_terminal else None
        given.screen.lines(render.table(rows, width, audit.BOOKS_HEAD))
    elif not rows:
        given.screen.note("", "", "no runbooks" + (f" called {given.ids[0]}" if given.ids else ""))
    return code


ns = Collection(
    run, again, attach, logs, send, kill, ps, status, wait, export, diff, gc, doctor, history, book
)

__all__ = [
    "again",
    "attach",
    "book",
    "diff",
    "doctor",
    "export",
    "gc",
    "history",
    "kill",
    "logs",
    "ns",
    "ps",
    "run",
    "send",
    "status",
    "wait",
]
