"""How a run ended, as Fabric's own results say it, with what only corra knows.

Importing this imports fabric (85 ms), so nobody does before there is a result.
"""

from __future__ import annotations

import shlex
from typing import Any

import fabric.runners

from .program import Host
from .state import State, exit_code


class Result(fabric.runners.Result):  # type: ignore[misc] # fabric has no hints
    """An Invoke and Fabric result of a run that has ended.

    `exited` is corra's exit code: the program's own, 128+N for signal N, 123 lost, 124 timeout, 125 to 127 not started.
    `truncated`: `stdout` and `stderr` don't hold everything; `Run.read` does.
    """

    prog_id: str
    host: Host
    state: State
    truncated: bool

    def __init__(
        self,
        state: State,
        host: Host,
        *,
        stdout: str = "",
        stderr: str = "",
        hide: tuple[str, ...] = (),
        truncated: bool = False,
        connection: Any = None,
    ) -> None:
        super().__init__(
            connection=connection,
            command=shlex.join(state.argv),
            stdout=stdout,
            stderr=stderr,
            encoding="utf-8",
            exited=exit_code(state),
            hide=hide,
        )
        self.prog_id = state.prog_id
        self.host = host
        self.state = state
        self.truncated = truncated

    @property
    def reason(self) -> str | None:
        """Why it ended: exited, signaled, timeout, reboot, ... (State.reason)."""
        return self.state.reason

    @property
    def signal(self) -> str | None:
        """The signal that ended it, as SIGKILL; None when it exited."""
        return self.state.signal

    @property
    def elapsed(self) -> float | None:
        """Seconds from start to end by the host's clock."""
        return self.state.elapsed

    def __repr__(self) -> str:
        return f"<Result {self.state.label} on {self.host}: {self.state.state} exited={self.exited}>"
