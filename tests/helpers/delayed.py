"""Two network namespaces and a line between them on which each packet takes its time. Root only.

The kernel's netem isn't in every kernel. Here a process reads packets from one tun device and
writes them into the other one later: SYN and ACK take as long as data.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import select
import struct
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

NEAR, FAR = "10.79.0.1", "10.79.0.2"
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x1, 0x1000
_CLONE_NEWNET = 0x40000000
_MTU = 1500


class Ends(NamedTuple):
    """The words before a command that is to run at one end. The far end's address is FAR."""

    near: list[str]
    far: list[str]


def _device(pid: int, mine: str, other: str) -> int:
    """Return the descriptor of a tun device in the network of process `pid`."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/proc/{pid}/ns/net", "rb") as there:
        if libc.setns(there.fileno(), _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns")
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH14x", b"line0", _IFF_TUN | _IFF_NO_PI))
    for words in (
        ["link", "set", "lo", "up"],
        ["addr", "add", mine, "peer", other, "dev", "line0"],
        ["link", "set", "line0", "mtu", str(_MTU), "txqueuelen", "10000", "up"],
    ):
        subprocess.run(["ip", *words], check=True)
    return device


def _carry(near: int, far: int, delay_s: float) -> None:
    """Carry packets for ever."""
    ways = {near: (far, deque()), far: (near, deque())}  # type: ignore[var-annotated]
    waiting = select.poll()
    for device in ways:
        waiting.register(device, select.POLLIN)
    while True:
        due = [queue[0][0] for _, queue in ways.values() if queue]
        pause_ms = max(0.0, (min(due) - time.monotonic()) * 1000) if due else None
        for device, _ in waiting.poll(pause_ms):
            with contextlib.suppress(BlockingIOError):
                while True:
                    packet = os.read(device, _MTU)
                    ways[device][1].append((time.monotonic() + delay_s, packet))
        now = time.monotonic()
        for target, queue in ways.values():
            while queue and queue[0][0] <= now:
                with contextlib.suppress(OSError):  # as a full queue on any line
                    os.write(target, queue.popleft()[1])


@contextlib.contextmanager
def line(delay_s: float) -> Iterator[Ends]:
    """Make the two ends; a packet takes `delay_s` each way."""
    with contextlib.ExitStack() as ended:
        pids = []
        for _ in range(2):
            place = subprocess.Popen(
                ["unshare", "-n", "sh", "-c", "echo up; exec cat"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            ended.enter_context(place)
            ended.callback(place.kill)
            assert place.stdout is not None
            place.stdout.readline()
            pids.append(place.pid)
        words = [sys.executable, __file__, str(pids[0]), str(pids[1]), str(delay_s)]
        carrier = subprocess.Popen(words, stdout=subprocess.PIPE)
        ended.enter_context(carrier)
        ended.callback(carrier.kill)
        assert carrier.stdout is not None
        assert carrier.stdout.readline() == b"up\n", "no line"
        yield Ends(*(["nsenter", f"--net=/proc/{pid}/ns/net", "--"] for pid in pids))


if __name__ == "__main__":
    one, two, delay = sys.argv[1:]
    ends = _device(int(one), NEAR, FAR), _device(int(two), FAR, NEAR)
    with contextlib.suppress(PermissionError):
        os.nice(-10)  # a line that waits for a processor would be longer than it says
    print("up", flush=True)
    _carry(*ends, float(delay))
