"""What goes wrong between a fleet and its hosts. Each host has a network, a disk and an sshd of its
own (root only); or 50 of them are names of one sshd, with OpenSSH's own limits.
"""

from __future__ import annotations

import base64
import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Cli

import islands
from fleet_hosts import LIMITS, ends, lines, mark, told
from islands import Island, Network
from sshd import Sshd, new_key, public

Many = Callable[[int], str]
PATH = "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"
# A program that says when it has begun, writes its output once the test lets it, and ends.
SCRIPT = 'echo once >> "$HOME/ran"; echo begun; until [ -e "$HOME/go" ]; do sleep 0.1; done'
GATED = ["sh", "-c", f"{SCRIPT}; seq 1 20000; echo over"]
BEGUN = b"begun\n"
WHOLE = BEGUN + b"".join(b"%d\n" % n for n in range(1, 20001)) + b"over\n"


@pytest.fixture
def network(home: Path, cli: Cli) -> Iterator[Network]:
    """A network of the test's own, with no hosts yet. `cli` runs in it."""
    if why := islands.missing():
        pytest.skip(why)
    with islands.network(home / "net", home / ".ssh") as made:
        cli.program = [*made.client, sys.executable, "-m", "corra"]
        yield made


def good(network: Network, *numbers: int) -> list[Island]:
    return [network.add(number, {"PATH": PATH}) for number in numbers]


def let_go(hosts: Iterable[Island]) -> None:
    for each in hosts:
        (each.files / "go").touch()


def with_another_key(known_hosts: Path, host: Island) -> None:
    """Have the client know another key of this host than the host has."""
    text = known_hosts.read_text()
    name = re.escape(f"[{host.address}]:{islands.PORT} ")
    other = public(new_key(known_hosts.with_name("other")))
    known_hosts.write_text(re.sub(rf"({name}).*", rf"\g<1>{other}", text))


