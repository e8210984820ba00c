#!/usr/bin/env python3
"""A fleet beside the tools that people use today, `true` on 50 hosts, turn by turn in one run:
`benchmarks/fleets.py [near] [far] [wide] [share] [processes]`.

near: on loopback, where the hosts' Pythons run on the same cores. far: through lines of 50 ms
there and back, in a network namespace of its own (root only). wide: 100, 250 and 500 hosts. share:
what a verb costs its host. processes: over how many processes a client's members are spread.

All hosts are names of one private sshd. Wall and CPU are those of the client's whole tree: a
subreaper waits for each command, and for what it leaves behind.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "helpers")]

import delayed  # noqa: E402 - found by the line above
from corra.remote import bootstrap  # noqa: E402
from sshd import QUICKLY, Sshd  # noqa: E402

BIN = Path(sys.executable).parent
HOSTS = 50
ROUNDS = 7
ONCE = ("`ansible -m command -f 50`",)  # it takes 40 s of CPU
DELAY_S = 0.025
_PR_SET_CHILD_SUBREAPER = 36
PATH = "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"
# Set in the environment, it has `measure` look how much memory the client's processes take.
_MEMORY = "BENCH_MEMORY"
_LOOK_S = 0.1
# A client that says how many members make it begin one more process.
_SPREAD = """
import sys
import corra.fleets.workers as workers
workers.MEMBERS_A_PROCESS = int(sys.argv.pop(1))
from corra.__main__ import main
main()
"""


class Took(NamedTuple):
    """What one call took: seconds until its end, CPU seconds, and MB of all its processes."""

    wall_s: float
    cpu_s: float
    mb: float


def cpu_of_children_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def measured(argv: list[str], env: Mapping[str, str]) -> Took:
    """Run a command under a subreaper of its own and return what it took."""
    words = [sys.executable, __file__, "--measure", json.dumps(argv)]
    done = subprocess.run(words, env=env, stdout=subprocess.PIPE, check=False)
    told = json.loads(done.stdout)
    if told.pop("code"):
        raise SystemExit(f"{argv}: {told}")
    told.pop("said")
    return Took(**told)


def tree(pid: int) -> Iterator[int]:
    """Yield the pids of a process and of all below it."""
    yield pid
    with contextlib.suppress(OSError):
        for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            yield from tree(int(each))


def pss_mb(pid: int) -> float:
    """Return the memory of a process; a page that n processes share counts as 1/n."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) / 1024
    return 0.0


def cpu_ticks(pid: int) -> int:
    """Return the CPU of a process and of the children that it has waited for."""
    return sum(map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:15]))


def measure(argv: list[str]) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
    mb = 0.0
    with tempfile.TemporaryFile() as said, open(os.devnull, "r+b") as null:
        began = time.perf_counter()
        process = subprocess.Popen(argv, stdin=null, stdout=null, stderr=said)
        while os.environ.get(_MEMORY) and process.poll() is None:
            time.sleep(_LOOK_S)
            mb = max(mb, sum(map(pss_mb, tree(process.pid))))
        code = process.wait()
        wall_s = time.perf_counter() - began
        said.seek(0)
        words = said.read().decode(errors="replace")[-400:] if code else ""
    try:
        while True:
            os.waitpid(-1, 0)
    except ChildProcessError:
        pass
    cpu_s = cpu_of_children_s()
    print(json.dumps({"code": code, "said": words, "wall_s": wall_s, "cpu_s": cpu_s, "mb": mb}))


