"""A program edits its own lines on a terminal as over plain ssh, and nothing beyond them."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pyte
import pytest
from hypothesis import example, given, settings, strategies as st

from corra.terminal.own_lines import OwnLines
from corra.terminal.sanitiser import Sanitiser
from properties import PROPERTY
from proxy import wait_for
from terminal import Terminal

COLUMNS, LINES = 20, 50
CSI = re.compile(r"\x1b\[(\d*)([A-GJKPX@])")

words = st.text("abcxyz %#=->", min_size=1, max_size=45)
sequences = st.builds(
    lambda number, final: f"\x1b[{number}{final}",
    st.sampled_from(["", "1", "2", "3", "7"]),
    st.sampled_from("ABCDEFGPX@"),
)
erasures = st.sampled_from(["\x1b[K", "\x1b[0K", "\x1b[1K", "\x1b[2K", "\x1b[J", "\x1b[0J"])
controls = st.sampled_from(["\r", "\b", "\t", "\n", "\r\n", "\r\x1b[K", "\x1b[31m", "\x1b[m"])
pieces = st.lists(words | sequences | erasures | controls, max_size=30)


def look(text: str, columns: int = COLUMNS, lines: int = LINES) -> list[str]:
    """Return what a terminal shows of text that passed its line discipline."""
    screen = pyte.Screen(columns, lines)
    pyte.Stream(screen).feed(re.sub(r"\r?\n", "\r\n", text))
    return [line.rstrip() for line in screen.display]


def sanitised(data: bytes, cuts: Sequence[int] = (), lines: OwnLines | None = None) -> str:
    sanitiser = Sanitiser(lines or OwnLines(COLUMNS, LINES))
    places = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    parts = [sanitiser.feed(data[a:b]) for a, b in itertools.pairwise(places)]
    return "".join([*parts, sanitiser.feed(b"", final=True)])


def within(given: Sequence[str]) -> str:
    """Return the pieces but for those that leave the program's lines, and those behind a full row,
    about which terminals disagree.
    """
    lines, kept = OwnLines(COLUMNS, LINES), []
    for piece in given:
        match = CSI.fullmatch(piece)
        if match and lines.column >= COLUMNS:
            continue
        if match and match.group(2) in "BE" and int(match.group(1) or 1) > lines.below:
            continue
        if lines.rows > LINES - 8:
            break
        Sanitiser(lines).feed(piece.encode())
        kept.append(piece)
    return "".join(kept)


@PROPERTY
@given(pieces, st.lists(st.integers(0, 400)))
def test_edits_of_its_own_lines_look_as_over_plain_ssh_at_each_chunking(
    given: list[str], cuts: list[int]
) -> None:
    text = within(given)
    assert look(sanitised(text.encode(), cuts)) == look(text)


@PROPERTY
@example(["\n", "\x1b[A", "=" * 9, "=" * 12])  # a row that wraps into the last one
@given(pieces)
def test_the_cursor_is_where_it_is_counted(given: list[str]) -> None:
    lines = OwnLines(COLUMNS, LINES)
    shown = sanitised("".join(given)[:800].encode(), lines=lines)
    screen = pyte.Screen(COLUMNS, LINES + 200)
    pyte.Stream(screen).feed(re.sub(r"\r?\n", "\r\n", shown))
    assert (screen.cursor.y, min(screen.cursor.x, COLUMNS)) == (lines.row, lines.column)
    last = screen.display[lines.rows - 1]
    assert lines.used or not last.strip()


@settings(parent=PROPERTY)
@given(pieces, st.integers(0, 20))
def test_what_corra_has_written_above_stays_as_it_is(given: list[str], above: int) -> None:
    ours = [f"corra: line {n}" for n in range(above)]
    shown = sanitised("".join(given).encode(), lines=OwnLines(COLUMNS, 24))
    screen = pyte.HistoryScreen(COLUMNS, 24, history=4000, ratio=0.5)
    pyte.Stream(screen).feed("".join(f"{line}\r\n" for line in ours))
    pyte.Stream(screen).feed(re.sub(r"\r?\n", "\r\n", shown))
    whole = [
        "".join(line[x].data for x in range(COLUMNS)).rstrip() for line in screen.history.top
    ] + [line.rstrip() for line in screen.display]
    assert whole[:above] == ours


@pytest.mark.parametrize(
    "data",
    [
        b"\x1b[2J", b"\x1b[1J", b"\x1b[3J", b"\x1b[H", b"\x1b[5;5H", b"\x1b[1;9r", b"\x1b7",
        b"\x1b8", b"\x1bc", b"\x1b]0;title\x07", b"\x1b[6n", b"\x1b[c", b"\x1b[20L", b"\x1b[3M",
        b"\x1b[5S",
        b"\x1b[?6n", b"\x9b2J", b"\x0b", b"\x0c", b"\x1b(0",
    ],
)  # fmt: skip
def test_all_else_is_shown_instead_of_done(data: bytes) -> None:
    shown = sanitised(data)
    assert "\x1b" not in shown and shown.isprintable() and shown


@pytest.mark.parametrize("data", [b"\x1b[?25l", b"\x1b[?25h", b"\x1b[?2004h", b"\x1b[?1049h"])
def test_a_mode_of_the_screen_has_no_look(data: bytes) -> None:
    assert sanitised(b"a" + data + b"b") == "ab"


RECORDED = sorted((Path(__file__).parent / "recorded").iterdir())
# What `docker pull` writes, by its source: a row for each layer, changed in place.
DOCKER = b"".join(
    b"\x1b[%dA\x1b[2K\r%c: Downloading %d%%\x1b[%dB\r" % (3 - at, b"abc"[at], n, 3 - at)
    for n in range(0, 101, 20)
    for at in range(3)
)


@pytest.mark.parametrize("size", [1, 3, 7, 100, 100_000])
@pytest.mark.parametrize(
    "file", [*RECORDED, None], ids=lambda file: file.name if file else "docker"
)
def test_real_progress_looks_as_over_plain_ssh_at_each_chunking(
    file: Path | None, size: int
) -> None:
    """Recorded on 80 columns: curl, wget, rsync, git, tqdm and rich, which is pip's."""
    data = file.read_bytes() if file else b"a: Waiting\nb: Waiting\nc: Waiting\n" + DOCKER
    shown = sanitised(data, range(0, len(data), size), OwnLines(80, 24))
    seen = look(data.decode(), 80, 24)
    assert look(shown, 80, 24) == seen and any(seen)


