"""A TCP proxy on 127.0.0.1 that a test can cut, reset, freeze, delay and narrow."""

from __future__ import annotations

import contextlib
import queue
import select
import socket
import struct
import threading
import time
from collections.abc import Callable
from typing import Any

_PIECE = 1 << 16
# How many bytes may be under way on a delayed or narrow line; a sender of more has to wait.
_UNDER_WAY = 256
# SO_LINGER with no time: close() sends RST instead of FIN and drops the unsent bytes.
_RESET = struct.pack("ii", 1, 0)


class _Pair:
    """One connection through the proxy."""

    def __init__(self, near: socket.socket, far: socket.socket) -> None:
        self.near, self.far = near, far
        self.passed_down = 0
        self.stranded = False
        self.over = threading.Event()

    def end(self, *, reset: bool) -> None:
        self.over.set()
        for each in (self.near, self.far):
            with contextlib.suppress(OSError):
                if reset:
                    each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                else:
                    each.shutdown(socket.SHUT_RDWR)
            each.close()


class Proxy:
    """A proxy that passes connections on to `port` of this machine. `accepted` counts them.

    `delay_s` and `rate` hold for connections made after they were set: each byte takes `delay_s` in
    either direction, and `rate` bytes a second pass in each.
    """

    def __init__(self, port: int) -> None:
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.accepted = 0
        self.delay_s = 0.0
        self.rate: float | None = None
        self._refusing = False
        self._flowing = threading.Event()
        self._flowing.set()
        self._pairs: list[_Pair] = []
        self._lock = threading.Lock()
        self._limit: int | None = None
        self._at_limit = "cut"
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Proxy:  # noqa: PYI034 - Self needs Python 3.11
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()
        self.cut()

    def cut(self) -> None:
        """End every connection with FIN."""
        self._end(reset=False)

    def reset(self) -> None:
        """End every connection with RST."""
        self._end(reset=True)

    def freeze(self) -> None:
        """Let no more bytes through in either direction, and keep the connections open."""
        self._flowing.clear()

    def strand(self) -> None:
        """Freeze today's connections for good: a laptop's connections after a sleep in which the
        network forgot them.
        """
        with self._lock:
            for pair in self._pairs:
                pair.stranded = True

    def thaw(self) -> None:
        self._flowing.set()

    def refuse(self, yes: bool = True) -> None:
        """Close new connections before they begin."""
        self._refusing = yes

    def divert(self, port: int) -> None:
        """Pass new connections on to another port."""
        self._target = port

    def limit(self, size: int | None, then: str = "cut") -> None:
        """Call `then` (cut, reset or freeze) on each connection once it has carried `size` bytes to
        the client.
        """
        self._limit, self._at_limit = size, then

    def carried(self) -> int:
        """Return how many bytes the newest connection has carried to the client."""
        with self._lock:
            return self._pairs[-1].passed_down

    @property
    def down(self) -> int:
        """Bytes that all connections together have brought to the clients."""
        with self._lock:
            return sum(pair.passed_down for pair in self._pairs)

    def _end(self, *, reset: bool) -> None:
        with self._lock:
            pairs, self._pairs = self._pairs, []
        for pair in pairs:
            pair.end(reset=reset)

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            self.accepted += 1
            if self._refusing:
                near.close()
                continue
            try:
                far = socket.create_connection(("127.0.0.1", self._target))
            except OSError:  # the port has no listener any more
                near.close()
                continue
            for each in (near, far):
                each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            pair = _Pair(near, far)
            with self._lock:
                self._pairs.append(pair)
            for arguments in ((pair, near, far, False), (pair, far, near, True)):
                threading.Thread(target=self._carry, args=arguments, daemon=True).start()

    def _carry(self, pair: _Pair, source: socket.socket, target: socket.socket, down: bool) -> None:
        pass_on = self._slowly(pair, target) if self.delay_s or self.rate else target.sendall
        with contextlib.suppress(OSError, ValueError):
            while data := self._receive(pair, source):
                while pair.stranded or not self._flowing.wait(0.1):
                    if pair.over.wait(0.1):
                        return
                if down and self._limit is not None and pair.passed_down + len(data) > self._limit:
                    self._reach_limit(pair, target, data[: max(0, self._limit - pair.passed_down)])
                    return
                # Count before the send: a test that sees the effect of these bytes also sees the
                # count.
                pair.passed_down += len(data) if down else 0
                pass_on(data)
        if pass_on != target.sendall:
            pass_on(b"")
        else:
            pair.end(reset=False)

    def _slowly(self, pair: _Pair, target: socket.socket) -> Callable[[bytes], None]:
        """Return a function that takes data and delivers each piece after the same delay; b"" is
        the end.
        """
        line: queue.Queue[tuple[float, bytes]] = queue.Queue(8 if self.rate else _UNDER_WAY)

        def deliver() -> None:
            with contextlib.suppress(OSError):
                while True:
                    due, data = line.get()
                    pair.over.wait(max(0.0, due - time.monotonic()))
                    if not data or pair.over.is_set():
                        break
                    if self.rate:
                        pair.over.wait(len(data) / self.rate)
                    target.sendall(data)
            pair.end(reset=False)

        def take(data: bytes) -> None:
            while not pair.over.is_set():
                with contextlib.suppress(queue.Full):
                    line.put((time.monotonic() + self.delay_s, data), timeout=0.1)
                    return

        threading.Thread(target=deliver, daemon=True).start()
        return take

    def _receive(self, pair: _Pair, source: socket.socket) -> bytes:
        # The thread never blocks in recv: that would hold the connection open beyond close(), and
        # no RST would go out.
        while not select.select([source], [], [], 0.02)[0]:
            if pair.over.is_set():
                return b""
        # A narrow line gets small buffers; otherwise a cut would arrive minutes after the data
        # before it.
        return source.recv(1024 if self.rate else _PIECE)

    def _reach_limit(self, pair: _Pair, target: socket.socket, last: bytes) -> None:
        target.sendall(last)
        if self._at_limit == "freeze":
            pair.over.wait(60)  # this direction stays silent; the client must notice that by itself
        pair.end(reset=self._at_limit == "reset")


class Dripping:
    """A port of 127.0.0.1 that takes connections and says `first`, and then a piece of `rest` each
    tenth of a second. Without `rest` it says no more.
    """

    def __init__(self, first: bytes = b"", rest: bytes = b"") -> None:
        self._first, self._rest = first, rest
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._over = threading.Event()
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Dripping:  # noqa: PYI034 - Self needs Python 3.11
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._say, args=(near,), daemon=True).start()

    def _say(self, near: socket.socket) -> None:
        with near, contextlib.suppress(OSError):
            near.sendall(self._first)
            while not self._over.wait(0.1):
                near.sendall(self._rest)


def wait_for(condition: Any, *, deadline_s: float = 20.0, what: str = "") -> Any:
    """Return the first true value of `condition()`. Raises AssertionError at the deadline."""
    until = time.monotonic() + deadline_s
    pause = threading.Event()
    while not (value := condition()):
        assert time.monotonic() < until, what or f"waited {deadline_s} s in vain"
        pause.wait(0.02)
    return value
