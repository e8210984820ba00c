"""A start before it happens: the options of a run, and the Launch made of them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from typing import IO, TYPE_CHECKING, Any, BinaryIO, NamedTuple

from corra.errors import Misuse
from corra.model import ids
from corra.model.limits import parse_limits as read_limits
from corra.model.program import OPEN, Open, Program, Request, argv_words
from corra.model.signal_names import signal_name
from corra.model.state import State
from corra.model.units import in_seconds, output_kept
from corra.remote.agent_client import Agent
from corra.remote.bootstrap import courier_source
from corra.remote.targets import Reach, agent_for, is_a

from . import history
from .asking import asked_by, who_asks
from .follow import Follow
from .run import Run
from .stdin_file import payload_of

if TYPE_CHECKING:
    from typing_extensions import Unpack

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
        fresh = history.begin_entry(
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
            by=asked_by(),
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
                    history.forget_run(prog_id)
            elif state.state not in known:
                known.append(state.state)
                history.note_state(prog_id, state.state)

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
    prog_id = new_run_id(id)
    agent = agent_for(target, **reach)
    if cwd is None and agent.host.is_local:
        cwd = os.getcwd()
    described, payload = (
        ({"open": True}, None) if stdin is OPEN else payload_of(stdin, named=id is not None)
    )
    if pty and stdin is OPEN:
        described = None
    program = Program(
        argv_words(argv),
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
        origin={**who_asks(), **(origin or {})},
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


def new_run_id(given: str | None) -> str:
    if given is not None and not ids.is_valid(given):
        raise Misuse(
            f"not an id: {given!r} (a-z, 0-9, '.', '_', '-', at most 64, the first a letter or digit)"
        )
    return given or ids.new_id()


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
