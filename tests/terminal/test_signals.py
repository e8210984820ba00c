"""Ctrl-C, TERM, HUP and a closed terminal: their effect on the watching client, and on the program
only where the operator meant it.

Each watcher is a process of its own, on pipes or in a pseudo-terminal. The signal goes to the
watcher or to the program, so a test can tell the two effects apart.
"""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import re
import select
import shlex
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from conftest import COLD, Cli

import users
from agent_door import Gate, Mount, eventually
from corra import agent
from corra.model import ids
from sshd import Sshd
from terminal import Terminal
from tracing import held

pytestmark = pytest.mark.storm

DEADLINE_S = 30.0
LOCAL = ("--host", "local")
# The program prints when it is ready and which signals it got, and ends by itself should a test
# forget it.
PROGRAM = (
    "trap 'echo got term; exit 5' TERM; trap 'echo got hup; exit 6' HUP; echo ready; i=0; while "
    "[ $i -lt 600 ]; do sleep 0.1; i=$((i+1)); done"
)


class Watcher:
    """corra on pipes, in a session of its own."""

    def __init__(self, cli: Cli, *words: str, **how: Any) -> None:
        self.process = cli.popen(*words, **how)
        self.out = b""

    def until(self, text: bytes) -> None:
        assert self.process.stdout
        while text not in self.out:
            ready = select.select([self.process.stdout], [], [], DEADLINE_S)[0]
            data = os.read(self.process.stdout.fileno(), 65536) if ready else b""
            assert data, f"{text!r} never came: {self.out!r}"
            self.out += data

    def send(self, *numbers: int) -> None:
        for number in numbers:
            self.process.send_signal(number)

    def end(self) -> tuple[int, str]:
        """Wait for the end; return (exit code, stderr)."""
        out, err = self.process.communicate(timeout=DEADLINE_S)
        self.out += out
        return self.process.returncode, err.decode()


@pytest.fixture
def watch(cli: Cli) -> Iterator[Callable[..., Watcher]]:
    made: list[Watcher] = []

    def start(*words: str, **how: Any) -> Watcher:
        made.append(Watcher(cli, *words, **how))
        return made[-1]

    yield start
    for each in made:
        if each.process.poll() is None:
            each.process.kill()
        with contextlib.suppress(ValueError):
            each.process.communicate(timeout=DEADLINE_S)


@pytest.fixture(autouse=True)
def nothing_left(cli: Cli) -> Iterator[None]:
    yield
    running = cli("ps", *LOCAL, "-q", "--state", "running").stdout.decode().split()
    if running:
        cli("kill", "-9", "-y", *LOCAL, *running)


def has_said_ready(cli: Cli, name: str) -> bool:
    return cli("logs", name).stdout == b"ready\n"


def running(cli: Cli, name: str) -> bool:
    return cli("status", "--exit-code", name).returncode == 122


RUN = ("run", *LOCAL, "--name", "it", "--", "sh", "-c", PROGRAM)


# -- Ctrl-C


def test_sigint_detaches_and_ends_us_as_sigint_does(
    cli: Cli, watch: Callable[..., Watcher]
) -> None:
    watcher = watch(*RUN)
    watcher.until(b"ready\n")
    watcher.send(signal.SIGINT)
    code, err = watcher.end()
    assert code == -signal.SIGINT
    first, hint = err.splitlines()
    assert first.startswith("corra: it (")
    assert first.endswith(" on local: STILL RUNNING: you have detached")
    assert hint == "       watch: corra attach it      stop: corra kill it"
    assert running(cli, "it")


def test_a_shell_script_around_us_stops_at_ctrl_c_too(
    cli: Cli, terminal: Callable[..., Terminal]
) -> None:
    script = cli.home / "script"
    words = " ".join(["'" + word.replace("'", "'\\''") + "'" for word in (*cli.program, *RUN)])
    script.write_text(f"{words}\necho went on\n")
    cli.program = ["/bin/bash", str(script)]
    shell = terminal()
    cli.program = list(COLD)
    shell.until("ready")
    shell.type("\x03")
    assert shell.end() == -signal.SIGINT
    assert "went on" not in shell.text
    assert running(cli, "it")


