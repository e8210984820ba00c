"""The verbs: `inv run`, and the same as `corra run`. Each parses, makes one call, renders, and returns an exit code.

In your own tasks.py: `from corra.tasks import attach, kill, ps, run`, or `ns.add_collection(corra.tasks.ns, "corra")`.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal as signals
import stat
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from invoke.collection import Collection
from invoke.context import Context

from .errors import CorraError, Misuse, NotKilled
from .verb import Flag, Given, listing, option, switch, verb

if TYPE_CHECKING:
    from .control import Run
    from .follow import Follow
    from .history import Entry
    from .state import State

TAIL_ON_A_TERMINAL = 200
# For looking, a host that is down must not keep the others' answers back.
LOOK_TIMEOUT_S = 5.0
_HISTORY_HOSTS = 32


def _seconds(text: str) -> float:
    from .program import seconds

    return seconds(text)


def _signal(text: str) -> str:
    from .follow import signal_name

    return signal_name(text)


def _tail(text: str) -> int | None:
    return None if text == "all" else _count(text)


def _count(text: str) -> int:
    if not text.isdecimal():
        raise ValueError(text)
    return int(text)


def _one_of(*choices: str) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text not in choices:
            raise Misuse(f"not {' or '.join(choices)}: {text!r}")
        return text

    return read


_HOST = listing("host", "H", "hosts", help="Where: HOST, user@host:port or local; several with commas. Default: what history says.")
_TARGET = listing("host", "H", "hosts", help="Where: HOST, user@host:port, or local for this machine. Default: $CORRA_HOST.")
_REACH = (
    option("user", "u", help="Log in as this user."),
    option("as", help="Run as this user there, by sudo."),
    option("via", read=_one_of("fabric", "openssh"), help="What carries it: fabric, or openssh (the ssh program)."),
    option("connect-timeout", read=_seconds, help="How long a host may take to answer (15s; 5s for ps)."),
    option("spool", help="Directory on the host instead of the usual one."),
)
_SHOWN = (
    switch("timestamps", "t", help="Put the time of arrival before each line."),
    option("stream", read=_one_of("stdout", "stderr", "both"), help="Only stdout or stderr (both)."),
    switch("raw", help="Let escape sequences through to this terminal."),
)
_WATCHED = (
    option("timeout", "T", read=_seconds, help="Stop watching after this long; the program goes on (none)."),
    option("reconnect-timeout", read=_seconds, help="Give a lost link up after this long (never)."),
)
_RUN = (
    switch("detach", "d", help="Print the id and leave as soon as it is started."),
    option("name", help="A name to find it by."),
    option("id", help="Its id: the same id with the same command is the same run."),
    option("cwd", "C", help="Directory there (the home; on local: this one)."),
    listing("env", "E", help="K=V, or K for my own value of it; repeatable."),
    option("env-file", help="A file of K=V lines."),
    listing("secret", help="K=FILE, or K for my own value: in the program's environment, never on disk; repeatable."),
    option("stdin", help="FILE, - for my own stdin, or none (none)."),
    switch("merge", help="stdout and stderr as one stream, in order."),
    option("timeout", "T", read=_seconds, help="End it after this long, on the host's own clock (never)."),
    option("grace", read=_seconds, help="From its stop signal to KILL (10s)."),
    option("stop-signal", read=_signal, help="What asks it to stop (TERM)."),
    option("keep", read=_seconds, help="How long the host keeps its output (14d)."),
    switch("accept-new-key", help="Remember the key of a host never seen before."),
    option("reconnect-timeout", read=_seconds, help="Give a lost link up after this long (never)."),
    switch("raw", help="Let escape sequences through to this terminal."),
)


# -- The verbs


@verb(_TARGET, *_REACH, *_RUN, command=True, fate="NOT STARTED")
def run(c: Context, given: Given) -> int:
    """Start a program that outlives this connection, and show it: inv run --host db1 -- uptime

    Ctrl-C leaves it running. We exit as it does: its own code, 128+N by signal N, 124 by --timeout, 126 or 127 when it can't be
    executed; 125: nothing was started, 123: it may have been (repeat it with the same --id) or how it ended is unknown, 122: it still
    runs and we stopped watching.
    """
    from . import control
    from .watch import Gone, Watch

    target = _one_host(c, given, fate="NOT STARTED")
    stdin, file = _stdin(given)
    with file:
        launch = control.launch(
            target,
            given.argv,
            id=given.id,
            name=given.name,
            cwd=given.cwd,
            env=_environment(given),
            secrets=_secrets(given),
            stdin=stdin,
            merge=given.merge,
            timeout=given.timeout,
            grace=given.grace,
            stop_signal=given.stop_signal,
            keep=given.keep,
            spool=given.spool,
            **_reach(c, given),
        )
        if given.echo or given.dry:
            given.screen.note("", target, ("would start: " if given.dry else "") + shlex.join(given.argv))
        if given.dry:
            return 0
        follow = launch.follow(stay=not given.detach, reconnect_timeout_s=given.reconnect_timeout)
        watch = Watch(follow, launch.run, given.screen, relay=frozenset({signals.SIGTERM}), hide=given.hide)
        try:
            state = watch.stay()
        except Gone:
            return watch.gone()
    if given.detach and state is not None and state.state != "not_started":
        return _detached(given, watch.label, state, target)
    return 0 if state is None else watch.outcome(state)


@verb(
    _HOST,
    *_REACH,
    option("tail", "n", read=_tail, default="", help="Begin with the last N lines, or all (200 on a terminal, else all; 0: from now)."),
    *_SHOWN,
    *_WATCHED,
    switch("sig-proxy", help="Pass INT and TERM on to the program."),
    ids=True,
)
def attach(c: Context, given: Given) -> int:
    """Show a run's output and go on live, from anywhere: inv attach [ID]

    ID is an id, the beginning of its tail, or a name; without one it is the newest run of mine. We exit as run does.
    """
    from .watch import Gone, Watch

    found = _find_one(c, given)
    lines = given.tail if given.tail != "" else TAIL_ON_A_TERMINAL if given.screen.out_is_terminal else None
    follow = _follow(given, found, tail=lines, timeout_s=given.timeout, reconnect_timeout_s=given.reconnect_timeout)
    relay = frozenset({signals.SIGINT, signals.SIGTERM}) if given.sig_proxy else frozenset[int]()
    watch = Watch(follow, found, given.screen, relay=relay, hide=given.hide, stamps=given.timestamps, tail=lines)
    try:
        state = watch.stay()
    except Gone:
        return watch.gone()
    return 0 if state is None else watch.outcome(state)


@verb(
    _HOST,
    *_REACH,
    switch("follow", "f", help="Go on as more comes, to the end."),
    option("tail", "n", read=_tail, default=None, help="Only the last N lines (all)."),
    *_SHOWN,
    ids=True,
)
def logs(c: Context, given: Given) -> int:
    """Show what a run has written: inv logs [ID]

    What it became doesn't matter here: the exit code is 0 when the output could be shown.
    """
    from .watch import EPIPE_CODE, Gone, Watch

    found = _find_one(c, given)
    follow = _follow(given, found, tail=given.tail, live=given.follow)
    watch = Watch(follow, found, given.screen, hide=given.hide, stamps=given.timestamps)
    try:
        watch.stay(live=given.follow)
    except Gone:
        return EPIPE_CODE
    return 0


@verb(
    _HOST,
    *_REACH,
    option("signal", "s", read=_signal, help="Send just this one, no KILL after it (TERM, the grace, then KILL to the whole tree)."),
    switch("kill-now", "9", help="KILL to the whole tree now."),
    option("grace", read=_seconds, help="From TERM to KILL (10s)."),
    switch("all", "a", help="All that run on --host."),
    switch("yes", "y", help="Don't ask, though it is another's run or on several hosts."),
    switch("no-wait", help="Don't wait for the end."),
    ids=True,
    fate="NOT KILLED",
)
def kill(c: Context, given: Given) -> int:
    """Stop runs: TERM, after --grace KILL to the whole tree: inv kill ID..

    Exits 0 when none is left, also when it had ended already, 1 when something outlives KILL, 125 when nothing could be done.
    """
    from .watch import stop

    _refuse_contradictions(given)
    runs = _to_kill(c, given)
    _ask_first(given, runs)
    if given.dry:
        for found, _ in runs:
            given.screen.note(found.label, str(found.host), f"would be sent {given.signal or ('KILL' if given.kill_now else 'TERM')}")
        return 0
    grace_s = 0.0 if given.kill_now else 10.0 if given.grace is None else given.grace

    def end(each: tuple[Run, State]) -> int:
        found, before = each
        with _said(given) as code:
            if given.signal:
                found.signal(given.signal)
                given.screen.note(before.label, str(found.host), "had ended already" if before.ended else f"{given.signal} sent")
            else:
                stop(given.screen, found, grace_s=grace_s, wait=not given.no_wait)
            if given.json:
                given.screen.event("state", **_at(found.state(), found).to_json())
        return code[0]

    return max(_each(end, runs))


@verb(
    _HOST,
    *_REACH,
    switch("all", "a", help="Those that ended well or long ago, too."),
    switch("quiet", "q", help="Full ids only."),
    option("state", help="Only these, by the word in the table: running, done, FAILED, KILLED, TIMEOUT, LOST .."),
    option("grep", help="Only those with this in their name, id or command."),
    option("since", read=_seconds, default=86400.0, help="How far back an end still counts (24h)."),
    switch("mine", help="Only those I started."),
    switch("no-trunc", help="Don't cut commands off."),
)
def ps(c: Context, given: Given) -> int:
    """List runs, what runs first, then what went wrong lately: inv ps --host db1,db2

    Without --host the hosts of this machine's history. Exits 125 when a host didn't answer; the others' runs are shown all the same.
    """
    from . import render
    from .watch import now

    if given.connect_timeout is None:
        given.connect_timeout = LOOK_TIMEOUT_S
    states, errors = _list(c, given)
    moment = now()
    kept = [state for state in render.order(states) if _listed(state, given)]
    shown = [state for state in kept if given.all or given.state or _matters(state, given.since)]
    if given.json:
        for state in shown:
            given.screen.event("state", **state.to_json())
    elif given.quiet:
        given.screen.lines([state.prog_id for state in shown])
    elif shown:
        width = given.screen.width if given.screen.out_is_terminal and not given.no_trunc else None
        given.screen.lines(render.table([render.row(state, moment) for state in shown], width))
    for error in errors:
        given.screen.error(error)
    left = [state for state in kept if state not in shown]
    if given.screen.err_is_terminal and not (given.quiet or given.json):
        well = sum(render.went_well(state) and _recent(state, given.since) for state in left)
        if well:
            given.screen.note("", "", f"{well} more ended well in the last {_hours(given.since)}: add -a")
        elif left:
            given.screen.note("", "", f"{len(left)} more ended before that: add -a")
        elif not shown and not errors:
            given.screen.note("", "", "no runs there")
    return max((error.code for error in errors), default=0)


@verb(
    _HOST,
    *_REACH,
    switch("exit-code", help="Exit as the program did, 122 while it runs (else 0)."),
    ids=True,
)
def status(c: Context, given: Given) -> int:
    """Show all that is known of runs: inv status [ID..]

    Exits 0 when the host could tell, whatever became of the program; see --exit-code.
    """
    from . import render
    from .state import exit_code
    from .watch import now

    def show(text: str | None) -> int:
        with _said(given) as code:
            found = _find(c, given, text)
            state = found.state()
            if given.json:
                given.screen.event("state", **_at(state, found).to_json())
            else:
                given.screen.lines(render.status(_at(state, found), now()))
            code[0] = exit_code(state) if given.exit_code else 0
        return code[0]

    return max(_each(show, given.ids or [None]))


@verb(
    _HOST,
    *_REACH,
    switch("any", help="Until the first of them has ended."),
    *_WATCHED,
    ids=True,
)
def wait(c: Context, given: Given) -> int:
    """Wait until runs have ended: inv wait ID..

    Exits as the program did; of several the largest code, with --any that of the first to end. 122: --timeout was over.
    """
    import threading

    from .state import exit_code
    from .verb import die_of
    from .watch import Desk, Watch

    if not given.ids:
        raise Misuse("wait needs an id", fate="NOT DONE")

    def end(text: str) -> int:
        found = _find(c, given, text)
        follow = found.follow(streams=[], timeout_s=given.timeout, reconnect_timeout_s=given.reconnect_timeout)
        watch = Watch(follow, found, given.screen)
        for event in follow:
            if not given.json:
                watch.show(event)
        assert follow.state is not None
        if not given.json:
            return watch.outcome(follow.state)
        given.screen.event("state", **_at(follow.state, found).to_json())
        return exit_code(follow.state)

    def report(text: str) -> None:
        try:
            desk.put((end(text), None))
        except BaseException as error:  # noqa: BLE001 - the main thread raises it
            desk.put((0, error))

    worst = 0
    with Desk() as desk:
        for text in given.ids:
            threading.Thread(target=report, args=(text,), daemon=True).start()
        for _ in given.ids:
            item = desk.get()
            if isinstance(item, int):
                given.screen.close()
                die_of(signals.Signals(item).name)
            code, error = item
            if isinstance(error, CorraError):
                given.screen.error(error)
                code = error.code
            elif error is not None:
                raise error
            worst = max(worst, code)
            if given.any and error is None:
                return int(code)
    return worst


# -- What the verbs share


def _reach(c: Context, given: Given) -> dict[str, Any]:
    """Return how hosts are reached: the flags, and under them what the configuration says below `corra`."""
    told = {
        "user": given.user,
        "as_user": _as_user(given),
        "via": given.via or _configured(c, "via"),
        "connect_timeout": given.connect_timeout,
        "accept_new_key": getattr(given, "accept_new_key", None) or None,
    }
    return {"config": c.config, **{name: value for name, value in told.items() if value is not None}}


def _as_user(given: Given) -> str | None:
    name: str | None = vars(given)["as"]  # the flag's name is a word of Python's
    return name


def _configured(c: Context, name: str) -> Any:
    return (c.config.get("corra") or {}).get(name)


def _hosts(c: Context, given: Given) -> list[str]:
    """Return the hosts given by flag, $CORRA_HOST or the configuration, in this order; none is an answer too."""
    told: Sequence[str] = given.host or [os.environ.get("CORRA_HOST") or _configured(c, "host") or ""]
    return [name.strip() for text in told for name in text.split(",") if name.strip()]


def _one_host(c: Context, given: Given, *, fate: str) -> str:
    from .verb import program

    hosts = _hosts(c, given)
    if not hosts:
        command = shlex.join(given.argv)
        raise Misuse(f"no host:  {program()} run --host HOST -- {command}   (local is this machine)", fate=fate)
    if len(hosts) > 1:
        raise Misuse(f"one host at a time: {', '.join(hosts)} are {len(hosts)}", fate=fate)
    return hosts[0]


def _find(c: Context, given: Given, text: str | None) -> Run:
    """Return the run that `text` means: on --host, else on the host that history knows."""
    from . import control

    # $CORRA_HOST and the configuration say where to start things; where a run is, is for history to know first.
    hosts = [name.strip() for each in given.host for name in each.split(",") if name.strip()]
    if len(hosts) > 1:
        raise Misuse(f"an id belongs to one host: {', '.join(hosts)} are {len(hosts)}", fate="NOT DONE")
    return control.attach(text, hosts[0] if hosts else None, spool=given.spool, **_reach(c, given))


def _find_one(c: Context, given: Given) -> Run:
    if len(given.ids) > 1:
        raise Misuse(f"one id at a time: {' '.join(given.ids)}", fate="NOT DONE")
    return _find(c, given, given.ids[0] if given.ids else None)


def _follow(given: Given, found: Run, **how: Any) -> Follow:
    # A merged run has one stream, of another name, and is shown whole.
    streams = None if given.stream in (None, "both") else [given.stream]
    return found.follow(streams=streams, times=given.timestamps, **how)


@contextlib.contextmanager
def _said(given: Given) -> Iterator[list[int]]:
    """Say a CorraError and leave its code in the list, so that one run's trouble doesn't keep back the others'."""
    code = [0]
    try:
        yield code
    except CorraError as error:
        given.screen.error(error)
        code[0] = error.code


