"""Runs that have ended, by the thousand: made in this process by the agent's own functions, so that
each is what guards leave behind, without a process for each.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from corra import agent

SECOND_NS = 10**9
DAY_NS = 86400 * SECOND_NS
ORIGIN = {"user": "ops", "host": "laptop", "version": agent.VERSION}
# As three guards and a short program leave it.
USAGE = (3000, 1000, 4000, 200, 0, 0, 16, 2, 1)


def id_at(ns: int, number: int) -> str:
    """Return an id as corra makes it, of the time `ns`; another for each number."""
    import time

    tail = ""
    for _ in range(8):
        number, digit = divmod(number, len(agent.ID_ALPHABET))
        tail += agent.ID_ALPHABET[digit]
    return time.strftime("%Y%m%dt%H%M%Sz-", time.gmtime(ns // SECOND_NS)) + tail[::-1]


def claimed(
    root: Path, prog_id: str, at_ns: int, argv: tuple[str, ...], **request: Any
) -> dict[str, Any]:
    """Make the claim of a run below `root` that was started at `at_ns`; return its request."""
    request = {
        "origin": ORIGIN,
        "program": {"argv": list(argv), "cwd": "/", "host": "db1"},
        "user": "ops",
        **request,
        "prog_id": prog_id,
        "created": at_ns,
        "layout": agent.LAYOUT,
        "agent": agent.VERSION,
    }
    runs = agent.prepare_root(str(root))
    try:
        assert agent.claim(runs, prog_id, request, None, None)
    finally:
        os.close(runs)
    return request


def ended(
    root: Path,
    prog_id: str,
    *,
    at_ns: int,
    took_ns: int = SECOND_NS,
    status: int = 0,
    output: bytes = b"",
    argv: tuple[str, ...] = ("true",),
    **request: Any,
) -> str:
    """Make a run below `root` that was started at `at_ns` and has ended; return its id."""
    request = claimed(root, prog_id, at_ns, argv, **request)
    directory = os.open(root / "runs" / prog_id, os.O_RDONLY)
    try:
        finish(directory, request, at_ns, took_ns, status, output)
    finally:
        os.close(directory)
    return prog_id


def finish(
    directory: int,
    request: Mapping[str, Any],
    at_ns: int,
    took_ns: int,
    status: int,
    output: bytes,
) -> None:
    """Write into a run's directory what its guards write: launch, output, record, end."""
    launched = b"%d %d %s %d %d" % (4711, 4711, agent.boot_id().encode(), at_ns, at_ns // 7)
    file = os.open("launched.tmp", os.O_WRONLY, dir_fd=directory)
    os.pwrite(file, launched.ljust(255), 0)
    os.close(file)
    os.rename("launched.tmp", "launched", src_dir_fd=directory, dst_dir_fd=directory)
    names = agent.stream_names(request)
    if output:
        file = os.open(names[0], os.O_WRONLY, dir_fd=directory)
        os.write(file, output)
        os.close(file)
    record = agent.Record()
    record.phase, record.agent, record.ooms = "final", 4710, 0
    record.guards = [(4708, 4700), (4709, 4700), (4710, 4700)]
    record.outcome = (
        status,
        at_ns + took_ns,
        took_ns,
        "exited" if not status & 0x7F else "signaled",
    )
    record.usage = USAGE
    record.lengths = {**dict.fromkeys(names, 0), names[0]: len(output)}
    file = os.open("exit", os.O_WRONLY, dir_fd=directory)
    os.pwrite(file, record.page(), 0)
    os.close(file)
    fcntl.flock(directory, fcntl.LOCK_SH | fcntl.LOCK_NB)
    run = agent.Run(
        agent.parent(agent.parent(os.readlink(f"/proc/self/fd/{directory}"))), request["prog_id"]
    )
    state = run.state()
    run.close()
    agent.fill(directory, "state.json", agent.to_json(state).encode() + b"\n")


def abandoned(root: Path, prog_id: str, *, at_ns: int) -> str:
    """Make a claim that nobody has launched, as a starter leaves it that died at `at_ns`."""
    claimed(root, prog_id, at_ns, ("true",))
    os.utime(root / "runs" / prog_id / "launched.tmp", ns=(at_ns, at_ns))
    return prog_id
