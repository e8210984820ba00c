"""Ansible's INI inventories, read strictly: what this reader doesn't know, it refuses by line."""

from __future__ import annotations

import re
import shlex

from corra.errors import Misuse

from .patterns import host_names
from .tree import ALL, UNGROUPED, Said, Tree

_SECTION = re.compile(r"\[([^:\]\s]+)(?::(\w+))?\]\s*(?:[#;].*)?")
_VARIABLE = re.compile(r"([A-Za-z_]\w*)\s*=\s*(.*)")
_QUOTED = re.compile(r"""(["'])(.*)\1""")


def read_ini(text: str, file: str, tree: Tree) -> None:
    """Read an inventory's text into `tree`. Raises Misuse, with file and line."""
    group, kind = UNGROUPED, "hosts"
    unborn: dict[str, str] = {}  # groups with variables: where
    for number, each in enumerate(text.splitlines(), 1):
        where, line = f"{file}:{number}", each.strip()
        if not line or line[0] in "#;":
            continue
        if line.startswith("[") and (match := _SECTION.fullmatch(line)):
            group, kind = match.group(1), match.group(2) or "hosts"
            if kind not in ("hosts", "children", "vars"):
                raise Misuse(f"{where}: not a section: [{group}:{kind}]")
            if kind == "vars":
                unborn.setdefault(group, where)
            tree.group(group).defined |= kind != "vars"
        elif line.startswith("["):
            raise Misuse(f"{where}: not a section: {line}")
        elif kind == "vars":
            match = _VARIABLE.fullmatch(line)
            if match is None:
                raise Misuse(f"{where}: not NAME=VALUE: {line}")
            value = _QUOTED.fullmatch(match.group(2))
            tree.group(group).variables[match.group(1)] = Said(
                value.group(2) if value else match.group(2), where
            )
        elif kind == "children":
            tree.group(group).children[line.split("#")[0].strip()] = where
        else:
            _read_host(line, where, group, tree)
    for name, where in unborn.items():
        if name != ALL and not tree.group(name).defined:
            raise Misuse(f"{where}: variables of group {name}, which is defined nowhere")


def _read_host(line: str, where: str, group: str, tree: Tree) -> None:
    try:
        pattern, *words = shlex.split(line, comments=True)
    except ValueError as error:
        raise Misuse(f"{where}: {str(error).lower()}: {line}") from error
    if "=" in pattern:
        raise Misuse(f"{where}: a variable without a host: {line}")
    variables = {}
    for word in words:
        match = _VARIABLE.fullmatch(word)
        if match is None:
            raise Misuse(f"{where}: not NAME=VALUE behind {pattern}: {word}")
        variables[match.group(1)] = Said(match.group(2), where)
    tree.group(group).defined = True
    names, port = host_names(pattern, where)
    for name in names:
        tree.add(name, group, {**({"ansible_port": port} if port else {}), **variables})
