"""`--collector` on the command line, from `corra run` to a real collector and back, and the way to
the collector through ssh.
"""

from __future__ import annotations

import contextlib
import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent_door import eventually
from collector import Client, Served
from listener import Authority

pytest.importorskip("starlette", reason="corra[collector] isn't installed")


@pytest.fixture
def team(home: Path, tmp_path: Path) -> Iterator[Client]:
    """A collector called team in the configuration, with TLS and its own certificate authority."""
    authority = Authority(tmp_path)
    served = Served(tmp_path, tls=authority.server(), ca=authority.pem)
    member = Client(served, served.token())
    served.start()
    (home / ".corra.token").write_text(str(member.token))
    configure(home, served.url, authority.file)
    yield member
    served.kill()


def configure(home: Path, url: str, ca: Path) -> None:
    told = {"collectors": {"team": {"url": url, "token_file": "~/.corra.token", "ca": str(ca)}}}
    # The configuration is written as JSON, which is YAML.
    for name in (".invoke.yaml", ".corra.yaml"):
        (home / name).write_text(json.dumps({"corra": told}))


def test_a_run_reports_to_the_collector_and_can_be_listed_and_attached_to_there(cli, team):
    done = cli(
        "run",
        "--collector",
        "team",
        "--name",
        "job",
        "--host",
        "local",
        "--",
        "sh",
        "-c",
        "echo out; echo err >&2; exit 3",
    )
    assert (done.returncode, done.stdout) == (3, b"out\n"), done.stderr
    (found,) = eventually(lambda: team("GET", "/api/v1/runs?name=job&open=false").json["runs"])
    assert (found["host"], found["return_code"], found["argv"][0]) == ("local", 3, "sh")
    listed = cli("ps", "--collector", "team", "-a")
    assert b"FAILED 3" in listed.stdout and b"job" in listed.stdout
    shown = cli("attach", "--collector", "team", "job")
    assert (shown.returncode, shown.stdout) == (3, b"out\n")
    assert b"err\n" in shown.stderr and b"FAILED: exit 3" in shown.stderr
    status = cli("status", "--json", "job")
    assert json.loads(status.stdout)["callback"]["completed"]
    spool = Path(json.loads(status.stdout)["spool"])
    assert not (spool / "token").exists()


def test_the_runs_token_is_in_no_command_line_no_environment_and_nothing_that_is_said_or_remembered(
    cli, team, home
):
    token = re.compile(rb"corra_[0-9a-z]{12}_[0-9A-Za-z_-]{43}")
    script = 'env; until [ -e "$HOME/go" ]; do sleep 0.05; done'
    how = ["--collector", "team", "--name", "quiet", "--host", "local"]
    running = cli.popen("run", *how, "--", "sh", "-c", script)
    eventually(
        lambda: [
            each
            for each in team("GET", "/api/v1/runs?name=quiet").json["runs"]
            if each["collector"]["received"]
        ]
    )
    (held,) = home.rglob("runs/*/token")
    own = held.read_bytes().strip()
    assert token.fullmatch(own)
    looked = 0
    for process in Path("/proc").iterdir():
        if process.name.isdecimal():
            for name in ("cmdline", "environ"):
                with contextlib.suppress(OSError):
                    assert own not in (process / name).read_bytes(), process
                    looked += 1
    assert looked > 10
    status = cli("status", "--json", "quiet")
    (home / "go").touch()
    out, err = running.communicate(timeout=60)
    assert running.returncode == 0, err
    again = cli(
        "run", "--collector", "team", "--dry", "--json", "-e", "--host", "local", "--", "true"
    )
    texts = [
        out,
        err,
        status.stdout,
        status.stderr,
        again.stdout,
        again.stderr,
        team.served.log.read_bytes(),
    ]
    texts += [
        path.read_bytes()
        for path in home.rglob("*")
        if path.is_file() and path.name not in (".corra.token", "token")
    ]
    assert [text for text in texts if token.search(text)] == []


def test_a_long_list_is_read_to_its_end(cli, team, home, monkeypatch):
    from corra.collector import client

    for number in range(5):
        team.register(f"r{number}", host="db1")
    monkeypatch.setattr(client, "ASKED_RUNS", 2)
    collector = client.Collector("team", team.served.url, team.token, team.served.ca)
    assert [state.prog_id for state in collector.runs()] == ["r4", "r3", "r2", "r1", "r0"]
    assert [state.prog_id for state in collector.runs(limit=1)] == ["r4"]
    assert team.token not in repr(collector)


def test_what_goes_on_is_followed_to_its_end_and_beyond_a_restart_of_the_collector(cli, team, home):
    cli("run", "-d", "--collector", "team", "--name", "slow", "--host", "local", "--", "sh", "-c",
        'echo one; until [ -e "$HOME/go" ]; do sleep 0.05; done; echo two')  # fmt: skip
    eventually(
        lambda: team("GET", "/api/v1/runs?name=slow").json["runs"][0]["collector"]["received"]
    )
    watching = cli.popen("attach", "--collector", "team", "slow")
    assert watching.stdout.readline() == b"one\n"
    team.served.kill()
    team.served.start()
    (home / "go").touch()
    out, err = watching.communicate(timeout=60)
    assert (watching.returncode, out) == (0, b"two\n"), err


