"""Collectors for the verbs: have a run report to one, and show the runs that one has."""

from __future__ import annotations

import contextlib
import shlex
from typing import TYPE_CHECKING

from invoke.context import Context

from corra.errors import Misuse

from . import selection
from .chosen import choose_hosts
from .flags import AttachFlags, PsFlags, TunnelFlags

if TYPE_CHECKING:
    from corra.collector.client import Collector
    from corra.model.state import State
    from corra.runs.request import Launch
    from corra.runs.run import Run


def named_collector(c: Context, name: str) -> Collector:
    """Return the collector of that name in the configuration. Raises Misuse."""
    from corra.collector.client import Collector
    from corra.settings import setting

    return Collector.named(name, setting(c.config, "collectors"))


def register(c: Context, name: str, launch: Launch) -> Launch:
    """Make a run known to that collector and return its Launch with a callback there."""
    return named_collector(c, name).register(launch)


def led_through_ssh(
    c: Context, given: TunnelFlags, run: Run
) -> contextlib.AbstractContextManager[None]:
    """Return a context that leads the run's reports through our connection, if flags say so."""
    if not given.callback_through_ssh:
        return contextlib.nullcontext()
    if not given.collector:
        raise Misuse("--callback-through-ssh needs --collector NAME")
    from corra.collector.tunnel import led_to_collector

    return led_to_collector(run, named_collector(c, given.collector).url, run.agent.runner)


def attach_by_collector(c: Context, given: AttachFlags, name: str, tail: int | None) -> int:
    """Show a run's output as the collector has it, and go on live."""
    from corra.terminal.watch import Watch

    if len(given.ids) > 1:
        raise Misuse(f"one id at a time: {' '.join(given.ids)}", fate="NOT DONE")
    if given.host or given.sig_proxy:
        raise Misuse(
            "--collector excludes --host and --sig-proxy: a collector only listens", fate="NOT DONE"
        )
    found = named_collector(c, name).find(given.ids[0] if given.ids else None)
    streams = None if given.stream in (None, "both") else [given.stream]
    follow = found.follow(tail=tail, timeout_s=given.timeout, streams=streams)
    watch = Watch(
        follow,
        found,
        given.screen,
        hide=given.hide,
        stamps=given.timestamps,
        tail=tail,
        again=f" --collector {shlex.quote(name)}",
    )
    state = watch.stay()
    return 0 if state is None else watch.outcome(state)


def collected_states(c: Context, given: PsFlags, name: str) -> list[State]:
    """Return a collector's runs, those of --host where it is given."""
    import time

    collector = named_collector(c, name)
    hosts: list[str | None] = [*choose_hosts(c, given, given.host)] or [None]
    counts = selection.since(given)
    since = None if counts is None else time.time() - counts
    return [state for host in hosts for state in collector.runs(host=host, since=since)]
