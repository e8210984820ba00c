#!/usr/bin/env python3
"""The collector beside the bare framework it is built on, and the cost of idle watchers:
`benchmarks/collector.py [--write]`.

It counts appends a second over 32 connections, A B A B, against a Starlette application on the same
uvicorn that reads the body and answers 200. The goals: a ratio of 0.3 with SQLite and every append
on the disk before its answer; and 1,000 idle watchers that cost no CPU.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime as dt
import multiprocessing
import os
import re
import socket
import statistics
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "helpers")]

from collector import Client, Served  # noqa: E402 - found by the line above

CONNECTIONS = 32
SECONDS = 1.0
ROUNDS = 12
WATCHERS = 1000
GOAL = 0.3


def bare(ready: object) -> None:
    """Serve the application that does nothing."""
    import uvicorn
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import Route

    async def answer(request: Request) -> Response:
        await request.body()
        return Response(b"{}", 200, media_type="application/json")

    listener = socket.create_server(("127.0.0.1", 0), backlog=2048)
    ready.send(listener.getsockname()[1])  # type: ignore[attr-defined]
    app = Starlette(routes=[Route("/{rest:path}", answer, methods=["POST"])])
    uvicorn.Server(
        uvicorn.Config(app, loop="uvloop", http="httptools", log_config=None, access_log=False)
    ).run(sockets=[listener])


def load(port: int, token: str, size: int, offsets: dict[str, int], seconds: float) -> float:
    """Return how many appends a second `port` answers with 200. `offsets` holds each connection's
    current length of its stream.
    """

    async def one(run: str, until: float) -> int:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        body, offset, done = b"x" * size, offsets[run], 0
        while time.monotonic() < until:
            head = (
                f"POST /api/v1/agent/{run}/output/stdout HTTP/1.1\r\nHost: x\r\n"
                f"Authorization: Bearer {token}\r\n"
                f"Upload-Offset: {offset}\r\nContent-Length: {size}\r\n\r\n"
            )
            writer.write(head.encode() + body)
            answer = await reader.readuntil(b"\r\n\r\n")
            if not answer.startswith(b"HTTP/1.1 200"):
                raise SystemExit(answer.decode())
            found = re.search(rb"content-length: (\d+)", answer)
            await reader.readexactly(int(found[1]) if found else 0)
            offset += size
            done += 1
        writer.close()
        offsets[run] = offset
        return done

    async def all_of_them() -> int:
        until = time.monotonic() + seconds
        return sum(await asyncio.gather(*(one(run, until) for run in offsets)))

    began = time.monotonic()
    count = asyncio.run(all_of_them())
    return count / (time.monotonic() - began)


def appends(served: Served, token: str) -> list[str]:
    ours, theirs = multiprocessing.Pipe()
    framework = multiprocessing.Process(target=bare, args=(theirs,), daemon=True)
    framework.start()
    port = ours.recv()
    rows = []
    for size in (1024, 65536):
        offsets = {
            where: {f"{where}-{size}-{number}": 0 for number in range(CONNECTIONS)}
            for where in ("bare", "ours")
        }
        load(served.port, token, size, offsets["ours"], 0.5)  # a run's first append creates the run
        pairs = []
        for _ in range(ROUNDS):
            base = load(port, token, size, offsets["bare"], SECONDS)
            pairs.append((base, load(served.port, token, size, offsets["ours"], SECONDS)))
        base, found = (statistics.median(rates) for rates in zip(*pairs, strict=True))
        ratio = statistics.median(ours / bare for bare, ours in pairs)
        rows.append(
            f"| {size // 1024} KiB | {base:,.0f} | {found:,.0f} | {found * size / 1e6:,.0f} "
            f"| {ratio:.2f} | {GOAL} |"
        )
    framework.terminate()
    return rows


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def watchers(served: Served, member: Client) -> list[str]:
    """Return rows of the server's CPU time in 10 s, without watchers and with 1,000 idle ones."""
    assert served.process is not None
    for number in range(10):
        member.append(f"watched-{number}", 0, b"x")
    rows, open_ = [], []
    for count in (0, WATCHERS):
        for number in range(count):
            connection, answer = member.open("GET", f"/api/v1/runs/watched-{number % 10}/events")
            while b"event: state" not in answer.readline():
                pass
            open_.append((connection, answer))
        before = cpu_s(served.process.pid)
        time.sleep(10)
        rows.append(f"| {count} | {(cpu_s(served.process.pid) - before) * 1000:.0f} ms |")
    for connection, _ in open_:
        connection.close()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="put the table into RESULTS.md")
    told = parser.parse_args()
    with tempfile.TemporaryDirectory() as base:
        served = Served(Path(base), "--limits", "rate=1000000")
        served.cold = True
        token = served.token()
        served.start()
        try:
            rows, idle = appends(served, token), watchers(served, Client(served, token))
        finally:
            served.stop()
    versions = ", ".join(
        f"{name} {version(name)}"
        for name in ("starlette", "uvicorn", "uvloop", "httptools", "sqlalchemy")
    )
    text = "\n".join(
        [
            "### The collector: appends a second, on the disk before the answer",
            "",
            (
                f"{dt.date.today()}, {os.cpu_count()} cores, {versions}; "  # noqa: DTZ011
                f"{CONNECTIONS} connections, medians of {ROUNDS} pairs."
            ),
            "",
            "| an append of | bare framework | collector | MB/s | ratio | goal |",
            "|---|---:|---:|---:|---:|---:|",
            *rows,
            "",
            "| idle watchers | the server's CPU in 10 s |",
            "|---:|---:|",
            *idle,
            "",
        ]
    )
    print(text)
    if told.write:
        results = ROOT / "benchmarks" / "RESULTS.md"
        before = re.sub(
            r"(?ms)\n### The collector: appends.*?(?=\n### |\Z)", "", results.read_text()
        ).rstrip("\n")
        results.write_text(f"{before}\n\n{text}")


if __name__ == "__main__":
    main()
