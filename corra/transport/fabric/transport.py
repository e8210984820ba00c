"""paramiko's Transport with what a long and fast stream needs. Imported only once a connection is made."""

from __future__ import annotations

import contextlib
import socket
import threading
from typing import Any

from paramiko import Message, SSHException, Transport as Plain
from paramiko.auth_handler import AuthHandler
from paramiko.common import cMSG_CHANNEL_OPEN

from .packets import Packets
from .session import Inbox, to_run
from .tcp import GREETING

# AES-GCM carries 1.4 times what paramiko's own first choice does (280 against 203 MB/s), where the CPU has AES.
CIPHERS = ("aes128-gcm@openssh.com", "aes256-gcm@openssh.com")
# A window of 8 MiB fills 80 MB/s at 100 ms; it is also what a reader that stands still lets pile up in our memory. Packets of 256 KiB
# are an eighth of paramiko's work per byte.
WINDOW = 8 << 20
PACKET = 256 << 10
_AWAKE_S = 1.0


class Transport(Plain):  # type: ignore[misc] # paramiko has no hints
    """A client's side of one ssh connection."""

    def __init__(self, carrier: Any, **kwargs: Any) -> None:
        super().__init__(
            carrier, default_window_size=WINDOW, default_max_packet_size=PACKET, **kwargs
        )
        self.local_version = GREETING
        self.packetizer = Packets(carrier, self._take)
        self.packetizer.set_log(self.logger)
        self._held: list[Any] = []
        self._opening = threading.Lock()
        self._unused = True
        self._asking = threading.local()
        self.clear_to_send = _Gate(self)
        options = self.get_security_options()
        usual = options.ciphers
        options.ciphers = [each for each in CIPHERS if each in usual] + [
            each for each in usual if each not in CIPHERS
        ]

    def auth_publickey(
        self, username: str, key: Any, event: threading.Event | None = None
    ) -> list[str]:
        """Log in by a key, and return what else is wanted. `event` is for paramiko's own callers, and there are none."""
        self.auth_handler = _Prompt(self)
        answered = threading.Event()
        self.auth_handler.auth_publickey(username, key, answered)
        more: list[str] = self.auth_handler.wait_for_response(answered)
        return more

    def calm(self) -> None:
        """Wake up once a second from here on, not ten times as during the handshake: an idle watcher costs 0.1 % of a core otherwise."""
        self.sock.settimeout(_AWAKE_S)

    def _take(self, number: int, data: memoryview) -> bool:
        """Hand a channel's data to whoever reads them, past paramiko's dispatch; return whether there is somebody."""
        channel = self._channels.get(number)
        inbox = None if channel is None else channel.in_buffer
        if not isinstance(inbox, Inbox):
            return False
        inbox.feed(data)
        return True

    def stop_thread(self) -> None:
        # The thread notices a closed connection when its read ends: so that it ends now.
        with contextlib.suppress(OSError, EOFError, SSHException):
            self.sock.shutdown(socket.SHUT_RDWR)
        super().stop_thread()

    def open_running(self, command: str, timeout_s: float) -> Any:
        """Return a new session that has been asked for `command` already, if this is the first channel: that is a round trip less.

        A request names its channel by the host's number for it, which the host has yet to say. OpenSSH counts from 0; a host that poses as
        one and doesn't would be bound to end the connection. Raises what `open_session` does, and SSHException for such a host.
        """
        self._asking.command = command
        try:
            session = self.open_session(timeout=timeout_s)
        finally:
            asked = self._asking.command is None
            self._asking.command = None
        if asked and session.remote_chanid != 0:
            raise SSHException(f"the first channel is number {session.remote_chanid}")
        return session

    def _send_user_message(self, data: Any) -> None:
        if type(data) is Message and data.asbytes()[:1] == cMSG_CHANNEL_OPEN:
            self._send_open(data)
        else:
            self._send_later(data)

    def _send_open(self, data: Message) -> None:
        with self._opening:
            first, self._unused = self._unused, False
            command = getattr(self._asking, "command", None)
            if not (first and command and self.remote_version.startswith("SSH-2.0-OpenSSH")):
                self._send_later(data)
                return
            # Where the host's login shell prints something, it may come before our caller has the session.
            opened = Message(data.asbytes()[1:])
            opened.get_string()
            self._channels.get(opened.get_int()).in_buffer = Inbox()
            self._send_later(data)
            self._send_later(to_run(command, 0))
            self._asking.command = None

    def _send_later(self, data: Any) -> None:
        # Every 512 MB the keys are exchanged anew, and meanwhile nothing may be sent. paramiko's own thread answers the end of a channel
        # by a message of this kind: it would wait 30 s for the exchange that only itself can finish, and then give the connection up.
        if threading.current_thread() is self and not self.clear_to_send.is_set():
            self._held.append(data)
        else:
            super()._send_user_message(data)

    def send_held(self) -> None:
        """Send what had to wait; called with the right to send."""
        held, self._held = self._held, []
        for data in held:
            self._send_message(data)


class _Prompt(AuthHandler):  # type: ignore[misc]
    """Asks for the service and logs in by it in one breath, as RFC 4253, 10 allows and dropbear does: a round trip less.

    But for RSA, where the host must first have said which hashes it takes.
    """

    _asked = False

    def _request_auth(self) -> None:
        # Before a byte leaves: the host may accept while the key still signs, in an ssh-agent or on a token that is touched,
        # and paramiko's thread would have it sign a second time, over the same socket.
        self._asked = "rsa" not in self.private_key.get_name()
        super()._request_auth()
        if self._asked:
            accepted = Message()
            accepted.add_string("ssh-userauth")
            accepted.rewind()
            super()._parse_service_accept(accepted)

    def _parse_service_accept(self, accepted: Any) -> None:
        if not self._asked:
            super()._parse_service_accept(accepted)


class _Gate(threading.Event):
    """Set while messages may be sent. paramiko sets it in its own thread, when the keys have been exchanged."""

    def __init__(self, transport: Transport) -> None:
        super().__init__()
        self._transport = transport

    def set(self) -> None:
        super().set()
        self._transport.send_held()
