"""A Host: where a run lives, who logs in there, and the user that sudo changes to."""

from __future__ import annotations

import enum
import re
import shlex
import unicodedata
from dataclasses import replace

from corra.errors import Misuse

from .light_dataclass import light_dataclass

LOCAL = "local"

# The characters of a host's name beside letters and digits of any alphabet. ssh takes more, which
# belong to shells, to sets of hosts (`web[1-6],db1!db2`) and to users (`@`) here. A leading dash
# would make the name an option of ssh (CVE-2017-1000117).
_IN_HOST_NAME = frozenset("_.:%/+=-")
_USER_NAME = r"[A-Za-z0-9_.][A-Za-z0-9_.@\\+-]*\$?"
_PORT = r"[0-9]{1,5}"


class Mode(enum.Enum):
    """In which order ssh and sudo come."""

    LOCAL = "local"
    LOCAL_SUDO = "local-sudo"
    SSH_AS = "ssh-as"
    SSH_THEN_SUDO = "ssh-then-sudo"
    SUDO_THEN_SSH = "sudo-then-ssh"
    SUDO_THEN_SSH_THEN_SUDO = "sudo-then-ssh-then-sudo"


@light_dataclass(frozen=True)
class Address:
    """What ssh is called with for a host whose name is an inventory's alias.

    `key` is the path of a private key, `source` that of the inventory.
    """

    name: str
    port: int | None = None
    login: str | None = None
    key: str | None = None
    source: str = ""


@light_dataclass(frozen=True)
class Host:
    """Where a run lives.

    `caller` is the user that sudo changes to here, `login` logs in by ssh, and `user` is the user
    that sudo changes to there. `address` is where an inventory says that the host is; a login and a
    port of the host's own go before it.
    """

    name: str
    port: int | None = None
    login: str | None = None
    user: str | None = None
    caller: str | None = None
    address: Address | None = None

    def __post_init__(self) -> None:
        if not self.name or self.name.startswith("-") or not all(map(_names_a_host, self.name)):
            raise Misuse(f"not a host name: {self.name!r}")
        for user in (self.login, self.user, self.caller):
            if user is not None and not re.fullmatch(_USER_NAME, user):
                raise Misuse(f"not a user name: {user!r}")
        if self.caller and self.is_local:
            raise Misuse(
                f"local has no ssh that {self.caller} could call:"
                f" --as {self.user or self.caller} is enough"
            )
        if self.port is not None and not 0 < self.port < 65536:
            raise Misuse(f"not a port: {self.port}")
        if self.is_local and (self.login or self.port):
            as_them = f"; to run as {self.login}, say --as {self.login}" if self.login else ""
            raise Misuse(
                f"local is this machine without ssh, so it has neither login nor port{as_them}"
            )

    @classmethod
    def parse(cls, text: str, *, login: str | None = None, user: str | None = None) -> Host:
        """Read `[login@]name[:port]`, `[v6::addr]:port` or `local`.

        `login` is used if the text has none; `user` is what `run_as` takes. Raises Misuse for
        anything that ssh could take for an option or a shell for syntax.
        """
        before, at, rest = text.rpartition("@")
        name, colon, port = rest, "", ""
        if rest.startswith("["):
            name, bracket, after = rest[1:].partition("]")
            colon, port = after[:1], after[1:]
            if not bracket or colon not in ("", ":"):
                raise Misuse(f"not a host: {text!r}")
        elif rest.count(":") == 1:
            name, colon, port = rest.partition(":")
        if colon and not re.fullmatch(_PORT, port):
            raise Misuse(f"not a port: {port!r} in {text!r}")
        if at:
            login = before
        return cls(name, int(port) if colon else None, login).run_as(user)

    def run_as(self, text: str | None) -> Host:
        """Return this host with the users of `text`: `THERE`, `HERE,THERE` or `HERE,`.

        A user that the host has already stays.
        """
        caller, _, user = (
            ("," + text if "," not in text else text).partition(",") if text else ("", "", "")
        )
        return replace(self, user=self.user or user or None, caller=self.caller or caller or None)

    @property
    def ssh_name(self) -> str:
        """The name that ssh is called with, and that ssh_config is searched for."""
        return self.address.name if self.address else self.name

    @property
    def ssh_port(self) -> int | None:
        return self.port or (self.address.port if self.address else None)

    @property
    def ssh_login(self) -> str | None:
        return self.login or (self.address.login if self.address else None)

    @property
    def ssh_key(self) -> str | None:
        return self.address.key if self.address else None

    @property
    def ssh_options(self) -> list[str]:
        """The options that ssh is called with for this host."""
        options = (("-p", self.ssh_port), ("-l", self.ssh_login), ("-i", self.ssh_key))
        return [word for name, value in options if value for word in (name, str(value))]

    @property
    def ssh_text(self) -> str:
        """The words that a person types after `ssh` for this host."""
        return str(self) if self.address is None else shlex.join([*self.ssh_options, self.ssh_name])

    @property
    def as_user(self) -> str | None:
        """The text that `run_as` reads back; history keeps it to find a run again."""
        return f"{self.caller},{self.user or ''}" if self.caller else self.user

    @property
    def is_local(self) -> bool:
        return self.name == LOCAL

    @property
    def mode(self) -> Mode:
        if self.is_local:
            return Mode.LOCAL_SUDO if self.user else Mode.LOCAL
        if self.caller:
            return Mode.SUDO_THEN_SSH_THEN_SUDO if self.user else Mode.SUDO_THEN_SSH
        return Mode.SSH_THEN_SUDO if self.user else Mode.SSH_AS

    def __str__(self) -> str:
        """The text that `parse` reads back, apart from `as_user`."""
        name = f"[{self.name}]" if ":" in self.name else self.name
        return (
            (f"{self.login}@" if self.login else "") + name + (f":{self.port}" if self.port else "")
        )