def test_ctrl_c_on_a_terminal_says_how_to_watch_and_stop_and_then_leaves(
    cli: Cli, terminal: Callable[..., Terminal]
) -> None:
    screen = terminal(*RUN)
    screen.until("ready")
    screen.type("\x03")
    screen.until(
        "STILL RUNNING: you have detached",
        "watch: corra attach it",
        "stop: corra kill it",
        "Ctrl-C again within 2 s stops it now",
    )
    assert screen.end() == -signal.SIGINT
    assert running(cli, "it")


def test_a_second_ctrl_c_stops_the_program(cli: Cli, terminal: Callable[..., Terminal]) -> None:
    screen = terminal(*RUN)
    screen.until("ready")
    screen.type("\x03")
    screen.until("Ctrl-C again")
    mashed_for = time.monotonic() + 0.5
    # the 0.3 s in which a second Ctrl-C doesn't count, and some more
    while time.monotonic() < mashed_for:
        select.select([], [], [], mashed_for - time.monotonic())
    screen.type("\x03")
    screen.until(
        "TERM sent; KILL in ", "KILLED: exit 5" if "KILLED: exit" in screen.text else "corra: it ("
    )
    assert screen.end() == -signal.SIGINT
    assert cli("status", "--exit-code", "it").returncode == 5


def test_ctrl_c_before_anything_was_sent_says_that_nothing_was_started(
    cli: Cli, terminal: Callable[..., Terminal]
) -> None:
    # it accepts connections and stays silent
    with socket.create_server(("127.0.0.1", 0)) as silent:
        there = terminal("run", "--host", f"127.0.0.1:{silent.getsockname()[1]}", "--", "true")
        with silent.accept()[0]:
            there.until("connecting")
            there.type("\x03")
            assert there.end() == -signal.SIGINT
    assert "NOT STARTED: you left before 127.0.0.1:" in there.text and "MAYBE" not in there.text
    assert cli("attach").returncode == 125  # nor does history have a run


def test_mashing_ctrl_c_does_not_stop_the_program(
    cli: Cli, terminal: Callable[..., Terminal]
) -> None:
    screen = terminal(*RUN)
    screen.until("ready")
    screen.type("\x03")
    screen.until("Ctrl-C again")
    screen.type("\x03\x03\x03")
    assert screen.end() == -signal.SIGINT
    assert "TERM sent" not in screen.text
    assert running(cli, "it")


def test_ctrl_c_works_while_nobody_reads_our_output(
    cli: Cli, watch: Callable[..., Watcher]
) -> None:
    watcher = watch("run", *LOCAL, "--name", "it", "--", "yes")
    watcher.until(b"y\n")
    assert watcher.process.stdout
    assert select.select([watcher.process.stdout], [], [], DEADLINE_S)[0]
    watcher.send(signal.SIGINT)
    assert watcher.process.wait(DEADLINE_S) == -signal.SIGINT
    assert running(cli, "it")


def test_what_was_ignored_when_we_were_started_stays_ignored(
    cli: Cli, watch: Callable[..., Watcher]
) -> None:
    """As under `nohup`, and with `&` in a script."""
    watcher = watch(
        *RUN,
        preexec_fn=lambda: [
            signal.signal(each, signal.SIG_IGN) for each in (signal.SIGINT, signal.SIGHUP)
        ],
    )
    watcher.until(b"ready\n")
    watcher.send(signal.SIGINT, signal.SIGHUP)
    assert cli("kill", "-s", "TERM", "it").returncode == 0
    code, err = watcher.end()
    assert (code, watcher.out) == (5, b"ready\ngot term\n")
    assert "STILL RUNNING" not in err


# -- TERM and HUP


