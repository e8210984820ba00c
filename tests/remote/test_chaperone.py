"""`--via chaperone` as an operator meets it: its messages, the run that a name means, and its
limits.

A real sshd, and no mode but ssh.
"""

from __future__ import annotations

import errno
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Cli

from agent_door import Door, Gate, alive, eventually, gone
from corra.errors import Ambiguous, Conflict, Misuse, NotFound, Unreachable
from corra.on_host import tether
from corra.runs import finding, starting
from corra.runs.run import Run
from listener import listening
from proxy import Proxy, wait_for
from sshd import Sshd, user

ID = r"\d{8}t\d{6}z-[0-9a-z]{8}"


def run(target: str, argv: list[str], **how: Any) -> Run:
    return starting.start(target, argv, via="chaperone", **how)


# ---- what the agent expects of a carrier


PYTHON = [sys.executable, "-ISEc"]
SAYS = "import os, subprocess, sys; report = int(os.environ['CORRA_REPORT']); "


def test_a_run_is_starting_until_its_carrier_says_that_it_runs(door: Door, tmp_path: Path) -> None:
    gate = Gate(tmp_path / "gate")
    code = (
        SAYS
        + "open(sys.argv[1]).readline(); os.close(report); sys.exit(subprocess.call(sys.argv[2:]))"
    )
    request = {
        "prog_id": "x",
        "program": {"argv": ["sh", "-c", "exit 4"]},
        "run": {"carrier": [*PYTHON, code, gate.path]},
    }
    with door.popen("start") as starting:
        assert starting.stdin
        starting.stdin.write(door.encode(request))
        starting.stdin.close()
        eventually((door.directory("x") / "launched").exists)
        assert door.status("x")["state"] == "starting"
        gate.open()
        starting.wait(30)
    final = door.wait("x")
    assert (final["state"], final["return_code"]) == ("exited", 4)
    gate.close()


def test_what_a_carrier_says_before_it_runs_is_why_nothing_was_started(door: Door) -> None:
    code = SAYS + "os.write(report, b'cwd 2 no such thing'); os._exit(125)"
    state = door.start(["true"], prog_id="x", run={"carrier": [*PYTHON, code]})
    assert (state["state"], state["exception"]["stage"], state["exception"]["errno"]) == (
        "not_started",
        "cwd",
        2,
    )


def test_a_carrier_ended_by_a_signal_is_a_lost_run_and_one_that_exits_is_not(door: Door) -> None:
    door.start(["x"], prog_id="lost", run={"carrier": ["sh", "-c", "kill -9 $$", "sh"]})
    lost = door.wait("lost")
    assert (lost["state"], lost["reason"], lost["status"], lost["return_code"], lost["signal"]) == (
        "lost",
        "link",
        None,
        None,
        None,
    )
    assert lost["end_time"]
    door.start(["x"], prog_id="exited", run={"carrier": ["sh", "-c", "exit 137", "sh"]})
    assert (door.wait("exited")["state"], door.wait("exited")["return_code"]) == ("exited", 137)


def test_a_carrier_gets_the_programs_variables_under_a_name_of_their_own_and_secrets_in_a_pipe(
    door: Door,
) -> None:
    carrier = [
        "bash",
        "-c",
        'echo "$CORRA_FAR_A,$CORRA_FAR_PATH,$CORRA_FAR_S,$A"; tr "\\0" , <&"$CORRA_SECRETS"',
        "sh",
    ]
    program = {
        "argv": ["x"],
        "env": {"A": "a", "PATH": "/far", "GONE": None},
        "cwd": "/no/such/directory/here",
    }
    door.call(
        "start",
        {
            "prog_id": "x",
            "program": program,
            "run": {"carrier": carrier},
            "secrets": {"env": {"S": "s"}},
            "spool": str(door.spool),
        },
    )
    door.wait("x")
    assert door.file("x") == b"a,/far,,\nS=s,"


