"""The view of a fleet on a terminal: whatever its size, the hosts to look at come first."""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st
from rich.cells import cell_len

from corra.fleets.board import Board
from corra.fleets.live import ROWS_LEFT, SILENT_S, chosen_rows, frame
from corra.fleets.plan import new_plan
from corra.fleets.roll import Rolled, Way
from corra.fleets.summary import summary_of
from corra.model.rollout import Fact, What
from corra.model.state import State
from corra.render import HELD_BACK
from proxy import wait_for
from tmux import PROMPT, Tmux

Many = Callable[[int], str]
ESCAPE = re.compile(r"\x1b\[[0-9;]*m")
ENDS = [What.WELL, What.FAILED, What.LOST, What.MAYBE, What.UNREACHED]


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def board_of(count: int, *batch: int) -> tuple[Board, Clock]:
    clock = Clock()
    plan = new_plan([f"web{n}" for n in range(1, count + 1)], id="f", program="p", batch=batch)
    return Board(plan, clock), clock


def take(board: Board, at: int, what: What, *, code: int = 0, said: str = "") -> None:
    member = board.members[at]
    for step in (What.BEGUN, What.STARTED) if what in (What.WELL, What.FAILED) else (What.BEGUN,):
        board.take(Fact(step, at, 1.0))
    if said:
        board.wrote(member, "stderr", said.encode())
    board.take(Fact(what, at, 1.0))
    if what in (What.WELL, What.FAILED):
        member.state = State(member.prog_id, "exited", return_code=code, status=code << 8)


def names(board: Board, most: int) -> list[str]:
    return [row.name for row in chosen_rows(board, most)[0]]


def test_failures_come_first_then_the_longest_silent_then_the_newest() -> None:
    board, clock = board_of(8)
    for at in (0, 1, 2, 3, 4):
        take(board, at, What.STARTED)
        clock.now += 1
    clock.now += SILENT_S
    board.wrote(board.members[0], "stdout", b"i am not silent\n")
    take(board, 5, What.FAILED, code=2)
    clock.now += 1
    take(board, 6, What.UNREACHED)
    take(board, 7, What.STARTED)
    assert names(board, 20) == ["web7", "web6", "web2", "web3", "web4", "web5", "web8", "web1"]


def test_failures_leave_room_for_what_runs_and_those_without_room_are_counted() -> None:
    board, clock = board_of(40)
    for at in range(30):
        clock.now += 1
        take(board, at, What.FAILED, code=1)
    for at in range(30, 40):
        take(board, at, What.STARTED)
    rows, left_out = chosen_rows(board, 10)
    assert [row.name for row in rows][:6] == [f"web{n}" for n in (30, 29, 28, 27, 26, 25)]
    assert [row.word for row in rows][6:] == ["running"] * 3
    assert left_out == "24 more that went wrong"


def test_a_host_whose_link_is_down_says_so() -> None:
    board, clock = board_of(1)
    take(board, 0, What.STARTED)
    board.members[0].down_since = clock.now
    clock.now += 33
    assert chosen_rows(board, 5)[0][0].said == "LINK LOST for 0:33"
    board.members[0].down_why = ("silent for 15 s", "connection refused by 10.0.0.1")
    said = "LINK LOST for 0:33: connection refused by 10.0.0.1"
    assert chosen_rows(board, 5)[0][0].said == said
    summary = summary_of(board, Rolled(Way.LEFT, signal=2))
    assert summary.rows == ["  LINK LOST: web1  connection refused by 10.0.0.1"]


def test_a_host_that_is_held_back_says_so() -> None:
    board, _ = board_of(2)
    take(board, 0, What.STARTED)
    take(board, 1, What.STARTED)
    board.members[1].trouble = HELD_BACK
    rows = chosen_rows(board, 5)[0]
    assert {row.name: row.said for row in rows} == {"web1": "", "web2": HELD_BACK}
    summary = summary_of(board, Rolled(Way.LEFT, signal=2))
    assert summary.rows == ["  HELD BACK: web2  no room on the disk there"]


_STEPS = st.lists(
    st.tuples(st.integers(0, 59), st.sampled_from([What.STARTED, *ENDS])), max_size=80
)


@settings(deadline=None)  # a first frame imports rich
@given(_STEPS, st.integers(10, 200), st.integers(3, 70), st.booleans())
def test_a_frame_fits_any_terminal(steps, width, height, colour) -> None:
    board, clock = board_of(60, 7)
    for at, what in steps:
        clock.now += 0.7
        take(board, at, what, code=1, said="Fehler: größer als \x1b[2J 世界 " * 9)
    lines = frame(board, width, height, colour=colour)
    bare = [ESCAPE.sub("", line) for line in lines]
    assert len(lines) <= max(3, height - ROWS_LEFT)
    assert all(cell_len(line) <= width for line in bare), bare
    assert not any("\x1b" in line for line in bare)
    assert colour or lines == bare


def test_states_are_told_apart_without_colours() -> None:
    board, _ = board_of(10)
    for at, what in enumerate([What.WELL] * 4 + [What.FAILED, What.UNREACHED, What.STARTED]):
        take(board, at, what, code=int(what is What.FAILED))
    first, second, *_ = frame(board, 80, 24, colour=False)
    assert re.search(r"\[=+!+x+>+\.+\]", first)
    assert second.strip() == "4 done  1 failed  1 unreached  1 running  3 to come"


