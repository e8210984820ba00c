"""corra's program type for Apsis, in a scheduler with Apsis's ways, which is killed at any moment.

`CORRA_APSIS_RUNS` and `CORRA_APSIS_KILLS` make the storm larger; `CORRA_STORM_SEED` repeats it.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from proxy import wait_for
from sshd import Sshd

ROOT = Path(__file__).resolve().parent.parent
STANDINS = ROOT / "tests" / "helpers" / "standins"
RUNS = int(os.environ.get("CORRA_APSIS_RUNS", "8"))
KILLS = int(os.environ.get("CORRA_APSIS_KILLS", "3"))
SEED = int(os.environ.get("CORRA_STORM_SEED", str(time.time_ns() % 1_000_000)))
FINAL = ("success", "failure", "error")


@pytest.fixture
def apsis(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`corra.apsis`, with the stand-in in the place of Apsis."""
    monkeypatch.syspath_prepend(str(STANDINS))
    yield pytest.importorskip("corra.apsis")
    for name in [each for each in sys.modules if each.split(".")[0] == "apsis"]:
        del sys.modules[name]
    sys.modules.pop("corra.apsis", None)


class Scheduler:
    """The scheduler as a process, and the directory that it keeps."""

    def __init__(self, home: Path) -> None:
        self.home, self.directory = home, home / "scheduler"
        for name in ("jobs", "runs", "outputs"):
            (self.directory / name).mkdir(parents=True)
        self.said: list[str] = []
        self.process: subprocess.Popen[str] | None = None

    def add(self, run_id: str, argv: list[str], *, host: str = "local", **fields: Any) -> None:
        """Add a run of a job of its own, which the next start of the scheduler begins."""
        program = {"type": "corra.apsis.CorraProgram", "host": host, "argv": argv, **fields}
        job = self.directory / "jobs" / f"{run_id}.json"
        job.write_text(json.dumps({"program": program}))
        run = {"job": run_id, "args": {"run": run_id}, "state": "new"}
        self.file(run_id).write_text(json.dumps(run))

    def file(self, run_id: str) -> Path:
        return self.directory / "runs" / f"{run_id}.json"

    def run(self, run_id: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.file(run_id).read_text())
        return found

    def output(self, run_id: str, name: str = "output") -> bytes:
        return (self.directory / "outputs" / f"{run_id}.{name}").read_bytes()

    def start(self, **env: str) -> Scheduler:
        with (self.directory / "said").open("a") as said:
            self.process = subprocess.Popen(
                [sys.executable, str(ROOT / "tests/helpers/apsis_server.py"), str(self.directory)],
                stdin=subprocess.PIPE,
                stdout=said,
                text=True,
                env={**os.environ, "PYTHONPATH": f"{ROOT}:{STANDINS}", **env},
            )
        return self

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            assert self.process.stdin is not None
            self.process.stdin.close()
        self.process = None

    def leave(self) -> None:
        """Have the scheduler shut down."""
        assert self.process is not None
        assert self.process.stdin is not None
        self.process.stdin.close()
        assert self.process.wait(30) == 0
        self.process = None

    def tell(self, line: str) -> None:
        assert self.process is not None
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def until(self, run_id: str, *states: str, deadline_s: float = 60.0) -> dict[str, Any]:
        wait_for(
            lambda: self.run(run_id)["state"] in states,
            deadline_s=deadline_s,
            what=f"{run_id}: {states}",
        )
        return self.run(run_id)

    def said_of(self, run_id: str) -> list[str]:
        lines = (self.directory / "said").read_text().splitlines()
        return [line.partition(" ")[2] for line in lines if line.split(" ")[0] == run_id]


@pytest.fixture
def scheduler(home: Path) -> Iterator[Scheduler]:
    made = Scheduler(home)
    yield made
    made.kill()


def counted(home: Path, script: str) -> list[str]:
    """Return a command that leaves a mark for each of its executions, and then does `script`."""
    return ["sh", "-c", f'echo x >> "{home}/mark-$APSIS_RUN_ID"; {script}']


