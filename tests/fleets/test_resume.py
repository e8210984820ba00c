"""A fleet outlives its roller: it goes on from any machine that reaches one of its hosts."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Cli, home_environment

from fleet_hosts import ends, lines, mark, told, waiting
from fleet_torture import tortured
from proxy import wait_for
from sshd import Sshd

Hosts = Callable[[int], str]
Elsewhere = Callable[..., "subprocess.CompletedProcess[bytes]"]


@pytest.fixture
def elsewhere(cli: Cli, home: Path) -> Callable[..., subprocess.CompletedProcess[bytes]]:
    """Return a function that runs corra on another machine: with a home that knows nothing."""
    made = iter(range(1000))

    def run(*words: str, **how: object) -> subprocess.CompletedProcess[bytes]:
        new = home / f"elsewhere{next(made)}"
        new.mkdir()
        env = {**home_environment(new), **how.pop("env", {})}  # type: ignore[dict-item]
        return cli(*words, env=env, **how)  # type: ignore[arg-type]

    return run


def rolled(
    cli: Cli, fleet: str, hosts: str, *flags: str, command: list[str]
) -> subprocess.Popen[bytes]:
    """Begin a roll in a process of its own."""
    return cli.popen("run", "--id", fleet, "--host", hosts, *flags, "--", *command)


def killed(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.communicate(timeout=30)


@pytest.mark.parametrize("seed", ["web1", "web2", "web5,web2"])
def test_one_reached_host_is_enough_to_go_on_from_a_machine_that_knows_nothing(
    web_hosts: Hosts,
    cli: Cli,
    elsewhere: Elsewhere,
    latch: Callable[[int], None],
    ran: Path,
    seed: str,
) -> None:
    process = rolled(cli, "up-1", web_hosts(5), "--batch", "2", command=waiting(ran))
    wait_for(lambda: lines(ran) == 2)
    killed(process)
    latch(5)
    done = elsewhere("attach", "--json", "--host", seed, "up-1")
    assert done.returncode == 0, done.stderr
    assert lines(ran) == 5
    assert set(ends(told(done))) == {f"web{number}" for number in range(1, 6)}


def test_here_the_journal_is_enough_and_each_program_ran_once(
    web_hosts: Hosts, cli: Cli, latch: Callable[[int], None], ran: Path
) -> None:
    process = rolled(cli, "up-1", web_hosts(4), "--at-once", "2", command=waiting(ran))
    wait_for(lambda: lines(ran) == 2)
    killed(process)
    latch(4)
    done = cli("attach", "--take-over", "up-1")
    assert done.returncode == 0, done.stderr
    assert lines(ran) == 4
    assert cli("attach", "up-1").returncode == 0
    assert lines(ran) == 4


def test_watch_only_starts_nothing(
    web_hosts: Hosts, cli: Cli, elsewhere: Elsewhere, latch: Callable[[int], None], ran: Path
) -> None:
    process = rolled(cli, "up-1", web_hosts(3), "--batch", "1", command=waiting(ran))
    wait_for(lambda: lines(ran) == 1)
    killed(process)
    latch(3)
    done = elsewhere("attach", "--watch-only", "--host", "web1", "up-1")
    assert (done.returncode, lines(ran)) == (125, 1)
    assert b"1 done, 2 not started" in done.stderr


def heard(process: subprocess.Popen[bytes], words: bytes) -> None:
    """Wait until the process says these words on stderr; other lines may come before."""
    assert process.stderr is not None
    said = b""
    while words not in said:
        line = process.stderr.readline()
        assert line, said
        said += line


def epochs(journal: Path) -> list[int]:
    """Return the epochs of those who have rolled by this journal."""
    events = [json.loads(line) for line in journal.read_text().splitlines()]
    return [each["epoch"] for each in events if each["what"] == "rolling"]


def test_a_second_operator_watches_until_the_first_is_taken_over(
    web_hosts: Hosts, cli: Cli, home: Path, latch: Callable[[int], None], ran: Path
) -> None:
    first = rolled(cli, "up-1", web_hosts(3), "--batch", "1", command=waiting(ran))
    wait_for(lambda: lines(ran) == 1)
    second = cli.popen("attach", "up-1")
    heard(second, b"rolls it; watching (--take-over rolls it from here)")
    third = cli.popen("attach", "--take-over", "up-1")
    journal = home / ".local/state/corra/books/fleet/up-1.jsonl"
    wait_for(lambda: 2 in epochs(journal))
    latch(3)
    for process in (first, second, third):
        process.communicate(timeout=60)
        assert process.returncode == 0
    assert lines(ran) == 3


def test_a_kill_holds_for_every_roller_also_for_one_that_shares_no_journal(
    web_hosts: Hosts, cli: Cli, elsewhere: Elsewhere, latch: Callable[[int], None], ran: Path
) -> None:
    process = rolled(cli, "up-1", web_hosts(4), "--batch", "1", command=waiting(ran))
    wait_for(lambda: lines(ran) == 1)
    done = elsewhere("kill", "-y", "--host", "web1", "up-1")
    assert done.returncode == 0, done.stderr
    assert b"ended web1; never to be started: web[2-4]" in done.stderr
    _, said = process.communicate(timeout=60)
    assert process.returncode != 0
    assert b"STOPPED" in said
    latch(4)
    for text in ("--host=web3", "--host=web1"):
        assert elsewhere("attach", text, "up-1").returncode != 0
    assert lines(ran) == 1


def test_after_a_stop_what_runs_is_watched_to_its_end(
    web_hosts: Hosts, cli: Cli, latch: Callable[[int], None], ran: Path
) -> None:
    process = rolled(cli, "up-1", web_hosts(3), "--batch", "2", command=waiting(ran))
    wait_for(lambda: lines(ran) == 2)
    killed(process)
    assert cli("kill", "-9", "up-1").returncode == 0
    for verb in ("wait", "attach"):
        done = cli(verb, "up-1")
        assert done.returncode == 137
        assert (
            b"STOPPED" in done.stderr and b"2 of 2 failed: web[1-2]; 1 not started" in done.stderr
        )


def test_after_a_kill_again_starts_what_was_never_started(
    web_hosts: Hosts, cli: Cli, elsewhere: Elsewhere, latch: Callable[[int], None], ran: Path
) -> None:
    process = rolled(cli, "up-1", web_hosts(3), "--at-once", "1", command=waiting(ran))
    wait_for(lambda: lines(ran) == 1)
    assert cli("kill", "up-1").returncode == 0
    process.communicate(timeout=60)
    latch(3)
    done = elsewhere("again", "--only", "not-started", "--host", "web1", "up-1")
    assert done.returncode == 0, done.stderr
    assert lines(ran) == 3


def test_again_repeats_what_failed_and_nothing_that_has_ended_well(
    web_hosts: Hosts, cli: Cli, elsewhere: Elsewhere, home: Path, ran: Path
) -> None:
    bad = home / "bad"
    bad.touch()
    failing = mark(ran, f"test $(wc -l < {ran}) -gt 1 || test ! -e {bad}")
    hosts = web_hosts(3)
    assert (
        cli("run", "--id", "up-1", "--at-once", "1", "--host", hosts, "--", *failing).returncode
        == 1
    )
    assert lines(ran) == 3
    done = cli("again", "--json", "up-1")
    assert set(ends(told(done))) == {"web1"}
    assert lines(ran) == 4
    assert b"ALREADY DONE" not in done.stderr
    # The second attempt is known from each host, also from one that had no part in it.
    status = elsewhere("status", "--host", "web3", "up-1")
    assert b"attempt 2" in status.stdout and b"3 done: web[1-3]" in status.stdout
    nothing = cli("again", "up-1")
    assert (nothing.returncode, lines(ran)) == (0, 4)


def test_what_is_lost_is_started_again_by_name_alone(
    web_hosts: Hosts, cli: Cli, ran: Path, home: Path, latch: Callable[[int], None]
) -> None:
    process = rolled(cli, "up-1", web_hosts(2), command=waiting(ran))
    wait_for(lambda: lines(ran) == 2)
    killed(process)
    states = [each for each in told(cli("status", "--json", "up-1")) if each["type"] == "state"]
    for pid in [states[0]["agent_pid"], *states[0]["standby_pids"]]:
        os.kill(pid, signal.SIGKILL)
    lost = states[0]["host"]
    latch(2)
    done = cli("attach", "--take-over", "up-1")
    assert done.returncode == 123
    latch(2)
    assert cli("again", "up-1").returncode == 0
    assert lines(ran) == 2
    assert cli("again", "--redo", lost, "up-1").returncode == 0
    assert lines(ran) == 3


def test_a_secret_is_given_again_or_what_isnt_started_stays_so(
    web_hosts: Hosts, cli: Cli, elsewhere: Elsewhere, latch: Callable[[int], None], ran: Path
) -> None:
    command = mark(ran, f'read x < {ran.parent / "gate"}; test "$TOKEN" = s3cret')
    process = cli.popen(
        *("run", "--id", "up-1", "--secret", "TOKEN", "--host", web_hosts(2), "--batch", "1"),
        *("--", *command),
        env={"TOKEN": "s3cret"},
    )
    wait_for(lambda: lines(ran) == 1)
    killed(process)
    latch(2)
    without = elsewhere("attach", "--host", "web1", "up-1")
    assert lines(ran) == 1
    assert b"nobody has kept its secret TOKEN: what isn't started stays so" in without.stderr
    done = elsewhere(
        "attach", "--host", "web1", "--secret", "TOKEN", "up-1", env={"TOKEN": "s3cret"}
    )
    assert (done.returncode, lines(ran)) == (0, 2), done.stderr


def test_what_was_sent_to_stdin_comes_from_a_hosts_record(
    web_hosts: Hosts, cli: Cli, elsewhere: Elsewhere, latch: Callable[[int], None], ran: Path
) -> None:
    command = mark(ran, f"read x < {ran.parent / 'gate'}; cat")
    process = cli.popen(
        *("run", "--id", "up-1", "--stdin", "-", "--host", web_hosts(2), "--batch", "1"),
        *("--", *command),
        stdin=subprocess.PIPE,
    )
    assert process.stdin is not None
    process.stdin.write(b"given once\n")
    process.stdin.close()
    wait_for(lambda: lines(ran) == 1)
    process.kill()
    process.wait(30)
    for stream in (process.stdout, process.stderr):
        assert stream is not None
        stream.close()
    latch(2)
    done = elsewhere("attach", "--host", "web1", "up-1")
    assert done.returncode == 0, done.stderr
    assert b"web2: given once\n" in done.stdout


def test_a_journal_on_a_host_is_found_by_the_fleets_id_from_here(
    web_hosts: Hosts,
    new_sshd: Callable[..., Sshd],
    cli: Cli,
    home: Path,
    latch: Callable[[int], None],
    ran: Path,
) -> None:
    (home / "ops1").mkdir()
    new_sshd(alias="ops1", environment=home_environment(home / "ops1"))
    process = rolled(
        cli, "up-1", web_hosts(3), "--journal", "ops1", "--batch", "1", command=waiting(ran)
    )
    wait_for(lambda: lines(ran) == 1)
    killed(process)
    latch(3)
    assert (home / "ops1/.local/state/corra/books/fleet/up-1.jsonl").exists()
    done = cli("attach", "--take-over", "up-1")
    assert (done.returncode, lines(ran)) == (0, 3), done.stderr


def test_without_a_terminal_a_wave_waits_for_a_yes(web_hosts: Hosts, cli: Cli, ran: Path) -> None:
    flags = ["--id", "up-1", "--batch", "1", "--confirm", "--host", web_hosts(3)]
    done = cli("run", *flags, "--", *mark(ran))
    assert (done.returncode, lines(ran)) == (125, 1)
    assert b"PAUSED before wave 2 of 3" in done.stderr
    done = cli("attach", "-y", "up-1")
    assert (done.returncode, lines(ran)) == (0, 3)


def test_kill_on_fail_ends_what_runs(web_hosts: Hosts, cli: Cli, ran: Path) -> None:
    all_run = f"until [ $(wc -l < {ran}) -ge 3 ]; do sleep 0.05; done"
    command = mark(ran, f"{all_run}; mkdir {ran}.one 2>/dev/null && exit 1; exec sleep 1000")
    done = cli(
        *("run", "--kill-on-fail", "--max-fail", "0", "--host", web_hosts(3), "--json"),
        *("--", *command),
    )
    assert sorted(end["fate"] for end in ends(told(done)).values()) == [
        "FAILED 1",
        "KILLED",
        "KILLED",
    ]


def test_the_verbs_of_looking_take_a_fleet(
    web_hosts: Hosts, cli: Cli, elsewhere: Elsewhere
) -> None:
    cli("run", "--id", "up-1", "--name", "up", "--host", web_hosts(3), "--", "echo", "hi")
    for text in ("up-1", "up"):
        assert cli("logs", text).stdout.count(b"hi") == 3
        assert b"3 done: web[1-3]" in cli("status", text).stdout
        assert cli("ps", text).stdout.count(b"done") == 3
        assert cli("wait", text).returncode == 0
    assert elsewhere("logs", "--host", "web2", "up-1").stdout.count(b"hi") == 3
    assert cli("ps", "nobody").returncode == 125
    # A fleet is a runbook of one step.
    assert cli("book", "fleet", "up-1").stdout.count(b"done") >= 3


def test_killed_at_random_and_resumed_elsewhere_each_program_runs_once(
    web_hosts: Hosts, cli: Cli, home: Path
) -> None:
    """scripts/torture --fleets 2000 does the same with more of them."""
    web_hosts(24)
    runs = home / ".local/state/corra/runs"
    facts = tortured(
        lambda words, env: cli.popen(*words, env=env), home, runs, 24, random.Random(7), kills=3
    )
    assert (facts["executed"], facts["code"]) == (24, 0)
