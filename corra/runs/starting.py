"""Starting runs, from `corra.start`, `corra.run` and `inv again`.

A target is a fabric Connection, a host's name (`db1`, `ops@db1:2222`, `local`) or a Host. A bare
Invoke Context is none: it would mean this machine under `inv` and the other one under `fab`.
"""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from corra.errors import Misuse, NotStarted, typed
from corra.model import ids
from corra.model.ends import end_error, start_error
from corra.model.frames import Gap, Output
from corra.model.hidden import hidden_streams
from corra.model.program import Request
from corra.model.units import in_seconds

from .asking import who_asks
from .patience import Patience
from .request import Launch, StartOptions, launch, new_run_id
from .run import OnEvent, Run

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .result import Result


def again(
    run: Run,
    *,
    id: str | None = None,  # noqa: A002
    secrets: Mapping[str, str] | None = None,
) -> tuple[Launch, str | None]:
    """Return the Launch of the same program on the same host, and the URL the old run reported to.

    The host's record says what is started: words, directory, given variables, stdin, limits and
    name. The login's own environment is that of now. The record has no secrets: they must be given
    again. Raises NotStarted where the old run goes on, a secret is missing, or the stdin is gone.
    """
    prog_id = new_run_id(id)
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
        give = f"{typed()} again {flags} {ids.short(state.prog_id)}"
        raise NotStarted(
            f"nobody has kept its secret{'s' * (len(missing) != 1)} {', '.join(missing)}",
            hint=[f"give it again:  {give}      (or --secret NAME=FILE)"],
            **facts,
        )
    if isinstance(stdin, Mapping) and "bytes" in stdin and len(given) != stdin["bytes"]:
        raise NotStarted("what it read is gone from the host: use run", **facts)
    try:
        request = Request.from_record(
            record, prog_id, origin=who_asks(), secrets=dict(secrets or {}), spool=run.spool
        )
    except Misuse as error:
        raise NotStarted(error.why, **facts) from error
    payload = io.BytesIO(given) if isinstance(stdin, Mapping) and "bytes" in stdin else None
    return Launch(run.agent, request, payload, run.via, run.connection), (
        record.get("callback") or {}
    ).get("url")


def start(
    target: Any,
    argv: Sequence[str],
    *,
    reconnect_timeout: float | str | None = None,
    watch: OnEvent | None = None,
    **options: Unpack[StartOptions],
) -> Run:
    """Start `argv` on `target` and return as soon as the host has confirmed it.

    The same `id` again is the same run, so a start that raised MaybeStarted may be repeated with
    its id. `watch` gets each LinkDown and LinkUp. Raises NotStarted, Unreachable, MaybeStarted,
    Misuse.
    """
    starting = launch(target, argv, **options)
    follow = starting.follow(_patience(reconnect_timeout), stay=False)
    with contextlib.closing(starting):
        for event in follow:
            if watch is not None:
                watch(event)
    state = follow.state
    if state is not None and state.state == "not_started":
        raise start_error(state, str(follow.host))
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
    watch: OnEvent | None = None,
    **options: Unpack[StartOptions],
) -> Result:
    """Start `argv` on `target`, show its output as it comes, and return its Result at its end.

    `hide` (True, "out" or "err"), `warn`, `out_stream` and `err_stream` are Invoke's. A stream that
    takes bytes gets the program's bytes; one that takes text gets them decoded as UTF-8. Ctrl-C
    leaves the program running. Raises Failed, TimedOut and Lost unless `warn`; NotStarted,
    Unreachable, MaybeStarted, StillRunning and Misuse always.
    """
    from .result import Result

    hidden = hidden_streams(hide)
    starting = launch(target, argv, **options)
    follow = starting.follow(_patience(reconnect_timeout))
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
        raise start_error(follow.state, str(follow.host))
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
    reached = starting.run.reached
    error = end_error(follow.state, str(follow.host), result, reached=reached)
    if error is not None and not warn:
        raise error
    return result


def _patience(reconnect_timeout: float | str | None) -> Patience:
    return Patience(reconnect_timeout_s=in_seconds(reconnect_timeout))


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
