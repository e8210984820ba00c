"""The agent keeps its word when guards are killed, disks are full, machines reboot and pids are
reused.

The tests use real signals and real file systems. A test that needs root is skipped without it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import hashlib
import itertools
import json
import os
import random
import re
import resource
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

import machine
from agent_door import (
    SOURCE,
    Door,
    Mount,
    Refused,
    Stream,
    alive,
    children,
    eventually,
    fresh,
    gone,
    guards,
    kill,
    lines_of,
)
from corra import agent
from tracing import held

pytestmark = pytest.mark.storm

SIZE = 1_500_000  # that many lines of numbers are 11 MB
FLOW = f'echo x >> "$1"; read a < "$0"; seq 1 {SIZE}; read a < "$0"; exit 7'


@pytest.fixture(params=machine.for_faults(), ids=machine.name)
def python(request: pytest.FixtureRequest) -> str:
    """Each Python that faults are tried with; `machine.DEAR` is for tests of more than a second."""
    path: str = request.param
    return path


@pytest.fixture(scope="module")
def numbers() -> bytes:
    return b"".join(b"%d\n" % number for number in range(1, SIZE + 1))


# ---------------------------------------------------------------- a machine that dies


def test_the_claim_and_its_name_are_on_the_disk_before_the_program_is_executed(
    tmp_path: Path, python: str
) -> None:
    if shutil.which("strace") is None:
        pytest.skip("no strace here, which records the order of the system calls")
    log, program = tmp_path / "calls", shutil.which("true")
    calls = "trace=fsync,linkat,execve"
    # A file each process: in one file a call is torn in two where another comes between.
    for door in fresh(
        tmp_path, python=python, prefix=["strace", "-ff", "-qq", "-o", str(log), "-e", calls]
    ):
        door.start([str(program)])
    (own,) = [
        each
        for each in (file.read_text().splitlines() for file in tmp_path.glob("calls.*"))
        if any(call.startswith(f'execve("{program}"') for call in each)
    ]
    names = [call.partition("(")[0] for call in own]
    assert (
        names == ["fsync", "linkat", "fsync", "execve"]
        and '"launched"' in own[1]
        and all(call.endswith("= 0") for call in own)
    )


@contextlib.contextmanager
def before_the_claim(
    door: Door, tmp_path: Path, argv: list[str]
) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """Start the run `x`; yield the starter, and the pid of the process that would become the
    program: it is stopped just before it writes the claim's name.
    """
    if shutil.which("strace") is None:
        pytest.skip("no strace here, which holds a process at a system call")
    log = tmp_path / "calls"
    stop = ["strace", "-f", "-qq", "-o", str(log), "-e", "trace=fsync"]
    stop += ["-e", "inject=fsync:signal=STOP"]
    tracing = Door(tmp_path, python=door.python, prefix=stop)
    claim = door.directory("x") / "launched.tmp"
    with tracing.popen("start") as starter:
        assert starter.stdin is not None
        starter.stdin.write(tracing.encode(door.program(argv, prog_id="x")))
        (claimant, *_) = eventually(lambda: claim.exists() and claim.read_text().split())
        eventually(lambda: re.search(rf"(?m)^{claimant} .*stopped by SIGSTOP", log.read_text()))
        # Kill the tracer: the traced processes go on untraced, and a stopped one stays stopped.
        starter.kill()
        yield starter, int(claimant)


def test_a_program_killed_before_its_claim_is_started_by_whoever_tries_again(
    door: Door, tmp_path: Path
) -> None:
    """The start itself tries again."""
    mark = tmp_path / "mark"
    argv = ["sh", "-c", f"echo x >> {mark}; exit 5"]
    with before_the_claim(door, tmp_path, argv) as (starter, claimant):
        kill(claimant)
        assert starter.stdout is not None
        assert json.loads(starter.stdout.read())["state"] in ("running", "exited")
    assert door.wait("x")["return_code"] == 5
    assert lines_of(mark) == ["x"]


def test_a_program_that_was_stopped_before_its_claim_is_never_started(
    door: Door, tmp_path: Path
) -> None:
    mark = tmp_path / "mark"
    argv = ["sh", "-c", f"echo x >> {mark}; exit 5"]
    with before_the_claim(door, tmp_path, argv) as (starter, _):
        over = door.stop("x", 0)
        assert over["ended"] and over["state"]["state"] == "not_started"
        assert starter.stdout is not None
        told = json.loads(starter.stdout.read())
    assert told["state"] == "not_started"
    assert told["exception"]["message"] == "it was stopped before it was started"
    assert door.start(argv, prog_id="x")["state"] == "not_started"
    assert lines_of(mark) == []


# ---------------------------------------------------------------- guards killed

SOME = [each for count in (1, 2) for each in itertools.combinations(range(3), count)]


@pytest.mark.sampled
@pytest.mark.parametrize("which", SOME, ids=str)
@pytest.mark.parametrize("when", ["at rest", "while output flows"])
def test_any_one_or_two_guards_killed_lose_no_byte_and_no_status_and_run_nothing_twice(
    door, gate, numbers, which, when
):
    mark = door.base / "mark"
    state = door.start(["sh", "-c", FLOW, gate.path, str(mark)])
    everyone = guards(state)
    with door.follow(state["prog_id"]) as follow:
        if when == "at rest":
            kill(*(everyone[each] for each in which))
            gate.open()
        else:
            gate.open()
            follow.until(lambda each: len(each.stdout()) > len(numbers) // 4)
            kill(*(everyone[each] for each in which))
        gate.open()
        follow.drain(60)
    final = follow.states[-1]
    assert (final["state"], final["reason"], final["return_code"]) == ("exited", "exited", 7)
    assert final["streams"]["stdout"] == {"length": len(numbers), "dropped": 0, "late": 0}
    assert follow.stdout() == numbers == door.file(state["prog_id"])
    assert lines_of(mark) == ["x"] and follow.gaps == []
    gone(*everyone)


def answered(pings: int, follow: Stream) -> bool:
    return follow.beats() >= pings


def test_a_client_that_never_stops_talking_hears_that_all_guards_are_dead(tmp_path, python):
    """The follow can't wait for the keeper's death before Linux 5.3, or if the keeper died too
    soon. Then the follow looks once a second, however busy it is.
    """
    for door in fresh(tmp_path, python=python, constants="agent._PIDFD_OPEN = 99999; "):
        state = door.ready("echo ready; exec sleep 1000")
        with door.follow(state["prog_id"]) as follow:
            follow.until_output(b"ready")
            kill(*guards(state))
            deadline = time.monotonic() + 20
            # the follow has reported the death and left
            with contextlib.suppress(EOFError, BrokenPipeError):
                for pings in itertools.count(1):
                    follow.send(b"P\n")
                    follow.until(functools.partial(answered, pings))
                    assert time.monotonic() < deadline, "the client never heard of it"
            assert (follow.states[-1]["state"], follow.states[-1]["reason"]) == (
                "lost",
                "agent-gone",
            )
        os.kill(state["pid"], signal.SIGKILL)


@pytest.mark.storm
@machine.DEAR
def test_random_kills_at_any_moment_leave_every_run_exact_or_with_all_guards_dead_honestly_lost(
    door,
):
    """$CORRA_TORTURE is the number of runs. A seed repeats the schedule, not always the race."""
    seed = int(os.environ.get("CORRA_SEED") or random.randrange(1 << 32))
    print("seed", seed)
    chance = random.Random(seed)
    expected = b"".join(b"%d\n" % number for number in range(1, 200_001))
    for number in range(int(os.environ.get("CORRA_TORTURE", "10"))):
        name, mark = f"r{number}", door.base / f"mark{number}"
        starter = door.popen("start")
        program = door.program(
            ["sh", "-c", 'echo x >> "$0"; seq 1 200000; exit 7', str(mark)], prog_id=name
        )
        starter.stdin.write(door.encode(program))
        starter.stdin.close()
        starter.stdin = None
        directory = door.directory(name)
        everyone = eventually(lambda: guards_of(directory))  # noqa: B023
        if chance.random() < 0.5:
            starter.communicate()  # the program runs
        count = chance.choice([1, 1, 2, 2, 3])
        for pid in chance.sample(everyone, count):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            select.select([], [], [], chance.choice([0, 0, 0.001, 0.01]))
        starter.communicate()
        final = door.wait(door.call("start", program)["prog_id"])
        where = (seed, number, count, final["state"], final["reason"])
        assert len(lines_of(mark)) <= 1, where
        if final["state"] == "lost":
            assert count == 3 and final["reason"] == "agent-gone" and final["status"] is None, where
            assert expected.startswith(door.file(name)), where
        else:
            assert (final["state"], final["reason"], final["return_code"], lines_of(mark)) == (
                "exited",
                "exited",
                7,
                ["x"],
            ), where
            # The keeper writes the record before the last bytes. If all guards die between the two,
            # the record names the missing bytes.
            missing = final["streams"]["stdout"]["dropped"]
            assert missing == 0 or count == 3, where
            assert door.file(name) == expected[: len(expected) - missing], where
        assert (directory / "keeper").read_bytes() == b"", (
            where
        )  # a guard reports a defect of its own in this file


def guards_of(directory: Path) -> list[int]:
    """Return the guards as soon as the record names them."""
    try:
        record = agent.Record.read((directory / "exit").read_bytes()[: agent.PAGE])
    except FileNotFoundError:
        return []
    return [pid for pid, _ in record.guards] if record and len(record.guards) == 3 else []


def test_all_three_guards_killed_is_an_honest_loss_and_the_output_a_true_prefix(
    door, gate, numbers
):
    mark = door.base / "mark"
    state = door.start(["sh", "-c", FLOW, gate.path, str(mark)])
    with door.follow(state["prog_id"]) as follow:
        gate.open()
        follow.until(lambda each: len(each.stdout()) > 100_000)
        kill(*guards(state))
        follow.drain()
    final = follow.states[-1]
    assert (final["state"], final["reason"], final["status"], final["return_code"]) == (
        "lost",
        "agent-gone",
        None,
        None,
    )
    assert (
        final["supervisor"] == "gone" and final["agent_pid"] is None and final["standby_pids"] == []
    )
    kept = door.file(state["prog_id"])
    assert numbers.startswith(kept) and follow.stdout() == kept
    again = door.start(["sh", "-c", FLOW, gate.path, str(mark)], prog_id=state["prog_id"])
    assert again["state"] == "lost" and lines_of(mark) == ["x"]


def test_a_lost_runs_program_is_still_killed_by_stop(door):
    state = door.ready('trap "" TERM; setsid sleep 1000 & echo ready; wait')
    family = set(agent.process_tree([state["agent_pid"]])) - set(guards(state))
    kill(*guards(state))
    eventually(lambda: door.status(state["prog_id"])["state"] == "lost")
    assert len(family) == 2 and all(map(alive, family))
    over = door.stop(state["prog_id"], 0.1)
    assert over["first"]["how"] == "direct" and over["ended"]
    gone(*family)
    assert over["state"]["state"] == "lost"


def test_bytes_that_died_with_all_guards_are_a_gap_and_not_silence(door):
    state = door.start(["sh", "-c", "echo 1234567; exit 3"])
    final = door.wait(state["prog_id"])
    gone(*guards(state)) if state["agent_pid"] else None
    os.truncate(door.directory(state["prog_id"]) / "stdout", 5)
    with door.follow(state["prog_id"]) as follow:
        follow.drain()
    assert follow.stdout() == b"12345"
    assert [(gap.stream, gap.start, gap.end) for gap in follow.gaps] == [("stdout", 5, 8)]
    assert follow.states[-1]["streams"]["stdout"] == {"length": 8, "dropped": 3, "late": 0}
    assert follow.states[-1]["return_code"] == final["return_code"] == 3


def stopped(pid: int) -> bool:
    """Return whether a signal or a tracer has stopped the process."""
    return agent.process(pid)[0] in "Tt"


def stop_all(state: Mapping[str, Any]) -> list[int]:
    """Stop a run's guards for good: each before the one below it, which it would let go on."""
    everyone = guards(state)
    for pid in everyone:
        kill(pid, number=signal.SIGSTOP)
        eventually(functools.partial(stopped, pid), "the guard to be stopped")
    return everyone


