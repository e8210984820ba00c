"""What a host's login files do to a command: some read the stdin that is meant for the agent.

The client asks once, when a host that never answered has let it in and said nothing: it sends two
lines to a command that prints them. What comes back says whether the login files read any of them.
"""

from __future__ import annotations

import time

from corra.errors import CorraError, NotStarted, typed
from corra.transport.channel import Channel, Runner

# A shell that reads its stdin has read these two lines, or their end, at once.
PROBE_S = 5.0
PROBED_MAX = 1 << 20

# The kind of its error.
LOGIN_FILE = "login_file"
_BEGIN, _SENT = b"corra probe begins\n", b"corra probe 1\ncorra probe 2\n"
_COMMAND = "exec /bin/sh -c 'echo corra probe begins; exec cat'"


def login_fault(runner: Runner, limit_s: float = PROBE_S) -> CorraError | None:
    """Return the error for a host whose login files read stdin, else None."""
    try:
        channel = runner.open(_COMMAND)
    except (CorraError, ConnectionError, TimeoutError):
        return None
    try:
        channel.write(_SENT)
        channel.close_write()
        said = _all_of(channel, min(limit_s, PROBE_S))
    except (CorraError, ConnectionError, TimeoutError):
        return None
    finally:
        channel.close()
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
