"""Shows what many hosts have written as few groups: `--fold`, and with `--diff` what differs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from corra.errors import CorraError

from .flags import FoldFlags

if TYPE_CHECKING:
    from corra.fleets.board import Board, Member
    from corra.fleets.fleet import Fleet
    from corra.fleets.fold import Group
    from corra.runs.run import Run
    from corra.terminal.screen import Screen

# A group has other members to ask, so a host that is gone is given up soon.
_GIVE_UP_S = 15.0


def folds(given: FoldFlags) -> bool:
    return given.fold or given.diff


def show_folded(given: FoldFlags, fleet: Fleet, board: Board, *, asks: bool = True) -> None:
    """Show the groups of a fleet's members, the largest first, each with one member's output.

    `asks`: whether to ask the hosts for the digests that aren't known yet.
    """
    from corra.fleets.fold import complete, grouped
    from corra.runs.digest import Digests, digests_of

    def ask(member: Member, stream: str | None, start: int | None) -> Digests:
        assert member.state is not None
        run = _run_of(fleet, member)
        try:
            return digests_of(run, member.state, stream, start)
        finally:
            run.agent.close()

    if asks:
        complete(board.members, ask)
    largest: tuple[Group, dict[str, bytes]] | None = None
    for group in grouped(board.members):
        shown = _Shown(given.screen, given.hide, group)
        shown.title()
        if not group.has_output:
            continue
        if given.diff and largest is not None and not given.json:
            _show_difference(given, fleet, group, largest)
            continue
        _fetch(fleet, group, shown)
        shown.ends()
        largest = largest or (group, {name: bytes(data) for name, data in shown.kept.items()})


def _run_of(fleet: Fleet, member: Member) -> Run:
    return fleet.run_of(member.name, member.attempt)


class _Shown:
    """A group on the screen. It keeps the beginning of each stream, for a diff."""

    def __init__(self, screen: Screen, hide: str | None, group: Group) -> None:
        from corra import render
        from corra.terminal.screen import OUT, hidden_descriptors

        self.screen, self._group = screen, group
        self._hidden = hidden_descriptors(hide)
        self._head = f"==> {render.visible(group.title)} <==\n".encode()
        self._titled = {OUT}
        self._line_open: dict[int, bool] = {}
        self.kept: dict[str, bytearray] = {}

    def title(self) -> None:
        from corra.terminal.screen import OUT

        group = self._group
        if not self.screen.json:
            self.screen.output(OUT, self._head)
            return
        digests = {name: each._asdict() for name, each in (group.streams or {}).items()}
        self.screen.event(
            "group",
            hosts=[each.name for each in group.members],
            fold=group.hosts,
            exit=group.word,
            exit_code=group.members[0].code,
            streams=digests or None,
            error=group.error or None,
        )

    def output(self, stream: str, data: bytes, offset: int, member: Member) -> None:
        from corra.fleets.fold import DIFF_BYTES
        from corra.terminal.screen import descriptor_for

        kept = self.kept.setdefault(stream, bytearray())
        kept += data[: max(0, DIFF_BYTES - len(kept))]
        fd = descriptor_for(stream)
        if fd in self._hidden:
            return
        if self.screen.json:
            import base64

            text = base64.b64encode(data).decode()
            facts = {"host": member.name, "prog_id": member.prog_id, "stream": stream}
            self.screen.event("output", **facts, offset=offset, data=text)
            return
        if fd not in self._titled:
            self._titled.add(fd)
            if not (self.screen.out_is_terminal and self.screen.err_is_terminal):
                self.screen.output(fd, self._head)
        self.screen.output(fd, data)
        self._line_open[fd] = not data.endswith(b"\n")

    def ends(self) -> None:
        """End the line that the program has left open."""
        for fd, is_open in self._line_open.items():
            if is_open:
                self.screen.output(fd, b"\n")


def _fetch(fleet: Fleet, group: Group, shown: _Shown) -> None:
    """Show the output of the first member that has it. Says so where none can be reached."""
    from corra.model.frames import Output
    from corra.runs.patience import Patience

    failure: CorraError | None = None
    for member in group.members:
        run = _run_of(fleet, member)
        some = False
        try:
            for event in run.follow(live=False, patience=Patience(reconnect_timeout_s=_GIVE_UP_S)):
                if isinstance(event, Output):
                    some = True
                    shown.output(event.stream, event.data, event.offset, member)
            return
        except CorraError as error:
            failure = failure or error
            if some:
                break  # from another member it would be shown twice
        finally:
            run.agent.close()
    if failure is not None:
        shown.ends()
        shown.screen.error(failure)


def _show_difference(
    given: FoldFlags, fleet: Fleet, group: Group, largest: tuple[Group, dict[str, bytes]]
) -> None:
    from corra import render
    from corra.fleets.fold import DIFF_BYTES, differences
    from corra.model.units import decimal_size

    if group.streams == largest[0].streams:
        given.screen.lines(["(the same output)"])
        return
    other: dict[str, bytes] = {}
    failure: Any = None
    for member in group.members:
        run = _run_of(fleet, member)
        try:
            other = {
                name: run.read(name, each.start, min(each.end, each.start + DIFF_BYTES))
                for name, each in (group.streams or {}).items()
            }
            break
        except CorraError as error:
            failure = failure or error
        finally:
            run.agent.close()
    else:
        given.screen.error(failure)
        return
    against, kept = largest
    lines = list(differences(kept, other, (against.hosts, group.hosts)))
    sizes = [each.length for found in (group, against) for each in (found.streams or {}).values()]
    if max(sizes, default=0) > DIFF_BYTES:
        more = "compared" if lines else "alike"
        lines.append(f"({more} are the first {decimal_size(DIFF_BYTES)} of each stream)")
    given.screen.lines([render.visible(line) for line in lines])
