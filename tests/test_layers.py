"""Who may import whom: upwards only, so that a page of the package can be read without the pages below it.

Imports inside functions and under TYPE_CHECKING count too: what a module knows of is what it depends on.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "corra"

# From the top of the page to its bottom; a module may import what stands in a line above its own, and its neighbours without a circle.
LAYERS = [
    ["agent", "courier", "doctor", "ledger", "tether"],
    ["errors", "ids", "program", "state", "stream", "verdict"],
    ["command", "hostset", "settings"],
    [
        "channel",
        "process",
        "sshconfig",
        "hostkeys",
        "login",
        "session",
        "sudo",
        "carrier",
        "spare",
        "packets",
        "transport",
        "connection",
        "openssh",
        "runners",
    ],
    ["place", "chaperone", "reach", "feed", "payload"],
    ["history", "follow", "result"],
    ["control"],
    ["starting"],
    ["collected", "forward"],
    ["render", "lent", "screen"],
    ["checkup"],
    ["book", "journal", "attempt", "crew", "stopped", "teller", "chronicle", "runbooks"],
    ["durable", "__init__"],
    [
        "verb",
        "sieve",
        "keyboard",
        "watch",
        "flags",
        "inputs",
        "selection",
        "reporting",
        "shelf",
        "tasks",
        "serving",
    ],
    ["main", "__main__"],
]
LEVEL = {module: level for level, modules in enumerate(LAYERS) for module in modules}
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py"))

# Values have no I/O and no clock. Exceptions: an id is made of the time and of chance; what to call corra in a hint is what was typed.
FORBIDDEN_TO_VALUES = {
    "socket",
    "subprocess",
    "select",
    "threading",
    "asyncio",
    "logging",
    "pathlib",
    "shutil",
    "tempfile",
    "io",
    "sqlite3",
}
# It is sent together with that one.
VISITS = {"doctor": {"agent"}}
# `inv --list` at Invoke's own speed: these stay inside what needs them.
HEAVY = {"fabric", "paramiko", "rich", "asyncio", "yaml"}
MAY_BE_HEAVY = {
    "result",
    "durable",
    "packets",
    "transport",
}  # imported themselves only where a connection is made


def tree(module: str) -> ast.Module:
    return ast.parse((PACKAGE / f"{module}.py").read_text())


def imports(module: str, *, top_level: bool = False) -> Iterator[str]:
    """Yield the dotted names that `module` imports, our own as `corra.name`."""
    body = tree(module)
    for node in body.body if top_level else ast.walk(body):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1, f"{module} reaches out of the package"
            yield from (f"corra.{node.module or alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def ours(module: str) -> set[str]:
    found = set()
    for name in imports(module):
        if name == "corra" or name.startswith("corra."):
            own = name.removeprefix("corra").removeprefix(".").split(".")[0] or "__init__"
            found.add(own if own in MODULES else "__init__")
    return found - {module}


def test_every_module_has_its_place_on_the_page():
    assert [module for module in MODULES if module not in LEVEL] == []


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_upwards_only(module):
    below = {each for each in ours(module) if LEVEL[each] > LEVEL[module]}
    assert not below, f"{module} imports {', '.join(sorted(below))}, which stand below it"


def test_neighbours_import_each_other_without_a_circle():
    done: list[str] = []
    waiting = {module: ours(module) for module in MODULES}
    while ready := [module for module, needs in waiting.items() if needs <= set(done)]:
        done += ready
        waiting = {module: needs for module, needs in waiting.items() if module not in ready}
    assert not waiting, f"a circle among {', '.join(waiting)}"


@pytest.mark.parametrize("module", LAYERS[0])
def test_what_runs_on_the_host_imports_nothing_of_ours(module):
    if module in MODULES:
        assert ours(module) == set()
        assert {name.split(".")[0] for name in imports(module)} <= set(
            sys.stdlib_module_names
        ) | VISITS.get(module, set())


@pytest.mark.parametrize("module", LAYERS[1])
def test_values_do_no_io(module):
    assert not {name.split(".")[0] for name in imports(module)} & FORBIDDEN_TO_VALUES


@pytest.mark.parametrize("module", [module for module in MODULES if module not in MAY_BE_HEAVY])
def test_fabric_and_rich_are_imported_only_where_they_are_used(module):
    assert not {name.split(".")[0] for name in imports(module, top_level=True)} & HEAVY
    assert (
        not {name.removeprefix("corra.") for name in imports(module, top_level=True)} & MAY_BE_HEAVY
    )