def test_a_guard_that_is_stopped_goes_on_at_once(door, gate):
    """The guard above it sees to that: the run needs no operator, and loses no time."""
    state = door.ready('echo ready; read a < "$0"; exit 7', gate.path)
    _, middle, keeper = guards(state)
    for _ in range(3):
        kill(middle, keeper, number=signal.SIGSTOP)
        eventually(lambda: not stopped(keeper) and not stopped(middle))
    now = door.status(state["prog_id"])
    assert (now["supervisor"], now["hindered"]) == ("ok", None)
    kill(middle, keeper, number=signal.SIGSTOP)
    gate.open()
    assert door.wait(state["prog_id"])["return_code"] == 7


def test_a_timeout_is_kept_by_a_keeper_that_is_stopped_again_and_again(door):
    state = door.start(["sleep", "1000"], run={"timeout": 0.5, "grace": 5})
    with door.open("wait", {"prog_id": state["prog_id"]}) as waiting:
        while state["agent_pid"] and alive(state["agent_pid"]):
            with contextlib.suppress(ProcessLookupError):
                kill(state["agent_pid"], number=signal.SIGSTOP)
        waiting.drain()
    final = waiting.states[-1]
    assert (final["reason"], final["signal"]) == ("timeout", "SIGTERM")


def test_a_keeper_that_a_debugger_holds_is_seen_and_signals_and_stop_work_without_it(door):
    door.constants = "agent.ORDER_DEADLINE_S = 0.2; "
    state = door.ready(
        'trap "echo hup" HUP; setsid sleep 1000 & echo ready; while kill -0 $!; do wait $!; done'
    )
    keeper = state["agent_pid"]
    held_up = {"why": "traced", "due": None, "pid": keeper, "by": os.getpid()}
    with held(keeper):
        now = door.status(state["prog_id"])
        assert (now["state"], now["agent_pid"]) == ("running", keeper)
        assert (now["supervisor"], now["hindered"]) == ("stopped", held_up)
        assert (
            door.call("signal", {"prog_id": state["prog_id"], "signal": "HUP"})["how"] == "direct"
        )
        over = door.stop(state["prog_id"], 0.1)
        assert over["first"]["how"] == "direct" and over["ended"]
        # Nothing is left of it, and nobody has recorded how it ended.
        now = door.status(state["prog_id"])
        assert (now["state"], now["hindered"]) == ("running", {**held_up, "due": "end"})
        assert door.stop(state["prog_id"])["first"]["how"] == "ended"
    final = door.wait(state["prog_id"])
    assert (final["state"], final["reason"], final["hindered"]) == ("exited", "killed", None)
    # The keeper didn't repeat the signal that the agent had sent in its place.
    assert "SIGHUP" not in [each["signal"] for each in final["signals_sent"]]
    assert door.file(state["prog_id"]).count(b"hup") == 1


def test_guards_that_are_all_stopped_are_seen_and_an_order_lets_them_go_on(door):
    state = door.ready('trap "echo hup" HUP; echo ready; while :; do sleep 0.01; done')
    keeper = state["agent_pid"]
    stop_all(state)
    now = door.status(state["prog_id"])
    assert (now["state"], now["supervisor"]) == ("running", "stopped")
    assert now["hindered"] == {"why": "stopped", "due": None, "pid": keeper, "by": None}
    assert door.call("signal", {"prog_id": state["prog_id"], "signal": "HUP"})["how"] == "keeper"
    stop_all(state)
    over = door.stop(state["prog_id"], 5)
    assert over["first"]["how"] == "keeper" and over["ended"]
    assert (over["state"]["reason"], over["state"]["signal"]) == ("killed", "SIGTERM")
    assert door.file(state["prog_id"]) == b"ready\nhup\n"


