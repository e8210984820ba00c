"""A room imports from rooms below it only, so that a reader needs no room above it.

Imports inside functions and under TYPE_CHECKING count too: a module depends on every module that it
names.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import corra

PACKAGE = Path(__file__).resolve().parents[2] / "corra"

# From the bottom up. A name that isn't a file is a folder: a room.
LAYERS = [
    ["on_host", "agent"],
    ["errors", "lean_imports"],
    ["model"],
    ["render", "settings"],
    ["inventory", "transport"],
    ["remote"],
    ["runs"],
    ["apsis", "runners", "terminal", "collector"],
    ["exports", "runbooks"],
    ["fleets"],
    ["cli", "tasks", "main", "__init__", "__main__"],
]
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if "migrations" not in path.parts
}

# A value does no I/O. The two exceptions: an id needs the time and random bytes, and a hint names
# corra as the operator typed it.
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
# The client sends doctor.py together with agent.py, and the loader runs agent.py.
BESIDE_IT = {"on_host.doctor": {"agent"}, "on_host.loader": {"agent"}}
# Imported only inside the functions that need them, so that `inv --list` is as fast as Invoke's.
HEAVY = {"fabric", "paramiko", "rich", "asyncio", "yaml", "sqlalchemy", "starlette"}
# These modules are themselves imported only once a connection is made or a collector is served.
SERVED = {name for name in MODULES if name.startswith("collector.")} - {
    "collector.client",
    "collector.tunnel",
    "collector.notices",
}
MAY_BE_HEAVY = {
    "apsis",
    "runs.result",
    "runners",
    "transport.fabric.packets",
    "transport.fabric.transport",
    *SERVED,
}


def room(module: str) -> str:
    return module.split(".", maxsplit=1)[0]


def imports(module: str, *, top_level: bool = False) -> Iterator[str]:
    """Yield the dotted names that `module` imports. A name of this package begins with `corra`."""
    path = MODULES[module]
    tree = ast.parse(path.read_text())
    package = ["corra", *path.relative_to(PACKAGE).parts[:-1]]
    for node in tree.body if top_level else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            whole = [*base, *([node.module] if node.module else [])]
            yield from (".".join([*whole, alias.name]) for alias in node.names)
        elif isinstance(node, ast.Call) and _name_of(node.func) in ("import_module", "__import__"):
            assert isinstance(node.args[0], (ast.Constant, ast.Name, ast.JoinedStr)), module
            if isinstance(node.args[0], ast.Constant):
                yield str(node.args[0].value)


def _name_of(function: ast.expr) -> str:
    return getattr(function, "attr", getattr(function, "id", ""))


def ours(module: str) -> set[str]:
    """Return this package's modules that `module` imports."""
    found = set()
    for name in imports(module):
        if name != "corra" and not name.startswith("corra."):
            continue
        parts = name.split(".")[1:]
        while parts and ".".join(parts) not in MODULES:
            parts.pop()
        # `from corra.model import host` names a module, `from corra import Run` the package itself.
        found.add(".".join(parts) or "__init__")
    return found - {module}


def test_every_room_has_its_layer():
    assert {room(module) for module in MODULES} == set(LEVEL)


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_its_own_room_and_the_rooms_below(module):
    above = {
        each
        for each in ours(module)
        if room(each) != room(module) and LEVEL[room(each)] >= LEVEL[room(module)]
    }
    if LEVEL[room(module)] == len(LAYERS) - 1:
        above = set()  # the top layer is one room: the verbs and the commands that call them
    assert not above, f"{module} imports {', '.join(sorted(above))}"


def test_no_import_is_part_of_a_circle():
    done: set[str] = set()
    waiting = {module: ours(module) for module in MODULES}
    while ready := [module for module, needs in waiting.items() if needs <= done]:
        done |= set(ready)
        waiting = {module: needs for module, needs in waiting.items() if module not in ready}
    assert not waiting, f"a circle among {', '.join(waiting)}"


@pytest.mark.parametrize("module", MODULES)
def test_what_is_private_to_a_module_is_imported_by_no_other(module):
    private = {
        name
        for name in imports(module)
        if name.startswith("corra.") and re.match("_[^_]", name.rpartition(".")[2])
    }
    assert private == set()


def test_nothing_of_ours_is_imported_by_a_name_that_is_made_at_run_time():
    """The two exceptions: the package's own lazy names, and stand-ins for foreign packages."""
    dynamic = {
        module
        for module in MODULES
        if room(module) != "on_host"
        and re.search(r"\bimport_module\(|\b__import__\(", MODULES[module].read_text())
    }
    assert dynamic == {"__init__", "lean_imports"}


@pytest.mark.parametrize("module", [name for name in MODULES if room(name) in LAYERS[0]])
def test_what_runs_on_a_host_imports_the_standard_library_alone(module):
    if module.startswith("on_host.agent"):
        assert {each for each in ours(module) if not each.startswith("on_host.agent")} == set()
        return
    assert ours(module) == set()
    allowed = {*sys.stdlib_module_names, "posix", "_sha256", "_sha2"} | BESIDE_IT.get(module, set())
    assert {name.split(".")[0] for name in imports(module)} <= allowed


@pytest.mark.parametrize("module", [name for name in MODULES if room(name) == "model"])
def test_values_do_no_io(module):
    assert not {name.split(".")[0] for name in imports(module)} & FORBIDDEN_TO_VALUES


@pytest.mark.parametrize("module", [name for name in MODULES if name not in MAY_BE_HEAVY])
def test_fabric_and_rich_are_imported_only_where_they_are_used(module):
    found = set(imports(module, top_level=True))
    assert not {name.split(".")[0] for name in found} & HEAVY
    own = {name.removeprefix("corra.") for name in found}
    assert not {
        name
        for name in MAY_BE_HEAVY
        if name in own or any(each.startswith(f"{name}.") for each in own)
    }


def test_no_room_hides_a_function_of_the_package():
    """`import corra.run.x` would make `corra.run` a module."""
    rooms = {path.name for path in PACKAGE.iterdir() if path.is_dir()}
    files = {path.stem for path in PACKAGE.glob("*.py")}
    assert not (rooms | files) & set(corra.__all__)
