"""What ssh_config means for a host, as ssh itself reads it.

`ssh -G` knows Include, Match and canonical names, which no parser in Python does (paramiko#1609),
and takes 4 ms. Where there is no ssh program, paramiko's parser reads ssh_config.
"""

from __future__ import annotations

import os
import pwd
import re
import shlex
import socket
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from corra.errors import NotStarted
from corra.model.host import Host

from .channel import first_line

SSH_PORT = 22

_STRICT = {
    "true": "yes",
    "yes": "yes",
    "ask": "ask",
    "accept-new": "accept-new",
    "false": "no",
    "no": "no",
    "off": "no",
}
_TOKEN = re.compile(r"%(.)|\$\{(\w+)\}")


class SshSettings(NamedTuple):
    """The directives that decide how a host is reached. `strict` is yes, ask, accept-new or no."""

    hostname: str
    port: int
    user: str
    address_family: int = socket.AF_UNSPEC
    identity_files: tuple[str, ...] = ()
    identities_only: bool = False
    identity_agent: str | None = None
    user_known_hosts: tuple[str, ...] = ()
    global_known_hosts: tuple[str, ...] = ()
    hash_known_hosts: bool = False
    host_key_alias: str | None = None
    strict: str = "ask"
    proxy_jump: str | None = None
    proxy_command: str | None = None
    connect_timeout_s: float | None = None
    alive_interval_s: float = 0.0
    control_persist: bool = False

    @property
    def known_as(self) -> str:
        """The name that known_hosts has for this host."""
        if self.host_key_alias:
            return self.host_key_alias
        name = self.hostname.lower()
        return name if self.port == SSH_PORT else f"[{name}]:{self.port}"


def config_path(config: Any = None) -> str | None:
    """Return the ssh_config to be used instead of the usual ones, or None.

    It is Fabric's `ssh_config_path`, or $CORRA_SSH_CONFIG.
    """
    path = config.get("ssh_config_path") if config is not None else None
    path = path or os.environ.get("CORRA_SSH_CONFIG")
    return os.path.expanduser(path) if path else None


def ssh_settings(host: Host, path: str | None = None) -> SshSettings:
    """Return the settings for `host`; what `host` says itself goes before ssh_config.

    Raises NotStarted if ssh can't read ssh_config.
    """
    return Question(host, path).answer()


