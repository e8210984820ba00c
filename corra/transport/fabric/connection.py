"""Commands through Fabric's Connection: checked, tuned, shared by threads, and opened once.

Fabric by itself checks no host key, knows no Include in ssh_config, pays 40 ms an exchange to
Nagle's algorithm, and its Runner is quadratic in the output. So Fabric makes the Connection, and
its own `open` opens it, but this module gives it the socket, the check of the host key, the keys to
try, and the transport with its ciphers, windows and channels.
"""

from __future__ import annotations

import contextlib
import logging
import math
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from corra.errors import CorraError, NotStarted, Unreachable
from corra.lean_imports import load_fabric
from corra.model.host import Host
from corra.transport import host_keys, sudo
from corra.transport.channel import CONNECT_S, Channel, first_line
from corra.transport.command import login_command
from corra.transport.host_keys import Key
from corra.transport.ssh_config import Question, SshSettings, config_path

from .beyond import BeyondFabric
from .login import Answers, Login, NobodyToAsk
from .proxied import Proxied
from .session import Order, Session
from .tcp import Carrier

if TYPE_CHECKING:
    from fabric import Connection

# The kernel gives a connection up if sent bytes stay unacknowledged for this long. By itself it
# would take 15 minutes.
SILENCE_MS = 30_000
# How long an open connection may take to open one more channel before a new connection is tried.
# It may have died in a laptop's sleep.
REUSE_S = 5.0
JUMPS_MAX = 8
# Other threads may take all sessions of a new connection before this one gets its own, but hardly
# this often.
CONNECTS_MAX = 3
# A ProxyCommand may be an ssh that was turned away in a burst. One that fails for good is told
# soon.
PROXIES_MAX = 3


