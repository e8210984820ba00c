"""The README and the pages under docs/ are true: their commands do what the pages show."""

from __future__ import annotations

import ast
import functools
import os
import re
import shlex
import shutil
import sys
from inspect import signature
from pathlib import Path

import pytest
from conftest import home_environment

import console
from console import alike, blocks, commands, outputs, replaced, screen, unfolded
from corra.render import folded
from sshd import SLOWLY, user

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
TEXTS = [*PAGES, ROOT / "DESIGN.md", ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md"]
WRITE = bool(os.environ.get("CORRA_WRITE_DOCS"))


@pytest.fixture
def reader(new_sshd, home: Path) -> dict[str, str]:
    """The environment of a reader who types along: `inv`, `corra`, `scripts/inv` and `ssh`, a host
    called db1, and six names more of it, web1 to web6.
    """
    there = home / "db1"  # so that the first run on db1 has to place the agent
    there.mkdir()
    server = new_sshd(alias="db1", environment=home_environment(there), options=SLOWLY)
    for number in range(1, 7):
        server.add_host(f"web{number}")
    bin_ = home / "bin"
    beside = os.path.dirname(sys.executable)
    programs: dict[Path, list[str]] = {
        bin_ / "ssh": [shutil.which("ssh") or "ssh", "-F", str(home / ".ssh" / "config")],
        bin_ / "python3": [os.path.realpath(sys.executable)],
    }
    ours = shlex.join([f"{beside}/python", str(ROOT / "scripts" / "typed.py")])
    texts = {path: f'exec {shlex.join(words)} "$@"' for path, words in programs.items()}
    for path in (bin_ / "inv", bin_ / "corra", home / "scripts" / "inv"):
        texts[path] = f'exec {ours} "$0" "$@"'
    for path, text in texts.items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
    for name in ("agent.py", "on_host/courier.py"):
        shutil.copy(ROOT / "corra" / name, home)
    return {
        **os.environ,
        "PATH": f"{bin_}:{os.environ['PATH']}",
        "TERM": "xterm",
        "LANG": "C.UTF-8",
        "SHELL": "/bin/sh",
    }


def told(line: str, home: Path) -> str:
    """Return a line as the pages show it, with the pages' home and user for the test's."""
    line = line.replace(str(home / "db1"), "/home/ops").replace(str(home), "/home/ops")
    line = re.sub(r"(?<=127\.0\.0\.1 port )\d+", "2222", line)
    me = re.escape(user())
    line = re.sub(rf"\b{me}@[\w.-]+", "ops@laptop", line)
    line = re.sub(rf"\b{me}\b(?=  )", "ops".ljust(len(user())), line)
    line = re.sub(rf"(\b(?:as|of|by) |\(){me}\b(?!@)", r"\1ops", line)
    # The page names the limit on processes, which root doesn't have.
    return re.sub(r"(?<=limits    )\d+ of \d+ processes$", "none that matter", line)


def again_folded(line: str) -> list[str]:
    """Return a line of corra's as a terminal of 80 columns shows it, and any other as it is."""
    ours = re.match(r"corra: |\S+ \(\w{6}\) on ", line)
    fate = re.search(r": ([A-Z]{2,}(?: [A-Z]{2,})*)", line)
    return folded(line, 80, fate[1] if fate else "").split("\n") if ours else [line]


@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    "page",
    # Every verb goes through Invoke in the same way, so one page is run with each version of
    # Invoke.
    [
        pytest.param(page, id=page.stem, marks=[pytest.mark.invoke] if page.stem == "kill" else [])
        for page in PAGES
        if blocks(page.read_text())
    ],
)
def test_the_commands_of_a_page_do_what_it_says(page, reader, home):
    text = page.read_text()
    wrong, new = [], []
    for block in blocks(text):
        typed = commands(block)
        shown = [
            [each for line in unfolded(lines) for each in again_folded(told(line, home))]
            for lines in console.run(typed, cwd=home, env=reader)
        ]
        new.append(
            "".join(
                "\n".join([f"$ {command}", *lines]) + "\n"
                for command, lines in zip(typed, shown, strict=True)
            )
        )
        for command, expected, lines in zip(typed, outputs(block), shown, strict=True):
            if not alike(expected, lines, cut=8 + len(user())):
                wrong.append(
                    "\n".join(
                        [f"$ {command}", "  the page says:", *expected, "  it shows:", *lines]
                    )
                )
    if WRITE:
        page.write_text(replaced(text, new))
    else:
        assert not wrong, "\n\n".join(["", *wrong])


# -- Screens that no test runs, as they want a host without Python or a key that has changed

# What belongs to the example: names of its steps and times, and another program's words.
_EXAMPLES = re.compile(
    r"preflight, backup, .*|\(\d\d:\d\d to \d\d:\d\d\)|FAILED exit 2|vacuumdb: error: .*"
    r"|inv .*"  # a command
)


@functools.cache
def sentences() -> list[re.Pattern[str]]:
    """Return what corra can say: each text in its source, with anything in place of a value."""
    found = set()
    for path in (ROOT / "corra").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())) if path.name != "agent.py" else ():
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            said = "".join(
                each.value if isinstance(each.value, str) else "\0"
                for each in parts
                if isinstance(each, (ast.Constant, ast.FormattedValue))
            )
            if sum(map(str.isalpha, said)) > 4:
                found.add(re.escape(said.strip()).replace("\0", ".*?"))
    return [re.compile(each) for each in found]