# -- On a real terminal


@pytest.fixture
def pane(home: Path, web_hosts: Many) -> Iterator[Callable[..., Tmux]]:
    """Return a function that runs a fleet of four hosts in a terminal of a size."""
    if shutil.which("tmux") is None:
        pytest.skip("no tmux on this machine")
    opened: list[Tmux] = []

    def start(script: str, *flags: str, rows: int = 24, columns: int = 80, **env: str) -> Tmux:
        tmux = Tmux(home, rows=rows, columns=columns, env=env)
        opened.append(tmux)
        words = ["run", "--host", web_hosts(4), "--name", "roll", *flags, "--", "sh", "-c", script]
        tmux.command(f"{shlex.quote(sys.executable)} -m corra {shlex.join(words)}")
        return tmux

    yield start
    for each in opened:
        each.__exit__(None, None, None)


SCRIPT = (
    "mkdir $HOME/first 2>/dev/null && { echo no room left on the device >&2; exit 3; };"
    " echo begun; until [ -e $HOME/go ]; do sleep 0.05; done; echo over"
)


@pytest.mark.parametrize(("rows", "columns"), [(24, 80), (40, 120), (24, 40)])
def test_the_view_stands_below_the_output_and_is_gone_at_the_end(
    pane: Callable[..., Tmux], home: Path, rows: int, columns: int
) -> None:
    tmux = pane(SCRIPT, rows=rows, columns=columns)
    tmux.expect(r"web\d +FAILED 3 .*no room")
    wait_for(lambda: _shows_the_failure_first(tmux), what=tmux.screen)
    (home / "go").touch()
    tmux.expect(r"roll \(\w+\): FAILED: 1\s+of\s+4\s+failed:\s+web")
    tmux.expect(f"^{re.escape(PROMPT.strip())}")
    screen = tmux.screen.splitlines()
    assert sum("over" in line for line in screen) == 3, screen
    assert not any("running" in line or "1/4" in line for line in screen), screen


def _shows_the_failure_first(tmux: Tmux) -> bool:
    """Return whether the bar, the failed host and the three that run stand one below the other."""
    screen = tmux.screen.splitlines()
    bar = next((at for at, line in enumerate(screen) if "1/4" in line), len(screen))
    rows = screen[bar + 2 : bar + 6]
    going = [line for line in rows[1:] if re.search(r"web\d +running", line)]
    return len(going) == 3 and "FAILED 3" in rows[0]


def test_a_terminal_may_be_resized_meanwhile(pane: Callable[..., Tmux], home: Path) -> None:
    tmux = pane(SCRIPT)
    tmux.expect(r"3 running")
    for rows, columns in ((40, 120), (12, 40), (24, 80), (10, 30), (30, 100)):
        tmux.resize(rows, columns)
        wait_for(partial(_one_bar, tmux, columns))
    (home / "go").touch()
    tmux.expect(f"^{re.escape(PROMPT.strip())}")
    assert _bars(tmux) == 0


def _bars(tmux: Tmux) -> int:
    return sum("1/4" in line for line in tmux.screen.splitlines())


def _one_bar(tmux: Tmux, columns: int) -> bool:
    return _bars(tmux) == 1 and max(map(len, tmux.screen.splitlines())) <= columns


def test_ctrl_c_prints_the_summary_so_far_and_leaves_all_running(
    pane: Callable[..., Tmux], home: Path
) -> None:
    tmux = pane(SCRIPT)
    tmux.expect(r"3 running")
    tmux.type("C-c")
    tmux.expect(r"roll \(\w+\): STILL RUNNING: 3 of 4 hosts running")
    tmux.expect(r"  FAILED 3: web\d  no room left on the device")
    tmux.expect(r"go on: \S+ attach")
    assert _bars(tmux) == 0
    (home / "go").touch()


def test_a_question_between_waves_is_not_drawn_over(pane: Callable[..., Tmux], home: Path) -> None:
    (home / "go").touch()
    (home / "first").mkdir()
    tmux = pane(SCRIPT, "--batch", "2", "--confirm")
    tmux.expect(r"wave 2 of 2, 2 hosts: go on\? \[y/N\]")
    assert _bars(tmux) == 0
    tmux.type("y", "Enter")
    tmux.expect(r"roll \(\w+\): done: 4 hosts")


def test_no_color_has_none(pane: Callable[..., Tmux], home: Path) -> None:
    tmux = pane(SCRIPT, NO_COLOR="1")
    tmux.expect(r"web\d +FAILED 3")
    assert "\x1b[31m" not in tmux.picture[0]
    (home / "go").touch()


def test_a_prompt_without_a_line_end_is_shown_while_its_program_waits(
    pane: Callable[..., Tmux], home: Path
) -> None:
    tmux = pane("printf 'name? '; until [ -e $HOME/go ]; do sleep 0.05; done; echo thanks")
    for number in range(1, 5):
        tmux.expect(rf"web{number}: +name\? …")
    (home / "go").touch()
    tmux.expect(r"roll \(\w+\): done: 4 hosts")
    assert tmux.screen.count(": thanks") == 4
