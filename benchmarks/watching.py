"""The cost and the delay of an open follow, with the goals beside them: `benchmarks/watching.py
[--idle SECONDS]`.

It runs over a private sshd on loopback. Both ends read the same monotonic clock, so a delay is the
difference of two readings.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

from run import PYTHON, Place, cpu_ticks, scratch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

WRITES = 1000
SIGNALS = 50
WRITER = f"""
import time
time.sleep(1)
for _ in range({WRITES}):
    print(time.monotonic_ns(), flush=True)
    time.sleep(0.003)
"""
CATCHER = """
import signal, time
signal.signal(signal.SIGUSR1, lambda *_: print(time.monotonic_ns(), flush=True))
print("ready", flush=True)
while True:
    signal.pause()
"""


def delays() -> list[float]:
    """Return the ms from each write on the host to its bytes at the client."""
    import corra
    from corra.model.frames import Output

    run = corra.start("h", [PYTHON, "-c", WRITER])
    found = []
    for event in run.follow():
        if isinstance(event, Output):
            now = time.monotonic_ns()
            found += [(now - int(line)) / 1e6 for line in event.data.split()]
    return found


def signalled() -> list[float]:
    """Return the ms from a signal sent over an open follow to the program's handler."""
    import corra
    from corra.model.frames import Output

    run = corra.start("h", [PYTHON, "-c", CATCHER])
    follow = run.follow()
    came: list[int] = []
    ready = threading.Event()

    def pump() -> None:
        for event in follow:
            if isinstance(event, Output):
                came.extend(int(word) for word in event.data.split() if word != b"ready")
                ready.set()

    threading.Thread(target=pump, daemon=True).start()
    ready.wait(30)
    found = []
    for n in range(SIGNALS):
        ready.clear()
        sent = time.monotonic_ns()
        follow.signal("USR1")
        while len(came) <= n:
            ready.wait(30)
            ready.clear()
        found.append((came[n] - sent) / 1e6)
    run.kill(grace=0)
    return found


def idle(place: Place, seconds: float) -> tuple[float, float]:
    """Return an idle watcher's CPU in % of a core: the client's, and the follow's on the host."""
    client = subprocess.Popen(
        [*place.inv, "sleep", "600"],
        env=place.env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    time.sleep(3)  # the client has connected and found nothing to do
    follows = [
        pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if _is_follow(pid, place)
    ]
    before = cpu_ticks(client.pid), sum(map(cpu_ticks, follows))
    time.sleep(seconds)
    after = cpu_ticks(client.pid), sum(map(cpu_ticks, follows))
    client.terminate()
    client.wait(20)
    tick = 100 / os.sysconf("SC_CLK_TCK") / seconds
    return (after[0] - before[0]) * tick, (after[1] - before[1]) * tick


def _is_follow(pid: int, place: Place) -> bool:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes()
        return (
            b"closefd=0" in words
            and f"HOME={place.home}".encode() in Path(f"/proc/{pid}/environ").read_bytes()
        )
    except OSError:
        return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--idle", type=float, default=30, help="how long an idle watcher is watched"
    )
    chosen = parser.parse_args()
    with scratch("/tmp") as home:
        place = Place(home)
        os.environ.update(place.env)
        try:
            writes, signals = sorted(delays()), signalled()
            ours, theirs = idle(place, chosen.idle)
        finally:
            place.server.stop()
    print("| an open follow | measured | goal |\n|---|---:|---:|")
    print(
        f"| write on the host to byte at the client, p50 | {statistics.median(writes):.2f} "
        f"ms | 1 ms |"
    )
    print(f"| the same, p99 | {writes[len(writes) * 99 // 100]:.2f} ms | 10 ms |")
    print(
        f"| a signal to the program's handler, median | {statistics.median(signals):.2f} ms "
        f"| 2 ms |"
    )
    print(f"| CPU of an idle watcher, client | {ours:.2f} % | 0.1 % |")
    print(f"| CPU of an idle watcher, follow on the host | {theirs:.2f} % | 0.0 % |")


if __name__ == "__main__":
    main()
