"""The lines of a runbook on stderr: its state, a row for each step, a live line for open runs."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone

from corra import render
from corra.model import ids
from corra.model.host_sets import fold
from corra.model.state import State
from corra.model.units import duration
from corra.model.words import local_time
from corra.terminal.screen import ERR, OUT, Screen, descriptor_for

from .book import Book, JournalEvent

# Beside the number, "done before" and two times, in 80 columns.
_NAMES_WIDTH = 42
_STEP_WIDTH, _HOST_WIDTH, _WORD_WIDTH, _TOOK_WIDTH = 12, 9, 17, 7


@dataclass(frozen=True)
class HostRow:
    """One host's part of a step, as its row tells it."""

    host: str
    word: str
    took_s: float | None = None
    prog_id: str = ""


class Progress:
    """Says how one pass through a runbook goes. Its methods may be called from any thread."""

    def __init__(self, label: str, *, quiet: bool) -> None:
        self.label = label
        self.screen = Screen(quiet=quiet)
        self._before: list[tuple[int, str]] = []
        self._span: list[str] = []
        self._running: dict[str, float] = {}
        self._down: set[str] = set()
        self._step = ""
        self._lock = threading.Lock()

    # -- Lines
    def say(self, fate: str, why: str = "", hint: Sequence[str] = ()) -> None:
        self.flush()
        self.screen.say(self.label, "", fate, why, hint)

    def begins(self, book: Book, where: str) -> None:
        """Say which steps are done already, or that this is the beginning."""
        begun = book.begun
        parts = list(book.parts.values())
        if begun is None or not parts:
            self.screen.say(self.label, "", render.STARTED, where)
            return
        steps = {step: [part for part in parts if part.step == step] for step in book.steps}
        done = sum(all(part.done or part.skipped for part in of) for of in steps.values() if of)
        running = sum(any(part.running for part in of) for of in steps.values())
        bad = len(steps) - done - running
        counts = [
            f"{count} {word}"
            for count, word in ((done, "done"), (running, "running"), (bad, "not done"))
            if count
        ]
        self.screen.note(
            self.label,
            "",
            f"begun {begun_moment(begun.at)} by {begun.by}: "
            + (", ".join(counts) or "nothing done yet"),
        )

    def already_done(self, done: JournalEvent) -> None:
        self.screen.say(
            self.label,
            "",
            f"ALREADY DONE at {begun_moment(done.at)} by {done.by}",
            "",
            ["nothing was started; a new key starts it anew"],
        )

    # -- Rows
    def done_before(self, number: int, step: str, times: Sequence[str]) -> None:
        """Keep a step that was done in an earlier pass, for one row with its neighbours."""
        self._before.append((number, step))
        self._span += [each for each in times if each]

    def flush(self) -> None:
        """Write the row of the steps that were done before."""
        if not self._before:
            return
        number = self._before[-1][0]
        steps = list(dict.fromkeys(step for _, step in self._before))
        names = ", ".join(steps)
        if len(names) > _NAMES_WIDTH and len(steps) > 2:
            names = f"{steps[0]} .. {steps[-1]} ({len(steps)} steps)"
        first, last = (
            (begun_moment(min(self._span)), begun_moment(max(self._span)))
            if self._span
            else ("", "")
        )
        span = f"  ({first} to {last})" if first != last else f"  ({first})" if first else ""
        self._before, self._span = [], []
        self.screen.row(f"{number:>4}  {names}    done before{span}")

    def rows(self, number: int, step: str, rows: Sequence[HostRow]) -> None:
        """Write the rows of a step. Hosts with the same outcome share a row."""
        self.flush()
        alike: dict[str, list[HostRow]] = {}
        for row in rows:
            alike.setdefault(row.word, []).append(row)
        for word, group in alike.items():
            took = max((row.took_s for row in group if row.took_s is not None), default=None)
            shown = [
                f"{number:>4}  {step:<{_STEP_WIDTH}}",
                f"{fold(row.host for row in group):<{_HOST_WIDTH}}",
                f"{word:<{_WORD_WIDTH}}",
                f"{duration(took) if took is not None else '-':<{_TOOK_WIDTH}}",
                ids.short(group[0].prog_id) if len(group) == 1 and group[0].prog_id else "",
            ]
            self.screen.row("  ".join(shown).rstrip())

    # -- The live line
    def live(self, number: int, step: str, total: int) -> None:
        with self._lock:
            self._step, self._running, self._down = f"{number} {step}", {}, set()
        self.screen.live(lambda width: self._words(width, total))

    def begun(self, host: str, state: State) -> None:
        with self._lock:
            self._running[host] = time.monotonic() - (state.elapsed or 0.0)

    def over(self, host: str) -> None:
        with self._lock:
            self._running.pop(host, None)
            self._down.discard(host)

    def link(self, host: str, *, up: bool, for_s: float = 0.0) -> None:
        """Say that a link is lost or back; the program isn't affected."""
        with self._lock:
            known = host in self._down
            (self._down.discard if up else self._down.add)(host)
        if up:
            self.screen.note("", host, f"link back after {duration(for_s)}, nothing missed")
        elif not known:
            self.screen.note("", host, "link lost, program unaffected as far as known; trying on")

    def live_no_more(self) -> None:
        self.screen.live(None)

    def _words(self, width: int, total: int) -> str:
        with self._lock:
            hosts, down = list(self._running), sorted(self._down)
            longest = time.monotonic() - min(self._running.values(), default=time.monotonic())
        where = fold(hosts[:8]) + (" .." if len(hosts) > 8 else "")
        many = f" ({len(hosts)} of {total})" if total > 1 else ""
        if not hosts:
            return render.cut(f"{self._step}  connecting", width)
        lost = f"  LINK LOST to {fold(down)}" if down else ""
        return render.cut(
            f"{self._step}  {where}{many}  running  {render.running_time(longest)}{lost}"
            "   Ctrl-C: leave it running",
            width,
        )

    # -- The output of programs
    def lines(self, host: str, *, alone: bool) -> ProgressLines:
        return ProgressLines(self.screen, "" if alone else f"{host}: ")

    def close(self) -> None:
        self.screen.close()


