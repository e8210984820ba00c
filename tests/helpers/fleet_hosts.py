"""A fleet of names that all lead to one private sshd, whose MaxStartups is OpenSSH's own."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sshd import Sshd

# OpenSSH's own: of ten connections that aren't logged in yet, some more are turned away.
LIMITS: dict[str, str | int] = {"MaxStartups": "10:30:100", "MaxSessions": 10}


@pytest.fixture
def web_hosts(new_sshd: Callable[..., Sshd]) -> Callable[[int], str]:
    """Return a function that adds `web1` .. `webN` to ssh_config and returns their set."""
    server = new_sshd(alias="web1", options=LIMITS)

    def add(count: int) -> str:
        for number in range(2, count + 1):
            server.add_host(f"web{number}")
        return f"web[1-{count}]"

    return add


@pytest.fixture
def ran(home: Path) -> Path:
    """A file that each execution of `mark` adds a line to."""
    return home / "ran"


@pytest.fixture
def latch(home: Path) -> Iterator[Callable[[int], None]]:
    """Return a function that lets so many programs go on that wait at the gate, `home / "gate"`."""
    path = home / "gate"
    os.mkfifo(path)
    held = os.open(path, os.O_RDWR)

    def let(count: int) -> None:
        os.write(held, b"\n" * count)

    yield let
    os.close(held)


def waiting(ran: Path) -> list[str]:
    """Return a program that waits at the gate."""
    return mark(ran, f"read x < {ran.parent / 'gate'}")


def mark(path: Path, more: str = "true") -> list[str]:
    """Return a program that writes a line each time it is executed."""
    return ["sh", "-c", f"echo once >> {path}; {more}"]


def lines(path: Path) -> int:
    return path.read_text().count("\n") if path.exists() else 0


def told(done: subprocess.CompletedProcess[bytes]) -> list[dict[str, Any]]:
    """Return the objects that --json has printed."""
    return [json.loads(line) for line in done.stdout.splitlines()]


def fleet_id(events: list[dict[str, Any]]) -> str:
    """Return the id of the fleet in what --json has printed."""
    return str(next(each["plan"]["id"] for each in events if each.get("event") == "plan"))


def ends(events: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the event `end` of each host."""
    return {each["host"]: each for each in events if each.get("event") == "end"}