def _each(do: Callable[[Any], int], whom: Sequence[Any]) -> list[int]:
    """Do it with all of them at once."""
    if len(whom) == 1:
        return [do(whom[0])]
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(min(32, len(whom) or 1)) as pool:
        return list(pool.map(do, whom)) or [0]


def _at(state: State, found: Run) -> State:
    """Return `state` with its host called as it is typed."""
    from dataclasses import replace

    return replace(state, host=str(found.host))


# -- run's own


def _detached(given: Given, label: str, state: State, target: str) -> int:
    from . import ids, render
    from .verb import program

    if given.json:
        return 0  # the start event has said it
    given.screen.lines([state.prog_id])
    short = ids.short(state.prog_id)
    hint = [f"watch: {program()} attach {state.name or short}"]
    if target != "local":
        hint.append(f"elsewhere: corra attach --host {target} {short}")
    given.screen.say(label, target, render.STARTED, "", render.beside(hint))
    return 0


def _stdin(given: Given) -> tuple[Any, contextlib.AbstractContextManager[Any]]:
    """Return what the program reads, and what is to be closed afterwards. Raises Misuse for a file that nobody would read."""
    if given.stdin == "-":
        return sys.stdin.buffer, contextlib.nullcontext()
    if given.stdin not in (None, "none"):
        try:
            file = open(given.stdin, "rb")  # noqa: SIM115 - the caller closes it, by what we return
        except OSError as error:
            raise Misuse(f"--stdin {given.stdin}: {error.strerror}") from error
        return file, file
    if given.stdin is None and _unread_file(0):
        raise Misuse(
            "stdin is a file, but the program would read /dev/null",
            hint=["send it: --stdin -            don't: --stdin none  (or < /dev/null)"],
        )
    return None, contextlib.nullcontext()


