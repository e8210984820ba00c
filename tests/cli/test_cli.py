"""The verbs as an operator types them: words, streams, exit codes. Most run on this machine, and
one of each over ssh.
"""

from __future__ import annotations

import base64
import functools
import json
import os
import pwd
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from conftest import Cli
from hypothesis import HealthCheck, given, settings

import console
import long_ago
from agent_door import Mount, eventually
from corra.main import ns
from corra.model import ids
from properties import words as any_word
from sshd import Sshd
from terminal import Terminal

ROOT = Path(__file__).resolve().parents[2]
LOCAL = ("--host", "local")


WAITS = "echo ready; until [ -e $HOME/go ]; do sleep 0.02; done"


def lines(data: bytes) -> list[str]:
    return data.decode().splitlines()


def objects(data: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in data.splitlines()]


@pytest.fixture
def started(cli: Cli) -> Iterator[Callable[..., str]]:
    """Return a function that starts a program detached and returns the full id; the fixture ends
    the program.
    """
    running: list[str] = []

    def start(*argv: str, flags: tuple[str, ...] = ()) -> str:
        done = cli("run", "-d", *LOCAL, *flags, "--", *argv)
        assert done.returncode == 0, done.stderr
        running.append(done.stdout.decode().strip())
        return running[-1]

    yield start
    if running:
        cli("kill", "-9", "-y", *running)


# -- run


def test_run_gives_stdout_stderr_and_the_exit_code(cli: Cli) -> None:
    done = cli("run", *LOCAL, "--", "sh", "-c", "echo out; echo err >&2; exit 7")
    assert (done.returncode, done.stdout) == (7, b"out\n")
    assert lines(done.stderr)[0] == "err"
    assert lines(done.stderr)[1].startswith("corra: ")
    assert " on local: FAILED: exit 7 after " in lines(done.stderr)[1]
    assert len(lines(done.stderr)) == 2


def test_a_good_end_into_a_pipe_says_nothing_of_its_own(cli: Cli) -> None:
    done = cli("run", *LOCAL, "--", "echo", "x")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"x\n", b"")


def test_bytes_of_every_kind_pass_through_exactly(cli: Cli, tmp_path: Path) -> None:
    data = os.urandom(3_000_000) + bytes(range(256)) + b"\x1b[2J no newline"
    (tmp_path / "f").write_bytes(data)
    assert cli("run", *LOCAL, "--", "cat", str(tmp_path / "f")).stdout == data


def test_run_over_ssh_gives_the_same(cli: Cli, sshd: Sshd) -> None:
    done = cli("run", "--host", "h", "--", "sh", "-c", "echo out; echo err >&2; exit 7")
    assert (done.returncode, done.stdout) == (7, b"out\n")
    assert lines(done.stderr)[0] == "err"
    assert " on h: FAILED: exit 7 after " in lines(done.stderr)[1]


@settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(any_word)
def test_a_word_of_any_bytes_reaches_the_program_as_it_is(cli: Cli, word: str) -> None:
    data = os.fsencode(word)
    done = cli(
        "run",
        *LOCAL,
        "--",
        sys.executable,
        "-c",
        "import os, sys; os.write(1, os.fsencode(sys.argv[1]))",
        data,
    )
    assert (done.returncode, done.stdout) == (0, data)


def test_a_name_that_isnt_utf_8_finds_its_run_and_hints_say_the_id(cli: Cli) -> None:
    name = b"caf\xe9"
    start = ("run", "-d", *LOCAL, "--name", name, "--", "sleep", "60")
    _, (prog_id, first, hint) = console.one(functools.partial(cli.popen, *start))
    assert first == f"corra: caf\\xe9 ({ids.short(prog_id)}) on local: started"
    assert hint == f"       watch: corra attach {ids.short(prog_id)}"
    done = cli("kill", "-9", name)
    assert done.returncode == 0
    assert b"not used" not in done.stderr
    assert cli("status", "--exit-code", name).returncode == 137


def test_a_name_of_two_words_is_one_word_in_a_hint(cli: Cli) -> None:
    start = ("run", "-d", *LOCAL, "--name", "a b", "--", "true")
    _, (_, _, hint) = console.one(functools.partial(cli.popen, *start))
    assert hint == "       watch: corra attach 'a b'"


@pytest.mark.parametrize(
    ("given", "there"),
    [
        ((), "here"),
        (("-C", "~"), ""),
        (("-C", "~/here"), "here"),
        (("-C", "~//here/"), "here"),
        (("-C", "below"), "here/below"),
        (("-C", "."), "here"),
    ],
)
def test_on_this_machine_a_directory_begins_here_and_a_tilde_is_the_home(
    cli: Cli, given: tuple[str, ...], there: str
) -> None:
    (cli.home / "here" / "below").mkdir(parents=True)
    words = [sys.executable, "-m", "corra", "run", *LOCAL, *given, "--", "/bin/pwd"]
    done = subprocess.run(
        words,
        cwd=cli.home / "here",
        env=cli.environment(),
        capture_output=True,
        timeout=60,
        check=True,
    )
    assert Path(done.stdout.decode().strip()) == cli.home / there


@pytest.mark.parametrize("via", ["fabric", "openssh", "chaperone"])
def test_on_a_host_a_directory_begins_at_the_home_of_who_runs_it(
    cli: Cli, sshd: Sshd, via: str
) -> None:
    (cli.home / "there").mkdir()
    for there in ("~/there", "there", "~//there"):
        done = cli("run", "--host", "h", "--via", via, "-C", there, "--", "/bin/pwd")
        assert done.stdout.decode().strip() == str(cli.home / "there"), done.stderr
    done = cli("run", "--host", "h", "--via", via, "-C", "~", "--", "/bin/pwd")
    assert done.stdout.decode().strip() == str(cli.home)


def test_another_users_tilde_is_a_shells_and_is_refused(cli: Cli) -> None:
    done = cli("run", *LOCAL, "-C", "~root/x", "--", "true")
    assert done.returncode == 2
    assert done.stderr.decode() == (
        "corra: NOT STARTED: not a directory: '~root/x'"
        " (only ~ alone is a home: say ~/x or /home/x)\n"
    )


def test_a_start_in_a_directory_that_is_gone_is_refused(cli: Cli) -> None:
    words = f"{sys.executable} -m corra run {shlex.join(LOCAL)} -- true"
    script = f"mkdir gone && cd gone && rmdir ../gone && {words}"
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=cli.home,
        env=cli.environment(),
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert b"NOT STARTED: this directory can't be had" in done.stderr


def test_every_kind_of_word_keeps_its_bounds(cli: Cli) -> None:
    given = ["", "a  b", "'", '"', "\\", "$HOME", "--x", "-H", "--", "a\nb", "*", "!", "é"]
    done = cli("run", *LOCAL, "--", "printf", "%s\\0", *given)
    assert done.stdout.decode().split("\0")[:-1] == given


def test_detached_prints_the_id_alone(cli: Cli, started: Callable[..., str]) -> None:
    prog_id = started("sleep", "60", flags=("--name", "nap"))
    assert ids.is_valid(prog_id)
    assert ids.short(prog_id) != prog_id
    listed = cli("ps", *LOCAL)
    assert lines(listed.stdout)[1].split()[:4] == [ids.short(prog_id), "nap", "local", "running"]


