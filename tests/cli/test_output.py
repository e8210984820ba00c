"""Where a verb's output goes: full disks, readers that have gone, descriptors that are closed."""

from __future__ import annotations

import contextlib
import os
import pty
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import Cli

from agent_door import eventually
from corra.cli.verb import VERBS
from corra.main import ns
from corra.runs import history
from proxy import wait_for
from sshd import Sshd
from terminal import Terminal

ROOT = Path(__file__).resolve().parents[2]
LOCAL = ("--host", "local")
NOT_WRITTEN = 121
EPIPE = 141

# Each verb with words that print something and end with 0; `one` is a run that has ended.
PRINTS = {
    "run": ("run", *LOCAL, "--", "echo", "x"),
    "run -d": ("run", "-d", *LOCAL, "--", "true"),
    "run --json": ("run", "--json", *LOCAL, "--", "echo", "x"),
    "again": ("again", "one"),
    "attach": ("attach", "one"),
    "attach --json": ("attach", "--json", "one"),
    "logs": ("logs", "one"),
    "export": ("export", "-o", "-", "one"),
    "kill": ("kill", "--json", "one"),
    "ps": ("ps", "-a", *LOCAL),
    "ps --json": ("ps", "-a", "--json", *LOCAL),
    "status": ("status", "one"),
    "status --json": ("status", "--json", "one"),
    "wait": ("wait", "--json", "one"),
    "wait --any": ("wait", "--any", "one"),
    "gc": ("gc", "--json", "-R", *LOCAL),
    "doctor": ("doctor", *LOCAL),
    "doctor --json": ("doctor", "--json", *LOCAL),
    "history": ("history",),
    "serve": ("serve", "--new-token", "x=read", "--database", "tokens.sqlite3"),
    "--help": ("--help", "run"),
    "run --help": ("run", "--help"),
    "--list": ("--list",),
}
# `send` and `deliver` say what they did on stderr; `book` has nothing to show here.
PRINTS_NOTHING = {"send", "deliver", "book", "diff"}


@pytest.fixture
def one(cli: Cli) -> Cli:
    assert cli("run", *LOCAL, "--name", "one", "--", "echo", "hello").returncode == 0
    return cli


def test_the_table_has_every_verb() -> None:
    assert (
        ns.tasks.keys() == {name.split()[0] for name in PRINTS if name[0] != "-"} | PRINTS_NOTHING
    )
    assert set(VERBS) >= set(ns.tasks)


def outcome(cli: Cli, words: tuple[str, ...], out: int) -> tuple[int, list[str]]:
    process = cli.popen(*words, stdout=out)
    err = process.communicate(timeout=60)[1].decode()
    assert "Traceback" not in err and "Exception" not in err, err
    return process.returncode, err.splitlines()


@pytest.mark.sampled
@pytest.mark.parametrize("name", PRINTS)
def test_a_full_disk_here_is_one_line_and_a_code_of_its_own(one: Cli, name: str) -> None:
    with open("/dev/full", "w") as full:
        code, said = outcome(one, PRINTS[name], full.fileno())
    assert code == NOT_WRITTEN
    assert [line for line in said if line.endswith("can't be written here: disk full (ENOSPC)")]
    assert len(said) == 1


@pytest.mark.parametrize("name", ["run -d", "run", "logs", "ps --json"])
def test_a_device_here_that_fails_is_one_line_and_the_same_code(one: Cli, name: str) -> None:
    """A quota (EDQUOT) goes the same way, and needs a file system that has one."""
    master, device = pty.openpty()
    os.close(master)
    try:
        code, said = outcome(one, PRINTS[name], device)
    finally:
        os.close(device)
    assert code == NOT_WRITTEN
    assert len(said) == 1 and "can't be written here" in said[0] and "EIO" in said[0], said


@pytest.mark.sampled
@pytest.mark.parametrize("name", PRINTS)
def test_a_reader_that_has_gone_is_141_and_no_traceback(one: Cli, name: str) -> None:
    read, write = os.pipe()
    os.close(read)
    try:
        code, said = outcome(one, PRINTS[name], write)
    finally:
        os.close(write)
    assert code == EPIPE
    assert len(said) <= 1


