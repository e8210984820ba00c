"""How a run ended, as Fabric's own results say it, with what only corra knows.

Importing this imports fabric (85 ms), so nobody does before there is a result.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

import fabric.runners

from corra.errors import CorraError
from corra.model.host import Host
from corra.model.state import State, exit_code


class Result(fabric.runners.Result):  # type: ignore[misc] # fabric has no hints
    """An Invoke and Fabric result of a run that has ended.

    `exited` is corra's exit code: the program's own, 128+N for signal N, 123 lost, 124 timeout, 125
    to 127 not started. `truncated`: `stdout` and `stderr` don't hold everything; `Run.read` does.
    `skipped`: a runbook's step that an operator left out; the rest is of its last try, if any.
    """

    prog_id: str
    host: Host
    state: State
    truncated: bool
    skipped: bool

    def __init__(
        self,
        state: State,
        host: Host,
        *,
        stdout: str = "",
        stderr: str = "",
        hide: tuple[str, ...] = (),
        truncated: bool = False,
        skipped: bool = False,
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
        self.skipped = skipped

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
        return (
            f"<Result {self.state.label} on {self.host}: {self.state.state} exited={self.exited}>"
        )


class Results(dict[Host, Result]):
    """The results of a step on several hosts, in the hosts' order.

    `unreached`: the error of each host that has no result.
    """

    def __init__(
        self,
        results: Mapping[Host, Result] | None = None,
        *,
        unreached: Mapping[Host, CorraError] | None = None,
    ) -> None:
        super().__init__(results or {})
        self.unreached: dict[Host, CorraError] = dict(unreached or {})

    def __getitem__(self, host: Host | str) -> Result:
        """Return the result of a host, which may be given as its text."""
        return super().__getitem__(Host.parse(host) if isinstance(host, str) else host)

    @property
    def ok(self) -> bool:
        """Whether all ended well, and none is missing."""
        return not self.unreached and all(result.ok for result in self.values())

    @property
    def failed(self) -> Results:
        """Those that ended badly."""
        return Results({host: result for host, result in self.items() if result.failed})

    @property
    def succeeded(self) -> Results:
        """Those that ended well."""
        return Results({host: result for host, result in self.items() if result.ok})
