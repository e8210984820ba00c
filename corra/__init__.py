"""Programs on remote hosts that outlive the connection: start, watch, stop and reattach to them.

    import corra

    result = corra.run("db1", ["pg_dump", "-Fc", "-f", "/b/x"], timeout="2h")
    nightly = corra.start("ops@db1", ["./migrate", "--all"], name="migrate")
    corra.attach("migrate").wait()

A name is imported at its first use, so that `import corra` costs nothing in a tasks.py, which every
completion loads.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .errors import (
        Ambiguous,
        Auth,
        Changed,
        Conflict,
        CorraError,
        Failed,
        HostKey,
        Lost,
        MaybeStarted,
        Misuse,
        NoPython,
        NoRoom,
        NotDead,
        NotFound,
        NotKilled,
        NotSent,
        NotStarted,
        StillRunning,
        Stop,
        TimedOut,
        Unreachable,
    )
    from .fleets.finding import attach_fleet
    from .fleets.fleet import Fleet
    from .fleets.making import fleet
    from .fleets.result import FleetKilled, FleetResult
    from .fleets.rolling import Rolling
    from .fleets.standing import FleetEvent, Said, Standing, Wrote
    from .inventory.groups import hosts
    from .model.frames import Gap, Output, Status, Taken
    from .model.host import Host
    from .model.host_sets import Hosts, fold, waves
    from .model.program import OPEN, Program
    from .model.state import State
    from .on_host.agent.contract import VERSION as __version__  # noqa: N811 - the name every package has
    from .runbooks.runbook import Runbook, runbook
    from .runbooks.step import Reboot
    from .runs.events import Event, LinkDown, LinkUp, SignalPassed, Tick
    from .runs.finding import attach, ps
    from .runs.follow import Follow
    from .runs.request import Launch, launch
    from .runs.result import Result, Results
    from .runs.run import Killed, Run
    from .runs.starting import run, start

_HOMES = {
    "errors": "Ambiguous Auth Changed Conflict CorraError Failed HostKey Lost MaybeStarted Misuse"
    " NoPython NoRoom NotDead NotFound NotKilled NotSent NotStarted StillRunning Stop"
    " TimedOut Unreachable",
    "fleets.finding": "attach_fleet",
    "fleets.fleet": "Fleet",
    "fleets.making": "fleet",
    "fleets.result": "FleetKilled FleetResult",
    "fleets.rolling": "Rolling",
    "fleets.standing": "FleetEvent Said Standing Wrote",
    "inventory.groups": "hosts",
    "model.frames": "Gap Output Status Taken",
    "model.host": "Host",
    "model.host_sets": "Hosts fold waves",
    "model.program": "OPEN Program",
    "model.state": "State",
    "runbooks.runbook": "Runbook runbook",
    "runbooks.step": "Reboot",
    "runs.events": "Event LinkDown LinkUp SignalPassed Tick",
    "runs.finding": "attach ps",
    "runs.follow": "Follow",
    "runs.request": "Launch launch",
    "runs.result": "Result Results",
    "runs.run": "Killed Run",
    "runs.starting": "run start",
}
_HOME = {name: module for module, names in _HOMES.items() for name in names.split()}

__all__ = [
    "OPEN",
    "Ambiguous",
    "Auth",
    "Changed",
    "Conflict",
    "CorraError",
    "Event",
    "Failed",
    "Fleet",
    "FleetEvent",
    "FleetKilled",
    "FleetResult",
    "Follow",
    "Gap",
    "Host",
    "HostKey",
    "Hosts",
    "Killed",
    "Launch",
    "LinkDown",
    "LinkUp",
    "Lost",
    "MaybeStarted",
    "Misuse",
    "NoPython",
    "NoRoom",
    "NotDead",
    "NotFound",
    "NotKilled",
    "NotSent",
    "NotStarted",
    "Output",
    "Program",
    "Reboot",
    "Result",
    "Results",
    "Rolling",
    "Run",
    "Runbook",
    "Said",
    "SignalPassed",
    "Standing",
    "State",
    "Status",
    "StillRunning",
    "Stop",
    "Taken",
    "Tick",
    "TimedOut",
    "Unreachable",
    "Wrote",
    "__version__",
    "attach",
    "attach_fleet",
    "fleet",
    "fold",
    "hosts",
    "launch",
    "ps",
    "run",
    "runbook",
    "start",
    "waves",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from .on_host.agent.contract import VERSION

        return VERSION
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
