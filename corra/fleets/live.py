"""What a terminal shows of a fleet while it rolls: one bar over all, and the hosts to look at.

`frame` makes lines of facts, for any size of terminal. The Screen draws them below the output,
twice a second. First come the hosts that failed, then those that have been silent longest, then the
newest. Nothing here costs more with more hosts than one look at each.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from corra import render
from corra.model.rollout import What

from .board import BAD, KINDS, Board, Member

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

# Rows that are left for the output and for the prompt behind it.
ROWS_LEFT = 6
# A host that says nothing for so long is shown before those that say something.
SILENT_S = 5.0
# Of the rows, failures leave so many to the hosts that run.
_RUNNING_ROWS = 3
_NAME_MAX = 24
_NARROW = 60
_STYLES = {
    What.WELL: "green",
    What.FAILED: "red",
    What.LOST: "red",
    What.MAYBE: "magenta",
    What.UNREACHED: "magenta",
    What.STARTED: "yellow",
    What.BEGUN: "cyan",
}
# The bar's characters tell the states apart without colours, too.
_CELLS = (
    *((What.WELL, "="), (What.FAILED, "!"), (What.LOST, "?"), (What.MAYBE, "?")),
    *((What.UNREACHED, "x"), (What.STARTED, ">"), (What.BEGUN, "-"), (None, ".")),
)
_WORDS = {**KINDS, None: "to come"}


class Row(NamedTuple):
    """A host's row: its name, its state, for how long, and what there is to say of it."""

    name: str
    word: str
    style: str
    time_s: float | None
    said: str


def frame(board: Board, width: int, height: int, *, colour: bool) -> list[str]:
    """Return the lines to draw, none wider than `width`, with escape sequences if `colour`."""
    console = _console(width, colour=colour)
    rows = max(1, height - ROWS_LEFT - 2)
    for line in (_bar(board, width), _counts(board, width), *_rows(board, rows, width)):
        console.print(line, no_wrap=True, overflow="crop", crop=True)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().split("\n")[:-1]


def _console(width: int, *, colour: bool) -> Console:
    from rich.console import Console

    return Console(
        file=io.StringIO(),
        width=width,
        force_terminal=colour,
        color_system="standard" if colour else None,
        no_color=not colour,
        highlight=False,
        markup=False,
        emoji=False,
        legacy_windows=False,
        _environ={},
    )


# The bar


def _tally(board: Board) -> dict[What | None, int]:
    found: dict[What | None, int] = dict.fromkeys(_WORDS, 0)
    for member in board.members:
        found[member.what] += 1
    return found