# -- With corra's own line below


def display(terminal: Terminal) -> list[str]:
    terminal.read(0.05)
    screen = pyte.Screen(80, 24)
    pyte.ByteStream(screen).feed(terminal.seen)
    return [line.rstrip() for line in screen.display if line.strip()]


def shows(terminal: Terminal, *patterns: str) -> bool:
    """Return whether the lines on the screen are these, and the status line below them."""
    seen = display(terminal)
    return len(seen) == len(patterns) and all(map(re.fullmatch, patterns, seen))


STATUS = r"\w{6} local +running.*Ctrl-C: detach"


def test_the_status_line_stays_below_a_progress_bar(
    terminal: Callable[..., Terminal], home: Path
) -> None:
    script = f"""
        for n in 20 40 100; do
            printf '\\r%3d%% ###' $n
            until [ -e {home}/$n ]; do sleep 0.02; done
        done
        printf '\\nmore\\n'
    """
    shown = terminal("run", "--host", "local", "--", "sh", "-c", script)
    for n in (20, 40, 100):
        wait_for(lambda n=n: shows(shown, f" *{n}% ###", STATUS), what=f"{n} %: {display(shown)}")
        (home / str(n)).touch()
    end = ("100% ###", "more", r"corra: \w{6} on local: done: exit 0 .*")
    wait_for(lambda: shows(shown, *end), what=f"the end: {display(shown)}")


def test_several_bars_are_redrawn_above_the_status_line(
    terminal: Callable[..., Terminal], home: Path
) -> None:
    script = f"""
        printf 'a 0%%\\nb 0%%\\n'
        for n in 50 100; do
            until [ -e {home}/$n ]; do sleep 0.02; done
            printf '\\033[2A\\r\\033[Ka %d%%\\r\\033[2B' $n
        done
        until [ -e {home}/top ]; do sleep 0.02; done
        printf '\\033[9A\\r\\033[Ktop'
    """
    shown = terminal("run", "--host", "local", "--", "sh", "-c", script)
    wait_for(lambda: shows(shown, "a 0%", "b 0%", STATUS), what="the beginning")
    for n in (50, 100):
        (home / str(n)).touch()
        wait_for(lambda n=n: shows(shown, f"a {n}%", "b 0%", STATUS), what=f"{n}: {display(shown)}")
    (home / "top").touch()
    end = ("top", "b 0%", r"corra: \w{6} on local: done: exit 0 .*")
    wait_for(lambda: shows(shown, *end), what=f"the end: {display(shown)}")