@pytest.mark.sampled
@pytest.mark.parametrize("due", ["end", "timeout", "kill"])
def test_work_that_is_due_while_all_guards_are_stopped_is_told_and_is_done_once_they_go_on(
    door, gate, due
):
    run = {"timeout": 1.0, "grace": 0.2} if due == "timeout" else None
    script = 'trap "" TERM; echo ready; read a < "$0"; exit 7'
    state = door.ready(script, gate.path, run=run)
    order = door.open("stop", {"prog_id": state["prog_id"], "grace": 2}) if due == "kill" else None
    everyone = stop_all(state)
    if due == "end":
        gate.open()
    with door.follow(state["prog_id"]) as follow:
        # The ping of a client that watches is what makes a follower look.
        while not follow.states or follow.states[-1]["hindered"].get("due") != due:
            follow.send(b"P\n")
            beats = follow.beats()
            follow.until(lambda each, beats=beats: each.beats() > beats)
            if follow.reply["hindered"].get("due") == due:
                break
        now = door.status(state["prog_id"])
        assert (now["state"], now["supervisor"], now["hindered"]["due"]) == (
            "running",
            "stopped",
            due,
        )
        kill(everyone[0], number=signal.SIGCONT)  # which lets the others go on
        follow.drain()
    if order is not None:
        order.close()
    final = follow.states[-1]
    told = {"end": (7, None, "exited"), "timeout": (None, "SIGKILL", "timeout")}
    assert (final["return_code"], final["signal"], final["reason"]) == told.get(
        due, (None, "SIGKILL", "killed")
    )
    assert final["hindered"] is None


def test_the_outermost_guard_is_seen_stopped_once_the_run_is_its_own(door, gate):
    state = door.ready('echo ready; read a < "$0"; exit 7', gate.path)
    standby, *inner = guards(state)
    kill(standby, number=signal.SIGSTOP)
    assert (
        door.status(state["prog_id"])["state"],
        door.status(state["prog_id"])["supervisor"],
    ) == ("running", "ok")
    kill(*inner)
    gone(*inner)
    now = door.status(state["prog_id"])
    assert (now["state"], now["supervisor"]) == ("running", "stopped")
    gate.open()
    kill(standby, number=signal.SIGCONT)
    assert door.wait(state["prog_id"])["return_code"] == 7


@pytest.mark.parametrize("count", [1, 2])
def test_an_end_that_nobody_could_record_is_recorded_by_the_guard_that_is_left(door, gate, count):
    """The guard that would see the end is stopped before the end, and killed before it could record
    the end.
    """
    state = door.ready('echo ready; read a < "$0"; echo last; exit 7', gate.path)
    everyone = stop_all(state)
    gate.open()
    eventually(lambda: agent.process(state["pid"])[0] == "Z")
    assert door.record(state["prog_id"]).outcome is None
    kill(*everyone[-count:])
    kill(everyone[0], number=signal.SIGCONT)
    final = door.wait(state["prog_id"])
    assert (final["state"], final["reason"], final["return_code"]) == ("exited", "exited", 7)
    assert door.file(state["prog_id"]) == b"ready\nlast\n"


THREADS = """
import ctypes, os, sys, threading
def go():
    os.write(1, b"ready\\n")
    open(sys.argv[1]).readline()
    os._exit(7)
threading.Thread(target=go).start()
ctypes.CDLL(None).pthread_exit(None)
"""


def shown_as_zombie(pid: int) -> bool:
    return ") Z " in Path(f"/proc/{pid}/stat").read_text()


def test_a_program_whose_first_thread_has_ended_is_running_and_can_be_stopped(door, gate):
    """/proc shows it as a zombie, though its other threads go on."""
    for stop in (False, True):
        state = door.start([door.python, "-c", THREADS, gate.path])
        with door.follow(state["prog_id"]) as follow:
            follow.until_output(b"ready")
        eventually(functools.partial(shown_as_zombie, state["pid"]))
        now = door.status(state["prog_id"])
        assert (now["state"], now["hindered"]) == ("running", None)
        if stop:
            over = door.stop(state["prog_id"], 0)
            assert over["first"]["processes"] == 1 and over["ended"]
            assert over["state"]["signal"] == "SIGKILL"
        else:
            gate.open()
            assert door.wait(state["prog_id"])["return_code"] == 7


def test_a_stop_goes_on_after_its_keepers_death(door):
    state = door.ready('trap "" TERM; echo ready; sleep 1000 & wait')
    with door.open("stop", {"prog_id": state["prog_id"], "grace": 0.5, "by": "a@test"}) as stop:
        kill(state["agent_pid"])
        stop.drain()
    assert stop.states[-1]["ended"]
    final = door.wait(state["prog_id"])
    assert (final["reason"], final["signal"]) == ("killed", "SIGKILL")
    assert [each["signal"] for each in final["signals_sent"]] == ["SIGTERM", "SIGKILL"]


@machine.DEAR
def test_a_timeout_is_kept_after_the_death_of_two_keepers(door):
    state = door.start(["sleep", "1000"], run={"timeout": 1.0, "grace": 5})
    first, second, third = guards(state)
    kill(third)
    eventually(lambda: door.status(state["prog_id"])["agent_pid"] == second)
    kill(second)
    final = door.wait(state["prog_id"])
    assert (final["reason"], final["signal"]) == ("timeout", "SIGTERM")
    assert 1.0 <= final["elapsed"] < 4
    assert first != third


def test_sigterm_to_all_three_guards_is_relayed_once_and_other_signals_are_nothing_to_them(
    door, gate
):
    state = door.ready(
        'trap "echo term" TERM; echo ready; while ! read a < "$0"; do :; done; echo over; exit 2',
        gate.path,
    )
    everyone = guards(state)
    with door.follow(state["prog_id"]) as follow:
        for name in (
            "HUP",
            "INT",
            "QUIT",
            "USR1",
            "USR2",
            "ALRM",
            "PIPE",
            "RTMIN",
            "WINCH",
            "TSTP",
            "TTIN",
        ):
            kill(*everyone, number=agent.SIGNALS[name])
        kill(*everyone, number=signal.SIGTERM)
        follow.until_output(b"term\n")
        assert all(map(alive, everyone))
        gate.open()
        gate.open()
        follow.drain()
    assert follow.stdout() == b"ready\nterm\nover\n"
    final = follow.states[-1]
    assert (final["return_code"], [each["by"] for each in final["signals_sent"]]) == (
        2,
        ["SIGTERM to the agent"],
    )


def test_guards_are_named_so_that_killall_python3_misses_them(door):
    state = door.ready("echo ready; exec sleep 1000")
    assert [agent.process(pid)[3] for pid in guards(state)] == [
        "corra-standby",
        "corra-standby",
        "corra-keeper",
    ]


def test_a_guards_pid_that_came_to_mean_another_runs_guard_is_not_ours(door):
    """The test makes one run's record name the other run's guards, as reused pids would."""
    other = door.ready("echo ready; exec sleep 1000", prog_id="other")
    ours = door.ready("echo ready; exec sleep 1000", prog_id="ours")
    door.constants = "agent.ORDER_DEADLINE_S = 0.2; "
    with held(ours["agent_pid"]):
        path = door.directory("ours") / "exit"
        record = door.record("ours")
        starts = dict(record.guards)
        record.guards = [
            (pid, start) for pid, start in zip(guards(other), starts.values(), strict=True)
        ] + record.guards
        with path.open("r+b") as slot:
            slot.write(record.page())
        assert set(guards(door.status("ours"))) == set(guards(ours))
        assert door.stop("ours", 0)["ended"]
        assert door.status("other")["state"] == "running" and all(
            alive(pid) for pid in [other["pid"], *guards(other)]
        )


# ---------------------------------------------------------------- reboot, pids, clocks


def rewrite_launched(door: Door, prog_id: str, **changes: object) -> None:
    """Change `launched` to name another boot or another process."""
    path = door.directory(prog_id) / "launched"
    words = path.read_text().split()
    for at, key in enumerate(("pid", "start", "boot_id", "time_ns", "mono_ns")):
        words[at] = str(changes.get(key, words[at]))
    path.chmod(0o600)
    path.write_text(" ".join(words).ljust(255))


