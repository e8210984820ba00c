"""The agent as a process: what it starts and how, what it reports, how it ends a run, and how a
client follows one.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import re
import select
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import machine
from agent_door import (
    LATE,
    Door,
    Refused,
    alive,
    children,
    copy_of_the_agent,
    eventually,
    fresh,
    gone,
    guards,
    kill,
    lines_of,
    reap,
)
from corra import agent

SEED_KEYS = {
    "proc_id", "state", "program", "agent_pid", "pid", "exception", "status", "return_code",
    "signal", "rusage", "start_time", "end_time",
}  # fmt: skip
# The program prints a line for each TERM; USR1 ends it. A trap interrupts `wait`.
COUNTS_TERM = (
    'trap "echo term" TERM; trap "kill $!; exit 3" USR1; setsid sleep 1000 & echo ready; while '
    "kill -0 $!; do wait $!; done"
)
IGNORES_TERM = 'trap "" TERM; echo ready; sleep 1000 & wait'


# ---------------------------------------------------------------- by hand


def by_hand(door: Door, request: object, python: str = sys.executable) -> tuple[int, bytes, bytes]:
    done = subprocess.run(
        [python, f"{copy_of_the_agent()}/agent.py"],
        input=json.dumps(request).encode(),
        env=door.env,
        capture_output=True,
        check=False,
        timeout=30,
        cwd="/",
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.sampled
@pytest.mark.parametrize("python", machine.pythons(), ids=machine.name)
def test_by_hand_the_seeds_program_starts_and_its_agents_pid_takes_sigterm_for_it(door, python):
    request = {
        "program": {
            "argv": ["sh", "-c", COUNTS_TERM],
            "cwd": str(door.home),
            "env": {"VAR1": "value1"},
            "stdin": None,
        },
        "callback": {
            "url": "https://agenthost:8050/api/v1/agent/PROG-ID",
            "method": "GET",
            "token": "very-secret-token",
        },
        "config": {
            "retry_frequency": 10,
            "timeout": 86400,
            "output_buffer": 65536,
            "output_latency": 1,
        },
    }
    code, out, err = by_hand(door, request, python)
    assert (code, err) == (0, b"")
    state = json.loads(out)
    assert set(state) >= SEED_KEYS
    assert state["state"] == "running"
    door.spool = door.home / "state" / "corra"
    with door.follow(state["prog_id"]) as follow:
        follow.until_output(b"ready\n")
        kill(state["agent_pid"], number=signal.SIGTERM)
        follow.until_output(b"term\n")
        assert (
            door.call("signal", {"prog_id": state["prog_id"], "signal": "USR1", "by": "a@test"})[
                "how"
            ]
            == "keeper"
        )
        follow.drain()
    final = follow.states[-1]
    assert follow.stdout() == b"ready\nterm\n"
    assert (final["state"], final["reason"], final["return_code"]) == ("exited", "exited", 3)
    assert [each["signal"] for each in final["signals_sent"]] == ["SIGTERM", "SIGUSR1"]
    for path in door.directory(state["prog_id"]).glob("*"):
        assert (
            path.name == "token"
            or not path.is_file()
            or b"very-secret-token" not in path.read_bytes()
        )
    assert (door.directory(state["prog_id"]) / "token").stat().st_mode & 0o777 == 0o600


@pytest.mark.sampled
@pytest.mark.parametrize("python", machine.pythons(), ids=machine.name)
def test_every_python_starts_follows_stops_refuses_and_survives_a_keepers_death(
    tmp_path, gate, python
):
    for door in fresh(tmp_path, python=python, env={"LANG": "C"}):
        words = ["", "--x", "$HOME 'a\"", "two\nlines", "é", os.fsdecode(b"\xff\x80"), "☃"]
        state = door.start(["printf", "%s\\0", *words], env={"LC_ALL": "C"})
        with door.follow(state["prog_id"]) as follow:
            follow.drain()
        assert follow.stdout() == b"".join(os.fsencode(word) + b"\0" for word in words)

        failed = door.start(["/nowhere/at/all"])
        assert (failed["state"], failed["exception"]["errno"], failed["exception"]["stage"]) == (
            "not_started",
            errno.ENOENT,
            "exec",
        )

        state = door.start(["sh", "-c", IGNORES_TERM])
        with door.follow(state["prog_id"]) as follow:
            follow.until_output(b"ready")
            assert door.stop(state["prog_id"], 0.05)["ended"]
            follow.drain()
        assert (follow.states[-1]["signal"], follow.states[-1]["reason"]) == ("SIGKILL", "killed")

        state = door.start(["sh", "-c", 'read a < "$0"; seq 1 20000; exit 5', gate.path])
        kill(state["agent_pid"])
        gate.open()
        final = door.wait(state["prog_id"])
        assert (final["state"], final["return_code"]) == ("exited", 5)
        assert door.file(state["prog_id"]) == b"".join(
            b"%d\n" % number for number in range(1, 20001)
        )


@pytest.mark.parametrize(
    "stdin",
    [
        b"",
        b"hello\n",
        b"12\n{}",
        b"-1\n",
        b"2\n[]",
        b"{",
        b"9" * 40,
        b"3\n{\xff}",
        b"7\n" + b"[" * 7,
        b"[1]",
    ],
)
def test_a_request_that_cant_be_read_exits_with_2_and_says_so(door, stdin):
    code, out, err = door.raw("start", stdin)
    assert (code, err) == (2, b"")
    assert json.loads(out)["error"] == "bad_request"


def test_unknown_keys_are_refused_by_name_and_every_complaint_is_listed(door):
    with pytest.raises(Refused) as refused:
        door.call(
            "start", {"progam": {}, "program": {"argv": "ls", "shell": True}, "run": {"timout": 3}}
        )
    assert refused.value.reply["complaints"] == [
        "unknown key: progam",
        "program.argv must be list or tuple",
        "unknown key: program.shell",
        "unknown key: run.timout",
    ]


@pytest.mark.parametrize(
    "request_, words",
    [
        ({"program": {"argv": []}}, ["argv"]),
        ({"program": {"argv": [""]}}, ["argv"]),
        ({"program": {"argv": ["a\0b"]}}, ["NUL"]),
        ({"program": {"argv": ["a\ud800"]}}, ["half a character"]),
        ({"program": {"argv": ["a"], "env": {"A=B": "c"}}}, ["A=B"]),
        ({"program": {"argv": ["a"], "env": {"A": "\0"}}}, ["A"]),
        ({"program": {"argv": ["a"], "env": {"A": 1}}}, ["A"]),
        ({"program": {"argv": ["a"], "cwd": "a\0"}}, ["cwd", "NUL"]),
        ({"program": {"argv": ["a"], "umask": 0o1000}}, ["umask"]),
        ({"program": {"argv": ["a"], "umask": 1.5}}, ["umask"]),
        ({"program": {"argv": ["a"], "stdin": {"bytes": -1}}}, ["stdin"]),
        ({"program": {"argv": ["a"], "env_inherit": [1]}}, ["env_inherit"]),
        ({"program": {"argv": ["a"]}, "run": {"timeout": 1e300}}, ["timeout"]),
        ({"program": {"argv": ["a"]}, "run": {"timeout": float("inf")}}, ["timeout"]),
        ({"program": {"argv": ["a"]}, "run": {"grace": float("nan")}}, ["grace"]),
        ({"program": {"argv": ["a"]}, "run": {"grace": -1}}, ["grace"]),
        ({"program": {"argv": ["a"]}, "run": {"stop_signal": "NOPE"}}, ["NOPE"]),
        ({"program": {"argv": ["a"]}, "prog_id": "../x"}, ["prog_id"]),
        ({"program": {"argv": ["a"]}, "secrets": {"env": {"": "x"}}}, ["secrets.env"]),
        ({}, ["no program"]),
        (
            {"program": {"argv": ["", "b\0"], "cwd": "\0"}, "run": {"timeout": -1}},
            ["cwd", "timeout"],
        ),
    ],
)
def test_what_the_kernel_would_not_take_is_refused_before_anything_is_made(door, request_, words):
    with pytest.raises(Refused) as refused:
        door.call("start", request_)
    assert refused.value.kind == "bad_request"
    assert all(
        any(word in complaint for complaint in refused.value.reply["complaints"]) for word in words
    )
    assert not door.spool.exists()


def test_null_is_as_good_as_left_out(door):
    keys = ("prog_id", "name", "origin", "run", "secrets", "callback", "config", "nonce")
    program = {
        "argv": ["sh", "-c", 'test -n "$XDG_STATE_HOME"'],
        **dict.fromkeys(("cwd", "env", "env_inherit", "stdin", "umask", "merge", "pty", "limits")),
    }
    state = door.call("start", {**dict.fromkeys(keys), "program": program})
    assert agent.valid_id(state["prog_id"])
    assert door.wait(state["prog_id"])["return_code"] == 0


def test_a_verb_that_isnt_and_a_run_that_isnt_are_refused(door):
    for verb, request, kind in [
        ("dance", {}, "bad_request"),
        ("status", {"prog_id": "nobody"}, "not_found"),
        ("follow", {}, "not_found"),
    ]:
        with pytest.raises(Refused) as refused:
            door.call(verb, request)
        assert refused.value.kind == kind


# ---------------------------------------------------------------- started at most once


@machine.DEAR
def test_twenty_starts_of_one_id_at_once_execute_it_once(door):
    mark = door.base / "mark"
    request = door.encode(
        door.program(
            ["sh", "-c", 'echo "$$" >> "$0"; read a', str(mark)], prog_id="once", stdin=None
        )
    )
    starters = [door.popen("start") for _ in range(20)]
    for each in starters:
        each.stdin.write(request)
        each.stdin.close()
        each.stdin = None
    states = [json.loads(each.communicate(timeout=60)[0]) for each in starters]
    final = door.wait("once")
    assert lines_of(mark) == [str(final["pid"])]
    assert {(each["pid"], each["pid_start"]) for each in states} == {
        (final["pid"], final["pid_start"])
    }


def test_the_same_id_with_another_program_is_a_conflict_and_starts_nothing(door):
    door.start(["true"], prog_id="mine")
    with pytest.raises(Refused) as refused:
        door.start(["touch", str(door.base / "mark")], prog_id="mine")
    assert refused.value.kind == "conflict"
    assert refused.value.reply["there"]["argv"] == ["true"]
    assert door.wait("mine")["state"] == "exited"
    assert not (door.base / "mark").exists()


@pytest.mark.storm
def test_a_starter_killed_at_any_moment_and_repeated_executes_once(door):
    seed = random.randrange(1 << 32)
    print("seed", seed)
    chance = random.Random(seed)
    for number in range(15):
        name, mark = f"run{number}", door.base / f"mark{number}"
        request = door.program(
            ["sh", "-c", 'echo x >> "$0"; echo out; exit 4', str(mark)], prog_id=name
        )
        starter = door.popen("start")
        starter.stdin.write(door.encode(request))
        select.select([starter.stdout], [], [], chance.uniform(0.02, 0.15))
        starter.kill()
        starter.communicate()
        assert door.call("start", request)["state"] in {"running", "exited"}
        final = door.wait(name)
        assert (final["state"], final["return_code"], lines_of(mark), door.file(name)) == (
            "exited",
            4,
            ["x"],
            b"out\n",
        ), (seed, number)
    assert sorted(os.listdir(door.spool / "runs")) == sorted(
        [f"run{number}" for number in range(15)]
        + [name for name in os.listdir(door.spool / "runs") if name.startswith(".new-")]
    )


def test_a_start_repeated_after_a_failed_exec_tells_the_same_and_tries_no_more(door):
    first = door.start(["./late"], prog_id="late", cwd=str(door.base))
    shutil.copy("/bin/true", door.base / "late")
    again = door.start(["./late"], prog_id="late", cwd=str(door.base))
    assert (first["state"], again["state"], again["exception"]) == (
        "not_started",
        "not_started",
        first["exception"],
    )


# ---------------------------------------------------------------- what the program is given


def environment_of(door: Door, request: dict[str, object]) -> dict[bytes, bytes]:
    state = door.call("start", request)
    door.wait(state["prog_id"])
    pairs = (each.partition(b"=") for each in door.file(state["prog_id"]).split(b"\0") if each)
    return {name: value for name, _, value in pairs}


@machine.EVERYWHERE
def test_the_environment_is_inherited_set_removed_and_stripped_as_asked(tmp_path, python):
    given = {
        "KEEP": "k",
        "DROP": "d",
        "CORRA_HOST": "x",
        "LANG": None,
        "BYTES": os.fsdecode(b"\xff\n="),
    }
    for door in fresh(tmp_path, python=python, env=given):
        base = {
            key.encode(): os.fsencode(value)
            for key, value in door.env.items()
            if not key.startswith("CORRA_")
        }
        added = {"NEW": "two\nlines", "ODD": os.fsdecode(b"\xfe="), "DROP": None, "EMPTY": ""}
        program = door.program(["env", "-0"], prog_id="all", env=added)
        expected = {
            **base,
            b"NEW": b"two\nlines",
            b"ODD": b"\xfe=",
            b"EMPTY": b"",
            b"CORRA_PROG_ID": b"all",
        }
        del expected[b"DROP"]
        assert environment_of(door, program) == expected
        nothing = door.program(
            ["/usr/bin/env", "-0"], prog_id="none", env={"A": "1"}, env_inherit=False
        )
        assert environment_of(door, nothing) == {b"A": b"1", b"CORRA_PROG_ID": b"none"}
        some = door.program(
            ["env", "-0"], prog_id="some", env_inherit=["KEEP", "PATH", "CORRA_HOST", "ABSENT"]
        )
        assert environment_of(door, some) == {
            b"KEEP": b"k",
            b"PATH": base[b"PATH"],
            b"CORRA_PROG_ID": b"some",
        }


@machine.EVERYWHERE
def test_secrets_are_in_the_programs_environment_and_nowhere_else(door):
    request = door.program(
        ["sh", "-c", 'test "${#S}" = 11 && echo yes; exec sleep 1000'], prog_id="s"
    )
    state = door.call(
        "start", {**request, "secrets": {"env": {"S": "very-secret"}, "token": "very-secret"}}
    )
    with door.follow("s") as follow:
        follow.until_output(b"yes\n")
    for path in door.spool.rglob("*"):
        assert not path.is_file() or b"very-secret" not in path.read_bytes(), path
    assert "very-secret" not in json.dumps([state, door.status("s")])
    for pid in guards(state):
        for name in ("environ", "cmdline"):
            assert b"very-secret" not in Path(f"/proc/{pid}/{name}").read_bytes()
    assert b"S=very-secret" in Path(f"/proc/{state['pid']}/environ").read_bytes()
    # Another secret is no conflict: the host doesn't keep the first one.
    assert (
        door.call("start", {**request, "secrets": {"env": {"S": "other"}}})["pid"] == state["pid"]
    )


@machine.EVERYWHERE
def test_the_program_has_a_session_of_its_own_default_signals_no_mask_and_three_descriptors(
    tmp_path, python
):
    ignoring = ["sh", "-c", 'trap "" HUP INT QUIT PIPE USR1 TERM CHLD; exec 7< /; exec "$@"', "sh"]
    blocking = [
        sys.executable,
        "-ISEc",
        (
            "import os, signal, sys; signal.pthread_sigmask(0, signal.valid_signals()); "
            "os.execv(sys.argv[1], sys.argv[1:])"
        ),
    ]
    for door in fresh(tmp_path, python=python, prefix=ignoring + blocking):
        state = door.start(["cat", "/proc/self/status"], umask=0o027)
        door.wait(state["prog_id"])
        facts = dict(
            line.split(":\t", 1)
            for line in door.file(state["prog_id"]).decode().splitlines()
            if ":\t" in line
        )
        assert [facts[key] for key in ("SigBlk", "SigIgn", "SigCgt")] == ["0" * 16] * 3
        assert facts["Umask"] == "0027"
        assert facts["NSsid"] == facts["NSpgid"] == facts["Pid"] == str(state["pid"])
        state = door.start(["ls", "/proc/self/fd"])
        door.wait(state["prog_id"])
        assert door.file(state["prog_id"]).split() == [
            b"0",
            b"1",
            b"2",
            b"3",
        ]  # 3 is the directory that ls reads


def test_stdin_is_nothing_a_text_or_the_bytes_that_were_sent(door):
    assert door.wait(door.start(["cat"], prog_id="none")["prog_id"])["return_code"] == 0
    door.wait(door.start(["cat"], prog_id="text", stdin="é\n")["prog_id"])
    data = bytes(range(256)) * 4096
    request = {**door.program(["cat"], prog_id="bytes", stdin={"bytes": len(data)}), "nonce": "n1"}
    code, out, _ = door.raw("start", door.encode(request, data))
    assert code == 0 and out.splitlines()[:2] == [b"corra 1 n1 send", b"corra 1 n1"]
    door.wait("bytes")
    assert [door.file(name) for name in ("none", "text", "bytes")] == [b"", "é\n".encode(), data]
    again = door.raw("start", door.encode(request))  # the agent asks for the bytes only once
    assert again[0] == 0 and again[1].splitlines()[0] == b"corra 1 n1"


def test_stdin_that_ends_too_early_starts_nothing(door):
    request = door.program(["touch", str(door.base / "mark")], prog_id="short", stdin={"bytes": 10})
    code, out, _ = door.raw("start", door.encode(request, b"12345"))
    assert code == 1 and json.loads(out.splitlines()[-1])["error"] == "bad_request"
    assert os.listdir(door.spool / "runs") == []


def test_stdin_that_isnt_as_announced_starts_nothing_and_other_bytes_of_an_id_are_a_conflict(
    door,
):
    def request(announced: bytes) -> dict[str, Any]:
        source = {"bytes": 5, "sha256": hashlib.sha256(announced).hexdigest()}
        made: dict[str, Any] = door.program(
            ["touch", str(door.base / "mark")], prog_id="same", stdin=source
        )
        return made

    code, out, _ = door.raw("start", door.encode(request(b"12345"), b"54321"))
    assert code == 1 and "not those announced" in json.loads(out.splitlines()[-1])["message"]
    assert os.listdir(door.spool / "runs") == [] and not (door.base / "mark").exists()
    assert door.raw("start", door.encode(request(b"12345"), b"12345"))[0] == 0
    with pytest.raises(Refused) as refused:
        door.call("start", request(b"54321"))
    assert refused.value.kind == "conflict"


@machine.EVERYWHERE
def test_merged_output_is_one_stream_in_the_order_it_was_written(door):
    lines = "for i in $(seq 1 500); do echo out $i; echo err $i >&2; done"
    state = door.start(["sh", "-c", lines], merge=True)
    with door.follow(state["prog_id"]) as follow:
        follow.drain()
    assert follow.out == {
        "output": b"".join(b"out %d\nerr %d\n" % (number, number) for number in range(1, 501))
    }


@machine.EVERYWHERE
def test_reopening_stderr_by_name_wipes_nothing(door):
    state = door.start(
        ["sh", "-c", "echo a >&2; echo b > /dev/stderr; echo c > /dev/stderr; echo d >&2"]
    )
    door.wait(state["prog_id"])
    assert door.file(state["prog_id"], "stderr") == b"a\nb\nc\nd\n"


# ---------------------------------------------------------------- what can't be started


def failures(at: Path) -> dict[str, tuple[dict[str, object], int, str, str]]:
    """Return {name: (program, errno, stage, a word of the message)}."""

    def script(name: str, text: str, mode: int = 0o755) -> str:
        (at / name).write_bytes(text.encode())
        (at / name).chmod(mode)
        return str(at / name)

    (at / "loop").symlink_to(at / "loop")
    return {
        "not in PATH": ({"argv": ["no-such-program"]}, errno.ENOENT, "exec", "No such file"),
        "not there": ({"argv": [str(at / "absent")]}, errno.ENOENT, "exec", "No such file"),
        "not executable": (
            {"argv": [script("plain", "echo", 0o644)]},
            errno.EACCES,
            "exec",
            "Permission denied",
        ),
        "a directory": ({"argv": [str(at)]}, errno.EACCES, "exec", "is a directory"),
        "no #!": (
            {"argv": [script("bare", "echo hello\n")]},
            errno.ENOEXEC,
            "exec",
            "run it as  sh FILE",
        ),
        "no interpreter": (
            {"argv": [script("odd", "#!/no/such/thing\n")]},
            errno.ENOENT,
            "exec",
            "/no/such/thing",
        ),
        "CR LF": (
            {"argv": [script("crlf", "#!/bin/sh\r\necho\r\n")]},
            errno.ENOENT,
            "exec",
            "CR LF",
        ),
        "too much in all": (
            {"argv": ["echo", *(["x" * 100_000] * 70)]},
            errno.E2BIG,
            "exec",
            "all words and the environment 70",
        ),
        "too long a word": ({"argv": ["echo", "x" * 131072]}, errno.E2BIG, "exec", "131071"),
        "a loop of links": ({"argv": [str(at / "loop")]}, errno.ELOOP, "exec", "symbolic links"),
        "cwd missing": (
            {"argv": ["true"], "cwd": str(at / "no")},
            errno.ENOENT,
            "cwd",
            str(at / "no"),
        ),
        "cwd no directory": (
            {"argv": ["true"], "cwd": str(at / "plain")},
            errno.ENOTDIR,
            "cwd",
            str(at / "plain"),
        ),
        "cwd relative": (
            {"argv": ["true"], "cwd": "below/home"},
            errno.ENOENT,
            "cwd",
            "home/below/home",
        ),
    }


FAILURES = (
    "not in PATH|not there|not executable|a directory|no #!|no interpreter|CR LF|too much in "
    "all|too long a word|a loop of links|"
    "cwd missing|cwd no directory|cwd relative"
)


@pytest.mark.sampled
@machine.EVERYWHERE
@pytest.mark.parametrize("name", FAILURES.split("|"))
def test_a_program_that_cant_be_started_says_why_before_start_answers(door, name):
    program, number, stage, word = failures(door.base)[name]
    state = door.call("start", {"program": program})
    assert (state["state"], state["reason"]) == (
        "not_started",
        "exec" if stage == "exec" else "setup",
    )
    exception = state["exception"]
    assert (exception["errno"], exception["stage"], exception["type"]) == (
        number,
        stage,
        errno.errorcode[number],
    )
    assert word in exception["message"]
    assert exception["path"] == (door.env["PATH"] if name == "not in PATH" else None)
    with door.follow(state["prog_id"]) as follow:
        follow.drain()
    assert follow.states[-1]["state"] == "not_started" and follow.states[-1]["return_code"] is None
    assert json.loads(door.file(state["prog_id"], "state.json"))["state"] == "not_started"


@machine.EVERYWHERE
def test_a_file_that_is_being_written_is_not_executed(door):
    busy = door.base / "busy"
    shutil.copy("/bin/true", busy)
    with busy.open("ab"):
        try:
            subprocess.run([str(busy)], check=True)
            pytest.skip("this kernel executes files that are open for writing")
        except OSError:
            state = door.start([str(busy)])
    assert state["exception"]["errno"] == errno.ETXTBSY


@machine.EVERYWHERE
def test_a_program_with_as_many_words_as_the_kernel_takes_is_started_and_its_state_can_be_read(
    door,
):
    state = door.start(["printf", "%.0s", *(["é" * 30_000] * 15)])
    with door.follow(state["prog_id"]) as follow:
        follow.drain()
    assert (follow.states[-1]["state"], follow.states[-1]["return_code"]) == ("exited", 0)
    assert door.call("list", {})["runs"][0]["prog_id"] == state["prog_id"]


@machine.EVERYWHERE
def test_a_limit_on_the_size_of_files_holds_the_program_back_and_kills_no_guard(door):
    door.prefix = ["sh", "-c", 'ulimit -f 200; exec "$@"', "sh"]
    state = door.start(["seq", "1", "400000"])
    blocked = eventually(lambda: door.status(state["prog_id"])["blocked"])
    assert blocked["errno"] == errno.EFBIG
    assert door.stop(state["prog_id"], 5)["ended"]


@machine.EVERYWHERE
def test_a_lookup_goes_on_past_what_may_not_be_run(door):
    for name, mode in (("a", 0o644), ("b", 0o755)):
        (door.base / name).mkdir()
        (door.base / name / "tool").write_text("#!/bin/sh\necho found\n")
        (door.base / name / "tool").chmod(mode)
    state = door.start(["tool"], env={"PATH": f"/none:{door.base}/a:{door.base}/b"})
    door.wait(state["prog_id"])
    assert door.file(state["prog_id"]) == b"found\n"
    state = door.start(["tool"], env={"PATH": f"/none:{door.base}/a:/none"})
    assert state["exception"]["errno"] == errno.EACCES


# ---------------------------------------------------------------- kill


@machine.EVERYWHERE
def test_term_then_kill_after_the_grace_and_the_record_says_what_when_and_by_whom(door):
    state = door.ready(IGNORES_TERM)
    over = door.stop(state["prog_id"], 0.1)
    assert (
        over["ended"]
        and over["survivors"] == []
        and over["first"]["how"] == "keeper"
        and over["first"]["processes"] == 2
    )
    final = over["state"]
    assert (final["state"], final["reason"], final["signal"], final["return_code"]) == (
        "exited",
        "killed",
        "SIGKILL",
        None,
    )
    assert [(each["signal"], each["to"], each["by"]) for each in final["signals_sent"]] == [
        ("SIGTERM", "group", "a@test"),
        ("SIGKILL", "tree", "corra, after the grace"),
    ]


@machine.EVERYWHERE
def test_a_program_that_obeys_term_ends_at_once_whatever_the_grace(door):
    state = door.ready("echo ready; exec sleep 1000")
    final = door.stop(state["prog_id"], 1000)["state"]
    assert (final["signal"], final["reason"]) == ("SIGTERM", "killed")


@machine.EVERYWHERE
def test_grace_0_kills_the_tree_now(door):
    state = door.ready(COUNTS_TERM)
    final = door.stop(state["prog_id"], 0)["state"]
    assert final["signal"] == "SIGKILL" and door.file(state["prog_id"]) == b"ready\n"
    assert [each["signal"] for each in final["signals_sent"]] == ["SIGKILL"]


FAMILY = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
def child(work):
    if os.fork() == 0:
        os.setsid()
        work()
        while True: signal.pause()
def daemon():
    child(lambda: None)
    for fd in range(3): os.close(fd)
def respawner():
    def again(*_):
        try:
            while os.waitpid(-1, os.WNOHANG)[0]: child(lambda: None)
        except ChildProcessError: pass
    signal.signal(signal.SIGCHLD, again)
    for _ in range(20): child(lambda: None)
child(daemon)
child(respawner)
child(respawner)
print("ready", flush=True)
while True: signal.pause()
"""