def test_secrets_that_no_pipe_holds_are_refused(door: Door) -> None:
    secrets = {"env": {f"S{number}": "s" * 100_000 for number in range(20)}}
    request = {
        "prog_id": "x",
        "program": {"argv": ["x"]},
        "run": {"carrier": ["true"]},
        "secrets": secrets,
        "spool": str(door.spool),
    }
    state = door.call("start", request)
    assert (state["state"], state["exception"]["errno"]) == ("not_started", errno.E2BIG)
    assert re.fullmatch(
        r"its secrets: \d+ bytes are more than a pipe takes", state["exception"]["message"]
    )


def test_a_keeper_killed_before_it_heard_that_nobody_is_let_in_leaves_no_exit_status(
    door: Door, tmp_path: Path
) -> None:
    gate = Gate(tmp_path / "gate")
    link = [
        "sh",
        "-c",
        'read a <"$0"; echo "Permission denied (publickey)." >&2; exit 255',
        gate.path,
    ]
    carrier = [*PYTHON[:1], "-ISE", tether.__file__, str(len(link)), *link]
    with door.popen("start") as starting:
        assert starting.stdin
        starting.stdin.write(
            door.encode(
                {"prog_id": "x", "program": {"argv": ["true"]}, "run": {"carrier": carrier}}
            )
        )
        starting.stdin.close()
        eventually((door.directory("x") / "launched").exists)
        keeper = door.status("x")["agent_pid"]
        os.kill(keeper, signal.SIGKILL)
        eventually(lambda: door.status("x")["agent_pid"] != keeper)
        gate.open()
        starting.wait(30)
    final = door.wait("x")
    gate.close()
    assert (final["state"], final["return_code"]) == ("lost", None)


# ---- its messages


def test_a_detached_start_says_who_keeps_it(sshd: Sshd, cli: Cli) -> None:
    done = cli(
        "run", "-d", "--name", "fw", "--via", "chaperone", "--host", "h", "--", "sleep", "1000"
    )
    assert done.returncode == 0
    assert re.fullmatch(ID, done.stdout.decode().strip())
    first, *hints = done.stderr.splitlines()
    assert re.fullmatch(
        rb"corra: fw \(\w{6}\) on h: started, kept by THIS machine: don't let it sleep", first
    )
    assert hints[0] == b"       watch: corra attach fw"
    killed = cli("kill", "-9", "fw")
    assert killed.returncode == 0, killed.stderr
    assert b"KILL sent to it" in killed.stderr


def test_the_programs_bytes_and_code_are_those_of_the_command(sshd: Sshd, cli: Cli) -> None:
    done = cli(
        "run",
        "--via",
        "chaperone",
        "--host",
        "h",
        "-C",
        "/",
        "-E",
        "A=it's",
        "--",
        "sh",
        "-c",
        'pwd; echo "$A" >&2; exit 255',
    )
    assert (done.returncode, done.stdout) == (255, b"/\n")
    # Chance decides whether the run had ended before the command looked.
    assert re.fullmatch(
        rb"it's\ncorra: \w{6} on h: FAILED: exit 255 after [\d.]+ s(, at \d\d:\d\d)?\n", done.stderr
    )


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--", "no-such-program"], 127, "no-such-program: not found (ENOENT)"),
        (["--", "/etc/passwd"], 126, "/etc/passwd: not executable (EACCES)"),
        (["-C", "/no/such", "--", "true"], 125, "cwd /no/such: no such directory (ENOENT)"),
    ],
)
def test_what_cant_be_started_there_is_said_as_the_agent_says_it(
    sshd: Sshd, cli: Cli, words: list[str], code: int, said: str
) -> None:
    done = cli("run", "--via", "chaperone", "--host", "h", *words)
    assert done.returncode == code
    assert done.stderr.decode().splitlines()[0].endswith(f" on h: NOT STARTED: {said}")


