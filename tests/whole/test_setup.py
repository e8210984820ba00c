"""scripts/inv: the first call makes the environment; every later call goes straight to `inv`.

Both say in their hints what was typed.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CALLED = 99


class Checkout:
    """A copy of the scripts with a ready environment, which only prints its arguments."""

    def __init__(self, path: Path) -> None:
        self.path = path
        shutil.copytree(
            ROOT / "scripts", path / "scripts", ignore=shutil.ignore_patterns("__pycache__")
        )
        for name in ("pyproject.toml", "constraints.txt"):
            shutil.copy(ROOT / name, path / name)
        bin_ = path / ".venv" / "bin"
        bin_.mkdir(parents=True)
        (bin_ / "python").symlink_to(sys.executable)
        started = path / "scripts" / "typed.py"
        started.write_text("import os, sys; print(os.getcwd(), *sys.argv[1:])\n")

    def script(self, path: Path, text: str) -> None:
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)

    def expected(self) -> str:
        """Return the stamp that setup.py expects."""
        ask = (
            "import sys; sys.path.insert(0, 'scripts'); import setup; "
            "print(setup.Environment('run').expected())"
        )
        return subprocess.check_output(
            [sys.executable, "-c", ask], cwd=self.path, text=True
        ).strip()

    def stamp(self, text: str) -> None:
        (self.path / ".venv" / "corra-stamp").write_text(text + "\n")

    def inv(
        self, *words: str, cwd: Path | None = None, **env: str
    ) -> subprocess.CompletedProcess[str]:
        argv = [str(self.path / "scripts" / "inv"), *words]
        return subprocess.run(
            argv,
            cwd=cwd or self.path,
            capture_output=True,
            text=True,
            env={**os.environ, **env},
            timeout=60,
            check=False,
        )


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    made = Checkout(tmp_path / "a checkout")
    made.script(made.path / "scripts" / "setup", f"exit {CALLED}")
    return made


@pytest.mark.parametrize("kind", ["run", "dev"])
def test_an_environment_that_is_up_to_date_is_used_at_once(checkout, kind):
    checkout.stamp(f"{kind} {checkout.expected()}")
    done = checkout.inv("run", "--", "a  b")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{checkout.path} {checkout.path}/scripts/inv run -- a  b\n"


def test_it_works_from_any_directory_and_through_a_link(checkout, tmp_path):
    checkout.stamp(f"run {checkout.expected()}")
    (tmp_path / "link").symlink_to(checkout.path / "scripts" / "inv")
    done = subprocess.run(
        [tmp_path / "link", "ps"], cwd="/", capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (0, f"/ {tmp_path}/link ps\n")


@pytest.mark.parametrize("stamp", ["", "making", "updating", "run 0 0 /elsewhere /usr/bin/python3"])
def test_what_is_not_whole_or_not_ours_is_set_up(checkout, stamp):
    checkout.stamp(stamp)
    assert checkout.inv("ps").returncode == CALLED


def test_a_changed_requirement_is_set_up(checkout):
    checkout.stamp(f"run {checkout.expected()}")
    with (checkout.path / "constraints.txt").open("a") as file:
        file.write("attrs==1\n")
    assert checkout.inv("ps").returncode == CALLED


def test_another_python_below_the_environment_is_set_up(checkout):
    checkout.stamp(f"run {checkout.expected()}")
    python = checkout.path / ".venv" / "bin" / "python"
    python.unlink()
    python.symlink_to("/usr/bin/env")
    assert checkout.inv("ps").returncode == CALLED


def test_ctrl_c_ends_the_wait_for_another_set_up_without_a_traceback(tmp_path):
    checkout = Checkout(tmp_path / "a checkout")
    with open(checkout.path / ".venv.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        argv = [str(checkout.path / "scripts" / "inv"), "ps"]
        pipe = subprocess.PIPE
        with subprocess.Popen(argv, stdout=pipe, stderr=pipe, start_new_session=True) as waiting:
            assert waiting.stderr and b"waiting for it" in waiting.stderr.readline()
            os.killpg(waiting.pid, signal.SIGINT)
            out, err = waiting.communicate(timeout=60)
    assert (waiting.returncode, out, err) == (-signal.SIGINT, b"", b"")


def test_an_old_python_gets_a_sentence_that_says_what_to_do(checkout, tmp_path):
    shutil.copy(ROOT / "scripts" / "setup", checkout.path / "scripts" / "setup")
    old = tmp_path / "old"
    old.mkdir()
    for name in ("python3", *(f"python3.{minor}" for minor in range(10, 15))):
        checkout.script(old / name, '[ "$1" = -V ] && echo Python 3.9.2')
    done = checkout.inv("ps", PATH=f"{old}:/usr/bin:/bin")
    assert (done.returncode, done.stdout) == (125, "")
    first, second, _ = done.stderr.splitlines()
    assert first.startswith("corra: no Python 3.10 or later here (Python 3.9.2)")
    assert "apt-get install python3" in second