@machine.EVERYWHERE
def test_daemonised_grandchildren_other_sessions_and_a_respawner_are_all_cleaned(door):
    state = door.start([sys.executable, "-ISEc", FAMILY])
    outer = guards(state)[0]
    eventually(lambda: len(agent.process_tree([state["agent_pid"]])) == 45, "the whole family")
    family = set(agent.process_tree([state["agent_pid"]]))
    over = door.stop(state["prog_id"], 0.05)
    assert over["ended"] and over["survivors"] == []
    assert not any(alive(pid) for pid in family)
    gone(outer)


@machine.EVERYWHERE
def test_a_program_that_is_stopped_gets_its_term(door):
    state = door.ready("echo ready; kill -STOP $$; exec sleep 1000")
    eventually(lambda: agent.process(state["pid"])[0] == "T")
    final = door.stop(state["prog_id"], 1000)["state"]
    assert (final["signal"], final["reason"]) == ("SIGTERM", "killed")


@machine.EVERYWHERE
def test_the_programs_orphans_are_reaped_by_its_keeper_and_by_the_next_one(door, gate):
    state = door.ready(
        'for i in $(seq 1 50); do (read a < "$0" &) ; done; echo ready; exec sleep 1000', gate.path
    )
    first, second, third = guards(state)

    def zombies() -> int:
        found = [agent.process(int(entry)) for entry in os.listdir("/proc") if entry.isdigit()]
        return sum(
            each is not None and each[0] == "Z" and each[1] in {first, second, third}
            for each in found
        )

    gate.open(25)
    eventually(lambda: len(agent.process_tree([third])) == 26)
    kill(third)
    eventually(lambda: door.status(state["prog_id"])["agent_pid"] == second)
    gate.open(25)
    eventually(lambda: len(agent.process_tree([second])) == 1 and not zombies())
    door.stop(state["prog_id"], 0)


