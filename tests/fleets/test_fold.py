"""Identical outputs become one group by their hashes, and one output of each group travels."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Cli

from corra.fleets.board import Board
from corra.fleets.fold import differences, grouped
from corra.fleets.plan import new_plan
from corra.model.rollout import Fact, What
from corra.model.state import State
from corra.runs.digest import Digest, Digests
from fleet_hosts import told
from proxy import Proxy
from sshd import Sshd

Many = Callable[[int], str]


def own(name: str) -> str:
    """Return shell text that is true on the first run which asks for `name`."""
    return f"mkdir {name} 2>/dev/null"


def test_hosts_with_the_same_output_and_exit_are_one_group(
    web_hosts: Many, cli: Cli, home: Path
) -> None:
    script = f"if {own(f'{home}/odd')}; then echo odd; exit 3; fi; echo same; echo more >&2"
    done = cli("run", "--fold", "--host", web_hosts(6), "--", "sh", "-c", script)
    assert done.returncode == 3
    lines = done.stdout.decode().splitlines()
    assert re.fullmatch(r"==> web\[[\d,-]+\]: 5 hosts: exit 0 <==", lines[0])
    assert lines[1] == "same"
    assert re.fullmatch(r"==> web\d: exit 3 <==", lines[2])
    assert lines[3:] == ["odd"]
    # A reader of stderr alone is told whose it is.
    said = done.stderr.decode().splitlines()
    assert said[said.index("more") - 1] == lines[0]


def test_diff_shows_what_the_smaller_groups_have_other_than_the_largest(
    web_hosts: Many, cli: Cli, home: Path
) -> None:
    script = f"echo one; {own(f'{home}/odd')} && echo 2 || echo two; echo three"
    done = cli("run", "--diff", "--host", web_hosts(4), "--", "sh", "-c", script)
    assert done.returncode == 0
    text = re.sub(r"web(\[[\d,-]+\]|\d)", "WEB", done.stdout.decode())
    assert text.splitlines() == [
        "==> WEB: 3 hosts: exit 0 <==",
        *("one", "two", "three"),
        "==> WEB: exit 0 <==",
        *("--- WEB stdout", "+++ WEB stdout", "@@ -1,4 +1,4 @@"),
        *(" one", "-two", "+2", " three", " "),
    ]


def test_diff_says_of_another_exit_with_the_same_output_that_it_is_the_same(
    web_hosts: Many, cli: Cli, home: Path
) -> None:
    script = f"echo one; ! {own(f'{home}/odd')}"
    done = cli("run", "--diff", "--host", web_hosts(3), "--", "sh", "-c", script)
    lines = done.stdout.decode().splitlines()
    assert lines[1] == "one"
    assert re.fullmatch(r"==> web\d: exit 1 <==", lines[2])
    assert lines[3:] == ["(the same output)"]


def test_a_fleet_is_folded_after_its_end_too_and_an_output_that_is_gone_is_said(
    web_hosts: Many, cli: Cli
) -> None:
    hosts = web_hosts(3)
    cli("run", "--name", "seq", "--host", hosts, "--keep-output", "64K", "--", "seq", "100000")
    done = cli("logs", "--fold", "seq")
    assert done.returncode == 0
    first, *rest = done.stdout.decode().splitlines()
    assert re.fullmatch(
        r"==> web\[1-3\]: 3 hosts: exit 0; stdout: only the last \d+ kB of 589 kB are kept <==",
        first,
    )
    assert rest[-1] == "100000"
    ids = [each["prog_id"] for each in told(cli("status", "--json", "seq")) if "prog_id" in each]
    assert cli("gc", "-y", "--host", "web1", ids[0]).returncode == 0
    done = cli("logs", "--fold", "--json", "seq")
    groups = [each for each in told(done) if each.get("event") == "group"]
    assert sorted(len(each["hosts"]) for each in groups) == [1, 2]
    gone = next(each for each in groups if len(each["hosts"]) == 1)
    assert gone["streams"]["stdout"]["start"] == gone["streams"]["stdout"]["length"] == 588895


def test_hosts_that_were_not_reached_are_a_group_of_their_own(
    web_hosts: Many, cli: Cli, home: Path
) -> None:
    hosts = web_hosts(2)
    with (home / ".ssh" / "config").open("a") as file:
        file.write("Host down\n  HostName 127.0.0.1\n  Port 1\n")
    done = cli("run", "--fold", "--host", f"{hosts},down", "--", "echo", "hi")
    assert done.returncode == 125
    assert done.stdout.decode().splitlines() == [
        "==> web[1-2]: 2 hosts: exit 0 <==",
        "hi",
        "==> down: UNREACHED: connection refused by 127.0.0.1 port 1 <==",
    ]


@pytest.mark.timeout(180)
def test_an_output_that_fifty_hosts_share_travels_once(
    new_sshd: Callable[..., Sshd], cli: Cli, home: Path
) -> None:
    """50 hosts with 2 MB each and one other: less than 5 MB come over ssh, of 100.

    Hosts and files of ten times the size: `benchmarks/fold.py`.
    """
    server = new_sshd(alias="web1", options={"MaxStartups": "10:30:100"})
    with Proxy(server.port) as proxy:
        for number in range(2, 52):
            server.add_host(
                f"node{number}", Port=proxy.port, HostKeyAlias=f"[127.0.0.1]:{server.port}"
            )
        script = f"{own(f'{home}/odd')} && echo other; head -c 2000000 /dev/zero | tr '\\0' x"
        done = cli("run", "--fold", "--host", "node[2-51]", "--", "sh", "-c", script, timeout=170)
        assert done.returncode == 0, done.stderr
        assert len(done.stdout) > 4_000_000
        assert proxy.down < 5_000_000


def board_of(*digests: Digests | None) -> Board:
    plan = new_plan([f"web{n}" for n in range(1, len(digests) + 1)], id="f", program="p")
    board = Board(plan)
    for member, each in zip(board.members, digests, strict=True):
        board.take(Fact(What.WELL, member.at, 1.0))
        member.state = State(member.prog_id, "exited", return_code=0, status=0)
        member.digests = each
    return board


def digests(start: int, end: int, length: int, text: str) -> Digests:
    return Digests(State("x", "exited"), {"stdout": Digest(start, end, length, text)})


def test_only_what_is_known_to_be_alike_is_a_group() -> None:
    """Another length, another beginning or another end is another output, whatever the hash."""
    board = board_of(
        digests(0, 5, 5, "h"),
        digests(0, 5, 5, "h"),
        digests(5, 5, 5, "h"),
        digests(1, 5, 5, "h"),
        digests(0, 4, 5, "h"),
        digests(0, 5, 5, "i"),
        None,
    )
    assert [group.title for group in grouped(board.members)] == [
        "web[1-2]: 2 hosts: exit 0",
        "web3: exit 0; stdout: all 5 B were removed on the host",
        "web4: exit 0; stdout: only the last 4 B of 5 B are kept",
        "web5: exit 0; stdout: 4 B of 5 B are on the host",
        "web6: exit 0",
        "web7: exit 0",
    ]


def test_a_difference_in_a_last_newline_or_a_carriage_return_is_shown() -> None:
    shown = list(differences({"stdout": b"a\n"}, {"stdout": b"a\r"}, ("x", "y")))
    assert shown[-3:] == ["-a", "-", "+a\r"]
    assert list(differences({"stdout": b"a"}, {"stdout": b"a"}, ("x", "y"))) == []
    assert json.dumps(shown)


def test_a_fleet_is_folded_from_a_machine_that_never_heard_of_it(
    web_hosts: Many, cli: Cli, home: Path
) -> None:
    cli("run", "--name", "known", "--host", web_hosts(2), "--", "echo", "hi")
    env = {"XDG_STATE_HOME": str(home / "elsewhere")}
    done = cli("logs", "--fold", "--host", "web2", "known", env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout == b"==> web[1-2]: 2 hosts: exit 0 <==\nhi\n"


def test_one_run_is_not_folded(cli: Cli) -> None:
    prog_id = cli("run", "-d", "--host", "local", "--", "true").stdout.decode().strip()
    for words in (["logs", "--fold"], ["attach", "--diff"], ["again", "--fold"]):
        done = cli(*words, prog_id)
        assert (done.returncode, done.stdout) == (2, b"")
        assert done.stderr.decode().splitlines()[0].endswith("is for a fleet, and this is one run")
