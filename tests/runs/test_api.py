"""The Python API on this machine and through a real sshd: the same rules for both."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from conftest import home_environment
from invoke.context import Context
from invoke.exceptions import Exit, UnexpectedExit

import corra
from corra.model import ids
from corra.model.frames import Gap, Output, Status
from corra.remote.agent_client import Agent
from corra.runs import history, run as running
from corra.runs.run import Killed
from proxy import wait_for
from sshd import Sshd

ROOT = Path(__file__).resolve().parents[2]


def append(path: Path) -> list[str]:
    """Return a program that writes one line each time it is executed."""
    return ["sh", "-c", f"echo ran >> {path}"]


# -- run


def test_run_returns_what_the_program_wrote_and_how_it_ended(target: Agent) -> None:
    result = corra.run(target, ["sh", "-c", "echo out; echo err >&2; exit 7"], warn=True, hide=True)
    assert (result.stdout, result.stderr, result.exited, result.failed) == (
        "out\n",
        "err\n",
        7,
        True,
    )
    assert (result.reason, result.signal, result.truncated) == ("exited", None, False)
    assert result.state.state == "exited" and ids.is_valid(result.prog_id)
    assert result.elapsed is not None and result.elapsed < 10


def test_words_reach_the_program_as_they_are(target: Agent) -> None:
    words = ["", "a  b", "'", '"', "$HOME", "--x", "line\nline", "\udcff", "!", "\\", "*"]
    code = "import os, sys; sys.stdout.buffer.write(b'\\0'.join(map(os.fsencode, sys.argv[1:])))"
    run = corra.start(target, [sys.executable, "-c", code, *words])
    run.wait(20)
    assert run.read() == b"\0".join(map(os.fsencode, words))


def test_run_shows_the_bytes_themselves(
    target: Agent, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    corra.run(target, ["sh", "-c", r"printf '\377\000\303'; printf 'e\033' >&2"])
    shown = capfdbinary.readouterr()
    assert (shown.out, shown.err) == (b"\xff\x00\xc3", b"e\x1b")


def test_hide_hides_what_it_names_and_the_result_has_it(
    home: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    both = ["sh", "-c", "echo out; echo err >&2"]
    for hide, left in (
        (True, (b"", b"")),
        ("out", (b"", b"err\n")),
        ("stderr", (b"out\n", b"")),
        (None, (b"out\n", b"err\n")),
    ):
        result = corra.run("local", both, hide=hide)
        shown = capfdbinary.readouterr()
        assert (shown.out, shown.err) == left
        assert (result.stdout, result.stderr) == ("out\n", "err\n")
    with pytest.raises(corra.Misuse):
        corra.run("local", both, hide="neither")


def test_streams_may_take_text_or_bytes(home: Path) -> None:
    text, raw = io.StringIO(), io.BytesIO()
    # The pause cuts a character in two; as text it must arrive whole.
    corra.run(
        "local",
        ["sh", "-c", r"printf '\303'; sleep 0.2; printf '\244'; printf '\377' >&2"],
        out_stream=text,
        err_stream=raw,
    )
    assert (text.getvalue(), raw.getvalue()) == ("ä", b"\xff")


def test_a_bad_end_is_an_error_that_invokes_own_handlers_know(target: Agent) -> None:
    with pytest.raises(UnexpectedExit) as caught:
        corra.run(target, ["sh", "-c", "echo seen; exit 3"], hide=True)
    error = caught.value
    assert isinstance(error, corra.Failed) and isinstance(error, Exit)
    assert error.code == 3 and error.result.stdout == "seen\n" and error.started == "yes"
    assert f"on {target.host}: FAILED: exit 3 after" in error.line


@pytest.mark.parametrize(
    ("argv", "how", "code", "why"),
    [
        (["upptime"], {}, 127, "upptime: not found (ENOENT)"),
        (["/etc/passwd"], {}, 126, "/etc/passwd: not executable (EACCES)"),
        (["true"], {"cwd": "/no/such"}, 125, "cwd /no/such: no such directory (ENOENT)"),
    ],
)
def test_a_program_that_cant_be_started_says_why(
    target: Agent, argv: list[str], how: Any, code: int, why: str
) -> None:
    for call in (corra.run, corra.start):
        with pytest.raises(corra.NotStarted) as caught:
            call(target, argv, **how)
        assert (caught.value.code, caught.value.why, caught.value.started) == (code, why, "no")


def test_its_own_timeout_ends_it(target: Agent) -> None:
    with pytest.raises(corra.TimedOut) as caught:
        corra.run(target, ["sleep", "60"], timeout="300ms")
    result: Any = caught.value.result
    assert caught.value.code == 124 and result.reason == "timeout"
    assert caught.value.why.startswith("0.3 s; ended by TERM")


def test_a_program_that_a_signal_ended_says_which(target: Agent) -> None:
    result = corra.run(target, ["sh", "-c", "kill -KILL $$"], warn=True)
    assert (result.exited, result.signal) == (137, "SIGKILL")
    with pytest.raises(corra.Failed, match="KILLED: KILL"):
        corra.run(target, ["sh", "-c", "kill -KILL $$"])


def test_a_run_whose_guards_were_all_killed_is_lost_and_never_a_success(home: Path) -> None:
    class Kills(io.StringIO):
        def write(self, text: str) -> int:
            state = corra.attach(ids_seen[0], "local").state()
            # The deepest guard comes last: the guard that is left adopts the program.
            for pid in (*state.standby_pids, state.agent_pid):
                os.kill(pid or 0, signal.SIGSTOP)
            for pid in (*state.standby_pids, state.agent_pid):
                os.kill(pid or 0, signal.SIGKILL)
            return len(text)

    ids_seen = [ids.new_id()]
    with pytest.raises(corra.Lost) as caught:
        corra.run(
            "local", ["sh", "-c", "echo here; exec sleep 30"], id=ids_seen[0], out_stream=Kills()
        )
    assert caught.value.code == 123
    state = corra.attach(ids_seen[0], "local").state()
    assert (state.state, state.reason) == ("lost", "agent-gone")
    with contextlib.suppress(ProcessLookupError):
        os.kill(state.pid or 0, signal.SIGKILL)


@pytest.mark.parametrize("argv", [[], [""], "echo hi", ["a\0b"]])
def test_what_no_host_could_start_is_misuse(argv: Any) -> None:
    with pytest.raises(corra.Misuse):
        corra.run("local", argv)


@pytest.mark.parametrize("name", ["-oProxyCommand=x", "", "a b", "h;x", "user@-h", "h:0", "h:x"])
def test_a_host_that_ssh_could_misread_is_misuse(name: str) -> None:
    with pytest.raises(corra.Misuse):
        corra.start(name, ["true"])


def test_a_context_is_no_target() -> None:
    with pytest.raises(TypeError, match=r"under inv .* under fab"):
        corra.run(Context(), ["true"])
    with pytest.raises(TypeError):
        corra.run(None, ["true"])


# -- A program's environment and streams


def _pipe(data: bytes) -> Any:
    read, write = os.pipe()
    with open(write, "wb") as end:
        end.write(data)
    return open(read, "rb")


def _file(data: bytes, at: int) -> Any:
    file = tempfile.TemporaryFile()  # noqa: SIM115 - the test closes it
    file.write(b"-" * at + data)
    file.seek(at)
    return file


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: "text ä", "text ä".encode()),
        (lambda: b"\0bytes\xff", b"\0bytes\xff"),
        (lambda: b"", b""),
        (lambda: None, b""),
        (lambda: io.BytesIO(b"memory"), b"memory"),
        (lambda: io.StringIO("words"), b"words"),
        (lambda: _file(b"x" * 300_000, 0), b"x" * 300_000),
        (lambda: _file(b"from here", 12), b"from here"),
        (lambda: _pipe(b"piped"), b"piped"),
    ],
)
def test_stdin_is_what_was_given(target: Agent, make: Callable[[], Any], expected: bytes) -> None:
    given = make()
    try:
        result = corra.run(target, ["sha256sum"], stdin=given, hide=True)
    finally:
        if hasattr(given, "close"):
            given.close()
    assert result.stdout.split()[0] == hashlib.sha256(expected).hexdigest()


@pytest.mark.storm
def test_as_many_words_as_linux_takes_come_back_in_the_state(home: Path) -> None:
    words_of_all_kinds = ["true", *["\udcff" * 100_000] * 18]
    assert corra.run("local", words_of_all_kinds).state.argv == tuple(words_of_all_kinds)


def test_the_environment_and_cwd_are_as_asked(target: Agent, home: Path) -> None:
    (home / "d").mkdir()
    env = {"A": "x y; echo INJECTED", "LANG": None}
    result = corra.run(
        target,
        ["sh", "-c", 'echo "$A/${LANG-unset}/$PWD"'],
        env=env,
        cwd=str(home / "d"),
        hide=True,
    )
    assert result.stdout == f"x y; echo INJECTED/unset/{home}/d\n"


def test_a_secret_is_in_the_program_and_nowhere_on_disk(target: Agent, home: Path) -> None:
    run = corra.start(
        target, ["sh", "-c", "echo $TOKEN | sha256sum"], secrets={"TOKEN": "hunter2hunter2"}
    )
    result = run.wait(20)
    assert result.stdout.split()[0] == hashlib.sha256(b"hunter2hunter2\n").hexdigest()
    assert (
        subprocess.run(["grep", "-r", "hunter2", home], capture_output=True, check=False).stdout
        == b""
    )


# -- start, attach, wait, read


def test_start_returns_while_the_program_runs_and_attach_finds_it(target: Agent) -> None:
    run = corra.start(target, ["sh", "-c", "echo begun; exec sleep 60"], name="migrate")
    for text in (run.id, "migrate", run.id[-8:-4]):
        again = corra.attach(text, target)
        assert (again.id, again.name, again.host) == (run.id, "migrate", target.host)
    assert run.state().state == "running"
    assert run.kill(grace=5).ended
    assert run.state().ended


def test_attach_without_a_host_asks_this_machines_history(target: Agent, home: Path) -> None:
    run = corra.start(target, ["sh", "-c", "exec sleep 60"], name="backup")
    try:
        assert corra.attach("backup").id == run.id
        assert corra.attach(run.id[-8:-3]).id == run.id
        assert corra.attach().id == run.id
        history.path().unlink()
        with pytest.raises(corra.NotFound, match="this machine's history"):
            corra.attach("backup")
        assert corra.attach("backup", target).id == run.id
        assert corra.attach("backup").id == run.id
    finally:
        run.kill(grace=0)


def test_the_newest_of_mine_on_a_host_needs_no_id(target: Agent) -> None:
    with pytest.raises(corra.NotFound):
        corra.attach(None, target)
    for word in ("one", "two"):
        last = corra.start(target, ["echo", word])
        last.wait(20)
    assert corra.attach(None, target).id == last.id


def test_an_id_nobody_knows_is_not_found(target: Agent) -> None:
    corra.start(target, ["true"]).wait(20)
    with pytest.raises(corra.NotFound) as caught:
        corra.attach("zz9", target)
    assert (
        f"corra: zz9 on {target.host}: NOT FOUND" in caught.value.line
        and "1 run" in caught.value.line
    )
    assert caught.value.code == 125
    with pytest.raises(corra.NotFound, match="say where it runs"):
        corra.attach("zz9")


def test_a_prefix_of_two_runs_is_ambiguous_and_shows_them(target: Agent) -> None:
    for tail, name in (("k7m2qxwp", "migrate"), ("k7w4dnzz", None)):
        corra.start(target, ["true"], id=f"20261123t014409z-{tail}", name=name).wait(20)
    with pytest.raises(corra.Ambiguous) as caught:
        corra.attach("k7", target)
    assert caught.value.line == f"corra: k7 on {target.host}: AMBIGUOUS: 2 runs, nothing done"
    assert [line.split()[:2] for line in caught.value.hint] == [
        ["k7m2qx", "migrate"],
        ["k7w4dn", "-"],
    ]
    with pytest.raises(corra.Ambiguous):
        corra.attach("k7")
    assert corra.attach("k7m", target).name == "migrate"


def test_the_same_id_is_the_same_run_and_another_command_a_conflict(
    target: Agent, home: Path
) -> None:
    marks = home / "marks"
    first = corra.start(target, append(marks), id="pay-20261123")
    again = corra.start(target, append(marks), id="pay-20261123")
    assert again.id == first.id
    assert again.wait(20).ok
    assert corra.run(target, append(marks), id="pay-20261123").ok
    assert marks.read_text() == "ran\n"
    with pytest.raises(corra.Conflict) as caught:
        corra.start(target, ["./pay", "--twice"], id="pay-20261123", cwd="/")
    assert caught.value.line == (
        f"corra: pay-20261123 on {target.host}: NOT STARTED: this id already names another command"
    )
    assert caught.value.hint[0].startswith("there: sh -c 'echo ran") and caught.value.hint[
        0
    ].endswith("here: ./pay --twice")
    assert caught.value.started == "no" and caught.value.code == 125


def test_wait_gives_the_whole_result_and_has_a_limit(target: Agent) -> None:
    run = corra.start(target, ["sh", "-c", "echo out; read line; echo $line", "x"], stdin=b"")
    assert run.wait(20).stdout == "out\n\n"
    slow = corra.start(target, ["sleep", "60"])
    with pytest.raises(corra.StillRunning) as caught:
        slow.wait("200ms")
    assert caught.value.code == 122
    slow.kill(grace=0)
    assert slow.wait(20).signal == "SIGKILL"


def test_wait_keeps_the_end_of_much_output_and_read_has_the_rest(
    target: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "OUTPUT_KEPT", 1000)
    run = corra.start(target, ["seq", "1", "100000"])
    whole = "".join(f"{n}\n" for n in range(1, 100001))
    result = run.wait(20)
    assert result.truncated and result.stdout == whole[-1000:]
    assert run.read() == whole.encode()
    assert run.read("stdout", 10, 5000) == whole.encode()[10:5000]
    assert run.read("stdout", len(whole) + 5) == b""


def test_a_bounded_run_gives_what_it_has_and_says_that_it_isnt_all(target: Agent) -> None:
    whole = b"".join(b"%d\n" % n for n in range(1, 1100001))
    how: Any = {"keep_output": "1M", "limits": {"files": 77}}
    run = corra.start(target, ["sh", "-c", "seq 1 1100000; ulimit -n >&2"], **how)
    result = run.wait()
    state = run.state()
    gone = (state.streams or {})["stdout"]["dropped"]
    assert len(whole) - (1 << 20) - (1 << 17) - (1 << 18) <= gone <= len(whole) - (1 << 20)
    assert (result.stderr, result.truncated, result.stdout.encode()) == ("77\n", True, whole[gone:])
    assert run.read(end=gone + 5) == whole[gone : gone + 5]
    assert [event for event in run.follow(cursor={"stdout": 3}) if isinstance(event, Gap)] == [
        Gap("stdout", 3, gone)
    ]


def test_a_result_of_a_run_that_was_watched_is_truncated_where_there_was_a_gap(home: Path) -> None:
    for keep, cut in (("64K", True), ("64M", False)):
        result = corra.run("local", ["sh", "-c", "seq 1 300000"], hide=True, keep_output=keep)
        assert result.truncated == (len(result.stdout) < 1988895) and (cut or not result.truncated)


def test_follow_gives_output_from_a_cursor_or_a_tail(target: Agent) -> None:
    run = corra.start(target, ["seq", "1", "1000"])
    run.wait(20)
    whole = b"".join(b"%d\n" % n for n in range(1, 1001))
    events = list(run.follow())
    assert b"".join(e.data for e in events if isinstance(e, Output)) == whole
    assert isinstance(events[-1], Status)
    assert (
        b"".join(e.data for e in run.follow({"stdout": 100}) if isinstance(e, Output))
        == whole[100:]
    )
    tail = list(run.follow(tail=3))
    assert b"".join(e.data for e in tail if isinstance(e, Output)) == b"998\n999\n1000\n"
    assert not any(isinstance(e, Gap) for e in tail)
    assert not any(isinstance(e, Output) for e in run.follow(streams=["stderr"]))


def test_a_signal_goes_over_the_open_follow_from_another_thread(target: Agent) -> None:
    run = corra.start(
        target,
        ["sh", "-c", "trap 'echo got; exit 5' USR1; echo ready; while :; do sleep 0.05; done"],
    )
    follow, seen = run.follow(), b""
    for event in follow:
        if isinstance(event, Output) and event.stream == "stdout":
            seen += event.data
            if event.data == b"ready\n":
                thread = threading.Thread(target=follow.signal, args=("USR1",))
                thread.start()
                thread.join()
    assert seen == b"ready\ngot\n"
    assert follow.state is not None and follow.state.return_code == 5
    assert [each["signal"] for each in follow.state.signals_sent] == ["SIGUSR1"]


# -- kill and signal


def test_kill_ends_the_tree_and_says_what_it_told_the_host(target: Agent) -> None:
    run = corra.start(
        target, ["sh", "-c", "(trap '' TERM; sleep 61) & (setsid sleep 62) & echo up; wait"]
    )
    wait_for(run.read)
    told: list[Any] = []
    started = time.monotonic()
    killed = run.kill(grace="300ms", told=told.append)
    assert killed.ended and killed.survivors == () and killed.state.ended
    assert time.monotonic() - started < 10
    assert len(told) == 1 and told[0]["processes"] >= 3


def test_a_program_that_ignores_term_is_killed_after_its_grace(target: Agent) -> None:
    run = corra.start(target, ["sh", "-c", "trap '' TERM; echo up; while :; do sleep 0.1; done"])
    wait_for(run.read)
    run.kill(grace=0.2)
    assert run.wait(timeout=10).signal == "SIGKILL"


def test_kill_of_what_has_ended_finds_nothing_left(target: Agent) -> None:
    run = corra.start(target, ["true"])
    run.wait(20)
    assert run.kill() == Killed(ended=True, survivors=(), state=run.state())


def test_one_signal_is_one_signal(target: Agent) -> None:
    run = corra.start(
        target, ["sh", "-c", "trap 'echo hup' HUP; echo up; while :; do sleep 0.05; done"]
    )
    wait_for(run.read)
    assert not run.signal("HUP").ended
    wait_for(lambda: run.read() == b"up\nhup\n")
    with pytest.raises(corra.Misuse):
        run.signal("NOPE")
    run.kill(grace=0)


# -- ps


def test_ps_asks_every_host_and_has_an_error_in_place_of_a_dead_one(target: Agent) -> None:
    run = corra.start(target, ["true"], name="mine")
    run.wait(20)
    found = corra.ps([target, "127.0.0.1:1"], connect_timeout=5)
    assert [each.prog_id for each in found if isinstance(each, corra.State)] == [run.id]
    assert [each.host for each in found if isinstance(each, corra.State)] == [str(target.host)]
    assert [type(each) for each in found if not isinstance(each, corra.State)] == [
        corra.Unreachable
    ]
    assert corra.ps([]) == []


# -- Threads and connections


def test_ps_takes_a_set_of_hosts(new_sshd: Callable[..., Sshd], home: Path) -> None:
    for name in ("web1", "web2"):
        (home / name).mkdir()
        new_sshd(alias=name, environment=home_environment(home / name))
        corra.start(name, ["true"])
    for asked in ("web[1-2]", corra.hosts("web[1-2]"), ["web1", corra.Host("web2")]):
        found = [each for each in corra.ps(asked) if isinstance(each, corra.State)]
        assert [each.host for each in found] == ["web1", "web2"]


@pytest.mark.storm
def test_many_threads_share_one_agent(target: Agent) -> None:
    """More threads at once than sshd allows sessions on one connection."""
    with ThreadPoolExecutor(14) as pool:
        results = list(
            pool.map(
                lambda n: corra.run(target, ["sh", "-c", f"echo {n}; sleep 0.3"], hide=True).stdout,
                range(14),
            )
        )
    assert results == [f"{n}\n" for n in range(14)]


def test_a_fabric_connection_is_a_target_and_stays_open(sshd: Sshd, home: Path) -> None:
    from fabric import Config, Connection

    config = Config(runtime_ssh_path=str(sshd.ssh_config))
    with Connection("h", config=config) as connection:
        result = corra.run(connection, ["echo", "hi"], hide=True)
        assert result.stdout == "hi\n" and result.connection is connection
        run = corra.start(connection, ["sleep", "60"])
        assert run.kill(grace=0).ended


def test_nothing_listening_is_unreachable_at_once_and_forgotten(home: Path) -> None:
    with pytest.raises(corra.Unreachable) as caught:
        corra.start("127.0.0.1:1", ["true"], connect_timeout=5)
    assert (
        caught.value.code == 125
        and caught.value.started == "no"
        and "NOT STARTED" in caught.value.line
    )
    assert history.recent_entries() == []
    with pytest.raises(corra.Unreachable) as caught:
        corra.attach("abcd", "127.0.0.1:1", connect_timeout=5)
    assert "NOT STARTED" not in caught.value.line


# -- A client that is killed


CLIENT = """
import sys, corra
print("up", flush=True)
corra.start(sys.argv[1], sys.argv[3:], id=sys.argv[2], cwd="/")
"""


def test_a_client_killed_in_mid_start_and_run_again_executes_once(
    target: Agent, home: Path
) -> None:
    corra.run(target, ["true"])
    random.seed(7)
    for n in range(4):
        marks, prog_id = home / f"marks{n}", f"kill-{n}"
        client = subprocess.Popen(
            [sys.executable, "-c", CLIENT, str(target.host), prog_id, *append(marks)],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            cwd=home,
        )
        assert client.stdout is not None
        with client, client.stdout:
            assert client.stdout.readline() == b"up\n"
            with contextlib.suppress(subprocess.TimeoutExpired):
                client.wait(random.uniform(0.0, 0.5))
            client.kill()
        run = corra.start(target, append(marks), id=prog_id, cwd="/")
        assert run.wait(20).ok
        assert marks.read_text() == "ran\n"


# -- The package


def test_importing_corra_imports_nothing_else() -> None:
    code = (
        "import sys, corra; print([m for m in sys.modules if m.startswith(('corra.', 'fabric', "
        "'invoke', 'rich', 'paramiko'))])"
    )
    said = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        timeout=30,
    )
    assert said.stdout == "[]\n"


def test_everything_the_package_promises_is_there() -> None:
    assert len(set(corra.__all__)) == len(corra.__all__)
    for name in corra.__all__:
        assert getattr(corra, name) is not None
    assert set(dir(corra)) >= set(corra.__all__)
    with pytest.raises(AttributeError):
        corra.no_such_thing  # noqa: B018 - the access is the test


def test_a_result_is_fabrics_and_prints_as_theirs(home: Path) -> None:
    import fabric.runners

    result = corra.run("local", ["sh", "-c", "echo hi"], hide=True)
    assert isinstance(result, fabric.runners.Result) and result.ok and bool(result)
    assert (
        "hi" in str(result)
        and result.command == "sh -c 'echo hi'"
        and result.tail("stdout").strip() == "hi"
    )


def test_an_error_in_somebodys_task_prints_one_line_and_sets_the_code(home: Path) -> None:
    (home / "tasks.py").write_text(
        "from invoke import task\nimport corra\n\n@task\ndef go(c):\n"
        "    corra.run('local', ['sh', '-c', 'exit 9'])\n"
    )
    said = subprocess.run(
        [sys.executable, "-m", "invoke", "go"],
        capture_output=True,
        text=True,
        cwd=home,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=60,
        check=False,
    )
    assert said.returncode == 9
    assert "Traceback" not in said.stderr and "on local: FAILED: exit 9 after" in said.stderr


def test_the_state_is_json_and_back(home: Path) -> None:
    state = corra.run("local", ["true"]).state
    assert corra.State.from_json(json.loads(json.dumps(state.to_json()))) == state


def test_a_keyword_that_no_option_has_is_refused_as_python_refuses_its_own() -> None:
    with pytest.raises(TypeError, match=r"launch\(\) got an unexpected keyword argument 'tiemout'"):
        corra.start("local", ["true"], tiemout=3)  # type: ignore[call-arg]
