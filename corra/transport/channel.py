"""The seam between corra and what carries its bytes.

A Runner opens Channels. A Channel is the stdin, stdout and stderr of one command.

`Channel.read` tells three endings apart. It returns b"" when the command closed its stdout. It
raises LinkLost when the link broke: what the command did after the last byte is unknown. It raises
a CorraError when there never was a link: the host was asked for nothing.
"""

from __future__ import annotations

from typing import Protocol

from corra.model.host import Host

# The most that one `read` returns. More per call gained nothing measurable.
READ_MAX = 256 * 1024
# How much of a command's stderr is kept: enough for any message, too little for a flood.
STDERR_MAX = 64 * 1024
# A peer that takes no byte for this long counts as gone. The host's buffers hold a whole request,
# so only a stuck link makes a write wait.
WRITE_S = 30.0
# How long it may take to connect.
CONNECT_S = 15.0


class LinkLost(ConnectionError):
    """The link broke after the channel was open; what the host did is unknown."""


class Silent(LinkLost):
    """The host says nothing; the connection may be dead without this machine knowing."""


class NoAnswer(LinkLost):
    """The command ended without an answer, or with another one: what it did is unknown.

    The link isn't at fault, so a second try may well end in the same way.
    """


class Channel(Protocol):
    """A command that runs somewhere. One thread reads, any thread writes or closes."""

    def read(self, timeout_s: float | None) -> bytes:
        """Return the bytes that have come, up to READ_MAX, or b"" at the end.

        Raises TimeoutError, LinkLost, CorraError.
        """

    def write(self, data: bytes) -> None:
        """Send all of `data`. Raises LinkLost if the peer is gone or takes nothing for WRITE_S."""

    def close_write(self) -> None:
        """Let the command see the end of its stdin."""

    def close(self) -> None:
        """Leave at once, without waiting for the command.

        A `read` in another thread ends with LinkLost.
        """

    def stderr(self) -> bytes:
        """Return the last STDERR_MAX bytes of stderr so far, of the command or of its ssh."""

    def exit_status(self) -> int | None:
        """Return the command's exit status after the end of its output, or None if unknown."""


class Runner(Protocol):
    """A way to run commands on one host as one user."""

    host: Host

    @property
    def remark(self) -> str:
        """What an operator should know about the way to the host, or ""."""

    @property
    def login(self) -> str:
        """The user who logs in (on this machine: who runs corra), before any sudo."""

    def begin(self) -> None:
        """Start to connect in the background. The first `open` raises what went wrong."""

    def open(self, command: str) -> Channel:
        """Start `command`, POSIX shell text, as the user that `host` means.

        Raises Unreachable, HostKey, Auth.
        """

    def close(self) -> None:
        """Close every connection. Commands that run are not stopped."""


class Tail:
    """The last STDERR_MAX bytes of a stream."""

    def __init__(self) -> None:
        self._held = bytearray()

    def add(self, data: bytes) -> None:
        self._held += data
        del self._held[:-STDERR_MAX]

    def __bytes__(self) -> bytes:
        return bytes(self._held)


def first_line(text: bytes) -> str:
    """Return the first line of foreign text that isn't blank, made printable, for a quotation."""
    for line in text.decode(errors="replace").splitlines():
        clean = "".join(c if c.isprintable() else " " for c in line).strip()
        if clean:
            return clean[:200]
    return ""
