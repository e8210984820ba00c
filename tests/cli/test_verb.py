"""The command line: words that Invoke's parser gets wrong, and refusals in corra's own words."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings, strategies as st
from invoke.context import Context
from invoke.exceptions import Exit
from invoke.parser.context import ParserContext
from invoke.parser.parser import Parser
from invoke.program import Program

import warm
from corra import tasks
from corra.cli.verb import Verb

pytestmark = pytest.mark.invoke

ROOT = Path(__file__).resolve().parents[2]
TASKS = """
import json, sys
from invoke import task
from corra.cli.verb import verb
from corra.cli.words import Given, listing, option, switch
from corra.model.units import parse_seconds

def told(given):
    return json.dumps({k: v for k, v in vars(given).items() if k != "screen"}, default=str)

class Host(Given):
    host = listing("host", "H", "hosts", takes="HOST", help="Where.")

class Kill(Host):
    signal = option("signal", "s", takes="SIG", help="Which.")
    tail = option("tail", "n", takes="N", read=int, help="Lines.")
    all = switch("all", "a", help="All.")

class Run(Host):
    detach = switch("detach", "d", help="Leave.")
    timeout = option("timeout", "T", takes="TIME", read=parse_seconds, help="End.")

class Ps(Host):
    all = switch("all", "a", help="All.")

@verb(Kill, ids="ID..", fate="NOT KILLED")
def kill(c, given):
    "Stop runs: inv kill ID.."
    print("kill", told(given))

@verb(Run, command=True, fate="NOT STARTED")
def run(c, given):
    "Start: inv run --host h -- cmd"
    print("run", told(given))

@verb(Ps)
def ps(c, given):
    "List runs."
    print("ps", told(given))

@task
def deploy(c, what="", verbose=False):
    print("deploy", what, verbose)
