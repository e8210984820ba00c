"""The operator's terminal lent to a program: typed and shown over real terminals, over ssh, over
slow links and links that break.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import termios
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Cli

import corra
from corra.model.frames import Taken
from corra.model.state import State
from corra.runs.stdin_feed import StdinFeed
from corra.terminal.keyboard import Keyboard
from corra.terminal.screen import Screen
from proxy import Proxy, wait_for
from sshd import Sshd
from terminal import Pty, Terminal

pytestmark = pytest.mark.usefixtures("home")


def shell(
    terminal: Callable[..., Terminal], *more: str, host: str = "local", **how: Any
) -> Terminal:
    """A shell on the program's terminal, at its prompt."""
    opened = terminal(
        "run",
        "-i",
        "--pty",
        "--name",
        "shell",
        "--host",
        host,
        *more,
        "--",
        "bash",
        "--norc",
        "-i",
        **how,
    )
    opened.expect(r"this is its terminal; Ctrl-\] leaves it running\r\n")
    opened.expect(r"bash-.*[$#] ")
    return opened


# ---------------------------------------------------------------- a terminal


def test_a_programs_terminal_is_ours_of_our_size_and_we_exit_as_it_does(
    terminal: Callable[..., Terminal],
) -> None:
    opened = shell(terminal, rows=30, columns=101)
    assert opened.is_raw
    opened.type("stty size; tty; echo $TERM\r")
    opened.expect("30 101\r\n/dev/pts/[0-9]+\r\nxterm-256color\r\n")
    opened.resize(41, 120)
    opened.type("until [ \"$(stty size)\" = '41 120' ]; do sleep 0.02; done; echo resiz'ed'\r")
    opened.expect("resized")
    # The program itself says so: Ctrl-C before bash has given it the terminal would reach bash.
    opened.type("sh -c \"echo be'gun'; exec sleep 600\"\r")
    opened.expect("begun")
    opened.type("\x03")
    opened.expect(r"bash-.*[$#] ")
    opened.type("exit 7\r")
    opened.expect("FAILED: exit 7")
    assert opened.end() == 7 and opened.modes() == opened.before


def test_the_keys_leave_it_running_and_attach_takes_it_up_where_it_was(
    terminal: Callable[..., Terminal],
) -> None:
    opened = shell(terminal)
    opened.type("X=kept\r")
    opened.type("\x1d")
    opened.expect("STILL RUNNING: you have left its terminal\r\n +watch: corra attach -i shell")
    assert opened.end() == 122 and opened.modes() == opened.before
    again = terminal("attach", "-i", "--detach-keys", "ctrl-p,ctrl-q", "shell")
    again.expect(r"this is its terminal; Ctrl-P Ctrl-Q leaves it\s+running")
    again.type("echo is $X\r")
    again.expect("is kept")
    again.type("\x10\x11")
    again.expect("STILL RUNNING")
    assert again.end() == 122 and again.modes() == again.before
    assert corra.attach("shell").kill(grace=0).ended


def test_the_keys_wait_until_the_host_has_what_was_typed_before_them() -> None:
    tty = Pty()
    feed, left = StdinFeed(), threading.Event()
    keyboard = Keyboard(feed, Screen(out=tty.slave, err=tty.slave), fd=tty.slave)
    try:
        keyboard.begin(
            State("20261123t014409z-k7m2qxwp", "running", pty=True),
            lambda _: left.set(),
            lambda _: None,
        )
        tty.type("abc\x1d")
        wait_for(lambda: feed.given == 3)
        assert not left.wait(0.2)
        feed.told(Taken(3))
        assert left.wait(20)
    finally:
        keyboard.restore()
        tty.close()


