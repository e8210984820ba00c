"""The ssh program's pipes as a Channel, and its words on stderr as errors.

ssh says why it failed in text and by exit status 255. If no byte has come from the host before
that, the host was asked for nothing. If sshd turned ssh away in a burst, ssh is started again, and
gets again what was written so far. After the first byte, an exit status 255 means a lost link.
"""

from __future__ import annotations

import getpass
import re
import subprocess
import time
from collections.abc import Sequence
from typing import Any

from corra.errors import Auth, CorraError, HostKey, Misuse, Unreachable
from corra.model.host import Host

from . import host_keys, sudo
from .channel import CONNECT_S, Channel, LinkLost, NoAnswer, Runner, first_line
from .command import Options, build_command, build_program
from .pipes import Process
from .ssh_config import SSH_PORT, SshSettings, config_path, ssh_settings

# The exit status of ssh's own failures. The agent's verbs end with 0, 1 or 2.
SSH_FAILED = 255
# What is kept for a second try. Requests are far smaller; a program's stdin is sent only after the
# first byte has come.
REPLAY_MAX = 1 << 20
# How often a ProxyCommand is started that ends before the host's greeting.
PROXIES_MAX = 3

_TURNED_AWAY = re.compile(r"Connection (?:closed|reset) by")
# What ssh says when the peer, or a ProxyCommand, ended before the peer said who it is.
_NO_BANNER = re.compile(r"(?:kex|ssh)_exchange_identification|banner exchange: Connection")
# What ssh says when a session had begun: the host may have acted.
_CUT = re.compile(
    r"client_loop|Read from remote host|Connection to \S+ closed|Timeout, server|Broken pipe"
    r"|packet_write_wait"
)
# What ssh says before there is a session.
_NEVER = re.compile(
    r"Unable to negotiate|Bad configuration option|command-line: line|no matching"
    r"|terminating, \d+ bad|unknown option|usage: ssh"
)


class TurnedAway(Unreachable):
    """The host hung up before it sent its greeting."""


class SshProcess(Process):
    """The process `argv`, an ssh that runs a command on `host`."""

    def __init__(
        self,
        argv: Sequence[str],
        host: Host,
        known: SshSettings,
        limit_s: float,
        config: str | None,
    ) -> None:
        self._argv = argv
        self._host = host
        self._known = known
        self._limit_s = limit_s
        self._config = config
        self._deadline = time.monotonic() + limit_s
        self._pause_s = 0.1
        self._tries = 1
        self._answered = False
        self._written = bytearray()
        super().__init__(argv)

    def write(self, data: bytes) -> None:
        if not self._answered and len(self._written) < REPLAY_MAX:
            self._written += data
        super().write(data)

    def _begun(self) -> None:
        if not self._answered:
            self._answered = True
            self._written.clear()

    def _ended(self) -> bool:
        if self.exit_status() != SSH_FAILED:
            return False
        if self._answered:
            raise LinkLost(first_line(self.stderr()) or "ssh ended")
        error = failure(
            self.stderr().decode(errors="replace"),
            self._host,
            self._known,
            self._limit_s,
            self._config,
            self._argv,
        )
        if isinstance(error, TurnedAway) and self._again():
            return True
        raise error

    def _again(self) -> bool:
        """Start ssh again and write again what was written; return whether the time allowed it."""
        self._tries += 1
        if self._known.proxy_command and self._tries > PROXIES_MAX:
            return False
        import random

        jitter = random.uniform(0.5, 1.0)  # noqa: S311 - no secret
        self._pause_s = min(2.0, self._pause_s * 2) * jitter
        if time.monotonic() + self._pause_s > self._deadline or len(self._written) >= REPLAY_MAX:
            return False
        time.sleep(self._pause_s)
        with self._writing:
            self._let_go()
            self._start(self._argv)
            written = bytes(self._written)
            self._written.clear()
            self.write(written)
        return True