def can_be_said(text: str) -> bool:
    """Return whether corra says this line, or what stands behind one of its colons."""
    return any(
        sentence.fullmatch(each)
        for each in (text[at:] for at in [0, *(m.end() for m in re.finditer(r": +", text))])
        for sentence in sentences()
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_screen_that_no_test_runs_has_the_words_of_the_source(page):
    wrong = []
    for block in re.findall(r"```text\n(.*?)```", page.read_text(), re.DOTALL):
        for line in block.splitlines():
            pieces = [each for each in re.split(" {2,}", line.strip()) if len(each.split()) > 2]
            if not line.startswith("$ ") and not can_be_said(line.strip()):
                wrong += [each for each in pieces if not can_be_said(each)]
    assert [each for each in wrong if not _EXAMPLES.fullmatch(each)] == []


def test_a_screen_is_held_to_the_words_of_the_source():
    assert can_be_said("corra: sw1: NOT STARTED: host key unknown: ED25519 SHA256:9kX2vT..Qw8")
    assert not can_be_said("corra: sw1: NOT STARTED: host key not known: ED25519")
    assert not can_be_said("give it once:  inv --prompt-for-sudo-password ..")


def test_the_pages_agree_about_the_agent():
    """CORRA_WRITE_DOCS=1 writes all pages anew."""
    told = {
        match: page.name
        for page in PAGES
        for match in re.findall(r"\(agent .*?\)", page.read_text())
    }
    assert len(told) == 1, told


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_the_table_of_exit_codes_is_complete():
    from corra import errors

    table = (ROOT / "docs" / "exit-codes.md").read_text()
    for code in (
        errors.MISUSE,
        errors.STILL_RUNNING,
        errors.LOST,
        errors.TIMED_OUT,
        errors.NOTHING_DONE,
        errors.NOT_EXECUTABLE,
        errors.NOT_FOUND,
    ):
        assert f"| {code} |" in table


def test_the_table_of_errors_names_what_can_be_raised():
    from corra import errors

    named = set(re.findall(r"`([A-Z][A-Za-z]+)`", (ROOT / "docs" / "python.md").read_text()))
    tree = {
        name
        for name, each in vars(errors).items()
        if isinstance(each, type) and issubclass(each, errors.CorraError)
    }
    assert tree - named <= {"CorraError"}


def test_the_page_about_python_names_every_keyword_and_every_method():
    import corra

    named = set(
        re.findall(
            r"[A-Za-z_]+",
            " ".join(re.findall(r"`([^`\n]+)`", (ROOT / "docs" / "python.md").read_text())),
        )
    )
    from corra.fleets import making
    from corra.runs import request

    there = {
        *request.StartOptions.__annotations__,
        "reconnect_timeout",
        "watch",
        "warn",
        "hide",
        "out_stream",
        "err_stream",
    }
    there |= set(making.FleetOptions.__annotations__)
    there |= set(signature(corra.Fleet.follow).parameters) - {"self"}
    for kind in (corra.Run, corra.Results, corra.FleetResult):
        there |= {name for name in vars(kind) if not name.startswith("_")}
    there |= set(corra.Result.__annotations__) | {"reason", "signal", "elapsed"}
    # These belong to the verbs: they pass on stdin, restart a run, and keep what a host has
    # reported.
    assert there - named <= {"heard", "pass_on", "reached", "record", "skipped", "spool", "via"}


def test_design_names_every_frame_and_every_file_of_the_spool():
    from corra import agent
    from corra.model import frames

    text = (ROOT / "DESIGN.md").read_text()
    for kind in frames._FIELDS:
        assert f"| `{kind}" in text
    for word in (
        *agent.TRANSITIONS,
        *agent.REASONS,
        "program.json",
        "launched",
        "index",
        "control",
        "keeper",
        "state.json",
    ):
        assert word in text


def test_the_page_about_the_agent_names_every_verb():
    from corra import agent

    text = (ROOT / "docs" / "agent-by-hand.md").read_text()
    assert [verb for verb in agent.VERBS if f"`{verb}`" not in text] == []


def test_every_fault_in_the_table_has_tests_that_exist():
    there = {
        name
        for path in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)
    }
    rows = [
        line.split(" | ")
        for line in (ROOT / "docs" / "faults.md").read_text().splitlines()
        if re.match(r"\| \d", line)
    ]
    assert len(rows) > 30
    for row in rows:
        named = re.findall(r"`(test_\w+)`", row[2])
        assert named, row[0]
        assert set(named) <= there, row[0]


def test_every_flag_that_a_page_names_exists():
    from corra.main import ns, program

    flags = {
        flag
        for task in ns.tasks.values()
        for argument in task.get_arguments()
        for flag in argument.names
    }
    flags |= {name for argument in program.core_args() for name in argument.names}
    for page in PAGES:
        named = set(re.findall(r"`[^`\n]*?--([a-z][a-z-]+)", page.read_text()))
        assert {
            name for name in named if name.replace("-", "_") not in flags and name not in flags
        } == set(), page.name


def test_a_terminal_shows_what_was_not_overwritten_or_erased():
    assert screen("a\r\nbcd\rX\n\x1b[2mlive\x1b[0m\x1b[K\r\r\x1b[Kdone\n") == ["a", "Xcd", "done"]


def test_numbers_and_ids_may_differ_and_words_may_not():
    said = ["corra: 722rh7 on db1: FAILED: exit 7 after 3.0 s"]
    assert alike(said, ["corra: kcvmq9 on db1: FAILED: exit 7 after 2.9 s"])
    assert alike(["20261123t014409z-k7m2qxwp"], ["20270101t000000z-22222222"])
    assert not alike(said, ["corra: kcvmq9 on db1: KILLED: exit 7 after 2.9 s"])
    assert not alike(said, [])
