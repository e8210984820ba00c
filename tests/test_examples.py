"""The examples do what they say, as a person would run them."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import corra
from conftest import home_environment, reboot_order
from proxy import wait_for
from sshd import Sshd

ROOT = Path(__file__).resolve().parent.parent


def inv(home: Path, *words: str, collection: str = "tasks") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "invoke", "-r", str(ROOT / "examples"), "-c", collection, *words],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=home,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.fixture(params=["local", "h"])
def host(request: pytest.FixtureRequest, home: Path) -> str:
    if request.param == "h":
        request.getfixturevalue("sshd")
    return str(request.param)


def test_the_upgrade_installs_and_may_be_repeated(home: Path, host: str) -> None:
    for release in ("4.1", "4.2"):
        said = inv(home, "upgrade", "--host", host, "--release", release, "--root", str(home / "service"))
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
    """Three hosts with homes of their own."""
    for name in ("web1", "web2", "web3"):
        (home / name).mkdir()
        new_sshd(alias=name, environment=home_environment(home / name))
    return ["web1", "web2", "web3"]


def test_the_deploy_goes_in_waves_and_a_canary_that_fails_keeps_the_others_as_they_were(fleet: list[str], home: Path) -> None:
    def deploy(release: str, ticket: str) -> subprocess.CompletedProcess[str]:
        words = ["--hosts", "web[1-3]", "--release", release, "--ticket", ticket, "--root", "srv"]
        return inv(home, "deploy", *words, collection="deploy")

    assert deploy("4.1", "OPS-1").returncode == 0
    assert [(home / name / "srv/current/release").read_text() for name in fleet] == ["4.1\n"] * 3
    # The canary's directory can't be switched.
    (home / "web1/srv/new").mkdir()
    stopped = deploy("4.2", "OPS-2")
    assert stopped.returncode != 0 and "STOPPED at 2 switch: web1 FAILED" in stopped.stderr and "Traceback" not in stopped.stderr
    assert [(home / name / "srv/current/release").read_text() for name in fleet] == ["4.1\n"] * 3
    for left in (home / "web1/srv/new").iterdir():
        left.unlink()
    (home / "web1/srv/new").rmdir()
    done = deploy("4.2", "OPS-2")
    assert done.returncode == 0 and "done before" in done.stderr and "wave 2: web[2-3] runs 4.2" in done.stderr, done.stderr
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


def test_the_kernel_upgrade_asks_drains_installs_reboots_and_enables(machine: Path, home: Path) -> None:
    log = home / "log"
    note = f"{home}/note"
    Path(note).write_text(f'#!/bin/sh\necho "$@" >> {log}\n')
    Path(note).chmod(0o755)
    words = ["kernel", "--version", "6.1.0-28", "--ticket", "OPS-812", "--hosts", "m", "--balancer", "local", "--as-user", ""]
    words += ["--install", f"{note} install", "--balance", note, "--health", "true"]
    words += ["--order", shlex.join(reboot_order(machine, home / "rebooted"))]
    asked = inv(home, *words, collection="kernel")
    assert asked.returncode == 125 and "STOPPED at 2 go-1: wave 1: reboot m into 6.1.0-28?: nobody here to say yes" in asked.stderr
    assert not log.exists()
    yes = [sys.executable, "-m", "corra", "book", "kernel", "OPS-812", "--skip", "go-1"]
    subprocess.run(yes, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True, capture_output=True, timeout=60)
    done = inv(home, *words, collection="kernel")
    assert done.returncode == 0, done.stderr
    assert log.read_text() == "drain m\ninstall linux-image-6.1.0-28-amd64\nenable m\n"
    assert (home / "rebooted").read_text() == "ran\n" and "rebooted" in done.stderr
    again = inv(home, *words, collection="kernel")
    assert again.returncode == 0 and "ALREADY DONE" in again.stderr and (home / "rebooted").read_text() == "ran\n"


@pytest.mark.parametrize("host", ["h"], indirect=True)
def test_the_job_is_one_job_whoever_starts_it_and_its_message_comes_without_a_watcher(home: Path, host: str) -> None:
    (home / "input").write_text("one\ntwo\n")
    program = home / "count"
    program.write_text(f'#!/bin/sh\necho ran >> {home}/runs\nwhile [ ! -e {home}/go ]; do sleep 0.05; done\nwc -l < "$1"\nexit 3\n')
    program.chmod(0o755)
    words = ["crunch", "--host", host, "--data", str(home / "input"), "--program", str(program), "--notify", f"cat > {home}/message"]
    first = inv(home, *words, collection="job")
    assert first.returncode == 0 and inv(home, *words, collection="job").stdout == first.stdout
    (home / "go").touch()
    wait_for((home / "message").exists)
    over = inv(home, *words, "--wait", collection="job")
    assert (over.returncode, over.stdout) == (3, "2\n") and "the job ended with 3" in over.stderr
    assert (home / "message").read_text() == f"{home}/input ended with 3\n" and (home / "runs").read_text() == "ran\n"


def test_the_incident_bundle_has_what_could_be_had_and_names_what_is_missing(fleet: list[str], home: Path) -> None:
    said = inv(home, "collect", "--hosts", "web[1-3],127.0.0.1:1", "--to", str(home / "INC-77"), collection="incident")
    assert said.returncode == 125 and "nothing from 127.0.0.1:1" in said.stderr and "127.0.0.1:1: connection refused" in said.stdout
    assert len(list((home / "INC-77").iterdir())) == 12
    assert "MemTotal" in (home / "INC-77/web2.memory.txt").read_text()
    said = inv(home, "collect", "--hosts", "web[1-3]", "--to", str(home / "INC-77"), collection="incident")
    assert (said.returncode, said.stdout) == (0, f"12 files in {home}/INC-77\n"), said.stderr
    assert "done before" in said.stderr
