"""The agent on one host: one exec places it, starts it and carries its answer.

The remote command is a constant, so nothing a user says can meet a shell. The command finds a
Python, and that Python executes the beginning of stdin, the loader. The loader's length is part of
the command. All else on stdin is data:

    exec('...the loader...');run()
    <nonce> <sha256 of agent.py> <verb>
    <bytes>                                 the request, as JSON of that many bytes

The loader imports `<cache>/<sha256>/agent.py` if the file has that hash and nobody else could have
written it. Else it answers `corra 1 <nonce> need`, reads `<bytes>` and the source from stdin, and
checks the hash before it imports the source. What a login shell prints first lacks the nonce, and
is skipped as noise.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

from corra.errors import CorraError, NotStarted
from corra.model.host import Host, Mode
from corra.model.replies import AGENT_REPLIES, DOCTOR_REPLIES, check_reply
from corra.model.shapes import Object
from corra.transport.channel import NoAnswer, Runner

from .bootstrap import COMMAND, agent_source, loader_command, sha256_of, visitor_modules
from .exchange import LOGIN_ENDED, BadReply, Exchange, Link, Refused
from .login_files import Doubt, login_fault


class Agent:
    """The agent on one host, as one user. Nothing happens before the first verb."""

    def __init__(
        self,
        runner: Runner,
        source: bytes | None = None,
        replies: Mapping[str, Object] | None = None,
    ) -> None:
        """`replies` are what another source than the agent's may answer, by verb."""
        self._runner = runner
        self._replies = replies or ({} if source else AGENT_REPLIES)
        self._source = agent_source() if source is None else source
        self._digest = ""
        # Whether the host has ever said a word of corra's protocol.
        self.answered = False
        self._doubt: Doubt | None = None

    @property
    def host(self) -> Host:
        return self._runner.host

    @property
    def runner(self) -> Runner:
        """The Runner that carries the agent's bytes."""
        return self._runner

    @property
    def remark(self) -> str:
        """What an operator should know about the way to the host, or ""."""
        return self._runner.remark

    @property
    def digest(self) -> str:
        """The SHA-256 of the agent's source, its directory's name on the host."""
        self._digest = self._digest or sha256_of(self._source)
        return self._digest

    @property
    def user(self) -> str:
        """The user on the host whose runs these are: the one sudo changes to, else the login."""
        return self.host.user or self._runner.login

    def beside(self, source: bytes, replies: Mapping[str, Object]) -> Agent:
        """Return the Agent of another source file on the same host, over the same connection."""
        return Agent(self._runner, source, replies)

    def begin(self) -> None:
        """Start connecting in the background, before the first verb needs the connection."""
        self._runner.begin()

    def call(
        self, verb: str, request: Mapping[str, Any], *, timeout_s: float = 15.0
    ) -> dict[str, Any]:
        """Return the reply of a verb that sends nothing else.

        Raises Refused, CorraError, LinkLost.
        """
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
        """Return the Link once the reply has come; `payload` is sent if the host asks for it.

        `timeout_s` is how long the host may be silent before the reply. `sending` is called before
        the first byte is sent; if it raises, nothing is sent. Raises Refused, CorraError, LinkLost.
        """
        return self._ask(
            lambda exchange: exchange.reply_to(request, self.digest, self._source, payload),
            self._replies,
            verb,
            request,
            timeout_s,
            sending,
        )

    def visit(self, verb: str, request: Mapping[str, Any], *, timeout_s: float = 15.0) -> Link:
        """Return the Link of a verb of doctor.py, which leaves nothing on the host.

        Raises what `stream` raises.
        """
        return self._ask(
            lambda exchange: exchange.reply_to_visit(request, visitor_modules()),
            DOCTOR_REPLIES,
            verb,
            request,
            timeout_s,
        )

    def _ask(
        self,
        ask: Callable[[Exchange], Link],
        replies: Mapping[str, Object],
        verb: str,
        request: Mapping[str, Any],
        timeout_s: float,
        sending: Callable[[], None] | None = None,
    ) -> Link:
        channel = self._runner.open(self._command)
        try:
            if sending is not None:
                sending()
            exchange = Exchange(self._runner, channel, verb, timeout_s, self._doubt_of(timeout_s))
            try:
                link = ask(exchange)
            finally:
                self.answered = self.answered or exchange.answered
            check_reply(replies, verb, request, link.reply)
        except ValueError as error:
            channel.close()
            raise BadReply(error) from error
        except Exception as error:
            channel.close()
            fault = None if self.answered else self._login_fault(error)
            if fault is not None:
                raise fault from error
            raise
        except BaseException:
            channel.close()
            raise
        if "error" in link.reply:
            link.close()
            raise Refused(link.reply)
        return link

    def _doubt_of(self, timeout_s: float) -> Doubt | None:
        """Return the Doubt of a host that has never answered: one, as a look costs a login."""
        if self.answered or self._runner.host.mode is Mode.LOCAL:
            return None
        if self._doubt is None:
            self._doubt = Doubt(self._runner, timeout_s)
        return self._doubt

    def _login_fault(self, error: Exception) -> CorraError | None:
        """Return what is wrong with the login of a host that let us in and never answered."""
        ended = isinstance(error, NotStarted) and error.why.startswith(LOGIN_ENDED)
        return login_fault(self._runner) if ended or isinstance(error, NoAnswer) else None

    @property
    def _command(self) -> str:
        # On this machine our own Python will do; in cron's PATH there may be none.
        return loader_command(sys.executable) if self._runner.host.mode is Mode.LOCAL else COMMAND

    def close(self) -> None:
        """Close the connection. Runs go on."""
        self._runner.close()


def place(runner: Runner, *, source: bytes | None = None) -> Agent:
    """Return the agent that `runner` leads to; the first verb places it if it is missing."""
    return Agent(runner, source)