class Fabric:
    """Commands on `host` over one Fabric connection, or more if the host limits its sessions.

    It connects at the first `open`. After `close`, the next `open` connects anew.
    """

    def __init__(
        self,
        host: Host,
        *,
        config: Any = None,
        connect_timeout_s: float | None = CONNECT_S,
        accept_new_key: bool = False,
        connection: Connection | None = None,
        jump: str | None = None,
        jumps: int = 0,
        password: str | None = None,
        answers: Answers | None = None,
    ) -> None:
        self.host = host
        # False: where the ssh program may do better, it is to be tried first.
        self.alone = False
        self._answers = answers or Answers()
        self._connected = False
        self._sudo_password = password if host.user else None
        self._config = config
        self._config_path = config_path(config)
        self._connect_timeout_s = connect_timeout_s
        self._accept_new_key = accept_new_key
        self._given = connection
        self._jump = jump
        self._jumps = jumps
        self._settings: SshSettings | None = None
        # Held while a connection is made, which may take long; the list has a lock of its own.
        self._connecting = threading.Lock()
        self._listing = threading.Lock()
        self._open: list[Connection] = (
            [connection] if connection is not None and connection.is_connected else []
        )
        self._gateway: Fabric | None = None
        self._asked: Question | None = None
        self._hasty = True
        self._settling = threading.Lock()
        self._begun: _InThread | None = None

    @property
    def login(self) -> str:
        """Who logs in, by the host or by ssh_config."""
        return self.host.ssh_login or self.settings.user

    @property
    def settings(self) -> SshSettings:
        """What ssh_config means for this host."""
        with self._settling:
            if self._settings is None:
                asked, self._asked = (
                    self._asked,
                    None,
                )  # it answers once, and this may be the second try
                self._settings = (asked or Question(self.host, self._config_path)).answer()
            return self._settings

    def begin(self) -> None:
        if self._begun is None and not self._open:
            # ssh -G and the network do their part while fabric is imported. The keys are exchanged
            # while the caller imports the rest. Two threads that import at once would hinder each
            # other.
            if self._settings is None:
                self._asked = Question(self.host, self._config_path)
            self._answers.begin()
            dialling = _InThread(lambda: self._socket(*self._time()))
            load()
            self._begun = _InThread(lambda: self._connect_first(dialling))

    def _connect_first(self, dialling: _InThread) -> None:
        with self._connecting:
            if not self._open:
                self._add(dialling)

    def open(self, command: str) -> Channel:
        if (password := self._sudo_password) is None:
            return self._start(login_command(command, self.host))
        channel = self._start(login_command(sudo.gated(command), self.host, password=True))
        return sudo.enter(channel, password, self.host, lambda: self.login)

    def _start(self, text: str) -> Channel:
        begun, self._begun = self._begun, None
        if begun is not None:
            with contextlib.suppress(NobodyToAsk):
                begun.result()
        order = Order(text, () if self._given_open else self.settings.environment())
        made = 0
        while True:
            before = list(self._open)
            for connection in before:
                if (session := self._session(connection, order)) is not None:
                    return session
            if made == CONNECTS_MAX:
                raise self._unreachable(f"{self._where()} let {self.login} in, but starts nothing")
            with self._connecting:
                # Another thread may have connected while this one waited. Compared by identity:
                # all of Fabric's connections to one host are equal.
                if all(any(each is tried for tried in before) for each in self._open):
                    # Later the terminal shows a program's output, and no question.
                    if not self._connected:
                        self._answers.allow()
                    self._add()
                    self._answers.forbid()
                    made += 1

    def _add(self, dialling: _InThread | None = None) -> None:
        """Connect, for all that want a session; `_connecting` is held."""
        connection = self._connect(dialling)
        with self._listing:
            self._open.append(connection)
        self._connected = True

    @property
    def _given_open(self) -> bool:
        """Whether the caller gave a connection that is open; ssh_config then has no part in it."""
        return self._given is not None and any(each is self._given for each in self._open)

    def _session(self, connection: Connection, order: Order) -> Session | None:
        """Return a new session on an open connection, which has `order`.

        None if the connection takes no more sessions, or has died; no agent was asked for anything
        yet.
        """
        from paramiko import ChannelException, SSHException

        from .transport import Transport

        transport = connection.transport
        try:
            if self._hasty and isinstance(transport, Transport):
                return Session(transport.open_running(order, REUSE_S), order)
            return Session(transport.open_session(timeout=REUSE_S), order)
        except ChannelException:  # MaxSessions
            return None
        except (SSHException, EOFError, OSError):
            self._hasty = False
            self._drop(connection)
            return None

    def _drop(self, connection: Connection) -> None:
        with self._listing:
            known = any(each is connection for each in self._open)
            self._open = [each for each in self._open if each is not connection]
        if known:
            connection.close()

    def listen_there(self, taken: Callable[[Any], None]) -> int:
        """Have the host listen on its loopback, and return the port. Raises Unreachable.

        `taken` gets a paramiko channel for each connection.
        """
        from paramiko import SSHException

        if not self._open:
            with self._connecting:
                self._add()
        try:
            port: int = self._open[0].transport.request_port_forward(
                "127.0.0.1", 0, lambda channel, *_: taken(channel)
            )
        except (SSHException, EOFError, OSError) as error:
            raise self._unreachable(
                "it forwards no port", str(error), "AllowTcpForwarding in its sshd_config"
            ) from error
        return port

    def close(self) -> None:
        """Close all connections that stand, at once; one that is being made is a new one."""
        with self._listing:
            gone, self._open = self._open, []
        for connection in gone:
            if connection is not self._given:  # its owner closes it
                connection.close()
        if self._gateway is not None:
            self._gateway.close()

    def _time(self) -> tuple[float, float]:
        """Return the deadline of a connection that is begun now, and the seconds until then."""
        limit = self._connect_timeout_s or self.settings.connect_timeout_s or CONNECT_S
        return time.monotonic() + limit, limit

    def _connect(self, dialling: _InThread | None = None) -> Connection:
        """Return a new open connection; `dialling` is one that has begun.

        Raises Unreachable, HostKey, Auth.
        """
        deadline, limit = self._time()
        pause_s = 0.1
        tries = 0
        while True:
            tries += 1
            try:
                return self._attempt(
                    dialling or _InThread(lambda: self._socket(deadline, limit)), deadline, limit
                )
            except _TurnedAwayError as error:
                # In a burst sshd drops some connections before its greeting (MaxStartups), and a
                # little later it takes them.
                dialling = None
                if error.proxied and tries == PROXIES_MAX:
                    raise self._unreachable(error.said) from error
                import random

                jitter = random.uniform(0.5, 1.0)  # noqa: S311 - no secret
                pause_s = min(2.0, pause_s * 2) * jitter
                if time.monotonic() + pause_s > deadline and error.proxied:
                    raise self._unreachable(error.said) from error
                if time.monotonic() + pause_s > deadline:
                    raise self._unreachable(
                        f"{self._where()} closed the connection before it began", error.said
                    ) from error
                time.sleep(pause_s)

    def _attempt(self, dialling: _InThread, deadline: float, limit: float) -> Connection:
        load()
        import paramiko

        logging.getLogger("paramiko").addHandler(_SILENT)
        connection = self._new()
        kwargs = dict(connection.connect_kwargs)
        login = Login(
            self.host,
            connection.user,
            self.settings,
            kwargs,
            answers=self._answers,
            alone=self.alone,
        )
        offered: list[Key] = []

        class Policy(paramiko.MissingHostKeyPolicy):  # type: ignore[misc] # paramiko has no hints
            """Checks the host key. paramiko asks it each time, as it was given no known keys."""

            @staticmethod
            def missing_host_key(client: Any, hostname: str, key: Any) -> None:
                offered.append(Key.of(key.get_name(), key.asbytes()))
                host_keys.check(
                    offered[0],
                    self.host,
                    self.settings,
                    accept_new=self._accept_new_key,
                    config=self._config_path,
                )

        carrier = dialling.result(deadline)
        if carrier is None:
            raise self._unreachable("no answer from the name service")
        left = max(1.0, deadline - time.monotonic())
        connection.client.set_missing_host_key_policy(Policy())
        connection.connect_timeout = math.ceil(left)
        connection.connect_kwargs = {
            **kwargs,
            "sock": carrier,
            "transport_factory": self._transport,
            "auth_strategy": login,
            "banner_timeout": left,
            "auth_timeout": left,
        }
        try:
            connection.open()
        except BaseException as error:
            transport = connection.client.get_transport()
            greeted = transport is not None and bool(transport.remote_version)
            proxied = carrier if isinstance(carrier, Proxied) else None
            ended = "" if proxied is None or greeted else proxied.end()
            connection.client.close()
            carrier.close()
            if isinstance(error, (CorraError, BeyondFabric, NobodyToAsk)):
                raise
            if not isinstance(error, Exception):
                raise
            if ended:
                raise _TurnedAwayError(ended, proxied=True) from error
            late = time.monotonic() > deadline - 0.1
            raise self._meaning(
                error,
                greeted=greeted,
                judged=bool(offered),
                late=late,
                limit=limit,
                said="" if proxied is None else proxied.said,
            ) from error
        connection.transport.calm()
        return connection

    def _new(self) -> Connection:
        """Return a Fabric connection that isn't open.

        It gets a copy of the config, as Fabric writes one host's keys into it.
        """
        from fabric import Config, Connection as New
        from paramiko import SSHConfig

        if self._given is not None and not self._given.is_connected:
            return self._given
        known = self.settings
        text = f"Host *\nHostName {known.hostname}\nPort {known.port}\nUser {known.user}\n"
        base = self._given.config if self._given is not None else self._config
        config = Config(ssh_config=SSHConfig()) if base is None else base.clone(into=Config)
        ssh_config = SSHConfig.from_text(text)
        config._set(base_ssh_config=ssh_config)  # noqa: SLF001 - clone() takes no ssh_config
        kwargs = None if self._given is None else _without(self._given.connect_kwargs, *_OURS)
        # False, not None: the jump is made by this module.
        return New(self.host.name, gateway=False, config=config, connect_kwargs=kwargs)

    def _transport(self, carrier: Any, **kwargs: Any) -> Any:
        from .transport import Transport

        transport = Transport(carrier, **kwargs)
        if emptied := transport.restrict(self.settings):
            raise self._beyond(emptied)
        options = transport.get_security_options()
        options.key_types = host_keys.types_first(
            options.key_types, host_keys.keys_to_ask_for(self.settings)
        )
        return transport

    def _look_beyond(self) -> None:
        """Raise BeyondFabric if ssh_config sets what only the ssh program can do."""
        if reasons := self.settings.beyond_fabric:
            raise self._beyond(reasons)
        if host_keys.has_authority(self.settings):
            raise self._beyond(["@cert-authority"], "known_hosts has")

    def _beyond(self, reasons: Sequence[str], who: str = "ssh_config sets") -> BeyondFabric:
        what = f"{who} {', '.join(reasons)}"
        if self._jumps:
            what += f" for {self.host.name}"
        return BeyondFabric(
            [what],
            NotStarted(f"{what}, which takes the ssh program", host=self.host.name),
        )

    def _socket(self, deadline: float, limit: float) -> Any:
        """Return the way of the bytes: TCP, a ProxyCommand's pipes, or a channel of a jump host."""
        known = self.settings
        self._look_beyond()
        gateway = (
            self._given.gateway
            if self._given is not None
            else getattr(self._config, "gateway", None)
        )
        jump = self._jump if self._jump is not None else known.proxy_jump
        if self._given is not None and self._given.gateway is None:
            jump = None
        if isinstance(gateway, str):
            return Proxied(gateway)
        if jump or gateway:
            return self._through(self._jump_from(jump, gateway), deadline)
        if known.proxy_command:
            return Proxied(known.proxy_command)
        address, port = (
            (self._given.host, int(self._given.port))
            if self._given is not None
            else (known.hostname, known.port)
        )
        return self._dial(address, port, deadline, limit)

    def _jump_from(self, jump: str | None, gateway: Any) -> Fabric:
        if self._gateway is None:
            if self._jumps >= JUMPS_MAX:
                raise NotStarted(
                    f"ProxyJump goes through more than {JUMPS_MAX} hosts, or in a circle",
                    host=self.host.name,
                )
            if jump:
                *before, last = jump.split(",")
                hop = Host.parse(last.strip().removeprefix("ssh://").rstrip("/"))
                rest, given = ",".join(before) or None, None
            else:
                hop, rest, given = host_of(gateway), None, gateway
            self._gateway = Fabric(
                hop,
                config=self._config,
                connect_timeout_s=self._connect_timeout_s,
                accept_new_key=self._accept_new_key,
                connection=given,
                jump=rest,
                jumps=self._jumps + 1,
                answers=self._answers,
            )
            self._gateway.alone = self.alone
        return self._gateway

    def _through(self, gateway: Fabric, deadline: float) -> Any:
        try:
            return gateway.tunnel(self.settings.hostname, self.settings.port, deadline)
        except CorraError as error:
            why = f"by way of {gateway.host}: {error.why}"
            raise error.but(why=why, host=self.host.name) from error

    def tunnel(self, address: str, port: int, deadline: float) -> Any:
        """Return a channel from this host to `address`, to be used like a socket.

        Raises Unreachable, HostKey, Auth.
        """
        from paramiko import ChannelException, SSHException

        with self._connecting:
            with self._listing:
                self._open = [each for each in self._open if each.is_connected]
            if not self._open:
                self._add()
            connection = self._open[0]
        left = max(1.0, deadline - time.monotonic())
        try:
            return connection.transport.open_channel(
                "direct-tcpip", (address, port), ("127.0.0.1", 0), timeout=left
            )
        except ChannelException as error:
            raise self._unreachable(
                f"it can't reach {address} port {port}: {error.text}"
            ) from error
        except (SSHException, EOFError, OSError) as error:
            raise self._unreachable(f"link lost: {error}") from error

    def _dial(self, name: str, port: int, deadline: float, limit: float) -> socket.socket:
        """Return a TCP connection. The addresses share the time: a dead IPv6 leaves IPv4 some."""
        try:
            # As bytes: for a str Python loads its tables of other alphabets, which takes 5 ms.
            found = socket.getaddrinfo(
                name.encode() if name.isascii() else name,
                port,
                self.settings.address_family,
                socket.SOCK_STREAM,
            )
        except socket.gaierror as error:
            other = "" if name == self.host.name else f": {name}"
            raise self._unreachable(
                f"host name not found{other}",
                hint=f"ssh_config has no Host {self.host.ssh_name}, and neither has DNS",
            ) from error
        failures: list[OSError] = []
        for n, (family, kind, protocol, _, address) in enumerate(found):
            carrier = Carrier(family, kind, protocol)
            try:
                carrier.settimeout(max(0.5, (deadline - time.monotonic()) / (len(found) - n)))
                carrier.connect(address)
                carrier.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                carrier.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, SILENCE_MS)
                carrier.greet()
            except OSError as error:
                carrier.close()
                error.filename = address[0]
                failures.append(error)
            else:
                return carrier
        # A refusal says more than a silence: there is a machine.
        worst = next(
            (each for each in failures if isinstance(each, ConnectionRefusedError)), failures[0]
        )
        where = f"{worst.filename} port {port}"
        if isinstance(worst, ConnectionRefusedError):
            raise self._unreachable(f"connection refused by {where}") from worst
        if isinstance(worst, TimeoutError):
            raise self._unreachable(f"no answer from {where} in {limit:g} s") from worst
        raise self._unreachable(f"{where}: {worst.strerror or worst}") from worst

    def _meaning(
        self,
        error: Exception,
        *,
        greeted: bool,
        judged: bool,
        late: bool,
        limit: float,
        said: str,
    ) -> Exception:
        """Return the error that an error in the middle of the handshake means."""
        from paramiko import IncompatiblePeer, SSHException

        text = str(error) or type(error).__name__
        if not isinstance(error, (SSHException, EOFError, OSError)):
            return error
        if late or isinstance(error, TimeoutError) or "imeout" in text:
            return self._unreachable(f"no answer from {self._where()} in {limit:g} s", said)
        if not greeted:
            return _TurnedAwayError(text)
        if judged:
            return self._unreachable(
                f"{self._where()} broke off the login: {first_line(text.encode())}"
            )
        alone = self._unreachable(
            f"no common ground with {self._where()}: {first_line(text.encode())}"
        )
        if isinstance(error, IncompatiblePeer):
            return BeyondFabric(["Fabric has no algorithm that the host takes"], alone)
        return alone

    def _where(self) -> str:
        """Return who should have answered. Behind a ProxyCommand, no address was dialled."""
        if self.settings.proxy_command and not self.settings.proxy_jump and self._given is None:
            return "its ProxyCommand"
        return f"{self.settings.hostname} port {self.settings.port}"

    def _unreachable(self, why: str, said: str = "", hint: str = "") -> Unreachable:
        return Unreachable(why, host=self.host.name, hint=[each for each in (said, hint) if each])