def executions(home: Path, run_id: str) -> int:
    file = home / f"mark-{run_id}"
    return len(file.read_text().split()) if file.exists() else 0


# -- A job's fields


GOOD: dict[str, Any] = {"host": "db1", "argv": ["true"]}


@pytest.mark.parametrize(
    "fields, word",
    [
        ({"argv": None}, "missing field: argv"),
        ({"host": None}, "missing field: host"),
        ({"host": "a b"}, "field host"),
        ({"argv": "true"}, "field argv"),
        ({"argv": []}, "field argv"),
        ({"argv": ["a", ["b"]]}, "field argv"),
        ({"timeout": "soon"}, "field timeout"),
        ({"grace": True}, "field grace"),
        ({"stop_signal": "STOPIT"}, "field stop_signal"),
        ({"limits": {"memoria": 1}}, "field limits"),
        ({"env": ["A=1"]}, "field env"),
        ({"secrets": ["a b"]}, "field secrets"),
        ({"max_output": "1"}, "field max_output"),
        ({"stderr": "null"}, "field stderr"),
        ({"umask": "9"}, "field umask"),
        ({"timeuot": "2h"}, "unknown field: timeuot"),
    ],
)
def test_a_bad_job_is_refused_when_it_is_loaded_with_the_fields_name(
    apsis: Any, fields: Mapping[str, Any], word: str
) -> None:
    with pytest.raises(ValueError, match=word):
        apsis.CorraProgram.from_jso({**GOOD, **fields})


def test_arguments_expand_everywhere_and_what_they_make_is_checked(apsis: Any) -> None:
    fields = {
        "host": "{{ h }}",
        "argv": ["./x", "{{ a }}"],
        "cwd": "/srv/{{ a }}",
        "env": {"{{ a }}": "{{ t }}", "B": None},
        "timeout": "{{ t }}",
        "limits": {"memory": "{{ m }}"},
        "secrets": ["{{ a }}"],
        "stdin": "{{ a }}",
    }
    job = apsis.CorraProgram.from_jso(fields)
    bound = job.bind({"h": "db1", "a": "A", "t": "2h", "m": "1G"})
    assert bound.to_jso() == {
        "type": "corra.apsis.BoundCorraProgram",
        "host": "db1",
        "argv": ["./x", "A"],
        "cwd": "/srv/A",
        "env": {"A": "2h", "B": None},
        "timeout": "2h",
        "limits": {"memory": "1G"},
        "secrets": ["A"],
        "stdin": "A",
    }
    assert str(job) == "{{ h }}: ./x {{ a }}" and str(bound) == "db1: ./x A"
    with pytest.raises(ValueError, match="field timeout"):
        job.bind({"h": "db1", "a": "A", "t": "soon", "m": "1G"})
    with pytest.raises(NameError):
        job.bind({"h": "db1"})


def test_a_program_is_in_the_database_as_it_was_loaded(apsis: Any) -> None:
    job = apsis.CorraProgram.from_jso({**GOOD, "timeout": "2h", "limits": {"files": 64}})
    for program in (job, job.bind({})):
        stored = json.loads(json.dumps(program.to_jso()))
        kind = stored.pop("type").rpartition(".")[2]
        again = getattr(apsis, kind).from_jso(stored)
        assert again.to_jso() == program.to_jso()


def test_an_id_is_apsiss_own_and_tells_two_apsis_apart(apsis: Any) -> None:
    assert apsis.prog_id_of("r17", {}) == "apsis-r17"
    assert apsis.prog_id_of("r17", {"corra": {"instance": "Prod"}}) == "apsis-prod-r17"
    with pytest.raises(apsis.Misuse, match="instance"):
        apsis.prog_id_of("r17", {"corra": {"instance": "a b"}})


