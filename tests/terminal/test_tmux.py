"""A program's terminal as the operator sees it: the screen of a real terminal, over ssh and 100 ms.

Where the same program can run in a terminal beside it, corra's screen must equal that one, cell by
cell.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import pytest
from conftest import ROOT
from hypothesis import given, settings, strategies as st
from test_program_modes import HARMLESS, QUESTIONS, SEQUENCES, STRINGS

import corra
import users
from corra.terminal.program_modes import ProgramModes, Replay
from properties import PROPERTY
from proxy import Proxy, wait_for
from sshd import Sshd
from tmux import PATIENCE_S, PROMPT, Tmux

CORRA = f"{shlex.quote(sys.executable)} -m corra"
# Each mode that a program may leave switched on and that tmux reports, and characters that are
# drawn as lines.
ALL = (
    r"\033[?1049h\033[?1h\033=\033[?25l\033[3 "
    r"q\033[?1003h\033[?1006h\033[?2004h\033[?7l\033[4h\033[2;9r\033[?6h\033(0\033[31m"
)
SIGNALS = {
    "HUP": [signal.SIGHUP],
    "HUP and TERM": [signal.SIGHUP, signal.SIGTERM],
    "TERM": [signal.SIGTERM],
}
SHELL_PROMPT = re.escape(PROMPT.strip())

pytestmark = [
    pytest.mark.usefixtures("home"),
    pytest.mark.skipif(shutil.which("tmux") is None, reason="no tmux on this machine"),
]


@pytest.fixture
def seat(home: Path) -> Iterator[Callable[..., Tmux]]:
    """Return a function that opens a terminal: `seat()` runs a shell, `seat("vim", ..)` runs a
    program.
    """
    opened: list[Tmux] = []

    def sit(*command: str, rows: int = 24, columns: int = 80, **env: str) -> Tmux:
        opened.append(
            Tmux(home, *command, rows=rows, columns=columns, env={"PYTHONPATH": str(ROOT), **env})
        )
        return opened[-1]

    yield sit
    for each in opened:
        each.__exit__(None, None, None)


@pytest.fixture
def line(sshd: Sshd) -> Iterator[Proxy]:
    """The link to the host `far`, with a delay of 100 ms."""
    with Proxy(sshd.port) as proxy:
        proxy.delay_s = 0.05
        sshd.add_host("far", Port=proxy.port, HostKeyAlias=f"[127.0.0.1]:{sshd.port}")
        yield proxy


def needs(*names: str) -> str:
    found = next(filter(None, map(shutil.which, names)), None)
    return found or pytest.skip(f"no {names[0]} on this machine")


def vim(*words: str) -> list[str]:
    return [needs("vim", "vim.tiny"), "-u", "NONE", "-i", "NONE", "-n", *words]


def same(one: Tmux, other: Tmux, pattern: str) -> None:
    """Wait until both terminals show the same, with `pattern` in it."""
    other.expect(pattern)
    until = time.monotonic() + PATIENCE_S
    while (mine := one.picture) != (theirs := other.picture):
        assert time.monotonic() < until, (
            f"the two never showed the same:\n{mine[0]}\n{mine[1]}\n\n{theirs[0]}\n{theirs[1]}"
        )


def as_it_was(there: Tmux, before: object) -> None:
    """Check that the shell's terminal is as before: a line goes on behind the last column, and
    characters are neither inserted nor drawn as lines.
    """
    wait_for(lambda: there.modes == before, what=f"{there.modes}, and was {before}")
    columns, wide = int(there.ask("#{pane_width}")), "lqk" * 50
    typed = f"{PROMPT}echo {wide}"
    there.type("clear", "Enter")
    there.expect(rf"\A{SHELL_PROMPT}\Z")  # text typed before the prompt would be echoed twice
    there.type(f"echo {wide}", "Enter")
    lines = [
        text[at : at + columns] for text in (typed, wide) for at in range(0, len(text), columns)
    ]
    there.expect(r"\A" + re.escape("\n".join([*lines, PROMPT.strip()])) + r"\Z")


def test_vim_looks_as_beside_it_through_edits_sizes_and_whoever_comes_later(
    seat: Callable[..., Tmux], line: Proxy, home: Path
) -> None:
    file = home / "f"
    file.write_text("".join(f"line {n}\n" for n in range(200)))
    words = vim("-c", "set ruler mouse=a", str(file))
    here, there = seat(*words), seat()
    before = there.modes
    there.command(
        f"echo earlier; {CORRA} run -i --pty --name vim --host far -- {shlex.join(words)}"
    )
    same(there, here, "^line 0$")
    for each in (here, there):
        each.type("5G", "O", "one more", "Escape")
    same(there, here, "^one more$")
    for each in (here, there):
        each.resize(30, 100)
    same(there, here, "^line 27$")
    there.type("C-]")
    there.expect(r"STILL RUNNING: you have left its terminal\n +watch: corra attach -i vim")
    assert there.screen.splitlines()[0] == "earlier" and there.screen.count("Ctrl-]") == 1
    wait_for(lambda: there.modes == before)
    for each in (here, there):
        each.resize(36, 110)
    there.command(f"{CORRA} attach -i vim")
    same(there, here, "^line 31$")
    for each in (here, there):
        each.type("G")
    same(there, here, "^line 199$")
    for each in (here, there):
        each.type("Up", "Up", "dd", "gg", "j")
    same(there, here, "^line 33$")
    there.type(":wq", "Enter")
    there.expect("done: exit 0")
    as_gone = there.expect(rf"\A(.*\n)*{SHELL_PROMPT}\Z").group()
    assert "line 33" not in as_gone and there.modes == before
    lines = [f"line {n}" for n in range(200) if n != 197]
    assert file.read_text().splitlines() == [*lines[:4], "one more", *lines[4:]]


@pytest.mark.parametrize(
    ("words", "shown", "sizes"),
    [("htop", "^F1.*F10", (24, 34)), ("top", "PID USER", (12, 16)), ("less f", "^:$", (24, 34))],
    ids=["htop", "top", "less"],
)
def test_what_fills_the_screen_follows_its_size_and_keys_and_leaves_the_screen_as_it_was(
    seat: Callable[..., Tmux],
    line: Proxy,
    home: Path,
    words: str,
    shown: str,
    sizes: tuple[int, int],
) -> None:
    (home / "f").write_text("".join(f"line {n}\n" for n in range(200)))
    program, *rest = words.split()
    there = seat(rows=sizes[0])
    before = there.modes
    there.command(
        f"echo earlier; {CORRA} run -i --pty --name full --host far -- "
        f"{shlex.join([needs(program), *rest])}"
    )
    there.expect(shown)
    wait_for(lambda: len(there.screen.splitlines()) == sizes[0])
    there.resize(sizes[1], 110)
    wait_for(lambda: len(there.screen.splitlines()) == sizes[1], what=there.screen)
    there.expect(shown)
    there.type("C-]")
    there.expect("STILL RUNNING")
    wait_for(lambda: there.modes == before)
    there.command(f"echo earlier; {CORRA} attach -i full")
    there.expect(shown)
    if program == "htop":
        there.type("F6")  # by its terminfo: the key of a terminal in application mode
        there.expect("^Sort by")
        there.type("Escape")
        there.expect("F10Quit")
    there.type("q")
    # top uses no alternate screen: its end restores no earlier text without corra either.
    above = "" if program == "top" else r"\Aearlier\n(corra: .*\n)+"
    there.expect(rf"{above}\n?corra: .*done: exit 0.*\n{SHELL_PROMPT}\Z")
    as_it_was(there, before)


def test_sudo_asks_for_its_password_shows_nothing_of_it_and_keeps_nothing(
    seat: Callable[..., Tmux], line: Proxy, home: Path, as_root: None
) -> None:
    """With the real sudo, which opens /dev/tty itself."""
    needs("sudo")
    name = f"corra{os.getpid()}"
    with (
        users.made(name, "c0rrect-horse"),
        users.sudoers(f"corra-{name}", f"Defaults:{name} !lecture", f"{name} ALL=(ALL) ALL"),
    ):
        there = seat()
        who = f"setpriv --reuid={name} --regid={name} --init-groups"
        there.command(f"{CORRA} run -i --pty --host far -- {who} sudo id -un")
        there.expect("password for .*:$")
        there.type("c0rrect-horse", "Enter")
        there.expect(rf"^\[sudo\] password for {name}:\nroot\ncorra: .*done: exit 0")
    wait_for(
        lambda: (
            subprocess.run(
                ["grep", "-rq", "c0rrect-horse", home / ".local"], check=False
            ).returncode
        )
    )


def test_a_shell_there_is_a_shell(seat: Callable[..., Tmux], line: Proxy) -> None:
    there = seat(rows=15, columns=82)
    before = there.modes
    there.command(f"{CORRA} run -i --pty --name shell --host far -- bash --norc --noprofile -i")
    there.expect(r"this is its terminal; Ctrl-\] leaves it running\nbash-.*[$#]$")
    there.type("seq 200", "Enter")
    there.expect("".join(f"{n}\n" for n in range(187, 201)) + r"bash-.*[$#]\Z")
    there.type("C-l")
    there.expect(r"\Abash-.*[$#]\Z")
    there.type("stty size", "Enter")
    there.expect("^15 82$")
    there.resize(18, 75)
    there.type("C-l")
    there.expect(r"\Abash-.*[$#]\Z")
    there.type("stty size; echo b'egu'n; sleep 600", "Enter")
    there.expect("^18 75\nbegun$")
    there.type("C-c")
    there.expect(r"\^C\nbash-")
    there.type("C-l")
    there.expect(r"\Abash-.*[$#]\Z")
    there.type("(echo b'egu'n; exec sleep 500)", "Enter")
    there.expect("^begun$")
    there.type("C-z")
    there.expect("Stopped")
    there.type("C-l")
    there.expect(r"\Abash-.*[$#]\Z")
    there.type("jobs; echo j'ob's; fg", "Enter")
    there.expect(r"Stopped.*\njobs\n\( ?echo.*\Z")
    there.type("C-c")
    there.expect(r"\^C\nbash-")
    there.type("exit 7", "Enter")
    there.expect("FAILED: exit 7")
    as_it_was(there, before)


def test_what_is_pasted_arrives_once_and_whole(
    seat: Callable[..., Tmux], line: Proxy, home: Path
) -> None:
    """100 kB are pasted into vim, bracketed so that vim indents nothing; also by a client that
    attached later.
    """
    file, text = (
        home / "pasted",
        "".join(f"    {n} and some words behind it\n" for n in range(3300)),
    )
    (home / "vimrc").write_text(
        "set nocompatible autoindent t_BE=\x1b[?2004h t_BD=\x1b[?2004l t_PS=\x1b[200~ "
        "t_PE=\x1b[201~\n"
    )
    words = [*vim(), str(file)]
    words[words.index("-u") + 1] = str(home / "vimrc")
    there = seat()
    there.command(f"{CORRA} run -d -q --pty --name vim --host far -- {shlex.join(words)}")
    there.expect(rf"-[a-z0-9]+\n(.*\n)*{SHELL_PROMPT}\Z")
    run = corra.attach("vim", "far")
    wait_for(lambda: b"2004h" in run.read("output"))
    there.command(f"{CORRA} attach -i -n 0 vim")
    there.expect("^~$")
    there.type("i")
    there.expect("INSERT")
    there.paste(text)
    there.expect("3299 and some words")
    there.type("Escape")
    there.type(":wq", "Enter")
    there.expect("done: exit 0")
    assert file.read_text() == text + "\n"


@pytest.mark.parametrize(
    "how", ["keys", "HUP", "HUP and TERM", "TERM", "the link cut, and keys", "the program killed"]
)
def test_however_a_program_is_left_the_terminal_is_as_it_was(
    seat: Callable[..., Tmux], line: Proxy, how: str
) -> None:
    there = seat()
    before = there.modes
    program = f"printf '{ALL}all'; exec sleep 600"
    there.command(
        f"echo earlier; {CORRA} run -i --pty --name it --host far -- sh -c {shlex.quote(program)}"
    )
    until = time.monotonic() + 2 * PATIENCE_S
    while "alternate_on=1" not in there.modes[0] or "scroll_region_upper=1" not in there.modes[0]:
        assert time.monotonic() < until, f"{there.modes[0]}\n{there.screen}"
    if how in SIGNALS:
        pid = there.child
        for number in SIGNALS[how]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
    elif how == "the program killed":
        corra.attach("it", "far").kill(grace=0)
    else:
        if how != "keys":
            line.refuse()
            line.reset()
            there.expect("link lost")
        there.type("C-]")
    said = "KILLED" if how in ("TERM", "the program killed") else "STILL RUNNING"
    there.expect(rf"\Aearlier\n(.*\n)*corra: .*{said}(.*\n)+{SHELL_PROMPT}\Z")
    as_it_was(there, before)


# ---------------------------------------------------------------- a real terminal's answer


@pytest.fixture(scope="module")
def glass(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Tmux, IO[bytes], Path]]:
    """A terminal that shows the bytes written to a pipe, and keeps the answers that it sends."""
    at = tmp_path_factory.mktemp("glass")
    os.mkfifo(at / "shown")
    answers = at / "answers"
    show = f"stty raw -echo; cat > {answers} & exec cat {at}/shown"
    with (
        Tmux(at, "sh", "-c", show.replace("cat >", "cat < /dev/tty >")) as tmux,
        (at / "shown").open("wb", 0) as shown,
    ):
        wait_for(answers.exists)
        yield tmux, shown, answers


def show(glass: tuple[Tmux, IO[bytes], Path], data: bytes) -> None:
    """Write `data`, and wait until the terminal has taken it in: its answers come in order."""
    _, shown, answers = glass
    before = answers.stat().st_size
    shown.write(data + b"\x1b[5n")
    wait_for(lambda: answers.read_bytes()[before:].endswith(b"\x1b[0n"))


@given(sequences=st.lists(st.sampled_from(SEQUENCES), max_size=20))
@settings(PROPERTY, max_examples=PROPERTY.max_examples // 2)
def test_a_real_terminal_is_as_before_after_whatever_was_switched(
    glass: tuple[Tmux, IO[bytes], Path], sequences: list[bytes]
) -> None:
    tmux, modes = glass[0], ProgramModes()
    show(glass, b"\x1b[?1049l\x1bc")
    before = tmux.modes
    modes.see(b"".join(sequences))
    show(glass, b"".join(sequences) + modes.undo())
    assert tmux.modes == before
    # The terminal draws the letters themselves again, and no line characters.
    show(glass, b"\x1b[H\x1b[2Jlqk")
    assert tmux.screen == "lqk"


@given(old=st.lists(st.sampled_from(QUESTIONS + STRINGS + HARMLESS), max_size=12))
@settings(PROPERTY, max_examples=PROPERTY.max_examples // 2)
def test_a_real_terminal_answers_nothing_that_was_asked_before(
    glass: tuple[Tmux, IO[bytes], Path], old: list[bytes]
) -> None:
    answers = glass[2]
    before = answers.stat().st_size
    data = b"".join(old)
    modes = ProgramModes()
    modes.see(data)
    show(glass, Replay(len(data)).take(0, data) + modes.undo())
    assert answers.read_bytes()[before:] == b"\x1b[0n"
