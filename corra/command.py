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
from dataclasses import dataclass

from .program import Host, Mode

SHELL = "/bin/sh"

# Between single quotes sh, bash, zsh, fish and tcsh agree on all of ASCII but this: tcsh expands ! and can't take a newline there, fish
# reads \\ and \' as one character, and a single quote ends the word (`'"'"'` brings it in, and all of them agree on that again).
_ALIKE = re.compile(r"(?:[ -~])*")
_UNLIKE = re.compile(r"!|\\(?!0)")
# `exec` and words that are bare or in single quotes: a text that needs no shell of its own to mean the same everywhere.
_WORDS = re.compile(r"""exec(?: (?:[A-Za-z0-9+,./:_-]|'[^']*'|"'")+)+""")
_PLAIN = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789 %+,-./:=@_")


@dataclass(frozen=True)
class Ssh:
    """How the ssh program is to be called. `alive_interval_s`: None leaves it to ssh_config, as everything that isn't named here."""

    program: str = "ssh"
    config: str | None = None
    connect_timeout_s: float = 15.0
    alive_interval_s: float | None = 15.0
    options: tuple[str, ...] = ()


def build_program(argv: Sequence[str]) -> str:
    """Return the command that replaces its shell by `argv`, each word exactly as it is."""
    # dash takes no `exec --`, but nothing else needs it: only a first word with a dash could be read as an option of exec.
    exec_ = "exec env --" if argv[0].startswith("-") else "exec"
    return " ".join([exec_, *map(shlex.quote, argv)])


def build_command(command: str, host: Host, ssh: Ssh | None = None) -> list[str]:
    """Return the argv that runs `command`, here, as the user on the host that `host` means."""
    ssh = ssh or Ssh()
    match host.mode:
        case Mode.LOCAL:
            return shell(command)
        case Mode.LOCAL_SUDO:
            return sudo(str(host.user), shell(command))
        case Mode.SSH_AS | Mode.SSH_THEN_SUDO:
            return by_ssh(host, login_command(command, host), ssh)


def login_command(command: str, host: Host) -> str:
    """Return what the login shell on `host` is given so that `command` runs there as `host.user`, or as who logs in."""
    if host.user is None:
        return portable(command)
    return portable(build_program(sudo(host.user, shell(command))))


def shell(command: str) -> list[str]:
    return [SHELL, "-c", command]


def sudo(user: str, argv: Sequence[str]) -> list[str]:
    """Return the argv that runs `argv` as `user`, with that user's home; it fails at once where sudo would ask for a password."""
    return ["sudo", "-n", "-H", "-u", user, "--", *argv]


def by_ssh(host: Host, command: str, ssh: Ssh) -> list[str]:
    """Return the argv that hands `command` to the login shell on `host`, with no question asked, no terminal, nothing forwarded."""
    settings = [
        "BatchMode=yes",
        f"ConnectTimeout={max(1, round(ssh.connect_timeout_s))}",
        "ClearAllForwardings=yes",
        "PermitLocalCommand=no",
        "RemoteCommand=none",
        # A failure must say why: ssh hides "Connection closed by" at LogLevel ERROR and everything at QUIET.
        "LogLevel=INFO",
    ]
    if ssh.alive_interval_s is not None:
        settings.append(f"ServerAliveInterval={max(1, round(ssh.alive_interval_s))}")
    return [
        ssh.program,
        *(["-F", ssh.config] if ssh.config else []),
        *(["-p", str(host.port)] if host.port else []),
        *(["-l", host.login] if host.login else []),
        "-T",
        "-a",
        "-x",
        *(f"-o{setting}" for setting in settings),
        *ssh.options,
        "--",
        host.name,
        command,
    ]


def portable(command: str) -> str:
    """Return text that any login shell understands alike, and that runs `command` in a POSIX shell in its own place."""
    if _ALIKE.fullmatch(command) and not _UNLIKE.search(command):
        return command if _WORDS.fullmatch(command) else f"exec {SHELL} -c {_quote(command)}"
    # Octal digits need no quoting anywhere. `$(...)` drops newlines at the end, which mean nothing to a shell.
    encoded = "".join(chr(byte) if byte in _PLAIN else f"\\0{byte:03o}" for byte in os.fsencode(command))
    return f"""exec {SHELL} -c 'eval "$(printf %b "$0")"' '{encoded}'"""


def _quote(text: str) -> str:
    # shlex.quote leaves `=ls` and `%1` bare, which zsh and fish have ideas about.
    return "'" + text.replace("'", "'\"'\"'") + "'"
