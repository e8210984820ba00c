"""ssh and sudo as functions from a command to a command: no I/O, and a mode is a branch between compositions.

Two kinds of things are told apart all the way. An *argv* is a list of words that exec gets as they are. A *command* is text for a POSIX
shell. ssh knows no argv: it hands one text to the login shell there, which may be fish or tcsh, so whatever goes through ssh is made
`portable` first. No word ever becomes an option: host and user have been checked by Host, and `--` stands before both.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Sequence
from typing import NamedTuple

from corra.model.host import LOCAL, Host, Mode, meant_host

SHELL = "/bin/sh"
# What sudo asks with, here and there; nobody else says it. tether.PROMPTS are the same.
ASK_HERE, ASK_THERE = "corra-sudo-here:", "corra-sudo-there:"

# Between single quotes sh, bash, zsh, fish and tcsh agree on all of ASCII but this: tcsh expands ! and can't take a newline there, fish
# reads \\ and \' as one character, and a single quote ends the word (`'"'"'` brings it in, and all of them agree on that again).
_ALIKE = re.compile(r"(?:[ -~])*")
_UNLIKE = re.compile(r"!|\\(?!0)")
# `exec` and words that are bare or in single quotes: a text that needs no shell of its own to mean the same everywhere.
_WORDS = re.compile(r"""exec(?: (?:[A-Za-z0-9+,./:_-]|'[^']*'|"'")+)+""")
_PLAIN = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789 %+,-./:=@_")


class Options(NamedTuple):
    """How a command gets where it is to run. What is None is left to ssh_config, as everything that isn't named here.

    `mode` says what a bare user's name means. `batch`: ssh fails where it would ask. `tty`: the command has a terminal there, and stdout and
    stderr are one. `password`: a sudo on the way may ask for one, by the prompt ASK_HERE or ASK_THERE on stderr, and reads it from stdin.
    """

    port: int | None = None
    mode: Mode | None = None
    program: str = "ssh"
    config: str | None = None
    connect_timeout_s: float = 15.0
    alive_interval_s: float | None = 15.0
    batch: bool = True
    tty: bool = False
    password: bool = False
    ssh: tuple[str, ...] = ()


def build_program(argv: Sequence[str]) -> str:
    """Return the command that replaces its shell by `argv`, each word exactly as it is."""
    # dash takes no `exec --`, but nothing else needs it: only a first word with a dash could be read as an option of exec.
    exec_ = "exec env --" if argv[0].startswith("-") else "exec"
    return " ".join([exec_, *map(shlex.quote, argv)])


def build_command(
    command: str,
    host: Host | str | None = None,
    user: str | None = None,
    options: Options | None = None,
) -> list[str]:
    """Return the argv that runs `command`, here, as `user` on `host`; None is this machine. Raises Misuse.

    `user` is who `--as` would name: whom sudo makes of us there, unless the mode says otherwise; `HERE,THERE` names two.
    """
    options = options or Options()
    host = meant_host(host or LOCAL, user, options.mode, port=options.port)
    here, there = (ASK_HERE, ASK_THERE) if options.password else ("", "")
    match host.mode:
        case Mode.LOCAL:
            return shell(command)
        case Mode.LOCAL_SUDO:
            return sudo(str(host.user), shell(command), ask=here)
        case Mode.SSH_AS:
            return by_ssh(host, portable(command), options)
        case Mode.SSH_THEN_SUDO:
            return by_ssh(host, behind_sudo(str(host.user), command, ask=there), options)
        case Mode.SUDO_THEN_SSH:
            return sudo(str(host.caller), by_ssh(host, portable(command), options), ask=here)
        case Mode.SUDO_THEN_SSH_THEN_SUDO:
            return sudo(
                str(host.caller),
                by_ssh(host, behind_sudo(str(host.user), command, ask=there), options),
                ask=here,
            )


def login_command(command: str, host: Host, *, password: bool = False) -> str:
    """Return what the login shell on `host` is given so that `command` runs there as `host.user`, or as who logs in."""
    return (
        portable(command)
        if host.user is None
        else behind_sudo(host.user, command, ask=ASK_THERE if password else "")
    )


def behind_sudo(user: str, command: str, *, ask: str = "") -> str:
    """Return what a login shell is given so that `command` runs as `user`."""
    return portable(build_program(sudo(user, shell(command), ask=ask)))


def shell(command: str) -> list[str]:
    return [SHELL, "-c", command]


def sudo(user: str, argv: Sequence[str], *, ask: str = "") -> list[str]:
    """Return the argv that runs `argv` as `user`, with that user's home.

    Where sudo wants a password it fails at once, or with `ask` asks by that prompt on stderr and reads one line of stdin.
    """
    return ["sudo", *(["-S", "-p", ask] if ask else ["-n"]), "-H", "-u", user, "--", *argv]


def by_ssh(host: Host, command: str, options: Options) -> list[str]:
    """Return the argv that hands `command` to the login shell on `host`, with no question asked, no terminal, nothing forwarded."""
    settings = [
        *(["BatchMode=yes"] if options.batch else []),
        f"ConnectTimeout={max(1, round(options.connect_timeout_s))}",
        "ClearAllForwardings=yes",
        "PermitLocalCommand=no",
        "RemoteCommand=none",
        # A failure must say why: ssh hides "Connection closed by" at LogLevel ERROR and everything at QUIET.
        "LogLevel=INFO",
    ]
    if options.alive_interval_s is not None:
        settings.append(f"ServerAliveInterval={max(1, round(options.alive_interval_s))}")
    return [
        options.program,
        *(["-F", options.config] if options.config else []),
        *(["-p", str(host.port)] if host.port else []),
        *(["-l", host.login] if host.login else []),
        "-tt" if options.tty else "-T",
        "-a",
        "-x",
        *(f"-o{setting}" for setting in settings),
        *options.ssh,
        "--",
        host.name,
        command,
    ]


def portable(command: str) -> str:
    """Return text that any login shell understands alike, and that runs `command` in a POSIX shell in its own place."""
    if _ALIKE.fullmatch(command) and not _UNLIKE.search(command):
        return command if _WORDS.fullmatch(command) else f"exec {SHELL} -c {_quote(command)}"
    # Octal digits need no quoting anywhere. `$(...)` drops newlines at the end, which mean nothing to a shell.
    encoded = "".join(
        chr(byte) if byte in _PLAIN else f"\\0{byte:03o}" for byte in os.fsencode(command)
    )
    return f"""exec {SHELL} -c 'eval "$(printf %b "$0")"' '{encoded}'"""


def _quote(text: str) -> str:
    # shlex.quote leaves `=ls` and `%1` bare, which zsh and fish have ideas about.
    return "'" + text.replace("'", "'\"'\"'") + "'"
