"""Bytes to a command and back: through Fabric's connection, through the ssh program, or here without ssh."""

from __future__ import annotations

import getpass
import importlib
import shutil
from typing import Any

from .channel import Channel, LinkLost, Runner
from .command import Ssh, build_command
from .connection import CONNECT_S, Fabric, host_of
from .errors import Misuse
from .openssh import SshProcess
from .process import Process
from .program import Host
from .sshconfig import Settings, config_path, settings

__all__ = ["Channel", "Fabric", "LinkLost", "Local", "OpenSSH", "Runner", "runner"]


def __getattr__(name: str) -> Any:
    """`Durable`, the Runner for Fabric's own `Connection.run`; it imports fabric, and stands below all that is here."""
    if name == "Durable":
        return importlib.import_module(".durable", __package__).Durable
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# Three of these without an answer and ssh gives the link up.
ALIVE_S = 5.0


class Local:
    """Commands on this machine, as me or by sudo as somebody else."""

    def __init__(self, host: Host) -> None:
        self.host = host

    @property
    def login(self) -> str:
        return getpass.getuser()

    def begin(self) -> None:
        """There is no connection to make."""

    def open(self, command: str) -> Channel:
        argv = build_command(command, self.host)
        if not shutil.which(argv[0]):
            raise Misuse(f"no {argv[0]} on this machine", host=self.host.name)
        return Process(argv)

    def close(self) -> None:
        """There is no connection to let go of."""


class OpenSSH:
    """Commands on `host` through the ssh program, with everything it knows: ControlMaster, FIDO keys, GSSAPI, ServerAlive."""

    def __init__(
        self, host: Host, *, config: Any = None, connect_timeout_s: float | None = CONNECT_S, accept_new_key: bool = False
    ) -> None:
        if not shutil.which("ssh"):
            raise Misuse("no ssh program on this machine", host=host.name)
        self.host = host
        self._config_path = config_path(config)
        self._connect_timeout_s = connect_timeout_s
        self._accept_new_key = accept_new_key
        self._settings: Settings | None = None

    @property
    def login(self) -> str:
        return self.host.login or self._known.user

    @property
    def _known(self) -> Settings:
        if self._settings is None:
            self._settings = settings(self.host, self._config_path)
        return self._settings

    def begin(self) -> None:
        """Nothing yet: ssh is started together with its command."""

    def open(self, command: str) -> Channel:
        limit_s = self._connect_timeout_s or self._known.connect_timeout_s or CONNECT_S
        ssh = Ssh(
            config=self._config_path,
            connect_timeout_s=limit_s,
            # What ssh_config says goes before our own idea.
            alive_interval_s=None if self._known.alive_interval_s else ALIVE_S,
            options=("-oStrictHostKeyChecking=accept-new",) if self._accept_new_key and self._known.strict in {"ask", "yes"} else (),
        )
        return SshProcess(build_command(command, self.host, ssh), self.host, self._known, limit_s, self._config_path)

    def close(self) -> None:
        """Each command has an ssh of its own, and a ControlMaster's life is ssh_config's business."""


def runner(
    target: Host | Any,
    *,
    via: str = "fabric",
    config: Any = None,
    connect_timeout_s: float | None = CONNECT_S,
    accept_new_key: bool = False,
) -> Runner:
    """Return the Runner for a Host, or for an existing fabric.Connection, whose transport is used while it is open.

    `config` is an Invoke config; `connect_timeout_s` None leaves it to ssh_config. Nothing is connected yet. Raises Misuse.
    """
    if not isinstance(target, Host):
        return Fabric(
            host_of(target), config=target.config, connection=target, connect_timeout_s=connect_timeout_s, accept_new_key=accept_new_key
        )
    if target.is_local:
        return Local(target)
    match via:
        case "fabric":
            return Fabric(target, config=config, connect_timeout_s=connect_timeout_s, accept_new_key=accept_new_key)
        case "openssh":
            return OpenSSH(target, config=config, connect_timeout_s=connect_timeout_s, accept_new_key=accept_new_key)
    raise Misuse(f"no transport {via!r}: there are fabric and openssh")