def test_who_isnt_let_in_is_told_as_ever_and_no_run_is_made(sshd: Sshd, cli: Cli) -> None:
    sshd.known_hosts.write_text("")
    done = cli("run", "--via", "chaperone", "--id", "pay", "--host", "h", "--", "true")
    assert done.returncode == 125
    assert (
        f"h: NOT STARTED: host key unknown: ED25519 {sshd.fingerprint[:13]}.."
        in done.stderr.decode()
    )
    assert (
        cli(
            "run",
            "--via",
            "chaperone",
            "--id",
            "pay",
            "--host",
            "h",
            "--accept-new-key",
            "--",
            "echo",
            "in",
        ).stdout
        == b"in\n"
    )


def test_a_host_without_python_is_served_and_the_agent_names_the_chaperone(
    new_sshd: Callable[..., Sshd], cli: Cli
) -> None:
    new_sshd(environment={"PATH": "/proc/nonexistent"})
    refused = cli("run", "--host", "h", "--", "/bin/echo", "in")
    assert refused.returncode == 125
    assert b"no Python 3.6 or later" in refused.stderr
    done = cli("run", "--via", "chaperone", "--host", "h", "--", "/bin/echo", "in")
    assert (done.returncode, done.stdout) == (0, b"in\n")
    killed = run("h", ["/bin/sleep", "1000"])
    assert killed.kill(grace=5).state.return_code == 143


def test_a_login_that_is_no_shell_is_quoted(new_sshd: Callable[..., Sshd], cli: Cli) -> None:
    new_sshd(options={"ForceCommand": "echo '%% Unknown command'"})
    done = cli("run", "--via", "chaperone", "--host", "h", "--", "true")
    assert done.returncode == 125
    assert b"no POSIX shell there that would start it: %% Unknown command" in done.stderr


@pytest.mark.parametrize("break_it", ["cut", "freeze"])
def test_a_link_that_breaks_is_said_with_what_is_known(sshd: Sshd, cli: Cli, break_it: str) -> None:
    with Proxy(sshd.port) as proxy:
        sshd.trust(sshd.host_public, f"[127.0.0.1]:{proxy.port}")
        sshd.add_host("far", Port=proxy.port, ServerAliveInterval=1)
        started = run("far", ["sh", "-c", "echo $$; exec sleep 1000"], name="fw")
        pid = int(wait_for(started.read))
        getattr(proxy, break_it)()
        done = cli("attach", "fw")
        assert done.returncode == 123
        assert done.stdout == b"%d\n" % pid
        last = [line for line in done.stderr.decode().splitlines() if line.startswith("corra: ")][
            -1
        ]
        assert re.fullmatch(
            r"corra: fw \(\w{6}\) on far: LOST: link to far broke at \d\d:\d\d; it may still run",
            last,
        )
        assert alive(pid)
        os.kill(pid, signal.SIGKILL)


def test_a_kill_over_a_dead_link_doesnt_say_that_nothing_is_left(sshd: Sshd, cli: Cli) -> None:
    with Proxy(sshd.port) as proxy:
        sshd.trust(sshd.host_public, f"[127.0.0.1]:{proxy.port}")
        sshd.add_host("far", Port=proxy.port, ServerAliveInterval=0)
        started = run("far", ["sh", "-c", "echo $$; exec sleep 1000"], name="fw")
        pid = int(wait_for(started.read))
        proxy.freeze()
        done = cli("kill", "--grace", "0.2", "fw")
        assert done.returncode == 123
        assert b"on far: LOST: link to far broke" in done.stderr
        # Before the thaw: what waits in the proxy may be the order to kill it.
        assert alive(pid)
        os.kill(pid, signal.SIGKILL)
        proxy.thaw()


def test_a_timeout_holds_there_and_is_told_as_one(sshd: Sshd, cli: Cli) -> None:
    done = cli(
        "run",
        "--via",
        "chaperone",
        "--timeout",
        "1s",
        "--host",
        "h",
        "--",
        "sh",
        "-c",
        "trap 'exit 0' TERM; while :; do sleep 0.05; done",
    )
    assert done.returncode == 124
    assert b"TIMEOUT: 1 s" in done.stderr