def _names_a_host(c: str) -> bool:
    # A mark: the two dots of an u may stand alone behind it.
    return c in _IN_HOST_NAME or c.isalnum() or unicodedata.category(c) == "Mn"


def reach_flags(host: Host, *, via: str | None = None, spool: str | None = None) -> str:
    """Return the flags by which any machine reaches a run there: `--host db1 --as root`."""
    words = ["--host", str(host)]
    words += ["--as", host.as_user] if host.as_user else []
    words += ["--via", via] if via not in (None, "", "fabric") else []
    words += ["--spool", spool] if spool else []
    words += ["--inventory", host.address.source] if host.address else []
    return shlex.join(words)


def login_and_user(user: str | None, mode: Mode | None) -> tuple[str | None, str | None]:
    """Return the login and the text for `Host.run_as`, as `mode` says what `user` means.

    Raises Misuse.
    """
    if mode in (Mode.SSH_AS, Mode.SSH_THEN_SUDO) and user and "," in user:
        raise Misuse(f"--mode {mode.value} has one user: --as {user} names two")
    if mode is Mode.SSH_AS:
        return user, None
    if mode is Mode.SUDO_THEN_SSH and user and "," not in user:
        return None, f"{user},"
    if mode is Mode.SUDO_THEN_SSH_THEN_SUDO and user and "," not in user:
        return None, f"{user},{user}"
    return None, user


def refuse_two_logins(host: Host, login: str | None) -> None:
    """Raise Misuse if `login` is another one than `host` names."""
    if host.login and login and host.login != login:
        raise Misuse(
            f"two logins: {host.login}@{host.name}, and {login} by --mode ssh-as", host=host.name
        )


def meant_host(
    host: Host | str, user: str | None, mode: Mode | None = None, *, port: int | None = None
) -> Host:
    """Return `host` with the user, as `mode` has it, and the port that it doesn't have itself.

    Raises Misuse, also if that makes another mode.
    """
    found = Host.parse(host) if isinstance(host, str) else host
    login, user = login_and_user(user, mode)
    refuse_two_logins(found, login)
    found = replace(found, login=found.login or login, port=found.port or port).run_as(user)
    if mode and found.mode is not mode:
        raise Misuse(f"that is {found.mode.value}, not {mode.value}", host=found.name)
    return found
