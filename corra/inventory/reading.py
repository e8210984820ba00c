"""Inventories as files, as directories, and as `ansible-inventory --list` tells them.

Where Ansible is installed it reads its own inventories, whatever they are made of. Elsewhere corra
reads what plain files say, and refuses what it would only guess at.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from corra.errors import Misuse

from .ini import read_ini
from .tree import Inventory, Said, Tree, resolved
from .yaml_text import read_variables, read_yaml

ANSIBLE = "ansible-inventory"
# A dynamic inventory may ask a cloud, page by page.
_ANSIBLE_S = 300.0
_YAML = (".yml", ".yaml", ".json")
# In a directory Ansible leaves these aside.
_ASIDE = (
    *(".pyc", ".pyo", ".swp", ".bak", "~", ".rpm", ".md", ".txt", ".rst"),
    *(".orig", ".cfg", ".retry"),
)
_VARIABLES = ("group_vars", "host_vars")
_LARGEST = 64 << 20


@functools.lru_cache(maxsize=8)
def inventory_at(path: str) -> Inventory:
    """Return what the inventory at `path` says, read once. Raises Misuse."""
    source = os.path.abspath(os.path.expanduser(path))
    if not os.path.exists(source):
        raise Misuse(f"inventory {path}: no such file or directory")
    if shutil.which(ANSIBLE):
        return _by_ansible(source)
    return read_inventory(source)


def read_inventory(source: str) -> Inventory:
    """Read an inventory with corra's own reader. Raises Misuse, with file and line."""
    tree = Tree()
    try:
        for file in _files(Path(source)):
            _read_file(file, tree)
        home = Path(source) if os.path.isdir(source) else Path(source).parent
        for kind in _VARIABLES:
            _read_beside(home / kind, kind, tree)
    except OSError as error:
        raise Misuse(f"inventory {error.filename or source}: {error.strerror}") from error
    return resolved(tree, source)


def _files(source: Path) -> Iterator[Path]:
    if not source.is_dir():
        yield source
        return
    for each in sorted(source.iterdir()):
        if each.name.startswith(".") or each.name.endswith(_ASIDE) or each.name in _VARIABLES:
            continue
        if each.is_dir():
            yield from _files(each)
        else:
            yield each


def _read_file(file: Path, tree: Tree) -> None:
    name = str(file)
    if os.access(file, os.X_OK):
        raise Misuse(
            f"inventory {name}: it is a program, which only Ansible runs: install ansible-core here"
        )
    text = _text(file)
    if text.startswith("$ANSIBLE_VAULT"):
        raise Misuse(f"inventory {name}: it is encrypted: install ansible-core here")
    if file.suffix == ".toml":
        raise Misuse(f"inventory {name}: TOML is for Ansible: install ansible-core here")
    (read_yaml if file.suffix in _YAML else read_ini)(text, name, tree)


def _text(file: Path) -> str:
    with open(file, "rb") as opened:
        data = opened.read(_LARGEST + 1)
    if len(data) > _LARGEST:
        raise Misuse(f"inventory {file}: larger than {_LARGEST >> 20} MiB")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise Misuse(f"{file}:{line}: not UTF-8") from error


def _read_beside(directory: Path, kind: str, tree: Tree) -> None:
    """Read group_vars or host_vars: a file, or a directory of files, of each name."""
    if not directory.is_dir():
        return
    for each in sorted(directory.iterdir()):
        name = each.name[: -len(each.suffix)] if each.suffix in _YAML else each.name
        known = name in (tree.groups if kind == "group_vars" else tree.hosts)
        if each.name.startswith(".") or each.name.endswith(_ASIDE) or not known:
            continue
        for file in _files(each):
            found = read_variables(_text(file), str(file))
            if kind == "group_vars":
                tree.group(name).from_files.update(found)
            else:
                tree.from_files.setdefault(name, {}).update(found)


def _by_ansible(source: str) -> Inventory:
    try:
        done = subprocess.run(
            [ANSIBLE, "-i", source, "--list"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_ANSIBLE_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise Misuse(f"inventory {source}: {ANSIBLE} gave no answer in 5 min") from None
    except OSError as error:
        raise Misuse(f"inventory {source}: {ANSIBLE}: {error.strerror}") from error
    said = [line for line in done.stderr.decode(errors="replace").splitlines() if line.strip()]
    try:
        told = json.loads(done.stdout) if done.returncode == 0 else None
    except ValueError:
        told = None
    if not isinstance(told, dict):
        raise Misuse(f"inventory {source}: {ANSIBLE}: {said[-1] if said else 'no answer'}")
    tree = tree_of_list(told)
    if not tree.hosts:
        # Ansible warns of what it can't parse, and goes on with no host at all.
        why = f": {' '.join(said[-1].split())}" if said else ""
        raise Misuse(f"inventory {source}: no hosts in it{why}")
    return resolved(tree, source)


def tree_of_list(told: dict[str, Any]) -> Tree:
    """Return the Tree of what `ansible-inventory --list` prints."""
    tree = Tree()
    variables = (told.get("_meta") or {}).get("hostvars") or {}
    for name, group in told.items():
        if name == "_meta" or not isinstance(group, dict):
            continue
        tree.group(name).defined = True
        for child in group.get("children") or ():
            tree.group(name).children[child] = ANSIBLE
            tree.group(child).defined = True
        for host in group.get("hosts") or ():
            tree.add(host, name, dict(_said(variables.get(host) or {})))
    return tree


def _said(variables: dict[str, Any]) -> Iterable[tuple[str, Said]]:
    for name, value in variables.items():
        plain = isinstance(value, (str, int, float))
        yield name, Said(str(value) if plain else "", ANSIBLE, plain)
