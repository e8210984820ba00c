"""Bytes to a command and back: through Fabric's connection, through the ssh program, or here without ssh."""

from __future__ import annotations

import getpass
import shutil
from typing import Any

from .channel import Channel, LinkLost, Runner
from .command import build_command
from .errors import Misuse
from .process import Process
from .program import Host

__all__ = ["Channel", "LinkLost", "Local", "Runner", "runner"]


class Local:
    """Commands on this machine, as me or by sudo as somebody else."""

    def __init__(self, host: Host) -> None:
        self.host = host

    @property
    def login(self) -> str:
        return getpass.getuser()

    def open(self, command: str) -> Channel:
        argv = build_command(command, self.host)
        if not shutil.which(argv[0]):
            raise Misuse(f"no {argv[0]} on this machine", host=self.host.name)
        return Process(argv)

    def close(self) -> None:
        """There is no connection to let go of."""


def runner(host: Any, *, via: str = "fabric", config: Any = None, connect_timeout_s: float = 15.0, accept_new_key: bool = False) -> Runner:
    if host.is_local:
        return Local(host)
    raise NotImplementedError
