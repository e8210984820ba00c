"""What a connection may cost, before its client has shown a token and after.

uvicorn's protocol bounds neither the head of a request nor the time it takes, nor how many
connections there are. Here a head has a size and a deadline. Connections without a token have a
share of the places, those of each token have one, and so have those of all tokens together: when a
share is used up, the oldest in it makes way for the next. So a client with a token always gets in,
however many connections others open.
"""

from __future__ import annotations

import asyncio
import json
import resource
from collections.abc import Callable
from functools import partial
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

# From the first byte of a request's head to the last, or from the connection to that.
HEAD_S = 15.0
URL_MAX = 8 << 10
# Of headers together, and of bytes that the parser has taken without a word.
HEAD_MAX = 32 << 10
# Python's own client takes as many; each costs 150 bytes here, however short it is.
HEADERS_MAX = 100
# No client of ours sends a request before the answer to the last one.
PIPELINED_MAX = 16
STRANGERS_MAX, HOLDER_MAX, HOLDERS_MAX = 512, 4096, 16384
# Where this process may have fewer descriptors, a quarter of them are the strangers', a quarter may
# be one token's and a half all tokens' together. The database and its readers have the rest.
STRANGERS_SHARE = HOLDER_SHARE = 4
HOLDERS_SHARE = 2

# By status: what is said of a head that can't be taken.
_REFUSALS = {
    400: ("bad_request", "this is no HTTP request"),
    414: ("long_url", f"a URL may have {URL_MAX} bytes"),
    431: ("long_head", f"a request may have {HEADERS_MAX} headers and {HEAD_MAX} bytes of them"),
}


class Places:
    """The connections that there are: of strangers, and of the holder of each token.

    Beyond `strangers` of the first, `each` of one token and `all_` of all tokens, the oldest is
    dropped. Beyond `all_` it is the oldest of the token that has most.
    """

    def __init__(
        self, strangers: int = STRANGERS_MAX, each: int = HOLDER_MAX, all_: int = HOLDERS_MAX
    ) -> None:
        self._most, self._each, self._all = strangers, each, all_
        self._strangers: dict[Connection, None] = {}
        self._holders: dict[int, dict[Connection, None]] = {}
        self._count = 0

    def enter(self, connection: Connection) -> None:
        self._strangers[connection] = None
        if len(self._strangers) > self._most:
            self._drop_oldest(self._strangers)

    def has_token(self, connection: Connection, token: int) -> None:
        """Have a stranger's connection count as that token's from now on."""
        if connection not in self._strangers:
            return  # it was dropped while its token was looked up
        del self._strangers[connection]
        connection.token = token
        held = self._holders.setdefault(token, {})
        held[connection] = None
        self._count += 1
        if len(held) > self._each:
            self._drop_oldest(held)
        elif self._count > self._all:
            self._drop_oldest(max(self._holders.values(), key=len))

    def leave(self, connection: Connection) -> None:
        self._strangers.pop(connection, None)
        if connection.token is None:
            return
        held = self._holders.get(connection.token, {})
        if connection in held:
            del held[connection]
            self._count -= 1
            if not held:
                del self._holders[connection.token]

    def _drop_oldest(self, held: dict[Connection, None]) -> None:
        oldest = next(iter(held))
        self.leave(oldest)
        oldest.transport.abort()


def room() -> Places:
    """Have as many descriptors as this process may, and return the places that they allow."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if hard == resource.RLIM_INFINITY:
        return Places()
    return Places(
        min(STRANGERS_MAX, hard // STRANGERS_SHARE),
        min(HOLDER_MAX, hard // HOLDER_SHARE),
        min(HOLDERS_MAX, hard // HOLDERS_SHARE),
    )


def protocol_for(places: Places) -> Callable[..., Connection]:
    """Return what makes the protocol of each connection."""
    return partial(Connection, places=places)


class _Joined:
    """A transport that sends two writes as one.

    uvicorn writes the head and the body of an answer separately. That would be two packets, and the
    client would wake twice.
    """

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport, self._loop = transport, loop
        self._held = b""

    def write(self, data: bytes) -> None:
        if self._held:
            held, self._held = self._held, b""
            self._transport.write(held + data)
        else:
            self._held = data
            self._loop.call_soon(self._flush)

    def close(self) -> None:
        self._flush()
        self._transport.close()

    def _flush(self) -> None:
        if self._held:
            held, self._held = self._held, b""
            self._transport.write(held)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class Connection(HttpToolsProtocol):
    """uvicorn's protocol with the bounds above."""

    head_s = HEAD_S

    def __init__(self, *args: Any, places: Places, **how: Any) -> None:
        super().__init__(*args, **how)
        self._places = places
        # The id of the token that its client has shown first.
        self.token: int | None = None
        self._refusal = 400
        # Bytes that the parser has taken without calling anything here: it keeps a header that
        # doesn't end, and would go on to keep it.
        self._unseen = 0
        self._headers_size = 0
        self._deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(_Joined(transport, self.loop))  # type: ignore[arg-type]
        self._places.enter(self)
        self._begin_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._places.leave(self)
        self._end_head()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        self._unseen += len(data)
        super().data_received(data)
        if self._unseen > HEAD_MAX:
            self._refusal = 431
            self.send_400_response("")
        if self._deadline is None and self._has_answered():
            # There is nothing to answer: either a head begins, or a refused body goes on.
            self._begin_head()

    def send_400_response(self, msg: str) -> None:
        """Refuse what can't be read, with the status of the bound that it broke."""
        if self.transport.is_closing():
            return
        kind, message = _REFUSALS[self._refusal]
        body = json.dumps({"error": kind, "message": message}).encode("ascii")
        self.transport.write(
            STATUS_LINE[self._refusal]
            + b"content-type: application/json\r\nconnection: close\r\n"
            + b"content-length: %d\r\n\r\n%b" % (len(body), body)
        )
        self.transport.close()

    def _has_answered(self) -> bool:
        cycle: Any = self.cycle  # None before the first request, whatever uvicorn's hint says
        return cycle is None or bool(cycle.response_complete)

    # -- What the parser calls; an error ends its work, and `send_400_response` answers

    def on_message_begin(self) -> None:
        self._unseen = self._headers_size = 0
        super().on_message_begin()
        if self.token is None:
            self.scope["corra.has_token"] = self._has_token  # type: ignore[typeddict-unknown-key]

    def on_url(self, url: bytes) -> None:
        self._unseen = 0
        if len(self.url) + len(url) > URL_MAX:
            self._refuse(414)
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._unseen = 0
        self._headers_size += len(name) + len(value)
        if self._headers_size > HEAD_MAX or len(self.headers) >= HEADERS_MAX:
            self._refuse(431)
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._unseen = 0
        self._end_head()
        super().on_headers_complete()
        if len(self.pipeline) > PIPELINED_MAX:
            self.transport.abort()
            self._refuse(400)

    def on_body(self, body: bytes) -> None:
        self._unseen = 0
        super().on_body(body)

    def _refuse(self, status: int) -> None:
        self._refusal = status
        raise ValueError("the head of a request is too large")

    # -- Its time and its place

    def _has_token(self, token: int) -> None:
        """Note that the client has shown a token: it no longer takes a stranger's place."""
        self._places.has_token(self, token)

    def _begin_head(self) -> None:
        self._deadline = self.loop.call_later(self.head_s, self._too_slow)

    def _end_head(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _too_slow(self) -> None:
        self._deadline = None
        if not self.transport.is_closing():
            self.transport.close()
