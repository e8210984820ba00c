#!/usr/bin/env python3
"""What the view of 500 hosts costs, and what a fold moves:
`benchmarks/fleet_view.py [view] [fold]`.

view: a Screen on a pseudo-terminal of 120 x 40 draws a board of 500 hosts twice a second, while
each of 100 running hosts writes a line each second. The goal: at most 10 % of a core.

fold: 50 hosts of a private sshd with 20 MB of equal output each, and one other; the bytes that come
over ssh are counted by a proxy. The goal: less than 50 MB. Beside it `clush -b`, where it is there.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import resource
import shutil
import struct
import subprocess
import sys
import tempfile
import termios
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "helpers")]

from proxy import Proxy  # noqa: E402 - found by the line above
from sshd import Sshd  # noqa: E402

HOSTS = 500
RUNNING = 100
SECONDS = 30.0
SIZE = 20_000_000


def cost_of_view() -> str:
    from corra.fleets.board import Board
    from corra.fleets.live import frame
    from corra.fleets.plan import new_plan
    from corra.fleets.view import Lines
    from corra.model.rollout import Fact, What
    from corra.terminal.screen import Screen

    screen = Screen()
    board = Board(new_plan([f"web{n}" for n in range(1, HOSTS + 1)], id="f", program="p"))
    lines = Lines(screen)
    lines.begins(board)
    for at in range(HOSTS):
        steps = (What.BEGUN, What.STARTED, *([What.FAILED] if at < 20 else []))
        for what in steps if at < RUNNING + 20 else ():
            board.take(Fact(what, at, 1.0))
    frames: list[float] = []

    def made(width: int, height: int) -> list[str]:
        began = time.thread_time()
        found = frame(board, width, height, colour=True)
        frames.append(time.thread_time() - began)
        return found

    made(120, 40)  # the imports
    cpu, began = time.process_time(), time.monotonic()
    screen.live_block(made)
    while (passed := time.monotonic() - began) < SECONDS:
        for at in range(20, 20 + RUNNING):
            member = board.members[at]
            data = f"step {passed:.0f} of something that takes a while, number {at}\n".encode()
            board.wrote(member, "stdout", data)
            lines.output(member, "stdout", data, 0)
            time.sleep(1 / RUNNING)
    used, took = time.process_time() - cpu, time.monotonic() - began
    screen.live_block(None)
    lines.ends()
    return (
        f"view: {100 * used / took:.1f} % of a core with the lines of {RUNNING} hosts,"
        f" {1000 * sum(frames) / len(frames):.1f} ms a frame of {HOSTS} hosts"
        f" ({100 * sum(frames) / took:.1f} %)"
    )


def view() -> None:
    """Measure in a child whose terminal this process reads: a view is drawn in a foreground."""
    told, says = os.pipe()
    pid, terminal = pty.fork()
    if pid == 0:
        fcntl.ioctl(1, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
        os.write(says, cost_of_view().encode())
        os._exit(0)
    os.close(says)
    drawn = 0
    with contextlib.suppress(OSError):  # the terminal is gone with its last program
        while data := os.read(terminal, 1 << 16):
            drawn += len(data)
    os.waitpid(pid, 0)
    print(f"{os.read(told, 1 << 12).decode()}, {drawn / SECONDS / 1000:.0f} kB/s drawn")


def children_cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def fold() -> None:
    home = Path(tempfile.mkdtemp(prefix="corra-bench-"))
    (home / ".ssh").mkdir(mode=0o700)
    env = {"HOME": str(home), "PATH": "/usr/local/bin:/usr/bin:/bin"}
    config = home / ".ssh" / "config"
    server = Sshd(
        home / "sshd",
        alias="h",
        environment=env,
        ssh_config=config,
        known_hosts=home / ".ssh" / "known_hosts",
        options={"MaxStartups": "200"},
    ).start()
    data = home / "data"
    data.write_bytes(b"".join(b"%078d\n" % n for n in range(SIZE // 79)))
    script = f"mkdir {home}/odd-$1 2>/dev/null && echo other; cat {data}"
    mine = {**os.environ, **env, "CORRA_SSH_CONFIG": str(config), "XDG_STATE_HOME": str(home / "l")}
    corra = [str(Path(sys.executable).parent / "corra"), "run", "--fold", "--host", "node[1-51]"]
    ways = {"corra run --fold": [*corra, "--", "sh", "-c", script, "sh", "corra"]}
    if clush := shutil.which("clush", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}"):
        words = [clush, "-b", "-w", "node[1-51]", "-f", "32", "-o", f"-F {config}"]
        ways["clush -b"] = [*words, f"set -- clush; {script}"]
    try:
        with Proxy(server.port) as proxy:
            for number in range(1, 52):
                name = f"[127.0.0.1]:{server.port}"
                server.add_host(f"node{number}", Port=proxy.port, HostKeyAlias=name)
            for name, argv in ways.items():
                before, began, cpu = proxy.down, time.monotonic(), children_cpu_s()
                with open(os.devnull, "wb") as null:
                    done = subprocess.run(argv, env=mine, stdout=null, check=False)
                moved, whole = (proxy.down - before) / 1e6, 51 * SIZE / 1e6
                print(
                    f"fold: {name}: rc {done.returncode}, {moved:,.0f} MB over ssh of {whole:,.0f}"
                    f" MB, {time.monotonic() - began:.1f} s, {children_cpu_s() - cpu:.1f} s of CPU"
                    " here",
                    flush=True,
                )
    finally:
        server.stop()
        shutil.rmtree(home, ignore_errors=True)


if __name__ == "__main__":
    for wanted in sys.argv[1:] or ["view", "fold"]:
        {"view": view, "fold": fold}[wanted]()