@machine.EVERYWHERE
def test_signal_reaches_the_program_and_escalates_nothing(door):
    state = door.ready(COUNTS_TERM)
    with door.follow(state["prog_id"]) as follow:
        assert (
            door.call("signal", {"prog_id": state["prog_id"], "signal": "SIGTERM", "by": "x y"})[
                "how"
            ]
            == "keeper"
        )
        follow.until_output(b"term")
    now = door.status(state["prog_id"])
    assert now["state"] == "running" and now["signals_sent"][0]["by"] == "x_y"
    assert door.call("signal", {"prog_id": state["prog_id"], "signal": "9"})["how"] == "keeper"
    final = door.wait(state["prog_id"])
    assert (final["reason"], final["signal"]) == ("killed", "SIGKILL")
    assert door.call("signal", {"prog_id": state["prog_id"], "signal": "TERM"})["how"] == "ended"
    with pytest.raises(Refused, match="no such signal"):
        door.call("signal", {"prog_id": state["prog_id"], "signal": "NOPE"})


@machine.EVERYWHERE
def test_a_signal_from_elsewhere_is_told_apart_from_corras_own(door):
    state = door.ready("echo ready; exec sleep 1000")
    kill(state["pid"], number=signal.SIGTERM)
    final = door.wait(state["prog_id"])
    assert (final["reason"], final["signal"], final["status"]) == ("signaled", "SIGTERM", 15)


