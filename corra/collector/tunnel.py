"""A way from a host to a collector that the host can't reach itself.

While the client watches, it forwards a port on the host's loopback through its connection. The
courier speaks TLS through that port and checks the collector's certificate as ever, so a program
that takes the port over afterwards gets nothing.
"""

from __future__ import annotations

import contextlib
import select
import socket
import threading
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from corra.errors import CorraError, Misuse
from corra.runs.run import Run
from corra.transport.default import DefaultLink

TUNNEL_CONNECT_S = 15.0
AGAIN_S = 0.3


@contextlib.contextmanager
def led_to_collector(run: Run, url: str, runner: Any) -> Iterator[None]:
    """Lead the courier of `run` to `url` for the length of the `with`.

    Raises Misuse where that isn't safe or not possible.
    """
    parts = urlsplit(url)
    if parts.scheme != "https":
        raise Misuse(
            "--callback-through-ssh needs an https URL: "
            "any user of the host may listen at the port afterwards"
        )
    if not isinstance(runner, DefaultLink):
        raise Misuse("--callback-through-ssh needs a host that is reached by ssh, --via fabric")
    assert parts.hostname is not None
    target = (parts.hostname, parts.port or 443)
    port: list[int] = []

    def taken(channel: Any) -> None:
        threading.Thread(target=_relay, args=(channel, target), daemon=True).start()

    over = threading.Event()

    def open_it() -> None:
        # In a thread, and repeatedly: before a start is confirmed there is no courier to tell.
        while not over.wait(AGAIN_S):
            with contextlib.suppress(CorraError, ConnectionError, TimeoutError):
                port[:] = port or [runner.listen_there(taken)]
                _tell_route(run, f"127.0.0.1:{port[0]}")
                return

    threading.Thread(target=open_it, daemon=True).start()
    try:
        yield
    finally:
        over.set()
    if port:
        with contextlib.suppress(CorraError, ConnectionError, TimeoutError):
            _tell_route(run, "")


def _tell_route(run: Run, route: str) -> None:
    """Tell the run's courier where to connect to; "" is the URL's own host."""
    run.deliver(route=route, seconds=0)


def _relay(channel: Any, target: tuple[str, int]) -> None:
    """Carry bytes both ways until one side ends."""
    try:
        with (
            contextlib.closing(channel),
            socket.create_connection(target, TUNNEL_CONNECT_S) as there,
        ):
            there.settimeout(None)
            while True:
                ready = select.select([channel, there], [], [])[0]
                for source, sink in ((channel, there), (there, channel)):
                    if source in ready:
                        data = source.recv(65536)
                        if not data:
                            return
                        sink.sendall(data)
    except OSError:
        return
