"""Starting runs: what `inv run`, `corra.start` and everybody's own tasks are made of.

A target is a fabric Connection, a host's name (`db1`, `ops@db1:2222`, `local`) or a Host. A bare invoke Context is none: under `inv` it
would mean this machine, under `fab` the other one.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import IO, TYPE_CHECKING, Any, BinaryIO, NamedTuple

from . import history, ids
from .control import Run, Watch, by, me
from .errors import Misuse, NotStarted, typed
from .follow import Follow, signal_name
from .payload import payload_of
from .place import Agent, courier_source
from .program import (
    OPEN,
    Open,
    Program,
    Request,
    in_seconds,
    limits as read_limits,
    output_kept,
    words,
)
from .reach import Reach, agent_for, is_a
from .state import State
from .stream import Gap, Output
from .verdict import ended, not_started

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .result import Result

Stdin = str | bytes | IO[bytes] | IO[str] | Open | None


class What(Reach, total=False):
    """What may be said of any program beside its command. Durations are seconds, or text such as `5m`."""

    cwd: str | None
    env: Mapping[str, str | None] | None
    env_inherit: bool | Sequence[str]
    secrets: Mapping[str, str] | None
    stdin: Stdin
    umask: int | None
    merge: bool
    limits: Mapping[str, int | str | Sequence[int]] | None
    pty: bool | tuple[int, int]
    forget_stdin: bool
    timeout: float | str | None
    grace: float | str | None
    stop_signal: str | int | None
    keep: float | str | None
    keep_output: int | str | None
    wait_children: bool
    force: bool
    spool: str | None


class How(What, total=False):
    """What `start` and `run` may be told beside the command."""

    id: str | None
    name: str | None
    origin: Mapping[str, str] | None
    callback: Mapping[str, Any] | None
    callback_config: Mapping[str, float] | None


class Launch(NamedTuple):
    """A run that is about to be started: its id is made, its host known, and nothing has been sent."""

    agent: Agent
    request: Request
    payload: BinaryIO | None = None
    via: str | None = None
    connection: Any = None

    def follow(self, *, stay: bool = True, **how: Any) -> Follow:
        """Return the loop that starts it and, with `stay`, shows it to its end. `how`: what Follow takes."""
        host, request = self.agent.host, self.request
        # Before the first byte is sent: whoever is killed in the middle finds the id here and may repeat the start with it.
        fresh = history.begin(
            history.Entry(
                request.prog_id,
                str(host),
                request.name,
                host.as_user,
                self.via,
                request.spool,
                request.program.argv,
            )
        )
        follow = Follow(
            self.agent,
            request.prog_id,
            start=request,
            stay=stay,
            payload=self.payload,
            by=by(),
            told=self._told(request.prog_id, fresh=fresh),
            **how,
        )
        follow.first = fresh
        return follow

    @staticmethod
    def _told(prog_id: str, *, fresh: bool) -> Callable[[State | None], None]:
        """Return what keeps the history of a start up to date with what its follow is told. `fresh`: only this start knows of it."""
        known: list[str] = []

        def note(state: State | None) -> None:
            if state is None:
                if fresh:
                    history.forget(prog_id)
            elif state.state not in known:
                known.append(state.state)
                history.note(prog_id, state.state)

        return note

    def close(self) -> None:
        """Let go of what was kept for a repeated start. A file that was given stays open."""
        if self.payload is not None:
            self.payload.close()

    @property
    def run(self) -> Run:
        return Run(
            self.agent,
            self.request.prog_id,
            name=self.request.name,
            spool=self.request.spool,
            connection=self.connection,
        )


def launch(
    target: Any,
    argv: Sequence[str],
    *,
    id: str | None = None,  # noqa: A002 - what it is called everywhere else
    name: str | None = None,
    cwd: str | None = None,
    env: Mapping[str, str | None] | None = None,
    env_inherit: bool | Sequence[str] = True,
    secrets: Mapping[str, str] | None = None,
    stdin: Stdin = None,
    umask: int | None = None,
    merge: bool = False,
    limits: Mapping[str, int | str | Sequence[int]] | None = None,
    pty: bool | tuple[int, int] = False,
    forget_stdin: bool = False,
    timeout: float | str | None = None,
    grace: float | str | None = None,
    stop_signal: str | int | None = None,
    keep: float | str | None = None,
    keep_output: int | str | None = None,
    wait_children: bool = False,
    force: bool = False,
    spool: str | None = None,
    origin: Mapping[str, str] | None = None,
    callback: Mapping[str, Any] | None = None,
    callback_config: Mapping[str, float] | None = None,
    **reach: Unpack[Reach],
) -> Launch:
    """Return the Launch of `argv` on `target`. Raises Misuse for what no host could start. No I/O but reading `stdin`.

    `stdin=OPEN` holds it open for `Run.send`; `pty` gives the program a terminal of its own, which can be sent to as well, of (rows, columns), else of
    the size of ours or 24 by 80. What is sent is kept in the spool; with `forget_stdin`, and with a terminal, only until the program has read it.
    """
    prog_id = _new_id(id)
    agent = agent_for(target, **reach)
    if cwd is None and agent.host.is_local:
        cwd = os.getcwd()
    described, payload = (
        ({"open": True}, None) if stdin is OPEN else payload_of(stdin, named=id is not None)
    )
    if pty and stdin is OPEN:
        described = None
    program = Program(
        words(argv),
        cwd=cwd,
        env=dict(env or {}),
        env_inherit=env_inherit if isinstance(env_inherit, bool) else tuple(env_inherit),
        stdin=described,
        umask=umask,
        merge=merge,
        limits=read_limits(limits or {}),
        pty=bool(pty),
    )
    request = Request(
        prog_id,
        program,
        name=name,
        origin={**me(), **(origin or {})},
        timeout_s=in_seconds(timeout),
        grace_s=in_seconds(grace),
        stop_signal=None if stop_signal is None else signal_name(stop_signal),
        keep_s=in_seconds(keep),
        keep_output=output_kept(keep_output),
        wait_children=wait_children,
        force=force,
        terminal=_terminal(pty) if pty else {},
        forget_stdin=forget_stdin,
        secrets=dict(secrets or {}),
        spool=spool,
        callback=dict(callback or {}),
        config=dict(callback_config or {}),
        courier=courier_source() if callback else None,
    )
    connection = target if is_a(target, "fabric.connection", "Connection") else None
    return Launch(agent, request, payload, reach.get("via"), connection)


def _new_id(given: str | None) -> str:
    if given is not None and not ids.is_valid(given):
        raise Misuse(
            f"not an id: {given!r} (a-z, 0-9, '.', '_', '-', at most 64, the first a letter or digit)"
        )
    return given or ids.new_id()


def again(
    run: Run,
    *,
    id: str | None = None,  # noqa: A002
    secrets: Mapping[str, str] | None = None,
) -> tuple[Launch, str | None]:
    """Return the Launch of the same program, on the same host, as a run of its own; and the URL that the old one reported to, if it did.

    What the host has written down is what is started: words, directory, the variables that were given, stdin, limits and name. The login's
    own environment is that of now. Secrets were never written down and must be given anew. Raises NotStarted where it still runs, where a
    secret is missing, and where its output and stdin are gone.
    """
    prog_id = _new_id(id)
    state = run.state()
    facts: dict[str, Any] = {"label": state.label, "host": str(run.host), "prog_id": state.prog_id}
    if not state.ended:
        raise NotStarted(
            "it is still running",
            hint=[f"watch: {typed()} attach {ids.short(state.prog_id)}"],
            **facts,
        )
    record, given = run.record()
    stdin = record["program"].get("stdin")
    missing = sorted(
        set(filter(None, (state.origin or {}).get("secrets", "").split(","))) - set(secrets or {})
    )
    if missing:
        flags = " ".join(f"--secret {name}" for name in missing)
        raise NotStarted(
            f"nobody has kept its secret{'s' * (len(missing) != 1)} {', '.join(missing)}",
            hint=[
                f"give it again:  {typed()} again {flags} {ids.short(state.prog_id)}      (or --secret NAME=FILE)"
            ],
            **facts,
        )
    if isinstance(stdin, Mapping) and "bytes" in stdin and len(given) != stdin["bytes"]:
        raise NotStarted("what it read is gone from the host: use run", **facts)
    try:
        request = Request.from_record(
            record, prog_id, origin=me(), secrets=dict(secrets or {}), spool=run.spool
        )
    except Misuse as error:
        raise NotStarted(error.why, **facts) from error
    payload = io.BytesIO(given) if isinstance(stdin, Mapping) and "bytes" in stdin else None
    return Launch(run.agent, request, payload, run.via, run.connection), (
        record.get("callback") or {}
    ).get("url")


def _terminal(size: bool | Sequence[Any]) -> dict[str, Any]:
    """Return what a program's terminal is to be like: of that size, else as ours, where we have one."""
    found: dict[str, Any] = {"term": os.environ.get("TERM") or "xterm"}
    if not isinstance(size, bool):
        if len(size) != 2 or not all(isinstance(each, int) and 0 < each < 1 << 16 for each in size):
            raise Misuse(
                f"pty={size!r} is no size (say pty=True, or rows and columns: pty=(24, 80))"
            )
        return {**found, "rows": size[0], "columns": size[1]}
    for fd in (0, 1, 2):
        with contextlib.suppress(OSError):
            columns, rows = os.get_terminal_size(fd)
            if rows and columns:
                return {**found, "rows": rows, "columns": columns}
    return found