@machine.EVERYWHERE
def test_stopping_an_ended_run_ends_its_stragglers_and_leaves_its_status(door):
    state = door.start(["sh", "-c", "sleep 1000 & exit 6"])
    assert door.wait(state["prog_id"])["return_code"] == 6
    over = door.stop(state["prog_id"], 5)
    assert over["ended"] and over["first"]["processes"] == 1
    assert (over["state"]["return_code"], over["state"]["reason"]) == (6, "exited")
    assert door.stop(state["prog_id"], 5)["first"]["how"] == "ended"


@pytest.mark.storm
@machine.DEAR
def test_a_kill_raced_with_the_exit_hits_nobody_else(door):
    bystander = subprocess.Popen(["sleep", "1000"], start_new_session=True)
    try:
        for number in range(12):
            state = door.start(["sh", "-c", "read a < /dev/null; exit 0"], prog_id=f"r{number}")
            over = door.stop(state["prog_id"], 0)
            final = door.wait(state["prog_id"])
            assert (
                over["ended"]
                and final["state"] == "exited"
                and final["signal"] in {None, "SIGKILL"}
            )
            assert (final["signal"] == "SIGKILL") <= (final["reason"] == "killed")
            assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


@machine.EVERYWHERE
def test_a_timeout_is_kept_on_the_host_without_any_client(door):
    state = door.start(
        ["sh", "-c", 'trap "exit 0" TERM; echo ready; sleep 1000 & wait'],
        run={"timeout": 0.3, "grace": 5},
    )
    eventually(lambda: door.record(state["prog_id"]).outcome, "its end")
    final = door.wait(state["prog_id"])
    assert (final["reason"], final["return_code"], final["signals_sent"][0]["by"]) == (
        "timeout",
        0,
        "its own timeout",
    )
    assert 0.3 <= final["elapsed"] < 3