@pytest.mark.parametrize("name", ["run -d", "run", "run --json"])
def test_a_run_whose_id_nobody_could_read_is_named_on_stderr(cli: Cli, name: str) -> None:
    with open("/dev/full", "w") as full:
        said = outcome(cli, PRINTS[name], full.fileno())[1]
    (entry,) = history.recent_entries()
    assert entry.label in said[0]
    fate = "started: " + entry.prog_id if name == "run -d" else "done: exit 0"
    assert f" on local: {fate}" in said[0]


def test_a_program_that_goes_on_is_said_to_run_when_the_disk_here_is_full(cli: Cli) -> None:
    words = ("run", *LOCAL, "--name", "long", "--", "sh", "-c", "echo x; exec sleep 1000")
    with open("/dev/full", "w") as full:
        code, said = outcome(cli, words, full.fileno())
    assert (code, len(said)) == (NOT_WRITTEN, 2)
    assert " on local: STILL RUNNING: its output can't be written here: disk full" in said[0]
    assert said[1] == "       watch: corra attach long      stop: corra kill long"
    assert cli("kill", "-9", "long").returncode == 0


def test_what_went_wrong_is_on_stderr_where_json_cant_be_written(cli: Cli) -> None:
    with open("/dev/full", "w") as full:
        code, said = outcome(cli, ("status", "--json", "nothing"), full.fileno())
    assert code == 125
    assert said[0].startswith("corra: nothing: NOT FOUND")


# -- Closed descriptors