def _unread_file(fd: int) -> bool:
    """Return whether `fd` is a regular file at its beginning, with bytes to read: `while read h; do inv run ..; done < hosts` isn't."""
    try:
        facts = os.fstat(fd)
        return stat.S_ISREG(facts.st_mode) and facts.st_size > 0 and os.lseek(fd, 0, os.SEEK_CUR) == 0
    except OSError:
        return False


def _environment(given: Given) -> dict[str, str]:
    env: dict[str, str] = {}
    if given.env_file:
        try:
            with open(given.env_file, encoding="utf-8", errors="surrogateescape") as lines:
                text = [line.rstrip("\n") for line in lines]
        except OSError as error:
            raise Misuse(f"--env-file {given.env_file}: {error.strerror}") from error
        for number, line in enumerate(text, 1):
            name, equals, value = line.partition("=")
            if not line.strip() or line.lstrip().startswith("#"):
                continue
            if not equals:
                raise Misuse(f"--env-file {given.env_file}: line {number} is not K=V")
            env[name.strip()] = value
    for each in given.env:
        name, equals, value = each.partition("=")
        env[name] = value if equals else _mine(name, "-E")
    return env


def _secrets(given: Given) -> dict[str, str]:
    secrets: dict[str, str] = {}
    for each in given.secret:
        name, equals, path = each.partition("=")
        if not equals:
            secrets[name] = _mine(name, "--secret")
            continue
        try:
            with open(path, encoding="utf-8", errors="surrogateescape") as file:
                secrets[name] = file.read().removesuffix("\n")
        except OSError as error:
            raise Misuse(f"--secret {name}: {path}: {error.strerror}") from error
    return secrets


