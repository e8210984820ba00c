"""ssh and sudo as functions from a command to a command. No I/O; each mode is one composition.

An *argv* is a list of words that exec gets as they are. A *command* is text for a POSIX shell. ssh
knows no argv: it hands one text to the host's login shell, which may be fish or tcsh. So each
command that goes through ssh is made `portable` first. No word becomes an option: Host has checked
the host and the users, and `--` stands before the host.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from corra.errors import Misuse
from corra.model.host import LOCAL, Host, Mode, meant_host

SHELL = "/bin/sh"
# The prompts of sudo on this machine and on the host. tether.PROMPTS are the same.
ASK_HERE, ASK_THERE = "corra-sudo-here:", "corra-sudo-there:"

# Between single quotes sh, bash, zsh, fish and tcsh agree on all of ASCII but this: tcsh expands !
# and takes no newline; fish reads \\ and \' as one character. A single quote ends the word;
# `'"'"'` brings one in, in all five shells.
_ALIKE = re.compile(r"(?:[ -~])*")
_UNLIKE = re.compile(r"!|\\(?!0)")
# `exec` and words that are bare or in single quotes: every login shell reads them alike.
_WORDS = re.compile(r"""exec(?: (?:[A-Za-z0-9+,./:_-]|'[^']*'|"'")+)+""")
_PLAIN = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789 %+,-./:=@_")


class Options(NamedTuple):
    """How a command reaches its host. ssh_config decides what is None, and what isn't named here.

    `mode` says what a bare user name means. With `batch`, ssh fails where it would ask. With `tty`,
    the command gets a terminal on the host, and stdout and stderr are one. With `password`, a sudo
    on the way may ask for a password: by the prompt ASK_HERE or ASK_THERE on stderr. It reads the
    password from stdin.
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
    host: Host | str | None = None

    @classmethod
    def meant(cls, given: Options | Mapping[str, Any] | None) -> Options:
        """Return `given`, of which a mapping has the same names. Raises Misuse.

        Its `mode` may be a text, and its `ssh` one text, several words, or ssh_config's names with
        their values.
        """
        if isinstance(given, Options):
            return given
        said = dict(given or {})
        if strange := sorted(set(said) - set(cls._fields)):
            raise Misuse(
                f"no option {strange[0]!r} of a command: there are {', '.join(cls._fields)}"
            )
        if isinstance(mode := said.get("mode"), str):
            modes = {each.value: each for each in Mode}
            if mode not in modes:
                raise Misuse(f"no mode {mode!r}: there are {', '.join(modes)}")
            said["mode"] = modes[mode]
        if "ssh" in said:
            words = said["ssh"] or ()
            if isinstance(words, Mapping):
                words = [f"-o{name}={value}" for name, value in words.items()]
            said["ssh"] = tuple(shlex.split(words) if isinstance(words, str) else words)
        return cls(**said)


def build_program(argv: Sequence[str], options: Options | Mapping[str, Any] | None = None) -> str:
    """Return the command that replaces its shell by `argv`, each word exactly as it is.

    `options` are those of `build_command`. None of them changes the program. Raises Misuse.
    """
    Options.meant(options)
    # dash knows no `exec --`. Only a first word with a dash could be read as an option of exec.
    exec_ = "exec env --" if argv[0].startswith("-") else "exec"
    return " ".join([exec_, *map(shlex.quote, argv)])


def build_command(
    command: str,
    host: Host | str | None = None,
    user: str | None = None,
    options: Options | Mapping[str, Any] | None = None,
) -> list[str]:
    """Return the argv that runs `command` as `user` on `host`; None is this machine. Raises Misuse.

    `user` is what `--as` takes: the user that sudo changes to on the host, unless the mode says
    otherwise; `HERE,THERE` names two. `options` may be a mapping, and may name the host.
    """
    options = Options.meant(options)
    if host and options.host and str(host) != str(options.host):
        raise Misuse(f"two hosts: {host}, and {options.host} in the options")
    host = meant_host(host or options.host or LOCAL, user, options.mode, port=options.port)
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
    """Return the text for the login shell on `host` that runs `command` as `host.user`.

    Where `host.user` is None, the command runs as the user who logs in.
    """
    return (
        portable(command)
        if host.user is None
        else behind_sudo(host.user, command, ask=ASK_THERE if password else "")
    )


def behind_sudo(user: str, command: str, *, ask: str = "") -> str:
    """Return the text for a login shell that runs `command` as `user`."""
    return portable(build_program(sudo(user, shell(command), ask=ask)))


def shell(command: str) -> list[str]:
    return [SHELL, "-c", command]


def sudo(user: str, argv: Sequence[str], *, ask: str = "") -> list[str]:
    """Return the argv that runs `argv` as `user`, with that user's home.

    Where sudo wants a password, it fails at once. With `ask`, it asks by that prompt on stderr and
    reads one line of stdin.
    """
    return ["sudo", *(["-S", "-p", ask] if ask else ["-n"]), "-H", "-u", user, "--", *argv]


def by_ssh(host: Host, command: str, options: Options) -> list[str]:
    """Return the argv that hands `command` to the login shell on `host`, and forwards nothing."""
    settings = [
        *(["BatchMode=yes"] if options.batch else []),
        f"ConnectTimeout={max(1, round(options.connect_timeout_s))}",
        "ClearAllForwardings=yes",
        "PermitLocalCommand=no",
        "RemoteCommand=none",
        # A failure must say why: ssh hides "Connection closed by" at LogLevel ERROR, and every
        # message at QUIET.
        "LogLevel=INFO",
    ]
    if options.alive_interval_s is not None:
        settings.append(f"ServerAliveInterval={max(1, round(options.alive_interval_s))}")
    return [
        options.program,
        *(["-F", options.config] if options.config else []),
        *host.ssh_options,
        "-tt" if options.tty else "-T",
        "-a",
        "-x",
        *(f"-o{setting}" for setting in settings),
        *options.ssh,
        "--",
        host.ssh_name,
        command,
    ]


def portable(command: str) -> str:
    """Return text that any login shell reads alike, and that runs `command` in a POSIX shell."""
    if _ALIKE.fullmatch(command) and not _UNLIKE.search(command):
        return command if _WORDS.fullmatch(command) else f"exec {SHELL} -c {_quote(command)}"
    # Octal digits need no quoting in any shell. `$(...)` drops newlines at the end, which mean
    # nothing to a shell.
    encoded = "".join(
        chr(byte) if byte in _PLAIN else f"\\0{byte:03o}" for byte in os.fsencode(command)
    )
    return f"""exec {SHELL} -c 'eval "$(printf %b "$0")"' '{encoded}'"""


def _quote(text: str) -> str:
    # shlex.quote leaves `=ls` and `%1` bare, which zsh and fish expand.
    return "'" + text.replace("'", "'\"'\"'") + "'"