@pytest.mark.parametrize(
    ("flags", "argv", "code", "line"),
    [
        ((), ("no-such-program",), 127, "NOT STARTED: no-such-program: not found (ENOENT)"),
        ((), ("/etc/passwd",), 126, "NOT STARTED: /etc/passwd: not executable (EACCES)"),
        (
            ("-C", "/no/such"),
            ("true",),
            125,
            "NOT STARTED: cwd /no/such: no such directory (ENOENT)",
        ),
        (("-T", "0.2s"), ("sleep", "60"), 124, "TIMEOUT: 0.2 s; ended by TERM after "),
        ((), ("sh", "-c", "kill -SEGV $$"), 139, "KILLED: SEGV after "),
    ],
)
def test_each_bad_end_has_its_line_and_code(
    cli: Cli, flags: tuple[str, ...], argv: tuple[str, ...], code: int, line: str
) -> None:
    done = cli("run", *LOCAL, *flags, "--", *argv)
    assert done.returncode == code
    first, *hints = lines(done.stderr)
    assert f" on local: {line}" in first
    assert all(hint.startswith("       ") for hint in hints)


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("typed", "line"),
    [
        (
            "run -- true",
            "corra: NOT STARTED: no host:  corra run --host HOST -- true   (here: local)",
        ),
        (
            "run --batch 0 --host a,b -- true",
            "corra: NOT STARTED: --batch: not the size of a wave: '0' (say 2, or \"25%\")",
        ),
        (
            "run --max-fail x --host a,b -- true",
            "corra: NOT STARTED: --max-fail: neither a number nor a share: 'x' (say 2, or 10%)",
        ),
        (
            "run -d --batch 1 --host web[1-6] -- true",
            "corra: NOT STARTED: waves need somebody to stay, and -d leaves once all have started",
        ),
        (
            "run --canary db1 --host web[1-6] -- true",
            "corra: NOT STARTED: the canary isn't among the hosts: db1",
        ),
        (
            "send --host web[1-2] x y",
            "corra: NOT SENT: an id belongs to one host, not 2: web1, web2",
        ),
        ("kill --host web[1- -a", "corra: NOT KILLED: not a set of hosts: 'web[1-'"),
        ("kill -y \t", "corra: NOT KILLED: an id is empty: is a variable unset?"),
        (
            "run --host -oProxyCommand=x -- true",
            "corra: NOT STARTED: not a host name: '-oProxyCommand=x'",
        ),
        *(
            (f"run --host {host} {flag}-x -- true", "corra: NOT STARTED: not a user name: '-x'")
            for host in ("db1", "local")
            for flag in ("-u ", "--user=", "--as ")
        ),
        ("run --host -x@db1 -- true", "corra: NOT STARTED: not a user name: '-x'"),
        ("attach --host -h1 x", "corra: NOT DONE: not a host name: '-h1'"),
        ("kill --host local -u -x x", "corra: NOT KILLED: not a user name: '-x'"),
        ("ps --host -h1", "corra: NOT DONE: not a host name: '-h1'"),
        ("status --host local -u -x x", "corra: NOT DONE: not a user name: '-x'"),
        ("wait --host -h1 x", "corra: NOT DONE: not a host name: '-h1'"),
        ("gc -y --host -h1", "corra: NOT DONE: not a host name: '-h1'"),
        (
            "run --host local -u ops -- true",
            (
                "corra: NOT STARTED: local is this machine without ssh, so it has neither login "
                "nor port; to run as ops, say --as ops"
            ),
        ),
        (
            "run --host local -E NO_SUCH_VARIABLE -- true",
            "corra: NOT STARTED: -E NO_SUCH_VARIABLE: not set here; say -E NO_SUCH_VARIABLE=..",
        ),
        (
            "run --host local --stdin /no/such -- true",
            "corra: NOT STARTED: --stdin /no/such: No such file or directory",
        ),
        (
            "run --host local --via carrier -- true",
            (
                "corra: NOT STARTED: --via: not fabric, openssh, chaperone or chaperone@HOST: "
                "'carrier'"
            ),
        ),
        (
            "run --host local --ulimit files -- true",
            "corra: NOT STARTED: --ulimit: not NAME=VALUE: 'files' (say files=4096)",
        ),
        (
            "run --host local --ulimit file=1 -- true",
            (
                "corra: NOT STARTED: --ulimit: no such limit: 'file' (there are files, core, cpu, "
                "memory, nice, oom_score_adj, memory_max, cpu_quota)"
            ),
        ),
        (
            "run --host local --ulimit files=many -- true",
            "corra: NOT STARTED: --ulimit: files: not a whole number: 'many'",
        ),
        (
            "run --host local --ulimit nice=20 -- true",
            "corra: NOT STARTED: --ulimit: nice: not from -20 to 19: '20'",
        ),
        (
            "run --host local --keep-output 1K -- true",
            "corra: NOT STARTED: --keep-output: too little to keep of an output: 1K (64K or more)",
        ),
        (
            "run --host local --keep-output lots -- true",
            "corra: NOT STARTED: --keep-output: not a size: 'lots' (say 500M or 2G)",
        ),
        (
            "logs --bytes 7 x",
            "corra: NOT DONE: --bytes: not A:B: '7' (say 0:4096, 1M:2M, or 4096: to the end)",
        ),
        ("logs --bytes 7:5 x", "corra: NOT DONE: --bytes: it ends before it begins: '7:5'"),
        ("logs --bytes=-7: x", "corra: NOT DONE: --bytes: not a size: '-7' (say 500M or 2G)"),
        (
            "logs --bytes 1: -n 5 x",
            "corra: NOT DONE: --bytes and --tail, --grep, --since or --until exclude each other",
        ),
        ("run --host local --id UPPER -- true", "corra: NOT STARTED: not an id: 'UPPER'"),
        ("attach a b", "corra: NOT DONE: one id at a time: a b"),
        ("wait", "corra: NOT DONE: wait needs an id"),
        ("kill -s HUP -9 x", "corra: NOT KILLED: -s and -9 exclude each other"),
        ("kill -s NOPE x", "corra: NOT KILLED: -s: not a signal: 'NOPE'"),
        ("kill -a", "corra: NOT KILLED: -a needs --host"),
        ("ps", "corra: NOT DONE: no host, and no history of any:  corra ps --host HOST"),
    ],
)
def test_misuse_is_a_line_with_its_hints_and_code_2(cli: Cli, typed: str, line: str) -> None:
    done = cli(*(word.strip("\t") for word in typed.split(" ")))
    assert (done.returncode, done.stdout) == (2, b"")
    assert all(hint.startswith("       ") for hint in lines(done.stderr)[1:])
    assert lines(done.stderr)[0].startswith(line)


def test_what_is_piped_in_is_sent_and_let_go_of(cli: Cli) -> None:
    """If corra left its temporary file to the garbage collector, Python would print a warning
    between the operator's lines.
    """
    done = cli(
        "run",
        *LOCAL,
        "--stdin",
        "-",
        "--",
        "cat",
        stdin=b"piped",
        env={"PYTHONWARNINGS": "always::ResourceWarning"},
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"piped", b"")


def test_the_same_id_with_other_bytes_for_stdin_is_a_conflict(cli: Cli) -> None:
    typed = ("run", *LOCAL, "--id", "load-1", "--stdin", "-", "--", "cat")
    assert [cli(*typed, stdin=b"one").returncode for _ in range(2)] == [0, 0]
    other = cli(*typed, stdin=b"two")
    assert other.returncode == 125 and b"already names another command" in other.stderr


def test_a_host_nobody_knows_is_125(cli: Cli) -> None:
    done = cli("run", "--host", "no-such-host.invalid", "--", "true")
    assert done.returncode == 125
    assert lines(done.stderr)[0].startswith("corra: no-such-host.invalid: NOT STARTED: ")
    assert b"Traceback" not in done.stderr


def test_the_same_id_with_another_command_is_a_conflict(cli: Cli) -> None:
    assert cli("run", *LOCAL, "--id", "pay-1", "--", "echo", "once").stdout == b"once\n"
    again = cli("run", *LOCAL, "--id", "pay-1", "--", "echo", "once")
    assert (again.returncode, again.stdout) == (0, b"once\n")
    other = cli("run", *LOCAL, "--id", "pay-1", "--", "echo", "twice")
    assert (other.returncode, lines(other.stderr)[0]) == (
        125,
        "corra: pay-1 on local: NOT STARTED: this id already names another command",
    )


