"""What is known of each member of a fleet right now. The roller writes it, and a view reads it.

A fact that decides anything is a Fact of `model/rollout.py`; a Board holds what people look at.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone

from corra import render
from corra.errors import (
    LOST,
    NOTHING_DONE,
    STILL_RUNNING,
    CorraError,
    Lost,
    MaybeStarted,
    Unreachable,
)
from corra.model.rollout import Fact, What
from corra.model.state import State, exit_code
from corra.model.words import local_time
from corra.runs.digest import Digests

from .plan import Plan, host_of

# How much of a member's last line is kept, for the summary.
LINE_KEPT = 300

NOT_STARTED, CONNECTING, UNREACHED, MAYBE = (
    *("not started", "connecting"),
    *("UNREACHED", "MAYBE STARTED"),
)
# What became of a member, the good ones first.
KINDS: Mapping[What | None, str] = {
    What.WELL: "done",
    What.FAILED: "failed",
    What.LOST: "lost",
    What.MAYBE: "maybe started",
    What.UNREACHED: "unreached",
    What.STARTED: "running",
    What.BEGUN: CONNECTING,
    None: NOT_STARTED,
}
# What went wrong, or may have.
BAD = (What.FAILED, What.LOST, What.MAYBE, What.UNREACHED)


@dataclass
class Member:
    """One member, by its place in the plan. Times are `time.monotonic()`; 0 for never."""

    at: int
    name: str
    wave: int
    prog_id: str
    attempt: int = 1
    what: What | None = None
    state: State | None = None
    error: CorraError | None = None
    begun_at: float = 0.0
    started_at: float = 0.0
    output_at: float = 0.0
    over_at: float = 0.0
    down_since: float = 0.0
    down_why: tuple[str, ...] = ()
    trouble: str = ""
    size: int = 0
    last_lines: dict[str, bytes] = field(default_factory=dict)
    digests: Digests | CorraError | None = None

    @property
    def host(self) -> str:
        return host_of(self.name)

    @property
    def over(self) -> bool:
        return self.what not in (None, What.BEGUN, What.STARTED)

    @property
    def word(self) -> str:
        """Its state in a word or two: `running`, `done`, `FAILED 2`, `UNREACHED`."""
        match self.what:
            case None:
                return NOT_STARTED
            case What.BEGUN:
                return CONNECTING
            case What.MAYBE:
                return MAYBE
            case What.UNREACHED:
                known = self.error is not None and not isinstance(self.error, Unreachable)
                return self.error.fate if known and self.error is not None else UNREACHED
            case What.STARTED:
                return "running"
        return render.word(self.state) if self.state is not None else self.what.value

    @property
    def code(self) -> int:
        """Its part of the fleet's exit code; 0 for one that nobody has tried."""
        match self.what:
            case None:
                return 0
            case What.BEGUN | What.STARTED:
                return STILL_RUNNING
            case What.MAYBE:
                return LOST
            case What.UNREACHED:
                return self.error.code if self.error is not None else NOTHING_DONE
        return exit_code(self.state) if self.state is not None else LOST

    @property
    def waits(self) -> tuple[str, str]:
        """Why nothing comes of it though it isn't over, in a word and a reason, or ("", "")."""
        if self.what is not What.STARTED:
            return "", ""
        if self.down_since:
            return "LINK LOST", self.down_why[-1] if self.down_why else ""
        word, _, why = self.trouble.partition(": ")
        if why and word.isupper():
            return word, why
        return ("running", self.trouble) if self.trouble else ("", "")

    @property
    def said(self) -> str:
        """The last line that it wrote, stderr's before stdout's, or why it was not reached."""
        if self.error is not None and self.state is None:
            return self.error.why
        for stream in ("stderr", "stdout", "output"):
            if line := self.last_lines.get(stream, b"").strip():
                return line.decode("utf-8", "replace")
        return ""


class Board:
    """All members of a fleet, in the order of the plan."""

    def __init__(self, plan: Plan, clock: Callable[[], float] = time.monotonic) -> None:
        self.plan = plan
        self.clock = clock
        self.begun_at = clock()
        self.wave = 0
        waves = [wave for wave, size in enumerate(plan.waves) for _ in range(size)]
        self.members = [
            Member(at, name, waves[at], plan.run_id(name), plan.attempt)
            for at, name in enumerate(plan.members)
        ]

    def take(self, fact: Fact) -> Member | None:
        """Note a fact about a member. Return the member if that changes what is known of it."""
        if fact.what in (What.CONFIRMED, What.STOPPED, What.NOW):
            return None
        member = self.members[fact.member]
        if member.over or member.what is fact.what:
            return None
        now = self.clock()
        member.what = fact.what
        self.wave = max(self.wave, member.wave)
        if fact.what is What.BEGUN:
            member.begun_at = now
        elif fact.what is What.STARTED:
            member.started_at = now
        else:
            member.over_at = now
        return member

    def wrote(self, member: Member, stream: str, data: bytes) -> None:
        """Note a member's output. Called by the thread that has read it."""
        member.size += len(data)
        member.output_at = self.clock()
        tail = data[-4 * LINE_KEPT :].rstrip(b"\n")
        line = tail[tail.rfind(b"\n") + 1 :]
        if line.strip():
            member.last_lines[stream] = line[-LINE_KEPT:]

    def of(self, *kinds: What | None) -> list[Member]:
        return [each for each in self.members if each.what in kinds]

    @property
    def code(self) -> int:
        """The fleet's exit code: the largest of its members.

        Where all that were tried ended well and some were not, it is that of nothing done.
        """
        worst = max((each.code for each in self.members), default=0)
        untried = any(each.what is None for each in self.members)
        return NOTHING_DONE if untried and not worst else worst


def fact_of(state: State, at: float, member: int) -> Fact:
    """Return the Fact that a State means for a member. `at`: when it was heard."""
    if not state.ended:
        return Fact(What.STARTED, member, at)
    ended = local_time(state.end_time)
    when = min(at, ended.timestamp()) if ended is not None else at
    if state.state == "lost":
        return Fact(What.LOST, member, when)
    return Fact(What.WELL if exit_code(state) == 0 else What.FAILED, member, when)


def fact_of_error(error: CorraError, at: float, member: int) -> Fact:
    """Return the Fact that an error of a start, or of a watch, means for a member."""
    if isinstance(error, (MaybeStarted, Lost)):
        return Fact(What.MAYBE if isinstance(error, MaybeStarted) else What.LOST, member, at)
    if error.started == "yes":
        return Fact(What.STARTED, member, at)
    return Fact(What.UNREACHED, member, at)


def today() -> str:
    """Return now, to the second, as a Plan says it."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def moment() -> float:
    """Return now, in seconds since the epoch, to the millisecond."""
    return round(datetime.now(timezone.utc).timestamp(), 3)