def closed(cli: Cli, words: tuple[str, ...], shell: str) -> tuple[int, str]:
    """Return the code and stderr of corra, started with the descriptors as `shell` has them."""
    typed = f"exec {shlex.join([sys.executable, '-m', 'corra', *words])} {shell}"
    done = subprocess.run(
        ["sh", "-c", typed],
        cwd=cli.home,
        env=cli.environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done.returncode, done.stderr


@pytest.mark.sampled
@pytest.mark.parametrize("name", PRINTS)
def test_a_verb_takes_a_closed_descriptor_for_dev_null(one: Cli, name: str) -> None:
    code, said = closed(one, PRINTS[name], "<&- >&-")
    assert (code, "Traceback" in said) == (0, False), said
    assert closed(one, PRINTS[name], "<&- >&- 2>&-")[0] == 0


@pytest.mark.parametrize("shell", [">&-", "2>&-", "<&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize("via", ["fabric", "openssh"])
def test_output_never_goes_into_the_socket_of_ssh(
    cli: Cli, sshd: Sshd, shell: str, via: str
) -> None:
    program = ("sh", "-c", "echo SECRET; echo SECRET >&2; exit 3")
    words = ("run", "--via", via, "--host", "h", "--", *program)
    assert closed(cli, words, shell)[0] == 3
    (entry,) = history.recent_entries()
    assert (entry.state, cli("logs", entry.prog_id).stdout.count(b"SECRET")) == ("exited", 1)


@pytest.mark.parametrize("shell", ["<&- >&- 2>&-", "</dev/null >&- 2>&-"])
@pytest.mark.parametrize(
    ("file", "words", "code"),
    [("agent.py", ["list"], 2), ("on_host/courier.py", [], 2), ("on_host/tether.py", ["0"], None)],
)
def test_what_runs_on_a_host_takes_closed_descriptors_for_dev_null(
    home: Path, shell: str, file: str, words: list[str], code: int | None
) -> None:
    """By hand, with nothing to do: the code says that it went as with /dev/null."""
    argv = shlex.join([sys.executable, str(ROOT / "corra" / file), *words])

    def run(how: str) -> int:
        return subprocess.run(
            ["sh", "-c", f"exec {argv} {how}"], check=False, timeout=60
        ).returncode

    expected = run("</dev/null >/dev/null 2>/dev/null")
    assert code in (None, expected)
    assert run(shell) == expected


@pytest.mark.parametrize("shell", ["<&- >&-", "<&- >&- 2>&-"])
def test_a_collector_takes_closed_descriptors_for_dev_null(cli: Cli, shell: str) -> None:
    """No socket of it becomes 0, 1 or 2: nothing that is printed goes to a client of it."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    words = ("serve", "--database", "c.sqlite3", "--listen", f"127.0.0.1:{port}")
    argv = shlex.join([sys.executable, "-m", "corra", *words])
    with subprocess.Popen(
        ["sh", "-c", f"exec {argv} {shell}"],
        cwd=cli.home,
        env=cli.environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as served:
        try:
            wait_for(lambda: served.poll() is not None or listens(port), deadline_s=60)
            assert served.poll() is None
            closed_ones = (0, 1, 2) if "2>" in shell else (0, 1)
            there = {os.readlink(f"/proc/{served.pid}/fd/{number}") for number in closed_ones}
        finally:
            served.terminate()
    assert there == {"/dev/null"}


def listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True


# -- A home that doesn't exist


def test_a_home_that_doesnt_exist_is_not_created(cli: Cli, tmp_path: Path) -> None:
    nowhere = tmp_path / "nonexistent"
    done = cli("run", *LOCAL, "--spool", str(tmp_path / "spool"), "--", "echo", "x",
               env={"HOME": str(nowhere), "XDG_STATE_HOME": ""})  # fmt: skip
    assert (done.returncode, done.stdout) == (0, b"x\n")
    assert b"history" in done.stderr and b"not used" in done.stderr
    assert not nowhere.exists()


# -- Several at once


@pytest.fixture
def silent() -> Iterator[socket.socket]:
    """A port that takes connections and never says a word."""
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as server:
        server.settimeout(60)
        yield server


@pytest.mark.parametrize(
    "words",
    [("doctor",), ("gc", "-R"), ("gc", "-y"), ("kill", "-a"), ("ps",)],
    ids=" ".join,
)
def test_ctrl_c_ends_a_verb_at_once_whichever_host_hangs(
    cli: Cli, sshd: Sshd, silent: socket.socket, words: tuple[str, ...]
) -> None:
    sshd.add_host("silent", Port=silent.getsockname()[1])
    typed = (*words, "--connect-timeout", "60s", "--host", "h,silent")
    with cli.popen(*typed) as process:
        connection = silent.accept()[0]
        begun = time.monotonic()
        process.send_signal(signal.SIGINT)
        err = process.communicate(timeout=60)[1]
        took = time.monotonic() - begun
        connection.close()
    assert (process.returncode, b"Traceback" in err) == (-signal.SIGINT, False)
    assert took < 5


def test_wait_any_names_the_first_to_end_and_says_nothing_of_the_others(
    cli: Cli, sshd: Sshd
) -> None:
    start = ("run", "-d", "--host", "h", "--")
    slow = cli(*start, "sleep", "1000").stdout.decode().strip()
    quick = cli(*start, "sh", "-c", 'until [ -e "$HOME/go" ]; do sleep 0.05; done')
    name = quick.stdout.decode().strip()
    with cli.popen("wait", "--any", slow, name) as process:
        eventually(lambda: process.poll() is None)
        (cli.home / "go").touch()
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out.decode(), err) == (0, name + "\n", b"")
    assert cli("kill", "-9", slow).returncode == 0


def test_status_answers_in_the_order_that_was_typed(cli: Cli) -> None:
    for name in ("a", "b", "c"):
        cli("run", *LOCAL, "--name", name, "--", "true")
    shown = cli("status", "c", "a", "b").stdout.decode()
    assert [line[0] for line in shown.splitlines() if line[1:3] == " ("] == ["c", "a", "b"]


def test_a_terminal_shows_for_whom_it_waits(
    sshd: Sshd, silent: socket.socket, terminal: Callable[..., Terminal]
) -> None:
    sshd.add_host("silent", Port=silent.getsockname()[1])
    verb = terminal("ps", "--connect-timeout", "60s", "--host", "h,silent")
    verb.until("waiting for silent")
    silent.accept()[0].close()
    assert verb.end() == 125
