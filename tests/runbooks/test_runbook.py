"""Runbooks that resume: a done step isn't done again, a running step is taken up, a failed step is
repeated, and a LOST step waits for a person.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import NEXT_BOOT, Cli, home_environment, reboot_order
from invoke.context import Context
from invoke.exceptions import UnexpectedExit

import corra
from corra import agent
from corra.model import ids
from corra.runbooks import journal as journals, ledgers
from proxy import Proxy, wait_for
from sshd import Sshd, user
from terminal import Terminal

ROOT = Path(__file__).resolve().parents[2]


def append(path: Path, more: str = "") -> list[str]:
    """Return a program that writes one line each time it is executed."""
    return ["sh", "-c", f"echo ran >> {path}; {more or 'true'}"]


def lines(path: Path) -> int:
    return path.read_text().count("\n") if path.exists() else 0


@pytest.fixture
def two(new_sshd: Callable[..., Sshd], home: Path) -> list[str]:
    """Two hosts, each with its own home."""
    for name in ("web1", "web2"):
        (home / name).mkdir()
        new_sshd(alias=name, environment=home_environment(home / name))
    return ["web1", "web2"]


@pytest.fixture(params=["local", "h"])
def host(request: pytest.FixtureRequest, home: Path) -> str:
    if request.param == "h":
        request.getfixturevalue("sshd")
    return str(request.param)


@pytest.fixture(params=["here", "there"])
def journal(request: pytest.FixtureRequest, home: Path) -> str | None:
    """A journal on this machine, and one on a host of its own."""
    if request.param == "here":
        return None
    (home / "ops1").mkdir()
    request.getfixturevalue("new_sshd")(alias="ops1", environment=home_environment(home / "ops1"))
    return "ops1"


def book(key: str = "OPS-1", **how: Any) -> corra.Runbook:
    return corra.runbook("up", key=key, **how)


# -- Steps


def test_what_was_done_gives_its_result_again_and_is_not_done_again(
    host: str, journal: str | None, home: Path
) -> None:
    marks = home / "marks"
    for _ in range(3):
        with book(journal=journal) as it:
            result = it.run(host, append(marks, "echo out; echo err >&2"), step="one")
            assert (result.stdout, result.stderr, result.exited, result.ok) == (
                "out\n",
                "err\n",
                0,
                True,
            )
            assert (
                it.run(host, ["echo", result.prog_id], step="two").stdout == f"{result.prog_id}\n"
            )
    assert lines(marks) == 1


def test_what_failed_is_repeated_and_what_was_before_it_is_not(host: str, home: Path) -> None:
    marks, bad = home / "marks", home / "bad"
    bad.touch()

    def once() -> None:
        with book() as it:
            it.run(host, append(marks), step="one")
            it.run(host, ["sh", "-c", f"echo no luck >&2; test ! -e {bad}"], step="two")

    for _ in range(2):
        with pytest.raises(corra.Failed) as caught:
            once()
        assert caught.value.line == f"corra: up OPS-1: STOPPED at 2 two: {host} FAILED: exit 1"
        assert caught.value.code == 1 and caught.value.hint[0] == "no luck"
        assert caught.value.hint[2] == "leave 2 out: corra book up OPS-1 --skip two"
        assert isinstance(caught.value, UnexpectedExit)
    bad.unlink()
    once()
    assert lines(marks) == 1
    read = journals.Journal(ledgers.Here(), "up", "OPS-1").read()
    assert [each.number for each in read.part("two", host).attempts] == [
        1,
        2,
        3,
    ] and read.done is not None


def test_all_done_says_so_and_starts_nothing(
    host: str, home: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    marks = home / "marks"
    for _ in range(2):
        capfd.readouterr()
        with book() as it:
            assert it.run(host, append(marks, "echo out"), step="one").stdout == "out\n"
            assert it.do("two", sorted, [1]) == [1]
            it.note("said once")
    said = capfd.readouterr().err
    assert (
        "corra: up OPS-1: ALREADY DONE at" in said
        and "said once" not in said
        and "done before" not in said
    )
    assert lines(marks) == 1
    with pytest.raises(corra.Changed, match="without a step three"), book() as it:
        it.run(host, append(marks), step="three")
    with pytest.raises(corra.Changed, match="without a step four"), book() as it:
        it.do("four", lambda: 1)
    assert lines(marks) == 1


@pytest.mark.parametrize("host", ["h"], indirect=True)
def test_the_output_of_a_long_step_comes_from_the_host_again(host: str) -> None:
    whole = "".join(f"{n}\n" for n in range(1, 100001))
    for _ in range(2):
        with book() as it:
            result = it.run(host, ["seq", "1", "100000"], step="one")
            assert result.stdout == whole and not result.truncated


def test_warn_makes_a_bad_end_a_result_that_is_kept(host: str, home: Path) -> None:
    marks = home / "marks"
    for _ in range(2):
        with pytest.raises(corra.Stop), book() as it:
            assert it.run(host, append(marks, "exit 3"), step="one", warn=True).exited == 3
            raise corra.Stop("on purpose")
    assert lines(marks) == 1


@pytest.mark.parametrize("host", ["h"], indirect=True)
def test_what_cant_be_started_stops_with_why_and_is_tried_again(host: str, home: Path) -> None:
    program = home / "program"

    def once() -> corra.Result:
        with book() as it:
            return it.run(host, [str(program)], step="one")

    with pytest.raises(corra.NotStarted) as caught:
        once()
    assert (
        caught.value.code == 127
        and "not found (ENOENT)" in caught.value.line
        and "STOPPED at 1 one" in caught.value.line
    )
    program.write_text("#!/bin/sh\necho now\n")
    program.chmod(0o755)
    assert once().stdout == "now\n"


def test_its_own_timeout_is_a_failure_like_others(home: Path) -> None:
    with pytest.raises(corra.TimedOut) as caught, book() as it:
        it.run("local", ["sleep", "60"], step="one", timeout="200ms")
    assert caught.value.code == 124 and "STOPPED at 1 one: local TIMEOUT" in caught.value.line


def test_a_step_named_twice_on_a_host_is_an_error_of_the_runbook(home: Path) -> None:
    with pytest.raises(ValueError, match="step 'one' on local comes twice"), book() as it:
        it.run("local", ["true"], step="one")
        it.run("local", ["true"], step="one")
    for name in ("", "a b", "../x", "-x"):
        with pytest.raises(corra.Misuse), book("K2") as it:
            it.run("local", ["true"], step=name)
    for key in ("", " ", "a\nb", "x" * 300, 7):
        with pytest.raises(corra.Misuse):
            book(key)  # type: ignore[arg-type]


def test_what_makes_no_sense_is_said_before_anything_is_begun(home: Path) -> None:
    with pytest.raises(TypeError, match=r"runbook\(\) got an unexpected keyword argument 'parms'"):
        book(parms={"to": 17})
    with pytest.raises(corra.Misuse, match="a text is one host, and 'web") as caught, book() as it:
        it.run("web[1-3]", ["true"], step="one")
    assert caught.value.hint == ("corra.hosts('web[1-3]')",)
    with pytest.raises(corra.Misuse, match="stdin can't be held open"), book() as it:
        it.run("local", ["cat"], step="one", stdin=corra.OPEN)
    with pytest.raises(corra.Misuse) as caught, book() as it:
        it.run("local", "echo a", step="one")
    assert "STOPPED at 1 one: local NOT STARTED: argv must be a list of words" in caught.value.line
    assert (
        caught.value.code == 2 and not caught.value.hint
    )  # otherwise the same command would have the same result


def test_a_key_may_be_any_text_a_ticket_has(home: Path) -> None:
    for key in ("OPS 1/2 #x", "../../etc", ".", "ä", "%2E"):
        with book(key) as it:
            it.run("local", ["true"], step="one")
    found = ledgers.all_books(ledgers.Here())
    assert sorted(each[1] for each in found) == sorted(["OPS 1/2 #x", "../../etc", ".", "ä", "%2E"])


# -- Changes between passes


def test_other_params_are_not_continued_and_the_difference_is_told(home: Path) -> None:
    with contextlib.suppress(corra.Stop), book(params={"to": 17, "x": [1]}):
        raise corra.Stop("x")
    with pytest.raises(corra.Changed) as caught, book(params={"to": 18, "x": [1]}):
        pytest.fail("the body ran")
    assert caught.value.line == "corra: up OPS-1: NOT CONTINUED: begun with to=17, now to=18"
    assert caught.value.code == 125


@pytest.mark.parametrize(
    ("now", "told"),
    [
        ({"argv": ["echo", "b"]}, 'argv: was ["echo", "a"], now ["echo", "b"]'),
        ({"env": {"A": "2"}}, "env A: was another value, now another value"),
        ({"cwd": "/"}, "cwd: was"),
        ({"stdin": "x"}, "stdin: was null, now"),
    ],
)
def test_another_command_under_a_step_that_is_done_stops_with_the_difference(
    home: Path, now: dict[str, Any], told: str
) -> None:
    first: dict[str, Any] = {"argv": ["echo", "a"], "env": {"A": "1"}}

    def once(argv: list[str], **how: Any) -> None:
        with book() as it:
            it.run("local", argv, step="one", **how)
            raise corra.Stop("not yet")

    with pytest.raises(corra.Stop):
        once(**first)
    with pytest.raises(corra.Changed) as caught:
        once(**{**first, **now})
    assert "NOT CONTINUED: 1 one was begun on local with another" in caught.value.line
    assert caught.value.hint[0].startswith(told) and "--redo one" in caught.value.hint[1]


def test_another_command_under_a_step_that_failed_is_how_it_is_mended(home: Path) -> None:
    with pytest.raises(corra.Failed), book() as it:
        it.run("local", ["false"], step="one")
    with book() as it:
        assert it.run("local", ["true"], step="one").ok


def test_the_directory_one_stands_in_is_no_part_of_a_step(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / "d").mkdir()
    for place in (home, home / "d"):
        monkeypatch.chdir(place)
        with contextlib.suppress(corra.Stop), book() as it:
            assert it.run("local", ["pwd"], step="one").stdout == f"{home}\n"
            raise corra.Stop("x")


# -- Targets


def test_a_connection_is_one_host_and_the_same_one_as_its_name(sshd: Sshd, home: Path) -> None:
    """Under fab a task has a Connection. A step done through it isn't repeated under inv."""
    from fabric import Config, Connection

    marks = home / "marks"
    with Connection("h", config=Config(runtime_ssh_path=str(sshd.ssh_config))) as connection:
        with contextlib.suppress(corra.Stop), book() as it:
            assert it.run(connection, append(marks, "echo out"), step="one").stdout == "out\n"
            assert it.run([connection], ["true"], step="two").ok
            raise corra.Stop("on under inv")
        assert [each.name for each in corra.ps(connection) if isinstance(each, corra.State)] in (
            ["two", "one"],
            ["one", "two"],
        )
    with book() as it:
        assert it.run("h", append(marks, "echo out"), step="one").stdout == "out\n"
        assert it.run(["h"], ["true"], step="two").ok
    assert lines(marks) == 1


