"""The verbs around callbacks that only `corra` has: `serve`, the collector, and `deliver`, sending again by hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from invoke.context import Context

from . import reporting, selection
from .errors import CorraError, Misuse
from .flags import HOST, REACH, seconds
from .verb import Given, listing, option, switch, verb

if TYPE_CHECKING:
    from .collector.serve import Settings

_NEEDED = (
    "alembic",
    "httptools",
    "prometheus_client",
    "sqlalchemy",
    "starlette",
    "uvicorn",
    "uvloop",
)


def _offset(text: str) -> int:
    if not text.isdecimal():
        raise ValueError(text)
    return int(text)


@verb(
    option("listen", default="127.0.0.1:8050", help="HOST:PORT (127.0.0.1:8050)."),
    option(
        "database",
        help="Where the data is: a path (collector.sqlite3 beside this machine's history).",
    ),
    option(
        "tls-cert", help="The certificate, in PEM, with what stands between it and its authority."
    ),
    option("tls-key", help="Its key."),
    switch(
        "insecure", help="Leave this machine without TLS, where something in front of it does that."
    ),
    option("keep", read=seconds, help="How long an ended run is kept (90d)."),
    option("max-size", help="Then the oldest, until no more than this is kept (no limit)."),
    option(
        "limits", default="", help="What one token may cost: body=4M,rate=1000,runs=10000,disk=64G."
    ),
    listing("webhook", help="URL, or slack=URL, that is told of each end; repeatable."),
    switch("log-requests", help="A line for each request."),
    option(
        "new-token",
        help="Make a token and leave: NAME=read,write, or NAME=read:host=db* for a part of it.",
    ),
    option(
        "revoke-token",
        help="Take back the tokens of this NAME, and those of the runs registered with them.",
    ),
    fate="NOT SERVED",
)
def serve(c: Context, given: Given) -> int:
    """Be a collector: keep what runs report, and answer for them: corra serve

    Ends at TERM or Ctrl-C, when it has finished what it has taken. Its log is JSON, a line each, on stderr.
    """
    _needed()
    from .collector import serve as collector

    database = given.database or collector.default_database()
    if given.new_token:
        given.screen.lines([collector.new_token(database, given.new_token)])
        given.screen.note(
            "",
            "",
            "shown this once; it goes into corra.collectors of ~/.invoke.yaml, or $CORRA_COLLECTOR_TOKEN",
        )
        return 0
    if given.revoke_token:
        count = collector.revoke(database, given.revoke_token)
        if not count:
            raise CorraError(f"no token is called {given.revoke_token}", fate="NOT REVOKED")
        given.screen.note("", "", f"{given.revoke_token}: taken back")
        return 0
    told = collector.settings(
        listen=given.listen,
        database=database,
        tls_cert=given.tls_cert,
        tls_key=given.tls_key,
        insecure=given.insecure,
        keep_s=given.keep,
        max_size=given.max_size,
        limits=given.limits,
        webhook=given.webhook,
        log_requests=given.log_requests,
    )

    def ready(now: Settings, _: object) -> None:
        given.screen.note("", "", f"listening at {now.url}")
        given.screen.note("", "", f"data in {now.database}")
        where = f" --database {now.database}" if given.database else ""
        given.screen.note("", "", f"a token:  corra serve{where} --new-token NAME=read,write")

    given.screen.close()
    collector.serve(told, ready)
    return 0


def _needed() -> None:
    """Raise CorraError with the command that installs what isn't there."""
    from importlib.util import find_spec
    from pathlib import Path

    missing = [name for name in _NEEDED if find_spec(name) is None]
    if not missing:
        return
    root = Path(__file__).resolve().parent.parent
    command = "pip install 'corra[collector]'"
    if (root / "constraints.txt").exists():
        command = f"{root}/.venv/bin/pip install -c {root}/constraints.txt -e '{root}[collector]'"
    raise CorraError(
        f"the collector's own packages are missing: {', '.join(missing)}",
        fate="NOT SERVED",
        hint=[command],
    )


@verb(
    HOST,
    *REACH,
    option(
        "to",
        help="Another collector: its name in the configuration, or its URL with $CORRA_COLLECTOR_TOKEN.",
    ),
    option(
        "from",
        read=_offset,
        help="Send again from this byte of each stream (what is acknowledged).",
    ),
    option("timeout", "T", read=seconds, default=60.0, help="How long it may take (60s)."),
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
    found = selection.find(c, given, text)
    callback: Mapping[str, Any] | None = None
    if given.to:
        collector = reporting.named(c, given.to)
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
    from . import render

    amount = " and ".join(
        f"{name} {render.size(size)}" for name, size in sorted((report.get("acked") or {}).items())
    )
    end = "and its end" if report.get("completed") else "so far; it goes on"
    given.screen.note(found.label, str(found.host), f"delivered: {amount} {end}")
