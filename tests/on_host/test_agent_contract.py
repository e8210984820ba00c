"""The agent's promises about itself: one file, standard library only, Python 3.6, silent, and small
while it waits.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import machine
from corra import agent

AGENT = Path(__file__).resolve().parents[2] / "corra" / "agent.py"
# As one program: the late parts are a text in it.
SOURCE = AGENT.read_text().replace(agent.LATE_BEGIN, "\n\n").replace(agent.LATE_END, "\n\n")
TREE = ast.parse(SOURCE)

# These cost little or nothing: C modules, and modules that every Python has loaded. A guard that
# sleeps for weeks pays for each import.
LIGHT = {
    "_ctypes",
    "errno",
    "fcntl",
    "gc",
    "marshal",
    "posix",
    "select",
    "struct",
    "sys",
    "time",
    "zlib",
    "_json",
    "_signal",
}
# Imported only for a verb that needs them, in a process that ends with its answer.
LATE = LIGHT | {"_blake2", "pwd", "hashlib", "re", "termios"}


def imported(body: list[ast.stmt] | ast.Module) -> set[str]:
    found = set()
    for node in ast.walk(body) if isinstance(body, ast.Module) else body:
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").split(".")[0])
    return found


def test_it_imports_only_the_standard_library_and_little_of_it():
    assert imported(TREE) <= LATE
    assert imported(TREE) <= set(sys.stdlib_module_names) | {"_sha256", "_sha2"}


def test_what_is_imported_at_the_top_costs_a_waiting_guard_next_to_nothing():
    assert imported(TREE.body) <= LIGHT


@pytest.mark.parametrize("python", machine.pythons(), ids=machine.name)
def test_what_it_calls_os_is_posix_and_has_all_that_it_takes_from_there(python):
    """A run's guards would carry os.py for weeks. So no module on their way may import it, or use a
    name that only os has.
    """
    used = {
        node.attr
        for node in ast.walk(TREE)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "os"
    }
    check = (
        "import sys, posix; sys.path.insert(0, sys.argv[1]); import agent; print([x for x in "
        "sys.argv[2:] if not hasattr(posix, x)], 'os' in sys.modules)"
    )
    said = subprocess.check_output(
        [python, "-ISEB", "-c", check, str(AGENT.parent), *sorted(used)], text=True
    )
    assert said == "[] False\n"


def test_it_is_written_in_the_language_of_python_3_6():
    ast.parse(SOURCE, feature_version=(3, 6))
    newer = (ast.NamedExpr, ast.Match, getattr(ast, "TryStar", ast.Match))
    assert [node.lineno for node in ast.walk(TREE) if isinstance(node, newer)] == []
    assert [
        node.args for node in ast.walk(TREE) if isinstance(node, ast.arguments) and node.posonlyargs
    ] == []
    # f"{x=}" parses under any feature_version, but leaves the text "x=" before the value in the
    # tree.
    assert not re.search(r"""f["'][^"']*\{[^{}"']*[^=!<>]=\}""", SOURCE)


@pytest.mark.parametrize("python", machine.pythons(), ids=machine.name)
def test_each_python_on_this_machine_compiles_and_imports_it_in_silence(python, tmp_path):
    shutil.copy(AGENT, tmp_path / "agent.py")
    done = subprocess.run(
        [
            python,
            "-W",
            "error",
            "-Ic",
            "import sys; sys.path.insert(0, '.'); import agent; sys.exit(agent.PROTOCOL != 1)",
        ],
        cwd=tmp_path,
        capture_output=True,
        timeout=60,
        env={"PATH": os.environ["PATH"]},
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_the_oldest_python_it_promises_is_tried_where_there_is_one():
    if (3, 6) not in machine.versions():
        pytest.skip("no Python 3.6 on this machine; the grammar was checked")
    subprocess.run(
        [
            machine.versions()[3, 6],
            "-c",
            f"compile(open({str(AGENT)!r}, encoding='utf-8').read(), 'agent.py', 'exec')",
        ],
        check=True,
    )


def test_importing_it_does_nothing():
    allowed = (
        ast.Expr,
        ast.Import,
        ast.ImportFrom,
        ast.Assign,
        ast.AnnAssign,
        ast.FunctionDef,
        ast.ClassDef,
        ast.If,
    )
    assert [node.lineno for node in TREE.body if not isinstance(node, allowed)] == []
    assert [
        node.lineno
        for node in TREE.body
        if isinstance(node, ast.Expr) and not isinstance(node.value, ast.Constant)
    ] == []


def test_its_version_is_the_packages():
    from importlib.metadata import version as installed

    import corra

    assert re.fullmatch(r"\d+\.\d+\.\d+", corra.__version__)
    assert installed("corra") == corra.__version__


def test_its_first_screen_is_the_whole_contract():
    text = ast.get_docstring(TREE) or ""
    for word in (
        "stdin",
        "stdout",
        "Exit code",
        "program.json",
        "Python 3.6",
        "signal",
        "follow",
        "list",
    ):
        assert word in text
    assert len(text.splitlines()) <= 50