def start(
    target: Any,
    argv: Sequence[str],
    *,
    reconnect_timeout: float | str | None = None,
    watch: Watch | None = None,
    **how: Unpack[How],
) -> Run:
    """Start `argv` on `target` and return as soon as the host has confirmed it.

    The same `id` again is the same run, so a start that failed with MaybeStarted may be repeated with it. `watch` is given the
    LinkDown and LinkUp of the meantime. Raises NotStarted, Unreachable, MaybeStarted, Misuse.
    """
    starting = launch(target, argv, **how)
    follow = starting.follow(stay=False, reconnect_timeout_s=in_seconds(reconnect_timeout))
    with contextlib.closing(starting):
        for event in follow:
            if watch is not None:
                watch(event)
    state = follow.state
    if state is not None and state.state == "not_started":
        raise not_started(state, str(follow.host))
    begun = starting.run
    begun.known = state
    return begun


def run(
    target: Any,
    argv: Sequence[str],
    *,
    warn: bool = False,
    hide: bool | str | None = None,
    out_stream: Any = None,
    err_stream: Any = None,
    reconnect_timeout: float | str | None = None,
    watch: Watch | None = None,
    **how: Unpack[How],
) -> Result:
    """Start `argv` on `target`, show its output as it comes, and return its Result when it has ended.

    `hide` (True, "out" or "err"), `warn`, `out_stream` and `err_stream` are Invoke's. A stream that takes bytes gets the program's
    bytes; one that takes text gets them decoded as UTF-8. Ctrl-C leaves the program running.
    Raises Failed, TimedOut and Lost unless `warn`; NotStarted, Unreachable, MaybeStarted, StillRunning, Misuse always.
    """
    from .result import Result

    hidden = _hidden(hide)
    starting = launch(target, argv, **how)
    follow = starting.follow(reconnect_timeout_s=in_seconds(reconnect_timeout))
    kept: dict[str, list[bytes]] = {"stdout": [], "stderr": []}
    truncated = False
    sinks = {
        "stdout": None
        if "stdout" in hidden
        else _Sink(out_stream if out_stream is not None else sys.stdout),
        "stderr": None
        if "stderr" in hidden
        else _Sink(err_stream if err_stream is not None else sys.stderr),
    }
    with contextlib.closing(starting):
        for event in follow:
            if isinstance(event, Output):
                stream = "stderr" if event.stream == "stderr" else "stdout"
                kept[stream].append(event.data)
                if (sink := sinks[stream]) is not None:
                    sink.write(event.data)
                continue
            truncated = truncated or isinstance(event, Gap)
            if watch is not None:
                watch(event)
    for sink in sinks.values():
        if sink is not None:
            sink.end()
    assert follow.state is not None
    if follow.state.state == "not_started":
        raise not_started(follow.state, str(follow.host))
    out, err = (
        b"".join(kept[stream]).decode("utf-8", "replace") for stream in ("stdout", "stderr")
    )
    told: dict[str, Any] = {
        "stdout": out,
        "stderr": err,
        "hide": hidden,
        "truncated": truncated,
        "connection": starting.connection,
    }
    result = Result(follow.state, follow.host, **told)
    error = ended(follow.state, str(follow.host), result)
    if error is not None and not warn:
        raise error
    return result