def test_a_context_is_refused_and_not_taken_for_its_configurations_keys(home: Path) -> None:
    with pytest.raises(TypeError, match="a Context is no target"), book() as it:
        it.run(Context(), ["true"], step="one")  # type: ignore[arg-type] # as mypy would have said
    with pytest.raises(TypeError, match="a Context is no target"):
        corra.ps(Context())


# -- Several hosts


def test_a_step_on_several_hosts_is_done_once_on_each(
    two: list[str], journal: str | None, home: Path
) -> None:
    def once() -> corra.Results:
        with book(journal=journal) as it:
            found = it.run(two, ["sh", "-c", "echo ran >> $HOME/marks; echo $HOME"], step="one")
            it.run(["web1"], ["false"], step="two", warn=True)
            return found

    for _ in range(2):
        found = once()
        assert [str(each) for each in found] == two and found.ok
        assert (
            found["web2"].stdout == f"{home}/web2\n"
            and found[corra.Host("web1")].stdout == f"{home}/web1\n"
        )
    assert lines(home / "web1/marks") == lines(home / "web2/marks") == 1


def test_only_the_hosts_that_failed_are_repeated(two: list[str], home: Path) -> None:
    (home / "web2/bad").touch()

    def once() -> None:
        with book() as it:
            it.run(two, ["sh", "-c", "echo ran >> $HOME/marks; test ! -e $HOME/bad"], step="one")

    with pytest.raises(corra.Failed) as caught:
        once()
    assert caught.value.why == "web2 FAILED: exit 1 (1 of 2 hosts)"
    assert list(map(str, caught.value.results.failed)) == ["web2"] and list(
        map(str, caught.value.results.succeeded)
    ) == ["web1"]
    (home / "web2/bad").unlink()
    once()
    assert (lines(home / "web1/marks"), lines(home / "web2/marks")) == (1, 2)


