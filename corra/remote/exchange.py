"""One exchange with a host: a request, its reply, and the Link that stays open."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, BinaryIO

from corra import errors
from corra.model.frames import STATE_MAX
from corra.model.shapes import read_json
from corra.transport import sudo
from corra.transport.channel import Channel, LinkLost, NoAnswer, Runner, Silent, first_line

from .bootstrap import FIRST, PYTHONS, VISIT
from .login_files import MAY_WAIT, Doubt

ANSWER_S = 15.0
# How often the silence of a host that has never answered is looked at.
_LOOK_S = 0.2

# How the error begins that says it of a login shell.
LOGIN_ENDED = "the login there ended"
ANSWER_PREFIX = b"corra 1 "
NOISE_MAX = 1 << 20
REPLY_MAX = STATE_MAX
# Half of what a line of 56 kbit/s carries in a second.
SLOWEST = 3500
# The host's pipe and ssh's window take this much without a pause.
PAYLOAD_STEP = 256 * 1024


class Refused(Exception):
    """The host answered `{"error": KIND, ...}`; it did nothing but what `facts` say."""

    def __init__(self, facts: Mapping[str, Any]) -> None:
        self.facts = dict(facts)
        self.kind = str(self.facts.get("error"))
        super().__init__(str(self.facts.get("message", self.kind)))


class BadReply(NoAnswer):
    """The host's answer isn't corra's protocol. Asking again comes to the same."""

    def __init__(self, why: object) -> None:
        super().__init__(f"doesn't speak corra's protocol: {why}")


class Pace:
    """How long an answer may take in all: a silence, and the time that a slow line needs for more.

    A host that sends a byte each 3 s would otherwise hold a verb for ever.
    """

    def __init__(self, silence_s: float) -> None:
        self._silence_s = silence_s
        self._began = self._heard = time.monotonic()
        self._came = 0

    def read(self, read: Callable[[float | None], bytes]) -> bytes:
        """Return the next bytes. Raises TimeoutError; BadReply for an answer that only drips."""
        over = self._began + self._silence_s + self._came / SLOWEST
        left = min(self._silence_s, over - time.monotonic())
        if left <= 0:
            raise self._over()
        try:
            data = read(left)
        except TimeoutError:
            raise self._over() from None
        self._came += len(data)
        self._heard = time.monotonic()
        return data

    def _over(self) -> Exception:
        """Return the error for a time that is up: a host that was silent may only be slow."""
        now = time.monotonic()
        if now - self._heard >= self._silence_s / 2:
            return TimeoutError()
        return BadReply(f"{self._came} bytes in {now - self._began:.0f} s")


class Link:
    """An answered verb: its reply, and the channel for the bytes after it."""

    def __init__(self, channel: Channel, reply: dict[str, Any], ahead: bytes, placed: int) -> None:
        self.reply = reply
        self.placed = placed
        self._channel = channel
        self._ahead = ahead

    def read(self, timeout_s: float | None) -> bytes:
        """Return the next bytes, b"" at the end. Raises TimeoutError, LinkLost."""
        if self._ahead:
            data, self._ahead = self._ahead, b""
            return data
        return self._channel.read(timeout_s)

    def read_all(self, size: int, silence_s: float) -> bytes:
        """Return the next `size` bytes. Raises TimeoutError, LinkLost, BadReply."""
        parts, left, pace = [], size, Pace(silence_s)
        while left > 0:
            data = pace.read(self.read)
            if not data:
                raise LinkLost("the link was closed")
            if len(data) > left:
                data, self._ahead = data[:left], data[left:]
            parts.append(data)
            left -= len(data)
        return b"".join(parts)

    def send(self, data: bytes) -> None:
        """Send all of `data`; other threads' bytes don't come between. Raises LinkLost."""
        self._channel.write(data)

    def close(self) -> None:
        """Close the channel at once; a `read` in another thread ends with LinkLost."""
        self._channel.close()


