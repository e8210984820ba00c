"""What a host's login files do to a command: some read the stdin that is meant for the agent.

The client asks once, when a host that never answered has let it in and says nothing: it sends two
lines to a command that prints them. What comes back says whether the login files read any of them.
"""

from __future__ import annotations

import threading
import time

from corra.errors import CorraError, NotStarted, typed
from corra.transport.channel import Channel, Runner

# A shell that reads its stdin has read these two lines, or their end, at once.
PROBE_S = 5.0
PROBED_MAX = 1 << 20
# A host that has been silent for so long is looked at, and a second later the operator hears of it.
# Hardly a login takes longer: a .bashrc that starts conda and nvm takes 2 s.
SILENT_S = 5.0
SAID_AFTER_S = 6.0

MAY_WAIT = "a login file may wait there"
# The kind of its error.
LOGIN_FILE = "login_file"
_BEGIN, _SENT = b"corra probe begins\n", b"corra probe 1\ncorra probe 2\n"
_COMMAND = "exec /bin/sh -c 'echo corra probe begins; exec cat'"


class Doubt:
    """What is done while a host that has never answered says nothing.

    After SILENT_S its login files are probed in a thread, so that an answer that comes late is
    still read at once. The deadline for that answer stays.
    """

    def __init__(self, runner: Runner, limit_s: float) -> None:
        """`limit_s`: how long the host may be silent."""
        self._runner = runner
        self._limit_s = limit_s
        # A caller with less patience than that gets the answer of the probe within it.
        self._probe_at_s = min(SILENT_S, limit_s / 2)
        self._said = limit_s <= SAID_AFTER_S
        self._fault: CorraError | None = None
        self._begun = False
        self.looking = False
        # Whether the login came to no command in the time of the probe.
        self.waits = False

    def look(self, silent_s: float) -> None:
        """Do what is due after `silent_s` of silence.

        Raises CorraError for a host whose login files read stdin.
        """
        if self._fault is not None:
            raise self._fault
        if not self._begun and silent_s >= self._probe_at_s:
            self._begun = self.looking = True
            threading.Thread(target=self._probe, daemon=True).start()
        if not self._said and silent_s >= SAID_AFTER_S:
            self._said = True
            import logging

            logging.getLogger("corra").warning(
                "%s: no answer for %g s (%s); waiting on",
                self._runner.host,
                SAID_AFTER_S,
                MAY_WAIT,
            )

    def _probe(self) -> None:
        try:
            said = _said_by(self._runner, min(PROBE_S, self._limit_s / 3))
            self._fault = _fault_in(said, self._runner)
        except TimeoutError:
            self.waits = True
        except (CorraError, ConnectionError):
            pass
        finally:
            self.looking = False


def login_fault(runner: Runner, limit_s: float = PROBE_S) -> CorraError | None:
    """Return the error for a host whose login files read stdin, else None."""
    try:
        return _fault_in(_said_by(runner, limit_s), runner)
    except (CorraError, ConnectionError, TimeoutError):
        return None


def _said_by(runner: Runner, limit_s: float) -> bytes:
    """Return all that a login says, with the lines it left for its command.

    Raises TimeoutError, ConnectionError, CorraError.
    """
    channel = runner.open(_COMMAND)
    try:
        channel.write(_SENT)
        channel.close_write()
        return _all_of(channel, limit_s)
    finally:
        channel.close()


def _fault_in(said: bytes, runner: Runner) -> CorraError | None:
    noise, begin, came = said.partition(_BEGIN)
    if not begin or came == _SENT:
        return None
    host = runner.host
    more = f"more: {typed()} doctor --host {host}"
    look = f"look: ssh {host.ssh_name} 'cat' < /etc/hostname  must print the name;  {more}"
    prints = ["it prints, too: " + repr(noise[:40])[2:-1]] if noise else []
    return NotStarted(
        "a login file there reads what is meant for the agent (.bashrc?)",
        host=str(host),
        hint=[look, *prints],
        kind=LOGIN_FILE,
    )


def _all_of(channel: Channel, limit_s: float) -> bytes:
    """Return all that the command prints. Raises TimeoutError."""
    said, until = bytearray(), time.monotonic() + limit_s
    while data := channel.read(max(0.0, until - time.monotonic())):
        said += data
        if len(said) > PROBED_MAX or time.monotonic() > until:
            raise TimeoutError
    return bytes(said)
