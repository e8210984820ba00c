"""corra's words for facts, and the text that a terminal may be shown."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from corra import render
from corra.agent import AFTER_GRACE
from corra.errors import NotFound
from corra.model import units
from corra.model.ends import end_error as bad_end, outcome_words
from corra.model.state import State
from corra.terminal.sanitiser import Sanitiser
from corra.terminal.screen import OUT, Gone, Screen
from terminal import Pty

NOW = datetime(2026, 11, 23, 4, 0, tzinfo=timezone.utc)
COLOUR = re.compile(r"\x1b\[[0-9;:]*m")
# What edits the program's own lines (tests/terminal/test_own_lines.py).
EDITS = re.compile(r"\x1b\[[0-9]*(?:;[0-9]*)?[A-GJKPX@]")
ACTIVE = re.compile(r"[\x00-\x07\x0b\x0c\x0e-\x1f\x7f-\x9f]")


def at(**ago: float) -> str:
    return (NOW - timedelta(**ago)).isoformat()


def running(**facts: Any) -> State:
    known: dict[str, Any] = {
        "name": "migrate",
        "host": "db1",
        "user": "ops",
        "argv": ("./migrate", "--all"),
        "start_time": at(hours=2),
        "elapsed": 7200.0,
    }
    return State(prog_id="20261123t014409z-k7m2qxwp", state="running", **{**known, **facts})


def ended(**facts: Any) -> State:
    known: dict[str, Any] = {
        "state": "exited",
        "reason": "exited",
        "return_code": 0,
        "end_time": at(minutes=5),
        "elapsed": 8280.0,
    }
    return replace(running(), **{**known, **facts})


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (4, "4 B"),
        (999, "999 B"),
        (61_000, "61 kB"),
        (812_300, "812 kB"),
        (1_200_000, "1.2 MB"),
        (3_100_000_000, "3.1 GB"),
        (999_999, "1.0 MB"),
    ],
)
def test_a_size_has_two_or_three_figures(count: int, text: str) -> None:
    assert units.decimal_size(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(2, "0:02"), (61, "1:01"), (2467, "0:41:07"), (7265, "2:01:05")]
)
def test_a_clock_that_moves_has_hours_once_they_matter(seconds: float, text: str) -> None:
    assert render.running_time(seconds) == text


def test_a_good_end_says_how_and_after_how_long() -> None:
    assert render.fate(ended(elapsed=0.012)) == ("done", "exit 0 after 0.01 s")


def test_an_end_found_late_says_when_it_was() -> None:
    local = (NOW - timedelta(minutes=5)).astimezone()
    assert render.fate(ended(), now=NOW) == ("done", f"exit 0 at {local:%H:%M} after 2 h 18 min")
    assert render.fate(ended(return_code=2), now=NOW) == (
        "FAILED",
        f"exit 2 after 2 h 18 min, at {local:%H:%M}",
    )


def test_every_time_of_day_is_the_operators_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "UTC-5:30")
    time.tzset()
    try:
        rebooted = State(
            "20261123t014409z-k7m2qxwp",
            "lost",
            "reboot",
            end_time="2026-11-23T03:31:00+00:00",
            last_output_time="2026-11-23T03:30:58+00:00",
        )
        error = bad_end(rebooted, "db1")
        assert error is not None and error.why == "db1 rebooted at 09:01 while it ran"
        assert error.hint[0].startswith("exit status unknown; output to 09:00:58: ")
        assert (
            outcome_words(replace(rebooted, state="exited", reason="exited", return_code=0))
            == "done: exit 0, 09:01"
        )
        # History knows that the run ended, but not how: that is no success.
        assert (
            outcome_words(replace(rebooted, state="exited", reason=None, return_code=None))
            == "ended"
        )
    finally:
        monkeypatch.undo()
        time.tzset()


def test_a_kill_says_who_asked_and_what_ended_it() -> None:
    term = {"signal": "SIGTERM", "by": "ops@laptop"}
    kill = {"signal": "SIGKILL", "by": AFTER_GRACE}
    state = State(
        "20261123t014409z-k7m2qxwp",
        "exited",
        "killed",
        status=9,
        signal="SIGKILL",
        elapsed=1.8,
        signals_sent=(term, kill),
    )

    def why(state: State) -> str:
        error = bad_end(state, "db1")
        assert error is not None
        return error.why

    assert why(state) == "TERM from ops@laptop; ended by KILL after 1.8 s"
    assert (
        why(replace(state, status=15, signal="SIGTERM", signals_sent=(term,)))
        == "TERM from ops@laptop after 1.8 s"
    )
    # No HUP by an operator ended it: the program crashed.
    assert (
        why(replace(state, status=11, signal="SIGSEGV", signals_sent=(term,))) == "SEGV after 1.8 s"
    )


def test_an_open_run_is_still_running() -> None:
    assert render.fate(running()) == ("STILL RUNNING", "for 2 h")


@given(st.text())
def test_visible_text_is_one_line_without_anything_a_terminal_acts_on(text: str) -> None:
    shown = render.visible(text)
    assert shown.isprintable() or not ACTIVE.search(shown)
    assert "\n" not in shown
    assert not re.search("[\u202a-\u202e\u2066-\u2069]", shown)
    shown.encode()


# -- Tables


def test_the_table_keeps_to_the_terminal_and_cuts_the_command() -> None:
    rows = [render.row(running(argv=("./migrate", *["--with-a-long-option"] * 9)), NOW)]
    lines = render.table(rows, 80)
    assert all(len(line) <= 80 for line in lines)
    assert lines[1].endswith("..")
    assert render.table(rows, None)[1].count("--with-a-long-option") == 9


def test_columns_stand_below_each_other_with_wide_characters() -> None:
    rows = [("漢字", "x"), ("ab", "y")]
    lines = render.table(rows, None, head=("A", "B"))
    assert lines == ["A     B", "漢字  x", "ab    y"]


def test_running_comes_first_then_the_newest() -> None:
    old, new, open_ = (
        ended(start_time=at(hours=9)),
        ended(start_time=at(hours=1)),
        running(start_time=at(hours=20)),
    )
    assert render.order([old, new, open_]) == [open_, new, old]


def test_a_row_says_state_age_and_who() -> None:
    row = render.row(
        running(origin={"user": "ops", "host": "laptop"}, last_output_time=at(seconds=4)), NOW
    )
    assert row == (
        "k7m2qx",
        "migrate",
        "db1",
        "running",
        "2 h",
        "4 s ago",
        "ops",
        "./migrate --all",
    )
    assert render.row(ended(return_code=2, end_time=at(hours=5)), NOW)[3:6] == (
        "FAILED 2",
        "5 h ago",
        "-",
    )


def test_a_run_that_never_started_is_as_old_as_its_id() -> None:
    never = replace(
        running(), state="not_started", reason="exec", start_time=None, elapsed=None, end_time=None
    )
    assert render.row(never, NOW)[3:5] == ("NOT STARTED", "2 h ago")


def test_a_run_that_never_started_stands_among_the_others_by_the_time_of_its_id() -> None:
    def made(minutes: int, start_time: str | None = None) -> State:
        prog_id = f"20261123t01{minutes}00z-k7m2qxwp"
        return replace(ended(return_code=1), prog_id=prog_id, start_time=start_time)

    first, last = (made(m, f"2026-11-23T01:{m}:00.5+00:00") for m in (10, 30))
    never = replace(made(20), state="not_started", reason="cwd", end_time=None)
    assert render.order([first, never, last]) == [last, never, first]


def test_ages_of_an_open_run_are_the_hosts_own_whatever_our_clock_says() -> None:
    row = render.row(running(last_output_time=at(seconds=4)), NOW + timedelta(days=3))
    assert row[4:6] == ("2 h", "4 s ago")


def test_no_cell_of_the_table_holds_a_control_character() -> None:
    hostile = running(
        argv=("printf", "\x1b]0;x\x07\n"), name="a\x1b[2J", host="h\r", origin={"user": "o\x9b"}
    )
    assert not any(
        ACTIVE.search(line) or "\n" in line
        for line in [*render.table([render.row(hostile, NOW)]), *render.status(hostile, NOW)]
    )


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"stdin": {"length": 5, "moved": 5, "ended": False}}, "stdin 5 B sent, open"),
        (
            {"stdin": {"length": 3000, "moved": 1000, "ended": True}},
            "stdin 3.0 kB sent, 2.0 kB wait for the program, ended",
        ),
        (
            {"stdin": {"length": 0, "moved": 0, "ended": False}, "pty": True},
            "terminal 0 B sent, open",
        ),
    ],
)
def test_the_status_screen_says_what_was_sent_to_a_stdin_that_is_held_open(
    facts: dict[str, Any], said: str
) -> None:
    shown = "\n".join(
        render.status(State("20261123t014409z-k7m2qxwp", "running", argv=("cat",), **facts), NOW)
    )
    assert f"  input    {said}\n" in shown
    assert "input" not in "\n".join(
        render.status(State("20261123t014409z-k7m2qxwp", "running", argv=("cat",)), NOW)
    )


def test_the_status_screen_answers_what_a_person_asks_next() -> None:
    state = running(
        origin={"user": "ops", "host": "laptop"}, cwd="/opt", pid=8177, supervisor="ok",
        streams={"stdout": {"length": 3_100_000_000}, "stderr": {"length": 812_000}},
        last_output_time=at(seconds=4),
    )  # fmt: skip
    lines = render.status(state, NOW)
    assert lines[0] == "migrate (k7m2qx) on db1 as ops: running for 2 h"
    text = "\n".join(lines)
    for fact in (
        "./migrate --all   in /opt",
        "by ops@laptop",
        "stdout 3.1 GB, stderr 812 kB, last 4 s ago",
        "pid 8177, guards ok",
    ):
        assert fact in text


# -- The live line


def test_the_live_line_is_one_line_of_the_terminals_width() -> None:
    line = render.live("t4xk9d", "local", elapsed=2, amount=4, silent=0, width=79)
    assert line == "t4xk9d local  running  0:02  4 B  output 0 s ago" + " " * 17 + "Ctrl-C: detach"
    assert len(render.live("t4xk9d", "local", elapsed=2, amount=4, silent=0, width=30)) == 30


def test_a_program_held_back_by_a_full_disk_doesnt_look_like_a_silent_one() -> None:
    line = render.live(
        "t4xk9d", "db1", elapsed=2, amount=4, silent=7, width=79, trouble=render.HELD_BACK
    )
    assert line.startswith("t4xk9d db1  running  0:02  4 B  HELD BACK: no room on the disk there")


def test_a_lost_link_says_that_the_program_is_unaffected() -> None:
    line = render.live_without_link("migrate", "db1", since_s=33 * 60, tries=2, width=79)
    assert line == "migrate db1  LINK LOST 33 min ago, program unaffected; connecting (try 2)"


# -- The text that a terminal may be shown


def shown(*chunks: bytes) -> str:
    sanitiser = Sanitiser()
    return "".join(map(sanitiser.feed, chunks)) + sanitiser.feed(b"", final=True)


@settings(max_examples=500)
@given(
    st.lists(
        st.binary(max_size=40)
        | st.sampled_from(
            [b"\x1b[31m", b"\x1b[", b"\x1b", b"\r", b"\n", b"\x9b2J", b"\xc2\x9b", "é漢".encode()]
        )
    )
)
def test_nothing_a_terminal_acts_on_passes_but_edits_of_the_programs_lines_and_colours(
    chunks: list[bytes],
) -> None:
    assert not ACTIVE.search(EDITS.sub("", COLOUR.sub("", shown(*chunks))))


@settings(max_examples=500)
@given(st.binary(max_size=60) | st.text().map(str.encode), st.lists(st.integers(0, 60)))
def test_how_the_bytes_are_cut_into_chunks_changes_nothing(data: bytes, cuts: list[int]) -> None:
    places = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    assert shown(*(data[a:b] for a, b in itertools.pairwise(places))) == shown(data)


@given(st.text(st.characters(exclude_categories=("Cc", "Cs"))))
def test_harmless_text_passes_as_it_is(text: str) -> None:
    assert shown(text.encode()) == text


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"a\tb\n", "a\tb\n"),
        (b"crlf\r\n", "crlf\r\n"),
        (b"50%\r60%", "50%\r60%"),
        (b"\x1b]0;title\x07", "^[]0;title^G"),
        (b"\x1b[2J", "^[[2J"),
        (b"\x1b]52;c;ZXZpbA==\x1b\\", "^[]52;c;ZXZpbA==^[\\"),
        (b"\xc2\x9b2J", "\\x9b2J"),
        (b"\xff\xfe", "\\xff\\xfe"),
        (b"\x7f", "^?"),
        (b"\x1b[1;31mred", "\x1b[1;31mred"),
        (b"\x1b[31", "^[[31"),
    ],
)
def test_the_corpus_of_tricks_is_shown_instead_of_done(data: bytes, text: str) -> None:
    assert shown(data) == text


def test_a_character_cut_in_two_stays_whole_and_a_colour_too() -> None:
    assert shown(b"\xe6\xbc", b"\xa2", b"\x1b[3", b"1m") == "漢\x1b[31m"


# -- The screen on a real terminal, and on pipes


@pytest.fixture
def terminal() -> Iterator[Pty]:
    with Pty() as made:
        yield made


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for end in ends:
        with contextlib.suppress(OSError):
            os.close(end)


def test_a_pipe_gets_the_programs_bytes_exactly(pipe: tuple[int, int]) -> None:
    screen = Screen(out=pipe[1], err=pipe[1])
    data = bytes(range(256)) + b"\x1b[31m"
    screen.output(OUT, data)
    screen.close()
    assert os.read(pipe[0], 1000) == data


def test_bytes_that_find_no_room_at_once_are_not_lost(pipe: tuple[int, int]) -> None:
    os.set_blocking(pipe[1], False)
    screen = Screen(out=pipe[1], err=pipe[1])
    data = os.urandom(300_000)
    writer = threading.Thread(target=screen.output, args=(OUT, data))
    writer.start()
    got = b""
    while len(got) < len(data):
        got += os.read(pipe[0], 65536)
    writer.join(10)
    assert got == data


def test_a_reader_that_has_gone_is_told_as_gone(pipe: tuple[int, int]) -> None:
    screen = Screen(out=pipe[1], err=pipe[1])
    os.close(pipe[0])
    with pytest.raises(Gone):
        screen.output(OUT, b"x")


def test_good_ends_are_for_terminals_only_and_a_log_has_the_hints_of_bad_ones(
    pipe: tuple[int, int],
) -> None:
    screen = Screen(out=pipe[1], err=pipe[1])
    screen.say("r8w3mz", "db1", "done", "exit 0 after 0.01 s", ["a hint"])
    screen.say("r8w3mz", "db1", "FAILED", "exit 7 after 3.0 s", ["a hint"])
    assert os.read(pipe[0], 1000) == (
        b"corra: r8w3mz on db1: FAILED: exit 7 after 3.0 s\n       a hint\n"
    )


def test_a_terminal_gets_hints_below_the_line_and_no_colour_where_none_is_wanted(
    terminal: Pty, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    screen = Screen(out=terminal.slave, err=terminal.slave)
    screen.error(NotFound("in this machine's history", label="k7m2qx", hint=["look: corra ps"]))
    seen = terminal.until("ps\r\n")
    assert (
        seen == "corra: k7m2qx: NOT FOUND: in this machine's history\r\n       look: corra ps\r\n"
    )


def test_program_output_is_never_read_as_markup(terminal: Pty) -> None:
    screen = Screen(out=terminal.slave, err=terminal.slave)
    screen.output(OUT, b"[bold]x[/bold] :smile:\n")
    assert terminal.until("\n") == "[bold]x[/bold] :smile:\r\n"


def test_a_colour_the_program_left_open_is_reset_before_our_words_and_at_the_end(
    terminal: Pty,
) -> None:
    screen = Screen(out=terminal.slave, err=terminal.slave)
    screen.output(OUT, b"\x1b[31mred\n")
    screen.note("x", "h", "a fact")
    screen.output(OUT, b"still red\n")
    screen.close()
    terminal.expect("still red\r\n")
    seen = terminal.seen.decode()
    assert "\x1b[0mcorra: x on h: a fact" in seen
    assert "\x1b[31mstill red" in seen


def test_our_words_begin_a_line_of_their_own(terminal: Pty) -> None:
    screen = Screen(out=terminal.slave, err=terminal.slave)
    screen.output(OUT, b"Password: ")
    screen.note("x", "h", "a fact")
    assert "Password: \r\ncorra: x on h: a fact" in terminal.until("fact\r\n")


def test_a_closed_screen_shows_what_a_cut_off_sequence_held_back(terminal: Pty) -> None:
    screen = Screen(out=terminal.slave, err=terminal.slave)
    screen.output(OUT, b"end\x1b[3")
    screen.close()
    assert terminal.until("^[[3").endswith("end^[[3")


def test_a_stopped_reader_of_stdout_does_not_keep_us_from_speaking(pipe: tuple[int, int]) -> None:
    reader, writer = os.pipe()
    screen = Screen(out=pipe[1], err=writer)
    stuck = threading.Thread(target=lambda: _quietly(screen, os.urandom(10_000_000)), daemon=True)
    stuck.start()
    os.read(pipe[0], 1)  # the program still writes
    screen.say("x", "h", "STILL RUNNING", "you have detached")
    assert os.read(reader, 1000) == b"corra: x on h: STILL RUNNING: you have detached\n"
    os.close(pipe[0])
    stuck.join(10)
    os.close(reader)
    os.close(writer)


def _quietly(screen: Screen, data: bytes) -> None:
    with contextlib.suppress(Gone):
        screen.output(OUT, data)


# -- Lines too long for a terminal


def test_a_line_that_fits_is_left_alone() -> None:
    assert render.folded("corra: x: done: exit 0", 80, "done") == "corra: x: done: exit 0"


def test_a_long_line_is_broken_between_words_and_never_within_a_fate_or_a_command() -> None:
    line = "corra: a-run-of-some-length (7phtvj) on db1: STILL RUNNING: you have detached"
    assert render.folded(line, 60, "STILL RUNNING") == (
        "corra: a-run-of-some-length (7phtvj) on db1: STILL RUNNING:\n         you have detached"
    )
    assert "\n         STILL RUNNING: you have" in render.folded(line, 52, "STILL RUNNING")
    command = (
        "corra run --host db1 -- printf '%s' a b c d e f g h i j k l m n o p q r s t u v w x y z"
    )
    line = f"corra: NOT STARTED: no -- before the command:  {command}  (as ssh has it)"
    assert render.folded(line, 60, "NOT STARTED") == (
        "corra: NOT STARTED: no -- before the command:\n"
        f"         {command}\n"
        "         (as ssh has it)"
    )


def test_a_hint_is_broken_between_words_unless_it_has_a_command_to_type() -> None:
    hint = "       there are id, name, host, state, for, output, by, command, and --json's keys"
    assert render.folded_hint(hint, 80) == (
        "       there are id, name, host, state, for, output, by, command, and --json's\n"
        "         keys"
    )
    command = f"       elsewhere: corra attach --host {'db1' * 20} --as root k7m2qx"
    assert render.folded_hint(command, 80) == command


def test_a_number_and_its_unit_stay_together() -> None:
    line = "corra: x on db1: KILLED: TERM from ops@laptop after 1 min 17 s, at 02:08"
    shown = render.folded(line, len("corra: x on db1: KILLED: TERM from ops@laptop after 1 min 17"))
    assert shown.endswith("after 1 min\n         17 s, at 02:08")


def test_a_folded_row_keeps_its_indent():
    row = "  FAILED 1: web[1,5]  Job for app.service failed because of its control process"
    assert render.folded(row, 60) == (
        "  FAILED 1: web[1,5]\n         Job for app.service failed because of its control process"
    )


@settings(max_examples=200)
@given(
    st.text(st.characters(codec="utf-8", exclude_characters="\n\0"), max_size=90),
    st.integers(1, 90),
)
def test_folding_loses_no_letter(text: str, width: int) -> None:
    assert "".join(render.folded(text, width).split()) == "".join(text.split())