def test_term_to_the_watching_client_is_passed_on(sshd: Sshd, cli: Cli) -> None:
    watching = cli.popen(
        "run",
        "--via",
        "chaperone",
        "--host",
        "h",
        "--",
        "sh",
        "-c",
        "trap 'exit 9' TERM; echo ready; while :; do sleep 0.05; done",
    )
    assert watching.stdout
    assert watching.stdout.readline() == b"ready\n"
    watching.terminate()
    watching.communicate(timeout=60)
    assert watching.returncode == 9


@pytest.mark.parametrize("via", ["openssh", "chaperone"])
def test_the_mode_says_what_as_means(sshd: Sshd, cli: Cli, via: str) -> None:
    sshd.add_host("nobodys", User="corra-nobody")
    done = cli(
        "run",
        "--via",
        via,
        "--mode",
        "ssh-as",
        "--as",
        user(),
        "--host",
        "nobodys",
        "--",
        "id",
        "-un",
    )
    assert (done.returncode, done.stdout) == (0, user().encode() + b"\n")
    refused = cli(
        "run", "--via", via, "--mode", "ssh-as", "--as", "a,b", "--host", "nobodys", "--", "true"
    )
    assert (refused.returncode, refused.stderr) == (
        2,
        b"corra: NOT STARTED: --mode ssh-as has one user: --as a,b names two\n",
    )


# ---- the run that a name means


def test_the_same_id_is_the_same_run_and_another_command_or_host_a_conflict(
    sshd: Sshd, home: Path
) -> None:
    sshd.add_host("other")
    first = run("h", ["sh", "-c", "echo once; sleep 1000"], id="pay")
    wait_for(first.read)
    again = run("h", ["sh", "-c", "echo once; sleep 1000"], id="pay")
    assert again.state().pid == first.state().pid
    for target, argv in (("h", ["true"]), ("other", ["sh", "-c", "echo once; sleep 1000"])):
        with pytest.raises(Conflict):
            run(target, argv, id="pay")
    first.kill(grace=0)


def test_a_name_means_the_run_of_the_host_that_was_said(sshd: Sshd, cli: Cli) -> None:
    sshd.add_host("other")
    here, there = (
        run("h", ["sleep", "1000"], name="job"),
        run("other", ["sleep", "1000"], name="job"),
    )
    assert finding.attach("job", "h", via="chaperone").id == here.id
    assert finding.attach("job", "other", via="chaperone").id == there.id
    for text in (there.id, there.id[-8:], "none"):
        with pytest.raises(NotFound):
            finding.attach(text, "h", via="chaperone")
    assert [state.prog_id for state in finding.ps("h", via="chaperone")] == [here.id]
    # This machine keeps both runs, and names the host of each.
    kept = {state.prog_id: state.host for state in finding.ps("local")}
    assert kept.items() >= {here.id: "h", there.id: "other"}.items()
    assert cli("kill", "-9", "--host", "h", "--via", "chaperone", "job").returncode == 0
    assert there.state().state == "running"
    there.kill(grace=0)


def test_a_prefix_that_means_two_is_said_to(sshd: Sshd, home: Path) -> None:
    first, second = run("h", ["true"], id="pay-1"), run("h", ["true"], id="pay-2")
    first.wait(30), second.wait(30)
    with pytest.raises(Ambiguous):
        finding.attach("pay", "h", via="chaperone")


def test_history_leads_back_to_it(sshd: Sshd, cli: Cli) -> None:
    started = run("h", ["sh", "-c", "echo out; exit 5"])
    done = cli("attach", started.id[-8:-2])
    assert (done.returncode, done.stdout) == (5, b"out\n")


# ---- its limits


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ({"env_inherit": False}, "env_inherit"),
        ({"env": {"a.b": "1"}}, "a shell takes letters"),
        ({"wait_children": True}, "wait_children"),
        ({"limits": {"files": 64}}, "limits"),
    ],
)
def test_what_it_cant_do_is_refused_before_anything_is_asked(
    home: Path, how: dict[str, Any], why: str
) -> None:
    with pytest.raises(Misuse, match=why):
        run("h", ["true"], **how)


