"""Commands on this machine, without ssh."""

from __future__ import annotations

import getpass

from corra.errors import Misuse
from corra.model.host import Host

from . import sudo
from .channel import Channel
from .command import Options, build_command
from .pipes import Process


class Local:
    """Commands on this machine, as who runs corra, or by sudo as another user."""

    remark = ""

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
        try:
            channel = Process(argv)
        except (FileNotFoundError, PermissionError) as error:
            raise Misuse(f"no {argv[0]} on this machine", host=self.host.name) from error
        return (
            channel
            if password is None
            else sudo.enter(channel, password, self.host, lambda: self.login)
        )

    def close(self) -> None:
        """There is no connection to let go of."""
