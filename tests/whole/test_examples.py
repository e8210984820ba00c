"""The examples do what they promise when a person runs them."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import home_environment

import corra
import warm
from proxy import wait_for
from sshd import Sshd, free_port
from terminal import Terminal
from warm import Warm

ROOT = Path(__file__).resolve().parents[2]


def inv(home: Path, *words: str, collection: str = "tasks") -> subprocess.CompletedProcess[str]:
    return warm.run("-r", str(ROOT / "examples"), "-c", collection, *words, program="inv", cwd=home)


@pytest.fixture(params=["local", "h"])
def host(request: pytest.FixtureRequest, home: Path) -> str:
    if request.param == "h":
        request.getfixturevalue("sshd")
    return str(request.param)


def test_the_upgrade_installs_and_may_be_repeated(home: Path, host: str) -> None:
    for release in ("4.1", "4.2"):
        said = inv(
            home, "upgrade", "--host", host, "--release", release, "--root", str(home / "service")
        )
        assert (said.returncode, said.stdout, said.stderr) == (0, f"{host} runs {release}\n", "")
        assert (home / "service" / "current").read_text() == f"{release}\n"
    assert corra.attach("backup", host).wait(20).stdout == "saved\n"


def test_the_upgrade_says_what_is_missing(home: Path) -> None:
    said = inv(home, "upgrade")
    assert said.returncode == 125
    assert said.stderr == "corra: STOPPED: say --release; inv --help upgrade has an example\n"


def test_a_step_that_fails_stops_the_upgrade_with_its_exit_code(home: Path) -> None:
    (home / "file").touch()
    said = inv(home, "upgrade", "--release", "1", "--root", str(home / "file"))
    assert said.returncode == 1
    assert "Traceback" not in said.stderr and "on local: FAILED: exit 1" in said.stderr


def test_the_backup_is_left_running_and_found_by_its_name(home: Path, host: str) -> None:
    (home / "current").write_text("x")
    said = inv(home, "backup", "--host", host, "--root", str(home))
    assert said.returncode == 0
    run = corra.attach("backup")
    assert said.stdout == f"{run.id}\n"
    assert run.wait(20).ok and (home / "nightly.tar").exists()


@pytest.fixture
def fleet(new_sshd: Callable[..., Sshd], home: Path) -> list[str]:
    """Three hosts, each with its own home."""
    for name in ("web1", "web2", "web3"):
        (home / name).mkdir()
        new_sshd(alias=name, environment=home_environment(home / name))
    return ["web1", "web2", "web3"]


def test_the_deploy_goes_in_waves_and_a_canary_that_fails_keeps_the_others_as_they_were(
    fleet: list[str], home: Path
) -> None:
    def deploy(release: str, ticket: str) -> subprocess.CompletedProcess[str]:
        words = ["--hosts", "web[1-3]", "--release", release, "--ticket", ticket, "--root", "srv"]
        return inv(home, "deploy", *words, collection="deploy")

    assert deploy("4.1", "OPS-1").returncode == 0
    assert [(home / name / "srv/current/release").read_text() for name in fleet] == ["4.1\n"] * 3
    # The canary can't switch its directory.
    (home / "web1/srv/new").mkdir()
    stopped = deploy("4.2", "OPS-2")
    assert (
        stopped.returncode != 0
        and "STOPPED at 2 switch: web1 FAILED" in stopped.stderr
        and "Traceback" not in stopped.stderr
    )
    assert [(home / name / "srv/current/release").read_text() for name in fleet] == ["4.1\n"] * 3
    for left in (home / "web1/srv/new").iterdir():
        left.unlink()
    (home / "web1/srv/new").rmdir()
    done = deploy("4.2", "OPS-2")
    assert (
        done.returncode == 0
        and "done before" in done.stderr
        and "wave 2: web[2-3] runs 4.2" in done.stderr
    ), done.stderr
    assert [(home / name / "srv/current/release").read_text() for name in fleet] == ["4.2\n"] * 3
    assert "ALREADY DONE" in deploy("4.2", "OPS-2").stderr


@pytest.mark.parametrize("host", ["h"], indirect=True)
def test_the_drill_finds_a_backup_that_is_good_and_one_that_isnt(home: Path, host: str) -> None:
    (home / "srv/data").mkdir(parents=True)
    (home / "srv/data/rows").write_text("".join(f"{n}\n" for n in range(500)))
    words = ["drill", "--host", host, "--root", str(home / "srv")]
    said = inv(home, *words, "--ticket", "DRILL-1", collection="database")
    assert said.returncode == 0 and "restored all 500 rows" in said.stderr, said.stderr
    assert not (home / "srv/scratch").exists() and (home / "srv/backup/last.tar").exists()
    (home / "srv/data/rows").unlink()
    (home / "srv/data").rmdir()
    said = inv(home, *words, "--ticket", "DRILL-2", collection="database")
    assert said.returncode != 0 and "STOPPED at 1 dump" in said.stderr


# The programs that the kernel's runbook calls on a host. Each logs its call to $HOME/log. A new
# kernel runs after the next boot.
CALLED = {
    "apt-get": (
        'echo "apt-get $DEBIAN_FRONTEND $*" >> $HOME/log; case $1 in -y) echo '
        '"${3#linux-image-}" > $HOME/next;; esac'
    ),
    "curl": "test -e $HOME/healthy",
    "df": 'echo "Avail"; echo 900',
    "lbctl": 'echo "$*" >> $HOME/log',
    "sudo": 'while [ "$1" != -- ]; do shift; done; shift; exec "$@"',
    "systemctl": """echo "systemctl $*" >> $HOME/log
        (sleep 0.2; mv $HOME/next $HOME/kernel
         cat /proc/sys/kernel/random/uuid > $BOOT_ID) > /dev/null 2>&1 &""",
    "uname": "cat $HOME/kernel",
}


@pytest.fixture
def site(new_sshd: Callable[..., Sshd], new_machine: Callable[..., Path], home: Path) -> Path:
    """The hosts web1 to web3 that can reboot, a balancer lb1, and ops1 for journals. Returns the
    directory with their homes.
    """
    programs = home / "programs"
    programs.mkdir()
    for name, text in CALLED.items():
        (programs / name).write_text(f"#!/bin/sh\n{text}\n")
        (programs / name).chmod(0o755)
    path = f"{programs}:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"
    for name in ("lb1", "ops1", "web1", "web2", "web3"):
        there = home / "at" / name
        there.mkdir(parents=True)
        environment = {**home_environment(there), "PATH": path}
        if name.startswith("web"):
            environment["BOOT_ID"] = str(home / "machines" / name / "boot_id")
            new_machine(name, environment=environment)
            (there / "kernel").write_text("6.1.0-27-amd64\n")
        else:
            new_sshd(alias=name, environment=environment)
    return home / "at"


def kernel(home: Path, *, until: Callable[[], bool] | None = None) -> tuple[int, str]:
    """Run the upgrade at a terminal and answer yes to each question; kill it as soon as `until`
    returns true. Return its exit code and its output.
    """
    words = [
        "-r",
        str(ROOT / "examples"),
        "-c",
        "kernel",
        "kernel",
        "--version",
        "6.1.0-28",
        "--ticket",
        "OPS-812",
        "--hosts",
        "web[1-3]",
    ]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm"}
    start = functools.partial(Warm, words, program="inv", env=env, cwd=home, start_new_session=True)
    answered, deadline = 0, time.monotonic() + 80
    with Terminal(start) as terminal:
        while not terminal.has_ended and time.monotonic() < deadline:
            if until is not None and until():
                terminal.process.kill()
            terminal.read(0.1)
            if terminal.text.count("[y/N]") > answered:
                answered += 1
                terminal.type("y\n")
        terminal.process.kill()
        return terminal.end(), terminal.text


def test_the_kernel_upgrade_goes_on_where_it_was_killed_and_reboots_each_host_once(
    site: Path, home: Path
) -> None:
    (site / "web1/healthy").touch()
    # At the kill (the laptop's battery is empty) the canary is done, and the second wave is up
    # again but not healthy.
    second = [site / name / ".local/state/corra/runs" for name in ("web2", "web3")]
    code, said = kernel(home, until=lambda: all("healthy" in names(each) for each in second))
    assert code == -9 and "wave 2: reboot web[2-3] into 6.1.0-28? [y/N]" in said, said
    for name in ("web2", "web3"):
        (site / name / "healthy").touch()
    code, said = kernel(home)
    assert code == 0 and "[y/N]" not in said and "attached, done" in said, said
    installed = "apt-get noninteractive -y install linux-image-6.1.0-28-amd64"
    for name in ("web1", "web2", "web3"):
        called = (site / name / "log").read_text().splitlines()
        assert called == [
            "apt-get  install --dry-run linux-image-6.1.0-28-amd64",
            installed,
            "systemctl reboot",
        ]
    balanced = [f"{what} {wave}" for wave in ("web1", "web2 web3") for what in ("drain", "enable")]
    assert (site / "lb1/log").read_text().splitlines() == balanced
    code, said = kernel(home)
    assert code == 0 and "ALREADY DONE" in said and "[y/N]" not in said
    text = warm.run("book", "kernel", "OPS-812", "--markdown", program="corra", cwd=home).stdout
    assert (
        text.count("| rebooted |") == 3 and "said yes: wave 1: reboot web1 into 6.1.0-28?" in text
    )


def names(runs: Path) -> set[str]:
    """Return the names of the launched runs in a spool."""
    return {
        json.loads((each.parent / "program.json").read_text()).get("name")
        for each in runs.glob("*/launched")
    }


@pytest.mark.parametrize("host", ["h"], indirect=True)
def test_the_job_is_one_job_whoever_starts_it_and_its_message_comes_without_a_watcher(
    home: Path, host: str
) -> None:
    (home / "input").write_text("one\ntwo\n")
    program = home / "count"
    program.write_text(
        f"#!/bin/sh\necho ran >> {home}/runs\nwhile [ ! -e {home}/go ]; do sleep 0.05; done\n"
        f'wc -l < "$1"\nexit 3\n'
    )
    program.chmod(0o755)
    words = [
        "crunch",
        "--host",
        host,
        "--data",
        str(home / "input"),
        "--program",
        str(program),
        "--notify",
        f"cat > {home}/message",
    ]
    first = inv(home, *words, collection="job")
    assert first.returncode == 0 and inv(home, *words, collection="job").stdout == first.stdout
    (home / "go").touch()
    wait_for((home / "message").exists)
    over = inv(home, *words, "--wait", collection="job")
    assert (over.returncode, over.stdout) == (3, "2\n") and "the job ended with 3" in over.stderr
    assert (home / "message").read_text() == f"{home}/input ended with 3\n" and (
        home / "runs"
    ).read_text() == "ran\n"


def test_the_incident_bundle_has_what_could_be_had_and_names_what_is_missing(
    fleet: list[str], home: Path
) -> None:
    said = inv(
        home,
        "collect",
        "--hosts",
        "web[1-3],127.0.0.1:1",
        "--to",
        str(home / "INC-77"),
        collection="incident",
    )
    assert (
        said.returncode == 125
        and "nothing from 127.0.0.1:1" in said.stderr
        and "127.0.0.1:1: connection refused" in said.stdout
    )
    assert len(list((home / "INC-77").iterdir())) == 12
    assert "MemTotal" in (home / "INC-77/web2.memory.txt").read_text()
    said = inv(
        home, "collect", "--hosts", "web[1-3]", "--to", str(home / "INC-77"), collection="incident"
    )
    assert (said.returncode, said.stdout) == (0, f"12 files in {home}/INC-77\n"), said.stderr
    assert "done before" in said.stderr


def test_the_callback_server_keeps_what_a_run_by_hand_reports(home: Path) -> None:
    """The page shows the very file, and an agent without a client reports to it."""
    server = ROOT / "examples" / "callback_server.py"
    assert f"```python\n{server.read_text()}```" in (ROOT / "docs" / "callbacks.md").read_text()
    assert len(server.read_text().splitlines()) <= 40
    kept, port = home / "kept", free_port()
    kept.mkdir()
    for name in ("agent.py", "on_host/courier.py"):
        shutil.copy(ROOT / "corra" / name, home)
    script = "seq 20000; echo err >&2; exit 3"
    request = {
        "prog_id": "by-hand-1",
        "program": {"argv": ["sh", "-c", script]},
        "callback": {"url": f"http://127.0.0.1:{port}/PROG-ID", "method": "POST"},
        "config": {"retry_frequency": 0.2, "output_latency": 0.1},
    }
    with subprocess.Popen([sys.executable, str(server), str(port), str(kept)]) as serving:
        try:
            subprocess.run(
                [sys.executable, str(home / "agent.py")],
                input=json.dumps(request),
                text=True,
                check=True,
                stdout=subprocess.DEVNULL,
            )
            wait_for((kept / "by-hand-1.json").exists, what="the end")
        finally:
            serving.kill()
    state = json.loads((kept / "by-hand-1.json").read_text())
    assert (state["state"], state["return_code"]) == ("exited", 3)
    wanted = "".join(f"{n}\n" for n in range(1, 20001))
    assert (kept / "by-hand-1.stdout").read_text() == wanted
    assert (kept / "by-hand-1.stderr").read_text() == "err\n"
