"""`corra` and a checkout's `inv` as they are typed in a hurry: the help, and the nearest right word
for a wrong one. Both say in hints what was typed.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Cli

import warm
from corra.main import ns

ROOT = Path(__file__).resolve().parents[2]
# `inv` as scripts/inv starts it, with the word that was typed.
INV = [sys.executable, str(ROOT / "scripts" / "typed.py"), "inv"]
PATH_TYPED = [*INV[:2], "scripts/inv"]


@pytest.fixture(params=["corra", "inv"])
def program(request: pytest.FixtureRequest, cli: Cli) -> str:
    """The name of the program that `cli` is."""
    if request.param == "inv":
        cli.program = INV
    return str(request.param)


@pytest.mark.parametrize("words", [(), ("--help",), ("-h",)])
def test_the_help_shows_every_verb_on_a_screen_of_24_rows(
    cli: Cli, program: str, words: tuple[str, ...]
) -> None:
    done = cli(*words)
    shown = done.stdout.decode().splitlines()
    assert (done.returncode, done.stderr) == (0, b"")
    assert shown[0].startswith(f"Usage: {program} VERB")
    listed = [line.split() for line in shown if line[:2] == "  " and line[2] != " "]
    names = [line[0] for line in listed if line[0] != "and"]
    names += [each.strip(",") for line in listed if line[0] == "and" for each in line[1:]]
    assert names == list(ns.tasks)
    assert len(shown) < 24
    assert all(len(line) <= 80 for line in shown)


@pytest.mark.sampled
@pytest.mark.parametrize("verb", ns.tasks)
def test_a_help_names_the_program_that_was_typed_and_has_an_example(
    cli: Cli, program: str, verb: str
) -> None:
    shown = cli(verb, "--help").stdout.decode()
    assert shown.startswith(f"Usage: {program} {verb} [flags]")
    assert f"\n    {program} {verb}" in shown
    other = {"corra": "inv", "inv": "corra"}[program]
    assert not any(f"{other} {each}" in shown for each in ns.tasks)
    assert all(len(line) <= 80 for line in shown.splitlines())
    assert cli("--help", verb).stdout.decode() == shown


def test_a_help_says_what_each_flag_takes_and_the_verbs_own_first(cli: Cli) -> None:
    shown = [line.strip() for line in cli("kill", "-h").stdout.decode().splitlines()]
    at = shown.index("Flags:")
    assert shown[at + 1].startswith("-s, --signal SIG  ")
    assert any(line.startswith("-H, --host, --hosts HOST  ") for line in shown)
    assert shown[-1].startswith("-h, --help  ")


@pytest.mark.parametrize("verb", [(), ("run",), ("serve",)])
def test_where_path_lacks_it_the_help_says_the_path_that_was_typed(
    cli: Cli, verb: tuple[str, ...]
) -> None:
    cli.program = PATH_TYPED
    shown = cli(*verb, "--help").stdout.decode()
    assert shown.startswith("Usage: scripts/inv ")
    assert all(len(line) <= 80 for line in shown.splitlines())


def test_a_name_that_path_has_is_said_without_its_path(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "inv").symlink_to("/bin/true")
    cli.program = [*INV[:2], str(tmp_path / "inv")]
    assert cli().stdout.startswith(f"Usage: {tmp_path}/inv VERB".encode())
    path = f"{tmp_path}:{os.environ['PATH']}"
    assert cli(env={"PATH": path}).stdout.startswith(b"Usage: inv VERB")


NOT_DONE = "corra: NOT DONE: "
NOT_KILLED = "corra: NOT KILLED: "
NOT_STARTED = "corra: NOT STARTED: "
# With the name of the program in braces, and the flag that lists verbs.
MISTAKES = [
    ("rum --host db1 -- true", NOT_DONE + "no verb 'rum' (did you mean run?);"),
    ("ls", NOT_DONE + "no verb 'ls' (did you mean ps?);"),
    ("stop x", NOT_DONE + "no verb 'stop' (did you mean kill?);"),
    ("xyzzy", NOT_DONE + "no verb 'xyzzy';  {name} {lists} lists the verbs"),
    ("--help rum", NOT_DONE + "no verb 'rum' (did you mean run?);  {name} {lists} lists"),
    ("-H db1 run -- a b", NOT_DONE + "-H stands before the verb:  {name} run -H db1 -- a b"),
    ("-d run -- a", NOT_DONE + "-d stands before the verb:  {name} run -d -- a"),
    ("-T 2h run -- a", NOT_DONE + "-T stands before the verb:  {name} run -T 2h -- a"),
    ("-T 2h ps", NOT_DONE + "-T means nothing to ps;  {name} --help ps lists its flags"),
    ("-w ps", NOT_DONE + "-w means nothing to ps;"),
    ("-ew ps", NOT_DONE + "-w means nothing to ps;"),
    ("--no-dedupe ps", NOT_DONE + "--no-dedupe means nothing to ps;"),
    ("--dyr ps", NOT_DONE + "no flag --dyr (did you mean --dry?);"),
    ("-l -D x", NOT_DONE + "not a number: 'x'"),
    ("-f", NOT_DONE + "-f needs a value"),
    ("-f /no/such.yaml ps", NOT_DONE + "-f: no such file: /no/such.yaml"),
    ("-f /etc/passwd ps", NOT_DONE + "-f: not a .yaml, .yml, .json or .py: /etc/passwd"),
    ("--hide foo ps", NOT_DONE + "--hide: not stdout, stderr, both, out or err: 'foo'"),
    ("run", NOT_STARTED + "no command:  {name} run --host HOST -- COMMAND"),
    ("run uptime", NOT_STARTED + "no -- before the command:  {name} run --host HOST -- uptime"),
    ("run db1 uptime", NOT_STARTED + "no -- before the command:  {name} run --host db1 -- uptime"),
    ("ps --state runing", NOT_DONE + "--state: no state 'runing' (did you mean running?)"),
    ("ps --state xyzzy", NOT_DONE + "--state: no state 'xyzzy': there are starting, running"),
    ("logs --stream stdot x", NOT_DONE + "--stream: not stdout, stderr or both: 'stdot'"),
    ("ps --hide foo", NOT_DONE + "--hide: not stdout, stderr, both, out or err: 'foo'"),
    ("kill -99 x", NOT_KILLED + "-s: not a signal: '99' (say HUP, INT, TERM, USR1 or a number)"),
    ("run --tiemout 5 -- x", NOT_STARTED + "run has no --tiemout (did you mean --timeout?);"),
    ("run --host local -E 1X=3 -- true", NOT_STARTED + "-E: '1X' can't be a name"),
]


@pytest.mark.sampled
@pytest.mark.parametrize(("typed", "line"), MISTAKES)
def test_a_wrong_word_is_a_misuse_with_the_nearest_right_one(
    cli: Cli, program: str, typed: str, line: str
) -> None:
    done = cli(*typed.split())
    assert (done.returncode, done.stdout) == (2, b"")
    lists = {"corra": "--help", "inv": "--list"}[program]
    assert done.stderr.decode().startswith(line.format(name=program, lists=lists))


# What Invoke's own `inv` reads before it loads the checkout's tasks.py is Invoke's.
@pytest.mark.invoke
@pytest.mark.parametrize(
    ("typed", "line"),
    [
        ("rum --host db1 -- true", NOT_DONE + "no verb 'rum' (did you mean run?);"),
        ("-H db1 run -- a", NOT_DONE + "-H stands before the verb:  inv run -H db1 -- a"),
        ("-p ps", NOT_DONE + "-p means nothing to ps;"),
        ("-f /no/such.yaml ps", NOT_DONE + "-f: no such file: /no/such.yaml"),
    ],
)
def test_invokes_own_inv_answers_a_wrong_word_too_where_it_loads_the_checkouts_tasks(
    home: Path, typed: str, line: str
) -> None:
    done = warm.run(*typed.split(), program="inv", cwd=ROOT)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(line)


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


def test_a_name_alone_in_an_env_file_is_taken_over_from_here(cli: Cli) -> None:
    (cli.home / "env").write_bytes(b"MINE\r\nA='q' \r\n")
    words = ("run", "--host", "local", "--env-file", "env", "--", "printenv", "MINE", "A")
    assert cli(*words, env={"MINE": "here"}).stdout == b"here\n'q' \n"
    assert cli(*words).stderr == (
        b"corra: NOT STARTED: --env-file env: line 1: MINE is not set here; say MINE=..\n"
    )


def test_an_empty_text_is_sent(cli: Cli) -> None:
    assert cli("send", "x", "").stderr.startswith(b"corra: x: NOT FOUND")


WRONG_FILES = [
    (".invoke.yaml", "corra:\n  host: [x\n", " line 3: expected"),
    (".invoke.yaml", "- corra\n", ": not names with values, such as"),
    (".invoke.yaml", "run: 5\n", ": run is 5, not names with values"),
    (".invoke.yaml", "a: \x01\n", ": unacceptable character #x0001"),
    (".invoke.json", '{"a":\n', " line 2: Expecting value"),
]


@pytest.mark.parametrize(("name", "text", "why"), WRONG_FILES)
def test_a_configuration_that_cant_be_read_is_one_line_with_its_place(
    cli: Cli, program: str, name: str, text: str, why: str
) -> None:
    (cli.home / name).write_text(text)
    done = cli("ps")
    assert done.returncode == 2
    (line,) = done.stderr.decode().splitlines()
    assert line.startswith(f"corra: NOT DONE: {cli.home}/{name}{why}")


def test_a_setting_that_is_none_is_a_misuse_of_the_verb_that_asked(cli: Cli) -> None:
    (cli.home / ".invoke.yaml").write_text("corra: 5\n")
    assert cli("ps", "--host", "local").stderr == (
        b"corra: NOT DONE: corra in the configuration is 5, not names with values\n"
    )
    done = cli("ps", "--host", "local", env={"INVOKE_CORRA_HOTS": "1"})
    assert b"NOT DONE" in done.stderr


@pytest.mark.parametrize("shell", ["bash", "sh"])
def test_after_activate_inv_and_corra_are_commands_of_the_shell(shell: str) -> None:
    typed = ". scripts/activate && command -v inv && command -v corra && corra --version"
    done = subprocess.run(
        [shell, "-c", typed], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    inv, corra, version = done.stdout.splitlines()
    assert (inv, corra) == (f"{ROOT}/scripts/inv", f"{ROOT}/scripts/corra")
    assert version.startswith("corra ")
