#!/usr/bin/env python3
"""Measure corra beside the tools that people use today, in one run, A B A B, against a private sshd
on loopback: `benchmarks/run.py [--write]`.

Absolute figures drift with the machine; the ratios of one run count. `--write` puts the table and
the machine into RESULTS.md.
"""

from __future__ import annotations

import argparse
import compileall
import contextlib
import datetime as dt
import functools
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "helpers"))

from proxy import Proxy  # noqa: E402 - found by the line above
from sshd import Sshd  # noqa: E402

# The time of `run` with 8 MB of output in a Python program, over an open connection.
READER = """
import sys, time
import fabric
import corra
from corra.runners import Durable
way, ssh_config, command = sys.argv[1:]
config = fabric.Config(runtime_ssh_path=ssh_config)
if way == "Durable":
    config.runners.remote = Durable
with fabric.Connection("h", config=config) as connection:
    connection.run("true", hide=True)
    began = time.perf_counter()
    result = (
        corra.run("h", command.split(), hide=True)
        if way == "corra"
        else connection.run(command, hide=True)
    )
    took = time.perf_counter() - began
    assert result.ok and len(result.stdout) == (0 if command == "true" else 8 << 20)
print(took)
"""

BIN = Path(sys.executable).parent
HOSTS_PATH = "/usr/local/bin:/usr/bin:/bin"
# Not the shim of a version manager, which would take longer than the measured program.
PYTHON = os.path.realpath(sys.executable)
# The programs that the private sshd's PATH holds.
HOSTS_PYTHON = shutil.which("python3", path=HOSTS_PATH) or PYTHON
AGENT = ROOT / "corra" / "agent.py"
MB = 1 << 20
OUTPUT_BYTES = 8 * MB
CAPTURE_BYTES = 1 << 30
FAR_BYTES = 1 << 30
SENT_BYTES = 1 << 30
DELAY_S = 0.025  # for each of the ways
IDLE_RUNS = 20


@dataclass
class Contest:
    """Several ways to do the same thing; the others are compared with the first."""

    title: str
    ways: dict[str, Callable[[], float]]
    rounds: int
    once: tuple[str, ...] = ()  # too slow to repeat
    seconds: dict[str, list[float]] = field(default_factory=dict)

    def run(self) -> None:
        for turn in range(self.rounds + 1):
            for name, way in self.ways.items():
                if name in self.once and turn > 1:
                    continue
                took = way()
                if turn:  # the first round warms caches and places the agent
                    self.seconds.setdefault(name, []).append(took)

    def rows(self) -> Iterator[str]:
        base = statistics.median(next(iter(self.seconds.values())))
        for name, took in self.seconds.items():
            median = statistics.median(took)
            yield (
                f"| {name} | {median * 1000:,.0f} | {min(took) * 1000:,.0f} | "
                f"{median / base:.2f} | {len(took)} |"
            )

    def table(self) -> str:
        head = (
            f"### {self.title}\n\n| | median ms | best ms | ratio | runs |\n"
            f"|---|---:|---:|---:|---:|"
        )
        return "\n".join([head, *self.rows()])


