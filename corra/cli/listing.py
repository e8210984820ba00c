"""The runs that `ps` lists: those of several hosts, page by page, each run once.

The hosts filter, so that no more travels than is shown. A list on a terminal is folded: nobody
reads ten thousand lines there. Into a pipe all of them go, a page of each host in memory.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from invoke.context import Context

from corra import render
from corra.errors import CorraError
from corra.model.state import State
from corra.remote.agent_client import Agent
from corra.remote.targets import agent_to_ask
from corra.runs.asking import who_asks
from corra.runs.finding import PAGES_MAX, RunsPage, list_page, look_patience_s, on_host

from . import collectors, selection
from .at_once import at_once
from .flags import PsFlags

# So many ended runs are shown on a terminal; open runs are always shown.
ON_SCREEN = 100
# What `ps` shows when nothing else is said: what is open, and what went wrong.
OPEN_WORDS = ("starting", "running")
_SHOWN_WORDS = [*OPEN_WORDS, "failed", "killed", "timeout", "not started", "lost"]


class _Asked(NamedTuple):
    """A host that has answered: its agent, how it was asked, and the page that it gave."""

    agent: Agent
    how: Mapping[str, Any]
    wanted: Mapping[str, Any]
    page: RunsPage

    def next_page(self) -> _Asked:
        page = list_page(self.agent, self.wanted, before=self.page.next, **self.how)
        return self._replace(page=page)


class HostsRuns:
    """What the hosts have answered. Iterate `chunks` first; the rest counts what was left out."""

    def __init__(self, c: Context, given: PsFlags, *, folded: bool) -> None:
        self._given, self._folded = given, folded
        self._wanted = _request(given)
        self._seen: set[tuple[str, str | None, str | None]] = set()
        known = selection.places(c, given, "ps", max(selection.since(given) or 0.0, 7 * 86400.0))
        found = at_once(given.screen, self._first, known, named=lambda place: place[0])
        self._asked = [each for each in found if isinstance(each, _Asked)]
        errors = [
            selection.last_seen(each, how.get("as_user"), how.get("spool"))
            for (_, how), each in zip(known, found, strict=True)
            if isinstance(each, CorraError)
        ]
        damaged = [error for each in self._asked for error in each.page.damaged]
        up = {str(each.agent.host) for each in self._asked}
        self.errors = selection.one_line_each([*errors, *damaged], up)
        # How many of those that were asked for don't fit on the terminal.
        self.more = 0

    def chunks(self) -> Iterator[list[State]]:
        """Yield the States in the table's order, page by page. Raises CorraError."""
        first = selection.one_row_each(
            [
                on_host(state, each.agent)
                for each in self._asked
                for state in [*self._open_beyond(each), *each.page.states]
            ]
        )
        states = self._new(render.order(first))
        if self._folded:
            running = sum(not state.ended for state in states)
            shown = states[: max(ON_SCREEN, running)]
            self.more = len(states) - len(shown)
            for each in self._asked:
                on_pages = sum(not state.ended for state in self._open_beyond(each))
                self.more += max(0, each.page.more - on_pages)
            yield shown
            return
        yield states
        for asked in self._asked:
            for _ in range(PAGES_MAX):
                if not asked.page.next:
                    break
                asked = asked.next_page()  # noqa: PLW2901 - it is the same host
                yield self._new([on_host(state, asked.agent) for state in asked.page.states])

    def left_out(self) -> tuple[int, int]:
        """Return how many more ended well lately, and how many ended before that."""
        each_once = {each.page.place: each for each in self._asked}.values()
        lately = sum(sum(each.page.counts.values()) for each in each_once)
        if self._given.state or self._given.all:
            well = 0
        else:
            well = sum(each.page.counts.get("done", 0) for each in each_once)
        if well or "since" not in self._wanted:
            return well, 0
        if not {"match", "mine"} & set(self._wanted) and not self._given.state:
            return 0, sum(each.page.total for each in each_once) - lately
        ever = {name: value for name, value in self._wanted.items() if name != "since"}
        matching = sum(len(each.page.states) + each.page.more for each in each_once)
        counted = at_once(
            self._given.screen,
            lambda each: list_page(each.agent, ever, limit=0, **each.how).more,
            list(each_once),
            named=lambda each: str(each.agent.host),
        )
        return 0, sum(counted) - matching

    def _first(self, place: tuple[str, dict[str, Any]]) -> _Asked | CorraError:
        host, how = place
        reach = {name: value for name, value in how.items() if name != "spool"}
        asked = {"spool": how.get("spool"), "via": how.get("via")}
        try:
            agent = agent_to_ask(host, **reach)
            limit = ON_SCREEN if self._folded else None
            once_s = look_patience_s(reach)
            page = list_page(agent, self._wanted, limit=limit, once_s=once_s, **asked)
            return _Asked(agent, asked, self._wanted, page)
        except CorraError as error:
            return error

    def _open_beyond(self, asked: _Asked) -> list[State]:
        """Return the open runs that come on later pages: an open run may be older than a page."""
        words = self._wanted.get("states") or OPEN_WORDS
        wanted = {**self._wanted, "states": [word for word in OPEN_WORDS if word in words]}
        if not asked.page.more or not wanted["states"]:
            return []
        there = {state.prog_id for state in asked.page.states}
        found: list[State] = []
        before: str | None = asked.page.next
        for _ in range(PAGES_MAX):
            if not before:
                break
            page = list_page(asked.agent, wanted, before=before, **asked.how)
            found += [state for state in page.states if state.prog_id not in there]
            before = page.next
        return found

    def _new(self, states: Sequence[State]) -> list[State]:
        """Return those that weren't yielded before."""
        found = []
        for state in states:
            key = (state.prog_id, state.boot_id, state.spool)
            if key not in self._seen:
                self._seen.add(key)
                found.append(state)
        return found


def _request(given: PsFlags) -> dict[str, Any]:
    """Return what the hosts are asked for."""
    wanted: dict[str, Any] = {}
    span_s = selection.since(given)
    if span_s is not None:
        wanted["since"] = int((time.time() - span_s) * 1e6)
    if given.grep:
        wanted["match"] = given.grep
    if given.mine:
        wanted["mine"] = {"user": who_asks()["user"]}
    if given.state:
        wanted["states"] = [given.state]
    elif not given.all:
        wanted["states"] = _SHOWN_WORDS
    return wanted


class CollectorsRuns:
    """The runs that a collector has, in one chunk."""

    def __init__(self, c: Context, given: PsFlags) -> None:
        self._given = given
        states = render.order(collectors.collected_states(c, given, given.collector or ""))
        self._listed = [state for state in states if selection.is_listed(state, given)]
        self.errors: list[CorraError] = []
        self.more = 0

    def chunks(self) -> Iterator[list[State]]:
        yield [state for state in self._listed if selection.is_shown(state, self._given)]

    def left_out(self) -> tuple[int, int]:
        """Return how many more ended well lately, and how many ended before that."""
        left = [state for state in self._listed if not selection.is_shown(state, self._given)]
        since_s = selection.since(self._given)
        well = sum(
            render.went_well(state) and selection.ended_lately(state, since_s) for state in left
        )
        return well, len(left) - well
