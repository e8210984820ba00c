"""Bad input and bad luck, as an operator at a terminal of 80 columns meets them: one clear line,
the right exit code, nothing half-started.

Each command is `inv` of either Invoke, at a real sshd and at `local`.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

import console
from sshd import Sshd, new_key, public
from warm import Warm

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [pytest.mark.invoke, pytest.mark.timeout(180)]

Case = tuple[str, int, str]


@pytest.fixture
def held(home: Path) -> Callable[[list[Case]], None]:
    """Return a function that types commands, and checks each one's exit code, first line and
    grammar.
    """
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm"}

    def hold(cases: list[Case]) -> None:
        for typed, code, said in cases:
            words = ["--search-root", str(ROOT), *shlex.split(typed)[1:]]
            status, (first, *hints) = console.one(
                lambda words=words, **how: Warm(words, program="inv", cwd=home, env=env, **how)
            )
            assert first.startswith("corra: ") and said in first, f"{typed}\n{first}"
            assert status == code, f"{typed}\n{first}\n{hints}"
            # There are three hints at most, all indented. A command in a hint isn't broken over
            # lines.
            assert len(hints) <= 3 and all(hint.startswith("       ") for hint in hints), (
                f"{typed}\n{hints}"
            )
            assert len(first) <= 80, f"{typed}\n{first}"
            assert not any("Traceback" in line for line in (first, *hints)), typed

    return hold


def nothing_was_started(home: Path) -> bool:
    return not list((home / ".local" / "state" / "corra" / "runs").glob("*"))


def test_what_makes_no_sense_is_refused_before_any_host_is_asked(
    held: Callable[[list[Case]], None], home: Path
) -> None:
    held(
        [
            (
                "inv run -- true",
                2,
                "NOT STARTED: no host:  inv run --host HOST -- true   (here: local)",
            ),
            (
                "inv run --host local uptime",
                2,
                "NOT STARTED: no -- before the command:  inv run --host local -- uptime",
            ),
            ("inv run --host local --", 2, "NOT STARTED: no command:"),
            ("inv run --host local -- ''", 2, "NOT STARTED: no command given"),
            (
                "inv run --host=-oProxyCommand=x -- true",
                2,
                "NOT STARTED: not a host name: '-oProxyCommand=x'",
            ),
            ("inv run --host -x@local -- true", 2, "NOT STARTED: not a user name: '-x'"),
            (
                "inv run -i --host 'web[1-6]' -- true",
                2,
                "NOT STARTED: -i is for one host",
            ),
            (
                "inv run --host local -w -- true",
                2,
                "NOT STARTED: run has no -w;  inv --help run lists its flags",
            ),
            (
                "inv run --host joe@h --mode ssh-as --as ops -- true",
                2,
                "two logins: joe@h, and ops by --mode ssh-as",
            ),
            ("inv kill ''", 2, "NOT KILLED: an id is empty: is a variable unset?"),
            ("inv kill", 2, "NOT KILLED: say which: nothing ran when this machine last looked"),
            (
                "inv kill k7",
                125,
                "corra: k7: NOT FOUND in this machine's history: say where it runs:",
            ),
            ("inv again", 2, "NOT STARTED: again needs an id"),
        ]
    )
    assert nothing_was_started(home)


def test_a_host_that_cant_be_had_is_said_with_what_to_do(
    held: Callable[[list[Case]], None], new_sshd: Callable[..., Sshd], home: Path, tmp_path: Path
) -> None:
    server = new_sshd(environment={"PATH": "/proc/nonexistent"})
    key = new_key(tmp_path / "key")
    server.trust(public(key), "db2")
    server.add_host("refused", Port=1)
    server.add_host("unknown", UserKnownHostsFile="/dev/null")
    server.add_host("db2", HostKeyAlias="db2")
    server.add_host("noauth", IdentityFile=str(key))
    gate = tmp_path / "gate"
    gate.write_text("#!/bin/sh\necho 'gate is shut' >&2\nexit 9\n")
    gate.chmod(0o755)
    server.add_host("vpn9", ProxyCommand=str(gate))
    held(
        [
            (
                "inv run --host vpn9 -- true",
                125,
                'corra: vpn9: NOT STARTED: its ProxyCommand ended with exit 9: "gate is shut"',
            ),
            (
                "inv run --host nowhere.invalid -- true",
                125,
                "corra: nowhere.invalid: NOT STARTED: host name not found",
            ),
            (
                "inv run --host refused -- true",
                125,
                "corra: refused: NOT STARTED: connection refused by 127.0.0.1 port 1",
            ),
            (
                "inv run --host unknown -- true",
                125,
                "corra: unknown: NOT STARTED: host key unknown: ED25519 SHA256:",
            ),
            (
                "inv run --host db2 -- true",
                125,
                "corra: db2: NOT STARTED: HOST KEY CHANGED: not the one in known_hosts line 2",
            ),
            ("inv run --host noauth -- true", 125, "corra: noauth: NOT STARTED: "),
            (
                "inv run --host h -- true",
                125,
                "corra: h: NOT STARTED: no Python 3.6 or later (tried python3, python3.14 ..)",
            ),
            (
                "inv attach --host refused x",
                125,
                "corra: refused: connection refused by 127.0.0.1 port 1",
            ),
            (
                "inv kill --host refused x",
                125,
                "corra: x on refused: NOT KILLED: connection refused by 127.0.0.1 port 1",
            ),
        ]
    )
    assert nothing_was_started(home)


@pytest.mark.parametrize("host", ["local", "h"])
def test_a_program_that_cant_be_is_said_by_the_host(
    held: Callable[[list[Case]], None], sshd: Sshd, host: str
) -> None:
    held(
        [
            (
                f"inv run -q --host {host} -- upptime",
                127,
                f" on {host}: NOT STARTED: upptime: not found (ENOENT)",
            ),
            (
                f"inv run --host {host} -- /etc/passwd",
                126,
                f" on {host}: NOT STARTED: /etc/passwd: not executable (EACCES)",
            ),
            (
                f"inv run --host {host} -C /proc/no -- true",
                125,
                f" on {host}: NOT STARTED: cwd /proc/no: no such directory (ENOENT)",
            ),
            (
                f"inv run --host {host} --id pay-1 -- true",
                0,
                f"corra: pay-1 on {host}: done: exit 0",
            ),
            (
                f"inv run --host {host} --id pay-2 -- true",
                0,
                f"corra: pay-2 on {host}: done: exit 0",
            ),
            (
                f"inv run --host {host} --id pay-1 -- false",
                125,
                f"corra: pay-1 on {host}: NOT STARTED: this id already names another command",
            ),
            (
                f"inv attach --host {host} pay",
                125,
                f"corra: pay on {host}: AMBIGUOUS: 2 runs, nothing done",
            ),
            (
                f"inv status --host {host} zz9",
                125,
                f"corra: zz9 on {host}: NOT FOUND among the 5 runs of ",
            ),
        ]
    )
