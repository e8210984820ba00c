"""Fabric's `Connection.run` over Durable: what Fabric and Invoke document of it, and what they
can't do.
"""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from fabric import Config, Connection, ThreadingGroup
from invoke.exceptions import AuthFailure, CommandTimedOut, Failure, ThreadException, UnexpectedExit
from invoke.watchers import FailingResponder, Responder, StreamWatcher

import corra
from corra import runners
from corra.runners import Durable
from proxy import Proxy, wait_for
from sshd import Sshd

ROOT = Path(__file__).resolve().parent.parent

# Each of these tests runs on both of Invoke's major versions.
pytestmark = pytest.mark.invoke


def connection(sshd: Sshd, host: str = "h", **overrides: Any) -> Any:
    run = {"in_stream": False, **overrides.pop("run", {})}
    config = Config(
        runtime_ssh_path=str(sshd.ssh_config),
        overrides={"runners": {"remote": Durable}, "run": run, **overrides},
    )
    return Connection(host, config=config)


@pytest.fixture
def c(sshd: Sshd) -> Iterator[Any]:
    with connection(sshd) as opened:
        yield opened


# -- Results


def test_run_returns_a_result_of_fabrics_with_what_corra_knows(c: Any) -> None:
    result = c.run("echo out; echo err >&2", hide=True)
    assert (result.stdout, result.stderr, result.exited, result.ok, result.command) == (
        "out\n",
        "err\n",
        0,
        True,
        "echo out; echo err >&2",
    )
    assert (
        result.connection is c
        and isinstance(result, corra.Result)
        and result.tail("stdout") == "\n\nout"
    )
    assert corra.attach(result.prog_id, c).wait(20).stdout == "out\n"
    assert (result.reason, result.signal, result.truncated) == (
        "exited",
        None,
        False,
    ) and result.elapsed is not None


def test_a_bad_end_raises_and_warn_returns_it(c: Any) -> None:
    with pytest.raises(UnexpectedExit) as caught:
        c.run("echo seen; exit 3", hide=True)
    assert caught.value.result.exited == 3 and caught.value.result.stdout == "seen\n"
    assert c.run("exit 3", warn=True, hide=True).return_code == 3
    assert c.run("kill -KILL $$", warn=True, hide=True).signal == "SIGKILL"


@pytest.mark.parametrize(
    ("hide", "out", "err"),
    [
        (None, "o\n", "e\n"),
        (True, "", ""),
        ("both", "", ""),
        ("out", "", "e\n"),
        ("stderr", "o\n", ""),
    ],
)
def test_hide_hides_what_it_names(
    c: Any, capsys: pytest.CaptureFixture[str], hide: Any, out: str, err: str
) -> None:
    c.run("echo o; echo e >&2", hide=hide)
    assert capsys.readouterr() == (out, err)