def test_who_leaves_a_run_of_a_collector_is_told_how_to_watch_it_there_and_no_way_to_stop_it(
    cli, team, home, terminal
):
    cli("run", "-d", "--collector", "team", "--name", "slow", "--host", "local", "--", "sh", "-c",
        'echo one; until [ -e "$HOME/go" ]; do sleep 0.05; done')  # fmt: skip
    eventually(
        lambda: team("GET", "/api/v1/runs?name=slow").json["runs"][0]["collector"]["received"]
    )
    screen = terminal("attach", "--collector", "team", "slow")
    screen.until("one")
    screen.type("\x03")
    screen.until("STILL RUNNING: you have detached", "watch: corra attach --collector team slow")
    assert screen.end() == -signal.SIGINT
    assert b"stop" not in screen.seen
    (home / "go").touch()


def test_nothing_is_started_where_the_collector_cant_be_told(cli, team, home):
    team.served.kill()
    done = cli("run", "--collector", "team", "--host", "local", "--", "touch", str(home / "ran"))
    assert done.returncode == 125 and b"NOT STARTED" in done.stderr and b"refused" in done.stderr
    assert not (home / "ran").exists()


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["attach", "--collector", "team", "nobody"], 125, b"NOT FOUND"),
        (["ps", "--collector", "other"], 2, b"no collector 'other'"),
        (["attach", "--collector", "team", "--host", "x", "a"], 2, b"excludes --host"),
        (
            ["run", "--callback-through-ssh", "--host", "local", "--", "true"],
            2,
            b"needs --collector",
        ),
        (["deliver"], 2, b"needs an id"),
        (
            ["run", "--collector", "http://203.0.113.1:8050", "--host", "local", "--", "true"],
            2,
            b"NOT STARTED: http",
        ),
        (["ps", "--collector", "http://203.0.113.1:8050"], 2, b"in the clear"),
        (["attach", "--collector", "http://203.0.113.1:8050", "abc"], 2, b"in the clear"),
    ],
)
def test_what_cant_be_is_said_in_a_line(cli, team, words, code, said):
    done = cli(*words)
    assert done.returncode == code and said in done.stderr and b"Traceback" not in done.stderr, (
        done.stderr
    )


def test_deliver_sends_again_and_elsewhere(cli, team, home):
    prog_id = cli("run", "-d", "--host", "local", "--", "echo", "late").stdout.decode().strip()
    refused = cli("deliver", prog_id)
    assert refused.returncode == 125 and b"without a callback" in refused.stderr
    refused = cli("deliver", prog_id, "--to", "http://203.0.113.1:8050")
    assert refused.returncode == 2 and b"in the clear" in refused.stderr
    done = cli("deliver", prog_id, "--to", "team")
    assert done.returncode == 0, done.stderr
    assert team.output(prog_id).body == b"late\n"
    assert team.run(prog_id)["state"] == "exited"


RELAY = """
import os, select, socket, sys
there = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
while True:
    for ready in select.select([0, there], [], [])[0]:
        data = os.read(0, 65536) if ready == 0 else there.recv(65536)
        if not data:
            sys.exit()
        there.sendall(data) if ready == 0 else os.write(1, data)
"""


def test_a_host_without_a_route_reports_through_the_connection_of_who_watches(
    cli, team, new_sshd, home, monkeypatch, as_root
):
    import sshd

    if subprocess.run(["unshare", "-n", "true"], capture_output=True, check=False).returncode:
        pytest.skip("needs a network namespace, for a host without a route")
    real = sshd.program()
    lonely = home / "sshd-alone"
    lonely.write_text(
        f'#!/bin/sh\nexec unshare -n sh -c \'ip link set lo up; exec {real} "$@"\' sshd "$@"\n'
    )
    lonely.chmod(0o755)
    monkeypatch.setattr(sshd, "program", lambda: str(lonely))
    server = new_sshd()
    (home / "relay.py").write_text(RELAY)
    with open(home / ".ssh" / "config", "a") as config:
        config.write(
            f"\nHost h\n  ProxyCommand nsenter -n -t {server.pid} {sys.executable} "
            f"{home}/relay.py %p\n"
        )
    run = ["run", "--collector", "team", "--host", "h", "--", "sh", "-c", "echo far; sleep 3"]
    alone = cli("run", "-d", *run[1:])
    assert alone.returncode == 0, alone.stderr
    through = cli("run", "--callback-through-ssh", "--name", "far", *run[1:])
    assert through.returncode == 0, through.stderr
    (found,) = eventually(
        lambda: [
            each
            for each in team("GET", "/api/v1/runs?name=far").json["runs"]
            if each["collector"]["received"]
        ]
    )
    assert team.output(found["prog_id"]).body == b"far\n"
    # No client carries the other run's reports, and its host has no route: the run is still
    # waiting.
    (waiting,) = team("GET", "/api/v1/runs?state=starting").json["runs"]
    error = json.loads(cli("status", "--json", "--host", "h", waiting["prog_id"]).stdout)[
        "callback"
    ]["error"]
    assert "refused" in error or "unreachable" in error
