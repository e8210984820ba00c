"""Many runs: a thousand at once, and a thousand one after another."""

from __future__ import annotations

import concurrent.futures
import fcntl
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

from corra import agent as host_agent

# The program waits for its line, prints its number and "go" on stdout and its number on stderr, and
# ends with its number as exit code.
PROGRAM = 'read word < "$0"; echo "$1 go"; echo "$1" >&2; exit $(($1 % 256))'
SETTLED_S = 120.0


def start(agent: Path, spool: Path, number: int, gate: Path, python: str) -> dict[str, object]:
    """Start one run and return its State."""
    program = {"argv": ["sh", "-c", PROGRAM, str(gate), str(number)], "cwd": "/"}
    request = json.dumps(
        {"prog_id": f"many-{number}", "spool": str(spool), "program": program}
    ).encode()
    done = subprocess.run(
        [python, "-ISE", str(agent), "start"], input=request, stdout=subprocess.PIPE, check=True
    )
    state: dict[str, object] = json.loads(done.stdout)
    return state


def guards(spool: Path) -> list[int]:
    """Return the pids of all live guards of the runs in `spool`."""
    found = []
    for path in (spool / "runs").iterdir():
        record = host_agent.Record.read((path / "exit").read_bytes()[: host_agent.PAGE])
        found += [
            pid
            for pid, began in record.guards
            if (process := host_agent.process(pid)) and process[2] == began and process[0] != "Z"
        ]
    return found


def pss_kb(pid: int) -> int:
    """Return the memory of one process in kB; a page that n processes share counts as 1/n. Raises
    OSError if the process is gone.
    """
    return int(
        re.findall(
            r"^Pss:\s+(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE
        )[0]
    )


def switches(pids: list[int]) -> int:
    """Return how often the processes got a processor."""
    return sum(
        sum(
            map(int, re.findall(r"ctxt_switches:\s+(\d+)", Path(f"/proc/{pid}/status").read_text()))
        )
        for pid in pids
    )


def at_once(count: int, root: Path, agent: Path, python: str = sys.executable) -> dict[str, object]:
    """Open `count` runs at once, then let all of them end; return figures and violations."""
    spool, gate = root / "spool", root / "gate"
    spool.mkdir()
    os.mkfifo(gate)
    word = os.open(gate, os.O_RDWR)
    violations = []
    began = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        states = list(
            pool.map(lambda number: start(agent, spool, number, gate, python), range(count))
        )
    took_s = time.monotonic() - began
    violations += [
        f"{state['prog_id']} {state['state']}" for state in states if state["state"] != "running"
    ]
    keepers = guards(spool)
    if len(keepers) != 3 * count:
        violations.append(f"{len(keepers)} guards of {count} runs")
    memory_mb = sum(map(pss_kb, keepers)) / 1024
    # The guards are at rest once none of them woke within a second.
    deadline = time.monotonic() + SETTLED_S
    before = switches(keepers)
    while time.monotonic() < deadline:
        time.sleep(1)
        if before == (before := switches(keepers)):
            break
    else:
        violations.append("the guards don't come to rest")
    began = time.monotonic()
    with open(word, "wb", 0) as opened:
        # One line for each reader: a shell reads byte by byte, and no further than its line.
        opened.writelines(b"go\n" for _ in range(count))
        deadline = time.monotonic() + SETTLED_S
        while (left := guards(spool)) and time.monotonic() < deadline:
            time.sleep(0.05)
    ended_s = time.monotonic() - began
    if left:
        violations.append(f"{len(left)} guards left")
    for number in range(count):
        run = host_agent.Run(str(spool), f"many-{number}")
        state = run.state()
        out, err = (
            (spool / "runs" / f"many-{number}" / name).read_bytes() for name in ("stdout", "stderr")
        )
        if (state["state"], state["return_code"], out, err) != (
            "exited",
            number % 256,
            b"%d go\n" % number,
            b"%d\n" % number,
        ):
            violations.append(
                f"many-{number}: {state['state']} {state['return_code']} {out!r} {err!r}"
            )
        if run.alive():
            violations.append(f"many-{number}: the lock is held")
        run.close()
    return {
        "runs": count,
        "MB_a_run": round(memory_mb / count, 2),
        "start_ms": round(took_s * 1000 / count, 1),
        "end_ms": round(ended_s * 1000 / count, 1),
        "said": violations,
    }


def in_turn(count: int, root: Path, agent: Path, python: str = sys.executable) -> dict[str, object]:
    """From one process, start `count` runs one after another, each to its end. Return the figures
    and what the process holds more than before.
    """
    spool, gate = root / "spool", root / "gate"
    spool.mkdir()
    os.mkfifo(gate)
    word = os.open(gate, os.O_RDWR)
    violations: list[str] = []

    def one(number: int) -> None:
        state = start(agent, spool, number, gate, python)
        os.write(word, b"\n")
        run = host_agent.Run(str(spool), str(state["prog_id"]))
        try:
            # the lock is free once the last guard has left
            fcntl.flock(run.directory, fcntl.LOCK_EX)
            fcntl.flock(run.directory, fcntl.LOCK_UN)
            after = run.state()
            if (after["state"], after["return_code"]) != ("exited", number % 256):
                violations.append(f"many-{number}: {after['state']} {after['return_code']}")
        finally:
            run.close()

    def held() -> dict[str, int]:
        tree = host_agent.process_tree([os.getpid()])
        return {
            "descriptors": len(os.listdir("/proc/self/fd")),
            "processes": len(tree),
            "locks": sum(
                str(os.getpid()) in line for line in Path("/proc/locks").read_text().splitlines()
            ),
            "files beside the runs": len(
                [each for each in os.listdir(spool / "runs") if not each.startswith("many-")]
            ),
            "files a run": len(os.listdir(spool / "runs" / f"many-{number}")),
        }

    began = time.monotonic()
    for number in range(count):
        one(number)
        while True:  # reap what the run left to this process, as init would
            try:
                if not os.waitpid(-1, os.WNOHANG)[0]:
                    break
            except ChildProcessError:
                break
        if number == 0:
            before = held()
    took_s = time.monotonic() - began
    violations += [
        f"{name}: {value} more" for name, value in held().items() if value > before[name]
    ]
    os.close(word)
    return {"runs": count, "ms_a_run": round(took_s * 1000 / count, 1), "said": violations}