"""

Inv = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def inv(home: Path, tmp_path: Path) -> Inv:
    """`inv` of this Python, with those tasks."""
    (tmp_path / "tasks.py").write_text(TASKS)
    return functools.partial(warm.run, program="inv", cwd=tmp_path)


def told(done: subprocess.CompletedProcess[str], verb: str) -> dict[str, Any]:
    """Return the arguments that the verb printed on its line."""
    assert done.returncode == 0, done.stderr
    line = next(each for each in done.stdout.splitlines() if each.startswith(verb + " "))
    return dict(json.loads(line[len(verb) :]))


@pytest.mark.parametrize("ids", [[], ["a"], ["a", "b", "c"], ["kill"]])
def test_a_verb_takes_many_ids_or_none(inv: Inv, ids: list[str]) -> None:
    assert told(inv("kill", *ids), "kill")["ids"] == ids


def test_flags_may_stand_before_between_and_behind_the_ids(inv: Inv) -> None:
    given = told(inv("kill", "-s", "HUP", "a", "-an5", "b", "--hosts=h1,h2", "-H", "h3"), "kill")
    assert (given["ids"], given["signal"], given["all"], given["tail"], given["host"]) == (
        ["a", "b"],
        "HUP",
        True,
        5,
        ["h1,h2", "h3"],
    )


def test_the_command_keeps_its_words_exactly(inv: Inv) -> None:
    words = ["sh", "-c", "a  b", "", "--x", "-H", "--", "a\nb", "$HOME", "'\"\\"]
    given = told(inv("run", "-H", "db1", "-dT", "2h", "--", *words), "run")
    assert (given["argv"], given["detach"], given["timeout"], given["host"]) == (
        words,
        True,
        7200.0,
        ["db1"],
    )


def test_a_verb_after_a_verb_is_run_too(inv: Inv) -> None:
    done = inv("kill", "a", "-s", "HUP", "ps", "-a", "run", "-d", "--", "true")
    assert told(done, "kill")["ids"] == ["a"]
    assert told(done, "ps")["all"]
    assert told(done, "run")["argv"] == ["true"]


def test_other_tasks_are_left_alone_even_if_a_verbs_name_is_among_their_words(inv: Inv) -> None:
    done = inv("deploy", "--what", "run", "-v")
    assert (done.returncode, done.stdout) == (0, "deploy run True\n")
    assert told(inv("deploy", "kill", "x"), "kill")["ids"] == ["x"]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            "run --host db1 uptime",
            "corra: NOT STARTED: no -- before the command:  inv run --host db1 -- uptime",
        ),
        (
            "run --host db1 ls -l /tmp",
            "corra: NOT STARTED: no -- before the command:  inv run --host db1 -- ls -l /tmp",
        ),
        ("run --host db1", "corra: NOT STARTED: no command:  inv run --host db1 -- COMMAND"),
        ("run --host db1 --", "corra: NOT STARTED: no command:  inv run --host db1 -- COMMAND"),
        ("run --host -- true", "corra: NOT STARTED: --host needs a value"),
        ("run --host= -- true", "corra: NOT STARTED: --host needs a value"),
        ("run --host -d -- true", "corra: NOT STARTED: --host needs a value"),
        (
            "run -T soon -- true",
            "corra: NOT STARTED: -T: not a duration: 'soon' (say 30s, 5m, 2h or 14d)",
        ),
        (
            "run -H h x -- true",
            "corra: NOT STARTED: 'x' stands before the --;  the command goes after it",
        ),
        ("kill x -f", "corra: NOT KILLED: kill has no -f;  inv --help kill lists its flags"),
        ("kill -w x", "corra: NOT KILLED: kill has no -w;  inv --help kill lists its flags"),
        ("kill --pty x", "corra: NOT KILLED: kill has no --pty;  inv --help kill lists its flags"),
        ("kill -c other x", "corra: NOT KILLED: kill has no -c;  inv --help kill lists its flags"),
        (
            "kill --such=1 x",
            "corra: NOT KILLED: kill has no --such;  inv --help kill lists its flags",
        ),
        ("kill -s TERM -s KILL x", "corra: NOT KILLED: -s is given twice"),
        ("kill -n five x", "corra: NOT KILLED: -n: not a number: 'five'"),
        ("kill --all=yes", "corra: NOT KILLED: --all takes no value"),
        ("kill x -- true", "corra: NOT KILLED: kill takes no -- and no command"),
        ("ps db1", "corra: NOT DONE: ps takes no word: 'db1';  a host is  inv ps --host HOST"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name_and_runs_nothing(
    inv: Inv, words: str, line: str
) -> None:
    done = inv(*words.split())
    assert (done.returncode, done.stdout, done.stderr) == (2, "", line + "\n")


def test_a_refusal_is_json_where_json_is_wanted(inv: Inv) -> None:
    done = inv("kill", "--json", "-f")
    error = json.loads(done.stdout)
    assert (done.returncode, done.stderr) == (2, "")
    assert (error["type"], error["kind"], error["exit_code"], error["started"]) == (
        "error",
        "misuse",
        2,
        "no",
    )


@pytest.mark.parametrize(
    "words",
    [
        ("kill", "--help"),
        ("kill", "-h"),
        ("kill", "x", "--help"),
        ("run", "--help"),
        ("run", "-h", "--", "x"),
    ],
)
def test_help_behind_the_verb_is_help(inv: Inv, words: tuple[str, ...]) -> None:
    done = inv(*words)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"Usage: inv {words[0]} [flags]")
    for shown in (done.stdout, inv("--help", words[0]).stdout):
        assert "-H, --host" in shown
        assert "Where." in shown


def test_invokes_own_dry_echo_and_hide_count_before_and_behind_the_verb(inv: Inv) -> None:
    for words in (
        ("-R", "-e", "--hide=out", "run", "--", "x"),
        ("run", "-Re", "--hide", "out", "--", "x"),
    ):
        given = told(inv(*words), "run")
        assert (given["dry"], given["echo"], given["hide"]) == (True, True, "out")


def test_the_list_of_tasks_shows_each_verbs_first_line(inv: Inv) -> None:
    assert "run      Start: inv run --host h -- cmd" in inv("--list").stdout


def test_flags_are_completed_by_invoke(inv: Inv) -> None:
    assert "--detach" in inv("--complete", "--", "inv", "run", "--").stdout.split()
    assert {"kill", "run", "deploy"} <= set(inv("--complete", "--", "inv", "").stdout.split())


def test_ids_and_names_are_completed_from_history(inv: Inv) -> None:
    from corra.runs import history

    history.remember_run(history.Entry("20261123t014409z-k7m2qxwp", "db1", name="migrate"))
    history.remember_run(history.Entry("pay-20261123", "db1"))
    assert set(inv("--complete", "--", "inv", "kill").stdout.split()) == {
        "k7m2qx",
        "migrate",
        "pay-20261123",
    }
    assert inv("--complete", "--", "inv", "kill", "x", "k7").stdout.split() == ["k7m2qx"]
    assert inv("--complete", "--", "inv", "kill", "-s", "mi").stdout.split() != ["migrate"]


# -- Invoke's parser takes exactly the tokens that the verb promises

pieces = st.one_of(
    st.sampled_from(("x", "k7m2qx", "5", "2h", "-", "---", "run", "ps", "kill")),
    st.sampled_from(
        (
            "-s",
            "-sTERM",
            "-aq",
            "-qan5",
            "-n",
            "-q=1",
            "-Hh=1",
            "-abc=--d=-efg",
            "-h",
            "-R",
            "-e",
            "-w",
            "-c",
            "-T",
            "-f=",
        )
    ),
    st.sampled_from(
        (
            "--host",
            "--host=h",
            "--host=--x=y",
            "--help",
            "--hide",
            "--echo",
            "--config=x",
            "--no-such",
        )
    ),
)
words_of_any_kind = st.lists(
    pieces | st.text(max_size=6).filter(lambda word: word != "--"), max_size=7
)


@pytest.mark.storm
@settings(max_examples=500, deadline=None)
@given(st.sampled_from([tasks.kill, tasks.attach, tasks.ps, tasks.run]), words_of_any_kind)
@example(tasks.kill, ["--help", "x"])
@example(tasks.kill, ["-qan=5", "x"])
def test_whatever_follows_a_verb_invoke_hands_the_verb_its_own_reading(
    verb: Verb, words: list[str]
) -> None:
    """Invoke raises no ParseError, so it gives no answer of its own. Where another verb's name ends
    the words, the rest belongs to that verb.
    """
    before = sys.argv
    sys.argv = ["inv", verb.name, *words]
    try:
        line = verb.read(words)
        contexts = [ParserContext(name=each.name, args=each.get_arguments()) for each in (verb,)]
        own = [*words[: line.taken]]
        parsed = Parser(initial=Program().initial_context, contexts=contexts).parse_argv(
            [verb.name, *own]
        )
    finally:
        sys.argv = before
    assert [each.name for each in parsed] == [None, verb.name]
    assert parsed[1].as_kwargs["given"].ids == line.given.ids


# -- From Python


def test_a_verb_called_as_a_function_takes_words_and_flags(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(Exit) as caught:
        tasks.kill(Context(), "x", "y", all=True)
    assert caught.value.code == 2
    assert capfd.readouterr().err == "corra: NOT KILLED: -a and an id exclude each other\n"


def test_a_flag_that_is_none_is_a_type_error_in_python() -> None:
    with pytest.raises(TypeError, match="no_such"):
        tasks.kill(Context(), no_such=1)


def test_the_first_argument_of_a_verb_is_a_context() -> None:
    with pytest.raises(TypeError, match="Context"):
        tasks.kill("x")


# -- Flags are typed


USE = """
from corra.cli.flags import KillFlags, RunFlags
from corra.cli.verb import verb