@machine.EVERYWHERE
def test_a_timeout_uses_the_stop_signal_and_kills_after_the_grace(door):
    script = 'trap "echo int" INT; trap "" TERM; sleep 1000 & while kill -0 $!; do wait $!; done'
    state = door.start(
        ["sh", "-c", script], run={"timeout": 0.3, "grace": 0.2, "stop_signal": "INT"}
    )
    final = door.wait(state["prog_id"])
    assert (final["reason"], final["signal"]) == ("timeout", "SIGKILL")
    assert door.file(state["prog_id"]) == b"int\n"


@machine.EVERYWHERE
def test_a_stop_without_a_signal_of_its_own_uses_the_runs_and_says_which(door):
    script = 'trap "echo int; exit 3" INT; trap "" TERM; echo ready; while :; do sleep 0.1; done'
    state = door.ready(script, run={"grace": 20, "stop_signal": "INT"})
    stopped = door.stop(state["prog_id"])
    assert (stopped["first"]["signal"], stopped["first"]["grace"]) == ("INT", 20)
    assert stopped["state"]["return_code"] == 3


# ---------------------------------------------------------------- stragglers


@machine.EVERYWHERE
def test_a_run_ends_with_its_program_and_what_outlives_it_is_a_straggler_whose_output_is_late(
    door, gate
):
    state = door.start(["sh", "-c", 'echo first; (read a < "$0"; echo late) & exit 0', gate.path])
    final = door.wait(state["prog_id"])
    assert final["return_code"] == 0 and final["streams"]["stdout"] == {
        "length": 6,
        "dropped": 0,
        "late": 0,
    }
    stragglers = door.status(state["prog_id"])["stragglers"]
    assert [each["name"] for each in stragglers] == ["sh"]
    gate.open()
    gone(state["agent_pid"])
    assert door.status(state["prog_id"])["streams"]["stdout"] == {
        "length": 6,
        "dropped": 0,
        "late": 5,
    }
    with door.follow(state["prog_id"]) as follow:
        follow.drain()
    with door.follow(state["prog_id"], late=True) as late:
        late.drain()
    assert (follow.stdout(), late.stdout()) == (b"first\n", b"first\nlate\n")


