"""`corra serve` as a process of its own, and a client that speaks HTTP to it."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from warm import Warm

ROOT = Path(__file__).resolve().parents[2]
DEADLINE_S = 30.0


@dataclass(frozen=True)
class Answer:
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Served:
    """`corra serve` with its own data. A test may kill it and start it again at the same port. With
    `cold`, it gets a new Python interpreter.
    """

    cold = False

    def __init__(
        self,
        base: Path,
        *flags: str,
        tls: tuple[Path, Path] | None = None,
        ca: str | None = None,
        port: int = 0,
    ) -> None:
        self.base, self.flags, self.port, self.ca = base, list(flags), port, ca
        self.database: Path | str = base / "collector.sqlite3"
        if tls:
            self.flags += ["--tls-cert", str(tls[0]), "--tls-key", str(tls[1])]
        self.process: subprocess.Popen[bytes] | None = None
        self.log = base / "serve.log"
        self.url = ""

    def corra(self, *words: str) -> subprocess.CompletedProcess[bytes]:
        pipe = subprocess.PIPE
        with self.popen(self.argv(*words), stdout=pipe, stderr=pipe) as process:
            out, err = process.communicate(timeout=60)
        return subprocess.CompletedProcess(words, process.returncode, out, err)

    def popen(self, argv: list[str], **how: Any) -> subprocess.Popen[bytes]:
        how = {"stdin": subprocess.DEVNULL, "env": self.environment(), **how}
        # The server that forks has imported this checkout's code only.
        cold = self.cold or how["env"].get("PYTHONPATH") != str(ROOT)
        return subprocess.Popen(argv, **how) if cold else Warm(argv[3:], program="collector", **how)

    def argv(self, *words: str) -> list[str]:
        return [sys.executable, "-m", "corra", "serve", "--database", str(self.database), *words]

    def environment(self) -> dict[str, str]:
        return {**os.environ, "PYTHONPATH": str(ROOT)}

    def token(self, text: str = "test=read,write") -> str:
        """Return a new token as `--new-token` makes it, without a process."""
        from corra.collector import serve

        return serve.new_token(str(self.database), text)

    def start(self) -> Served:
        with open(self.log, "ab") as log:
            at = log.tell()
            argv = self.argv("--listen", f"127.0.0.1:{self.port}", *self.flags)
            self.process = self.popen(argv, stdout=log, stderr=log)
        until = time.monotonic() + DEADLINE_S
        while not (
            found := re.search(
                rb"listening at (https?://[0-9.]+:([0-9]+))", self.log.read_bytes()[at:]
            )
        ):
            assert self.process.poll() is None and time.monotonic() < until, self.log.read_text()
            time.sleep(0.01)
        self.url, self.port = found[1].decode(), int(found[2])
        return self

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait(DEADLINE_S)

    def stop(self) -> int:
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(DEADLINE_S)

    def lines(self) -> list[dict[str, Any]]:
        return [
            json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")
        ]


class Client:
    """The holder of one token."""

    def __init__(self, served: Served, token: str | None) -> None:
        self.served, self.token = served, token

    def open(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Any:
        parts = urlsplit(self.served.url)
        kind: Any = http.client.HTTPConnection
        how: dict[str, Any] = {"timeout": DEADLINE_S}
        if parts.scheme == "https":
            kind, how = (
                http.client.HTTPSConnection,
                {**how, "context": ssl.create_default_context(cadata=self.served.ca)},
            )
        connection = kind(parts.netloc, **how)
        sent = {
            **({"Authorization": f"Bearer {self.token}"} if self.token else {}),
            **(headers or {}),
        }
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.request(method, path, body, sent)
        return connection, connection.getresponse()

    def __call__(
        self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None
    ) -> Answer:
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        connection, answer = self.open(method, path, data, headers)
        with contextlib.closing(connection):
            return Answer(
                answer.status, {k.lower(): v for k, v in answer.headers.items()}, answer.read()
            )

    def append(
        self,
        prog_id: str,
        offset: int,
        data: bytes,
        name: str = "stdout",
        *,
        method: str = "POST",
        **headers: str,
    ) -> Answer:
        return self(
            method,
            f"/api/v1/agent/{prog_id}/output/{name}",
            data,
            {"Upload-Offset": str(offset), **headers},
        )

    def complete(self, prog_id: str, **state: Any) -> Answer:
        return self("POST", f"/api/v1/agent/{prog_id}/completed", ended(prog_id, **state))

    def output(self, prog_id: str, name: str = "stdout", **headers: str) -> Answer:
        return self("GET", f"/api/v1/runs/{prog_id}/output/{name}", None, headers)

    def run(self, prog_id: str) -> Any:
        return self("GET", f"/api/v1/runs/{prog_id}").json

    def register(self, prog_id: str, **about: Any) -> Client:
        """Register a run; return a client that holds the run's own token."""
        answer = self("POST", "/api/v1/runs", {"prog_id": prog_id, **about})
        assert answer.status == 201, answer.body
        return Client(self.served, answer.json["token"])

    def events(self, prog_id: str, query: str = "", **headers: str) -> Iterator[dict[str, Any]]:
        """Yield each event as {id, event, data}."""
        connection, answer = self.open(
            "GET", f"/api/v1/runs/{prog_id}/events{query}", None, headers
        )
        assert answer.status == 200
        found: dict[str, Any] = {}
        with contextlib.closing(connection):
            while line := answer.readline().decode():
                if line == "\n":
                    if "event" in found:
                        yield {**found, "data": json.loads(found["data"])}
                    found = {}
                    continue
                name, _, value = line.rstrip("\n").partition(": ")
                found[name] = value


def ended(prog_id: str, **more: Any) -> dict[str, Any]:
    """Return a final State."""
    return {
        "prog_id": prog_id, "state": "exited", "reason": "exited", "status": 0, "return_code": 0,
        "host": "db1", "argv": ["true"],
        "end_time": "2026-11-24T01:00:00.000+00:00",
        "streams": {"stdout": {"length": 0, "dropped": 0, "late": 0}}, **more,
    }  # fmt: skip