def _bar(board: Board, width: int) -> Text:
    from rich.text import Text

    total = len(board.members)
    over = sum(member.over for member in board.members)
    waves = len(board.plan.waves)
    took = render.running_time(board.clock() - board.begun_at)
    head = render.cut(render.visible(board.plan.label), max(8, width // 3))
    tail = f" {over}/{total}  {took}"
    if waves > 1 and width >= _NARROW:
        tail += f"  wave {board.wave + 1}/{waves}"
    if width >= _NARROW:
        tail += "   Ctrl-C: detach"
    cells = width - len(head) - len(tail) - 4
    line = Text(f"{head} ", style="bold")
    if cells >= 5:
        line = Text.assemble(line, "[", *_cells(_tally(board), total, cells), "]")
    return Text.assemble(line, tail)


def _cells(counts: dict[What | None, int], total: int, width: int) -> Iterator[tuple[str, str]]:
    """Yield (characters, style) of a bar. A state that any host is in has one cell at least."""
    wanted = [(_style(what), char, counts[what]) for what, char in _CELLS if counts[what]]
    sizes = [max(1, count * width // total) for _, _, count in wanted]
    if sizes:
        # The largest takes what is more or less by rounding.
        sizes[sizes.index(max(sizes))] += width - sum(sizes)
    for (style, char, _), size in zip(wanted, sizes, strict=True):
        yield char * size, style


def _style(what: What | None) -> str:
    return _STYLES[what] if what is not None else "dim"


def _counts(board: Board, width: int) -> Text:
    """Return how many hosts are in each state. What doesn't fit is the least important."""
    from rich.text import Text

    counts = _tally(board)
    shown = [what for what in _WORDS if counts[what]]
    if width < _NARROW:
        shown.sort(key=lambda what: what not in BAD)
    parts: list[tuple[str, str] | str] = [" "]
    for what in shown:
        text = f"{counts[what]} {_WORDS[what]}"
        parts += [*(["  "] if len(parts) > 1 else []), (text, _style(what))]
        if sum(len(each) if isinstance(each, str) else len(each[0]) for each in parts) > width:
            return Text.assemble(*parts[:-2])
    return Text.assemble(*parts)


# The rows


def _rows(board: Board, most: int, width: int) -> Iterator[Text]:
    from rich.text import Text

    chosen, left_out = chosen_rows(board, most)
    longest = max((len(each.name) for each in board.members), default=1)
    name_width = min(longest, _NAME_MAX, max(6, width // 3))
    word_width = 13 if width >= _NARROW else 9
    for row in chosen:
        name = render.cut(render.visible(row.name), name_width)
        time = "" if row.time_s is None else render.running_time(row.time_s)
        head = (
            f" {name:<{name_width}} ",
            f"{render.cut(row.word, word_width):<{word_width}}",
            f"{time:>7}  " if width >= _NARROW else " ",
        )
        said = render.visible(row.said[: 4 * width])
        room = max(0, width - sum(map(len, head)))
        yield Text.assemble(head[0], (head[1], row.style), head[2], render.cut(said, room))
    if left_out:
        yield Text(f" and {left_out}", style="dim")


def chosen_rows(board: Board, most: int) -> tuple[list[Row], str]:
    """Return the rows for the hosts to look at, and words for the failures that have no room."""
    now = board.clock()
    bad = [each for each in board.members if each.what in BAD]
    bad.sort(key=lambda each: -each.over_at)
    going = [each for each in board.members if each.what in (What.BEGUN, What.STARTED)]
    going.sort(key=lambda each: _urgency(each, now))
    room = most
    if len(bad) > most - min(_RUNNING_ROWS, len(going)):
        room = max(1, most - min(_RUNNING_ROWS, len(going), most // 2) - 1)  # a line says how many
    shown = bad[:room]
    left = len(bad) - len(shown) if most > 1 else 0
    rows = [_row(each, now) for each in shown]
    rows += [_row(each, now) for each in going[: max(0, most - len(shown) - bool(left))]]
    return rows, f"{left} more that went wrong" if left else ""


def _quiet_since(member: Member) -> float:
    return max(member.begun_at, member.started_at, member.output_at)


def _urgency(member: Member, now: float) -> tuple[bool, float]:
    """Sort the silent ones before the others, the longest silent first; then the newest."""
    silent = now - _quiet_since(member)
    return (False, -silent) if silent >= SILENT_S else (True, -(member.started_at or now))


def _row(member: Member, now: float) -> Row:
    style = _STYLES[member.what] if member.what is not None else ""
    if member.over:
        begun = member.started_at or member.begun_at
        took = member.over_at - begun if begun and member.over_at >= begun else None
        if member.state is not None and member.state.elapsed is not None:
            took = member.state.elapsed
        return Row(member.name, member.word, style, took, member.said)
    since = member.started_at or member.begun_at
    said = member.said
    if member.down_since:
        why = f": {member.waits[1]}" if member.waits[1] else ""
        said = f"LINK LOST for {render.running_time(now - member.down_since)}{why}"
        style = "magenta"
    elif member.trouble:
        said, style = member.trouble, "magenta"
    elif (silent := now - _quiet_since(member)) >= SILENT_S and member.what is What.STARTED:
        said = f"(silent for {render.running_time(silent)})  {said}".rstrip()
    return Row(member.name, member.word, style, now - since if since else None, said)