@machine.EVERYWHERE
def test_wait_children_ends_with_the_last_descendant_and_the_programs_status(door, gate):
    script = '(read a < "$0"; echo last) & exit 4'
    state = door.start(["sh", "-c", script, gate.path], run={"wait_children": True})
    eventually(lambda: door.record(state["prog_id"]).outcome, "the program's end")
    assert door.status(state["prog_id"])["state"] == "running"
    gate.open()
    final = door.wait(state["prog_id"])
    assert (final["return_code"], final["streams"]["stdout"]) == (
        4,
        {"length": 5, "dropped": 0, "late": 0},
    )


@machine.EVERYWHERE
def test_the_timeout_holds_for_children_that_are_waited_for(door):
    state = door.start(
        ["sh", "-c", "sleep 1000 & exit 4"], run={"wait_children": True, "timeout": 0.3, "grace": 5}
    )
    final = door.wait(state["prog_id"])
    assert (final["state"], final["reason"], final["return_code"]) == ("exited", "timeout", 4)


@machine.EVERYWHERE
def test_a_second_gentler_stop_doesnt_take_back_the_first(door):
    state = door.ready(IGNORES_TERM)
    with door.open("stop", {"prog_id": state["prog_id"], "grace": 0.3, "by": "first"}) as first:
        second = door.stop(state["prog_id"], 1000, by="second")
        first.drain()
    assert second["ended"] and first.states[-1]["ended"]
    assert [each["by"] for each in second["state"]["signals_sent"]] == [
        "first",
        "second",
        "corra, after the grace",
    ]


def cpu_ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


@machine.EVERYWHERE
def test_a_program_that_closes_its_outputs_costs_no_busy_loop(door):
    marker = door.base / "closed"
    state = door.start(["sh", "-c", 'exec <&- >&- 2>&-; : > "$0"; exec sleep 0.4', str(marker)])
    eventually(marker.exists)
    before = sum(map(cpu_ticks, guards(state)))
    handle = os.pidfd_open(state["pid"])
    spent = []
    while not select.select([handle], [], [], 0.1)[0]:
        spent.append(sum(map(cpu_ticks, guards(state))) - before)
    os.close(handle)
    assert door.wait(state["prog_id"])["return_code"] == 0
    assert spent and spent[-1] <= 2


@machine.EVERYWHERE
def test_guards_leave_a_daemonised_child_that_has_closed_its_outputs(door, gate):
    script = 'setsid -f sh -c "exec sleep 1000 >&- 2>&-"; echo ready; read a < "$0"'
    state = door.ready(script, gate.path)
    gate.open()
    assert door.wait(state["prog_id"])["return_code"] == 0
    gone(*guards(state))
    assert (
        len(
            eventually(
                lambda: [pid for pid in children() if (agent.process(pid) or "????")[3] == "sleep"]
            )
        )
        == 1
    )


# ---------------------------------------------------------------- follow

NUMBERS = b"".join(b"%d\n" % number for number in range(1, 40001))