@verb({kind})
def body(c: object, given: RunFlags) -> int:
    grace: {grace} = given.{name}
    return 0 if grace is None else 1
"""


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("kind", "grace", "name", "refused"),
    [
        ("RunFlags", "float | None", "grace", ""),
        ("RunFlags", "float | None", "grcae", 'has no attribute "grcae"'),
        ("RunFlags", "str | None", "grace", "Incompatible types in assignment"),
        ("KillFlags", "float | None", "grace", "incompatible type"),
    ],
)
def test_a_wrong_name_or_type_of_a_flag_is_an_error_of_mypy(
    tmp_path: Path, kind: str, grace: str, name: str, refused: str
) -> None:
    (tmp_path / "use.py").write_text(USE.format(kind=kind, grace=grace, name=name))
    done = subprocess.run(
        [
            *(sys.executable, "-m", "mypy", "--strict", str(tmp_path / "use.py")),
            *("--cache-dir", str(ROOT / ".mypy_cache" / "user")),
        ],
        cwd=tmp_path,
        env={**os.environ, "MYPYPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert (done.returncode == 0) == (not refused), done.stdout
    assert refused in done.stdout


def test_each_verb_declares_a_flag_once() -> None:
    """Two flags of one verb never share a spelling: the verb would never read the second."""
    from corra.cli.verb import VERBS

    for verb in VERBS.values():
        spelt = [name for flag in verb.flags for name in flag.names]
        assert len(spelt) == len(set(spelt)), (verb.name, spelt)