def test_after_a_reboot_a_run_is_lost_at_the_first_look_and_nobody_is_signalled(door):
    state = door.ready("echo ready; exec sleep 1000")
    kill(*guards(state))
    gone(*guards(state))
    rewrite_launched(door, state["prog_id"], boot_id="00000000-0000-0000-0000-000000000000")
    now = door.status(state["prog_id"])
    assert (now["state"], now["reason"], now["status"]) == ("lost", "reboot", None)
    assert door.call("signal", {"prog_id": state["prog_id"], "signal": "KILL"})["how"] == "ended"
    assert door.stop(state["prog_id"], 0)["first"]["how"] == "ended"
    assert alive(state["pid"])
    with door.follow(state["prog_id"]) as follow:
        follow.drain()
    assert follow.stdout() == b"ready\n" and follow.states[-1]["reason"] == "reboot"


def test_a_process_that_began_at_another_time_is_a_stranger(door):
    state = door.ready("echo ready; exec sleep 1000")
    kill(*guards(state))
    gone(*guards(state))
    rewrite_launched(door, state["prog_id"], start=state["pid_start"] - 1)
    assert door.call("signal", {"prog_id": state["prog_id"], "signal": "KILL"})["how"] == "ended"
    over = door.stop(state["prog_id"], 0)
    assert over["first"]["processes"] == 0 and over["ended"]
    assert alive(state["pid"])