def test_a_file_on_stdin_is_not_passed_over_in_silence(cli: Cli) -> None:
    (cli.home / "dump.sql").write_bytes(b"one\ntwo\n")
    with open(cli.home / "dump.sql", "rb") as file:
        process = cli.popen("run", *LOCAL, "--", "cat", stdin=file)
        err = process.communicate(timeout=60)[1]
        assert (process.returncode, lines(err)[0]) == (
            2,
            "corra: NOT STARTED: stdin is a file, but the program would read /dev/null",
        )
    for flags, out in (
        (("--stdin", "-"), b"one\ntwo\n"),
        (("--stdin", "none"), b""),
        (("--stdin", str(cli.home / "dump.sql")), b"one\ntwo\n"),
    ):
        with open(cli.home / "dump.sql", "rb") as file:
            process = cli.popen("run", *LOCAL, *flags, "--", "cat", stdin=file)
            assert process.communicate(timeout=60)[0] == out
            assert process.returncode == 0


def test_a_loop_that_reads_hosts_from_a_file_goes_on_working(cli: Cli) -> None:
    (cli.home / "hosts").write_text("local\nlocal\n")
    typed = f"while read h; do {shlex.join(cli.program)} run --host $h -- echo $h; done < hosts"
    done = subprocess.run(
        ["sh", "-c", typed],
        cwd=cli.home,
        env=cli.environment(),
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, b"local\nlocal\n")


def test_environment_and_secrets_reach_the_program_and_secrets_no_disk(cli: Cli) -> None:
    (cli.home / "env").write_text("# ours\nA=1\n\nB=two words\n")
    (cli.home / "token").write_text("s3cr3t-word\n")
    flags = (
        "--env-file",
        "env",
        "-E",
        "B=over",
        "-E",
        "MINE",
        "--secret",
        "TOKEN=token",
        "--secret",
        "OTHER",
    )
    done = cli(
        "run",
        *LOCAL,
        *flags,
        "--",
        "sh",
        "-c",
        "echo $A $B $MINE $TOKEN $OTHER",
        env={"MINE": "m", "OTHER": "h1dd3n-word"},
    )
    assert done.stdout == b"1 over m s3cr3t-word h1dd3n-word\n"
    kept = [
        path
        for path in cli.home.rglob("*")
        if path.is_file()
        and path.name not in ("token", "stdout")
        and b"3n-word" in path.read_bytes()
    ]
    assert kept == []


def test_dry_says_what_would_be_done_and_does_nothing(cli: Cli) -> None:
    done = cli("-R", "run", "--host", "no-such-host.invalid", "--", "touch", "made it")
    assert (done.returncode, lines(done.stderr)) == (
        0,
        ["corra: no-such-host.invalid: would start: touch 'made it'"],
    )


def test_quiet_leaves_bad_news(cli: Cli) -> None:
    done = cli("run", "-q", *LOCAL, "--", "false")
    assert done.returncode == 1
    assert "FAILED: exit 1" in lines(done.stderr)[0]


def test_hide_keeps_a_stream_back(cli: Cli) -> None:
    done = cli("run", "--hide", "out", *LOCAL, "--", "sh", "-c", "echo out; echo err >&2")
    assert (done.stdout, done.stderr) == (b"", b"err\n")


# -- attach, logs


def test_attach_to_a_pipe_begins_with_the_first_byte_and_exits_as_the_program(cli: Cli) -> None:
    cli("run", *LOCAL, "--name", "old", "--", "sh", "-c", "seq 500; exit 3")
    done = cli("attach", "old")
    assert (done.returncode, done.stdout.split()) == (3, [str(n).encode() for n in range(1, 501)])
    assert "FAILED: exit 3" in lines(done.stderr)[0]


def test_attach_shows_the_last_lines_where_asked(cli: Cli) -> None:
    cli("run", *LOCAL, "--name", "old", "--", "seq", "500")
    assert cli("attach", "-n", "3", "old").stdout == b"498\n499\n500\n"
    assert cli("attach", "-n", "0", "old").stdout == b""
    assert cli("logs", "-n", "2", "old").stdout == b"499\n500\n"


def test_attach_with_a_timeout_leaves_and_says_so(cli: Cli, started: Callable[..., str]) -> None:
    prog_id = started("sleep", "60")
    done = cli("attach", "-T", "2s", prog_id)
    assert done.returncode == 122
    assert f"{ids.short(prog_id)} on local: STILL RUNNING: " in lines(done.stderr)[0]


def test_without_an_id_the_looking_verbs_take_the_newest(cli: Cli) -> None:
    cli("run", *LOCAL, "--", "echo", "first")
    cli("run", *LOCAL, "--", "echo", "second")
    assert cli("logs").stdout == b"second\n"
    assert cli("attach").stdout == b"second\n"
    assert b"echo second" in cli("status").stdout


def test_logs_shows_what_there_is_and_leaves(cli: Cli, started: Callable[..., str]) -> None:
    prog_id = started("sh", "-c", "echo so far; exec sleep 60")
    seen = b""
    for _ in range(100):
        if seen := cli("logs", prog_id).stdout:
            break
    assert seen == b"so far\n"


def test_logs_exits_0_whatever_became_of_the_program(cli: Cli) -> None:
    cli("run", *LOCAL, "--", "sh", "-c", "echo x; exit 9")
    for flags in ((), ("-f",)):
        done = cli("logs", *flags)
        assert (done.returncode, done.stdout, done.stderr) == (0, b"x\n", b"")


