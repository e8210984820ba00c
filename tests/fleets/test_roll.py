"""A roll over hosts of a real sshd: waves, thresholds, hosts that don't do what they should."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import Cli

from fleet_hosts import ends, fleet_id, lines, mark, told
from proxy import wait_for
from sshd import Sshd

Many = Callable[[int], str]
HOSTS_OF_TWO = {b"web1", b"web2"}
# Two programs that run at the same time get two numbers.
TAKE_A_NUMBER = 'n=1; until mkdir "$HOME/number$n"; do n=$((n + 1)); done 2>/dev/null'


def host_config(home: Path, alias: str, **options: str | int) -> None:
    """Add a host to the client's ssh_config."""
    text = "".join(f"  {name} {value}\n" for name, value in options.items())
    with (home / ".ssh" / "config").open("a") as file:
        file.write(f"Host {alias}\n{text}")


@pytest.fixture
def silent() -> Iterator[Callable[[bytes], int]]:
    """Return a function that listens, says these bytes to whoever connects, and nothing more."""
    listening: list[socket.socket] = []
    held: list[socket.socket] = []

    def listen(greeting: bytes) -> int:
        server = socket.create_server(("127.0.0.1", 0))
        listening.append(server)

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    peer = server.accept()[0]
                    held.append(peer)
                    peer.sendall(greeting)

        threading.Thread(target=accept, daemon=True).start()
        return int(server.getsockname()[1])

    yield listen
    for each in [*listening, *held]:
        each.close()


def test_a_program_runs_once_on_each_host_and_each_line_is_whole(
    web_hosts: Many, cli: Cli, ran: Path
) -> None:
    done = cli("run", "--host", web_hosts(12), "--", *mark(ran, "printf 'a\\nb'; echo c >&2"))
    assert done.returncode == 0
    assert sorted(done.stdout.decode().splitlines()) == sorted(
        f"web{number}: {text}" for number in range(1, 13) for text in "ab"
    )
    assert lines(ran) == 12


@pytest.mark.parametrize(("prefix", "line"), [("none", "hi"), ("host", "web1: hi")])
def test_what_stands_before_a_line_is_chosen(
    web_hosts: Many, cli: Cli, prefix: str, line: str
) -> None:
    done = cli("run", "--host", web_hosts(2), "--prefix", prefix, "--", "echo", "hi")
    assert line in done.stdout.decode().splitlines()


def test_waves_come_one_after_the_other_and_stop_at_the_threshold(
    web_hosts: Many, cli: Cli, ran: Path
) -> None:
    done = cli(
        *("run", "--host", web_hosts(9), "--batch", "2", "--max-fail", "1", "--"),
        *mark(ran, f"{TAKE_A_NUMBER}; exit $((n > 3))"),
    )
    said = done.stderr.decode()
    assert done.returncode == 1
    assert "9 hosts in 5 waves of 2; stops at the 2nd failure" in said
    assert "STOPPED in wave 3 of 5: " in said
    # Both of the third wave had begun. A wave that fails wholly is nothing special.
    assert lines(ran) == 6


def test_a_wave_that_fails_wholly_stops_nothing_that_its_threshold_allows(
    web_hosts: Many, cli: Cli, ran: Path
) -> None:
    done = cli(
        "run",
        "--host",
        web_hosts(4),
        "--batch",
        "2",
        "--max-fail",
        "4",
        "--",
        *mark(ran, "false"),
    )
    assert (done.returncode, lines(ran)) == (1, 4)
    assert b"FAILED: 4 of 4 failed: web[1-4]" in done.stderr


def test_no_more_run_at_once_than_allowed(web_hosts: Many, cli: Cli, home: Path) -> None:
    inside = home / "inside"
    inside.mkdir()
    count = f"touch {inside}/$$; ls {inside} | wc -l; sleep 0.1; rm {inside}/$$"
    done = cli(
        "run", "--host", web_hosts(8), "--at-once", "2", "--prefix", "none", "--", "sh", "-c", count
    )
    assert done.returncode == 0
    assert {int(line) for line in done.stdout.split()} <= {1, 2}


