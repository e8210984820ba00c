"""The errors: one grammar, one line, and the right exit code in a user's task, on either Invoke."""

from __future__ import annotations

import pickle
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from hypothesis import given, strategies as st
from invoke.exceptions import Exit, UnexpectedExit
from invoke.runners import Result

from corra import errors
from corra.model.host import Host
from corra.model.refusals import refusal_error
from properties import PROPERTY

TREE = [
    each
    for each in vars(errors).values()
    if isinstance(each, type) and issubclass(each, errors.CorraError)
]
PLAIN = [each for each in TREE if not issubclass(each, errors.Failed)]
ENDS = [each for each in TREE if issubclass(each, errors.Failed)]


def test_the_first_line_says_which_run_where_what_became_of_it_and_why():
    assert (
        errors.line("migrate (k7m2qx)", "db1", "LOST", "db1 rebooted")
        == "corra: migrate (k7m2qx) on db1: LOST: db1 rebooted"
    )
    assert (
        errors.line("", "db9", "NOT STARTED", "no answer") == "corra: db9: NOT STARTED: no answer"
    )
    assert errors.line("k7", "", "NOT FOUND") == "corra: k7: NOT FOUND"
    assert errors.line("", "", "NOT STARTED", "no host") == "corra: NOT STARTED: no host"


@PROPERTY
@given(st.text(), st.text(), st.text(), st.lists(st.text(), max_size=3))
def test_whatever_a_host_says_stays_one_line_that_does_nothing_to_a_terminal(
    label, host, why, hint
):
    error = errors.NotStarted(why, host=host, label=label, hint=hint)
    assert error.line.isprintable()
    assert len(str(error).split("\n")) == 1 + len(hint)
    assert all(each.isprintable() for each in str(error).split("\n"))
    assert error.line.startswith("corra: ")


def test_what_was_quoted_can_still_be_read():
    assert (
        errors.plain("sudo: a password\nis required\x1b[31m\t\udcff é")
        == "sudo: a password is required\\x1b[31m \\udcff é"
    )


def test_hints_stand_below_the_line_and_are_indented_like_it():
    error = errors.NotFound("say where", label="k7", hint=["one", "two"])
    assert str(error) == "corra: k7: NOT FOUND: say where\n       one\n       two"


@pytest.mark.parametrize("kind", PLAIN)
def test_each_is_an_exit_of_invokes_with_a_fate_and_a_code(kind):
    error = kind("why", host="h")
    assert issubclass(kind, Exit)
    assert error.code == kind.exit_code != 0
    assert error.line == f"corra: h: {kind.fate}: why"
    assert re.fullmatch(r"[A-Z]+( [A-Z]+)*", error.fate)
    assert error.started in ("no", "yes", "unknown")


def test_the_codes_are_those_the_shell_sees():
    assert errors.Misuse().code == 2
    assert errors.StillRunning().code == 122
    assert errors.Lost().code == errors.MaybeStarted().code == 123
    assert (
        errors.Unreachable().code
        == errors.HostKey().code
        == errors.NotFound().code
        == errors.Conflict().code
        == 125
    )
    assert errors.NotStarted(code=127).code == 127
    assert errors.NotDead().code == 1


def test_only_what_is_certain_counts_as_not_started():
    assert errors.MaybeStarted.started == "unknown"
    assert all(kind.started == "no" for kind in PLAIN if issubclass(kind, errors.NotStarted))
    assert errors.Unreachable.started == "no"
    assert errors.Lost.started == errors.StillRunning.started == "yes"


@pytest.mark.parametrize("kind", ENDS)
def test_a_bad_end_is_caught_as_invokes_own_error(kind):
    with pytest.raises(UnexpectedExit) as caught:
        raise kind("exit 7", result=Result(stdout="out", exited=7), host="h", label="x", code=7)
    assert caught.value.result.stdout == "out"
    assert caught.value.result.exited == 7
    assert str(caught.value) == f"corra: x on h: {kind.fate}: exit 7"
    assert "exit 7" in repr(caught.value)


@pytest.mark.parametrize("kind", TREE)
def test_each_passes_through_a_process_pool_whole(kind):
    facts = {"host": "h", "label": "x", "hint": ["one"], "code": 7}
    error = kind("why", **facts, **({"result": Result(stdout="out")} if kind in ENDS else {}))
    again = pickle.loads(pickle.dumps(error))
    assert (
        type(again) is kind
        and str(again) == str(error)
        and (again.code, again.hint, again.to_json()) == (7, ("one",), error.to_json())
    )
    assert kind in PLAIN or again.result.stdout == "out"