class Place:
    """A home, a private sshd, and names that lead to it, with the commands that are compared."""

    def __init__(
        self,
        home: Path,
        hosts: int,
        near: Sequence[str] = (),
        options: Mapping[str, str | int] | None = None,
        **where: Any,
    ) -> None:
        """`near`: the words before a client's command. `options` are sshd's."""
        (home / ".ssh").mkdir(mode=0o700)
        self.home, self.near = home, list(near)
        self.config = home / ".ssh" / "config"
        self.server = Sshd(
            home / "sshd",
            alias="node1",
            environment={"HOME": str(home), "PATH": PATH},
            ssh_config=self.config,
            known_hosts=home / ".ssh" / "known_hosts",
            options={"MaxStartups": "2000", "LogLevel": "INFO", **(options or {})},
            **where,
        ).start()
        for number in range(2, hosts + 1):
            self.server.add_host(f"node{number}")
        (home / "inventory").write_text("".join(f"node{n}\n" for n in range(1, hosts + 1)))
        mine = {"HOME", "PATH", "LANG", "LC_ALL", "TERM"}
        self.env = {
            **{name: value for name, value in os.environ.items() if name in mine},
            "HOME": str(home),
            "CORRA_SSH_CONFIG": str(self.config),
            "PDSH_SSH_ARGS_APPEND": f"-F {self.config} -oLogLevel=ERROR",
            "ANSIBLE_SSH_ARGS": f"-F {self.config} -oControlMaster=no",
        }

    def took(self, *argv: str, **env: str) -> Took:
        return measured([*self.near, *argv], {**self.env, **env})

    def corra(self, hosts: int, *flags: str, **env: str) -> Took:
        run = ["run", *flags, "--host", f"node[1-{hosts}]", "--", "true"]
        return self.took(str(BIN / "corra"), *run, **env)

    def used_s(self) -> float:
        """Return the CPU seconds of all that the server has begun, once nothing of it runs."""
        while len(pids := list(tree(self.server.pid))) > 2:
            time.sleep(0.02)
        return sum(map(cpu_ticks, pids)) / os.sysconf("SC_CLK_TCK")

    def ways(self, hosts: int) -> dict[str, Callable[[], Took]]:
        """Return the ways to run `true` on so many hosts, each as it is by itself."""
        found: dict[str, Callable[[], Took]] = {"`corra run`": lambda: self.corra(hosts)}
        names = f"node[1-{hosts}]"
        if clush := shutil.which("clush", path=f"{BIN}:{PATH}"):
            words = [clush, "-b", "-w", names, "-o", f"-F {self.config}", "true"]
            found["`clush -b`"] = lambda: self.took(*words)
        if pdsh := shutil.which("pdsh", path=PATH):
            found["`pdsh`"] = lambda: self.took(pdsh, "-R", "ssh", "-w", names, "true")
        if ansible := shutil.which("ansible", path=f"{PATH}:{BIN}"):
            inventory = str(self.home / "inventory")
            told = [ansible, "-i", inventory, "-f", "50", "-m", "command", "-a", "true", "all"]
            found["`ansible -m command -f 50`"] = lambda: self.took(*told)
        return found


@contextlib.contextmanager
def place(hosts: int, near: Sequence[str] = (), **how: Any) -> Iterator[Place]:
    home = Path(tempfile.mkdtemp(prefix="corra-bench-", dir="/tmp"))
    made = None
    try:
        made = Place(home, hosts, near, **how)
        yield made
    finally:
        if made is not None:
            made.server.stop()
        shutil.rmtree(home, ignore_errors=True)