def test_a_pid_used_again_in_a_pid_namespace_is_never_signalled(tmp_path, python):
    if os.getuid() != 0 or not shutil.which("unshare"):
        pytest.skip("needs root and unshare: it makes a pid namespace")
    # The namespace's first process reaps orphans: one child lives as long as the test.
    script = (
        "import os, sys\npid = os.fork()\nif not pid:\n    sys.stdin.read(); os._exit(0)\n"
        "print('up', flush=True)\nwhile os.wait()[0] != pid: pass"
    )
    first = subprocess.Popen(
        ["unshare", "-p", "-f", "--mount-proc", sys.executable, "-ISEc", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert first.stdout is not None
    if first.stdout.readline() != b"up\n":
        first.communicate()
        pytest.skip("no pid namespaces here")
    inside = next(
        pid for pid, found in agent.process_tree([first.pid]).items() if found[1] == first.pid
    )
    enter = ["nsenter", "-t", str(inside), "-p", "-m", "--"]
    try:
        for door in fresh(tmp_path, python=python, prefix=enter):
            state = door.start(["sleep", "1000"])
            pids = [*guards(state), state["pid"]]
            subprocess.run([*enter, "kill", "-9", *map(str, pids)], check=True)
            probe = [*enter, "kill", "-0", str(state["pid"])]
            eventually(lambda: subprocess.call(probe, stderr=subprocess.DEVNULL))  # noqa: B023
            assert door.status(state["prog_id"])["state"] == "lost"
            # The same user's next process gets the program's pid.
            again = (
                f"echo {state['pid'] - 1} > /proc/sys/kernel/ns_last_pid; sleep 1000 2>&- & echo $!"
            )
            stranger = subprocess.run(
                [*enter, "sh", "-c", again + " >&2"],
                check=True,
                stderr=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
            )
            assert int(stranger.stderr) == state["pid"]
            assert door.status(state["prog_id"])["state"] == "lost"
            assert (
                door.call("signal", {"prog_id": state["prog_id"], "signal": "KILL"})["how"]
                == "ended"
            )
            assert door.stop(state["prog_id"], 0)["first"] == {
                **door.stop(state["prog_id"], 0)["first"],
                "how": "ended",
                "processes": 0,
            }
            subprocess.run([*enter, "kill", "-0", str(state["pid"])], check=True)
    finally:
        first.communicate(timeout=10)


def test_a_torn_record_is_no_record_and_never_a_wrong_status(door):
    state = door.start(["sh", "-c", "exit 5"])
    door.wait(state["prog_id"])
    eventually(lambda: door.status(state["prog_id"])["supervisor"] == "gone")
    path = door.directory(state["prog_id"]) / "exit"
    whole = path.read_bytes()
    used = whole.index(b"\n\n")
    for at in range(1, used, 7):
        path.write_bytes(whole[:at] + b"\n" * (len(whole) - at))
        now = agent.Run(str(door.spool), state["prog_id"]).state()
        assert (now["state"], now["status"]) in {("lost", None), ("exited", 5 << 8)}, at
        assert (now["state"] == "exited") == (at >= used)


@pytest.fixture
def faked_clock(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Remove the files that libfaketime leaves in /dev/shm. One test runs at a time: otherwise one
    would remove the files of another.
    """

    def there() -> set[Path]:
        return set(Path("/dev/shm").glob("*faketime*"))

    with (tmp_path_factory.getbasetemp().parent / "faketime").open("w") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        before = there()
        yield
        for path in there() - before:
            path.unlink()


@pytest.mark.usefixtures("faked_clock")
@pytest.mark.parametrize("days", [-1, 1])
def test_a_clock_set_a_day_off_fires_and_delays_no_timeout_and_every_duration_stays_right(
    tmp_path, gate, python, days
):
    library = next(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"), None)
    if library is None:
        pytest.skip("no libfaketime here (apt-get install faketime)")
    clock = tmp_path / "clock"
    clock.write_text("+0d\n")
    # libfaketime reads the file at each look at the clock: the test sets the clock while the guards
    # run.
    env = {
        "LD_PRELOAD": str(library),
        "FAKETIME_TIMESTAMP_FILE": str(clock),
        "FAKETIME_NO_CACHE": "1",
        "DONT_FAKE_MONOTONIC": "1",
    }
    for door in fresh(tmp_path, python=python, env=env):
        state = door.ready('echo ready; read a < "$0"; exit 4', gate.path, run={"timeout": 3600})
        short = door.start(["sleep", "1000"], run={"timeout": 0.3})
        clock.write_text(f"{days:+d}d\n")
        now, late = door.status(state["prog_id"]), door.wait(short["prog_id"])
        assert now["state"] == "running" and 0 <= now["elapsed"] < 60
        assert late["reason"] == "timeout" and 0.3 <= late["elapsed"] < 60
        gate.open()
        final = door.wait(state["prog_id"])
        assert (final["state"], final["reason"], final["return_code"]) == (
            "exited",
            "exited",
            4,
        ) and 0 <= final["elapsed"] < 60
        began, over = (datetime.fromisoformat(final[key]) for key in ("start_time", "end_time"))
        assert abs(over - began - timedelta(days=days)) < timedelta(minutes=1)  # the clock was set


# ---------------------------------------------------------------- the spool taken away


def test_a_spool_deleted_under_a_run_leaves_the_program_alone_and_is_told_at_once(door, gate):
    mark = door.base / "mark"
    state = door.ready(
        'echo ready; read a < "$0"; echo more; echo end > "$1"', gate.path, str(mark)
    )
    with door.follow(state["prog_id"]) as follow:
        follow.until_output(b"ready\n")
        shutil.rmtree(door.directory(state["prog_id"]))
        follow.drain(10)
    final = follow.states[-1]
    assert (final["state"], final["reason"]) == ("lost", "spool-gone")
    assert alive(state["pid"])
    with pytest.raises(Refused) as refused:
        door.status(state["prog_id"])
    assert refused.value.kind == "not_found"
    assert all(map(alive, guards(state)))
    gate.open()
    gone(state["pid"], *guards(state))
    assert lines_of(mark) == ["end"]


def test_a_keeper_killed_after_its_spool_was_deleted_has_a_successor_that_ends_in_peace(door, gate):
    state = door.ready('echo ready; read a < "$0"; echo more', gate.path)
    shutil.rmtree(door.directory(state["prog_id"]))
    kill(state["agent_pid"])
    gate.open()
    gone(state["pid"], *guards(state))


# ---------------------------------------------------------------- disks


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Mount]:
    """A file system of 4 MiB."""
    if os.getuid() != 0:
        pytest.skip("needs root: it mounts a tmpfs")
    mount = Mount(tmp_path / "small", "size=4m,mode=0700")
    yield mount
    mount.close()


def fill(mount: Mount) -> Path:
    """Leave not a byte on the disk; return the file to remove."""
    with (mount.at / "filler").open("wb", 0) as filler, pytest.raises(OSError, match="No space"):
        while True:
            filler.write(b"x" * 4096)
    assert mount.free() == 0
    return mount.at / "filler"


def test_a_full_disk_holds_the_program_back_and_loses_nothing_once_there_is_room(door, small, gate):
    filler = small.at / "filler"
    filler.write_bytes(b"x" * (2 << 20))
    door.spool = small.at / "spool"
    state = door.start(["seq", "1", "400000"])  # 2.7 MB
    blocked = eventually(lambda: door.status(state["prog_id"])["blocked"])
    assert blocked["errno"] == errno.ENOSPC and blocked["since"]
    now = door.status(state["prog_id"])
    assert now["state"] == "running" and alive(state["pid"])
    # The floor: the keeper leaves the last twentieth of the disk free, except for what one splice
    # may overshoot.
    assert small.free() > (4 << 20) // 20 - agent.PIPE_MAX
    with door.follow(state["prog_id"]) as follow:
        filler.unlink()
        follow.drain()
    assert follow.stdout() == b"".join(b"%d\n" % number for number in range(1, 400001))
    assert follow.states[-1]["blocked"] is None and follow.states[-1]["return_code"] == 0


@pytest.mark.parametrize(
    "count", [1, 5000], ids=["what fits in its last page", "what fits in the FIFO"]
)
def test_the_exit_status_is_recorded_on_a_disk_without_a_byte_left(door, small, gate, count):
    door.spool = small.at / "spool"
    state = door.ready(f'echo ready; read a < "$0"; seq 1 {count}; exit 9', gate.path)
    filler = fill(small)
    gate.open()
    record = eventually(lambda: [each for each in [door.record(state["prog_id"])] if each.outcome])[
        0
    ]
    assert record.outcome[0] == 9 << 8
    with door.follow(state["prog_id"]) as follow:
        assert follow.reply["state"] == "exited" and follow.reply["return_code"] == 9
        filler.unlink()
        follow.drain()
    assert follow.stdout() == b"ready\n" + b"".join(
        b"%d\n" % number for number in range(1, count + 1)
    )
    gone(*guards(state))
    copy = door.directory(state["prog_id"]) / "state.json"
    assert not copy.exists() or json.loads(copy.read_text())["return_code"] == 9


def test_an_end_on_a_full_disk_is_final_and_its_output_waits_and_is_no_gap(door, small, gate):
    door.spool = small.at / "spool"
    state = door.ready('echo ready; read a < "$0"; seq 1 5000; exit 9', gate.path)
    filler = fill(small)
    waits = {"why": "room", "due": "output", "pid": state["agent_pid"], "by": None}
    with door.follow(state["prog_id"]) as follow:
        gate.open()
        final = door.wait(state["prog_id"])
        assert (final["return_code"], final["hindered"]) == (9, waits)
        over = door.stop(state["prog_id"])
        assert (over["first"]["how"], over["state"]["return_code"]) == ("ended", 9)
        with door.follow(state["prog_id"], live=False) as now:
            now.drain()
        assert now.gaps == [] and now.states[-1]["hindered"] == waits
        while not follow.states or follow.states[-1]["hindered"] != waits:
            follow.send(b"P\n")
            beats = follow.beats()
            follow.until(lambda each, beats=beats: each.beats() > beats)
        assert follow.states[-1]["state"] == "exited"
        filler.unlink()
        follow.drain()
    assert follow.stdout() == b"ready\n" + b"".join(b"%d\n" % each for each in range(1, 5001))
    assert (follow.states[-1]["hindered"], follow.gaps) == (None, [])


def test_a_timeout_is_kept_and_recorded_on_a_full_disk(door, small):
    door.spool = small.at / "spool"
    state = door.start(["cat", "/dev/zero"], run={"timeout": 1.0, "grace": 5})
    eventually(lambda: door.status(state["prog_id"])["blocked"])
    fill(small)
    final = door.wait(state["prog_id"])
    assert (final["reason"], final["signal"]) == ("timeout", "SIGTERM")


@pytest.mark.parametrize("rescued", ["by room", "by another keeper"])
def test_an_end_that_cant_be_written_is_told_and_recorded_as_it_was_once_it_can(
    door, gate, rescued
):
    """A limit on the size of files makes the kernel refuse the keeper's write to the slot, as a
    file system does that can't overwrite in place when it is full, or read-only after an error.
    """
    state = door.ready('echo ready; read a < "$0"; exit 9', gate.path)
    keeper = state["agent_pid"]
    resource.prlimit(keeper, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
    with door.open("wait", {"prog_id": state["prog_id"]}) as waiting:
        gate.open()
        eventually(lambda: agent.process(state["pid"])[0] == "Z")
        eventually(lambda: door.status(state["prog_id"])["hindered"])
        now = door.status(state["prog_id"])
        held_up = {"why": "room", "due": "end", "pid": keeper, "by": None}
        assert (now["state"], now["status"], now["hindered"]) == ("running", None, held_up)
        over = door.stop(state["prog_id"])
        assert (over["first"]["how"], over["ended"], over["state"]["state"]) == (
            "ended",
            True,
            "running",
        )
        if rescued == "by room":
            unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
            resource.prlimit(keeper, resource.RLIMIT_FSIZE, unlimited)
        else:
            kill(keeper)
        waiting.drain()
    final = waiting.states[-1]
    assert (final["state"], final["return_code"], final["hindered"]) == ("exited", 9, None)


def test_a_quota_that_is_used_up_holds_the_program_back_until_it_is_raised(door, gate):
    """strace makes the kernel say EDQUOT to the keeper: few machines that run this test have
    quotas.
    """
    if shutil.which("strace") is None:
        pytest.skip("no strace here, which makes the kernel say EDQUOT")
    state = door.ready('echo ready; read a < "$0"; seq 1 20000; exit 5', gate.path)
    inject = [
        "strace",
        "-qq",
        "-e",
        "trace=splice",
        "-e",
        "inject=splice:error=EDQUOT",
        "-o",
        "/dev/null",
        "-p",
        str(state["agent_pid"]),
    ]
    tracer = subprocess.Popen(inject)
    traced = Path(f"/proc/{state['agent_pid']}/status")
    eventually(lambda: f"TracerPid:\t{tracer.pid}\n" in traced.read_text())
    gate.open()
    blocked = eventually(lambda: door.status(state["prog_id"])["blocked"])
    assert blocked["errno"] == errno.EDQUOT and blocked["since"]
    tracer.send_signal(signal.SIGINT)
    tracer.wait()
    final = door.wait(state["prog_id"])
    assert (final["return_code"], final["blocked"]) == (5, None)
    assert door.file(state["prog_id"]) == b"ready\n" + b"".join(
        b"%d\n" % number for number in range(1, 20001)
    )


def test_where_the_kernel_splices_nothing_the_bytes_are_read_and_written(
    door, gate, tmp_path, python
):
    """strace makes each splice of the guards fail with EINVAL, for stdin and for output, as on a
    file system without splice.
    """
    if shutil.which("strace") is None:
        pytest.skip("no strace here, which makes the kernel say EINVAL")
    sent = os.urandom(100_000)
    inject = [
        "strace",
        "-f",
        "-qq",
        "-o",
        "/dev/null",
        "-e",
        "trace=splice",
        "-e",
        "inject=splice:error=EINVAL",
    ]
    request = door.program(
        ["sh", "-c", f"read a < {gate.path}; tee /dev/stderr | md5sum"],
        prog_id="x",
        stdin={"open": True},
    )
    # The tracer lives as long as the guards.
    with Door(tmp_path, python=python, prefix=inject).popen("start") as starter:
        assert starter.stdin is not None and starter.stdout is not None
        starter.stdin.write(door.encode(request))
        assert json.loads(starter.stdout.readline())["state"] == "running"
        with door.follow("x", sender=7) as follow:
            for at in range(0, len(sent), 50_000):
                piece = sent[at : at + 50_000]
                follow.send(b"I %d %d\n" % (at, len(piece)) + piece)
            follow.send(b"E %d\n" % len(sent))
            gate.open()
            follow.drain()
    assert follow.stdout().split()[0].decode() == hashlib.md5(sent).hexdigest()
    assert door.file("x", "stderr") == sent


def test_a_file_system_that_executes_nothing_will_do(tmp_path, python):
    if os.getuid() != 0:
        pytest.skip("needs root: it mounts a tmpfs")
    mount = Mount(tmp_path / "small", "size=4m,noexec,mode=0700")
    try:
        shutil.copy(SOURCE, mount.at)
        for door in fresh(tmp_path, python=python, spool=mount.at / "spool"):
            request = door.encode(door.program(["sh", "-c", "echo out; exit 3"], prog_id="x"))
            subprocess.run(
                [python, "-ISE", mount.at / "agent.py", "start"],
                input=request,
                env=door.env,
                check=True,
                capture_output=True,
            )
            assert (door.wait("x")["return_code"], door.file("x")) == (3, b"out\n")
    finally:
        mount.close()


def test_a_program_held_back_by_a_full_disk_can_be_stopped(door, small):
    door.spool = small.at / "spool"
    state = door.start(["cat", "/dev/zero"])
    eventually(lambda: door.status(state["prog_id"])["blocked"])
    over = door.stop(state["prog_id"], 5)
    assert over["ended"] and over["first"]["how"] == "keeper"
    assert (over["state"]["state"], over["state"]["signal"], over["state"]["reason"]) == (
        "exited",
        "SIGTERM",
        "killed",
    )


def test_a_spool_deleted_while_it_fills_the_disk_holds_nobody_back(door, small):
    door.spool = small.at / "spool"
    state = door.start(["cat", "/dev/zero"])
    eventually(lambda: door.status(state["prog_id"])["blocked"])
    shutil.rmtree(door.directory(state["prog_id"]))
    eventually(lambda: small.free() > 3 << 20, "the deleted output to leave the disk")
    kill(state["pid"])
    gone(*guards(state))
    assert small.free() > 3 << 20


def test_keepers_killed_while_the_disk_is_full_change_nothing(door, small):
    filler = small.at / "filler"
    filler.write_bytes(b"x" * (2 << 20))
    door.spool = small.at / "spool"
    state = door.start(["seq", "1", "400000"])
    eventually(lambda: door.status(state["prog_id"])["blocked"])
    _, second, third = guards(state)
    kill(third)
    eventually(
        lambda: (
            (
                door.status(state["prog_id"])["agent_pid"],
                bool(door.status(state["prog_id"])["blocked"]),
            )
            == (second, True)
        )
    )
    kill(second)
    filler.unlink()
    final = door.wait(state["prog_id"])
    assert final["return_code"] == 0
    assert door.file(state["prog_id"]) == b"".join(b"%d\n" % number for number in range(1, 400001))


def test_without_inodes_a_start_is_refused_and_a_running_run_still_records_its_end(
    tmp_path, gate, python
):
    if os.getuid() != 0:
        pytest.skip("needs root: it mounts a tmpfs")
    mount = Mount(tmp_path / "small", "size=4m,nr_inodes=40,mode=0700")
    try:
        for door in fresh(tmp_path, python=python, spool=mount.at / "spool"):
            state = door.ready('echo ready; read a < "$0"; echo more; exit 9', gate.path)
            with pytest.raises(OSError, match="No space"):
                for number in itertools.count():
                    (mount.at / str(number)).touch()
            with pytest.raises(Refused) as refused:
                door.start(["true"])
            assert refused.value.kind == "no_room"
            assert [(each["dir"], each["errno"]) for each in refused.value.reply["tried"]] == [
                (str(door.spool), errno.ENOSPC)
            ]
            assert os.listdir(door.spool / "runs") == [state["prog_id"]]
            gate.open()
            final = door.wait(state["prog_id"])
            assert (final["return_code"], door.file(state["prog_id"])) == (9, b"ready\nmore\n")
    finally:
        mount.close()


# ---------------------------------------------------------------- directories

USER = 50_000 + os.getpid() % 10_000  # neither a user of the machine nor another worker's


@pytest.fixture
def open_tmp() -> Iterator[Path]:
    """A directory that any user may enter."""
    if os.getuid() != 0:
        pytest.skip("needs root: it becomes another user")
    path = Path(tempfile.mkdtemp(prefix="corra-", dir="/tmp"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path, ignore_errors=True)
    shutil.rmtree(f"/var/tmp/corra-{USER}", ignore_errors=True)


@pytest.fixture
def theirs(python: str, open_tmp: Path) -> Iterator[str]:
    """`python` at a path where any user may execute it: a Python in a user's home is closed to
    other users.
    """
    if python.startswith("/usr/"):
        yield python
        return
    shown = open_tmp / "python"
    shown.mkdir()
    subprocess.run(["mount", "--bind", Path(python).parents[1], shown], check=True)
    yield str(shown / "bin" / Path(python).name)
    subprocess.run(["umount", "-l", shown], check=True)


def as_user(base: Path, python: str, **env: str | None) -> Iterator[Door]:
    # A Python that is mounted elsewhere needs the libpython beside it.
    given = {"XDG_STATE_HOME": None, "LD_LIBRARY_PATH": str(Path(python).parents[1] / "lib"), **env}
    for door in fresh(base, python=python, user=USER, env=given):
        os.chown(door.home, USER, USER)
        yield door


@pytest.mark.parametrize("kind", ["read-only", "missing", "unset", "another's", "not a directory"])
def test_without_a_usable_home_the_spool_is_in_var_tmp(open_tmp, theirs, kind):
    home = {
        "missing": str(open_tmp / "none"),
        "unset": None,
        "another's": "/root",
        "not a directory": "/etc/passwd",
    }
    env = {"HOME": home[kind]} if kind in home else {}
    for door in as_user(open_tmp, theirs, **env):
        if kind == "read-only":
            door.home.chmod(0o555)
        state = door.call(
            "start", {"spool": None, **door.program(["sh", "-c", "echo out; exit 3"])}
        )
        assert state["spool"] == f"/var/tmp/corra-{USER}/runs/{state['prog_id']}"
        assert os.stat(f"/var/tmp/corra-{USER}").st_mode & 0o777 == 0o700
        door.spool = Path(f"/var/tmp/corra-{USER}")
        with door.open("follow", {"prog_id": state["prog_id"], "spool": None}) as follow:
            follow.drain()
        assert follow.stdout() == b"out\n" and follow.states[-1]["return_code"] == 3


def test_a_root_that_cant_be_read_is_an_error_and_no_reason_to_go_elsewhere(open_tmp, theirs):
    for door in as_user(open_tmp, theirs):
        hidden = door.home / ".local" / "state"
        hidden.mkdir(parents=True)
        hidden.chmod(0o700)  # root owns it
        for verb, request in (
            ("start", door.program(["true"], prog_id="mine")),
            ("status", {"prog_id": "mine"}),
            ("list", {}),
        ):
            with pytest.raises(Refused) as refused:
                door.call(verb, {"spool": None, **request})
            assert refused.value.kind == "unreadable"
            assert (
                refused.value.reply["errno"] == errno.EACCES
                and str(hidden) in refused.value.reply["dir"]
            )
        assert not Path(f"/var/tmp/corra-{USER}").exists()


def test_a_root_of_another_user_is_neither_used_nor_believed(open_tmp, theirs):
    trap = Path(f"/var/tmp/corra-{USER}")
    run = trap / "runs" / "mine"
    for door in as_user(open_tmp, theirs, HOME=None):
        run.mkdir(parents=True)
        (run / "program.json").write_text(
            json.dumps({"prog_id": "mine", "program": {"argv": ["true"]}})
        )
        for path in (trap, trap / "runs", run, run / "program.json"):
            path.chmod(0o777)
        with pytest.raises(Refused) as refused:
            door.call("start", {"spool": None, **door.program(["true"], prog_id="mine")})
        assert (
            refused.value.kind == "no_room"
            and refused.value.reply["tried"][0]["errno"] == errno.EPERM
        )
        with pytest.raises(Refused) as refused:
            door.call("status", {"spool": None, "prog_id": "mine"})
        assert refused.value.kind == "not_found"
        assert door.call("list", {"spool": None})["runs"] == []
        assert os.listdir(run) == ["program.json"]


@pytest.mark.parametrize("kind", ["a link", "writable for the group", "a linked runs"])
def test_a_root_that_others_could_change_is_refused(door, kind):
    real = door.base / "real"
    (real / "runs").mkdir(parents=True, mode=0o700)
    real.chmod(0o770 if kind == "writable for the group" else 0o700)
    if kind == "writable for the group":
        door.spool = real
    elif kind == "a link":
        door.spool = door.base / "link"
        door.spool.symlink_to(real)
    else:
        door.spool = door.base / "other"
        door.spool.mkdir(mode=0o700)
        (door.spool / "runs").symlink_to(real / "runs")
    with pytest.raises(Refused) as refused:
        door.start(["true"])
    assert refused.value.kind == "no_room"
    assert refused.value.reply["tried"][0]["errno"] in {errno.EPERM, errno.ELOOP, errno.ENOTDIR}
    assert os.listdir(real / "runs") == []


def test_a_forbidden_cwd_is_told_with_its_path(open_tmp, theirs):
    shut = open_tmp / "shut"
    shut.mkdir(mode=0o700)
    for door in as_user(open_tmp, theirs):
        door.spool = door.home / "spool"
        state = door.start(["true"], cwd=str(shut))
    assert (state["state"], state["exception"]["stage"], state["exception"]["errno"]) == (
        "not_started",
        "cwd",
        errno.EACCES,
    )
    assert str(shut) in state["exception"]["message"]


def test_what_cant_be_killed_is_reported_by_pid(open_tmp, theirs):
    """Its user can't kill a program that has become root's."""
    if not os.path.exists("/usr/bin/python3"):
        pytest.skip("no system Python, which needs no library beside it")
    mighty = open_tmp / "mighty"
    shutil.copy("/usr/bin/python3", mighty)
    mighty.chmod(0o4755)
    try:
        for door in as_user(open_tmp, theirs):
            door.spool = door.home / "spool"
            door.constants = "agent.KILL_DEADLINE_NS = 3 * 10**8; "
            code = (
                "import os, signal; os.setresuid(0, 0, 0); print('ready', flush=True); "
                "signal.pause()"
            )
            state = door.start(["sh", "-c", f'"{mighty}" -ISEc "{code}" & echo $!; wait'])
            with door.follow(state["prog_id"]) as follow:
                follow.until(lambda each: len(each.stdout().split()) == 2)
                if b"ready" not in follow.stdout():
                    pytest.skip("set-user-id has no effect on this file system")
                pid = int(re.findall(rb"\d+", follow.stdout())[0])
                over = door.stop(state["prog_id"], 0.1)
                assert not over["ended"]
                assert [(each["pid"], each["name"]) for each in over["survivors"]] == [
                    (pid, "mighty")
                ]
                assert over["survivors"][0]["state"] in "SR"
                assert alive(pid)
                follow.drain()
            assert (follow.states[-1]["state"], follow.states[-1]["signal"]) == (
                "exited",
                "SIGTERM",
            )
            kill(pid)
    finally:
        mighty.unlink()


@pytest.mark.storm
@machine.DEAR
def test_a_user_with_hardly_any_process_left_gets_fewer_guards_or_a_clear_no_and_never_half_a_run(
    open_tmp, theirs
):
    seen: set[int | str] = set()
    for limit in range(1, 9):
        base = open_tmp / str(limit)
        base.mkdir(mode=0o755)
        for door in as_user(base, theirs):
            door.spool = door.home / "spool"
            # Only bash sets this limit: dash has no -u.
            door.prefix = ["bash", "-c", f'ulimit -u {limit}; exec "$@"', "bash"]
            door.constants = "agent.START_DEADLINE_S = 1; "
            state = door.start(["sleep", "1000"], prog_id="tight")
            door.prefix, door.constants = [], ""
            if state["state"] == "not_started":
                assert (state["exception"]["stage"], state["exception"]["errno"]) == (
                    "setup",
                    errno.EAGAIN,
                )
                seen.add("not started")
                continue
            assert state["state"] == "running"
            seen.add(len(guards(state)))
            assert door.stop("tight", 5)["state"]["signal"] == "SIGTERM"
    assert {"not started", 3} <= seen


# It has its parent trace it, as a program does that wants no debugger, and stops for the tracer at
# each exec and signal. USR1 ends it.
TRACES_ITSELF = """
import ctypes, os, signal, sys
signal.signal(signal.SIGUSR1, lambda *_: sys.exit(42))
assert ctypes.CDLL(None).ptrace(0, 0, 0, 0) == 0
os.kill(os.getpid(), signal.SIGWINCH)
if sys.argv[1:]:
    os.execv(sys.executable, [sys.executable, "-c", sys.argv[1]])
print("ready", flush=True)
while True:
    signal.pause()
"""


@pytest.mark.parametrize("again", [False, True], ids=["at a signal", "at an exec"])
def test_a_program_that_has_itself_traced_runs_on_and_its_end_is_its_own(
    door: Door, again: bool
) -> None:
    argv = [sys.executable, "-c", TRACES_ITSELF, *[TRACES_ITSELF] * again]
    state = door.start(argv, prog_id="x")
    with door.follow("x") as follow:
        follow.until_output(b"ready")
        assert follow.states[-1:] == [] or follow.states[-1]["state"] == "running"
        assert door.status("x")["state"] == "running"
        assert alive(state["pid"])
        assert door.call("signal", {"prog_id": "x", "signal": "USR1"})["how"] == "keeper"
        follow.drain()
    final = follow.states[-1]
    assert (final["state"], final["reason"], final["return_code"]) == ("exited", "exited", 42)
    assert not alive(state["pid"])


def test_a_program_that_strace_watches_runs_on_and_its_end_is_its_own(
    door: Door, tmp_path: Path
) -> None:
    if shutil.which("strace") is None:
        pytest.skip("no strace here")
    log = tmp_path / "calls"
    state = door.ready("trap 'exit 3' USR1; echo ready; while :; do sleep 0.01; done")
    pid = str(state["pid"])
    with subprocess.Popen(["strace", "-qq", "-o", str(log), "-p", pid]) as strace:
        eventually(lambda: log.exists() and b"wait4" in log.read_bytes())
        assert door.status(state["prog_id"])["state"] == "running"
        kill(state["pid"], number=signal.SIGUSR1)
        strace.wait(20)
    final = door.wait(state["prog_id"])
    assert (final["state"], final["return_code"]) == ("exited", 3)


DAMAGES = {
    "empty": b"",
    "cut short": b'{"prog_id": "bad", "prog',
    "not UTF-8": b"\xff\xfe",
    "null": b"null",
    "nested too deeply": b"[" * 100_000,
    "without a program": b'{"prog_id": "bad"}',
    "another run's": b'{"prog_id": "good", "program": {"argv": ["true"]}}',
    "argv of a wrong type": b'{"prog_id": "bad", "program": {"argv": [7]}}',
    "run of a wrong type": b'{"prog_id": "bad", "program": {"argv": ["true"]}, "run": 7}',
    "deep types": b'{"prog_id": "bad", "program": {"argv": ["x"], "env": 7}, "run": {"keep": []}}',
}


@pytest.mark.sampled
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_record_is_named_and_hides_no_other_run(door: Door, damage: str) -> None:
    for prog_id, code in (("bad", 9), ("good", 7)):
        request = {**door.program(["sh", "-c", f"exit {code}"], prog_id=prog_id), "name": prog_id}
        door.call("start", request)
        assert door.wait(prog_id)["return_code"] == code
    record = door.directory("bad") / "program.json"
    whole = record.read_bytes()
    record.write_bytes(DAMAGES[damage])
    listed = door.call("list", {})
    assert [each["prog_id"] for each in listed["runs"]] == ["good"]
    (unreadable,) = listed["unreadable"]
    assert (unreadable["prog_id"], unreadable["dir"]) == ("bad", str(record.parent))
    assert "damaged" in unreadable["message"]
    assert door.status("good")["return_code"] == 7
    assert door.status("go")["prog_id"] == "good"
    assert door.call("gc", {"older": 0})["removed"] == []
    for verb in ("status", "start", "stop", "follow", "signal"):
        request = door.program(["true"], prog_id="bad") if verb == "start" else {"prog_id": "bad"}
        with pytest.raises(Refused) as refused:
            door.call(verb, request)
        assert (refused.value.kind, refused.value.reply["dir"]) == (
            "unreadable",
            str(record.parent),
        )
    # As docs/faults.md says: with the id and any argv the record tells its end again.
    record.write_text('{"prog_id": "bad", "program": {"argv": ["?"]}}')
    assert door.status("bad")["return_code"] == 9
    record.write_bytes(whole)
    assert door.status("bad")["name"] == "bad"


# Fewer descriptors than Python, than a guard or than a keeper needs; too little memory for a guard.
@machine.DEAR
@pytest.mark.parametrize("limit", ["-n 8", "-n 16", "-n 20", "-n 24", "-v 15000"])
def test_a_start_whose_guards_cant_work_is_not_started_with_its_reason_before_the_answer(
    door: Door, limit: str
) -> None:
    door.prefix = ["bash", "-c", f'ulimit {limit}; exec "$@"', "bash"]
    door.constants = "agent.START_DEADLINE_S = 2; "
    before = children()
    state = door.start(["sleep", "1000"], prog_id="x")
    door.prefix, door.constants = [], ""
    assert (state["state"], state["reason"]) == ("not_started", "setup")
    assert state["exception"]["message"].startswith(("its guards can't", "no guard could"))
    if limit.startswith("-n"):
        assert state["exception"]["errno"] == errno.EMFILE
    for seen in (door.status("x"), door.wait("x"), door.stop("x", 0)["state"]):
        assert (seen["state"], seen["exception"]) == ("not_started", state["exception"])
    assert door.start(["sleep", "1000"], prog_id="x")["state"] == "not_started"
    eventually(lambda: children() == before)


@machine.DEAR
def test_a_guard_that_replaces_another_before_the_launch_gives_up_and_the_state_has_the_reason(
    door: Door,
) -> None:
    door.constants = (
        "agent.FORK_KB = 10**9; agent.Keeper.launch = lambda self: {}['a defect of ours']; "
    )
    before = children()
    state = door.start(["sleep", "1000"], prog_id="x")
    assert (state["state"], state["reason"]) == ("not_started", "setup")
    said = state["exception"]["message"]
    assert said.startswith(f"{agent.REPLACED_MOST} guards died before they started it; agent ")
    assert "KeyError('a defect of ours'" in said
    eventually(lambda: children() == before)
    deaths = door.file("x", "keeper").decode().splitlines()
    assert len(deaths) == agent.REPLACED_MOST


@pytest.fixture
def abandoned(door: Door) -> Door:
    """A door, and a run `x` behind it whose starter and guards all died before the launch."""
    door.prefix = ["bash", "-c", 'ulimit -n 7; exec "$@"', "bash"]
    with door.popen("start") as starter:
        assert starter.stdin is not None
        starter.stdin.write(door.encode(door.program(["sh", "-c", "echo x >> ran"], prog_id="x")))
        eventually(door.directory("x").exists)
        starter.kill()
    door.prefix = []
    eventually(lambda: door.status("x")["supervisor"] == "gone")
    return door


@machine.DEAR
def test_a_run_whose_guards_and_starter_died_before_the_launch_is_not_started_and_stays_so(
    abandoned: Door,
) -> None:
    door = abandoned
    assert door.status("x")["state"] == "starting"  # a repeated start may still launch it
    door.constants = "agent.START_DEADLINE_S = 1; "
    final = door.wait("x")
    assert (final["state"], final["reason"]) == ("not_started", "setup")
    assert final["exception"]["message"].startswith("its guards died before they started it")
    assert door.start(["sh", "-c", "echo x >> ran"], prog_id="x")["state"] == "not_started"
    assert not list(door.base.rglob("ran"))


@machine.DEAR
def test_a_stop_of_what_nobody_has_launched_keeps_it_from_being_launched(abandoned: Door) -> None:
    stopped = abandoned.stop("x", 5)
    assert (stopped["ended"], stopped["state"]["state"]) == (True, "not_started")
    assert stopped["state"]["exception"]["message"] == "it was stopped before it was started"
    again = abandoned.start(["sh", "-c", "echo x >> ran"], prog_id="x")
    assert again["exception"] == stopped["state"]["exception"]
    assert not list(abandoned.base.rglob("ran"))


def test_a_follower_that_gets_no_inotify_has_every_byte_all_the_same(
    open_tmp: Path, theirs: str
) -> None:
    hoard = (
        "import ctypes, sys\nlibc = ctypes.CDLL(None)\nfor _ in range(100000):\n"
        " if libc.inotify_init1(0) < 0: break\n"
        "print('none left', flush=True)\nsys.stdin.read()"
    )
    for door in as_user(open_tmp, theirs):
        door.spool = door.home / "spool"
        pipe = subprocess.PIPE
        hoarder = subprocess.Popen(
            [theirs, "-c", hoard],
            stdin=pipe,
            stdout=pipe,
            env=door.env,
            user=door.user,
            group=door.user,
            extra_groups=[],
        )
        try:
            assert hoarder.stdout
            assert hoarder.stdout.readline() == b"none left\n"
            with door.open(
                "run",
                door.program(["sh", "-c", "for i in 1 2 3; do echo $i; sleep 0.05; done; exit 7"]),
            ) as run:
                run.drain()
            assert (run.stdout(), run.states[-1]["return_code"]) == (b"1\n2\n3\n", 7)
            assert run.states[-1]["state"] == "exited"
        finally:
            hoarder.communicate()


# ---------------------------------------------------------------- memory


@pytest.fixture
def little_memory() -> Iterator[Path]:
    """A memory cgroup of 64 MiB, of the kind that this machine has."""
    for base, limit in (
        ("/sys/fs/cgroup", "memory.max"),
        ("/sys/fs/cgroup/memory", "memory.limit_in_bytes"),
    ):
        at = Path(base) / f"corra-{os.getpid()}"
        with contextlib.suppress(OSError):
            at.mkdir()
            if (at / limit).exists():
                (at / limit).write_text(str(64 << 20))
                yield at
                eventually(lambda: not (at / "cgroup.procs").read_text())  # noqa: B023
                at.rmdir()
                return
            at.rmdir()
    pytest.skip("no memory cgroup may be made here")


def test_when_memory_runs_out_the_program_is_killed_and_its_guards_live_to_say_why(
    tmp_path, little_memory, python
):
    enter = ["sh", "-c", f'echo $$ > {little_memory}/cgroup.procs; exec "$@"', "sh"]
    for door in fresh(tmp_path, python=python):
        door.prefix = enter
        state = door.start(
            [sys.executable, "-ISEc", "import os; os.write(1, b'ready'); x = bytearray(200 << 20)"]
        )
        door.prefix = []
        final = door.wait(state["prog_id"])
        assert (final["state"], final["reason"], final["signal"]) == ("exited", "oom", "SIGKILL")
        assert door.file(state["prog_id"]) == b"ready"
        other = door.ready("echo ready; exec sleep 1000")
        scores = [
            int(Path(f"/proc/{pid}/oom_score_adj").read_text())
            for pid in (other["pid"], *guards(other))
        ]
        assert all(scores[0] > each for each in scores[1:])


def test_a_user_whose_pipes_may_hold_hardly_anything_any_more_loses_nothing(open_tmp, theirs):
    """After some 500 runs of one ordinary user, the user's next pipes hold one page or two
    (pipe-user-pages-soft).
    """
    hoard = (
        "import fcntl, os, sys\nkept = []\nfor _ in range(64):\n kept.append(os.pipe())\n"
        " try: fcntl.fcntl(kept[-1][0], 1031, 1 << 20)\n"
        " except OSError: break\nprint(fcntl.fcntl(os.pipe()[0], 1032), flush=True)\n"
        "sys.stdin.read()"
    )
    for door in as_user(open_tmp, theirs):
        door.spool = door.home / "spool"
        pipe = subprocess.PIPE
        hoarder = subprocess.Popen(
            [theirs, "-c", hoard],
            stdin=pipe,
            stdout=pipe,
            env=door.env,
            user=door.user,
            group=door.user,
            extra_groups=[],
        )
        try:
            assert hoarder.stdout
            assert int(hoarder.stdout.readline()) <= 8192
            with door.open("run", door.program(["sh", "-c", "seq 1 100000; exit 7"])) as run:
                run.drain()
            assert run.stdout() == b"".join(b"%d\n" % number for number in range(1, 100001))
            assert run.states[-1]["return_code"] == 7
        finally:
            hoarder.communicate()