def test_echo_and_dry_say_what_is_run_and_dry_runs_nothing(
    c: Any, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    c.run("true", echo=True, echo_format="> {command}")
    assert capsys.readouterr().out == "> true\n"
    result = c.run(f"touch {home}/x", dry=True)
    assert (
        result.ok
        and result.prog_id == ""
        and not (home / "x").exists()
        and "touch" in capsys.readouterr().out
    )


def test_out_stream_and_err_stream_get_what_comes(c: Any) -> None:
    out, err = io.StringIO(), io.StringIO()
    c.run("echo o; echo e >&2", out_stream=out, err_stream=err)
    assert (out.getvalue(), err.getvalue()) == ("o\n", "e\n")


def test_a_stream_that_fails_is_a_thread_exception_and_no_hang(c: Any) -> None:
    class Broken(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError("no room")

    with pytest.raises(ThreadException):
        c.run("seq 1 2000000", out_stream=Broken())


def test_a_character_cut_in_two_arrives_whole_and_encoding_is_obeyed(c: Any) -> None:
    assert (
        c.run(r"printf '\303'; sleep 0.3; printf '\244\377'", hide=True, encoding="utf-8").stdout
        == "ä\ufffd"
    )
    assert c.run(r"printf '\344'", hide=True, encoding="latin-1").stdout == "ä"


def test_an_unknown_keyword_is_a_type_error(c: Any) -> None:
    with pytest.raises(TypeError, match="nope"):
        c.run("true", nope=1)


# -- The command's stdin and environment


def test_env_is_data_and_never_shell_text(c: Any, home: Path) -> None:
    value = f"x y; touch {home}/INJECTED; '\"$HOME`\\"
    assert c.run('printf %s "$A"', env={"A": value, "N": 7}, hide=True).stdout == value
    assert not (home / "INJECTED").exists()


def test_cd_and_prefix_and_the_users_own_shell(c: Any, home: Path) -> None:
    (home / "a b").mkdir()
    with c.cd(str(home)), c.cd("a b"), c.prefix("export X=1"):
        assert c.run("echo $PWD $X", hide=True).stdout == f"{home}/a b 1\n"
    assert c.run("echo ${0##*/}", hide=True).stdout.strip() == os.path.basename(
        c.run("echo $SHELL", hide=True).stdout.strip()
    )


def test_without_in_stream_a_command_reads_an_end_at_once(c: Any) -> None:
    assert c.run("cat; echo end", hide=True).stdout == "end\n"


@pytest.mark.parametrize("size", [0, 5, 300_000])
def test_in_stream_is_what_the_command_reads(c: Any, home: Path, size: int) -> None:
    text = "ä" * size
    assert c.run("cat", in_stream=io.StringIO(text), hide=True).stdout == text
    (home / "f").write_text(text)
    with (home / "f").open() as file:
        assert c.run("cat", in_stream=file, hide=True).stdout == text


def test_a_pipe_is_forwarded_as_it_comes_fast_and_to_its_end(c: Any) -> None:
    """Invoke forwards a stdin that is no terminal at 95 bytes a second: 60 kB would take ten
    minutes.
    """
    read, write = os.pipe()
    data = "".join(f"{n}\n" for n in range(200_000))

    def fill() -> None:
        with open(write, "w") as end:
            end.write(data)

    threading.Thread(target=fill).start()
    with open(read) as source:
        assert c.run("cat", in_stream=source, hide=True).stdout == data


def test_a_watcher_answers_a_question(c: Any) -> None:
    result = c.run(
        "printf 'name? '; read x; echo hello $x",
        watchers=[Responder(r"name\? ", "corra\n")],
        hide=True,
    )
    assert result.stdout == "name? hello corra\n"


def test_a_watcher_of_ones_own_sees_the_whole_stream(c: Any) -> None:
    seen: list[str] = []

    class Own(StreamWatcher):
        def submit(self, stream: str) -> list[str]:
            seen.append(stream)
            return ["go\n"] if stream.endswith("2?") and len(seen) < 9 else []

    c.run("echo 1; sleep 0.2; printf '2?'; read x; echo $x", watchers=[Own()], hide=True)
    assert any(each.startswith("1\n2?") for each in seen)


def test_a_watcher_that_gives_up_is_a_failure(c: Any) -> None:
    watcher = FailingResponder(pattern="Pass:", response="wrong\n", sentinel="Sorry")
    with pytest.raises(Failure):
        c.run("printf Pass:; read x; echo Sorry; exec sleep 60", watchers=[watcher], hide=True)


def test_a_prompt_is_found_behind_much_output_and_searching_costs_no_more_for_it() -> None:
    window = runners._Window([Responder("Pass:", "secret\n")])
    buffer: list[str] = []
    for _ in range(100):
        assert list(window.submit("x" * 10_000, buffer)) == []
        assert len(window._text) <= 3 * runners.PROMPT_MAX
    assert list(window.submit("Pa", buffer)) == []
    assert list(window.submit("ss:", buffer)) == ["secret\n"]
    assert list(window.submit("later", buffer)) == []


SUDO = """#!/bin/sh
# What sudo -S -p PROMPT [-H -u USER] COMMAND looks like from outside, for a password of its own.
while [ $# -gt 0 ]; do
  case $1 in -S|-H) shift;; -p) prompt=$2; shift 2;; -u) user=$2; shift 2;; *) break;; esac
done
for try in 1 2 3; do
    printf %s "$prompt" >&2
    read -r password || exit 1
    [ "$password" = right ] && SUDO_TO=${user:-root} exec "$@"
    echo "Sorry, try again." >&2
done
exit 1
"""


def test_sudo_gives_its_password_and_it_is_nowhere_on_the_disk(
    new_sshd: Callable[..., Sshd], home: Path
) -> None:
    (home / "bin").mkdir()
    (home / "bin/sudo").write_text(SUDO)
    (home / "bin/sudo").chmod(0o755)
    sshd = new_sshd(environment={"PATH": f"{home}/bin:/usr/bin:/bin"})
    with connection(sshd, sudo={"password": "right"}) as c:
        assert c.sudo("sh -c 'echo $SUDO_TO'", hide=True).stdout == "root\n"
        assert c.sudo("sh -c 'echo $SUDO_TO'", user="db", hide=True).stdout == "db\n"
        with pytest.raises(AuthFailure):
            c.sudo("true", password="wr0ng-one", hide=True)
    found = subprocess.run(
        ["grep", "-r", "-l", "wr0ng-one", home / ".local"], capture_output=True, check=False
    )
    assert found.stdout == b""


def test_a_pty_is_a_terminal_of_our_size_with_one_stream(c: Any) -> None:
    result = c.run(
        "test -t 0 && test -t 1 && test -t 2 && stty size; echo err >&2; exit 4",
        pty=True,
        warn=True,
        hide=True,
    )
    assert (
        result.stdout.replace("\r\n", "\n") == "24 80\nerr\n"
        and result.stderr == ""
        and result.exited == 4
    )
    assert c.run("kill -TERM $$", pty=True, warn=True, hide=True).signal == "SIGTERM"


def test_a_watcher_answers_on_a_pty_too(c: Any) -> None:
    result = c.run(
        "printf 'name? '; read x; echo hello $x",
        pty=True,
        watchers=[Responder(r"name\? ", "corra\n")],
        hide=True,
    )
    assert "hello corra" in result.stdout


def test_all_that_a_pty_program_says_before_its_end_is_there(c: Any) -> None:
    for _ in range(5):
        assert c.run("seq 1 20000", pty=True, hide=True).stdout.replace("\r\n", "\n") == "".join(
            f"{n}\n" for n in range(1, 20001)
        )


def test_a_left_over_child_keeps_neither_a_pty_nor_a_fed_command_waiting(c: Any) -> None:
    for how in ({"pty": True}, {"watchers": [Responder("never", "x")]}):
        began = time.monotonic()
        assert c.run("sleep 60 & echo on", hide=True, **how).stdout.strip() == "on"
        assert time.monotonic() - began < 30


# -- Time


def test_timeout_stops_the_program_itself(c: Any, home: Path) -> None:
    with pytest.raises(CommandTimedOut) as caught:
        c.run(f"echo $$ > {home}/pid; exec sleep 60", timeout=1, hide=True)
    assert caught.value.timeout == 1
    result: Any = caught.value.result
    assert corra.attach(result.prog_id, c).state().reason == "timeout"
    assert not Path(f"/proc/{(home / 'pid').read_text().strip()}").exists()


def test_asynchronous_gives_a_promise(c: Any) -> None:
    began = time.monotonic()
    with c.run("sleep 0.5; echo out; exit 2", asynchronous=True, warn=True) as promise:
        assert time.monotonic() - began < 20
        assert promise.runner.prog_id
    both = [c.run(f"sleep 0.3; echo {n}", asynchronous=True) for n in range(3)]
    assert [each.join().stdout for each in both] == ["0\n", "1\n", "2\n"]


def test_disown_leaves_it_running_and_says_its_id(c: Any, home: Path) -> None:
    result = c.run(f"while [ ! -e {home}/go ]; do sleep 0.05; done; echo ended", disown=True)
    assert result.exited is None and corra.attach(result.prog_id, c).state().state == "running"
    (home / "go").touch()
    assert corra.attach(result.prog_id, c).wait(20).stdout == "ended\n"


def test_a_group_runs_on_all(new_sshd: Callable[..., Sshd]) -> None:
    group = ThreadingGroup.from_connections(
        [connection(new_sshd(alias=name), name) for name in ("h", "h2")]
    )
    try:
        assert sorted(result.stdout for result in group.run("echo hi", hide=True).values()) == [
            "hi\n",
            "hi\n",
        ]
    finally:
        group.close()


# -- What Fabric and Invoke can't do


def test_a_broken_link_is_no_end_and_costs_no_byte(
    sshd: Sshd, capsys: pytest.CaptureFixture[str]
) -> None:
    with Proxy(sshd.port) as proxy:
        sshd.add_host("p", Port=proxy.port, HostKeyAlias=f"[127.0.0.1]:{sshd.port}")
        with connection(sshd, "p") as c:
            c.run("true")
            breaks = iter([20, 100])
            due = next(breaks)

            class Cutting(io.StringIO):
                def write(self, text: str) -> int:
                    nonlocal due
                    written = super().write(text)
                    if self.getvalue().count("\n") >= due:
                        proxy.reset()
                        due = next(breaks, 10**9)
                    return written

            result = c.run(
                "for i in $(seq 1 150); do echo $i; sleep 0.02; done", out_stream=Cutting()
            )
    assert result.stdout == "".join(f"{n}\n" for n in range(1, 151))
    assert "link lost, program unaffected" in capsys.readouterr().err


def test_what_was_typed_arrives_once_over_links_that_break(sshd: Sshd) -> None:
    with Proxy(sshd.port) as proxy:
        sshd.add_host("p", Port=proxy.port, HostKeyAlias=f"[127.0.0.1]:{sshd.port}")
        with connection(sshd, "p") as c:
            read, write = os.pipe()
            lines = [f"line {n}\n" for n in range(60)]

            def type_() -> None:
                with open(write, "w") as end:
                    for n, each in enumerate(lines):
                        end.write(each)
                        end.flush()
                        time.sleep(0.03)
                        if n in (15, 40):
                            proxy.reset()

            threading.Thread(target=type_).start()
            with open(read) as source:
                assert c.run("cat", in_stream=source, hide=True).stdout == "".join(lines)


def test_a_reconnect_trusts_the_host_of_the_first_connection_and_no_other(
    new_sshd: Callable[..., Sshd], home: Path
) -> None:
    """Fabric checks no key. A host that known_hosts doesn't have stays usable after a break, and a
    host with another key doesn't take its place.
    """
    sshd, other = new_sshd(), new_sshd(alias="other")
    with Proxy(sshd.port) as proxy:
        sshd.add_host("p", Port=proxy.port, UserKnownHostsFile="/dev/null")
        with connection(sshd, "p", corra={"reconnect_timeout": "20s"}) as c:
            promise = c.run(
                f"while [ ! -e {home}/go ]; do sleep 0.05; done; echo ended", asynchronous=True
            )
            proxy.reset()
            (home / "go").touch()
            assert promise.join().stdout == "ended\n"
        with connection(sshd, "p", corra={"reconnect_timeout": "1s"}) as c:
            promise = c.run("exec sleep 60", asynchronous=True)
            proxy._target = other.port
            proxy.reset()
            with pytest.raises(corra.StillRunning, match="does not match"):
                promise.join()
            proxy._target = sshd.port
            corra.attach(promise.runner.prog_id, c).kill(grace=0)


def test_output_is_kept_up_to_a_limit_and_shown_whole(sshd: Sshd) -> None:
    out = io.StringIO()
    with connection(sshd, corra={"output_limit": "64k"}) as c:
        result = c.run("seq 1 300000", out_stream=out)
        whole = "".join(f"{n}\n" for n in range(1, 300001))
        assert out.getvalue() == whole and result.truncated
        assert len(result.stdout) <= 2 * 64 * 1024 and whole.endswith(result.stdout)
        assert not c.run("echo short", hide=True).truncated


def test_lost_is_never_taken_for_an_ordinary_bad_end(c: Any, home: Path) -> None:
    def lose() -> None:
        wait_for((home / "up").exists)
        state = corra.attach("sleep", c).state()
        pids = [*state.standby_pids, state.agent_pid or 0, state.pid or 0]
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for pid in pids[: 3 if number == signal.SIGSTOP else None]:
                os.kill(pid, number)

    thread = threading.Thread(target=lose)
    thread.start()
    with pytest.raises(corra.Lost):
        c.run(f"sleep $(touch {home}/up; echo 60)", hide=True)
    thread.join()


def test_what_cant_be_started_is_said_in_one_line(sshd: Sshd, c: Any) -> None:
    with pytest.raises(corra.NotStarted, match="too long"):
        c.run("true " + "x" * 200_000)


FABFILE = """
from fabric import task
from corra.runners import Durable

@task
def go(c):
    c.run("echo $$ > pid; echo up; exec sleep 60")

@task
def bad(c):
    c.run("exit 9", hide=True)
"""


@pytest.fixture
def fab(sshd: Sshd, home: Path) -> Callable[..., subprocess.Popen[str]]:
    """`fab` on a fabfile that doesn't mention corra; ~/.fabric.py alone makes it durable."""
    if metadata.version("invoke") >= "3":
        pytest.skip("fab of Fabric 3.2 doesn't run on Invoke 3")
    (home / "fabfile.py").write_text(FABFILE.replace("from corra.runners import Durable\n", ""))
    (home / ".fabric.py").write_text(
        "from corra.runners import Durable\nrunners = {'remote': Durable}\n"
    )

    def start(*words: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "fabric", "-S", str(sshd.ssh_config), "-H", "h", *words],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            cwd=home,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    return start


def test_ctrl_c_leaves_at_once_and_the_program_goes_on(
    fab: Callable[..., subprocess.Popen[str]], home: Path
) -> None:
    process = fab("go")
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert (
        time.monotonic() - began < 10
        and "STILL RUNNING: you have detached" in err
        and "Traceback" not in err
    )
    assert Path(f"/proc/{(home / 'pid').read_text().strip()}").exists()
    assert corra.attach("echo", "h").kill(grace=0).ended


def test_an_existing_fabfile_needs_no_change(fab: Callable[..., subprocess.Popen[str]]) -> None:
    process = fab("bad")
    _, err = process.communicate(timeout=30)
    assert process.returncode == 9 and "Traceback" not in err
    assert corra.attach(None, "h").state().return_code == 9