def test_waves_come_one_after_the_other_and_a_later_pass_goes_on_in_the_middle(
    two: list[str], home: Path
) -> None:
    marks = home / "marks"
    command = append(marks, f"test $(wc -l < {marks}) -gt 1")
    with pytest.raises(corra.Failed), book() as it:
        it.run(two, command, step="one", batch=1)
    assert lines(marks) == 1
    with book() as it:
        results = it.run(two, command, step="one", batch=[1, "100%"], pause=0.1)
    assert results.ok and lines(marks) == 3


def test_a_share_of_the_hosts_may_fail(two: list[str]) -> None:
    with book() as it:
        assert (
            len(it.run(two, ["sh", "-c", "test $HOME = x"], step="a", max_fail="100%").failed) == 2
        )
        with pytest.raises(corra.Misuse):
            it.run(two, ["true"], step="b", max_fail="some")
        with pytest.raises(corra.Misuse):
            it.run(two, ["true"], step="c", batch=0)


def test_max_fail_lets_some_fail_and_they_are_not_repeated(two: list[str], home: Path) -> None:
    for _ in range(2):
        with pytest.raises(corra.Stop), book() as it:
            found = it.run(
                two,
                ["sh", "-c", "echo ran >> $HOME/marks; test $HOME != " + str(home / "web1")],
                step="one",
                max_fail=1,
            )
            assert list(map(str, found.failed)) == ["web1"] and not found.ok
            raise corra.Stop("later")
    assert (lines(home / "web1/marks"), lines(home / "web2/marks")) == (1, 1)


def test_after_too_many_failures_nothing_new_is_begun(home: Path, two: list[str]) -> None:
    hosts = [*two, "127.0.0.1:1"]
    with pytest.raises(corra.Failed), book() as it:
        it.run(hosts, ["sh", "-c", "echo ran >> $HOME/marks; false"], step="one", at_once=1)
    assert (lines(home / "web1/marks"), lines(home / "web2/marks")) == (1, 0)


