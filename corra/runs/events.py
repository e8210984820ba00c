"""The events that a Follow yields."""

from __future__ import annotations

from typing import NamedTuple

from corra.model.frames import Gap, Output, Status, Taken


class LinkDown(NamedTuple):
    """No link has brought anything new for `since_s`, and try `attempt` to make one is next.

    The program isn't affected.
    """

    since_s: float
    error: str
    attempt: int


class LinkUp(NamedTuple):
    """The link is back: it has brought something new or answered a ping. Nothing was missed."""

    down_s: float


class SignalPassed(NamedTuple):
    """The program has got a signal that `Follow.signal` sent over the open link, such as `TERM`."""

    name: str


class Tick:
    """`tick_s` have passed: time to redraw."""


Event = Output | Gap | Status | Taken | LinkDown | LinkUp | SignalPassed | Tick
