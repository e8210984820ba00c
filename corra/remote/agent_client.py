"""The agent, brought to a host and spoken to: one exec places it, starts it and carries all that follows.

The remote command is a constant, so nothing a user says can meet a shell. It finds a Python and has it execute the beginning of stdin, the
LOADER, whose length is part of the command; all else is data on the same stdin:

    exec('...the loader...');run()
    <nonce> <sha256 of agent.py> <verb>
    <bytes>                                 the request, as JSON of that many bytes

The loader imports `<cache>/<sha256>/agent.py` if its bytes have that hash and nobody else could have put them there. Else it answers
`corra 1 <nonce> need`, takes `<bytes>` and the source from stdin, and checks the hash before anything runs. Whatever a login shell
prints first is noise, told apart by the nonce.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

from corra.model.host import Host, Mode
from corra.transport.channel import Runner

from .bootstrap import COMMAND, agent_source, loader_command, visitor_modules
from .exchange import Exchange, Link, Refused


class Agent:
    """The agent on one host, as one user. Nothing happens before the first verb."""

    def __init__(self, runner: Runner, source: bytes | None = None) -> None:
        self._runner = runner
        self._source = agent_source() if source is None else source
        self._digest = hashlib.sha256(self._source).hexdigest()

    @property
    def host(self) -> Host:
        return self._runner.host

    @property
    def runner(self) -> Runner:
        """What carries its bytes."""
        return self._runner

    @property
    def digest(self) -> str:
        """The hash it has on the host."""
        return self._digest

    @property
    def user(self) -> str:
        """Who its runs belong to there: whom sudo makes of us, else who logs in."""
        return self.host.user or self._runner.login

    def beside(self, source: bytes) -> Agent:
        """Return another file for the same host, placed and spoken to in the same way, over the same connection."""
        return Agent(self._runner, source)

    def begin(self) -> None:
        """Start connecting, beside what the caller still has to do before the first verb."""
        self._runner.begin()

    def call(
        self, verb: str, request: Mapping[str, Any], *, timeout_s: float = 15.0
    ) -> dict[str, Any]:
        """Return the reply of a verb that has nothing more to say. Raises Refused, CorraError, LinkLost."""
        link = self.stream(verb, request, timeout_s=timeout_s)
        link.close()
        return link.reply

    def stream(
        self,
        verb: str,
        request: Mapping[str, Any],
        *,
        payload: BinaryIO | None = None,
        timeout_s: float = 15.0,
        sending: Callable[[], None] | None = None,
    ) -> Link:
        """Return the Link once the reply has come; `payload` is sent where the verb asks for it.

        `timeout_s` is how long the host may be silent before the reply. `sending` is called before the first byte goes out; what it raises
        keeps that byte back. Raises Refused, CorraError, LinkLost.
        """
        return self._ask(
            lambda exchange: exchange.reply_to(request, self._digest, self._source, payload),
            verb,
            timeout_s,
            sending,
        )

    def visit(self, verb: str, request: Mapping[str, Any], *, timeout_s: float = 15.0) -> Link:
        """Return the Link of a verb of doctor.py, of which nothing stays there. Raises what `stream` does."""
        return self._ask(
            lambda exchange: exchange.reply_to_visit(request, visitor_modules()), verb, timeout_s
        )

    def _ask(
        self,
        ask: Callable[[Exchange], Link],
        verb: str,
        timeout_s: float,
        sending: Callable[[], None] | None = None,
    ) -> Link:
        channel = self._runner.open(self._command)
        try:
            if sending is not None:
                sending()
            link = ask(Exchange(self._runner, channel, verb, timeout_s))
        except BaseException:
            channel.close()
            raise
        if "error" in link.reply:
            link.close()
            raise Refused(link.reply)
        return link

    @property
    def _command(self) -> str:
        # Here we are a Python that will do; cron's PATH, say, may lead to none.
        return loader_command(sys.executable) if self._runner.host.mode is Mode.LOCAL else COMMAND

    def close(self) -> None:
        """Let go of the connection. Runs go on."""
        self._runner.close()


def place(runner: Runner, *, source: bytes | None = None) -> Agent:
    """Return the agent behind `runner`; it is placed there when the first verb finds it missing."""
    return Agent(runner, source)
