"""A start before it happens: the options of a run, and the Launch made of them."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import IO, TYPE_CHECKING, Any, BinaryIO, NamedTuple, cast

from corra.errors import Misuse
from corra.model import ids
from corra.model.options import RecordedOptions, read_options
from corra.model.program import OPEN, Open, Program, Request, argv_words
from corra.model.state import State
from corra.remote.agent_client import Agent
from corra.remote.bootstrap import courier_source
from corra.remote.targets import Reach, agent_for, is_a

from . import history
from .asking import asked_by, who_asks
from .follow import PATIENT, Follow, Start
from .patience import Patience
from .run import Run
from .stdin_feed import StdinFeed

if TYPE_CHECKING:
    from typing_extensions import Unpack

Stdin = str | bytes | IO[bytes] | IO[str] | Open | None


class Options(RecordedOptions, Reach, total=False):
    """What may be said of any program beside its command."""

    stdin: Stdin
    secrets: Mapping[str, str] | None
    spool: str | None


class StartOptions(Options, total=False):
    """What may be said of one start; `start` and `run` take a few more for themselves."""

    id: str | None
    name: str | None
    origin: Mapping[str, str] | None
    callback: Mapping[str, Any] | None
    callback_config: Mapping[str, float] | None


class Launch(NamedTuple):
    """A run about to be started: its id is made, its host is known, and nothing has been sent."""

    agent: Agent
    request: Request
    payload: BinaryIO | None = None
    via: str | None = None
    connection: Any = None

    def follow(
        self,
        patience: Patience = PATIENT,
        *,
        stay: bool = True,
        feed: StdinFeed | None = None,
    ) -> Follow:
        """Return the loop that starts the run and, with `stay`, shows it to its end."""
        host, request = self.agent.host, self.request
        # Before the first byte is sent: if the client is killed during the start, its user finds
        # the id in the history and can repeat the start with it.
        fresh = history.begin_entry(
            history.Entry(
                request.prog_id,
                str(host),
                request.name,
                host.as_user,
                self.via,
                request.spool,
                request.program.argv,
                inventory=host.address.source if host.address else None,
            )
        )
        if not fresh:
            self._warn_of_namesake()
        return Follow(
            self.agent,
            request.prog_id,
            patience=patience,
            start=Start(request, stay, self.payload, fresh),
            by=asked_by(),
            feed=feed,
            told=self._told(request.prog_id, fresh=fresh),
        )

    def _warn_of_namesake(self) -> None:
        """Say so where the history has this id for a run on another host, which it keeps."""
        host, prog_id = self.agent.host, self.request.prog_id
        for known in history.find_entries(prog_id):
            if known.prog_id == prog_id and (known.host, known.as_user) != (
                str(host),
                host.as_user,
            ):
                logging.getLogger("corra").warning(
                    "%s: known here as a run on %s; name --host to reach the one on %s",
                    prog_id,
                    known.host,
                    host,
                )

    def _told(self, prog_id: str, *, fresh: bool) -> Callable[[State | None], None]:
        """Return the function that keeps the history up to date with what the Follow is told.

        `fresh`: only this start knows of the run.
        """
        known: list[str] = []

        def note(state: State | None) -> None:
            if state is None:
                if fresh:
                    history.forget_run(prog_id)
            elif state.state not in known:
                known.append(state.state)
                history.note_state(self.agent.host, prog_id, state.state)

        return note

    def close(self) -> None:
        """Let go of the stdin kept for a repeated start. A caller's own file stays open."""
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
            via=self.via,
        )


def launch(target: Any, argv: Sequence[str], **options: Unpack[StartOptions]) -> Launch:
    """Return the Launch of `argv` on `target`. Does no I/O but to read `stdin`.

    `stdin=OPEN` holds stdin open for `Run.send`. `pty` gives the program a terminal of its own,
    which `Run.send` reaches too; its size is (rows, columns), else the size of our own terminal,
    else 24 by 80. The spool keeps what is sent; with `forget_stdin` and with a terminal, only until
    the program has read it. Raises Misuse for a start that no host could make.
    """
    refuse_unknown("launch", options, StartOptions)
    prog_id = new_run_id(options.get("id"))
    agent = agent_for(target, **reach_of(options))
    recorded = read_options(options, "program")
    run = read_options(options, "run")
    if agent.host.is_local:
        recorded["cwd"] = _cwd_here(recorded.get("cwd"))
    stdin, pty, payload = options.get("stdin"), options.get("pty"), None
    if stdin is not None and stdin is not OPEN:
        from .stdin_file import payload_of

        recorded["stdin"], payload = payload_of(stdin, named=options.get("id") is not None)
    elif stdin is OPEN and not pty:
        recorded["stdin"] = {"open": True}
    if pty:
        run["terminal"] = _terminal(pty)
    callback = options.get("callback")
    request = Request(
        prog_id,
        Program(argv_words(argv), **recorded),
        name=options.get("name"),
        origin={**who_asks(), **(options.get("origin") or {})},
        run=run,
        secrets=dict(options.get("secrets") or {}),
        spool=options.get("spool"),
        callback=dict(callback or {}),
        config=dict(options.get("callback_config") or {}),
        courier=courier_source() if callback else None,
    )
    connection = target if is_a(target, "fabric.connection", "Connection") else None
    return Launch(agent, request, payload, options.get("via"), connection)


def _cwd_here(given: str | None) -> str:
    """Return the directory of a program on this machine, where a relative one begins here.

    On another machine it begins at the home. Raises Misuse where this directory is gone.
    """
    if given is not None and given.startswith(("/", "~")):
        return given
    try:
        here = os.getcwd()
    except OSError as error:
        raise Misuse(
            f"this directory can't be had: {error.strerror}; cd elsewhere, or -C"
        ) from error
    return os.path.join(here, given) if given else here


def reach_of(options: Mapping[str, Any]) -> Reach:
    """Return those of `options` that say how the host is reached."""
    return cast("Reach", {name: options[name] for name in Reach.__annotations__ if name in options})


def refuse_unknown(function: str, given: Iterable[str], options: type) -> None:
    """Raise TypeError for a keyword that isn't one of `options`, as Python itself does."""
    for name in given:
        if name not in options.__annotations__:
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}")


def new_run_id(given: str | None) -> str:
    if given is not None and not ids.is_valid(given):
        raise Misuse(
            f"not an id: {given!r}"
            " (a-z, 0-9, '.', '_', '-', at most 64, the first a letter or digit)"
        )
    return given or ids.new_id()


def _terminal(size: bool | Sequence[Any]) -> dict[str, Any]:
    """Return the facts of a program's terminal: of `size`, else of our own terminal's size."""
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
