"""The end of a login session, on a machine with systemd and logind: how KillUserProcesses and
linger affect a run, and what start does about it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

import rig
from agent_door import SOURCE, eventually
from corra.model.host import Host
from corra.remote import checkup
from corra.remote.agent_client import Agent
from corra.transport.pipes import Process

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
        f"mkdir -p /etc/systemd/logind.conf.d; printf '[Login]\\nKillUserProcesses={value}\\n' > "
        f"{KILLS}; systemctl reset-failed systemd-logind; systemctl restart systemd-logind"
    )
    done = machine.root("sh", "-c", script)
    assert done.returncode == 0, done.stderr


def linger(machine: rig.Rig, on: bool) -> None:
    done = machine.root("loginctl", "enable-linger" if on else "disable-linger", rig.USER)
    assert done.returncode == 0, done.stderr
    uid = machine.root("id", "-u", rig.USER).stdout.strip()
    eventually(
        lambda: (
            (machine.root("test", "-e", f"/run/user/{uid}/systemd/private").returncode == 0) == on
            or not on
        )
    )


def start(machine: rig.Rig, *argv: str, limits: Any = None, **run: Any) -> dict[str, Any]:
    """Log in, start a long program, log out; return the agent's reply."""
    request = {
        "program": {"argv": argv or ["sleep", "1000"], "cwd": "/", "limits": limits},
        "run": run,
    }
    done = machine.ssh(f"/usr/bin/python3 -ISE {AGENT} start", json.dumps(request))
    assert done.stdout, done.stderr
    eventually(lambda: not machine.sessions(), timeout_s=60)
    reply: dict[str, Any] = json.loads(done.stdout)
    return reply


def ask(machine: rig.Rig, verb: str, prog_id: str) -> dict[str, Any]:
    done = machine.user(
        "/usr/bin/python3", "-ISE", AGENT, verb, stdin=json.dumps({"prog_id": prog_id, "grace": 5})
    )
    reply: dict[str, Any] = json.loads(done.stdout.splitlines()[0])
    return reply


def cgroup(machine: rig.Rig, pid: int) -> str:
    return machine.root("cat", f"/proc/{pid}/cgroup").stdout


def test_where_logind_kills_nothing_a_run_stays_plain_and_outlives_the_session(
    machine: rig.Rig,
) -> None:
    kill_user_processes(machine, "no")
    state = start(machine)
    assert state["state"] == "running"
    after = ask(machine, "status", state["prog_id"])
    assert (after["state"], after["supervisor"]) == ("running", "ok")
    assert "/session-" in cgroup(machine, state["pid"])
    ask(machine, "stop", state["prog_id"])


def test_where_it_kills_and_the_user_doesnt_linger_a_start_is_refused_and_leaves_nothing(
    machine: rig.Rig,
) -> None:
    linger(machine, False)
    kill_user_processes(machine, "yes")
    reply = start(machine)
    assert (reply["error"], reply["user"]) == ("no_linger", rig.USER)
    listed = machine.user("/usr/bin/python3", "-ISE", AGENT, "list", stdin="{}")
    assert [
        each["state"] for each in json.loads(listed.stdout)["runs"] if each["state"] == "starting"
    ] == []


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


def test_where_it_kills_and_the_user_lingers_a_run_has_its_own_scope_and_outlives_the_session(
    machine: rig.Rig,
) -> None:
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


LIMITS = {"memory_max": 64 << 20, "cpu_quota": 50}


def scope_of(machine: rig.Rig, pid: int) -> str:
    """Return the directory of the process's cgroup."""
    return "/sys/fs/cgroup" + cgroup(machine, pid).strip().partition("::")[2]


def holds(machine: rig.Rig, pid: int) -> tuple[str, str]:
    at = scope_of(machine, pid)
    return machine.root("cat", at + "/memory.max").stdout.strip(), machine.root(
        "cat", at + "/cpu.max"
    ).stdout.split()[0]


def has_controllers(machine: rig.Rig) -> bool:
    return {"cpu", "memory"} <= set(
        machine.root("cat", "/sys/fs/cgroup/cgroup.controllers").stdout.split()
    )