def failure(
    said: str,
    host: Host,
    known: SshSettings,
    limit_s: float,
    config: str | None,
    argv: Sequence[str] | None,
) -> Exception:
    """Return the error that ssh's words mean.

    Words that aren't recognised are quoted; the host may have begun to act before ssh said them.
    With `argv` None, ssh can't be started again to say more.
    """
    name = host.name
    # A host on the way may have refused us for a reason of its own, which is told first.
    ungreeted = bool(_NO_BANNER.search(said)) and "timed out" not in said
    if not ungreeted and (match := _CUT.search(said)):
        return LinkLost(first_line(said[match.start() :].encode()))
    if (
        "REMOTE HOST IDENTIFICATION HAS CHANGED" in said
        or "Host key verification failed" in said
        or "host key is known for" in said
    ):
        return _host_key(said, host, known, config, argv)
    if match := re.search(
        r"^(?:\S+@\S+: )?Permission denied \(([^)]*)\)|Too many authentication failures",
        said,
        re.MULTILINE,
    ):
        methods = (match.group(1) or "too many keys were tried").replace(",", ", ")
        # What asks a person lets nobody in here: ssh runs with BatchMode.
        asks = "password" in methods or "keyboard-interactive" in methods
        return Auth(
            f"{host.ssh_login or host.caller or known.user} may not log in ({methods})",
            host=name,
            hint=[
                f"a key must let you in, or a master:  ssh -fNM {host.ssh_text}  with a ControlPath"
                if asks
                else f"which keys are tried:  ssh -v -oBatchMode=yes {host.ssh_text} true"
            ],
        )
    if match := re.search(r"Could not resolve hostname ([^:]+):", said):
        other = "" if match.group(1) == host.name else f": {match.group(1)}"
        return Unreachable(
            f"host name not found{other}",
            host=name,
            hint=[f"ssh_config has no Host {host.ssh_name}, and neither has DNS"],
        )
    if match := re.search(r"connect to host (\S+) port (\d+): (.*?)\r?$", said, re.MULTILINE):
        address, port, why = match.groups()
        if "refused" in why:
            return Unreachable(f"connection refused by {address} port {port}", host=name)
        if "timed out" in why:
            return Unreachable(f"no answer from {address} port {port} in {limit_s:g} s", host=name)
        return Unreachable(f"{address} port {port}: {why}", host=name)
    where = f"{known.hostname} port {known.port}"
    if known.proxy_command and not known.proxy_jump:
        where = "its ProxyCommand"
    if "timed out during banner exchange" in said:
        return Unreachable(f"no answer from {where} in {limit_s:g} s", host=name)
    if ungreeted or _TURNED_AWAY.search(said):
        return _turned_away(said, host, known)
    quoted = f"ssh: {first_line(said.encode()) or 'failed without a word'}"
    return Unreachable(quoted, host=name) if _NEVER.search(said) else NoAnswer(quoted)


def _turned_away(said: str, host: Host, known: SshSettings) -> TurnedAway:
    if known.proxy_command and not known.proxy_jump:
        lines = [line for line in said.splitlines() if line.strip() and not _is_sshs_own(line)]
        words = first_line(lines[0].encode()) if lines else ""
        return TurnedAway(
            f'its ProxyCommand ended: "{words}"' if words else "its ProxyCommand ended",
            host=host.name,
            kind="unreachable",
        )
    return TurnedAway(
        f"{known.hostname} port {known.port} closed the connection before it began",
        host=host.name,
        hint=[first_line(said.encode())],
        kind="unreachable",
    )


def _is_sshs_own(line: str) -> bool:
    return bool(_NO_BANNER.search(line) or _TURNED_AWAY.match(line))


def _host_key(
    said: str, host: Host, known: SshSettings, config: str | None, argv: Sequence[str] | None
) -> CorraError:
    """Return the HostKey error with the facts that ssh writes with -v only."""
    if argv is None or known.proxy_jump or known.proxy_command or host.caller:
        # Only the caller's ssh can read the caller's known_hosts. And only ssh knows whether the
        # key is the host's own, or one of a host on the way.
        line = next((line for line in said.splitlines() if "host key" in line.lower()), said)
        return HostKey(
            first_line(line.encode()),
            host=host.name,
            hint=[f"ssh {host} true  asks, and remembers"],
        )
    # The same call with -v, and with `true` to run, says which key was offered.
    at = argv.index("--")
    more = subprocess.run(
        [*argv[:at], "-v", *argv[at:-1], "true"],
        capture_output=True,
        stdin=subprocess.DEVNULL,
        check=False,
        timeout=60,
    )
    more_said = more.stderr.decode(errors="replace")
    match = re.search(r"Server host key: (\S+) (SHA256:\S+)", more_said)
    if match is None:
        return HostKey(f"host key not accepted: {first_line(said.encode())}", host=host.name)
    offered = host_keys.Key(match.group(1), match.group(2))
    if revoked := re.search(r"revoked by file (.*?)\r?$", said + more_said, re.MULTILINE):
        return HostKey(
            f"host key REVOKED: {offered}",
            host=host.name,
            hint=[f"{revoked.group(1)} has it: stop, report it"],
        )
    refusal = host_keys.verdict(offered, host_keys.lines_about(known), host, known, config=config)
    return refusal or HostKey(f"host key not accepted: {offered}", host=host.name)


# After three of these without an answer, ssh gives the link up.
ALIVE_S = 5.0