@pytest.mark.parametrize("has_pty", [True, False])
def test_a_window_that_is_closed_is_no_end_of_what_the_program_reads(has_pty: bool) -> None:
    """A terminal that has gone reads as empty as often as it is an error. Taken for an end of
    input, that would type Ctrl-D to the program's shell.
    """
    for _ in range(5):
        tty = Pty()
        feed = StdinFeed()
        keyboard = Keyboard(feed, Screen(out=tty.slave, err=tty.slave), fd=tty.slave)
        keyboard.begin(
            State("20261123t014409z-k7m2qxwp", "running", pty=has_pty),
            lambda _: None,
            lambda _: None,
        )
        assert keyboard.raw == has_pty
        tty.hang_up()
        wait_for(lambda: not any(each.name == "keyboard" for each in threading.enumerate()))
        feed.finish()
        assert feed.done  # an end of stdin would still wait to be sent
        keyboard.restore()
        tty.close()


def test_keys_that_the_host_may_not_have_are_said(terminal: Callable[..., Terminal]) -> None:
    opened = shell(terminal)
    threads = Path(f"/proc/{opened.process.pid}/task").glob("*/children")
    hosts = [int(pid) for each in threads for pid in each.read_text().split()]
    assert hosts
    for pid in hosts:  # the host's follow stays silent from here on
        os.kill(pid, signal.SIGSTOP)
    opened.type("X=lost\r\x1d")
    opened.expect("STILL RUNNING: you have left its terminal")
    opened.expect("what you typed last may not be there: 7 bytes")
    assert opened.end() == 122 and opened.modes() == opened.before
    for pid in hosts:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
    assert corra.attach("shell").kill(grace=0).ended


def test_who_comes_later_has_what_is_switched_on_and_is_asked_nothing_old_and_may_leave(
    terminal: Callable[..., Terminal],
) -> None:
    """A full-screen program, seen by the client that started it and by a later one. The program has
    asked for the terminal's kind, and for keys in kitty's encoding.
    """
    asks = (
        r"printf '\033[?1049h\033[?1h\033[?2004h\033[>1u\033[6n\033]11;?\007first\n'; sed -u "
        r"'s/^/said: /'"
    )
    opened = terminal(
        "run", "-i", "--pty", "--name", "full", "--host", "local", "--", "sh", "-c", asks
    )
    opened.expect("first")
    assert b"\x1b[6n\x1b]11;?\x07" in opened.seen
    opened.type("\x1b[93;5u")
    opened.expect("STILL RUNNING")
    assert opened.end() == 122
    assert re.search(rb"\x1b\[\?1l.*\x1b\[\?2004l.*\x1b\[<1u.*\x1b\[\?1049l", opened.seen)
    for tail in ("0", "10"):
        again = terminal("attach", "-i", "-n", tail, "full")
        again.expect(r"leaves it running.*\x1b\[\?1049h.*\x1b\[\?1h.*\x1b\[\?2004h.*\x1b\[>1u")
        again.type("here\r")
        again.expect("said: here")
        assert b"[6n" not in again.seen and b"]11;" not in again.seen  # an id may contain 6n
        again.type("\x1d")
        assert again.end() == 122 and again.modes() == again.before
        assert re.search(rb"STILL RUNNING", again.seen)
    assert corra.attach("full").kill(grace=0).ended


def test_a_stop_from_outside_is_no_end_of_it(terminal: Callable[..., Terminal]) -> None:
    """While the client is stopped, its shell takes the terminal back. When the client goes on, it
    gives the program's modes to the terminal again.
    """
    opened = shell(terminal)
    opened.type("printf '\\033[?1000h'; echo mou'se'\r")
    opened.expect("mouse")
    opened.process.send_signal(signal.SIGSTOP)
    termios.tcsetattr(opened.slave, termios.TCSANOW, opened.before)
    opened.process.send_signal(signal.SIGCONT)
    opened.expect(r"\x1b\[\?1000h")
    wait_for(lambda: opened.is_raw)
    opened.type("exit 0\r")
    opened.expect("done: exit 0")
    assert opened.end() == 0 and opened.modes() == opened.before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_that_ends_us_puts_the_terminal_back(
    terminal: Callable[..., Terminal], number: int
) -> None:
    opened = shell(terminal)
    opened.type("printf '\\033[?1049h\\033[?25l'; echo full'screen'\r")
    opened.expect("fullscreen")
    if number == signal.SIGTERM:
        # the client passes TERM on, and an interactive shell ignores it
        opened.process.send_signal(number)
        opened.expect("TERM passed on to it")
        number = signal.SIGHUP
    opened.process.send_signal(number)
    opened.end()
    assert opened.modes() == opened.before
    assert b"\x1b[?25h" in opened.seen and b"\x1b[?1049l" in opened.seen
    assert corra.attach("shell").kill(grace=0).ended