def test_term_to_run_is_term_for_the_program(watch: Callable[..., Watcher]) -> None:
    watcher = watch(*RUN)
    watcher.until(b"ready\n")
    watcher.send(signal.SIGTERM)
    code, err = watcher.end()
    assert (code, watcher.out) == (5, b"ready\ngot term\n")
    assert "TERM passed on to it" in err


# It says when it is ready, and ends at USR1; nothing else ends it.
ENDS = 'trap "" TERM; trap "exit 6" USR1; echo ready; while :; do sleep 0.01; done'


def end_unseen(state: dict[str, Any]) -> None:
    """End the program, of whose guards none can look."""
    os.kill(state["pid"], signal.SIGUSR1)
    eventually(lambda: (agent.process(state["pid"]) or "Z")[0] == "Z")


def stop_guards(state: dict[str, Any]) -> None:
    """Stop all guards, each before the one that it would let go on."""
    for pid in (*state["standby_pids"], state["agent_pid"]):
        os.kill(pid, signal.SIGSTOP)
        eventually(lambda pid=pid: (agent.process(pid) or "T")[0] == "T")  # type: ignore[misc]


def test_an_end_that_nobody_can_record_is_told_by_every_verb_and_is_the_programs_own_in_the_end(
    cli: Cli, terminal: Callable[..., Terminal]
) -> None:
    screen = terminal("run", *LOCAL, "--name", "it", "--", "sh", "-c", ENDS)
    screen.until("ready")
    state = json.loads(cli("status", "--json", "it").stdout)
    stop_guards(state)
    end_unseen(state)
    guards = " ".join(map(str, (*state["standby_pids"], state["agent_pid"])))
    why, remedy = "its program has ended, but its guards are STOPPED", f"kill -CONT {guards}"
    screen.until(f"NOT RECORDED: {why}", remedy)
    status = cli("status", "it").stdout.decode()
    assert f": NOT RECORDED: {why}" in status and remedy in status
    assert "  NOT RECORDED  " in cli("ps", *LOCAL).stdout.decode()
    os.kill(state["standby_pids"][0], signal.SIGCONT)
    assert screen.end() == 6


@pytest.mark.parametrize("how", ["term", "kill"])
def test_an_order_lets_stopped_guards_go_on_and_the_programs_own_end_is_recorded(
    cli: Cli, watch: Callable[..., Watcher], how: str
) -> None:
    watcher = watch("run", *LOCAL, "--name", "it", "--", "sh", "-c", ENDS)
    watcher.until(b"ready\n")
    state = json.loads(cli("status", "--json", "it").stdout)
    stop_guards(state)
    end_unseen(state)
    if how == "term":
        watcher.send(signal.SIGTERM)
    else:
        killed = cli("kill", "it")
        assert killed.returncode == 0
        assert "had ended already: FAILED: exit 6" in killed.stderr.decode()
    code, err = watcher.end()
    assert (code, "FAILED: exit 6" in err) == (6, True)


def test_a_term_that_reaches_nobody_ends_us_and_the_exit_status_is_the_programs_own(
    cli: Cli, watch: Callable[..., Watcher]
) -> None:
    """A debugger holds the keeper and the program is dead, so nobody can record its end."""
    watcher = watch("run", *LOCAL, "--name", "it", "--", "sh", "-c", ENDS)
    watcher.until(b"ready\n")
    state = json.loads(cli("status", "--json", "it").stdout)
    with held(state["agent_pid"]):
        end_unseen(state)
        watcher.send(signal.SIGTERM)
        code, err = watcher.end()
        assert code == -signal.SIGTERM
        why = "its program has ended, but a debugger holds its keeper"
        assert f"NOT RECORDED: {why}; detached by SIGTERM" in err
        killed = cli("kill", "it")
        assert f"NOT RECORDED: {why}\n" in killed.stderr.decode()
        assert "STILL RUNNING" not in killed.stderr.decode() + err
    assert cli("wait", "it").returncode == 6


