"""What the verbs do with a collector: have a run report to one, and show what one has."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from invoke.context import Context

from .errors import Misuse
from .verb import Given

if TYPE_CHECKING:
    from .collected import Collector
    from .control import Run
    from .starting import Launch
    from .state import State


def named(c: Context, name: str) -> Collector:
    """Return the collector that the configuration calls so. Raises Misuse."""
    from .collected import Collector
    from .settings import setting

    return Collector.named(name, setting(c.config, "collectors"))


def register(c: Context, given: Given, launch: Launch) -> Launch:
    """Make a run known to --collector and return its Launch with a callback there."""
    return named(c, given.collector).register(launch)


def led(c: Context, given: Given, run: Run) -> contextlib.AbstractContextManager[None]:
    """Return what leads the run's reports through our connection where that was asked for."""
    if not given.callback_through_ssh:
        return contextlib.nullcontext()
    if not given.collector:
        raise Misuse("--callback-through-ssh needs --collector NAME")
    from .forward import led as through

    return through(run, named(c, given.collector).url, run.agent.runner)


def attach(c: Context, given: Given, tail: int | None) -> int:
    """Show a run as the collector has it, and go on live."""
    from .watch import Gone, Watch

    if len(given.ids) > 1:
        raise Misuse(f"one id at a time: {' '.join(given.ids)}", fate="NOT DONE")
    if given.host or given.sig_proxy:
        raise Misuse(
            "--collector excludes --host and --sig-proxy: a collector only listens", fate="NOT DONE"
        )
    found: Any = named(c, given.collector).find(given.ids[0] if given.ids else None)
    streams = None if given.stream in (None, "both") else [given.stream]
    follow: Any = found.follow(tail=tail, timeout_s=given.timeout, streams=streams)
    watch = Watch(follow, found, given.screen, hide=given.hide, stamps=given.timestamps, tail=tail)
    try:
        state = watch.stay()
    except Gone:
        return watch.gone()
    return 0 if state is None else watch.outcome(state)


def states(c: Context, given: Given) -> list[State]:
    """Return the runs that a collector has, of --host where given."""
    import time

    collector = named(c, given.collector)
    hosts: list[str | None] = [name for each in given.host for name in each.split(",") if name] or [
        None
    ]
    since = None if given.all else time.time() - given.since
    return [state for host in hosts for state in collector.runs(host=host, since=since)]
