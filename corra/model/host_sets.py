"""Sets of hosts as people write them, `web[1-6,9],db1`, in the order written, and in waves.

ClusterShell's NodeSet reads and writes them: operators know its language from clush, Slurm and
pdsh. NodeSet sorts; here the host named first stays first, since it is the canary.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import overload

from corra.errors import Misuse

from .host import Host
from .rollout import wave_sizes

# Difference, intersection, symmetric difference (`web[1-6]!web3`): such a text is more than a list.
_OPERATORS = re.compile(r"[!&^]")
# A comma that separates parts stands outside brackets.
_PARTS = re.compile(r",(?![^\[]*\])")
_IPV6 = re.compile(r"(?:[^@]+@)?\[[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*(?:%[\w.-]+)?\](?::\d+)?")


class Hosts(Sequence[str]):
    """Names of hosts in order, each once. Its text is folded: `web[1-6]`."""

    def __init__(self, names: Iterable[str] = ()) -> None:
        self._names = tuple(dict.fromkeys(names))

    @overload
    def __getitem__(self, at: int) -> str: ...
    @overload
    def __getitem__(self, at: slice) -> Hosts: ...
    def __getitem__(self, at: int | slice) -> str | Hosts:
        return Hosts(self._names[at]) if isinstance(at, slice) else self._names[at]

    def __len__(self) -> int:
        return len(self._names)

    def __eq__(self, other: object) -> bool:
        return self._names == other._names if isinstance(other, Hosts) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._names)

    def __str__(self) -> str:
        return fold(self._names)

    def __repr__(self) -> str:
        return f"<Hosts {self}>"


def hosts(text: str | Iterable[str]) -> Hosts:
    """Return the hosts that `text` names.

    It may say `web[1-6]`, `db1,ops@web[1-3]`, `web[1-6]!web3`, or a `@group` of ClusterShell's.
    Raises Misuse for a text that can't be read or names no host.
    """
    return Hosts(each_host(text))


def each_host(text: str | Iterable[str]) -> list[str]:
    """Return the hosts that `text` names, one as often as it is named. Raises Misuse."""
    texts = [text] if isinstance(text, str) else list(text)
    names = [name for each in texts for name in _expanded(each)]
    if not names:
        raise Misuse(f"no host in {text!r}")
    for name in names:
        Host.parse(name)
    return names


def _expanded(text: str) -> list[str]:
    parts = [text] if _OPERATORS.search(text) else _PARTS.split(text)
    return [name for part in parts if part.strip() for name in _part(part.strip())]


def _part(text: str) -> list[str]:
    if _IPV6.fullmatch(text) or not re.search(r"[\[\]!&^]|^@", text):
        return [text]
    from ClusterShell.NodeSet import NodeSet, NodeSetException

    try:
        return [str(name) for name in NodeSet(text)]
    except NodeSetException as error:
        raise Misuse(f"not a set of hosts: {text!r}: {error}") from error


def waves(hosts: Iterable[str], *sizes: int | str) -> list[Hosts]:
    """Return `hosts` in waves of these sizes; the last size is repeated to the end.

    A size is a number, or a share of all hosts such as "25%", which is at least one host.
    `waves(fleet, 1, 2, "100%")` is a canary, two more, and the rest. Raises Misuse.
    """
    left = Hosts(hosts)
    found: list[Hosts] = []
    for size in wave_sizes(len(left), sizes):
        found.append(left[:size])
        left = left[size:]
    return found


def fold(hosts: Iterable[str | Host]) -> str:
    """Return names of hosts as a set is written: `db1,web[1-3]`."""
    names = [str(host) for host in hosts]
    if len(names) < 2:
        return "".join(names)
    if any(_IPV6.fullmatch(name) for name in names):
        return ",".join(names)
    from ClusterShell.NodeSet import NodeSet, NodeSetException

    try:
        return str(NodeSet.fromlist(names))
    except NodeSetException:
        return ",".join(names)