def test_a_program_that_is_killed_while_a_debugger_holds_its_keeper_is_not_called_running(
    cli: Cli, watch: Callable[..., Watcher]
) -> None:
    watcher = watch("run", *LOCAL, "--name", "it", "--", "sh", "-c", ENDS)
    watcher.until(b"ready\n")
    state = json.loads(cli("status", "--json", "it").stdout)
    with held(state["agent_pid"]):
        killed = cli("kill", "-9", "it")
        assert killed.returncode == 0
        err = killed.stderr.decode()
        assert "NOT RECORDED: its program has ended, but a debugger holds its keeper" in err
        assert "STILL RUNNING" not in err
    assert watcher.end()[0] == 128 + signal.SIGKILL


def test_a_run_whose_last_output_waits_for_room_says_how_it_ended_and_term_ends_us(
    cli: Cli, watch: Callable[..., Watcher], tmp_path: Path
) -> None:
    if os.getuid() != 0:
        pytest.skip("needs root: it mounts a tmpfs")
    small = Mount(tmp_path / "small", "size=4m,mode=0700")
    try:
        gate = Gate(tmp_path / "gate")
        script = f'echo ready; read a < "{gate.path}"; seq 1 5000; exit 9'
        spool = ("--spool", str(small.at / "spool"))
        watcher = watch("run", *LOCAL, *spool, "--name", "it", "--", "sh", "-c", script)
        watcher.until(b"ready\n")
        with (small.at / "filler").open("wb", 0) as filler, contextlib.suppress(OSError):
            while True:
                filler.write(b"x" * 4096)
        gate.open()
        waits = "; the rest of its output waits: no room on the disk there"
        err = b""
        assert watcher.process.stderr
        while waits.encode() not in err:
            assert select.select([watcher.process.stderr], [], [], DEADLINE_S)[0]
            err += os.read(watcher.process.stderr.fileno(), 65536)
        assert ": FAILED: exit 9 after " in err.decode()
        watcher.send(signal.SIGTERM)
        code, said = watcher.end()
        assert code == -signal.SIGTERM
        assert ": FAILED: exit 9 after " in said and "; detached by SIGTERM" in said
        assert "STILL RUNNING" not in said
        assert cli("wait", *LOCAL, *spool, "it").returncode == 9
        logs = cli("logs", *LOCAL, *spool, "it")
        assert waits in logs.stderr.decode() and "is gone" not in logs.stderr.decode()
        (small.at / "filler").unlink()
        eventually(
            lambda: (
                cli("logs", *LOCAL, *spool, "it").stdout
                == b"ready\n" + b"".join(b"%d\n" % each for each in range(1, 5001))
            )
        )
    finally:
        small.close()


@pytest.mark.parametrize(
    "order", [(signal.SIGTERM, signal.SIGHUP), (signal.SIGHUP, signal.SIGTERM)]
)
def test_a_session_that_ends_leaves_the_program_running(
    cli: Cli, watch: Callable[..., Watcher], order: tuple[int, int]
) -> None:
    watcher = watch(*RUN)
    watcher.until(b"ready\n")
    watcher.send(*order)
    code, err = watcher.end()
    assert code in (-signal.SIGTERM, -signal.SIGHUP)
    assert "STILL RUNNING: detached by " in err
    assert running(cli, "it")


def test_hup_detaches(cli: Cli, watch: Callable[..., Watcher]) -> None:
    watcher = watch(*RUN)
    watcher.until(b"ready\n")
    watcher.send(signal.SIGHUP)
    code, err = watcher.end()
    assert code == -signal.SIGHUP
    assert "STILL RUNNING: detached by SIGHUP" in err
    assert running(cli, "it")


def test_a_terminal_that_is_closed_leaves_the_program_running(
    cli: Cli, terminal: Callable[..., Terminal]
) -> None:
    screen = terminal(*RUN)
    screen.until("ready")
    screen.hang_up()
    code = screen.process.wait(DEADLINE_S)
    assert code == -signal.SIGHUP
    assert running(cli, "it")


