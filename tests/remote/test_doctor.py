"""`doctor`: what a host reports, what the report means, and that the check changes nothing."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Cli

import corra
import machine
from corra.model.host import Host
from corra.remote import checkup
from corra.remote.agent_client import Agent
from corra.remote.bootstrap import READ_FIRST
from corra.remote.exchange import Refused
from corra.remote.targets import agent_for
from corra.transport.pipes import Process
from sshd import Sshd, new_key, public

ON_HOST = Path(corra.__file__).with_name("on_host")
SOURCE = (ON_HOST / "doctor.py").read_text()
GB = 10**9


class By:
    """This machine, run by a Python of the test."""

    login = "me"
    remark = ""

    def __init__(self, python: str) -> None:
        self.host = Host("h")
        self._python = python

    def begin(self) -> None:
        pass

    def open(self, command: str) -> Process:
        return Process([self._python, "-ISE", "-c", READ_FIRST])

    def close(self) -> None:
        pass


def told(**changed: Any) -> dict[str, Any]:
    """Return the report of a healthy host, with `changes` in it."""
    room = {"free": 50 * GB, "size": 100 * GB, "floor": GB, "inodes": 10**6}
    facts: dict[str, Any] = {
        "python": "3.9.2",
        "executable": "/usr/bin/python3",
        "cache": [{**room, "dir": "/home/ops/.cache/corra", "problem": None, "agent": True}],
        "spool": [{**room, "dir": "/home/ops/.local/state/corra", "problem": None}],
        "logout": {"scope": False, "ends": False},
        "processes": [{"of": "ulimit -u", "now": 62, "most": 31000}],
        "file_size": None,
        "files": 1024,
        "time": 1000.0,
    }
    return {**facts, **changed}


def spool(**changed: Any) -> list[dict[str, Any]]:
    return [{**told()["spool"][0], **changed}]


def bad(**changed: Any) -> list[tuple[str, str, str]]:
    """Return the names of the checks that aren't ok in this report."""
    return [
        (check.verdict, check.name, check.what)
        for check in checkup.judge(told(**changed), 1000.0)
        if check.verdict != "ok"
    ]


def test_a_host_in_good_health_has_nothing_but_ok() -> None:
    assert bad() == []
    assert checkup.check_lines("db1", checkup.judge(told(), 1000.0))[0] == "db1: ready"


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (
            {
                "cache": [
                    {**spool()[0], "dir": "/c", "problem": "Permission denied", "agent": False}
                ]
            },
            ("PROBLEM", "agent", "no directory can hold it"),
        ),
        (
            {"cache": [{**spool(free=0)[0], "dir": "/c", "problem": None, "agent": False}]},
            ("PROBLEM", "agent", "no directory can hold it"),
        ),
        (
            {"spool": spool(problem="is on a remote file system (NFS)")},
            ("PROBLEM", "spool", "no directory can hold a run's output"),
        ),
        (
            {
                "spool": [
                    *spool(dir="/nfs", problem="is on a remote file system (NFS)"),
                    *spool(dir="/var/tmp/corra-7"),
                ]
            },
            ("note", "spool", "/var/tmp/corra-7"),
        ),
        (
            {"spool": spool(free=GB)},
            ("PROBLEM", "disk", "1.0 GB free, and the last 1.0 GB are left to others"),
        ),
        ({"spool": spool(free=1.9 * GB)}, ("note", "disk", "1.9 GB free of 100 GB")),
        ({"spool": spool(inodes=9)}, ("PROBLEM", "disk", "9 files more, then it is full")),
        (
            {"logout": {"ends": True, "user": "ops"}},
            ("PROBLEM", "logout", "logind ends programs, linger is off for ops"),
        ),
        ({"time": 1090.0}, ("note", "clock", "1 min 30 s ahead of ours")),
        ({"time": 0.0}, ("note", "clock", "16 min behind ours")),
        (
            {"processes": [{"of": "cgroup /user.slice", "now": 60, "most": 64}]},
            ("PROBLEM", "limits", "60 of 64 processes (cgroup /user.slice)"),
        ),
        ({"file_size": 10**6}, ("PROBLEM", "limits", "files of at most 1.0 MB (ulimit -f)")),
        ({"files": 20}, ("PROBLEM", "limits", "20 open files (ulimit -n)")),
    ],
)
def test_each_thing_that_keeps_programs_from_running_has_its_line(
    changed: dict[str, Any], said: tuple[str, str, str]
) -> None:
    assert bad(**changed) == [said]
    checks = checkup.judge(told(**changed), 1000.0)
    assert checkup.all_passed(checks) is (said[0] == "note")
    assert all(check.hint for check in checks if check.verdict != "ok")
    assert all(len(line) <= 80 for line in checkup.check_lines("db1", checks))