def test_logs_of_a_run_that_goes_on_come_as_they_are_written_to_its_end_and_later_in_that_order(
    cli: Cli, started: Callable[..., str], tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    says = (
        f"while read w; do case $w in o*) echo $w;; e*) echo $w >&2;; *) exit 4; esac; done < "
        f"{gate}"
    )
    prog_id = started("sh", "-c", says)
    words = ["o1", "e1", "e2", "o2", "o3", "e3"]
    both: dict[str, Any] = {
        "stdin": subprocess.DEVNULL,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.STDOUT,
    }
    with (
        gate.open("w", buffering=1) as tell,
        cli.popen("logs", "-f", "--timestamps", prog_id, **both) as following,
    ):
        assert following.stdout
        try:
            for word in words:
                tell.write(f"{word}\n")
                when, _, shown = following.stdout.readline().decode().partition(" ")
                assert shown == f"{word}\n" and datetime.fromisoformat(when).tzinfo is not None
            tell.write("quit\n")
            assert following.stdout.read() == b"" and following.wait(60) == 0
        finally:
            following.kill()
    with cli.popen("logs", prog_id, **both) as later:
        assert later.stdout and later.stdout.read().decode().split() == words


def test_streams_can_be_told_apart_and_dated(cli: Cli) -> None:
    cli("run", *LOCAL, "--", "sh", "-c", "echo out; echo err >&2")
    assert (cli("logs", "--stream", "stdout").stdout, cli("logs", "--stream", "stdout").stderr) == (
        b"out\n",
        b"",
    )
    assert (cli("logs", "--stream", "stderr").stdout, cli("logs", "--stream", "stderr").stderr) == (
        b"",
        b"err\n",
    )
    stamped = cli("logs", "-t", "--stream", "stdout").stdout.decode()
    assert stamped.endswith(" out\n")
    assert datetime.fromisoformat(stamped.split()[0]).tzinfo is not None


def test_logs_gives_any_bytes_of_a_stream(cli: Cli) -> None:
    cli("run", *LOCAL, "--", "sh", "-c", "seq 1000; echo 0123456789 >&2")
    whole = "".join(f"{number}\n" for number in range(1, 1001)).encode()
    for text, begin, end in (
        ("0:10", 0, 10),
        (":10", 0, 10),
        ("5:5", 5, 5),
        ("1K:2K", 1024, 2048),
        ("3000:", 3000, None),
        ("9M:", 9 << 20, None),
    ):
        done = cli("logs", "--bytes", text)
        assert (done.returncode, done.stdout, done.stderr) == (0, whole[begin:end], b"")
    assert cli("logs", "--bytes", "2:4", "--stream", "stderr").stderr == b"23"
    cli("run", *LOCAL, "--merge", "--", "sh", "-c", "echo out; echo err >&2")
    assert cli("logs", "--bytes", "2:6").stdout == b"t\ner"


def test_logs_of_bytes_still_to_come_waits_for_them_and_for_no_more(
    cli: Cli, started: Callable[..., str]
) -> None:
    prog_id = started("sh", "-c", "echo one; sleep 0.2; echo two; exec sleep 60")
    assert cli("logs", "-f", "--bytes", "2:6", prog_id).stdout == b"e\ntw"


def test_logs_of_what_came_after_the_end(cli: Cli, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    prog_id = (
        cli(
            "run",
            *LOCAL,
            "-d",
            "--",
            "sh",
            "-c",
            f"echo in time; (read a < {gate}; echo late) & exit 0",
        )
        .stdout.decode()
        .strip()
    )
    cli("wait", prog_id)
    gate.write_text("\n")
    eventually(
        lambda: json.loads(cli("status", "--json", prog_id).stdout)["streams"]["stdout"]["late"]
    )
    assert cli("logs", prog_id).stdout == b"in time\n"
    assert cli("logs", "--late", prog_id).stdout == b"in time\nlate\n"
    assert cli("logs", "--late", "--bytes", "8:", prog_id).stdout == b"late\n"


def test_a_merged_run_is_one_stream_whichever_is_asked_for(cli: Cli) -> None:
    cli(
        "run",
        *LOCAL,
        "--merge",
        "--",
        "sh",
        "-c",
        "for i in 1 2 3; do echo o$i; echo e$i >&2; done",
    )
    for flags in ((), ("--stream", "both"), ("--stream", "stdout"), ("--stream", "stderr")):
        assert (cli("logs", *flags).stdout, cli("logs", *flags).stderr) == (
            b"o1\ne1\no2\ne2\no3\ne3\n",
            b"",
        )
    stamped = cli("logs", "-t").stdout.decode().splitlines()
    assert [line.split()[1] for line in stamped] == ["o1", "e1", "o2", "e2", "o3", "e3"]


def test_a_bounded_run_shows_what_it_has_and_says_what_is_gone(cli: Cli) -> None:
    cli("run", *LOCAL, "-q", "--keep-output", "64K", "--", "seq", "100000")
    whole = "".join(f"{number}\n" for number in range(1, 100001)).encode()
    done = cli("logs")
    gone = len(whole) - len(done.stdout)
    assert gone > 0 and done.stdout == whole[gone:]
    assert re.fullmatch(
        rf"corra: \w+ on local: stdout from byte 0 to {gone} is gone: [0-9]+ kB\n",
        done.stderr.decode(),
    )
    assert "dropped" in cli("status").stdout.decode()
    (gap,) = [each for each in objects(cli("logs", "--json").stdout) if each.get("event") == "gap"]
    assert (gap["stream"], gap["start"], gap["end"]) == ("stdout", 0, gone)
    assert cli("logs", "--bytes", f"10:{gone + 7}").stdout == whole[gone : gone + 7]
    assert cli("logs", "--tail", "2").stdout == b"99999\n100000\n"


def test_limits_hold_and_one_that_cant_is_named(cli: Cli) -> None:
    flags = (
        "--ulimit",
        "files=99",
        "--ulimit",
        "Core=0:1M",
        "--ulimit",
        "nice=19",
        "--ulimit",
        "cpu=1m",
        "--ulimit",
        "oom-score-adj=900",
    )
    done = cli(
        "run",
        *LOCAL,
        *flags,
        "--",
        "sh",
        "-c",
        "ulimit -n; ulimit -St; nice; cat /proc/self/oom_score_adj",
    )
    assert done.stdout.split() == [b"99", b"60", b"19", b"900"]
    done = cli("run", *LOCAL, "--ulimit", "files=99999999999", "--", "true")
    assert done.returncode == 125
    assert re.search(
        r"local: NOT STARTED: limit files=99999999999: Operation not permitted \(at most \w+ "
        r"here\) \(EPERM\)",
        done.stderr.decode(),
    )


# -- kill


def test_kill_ends_a_run_and_says_so(cli: Cli, started: Callable[..., str]) -> None:
    prog_id = started("sleep", "60", flags=("--name", "nap"))
    done = cli("kill", "nap")
    assert (done.returncode, done.stdout) == (0, b"")
    label = f"corra: nap ({ids.short(prog_id)}) on local: "
    assert lines(done.stderr)[0] == f"{label}TERM sent; KILL in 10 s if still there"
    assert lines(done.stderr)[1].startswith(f"{label}KILLED: TERM from ")
    again = cli("kill", "nap")
    assert (again.returncode, "had ended already: KILLED" in lines(again.stderr)[0]) == (0, True)


def test_a_program_that_ignores_term_is_killed_after_its_grace(
    cli: Cli, started: Callable[..., str]
) -> None:
    prog_id = started("sh", "-c", "trap '' TERM; while :; do sleep 60; done")
    done = cli("kill", "--grace", "0.1s", prog_id)
    assert done.returncode == 0
    assert re.fullmatch(
        r"corra: \w{6} on local: KILLED: TERM from \S+@\S+; ended by KILL after [\d.]+ s",
        lines(done.stderr)[-1],
    )


def test_kill_9_does_not_wait(cli: Cli, started: Callable[..., str]) -> None:
    prog_id = started("sh", "-c", "trap '' TERM; while :; do sleep 60; done")
    done = cli("kill", "-9", prog_id)
    assert done.returncode == 0
    assert "KILL sent to " in lines(done.stderr)[0]


def test_kill_uses_the_stop_signal_and_the_grace_that_run_was_given(
    cli: Cli, started: Callable[..., str]
) -> None:
    script = "trap 'exit 3' INT; trap '' TERM; echo ready; while :; do sleep 0.1; done"
    prog_id = started("sh", "-c", script, flags=("--stop-signal", "INT", "--grace", "25s"))
    eventually(lambda: b"ready" in cli("logs", prog_id).stdout)
    done = cli("kill", prog_id)
    # Between two sleeps the shell is the only process.
    assert (
        re.search(
            rb"INT sent; KILL in 25 s if still there( \(2 processes\))?\n",
            done.stderr,
        )
        and b"FAILED: exit 3" in done.stderr
    )


def test_a_signal_of_choice_is_all_that_is_sent(cli: Cli, started: Callable[..., str]) -> None:
    ready = cli.home / "ready"
    prog_id = started(
        "sh", "-c", f"trap 'echo got usr1; exit 5' USR1; : > {ready}; while :; do sleep 0.05; done"
    )
    follow = cli.popen("attach", prog_id)
    while not ready.exists():
        pass
    done = cli("kill", "-s", "USR1", prog_id)
    assert (done.returncode, lines(done.stderr)) == (
        0,
        [f"corra: {ids.short(prog_id)} on local: USR1 sent"],
    )
    out, _ = follow.communicate(timeout=30)
    assert (follow.returncode, out) == (5, b"got usr1\n")


def test_kill_without_an_id_kills_nothing_and_says_what_there_is(
    cli: Cli, started: Callable[..., str]
) -> None:
    prog_id = started("sleep", "60", flags=("--name", "nap"))
    short = ids.short(prog_id)
    done = cli("kill", *LOCAL)
    assert done.returncode == 2
    assert lines(done.stderr) == [f"corra: NOT KILLED: say which: {short} (nap) runs on local"]
    done = cli("kill")
    assert done.returncode == 2
    begin = rf"corra: NOT KILLED: say which; ran when last seen: {short} \(nap on local, \d+"
    assert re.match(begin, lines(done.stderr)[0])
    assert cli("status", "--exit-code", "nap").returncode == 122


def test_a_kill_without_an_id_names_none_that_a_look_has_seen_ended(
    cli: Cli, started: Callable[..., str]
) -> None:
    short = started("sh", "-c", "until [ -e $HOME/go ]; do sleep 0.02; done")
    (cli.home / "go").touch()
    eventually(lambda: not cli("ps", *LOCAL, "-q", "--state", "running").stdout)
    done = cli("kill")
    assert lines(done.stderr) == [
        "corra: NOT KILLED: say which: nothing ran when this machine last looked",
        "       look: corra ps",
    ], short


def test_a_name_that_two_open_runs_of_one_host_have_is_ambiguous_and_a_second_start_says_so(
    cli: Cli, started: Callable[..., str]
) -> None:
    first = ids.short(started("sleep", "60", flags=("--name", "nap")))
    done = cli("run", "-d", *LOCAL, "--name", "nap", "--", "sleep", "60")
    second = ids.short(done.stdout.decode().strip())
    assert lines(done.stderr) == [
        f"corra: local: nap runs there already: {first};  kill and attach need an id"
    ]
    for words in (("kill", "nap"), ("kill", "-y", "nap"), ("status", "nap"), ("send", "nap", "x")):
        done = cli(*words)
        assert done.returncode == 125
        assert lines(done.stderr)[0] == "corra: nap on local: AMBIGUOUS: 2 runs, nothing done"
    assert cli("kill", "-9", first).returncode == 0
    assert cli("kill", "-9", "nap").returncode == 0
    assert cli("status", "--exit-code", second).returncode == 137
    done = cli("run", *LOCAL, "--name", "nap", "--", "true")
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("typed", ["-15", "-TERM", "-SIGTERM", "-s15"])
def test_a_signal_is_typed_as_for_kill(cli: Cli, started: Callable[..., str], typed: str) -> None:
    started("sh", "-c", "trap 'exit 9' TERM; echo ready; sleep 60 & wait", flags=("--name", "it"))
    eventually(lambda: cli("logs", "it").stdout)
    done = cli("kill", typed, "it")
    assert (done.returncode, done.stderr.decode().rpartition(": ")[2]) == (0, "TERM sent\n")
    assert cli("wait", "it").returncode == 9


def test_answers_come_in_the_order_that_was_typed(cli: Cli) -> None:
    shorts = [
        cli("run", "-d", *LOCAL, "--", "true").stdout.decode().strip().rpartition("-")[2][:6]
        for _ in range(4)
    ]
    for order in (shorts, shorts[::-1]):
        done = cli("status", *order[:2], "none-such", *order[2:])
        heads = [each.split()[0] for each in lines(done.stdout) if " on local as " in each]
        assert (done.returncode, heads) == (125, order)


def test_what_only_a_shell_knows_is_said_with_the_line_that_works(
    cli: Cli, terminal: Callable[..., Terminal]
) -> None:
    for argv, line in (
        (["cd", "/x", "&&", "ls"], "sh -c 'cd /x && ls'"),
        (["echo hi"], "sh -c 'echo hi'"),
    ):
        shown = terminal("run", *LOCAL, "--", *argv)
        assert f"not found (ENOENT)\r\n       no shell here:  {line}\r\n" in shown.until("shell")
        assert shown.end() == 127


def test_a_pipe_that_the_program_doesnt_read_is_said(cli: Cli) -> None:
    said = b"corra: local: nothing reads what is piped in here: "
    done = cli("run", *LOCAL, "--", "true", stdin=b"data")
    assert (done.returncode, done.stderr[: len(said)]) == (0, said)
    for words, data in ((("--stdin", "none"), b"data"), ((), b""), (("--stdin", "-"), b"data")):
        done = cli("run", *LOCAL, *words, "--", "true", stdin=data)
        assert (done.returncode, done.stderr) == (0, b"")


def test_what_comes_through_a_pipe_while_the_program_runs_is_said_at_its_end(cli: Cli) -> None:
    with cli.popen("run", *LOCAL, "--", "sh", "-c", WAITS, stdin=subprocess.PIPE) as process:
        assert process.stdin and process.stdout
        assert process.stdout.readline() == b"ready\n"
        process.stdin.write(b"late")
        process.stdin.flush()
        (cli.home / "go").touch()
        err = process.stderr.read()  # type: ignore[union-attr]
        assert b"nothing reads what is piped in here" in err
    assert process.returncode == 0


def test_processes_that_a_program_leaves_are_said_and_kill_ends_them(cli: Cli) -> None:
    done = cli("run", *LOCAL, "--name", "left", "--", "sh", "-c", "sleep 61 & exit 0")
    assert done.returncode == 0
    assert re.fullmatch(
        r"corra: left \(\w{6}\) on local: 1 process is left: \d+ (sleep|sh);"
        r"  end them: corra kill left\n",
        done.stderr.decode(),
    )
    leftover = r"  leftover 1 process is left: \d+ (sleep|sh)"
    assert re.search(leftover, cli("status", "left").stdout.decode())
    assert cli("kill", "left").returncode == 0
    assert "leftover" not in cli("status", "left").stdout.decode()


def test_the_history_is_listed_and_forgotten_by_name_or_host(cli: Cli) -> None:
    for name in ("a", "a", "b"):
        cli("run", *LOCAL, "--name", name, "--", "true")
    assert lines(cli("history").stdout)[1].split()[:4] == ["local", "-", "3", "0"]
    done = cli("history", "forget", "a", "none-such")
    assert done.returncode == 125
    assert lines(done.stderr) == [
        "corra: none-such: NOT FOUND in this machine's history",
    ]
    assert lines(cli("history", "forget", "-R", "a").stderr) == ["corra: a: would forget 2 runs"]
    assert lines(cli("history", "forget", "a").stderr) == ["corra: a: forgot 2 runs"]
    assert b"NOT FOUND in this machine's history" in cli("status", "a").stderr
    assert lines(cli("history", "forget", "local").stderr) == ["corra: local: forgot 1 run"]
    assert cli("history").stdout == b""
    assert cli("history", "forget").returncode == cli("history", "drop").returncode == 2
    assert b" b " in cli("ps", "-a", *LOCAL).stdout  # the host still has the run


def test_kill_of_several_finds_all_before_it_touches_any(
    cli: Cli, started: Callable[..., str]
) -> None:
    started("sleep", "60", flags=("--name", "a"))
    started("sleep", "60", flags=("--name", "b"))
    done = cli("kill", "a", "zz9")
    assert done.returncode == 125
    assert "zz9: NOT FOUND" in lines(done.stderr)[0]
    assert cli("status", "--exit-code", "a").returncode == 122
    assert cli("kill", "a", "b").returncode == 0
    assert cli("status", "--exit-code", "b").returncode == 143


def test_kill_all_of_a_host(cli: Cli, started: Callable[..., str]) -> None:
    started("sleep", "60", flags=("--name", "a"))
    started("sleep", "60", flags=("--name", "b"))
    assert cli("kill", "-a", *LOCAL).returncode == 0
    assert lines(cli("ps", "--state", "running", *LOCAL).stdout) == []


# -- ps, status, wait


def test_ps_shows_what_runs_and_what_went_wrong(cli: Cli, started: Callable[..., str]) -> None:
    cli("run", *LOCAL, "--name", "well", "--", "true")
    cli("run", *LOCAL, "--name", "bad", "--", "false")
    started("sleep", "60", flags=("--name", "nap"))
    names = [line.split()[1] for line in lines(cli("ps").stdout)]
    assert names == ["NAME", "nap", "bad"]
    assert [line.split()[1] for line in lines(cli("ps", "-a").stdout)] == [
        "NAME",
        "nap",
        "bad",
        "well",
    ]
    assert [line.split()[1] for line in lines(cli("ps", "--state", "failed").stdout)] == [
        "NAME",
        "bad",
    ]
    assert [line.split()[1] for line in lines(cli("ps", "-a", "--grep", "well").stdout)] == [
        "NAME",
        "well",
    ]
    assert lines(cli("ps", "-q").stdout)[0].startswith("20")


def on_terminal(cli: Cli, *words: str) -> tuple[int, list[str]]:
    """Return the exit code and the lines on a terminal of 80 columns."""
    return console.one(functools.partial(cli.popen, *words))


@pytest.mark.parametrize("how", [("-a",), ("--state", "done"), ()])
def test_ps_since_holds_whatever_else_is_asked_for(
    cli: Cli, started: Callable[..., str], how: tuple[str, ...]
) -> None:
    cli("run", *LOCAL, "--name", "well", "--", "true")
    nap = started("sleep", "60")
    there = cli("ps", "-q", *how, "--since", "1ms").stdout.decode().split()
    assert there == ([] if "--state" in how else [nap])
    there = cli("ps", "-q", *how, "--since", "1h").stdout.decode().split()
    assert len(there) == (2 if "-a" in how else 1)


def test_ps_says_how_to_see_what_it_leaves_out(cli: Cli) -> None:
    cli("run", *LOCAL, "--name", "well", "--", "true")
    for how, said in (
        ((), "1 more ended well in the last 24 h: add -a"),
        (("--since", "1h"), "1 more ended well in the last 1 h: add -a"),
        (("--since", "1ms"), "1 more ended before that: say a longer --since"),
        (("-a", "--since", "1ms"), "1 more ended before that: say a longer --since"),
        (("--state", "FAILED"), "no runs there"),
    ):
        _, shown = on_terminal(cli, "ps", *how)
        assert shown == [f"corra: {said}"]


def test_logs_that_show_nothing_say_why_on_a_terminal(
    cli: Cli, started: Callable[..., str]
) -> None:
    cli("run", *LOCAL, "--name", "well", "--", "true")
    cli("run", *LOCAL, "--name", "never", "--", "no-such-program")
    started("sleep", "60", flags=("--name", "nap"))
    for words, why in (
        (("well",), "it wrote nothing"),
        (("--grep", "x", "well"), "it wrote nothing of that kind"),
        (("never",), "it was not started, so it wrote nothing"),
        (("nap",), "it has written nothing yet"),
    ):
        code, (line,) = on_terminal(cli, "logs", *words)
        assert (code, line.partition(" on local: ")[2]) == (0, why)
    assert cli("logs", "well").stderr == b""


def test_what_was_never_started_was_asked_for(cli: Cli) -> None:
    cli("run", *LOCAL, "--name", "never", "--", "no-such-program")
    shown = cli("status", "never").stdout.decode()
    assert re.search(r"^  asked    20", shown, re.MULTILINE) and "started" not in shown


@pytest.mark.parametrize("verb", ["wait", "again", "send", "deliver"])
def test_a_verb_that_needs_an_id_says_where_to_look_for_one(cli: Cli, verb: str) -> None:
    done = cli(verb)
    assert done.returncode == 2
    assert done.stderr.decode().partition(": ")[2].partition(": ")[2] == (
        f"{verb} needs an id;  look: corra ps\n"
    )


def test_a_long_list_is_folded_on_a_terminal_and_whole_in_a_pipe(
    cli: Cli, started: Callable[..., str]
) -> None:
    """More than a page of a host's list, and an open run that is older than all of them."""
    # 13,000 files take 30 s on a disk that others write to.
    with tempfile.TemporaryDirectory(dir="/dev/shm") as memory:
        (cli.home / ".local").mkdir()
        (cli.home / ".local" / "state").symlink_to(memory)
        _list_is_folded(cli, started)


def _list_is_folded(cli: Cli, started: Callable[..., str]) -> None:
    old = started("sleep", "60", flags=("--name", "nap"))
    root, count = cli.home / ".local/state/corra", 1100
    begin = time.time_ns() + long_ago.SECOND_NS
    made = [
        long_ago.ended(
            root,
            long_ago.id_at(begin + n * long_ago.SECOND_NS, n),
            at_ns=begin + n * long_ago.SECOND_NS,
            status=256,
            name=f"job{n % 2}",
        )
        for n in range(count)
    ]
    for words in (("--json",), ()):
        shown = lines(cli("ps", *LOCAL, *words).stdout)
        assert len(shown) == count + 1 + (words == ()), words
        assert ids.tail(old)[:6] in shown[words == ()]
    assert lines(cli("ps", *LOCAL, "-q").stdout) == [old, *reversed(made)]
    half = lines(cli("ps", *LOCAL, "-a", "--format", "{id}", "--grep", "job1").stdout)
    assert half == [ids.short(each) for each in reversed(made[1::2])]
    code, shown = on_terminal(cli, "ps", *LOCAL)
    assert (code, len(shown)) == (0, 1 + 100 + 1)
    assert "nap" in shown[1] and ids.tail(made[-1])[:6] in shown[2]
    assert shown[-1] == "corra: and 1,001 more: say --since or --grep, or  | less"
    assert cli("kill", "-9", old).returncode == 0


def test_ps_of_several_hosts_shows_what_it_can_and_says_who_is_missing(cli: Cli) -> None:
    cli("run", *LOCAL, "--name", "bad", "--", "false")
    done = cli("ps", "--host", "local,no-such-host.invalid")
    assert done.returncode == 125
    assert "bad" in lines(done.stdout)[1]
    assert lines(done.stderr)[0].startswith("corra: no-such-host.invalid: ")


def test_status_says_what_a_person_asks_next_and_exits_0(cli: Cli) -> None:
    cli("run", *LOCAL, "--name", "bad", "--", "sh", "-c", "echo x; exit 4")
    done = cli("status", "bad")
    assert done.returncode == 0
    text = done.stdout.decode()
    assert ") on local as " in text
    assert "FAILED: exit 4 after " in text
    assert "stdout 2 B" in text
    assert cli("status", "--exit-code", "bad").returncode == 4


def test_wait_exits_as_the_program_did_and_of_several_as_the_worst(cli: Cli) -> None:
    for name, code in (("a", 3), ("b", 5), ("c", 0)):
        cli("run", "-d", *LOCAL, "--name", name, "--", "sh", "-c", f"exit {code}")
    assert cli("wait", "a").returncode == 3
    assert cli("wait", "c").returncode == 0
    done = cli("wait", "a", "b", "c")
    assert done.returncode == 5
    assert len(lines(done.stderr)) == 2


def test_wait_for_any_leaves_with_the_first(cli: Cli, started: Callable[..., str]) -> None:
    started("sleep", "60", flags=("--name", "long"))
    started("sh", "-c", "exit 6", flags=("--name", "short"))
    assert cli("wait", "--any", "long", "short").returncode == 6


def test_a_wait_is_over_when_its_time_is_though_nobody_lets_us_in(cli: Cli, sshd: Sshd) -> None:
    """Exit code 125 after 15 s is no answer to `wait -T 1s`. And the client doesn't report a run as
    running that it never saw start.
    """
    prog_id = cli("run", "-d", "--host", "h", "--", "sleep", "600").stdout.decode().strip()
    os.kill(sshd.pid, signal.SIGSTOP)  # the kernel accepts the connection, and sshd doesn't answer
    try:
        begun = time.monotonic()
        known, there, unknown = (
            cli(*words, "-T", "1s", ids.short(prog_id))
            for words in (("wait",), ("attach",), ("wait", "--host", "h"))
        )
        assert time.monotonic() - begun < 15
    finally:
        os.kill(sshd.pid, signal.SIGCONT)
        cli("kill", "-9", "-y", prog_id)
    for done in (known, there):
        assert done.returncode == 122, done.stderr
        assert lines(done.stderr)[0].startswith(
            f"corra: {ids.short(prog_id)} on h: STILL RUNNING: not seen to end in 1.0 s: "
        )
    assert unknown.returncode == 125 and lines(unknown.stderr)[0].startswith("corra: h: ")
    assert all(len(lines(done.stderr)) == 1 for done in (known, there, unknown))


def test_wait_gives_up_after_its_timeout(cli: Cli, started: Callable[..., str]) -> None:
    prog_id = started("sleep", "60")
    done = cli("wait", "-T", "2s", prog_id)
    assert done.returncode == 122
    assert "STILL RUNNING" in lines(done.stderr)[0]


# -- ids


def test_an_id_nobody_knows_says_how_to_look(cli: Cli) -> None:
    for quiet in ((), ("-q",)):
        done = cli("attach", *quiet, "k7m2qx")
        assert (done.returncode, lines(done.stderr)) == (
            125,
            [
                "corra: k7m2qx: NOT FOUND in this machine's history: say where it runs:",
                "       corra attach --host HOST k7m2qx       or look: corra ps --host HOST",
            ],
        )
    there = cli("attach", *LOCAL, "zz9")
    assert there.returncode == 125
    assert lines(there.stderr)[0].startswith("corra: zz9 on local: NOT FOUND among the 0 runs of ")


def test_attach_and_an_unasked_kill_are_one_exec_each(cli: Cli, sshd: Sshd) -> None:
    def commands(*words: str) -> int:
        before = sum("Starting session: command" in line for line in sshd.log)
        assert cli(*words).returncode == 0
        return sum("Starting session: command" in line for line in sshd.log) - before

    assert commands("run", "--host", "h", "--name", "short", "--", "true") == 1
    assert commands("attach", "--host", "h", "short") == 1
    assert commands("logs", "short") == 1
    assert commands("status", "short") == 1
    assert commands("wait", "short") == 1
    assert commands("kill", "-y", "--host", "h", "short") == 1


def test_with_a_host_no_local_memory_is_needed(cli: Cli) -> None:
    prog_id = cli("run", "-d", *LOCAL, "--name", "old", "--", "echo", "x").stdout.decode().strip()
    (cli.home / ".local" / "state" / "corra" / "history.sqlite3").unlink()
    assert cli("logs", ids.short(prog_id)).returncode == 125
    for text in (prog_id, "old", ids.short(prog_id), prog_id[-8:-4]):
        assert cli("attach", *LOCAL, text).stdout == b"x\n"


# -- json


def test_json_of_a_run_is_a_line_for_each_event(cli: Cli) -> None:
    done = cli("run", "--json", *LOCAL, "--", "sh", "-c", "printf out; exit 2")
    events = objects(done.stdout)
    assert (done.returncode, done.stderr) == (2, b"")
    assert {each["v"] for each in events} == {1}
    assert [each["event"] for each in events if each["event"] != "start"][-1] == "end"
    assert (
        base64.b64decode("".join(each["data"] for each in events if each["event"] == "output"))
        == b"out"
    )
    assert (events[-1]["exit_code"], events[-1]["state"]["return_code"]) == (2, 2)


def test_json_of_an_error_is_on_stdout_too(cli: Cli) -> None:
    done = cli("attach", "--json", "k7m2qx")
    (error,) = objects(done.stdout)
    assert (done.returncode, done.stderr) == (125, b"")
    assert (error["type"], error["kind"], error["exit_code"], error["started"]) == (
        "error",
        "not_found",
        125,
        "no",
    )


def test_json_of_the_looking_verbs_is_the_state(cli: Cli) -> None:
    cli("run", *LOCAL, "--name", "bad", "--", "false")
    for words in (("ps",), ("status", "bad"), ("wait", "bad"), ("kill", "bad")):
        (state,) = objects(cli(*words, "--json").stdout)
        assert (state["type"], state["name"], state["return_code"], state["host"]) == (
            "state",
            "bad",
            1,
            "local",
        )


# -- Nothing in the operator's way


def test_every_verb_has_help_with_an_example(cli: Cli) -> None:
    for verb in ns.tasks:
        done = cli(verb, "--help")
        assert done.returncode == 0
        assert all(len(line) <= 80 for line in lines(done.stdout))
        assert f"corra {verb}" in done.stdout.decode() or f"inv {verb}" in done.stdout.decode()
    assert lines(cli("--version").stdout)[0].startswith("corra ")


@pytest.mark.alone
def test_a_program_held_back_by_a_full_disk_is_said_to_be(cli: Cli, tmp_path: Path) -> None:
    if os.geteuid():
        pytest.skip("only root can mount a small disk")
    small = Mount(tmp_path / "small", "size=4m,mode=700")
    try:
        spool = ("--spool", str(small.at / "spool"))
        with cli.popen(
            "run",
            *LOCAL,
            *spool,
            "--name",
            "hog",
            "--",
            "cat",
            "/dev/zero",
            stdout=subprocess.DEVNULL,
        ) as watcher:
            assert watcher.stderr
            line = next(each for each in watcher.stderr if b"started" not in each)
            assert line.decode().endswith(" on local: HELD BACK: no room on the disk there\n")
            assert cli("kill", "-y", "hog").returncode == 0
            # Its last bytes may wait for room. Once there is some, the watcher gets them.
            subprocess.run(["mount", "-o", "remount,size=32m", str(small.at)], check=True)
            assert watcher.wait(60) == 143
    finally:
        small.close()


# -- gc


def test_gc_frees_output_when_told_to_and_says_what_it_would_do_when_asked(
    cli: Cli, started: Callable[..., str]
) -> None:
    cli("run", *LOCAL, "--name", "big", "--", "head", "-c", "5000000", "/dev/zero")
    started("sleep", "60", flags=("--name", "nap"))
    refused = cli("gc", "--older", "0s")
    assert (refused.returncode, refused.stderr) == (
        2,
        b"corra: NOT DONE: nobody here to say yes: add -y, or -R to see what would go\n",
    )
    dry = cli("gc", "-R", "--older", "0s")
    assert (dry.returncode, dry.stderr) == (
        0,
        b"corra: local: would free 5.0 MB: the output of 1 run\n",
    )
    assert len(cli("logs", "big").stdout) == 5_000_000
    assert (
        cli("gc", "-y", "--older", "0s").stderr
        == b"corra: local: freed 5.0 MB: the output of 1 run\n"
    )
    logs, status = cli("logs", "big"), cli("status", "big").stdout.decode()
    today = time.strftime("%Y-%m-%d")
    assert (logs.returncode, logs.stdout) == (0, b"")
    assert f"its stdout was removed on {today}: 5.0 MB" in logs.stderr.decode()
    assert "done: exit 0" in status and f"stderr 0 B, removed on {today}" in status
    assert "  spool" not in status
    listed = objects(cli("ps", *LOCAL, "-a", "--json").stdout)
    assert [each["name"] for each in listed if each["archived_time"]] == ["big"]
    assert cli("gc", "-y").stderr == b"corra: local: nothing to free\n"


def test_gc_of_one_run_and_never_of_one_that_runs(cli: Cli, started: Callable[..., str]) -> None:
    for name in ("one", "two"):
        cli("run", *LOCAL, "--name", name, "--", "head", "-c", "100000", "/dev/zero")
    full = started("sleep", "60", flags=("--name", "nap"))
    done = cli("gc", "-y", "one", "nap")
    assert (done.returncode, done.stderr.decode()) == (
        125,
        f"corra: nap ({ids.short(full)}) on local: NOT DONE: it is still running\n",
    )
    freed = objects(cli("gc", "-y", "--json", "one").stdout)[0]
    assert (freed["host"], freed["bytes"] >= 100000, len(freed["emptied"]), freed["dry"]) == (
        "local",
        True,
        1,
        False,
    )
    assert [len(cli("logs", name).stdout) for name in ("one", "two")] == [0, 100000]
    assert cli("gc", "-y", "two", "--older", "1h").returncode == 2
    assert cli("gc", "-y", "--max-size", "2X").stderr.startswith(
        b"corra: NOT DONE: --max-size: not a size: '2X' (say 500M or 2G)"
    )


def test_tasks_of_ones_own_beside_the_verbs(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "tasks.py").write_text(
        "from invoke import task\nfrom corra.tasks import attach, kill, run\nimport corra\n\n"
        "@task\ndef mine(c):\n"
        "    print(corra.run('local', ['echo', 'from a task'], hide=True).stdout.strip())\n"
    )
    inv = [sys.executable, str(Path(sys.executable).with_name("inv"))]

    def call(*typed: str) -> bytes:
        done = subprocess.run(
            [*inv, *typed],
            cwd=tmp_path,
            env=cli.environment(),
            capture_output=True,
            timeout=60,
            check=False,
        )
        return done.stdout

    assert call("mine") == b"from a task\n"
    assert call("run", *LOCAL, "--", "echo", "x") == b"x\n"
    assert b"mine" in call("--list")


def test_the_command_corra_starts_without_what_is_for_invokes_own_tests() -> None:
    code = (
        "import sys, corra.main; print([m for m in ('unittest', 'unittest.mock', 'asyncio', "
        "'yaml', 'fabric', 'rich') if m in sys.modules]); "
        "from unittest.mock import Mock; print(Mock(return_value=3)())"
    )
    said = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert said.stdout == "[]\n3\n"


@pytest.mark.parametrize("words", [("ps", *LOCAL), ("run", *LOCAL, "--", "true")])
def test_a_verb_on_this_machine_loads_neither_ssh_nor_yaml_nor_openssl(
    cli: Cli, words: tuple[str, ...]
) -> None:
    spared = (
        "fabric paramiko corra.transport.openssh corra.transport.ssh_config yaml asyncio unittest"
        " _hashlib random tempfile concurrent.futures difflib rich"
    )
    code = (
        "import atexit, sys; from corra.__main__ import main; atexit.register(lambda: "
        f"print([m for m in {spared.split()} if m in sys.modules], file=sys.stderr)); main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        cwd=cli.home,
        env={**cli.environment(), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr.splitlines()[-1]) == (0, "[]")


def test_what_a_verb_imports_is_compiled_once(cli: Cli) -> None:
    code = (
        "import atexit, sys; from corra.__main__ import main; atexit.register(lambda: "
        "print(sys.dont_write_bytecode, file=sys.stderr)); main()"
    )
    env = {**cli.environment(), "PYTHONPATH": str(ROOT)}
    for flag, said in (("", "False"), ("1", "True")):
        done = subprocess.run(
            [sys.executable, "-c", code, "ps", *LOCAL],
            cwd=cli.home,
            env={**env, "PYTHONDONTWRITEBYTECODE": flag},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert (done.returncode, done.stderr.splitlines()[-1]) == (0, said)


def test_listing_and_completing_import_neither_fabric_nor_rich(cli: Cli, tmp_path: Path) -> None:
    asked = (
        "import sys; sys.argv = ['inv', '--list']; import tasks; sys.exit(any(m in sys.modules "
        "for m in ('fabric', 'rich', 'corra.agent', 'corra.terminal.screen', 'corra.model.state')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", asked],
        cwd=ROOT,
        capture_output=True,
        timeout=60,
        check=False,
        env=cli.environment(),
    )
    assert done.returncode == 0


def test_a_reader_that_leaves_gets_what_it_wanted_and_the_program_goes_on(cli: Cli) -> None:
    typed = f"{shlex.join(cli.program)} run --name endless --host local -- yes | head -1; echo $?"
    done = subprocess.run(
        ["sh", "-c", typed],
        cwd=cli.home,
        env=cli.environment(),
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.stdout == b"y\n0\n"
    first, hint = lines(done.stderr)
    assert first.endswith("on local: STILL RUNNING: whoever read its output has gone")
    assert hint == "       watch: corra attach endless      stop: corra kill endless"
    assert cli("kill", "-9", "endless").returncode == 0


def test_help_whose_reader_has_gone_ends_without_a_traceback(cli: Cli) -> None:
    typed = f"{shlex.join(cli.program)} --help run | head -c 1; wait"
    for _ in range(3):
        done = subprocess.run(
            ["sh", "-c", typed],
            cwd=cli.home,
            env=cli.environment(),
            capture_output=True,
            timeout=60,
            check=False,
        )
        assert done.stderr == b""


def test_the_code_for_a_reader_that_left_is_141(cli: Cli) -> None:
    process = cli.popen("run", *LOCAL, "--name", "endless", "--", "yes")
    assert process.stdout
    process.stdout.read(10)
    process.stdout.close()
    assert process.wait(60) == 128 + signal.SIGPIPE
    assert process.stderr
    process.stderr.close()
    assert cli("kill", "-9", "endless").returncode == 0


# -- The history's hosts


def test_ps_shows_a_run_once_and_a_host_that_is_down_on_one_line_by_the_name_used_most(
    cli: Cli, sshd: Sshd
) -> None:
    me = pwd.getpwuid(os.getuid()).pw_name
    for host in ("h", f"{me}@h", "h"):
        assert cli("run", "--host", host, "--", "true").returncode == 0
    shown = [line.split()[2] for line in lines(cli("ps", "-a").stdout)[1:]]
    assert shown == ["h"] * 3
    sshd.add_host("other")
    assert cli("run", "--host", "other", "--", "true").returncode == 0
    shown = [line.split()[2] for line in lines(cli("ps", "-a").stdout)[1:]]
    assert shown == ["other", "h", "h", "h"]
    assert cli("history", "forget", "other").returncode == 0
    sshd.stop()
    done = cli("ps", "-a")
    (line,) = lines(done.stderr)
    assert (done.returncode, done.stdout) == (125, b"")
    assert line.startswith("corra: h: ") and "; last seen " in line and "running" not in line


def test_a_host_that_is_down_was_last_seen_as_the_last_look_saw_it(cli: Cli, sshd: Sshd) -> None:
    cli("run", "-d", "--host", "h", "--name", "nap", "--", "sleep", "60")
    cli("run", "-d", "--host", "h", "--", "sh", "-c", WAITS)
    (cli.home / "go").touch()
    eventually(lambda: len(cli("ps", "-q", "--state", "running").stdout.split()) == 1)
    sshd.stop()
    done = cli("ps")
    assert re.search(r"; last seen \d\d:\d\d with 1 running \(\w{6} nap\)$", done.stderr.decode())
    sshd.start()
    cli("kill", "-9", "nap")


def test_a_verb_that_reaches_no_host_says_what_became_of_its_order(cli: Cli, sshd: Sshd) -> None:
    cli("run", "-d", "--host", "h", "--name", "nap", "--", "sleep", "60")
    sshd.stop()
    refused = f"connection refused by 127.0.0.1 port {sshd.port}\n"
    for words, said in (
        (("kill", "nap"), "nap on h: NOT KILLED: "),
        (("kill", "-y", "nap"), "nap on h: NOT KILLED: "),
        (("again", "nap"), "h: NOT STARTED: "),
        (("send", "nap", "x"), "h: NOT SENT: "),
        (("deliver", "nap"), "h: NOT DELIVERED: "),
        (("status", "nap"), "h: "),
    ):
        done = cli(*words)
        assert (done.returncode, done.stderr.decode()) == (125, f"corra: {said}{refused}"), words
    sshd.start()
    assert cli("kill", "-9", "nap").returncode == 0


def test_a_run_that_reports_to_nobody_is_not_delivered_without_a_name(cli: Cli) -> None:
    cli("run", *LOCAL, "--name", "well", "--", "true")
    done = cli("deliver", "well")
    assert done.returncode == 125
    assert lines(done.stderr) == [
        "corra: well on local: NOT DELIVERED: it was started without a callback",
        "       say to which collector:  corra deliver --to NAME well",
    ]


def test_what_one_user_runs_is_never_said_of_another(cli: Cli, sshd: Sshd) -> None:
    cli("run", "-d", "--host", "h", "--name", "nap", "--", "sleep", "60")
    done = cli("ps", "--host", "h", "--as", "no-such-user")
    assert done.returncode == 125
    assert b"last seen" not in done.stderr and b"nap" not in done.stderr
    cli("kill", "-9", "nap")


def test_a_name_on_two_hosts_is_said_with_how_old_that_is(cli: Cli, sshd: Sshd) -> None:
    places = (("--host", "h"), (*LOCAL, "--spool", str(cli.home / "spool")))
    for place in places:
        cli("run", "-d", *place, "--name", "nap", "--", "sleep", "60")
    done = cli("status", "nap")
    assert done.returncode == 125
    assert lines(done.stderr)[0] == "corra: nap: AMBIGUOUS: 2 runs, nothing done"
    assert len(re.findall(rb"  running, seen [\d.]+ s ago +sleep 60", done.stderr)) == 2
    for place in places:
        assert cli("kill", "-9", *place, "nap").returncode == 0
