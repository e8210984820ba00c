"""`corra deliver`: send a run's output and end to its collector once more."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from invoke.context import Context

from corra.errors import CorraError, Misuse

from . import collectors, selection
from .flags import HOST_FLAG, REACH_FLAGS
from .readers import read_seconds
from .verb import verb
from .words import Given, option


def _offset(text: str) -> int:
    if not text.isdecimal():
        raise ValueError(text)
    return int(text)


@verb(
    HOST_FLAG,
    *REACH_FLAGS,
    option(
        "to",
        help="Another collector: its name in the configuration, or its URL with $CORRA_COLLECTOR_TOKEN.",
    ),
    option(
        "from",
        read=_offset,
        help="Send again from this byte of each stream (what is acknowledged).",
    ),
    option("timeout", "T", read=read_seconds, default=60.0, help="How long it may take (60s)."),
    ids=True,
    fate="NOT DELIVERED",
)
def deliver(c: Context, given: Given) -> int:
    """Send a run's reports once more, or to another collector: corra deliver ID..

    A courier that is waiting tries at once. Exits 0 when all there is has been acknowledged.
    """
    if not given.ids:
        raise Misuse("deliver needs an id", fate="NOT DELIVERED")
    worst = 0
    for text in given.ids:
        try:
            _deliver(c, given, text)
        except CorraError as error:
            given.screen.error(error)
            worst = max(worst, error.code)
    return worst


def _deliver(c: Context, given: Given, text: str) -> None:
    found = selection.find_run(c, given, text)
    callback: Mapping[str, Any] | None = None
    if given.to:
        collector = collectors.named_collector(c, given.to)
        made = collector.admit(found.state(), str(found.host))
        callback = collector.callback(found.id, made)
    begin = vars(given)["from"]  # a word of Python's
    if given.dry:
        given.screen.note(
            found.label,
            str(found.host),
            f"would be delivered{' to ' + given.to if given.to else ''}",
        )
        return
    answer = found.deliver(callback=callback, start=begin, seconds=given.timeout)
    report = answer.get("delivered") or {}
    facts: dict[str, Any] = {"label": found.label, "host": str(found.host), "prog_id": found.id}
    if report.get("error"):
        raise CorraError(str(report["error"]), fate="NOT DELIVERED", **facts)
    if not report:
        raise CorraError("its courier gave no answer", fate="NOT DELIVERED", **facts)
    if given.json:
        given.screen.event("delivered", host=str(found.host), prog_id=found.id, **report)
        return
    from corra.model import words

    amount = " and ".join(
        f"{name} {words.decimal_size(size)}"
        for name, size in sorted((report.get("acked") or {}).items())
    )
    end = "and its end" if report.get("completed") else "so far; it goes on"
    given.screen.note(found.label, str(found.host), f"delivered: {amount} {end}")
