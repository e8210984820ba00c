#!/usr/bin/env python3
"""What a year of ended runs costs each verb: `benchmarks/year.py [verbs] [takeover]`.

verbs: hosts with 100, 10,000 and 100,000 ended runs of 400 days and 50 open ones, made and folded
away by the agent's own code: up to REAL of them one by one, and the others as lines like theirs,
since to make 100,000 spools takes a quarter of an hour. Each verb runs on each host in turn, ROUNDS
times. The goal: at 100,000 at most 1.3 of what it takes at 100; at most 1 kB of disk and no inode
an archived run; the agent's list in less than 30 MB. KEPT of the ended runs keep their output and
are not folded away.

takeover: the spool of before, with 20,000 runs; how long starts take while it is folded away.
"""

from __future__ import annotations

import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "helpers")]

import long_ago  # noqa: E402 - found by the line above
from corra import agent  # noqa: E402

COUNTS = (100, 10_000, 100_000)
OPEN, ROUNDS, DAYS, TAKEN_OVER = 50, 9, 400, 20_000
KEPT = int(os.environ.get("CORRA_YEAR_KEPT", "0"))
REAL = 2000
CORRA = Path(sys.executable).with_name("corra")
ARGV = ("/usr/local/bin/backup", "--to", "/srv/backup", "--all")