def test_a_follow_from_any_cursor_has_exactly_the_rest(door):
    state = door.start(["sh", "-c", "seq 1 40000; seq 1 3 >&2"])
    door.wait(state["prog_id"])
    for offset in (0, 1, 65535, 65536, 65537, len(NUMBERS) - 1, len(NUMBERS)):
        with door.follow(state["prog_id"], cursor={"stdout": offset}, streams=["stdout"]) as follow:
            follow.drain()
        assert follow.stdout() == NUMBERS[offset:] and set(follow.out) <= {"stdout"}


@pytest.mark.storm
def test_a_live_follow_cut_again_and_again_and_resumed_has_every_byte_once(door):
    got = bytearray()
    seed = random.randrange(1 << 32)
    print("seed", seed)
    chance = random.Random(seed)
    state = door.start(["seq", "1", "3000000"])
    while True:
        enough = chance.randrange(1 << 22)
        with door.follow(state["prog_id"], cursor={"stdout": len(got)}) as follow:
            try:
                follow.until(lambda each: len(each.stdout()) > enough)  # noqa: B023
            except EOFError:
                break
            finally:
                got += follow.stdout()
    assert bytes(got) == b"".join(b"%d\n" % number for number in range(1, 3000001))


def test_a_tail_counts_lines_over_both_streams_in_the_order_they_came(door, gate):
    script = (
        'echo o1; echo o2; read a < "$0"; echo e1 >&2; read a < "$0"; echo o3; read a < "$0"; '
        'echo e2 >&2; read a < "$0"; printf o4'
    )
    state = door.start(["sh", "-c", script, gate.path])
    with door.follow(state["prog_id"]) as follow:
        for stream, part in (
            ("stdout", b"o2"),
            ("stderr", b"e1"),
            ("stdout", b"o3"),
            ("stderr", b"e2"),
        ):
            follow.until_output(part, stream)
            gate.open()
        follow.drain()
    expected = {
        0: (b"", b""),
        1: (b"o4", b""),
        2: (b"o4", b"e2\n"),
        3: (b"o3\no4", b"e2\n"),
        4: (b"o3\no4", b"e1\ne2\n"),
    }
    whole = (b"o1\no2\no3\no4", b"e1\ne2\n")
    for lines, parts in {**expected, 5: (b"o2\no3\no4", b"e1\ne2\n"), 6: whole, 100: whole}.items():
        with door.follow(state["prog_id"], tail=lines, live=False) as follow:
            # The agent sends the offset of the first byte before that byte.
            begins = follow.reply["cursor"]
            follow.drain()
        assert (follow.stdout(), bytes(follow.out.get("stderr", b""))) == parts, lines
        assert begins == {
            "stdout": len(whole[0]) - len(parts[0]),
            "stderr": len(whole[1]) - len(parts[1]),
        }


def test_with_times_each_arrival_has_its_own_frame_and_the_streams_are_in_order(door, gate):
    state = door.start(
        ["sh", "-c", 'echo a; read a < "$0"; echo b >&2; read a < "$0"; echo c', gate.path]
    )
    with door.follow(state["prog_id"]) as live:
        live.until_output(b"a\n")
        gate.open()
        live.until_output(b"b\n", "stderr")
        gate.open()
        live.drain()
    with door.follow(state["prog_id"], times=True) as follow:
        follow.drain()
    pieces = [
        (frame.stream, frame.data, frame.time_ns)
        for frame in follow.frames
        if hasattr(frame, "data")
    ]
    assert [piece[:2] for piece in pieces] == [
        ("stdout", b"a\n"),
        ("stderr", b"b\n"),
        ("stdout", b"c\n"),
    ]
    times = [piece[2] for piece in pieces]
    assert times == sorted(times) and len(set(times)) == 3


def test_a_follow_that_isnt_live_leaves_with_what_is_there(door):
    state = door.ready("echo ready; exec sleep 1000")
    with door.follow(state["prog_id"], live=False) as follow:
        follow.drain(5)
    assert follow.stdout() == b"ready\n" and follow.states[-1]["state"] == "running"


@machine.EVERYWHERE
def test_many_watchers_see_the_same_and_a_stopped_one_slows_nobody(door):
    state = door.start(["sh", "-c", "read a; seq 1 1000000; seq 1 10 >&2", "x"], stdin="go\n")
    watchers = [door.follow(state["prog_id"]) for _ in range(5)]
    watchers[0].process.send_signal(signal.SIGSTOP)
    final = door.wait(state["prog_id"])
    assert final["state"] == "exited"
    for each in watchers[1:]:
        each.drain()
    watchers[0].process.send_signal(signal.SIGCONT)
    watchers[0].drain()
    assert len({(each.stdout(), bytes(each.out["stderr"])) for each in watchers}) == 1
    assert watchers[0].stdout() == door.file(state["prog_id"])
    for each in watchers:
        each.close()


@pytest.mark.parametrize("which", ["stdin", "stdout"])
def test_a_follow_leaves_when_its_client_is_gone(door, which):
    state = door.ready("echo ready; exec sleep 1000")
    follow = door.follow(state["prog_id"])
    getattr(follow.process, which).close()
    follow.process.wait(5)
    follow.process.stdin.close()
    follow.process.stdout.close()
    assert follow.process.stderr.read() == b""
    follow.process.stderr.close()
    assert door.status(state["prog_id"])["state"] == "running"


def test_a_follow_whose_client_has_fallen_silent_leaves_by_itself_and_one_that_pings_stays(
    tmp_path,
):
    for door in fresh(tmp_path, constants=LATE + "agent.PING_DEADLINE_S = 0.5; "):
        state = door.ready("echo ready; exec sleep 1000")
        with door.follow(state["prog_id"]) as silent, door.follow(state["prog_id"]) as talking:
            assert silent.process.stdout
            while silent.process.poll() is None:
                talking.send(b"P\n")
                beats = talking.beats()
                talking.until(lambda each: each.beats() > beats)  # noqa: B023
                out = silent.process.stdout
                assert out is not None
                select.select([out], [], [], 0.1)
                if out in select.select([out], [], [], 0)[0]:
                    silent.drain()
                    silent.process.wait(5)
            assert talking.process.poll() is None
        assert door.status(state["prog_id"])["state"] == "running"