def test_a_disk_without_a_count_of_inodes_is_not_out_of_them() -> None:
    assert bad(spool=spool(inodes=None)) == []


@pytest.mark.parametrize("python", machine.pythons(), ids=machine.name)
def test_every_python_answers_and_nothing_is_written(python: str, home: Path) -> None:
    before = sorted(home.rglob("*"))
    link = Agent(By(python)).visit("examine", {"digest": "0" * 64})
    link.close()
    facts = link.reply
    assert facts["executable"] and facts["spool"][0]["dir"] == str(
        home / ".local" / "state" / "corra"
    )
    assert abs(facts["time"] - time.time()) < checkup.CLOCK_S * 2
    assert (
        facts["cache"][0]["dir"] == str(home / ".cache" / "corra")
        and not facts["cache"][0]["agent"]
    )
    assert checkup.all_passed(checkup.judge(facts, time.time()))
    assert sorted(home.rglob("*")) == before


def test_it_is_written_for_python_3_6_and_imports_the_standard_library_and_the_agent() -> None:
    ast.parse((ON_HOST / "visitor.py").read_text(), feature_version=(3, 6))
    tree = ast.parse(SOURCE, feature_version=(3, 6))
    imported = {
        name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names
    }
    assert imported == {"agent", "errno", "os", "resource", "stat", "sys", "time"}
    assert not any(isinstance(node, ast.ImportFrom) for node in ast.walk(tree))


@pytest.mark.sampled
@pytest.mark.parametrize("python", machine.pythons(), ids=machine.name)
@pytest.mark.parametrize("verb", ["record", "tree"])
def test_a_run_that_is_gone_is_said_to_be_gone(python: str, home: Path, verb: str) -> None:
    with pytest.raises(Refused) as caught:
        Agent(By(python)).visit(verb, {"prog_id": "gone"})
    assert caught.value.kind == "not_found" and caught.value.facts["count"] == 0


def checks(cli: Cli, *words: str) -> tuple[int, dict[str, str], list[dict[str, Any]]]:
    done = cli("doctor", "--json", *words)
    assert done.stderr == b""
    (line,) = done.stdout.splitlines()
    found = json.loads(line)["checks"]
    return done.returncode, {each["name"]: each["verdict"] for each in found}, found


@pytest.mark.bare
def test_a_host_over_ssh_is_looked_at_without_a_trace_and_place_brings_the_agent(
    cli: Cli, sshd: Sshd
) -> None:
    code, verdicts, _ = checks(cli, "--host", "h")
    assert (code, set(verdicts.values())) == (0, {"ok"})
    assert list(verdicts) == [
        "ssh",
        "host key",
        "login",
        "python",
        "agent",
        "spool",
        "disk",
        "logout",
        "clock",
        "limits",
    ]
    assert not (cli.home / ".cache").exists() and not (cli.home / ".local").exists()
    _, _, found = checks(cli, "--host", "h", "--place")
    assert found[-1]["name"] == "placed" and found[-1]["what"].startswith("agent ")
    assert list((cli.home / ".cache" / "corra").glob("*/agent.py"))
    assert "is there" in checks(cli, "--host", "h")[2][4]["what"]


@pytest.mark.parametrize("via", ["fabric", "openssh"])
def test_whatever_is_in_the_way_is_said_at_its_place(
    cli: Cli, new_sshd: Callable[..., Sshd], via: str, tmp_path: Path
) -> None:
    server = new_sshd(environment={"PATH": "/proc/nonexistent"})
    other = tmp_path / "other"
    other.write_text(f"[127.0.0.1]:{server.port} {public(new_key(tmp_path / 'key'))}\n")
    server.add_host("refused", Port=1)
    server.add_host("unknown", UserKnownHostsFile="/dev/null")
    server.add_host("changed", UserKnownHostsFile=str(other))
    server.add_host("noauth", IdentityFile=str(tmp_path / "key"))
    hosts = {
        "refused": "ssh",
        "unknown": "host key",
        "changed": "host key",
        "noauth": "login",
        "h": "python",
    }
    done = cli("doctor", "--json", "--via", via, "--host", ",".join(hosts))
    assert done.returncode == 1
    answers = {each["host"]: each["checks"] for each in map(json.loads, done.stdout.splitlines())}
    assert {host: found[-1]["name"] for host, found in answers.items()} == hosts
    assert all(
        found[-1]["verdict"] == "PROBLEM" and found[-1]["what"] for found in answers.values()
    )
    assert all(each["verdict"] == "ok" for found in answers.values() for each in found[:-1])
    assert [len(answers[host]) for host in hosts] == [1, 2, 2, 3, 4]


