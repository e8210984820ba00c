"""A runbook of ten steps over four hosts is killed at random again and again, from two machines in
turn; each step is executed exactly once.

`CORRA_STORM_KILLS` is the number of kills; `CORRA_STORM_SEED` repeats a schedule. A kill hits a
login, a start, a journal's line or a wait: that is chance.
"""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import home_environment

ROOT = Path(__file__).resolve().parents[2]
KILLS = int(os.environ.get("CORRA_STORM_KILLS", "3"))
SEED = int(os.environ.get("CORRA_STORM_SEED", str(time.time_ns() % 1_000_000)))
HOSTS = ["n1", "n2", "n3", "n4"]
STEPS = [f"step-{n}" for n in range(1, 11)]
pytestmark = pytest.mark.storm

PASS = """
import sys, corra
key, *steps = sys.argv[1:]
params = {"steps": len(steps)}
with corra.runbook(
    "storm", key=key, params=params, journal="ops1", connect_timeout=30
) as book:
    print("in", flush=True)
    hosts = corra.hosts("n[1-4]")
    ids = {}
    for n, step in enumerate(steps):
        script, mark = 'echo "$0" >> $HOME/marks; sleep 0.1', key + "/" + step
        if n % 5 == 4:  # every fifth step runs on one host
            last = book.run("n1", ["sh", "-c", script, mark], step=step)
        else:
            script += "; echo $CORRA_PROG_ID"
            found = book.run(hosts, ["sh", "-c", script, mark], step=step)
            ids[step] = sorted(result.stdout for result in found.values())
        recorded = book.do("here-" + step, lambda: ids.get(step))
        assert recorded == ids.get(step), "the recorded result differs"
print("done", flush=True)
"""


@pytest.mark.timeout(max(90, KILLS * 20))
def test_each_step_is_executed_exactly_once_however_often_the_runbook_is_killed(new_sshd, home):
    for name in (*HOSTS, "ops1", "laptop", "ops2"):
        (home / name).mkdir()
    for name in (*HOSTS, "ops1"):
        new_sshd(alias=name, environment=home_environment(home / name))
    chance = random.Random(SEED)
    kills = passes = 0
    keys: list[str] = []
    while kills < KILLS:
        keys.append(f"K{len(keys) + 1}")
        finished = False
        while not finished:
            machine = chance.choice(["laptop", "ops2"])
            patience_s = chance.uniform(0.1, 4.0) if kills < KILLS else 120.0
            passes += 1
            finished = _pass(home, machine, keys[-1], patience_s)
            kills += not finished
    expected = {f"{key}/{step}" for key in keys for step in STEPS}
    for name in HOSTS:
        ran = (home / name / "marks").read_text().split()
        due = (
            expected
            if name == "n1"
            else {each for each in expected if not each.endswith(("-5", "-10"))}
        )
        assert sorted(ran) == sorted(due), f"{name}, seed {SEED}"
    print(
        f"storm: {len(keys)} runbooks, {kills} kills in {passes} passes, {len(expected)} "
        f"steps; seed {SEED}"
    )


def _pass(home: Path, machine: str, key: str, patience_s: float) -> bool:
    """Run the runbook from `machine`, and kill it `patience_s` after its body began. Return whether
    it ended before the kill.
    """
    env = {**os.environ, **home_environment(home / machine), "PYTHONPATH": str(ROOT)}
    errors = home / f"{machine}.err"
    with (
        errors.open("wb") as err,
        subprocess.Popen(
            [sys.executable, "-c", PASS, key, *STEPS],
            env=env,
            stdout=subprocess.PIPE,
            stderr=err,
            cwd=home,
            start_new_session=True,
        ) as process,
    ):
        assert process.stdout is not None
        process.stdout.readline()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience_s)
        process.kill()
        out = process.stdout.read()
    assert process.returncode in (0, -9), errors.read_text()
    return out == b"done\n"
