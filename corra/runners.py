"""Bytes to a command and back: through Fabric's connection, through the ssh program, or here without ssh."""

from __future__ import annotations

import getpass
import importlib
import shutil
from typing import Any

from . import sudo
from .channel import Channel, LinkLost, Runner
from .command import Options, build_command, build_program
from .connection import CONNECT_S, Fabric, host_of
from .errors import CorraError, Misuse
from .openssh import SshProcess, failure
from .process import Process
from .program import Host
from .sshconfig import SSH_PORT, Settings, config_path, settings

__all__ = ["Channel", "Elsewhere", "Fabric", "LinkLost", "Local", "OpenSSH", "Runner", "runner"]


def __getattr__(name: str) -> Any:
    """`Durable`, the Runner for Fabric's own `Connection.run`; it imports fabric, and stands below all that is here."""
    if name == "Durable":
        return importlib.import_module(".durable", __package__).Durable
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# Three of these without an answer and ssh gives the link up.
ALIVE_S = 5.0


class Local:
    """Commands on this machine, as me or by sudo as somebody else."""

    def __init__(self, host: Host, *, password: str | None = None) -> None:
        self.host = host
        self._password = password if host.user else None

    @property
    def login(self) -> str:
        return getpass.getuser()

    def begin(self) -> None:
        """There is no connection to make."""

    def open(self, command: str) -> Channel:
        password = self._password
        options = Options(password=password is not None)
        argv = build_command(
            command if password is None else sudo.gated(command), self.host, options=options
        )
        if not shutil.which(argv[0]):
            raise Misuse(f"no {argv[0]} on this machine", host=self.host.name)
        channel = Process(argv)
        return (
            channel
            if password is None
            else sudo.enter(channel, password, self.host, lambda: self.login)
        )

    def close(self) -> None:
        """There is no connection to let go of."""


class OpenSSH:
    """Commands on `host` through the ssh program, with everything it knows: ControlMaster, FIDO keys, GSSAPI, ServerAlive.

    Where another user of this machine calls it, it has that user's keys, known hosts and ssh_config, and none of ours.
    """

    def __init__(
        self,
        host: Host,
        *,
        config: Any = None,
        connect_timeout_s: float | None = CONNECT_S,
        accept_new_key: bool = False,
        password: str | None = None,
    ) -> None:
        self._look_for_programs(host)
        self.host = host
        self.password = password if host.as_user else None
        self._config_path = None if host.caller else config_path(config)
        self._connect_timeout_s = connect_timeout_s
        self._accept_new_key = accept_new_key
        self._settings: Settings | None = None
        self._apart = False

    @property
    def login(self) -> str:
        """Who is to be in sudoers: on this machine we are, there whoever logs in."""
        if self.host.caller:
            return self._me if self.host.user is None else self.host.login or self.host.caller
        return self.host.login or self.settings.user

    @property
    def _me(self) -> str:
        """Who calls ssh, or sudo to have it called."""
        return getpass.getuser()

    def _look_for_programs(self, host: Host) -> None:
        for program in ("ssh", *(["sudo"] if host.caller else [])):
            if not shutil.which(program):
                raise Misuse(f"no {program} program on this machine", host=host.name)

    @property
    def connect_timeout_s(self) -> float:
        """How long a connection may take to come about."""
        return self._connect_timeout_s or self.settings.connect_timeout_s or CONNECT_S

    @property
    def settings(self) -> Settings:
        """What ssh_config means for this host."""
        if self._settings is None:
            self._settings = settings(self.host, self._config_path)
        return self._settings

    def begin(self) -> None:
        """Nothing yet: ssh is started together with its command."""

    def argv(self, command: str, *options: str) -> list[str]:
        """Return the argv that `open` starts, with more `options` for ssh."""
        accept = self._accept_new_key and self.settings.strict in {"ask", "yes"}
        # A master that doesn't go into the background would be ours to end, with all that goes through it; and one that is silent (its
        # machine slept, its line is cut) would be silent to each new command as well.
        master = (
            ["-oControlPath=none"]
            if self._apart
            else []
            if self.settings.control_persist
            else ["-oControlMaster=no"]
        )
        how = Options(
            config=self._config_path,
            connect_timeout_s=self.connect_timeout_s,
            # What ssh_config says goes before our own idea.
            alive_interval_s=None if self.settings.alive_interval_s else ALIVE_S,
            password=self.password is not None,
            ssh=(*(["-oStrictHostKeyChecking=accept-new"] if accept else []), *options, *master),
        )
        return build_command(command, self.host, options=how)

    def failure(self, said: str) -> Exception:
        """Return the error that ssh's words mean: a CorraError, or LinkLost where they don't say whether it was let in."""
        return failure(
            said,
            self.host,
            self.settings,
            self.connect_timeout_s,
            self._config_path,
            self.argv("true"),
        )

    def open(self, command: str) -> Channel:
        argv = self.argv(command if self.password is None else sudo.gated(command))
        channel = SshProcess(
            argv, self.host, self.settings, self.connect_timeout_s, self._config_path
        )
        return (
            channel
            if self.password is None
            else sudo.enter(channel, self.password, self.host, lambda: self.login)
        )

    def close(self) -> None:
        """Let later commands connect anew: each has an ssh of its own, but it may have gone through a ControlMaster, which lives on."""
        self._apart = True