def test_a_host_that_doesnt_answer_is_named_and_tried_again(
    two: list[str], home: Path, cli: Cli
) -> None:
    hosts = [*two, "127.0.0.1:1"]
    for _ in range(2):
        with pytest.raises(corra.Unreachable) as caught, book(connect_timeout=5) as it:
            it.run(hosts, ["sh", "-c", "echo ran >> $HOME/marks"], step="one")
        assert caught.value.line.startswith(
            "corra: up OPS-1: STOPPED at 1 one: 127.0.0.1:1 NOT STARTED: connection refused"
        )
        assert caught.value.code == 125 and list(map(str, caught.value.results.unreached)) == [
            "127.0.0.1:1"
        ]
    assert lines(home / "web1/marks") == lines(home / "web2/marks") == 1
    shown = cli("book", "up", "OPS-1").stdout.decode().splitlines()
    assert [line.split()[2:5] for line in shown if "127.0.0.1:1 " in line and " one " in line] == [
        ["127.0.0.1:1", "not", "confirmed"]
    ]


def test_hide_false_shows_what_each_host_writes(
    two: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    with book() as it:
        it.run("web1", ["printf", "alone"], step="one", hide=False)
        it.run(two, ["sh", "-c", "echo a; printf b"], step="two", hide=False)
        it.run("web1", ["echo", "hidden"], step="three")
    out = capfd.readouterr().out
    assert out.startswith("alone") and sorted(out.removeprefix("alone").splitlines()) == [
        "web1: a",
        "web1: b",
        "web2: a",
        "web2: b",
    ]


# -- Passes that die, and others that go on

PASS = """
import sys, corra
with corra.runbook("up", key="OPS-1", journal=sys.argv[2] or None) as book:
    print("in", flush=True)
    result = book.run(sys.argv[1], sys.argv[3:], step="one")
    print(result.stdout, flush=True)
"""


def begin(home: Path, host: str, journal: str | None, argv: list[str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PASS, host, journal or "", *argv]
    return subprocess.Popen(
        command,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=home,
    )


@pytest.mark.parametrize("host", ["h"], indirect=True)
def test_what_runs_is_taken_hold_of_from_another_machine(
    host: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first machine is killed in the middle of a step; the second knows only the journal's
    host.
    """
    monkeypatch.setenv(
        "XDG_STATE_HOME", ""
    )  # the host is this machine, so both machines' programs share one home
    marks, go = home / "marks", home / "go"
    argv = append(marks, f"while [ ! -e {go} ]; do sleep 0.05; done; echo ended")
    (home / "ops1").mkdir()
    first = begin(home, host, None, argv)
    try:
        wait_for(lambda: lines(marks))
        wait_for(
            lambda: "started" in (home / ".local/state/corra/books/up/OPS-1.jsonl").read_text()
        )
    finally:
        first.kill()
        first.communicate()
    go.touch()
    second = begin(home, host, None, argv)
    out, err = second.communicate(timeout=60)
    assert second.returncode == 0 and out.endswith("ended\n\n"), err
    assert lines(marks) == 1
    assert ": 1 running" in err and "attached, done" in err


def test_a_second_machine_reads_the_journal_and_skips_what_the_first_has_done(
    two: list[str], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for machine in ("laptop", "ops2"):
        (home / machine).mkdir()
        for name, value in home_environment(home / machine).items():
            monkeypatch.setenv(name, value)
        with contextlib.suppress(corra.Stop), book(journal="web2") as it:
            assert (
                it.run("web1", ["sh", "-c", "echo ran >> $HOME/marks; echo out"], step="one").stdout
                == "out\n"
            )
            if machine == "laptop":
                raise corra.Stop("the battery is empty")
    assert lines(home / "web1/marks") == 1
    assert (home / "web2/.local/state/corra/books/up/OPS-1.jsonl").exists()


@pytest.mark.parametrize("host", ["local"], indirect=True)
def test_without_its_journal_the_hosts_still_know(host: str, home: Path) -> None:
    marks, bad = home / "marks", home / "bad"
    bad.touch()

    def once() -> None:
        with book() as it:
            it.run(host, append(marks, "echo out"), step="one")
            it.run(host, append(home / "again", f"test ! -e {bad}"), step="two")

    with pytest.raises(corra.Failed):
        once()
    bad.unlink()
    (home / ".local/state/corra/books/up/OPS-1.jsonl").unlink()
    once()
    assert (lines(marks), lines(home / "again")) == (1, 2)


def test_without_its_journal_another_command_is_refused_by_the_host(home: Path) -> None:
    with book() as it:
        it.run("local", ["echo", "a"], step="one")
    (home / ".local/state/corra/books/up/OPS-1.jsonl").unlink()
    with (
        pytest.raises(corra.Changed, match="was begun on local as another command") as caught,
        book() as it,
    ):
        it.run("local", ["echo", "b"], step="one")
    assert caught.value.hint[0].startswith("there: echo a")


def test_a_step_begun_by_another_user_is_not_begun_again(sshd: Sshd, home: Path) -> None:
    """Another login has other runs. This login can't see the first login's run, and must not repeat
    it.
    """
    where = journals.Journal(ledgers.Here(), "up", "OPS-1")
    where.write("open", params={})
    prog_id = ids.derived("runbook", "up", "OPS-1", "one", "h", 1)
    where.write(
        "begin",
        step="one",
        host="h",
        attempt=1,
        prog_id=prog_id,
        program={"argv": ["true"]},
        user="somebody",
    )
    with pytest.raises(corra.Changed) as caught, book() as it:
        it.run("h", ["true"], step="one")
    assert caught.value.hint[0] == f"user: was somebody, now {user()}"


@pytest.mark.parametrize("host", ["h"], indirect=True)
def test_two_passes_at_once_come_to_the_same_runs(host: str, home: Path) -> None:
    marks = home / "marks"
    argv = append(marks, "sleep 1; echo ended")
    both = [begin(home, host, None, argv) for _ in range(2)]
    for each in both:
        out, err = each.communicate(timeout=60)
        assert each.returncode == 0 and "ended" in out, err
    assert lines(marks) == 1


def test_a_start_whose_link_breaks_is_found_by_the_next_pass(sshd: Sshd, home: Path) -> None:
    """The connection ends after so many bytes, anywhere in the step, and the pass gives up."""
    with Proxy(sshd.port) as proxy:
        sshd.add_host("p", Port=proxy.port, HostKeyAlias=f"[127.0.0.1]:{sshd.port}")
        corra.run("p", ["true"])
        for n, size in enumerate(range(2400, 4800, 800)):
            marks = home / f"marks{n}"
            proxy.limit(size, "reset")
            for last in (False, True):
                if last:
                    proxy.limit(None)
                with (
                    contextlib.suppress(*(() if last else (corra.CorraError,))),
                    book(f"K{n}", reconnect_timeout=0.1, connect_timeout=1) as it,
                ):
                    it.run("p", append(marks), step="one")
            assert lines(marks) == 1


@pytest.mark.parametrize("host", ["h"], indirect=True)
def test_ctrl_c_leaves_the_step_running_and_says_so(host: str, home: Path) -> None:
    marks, go = home / "marks", home / "go"
    argv = append(marks, f"while [ ! -e {go} ]; do sleep 0.05; done; echo ended")
    first = begin(home, host, None, argv)
    wait_for(lambda: lines(marks))
    wait_for(lambda: "started" in (home / ".local/state/corra/books/up/OPS-1.jsonl").read_text())
    first.send_signal(signal.SIGINT)
    _, err = first.communicate(timeout=30)
    assert f"corra: up OPS-1: STILL RUNNING: one on {host}" in err
    go.touch()
    second = begin(home, host, None, argv)
    out, err = second.communicate(timeout=60)
    assert "ended" in out and lines(marks) == 1, err


# -- LOST


def lose(state: corra.State) -> None:
    """Kill all guards at once, and then the program."""
    for pid in (*state.standby_pids, state.agent_pid):
        os.kill(pid or 0, signal.SIGSTOP)
    for pid in (*state.standby_pids, state.agent_pid, state.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid or 0, signal.SIGKILL)


def lost_step(host: str, marks: Path) -> corra.Lost:
    """Run a step that gets lost; return the error of the pass."""
    prog_id = ids.derived("runbook", "up", "OPS-1", "one", host, 1)

    def kill() -> None:
        wait_for(lambda: lines(marks))
        lose(corra.attach(prog_id, host).state())

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        with pytest.raises(corra.Lost) as caught, book() as it:
            it.run(host, append(marks, "exec sleep 30"), step="one", warn=True, max_fail=5)
    finally:
        thread.join()
    return caught.value


@pytest.mark.parametrize("host", ["h"], indirect=True)
def test_lost_is_never_repeated_by_itself_and_a_person_may_have_it_redone(
    host: str, home: Path, cli: Cli
) -> None:
    marks = home / "marks"
    error = lost_step(host, marks)
    assert error.code == 123 and error.line.startswith(
        f"corra: up OPS-1: STOPPED at 1 one: {host} LOST:"
    )
    assert (
        error.hint[0].startswith("look whether it finished (its output: corra logs ")
        and len(error.hint[0]) <= 73
    )
    assert error.hint[1] == "corra book up OPS-1 --redo one    (or --skip one)"
    for _ in range(2):
        with pytest.raises(corra.Lost), book() as it:
            it.run(host, append(marks, "exec sleep 30"), step="one", warn=True)
    assert lines(marks) == 1
    said = cli("book", "up", "OPS-1", "--redo", "one")
    assert (said.returncode, said.stdout) == (
        0,
        b"",
    ) and f"one on {host}: to be done anew" in said.stderr.decode()
    with book() as it:
        assert it.run(host, append(marks), step="one").ok
    assert lines(marks) == 2


def test_a_lost_step_may_be_left_out(home: Path, cli: Cli) -> None:
    marks = home / "marks"
    lost_step("local", marks)
    assert cli("book", "up", "OPS-1", "--skip", "one").returncode == 0
    with book() as it:
        result = it.run("local", append(marks, "exec sleep 30"), step="one")
        assert result.skipped and result.state.state == "lost" and not result.ok
        assert it.run("local", ["true"], step="two").ok
    assert lines(marks) == 1


@pytest.mark.parametrize("host", ["local"], indirect=True)
def test_a_run_whose_record_was_deleted_is_lost_and_not_begun_again(host: str, home: Path) -> None:
    import shutil

    marks = home / "marks"
    first = begin(home, host, None, append(marks, "exec sleep 0.5"))
    wait_for(lambda: lines(marks))
    wait_for(lambda: "started" in (home / ".local/state/corra/books/up/OPS-1.jsonl").read_text())
    first.kill()
    first.communicate()
    prog_id = ids.derived("runbook", "up", "OPS-1", "one", host, 1)
    corra.attach(prog_id, host).wait(20)
    record = agent.Run(str(home / ".local/state/corra"), prog_id)
    wait_for(lambda: not record.alive())  # its guards still write late bytes
    record.close()
    shutil.rmtree(record.path)
    with pytest.raises(corra.Lost, match="LOST: its spool was deleted"), book() as it:
        it.run(host, append(marks, "exec sleep 0.5"), step="one")
    assert lines(marks) == 1


# -- inv book


def test_the_book_verb_lists_shows_and_exports(home: Path, cli: Cli) -> None:
    with pytest.raises(corra.Failed), book(params={"to": 17}) as it:
        it.run("local", ["echo", "hi"], step="one")
        it.note("half-way | there")
        it.do("count", sorted, [2, 1])
        it.run("local", ["false"], step="two")
    listed = cli("book").stdout.decode().splitlines()
    assert (
        listed[0].split() == ["RUNBOOK", "KEY", "STATE", "BEGUN", "BY", "JOURNAL"]
        and "up       OPS-1  STOPPED at 3 two" in listed[1]
    )
    shown = cli("book", "up", "OPS-1").stdout.decode()
    assert (
        "to=17" in shown
        and "FAILED 1" in shown
        and "sorted([2, 1])" in shown
        and "note: half-way | there" in shown
    )
    text = cli("book", "up", "OPS-1", "--markdown").stdout.decode()
    assert (
        "| 3 | two | local | 1 |" in text
        and "sorted(\\[2, 1\\])" in text
        and "half-way \\| there" in text
    )
    told = json.loads(cli("book", "up", "OPS-1", "--json").stdout)
    assert told["event"] == "book" and [each["state"] for each in told["steps"]] == [
        "done",
        "done",
        "FAILED 1",
    ]
    here = told["steps"][1]
    assert (
        (here["function"], here["args"], here["result"]) == ("sorted", [[[2, 1]], {}], [1, 2])
        and "@" in here["by"]
        and here["ended"]
    )
    assert (
        told["params"] == {"to": 17}
        and told["steps"][0]["argv"] == ["echo", "hi"]
        and "hi\\n" not in json.dumps(told["events"])
    )


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["up", "NIX"], 125, "up NIX: NOT FOUND: no journal of it here"),
        (["up", "OPS-1", "--redo", "nix"], 2, "no step 'nix': begun are one"),
        (["up", "OPS-1", "--redo", "one@web9"], 2, "one was never begun on web9 but on local"),
        (["up", "OPS-1", "--skip", "one"], 2, "one is done; there is nothing to skip"),
        (["up", "--skip", "one"], 2, "--redo and --skip need NAME and KEY"),
    ],
)
def test_the_book_verb_refuses_what_makes_no_sense(
    home: Path, cli: Cli, words: list[str], code: int, said: str
) -> None:
    with book() as it:
        it.run("local", ["true"], step="one")
    done = cli("book", *words)
    assert done.returncode == code and said in done.stderr.decode()


def test_the_book_verb_finds_a_journal_on_another_host(
    two: list[str], home: Path, cli: Cli
) -> None:
    with pytest.raises(corra.Failed), book(journal="web2") as it:
        it.run("web1", ["false"], step="one")
    # On this machine book finds the journal by the runbook's way; on another, by --host or the
    # configuration.
    assert "journal on web2" in cli("book", "up", "OPS-1").stdout.decode()
    assert "web2" in cli("book").stdout.decode().splitlines()[1]
    elsewhere = home / "elsewhere"
    elsewhere.mkdir()
    away = home_environment(elsewhere)
    assert cli("book", "up", "OPS-1", env=away).returncode == 125
    assert "FAILED 1" in cli("book", "--host", "web2", "up", "OPS-1", env=away).stdout.decode()
    assert (
        cli(
            "book", "up", "OPS-1", "--skip", "one", env={**away, "CORRA_JOURNAL": "web2"}
        ).returncode
        == 0
    )
    with book(journal="web2") as it:
        assert it.run("web1", ["false"], step="one").skipped


def test_redo_of_a_done_runbook_opens_it_again_for_that_step_alone(home: Path, cli: Cli) -> None:
    marks = home / "marks"
    for n in (1, 2, 3):
        with book() as it:
            it.run("local", append(marks), step="one")
            it.run("local", append(home / "other"), step="two")
        assert lines(marks) == min(n, 2)
        if n == 1:
            assert cli("book", "up", "OPS-1", "--redo", "one@local").returncode == 0
    assert lines(home / "other") == 1


# -- Steps here, notes, questions


def test_do_calls_once_and_gives_json_again(home: Path) -> None:
    calls: list[int] = []

    def work(n: int, *, to: str) -> dict[str, Any]:
        calls.append(n)
        return {"n": n, "to": to, "list": (1, 2)}

    for _ in range(2):
        with contextlib.suppress(corra.Stop), book() as it:
            assert it.do("one", work, 3, to="x") == {"n": 3, "to": "x", "list": [1, 2]}
            raise corra.Stop("x")
    assert calls == [3]
    with pytest.raises(corra.Changed, match="with another list of arguments"), book() as it:
        it.do("one", work, 4, to="x")
    with pytest.raises(corra.Changed, match="with another function"), book() as it:
        it.do("one", dict, 3, to="x")
    with pytest.raises(corra.Misuse, match="must be JSON"), book("K2") as it:
        it.do("one", object)
    with pytest.raises(ZeroDivisionError), book("K3") as it:
        it.do("one", lambda: 1 // 0)


def test_a_note_is_written_once(home: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        with contextlib.suppress(corra.Stop), book() as it:
            it.note("old kernel kept")
            raise corra.Stop("x")
    assert capfd.readouterr().err.count("corra: up OPS-1: old kernel kept") == 1


def test_a_question_without_a_person_stops_and_skip_is_a_yes(home: Path, cli: Cli) -> None:
    def once() -> None:
        with book() as it:
            it.confirm("reboot web[1-2]?", step="go-1")

    with pytest.raises(corra.Stop) as caught:
        once()
    assert (
        caught.value.line
        == "corra: up OPS-1: STOPPED at 1 go-1: reboot web[1-2]?: nobody here to say yes"
    )
    assert cli("book", "up", "OPS-1", "--skip", "go-1").returncode == 0
    once()


def test_a_yes_to_another_question_is_none_to_this_one(
    home: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli
) -> None:
    with contextlib.suppress(corra.Stop), book() as it:
        it._journal.write("confirmed", step="go", question="drop the copy?")
        raise corra.Stop("not yet")
    for _ in range(2):
        with contextlib.suppress(corra.Stop), book() as it:
            it.confirm("drop the copy?", step="go")
            raise corra.Stop("not yet")
    with pytest.raises(corra.Changed) as caught, book() as it:
        it.confirm("drop the original?", step="go")
    assert (
        caught.value.line == "corra: up OPS-1: NOT CONTINUED: 1 go was begun with another question"
    )
    assert caught.value.hint[0] == "question: was drop the copy?, now drop the original?"
    assert cli("book", "up", "OPS-1", "--redo", "go").returncode == 0
    with pytest.raises(corra.Stop, match="nobody here to say yes"), book() as it:
        it.confirm("drop the original?", step="go")


ASK = """
import corra
with corra.runbook("up", key="OPS-1") as book:
    book.confirm("really?", step="go")
print("went on", flush=True)
"""


def test_a_person_is_asked_once(home: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm"}
    asking = functools.partial(subprocess.Popen, [sys.executable, "-c", ASK], env=env)
    for answer, went_on, asked in (("n", False, True), ("y", True, True), ("", True, False)):
        with Terminal(asking) as terminal:
            terminal.type("y\n")  # a line typed before the question isn't an answer
            if asked:
                terminal.until("[y/N]")
                terminal.type(f"{answer}\n")
            assert (terminal.end() == 0) is went_on
        assert ("went on\r\n" in terminal.text) is went_on
        assert asked or "[y/N]" not in terminal.text


# -- The journal


def test_a_journal_that_cant_be_reached_stops_before_anything_is_begun(home: Path) -> None:
    with pytest.raises(corra.Unreachable) as caught, book(journal="127.0.0.1:1", connect_timeout=5):
        pytest.fail("the body ran")
    assert caught.value.code == 125 and "NOT STARTED: connection refused" in caught.value.line


def test_a_journal_that_is_away_for_a_while_loses_nothing(
    sshd: Sshd, home: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with Proxy(sshd.port) as proxy:
        sshd.add_host("p", Port=proxy.port, HostKeyAlias=f"[127.0.0.1]:{sshd.port}")
        said: list[str] = []

        def told() -> bool:
            said.append(capfd.readouterr().err)
            return "p: journal: link lost" in "".join(said)

        def come_back() -> None:
            try:
                wait_for(told)
            finally:
                proxy.refuse(False)

        with book(journal="p", connect_timeout=3) as it:
            it.run("local", ["true"], step="one")
            proxy.refuse()
            proxy.reset()
            back = threading.Thread(target=come_back)
            back.start()
            it.run("local", ["true"], step="two")
            back.join()
    assert "p: journal: link back" in "".join(said) + capfd.readouterr().err
    read = journals.Journal(ledgers.ledger_on("p"), "up", "OPS-1").read()
    assert [part.done for part in read.parts.values()] == [True, True] and read.done is not None


def test_the_journal_holds_no_secret(host: str, home: Path) -> None:
    with book() as it:
        it.run(
            host,
            ["sh", "-c", "echo ${#TOKEN}"],
            step="one",
            secrets={"TOKEN": "hunter2hunter2"},
            env={"A": "hunter3hunter3"},
        )
    for secret in ("hunter2", "hunter3"):
        found = subprocess.run(
            ["grep", "-r", secret, home / ".local/state/corra/books"],
            capture_output=True,
            check=False,
        )
        assert found.stdout == b""


# -- Reboots


def test_a_reboot_is_a_result_and_happens_once(machine: Path, home: Path) -> None:
    marks = home / "marks"
    for _ in range(2):
        with contextlib.suppress(corra.Stop), book() as it:
            found = it.reboot("m", step="reboot", argv=reboot_order(machine, marks), timeout="20s")
            assert (found.old_boot[:4], found.new_boot) == (
                "1111",
                NEXT_BOOT,
            ) and 0 < found.down_s < 20
            raise corra.Stop("later")
    assert lines(marks) == 1


def test_a_pass_that_dies_in_a_reboot_finds_the_host_rebooted(machine: Path, home: Path) -> None:
    """The pass gives the order and is killed, and the host goes down. The next pass gives no second
    order.
    """
    marks = home / "marks"
    order = ["sh", "-c", f"echo ran >> {marks}"]
    code = (
        "import sys, corra\nwith corra.runbook('up', key='OPS-1') as book:\n"
        "    book.reboot('m', step='reboot', argv=sys.argv[1:], timeout='60s')\n"
    )
    first = subprocess.Popen(
        [sys.executable, "-c", code, *order], env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=home
    )
    try:
        wait_for(lambda: lines(marks))
    finally:
        first.kill()
        first.wait()
    machine.write_text(NEXT_BOOT + "\n")
    with book() as it:
        found = it.reboot(["m"], step="reboot", argv=order, timeout="20s")
    assert found[corra.Host("m")].new_boot == NEXT_BOOT
    assert lines(marks) == 1


def test_a_host_that_doesnt_reboot_stops_the_runbook(machine: Path, home: Path) -> None:
    with pytest.raises(corra.TimedOut) as caught, book() as it:
        it.reboot("m", step="reboot", argv=["true"], timeout="1s")
    assert (
        caught.value.line
        == "corra: up OPS-1: STOPPED at 1 reboot: m NOT REBOOTED: not rebooted in 1.0 s"
        and caught.value.code == 124
    )
    with pytest.raises(corra.Failed, match="exit 3"), book("K2") as it:
        it.reboot("m", step="reboot", argv=["sh", "-c", "exit 3"], timeout="20s")


# -- From threads and coroutines


def test_steps_may_be_run_from_several_threads(home: Path) -> None:
    async def main() -> list[str]:
        with book() as it:
            calls = [
                asyncio.to_thread(
                    it.run, "local", ["sh", "-c", f"sleep 0.2; echo {n}"], step=f"s{n}"
                )
                for n in range(6)
            ]
            return [result.stdout for result in await asyncio.gather(*calls)]

    assert asyncio.run(main()) == [f"{n}\n" for n in range(6)]


def test_a_coroutine_that_is_cancelled_leaves_its_thread_and_the_program_runs_on(
    host: str, home: Path
) -> None:
    """As docs/python.md says: nothing can cancel a thread, but closing a follow ends it."""

    async def watch(run: corra.Run) -> None:
        follow = run.follow()
        try:
            await asyncio.to_thread(list, follow)
        finally:
            follow.close()

    async def main() -> corra.Run:
        run = await asyncio.to_thread(corra.start, host, append(home / "marks", "exec sleep 60"))
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(watch(run), 0.5)
        return run

    run = asyncio.run(main())  # joins the threads
    assert run.state().state == "running" and run.kill(grace=0).ended


def test_the_api_may_be_called_from_coroutines(host: str) -> None:
    async def main() -> list[str]:
        results = await asyncio.gather(
            *(asyncio.to_thread(corra.run, host, ["echo", str(n)], hide=True) for n in range(6))
        )
        return [result.stdout for result in results]

    assert asyncio.run(main()) == [f"{n}\n" for n in range(6)]
