"""Hosts that have never worked: through a real sshd, their login files read the bytes meant for the
agent.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from conftest import Cli

import corra
from corra.errors import NotStarted
from corra.model.host import Host
from corra.remote.login_files import login_fault
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
    (home / ".bashrc").write_text(f"{line}\n")
    begun = time.monotonic()
    with pytest.raises(NotStarted) as caught:
        corra.start("h", ["touch", str(home / "ran")], via=via)
    assert caught.value.why == READ and caught.value.code == 125
    assert time.monotonic() - begun < 40
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


def test_a_login_that_prints_without_end_is_named(sshd: Sshd, home: Path) -> None:
    (home / ".bashrc").write_text("yes noise\n")
    with pytest.raises(corra.MaybeStarted, match="a login file prints without end") as caught:
        corra.start("h", ["true"])
    assert "noise" in caught.value.why


@pytest.mark.parametrize("times", [1, 2])
def test_term_ends_a_run_that_nobody_confirms(sshd: Sshd, home: Path, cli: Cli, times: int) -> None:
    """The first TERM may come in the middle of a start, so it waits a moment for that start."""
    (home / ".bashrc").write_text(f"touch {home / 'reached'}; cat >/dev/null\n")
    run = cli.popen("run", "--host", "h", "--", "true")
    wait_for((home / "reached").exists)
    run.send_signal(signal.SIGTERM)
    assert run.stderr is not None
    said = b""
    while b"TERM waits 5 s for h to confirm the start" not in said:
        said += os.read(run.stderr.fileno(), 4096)
    begun = time.monotonic()
    if times == 2:
        run.send_signal(signal.SIGTERM)
    rest = run.communicate(timeout=14)[1]
    assert times == 2 or time.monotonic() - begun > 4
    assert run.returncode == -signal.SIGTERM
    assert b"MAYBE STARTED: you left before h confirmed it" in said + rest