def test_term_to_attach_detaches(cli: Cli, watch: Callable[..., Watcher]) -> None:
    cli("run", "-d", *RUN[1:])
    watcher = watch("attach", "it")
    watcher.until(b"ready\n")
    watcher.send(signal.SIGTERM)
    code, err = watcher.end()
    assert code == -signal.SIGTERM
    assert "STILL RUNNING: detached by SIGTERM" in err
    assert running(cli, "it")


def test_sig_proxy_passes_term_on(cli: Cli, watch: Callable[..., Watcher]) -> None:
    cli("run", "-d", *RUN[1:])
    watcher = watch("attach", "--sig-proxy", "it")
    watcher.until(b"ready\n")
    watcher.send(signal.SIGTERM)
    code, _ = watcher.end()
    assert (code, watcher.out) == (5, b"ready\ngot term\n")


def test_ctrl_c_of_a_wait_just_ends_it_also_before_the_host_has_answered(
    cli: Cli, watch: Callable[..., Watcher]
) -> None:
    cli("run", "-d", *RUN[1:])
    watcher = watch("wait", "it", stdout=subprocess.DEVNULL)
    assert watcher.process.stderr
    until = time.monotonic() + DEADLINE_S
    while not any(_threads(watcher.process.pid)) and time.monotonic() < until:
        select.select([], [], [], 0.01)
    watcher.send(signal.SIGINT)
    assert watcher.process.wait(DEADLINE_S) == -signal.SIGINT
    # Which of the three depends on how far it had come: it looked for the run, had asked, or knew.
    said = watcher.process.stderr.read()
    left = (b"STILL RUNNING: you stopped waiting", b"you left before local answered")
    assert not said or any(words in said for words in left), said
    assert running(cli, "it")


def _threads(pid: int) -> list[str]:
    """Return the threads beside the main one; once there is one, the waiting has begun."""
    return os.listdir(f"/proc/{pid}/task")[1:]


# -- The text that a terminal shows


def test_the_live_line_shows_what_runs_and_is_gone_at_the_end(
    cli: Cli, terminal: Callable[..., Terminal]
) -> None:
    go = cli.home / "go"
    screen = terminal(
        "run",
        *LOCAL,
        "--name",
        "it",
        "--",
        "sh",
        "-c",
        f"echo one; until [ -e {go} ]; do sleep 0.05; done; echo two",
    )
    screen.until("one\r\n", "it local  running  0:0", "Ctrl-C: detach")
    go.touch()
    screen.until("two\r\n", "done: exit 0 after")
    assert screen.end() == 0
    last = screen.text.rpartition("two\r\n")[2]
    assert "running" not in last
    assert "two\r\ncorra: it (" in screen.text or "two\r\n\r\x1b[Kcorra: it (" in screen.text


def test_whoever_attaches_sees_how_long_a_program_has_been_silent(
    cli: Cli, terminal: Callable[..., Terminal]
) -> None:
    """The time counts from the program's last output, not from its arrival at this terminal: a hung
    program must look hung.
    """
    prog_id = (
        cli("run", "-d", *LOCAL, "--name", "it", "--", "sh", "-c", "echo one; exec sleep 600")
        .stdout.decode()
        .strip()
    )
    run = agent.Run(str(cli.home / ".local/state/corra"), prog_id)
    with contextlib.closing(run):
        eventually(
            lambda: (state := run.state(details=True))["last_output_time"] and state["elapsed"] > 3
        )
    screen = terminal("attach", "it")
    text = screen.until("one\r\n", " s ago")
    cli("kill", "-9", "-y", "it")
    found = re.search(r"output (\d+) s ago", text)
    assert found and int(found.group(1)) >= 3
    assert screen.end() == 137


