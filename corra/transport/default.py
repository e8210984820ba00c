"""The default link: Fabric's connection, or the ssh program where ssh_config wants more."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from corra.errors import CorraError, Misuse, NotStarted
from corra.model.host import Host

from .channel import CONNECT_S, Channel, LinkLost
from .fabric.beyond import BeyondFabric
from .fabric.connection import Fabric
from .ssh_config import SshSettings

if TYPE_CHECKING:
    from .openssh import OpenSSH


class DefaultLink:
    """Commands on `host` through Fabric, or through the ssh program where Fabric can't do it.

    Which of the two it is turns out at the first `open`.
    """

    def __init__(
        self,
        host: Host,
        *,
        config: Any = None,
        connect_timeout_s: float | None = CONNECT_S,
        accept_new_key: bool = False,
        connection: Any = None,
        password: str | None = None,
    ) -> None:
        self.host = host
        self._how: dict[str, Any] = {
            "config": config,
            "connect_timeout_s": connect_timeout_s,
            "accept_new_key": accept_new_key,
            "password": password,
        }
        self._connection = connection
        self._fabric = Fabric(host, connection=connection, **self._how)
        self._ssh: OpenSSH | None = None
        self._turning = threading.Lock()
        self.remark = ""

    @property
    def login(self) -> str:
        return self._fabric.login

    @property
    def settings(self) -> SshSettings:
        """What ssh_config means for this host."""
        return self._fabric.settings

    def begin(self) -> None:
        if self._ssh is None:
            self._fabric.begin()

    def open(self, command: str) -> Channel:
        while self._ssh is None:
            try:
                return self._fabric.open(command)
            except BeyondFabric as beyond:
                with self._turning:
                    if self._ssh is None:
                        self._turn_to_ssh(beyond)
        return self._ssh.open(command)

    def _turn_to_ssh(self, beyond: BeyondFabric) -> None:
        """Have the ssh program used from here on, if it does better. Raises CorraError."""
        import shutil

        from .openssh import OpenSSH

        if not shutil.which("ssh"):
            if beyond.certain:
                raise beyond.error
            self._fabric.alone = True
            return
        if self._has_arguments_of_its_own():
            raise NotStarted(
                f"{beyond}: only the ssh program can do it, and not with this Connection",
                host=self.host.name,
                hint=["give the host's name as the target, and put its keys into ssh_config"],
            )
        ssh = OpenSSH(self.host, settings=self.settings, **self._how)
        if beyond.certain or _lets_in(ssh):
            self._ssh = ssh
            self.remark = f"by way of the ssh program: {beyond}"
        else:
            self._fabric.alone = True

    def _has_arguments_of_its_own(self) -> bool:
        """Whether the caller's connection says what the ssh program can't know."""
        if self._connection is None:
            return False
        given = {name: value for name, value in self._connection.connect_kwargs.items() if value}
        # Fabric itself copies these from ssh_config.
        keys = given.pop("key_filename", ())
        keys = [keys] if isinstance(keys, str) else keys
        known = self.settings.identity_files
        return bool(given or self._connection.gateway or any(key not in known for key in keys))

    def listen_there(self, taken: Callable[[Any], None]) -> int:
        """Have the host listen on its loopback, and return the port. Raises Unreachable, Misuse.

        `taken` gets a paramiko channel for each connection.
        """
        try:
            return self._fabric.listen_there(taken)
        except BeyondFabric as beyond:
            raise Misuse(
                f"{beyond}: through the ssh program corra forwards no port", host=self.host.name
            ) from beyond

    def close(self) -> None:
        self._fabric.close()
        if self._ssh is not None:
            self._ssh.close()


def _lets_in(ssh: OpenSSH) -> bool:
    """Whether the ssh program can log in where Fabric can't."""
    try:
        channel = ssh.open("exit 0")
        try:
            while channel.read(ssh.connect_timeout_s * 2):
                pass
            return channel.exit_status() == 0
        finally:
            channel.close()
    except (CorraError, LinkLost, TimeoutError):
        return False
