"""One attempt of a step: a run that is started or found running, and watched to its end.

The host decides which of the two: it starts an id at most once. A run that the journal has seen on
the host is never started again: if its record has gone from the host, it would run twice.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Protocol

from corra.errors import NotFound, StillRunning
from corra.model.frames import Gap, Output, Status
from corra.model.state import State
from corra.runs import request
from corra.runs.events import LinkDown, LinkUp
from corra.runs.follow import Follow
from corra.runs.kept import TailKept
from corra.runs.patience import Patience
from corra.runs.run import OUTPUT_KEPT


class Watcher(Protocol):
    """Takes the events of an attempt."""

    def follows(self, follow: Follow) -> None: ...
    def began(self, state: State) -> None: ...
    def link(self, event: LinkDown | LinkUp) -> None: ...
    def output(self, stream: str, data: bytes) -> None: ...


@dataclass(frozen=True)
class Seen:
    """How an attempt ended. `was_over`: it had ended before this pass."""

    state: State
    stdout: str = ""
    stderr: str = ""
    truncated: bool = False
    was_over: bool = False


class OpenFollows:
    """The follows of one pass, closed together when the operator leaves; the programs go on."""

    def __init__(self) -> None:
        self.left = threading.Event()
        self._follows: set[Follow] = set()
        self._lock = threading.Lock()

    def add(self, follow: Follow) -> None:
        """Keep `follow` until `discard`; one that comes after `leave` is closed at once."""
        with self._lock:
            self._follows.add(follow)
        if self.left.is_set():
            follow.close()

    def discard(self, follow: Follow) -> None:
        with self._lock:
            self._follows.discard(follow)

    def leave(self) -> None:
        """Close every follow, and each that is added from now on."""
        self.left.set()
        with self._lock:
            follows = list(self._follows)
        for each in follows:
            each.close()


def watch_attempt(
    launch: request.Launch,
    watcher: Watcher,
    *,
    confirmed: bool,
    patience_s: float | None,
    pass_id: str,
) -> Seen:
    """Start `launch`, or find it running, and return how it ended.

    Raises CorraError, StillRunning if the follow was closed.
    """
    run = launch.run
    kept = {"stdout": TailKept(OUTPUT_KEPT), "stderr": TailKept(OUTPUT_KEPT)}
    patience = Patience(reconnect_timeout_s=patience_s)
    follow = run.follow(patience=patience) if confirmed else launch.follow(patience)
    watcher.follows(follow)
    first: State | None = None
    try:
        for event in follow:
            match event:
                case Status() if first is None and follow.state is not None:
                    first = follow.state
                    watcher.began(first)
                case Output(stream=stream, data=data):
                    kept["stderr" if stream == "stderr" else "stdout"].add(data)
                    watcher.output(stream, data)
                case Gap(stream=stream, start=begin, end=end):
                    kept["stderr" if stream == "stderr" else "stdout"].dropped += end - begin
                case LinkDown() | LinkUp():
                    watcher.link(event)
    except NotFound:
        if not confirmed:
            raise
        return Seen(
            State(
                run.id, "lost", reason="spool-gone", name=run.name, argv=launch.request.program.argv
            )
        )
    state = follow.state
    if state is None or not state.ended:
        raise StillRunning("you have left", host=str(run.host), prog_id=run.id, label=run.label)
    ours = (state.origin or {}).get("pass") == pass_id
    return Seen(
        state,
        kept["stdout"].text(),
        kept["stderr"].text(),
        any(each.dropped for each in kept.values()),
        was_over=first is not None and first.ended and not ours,
    )


def end_of(text: str, most: int) -> tuple[str, bool]:
    """Return the last `most` characters of `text`, and whether some were left out."""
    return (text, False) if len(text) <= most else (text[-most:], True)