def test_a_program_can_not_drive_the_terminal_unless_raw(terminal: Callable[..., Terminal]) -> None:
    words = ("--host", "local", "--", "printf", "\\033]0;title\\007\\033[31mred\\n")
    screen = terminal("run", *words)
    screen.until("done: exit 0")
    assert b"^[]0;title^G\x1b[31mred\r\n" in screen.seen
    screen = terminal("run", "--raw", *words)
    screen.until("done: exit 0")
    assert b"\x1b]0;title\x07\x1b[31mred\r\n" in screen.seen


def test_attach_on_a_terminal_shows_the_last_200_lines(
    cli: Cli, terminal: Callable[..., Terminal]
) -> None:
    cli("run", *LOCAL, "--name", "it", "--", "seq", "1000")
    screen = terminal("attach", "it")
    text = screen.until("done: exit 0 at ")
    assert screen.end() == 0
    assert "showing the last 200 lines" in text
    assert "\r\n801\r\n" in text
    assert "\r\n800\r\n" not in text


def test_kill_asks_before_it_stops_another_persons_run(
    cli: Cli, terminal: Callable[..., Terminal]
) -> None:
    cli("run", "-d", *LOCAL, "--name", "it", "--", "sleep", "60", env={"LOGNAME": "ops"})
    refused = cli("kill", "it")
    assert refused.returncode == 125
    assert b"NOT KILLED: started by ops@" in refused.stderr
    for answer, code in (("n", 125), ("y", 0)):
        screen = terminal("kill", "it")
        screen.until("stop it? [y/N]")
        screen.type(answer + "\n")
        assert screen.end() == code
    assert not running(cli, "it")


@pytest.mark.bare
def test_a_detached_start_that_places_the_agent_says_started_once(
    cli: Cli, terminal: Callable[..., Terminal], sshd: Sshd
) -> None:
    shown = terminal("run", "-d", "--host", "h", "--name", "nap", "--", "sleep", "60")
    assert shown.end() == 0
    said = [line for line in shown.text.splitlines() if "started" in line]
    assert len(said) == 1 and re.search(
        r"nap \(\w{6}\) on h: started \(agent \S+ placed, \d+ kB\)", said[0]
    )
    cli("kill", "-9", "-y", "nap")


def test_what_history_warns_of_is_said_once_in_our_own_words(
    cli: Cli, terminal: Callable[..., Terminal]
) -> None:
    (cli.home / ".local" / "state" / "corra").mkdir(parents=True)
    (cli.home / ".local" / "state" / "corra" / "history.sqlite3").mkdir()
    shown = terminal("run", *LOCAL, "--", "true")
    assert shown.end() == 0
    assert shown.text.count("corra: history ") == 1


def test_a_detached_start_says_where_to_watch_on_a_terminal(
    cli: Cli, terminal: Callable[..., Terminal]
) -> None:
    screen = terminal("run", "-d", *LOCAL, "--name", "it", "--", "true")
    text = screen.until("watch: corra attach it")
    assert screen.end() == 0
    assert any(
        ids.is_valid(each) and ids.short(each) != each
        for each in text.replace("\x1b[K", " ").split()
    )


@pytest.mark.parametrize("flag", ["", "-u", "--as", "--spool", "--via"])
def test_the_line_for_elsewhere_works_as_it_stands_on_another_machine(
    cli: Cli, terminal: Callable[..., Terminal], sshd: Sshd, flag: str
) -> None:
    if flag == "--as" and shutil.which("sudo") is None:
        pytest.skip("no sudo here (apt-get install sudo)")
    me = pwd.getpwuid(os.getuid()).pw_name
    given = {"-u": me, "--spool": str(cli.home / "a spool"), "--via": "openssh"}
    with contextlib.ExitStack() as made:
        if flag == "--as":  # sudo goes to the home of whom it makes of us, which isn't the test's
            given[flag] = made.enter_context(users.made("corra-elsewhere")).name
        words = [flag, given[flag]] if flag else []
        screen = terminal("run", "-d", *words, "--host", "h", "--", "sh", "-c", "echo out; exit 3")
        screen.until("elsewhere: ")
        assert screen.end() == 0
        line = re.search(r"elsewhere: corra (attach .*?)\r\n", screen.text)
        assert line
        other = {"XDG_STATE_HOME": str(cli.home / "another machine")}
        done = cli(*shlex.split(line[1]), env=other)
        assert (done.returncode, done.stdout) == (3, b"out\n"), (line[1], done.stderr)