def test_a_plan_is_printed_and_nothing_is_started(web_hosts: Many, cli: Cli, ran: Path) -> None:
    hosts = web_hosts(5)
    done = cli(
        "run", "--host", hosts, "--batch", "1,40%", "--canary", "web3", "--plan", "--", *mark(ran)
    )
    assert (done.returncode, lines(ran)) == (0, 0)
    assert done.stdout.decode().splitlines() == [
        "5 hosts in 4 waves (1, 1, 2, 1); stops at the 1st failure",
        "  wave 1      1  web3",
        "  wave 2      1  web1",
        "  wave 3      2  web2,web4",
        "  wave 4      1  web5",
    ]


def test_hosts_that_dont_do_what_they_should_hold_up_no_other(
    web_hosts: Many,
    new_sshd: Callable[..., Sshd],
    silent: Callable[[bytes], int],
    cli: Cli,
    home: Path,
    ran: Path,
) -> None:
    """Down, refusing, hanging before and after the banner, without Python, with a wrong key."""
    hosts = web_hosts(6)
    config = home / ".ssh" / "config"
    known = {"UserKnownHostsFile": str(home / ".ssh" / "known_hosts"), "HostName": "127.0.0.1"}
    with socket.create_server(("127.0.0.1", 0)) as free:
        refusing = free.getsockname()[1]
    host_config(home, "refuses", Port=refusing, **known)
    host_config(home, "hangs", Port=silent(b""), **known)
    host_config(home, "mute", Port=silent(b"SSH-2.0-OpenSSH_9.2\r\n"), **known)
    new_sshd(alias="bare", environment={"PATH": "/none"})
    other = new_sshd(alias="other")
    text = config.read_text()
    config.write_text(
        text + f"Host wrong\n  HostName 127.0.0.1\n  Port {other.port}\n"
        f"  UserKnownHostsFile {home}/none\n  StrictHostKeyChecking yes\n"
    )
    bad = "refuses,hangs,mute,bare,wrong"
    done = cli(
        "run", "--json", "--connect-timeout", "8s", "--host", f"{bad},{hosts}", "--", *mark(ran)
    )
    over = ends(told(done))
    assert set(over) == {*bad.split(","), *(f"web{number}" for number in range(1, 7))}
    assert lines(ran) == 6
    assert {host for host, end in over.items() if end["exit_code"] == 0} == set(over) - set(
        bad.split(",")
    )
    whys = {host: over[host]["error"]["message"] for host in bad.split(",")}
    assert "refused" in whys["refuses"]
    assert "no answer" in whys["hangs"] and "no answer" in whys["mute"]
    assert "no Python" in whys["bare"]
    assert "host key unknown" in whys["wrong"]
    assert done.returncode == 125


def test_a_start_that_is_not_confirmed_in_time_is_given_up_and_named(
    web_hosts: Many, silent: Callable[[bytes], int], cli: Cli, home: Path
) -> None:
    hosts = web_hosts(2)
    host_config(home, "mute", Port=silent(b"SSH-2.0-OpenSSH_9.2\r\n"), HostName="127.0.0.1")
    done = cli(
        *("run", "--host", f"mute,{hosts}", "--start-timeout", "6s", "--batch", "1"),
        *("--max-unreached", "1", "--", "true"),
    )
    assert done.returncode == 125
    assert b"1 of 3 unreached: " in done.stderr
    assert b"mute  no start confirmed in 6 s" in done.stderr


def test_unreached_hosts_count_as_failures_unless_they_have_a_limit_of_their_own(
    web_hosts: Many, cli: Cli, home: Path, ran: Path
) -> None:
    hosts = web_hosts(2)
    with socket.create_server(("127.0.0.1", 0)) as free:
        host_config(home, "down", Port=free.getsockname()[1], HostName="127.0.0.1")
    command = ["--host", f"down,{hosts}", "--batch", "1", "--", *mark(ran)]
    assert cli("run", *command).returncode == 125
    assert lines(ran) == 0
    assert cli("run", "--max-unreached", "1", *command).returncode == 125
    assert lines(ran) == 2


def test_an_alias_that_is_named_twice_is_one_host_unless_each_is_asked_for(
    web_hosts: Many, cli: Cli, ran: Path
) -> None:
    web_hosts(2)
    twice = ["--host", "web1,web2", "--host", "web1", "--", *mark(ran)]
    assert cli("run", *twice).returncode == 0
    assert lines(ran) == 2
    done = cli("run", "--each", "--json", *twice)
    assert set(ends(told(done))) == {"web1", "web2", "web1#2"}
    assert lines(ran) == 5


