"""The TCP connection below paramiko, on which no message waits for an acknowledgement.

sshd has Nagle's algorithm on until a session begins, and for ever where it carries a ProxyJump. It
holds its next message back until the last one is acknowledged, which Linux puts off by 40 ms. So
this end acknowledges short messages at once: a first session took 41 ms, and takes 1 ms now.

The client's greeting leaves before paramiko is imported. The host's greeting has come by the time
that paramiko exchanges keys.
"""

from __future__ import annotations

import socket
from typing import Any

# The client's first line (RFC 4253, 4.2).
GREETING = "SSH-2.0-corra"
# A longer piece belongs to a stream, whose next piece acknowledges it.
_SHORT = 8192


class Carrier(socket.socket):
    """A client's TCP connection, read by one thread."""

    def __init__(self, *how: Any) -> None:
        super().__init__(*how)
        self._greeted = b""

    def greet(self) -> None:
        """Send the greeting. When paramiko sends the same greeting later, it is dropped."""
        greeting = GREETING.encode() + b"\r\n"
        self.sendall(greeting)
        self._greeted = greeting

    def send(self, data: Any, flags: int = 0, /) -> int:
        if self._greeted and data == self._greeted:
            self._greeted = b""
            return len(data)
        return super().send(data, flags)

    def recv_into(self, buffer: Any, size: int = 0, flags: int = 0, /) -> int:
        came = super().recv_into(buffer, size, flags)
        if 0 < came < _SHORT:
            # Each time: the kernel forgets it with the next byte that is sent.
            self.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
        return came
