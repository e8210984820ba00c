"""Groups of hosts, `@web`: an inventory's, the configuration's, and ClusterShell's own sources."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from corra.errors import Misuse
from corra.model.host_sets import Groups, Hosts, choose
from corra.settings import setting

if TYPE_CHECKING:
    from .tree import Inventory

_GROUP = re.compile(r"[\w.:+-]+")


def known_groups(config: Any = None, inventory: Inventory | None = None) -> Groups:
    """Return what finds a group: in the inventory, then under corra.groups, then in ClusterShell's.

    `config` is an Invoke Config. The finder raises Misuse for a group that nobody knows.
    """
    configured: Mapping[str, Sequence[str]] = setting(config, "groups") or {}

    def find(name: str) -> Iterable[str]:
        if inventory is not None and name in inventory.groups:
            return inventory.groups[name]
        if name in configured:
            return configured[name]
        found, others = _clustershell(name)
        if found is not None:
            return found
        names = [*(inventory.groups if inventory is not None else ()), *configured, *others]
        import difflib

        near = difflib.get_close_matches(name, names, 1, 0.6)
        why = f"no group @{name}" + (f" (did you mean @{near[0]}?)" if near else "")
        hint = ["there are " + ", ".join(f"@{each}" for each in sorted(names)[:20])]
        raise Misuse(why, hint=hint if names else ["groups: corra.groups in invoke.yaml"])

    return find


def _clustershell(name: str) -> tuple[list[str] | None, list[str]]:
    """Return a group's hosts by ClusterShell's groups.conf, or None, and the groups that it has.

    Raises Misuse where a source of its own fails.
    """
    source, _, group = name.rpartition(":")
    # ClusterShell puts the name into a shell's command.
    if not _GROUP.fullmatch(name):
        return None, []
    from ClusterShell.Defaults import config_paths
    from ClusterShell.NodeUtils import (
        GroupResolverConfig,
        GroupResolverConfigError,
        GroupResolverError,
        GroupSourceError,
        GroupSourceNoUpcall,
        GroupSourceQueryFailed,
    )

    # pip puts a sample of groups below this Python, which nobody means.
    sample = os.path.join(sys.prefix, "")
    files = [each for each in config_paths("groups.conf") if not each.startswith(sample)]
    names: list[str] = []
    try:
        resolver = GroupResolverConfig(files)
        with contextlib.suppress(GroupSourceNoUpcall):
            names = list(resolver.grouplist(source or None))
        found = list(resolver.group_nodes(group, source or None))
    except GroupSourceQueryFailed as error:
        if names:
            return None, names
        raise Misuse(f"group @{name}: ClusterShell's command for it failed: {error}") from error
    except GroupResolverConfigError as error:
        raise Misuse(f"group @{name}: ClusterShell's groups.conf: {error}") from error
    except (GroupResolverError, GroupSourceError):
        return None, names  # no such source, no such group
    return found or None, names


def hosts(text: str | Iterable[str], config: Any = None, inventory: str | None = None) -> Hosts:
    """Return the hosts that `text` names, each once.

    It may say `web[1-6]`, `db1,ops@web[1-3]`, `web[1-6],!web3`, or a group, `@web`: of corra.groups
    in `config`, an Invoke Config, or of ClusterShell's. `inventory` is the path of an Ansible
    inventory; `@all` are all hosts of it. Raises Misuse for a text that can't be read or names no
    host.
    """
    return Hosts(each_host(text, config, inventory))


def each_host(
    text: str | Iterable[str], config: Any = None, inventory: str | None = None
) -> list[str]:
    """Return the hosts that `text` names, one as often as it is named. Raises Misuse."""
    found = None
    if inventory is not None:
        from .reading import inventory_at

        found = inventory_at(inventory)
    texts = [text] if isinstance(text, str) else list(text)
    return list(choose(texts, known_groups(config, found)).names)