class Elsewhere(OpenSSH):
    """The ssh program of another machine, `keeper`: with its ssh_config, keys and known hosts, and none of ours."""

    def __init__(self, host: Host, keeper: Runner, **how: Any) -> None:
        self._keeper = keeper
        super().__init__(host, **how)
        self._config_path = None

    def _look_for_programs(self, host: Host) -> None:
        """What is there its own words will tell."""

    @property
    def _me(self) -> str:
        return self._keeper.login

    @property
    def settings(self) -> Settings:
        if self._settings is None:
            self._settings = Settings(
                self.host.name, self.host.port or SSH_PORT, self.host.login or self._me
            )
        return self._settings

    def failure(self, said: str) -> Exception:
        error = failure(said, self.host, self.settings, self.connect_timeout_s, None, None)
        if isinstance(error, CorraError):
            error.hint = tuple(f"on {self._keeper.host}:  {line}" for line in error.hint)
        return error

    def open(self, command: str) -> Channel:
        channel = self._keeper.open(
            build_program(self.argv(command if self.password is None else sudo.gated(command)))
        )
        return (
            channel
            if self.password is None
            else sudo.enter(channel, self.password, self.host, lambda: self.login)
        )


def runner(
    target: Host | Any,
    *,
    via: str = "fabric",
    config: Any = None,
    connect_timeout_s: float | None = CONNECT_S,
    accept_new_key: bool = False,
    password: str | None = None,
) -> Runner:
    """Return the Runner for a Host, or for an existing fabric.Connection, whose transport is used while it is open.

    `config` is an Invoke config; `connect_timeout_s` None leaves it to ssh_config; `password` is for the sudo on the way. Another user of
    this machine can only call the ssh program, so that is what is used for one. Nothing is connected yet. Raises Misuse.
    """
    if not isinstance(target, Host):
        return Fabric(
            host_of(target),
            config=target.config,
            connection=target,
            connect_timeout_s=connect_timeout_s,
            accept_new_key=accept_new_key,
            password=password,
        )
    if target.is_local:
        return Local(target, password=password)
    how: dict[str, Any] = {
        "config": config,
        "connect_timeout_s": connect_timeout_s,
        "accept_new_key": accept_new_key,
        "password": password,
    }
    match via:
        case "fabric" if target.caller is None:
            return Fabric(target, **how)
        case "fabric" | "openssh":
            return OpenSSH(target, **how)
    raise Misuse(f"no transport {via!r}: there are fabric and openssh")