def test_json_says_the_same_as_the_line():
    error = errors.HostKey("unknown", host="db1", hint=["ssh db1 true"])
    assert error.to_json() == {
        "v": 1,
        "type": "error",
        "kind": "host_key",
        "host": "db1",
        "prog_id": None,
        "started": "no",
        "message": "corra: db1: NOT STARTED: unknown",
        "hint": ["ssh db1 true"],
        "exit_code": 125,
    }


def test_without_a_result_there_is_still_one_for_invoke_to_exit_with():
    assert errors.TimedOut("2 h", result=None).result.exited == 124


TASKS = """
    from invoke import Result, UnexpectedExit, task
    from corra import errors

    @task
    def away(c):
        raise errors.Unreachable("no answer", host="db9", hint=["ssh db9 true"])

    @task
    def failed(c, hidden=False):
        result = Result(exited=7, stdout="OUT", hide=("stdout", "stderr") if hidden else ())
        raise errors.Failed("exit 7", result=result, host="db1", label="k7", code=7)

    @task
    def timed_out(c):
        raise errors.TimedOut("2 h", result=Result(exited=143), host="db1", label="k7")

    @task
    def caught(c):
        try:
            failed(c)
        except UnexpectedExit as error:
            print(error.result.exited, error.result.stdout)
"""


@pytest.fixture
def inv(tmp_path: Path) -> list[str]:
    """A user's own tasks.py, and `inv` for it."""
    (tmp_path / "tasks.py").write_text(textwrap.dedent(TASKS))
    return [
        sys.executable,
        "-c",
        "from invoke.main import program; program.run()",
        "--search-root",
        str(tmp_path),
    ]


def call(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        argv, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL, check=False
    )


@pytest.mark.invoke
@pytest.mark.parametrize(
    "words, code, said",
    [
        (["away"], 125, "corra: db9: NOT STARTED: no answer\n       ssh db9 true\n"),
        (["failed"], 7, "corra: k7 on db1: FAILED: exit 7\n"),
        (["failed", "--hidden"], 7, "corra: k7 on db1: FAILED: exit 7\n"),
        (["timed-out"], 124, "corra: k7 on db1: TIMEOUT: 2 h\n"),
    ],
)
def test_in_anybodys_task_it_prints_line_and_hints_and_sets_the_code(inv, words, code, said):
    done = call(*inv, *words)
    assert (done.returncode, done.stdout, done.stderr) == (code, "", said)


@pytest.mark.invoke
def test_a_task_may_catch_it_as_invokes_unexpected_exit(inv):
    done = call(*inv, "caught")
    assert (done.returncode, done.stdout, done.stderr) == (0, "7 OUT\n", "")


def test_a_host_that_kills_programs_at_logout_is_said_with_the_line_that_helps() -> None:
    error = refusal_error("no_linger", {"user": "ops"}, host=Host.parse("web9"), verb="run")
    assert (
        error.line
        == "corra: web9: NOT STARTED: logind there kills programs at logout, linger is off"
    )
    assert error.hint[0].endswith(" run --host web9 --as root -- loginctl enable-linger ops")
    assert (error.code, error.started) == (125, "no")


def test_an_error_with_other_facts_is_another_error() -> None:
    first = errors.HostKey("unknown", host="db1", hint=["compare it"])
    other = first.but(fate="NOT KILLED", label="x")
    assert type(other) is errors.HostKey
    assert other.line == "corra: x on db1: NOT KILLED: unknown" and other.hint == ("compare it",)
    assert first.line == "corra: db1: NOT STARTED: unknown"
    with pytest.raises(TypeError, match="no fete"):
        first.but(fete="NOT KILLED")


def test_no_module_changes_an_error_that_was_raised() -> None:
    """An error gets its facts where it is made, or from `but`, which makes another error."""
    facts = "fate|hint|label|why|kind|prog_id|started|host|results"
    changes = re.compile(rf"^\s*(?:error|refusal|refused)\.(?:{facts}) (?:\+=|=) ", re.MULTILINE)
    package = Path(errors.__file__).parent
    found = [
        str(path.relative_to(package))
        for path in package.rglob("*.py")
        if changes.search(path.read_text())
    ]
    assert found == []
