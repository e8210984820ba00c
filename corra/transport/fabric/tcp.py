"""The TCP connection below paramiko: no message that waits for an acknowledgement.

sshd has Nagle's algorithm on until a session begins, and for ever where it carries a ProxyJump: it holds its next message back until the one
before is acknowledged, which Linux puts off by 40 ms. So what is short is acknowledged at once; a first session took 41 ms, and takes 1.

Our greeting goes out before paramiko is imported: the host's half of the first round trip is here when its keys are to be exchanged.
"""

from __future__ import annotations

import socket
from typing import Any

# What a client says first (RFC 4253, 4.2). paramiko waits for the host's before it goes on, and the host for ours.
GREETING = "SSH-2.0-corra"
# More is a stream, whose next piece acknowledges this one.
_SHORT = 8192


class Carrier(socket.socket):
    """A client's TCP connection, read by one thread."""

    def __init__(self, *how: Any) -> None:
        super().__init__(*how)
        self._greeted = b""

    def greet(self) -> None:
        """Say who we are; paramiko's own try to say the same is passed over."""
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
            # Not once and for all: the kernel falls back with the next byte we send.
            self.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
        return came
