"""Ansible's YAML inventories and files of variables, read strictly, each refusal with its line.

The text is read into nodes and never constructed, so no tag in it does anything.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from corra.errors import Misuse

from .patterns import host_names
from .tree import Said, Tree

_PLAIN = tuple(f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float", "bool"))
_KEYS = ("hosts", "vars", "children")
_DEPTH_MOST = 100


def read_yaml(text: str, file: str, tree: Tree) -> None:
    """Read an inventory's text into `tree`. Raises Misuse, with file and line."""
    for name, _, node in _pairs(_node(text, file), file):
        if name == "plugin":
            raise Misuse(
                f"{_where(node, file)}: an inventory plugin, which only Ansible can run:"
                " install ansible-core here"
            )
        _read_group(name, node, file, tree, 0)


def read_variables(text: str, file: str) -> dict[str, Said]:
    """Return the variables of a file in group_vars or host_vars. Raises Misuse."""
    return {name: _value(node, file) for name, _, node in _pairs(_node(text, file), file)}


def _node(text: str, file: str) -> Any:
    from invoke.vendor import yaml

    if text.startswith("$ANSIBLE_VAULT"):
        raise Misuse(f"{file}: it is encrypted: install ansible-core here")
    try:
        return yaml.compose(text, yaml.SafeLoader)  # type: ignore[no-untyped-call] # Invoke's own
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise Misuse(f"{file}:{line}: not YAML: {error.problem}") from error
    except yaml.YAMLError as error:
        raise Misuse(f"{file}: not YAML: {error}") from error


def _where(node: Any, file: str) -> str:
    return f"{file}:{node.start_mark.line + 1}"


def _pairs(node: Any, file: str) -> Iterator[tuple[str, Any, Any]]:
    """Yield (key, the key's node, the value's node) of a mapping; nothing for an empty one."""
    from invoke.vendor.yaml.nodes import MappingNode, ScalarNode

    if node is None or (isinstance(node, ScalarNode) and node.tag == "tag:yaml.org,2002:null"):
        return
    if not isinstance(node, MappingNode):
        raise Misuse(f"{_where(node, file)}: not NAME: VALUE pairs")
    for key, value in node.value:
        if not isinstance(key, ScalarNode) or key.tag not in _PLAIN:
            raise Misuse(f"{_where(key, file)}: not a plain name")
        yield str(key.value), key, value


def _value(node: Any, file: str) -> Said:
    plain = node.tag in _PLAIN
    return Said(str(node.value) if plain else "", _where(node, file), plain)


def _read_group(name: str, node: Any, file: str, tree: Tree, depth: int) -> None:
    if depth > _DEPTH_MOST:
        raise Misuse(f"{_where(node, file)}: groups in groups, {_DEPTH_MOST} deep")
    group = tree.group(name)
    group.defined = True
    for key, key_node, inner in _pairs(node, file):
        where = _where(key_node, file)
        if key not in _KEYS:
            raise Misuse(f"{where}: {key!r} in group {name}: there are {', '.join(_KEYS)}")
        for each, each_node, value in _pairs(inner, file):
            if key == "vars":
                group.variables[each] = _value(value, file)
            elif key == "children":
                group.children[each] = _where(each_node, file)
                _read_group(each, value, file, tree, depth + 1)
            else:
                names, port = host_names(each, _where(each_node, file))
                variables = {k: _value(v, file) for k, _, v in _pairs(value, file)}
                for host in names:
                    tree.add(host, name, {**({"ansible_port": port} if port else {}), **variables})
