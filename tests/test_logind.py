"""A login session's end, on a machine with systemd and logind: what KillUserProcesses and linger do to a run, and what start does about it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

import rig
from agent_door import SOURCE, eventually

pytestmark = [pytest.mark.timeout(300)]
KILLS = "/etc/systemd/logind.conf.d/corra.conf"
AGENT = "/usr/lib/corra-agent.py"


@pytest.fixture(scope="module")
def machine() -> Iterator[rig.Rig]:
    if why := rig.missing():
        pytest.skip(why)
    with rig.booted([(AGENT, SOURCE.read_text())]) as booted:
        yield booted


def kill_user_processes(machine: rig.Rig, value: str) -> None:
    script = (
        f"mkdir -p /etc/systemd/logind.conf.d; printf '[Login]\\nKillUserProcesses={value}\\n' > {KILLS}; systemctl restart systemd-logind"
    )
    done = machine.root("sh", "-c", script)
    assert done.returncode == 0, done.stderr


def linger(machine: rig.Rig, on: bool) -> None:
    done = machine.root("loginctl", "enable-linger" if on else "disable-linger", rig.USER)
    assert done.returncode == 0, done.stderr
    uid = machine.root("id", "-u", rig.USER).stdout.strip()
    eventually(lambda: (machine.root("test", "-e", f"/run/user/{uid}/systemd/private").returncode == 0) == on or not on)


def start(machine: rig.Rig, **run: Any) -> dict[str, Any]:
    """Log in, start a program that goes on for long, log out; return what the agent said."""
    request = {"program": {"argv": ["sleep", "1000"], "cwd": "/"}, "run": run}
    done = machine.ssh(f"/usr/bin/python3 -ISE {AGENT} start", json.dumps(request))
    assert done.stdout, done.stderr
    eventually(lambda: not machine.sessions(), timeout_s=60)
    reply: dict[str, Any] = json.loads(done.stdout)
    return reply


def ask(machine: rig.Rig, verb: str, prog_id: str) -> dict[str, Any]:
    done = machine.user("/usr/bin/python3", "-ISE", AGENT, verb, stdin=json.dumps({"prog_id": prog_id, "grace": 5}))
    reply: dict[str, Any] = json.loads(done.stdout.splitlines()[0])
    return reply


def cgroup(machine: rig.Rig, pid: int) -> str:
    return machine.root("cat", f"/proc/{pid}/cgroup").stdout


def test_where_logind_kills_nothing_a_run_stays_plain_and_outlives_the_session(machine: rig.Rig) -> None:
    kill_user_processes(machine, "no")
    state = start(machine)
    assert state["state"] == "running"
    after = ask(machine, "status", state["prog_id"])
    assert (after["state"], after["supervisor"]) == ("running", "ok")
    assert "/session-" in cgroup(machine, state["pid"])
    ask(machine, "stop", state["prog_id"])


def test_where_it_kills_and_the_user_doesnt_linger_a_start_is_refused_and_leaves_nothing(machine: rig.Rig) -> None:
    linger(machine, False)
    kill_user_processes(machine, "yes")
    reply = start(machine)
    assert (reply["error"], reply["user"]) == ("no_linger", rig.USER)
    listed = machine.user("/usr/bin/python3", "-ISE", AGENT, "list", stdin="{}")
    assert [each["state"] for each in json.loads(listed.stdout)["runs"] if each["state"] == "starting"] == []


def test_a_start_that_was_forced_dies_with_the_session_and_says_so(machine: rig.Rig) -> None:
    linger(machine, False)
    kill_user_processes(machine, "yes")
    state = start(machine, force=True)
    assert state["state"] == "running"

    def over() -> bool:
        return ask(machine, "status", state["prog_id"])["state"] in ("exited", "lost")

    eventually(over, timeout_s=120)
    after = ask(machine, "status", state["prog_id"])
    assert (after["state"], after["reason"], after["signal"]) in {
        ("exited", "signaled", "SIGHUP"),
        ("exited", "signaled", "SIGTERM"),
        ("exited", "killed", "SIGTERM"),
        ("exited", "signaled", "SIGKILL"),
        ("lost", "agent-gone", None),
    }


def test_where_it_kills_and_the_user_lingers_a_run_is_in_a_scope_of_its_own_and_outlives_the_session(machine: rig.Rig) -> None:
    kill_user_processes(machine, "yes")
    linger(machine, True)
    state = start(machine)
    assert state["state"] == "running"
    place = cgroup(machine, state["pid"])
    assert "/session-" not in place
    assert ".scope" in place and "/user@" in place
    after = ask(machine, "status", state["prog_id"])
    assert (after["state"], after["supervisor"], len(after["standby_pids"])) == ("running", "ok", 2)
    ask(machine, "stop", state["prog_id"])
    eventually(lambda: ask(machine, "status", state["prog_id"])["state"] == "exited")
