"""mypy --strict over a user's runbook: the API's types accept what is right, and refuse what makes
no sense.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

GOOD = """
import corra


def upgrade(version: str, ticket: str, fleet_text: str) -> dict[str, float]:
    fleet: corra.Hosts = corra.hosts(fleet_text)
    with corra.runbook(
        "kernel", key=ticket, params={"version": version}, journal="ops1", as_user="root"
    ) as book:
        space: corra.Results = book.run(
            fleet, ["df", "-m", "/boot"], step="space", timeout="5m", max_fail=1
        )
        tight: list[corra.Host] = [
            host for host, r in space.items() if int(r.stdout.split()[-1]) < 200
        ]
        if tight:
            raise corra.Stop(f"no room on {corra.fold(tight)}")
        for n, wave in enumerate(corra.waves(fleet, 1, "100%")):
            book.confirm(f"wave {n}: {wave}?", step=f"go-{n}")
            rebooted: dict[corra.Host, corra.Reboot] = book.reboot(
                wave, step="reboot", timeout="15m"
            )
        one: corra.Result = book.run(
            "lb1", ["lbctl", "enable", *fleet], step="enable", env={"A": "b"}, warn=True
        )
        count: int = book.do("count", len, "abc")
        book.note(f"{count} {one.prog_id}")
        return {str(host): each.down_s for host, each in rebooted.items()}


def other() -> bytes:
    run: corra.Run = corra.start(
        "db1",
        ["sleep", "1"],
        name="x",
        timeout="1h",
        keep_output="64M",
        limits={"files": 4096, "cpu": "1h", "core": (0, -1)},
    )
    for event in run.follow():
        match event:
            case corra.Output(stream="stdout", data=data):
                return data
    with corra.fleet("web[1-6]", ["true"], batch="10%", max_fail=1, timeout="1h") as fleet:
        rolling: corra.Rolling = fleet.follow(confirm=lambda question: True)
        for each in rolling:
            match each:
                case corra.Standing(what="failed", member=member, state=state):
                    print(member, state and state.return_code)
                case corra.Wrote(data=data):
                    return data
        bad: tuple[str, ...] = rolling.result.failed
        killed: corra.FleetKilled = fleet.kill(grace="5s")
        print(corra.fold(bad), killed.ended, corra.attach_fleet(fleet.id, "web1").wait().code)
    states: list[corra.State | corra.CorraError] = corra.ps(["db1"])
    return str(states).encode()
"""
BAD = [
    'corra.runbook("kernel")',
    'corra.runbook("k", key="x").run("db1", ["true"])',
    'corra.runbook("k", key="x").run("db1", ["true"], step="s", tiemout="5m")',
    'corra.runbook("k", key="x").run(["db1"], ["true"], step="s").stdout',
    "corra.hosts(7)",
    'corra.fleet("web[1-6]", ["true"], bach=1)',
    'corra.fleet("web[1-6]", ["true"]).roll().stdout',
    'corra.start("db1", ["true"], limits=["files=4096"])',
]


def mypy(tmp_path: Path, text: str) -> subprocess.CompletedProcess[str]:
    file = tmp_path / "book.py"
    file.write_text(text)
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--strict",
        "--cache-dir",
        str(ROOT / ".mypy_cache" / "user"),
        str(file),
    ]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "MYPYPATH": str(ROOT)},
        check=False,
        timeout=300,
    )


def test_a_typed_runbook_passes_and_each_mistake_is_found(tmp_path: Path) -> None:
    """One run of mypy reports a line for each mistake, and none for correct code."""
    said = mypy(tmp_path, GOOD + "\n\n" + "\n".join(BAD) + "\n")
    begin = (GOOD + "\n\n").count("\n") + 1
    lines = [
        int(line.split(":")[1])
        for line in said.stdout.splitlines()
        if line.startswith("book.py:") and ": error:" in line
    ]
    assert sorted(set(lines)) == list(range(begin, begin + len(BAD))), said.stdout + said.stderr
