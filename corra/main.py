"""The `corra` command: the same verbs as `inv` finds in tasks.py, wherever one stands."""

from __future__ import annotations

import getpass
import os
import shlex
import sys

from .lean_imports import without_mock

with without_mock():
    from invoke.collection import Collection
    from invoke.parser.argument import Argument
    from invoke.program import Program
    from invoke.util import yaml  # type: ignore[attr-defined]

from . import tasks
from .cli.deliver import deliver
from .cli.process import open_standard, own_process, printed
from .cli.serve import serve
from .cli.verb import CORE_SHOWS, CORE_WITH_VALUE, VERBS
from .cli.words import nearest
from .errors import MISUSE, Misuse

# Core flags of Invoke that a verb has as well.
_CORE = frozenset({"-e", "--echo", "-R", "--dry", "--hide", "-f"})
# Verbs of other tools, and ours that do the same.
_SYNONYMS = {
    "ls": "ps",
    "list": "ps",
    "stop": "kill",
    "cancel": "kill",
    "start": "run",
    "exec": "run",
    "log": "logs",
    "tail": "logs",
    "watch": "attach",
    "fg": "attach",
    "restart": "again",
    "rerun": "again",
    "check": "doctor",
    "clean": "gc",
    "prune": "gc",
    "rm": "gc",
    "show": "status",
    "info": "status",
}

# As Fabric asks.
_LOGIN_PROMPT = "Enter login password for use with SSH auth: "
_SUDO_PROMPT = "sudo password on the hosts, of the user who logs in there: "


class _Corra(Program):
    """Invoke's program over our verbs. It looks the version up only for --version."""

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

    def print_help(self) -> None:
        """Print the verbs, a line each, on a screen of 80 columns and 24 rows."""
        print("Usage: corra VERB [flags] [ID.. | -- COMMAND]      more: corra VERB --help\n")
        for name, verb in ns.tasks.items():
            print(f"  {name:<8} {(verb.__doc__ or '').splitlines()[0].partition(': corra ')[0]}")
        print(
            "\nFirst:     corra run --host local -- uname -a\n"
            "Detached:  corra run -d --name nightly --host db1 -- ./migrate --all\n"
            "           corra attach nightly\n"
            "For each verb: -R say what would be done; -q; --json.  Also: corra --version"
        )

    def parse_core(self, argv: list[str] | None) -> None:
        if why := _refusal(list(argv or ())[1:]):
            raise Misuse(why, fate="NOT DONE")
        super().parse_core(argv)


def _refusal(words: list[str]) -> str:
    """Return what is wrong with the words before the verb, or nothing."""
    at = 0
    while at < len(words) and words[at] != "--":
        word = words[at]
        if not word.startswith("-"):
            if word in VERBS:
                return ""
            meant = _SYNONYMS.get(word)
            near = f" (did you mean {meant}?)" if meant else nearest(word, ns.tasks)
            return f"no verb {word!r}{near};  corra --help lists the verbs"
        name = word.partition("=")[0]
        if name in CORE_SHOWS or name.startswith("--complete"):
            return ""
        if any(name in flag.typed for verb in VERBS.values() for flag in verb.flags) and (
            name not in _CORE
        ):
            verb = next((each for each in words[at:] if each in VERBS), "VERB")
            rest = [each for each in words if each != verb]
            return f"{name} stands before the verb:  {shlex.join(['corra', verb, *rest])}"
        if name in ("-f", "--config"):
            file = word.partition("=")[2] or "".join(words[at + 1 : at + 2])
            if not os.path.isfile(file):
                return f"{name}: no such file: {file}"
        at += 2 if word in CORE_WITH_VALUE else 1
    return ""


ns = Collection(*tasks.ns.tasks.values(), serve, deliver)
program = _Corra(name="corra", binary="corra", binary_names=["corra"], namespace=ns)


def main() -> None:
    """Run the command line."""
    open_standard()
    own_process()
    with printed():
        try:
            program.run(sys.argv)
        except yaml.MarkedYAMLError as error:
            at = error.problem_mark or error.context_mark
            where = f"{at.name} line {at.line + 1}" if at else "the configuration"
            print(Misuse(f"{where}: {error.problem}", fate="NOT DONE").line, file=sys.stderr)
            sys.exit(MISUSE)