def _mine(name: str, flag: str) -> str:
    if name not in os.environ:
        raise Misuse(f"{flag} {name}: not set here; say {flag} {name}=..")
    return os.environ[name]


# -- kill's own


def _refuse_contradictions(given: Given) -> None:
    given_flags = [name for name, value in (("-s", given.signal), ("-9", given.kill_now), ("--grace", given.grace)) if value]
    if len(given_flags) > 1:
        raise Misuse(f"{given_flags[0]} and {given_flags[1]} exclude each other", fate="NOT KILLED")
    if given.all and given.ids:
        raise Misuse("-a and an id exclude each other", fate="NOT KILLED")


def _to_kill(c: Context, given: Given) -> list[tuple[Run, State]]:
    """Return the runs to stop, with what is known of them. Never a guess: without ids or -a it is a misuse that lists them."""
    from . import control, history, ids

    if given.ids:
        found = _each_found(c, given)
        return [(each, each.state()) for each in found]
    hosts = _hosts(c, given)
    if given.all and not hosts:
        raise Misuse("-a needs --host", fate="NOT KILLED")
    open_: list[State] = []
    if hosts:
        answers = control.ps(hosts, spool=given.spool, **_reach(c, given))
        for answer in answers:
            if isinstance(answer, CorraError):
                raise _not_killed(answer)
        open_ = [each for each in answers if not isinstance(each, CorraError) and not each.ended]
    else:
        open_ = [entry.as_state() for entry in history.recent(50) if entry.open]
    if not given.all:
        named = ", ".join(f"{ids.short(each.prog_id)} ({each.name or '-'})" for each in open_[:5]) or "nothing"
        more = f" and {len(open_) - 5} more" if len(open_) > 5 else ""
        where = f" on {', '.join(sorted({each.host for each in open_}) or hosts)}" if open_ or hosts else ""
        raise Misuse(f"say which: {named}{more} run{'s' if len(open_) <= 1 else ''}{where}", fate="NOT KILLED")
    if not open_:
        given.screen.note("", ",".join(hosts), "nothing runs there")
    reach = _reach(c, given)
    return [(control.Run(control.agent_for(each.host, **reach), each.prog_id, name=each.name, spool=given.spool), each) for each in open_]