def test_neither_sqlalchemy_nor_rich_is_imported_by_a_whole_run(
    scheduler: Scheduler, home: Path
) -> None:
    scheduler.add("r1", ["true"])
    code = (
        "import asyncio, json, sys\n"
        "from corra.apsis import CorraProgram\n"
        "program = CorraProgram.from_jso({'host': 'local', 'argv': ['true']}).bind({})\n"
        "async def go():\n"
        "    return [type(each).__name__ async for each in program.run('r1', {}).updates]\n"
        "print(asyncio.run(go()))\n"
        "print([each for each in ('rich', 'sqlalchemy') if each in sys.modules])\n"
    )
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{STANDINS}"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
    )
    first, second = done.stdout.splitlines()
    assert first.startswith("['ProgramRunning'") and first.endswith("'ProgramSuccess']")
    assert second == "[]"


# -- The states of a run


def test_a_good_end_a_bad_one_and_none_at_all(scheduler: Scheduler, sshd: Sshd, home: Path) -> None:
    scheduler.add("r1", ["sh", "-c", "echo out; echo err >&2"], host="h")
    scheduler.add("r2", ["sh", "-c", "echo $A; exit 3"], host="h", env={"A": "{{ run }}"})
    scheduler.add("r3", ["/no/such/program"], host="h")
    scheduler.add("r4", ["sleep", "60"], host="h", timeout="0.2s", grace="1s")
    scheduler.add("r5", ["true"], host="local", cwd="/no/such/directory")
    scheduler.add("r6", ["sh", "-c", "echo out; echo err >&2"], host="h", stderr="stderr")
    scheduler.add("r7", ["sh", "-c", 'test "${#S}" = 4'], secrets=["S"])
    scheduler.add("r8", ["true"], secrets=["NOT_THERE"])
    scheduler.start(S="hush")
    ends = {f"r{n}": scheduler.until(f"r{n}", *FINAL) for n in range(1, 9)}
    assert {name: run["state"] for name, run in ends.items()} == {
        "r1": "success",
        "r2": "failure",
        "r3": "error",
        "r4": "failure",
        "r5": "error",
        "r6": "success",
        "r7": "success",
        "r8": "error",
    }
    assert scheduler.output("r1") == b"out\nerr\n"
    assert scheduler.output("r2") == b"r2\n"
    assert "FAILED: exit 3" in ends["r2"]["message"]
    assert "NOT STARTED" in ends["r3"]["message"] and "ENOENT" in ends["r3"]["message"]
    assert "TIMEOUT" in ends["r4"]["message"]
    assert "cwd" in ends["r5"]["message"]
    assert (scheduler.output("r6"), scheduler.output("r6", "stderr")) == (b"out\n", b"err\n")
    assert "NOT_THERE" in ends["r8"]["message"]
    assert "hush" not in json.dumps(ends)
    meta = ends["r1"]["meta"]
    assert meta["attach"] == "corra attach --host h apsis-r1" and meta["return_code"] == 0
    assert meta["elapsed"] >= 0 and meta["rusage"]


def test_a_host_that_cant_be_reached_starts_nothing(
    scheduler: Scheduler, sshd: Sshd, home: Path
) -> None:
    sshd.stop()
    scheduler.add("r1", counted(home, "true"), host="h")
    scheduler.start()
    run = scheduler.until("r1", *FINAL)
    assert run["state"] == "error" and "NOT STARTED" in run["message"]
    assert executions(home, "r1") == 0


def test_output_is_shown_while_it_grows_and_a_signal_arrives(
    scheduler: Scheduler, home: Path
) -> None:
    script = (
        "trap 'echo got it' USR1; echo a; n=0; while [ $n -lt 600 ]; do sleep 0.1; n=$((n+1)); done"
    )
    scheduler.add("r1", ["sh", "-c", script], grace="1s")
    scheduler.start().until("r1", "running")
    wait_for(lambda: "output 2" in scheduler.said_of("r1"), what="the first line")
    scheduler.tell("signal r1 SIGUSR1")
    wait_for(lambda: len(scheduler.said_of("r1")) > 3, what="more output")
    scheduler.tell("stop r1")
    run = scheduler.until("r1", *FINAL)
    assert run["state"] == "failure" and "KILLED: TERM from" in run["message"]
    # The shell also says what its sleep died of.
    assert scheduler.output("r1").endswith(b"got it\n")