def test_pings_are_answered_and_a_signal_over_the_open_follow_is_relayed_and_acknowledged(door):
    state = door.ready(COUNTS_TERM)
    with door.follow(state["prog_id"]) as follow:
        follow.send(b"P\nP\n")
        follow.until(lambda each: each.beats() == 2)
        follow.send(b"K TERM 7\nK NOPE 8\n")
        follow.until(lambda each: each.acked(7)).until_output(b"term\n")
        assert not follow.acked(8)
        follow.send(b"K USR1 9\n")
        follow.drain()
        assert follow.acked(9)
    assert follow.states[-1]["return_code"] == 3


def test_a_follower_leaves_a_client_that_speaks_another_language(door):
    state = door.start(["sleep", "600"])
    with door.follow(state["prog_id"]) as follow:
        follow.send(b"P\nnonsense\nP\n")
        with pytest.raises(EOFError):
            follow.until(lambda each: each.beats() == 2)
    door.stop(state["prog_id"])


def test_wait_has_states_and_no_output(door):
    state = door.start(["sh", "-c", "echo out; exit 9"])
    with door.open("wait", {"prog_id": state["prog_id"]}) as wait:
        wait.drain()
    assert wait.out == {} and wait.states[-1]["return_code"] == 9


def test_run_starts_and_follows_in_one_exec_and_says_why_it_didnt(door):
    with door.open("run", door.program(["sh", "-c", "echo out; exit 9"])) as run:
        run.drain()
    assert run.stdout() == b"out\n" and run.states[-1]["return_code"] == 9
    with door.open("run", door.program(["no-such-program"])) as run:
        run.drain()
    assert run.reply["state"] == "not_started"


def test_read_gives_any_range(door):
    state = door.start(["seq", "1", "40000"])
    door.wait(state["prog_id"])
    for start, end in (
        (0, None),
        (0, 0),
        (7, 70000),
        (len(NUMBERS), None),
        (len(NUMBERS) + 5, None),
        (9, 3),
    ):
        assert (
            door.read(state["prog_id"], start=start, end=end)
            == NUMBERS[start : len(NUMBERS) if end is None else max(end, start)]
        )
    with pytest.raises(Refused, match="no stream output"):
        door.call("read", {"prog_id": state["prog_id"], "stream": "output"})


def test_a_run_is_found_by_id_name_and_the_beginning_of_its_tail(door):
    first = door.call("start", {**door.program(["true"]), "name": "nightly"})
    door.wait(first["prog_id"])
    second = door.call("start", {**door.program(["sleep", "1000"]), "name": "nightly"})
    third = door.call("start", {**door.program(["true"]), "name": "nightly"})
    door.wait(third["prog_id"])
    assert (
        door.status("nightly")["prog_id"] == second["prog_id"]
    )  # the open run wins over the newest
    door.stop("nightly", 0)
    assert door.status("nightly")["prog_id"] == third["prog_id"]
    assert door.status(first["prog_id"][-8:-2])["prog_id"] == first["prog_id"]
    door.start(["true"], prog_id="20261123t014409z-k7m2qxwp")
    door.start(["true"], prog_id="20261123t014410z-k7m3qxwp")
    with pytest.raises(Refused) as refused:
        door.status("k7m")
    assert refused.value.kind == "ambiguous" and len(refused.value.reply["runs"]) == 2
    listed = door.call("list", {})
    assert [run["prog_id"] for run in listed["runs"]][-3:] == [
        third["prog_id"],
        second["prog_id"],
        first["prog_id"],
    ]


def test_reading_changes_nothing(door):
    state = door.ready("echo ready; exec sleep 1000")
    directory = door.directory(state["prog_id"])

    def look() -> dict[str, tuple[int, int, bytes | None]]:
        found = {path: path.stat() for path in directory.rglob("*")}
        return {
            str(path): (s.st_size, s.st_mtime_ns, path.read_bytes() if path.is_file() else None)
            for path, s in found.items()
        }

    before = look()
    door.status(state["prog_id"])
    door.call("list", {})
    door.read(state["prog_id"])
    with door.follow(state["prog_id"], live=False) as follow:
        follow.drain()
    assert look() == before


# ---------------------------------------------------------------- small and quiet


@machine.EVERYWHERE
def test_guards_and_a_follow_that_nobody_reads_stay_small_while_a_program_writes_as_fast_as_it_can(
    door,
):
    size = 256 << 20
    state = door.start(["sh", "-c", f"head -c {size} /dev/zero; echo done >&2; exec sleep 1000"])
    with door.follow(state["prog_id"]) as unread:  # the client's pipe is full
        with door.follow(state["prog_id"], streams=["stderr"]) as follow:
            follow.until_output(b"done", "stderr")
        eventually(lambda: door.status(state["prog_id"])["streams"]["stdout"]["length"] == size)
        for pid in (*guards(state), unread.process.pid):
            peak = int(re.findall(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())[0])
            assert peak < 20_000
    door.stop(state["prog_id"], 0)


def test_guards_of_an_idle_run_never_wake_up(door):
    state = door.ready("echo ready; exec sleep 1000")

    def switches() -> list[list[str]]:
        return [
            re.findall(r"ctxt_switches:\s+\d+", Path(f"/proc/{pid}/status").read_text())
            for pid in guards(state)
        ]

    asleep = eventually(lambda: all(agent.process(pid)[0] == "S" for pid in guards(state)))
    assert asleep
    before = switches()
    other = door.start(["sleep", "1"])
    door.wait(other["prog_id"])
    assert switches() == before


@pytest.mark.storm
def test_runs_leave_nothing_behind_but_their_records(door):
    first = door.start(["sh", "-c", "echo out; exit 1"], prog_id="first")
    door.wait("first")
    gone(*guards(first)) if first["agent_pid"] else None
    before_fds, before = len(os.listdir("/proc/self/fd")), children()
    for number in range(12):
        with door.open(
            "run", door.program(["sh", "-c", "echo out; exit 1"], prog_id=f"r{number}")
        ) as run:
            run.drain()
        assert run.states[-1]["return_code"] == 1
    eventually(lambda: children() == before, "the last guards to leave")
    reap(set())
    assert len(os.listdir("/proc/self/fd")) == before_fds
    assert len(os.listdir(door.spool / "runs")) == 13
    expected = sorted(os.listdir(door.directory("first")))
    assert (
        "state.json" in expected
        and "state.json.tmp" not in expected
        and "launched.tmp" not in expected
    )
    for number in range(12):
        assert sorted(os.listdir(door.directory(f"r{number}"))) == expected