def compared(title: str, ways: Mapping[str, Callable[[], Took]], rounds: int, base: str) -> None:
    """Call the ways in turn and print a table. A round before the first warms what is kept."""
    found: dict[str, list[Took]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, way in ways.items():
            if name in ONCE and turn > 1:
                continue
            took = way()
            if turn:
                found[name].append(took)
    print(f"### {title}\n")
    print("Ratios: of the least, of the medians, and the median of the rounds' own.\n")
    print("| | wall: least, median | ratios | client's CPU: least, median | ratios | MB |")
    print("|---|---:|---:|---:|---:|---:|")
    for name, each in found.items():
        walls, cpus = [took.wall_s for took in each], [took.cpu_s for took in each]
        ratios = [""] * 2
        if base in found:
            of = found[base]
            ratios = [
                f"{min(mine) / min(theirs):.2f}, {median(mine) / median(theirs):.2f},"
                f" {median([a / b for a, b in zip(mine, theirs, strict=False)]):.2f}"
                for mine, theirs in (
                    (walls, [took.wall_s for took in of]),
                    (cpus, [took.cpu_s for took in of]),
                )
            ]
        print(
            f"| {name} | {min(walls):.2f}, {median(walls):.2f} s | {ratios[0]} |"
            f" {min(cpus):.2f}, {median(cpus):.2f} s | {ratios[1]} |"
            f" {max(took.mb for took in each):.0f} |",
            flush=True,
        )
    print(flush=True)


def near(rounds: int) -> None:
    with place(HOSTS) as at:
        compared(f"`true` on {HOSTS} hosts, loopback", at.ways(HOSTS), rounds, "`clush -b`")


def far(rounds: int) -> None:
    with (
        delayed.line(DELAY_S) as ends,
        place(HOSTS, ends.near, inside=ends.far, address=delayed.FAR, port=2222) as at,
    ):
        title = f"`true` on {HOSTS} hosts, lines of {2000 * DELAY_S:.0f} ms there and back"
        ways = {name: way for name, way in at.ways(HOSTS).items() if name not in ONCE}
        compared(title, ways, rounds, "`clush -b`")


def wide(rounds: int) -> None:
    with place(500) as at:
        ways = {
            f"{count} hosts": partial(at.corra, count, **{_MEMORY: "1"})
            for count in (100, 250, 500)
        }
        compared("`corra run -- true` on more hosts, loopback", ways, min(rounds, 3), "100 hosts")


def processes(rounds: int) -> None:
    """One process, and one a core, for fleets of several sizes."""
    with place(100) as at:
        for count in (4, 8, 12, 16, 24, 32, 50, 100):
            ways = {
                name: partial(
                    at.took,
                    *(sys.executable, "-c", _SPREAD, members, "run"),
                    *("--host", f"node[1-{count}]", "--", "true"),
                )
                for name, members in (("threads", "1000000"), ("a process a core", "1"))
            }
            compared(f"`true` on {count} hosts", ways, rounds, "threads")


_SHARES = {
    "nothing: `true` by the login shell": ["true"],
    "a Python: `python3 -ISE -c pass`": ["exec python3 -ISE -c pass"],
    "the same, found as corra does": [
        bootstrap.loader_command().replace(bootstrap.READ_FIRST, "pass")
    ],
}


def share(rounds: int) -> None:
    """What each step of a verb costs the host, sshd's part among it.

    sshd takes the quick exchange of keys alone, so that its part is the same for each way.
    """
    with place(HOSTS, options=QUICKLY, inside=[sys.executable, __file__, "--reap"]) as at:
        names = f"node[1-{HOSTS}]"
        ssh = [str(BIN / "clush"), "-w", names, "-o", f"-F {at.config}"]
        ways: dict[str, list[str]] = {name: [*ssh, *words] for name, words in _SHARES.items()}
        inv = [str(BIN / "corra"), "run", "--host", names]
        ways["`corra run -- true`"] = [*inv, "--", "true"]
        found: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(rounds + 1):
            for name, argv in ways.items():
                before = at.used_s()
                at.took(*argv)
                if turn:
                    found[name].append((at.used_s() - before) / HOSTS * 1000)
        print("### CPU of the host, sshd's part among it\n")
        print("| for each host | least, median |\n|---|---:|")
        for name, each in found.items():
            print(f"| {name} | {min(each):.1f}, {median(each):.1f} ms |", flush=True)


def reap(argv: list[str]) -> None:
    """Run a server as its subreaper, so that this process counts what the server leaves behind."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
    with subprocess.Popen(argv) as server:
        signal.signal(signal.SIGTERM, lambda *_: server.kill())
        with contextlib.suppress(ChildProcessError):
            while True:
                os.waitpid(-1, 0)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        measure(json.loads(sys.argv[2]))
        sys.exit()
    if sys.argv[1:2] == ["--reap"]:
        reap(sys.argv[2:])
        sys.exit()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", nargs="*", default=["near", "far", "wide"])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    given = parser.parse_args()
    print(f"load {os.getloadavg()[0]:.1f}, {os.cpu_count()} cores\n")
    parts = {"near": near, "far": far, "wide": wide, "processes": processes, "share": share}
    for name in given.what:
        parts[name](given.rounds)