class Exchange:
    """A channel, from its first byte to the end of the reply's line."""

    def __init__(
        self,
        runner: Runner,
        channel: Channel,
        verb: str,
        timeout_s: float,
        doubt: Doubt | None = None,
    ) -> None:
        """`doubt`: for a host that has never answered."""
        self._runner = runner
        self._doubt = doubt
        self._channel = channel
        self._verb = verb
        self._timeout_s = timeout_s
        self._held = bytearray()
        self.answered = False
        self._pace = Pace(timeout_s)

    def reply_to(
        self, request: Mapping[str, Any], digest: str, source: bytes, payload: BinaryIO | None
    ) -> Link:
        nonce = os.urandom(8).hex()
        body = json.dumps({**request, "nonce": nonce}).encode()
        placed = 0
        self._send(FIRST + f"{nonce} {digest} {self._verb}\n{len(body)}\n".encode() + body)
        while word := self._answer(ANSWER_PREFIX + nonce.encode()):
            self._pace = Pace(self._timeout_s)
            if word == b" need" and not placed:
                placed = len(source)
                self._send(b"%d\n%s" % (len(source), source))
            elif word == b" send" and payload is not None:
                self._send_all(payload)
                payload = None
            else:
                raise BadReply(f"it asked for {word[:20]!r}")
            self._pace = Pace(self._timeout_s)
        return Link(self._channel, self._object(), bytes(self._held), placed)

    def reply_to_visit(
        self, request: Mapping[str, Any], modules: Sequence[tuple[str, bytes]]
    ) -> Link:
        nonce, body = os.urandom(8).hex(), json.dumps(request).encode()
        sizes = " ".join(f"{name}:{len(data)}" for name, data in modules)
        self._send(
            VISIT
            + f"{nonce} {self._verb} {len(body)} {sizes}\n".encode()
            + body
            + b"".join(data for _, data in modules)
        )
        if word := self._answer(ANSWER_PREFIX + nonce.encode()):
            raise BadReply(f"it asked for {word[:20]!r}")
        return Link(self._channel, self._object(), bytes(self._held), 0)

    def _send(self, data: bytes) -> bool:
        """Send `data`; return False if the host has gone, whose last words are still to be read."""
        try:
            self._channel.write(data)
        except LinkLost:
            return False
        return True

    def _send_all(self, payload: BinaryIO) -> None:
        while data := payload.read(PAYLOAD_STEP):
            if not self._send(data):
                return

    def _answer(self, marker: bytes) -> bytes:
        """Skip noise; return the word behind the nonce: b" need", b" send", b"" before a reply."""
        none = ANSWER_PREFIX + b"no-python\n"
        while True:
            at = self._held.find(marker)
            end = self._held.find(b"\n", at) if at >= 0 else -1
            if end >= 0:
                word = bytes(self._held[at + len(marker) : end])
                del self._held[: end + 1]
                self.answered = True
                return word
            if none in self._held:
                via = f"--via chaperone --host {self._runner.host}"
                raise errors.NoPython(
                    f"no Python 3.6 or later (tried {PYTHONS[0]}, {PYTHONS[2]} ..)",
                    host=self._runner.host.name,
                    hint=[
                        f"keep it from here:  {errors.typed()} run {via} -- ..",
                        "or install one there:  apt-get install python3-minimal",
                    ],
                )
            if len(self._held) > NOISE_MAX:
                raise BadReply(
                    f"a login file prints without end (.bashrc?):"
                    f" {NOISE_MAX} bytes before any reply, {first_line(bytes(self._held))!r}"
                )
            self._more()

    def _object(self) -> dict[str, Any]:
        searched = 0
        while (end := self._held.find(b"\n", searched)) < 0:
            searched = len(self._held)
            if searched > REPLY_MAX:
                raise BadReply(f"a reply of more than {REPLY_MAX} bytes")
            self._more()
        held, self._held = self._held, self._held[end + 1 :]
        del held[end:]
        try:
            value = read_json(held)
        except ValueError as error:
            raise BadReply(f"{error}: {bytes(held[:80])!r}") from error
        if not isinstance(value, dict):
            raise BadReply(f"no object: {bytes(held[:80])!r}")
        return value

    def _more(self) -> None:
        try:
            data = self._pace.read(self._listen)
        except TimeoutError:
            raise self._silent(self._timeout_s) from None
        if not data:
            raise self._no_reply()
        self._held += data

    def _listen(self, timeout_s: float | None) -> bytes:
        """Return the channel's next bytes. Raises what it raises, and what the doubt finds."""
        if self._doubt is None or self.answered or timeout_s is None:
            return self._channel.read(timeout_s)
        begun = time.monotonic()
        while True:
            silent_s = time.monotonic() - begun
            self._doubt.look(silent_s)
            try:
                return self._channel.read(min(_LOOK_S, max(0.0, timeout_s - silent_s)))
            except TimeoutError:
                if silent_s >= timeout_s:
                    raise
            except LinkLost as error:
                if not self._doubt.looking:
                    raise
                # The look gives up a connection on which it gets no answer either.
                raise self._silent(silent_s) from error

    def _silent(self, silent_s: float) -> Silent:
        waits = self._doubt is not None and self._doubt.waits
        return Silent(
            f"{self._runner.host.name} gave no answer in {silent_s:.3g} s"
            + (f" ({MAY_WAIT})" if waits else "")
        )

    def _no_reply(self) -> Exception:
        """Return the error for a command that ended without a reply."""
        status = self._channel.exit_status()
        said = self._channel.stderr()
        name = self._runner.host.name
        if refusal := sudo.refusal(
            said.decode(errors="replace"), self._runner.host, lambda: self._runner.login
        ):
            return refusal
        if b"Traceback (most recent call last)" in said:
            # The agent broke down at its work, so what it had done by then is unknown.
            last = said.decode(errors="replace").strip().splitlines()[-1]
            return NoAnswer(f"the agent on {name} broke down: {last[:200]}")
        quoted = first_line(said) or first_line(bytes(self._held)) or "nothing was said"
        if status is None:
            return LinkLost(f"{name} closed the channel: {quoted}")
        if self.answered or status > 128:
            # A command that was killed may have been killed after the start.
            return NoAnswer(
                f"the command on {name} ended with exit {status} before it answered: {quoted}"
            )
        return errors.NotStarted(f"{LOGIN_ENDED} with exit {status}: {quoted}", host=name)
