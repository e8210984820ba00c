"""The documentation of Invoke's and Fabric's `run`, sentence by sentence, over Durable and on both
of Invoke's major versions.

test_durable.py holds the rest.
"""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from conftest import Cli
from fabric import Config, Connection, SerialGroup
from fabric.exceptions import GroupException
from invoke.exceptions import (
    CommandTimedOut,
    Failure,
    ThreadException,
    UnexpectedExit,
    WatcherError,
)
from invoke.watchers import FailingResponder

import corra
from corra.runners import Durable
from sshd import Sshd

ROOT = Path(__file__).resolve().parent.parent

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


def test_all_keywords_default_to_the_configurations_run_section(
    sshd: Sshd, capsys: pytest.CaptureFixture[str]
) -> None:
    with connection(
        sshd, run={"warn": True, "hide": True, "pty": True}, timeouts={"command": 1}
    ) as c:
        assert c.run("tty > /dev/null && exit 3").exited == 3
        with pytest.raises(CommandTimedOut):
            c.run("exec sleep 60")
    assert capsys.readouterr() == ("", "")


def test_asynchronous_hides_what_is_written_but_honours_a_stream_that_was_given(
    c: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    out = io.StringIO()
    promises = [
        c.run("echo o; echo e >&2", asynchronous=True),
        c.run("echo o; echo e >&2", asynchronous=True, out_stream=out),
    ]
    assert [(each.join().stdout, each.join().stderr) for each in promises] == [("o\n", "e\n")] * 2
    assert out.getvalue() == "o\n" and capsys.readouterr() == ("", "")


def test_joining_a_promise_raises_what_run_would_and_leaving_its_block_joins(c: Any) -> None:
    with pytest.raises(UnexpectedExit) as caught:
        c.run("exit 4", asynchronous=True).join()
    assert caught.value.result.exited == 4
    with pytest.raises(UnexpectedExit), c.run("exit 5", asynchronous=True):
        pass
    with pytest.raises(CommandTimedOut):
        c.run("exec sleep 60", asynchronous=True, timeout=1).join()


def test_disown_checks_no_exit_code_ignores_streams_and_excludes_asynchronous(c: Any) -> None:
    out = io.StringIO()
    result = c.run("echo o; exit 6", disown=True, out_stream=out)
    assert corra.attach(result.prog_id, c).wait(20).exited == 6 and out.getvalue() == ""
    with pytest.raises(ValueError, match="asynchronous"):
        c.run("true", disown=True, asynchronous=True)


def test_hide_overrides_echo_and_is_a_value_error_where_it_means_nothing(
    c: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert c.run("echo o", hide=True, echo=True).stdout == "o\n"
    assert capsys.readouterr() == ("", "")
    with pytest.raises(ValueError, match="nope"):
        c.run("true", hide="nope")


def test_hide_has_no_effect_on_a_stream_that_was_given(c: Any) -> None:
    out = io.StringIO()
    c.run("echo o", hide=True, out_stream=out)
    assert out.getvalue() == "o\n"


def test_echo_stdin_writes_what_is_read_to_what_is_written(c: Any) -> None:
    for echoes, shown in ((None, "got typed\n"), (False, "got typed\n")):
        out = io.StringIO()
        c.run(
            "read x; echo got $x",
            in_stream=io.StringIO("typed\n"),
            out_stream=out,
            echo_stdin=echoes,
        )
        assert out.getvalue() == shown


def test_the_environment_there_is_the_hosts_own_and_what_was_given(
    c: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The default is Fabric's `replace_env`, unlike Invoke's: otherwise the hosts would get each
    laptop's PATH.
    """
    monkeypatch.setenv("HERE_ONLY", "1")
    result = c.run("echo ${HERE_ONLY-none} $A; command -v sh", env={"A": "a"}, hide=True)
    assert result.stdout.splitlines()[0] == "none a" and result.stdout.splitlines()[1].startswith(
        "/"
    )


def test_nothing_that_keeps_a_command_from_exiting_is_a_matter_of_warn(c: Any) -> None:
    with pytest.raises(CommandTimedOut) as timed:
        c.run("exec sleep 60", warn=True, timeout=1, hide=True)
    assert "Command did not complete within 1 seconds" in str(timed.value)
    watcher = FailingResponder(pattern="Pass:", response="wrong\n", sentinel="Sorry")
    with pytest.raises(Failure) as failed:
        c.run(
            "printf Pass:; read x; echo Sorry; exec sleep 60",
            warn=True,
            watchers=[watcher],
            hide=True,
        )
    assert isinstance(failed.value.reason, WatcherError)

    class Broken(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError("no room")

    with pytest.raises(ThreadException):
        c.run("echo o", warn=True, out_stream=Broken())


def test_what_was_hidden_is_in_the_text_of_an_unexpected_exit(c: Any) -> None:
    with pytest.raises(UnexpectedExit) as caught:
        c.run("echo seen; echo wrong >&2; exit 7", hide=True)
    said = str(caught.value)
    assert "Exit code: 7" in said and "seen" in said and "wrong" in said and "echo seen" in said


def test_a_result_is_true_when_it_is_ok_and_prints_as_invokes_own(c: Any) -> None:
    good, bad = c.run("echo o", hide=True, env={"A": "a"}), c.run("exit 8", hide=True, warn=True)
    assert good and good.ok and not good.failed and not bad and bad.failed
    assert (good.encoding.lower(), good.env["A"], good.pty, good.hide) == (
        "utf-8",
        "a",
        False,
        ("stdout", "stderr"),
    )
    assert str(good).startswith("Command exited with status 0.\n=== stdout ===\no\n")
    assert c.run("seq 1 50", hide=True).tail("stdout", 3) == "\n\n48\n49\n50"


def test_contexts_nest_and_end(c: Any) -> None:
    before = c.run("echo $X$Y $PWD", hide=True).stdout
    with c.prefix("X=1"), c.prefix("Y=2"), c.cd("/"), c.cd("usr"):
        assert c.run("echo $X$Y $PWD", hide=True).stdout == "12 /usr\n"
    assert c.run("echo $X$Y $PWD", hide=True).stdout == before != "12 /usr\n"


@pytest.mark.usefixtures("as_root")
def test_sudo_preserves_what_env_names(c: Any) -> None:
    """With the real sudo, which asks root for no password."""
    assert c.sudo("printenv A", env={"A": "x y; $z"}, hide=True).stdout == "x y; $z\n"
    assert c.sudo("id -un", user="daemon", hide=True).stdout == "daemon\n"


def test_a_group_says_which_hosts_failed(new_sshd: Callable[..., Sshd], home: Path) -> None:
    group = SerialGroup.from_connections(
        [connection(new_sshd(alias=name), name) for name in ("h", "h2")]
    )
    try:
        with pytest.raises(GroupException) as caught:
            group.run(f"mkdir {home}/only-once", hide=True)
        assert [len(caught.value.result.succeeded), len(caught.value.result.failed)] == [1, 1]
    finally:
        group.close()


def test_a_gateway_is_gone_through(new_sshd: Callable[..., Sshd]) -> None:
    near, far = new_sshd(alias="near"), new_sshd(alias="far")
    with connection(near, "near") as gateway:
        config = Config(
            runtime_ssh_path=str(far.ssh_config),
            overrides={"runners": {"remote": Durable}, "run": {"in_stream": False}},
        )
        with Connection("far", config=config, gateway=gateway) as c:
            assert c.run("echo through", hide=True).stdout == "through\n"
    assert any("Accepted publickey" in line for line in near.log)


def test_files_and_the_connection_itself_are_as_before(c: Any, home: Path) -> None:
    c.put(io.StringIO("sent"), str(home / "file"))
    assert c.run(f"cat {home}/file", hide=True).stdout == "sent" and c.is_connected
    c.get(str(home / "file"), str(home / "copy"))
    assert (home / "copy").read_text() == "sent"
    c.close()
    assert c.run("echo again", hide=True).stdout == "again\n"


def test_much_output_costs_what_its_bytes_cost(c: Any) -> None:
    """Invoke joins all output so far at every thousand bytes: 16 MB take it 26 s on a free machine,
    and 32 MB four times that.
    """
    began = time.monotonic()
    result = c.run("head -c 32000000 /dev/zero | tr '\\0' x", hide=True)
    assert len(result.stdout) == 32_000_000 and time.monotonic() - began < 30


BOUNDED = """
import os, resource, sys
from fabric import Config, Connection
from corra.runners import Durable
overrides = {
    "runners": {"remote": Durable},
    "run": {"in_stream": False},
    "corra": {"output_limit": "1M"},
}
with Connection("h", config=Config(runtime_ssh_path=sys.argv[1], overrides=overrides)) as c:
    c.run("true")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result = c.run("head -c 150000000 /dev/zero | tr '\\\\0' x", hide=True)
    grew = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(len(result.stdout), result.truncated, grew)
"""


def test_a_limit_on_output_is_one_on_memory(sshd: Sshd, home: Path) -> None:
    command = [sys.executable, "-c", BOUNDED, str(sshd.ssh_config)]
    done = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=80,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    kept, truncated, grew_kb = done.stdout.split()
    assert int(kept) == 1 << 20 and truncated == "True", done.stderr
    assert int(grew_kb) < 50_000


TASKS = """
from invoke import Collection, task
import fabric
from corra.runners import Durable

@task
def go(c):
    config = c.config.clone(into=fabric.Config)
    config.load_ssh_config()
    connection = fabric.Connection("h", config=config)
    connection.run("echo $$ > pid; echo up; exec sleep 60", in_stream=False)

ns = Collection(go)
ns.configure({"runners": {"remote": Durable}})
"""


@pytest.mark.parametrize("how", ["", ", asynchronous=True, out_stream=sys.stdout).join("])
def test_ctrl_c_is_answered_at_once_under_inv_too(sshd: Sshd, home: Path, how: str) -> None:
    """Fabric alone answers Ctrl-C only once the command has ended."""
    (home / "tasks.py").write_text(
        "import sys\n" + TASKS.replace(", in_stream=False", f", in_stream=False{how}")
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "invoke", "go"],
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "INVOKE_SSH_CONFIG_PATH": str(sshd.ssh_config),
            "FABRIC_SSH_CONFIG_PATH": str(sshd.ssh_config),
        },
        cwd=home,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n", process.communicate()
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (
        time.monotonic() - began < 30
        and "STILL RUNNING: you have detached" in err
        and "Traceback" not in err
    )
    assert Path(f"/proc/{(home / 'pid').read_text().strip()}").exists()
    assert corra.attach("echo", "h").kill(grace=0).ended


FABFILE = """
from fabric import task
from corra.runners import Durable

@task
def bad(c):
    c.run("echo out; exit 3", hide=HIDE, pty=PTY)

@task
def caught(c):
    try:
        bad(c)
    except UnexpectedExit as error:
        print("caught", error.result.exited, error.result.stdout.strip())

from invoke import Collection
from invoke.exceptions import UnexpectedExit
ns = Collection(bad, caught)
ns.configure({"runners": {"remote": Durable}})
"""


def fab(sshd: Sshd, home: Path, task: str, **given: Any) -> subprocess.CompletedProcess[str]:
    if metadata.version("invoke") >= "3":
        pytest.skip("fab of Fabric 3.2 doesn't run on Invoke 3")
    text = FABFILE
    for name, value in given.items():
        text = text.replace(name, repr(value))
    (home / "fabfile.py").write_text(text)
    return subprocess.run(
        [sys.executable, "-m", "fabric", "-S", str(sshd.ssh_config), "-H", "h", task],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=home,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("hide", [None, True])
@pytest.mark.parametrize("pty", [False, True])
def test_a_command_that_fails_ends_the_fabfile_with_a_line_and_its_code(
    sshd: Sshd, home: Path, hide: bool | None, pty: bool
) -> None:
    done = fab(sshd, home, "bad", HIDE=hide, PTY=pty)
    assert done.returncode == 3
    line = r"corra: echo \(\w{6}\) on \S+: FAILED: exit 3 after \S+ s\n"
    told = r"Encountered a bad command exit code!.*Exit code: 3.*out.*" if hide else line
    assert re.fullmatch(told, done.stderr, re.DOTALL)
    assert done.stdout.split() == ([] if hide else ["out"])
    done = fab(sshd, home, "caught", HIDE=hide, PTY=pty)
    assert (done.returncode, done.stderr) == (0, "")
    assert "caught 3 out" in done.stdout


def test_ps_shows_the_command_of_the_fabfile_and_not_what_it_is_wrapped_in(
    sshd: Sshd, home: Path, cli: Cli
) -> None:
    fab(sshd, home, "bad", HIDE=True, PTY=False)
    row = cli("ps", "--host", "h").stdout.decode().splitlines()[1]
    assert row.endswith("  echo out; exit 3")
    assert b"  command  echo out; exit 3\n" in cli("status", "--host", "h", "echo").stdout
    assert len(cli("ps", "--host", "h", "-q", "--grep", "out; exit").stdout.split()) == 1