def test_behind_a_sudo_here_that_refuses_nothing_is_said_to_be_well(cli: Cli, sshd: Sshd) -> None:
    if not shutil.which("sudo"):
        pytest.skip("no sudo on this machine")
    for whom in ("no-such-user,root", "no-such-user,"):
        code, verdicts, found = checks(cli, "--host", "h", "--as", whom)
        assert (code, verdicts) == (1, {"sudo": "PROBLEM"})
        assert "there" not in found[0]["what"]


def test_a_host_without_python_is_ready_for_the_chaperone(
    cli: Cli, new_sshd: Callable[..., Sshd]
) -> None:
    new_sshd(
        environment={"PATH": "/bin"}
        if not os.path.exists("/bin/python3")
        else {"PATH": "/proc/nonexistent"}
    )
    code, verdicts, _ = checks(cli, "--host", "h", "--via", "chaperone")
    assert (code, verdicts["chaperone"], verdicts["spool"]) == (0, "ok", "ok")


def test_a_directory_that_can_hold_nothing_is_a_problem_and_the_agent_is_not_needed_to_say_so(
    cli: Cli,
) -> None:
    code, verdicts, found = checks(cli, "--host", "local", "--spool", "/proc/here")
    assert (code, verdicts["spool"]) == (1, "PROBLEM")
    spool_ = next(each for each in found if each["name"] == "spool")
    # Only root gets as far as the missing disk.
    why = "is on no disk" if os.getuid() == 0 else "Permission denied"
    assert spool_["hint"][0].startswith(f"/proc/here: {why}")


def test_a_spool_that_others_may_write_to_is_a_problem(cli: Cli, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    code, _, found = checks(cli, "--host", "local", "--spool", str(shared))
    assert code == 1
    assert any(
        "others can write to it or own it" in hint or "Operation not permitted" in hint
        for each in found
        for hint in each["hint"]
    )


def test_a_limit_of_the_login_is_seen(cli: Cli) -> None:
    typed = [*cli.program, "doctor", "--host", "local", "-q"]
    limited = ["sh", "-c", 'ulimit -f 1000; exec "$@"', "-", *typed]
    done = subprocess.run(
        limited, capture_output=True, env=cli.environment(), cwd=cli.home, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (1, b"")
    assert done.stdout.startswith(
        b"local: NOT READY: 1 problem\n  PROBLEM  limits    files of at most "
    )


# ---- status of a running program, and status --tree, by the same visitor


@pytest.mark.parametrize("host", ["local", "h"])
def test_the_tree_of_a_run_is_all_its_processes_each_below_its_parent(
    cli: Cli, sshd: Sshd, host: str
) -> None:
    run = corra.start(
        agent_for(host), ["sh", "-c", "echo up; sleep 600 & sh -c 'sleep 601; true'; true"]
    )
    try:
        for event in run.follow():
            if getattr(event, "data", b"") == b"up\n":
                break
        deadline = time.monotonic() + 30
        while len(looked := run.processes()["processes"]) < 4:
            assert time.monotonic() < deadline
        by_pid = {each["pid"]: each for each in looked}
        assert sorted(each["argv"][0] for each in looked) == ["sh", "sh", "sleep", "sleep"]
        (inner,) = [each for each in looked if each["argv"] == ["sleep", "601"]]
        assert by_pid[inner["parent"]]["argv"][:2] == ["sh", "-c"]
        assert all(each["memory"] > 0 and each["cpus"] < 1 for each in looked)
        shown = cli("status", "--host", host, "--tree", run.id).stdout.decode()
        assert "  tree     4 processes, 0.0 CPUs, " in shown
        plain = cli("status", "--host", host, run.id).stdout.decode()
        assert "  tree     4 processes, " in plain and "  disk     " in plain
        assert plain.count("sleep 601") == 1  # in its own command
        assert shown.splitlines()[-1].endswith("  sleep 601") or shown.splitlines()[-1].endswith(
            "  sleep 600"
        )
    finally:
        run.kill(grace=0)
    assert "tree" not in cli("status", "--host", host, "--tree", run.id).stdout.decode()