def _hidden(hide: bool | str | None) -> tuple[str, ...]:
    both = ("stdout", "stderr")
    known = {
        None: (),
        False: (),
        True: both,
        "both": both,
        "out": both[:1],
        "stdout": both[:1],
        "err": both[1:],
        "stderr": both[1:],
    }
    if hide not in known:
        raise Misuse(f"not a stream to hide: {hide!r} (out, err or both)")
    return known[hide]


class _Sink:
    """Where a program's bytes go: the binary side of a stream where it has one, else text."""

    def __init__(self, stream: Any) -> None:
        import codecs

        self._stream = stream
        self._binary = getattr(
            stream,
            "buffer",
            stream if isinstance(stream, (io.RawIOBase, io.BufferedIOBase)) else None,
        )
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        if self._binary is not None and self._binary is not stream:
            stream.flush()

    def write(self, data: bytes) -> None:
        if self._binary is None:
            self._stream.write(self._decode(data))
        else:
            _write_all(self._binary, data)
        self._flush()

    def end(self) -> None:
        if self._binary is None and (rest := self._decode(b"", True)):
            self._stream.write(rest)
            self._flush()

    def _flush(self) -> None:
        flush = getattr(self._binary if self._binary is not None else self._stream, "flush", None)
        if flush is not None:
            flush()


def _write_all(stream: Any, data: bytes) -> None:
    """Write all of `data`; a raw stream may take less at a time, and says how much."""
    view = memoryview(data)
    while view:
        taken = stream.write(view)
        view = view[len(view) if taken is None else taken :]
