"""`corra deliver`: send a run's output and end to its collector once more."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from invoke.context import Context

from corra.errors import CorraError

from . import collectors, selection
from .flags import DeliverFlags
from .verb import verb
from .words import refuse_without_id


@verb(DeliverFlags, ids="ID..", fate="NOT DELIVERED")
def deliver(c: Context, given: DeliverFlags) -> int:
    """Send a run's reports once more, or to another collector

        inv deliver k7m2qx
        inv deliver --to audit k7m2qx

    A courier that is waiting tries at once. Exits 0 when the collector has acknowledged all output.
    """
    refuse_without_id(given)
    worst = 0
    for text in given.ids:
        try:
            _deliver(c, given, text)
        except CorraError as error:
            given.screen.error(deliver.with_fate(error))
            worst = max(worst, error.code)
    return worst


def _deliver(c: Context, given: DeliverFlags, text: str) -> None:
    found = selection.find_run(c, given, text, limit_s=given.timeout)
    callback: Mapping[str, Any] | None = None
    if given.to:
        collector = collectors.named_collector(c, given.to)
        made = collector.admit(found.state(), str(found.host))
        callback = collector.callback(found.id, made)
    if given.dry:
        given.screen.note(
            found.label,
            str(found.host),
            f"would be delivered{' to ' + given.to if given.to else ''}",
        )
        return
    answer = found.deliver(callback=callback, start=given.start, seconds=given.timeout)
    report = answer.get("delivered") or {}
    facts: dict[str, Any] = {"label": found.label, "host": str(found.host), "prog_id": found.id}
    if report.get("error"):
        raise CorraError(str(report["error"]), fate="NOT DELIVERED", **facts)
    if not report:
        raise CorraError("its courier gave no answer", fate="NOT DELIVERED", **facts)
    if given.json:
        given.screen.event("delivered", host=str(found.host), prog_id=found.id, **report)
        return
    from corra.model import units

    amount = " and ".join(
        f"{name} {units.decimal_size(size)}"
        for name, size in sorted((report.get("acked") or {}).items())
    )
    end = "and its end" if report.get("completed") else "so far; it goes on"
    given.screen.note(found.label, str(found.host), f"delivered: {amount} {end}")