def test_the_exit_code_is_the_largest_and_the_failures_say_what_they_wrote(
    web_hosts: Many, cli: Cli, ran: Path
) -> None:
    command = mark(ran, f"echo oh >&2; exit $(( $(wc -l < {ran}) == 1 ? 3 : 0 ))")
    done = cli("run", "--host", web_hosts(3), "--at-once", "1", "--", *command)
    assert done.returncode == 3
    assert b"FAILED: 1 of 3 failed: " in done.stderr
    assert b"FAILED 3: web1  oh" in done.stderr


def test_output_that_is_gone_is_said_of_its_host(
    web_hosts: Many, cli: Cli, ran: Path, home: Path
) -> None:
    script = f"head -c 3000000 /dev/zero; echo; echo > {ran}-$$; until [ -e {home}/go ]; do"
    script += " sleep 0.1; done; echo last"
    words = ["--keep-output", "100000", "--host", web_hosts(2), "--id", "up-1"]
    done = cli("run", "-d", *words, "--", "sh", "-c", script)
    assert done.returncode == 0, done.stderr
    wait_for(lambda: len(list(home.glob(f"{ran.name}-*"))) == 2)
    watch = cli.popen("attach", "up-1")
    assert watch.stderr is not None
    said = b""
    while set(re.findall(rb"(web.): stdout from byte 0 to \d+ is gone: ", said)) != HOSTS_OF_TWO:
        said += (line := watch.stderr.readline())
        assert line, said
    (home / "go").touch()
    out, _ = watch.communicate(timeout=60)
    assert (watch.returncode, out.count(b": last\n")) == (0, 2)


def test_stdin_reaches_each_host_whole(web_hosts: Many, cli: Cli) -> None:
    data = bytes(range(256)) * 4096
    done = cli(
        "run",
        "--host",
        web_hosts(3),
        "--stdin",
        "-",
        "--prefix",
        "none",
        "--",
        "wc",
        "-c",
        stdin=data,
    )
    assert done.stdout.split() == [b"1048576"] * 3


def test_output_goes_into_files_with_what_became_of_each_host(
    web_hosts: Many, cli: Cli, home: Path
) -> None:
    out = home / "out"
    done = cli(
        "run",
        "--host",
        web_hosts(2),
        "--output-dir",
        str(out),
        "--",
        "sh",
        "-c",
        "printf x; echo e >&2; exit 4",
    )
    assert done.returncode == 4
    assert {path.name for path in out.iterdir()} == {
        f"web{n}.{ending}" for n in (1, 2) for ending in ("out", "err", "json")
    }
    assert (out / "web1.out").read_bytes() == b"x"
    assert (out / "web1.err").read_bytes() == b"e\n"
    assert '"exit_code": 4' in (out / "web1.json").read_text()


def test_ctrl_c_says_how_far_it_came_and_the_programs_go_on(
    web_hosts: Many, cli: Cli, ran: Path, home: Path
) -> None:
    gate = home / "gate"
    os.mkfifo(gate)
    process = cli.popen(
        "run", "--host", web_hosts(3), "--at-once", "2", "--", *mark(ran, f"read x < {gate}")
    )
    wait_for(lambda: lines(ran) == 2)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == -signal.SIGINT
    assert b"STILL RUNNING: 2 of 3 hosts running, 1 not started and won't be" in err
    held = os.open(gate, os.O_RDWR)
    os.write(held, b"\n\n")
    os.close(held)


@pytest.mark.parametrize("what", [["-i"], ["--callback-through-ssh"]])
def test_what_makes_sense_for_one_host_alone_is_refused(
    web_hosts: Many, cli: Cli, ran: Path, what: list[str]
) -> None:
    done = cli("run", *what, "--host", web_hosts(2), "--", *mark(ran))
    assert (done.returncode, lines(ran)) == (2, 0)
    assert b"for one host" in done.stderr


def test_detached_it_leaves_when_all_have_started_and_waves_are_refused(
    web_hosts: Many, cli: Cli, ran: Path, home: Path
) -> None:
    gate = home / "gate"
    os.mkfifo(gate)
    hosts = web_hosts(2)
    done = cli("run", "-d", "--host", hosts, "--", *mark(ran, f"read x < {gate}"))
    assert done.returncode == 0
    fleet = done.stdout.decode().strip()
    held = os.open(gate, os.O_RDWR)
    os.write(held, b"\n\n")
    assert cli("wait", fleet).returncode == 0
    os.close(held)
    assert lines(ran) == 2
    assert cli("run", "-d", "--batch", "1", "--host", hosts, "--", "true").returncode == 2