def _each_found(c: Context, given: Given) -> list[Run]:
    """Return all runs that the ids mean, or raise for the first that means none, before any of them is touched."""
    found = []
    for text in dict.fromkeys(given.ids):
        try:
            found.append(_find(c, given, text))
        except CorraError as error:
            raise _not_killed(error) from error
    return found


def _not_killed(error: CorraError) -> CorraError:
    """Return `error` as the answer to a kill: who wasn't reached wasn't killed."""
    if error.fate in ("", "NOT STARTED", "NOT DONE"):
        error.fate = NotKilled.fate
    return error


def _ask_first(given: Given, runs: Sequence[tuple[Run, State]]) -> None:
    """Have a person say yes where the runs are another's or on several hosts. Raises NotKilled for a no, and where nobody can be asked."""
    from .control import me
    from .verb import program

    if given.yes or given.dry:
        return
    mine = me()["user"]
    others = [(found, state) for found, state in runs if (state.origin or {}).get("user") not in (None, mine) and not state.ended]
    hosts = {str(found.host) for found, _ in runs}
    if others:
        found, state = others[0]
        more = f", and {len(others) - 1} more of others" if len(others) > 1 else ""
        why = f"started by {(state.origin or {}).get('user')}@{(state.origin or {}).get('host')}{more}"
        label, host = state.label, str(found.host)
    elif len(hosts) > 1:
        why, label, host = f"{len(runs)} runs on {len(hosts)} hosts", "", ",".join(sorted(hosts))
    else:
        return
    if not (os.isatty(0) and given.screen.err_is_terminal):
        raise NotKilled(f"{why}: add -y", label=label, host=host, hint=[f"{program()} kill -y .."])
    if not given.screen.ask(label, host, f"{why}: stop it? [y/N] "):
        raise NotKilled("you said no", label=label, host=host)


