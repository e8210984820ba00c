"""A private OpenSSH server on 127.0.0.1, or in a network of the test's own, with its own port, keys
and files. It reads nothing of the machine's configuration.
"""

from __future__ import annotations

import contextlib
import functools
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

_START_S = 20.0
# The ssh program's first choice of key exchange costs 0.1 s of processor for each connection.
# `options=SLOWLY` leaves the choice to ssh.
QUICKLY = {"KexAlgorithms": "-sntrup*,mlkem*"}
SLOWLY = {"KexAlgorithms": "+curve25519-sha256"}


def program() -> str | None:
    """Return the absolute path of sshd (sshd refuses to start by a relative one), or None if there
    is none.
    """
    return shutil.which("sshd", path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")


def user() -> str:
    return pwd.getpwuid(os.getuid()).pw_name


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def new_key(path: Path, kind: str = "ed25519") -> Path:
    """Make a key pair without a passphrase at `path` and `path`.pub."""
    subprocess.run(
        ["ssh-keygen", "-q", "-t", kind, "-N", "", "-C", path.name, "-f", path],
        check=True,
        timeout=60,
    )
    return path


@functools.cache
def _pair(whose: str) -> tuple[str, str]:
    """Return the two files of a key pair, the same pair for the same name in all tests of this
    process.
    """
    with tempfile.TemporaryDirectory(prefix="corra-key-", dir="/tmp") as base:
        key = new_key(Path(base) / whose.partition(" ")[0])
        return key.read_text(), key.with_name(key.name + ".pub").read_text()


def _key(path: Path, alias: str) -> Path:
    """Put a key pair at `path`, which no other host of a test has."""
    private, shown = _pair(f"{path.name} {alias}")
    path.touch(0o600)
    path.write_text(private)
    path.with_name(path.name + ".pub").write_text(shown)
    return path


def public(key: Path) -> str:
    """Return `ssh-ed25519 AAAA...`, the part of a public key that known_hosts and authorized_keys
    hold.
    """
    return " ".join(key.with_name(key.name + ".pub").read_text().split()[:2])


def _children(pid: int) -> list[int]:
    try:
        return [
            int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        ]
    except (FileNotFoundError, ProcessLookupError):
        return []


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except (FileNotFoundError, ProcessLookupError):
        return ""


class Sshd:
    """One running server, and the client's files to reach it.

    `ssh_config` has a `Host h` and the hosts of `add_host`, `known_hosts` has the server's key, and
    `user_key` may log in. The server gives its sessions `environment` over its own variables.
    `options` stand first in sshd_config, so they win.
    """

    def __init__(
        self,
        directory: Path,
        *,
        alias: str = "h",
        environment: Mapping[str, str] | None = None,
        options: Mapping[str, str | int] | None = None,
        user_key: Path | None = None,
        ssh_config: Path | None = None,
        known_hosts: Path | None = None,
        inside: Sequence[str] = (),
        address: str = "127.0.0.1",
        port: int = 0,
    ) -> None:
        """`inside` are words before sshd's own, which end in an exec of them. Without `port` it is
        a free one.
        """
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.directory = directory
        self.alias = alias
        self.environment = dict(environment or {})
        self.options = dict(options or {})
        self.host_key = _key(directory / "host_key", alias)
        self.user_key = user_key or _key(directory / "user_key", alias)
        self.authorized_keys = directory / "authorized_keys"
        self.authorized_keys.write_text(public(self.user_key) + "\n")
        self.known_hosts = known_hosts or directory / "known_hosts"
        self.ssh_config = ssh_config or directory / "ssh_config"
        self.log: list[str] = []
        self.address = address
        self.port = 0
        self._inside, self._wanted_port = list(inside), port
        self._process: subprocess.Popen[str] | None = None

    @property
    def pid(self) -> int:
        """The listener's pid. Its children are the sessions."""
        assert self._process is not None
        return self._process.pid

    @property
    def host_public(self) -> str:
        return public(self.host_key)

    @property
    def fingerprint(self) -> str:
        """`SHA256:...` of the host key, as ssh-keygen prints it."""
        said = subprocess.run(
            ["ssh-keygen", "-lf", self.host_key],
            capture_output=True,
            text=True,
            check=True,
            timeout=20,
        )
        return said.stdout.split()[1]

    def start(self) -> Sshd:
        """Start the server and return once it listens. The first start also writes the client's
        files.
        """
        for _ in range(5):  # another process may have taken the free port
            port = self.port or self._wanted_port or free_port()
            if self._listen(port):
                break
        else:
            raise RuntimeError("sshd did not start: " + "\n".join(self.log))
        if not self.port:
            self.port = port
            self.trust(self.host_public)
            self.add_host(self.alias)
        return self

    def _listen(self, port: int) -> bool:
        path = program()
        assert path, "no sshd"
        if (
            os.getuid() == 0
        ):  # privilege separation needs this directory, and only the system's own unit makes it
            Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
        config = self.directory / "sshd_config"
        config.write_text("".join(f"{name} {value}\n" for name, value in self._config(port)))
        self._process = subprocess.Popen(
            [*self._inside, path, "-D", "-e", "-f", config],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        ready = threading.Event()
        listening: list[bool] = []
        threading.Thread(
            target=self._read_log, args=(self._process, ready, listening), daemon=True
        ).start()
        if not ready.wait(_START_S) or not listening:
            self.stop()
            return False
        return True

    def _read_log(
        self, process: subprocess.Popen[str], ready: threading.Event, listening: list[bool]
    ) -> None:
        assert process.stderr is not None
        with process.stderr as lines, contextlib.suppress(ValueError):
            for line in lines:
                self.log.append(line.rstrip())
                if line.startswith("Server listening"):
                    listening.append(True)
                    ready.set()
        ready.set()

    def _config(self, port: int) -> list[tuple[str, str | int]]:
        # Of most keywords sshd takes the first value, so the test's options stand at the top.
        settings: list[tuple[str, str | int]] = list(self.options.items())
        given = {name.lower() for name in self.options}
        defaults: dict[str, str | int] = {
            "Port": port,
            "ListenAddress": self.address,
            "HostKey": str(self.host_key),
            "PidFile": str(self.directory / "sshd.pid"),
            "AuthorizedKeysFile": str(self.authorized_keys),
            "UsePAM": "no",
            "StrictModes": "no",
            "PubkeyAuthentication": "yes",
            "PasswordAuthentication": "no",
            "KbdInteractiveAuthentication": "no",
            "PermitRootLogin": "prohibit-password",
            "PermitUserEnvironment": "no",
            "MaxStartups": "500",
            "MaxSessions": 10,
            "UseDNS": "no",
            "PrintMotd": "no",
            "LogLevel": "VERBOSE",
            "Subsystem": "sftp internal-sftp",
        }
        settings += [(name, value) for name, value in defaults.items() if name.lower() not in given]
        if self.environment and "setenv" not in given:
            settings.append(
                (
                    "SetEnv",
                    " ".join(f'{name}="{value}"' for name, value in self.environment.items()),
                )
            )
        return settings

    def trust(self, key: str, name: str | None = None) -> None:
        """Add a line to the client's known_hosts."""
        with self.known_hosts.open("a") as file:
            file.write(f"{name or f'[{self.address}]:{self.port}'} {key}\n")

    def add_host(self, alias: str, **options: str | int) -> str:
        """Add a `Host` that leads here to the client's ssh_config, and return its alias. `options`
        stand before the other options of that host.
        """
        settings: dict[str, str | int] = {
            "HostName": self.address,
            "Port": self.port,
            "User": user(),
            "IdentityFile": str(self.user_key),
            "IdentitiesOnly": "yes",
            "IdentityAgent": "none",
            "UserKnownHostsFile": str(self.known_hosts),
            "GlobalKnownHostsFile": "/dev/null",
            "StrictHostKeyChecking": "yes",
        }
        lower = {name.lower() for name in options}
        lines = [f"Host {alias}"]
        lines += [f"  {name} {value}" for name, value in options.items()]
        lines += [
            f"  {name} {value}" for name, value in settings.items() if name.lower() not in lower
        ]
        with self.ssh_config.open("a") as file:
            file.write("\n".join(lines) + "\n")
        self.ssh_config.chmod(0o600)
        return alias

    def sessions(self) -> list[int]:
        """Return the pids of the server's children, one for every open connection."""
        return _children(self.pid)

    def cut(self) -> None:
        """Kill every connection's server process, as a crash or an impatient operator would."""
        for pid in self.sessions():
            # For a user other than root, sshd forks a child with that user's rights, and the child
            # holds the connection.
            for each in [*_children(pid), pid]:
                if _name(each) == "sshd":
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(each, signal.SIGKILL)

    def stop(self) -> None:
        """End the listener and its connections. Programs that were started through them live on.
        `start` starts the server again on its port.
        """
        if self._process is None:
            return
        self.cut()
        self._process.kill()
        self._process.wait(_START_S)
        self._process = None
