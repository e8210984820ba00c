"""A fleet whose roller is killed at random moments, and goes on from another machine each time."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from corra.model import ids
from fleet_hosts import LIMITS, lines, mark
from sshd import QUICKLY, Sshd

Popen = Callable[[list[str], Mapping[str, str]], "subprocess.Popen[bytes]"]


def home_of(path: Path) -> dict[str, str]:
    """Return the variables that make `path` a home that knows nothing."""
    path.mkdir()
    names = {"XDG_STATE_HOME": "state", "XDG_CACHE_HOME": "cache", "XDG_CONFIG_HOME": "config"}
    return {"HOME": str(path), **{name: str(path / each) for name, each in names.items()}}


def tortured(
    popen: Popen, root: Path, runs: Path, count: int, dice: random.Random, *, kills: int
) -> dict[str, Any]:
    """Roll a fleet over web1 .. webN, and kill its roller `kills` times, at random moments.

    Each next roller has an empty home and is told one host of `runs` (the hosts' common spool).
    Returns the fleet's id, how often its program was executed, and the last roller's exit code.
    """
    fleet = f"torture-{dice.randrange(1 << 40)}"
    ran = root / f"{fleet}-ran"
    words = ["run", "--id", fleet, "--host", f"web[1-{count}]", "--batch", "25%"]
    words += ["--at-once", "8", "--", *mark(ran, f"sleep 0.0{dice.randrange(10)}")]
    code = 0
    for turn in range(kills + 1):
        reached = reached_host(runs, fleet, count, dice)
        arguments = ["attach", "--host", reached, fleet] if reached else words
        process = popen(arguments, home_of(root / f"{fleet}-{turn}"))
        if turn < kills:
            time.sleep(dice.uniform(0.05, 1.5))  # the moment of the kill is what is tried
            process.kill()
        _, said = process.communicate(timeout=900)
        code = process.returncode
        if turn == kills and code:
            sys.stderr.write(said.decode())
    return {"id": fleet, "executed": lines(ran), "code": code}


def reached_host(runs: Path, fleet: str, count: int, dice: random.Random) -> str:
    """Return a host that has a run of the fleet, any of them, or nothing."""
    names = {ids.derived("fleet", fleet, f"web{n}", 1): f"web{n}" for n in range(1, count + 1)}
    there = (
        sorted(names[each] for each in os.listdir(runs) if each in names) if runs.is_dir() else []
    )
    return dice.choice(there) if there else ""


def many_fleets(root: Path, members: int, each: int, seed: int, kills: int) -> dict[str, object]:
    """Torture fleets of `each` members until `members` were run; return the figures."""
    own = home_of(root / "there")
    server = Sshd(
        root / "sshd",
        alias="web1",
        environment={**own, "PATH": os.environ["PATH"]},
        options={**QUICKLY, **LIMITS},
    ).start()
    for number in range(2, each + 1):
        server.add_host(f"web{number}")
    here = str(Path(__file__).resolve().parents[2])
    environment = {**os.environ, "CORRA_SSH_CONFIG": str(server.ssh_config), "PYTHONPATH": here}

    def popen(words: list[str], env: Mapping[str, str]) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-m", "corra", *words],
            env={**environment, **env},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )

    dice, done, bad = random.Random(seed), 0, 0
    runs = Path(own["XDG_STATE_HOME"]) / "corra" / "runs"
    try:
        while done < members:
            found = tortured(popen, root, runs, each, dice, kills=kills)
            done += each
            if (found["executed"], found["code"]) != (each, 0):
                bad += 1
            print(f"{done}: {json.dumps(found)}", flush=True)
    finally:
        server.stop()
    return {"runs": done, "fleets": done // each, "kills": done // each * kills, "violations": bad}