def test_fifty_hosts_of_one_server_with_its_own_limits(
    web_hosts: Many, cli: Cli, ran: Path
) -> None:
    done = cli("run", "--json", "--at-once", "50", "--host", web_hosts(50), "--", *mark(ran))
    assert done.returncode == 0, done.stderr
    assert lines(ran) == 50
    assert len(ends(told(done))) == 50


def test_a_reader_that_has_gone_ends_the_watch_and_no_program(
    web_hosts: Many, cli: Cli, ran: Path
) -> None:
    read, write = os.pipe()
    process = cli.popen(
        *("run", "--host", web_hosts(2), "--", *mark(ran, "yes | head -c 4000000")), stdout=write
    )
    os.close(write)
    os.close(read)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 141, said
    assert b"STILL RUNNING: whoever read their output has gone" in said


def test_the_same_id_is_the_same_fleet_and_another_plan_is_a_conflict(
    web_hosts: Many, cli: Cli, ran: Path
) -> None:
    hosts = web_hosts(3)
    for _ in range(2):
        assert cli("run", "--id", "pay-1", "--host", hosts, "--", *mark(ran)).returncode == 0
    assert lines(ran) == 3
    done = cli("run", "--id", "pay-1", "--host", hosts, "--", "true")
    assert done.returncode == 125
    assert b"this id already names another fleet" in done.stderr


def test_two_processes_help_with_many_hosts(web_hosts: Many, cli: Cli, ran: Path) -> None:
    """Each of them ends with the first process, also where that is killed."""
    process = cli.popen("run", "--host", web_hosts(48), "--", *mark(ran, "sleep 1000"))
    wait_for(lambda: lines(ran) >= 2)
    found = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=False
    ).stdout.split()
    process.kill()
    process.communicate(timeout=30)
    if len(os.sched_getaffinity(0)) > 1:
        assert len(found) >= 2
    wait_for(lambda: not any(_alive(pid) for pid in found))


def test_a_process_that_helps_and_is_killed_leaves_nobody_unsaid_and_attach_goes_on(
    web_hosts: Many, cli: Cli, ran: Path, home: Path
) -> None:
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one core: no process helps")
    wait = f"until [ -e {home}/go ]; do sleep 0.1; done"
    words = ["--id", "up-1", "--at-once", "48", "--host", web_hosts(50)]
    process = cli.popen("run", *words, "--", *mark(ran, f"echo begun; {wait}"))
    assert process.stdout is not None
    for _ in range(48):
        assert process.stdout.readline().endswith(b": begun\n")
    helps = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(helps[0]), signal.SIGKILL)
    wait_for(lambda: not _alive(helps[0]))
    (home / "go").touch()
    _, said = process.communicate(timeout=90)
    assert process.returncode == 122
    assert b"the process here that watched it was killed" in said
    assert lines(ran) == 50
    done = cli("attach", "up-1", timeout=90)
    assert (done.returncode, lines(ran)) == (0, 50), done.stderr