class Roll:
    """What a fleet's --json says, as it comes."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process
        self.events: list[dict[str, Any]] = []

    def until(self, wanted: Callable[[], object]) -> None:
        """Read on until this is true."""
        assert self.process.stdout is not None
        while not wanted():
            line = self.process.stdout.readline()
            assert line, self.events[-20:]
            self.events.append(json.loads(line))

    def end(self) -> dict[str, dict[str, Any]]:
        """Read to the end, and return how each host ended."""
        assert self.process.stdout is not None
        # `communicate` would read past what `readline` has fetched already, and lose that.
        self.events += map(json.loads, self.process.stdout)
        self.process.communicate(timeout=90)
        return ends(self.events)

    def output(self, host: str) -> bytes:
        """Return what the host has written so far."""
        found = bytearray()
        for each in self.events:
            if (each["event"], each.get("host")) == ("output", host):
                assert each["offset"] == len(found)
                found += base64.b64decode(each["data"])
        return bytes(found)

    def notes(self, host: str | None = None) -> str:
        """Return what was said of a host, or of all hosts."""
        said = [each for each in self.events if each["event"] == "note"]
        return "\n".join(each["text"] for each in said if host is None or each["host"] == host)


@pytest.fixture
def rolled(cli: Cli) -> Iterator[Callable[..., Roll]]:
    """Return a function that begins a roll with these words."""
    made: list[Roll] = []

    def begin(*words: str) -> Roll:
        made.append(Roll(cli.popen("run", "--json", *words)))
        return made[-1]

    yield begin
    for each in made:
        each.process.kill()
        each.process.communicate(timeout=30)


def test_each_host_that_cannot_start_is_named_with_its_reason_and_holds_up_no_other(
    network: Network, cli: Cli, home: Path
) -> None:
    """In two waves of ten. What fails and what is not reached is just as much as is allowed."""
    good(network, *range(1, 6), *range(11, 16), 20)
    good(network, 6)[0].cut()
    network.add_mute(7, "", port=islands.PORT + 1)
    network.add_mute(8, "")
    network.add_mute(9, "SSH-2.0-OpenSSH_9.2\r\n")
    network.add(10, {"PATH": "/none"})
    good(network, 16)[0].fill()
    with_another_key(home / ".ssh/known_hosts", good(network, 17)[0])
    network.add(18, {"PATH": PATH}, ForceCommand="sleep 1000")
    network.add(19, {"PATH": PATH, "CODE": "3"})
    done = cli(
        *("run", "--json", "--host", "n[1-20]", "--batch", "10"),
        *("--max-fail", "2", "--max-unreached", "7"),
        *("--connect-timeout", "12s", "--start-timeout", "20s"),
        *("--", "sh", "-c", 'echo once >> "$HOME/ran"; exit ${CODE:-0}'),
        timeout=120,
    )
    over = ends(told(done))
    assert sorted(over) == sorted(network.islands)
    bad = {
        "n6": ("UNREACHED", "no answer from 10.77.0.6 port 2222 in 12 s"),
        "n7": ("UNREACHED", "connection refused by 10.77.0.7"),
        "n8": ("UNREACHED", "no answer from 10.77.0.8 port 2222 in 12 s"),
        "n9": ("UNREACHED", "no answer from 10.77.0.9 port 2222 in 12 s"),
        "n10": ("NOT STARTED", "no Python"),
        "n16": ("NOT STARTED", "disk full"),
        "n17": ("NOT STARTED", "HOST KEY CHANGED"),
        "n18": ("MAYBE STARTED", "no start confirmed in 20 s"),
    }
    for name, (fate, why) in bad.items():
        assert (over[name]["fate"], why in over[name]["error"]["message"]) == (fate, True), over[
            name
        ]
    assert over["n19"]["fate"] == "FAILED 3"
    assert {name for name, end in over.items() if end["fate"] == "done"} == {
        f"n{n}" for n in (*range(1, 6), *range(11, 16), 20)
    }
    once = set(network.islands) - set(bad)
    assert {name: host.ran() for name, host in network.islands.items()} == {
        name: int(name in once) for name in network.islands
    }
    assert "waiting for n[6,8-9]" in "".join(each.get("text", "") for each in told(done))
    assert done.returncode == 125


def test_a_roll_stops_at_hosts_that_are_down_and_goes_on_with_them_once_they_are_up(
    network: Network, cli: Cli
) -> None:
    hosts = good(network, *range(1, 9))
    down = hosts[2:4]
    for each in down:
        each.cut()
    words = ["--id", "up-1", "--host", "n[1-8]", "--batch", "2", "--max-fail", "1"]
    command = ["--", "sh", "-c", 'echo once >> "$HOME/ran"']
    done = cli("run", *words, "--connect-timeout", "8s", *command)
    assert done.returncode == 125
    assert b"STOPPED in wave 2 of 4: 2 of 4 unreached: " in done.stderr
    assert [each.ran() for each in hosts] == [1, 1, 0, 0, 0, 0, 0, 0]
    for each in down:
        each.mend()
    done = cli("again", "up-1")
    assert done.returncode == 0, done.stderr
    assert [each.ran() for each in hosts] == [1] * 8


def test_a_client_that_loses_its_network_half_way_goes_on_with_all_hosts_when_it_is_back(
    network: Network, rolled: Callable[..., Roll]
) -> None:
    hosts = good(network, *range(1, 21))
    roll = rolled("--dead-after", "3s", "--host", "n[1-20]", "--", *GATED)
    roll.until(lambda: all(roll.output(each.name) == BEGUN for each in hosts))
    network.cut()
    let_go(hosts)
    roll.until(lambda: all("link lost" in roll.notes(each.name) for each in hosts))
    network.mend()
    over = roll.end()
    assert [over[each.name]["fate"] for each in hosts] == ["done"] * 20
    assert all(roll.output(each.name) == WHOLE for each in hosts)
    assert all("link back" in roll.notes(each.name) for each in hosts)
    assert [each.ran() for each in hosts] == [1] * 20
    assert roll.process.returncode == 0


def test_a_host_whose_link_is_cut_for_good_is_left_running_and_the_next_wave_waits_for_it(
    network: Network, rolled: Callable[..., Roll], cli: Cli
) -> None:
    """Beside it a host whose link comes back. The fleet is attached to once the link is mended."""
    hosts = good(network, *range(1, 5))
    cut, restored = hosts[:2]
    words = ["--dead-after", "3s", "--reconnect-timeout", "8s", "--batch", "2", "--id", "up-1"]
    roll = rolled(*words, "--host", "n[1-4]", "--", *GATED)
    roll.until(lambda: all(roll.output(each.name) == BEGUN for each in hosts[:2]))
    cut.cut()
    restored.cut()
    roll.until(lambda: all("link lost" in roll.notes(each.name) for each in hosts[:2]))
    let_go(hosts)
    restored.mend()
    over = roll.end()
    assert over["n2"]["fate"] == "done" and roll.output("n2") == WHOLE
    assert "given up" in roll.notes("n1")
    assert (set(over), roll.process.returncode) == ({"n2"}, 122)
    assert roll.events[-1]["why"] == "1 done, 1 running, 2 not started"
    assert [each.ran() for each in hosts] == [1, 1, 0, 0]
    cut.mend()
    done = cli("attach", "--json", "up-1")
    assert (done.returncode, set(ends(told(done)))) == (0, {each.name for each in hosts})
    assert [each.ran() for each in hosts] == [1, 1, 1, 1]


def test_a_host_that_comes_back_with_another_key_is_not_believed_and_is_named(
    network: Network, rolled: Callable[..., Roll], home: Path
) -> None:
    (host,) = good(network, 1)
    roll = rolled("--dead-after", "3s", "--fold", "--host", "n1", "--", *GATED)
    roll.until(lambda: any(each["event"] == "start" for each in roll.events))
    host.cut()
    roll.until(lambda: "link lost" in roll.notes("n1"))
    with_another_key(home / ".ssh/known_hosts", host)
    let_go([host])
    host.mend()
    roll.until(lambda: "no link yet: HOST KEY CHANGED" in roll.notes("n1"))
    roll.process.send_signal(signal.SIGINT)
    assert (roll.end(), roll.process.returncode) == ({}, -signal.SIGINT)
    assert host.ran() == 1


def test_a_disk_that_fills_up_half_way_is_said_of_its_host_and_the_fleet_goes_on_with_room(
    network: Network, rolled: Callable[..., Roll]
) -> None:
    hosts = good(network, 1, 2)
    roll = rolled("--host", "n[1-2]", "--", *GATED)
    roll.until(lambda: all(roll.output(each.name) == BEGUN for each in hosts))
    hosts[0].fill()
    let_go(hosts[1:])
    hosts[0].do("rm", "-f", "/var/tmp/fill")
    (hosts[0].files / "go").touch()
    roll.until(lambda: "HELD BACK: no room on the disk there" in roll.notes("n1"))
    hosts[0].do("rm", str(hosts[0].home / "fill"))
    over = roll.end()
    assert "there is room again, it goes on" in roll.notes("n1")
    assert [over[each.name]["fate"] for each in hosts] == ["done", "done"]
    assert all(roll.output(each.name) == WHOLE for each in hosts)


def test_fifty_addresses_of_one_sshd_in_waves_up_to_the_threshold(
    network: Network, cli: Cli, home: Path, ran: Path
) -> None:
    """MaxStartups is OpenSSH's own. The program fails on three hosts, of which two are allowed."""
    server = network.listen_here(home / "sshd", {**LIMITS}, {"HOME": str(home), "PATH": PATH})
    for number in range(1, 51):
        server.trust(server.host_public, f"[127.0.1.{number}]:{server.port}")
    (home / ".ssh/config").write_text(
        f"Host 127.0.1.*\n  Port {server.port}\n  IdentityFile {server.user_key}\n"
        f"  UserKnownHostsFile {server.known_hosts}\n"
    )
    hosts = "127.0.1.[1-50]"
    fail = 'case "$SSH_CONNECTION" in *" 127.0.1."[123]" "*) exit 7;; esac'
    words = ["--json", "--batch", "1,10%,100%", "--at-once", "50", "--max-fail", "2"]
    done = cli("run", *words, "--host", hosts, "--", *mark(ran, fail), timeout=120)
    over = ends(told(done))
    # The third fails in the second wave, of five.
    assert (len(over), lines(ran), done.returncode) == (6, 6, 7)
    ran.unlink()
    words[-1] = "3"
    done = cli("run", *words, "--host", hosts, "--", *mark(ran, fail), timeout=120)
    over = ends(told(done))
    assert (len(over), lines(ran), done.returncode) == (50, 50, 7)
    failed = {host for host, end in over.items() if end["fate"] == "FAILED 7"}
    assert failed == {f"127.0.1.{number}" for number in (1, 2, 3)}


def test_fifty_links_that_break_at_once_come_back_past_the_servers_limits(
    new_sshd: Callable[..., Sshd], rolled: Callable[..., Roll], home: Path
) -> None:
    server = new_sshd(alias="web1", options=LIMITS)
    hosts = [server.add_host(f"web{number}") for number in range(2, 51)] + ["web1"]
    roll = rolled("--at-once", "50", "--host", "web[1-50]", "--", *GATED)
    roll.until(lambda: all(roll.output(each) == BEGUN for each in hosts))
    server.cut()
    (home / "go").touch()
    over = roll.end()
    assert {over[each]["fate"] for each in hosts} == {"done"}
    assert all(roll.output(each) == WHOLE for each in hosts)
    assert lines(home / "ran") == 50
    assert roll.process.returncode == 0
