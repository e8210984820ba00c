"""`corra serve`: the collector, from the command line."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from invoke.context import Context

from corra.errors import CorraError, typed

from .flags import ServeFlags
from .verb import verb

if TYPE_CHECKING:
    from corra.collector.serve import ServeSettings

_PACKAGES = (
    "alembic",
    "httptools",
    "prometheus_client",
    "sqlalchemy",
    "starlette",
    "uvicorn",
    "uvloop",
)


@verb(ServeFlags, fate="NOT SERVED")
def serve(c: Context, given: ServeFlags) -> int:
    """Be a collector: keep what runs report, and answer about them

        inv serve --new-token team=read,write
        inv serve --listen 0.0.0.0:8050 --tls-cert c.pem --tls-key k.pem

    TERM or Ctrl-C ends it, once it has finished what it has taken. It logs JSON lines to stderr.
    """
    _check_packages()
    from corra.collector import serve

    database = given.database or serve.default_database()
    if given.new_token:
        given.screen.lines([serve.new_token(database, given.new_token)])
        given.screen.note(
            "",
            "",
            "shown this once; it goes into corra.collectors of ~/.invoke.yaml, "
            "or $CORRA_COLLECTOR_TOKEN",
        )
        return 0
    if given.revoke_token:
        count = serve.revoke(database, given.revoke_token)
        if not count:
            raise CorraError(f"no token is called {given.revoke_token}", fate="NOT REVOKED")
        given.screen.note("", "", f"{given.revoke_token}: revoked")
        return 0
    told = serve.serve_settings(
        listen=given.listen,
        database=database,
        tls_cert=given.tls_cert,
        tls_key=given.tls_key,
        insecure=given.insecure,
        keep_s=given.keep,
        max_bytes=given.max_size,
        limits=given.limits,
        webhook=given.webhook,
        log_requests=given.log_requests,
    )

    def ready(now: ServeSettings, _: object) -> None:
        given.screen.note("", "", f"listening at {now.url}")
        given.screen.note("", "", f"data in {now.database}")
        where = f" --database {now.database}" if given.database else ""
        given.screen.note("", "", f"a token:  {typed()} serve{where} --new-token NAME=read,write")

    given.screen.close()
    serve.serve_collector(told, ready)
    return 0


def _check_packages() -> None:
    """Raise CorraError, with the command that installs them, if packages are missing."""
    from importlib.util import find_spec
    from pathlib import Path

    missing = [name for name in _PACKAGES if find_spec(name) is None]
    if not missing:
        return
    root = Path(__file__).resolve().parents[2]
    command = f"{sys.executable} -m pip install {' '.join(missing)}"
    if (root / "constraints.txt").exists():
        command = f"{root}/.venv/bin/pip install -c {root}/constraints.txt -e '{root}[collector]'"
    raise CorraError(
        f"the collector's own packages are missing: {', '.join(missing)}",
        fate="NOT SERVED",
        hint=[command],
    )