class OpenSSH:
    """Commands on `host` through the ssh program, which can do all that ssh_config says.

    If another user of this machine calls ssh, that user's keys, known_hosts and ssh_config count.
    """

    remark = ""

    def __init__(
        self,
        host: Host,
        *,
        config: Any = None,
        connect_timeout_s: float | None = CONNECT_S,
        accept_new_key: bool = False,
        password: str | None = None,
        settings: SshSettings | None = None,
    ) -> None:
        self._look_for_programs(host)
        self.host = host
        self.password = password if host.as_user else None
        self._config_path = None if host.caller else config_path(config)
        self._connect_timeout_s = connect_timeout_s
        self._accept_new_key = accept_new_key
        self._settings = settings
        self._apart = False

    @property
    def login(self) -> str:
        """Who must be in sudoers: who runs corra, or who logs in on the host."""
        if self.host.caller:
            return self._me if self.host.user is None else self.host.ssh_login or self.host.caller
        return self.host.ssh_login or self.settings.user

    @property
    def _me(self) -> str:
        """Who calls ssh, or calls sudo to have ssh called."""
        return getpass.getuser()

    def _look_for_programs(self, host: Host) -> None:
        import shutil

        for program in ("ssh", *(["sudo"] if host.caller else [])):
            if not shutil.which(program):
                raise Misuse(f"no {program} program on this machine", host=host.name)

    @property
    def connect_timeout_s(self) -> float:
        """How long it may take to connect."""
        return self._connect_timeout_s or self.settings.connect_timeout_s or CONNECT_S

    @property
    def settings(self) -> SshSettings:
        """What ssh_config means for this host."""
        if self._settings is None:
            self._settings = ssh_settings(self.host, self._config_path)
        return self._settings

    def begin(self) -> None:
        """Do nothing: ssh starts together with its command."""

    def argv(self, command: str, *options: str) -> list[str]:
        """Return the argv that `open` starts. `options` are added to ssh's options."""
        accept = self._accept_new_key and self.settings.strict in {"ask", "yes"}
        # If a master of ours didn't go into the background, corra would have to end it, with every
        # session that goes through it. A master that is silent (its machine slept, its line is
        # cut) would be silent to each new command, too.
        master = (
            ["-oControlPath=none"]
            if self._apart
            else []
            if self.settings.control_persist
            else ["-oControlMaster=no"]
        )
        how = Options(
            config=self._config_path,
            connect_timeout_s=self.connect_timeout_s,
            # ssh_config's interval goes before ours.
            alive_interval_s=None if self.settings.alive_interval_s else ALIVE_S,
            password=self.password is not None,
            ssh=(
                *(["-oStrictHostKeyChecking=accept-new"] if accept else []),
                *([] if self.host.caller else self.settings.for_a_command),
                *options,
                *master,
            ),
        )
        return build_command(command, self.host, options=how)

    def failure(self, said: str) -> Exception:
        """Return the error that ssh's words mean: a CorraError, or LinkLost if it may be in."""
        return failure(
            said,
            self.host,
            self.settings,
            self.connect_timeout_s,
            self._config_path,
            self.argv("true"),
        )

    def open(self, command: str) -> Channel:
        argv = self.argv(command if self.password is None else sudo.gated(command))
        channel = SshProcess(
            argv, self.host, self.settings, self.connect_timeout_s, self._config_path
        )
        return (
            channel
            if self.password is None
            else sudo.enter(channel, self.password, self.host, lambda: self.login)
        )

    def close(self) -> None:
        """Have later commands connect anew, past a ControlMaster that was used so far."""
        self._apart = True


class Elsewhere(OpenSSH):
    """The ssh program of another machine, `keeper`, with the keeper's ssh_config and keys."""

    def __init__(self, host: Host, keeper: Runner, **how: Any) -> None:
        self._keeper = keeper
        super().__init__(host, **how)
        self._config_path = None

    def _look_for_programs(self, host: Host) -> None:
        """Look for nothing: if the keeper has no ssh, its shell says so."""

    @property
    def _me(self) -> str:
        return self._keeper.login

    @property
    def settings(self) -> SshSettings:
        if self._settings is None:
            self._settings = SshSettings(
                self.host.ssh_name,
                self.host.ssh_port or SSH_PORT,
                self.host.ssh_login or self._me,
            )
        return self._settings

    def failure(self, said: str) -> Exception:
        error = failure(said, self.host, self.settings, self.connect_timeout_s, None, None)
        if not isinstance(error, CorraError):
            return error
        return error.but(hint=tuple(f"on {self._keeper.host}:  {line}" for line in error.hint))

    def open(self, command: str) -> Channel:
        channel = self._keeper.open(
            build_program(self.argv(command if self.password is None else sudo.gated(command)))
        )
        return (
            channel
            if self.password is None
            else sudo.enter(channel, self.password, self.host, lambda: self.login)
        )
