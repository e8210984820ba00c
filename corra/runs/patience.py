"""How long a Follow waits: the caller's patience, the pauses between tries, the pings of a link."""

from __future__ import annotations

from typing import NamedTuple

from corra.model.units import duration

from .clock import Clock

PING_EVERY_S = 5.0
DEAD_AFTER_S = 15.0
# After a break the first ping goes out so soon: if the host answers it, the link is back.
FIRST_PING_S = 0.25

# The clocks of a suspended machine drift apart by the time it slept. A step of NTP may look the
# same; it costs one new link.
SLEPT_S = 5.0
# The host's follow leaves when it has had no ping for 60 s. If the client was stopped half as long
# (Ctrl-Z, a pager that doesn't scroll), that end of the link isn't worth a word.
AWAY_S = 30.0

_FIRST_PAUSE_S = 0.25
_LONGEST_PAUSE_S = 15.0


class Patience(NamedTuple):
    """How patient a caller is with a silent link, with a missing link, and with the whole watch.

    `tick_s`: how often the caller wants a Tick.
    """

    dead_after_s: float = DEAD_AFTER_S
    reconnect_timeout_s: float | None = None
    timeout_s: float | None = None
    tick_s: float | None = None


class Cut(Exception):
    """The link is no good any more.

    `quiet`: nobody needs to hear of it, unless the next link can't be made. `dead`: the connection
    below the link is no good either.
    """

    def __init__(self, why: str, *, quiet: bool = False, dead: bool = False) -> None:
        super().__init__(why)
        self.quiet = quiet
        self.dead = dead


def pause_s(attempt: int, clock: Clock) -> float:
    """Return the pause after the `attempt`th try without anything new: twice the one before."""
    # Half of the pause is chance: a hundred followers of a host must not knock in the same moment.
    return min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * (1 << min(attempt - 1, 10))) * (
        0.5 + clock.random() / 2
    )


class KeepAlive:
    """Says of one link after the other when to ping, and when it is dead."""

    def __init__(self, patience: Patience, clock: Clock) -> None:
        self._clock = clock
        self._dead_after_s = patience.dead_after_s
        self._every_s = min(PING_EVERY_S, patience.dead_after_s / 3)
        self.began_at = self._heard_at = self._slept_s = 0.0
        self._asked_at: float | None = None
        self.ping_at = 0.0
        self.away = False

    def begin(self, *, after_a_break: bool) -> None:
        """Begin with a new link."""
        self.began_at = self._heard_at = self._clock.now()
        self.ping_at = self._heard_at + (
            min(FIRST_PING_S, self._every_s) if after_a_break else self._every_s
        )
        self._asked_at = None
        self._slept_s = self._clock.slept_s()
        self.away = False

    def hear(self) -> None:
        """Note that the host has sent something."""
        self._heard_at, self._asked_at = self._clock.now(), None

    def is_ping_due(self) -> bool:
        """Return whether to ping now. Raises Cut when this machine has slept."""
        now = self._clock.now()
        if self._clock.slept_s() - self._slept_s > SLEPT_S:
            raise Cut("this machine slept", dead=True)
        if now < self.ping_at:
            return False
        self.away = self.away or now - self.ping_at > AWAY_S
        self.ping_at = now + self._every_s
        self._asked_at = now if self._asked_at is None else self._asked_at
        return True

    def check(self) -> None:
        """Raise Cut when the host has been silent for too long."""
        now = self._clock.now()
        # Silence counts only after a ping: a client that was stopped for a minute must ask and read
        # before it calls the host dead.
        asked_s = 0.0 if self._asked_at is None else now - self._asked_at
        silent_s = now - self._heard_at
        if silent_s >= self._dead_after_s and asked_s >= self._dead_after_s - self._every_s:
            raise Cut(f"silent for {duration(silent_s)}", quiet=self.away, dead=True)