class Question:
    """An `ssh -G` that runs in the background until `answer` waits for it."""

    def __init__(self, host: Host, path: str | None = None) -> None:
        self.host = host
        self.path = path
        argv = ["ssh", "-G"]
        argv += ["-F", path] if path else []
        argv += ["-p", str(host.port)] if host.port else []
        argv += ["-l", host.login] if host.login else []
        self._ssh: subprocess.Popen[bytes] | None = None
        self._failed: OSError | None = None
        try:
            self._ssh = subprocess.Popen(
                [*argv, "--", host.name],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
        except (FileNotFoundError, PermissionError):
            pass  # no ssh on this machine
        except OSError as error:
            self._failed = error

    def answer(self) -> SshSettings:
        """Return the settings, once. Raises NotStarted if ssh fails or can't be started."""
        if self._failed is not None:
            raise NotStarted(
                f"ssh -G {self.host.name}: {self._failed.strerror}", host=self.host.name
            )
        found = (
            _by_paramiko(self.host, self.path)
            if self._ssh is None
            else _by_ssh(self._ssh, self.host)
        )
        return _read(self.host, found)


def _by_ssh(ssh: subprocess.Popen[bytes], host: Host) -> dict[str, list[str]]:
    with ssh:
        try:
            out, err = ssh.communicate(timeout=60)  # a Match exec in it may take its time
        except subprocess.TimeoutExpired as error:
            ssh.kill()
            raise NotStarted(f"ssh -G {host.name}: no answer in 60 s", host=host.name) from error
    if ssh.returncode:
        raise NotStarted(f"ssh -G {host.name}: {first_line(err)}", host=host.name)
    found: dict[str, list[str]] = {}
    for line in out.decode(errors="surrogateescape").splitlines():
        key, _, value = line.partition(" ")
        found.setdefault(key.lower(), []).append(value)
    return found


def _by_paramiko(host: Host, path: str | None) -> dict[str, list[str]]:
    from paramiko import SSHConfig

    config = SSHConfig()
    for each in [path] if path else ["~/.ssh/config", "/etc/ssh/ssh_config"]:
        try:
            with open(os.path.expanduser(each), encoding="utf-8", errors="surrogateescape") as file:
                config.parse(file)
        except FileNotFoundError:
            continue
    found = {
        key: value if isinstance(value, list) else [value]
        for key, value in config.lookup(host.name).items()
    }
    if host.port:
        found["port"] = [str(host.port)]
    if host.login:
        found["user"] = [host.login]
    home = _home()
    found.setdefault(
        "identityfile", [f"{home}/.ssh/id_{kind}" for kind in ("rsa", "ecdsa", "ed25519")]
    )
    found.setdefault("userknownhostsfile", [f"{home}/.ssh/known_hosts {home}/.ssh/known_hosts2"])
    found.setdefault("globalknownhostsfile", ["/etc/ssh/ssh_known_hosts /etc/ssh/ssh_known_hosts2"])
    return found


def _read(host: Host, found: Mapping[str, Sequence[str]]) -> SshSettings:
    def one(key: str, default: str = "") -> str:
        return found[key][0] if found.get(key) else default

    def set_or_none(key: str) -> str | None:
        value = one(key)
        return None if value.lower() in {"", "none"} else value

    me = pwd.getpwuid(os.getuid()).pw_name
    hostname, port, user = (
        one("hostname", host.name),
        int(one("port", str(SSH_PORT))),
        one("user", me),
    )
    alias = set_or_none("hostkeyalias")
    tokens = {
        "%": "%",
        "d": _home(),
        "h": hostname,
        "i": str(os.getuid()),
        "k": alias or host.name,
        "L": socket.gethostname().partition(".")[0],
        "l": socket.gethostname(),
        "n": host.name,
        "p": str(port),
        "r": user,
        "u": me,
    }

    def paths(texts: Sequence[str]) -> tuple[str, ...]:
        return tuple(_expand_home(expand(text, tokens)) for text in texts if text.lower() != "none")

    timeout, proxy = set_or_none("connecttimeout"), set_or_none("proxycommand")
    agent = one("identityagent", "SSH_AUTH_SOCK")
    return SshSettings(
        hostname=hostname,
        port=port,
        user=user,
        address_family={"inet": socket.AF_INET, "inet6": socket.AF_INET6}.get(
            one("addressfamily"), socket.AF_UNSPEC
        ),
        identity_files=paths(found.get("identityfile", ())),
        identities_only=one("identitiesonly") == "yes",
        identity_agent=os.environ.get("SSH_AUTH_SOCK")
        if agent == "SSH_AUTH_SOCK"
        else next(iter(paths([agent])), None),
        user_known_hosts=paths(shlex.split(one("userknownhostsfile"))),
        global_known_hosts=paths(shlex.split(one("globalknownhostsfile"))),
        hash_known_hosts=one("hashknownhosts") == "yes",
        host_key_alias=alias,
        strict=_STRICT.get(one("stricthostkeychecking"), "ask"),
        proxy_jump=set_or_none("proxyjump"),
        proxy_command=expand(proxy, tokens) if proxy else None,
        connect_timeout_s=float(timeout) if timeout else None,
        alive_interval_s=float(one("serveraliveinterval", "0")),
        control_persist=one("controlpersist", "no") != "no",
    )


def expand(text: str, tokens: Mapping[str, str]) -> str:
    """Replace ssh_config's %h and ${NAME}. A token that isn't known stays as it is."""

    def value(match: re.Match[str]) -> str:
        token, variable = match.groups()
        return (
            tokens.get(token, match.group()) if token else os.environ.get(variable, match.group())
        )

    return _TOKEN.sub(value, text)


def _home() -> str:
    # As ssh does: from the passwd entry, whatever $HOME says.
    return pwd.getpwuid(os.getuid()).pw_dir


def _expand_home(path: str) -> str:
    return _home() + path[1:] if path.startswith("~/") else os.path.expanduser(path)