# -- ps's own


def _list(c: Context, given: Given) -> tuple[list[State], list[CorraError]]:
    """Ask all hosts at once; return what runs there were and what went wrong."""
    from . import control

    reach = _reach(c, given)
    hosts = _hosts(c, given)
    if hosts:
        answers = control.ps(hosts, spool=given.spool, **reach)
    else:
        known = _known_places(given)
        if not known:
            from .verb import program

            raise Misuse(f"no host, and no history of any:  {program()} ps --host HOST", fate="NOT DONE")

        def ask(entry: Entry) -> list[State | CorraError]:
            there = {**reach, "as_user": _as_user(given) or entry.as_user, "via": reach.get("via") or entry.via}
            return control.ps([entry.host], spool=given.spool or entry.spool, **there)

        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(min(32, len(known))) as pool:
            answers = [answer for found in pool.map(ask, known) for answer in found]
    states = [each for each in answers if not isinstance(each, CorraError)]
    return states, [_last_seen(each) for each in answers if isinstance(each, CorraError)]


def _known_places(given: Given) -> list[Entry]:
    """Return one entry of history for each host, user and spool where something ran lately."""
    import time

    from . import history

    places: dict[tuple[str, str | None, str | None], Entry] = {}
    for entry in history.recent(500):
        if entry.open or entry.started > time.time() - max(given.since, 7 * 86400.0):
            places.setdefault((entry.host, entry.as_user, entry.spool), entry)
    return list(places.values())[:_HISTORY_HOSTS]