class Place:
    """A home with a private sshd, and the compared commands."""

    def __init__(self, home: Path) -> None:
        self.home = home
        (home / ".ssh").mkdir(mode=0o700)
        config = home / ".ssh" / "config"
        environment = {"HOME": str(home), "PATH": HOSTS_PATH}
        self.server = Sshd(
            home / "sshd",
            environment=environment,
            ssh_config=config,
            known_hosts=home / ".ssh" / "known_hosts",
        ).start()
        self.env = {
            **{
                key: value
                for key, value in os.environ.items()
                if not key.startswith(("XDG_", "CORRA_", "INVOKE_", "FABRIC_"))
            },
            "HOME": str(home),
            "CORRA_SSH_CONFIG": str(config),
        }
        self.ssh = ["ssh", "-F", str(config), "h"]
        self.fab = [str(BIN / "fab"), "--ssh-config", str(config), "-H", "h", "--"]
        self.verb = [str(BIN / "inv"), "--search-root", str(ROOT)]
        self.inv = [*self.verb, "run", "--host", "h", "--"]
        self.local = [*self.verb, "run", "--host", "local", "--"]

    def time(self, *argv: str, stdin: bytes = b"") -> float:
        began = time.perf_counter()
        done = subprocess.run(
            argv,
            input=stdin,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=self.env,
            cwd=self.home,
            check=False,
        )
        took = time.perf_counter() - began
        if done.returncode:
            raise SystemExit(f"{argv}: {done.returncode}: {done.stderr.decode(errors='replace')}")
        return took

    def agent(self, verb: str, request: dict[str, object]) -> dict[str, object]:
        """Ask the agent as by hand: Python with an isolated start, the request on stdin."""
        argv = [PYTHON, "-ISE", str(AGENT), verb]
        done = subprocess.run(
            argv,
            input=json.dumps(request).encode(),
            stdout=subprocess.PIPE,
            env=self.env,
            cwd=self.home,
            check=True,
        )
        reply: dict[str, object] = json.loads(done.stdout.splitlines()[0])
        return reply


def starts(place: Place) -> Contest:
    return Contest(
        "`true` on a host, agent in place",
        {
            "`ssh h true`": lambda: place.time(*place.ssh, "true"),
            "`inv run --host h -- true`": lambda: place.time(*place.inv, "true"),
            "`fab -H h -- true`": lambda: place.time(*place.fab, "true"),
            "`inv run --host local -- true` (no ssh)": lambda: place.time(*place.local, "true"),
        },
        rounds=10,
    )


def far_starts(place: Place, proxy: Proxy) -> Contest:
    proxy.delay_s = DELAY_S
    place.server.trust(place.server.host_public, f"[127.0.0.1]:{proxy.port}")
    place.server.add_host("far", Port=proxy.port)
    inv = [*place.verb, "run", "--host", "far", "--", "true"]
    return Contest(
        f"`true` over a line of {2 * DELAY_S * 1000:.0f} ms there and back (goal 1.1)",
        {
            "`ssh far true`": lambda: place.time(*place.ssh[:-1], "far", "true"),
            "`inv run --host far -- true`": lambda: place.time(*inv),
        },
        rounds=10,
    )


def kills(place: Place) -> Contest:
    """Start from nothing: a new connection each time, to a program that TERM ends at once."""

    def started() -> str:
        done = subprocess.run(
            [*place.verb, "run", "-d", "--host", "h", "--", "sleep", "600"],
            env=place.env,
            cwd=place.home,
            capture_output=True,
            check=True,
        )
        return done.stdout.decode().strip()

    def bare() -> float:
        with subprocess.Popen(["sleep", "600"]) as program:
            return place.time(*place.ssh, "kill", str(program.pid))

    def corra() -> float:
        prog_id = started()
        return place.time(*place.verb, "kill", prog_id)

    return Contest(
        "A program stopped from nothing (goal 2)",
        {"`ssh h kill PID`": bare, "`inv kill PROG-ID`": corra},
        rounds=10,
    )


def far_output(place: Place, memory: Path) -> Contest:
    """Bytes of a file on tmpfs through ssh; corra's spool lies on tmpfs, too."""
    big = memory / "big"
    with big.open("wb") as file:
        os.truncate(file.fileno(), FAR_BYTES)

    def corra() -> float:
        spool = memory / "far"
        try:
            return place.time(
                *place.verb, "run", "--host", "h", "--spool", str(spool), "--", "cat", str(big)
            )
        finally:
            shutil.rmtree(spool, ignore_errors=True)

    ways = {
        "`ssh h cat`": lambda: place.time(*place.ssh, "cat", str(big)),
        "`inv run --host h -- cat`": corra,
    }
    return Contest(
        "1 GiB from a host into /dev/null (goal: 1.18, 0.85 of ssh's speed)", ways, rounds=4
    )


