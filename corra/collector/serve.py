"""The process of `corra serve`: it listens, and ends without losing what it has taken."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import logging
import os
import signal
import socket
import ssl
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio.to_thread
import uvicorn
from starlette.types import ASGIApp
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from corra.errors import CorraError, Misuse

from . import notices, tokens, webhooks
from .app import Api
from .limits import Limits
from .notices import Hook
from .protocol import HEAD_S, protocol_for, room
from .store import Store

# Longer than a courier's pause between two batches of output, so that it keeps its connection.
KEEP_ALIVE_S = 75
LEAVE_S = 20
PRUNE_S = 3600.0
NOTICES_S = 2.0
# How long an event stream may outlive its token.
REVOKED_S = 2.0
KEEP_S = 90 * 86400.0


class NotServed(CorraError):
    """The collector could not begin."""

    fate = "NOT SERVED"


@dataclass(frozen=True)
class ServeSettings:
    """The flags of `corra serve`."""

    host: str = "127.0.0.1"
    port: int = 8050
    database: str = ""
    tls_cert: str | None = None
    tls_key: str | None = None
    keep_s: float = KEEP_S
    max_bytes: int | None = None
    limits: Limits = field(default_factory=Limits)
    hooks: Sequence[Hook] = ()
    log_requests: bool = False

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.tls_cert else 'http'}://{host}:{self.port}"


def serve_settings(
    *,
    listen: str = "127.0.0.1:8050",
    database: str | None = None,
    tls_cert: str | None = None,
    tls_key: str | None = None,
    insecure: bool = False,
    keep_s: float | None = None,
    max_bytes: int | None = None,
    limits: Limits | None = None,
    webhook: Sequence[str] = (),
    log_requests: bool = False,
) -> ServeSettings:
    """Return the settings for those flags.

    Raises Misuse for an address beyond this machine without TLS and without `insecure`.
    """
    host, colon, port = listen.rpartition(":")
    if not colon or not port.isdecimal() or int(port) > 65535:
        raise Misuse(f"not HOST:PORT: {listen!r}", fate=NotServed.fate)
    host = host.strip("[]") or "127.0.0.1"
    if bool(tls_cert) != bool(tls_key):
        raise Misuse("--tls-cert and --tls-key belong together", fate=NotServed.fate)
    if not tls_cert and not insecure and not is_loopback(host):
        raise Misuse(
            f"{host} is not this machine alone, and there is no TLS: "
            "tokens would travel in the clear",
            fate=NotServed.fate,
            hint=[
                "--tls-cert FILE --tls-key FILE",
                "or --insecure, where something in front of it does TLS",
            ],
        )
    return ServeSettings(
        host,
        int(port),
        database or default_database(),
        tls_cert,
        tls_key,
        KEEP_S if keep_s is None else keep_s,
        max_bytes,
        limits or Limits(),
        tuple(notices.parse_hook(each) for each in webhook),
        log_requests,
    )


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def default_database() -> str:
    state = os.environ.get("XDG_STATE_HOME", "")
    root = Path(state) if os.path.isabs(state) else Path.home() / ".local" / "state"
    return str(root / "corra" / "collector.sqlite3")


def opened_store(database: str, **how: Any) -> Store:
    """Return the Store at `database`. Raises NotServed."""
    import sqlalchemy as sa

    try:
        return Store(database, **how)
    except (OSError, sa.exc.SQLAlchemyError) as error:
        why = str(getattr(error, "orig", None) or error).splitlines()[0]
        raise NotServed(f"{database}: {why}") from error


def new_token(database: str, text: str) -> str:
    """Make a token `NAME=SCOPES`, whether or not a server runs."""
    name, scopes = tokens.parse_token_spec(text)
    store = opened_store(database)
    try:
        return store.new_token(name, scopes)
    finally:
        store.close()


def revoke(database: str, name: str) -> int:
    store = opened_store(database)
    try:
        return store.revoke(name)
    finally:
        store.close()


class _Server(uvicorn.Server):
    """uvicorn's server. It ends the event streams before it waits for the other requests."""

    def __init__(self, config: uvicorn.Config, api: Api) -> None:
        super().__init__(config)
        self._api = api

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Answer TERM and INT with an orderly end.

        uvicorn's own method raises the signal again afterwards, and nothing would be closed.
        """
        before = {
            number: signal.signal(number, self.handle_exit)
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        logging.getLogger("corra.collector").info("stopping")
        if self._api.watchers is not None:
            self._api.watchers.close()
        await super().shutdown(sockets)


class _Lines(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        stamp = (
            time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            + f".{int(record.msecs):03}+00:00"
        )
        line = {
            "time": stamp,
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "facts", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


def serve_collector(told: ServeSettings, ready: Callable[[ServeSettings, Store], None]) -> None:
    """Serve until TERM or INT; call `ready` once the server listens. Raises NotServed."""
    _log_to_stderr()
    store = opened_store(told.database, limits=told.limits, hooks=told.hooks)
    try:
        try:
            listener = socket.create_server(
                (told.host, told.port),
                family=socket.AF_INET6 if ":" in told.host else socket.AF_INET,
                backlog=2048,
            )
        except OSError as error:
            raise NotServed(f"can't listen at {told.host}:{told.port}: {error.strerror}") from error
        api = Api(store, log_requests=told.log_requests)
        config = uvicorn.Config(
            api.front(_behind_proxy),
            interface="asgi3",
            proxy_headers=False,
            http=protocol_for(room()),  # type: ignore[arg-type]
            ws="none",
            loop="uvloop",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=LEAVE_S,
            ssl_certfile=told.tls_cert,
            ssl_keyfile=told.tls_key,
        )
        try:
            config.load()
        except (OSError, ssl.SSLError) as error:
            raise NotServed(f"TLS: {told.tls_cert}, {told.tls_key}: {error}") from error
        with listener:
            where = listener.getsockname()
            ready(ServeSettings(**{**vars(told), "port": where[1]}), store)
            _run(_Server(config, api), listener, told, store, api)
    finally:
        store.close()
    logging.getLogger("corra.collector").info("stopped")


def _behind_proxy(app: ASGIApp) -> ASGIApp:
    """Believe the headers of a proxy on this machine, or at $FORWARDED_ALLOW_IPS.

    uvicorn's own option would look at them for each append, too.
    """
    trusted = os.environ.get("FORWARDED_ALLOW_IPS", "127.0.0.1")
    return ProxyHeadersMiddleware(app, trusted_hosts=trusted)  # type: ignore[arg-type, return-value]


def _run(
    server: _Server, listener: socket.socket, told: ServeSettings, store: Store, api: Api
) -> None:
    import uvloop

    class Loop(uvloop.Loop):
        """uvloop's loop with our deadline for a TLS handshake, which uvicorn leaves at 60 s."""

        async def create_server(self, *args: Any, ssl: Any = None, **how: Any) -> Any:
            if ssl is not None:
                how["ssl_handshake_timeout"] = HEAD_S
            return await super().create_server(*args, ssl=ssl, **how)

    async def main() -> None:
        chores = [
            _chore(PRUNE_S, lambda: store.prune(told.keep_s, told.max_bytes)),
            _chore(REVOKED_S, api.end_revoked),
        ]
        if told.hooks:
            chores.append(_chore(NOTICES_S, lambda: webhooks.send_due(store)))
        tasks = [asyncio.create_task(each) for each in chores]
        await server.serve(sockets=[listener])
        for task in tasks:
            task.cancel()

    uvloop.run(main(), loop_factory=Loop)


async def _chore(every_s: float, do: Callable[[], Any]) -> None:
    while True:
        try:
            await anyio.to_thread.run_sync(do)
        except Exception:
            logging.getLogger("corra.collector").exception("a chore failed")
        await asyncio.sleep(every_s)


def _log_to_stderr() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Lines())
    for name, level in (("corra.collector", logging.INFO), ("uvicorn", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)
