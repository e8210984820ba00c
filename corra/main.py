"""The command `corra`, and `inv` in a checkout: Invoke's program over the verbs."""

from __future__ import annotations

import contextlib
import getpass
import os
import re
import sys
from collections.abc import Iterator
from typing import Any

from .lean_imports import lean_invoke

with lean_invoke():
    from invoke.collection import Collection
    from invoke.exceptions import (
        AmbiguousEnvVar,
        Exit,
        ParseError,
        UncastableEnvVar,
        UnknownFileType,
    )
    from invoke.parser.argument import Argument
    from invoke.program import Program

from . import tasks
from .cli.core_words import no_such_verb, wrong_words
from .cli.deliver import deliver
from .cli.process import open_standard, printed
from .cli.serve import serve
from .cli.verb import VERBS, Verb
from .errors import MISUSE, Misuse, typed
from .model.words import one_line
from .terminal.signals import dying_of_interrupts

# As Fabric asks.
_LOGIN_PROMPT = "Enter login password for use with SSH auth: "
_SUDO_PROMPT = "sudo password on the hosts, of the user who logs in there: "
_NO_IDEA = r"(?s)No idea what '(.*)' is!"


# What 24 rows hold beside the usage and the examples, with a line for the others' names.
_VERBS_TOLD = 14


class _Typed(Program):
    """Invoke's program, whose answers have the grammar of the verbs' answers.

    It looks the version up only for --version. `root` is where the project's configuration is.
    """

    root: str | None = None

    def print_version(self) -> None:
        from corra.on_host.agent.contract import VERSION

        print(f"corra {VERSION}")

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

    def parse_core(self, argv: list[str] | None) -> None:
        # A value that Invoke can't read, as in `-T 2h ps`, would be its traceback.
        if why := wrong_words(list(argv or ())[1:], VERBS, others=True):
            raise Misuse(why, fate="NOT DONE")
        writes_none = sys.dont_write_bytecode
        with self._refusing():
            super().parse_core(argv)
        # Invoke switches it off. Then each call would compile again what a verb imports from here
        # on, where no installer has compiled it.
        sys.dont_write_bytecode = writes_none

    def parse_tasks(self) -> None:
        if why := wrong_words(self.argv[1:], self._names()):
            raise Misuse(why, fate="NOT DONE")
        with self._refusing():
            super().parse_tasks()

    def parse_cleanup(self) -> None:
        with self._refusing():
            super().parse_cleanup()

    def _names(self) -> list[str]:
        """Return all names of the tasks, none while they aren't loaded."""
        found = self.collection.task_names if hasattr(self, "collection") else {}
        return [*found, *(alias for aliases in found.values() for alias in aliases)]

    @contextlib.contextmanager
    def _refusing(self) -> Iterator[None]:
        """Raise Misuse for what Invoke's parser refuses."""
        try:
            yield
        except ValueError as error:  # of a core flag that takes a number
            raise Misuse(
                f"not a number: {str(error).rpartition(': ')[2]}", fate="NOT DONE"
            ) from error
        except ParseError as error:
            unknown = re.fullmatch(_NO_IDEA, str(error))
            why = no_such_verb(unknown[1], self._names()) if unknown else str(error)
            raise Misuse(why, fate="NOT DONE") from error

    def print_help(self) -> None:
        """Print the verbs on a screen of 80 columns and 24 rows: a line each, the last by name."""
        name = typed()
        print(f"Usage: {name} VERB [flags] [ID.. | -- COMMAND]\n")
        order = list(ns.tasks)
        found = sorted(
            self.collection.tasks.items(),
            key=lambda each: order.index(each[0]) if each[0] in order else len(order),
        )
        told = order[:_VERBS_TOLD] if len(order) > _VERBS_TOLD + 1 else order
        for verb, task in found:
            if verb in told or verb not in order:
                print(f"  {verb:<8} {(task.__doc__ or '').strip().partition(chr(10))[0]}")
        if more := [verb for verb, _ in found if verb in order and verb not in told]:
            print(f"  and      {', '.join(more)}")
        print(
            f"\nFirst:     {name} run --host local -- uname -a\n"
            f"Detached:  {name} run -d --name nightly --host db1 -- ./migrate --all\n"
            f"           {name} attach nightly\n"
            f"Flags:     {name} VERB --help;  all have -q, --json, and -R (dry run)\n"
            "Before VERB: -f CONFIG, --prompt-for-login-password, --prompt-for-sudo-password"
        )

    def print_task_help(self, name: str) -> None:
        task = self.collection[name]
        if isinstance(task, Verb):
            task.show_help()
        else:
            super().print_task_help(name)


class _Inv(_Typed):
    """`inv` in a checkout: the tasks of its tasks.py, from any directory."""

    def __init__(self, root: str, **how: Any) -> None:
        super().__init__(**how)
        self.root = root

    def parse_collection(self) -> None:
        # Invoke doesn't load the tasks for --help, which lists them here.
        asks = self.args.help.value
        self.args.help.set_value(None, cast=False)
        self.root = self.args["search-root"].value or self.root
        self.args["search-root"].value = self.root
        try:
            super().parse_collection()
        except Exit as error:
            if error.message is None or isinstance(error, Misuse):
                raise
            name = self.args.collection.value
            raise Misuse(f"no tasks called {name!r} here or above", fate="NOT DONE") from error
        self.args.help.set_value(asks, cast=False)


ns = Collection(*tasks.ns.tasks.values(), serve, deliver)
program = _Typed(name="corra", binary="corra", binary_names=["corra"], namespace=ns)


def main() -> None:
    """Run the command line of `corra`."""
    _run(program)


def inv(root: str) -> None:
    """Run the command line of `inv`, over the tasks.py in the directory `root`."""
    _run(
        _Inv(
            root,
            name="corra",
            binary="inv[oke]",
            binary_names=["inv", "invoke"],
        )
    )


def _run(chosen: _Typed) -> None:
    open_standard()
    with printed(), dying_of_interrupts():
        try:
            chosen.run(sys.argv)
        except (AmbiguousEnvVar, UncastableEnvVar, UnknownFileType) as error:
            _refuse_config(chosen, one_line(error))
        except (AttributeError, OSError, TypeError, ValueError):
            _refuse_config(chosen, "")
            raise
        except Exception as error:
            from invoke.util import yaml  # type: ignore[attr-defined]

            if isinstance(error, yaml.YAMLError):
                _refuse_config(chosen, one_line(error))
            raise


def _refuse_config(chosen: _Typed, otherwise: str) -> None:
    """End with what is wrong with a configuration file, else with `otherwise`, if it says any."""
    from .cli.config_files import wrong_file

    told = chosen.args.config.value if hasattr(chosen, "core") else None
    runtime = told or os.environ.get("INVOKE_RUNTIME_CONFIG")
    if why := wrong_file(chosen.root, runtime) or otherwise:
        print(Misuse(why, fate="NOT DONE").line, file=sys.stderr)
        sys.exit(MISUSE)
