"""The examples do what they say, as a person would run them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import corra

ROOT = Path(__file__).resolve().parent.parent


def inv(home: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "invoke", "-r", str(ROOT / "examples"), *words],
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
