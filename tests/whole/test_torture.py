"""Random faults, and a kill at every system call: a run keeps its promises whatever is killed, and
whenever.

Both run in a process of their own (`scripts/torture`): the tracer and the reaper wait for any
child, and would take another test's child.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import sshd
import sweep
import torture

# Every day has other moments. A failure prints the seed, and `scripts/torture --runs 1 --seed N`
# repeats it.
SEED = int(os.environ.get("CORRA_SEED") or int.from_bytes(os.urandom(3), "big"))
RUNS = int(os.environ.get("CORRA_TORTURE_RUNS") or 300)
MANY = int(os.environ.get("CORRA_MANY") or 60)
POINTS = int(os.environ.get("CORRA_SWEEP_POINTS") or 15)

pytestmark = [pytest.mark.alone, pytest.mark.timeout(600)]


def tortured(*words: object) -> dict[str, Any]:
    """Run `scripts/torture` with `words`; return its figures, or fail with all its output."""
    script = Path(__file__).parents[2] / "scripts" / "torture"
    done = subprocess.run(
        [sys.executable, script, "--json", *map(str, words)],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert figures["violations"] == 0
    return figures


@pytest.mark.parametrize("fault", sorted(set(torture.FAULTS)))
def test_no_byte_status_or_promise_is_lost_under(fault: str) -> None:
    if fault == "full" and os.geteuid():
        pytest.skip("only root can mount the small disk that fills")
    if fault in torture.OVER_SSH and sshd.program() is None:
        pytest.skip("no sshd on this machine: there is no link to cut")
    share = RUNS * torture.FAULTS.count(fault) // len(torture.FAULTS)
    share //= (
        2 if fault in ("together", *torture.KEPT_HERE) else 1
    )  # each case is two clients, two logins and three guards
    figures = tortured("--fault", fault, "--runs", share, "--seed", SEED)
    assert figures["runs"] == share
    if fault in ("one", "two", "together", "kept"):
        assert figures["lost"] == 0
        assert figures["kills"] > share / 8  # the other runs were over before their moment came
    if fault in torture.OVER_SSH:
        assert figures["cuts"] + figures["clients"] > share / 5
    if fault == "inv":
        assert figures["clients"] > share / 2
        assert figures[
            "resumed"
        ]  # half of the programs get stdin, and most of those are hit in the middle of it
    if fault == "together":
        assert min(figures["kills"], figures["cuts"], figures["clients"]) > share / 5


@pytest.mark.parametrize("role", [*sweep.ROLES, "standby --by-hand"])
def test_a_guard_may_be_killed_at_any_of_its_system_calls(role: str) -> None:
    figures = tortured("--sweep", *role.split(), "--points", POINTS, "--seed", SEED)
    assert (
        figures["hit"] >= figures["runs"] * 0.8
    )  # a slow machine makes fewer calls than the one run that counted them
    assert figures["runs"] >= min(POINTS, figures["calls"])


@pytest.mark.parametrize("role", sweep.ROLES[1:])
def test_a_guard_may_be_stopped_at_any_of_its_system_calls(role: str) -> None:
    """The outermost guard has none above it that would let it go on."""
    tortured("--sweep", role, "--signal", "STOP", "--points", POINTS, "--seed", SEED)


@pytest.mark.parametrize("role", [*sweep.ROLES, "standby --by-hand"])
def test_no_guard_swallows_a_term_however_early_it_comes(role: str) -> None:
    """The innermost one passes it on to the program, also before there is a keeper."""
    words = ("--sweep", *role.split(), "--signal", "TERM", "--points", POINTS, "--seed", SEED)
    assert tortured(*words)["hit"]


@pytest.mark.parametrize("how", ["--at-once", "--in-turn"])
def test_many_runs_are_each_right_and_leave_nothing_behind(how: str) -> None:
    # after 30 runs, what a single run leaves behind shows
    many = MANY if how == "--at-once" else MANY // 2
    figures = tortured(how, many)
    assert figures["runs"] == many
    if how == "--at-once":
        assert figures["MB_a_run"] <= 4.4  # measured: 3.97
