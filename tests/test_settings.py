"""The configuration under `corra`, and corra's verbs among a user's own tasks: under inv and fab,
at the top and in a namespace.
"""

from __future__ import annotations

import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from invoke.config import Config

import corra
import warm
from corra.settings import SETTINGS, setting
from sshd import Sshd

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.invoke


def config(**under: Any) -> Config:
    return Config(overrides={"corra": under})


@pytest.mark.parametrize(
    ("name", "value", "read"),
    [
        ("host", "db1", "db1"),
        ("connect_timeout", "5s", 5.0),
        ("connect_timeout", 7, 7.0),
        ("keep", "14d", 14 * 86400.0),
        ("keep_output", "64M", 64 << 20),
        ("keep_output", 65536, 65536),
        ("output_limit", "64k", 65536),
        ("output_limit", "64K", 65536),
        ("output_limit", "1.5G", 3 << 29),
        ("keep", 1.5, 1.5),
        ("output_limit", 1000, 1000),
        ("accept_new_key", "yes", True),
        ("accept_new_key", False, False),
        ("via", "", None),
        ("via", None, None),
    ],
)
def test_a_setting_is_read_from_the_configuration_and_from_the_environment(
    home: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: Any, read: Any
) -> None:
    assert setting(config(**{name: value}), name) == read
    monkeypatch.setenv(f"INVOKE_CORRA_{name.upper()}", str(value) if value is not None else "")
    assert setting(None, name) == read
    assert setting(Config(), name) == read


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("connect_timeout", "soon"),
        ("connect_timeout", -5),
        ("connect_timeout", float("inf")),
        ("connect_timeout", True),
        ("output_limit", -1),
        ("output_limit", "much"),
        ("keep_output", "1k"),
        ("accept_new_key", "maybe"),
    ],
)
def test_what_cant_be_read_is_said_with_its_name(
    home: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: Any
) -> None:
    with pytest.raises(corra.Misuse, match=rf"corra\.{name} in the configuration: "):
        setting(config(**{name: value}), name)
    monkeypatch.setenv(f"INVOKE_CORRA_{name.upper()}", str(value))
    with pytest.raises(corra.Misuse, match=rf"\$INVOKE_CORRA_{name.upper()}: "):
        setting(None, name)


def test_a_key_that_means_nothing_is_said(home: Path) -> None:
    with pytest.raises(
        corra.Misuse,
        match=r"corra\.hots in the configuration means nothing \(did you mean host\?\)",
    ) as caught:
        setting(config(hots="db1"), "via")
    assert all(name in caught.value.hint[0] for name in SETTINGS)


def test_a_variable_that_means_nothing_is_said(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INVOKE_CORRA_HOTS", "1")
    with pytest.raises(
        corra.Misuse, match=r"\$INVOKE_CORRA_HOTS means nothing \(did you mean host\?\)"
    ):
        setting(None, "via")


MINE = """
from invoke import task
from corra.tasks import attach, book, kill, logs, ps, run, status, wait
import corra

@task
def mine(c):
    print("mine")
"""
BELOW = """
from invoke import Collection, task
import corra.tasks

@task
def mine(c):
    print("mine")

@task
def run(c):
    print("my own run")

ns = Collection(mine, run)
ns.add_collection(corra.tasks.ns, "corra")
"""


def inv(
    home: Path, *words: str, program: str = "inv", **env: str
) -> subprocess.CompletedProcess[str]:
    return warm.run(*words, program=program, cwd=home, env=env)


def test_the_verbs_work_beside_ones_own_tasks(home: Path) -> None:
    (home / "tasks.py").write_text(MINE)
    (home / "invoke.yaml").write_text("corra:\n  host: local\n")
    assert inv(home, "mine").stdout == "mine\n"
    said = inv(home, "run", "--", "sh", "-c", "echo 'a  b'")
    assert (said.returncode, said.stdout) == (0, "a  b\n")
    listed = inv(home, "--list").stdout
    assert (
        all(f"  {name} " in listed for name in ("attach", "book", "kill", "run"))
        and "  mine" in listed
    )


def test_the_verbs_work_below_a_name_and_leave_ones_own_run_alone(home: Path) -> None:
    (home / "tasks.py").write_text(BELOW)
    assert inv(home, "run").stdout == "my own run\n"
    said = inv(home, "corra.run", "--host", "local", "--", "echo", "hi")
    assert (said.returncode, said.stdout) == (0, "hi\n"), said.stderr
    assert inv(home, "corra.run", "--", "echo", "hi", INVOKE_CORRA_HOST="local").stdout == "hi\n"
    listed = inv(home, "corra.ps", "--host", "local", "-a").stdout
    assert listed.count("echo hi") == 2


def test_a_bad_configuration_is_one_line_and_misuse(home: Path) -> None:
    (home / "tasks.py").write_text(MINE)
    (home / "invoke.yaml").write_text("corra:\n  connect_timeout: soon\n")
    said = inv(home, "ps", "--host", "local")
    assert (
        said.returncode == 2
        and "Traceback" not in said.stderr
        and "corra.connect_timeout in the configuration: not a duration" in said.stderr
    )


def test_under_fab_the_verbs_take_fabs_hosts_and_tasks_hand_their_connection_on(
    sshd: Sshd, home: Path
) -> None:
    if metadata.version("invoke") >= "3":
        pytest.skip("fab of Fabric 3.2 doesn't run on Invoke 3")
    text = MINE.replace("from invoke import task", "from fabric import task").replace(
        'print("mine")', 'corra.run(c, ["sh", "-c", "echo mine; exit 4"], name="mine")'
    )
    (home / "fabfile.py").write_text(text)
    flags = ["-S", str(sshd.ssh_config), "-H", "h"]
    said = inv(home, *flags, "mine", program="fab")
    assert (
        (said.returncode, said.stdout) == (4, "mine\n")
        and "FAILED: exit 4" in said.stderr
        and "Traceback" not in said.stderr
    )
    assert "mine" in inv(home, *flags, "ps", program="fab").stdout
    assert inv(home, *flags, "logs", "mine", program="fab").stdout == "mine\n"
    # Without -H a verb takes its own --host.
    assert inv(home, "logs", "--host", "h", "mine", program="fab").stdout == "mine\n"
