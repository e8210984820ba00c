"""paramiko's Transport, tuned for long and fast streams. Imported when a connection is made."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable
from typing import Any

from paramiko import Message, SSHException, Transport as Plain
from paramiko.auth_handler import AuthHandler
from paramiko.common import cMSG_CHANNEL_OPEN

from corra.transport.ssh_config import SshSettings

from .packets import Packets
from .session import Inbox, Order
from .tcp import GREETING

# AES-GCM carries 1.4 times what paramiko's own first choice does (280 against 203 MB/s) on a CPU
# with AES instructions.
CIPHERS = ("aes128-gcm@openssh.com", "aes256-gcm@openssh.com")
# A window of 8 MiB is enough for 80 MB/s at 100 ms. It also bounds the memory that a reader who
# stands still takes. With packets of 256 KiB, paramiko's work per byte is an eighth.
WINDOW = 8 << 20
PACKET = 256 << 10
_AWAKE_S = 1.0
ALIASES = {"curve25519-sha256": "curve25519-sha256@libssh.org"}


class Transport(Plain):  # type: ignore[misc] # paramiko has no hints
    """A client's side of one ssh connection."""

    disabled_algorithms: dict[str, Any]

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
        # The ways to log in that the host has named last.
        self.allowed_methods: tuple[str, ...] = ()

    def restrict(self, known: SshSettings) -> list[str]:
        """Use the algorithms that ssh_config lists; return the directives that leave none."""
        options = self.get_security_options()
        emptied = []
        for directive, attribute, listed in (
            ("Ciphers", "ciphers", known.ciphers),
            ("MACs", "digests", known.macs),
            ("KexAlgorithms", "kex", known.key_exchanges),
            ("HostKeyAlgorithms", "key_types", known.host_key_types),
        ):
            usual = getattr(options, attribute)
            if listed is not None:
                # One algorithm under two names; paramiko has the older one.
                names = [ALIASES.get(name, name) for name in listed]
                usual = [name for name in dict.fromkeys(names) if name in usual]
            if attribute == "ciphers":
                usual = sorted(usual, key=lambda name: name not in CIPHERS)
            if usual:
                setattr(options, attribute, usual)
            else:
                emptied.append(directive)
        allowed = known.user_key_types
        if allowed is not None:
            unwanted = [name for name in self.preferred_pubkeys if name not in allowed]
            self.disabled_algorithms = {**self.disabled_algorithms, "pubkeys": unwanted}
        return emptied

    def auth_publickey(
        self, username: str, key: Any, event: threading.Event | None = None
    ) -> list[str]:
        """Log in by a key, and return what else the host wants. `event` is not used."""
        return self._log_in(lambda handler, done: handler.auth_publickey(username, key, done))

    def auth_none(self, username: str) -> list[str]:
        """Log in by nothing, which shows what the host wants."""
        return self._log_in(lambda handler, done: handler.auth_none(username, done))

    def auth_password(
        self,
        username: str,
        password: str,
        event: threading.Event | None = None,
        fallback: bool = True,
    ) -> list[str]:
        """Log in by a password. `event` and `fallback` are not used."""
        return self._log_in(lambda handler, done: handler.auth_password(username, password, done))

    def auth_interactive(self, username: str, handler: Any, submethods: str = "") -> list[str]:
        """Log in by answers to the host's questions, which `handler` gives."""
        return self._log_in(
            lambda prompt, done: prompt.auth_interactive(username, handler, done, submethods)
        )

    def _log_in(self, begin: Callable[[AuthHandler, threading.Event], None]) -> list[str]:
        self.auth_handler = _Prompt(self)
        answered = threading.Event()
        begin(self.auth_handler, answered)
        more: list[str] = self.auth_handler.wait_for_response(answered)
        return more

    def calm(self) -> None:
        """Wake up once a second from here on; the handshake's ten times take 0.1 % of a core."""
        self.sock.settimeout(_AWAKE_S)

    def _take(self, number: int, data: memoryview) -> bool:
        """Hand data to their channel's Inbox, past paramiko's dispatch; return if there is one."""
        channel = self._channels.get(number)
        inbox = None if channel is None else channel.in_buffer
        if not isinstance(inbox, Inbox):
            return False
        inbox.feed(data)
        return True

    def stop_thread(self) -> None:
        # The thread notices a closed connection when its read ends. A shutdown ends the read now.
        with contextlib.suppress(OSError, EOFError, SSHException):
            self.sock.shutdown(socket.SHUT_RDWR)
        super().stop_thread()

    def open_running(self, order: Order, timeout_s: float) -> Any:
        """Return a new session; if it is the first channel, `order` has been given already.

        That saves a round trip. The request names the channel by the host's number, which the host
        hasn't said yet. OpenSSH counts from 0. A host that only claims to be OpenSSH and counts
        otherwise must end the connection. Raises what `open_session` does, and SSHException for
        such a host.
        """
        self._asking.order, self._asking.channel = order, None
        try:
            session = self.open_session(timeout=timeout_s)
        except SSHException:
            # A short command may have ended before this thread looked, and paramiko has forgotten
            # its channel. To drop the connection then would cut off all other threads.
            session = self._asking.channel
            if session is None or not session.active:
                raise
        finally:
            asked = self._asking.order is None
            self._asking.order = self._asking.channel = None
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
            order = getattr(self._asking, "order", None)
            if not (first and order and self.remote_version.startswith("SSH-2.0-OpenSSH")):
                self._send_later(data)
                return
            # Output of the host's login shell may come before the caller has the session.
            opened = Message(data.asbytes()[1:])
            opened.get_string()
            self._asking.channel = self._channels.get(opened.get_int())
            self._asking.channel.in_buffer = Inbox()
            self._send_later(data)
            for request in order.requests(0):
                self._send_later(request)
            self._asking.order = None

    def _send_later(self, data: Any) -> None:
        # Every 512 MB the keys are exchanged anew, and nothing else may be sent meanwhile.
        # paramiko's own thread answers the end of a channel with such a message. It would wait 30 s
        # for the exchange, which only this thread can finish, and then give the connection up.
        if threading.current_thread() is self and not self.clear_to_send.is_set():
            self._held.append(data)
        else:
            super()._send_user_message(data)

    def send_held(self) -> None:
        """Send the messages that had to wait for the exchange of keys."""
        held, self._held = self._held, []
        for data in held:
            self._send_message(data)


