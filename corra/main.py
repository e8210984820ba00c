"""The `corra` command: the same verbs as `inv` finds in tasks.py, wherever one stands."""

from __future__ import annotations

import getpass
import os
import sys

from .lean_imports import without_mock

with without_mock():
    from invoke.collection import Collection
    from invoke.parser.argument import Argument
    from invoke.program import Program

from . import tasks
from .cli.deliver import deliver
from .cli.process import own_process
from .cli.serve import serve
from .errors import EPIPE_CODE

# As Fabric asks.
_LOGIN_PROMPT = "Enter login password for use with SSH auth: "
_SUDO_PROMPT = "sudo password on the hosts, of the user who logs in there: "


class _Corra(Program):
    """Invoke's program over our verbs; what the version is, is looked up only by who asks for it."""

    def print_version(self) -> None:
        from corra.on_host.agent.contract import VERSION

        print(f"{self.name} {VERSION}")

    def core_args(self) -> list[Argument]:
        """Have Fabric's own flag beside Invoke's."""
        asks = Argument(
            names=("prompt-for-login-password",),
            kind=bool,
            default=False,
            help="Ask for the password of the login at the start.",
        )
        return [*super().core_args(), asks]

    def update_config(self, merge: bool = True) -> None:
        """Ask for sudo's password in words that say whose it is; Invoke's name its own setting."""
        asked = self.args["prompt-for-sudo-password"]
        password = getpass.getpass(_SUDO_PROMPT) if asked.value else None
        asked.value = False
        super().update_config(merge)
        if self.args["prompt-for-login-password"].value:
            known = self.config.get("connect_kwargs") or {}
            password_too = {**known, "password": getpass.getpass(_LOGIN_PROMPT)}
            self.config.update(connect_kwargs=password_too)
        if password is not None:
            self.config.sudo.password = password


ns = Collection(*tasks.ns.tasks.values(), serve, deliver)
program = _Corra(name="corra", binary="corra", binary_names=["corra"], namespace=ns)


def main() -> None:
    """Run the command line."""
    own_process()
    try:
        program.run(sys.argv)
    except BrokenPipeError:
        # Invoke's own --help and --list, into a pipe whose reader has gone; what is still buffered has nowhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EPIPE_CODE)