def test_a_wait_says_on_a_terminal_what_it_waits_for(
    cli: Cli, terminal: Callable[..., Terminal]
) -> None:
    for name in ("it", "other"):
        cli("run", "-d", *LOCAL, "--name", name, "--", "sh", "-c", PROGRAM)
    both = terminal("wait", "it", "other")
    both.until("waiting for 2 of 2 runs")
    screen = terminal("wait", "it")
    screen.expect(r"it local  running  0:\d\d +Ctrl-C: stop waiting")
    for each, said in (
        (screen, ") on local: STILL RUNNING: you stopped waiting"),
        (both, "corra: you stopped waiting; 2 of 2 runs go on"),
    ):
        each.type("\x03")
        assert each.end() == -signal.SIGINT
        assert said in each.text
    assert "stop: corra kill it" in screen.text
    both, screen = terminal("wait", "it", "other"), terminal("wait", "it")
    both.until("waiting for 2 of 2 runs")
    cli("kill", "it", "other")
    assert screen.end() == 5 and both.end() == 5
    screen = terminal("wait", "it")
    assert screen.end() == 5
    assert "running" not in screen.text


def test_ctrl_c_in_a_kill_says_that_the_host_goes_on(
    cli: Cli, terminal: Callable[..., Terminal]
) -> None:
    stubborn = "trap '' TERM; echo ready; while :; do sleep 0.1; done"
    for name in ("it", "other"):
        cli("run", "-d", *LOCAL, "--name", name, "--", "sh", "-c", stubborn)
        eventually(partial(has_said_ready, cli, name))
    screen = terminal("kill", "--grace", "60s", "it", "other")
    assert screen.until("it (", "other (").count("TERM sent; KILL in 1 min if ") == 2
    screen.type("\x03")
    assert screen.end() == -signal.SIGINT
    left = r"corra: \w+ \(\w{6}\) on local: you left; local sends KILL in \S+ s if still there"
    assert len(re.findall(left, " ".join(screen.text.split()))) == 2
    assert running(cli, "it") and running(cli, "other")


def test_keys_that_no_program_will_read_are_said_to_be_none_of_its(
    cli: Cli, terminal: Callable[..., Terminal]
) -> None:
    screen = terminal("run", "--pty", "--name", "it", *LOCAL, "--", "sh", "-c", PROGRAM)
    # The command has a line of its own, since both have more than 80 columns.
    screen.until(
        "it (", "on local: what you type here doesn't reach it:\r\n         corra attach -i it"
    )
    later = terminal("attach", "it")
    later.until("what you type here doesn't reach it")
    shown = terminal("logs", "it")
    assert shown.end() == 0 and "doesn't reach it" not in shown.text
    cli("kill", "-9", "it")
    assert screen.end() == later.end() == 137
    for words in (("attach", "it"), ("run", *LOCAL, "--", "true")):
        ended = terminal(*words)
        assert ended.end() in (0, 137)
        assert "doesn't reach it" not in ended.text


def test_the_question_for_sudos_password_says_whose_it_is(
    terminal: Callable[..., Terminal],
) -> None:
    screen = terminal("--prompt-for-sudo-password", "run", *LOCAL, "--", "true")
    screen.until("sudo password on the hosts, of the user who logs in there: ")
    screen.type("secret\n")
    assert screen.end() == 0
    assert "secret" not in screen.text and "config value" not in screen.text