def test_an_error_of_our_own_puts_the_terminal_back(
    cli: Cli, terminal: Callable[..., Terminal], home: Path
) -> None:
    """The client's pump fails in the middle of the output."""
    (home / "broken.py").write_text(
        "import sys, corra.terminal.watch as w\n"
        "show = w.Watch._show_output\n"
        "def broken(self, output):\n"
        "    show(self, output)\n"
        "    if b'BROKEN' in output.data: raise RuntimeError('a defect')\n"
        "w.Watch._show_output = broken\n"
        "from corra.main import main\nmain()\n"
    )
    cli.program = [sys.executable, str(home / "broken.py")]
    opened = terminal(
        "run", "-i", "--pty", "--host", "local", "--", "sh", "-c", "read x; echo BR''OKEN; sleep 60"
    )
    opened.expect("leaves it running")
    assert opened.is_raw
    opened.type("\r")
    opened.expect("a defect")
    assert opened.end() != 0 and opened.modes() == opened.before


def test_without_a_pty_lines_go_as_they_are_typed_and_ctrl_d_is_the_end(
    terminal: Callable[..., Terminal],
) -> None:
    opened = terminal("run", "-i", "--host", "local", "--", "sh", "-c", "echo ready; cat; echo end")
    opened.expect("ready")
    assert not opened.is_raw
    opened.type("hello\r")
    opened.expect("hello\r\nhello")
    opened.type("\x04")
    opened.expect("end")
    assert opened.end() == 0


# ---------------------------------------------------------------- far away


def far(sshd: Sshd, proxy: Proxy, delay_s: float = 0.0) -> None:
    proxy.delay_s = delay_s
    sshd.add_host("far", Port=proxy.port, HostKeyAlias=f"[127.0.0.1]:{sshd.port}")


def test_a_session_at_100_ms_is_a_session(sshd: Sshd, terminal: Callable[..., Terminal]) -> None:
    with Proxy(sshd.port) as proxy:
        far(sshd, proxy, 0.05)
        opened = shell(terminal, host="far")
        opened.type("read -s -p 'Password: ' p\r")
        opened.expect("Password: ")
        opened.type("hunter2\r")
        opened.type("echo got ${#p}\r")
        opened.expect("got 7")
        assert b"hunter2" not in opened.seen
        opened.type("exit 0\r")
        opened.expect("done: exit 0")
        assert opened.end() == 0 and opened.modes() == opened.before


def test_what_is_typed_while_the_link_is_away_arrives_once_and_its_keys_work_without_one(
    sshd: Sshd, terminal: Callable[..., Terminal]
) -> None:
    with Proxy(sshd.port) as proxy:
        far(sshd, proxy)
        opened = shell(terminal, host="far")
        proxy.refuse()
        proxy.reset()
        opened.expect("link lost, program unaffected as far as known; trying on\r\n")
        opened.type("echo ty'ped' $((6 * 7))\r")
        proxy.refuse(False)
        opened.expect("link back after")
        opened.expect("typed 42")
        proxy.refuse()
        proxy.reset()
        opened.expect("link lost")
        opened.type("\x1d")
        opened.expect("STILL RUNNING")
        assert opened.end() == 122 and opened.modes() == opened.before
        assert bytes(opened.seen).count(b"typed 42") == 1
        proxy.refuse(False)
        assert corra.attach("shell", "far").kill(grace=0).ended