def test_the_grace_is_kept_by_the_host(scheduler: Scheduler, home: Path) -> None:
    """So a scheduler that dies in the middle of a stop leaves no program behind."""
    script = f'trap "echo >> {home}/asked" TERM; while :; do sleep 0.05; done'
    scheduler.add("r1", counted(home, script), grace="0.5s")
    scheduler.start().until("r1", "running")
    wait_for(lambda: executions(home, "r1"), what="the program's first word")
    scheduler.tell("stop r1")
    wait_for((home / "asked").exists, what="TERM")
    scheduler.kill()
    wait_for(lambda: state_there("apsis-r1")["state"] == "exited", what="KILL by the host")
    assert state_there("apsis-r1")["signal"] == "SIGKILL"
    scheduler.start()
    assert scheduler.until("r1", *FINAL)["state"] == "error"  # Apsis says so of each such run
    assert executions(home, "r1") == 1


def state_there(prog_id: str) -> Any:
    import corra

    return corra.attach(prog_id, "local").state().to_json()


def test_a_lost_run_is_an_error_with_its_reason(scheduler: Scheduler, home: Path) -> None:
    scheduler.add("r1", ["sh", "-c", "echo begun; exec sleep 600"])
    scheduler.start().until("r1", "running")
    wait_for(lambda: "output 6" in scheduler.said_of("r1"), what="its output")
    state = state_there("apsis-r1")
    for pid in [*state["standby_pids"], state["agent_pid"], state["pid"]]:
        os.kill(pid, 9)
    run = scheduler.until("r1", *FINAL)
    assert run["state"] == "error" and "LOST: all of its guards were killed" in run["message"]
    assert scheduler.output("r1") == b"begun\n"


def test_a_lost_link_is_no_event(scheduler: Scheduler, sshd: Sshd, home: Path) -> None:
    script = f"echo a; until [ -e {home}/go ]; do sleep 0.05; done; echo b"
    scheduler.add("r1", counted(home, script), host="h")
    scheduler.start().until("r1", "running")
    wait_for(lambda: "output 2" in scheduler.said_of("r1"), what="its output")
    sshd.cut()
    (home / "go").touch()
    run = scheduler.until("r1", *FINAL)
    assert run["state"] == "success" and scheduler.output("r1") == b"a\nb\n"
    wait_for(lambda: "success" in scheduler.said_of("r1"), what="the last event")
    assert [each for each in scheduler.said_of("r1") if "output" not in each] == [
        "starting",
        "running",
        "success",
    ]
    assert executions(home, "r1") == 1


def test_a_run_that_this_id_had_long_ago_is_not_taken_for_ours(
    scheduler: Scheduler, home: Path, apsis: Any
) -> None:
    """A new database of Apsis counts its runs from r1 again."""
    scheduler.add("r1", ["true"])
    scheduler.start().until("r1", "success")
    scheduler.kill()
    launched = home / ".local/state/corra/runs/apsis-r1/launched"
    words = launched.read_bytes().split(b" ")
    words[3] = b"%d" % (int(words[3]) - 2 * 86400 * 10**9)
    launched.chmod(0o600)
    launched.write_bytes(b" ".join(words))
    scheduler.add("r1", ["true"])
    scheduler.start()
    run = scheduler.until("r1", *FINAL)
    assert run["state"] == "error" and "instance" in run["message"]


# -- A scheduler that is killed