def _last_seen(error: CorraError) -> CorraError:
    """Add what this machine's history knows of a host that doesn't answer."""
    from datetime import datetime

    from . import history, ids, render
    from .watch import now

    entries = [entry for entry in history.recent(500) if entry.host == error.host]
    if entries:
        latest = max(entry.seen for entry in entries)
        running = [f"{ids.short(entry.prog_id)}{' ' + entry.name if entry.name else ''}" for entry in entries if entry.open]
        when = render.moment(datetime.fromtimestamp(latest).astimezone().isoformat(), now())
        error.why += f"; last seen {when}" + (f" with {len(running)} running ({', '.join(running[:3])})" if running else "")
    return error


def _listed(state: State, given: Given) -> bool:
    from . import render
    from .control import me

    words = (state.prog_id, state.name or "", shlex.join(state.argv))
    return (
        (not given.grep or any(given.grep in each for each in words))
        and (not given.state or render.word(state).lower().startswith(given.state.lower()))
        and (not given.mine or (state.origin or {}).get("user") == me()["user"])
    )


def _matters(state: State, since_s: float) -> bool:
    from . import render

    return not state.ended or (_recent(state, since_s) and not render.went_well(state))


def _recent(state: State, since_s: float) -> bool:
    from . import render
    from .watch import now

    ago = render.since(render.ended_at(state), now())
    return ago is None or ago <= since_s


def _hours(seconds: float) -> str:
    from . import render

    return "24 h" if seconds == 86400 else render.span(seconds)


ns = Collection(run, attach, logs, kill, ps, status, wait)

__all__ = ["attach", "kill", "logs", "ns", "ps", "run", "status", "wait"]
