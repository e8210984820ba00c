"""Hosts that have never worked: through a real sshd, their login files read the bytes meant for the
agent.
"""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

import pytest
from conftest import Cli

import corra
from corra.errors import NotStarted
from corra.model.host import Host
from corra.remote.exchange import ANSWER_S
from corra.remote.login_files import SILENT_S, login_fault
from corra.runs import finding
from corra.transport.choose import choose_runner
from proxy import wait_for
from sshd import Sshd

READ = "a login file there reads what is meant for the agent (.bashrc?)"
# bash reads ~/.bashrc when sshd runs it.
READERS = ["read -r -t 3 x", "read -r x", "cat >/dev/null"]


@pytest.mark.parametrize("via", ["fabric", "openssh"])
@pytest.mark.parametrize("line", READERS)
def test_a_login_file_that_reads_stdin_is_told_from_one_that_prints(
    sshd: Sshd, home: Path, via: str, line: str
) -> None:
    runner = choose_runner(Host("h"), via=via)
    assert login_fault(runner) is None
    (home / ".bashrc").write_text("echo hello; printf 'motd\\0 no newline'; echo err >&2\n")
    assert login_fault(runner) is None
    (home / ".bashrc").write_text(f"echo hello; {line}\n")
    fault = login_fault(runner)
    assert fault is not None and fault.line == f"corra: h: NOT STARTED: {READ}"
    assert fault.hint[0].startswith("look: ssh h 'cat' < /etc/hostname")
    assert fault.hint[1] == "it prints, too: hello\\n"
    (home / ".bashrc").write_text("exit 3\n")
    assert login_fault(runner) is None
    runner.close()


@pytest.mark.parametrize(("via", "line"), [("fabric", READERS[0]), ("openssh", READERS[2])])
def test_a_start_on_a_host_whose_login_file_reads_stdin_is_not_started_and_says_so(
    sshd: Sshd, home: Path, via: str, line: str
) -> None:
    """It is said after 5 s, though a slow host has 15 s to answer."""
    (home / ".bashrc").write_text(f"{line}\n")
    begun = time.monotonic()
    with pytest.raises(NotStarted) as caught:
        corra.start("h", ["touch", str(home / "ran")], via=via)
    assert caught.value.why == READ and caught.value.code == 125
    assert time.monotonic() - begun < ANSWER_S
    (home / ".bashrc").unlink()
    corra.run("h", ["true"], via=via)
    assert not (home / "ran").exists()


def test_the_verbs_say_it_of_a_host_where_nothing_was_to_be_started(
    sshd: Sshd, home: Path, cli: Cli
) -> None:
    (home / ".bashrc").write_text("cat >/dev/null\n")
    listed = cli("ps", "--host", "h")
    assert listed.returncode == 125 and f"corra: h: {READ}".encode() in listed.stderr
    looked = cli("doctor", "--host", "h")
    assert looked.returncode == 1 and READ.encode() in looked.stdout, looked.stdout


HANG = "touch {reached}; until [ -e {go} ]; do sleep 0.05; done\n"


@pytest.mark.parametrize("via", ["fabric", "openssh"])
def test_a_slow_login_is_said_after_some_seconds_and_waited_for(
    sshd: Sshd, home: Path, cli: Cli, via: str
) -> None:
    go = home / "go"
    (home / ".bashrc").write_text(HANG.format(reached=home / "reached", go=go))
    run = cli.popen("run", "--via", via, "--host", "h", "--", "echo", "ran")
    assert run.stderr is not None
    said = b""
    while b"\n" not in said:
        said += os.read(run.stderr.fileno(), 4096)
    go.touch()
    out, rest = run.communicate(timeout=60)
    assert said == b"corra: h: no answer for 6 s (a login file may wait there); waiting on\n"
    assert (run.returncode, out, rest) == (0, b"ran\n", b"")


def test_a_look_at_several_hosts_asks_a_silent_one_once(
    sshd: Sshd, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finding, "ANSWER_S", 2.0)
    (home / ".bashrc").write_text(HANG.format(reached=home / "reached", go=home / "go"))
    (error,) = corra.ps(["h", "local"])
    assert isinstance(error, corra.CorraError)
    assert error.why == "h gave no answer in 2 s (a login file may wait there)"
    assert sum("Accepted publickey" in line for line in sshd.log) == 1


WAITING = ["again x", "doctor", "gc -y", "kill x", "kill -s HUP -y x", "logs x", "ps"]
WAITING += ["send x y", "status x", "wait x"]


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("words", WAITING)
def test_a_signal_ends_a_verb_at_once_while_a_login_waits(
    sshd: Sshd, home: Path, cli: Cli, words: str, name: str
) -> None:
    (home / ".bashrc").write_text(HANG.format(reached=home / "reached", go=home / "go"))
    with cli.popen(*words.split(), "--host", "h") as verb:
        wait_for((home / "reached").exists)
        begun = time.monotonic()
        verb.send_signal(getattr(signal, name))
        err = verb.communicate(timeout=60)[1]
        took = time.monotonic() - begun
    assert (verb.returncode, b"Traceback" in err) == (-getattr(signal, name), False)
    assert took < SILENT_S


def test_a_login_that_prints_without_end_is_named(sshd: Sshd, home: Path) -> None:
    (home / ".bashrc").write_text("yes noise\n")
    with pytest.raises(corra.MaybeStarted, match="a login file prints without end") as caught:
        corra.start("h", ["true"])
    assert "noise" in caught.value.why


@pytest.mark.parametrize("times", [1, 2])
def test_term_ends_a_run_that_nobody_confirms(sshd: Sshd, home: Path, cli: Cli, times: int) -> None:
    """The first TERM may come in the middle of a start, so it waits a moment for that start."""
    (home / ".bashrc").write_text(HANG.format(reached=home / "reached", go=home / "go"))
    run = cli.popen("run", "--host", "h", "--", "true")
    wait_for((home / "reached").exists)
    run.send_signal(signal.SIGTERM)
    assert run.stderr is not None
    said = b""
    while not re.search(rb"TERM waits [1-5] s for h to confirm the start", said):
        said += os.read(run.stderr.fileno(), 4096)
    if times == 2:
        run.send_signal(signal.SIGTERM)
    rest = run.communicate(timeout=14)[1]
    assert run.returncode == -signal.SIGTERM
    assert b"MAYBE STARTED: you left before h confirmed it" in said + rest


def test_term_ends_a_run_at_once_whose_start_nobody_has_confirmed_for_some_seconds(
    sshd: Sshd, home: Path, cli: Cli
) -> None:
    (home / ".bashrc").write_text(HANG.format(reached=home / "reached", go=home / "go"))
    run = cli.popen("run", "--host", "h", "--", "true")
    assert run.stderr is not None
    said = b""
    while b"no answer for 6 s" not in said:
        said += os.read(run.stderr.fileno(), 4096)
    run.send_signal(signal.SIGTERM)
    rest = run.communicate(timeout=60)[1]
    assert run.returncode == -signal.SIGTERM
    assert b"MAYBE STARTED: you left before h confirmed it" in rest and b"TERM waits" not in rest