@pytest.mark.parametrize("moment", ["starting", "running", "finishing", "shut down"])
def test_a_restart_finds_the_run_again(scheduler: Scheduler, home: Path, moment: str) -> None:
    script = f"echo a; until [ -e {home}/go ]; do sleep 0.05; done; echo b; exit 4"
    scheduler.add("r1", counted(home, script))
    scheduler.start()
    if moment == "starting":
        scheduler.until("r1", "starting", "running")
    else:
        scheduler.until("r1", "running")
    if moment == "shut down":
        scheduler.leave()
    else:
        scheduler.kill()
    began = scheduler.run("r1")["state"]
    if moment == "finishing":
        (home / "go").touch()
        wait_for(lambda: state_there("apsis-r1")["state"] == "exited", what="its end")
    scheduler.start()
    (home / "go").touch()
    run = scheduler.until("r1", *FINAL)
    if began == "starting":
        # Apsis asks no program about such a run. What began goes on and can be attached to.
        assert run["state"] == "error" and executions(home, "r1") <= 1
        return
    assert run["state"] == "failure" and "exit 4" in run["message"]
    assert scheduler.output("r1") == b"a\nb\n"
    assert executions(home, "r1") == 1


def test_a_start_that_is_repeated_with_its_id_is_the_same_run(
    scheduler: Scheduler, home: Path
) -> None:
    scheduler.add("r1", counted(home, f"until [ -e {home}/go ]; do sleep 0.05; done; echo b"))
    scheduler.start().until("r1", "running")
    scheduler.kill()
    new = {**scheduler.run("r1"), "state": "new"}
    scheduler.file("r1").write_text(json.dumps(new))
    scheduler.start().until("r1", "running")
    (home / "go").touch()
    assert scheduler.until("r1", *FINAL)["state"] == "success"
    assert scheduler.output("r1") == b"b\n" and executions(home, "r1") == 1


@pytest.mark.storm
def test_runs_survive_a_scheduler_that_is_killed_again_and_again(
    scheduler: Scheduler, home: Path
) -> None:
    print(f"CORRA_STORM_SEED={SEED}")
    chance = random.Random(SEED)
    script = "i=0; while [ $i -lt 40 ]; do echo line $i; i=$((i+1)); sleep 0.1; done; exit $N"
    for n in range(RUNS):
        scheduler.add(f"r{n}", counted(home, script), env={"N": n % 2})
    scheduler.start()
    for n in range(RUNS):
        scheduler.until(f"r{n}", "running", *FINAL)
    for _ in range(KILLS):
        until = time.monotonic() + chance.uniform(0.1, 1.5)
        wait_for(lambda until=until: time.monotonic() > until, what="a moment by chance")
        scheduler.kill()
        scheduler.start()
    wanted = b"".join(b"line %d\n" % n for n in range(40))
    for n in range(RUNS):
        run = scheduler.until(f"r{n}", *FINAL, deadline_s=80)
        assert run["state"] == ("failure" if n % 2 else "success"), run
        assert scheduler.output(f"r{n}") == wanted
        assert executions(home, f"r{n}") == 1


# -- Much output


def test_of_a_long_output_both_ends_are_kept_with_a_line_between(
    scheduler: Scheduler, home: Path
) -> None:
    scheduler.add("r1", ["sh", "-c", "seq 1000000"], max_output="2M")
    scheduler.start()
    assert scheduler.until("r1", *FINAL)["state"] == "success"
    whole = b"".join(b"%d\n" % n for n in range(1, 1000001))
    found = scheduler.output("r1")
    line = (
        f"\n[corra: {len(whole) - (2 << 20):,} bytes are left out here:"
        " corra logs --host local apsis-r1]\n"
    ).encode()
    assert found == whole[: 1 << 20] + line + whole[-(1 << 20) :]


def test_100_mb_of_output_are_bounded_in_memory(scheduler: Scheduler, home: Path) -> None:
    scheduler.add("r1", ["sh", "-c", "head -c 100000000 /dev/zero | tr '\\0' x"])
    scheduler.start()
    run = scheduler.until("r1", *FINAL, deadline_s=80)
    assert run["state"] == "success" and len(scheduler.output("r1")) < (16 << 20) + 200
    assert scheduler.process is not None
    status = Path(f"/proc/{scheduler.process.pid}/status").read_text()
    peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    # 16 MiB are kept, twice as much for a moment, and Apsis has two copies; Python has 40 MB.
    assert peak < 170_000
