"""`corra` as it is typed in a hurry: its help, and the nearest right word for a wrong one."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from conftest import Cli

from corra.main import ns

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("words", [(), ("--help",), ("-h",)])
def test_the_help_shows_every_verb_on_a_screen_of_24_rows(cli: Cli, words: tuple[str, ...]) -> None:
    done = cli(*words)
    shown = done.stdout.decode().splitlines()
    assert (done.returncode, done.stderr) == (0, b"")
    assert [line.split()[0] for line in shown if line[:2] == "  " and line[2] != " "] == list(
        ns.tasks
    )
    assert len(shown) < 24
    assert all(len(line) <= 80 for line in shown)


@pytest.mark.parametrize("verb", ns.tasks)
def test_a_help_names_the_program_that_was_typed_and_has_an_example(cli: Cli, verb: str) -> None:
    shown = cli(verb, "--help").stdout.decode()
    assert f"corra {verb}" in " ".join(shown.split())
    assert " inv " not in shown
    assert cli("--help", verb).stdout.decode() == shown


NOT_DONE = "corra: NOT DONE: "
MISTAKES = [
    ("rum --host db1 -- true", NOT_DONE + "no verb 'rum' (did you mean run?);"),
    ("ls", NOT_DONE + "no verb 'ls' (did you mean ps?);"),
    ("stop x", NOT_DONE + "no verb 'stop' (did you mean kill?);"),
    ("xyzzy", NOT_DONE + "no verb 'xyzzy';  corra --help lists the verbs"),
    ("-H db1 run -- a b", NOT_DONE + "-H stands before the verb:  corra run -H db1 -- a b"),
    ("-T 2h ps", NOT_DONE + "-T stands before the verb:  corra ps -T 2h"),
    ("-f /no/such.yaml ps", NOT_DONE + "-f: no such file: /no/such.yaml"),
    ("run db1 uptime", "corra: NOT STARTED: no -- before the command:"),
    ("ps --state runing", NOT_DONE + "--state: no state 'runing' (did you mean running?)"),
    ("ps --state xyzzy", NOT_DONE + "--state: no state 'xyzzy': there are starting, running"),
    ("logs --stream stdot x", NOT_DONE + "--stream: not stdout, stderr or both: 'stdot'"),
    ("ps --hide foo", NOT_DONE + "--hide: not stdout, stderr, both, out or err: 'foo'"),
    ("kill -15 x", "corra: NOT KILLED: kill has no -1 (did you mean -s 15?);"),
    ("run --tiemout 5 -- x", "corra: NOT STARTED: run has no --tiemout (did you mean --timeout?);"),
    ("run --host local -E 1X=3 -- true", "corra: NOT STARTED: -E: '1X' can't be a name"),
]


@pytest.mark.parametrize(("typed", "line"), MISTAKES)
def test_a_wrong_word_is_a_misuse_with_the_nearest_right_one(
    cli: Cli, typed: str, line: str
) -> None:
    done = cli(*typed.split())
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.decode().splitlines()[0].startswith(line)


def test_what_is_suggested_for_a_host_that_was_typed_as_a_word_works(cli: Cli) -> None:
    done = cli("run", "db1", "uptime")
    assert done.stderr.decode() == (
        "corra: NOT STARTED: no -- before the command:  corra run --host db1 -- uptime\n"
    )


def test_behind_a_help_flag_no_other_verb_is_run(cli: Cli) -> None:
    done = cli("ps", "-h", "attach")
    assert (done.returncode, done.stdout) == (0, cli("ps", "--help").stdout)


def test_each_word_behind_kill_is_an_id(cli: Cli) -> None:
    done = cli("kill", "ps", "logs")
    assert done.returncode == 125
    assert done.stderr.startswith(b"corra: ps: NOT FOUND")


def test_a_line_of_an_env_file_that_is_shell_is_refused_by_its_number(cli: Cli) -> None:
    (cli.home / "env").write_text("# a comment\n\n  A=1\nexport B=2\n")
    done = cli("run", "--host", "local", "--env-file", "env", "--", "true")
    assert done.returncode == 2
    assert done.stderr.decode() == (
        "corra: NOT STARTED: --env-file env: line 4: 'export B' can't be a name\n"
    )


def test_an_empty_text_is_sent(cli: Cli) -> None:
    assert cli("send", "x", "").stderr.startswith(b"corra: x: NOT FOUND")


def test_a_configuration_that_is_no_yaml_is_one_line_with_its_place(cli: Cli) -> None:
    (cli.home / ".invoke.yaml").write_text("corra:\n  host: [x\n")
    done = cli("ps")
    assert done.returncode == 2
    (line,) = done.stderr.decode().splitlines()
    assert line.startswith(f"corra: NOT DONE: {cli.home}/.invoke.yaml line ")


@pytest.mark.parametrize("shell", ["bash", "sh"])
def test_after_activate_inv_and_corra_are_commands_of_the_shell(shell: str) -> None:
    typed = ". scripts/activate && command -v inv && command -v corra && corra --version"
    done = subprocess.run(
        [shell, "-c", typed], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    inv, corra, version = done.stdout.splitlines()
    assert (inv, corra) == (f"{ROOT}/scripts/inv", f"{ROOT}/scripts/corra")
    assert version.startswith("corra ")