class ProgressLines:
    """Shows the output of one host; of several hosts each line begins with the host's name."""

    def __init__(self, screen: Screen, head: str) -> None:
        self._screen = screen
        self._head = head.encode()
        self._rest: dict[int, bytes] = {OUT: b"", ERR: b""}

    def write(self, stream: str, data: bytes) -> None:
        fd = descriptor_for(stream)
        if not self._head:
            self._screen.output(fd, data)
            return
        *whole, self._rest[fd] = (self._rest[fd] + data).split(b"\n")
        if whole:
            self._screen.output(fd, b"".join(self._head + line + b"\n" for line in whole))

    def end(self) -> None:
        for fd, rest in self._rest.items():
            if rest:
                self._screen.output(fd, self._head + rest + b"\n")


def begun_moment(at: str) -> str:
    """Return `01:02` for today, else with its day."""
    return render.past_moment(at, datetime.now(timezone.utc))


def took(begun: JournalEvent, ended_at: str) -> str:
    """Return the time from the first begin of a runbook to its end."""
    first, last = local_time(begun.at), local_time(ended_at)
    return duration((last - first).total_seconds()) if first and last else "an unknown time"


def last_line(*texts: str) -> str:
    """Return the last line that isn't blank, of the first text with one."""
    for text in texts:
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        if lines:
            return lines[-1]
    return ""


def repeated(counts: Mapping[str, int]) -> str:
    """Return `7 analyze twice` for the steps that took more than one attempt."""
    words = {2: "twice"}
    return ", ".join(
        f"{step} {words.get(count, f'{count} times')}"
        for step, count in counts.items()
        if count > 1
    )
