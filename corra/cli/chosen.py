"""Which hosts --host, --limit and --inventory mean, with what stdin and the configuration add."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from invoke.context import Context

from corra.errors import Misuse
from corra.settings import setting

from .flags import ReachFlags

if TYPE_CHECKING:
    from corra.inventory.tree import Inventory

# The set that is read from stdin.
STDIN = "-"
# So many names are said of what didn't match, or was left aside.
_SAID_MOST = 5


def inventory_path(c: Context, given: ReachFlags) -> str | None:
    """Return the path of the inventory of the flag, else of the configuration."""
    path = given.inventory or setting(c.config, "inventory")
    return None if path is None else os.path.abspath(os.path.expanduser(path))


def choose_hosts(
    c: Context,
    given: ReachFlags,
    texts: Sequence[str],
    *,
    fate: str = "NOT DONE",
    whole: bool = False,
    limited: bool = True,
    each: bool = False,
) -> list[str]:
    """Return the hosts of sets such as `db1,web[1-3]`, `@web` or `-`; with `each`, also twice.

    `whole`: sets that name no host, beside exclusions, mean all hosts of --inventory. `limited`:
    --limit applies. Nothing for no text at all. Raises Misuse.
    """
    from corra.model.host_sets import choose, one_plain_host

    texts = [text for text in texts if text.strip(", ")]
    limit = given.limit if limited else []
    try:
        if len(texts) == 1 and not (limit or given.inventory) and one_plain_host(texts[0]):
            return [texts[0]]
        from corra.inventory.groups import known_groups

        found = _read_inventory(c, given)
        base = found.groups["all"] if whole and given.inventory and found is not None else None
        texts = _with_stdin(given, texts)
        if not texts and base is None:
            if limit:
                raise Misuse("--limit needs --host or --inventory to choose from")
            return []
        chosen = choose(texts, known_groups(c.config, found), limit=limit, base=base)
    except Misuse as error:
        raise error.but(fate=fate) from error
    if chosen.unmatched:
        names = ", ".join(chosen.unmatched[:_SAID_MOST])
        more = len(chosen.unmatched) - _SAID_MOST
        more_said = f" and {more} more" if more > 0 else ""
        _note(given, f"{names}{more_said}: excluded or limited to, and not among the hosts")
    return list(chosen.names if each else dict.fromkeys(chosen.names))


def _read_inventory(c: Context, given: ReachFlags) -> Inventory | None:
    path = inventory_path(c, given)
    if path is None:
        return None
    from corra.inventory.reading import inventory_at

    found = inventory_at(path)
    if given.inventory and found.aside:
        more = len(found.aside) - _SAID_MOST
        names = ", ".join(found.aside[:_SAID_MOST]) + (f" and {more} more" if more > 0 else "")
        _note(given, f"inventory {given.inventory}: left aside: {names}")
    return found


def _note(given: ReachFlags, text: str) -> None:
    """Say a line once."""
    # The way to a host is begun before there is a screen. The verb chooses once more.
    if text not in given.host_notes and hasattr(given, "screen"):
        given.host_notes |= {text}
        given.screen.note("", "", text)


def _with_stdin(given: ReachFlags, texts: Sequence[str]) -> list[str]:
    """Return texts with `-` replaced by the sets that stdin has, a line each, without comments."""
    if STDIN not in texts:
        return list(texts)
    if given.stdin_hosts is None:
        if getattr(given, "stdin", None) == STDIN or getattr(given, "interactive", False):
            raise Misuse("--host - reads the hosts from stdin, which the program can't read too")
        if os.isatty(0):
            raise Misuse("--host - reads hosts from stdin, a line each: pipe them in")
        given.stdin_hosts = _lines(sys.stdin.buffer.read())
    lines = given.stdin_hosts
    return [line for text in texts for line in (lines if text == STDIN else [text])]


def _lines(data: bytes) -> list[str]:
    try:
        lines = [line.partition("#")[0].strip() for line in data.decode().splitlines()]
    except UnicodeDecodeError:
        raise Misuse("--host -: stdin isn't UTF-8") from None
    found = [line for line in lines if line]
    if not found:
        raise Misuse("--host -: no host on stdin")
    for line in found:
        if len(line.split()) > 1:
            raise Misuse(f"--host -: one host or set a line: {line!r}")
    return found


def may_read_stdin(given: ReachFlags) -> bool:
    """Return whether the hosts come from stdin."""
    return STDIN in given.host