class Place:
    """A home with a spool on this machine, and what its verbs are asked for."""

    def __init__(self, at: Path) -> None:
        self.home = at
        self.home.mkdir()
        self.root = at / "state" / "corra"
        self.env = {**os.environ, "HOME": str(at), "XDG_STATE_HOME": str(at / "state")}
        self.env.pop("CORRA_HOST", None)
        self.ids: list[str] = []
        self.models: dict[tuple[str, int], list[bytes]] = {}

    def corra(self, *words: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [CORRA, *words],
            env=self.env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )

    def cost(self, *words: str) -> tuple[float, float, float]:
        """Return seconds of wall and of CPU, and the largest process in MB."""
        began = time.perf_counter()
        process = self.corra(*words)
        assert process.stdout
        process.stdout.read()
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        took = time.perf_counter() - began
        assert process.returncode == 0, (words, process.returncode)
        return took, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024

    def fill(self, count: int, *, folded: bool = True) -> None:
        """Make `count` runs of the last DAYS that have ended."""
        now, names = time.time_ns(), [f"job-{number}" for number in range(20)]
        written = max(0, count - KEPT - REAL) if folded else 0
        lines: dict[str, list[bytes]] = {}
        for number in range(count):
            at = now - (count - number) * (DAYS * long_ago.DAY_NS // (count + 1))
            name = "rare" if number == count // 2 else names[number % 20]
            status = (number % 50 == 1) << 8
            prog_id = long_ago.id_at(at, random.randrange(27**8))
            self.ids.append(prog_id)
            if number < written:
                month = agent.month_of(prog_id, at)
                lines.setdefault(month, []).append(self.line(prog_id, at, name, status))
                continue
            long_ago.ended(self.root, prog_id, at_ns=at, status=status, argv=ARGV, name=name)
            if folded and number == count - KEPT - 1:
                self.fold()
        archive = agent.make_archive(str(self.root))
        for month, several in lines.items():
            agent.append(archive, month, several)
            archive.month(month).write_index()
        archive.close()

    def line(self, prog_id: str, at: int, name: str, status: int) -> bytes:
        """Return what is left of a run once it is folded away."""
        key = (name, status)
        if key not in self.models:
            model = f"model-{len(self.models)}"
            long_ago.ended(self.root, model, at_ns=at, status=status, argv=ARGV, name=name)
            run = agent.Run(str(self.root), model)
            self.models[key] = agent.unsealed(agent.line_of(run, 0).rstrip(b"\n")).split(b" ", 4)
            run.close()
            shutil.rmtree(self.root / "runs" / model)
        *_, rest = self.models[key]
        times = b"%d %d %d " % (at, at + long_ago.SECOND_NS, at + 4 * long_ago.DAY_NS)
        return bytes(agent.sealed(prog_id.encode() + b" " + times + rest))

    def fold(self) -> None:
        request = {"spool": str(self.root), "records": 0}
        found = agent.collect(request, time.time_ns(), lambda: False)
        assert not found["left"]

    def open(self, count: int) -> None:
        for number in range(count):
            words = ("-q", "-d", "--name", f"open-{number}", "--host", "local")
            assert not self.corra("run", *words, "--", "sleep", "100000").wait()

    def close(self) -> None:
        self.corra("kill", "--host", "local", "-a", "-y", "--grace", "0s").wait()
        shutil.rmtree(self.home, ignore_errors=True)


def verbs_of(place: Place) -> dict[str, tuple[str, ...]]:
    """Return the command of each verb; an id, a tail and a name of the middle of the year."""
    middle = place.ids[len(place.ids) // 4 * 2]
    here = ("--host", "local")
    return {
        "ps": ("ps", *here),
        "ps -a": ("ps", "-a", *here),
        "ps --state running": ("ps", "--state", "running", *here),
        "status ID": ("status", *here, middle),
        "status TAIL": ("status", *here, agent.tail_of(middle)[:6]),
        "status NAME": ("status", *here, "rare"),
        "attach ID": ("attach", *here, middle),
        "wait ID": ("wait", *here, place.ids[-2]),
        "run true": ("run", *here, "--", "true"),
        "run --id NAME true": ("run", *here, "--id", "", "--", "true"),
        "completion": ("--complete", "--", "corra status jo"),
    }


def verbs(at: Path) -> str:
    places = [Place(at / str(count)) for count in COUNTS]
    try:
        rows = []
        for place, count in zip(places, COUNTS, strict=True):
            place.fill(count)
            place.open(OPEN)
        asked = [verbs_of(place) for place in places]
        for verb in asked[0]:
            found: list[list[tuple[float, float, float]]] = [[] for _ in places]
            for turn in range(ROUNDS + 1):
                for number, place in enumerate(places):
                    words = [each or f"own-{turn}" for each in asked[number][verb]]
                    cost = place.cost(*words)
                    if turn:  # the first places the agent and fills caches
                        found[number].append(cost)
            wall = [statistics.median(each[0] for each in of_one) for of_one in found]
            cpu = [quartile([each[1] for each in of_one]) for of_one in found]
            rows.append(
                f"| `{verb}` | "
                + " | ".join(
                    f"{1000 * a:.0f} / {1000 * b:.0f}" for a, b in zip(wall, cpu, strict=True)
                )
                + f" | {wall[-1] / wall[0]:.2f} / {cpu[-1] / cpu[0]:.2f} |"
            )
        head = " | ".join(f"{count:,}" for count in COUNTS)
        return "\n".join(
            [
                f"| verb, ms: median wall / lower quartile of CPU | {head} | ratio |",
                "|---|" + "---:|" * (len(COUNTS) + 1),
                *rows,
                "",
                *(facts(place) for place in places),
            ]
        )
    finally:
        for place in places:
            place.close()


def quartile(found: list[float]) -> float:
    return sorted(found)[len(found) // 4]


def facts(place: Place) -> str:
    """Return what the archive takes of the disk, and a list of memory."""
    files = list((place.root / "archive").iterdir())
    size = sum(each.stat().st_blocks * 512 for each in files)
    count = max(1, len(place.ids) - KEPT)
    peak, took = agent_peak(place, "list", {"limit": 100})
    filtered, slow = agent_peak(place, "list", {"match": "nothing like it"})
    _, nobody = agent_peak(place, "list", {"mine": {"user": "nobody"}})
    _, mine = agent_peak(place, "list", {"mine": {"user": "ops"}, "limit": 100})
    _, gc = agent_peak(place, "gc", {})
    return (
        f"{len(place.ids):,}: {size / count:.0f} B of disk a run in {len(files)} files;"
        f" the agent's list {peak:.1f} MB, {1000 * took:.0f} ms, and of a text that no run has"
        f" {filtered:.1f} MB, {1000 * slow:.0f} ms, of somebody who has none"
        f" {1000 * nobody:.0f} ms, of who has all {1000 * mine:.0f} ms; gc with nothing to do"
        f" {1000 * gc:.0f} ms"
    )


def agent_peak(place: Place, verb: str, request: dict[str, Any]) -> tuple[float, float]:
    """Return the peak memory in MB of an agent's verb, and its seconds."""
    import json

    (file,) = place.home.glob(".cache/corra/*/agent.py")
    load = (
        f"import sys; sys.path.insert(0, {str(file.parent)!r}); import agent; "
        "sys.exit(agent.main(sys.argv[1:], agent.Input(0), sys.stdout.buffer))"
    )
    # Python begins as a copy of this process, whose peak would be counted: sh lies between.
    argv = ["sh", "-c", 'exec "$@"', "sh", sys.executable, "-ISE", "-c", load, verb]
    began = time.perf_counter()
    process = subprocess.Popen(
        argv, env=place.env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd="/"
    )
    assert process.stdin
    assert process.stdout
    process.stdin.write(json.dumps({"spool": str(place.root), **request}).encode())
    process.stdin.close()
    process.stdout.read()
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert not process.returncode
    return used.ru_maxrss / 1024, time.perf_counter() - began


def takeover(at: Path) -> str:
    place = Place(at / "takeover")
    try:
        place.cost("run", "--host", "local", "--", "true")
        quiet = [place.cost("run", "--host", "local", "--", "true")[0] for _ in range(5)]
        place.fill(TAKEN_OVER, folded=False)
        (place.root / "gc").unlink()
        began, busy = time.perf_counter(), []
        while not busy or time.time() - (place.root / "gc").stat().st_mtime > 3600:
            busy.append(place.cost("run", "--host", "local", "--", "true")[0])
        took = time.perf_counter() - began
        left = len(list((place.root / "runs").iterdir()))
        return (
            f"takeover of {TAKEN_OVER:,} runs: done in the background after {took:.0f} s, {left}"
            f" runs left in runs/ (younger than 3 days and those of the benchmark); a run of true"
            f" takes {1000 * statistics.median(quiet):.0f} ms before, the first one with it"
            f" {1000 * busy[0]:.0f} ms, {len(busy)} meanwhile {1000 * statistics.median(busy):.0f}"
            f" ms, the slowest {1000 * max(busy):.0f} ms"
        )
    finally:
        place.close()


def main() -> None:
    parts: dict[str, Callable[[Path], str]] = {"verbs": verbs, "takeover": takeover}
    at = Path(tempfile.mkdtemp(prefix="corra-year-"))
    try:
        for name in sys.argv[1:] or parts:
            print(parts[name](at), flush=True)
    finally:
        shutil.rmtree(at, ignore_errors=True)


if __name__ == "__main__":
    main()