def inputs(place: Place, memory: Path) -> Contest:
    """A gigabyte of stdin for a program. With corra all of it lies on the host before the program
    starts, and stays there if the link breaks in between.
    """
    big, there = memory / "sent", memory / "received"
    with big.open("wb") as file:
        for _ in range(SENT_BYTES // MB):
            file.write(os.urandom(MB))

    def took(*argv: str, source: bool) -> float:
        with big.open("rb") as file:
            began = time.perf_counter()
            how = {"stdin": file} if source else {"stdin": subprocess.DEVNULL}
            subprocess.run(
                argv,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=place.env,
                cwd=place.home,
                check=True,
                **how,
            )
            seconds = time.perf_counter() - began
        assert there.stat().st_size == SENT_BYTES
        there.unlink()
        shutil.rmtree(memory / "spool", ignore_errors=True)
        return seconds

    cat = f"cat > {there}"
    run = [*place.verb, "run", "--host", "h", "--spool", str(memory / "spool")]
    return Contest(
        f"{SENT_BYTES // MB} MB into a program over ssh, into memory",
        {
            "`ssh h 'cat > f' < file`": lambda: took(*place.ssh, cat, source=True),
            "`inv run --stdin file --host h -- sh -c 'cat > f'`": lambda: took(
                *run, "--stdin", str(big), "--", "sh", "-c", cat, source=False
            ),
            "`inv run -i --host h -- sh -c 'cat > f' < file`": lambda: took(
                *run, "-i", "--", "sh", "-c", cat, source=True
            ),
        },
        rounds=3,
        once=("`inv run -i --host h -- sh -c 'cat > f' < file`",),
    )


def outputs(place: Place) -> Contest:
    big = place.home / "big"
    big.write_bytes(os.urandom(OUTPUT_BYTES // 2).hex().encode())
    return Contest(
        f"{OUTPUT_BYTES // MB} MB of text from a host",
        {
            "`ssh h cat`": lambda: place.time(*place.ssh, "cat", str(big)),
            "`inv run --host h -- cat`": lambda: place.time(*place.inv, "cat", str(big)),
            "`fab -H h -- cat`": lambda: place.time(*place.fab, "cat", str(big)),
        },
        rounds=5,
        once=("`fab -H h -- cat`",),
    )


def runs(place: Place) -> Contest:
    big = place.home / "big"
    big.write_bytes(os.urandom(OUTPUT_BYTES // 2).hex().encode())

    def read(way: str, command: str = f"cat {big}") -> float:
        argv = [sys.executable, "-c", READER, way, place.env["CORRA_SSH_CONFIG"], command]
        done = subprocess.run(
            argv,
            env={**place.env, "PYTHONPATH": str(ROOT)},
            cwd=place.home,
            stdout=subprocess.PIPE,
            check=True,
        )
        return float(done.stdout)

    return Contest(
        f"{OUTPUT_BYTES // MB} MB into a Result, in Python, over a connection that stands",
        {
            "Durable's `Connection.run`": lambda: read("Durable"),
            "the same of `true`": lambda: read("Durable", "true"),
            "`corra.run`": lambda: read("corra"),
            "Fabric's `Connection.run`": lambda: read("Fabric"),
        },
        rounds=5,
        once=("Fabric's `Connection.run`",),
    )


def starts_by_hand(place: Place) -> Contest:
    program = json.dumps(
        {"program": {"argv": ["true"]}, "spool": str(place.home / "byhand")}
    ).encode()
    shutil.copy(AGENT, place.home / "agent.py")
    compileall.compile_file(place.home / "agent.py", quiet=1)
    # Like the loader and like agent.py itself: without Python's finalisation.
    agent = "import agent; posix._exit(agent.main(['start'], agent.Input(0), sys.stdout.buffer))"
    cached = f"import posix, sys; sys.path.insert(0, {str(place.home)!r}); {agent}"
    ways = {
        "`python3 -ISE -c pass`": lambda: place.time(PYTHON, "-ISE", "-c", "pass"),
        "`python3 -ISE agent.py < program.json`": lambda: place.time(
            PYTHON, "-ISE", str(AGENT), stdin=program
        ),
    }
    ways["the same with its .pyc, as placed on a host"] = lambda: place.time(
        PYTHON, "-ISE", "-c", cached, stdin=program
    )
    if shutil.which("dtach"):
        ways["`dtach -n` and `python3 -ISE -c pass`"] = lambda: place.time(
            "sh", "-c", 'dtach -n "$0/d.$$" true && "$1" -ISE -c pass', str(place.home), PYTHON
        )
    return Contest("A start by hand: daemonised and confirmed", ways, rounds=20)


def captures(place: Place, memory: Path) -> Contest:
    program = ["dd", "if=/dev/zero", "bs=64k", f"count={CAPTURE_BYTES >> 16}", "status=none"]

    def plain(text: str) -> float:
        target = memory / "out"
        try:
            return place.time("sh", "-c", f"{' '.join(program)} {text}", str(target))
        finally:
            target.unlink(missing_ok=True)

    def corra() -> float:
        """The host's own time from exec to the recorded end, with all output in the spool."""
        spool = str(memory / "spool")
        state = place.agent("start", {"program": {"argv": program}, "spool": spool})
        ended = place.agent("wait", {"prog_id": state["prog_id"], "spool": spool})
        del ended
        final = place.agent("status", {"prog_id": state["prog_id"], "spool": spool})
        shutil.rmtree(spool)
        streams = final["streams"]
        assert isinstance(streams, dict)
        assert final["return_code"] == 0
        assert streams["stdout"]["length"] == CAPTURE_BYTES
        return float(str(final["elapsed"]))

    return Contest(
        "1 GiB of output into a file on tmpfs, in writes of 64 KiB",
        {
            "`program > file`": lambda: plain('> "$0"'),
            "`program \\| cat > file`": lambda: plain('| cat > "$0"'),
            "corra's capture": corra,
        },
        rounds=5,
    )


def idle_memory(place: Place) -> str:
    """Return the table of the cost of one more idle run: the PSS of its three guards, averaged over
    many runs, with the shared pages loaded before.
    """
    rows = []

    def live() -> list[dict[str, Any]]:
        runs: Any = place.agent("list", {})["runs"]
        return [run for run in runs if run["state"] == "running"]

    def guards() -> list[int]:
        return [pid for run in live() for pid in (run["agent_pid"], *run["standby_pids"])]

    def by_hand() -> None:
        program = json.dumps({"program": {"argv": ["sleep", "600"]}}).encode()
        place.time(HOSTS_PYTHON, "-ISE", str(AGENT), stdin=program)

    def by_inv() -> None:
        place.time(*place.verb, "run", "-d", "--host", "h", "--", "sleep", "600")

    for way, start in (("`inv run -d`", by_inv), ("`agent.py < program.json`", by_hand)):
        try:
            start()
            first_kb = sum(map(pss, guards()))
            for _ in range(IDLE_RUNS):
                start()
            pids = guards()
            all_kb, before = sum(map(pss, pids)), sum(map(cpu_ticks, pids))
            time.sleep(3)  # the benchmark measures how much the guards do while nothing happens
            ticks = sum(map(cpu_ticks, pids)) - before
        finally:
            for run in live():
                place.agent("stop", {"prog_id": run["prog_id"], "grace": 0})
        runs = IDLE_RUNS + 1
        one_more, each = (all_kb - first_kb) / IDLE_RUNS / 1024, all_kb / runs / 1024
        idle_ms = ticks * 1000 // os.sysconf("SC_CLK_TCK")
        rows.append(
            f"| {way} | {len(pids) / runs:.1f} | {one_more:.2f} MB | {each:.2f} MB | {idle_ms} ms |"
        )
    # PSS divides the pages that all processes of one Python share. With other processes around, the
    # first run counts less of them, and one more run counts more.
    strangers = sum(is_of_python(pid) for pid in os.listdir("/proc") if pid.isdigit())
    version = subprocess.run(
        [HOSTS_PYTHON, "-V"], capture_output=True, text=True, check=True
    ).stdout.strip()
    return "\n".join(
        [
            (
                f"### An idle run: {IDLE_RUNS} more of them beside one, by PSS, {version}, of "
                f"which {strangers or 'no'} other processes ran (goal 4 MB)"
            ),
            "",
            (
                "| started by | guards | one more costs | all, divided by how many | CPU of all "
                "guards in 3 s |"
            ),
            "|---|---:|---:|---:|---:|",
            *rows,
        ]
    )


def is_of_python(pid: str) -> bool:
    with contextlib.suppress(OSError):
        return os.path.realpath(f"/proc/{pid}/exe") == os.path.realpath(HOSTS_PYTHON)
    return False


def pss(pid: object) -> int:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1])
    return 0


def cpu_ticks(pid: object) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def machine() -> str:
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        "?",
    )
    ssh = subprocess.run(["ssh", "-V"], capture_output=True, text=True, check=False).stderr.split(
        ","
    )[0]
    versions = ", ".join(
        f"{name} {version(name)}" for name in ("corra", "fabric", "invoke", "paramiko")
    )
    return (
        f"{dt.datetime.now(tz=dt.timezone.utc):%Y-%m-%d}, {os.cpu_count()} cores of {model}, "
        f"Linux {platform.release()}, "
        f"Python {platform.python_version()}, {ssh}, {versions}; everything on loopback."
    )


@contextlib.contextmanager
def scratch(where: str | None = None) -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="corra-bench-", dir=where))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--write", action="store_true", help="keep the result in benchmarks/RESULTS.md"
    )
    parser.add_argument(
        "--only",
        default="",
        help="one of: start far kill output result gigabyte stdin hand capture idle",
    )
    chosen = parser.parse_args()
    with (
        scratch("/tmp") as home,
        scratch("/dev/shm" if os.path.isdir("/dev/shm") else None) as memory,
    ):
        place = Place(home)
        tables = []
        with contextlib.ExitStack() as stack:
            stack.callback(place.server.stop)
            proxy = stack.enter_context(Proxy(place.server.port))
            contests: dict[str, Callable[[Place], Contest]] = {
                "start": starts,
                "far": functools.partial(far_starts, proxy=proxy),
                "kill": kills,
                "output": outputs,
                "result": runs,
                "gigabyte": functools.partial(far_output, memory=memory),
                "stdin": functools.partial(inputs, memory=memory),
                "hand": starts_by_hand,
                "capture": functools.partial(captures, memory=memory),
            }
            for name, make in contests.items():
                if chosen.only in ("", name):
                    contest = make(place)
                    contest.run()
                    tables.append(contest.table())
                    print(tables[-1] + "\n", flush=True)
            if chosen.only in ("", "idle"):
                tables.append(idle_memory(place))
                print(tables[-1] + "\n", flush=True)
    if chosen.write:
        text = "\n\n".join(
            [
                "# Results",
                "Made by `benchmarks/run.py --write`. Quote the ratios, not the milliseconds.",
                machine(),
                *tables,
            ]
        )
        results = ROOT / "benchmarks" / "RESULTS.md"
        # The text below holds figures of benchmarks that are run once, by hand.
        _, begins, by_hand = results.read_text().partition("\n## ")
        results.write_text(text + "\n" + begins + by_hand)


if __name__ == "__main__":
    main()
