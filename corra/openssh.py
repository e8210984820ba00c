"""The ssh program's pipes as a Channel, and its few words on stderr as errors.

ssh says why it failed in text and exit status 255. Before the first byte from the host that means it was asked for nothing; a start that
sshd turned away in a burst is tried again, with all that was written so far. After the first byte the link is lost.
"""

from __future__ import annotations

import random
import re
import subprocess
import time
from collections.abc import Sequence

from . import hostkeys
from .channel import LinkLost, NoAnswer, first_line
from .errors import Auth, CorraError, HostKey, Unreachable
from .process import Process
from .program import Host
from .sshconfig import Settings

# ssh's own failures, and nothing of corra's: the agent's verbs end with 0, 1 or 2.
SSH_FAILED = 255
# Requests are far smaller; a program's stdin is sent only after the first byte has come.
REPLAY_MAX = 1 << 20

_TURNED_AWAY = re.compile(
    r"kex_exchange_identification|banner exchange: Connection|ssh_exchange_identification|Connection (?:closed|reset) by"
)
# What ssh says of a session that had begun: the host may have acted by then.
_CUT = re.compile(
    r"client_loop|Read from remote host|Connection to \S+ closed|Timeout, server|Broken pipe|packet_write_wait"
)
# What it says before there is any connection.
_NEVER = re.compile(
    r"Unable to negotiate|Bad configuration option|command-line: line|no matching|terminating, \d+ bad|unknown option|usage: ssh"
)


class TurnedAway(Unreachable):
    """The peer hung up before it said who it is."""


class SshProcess(Process):
    """`argv`, an ssh, that asks `host` for something."""

    def __init__(
        self, argv: Sequence[str], host: Host, known: Settings, limit_s: float, config: str | None
    ) -> None:
        self._argv = argv
        self._host = host
        self._known = known
        self._limit_s = limit_s
        self._config = config
        self._deadline = time.monotonic() + limit_s
        self._pause_s = 0.1
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
        """Start ssh once more, if the time allows it; what was written is written again."""
        self._pause_s = min(2.0, self._pause_s * 2) * random.uniform(0.5, 1.0)  # noqa: S311 - jitter, not a secret
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
    known: Settings,
    limit_s: float,
    config: str | None,
    argv: Sequence[str] | None,
) -> Exception:
    """Return the error that ssh's words mean; what isn't recognised is quoted, and may have come after the host had begun to act.

    `argv` None: it can't be asked any more than it has said.
    """
    name = host.name
    if match := _CUT.search(said):
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
        return Auth(
            f"{host.login or host.caller or known.user} may not log in ({methods})",
            host=name,
            hint=[f"does  ssh {host} true  let you in?"],
        )
    if match := re.search(r"Could not resolve hostname ([^:]+):", said):
        other = "" if match.group(1) == name else f": {match.group(1)}"
        return Unreachable(
            f"host name not found{other}",
            host=name,
            hint=[f"ssh_config has no Host {name}, and neither has DNS"],
        )
    if match := re.search(r"connect to host (\S+) port (\d+): (.*?)\r?$", said, re.MULTILINE):
        address, port, why = match.groups()
        if "refused" in why:
            return Unreachable(f"connection refused by {address} port {port}", host=name)
        if "timed out" in why:
            return Unreachable(f"no answer from {address} port {port} in {limit_s:g} s", host=name)
        return Unreachable(f"{address} port {port}: {why}", host=name)
    where = f"{known.hostname} port {known.port}"
    if "timed out during banner exchange" in said:
        return Unreachable(f"no answer from {where} in {limit_s:g} s", host=name)
    if _TURNED_AWAY.search(said):
        return TurnedAway(
            f"{where} closed the connection before it began",
            host=name,
            hint=[first_line(said.encode())],
            kind="unreachable",
        )
    quoted = f"ssh: {first_line(said.encode()) or 'failed without a word'}"
    return Unreachable(quoted, host=name) if _NEVER.search(said) else NoAnswer(quoted)


def _host_key(
    said: str, host: Host, known: Settings, config: str | None, argv: Sequence[str] | None
) -> CorraError:
    """Return the HostKey error with the facts that ssh keeps for its debug output."""
    if argv is None or known.proxy_jump or known.proxy_command or host.caller:
        # Of a caller's known hosts only the caller's ssh knows. And it may be the key of a host on the way, and only ssh knows which.
        line = next((line for line in said.splitlines() if "host key" in line.lower()), said)
        return HostKey(
            first_line(line.encode()),
            host=host.name,
            hint=[f"ssh {host} true  asks, and remembers"],
        )
    # -v on the same call, with nothing to run, says which key was offered; known_hosts says the rest.
    at = argv.index("--")
    more = subprocess.run(
        [*argv[:at], "-v", *argv[at:-1], "true"],
        capture_output=True,
        stdin=subprocess.DEVNULL,
        check=False,
        timeout=60,
    )
    match = re.search(r"Server host key: (\S+) (SHA256:\S+)", more.stderr.decode(errors="replace"))
    if match is None:
        return HostKey(f"host key not accepted: {first_line(said.encode())}", host=host.name)
    offered = hostkeys.Key(match.group(1), match.group(2))
    refusal = hostkeys.verdict(offered, hostkeys.lines_about(known), host, known, config=config)
    return refusal or HostKey(f"host key not accepted: {offered}", host=host.name)