def _alive(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_the_fleets_id_names_it_in_each_event(web_hosts: Many, cli: Cli) -> None:
    events = told(cli("run", "--json", "--host", web_hosts(2), "--", "true"))
    assert fleet_id(events)
    assert [each["event"] for each in events][-1] == "fleet"
    assert events[-1]["exit_code"] == 0


@pytest.mark.parametrize(
    ("verb", "flags", "named"),
    [
        ("attach", ["--watch-only"], "--watch-only"),
        ("attach", ["--take-over"], "--take-over"),
        ("attach", ["--output-dir", "out"], "--output-dir"),
        ("attach", ["-y"], "--yes"),
        ("again", ["--only", "failed"], "--only"),
        ("again", ["--redo", "web1"], "--redo"),
        ("again", ["--batch", "1"], "--batch"),
    ],
)
def test_a_flag_of_fleets_is_refused_for_one_run(
    web_hosts: Many, cli: Cli, verb: str, flags: list[str], named: str
) -> None:
    web_hosts(1)
    cli("run", "--name", "one", "--host", "web1", "--", "true")
    done = cli(verb, *flags, "one")
    assert done.returncode == 2
    assert f"{named} is for a fleet, and this is one run" in done.stderr.decode()


def test_what_contradicts_itself_is_refused_before_anything_is_begun(
    web_hosts: Many, cli: Cli, home: Path, ran: Path
) -> None:
    hosts = web_hosts(2)
    for flags, said in (
        (["--fold", "--output-dir", "out"], "--output-dir wants"),
        (["--output-dir", "/proc/none"], "--output-dir /proc/none: No such file"),
        (["--collector", "none"], "no collector 'none'"),
        (["-i"], "-i is for one host"),
        (["-d", "--batch", "1"], "waves need somebody to stay"),
    ):
        done = cli("run", *flags, "--host", hosts, "--", *mark(ran))
        assert (done.returncode, lines(ran)) == (2, 0), flags
        assert said in done.stderr.decode()
    assert not (home / ".local/state/corra/books").exists()


def test_who_leaves_at_once_prints_the_id_alone(web_hosts: Many, cli: Cli) -> None:
    done = cli("run", "-d", "--name", "up", "--host", web_hosts(2), "--", "true")
    assert done.returncode == 0
    assert done.stderr.decode().splitlines()[0].endswith(": 2 hosts")
    assert b"RUNNING" not in done.stderr
    (fleet,) = done.stdout.decode().split()
    assert cli("wait", fleet).returncode == 0


def test_a_time_limit_ends_the_watching(web_hosts: Many, cli: Cli) -> None:
    cli("run", "-d", "--id", "up-1", "--host", web_hosts(2), "--", "sleep", "1000")
    for verb in ("wait", "attach"):
        done = cli(verb, "--timeout", "0.5", "up-1")
        assert done.returncode == 122
        assert b"STILL RUNNING: 2 of 2 hosts running" in done.stderr
    assert cli("kill", "-9", "up-1").returncode == 0


def test_logs_follow_all_members_at_once(
    web_hosts: Many, cli: Cli, latch: Callable[[int], None], ran: Path
) -> None:
    """Also more of them than a look asks at once."""
    hosts = web_hosts(40)
    command = mark(ran, f"echo begun; read x < {ran.parent / 'gate'}")
    cli("run", "-d", "--id", "up-1", "--at-once", "40", "--host", hosts, "--", *command)
    following = cli.popen("logs", "-f", "up-1")
    assert following.stdout is not None
    assert len({following.stdout.readline() for _ in range(40)}) == 40
    latch(40)
    following.communicate(timeout=120)
    assert following.returncode == 0


def test_a_pause_stands_between_two_waves(web_hosts: Many, cli: Cli) -> None:
    flags = ["--batch", "1", "--pause", "1s", "--prefix", "none", "--host", web_hosts(2)]
    done = cli("run", *flags, "--", "date", "+%s.%N")
    first, second = sorted(map(float, done.stdout.split()))
    assert done.returncode == 0 and second - first >= 1.0
    assert b"1 s between waves" in done.stderr


def test_time_and_name_stand_before_a_line_where_asked_for(web_hosts: Many, cli: Cli) -> None:
    done = cli("run", "--host", web_hosts(2), "--prefix", "time", "--", "echo", "hi")
    assert {line[8:] for line in done.stdout.decode().splitlines()} == {" web1: hi", " web2: hi"}
    assert all(re.match(r"\d\d:\d\d:\d\d ", line) for line in done.stdout.decode().splitlines())


@pytest.mark.parametrize(
    ("order", "expected"),
    [("sorted", ["web1", "web2", "web3"]), ("reversed", ["web1", "web3", "web2"])],
)
def test_hosts_start_in_the_order_that_was_asked_for(
    web_hosts: Many, cli: Cli, order: str, expected: list[str]
) -> None:
    web_hosts(3)
    flags = ["--order", order, "--at-once", "1", "--host", "web2,web3,web1"]
    done = cli("run", *flags, "--", "echo", "hi")
    assert [line.split(":")[0] for line in done.stdout.decode().splitlines()] == expected


def test_each_program_has_a_terminal_of_its_own_where_asked_for(web_hosts: Many, cli: Cli) -> None:
    script = (
        "test -t 0 && mkdir $(tty | tr / _) && until [ $(ls -d *pts* | wc -l) = 2 ]; do :; done"
    )
    hosts = web_hosts(2)
    done = cli("run", "--pty", "--timeout", "60s", "--host", hosts, "--", "sh", "-c", script)
    assert done.returncode == 0, done.stdout
