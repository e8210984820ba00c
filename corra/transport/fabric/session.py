"""A Channel that is a session of a paramiko transport."""

from __future__ import annotations

import contextlib
import os
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from corra.transport.channel import READ_MAX, WRITE_S, LinkLost, Tail

# What sshd takes for a channel in one packet, even if it announces more.
_PACKET_MAX = 32 << 10


class Inbox:
    """The bytes that have come and weren't read, in the place of paramiko's BufferedPipe.

    BufferedPipe copies each byte four times on its way through an array.
    """

    def __init__(self) -> None:
        self.ready = threading.Event()
        self._lock = threading.Lock()
        self._pieces: deque[bytes | memoryview] = deque()
        self._size = 0
        self._closed = False

    def feed(self, data: bytes | memoryview) -> None:
        with self._lock:
            self._pieces.append(data)
            self._size += len(data)
            self._announce()

    def read(self, size: int, timeout: float | None = None) -> bytes:
        """Return the bytes at hand, up to about `size`; b"" at the end. Raises PipeTimeout."""
        from paramiko.buffered_pipe import PipeTimeout

        if not self.ready.wait(timeout):
            raise PipeTimeout
        taken: list[bytes | memoryview] = []
        with self._lock:
            while self._pieces and size > 0:
                taken.append(self._pieces.popleft())
                size -= len(taken[-1])
            data = b"".join(taken)
            self._size -= len(data)
            if not self._pieces and not self._closed:
                self.ready.clear()
        return data

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._announce()

    def _announce(self) -> None:
        if not self.ready.is_set():
            self.ready.set()

    def read_ready(self) -> bool:
        return self._size > 0

    def __len__(self) -> int:
        return self._size


class Order(NamedTuple):
    """What a session is to run: a command for the login shell, and variables that ssh sends."""

    command: str
    environment: Sequence[tuple[str, str]] = ()

    def requests(self, channel: int) -> Iterator[Any]:
        """Yield the requests to the host's `channel`."""
        for name, value in self.environment:
            yield _request(channel, "env", False, os.fsencode(name), os.fsencode(value))
        yield _request(channel, "exec", True, self.command)


def _request(channel: int, kind: str, wants_reply: bool, *texts: str | bytes) -> Any:
    from paramiko import Message
    from paramiko.common import cMSG_CHANNEL_REQUEST

    message = Message()
    message.add_byte(cMSG_CHANNEL_REQUEST)
    message.add_int(channel)
    message.add_string(kind)
    message.add_boolean(wants_reply)
    for text in texts:
        message.add_string(text)
    return message


class Session:
    """A paramiko session that runs one command, as a Channel.

    If the session has an Inbox, the host has been asked to run the command already.
    """

    def __init__(self, session: Any, order: Order) -> None:
        self._session = session
        self._tail = Tail()
        self._closed = False
        # A read waits on an event, so the session's one timeout is free to bound the writes.
        asked = isinstance(session.in_buffer, Inbox)
        if not asked:
            session.in_buffer = Inbox()
        self._ready = session.in_buffer.ready
        session.settimeout(WRITE_S)
        self._writing = threading.Lock()
        if not asked:
            # Without a wait for the reply: it would cost one more round trip before the first byte.
            for request in order.requests(session.remote_chanid):
                session.transport._send_user_message(request)  # noqa: SLF001 - as exec_command does

    def read(self, timeout_s: float | None) -> bytes:
        if not self._ready.wait(timeout_s):
            raise TimeoutError(f"no byte in {timeout_s} s")
        data = b"" if self._closed else self._receive()
        if data or self._host_ended():
            return data
        raise LinkLost("closed" if self._closed else self._why())

    def _receive(self) -> bytes:
        from paramiko import SSHException

        try:
            self._take_stderr()
            data: bytes = self._session.recv(READ_MAX)
        except (
            SSHException,
            EOFError,
            OSError,
        ) as error:  # a read also tells the host that there is room again
            raise LinkLost(str(error) or self._why()) from error
        return data

    def _host_ended(self) -> bool:
        """Whether the host announced the end of the output, as a lost link doesn't."""
        return not self._closed and (
            self._session.eof_received or self._session.transport.is_active()
        )

    def _why(self) -> str:
        return str(self._session.transport.get_exception() or "the connection was closed")

    def _take_stderr(self) -> None:
        while self._session.recv_stderr_ready():
            self._tail.add(self._session.recv_stderr(READ_MAX))

    def write(self, data: bytes) -> None:
        from paramiko import SSHException

        view, at = memoryview(data), 0
        try:
            with self._writing:
                while at < len(view):
                    size = self._room(len(view) - at)
                    self._send(view[at : at + size])
                    at += size
        except TimeoutError as error:
            raise LinkLost(f"the host took no byte for {WRITE_S:g} s") from error
        except (SSHException, OSError, EOFError) as error:
            raise LinkLost(self._why()) from error

    def _room(self, size: int) -> int:
        """Wait until the host has room, and take up to `size` bytes of it.

        Raises TimeoutError, OSError.
        """
        session = self._session
        with session.lock:
            # As `send` does, which takes one packet's worth at a time.
            taken = session._wait_for_send_window(size)  # noqa: SLF001
            if not taken:
                raise OSError("closed")
            more = min(size - taken, session.out_window_size)
            session.out_window_size -= more
        return int(taken + more)

    def _send(self, data: memoryview) -> None:
        from .packets import Data, Packets

        session = self._session
        sent = Data(session.remote_chanid, data, min(session.out_max_packet_size, _PACKET_MAX))
        # If the caller gave an open Fabric connection, its packets are paramiko's own.
        for message in (
            (sent,) if isinstance(session.transport.packetizer, Packets) else sent.messages()
        ):
            session.transport._send_user_message(message)  # noqa: SLF001 - as send does

    def close_write(self) -> None:
        with contextlib.suppress(OSError, EOFError):
            self._session.shutdown_write()

    def close(self) -> None:
        from paramiko import SSHException

        self._closed = True
        # Tells the host, if the connection still stands.
        with contextlib.suppress(SSHException, OSError, EOFError):
            self._session.close()
        self._ready.set()

    def stderr(self) -> bytes:
        self._take_stderr()
        return bytes(self._tail)

    def exit_status(self) -> int | None:
        # The status comes right after the output. A command that a signal ended has none
        # (paramiko#598).
        self._session.status_event.wait(2.0)
        status: int = self._session.exit_status
        return status if status >= 0 else None