def start_as_root(machine: rig.Rig) -> dict[str, Any]:
    request = {"program": {"argv": ["sleep", "1000"], "cwd": "/", "limits": LIMITS}}
    done = machine.root(
        "sh", "-c", f"/usr/bin/python3 -ISE {AGENT} start <<'E'\n{json.dumps(request)}\nE"
    )
    reply: dict[str, Any] = json.loads(done.stdout)
    return reply


def test_limits_of_a_whole_tree_are_a_clear_no_where_nothing_would_hold_them(
    machine: rig.Rig,
) -> None:
    kill_user_processes(machine, "no")
    linger(machine, False)
    reply = start(machine, limits=LIMITS)
    assert (reply["error"], reply["user"]) == ("no_scope", rig.USER)
    assert reply["message"] == (
        f"cpu_quota and memory_max: only a systemd of {rig.USER}'s own can set that, and "
        f"linger is off"
    )
    linger(machine, True)
    if has_controllers(machine):
        return
    for reply, user in (
        (start(machine, limits=LIMITS), rig.USER),
        (start_as_root(machine), "root"),
    ):
        assert reply["error"] == "no_scope"
        assert reply["message"] == (
            f"cpu_quota and memory_max: the systemd of {user} has no cgroup v2 controller: "
            f"cpu memory"
        )


def test_limits_of_a_whole_tree_are_a_scope_of_a_lingering_users_and_of_roots(
    machine: rig.Rig,
) -> None:
    if not has_controllers(machine):
        pytest.skip("this kernel's cgroup v2 has no controllers: cgroup v1 has them")
    linger(machine, True)
    for state, place in (
        (start(machine, limits=LIMITS), "/user@"),
        (start_as_root(machine), "/system.slice/"),
    ):
        assert state["state"] == "running", state
        assert place in scope_of(machine, state["pid"]) and scope_of(
            machine, state["pid"]
        ) == scope_of(machine, state["agent_pid"])
        assert holds(machine, state["pid"]) == (str(64 << 20), "50000")
        machine.root("kill", str(state["pid"]))


def test_a_tree_that_outgrows_its_memory_is_killed_and_its_guards_live_to_say_why(
    machine: rig.Rig,
) -> None:
    if not has_controllers(machine):
        pytest.skip("this kernel's cgroup v2 has no controllers: cgroup v1 has them")
    linger(machine, True)
    state = start(machine, "/usr/bin/python3", "-c", "x = bytearray(200 << 20)", limits=LIMITS)
    eventually(lambda: ask(machine, "status", state["prog_id"])["state"] == "exited", timeout_s=60)
    after = ask(machine, "status", state["prog_id"])
    assert (after["signal"], after["reason"]) == ("SIGKILL", "oom")


class Login:
    """The booted machine; each verb runs in an ssh login of its user."""

    login = rig.USER
    remark = ""

    def __init__(self, machine: rig.Rig) -> None:
        self.host = Host("h")
        self._machine = machine

    def begin(self) -> None:
        pass

    def open(self, command: str) -> Process:
        return Process(self._machine.ssh_argv(command))

    def close(self) -> None:
        pass


@pytest.mark.parametrize(
    ("kills", "lingers", "verdict", "said"),
    [
        ("yes", False, "PROBLEM", f"logind ends programs, linger is off for {rig.USER}"),
        ("yes", True, "ok", "ends nothing: each run gets a scope of its own"),
        ("no", False, "ok", "ends nothing"),
    ],
)
def test_the_doctor_says_what_the_end_of_a_login_does_to_a_run(
    machine: rig.Rig, kills: str, lingers: bool, verdict: str, said: str
) -> None:
    linger(machine, lingers)
    kill_user_processes(machine, kills)
    checks = checkup.examine_host(Agent(Login(machine)))
    (found,) = [check for check in checks if check.name == "logout"]
    assert (found.verdict, found.what) == (verdict, said)
    assert [each.split("there:  ")[-1] for each in found.hint] == (
        [f"loginctl enable-linger {rig.USER}"] if verdict == "PROBLEM" else []
    )
