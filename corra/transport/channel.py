"""The seam between corra and whatever carries its bytes: a Runner opens Channels, a Channel is a command's stdin, stdout and stderr.

A Channel's three fates are kept apart: `read` returns b"" when the command closed its stdout, raises LinkLost when nobody can know what
it did after the last byte, and raises a CorraError when the link never came to be, so that the host was asked for nothing.
"""

from __future__ import annotations

from typing import Protocol

from corra.model.host import Host

# As much as one call hands over: a window's worth on a fast link, and more per call gained nothing measurable.
READ_MAX = 256 * 1024
# What is kept of a command's stderr: enough for any message, not for a flood.
STDERR_MAX = 64 * 1024
# A peer that takes no byte for this long is called gone. The host's own buffers hold a request; only a stuck link gets here.
WRITE_S = 30.0


class LinkLost(ConnectionError):
    """The link broke after the channel was open; what the host did is unknown."""


class Silent(LinkLost):
    """The other side says nothing; the connection below may be dead without knowing it."""


class NoAnswer(LinkLost):
    """The command ended before it answered, or said something else: what it did is unknown.

    The link isn't at fault, so trying again may well come to the same.
    """


class Channel(Protocol):
    """A command that runs somewhere. One thread reads, any thread writes or closes."""

    def read(self, timeout_s: float | None) -> bytes:
        """Return what has come, up to READ_MAX, or b"" at the end. Raises TimeoutError, LinkLost, CorraError."""

    def write(self, data: bytes) -> None:
        """Send all of `data`. Raises LinkLost when the peer is gone or takes nothing for WRITE_S."""

    def close_write(self) -> None:
        """Let the command see the end of its stdin."""

    def close(self) -> None:
        """Leave at once; a `read` in another thread ends with LinkLost. The command isn't waited for."""

    def stderr(self) -> bytes:
        """Return the last STDERR_MAX bytes that the command, or what carries it, wrote there so far."""

    def exit_status(self) -> int | None:
        """Return the command's exit status after the end of its output, or None when it can't be had."""


class Runner(Protocol):
    """A way to run commands on one host as one user."""

    host: Host

    @property
    def login(self) -> str:
        """Who logs in there (or is here already), before any sudo."""

    def begin(self) -> None:
        """Start connecting, where that takes time, beside what the caller still has to do; what goes wrong is said by the first `open`."""

    def open(self, command: str) -> Channel:
        """Start `command`, POSIX shell text, as the user that `host` means. Raises Unreachable, HostKey, Auth."""

    def close(self) -> None:
        """Let go of every connection; the commands' own fates are theirs."""


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
    """Return the first line of foreign text that says anything, printable, to be quoted in a line of ours."""
    for line in text.decode(errors="replace").splitlines():
        clean = "".join(c if c.isprintable() else " " for c in line).strip()
        if clean:
            return clean[:200]
    return ""
