"""An inventory as it is written, and what it says of each host once all is put together.

Both readers and `ansible-inventory` fill a Tree. Ansible's rules decide which value of a variable
counts: a host's goes before its groups', and a group's before those of the groups that contain it.
Five variables say how a host is reached, and corra heeds those five.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple

from corra.errors import Misuse
from corra.model.host import LOCAL, Address, Host

HOST, PORT, USER, KEY, CONNECTION = (
    *("ansible_host", "ansible_port", "ansible_user"),
    *("ansible_ssh_private_key_file", "ansible_connection"),
)
# Other spellings that Ansible takes. Where both are set, it takes those with `ssh`.
_SPELLINGS = {
    HOST: ("ansible_ssh_host", "ansible_host"),
    PORT: ("ansible_ssh_port", "ansible_port"),
    USER: ("ansible_ssh_user", "ansible_user"),
    KEY: ("ansible_ssh_private_key_file", "ansible_private_key_file"),
    CONNECTION: ("ansible_connection",),
}
HEEDED = frozenset(name for names in _SPELLINGS.values() for name in names)
_BY_SSH = ("ssh", "smart", "paramiko", "paramiko_ssh")
_PRIORITY = "ansible_group_priority"
ALL, UNGROUPED = "all", "ungrouped"


class Said(NamedTuple):
    """The value of a variable, and where it stands: `hosts.ini:12`. `plain`: text or a number."""

    text: str
    where: str
    plain: bool = True


@dataclass
class Group:
    """One group: its own hosts, the groups in it, and its variables."""

    hosts: dict[str, None] = field(default_factory=dict)
    children: dict[str, str] = field(default_factory=dict)  # name: where it is said
    variables: dict[str, Said] = field(default_factory=dict)
    from_files: dict[str, Said] = field(default_factory=dict)  # group_vars/
    defined: bool = False


@dataclass
class Tree:
    """All hosts and groups, as far as they are read."""

    hosts: dict[str, dict[str, Said]] = field(default_factory=dict)
    from_files: dict[str, dict[str, Said]] = field(default_factory=dict)  # host_vars/
    groups: dict[str, Group] = field(default_factory=lambda: {ALL: Group(defined=True)})

    def group(self, name: str) -> Group:
        return self.groups.setdefault(name, Group())

    def add(self, host: str, group: str, variables: Mapping[str, Said]) -> None:
        """Note a host in a group."""
        self.hosts.setdefault(host, {}).update(variables)
        self.group(group).hosts[host] = None


@dataclass(frozen=True)
class Inventory:
    """What an inventory says: each host's address, the groups, and which variables say more.

    An address of None: the host is reached by its own name. One named `local` is this machine. A
    text: why corra can't reach it. `aside`: ansible_ variables that corra doesn't heed.
    """

    source: str
    addresses: Mapping[str, Address | str | None]
    groups: Mapping[str, tuple[str, ...]]
    aside: tuple[str, ...] = ()

    def address(self, name: str) -> Address | None:
        """Return where `name` is. None where it is reached by that name. Raises Misuse."""
        found = self.addresses.get(name)
        if isinstance(found, str):
            raise Misuse(found, host=name)
        return found


def resolved(tree: Tree, source: str) -> Inventory:
    """Return what a Tree says once all is put together. Raises Misuse, with file and line."""
    tree.group(UNGROUPED).defined = True
    _check_groups(tree)
    depths = _depths(tree)
    order = sorted(tree.groups, key=lambda name: (depths[name], name))
    members = {name: tuple(_members(tree, name)) for name in tree.groups}
    placed = {
        host for name, found in members.items() if name not in (ALL, UNGROUPED) for host in found
    }
    members[UNGROUPED] = tuple(host for host in tree.hosts if host not in placed)
    inside = {name: set(found) for name, found in members.items()}
    inside[ALL] = set(tree.hosts)
    aside: dict[str, None] = {}
    addresses: dict[str, Address | str | None] = {}
    for host, own in tree.hosts.items():
        groups = [tree.groups[name] for name in order if host in inside[name]]
        found: dict[str, Said] = {}
        for group in groups:
            found.update(group.variables)
        for group in groups:
            found.update(group.from_files)
        found.update(own)
        found.update(tree.from_files.get(host, {}))
        addresses[host] = _address(host, found, source)
        aside |= dict.fromkeys(
            each for each in found if each.startswith("ansible_") and each not in HEEDED
        )
    grouped = {name: tuple(found) for name, found in members.items() if name != ALL}
    listed = [host for name in order for host in grouped.get(name, ())]
    whole = tuple(dict.fromkeys([*tree.hosts, *listed]))
    return Inventory(
        source,
        MappingProxyType(addresses),
        MappingProxyType({ALL: whole, **grouped}),
        tuple(sorted(aside)),
    )


def _check_groups(tree: Tree) -> None:
    for name, group in tree.groups.items():
        for child, where in group.children.items():
            if child not in tree.groups or not tree.groups[child].defined:
                raise Misuse(f"{where}: group {child} is in {name}, and is defined nowhere")
        if _PRIORITY in group.variables:
            where = group.variables[_PRIORITY].where
            raise Misuse(f"{where}: {_PRIORITY} is for Ansible: install ansible-core here")


def _depths(tree: Tree) -> dict[str, int]:
    """Return how deep each group lies below `all`. Raises Misuse for a group in itself."""
    depths: dict[str, int] = {ALL: 0}

    def go(name: str, depth: int, above: tuple[str, ...]) -> None:
        depths[name] = max(depth, depths.get(name, 0))
        for child, where in tree.groups[name].children.items():
            if child in above:
                raise Misuse(f"{where}: group {child} contains itself")
            go(child, depth + 1, (*above, child))

    for name in tree.groups:
        go(name, int(name != ALL), (name,))
    return depths


def _members(tree: Tree, name: str) -> Iterator[str]:
    seen: dict[str, None] = dict(tree.groups[name].hosts)
    for child in tree.groups[name].children:
        seen |= dict.fromkeys(_members(tree, child))
    yield from seen


def _address(host: str, variables: Mapping[str, Said], source: str) -> Address | str | None:
    """Return where a host is: an Address, None for its own name, or why corra can't say."""
    told: dict[str, Said] = {}
    for name, spellings in _SPELLINGS.items():
        for each in spellings:
            if each in variables:
                told[name] = variables[each]
                break
    for name, value in told.items():
        if not value.plain or "{{" in value.text:
            return f"{value.where}: {name} is no plain value, which Ansible alone can work out"
    by = told.pop(CONNECTION, Said("ssh", "")).text.removeprefix("ansible.builtin.")
    if by == LOCAL:
        return Address(LOCAL, source=source)
    if by not in _BY_SSH:
        return f"its ansible_connection is {by}, and corra reaches hosts by ssh"
    if not told:
        return None
    port = told.get(PORT)
    if port is not None and not (port.text.isdecimal() and 0 < int(port.text) < 65536):
        return f"{port.where}: not a port: {port.text!r}"
    there = told[HOST] if HOST in told else Said(host, "")
    try:
        Host(there.text, login=told[USER].text if USER in told else None)
    except Misuse as error:
        return f"{there.where or told[USER].where}: {error.why}"
    key = told.get(KEY)
    return Address(
        there.text,
        int(port.text) if port is not None else None,
        told[USER].text if USER in told else None,
        os.path.abspath(os.path.expanduser(key.text)) if key is not None else None,
        source,
    )