@pytest.mark.parametrize(
    "via", ["chaperone@", "chaperone@-oProxyCommand=x", "chaperone@a b", "openssh@ops1"]
)
def test_a_keeper_that_is_no_host_is_refused(cli: Cli, via: str) -> None:
    assert cli("run", "--via", via, "--host", "h", "--", "true").returncode == 2


def test_this_machine_needs_none(home: Path) -> None:
    with pytest.raises(Misuse, match="local needs none"):
        run("local", ["true"])


def test_a_secret_reaches_the_program_and_no_disk(sshd: Sshd, home: Path) -> None:
    started = run("h", ["sh", "-c", 'echo "${#TOKEN}"'], secrets={"TOKEN": "s3cr3t-value"})
    started.wait(30)
    assert started.read() == b"12\n"
    assert not any(
        b"s3cr3t-value" in path.read_bytes() for path in home.rglob("*") if path.is_file()
    )


def test_variables_can_be_taken_away_and_the_umask_set(sshd: Sshd, home: Path) -> None:
    started = run("h", ["sh", "-c", 'echo "${HOME-gone}"; umask'], env={"HOME": None}, umask=0o027)
    started.wait(30)
    assert started.read() == b"gone\n0027\n"


def test_merged_output_is_one_stream_in_order(sshd: Sshd, home: Path) -> None:
    started = run("h", ["sh", "-c", "echo 1; echo 2 >&2; echo 3"], merge=True)
    started.wait(30)
    assert started.read("output") == b"1\n2\n3\n"


def test_a_file_is_its_stdin(sshd: Sshd, cli: Cli) -> None:
    data = os.urandom(300_000)
    done = cli("run", "--via", "chaperone", "--host", "h", "--stdin", "-", "--", "cat", stdin=data)
    assert (done.returncode, done.stdout) == (0, data)


def test_a_child_left_behind_there_keeps_nobody_waiting(sshd: Sshd, home: Path) -> None:
    started = run("h", ["sh", "-c", "sleep 1000 & echo $!; exit 6"])
    assert started.wait(30).exited == 6
    pid = int(started.read())
    os.kill(pid, signal.SIGKILL)
    gone(pid)


def test_a_collector_is_told_of_it_as_of_any_run(sshd: Sshd, home: Path) -> None:
    with listening() as collector:
        callback = {"url": collector.url, "method": "POST", "token": "secret-token"}
        started = run(
            "h", ["sh", "-c", "echo out; echo err >&2; exit 5"], id="told", callback=callback
        )
        final = collector.wait(lambda each: each.held.completed)[0]
    assert started.wait(30).exited == 5
    assert (collector.output(), collector.output("stderr")) == (b"out\n", b"err\n")
    assert {name: final[name] for name in ("prog_id", "state", "return_code", "link")} == {
        "prog_id": "told",
        "state": "exited",
        "return_code": 5,
        "link": "h",
    }


def test_all_guards_dead_is_lost_and_nobody_is_killed_for_it(sshd: Sshd, home: Path) -> None:
    started = run("h", ["sh", "-c", "echo $$; exec sleep 1000"])
    pid = int(wait_for(started.read))
    state = started.state()
    assert state.agent_pid
    for each in (*state.standby_pids, state.agent_pid):
        os.kill(each, signal.SIGKILL)
    assert wait_for(lambda: started.state().ended)
    assert (started.state().state, started.state().reason) == ("lost", "agent-gone")
    assert alive(pid)
    assert state.pid
    os.kill(state.pid, signal.SIGKILL)
    os.kill(pid, signal.SIGKILL)


def test_a_link_that_breaks_between_probe_and_start_starts_nothing(
    sshd: Sshd, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from corra.remote.chaperone import Chaperone

    monkeypatch.setattr(Chaperone, "probe", lambda self: sshd.stop())
    with pytest.raises(Unreachable, match="connection refused"):
        run("h", ["true"])