class _Prompt(AuthHandler):  # type: ignore[misc]
    """Asks for the login service and logs in without a wait between, which saves a round trip.

    RFC 4253, 10 allows it, and dropbear does the same. With RSA the host must first say which
    hashes it takes.
    """

    _asked = False

    def _request_auth(self) -> None:
        # Set before a byte leaves. The host may accept the service while the key still signs (in an
        # ssh-agent, or on a token), and paramiko's thread would have it sign a second time.
        self._asked = self.private_key is not None and "rsa" not in self.private_key.get_name()
        super()._request_auth()
        if self._asked:
            accepted = Message()
            accepted.add_string("ssh-userauth")
            accepted.rewind()
            super()._parse_service_accept(accepted)

    def _parse_service_accept(self, accepted: Any) -> None:
        if not self._asked:
            super()._parse_service_accept(accepted)

    def _parse_userauth_failure(self, failure: Any) -> None:
        self.transport.allowed_methods = tuple(failure.get_list())
        failure.rewind()
        super()._parse_userauth_failure(failure)


class _Gate(threading.Event):
    """Set while messages may be sent. paramiko's thread sets it after an exchange of keys."""

    def __init__(self, transport: Transport) -> None:
        super().__init__()
        self._transport = transport

    def set(self) -> None:
        super().set()
        self._transport.send_held()