def host_of(connection: Connection) -> Host:
    """Return the Host that an existing Fabric connection leads to."""
    return Host(connection.original_host, int(connection.port), connection.user)


def name_of(connection: Connection) -> str:
    """Return what a person types for the host of a Fabric connection.

    The port is left out if ssh_config has the same.
    """
    host = replace(host_of(connection), login=None)
    implied = int(connection.ssh_config.get("port", 22))
    return str(replace(host, port=None) if host.port == implied else host)


def load() -> None:
    """Import all that a connection needs, which takes a fifth of a second."""
    load_fabric()
    from . import transport  # noqa: F401


_SILENT = logging.NullHandler()
# What `_attempt` gives to one connection; the next one must not get it.
_OURS = ("sock", "transport_factory", "auth_strategy", "banner_timeout", "auth_timeout")


def _without(kwargs: Any, *names: str) -> dict[str, Any]:
    return {name: value for name, value in dict(kwargs).items() if name not in names}


class _TurnedAwayError(Exception):
    """The host hung up before it sent its greeting."""

    def __init__(self, said: str, *, proxied: bool = False) -> None:
        self.said = said
        self.proxied = proxied
        super().__init__(said)


class _InThread:
    """A call in a thread. getaddrinfo can't be interrupted, and imports needn't wait for it."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self._done = threading.Event()
        self._call = call
        self._value: Any = None
        self._error: BaseException | None = None
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        try:
            self._value = self._call()
        except BaseException as error:  # noqa: BLE001 - `result` raises it
            self._error = error
        self._done.set()

    def result(self, deadline: float | None = None) -> Any:
        """Return the call's value or raise its error; None if it lasts past `deadline` + 1 s."""
        if not self._done.wait(
            None if deadline is None else max(0.0, deadline - time.monotonic()) + 1.0
        ):
            return None
        if self._error is not None:
            raise self._error
        return self._value
