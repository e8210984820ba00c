"""Where runbooks' journals are found.

A journal is on the host that was named, on the host that a pointer here names, or here.
"""

from __future__ import annotations

import os
import shlex
from typing import TYPE_CHECKING, Any

from invoke.context import Context

from corra.errors import CorraError, Misuse, NotFound, typed
from corra.runbooks.book import HERE, Book
from corra.settings import setting

from .chosen import choose_hosts
from .flags import BookFlags
from .selection import host_reach

if TYPE_CHECKING:
    from corra.runbooks.journal import Journal
    from corra.runbooks.ledgers import Ledger


def chosen_ledger(c: Context, given: BookFlags) -> Ledger:
    """Return the ledger of --host, $CORRA_JOURNAL or `corra.journal` in the configuration.

    Without any of them it is the ledger of this machine.
    """
    from corra.runbooks.ledgers import ledger_on

    hosts = choose_hosts(c, given, given.host)
    if len(hosts) > 1:
        raise Misuse("one host at a time: a journal is in one place")
    told = hosts[0] if hosts else os.environ.get("CORRA_JOURNAL") or setting(c.config, "journal")
    return ledger_on(told, **_reach(c, given))


def _reach(c: Context, given: BookFlags) -> dict[str, Any]:
    """Return how a journal's host is reached; `--as` is meant for it only where it is said."""
    return host_reach(c, given)


def all_journals(
    c: Context, given: BookFlags, *, name: str | None = None
) -> list[tuple[Journal | None, str, str, CorraError | None]]:
    """Return (journal, name, key, error) of every runbook to be found, the latest first.

    `error` says why the journal can't be read.
    """
    from corra.runbooks.ledgers import all_books

    where = chosen_ledger(c, given)
    found: list[tuple[Journal | None, str, str, CorraError | None]] = []
    for book, key, _ in all_books(where):
        if name is None or book == name:
            try:
                found.append((_opened(c, given, where, book, key), book, key, None))
            except CorraError as error:
                found.append((None, book, key, error))
    return found


def one_journal(c: Context, given: BookFlags, name: str, key: str) -> Journal:
    """Return the journal of that runbook, read. Raises NotFound."""
    opened = _opened(c, given, chosen_ledger(c, given), name, key)
    if opened.book.begun is None:
        look = (
            ""
            if given.host
            else f"on another host?  {typed()} book --host HOST {shlex.join([name, key])}"
        )
        raise NotFound(
            f"no journal of it {_place(opened)}", label=f"{name} {key}", hint=[look] if look else []
        )
    return opened


def _opened(c: Context, given: BookFlags, where: Ledger, name: str, key: str) -> Journal:
    from corra.runbooks.journal import Journal
    from corra.runbooks.ledgers import Here, ledger_on

    found = Journal(where, name, key, patience_s=0.0)
    book = found.read()
    if book.begun is None and book.kept_at is not None and isinstance(where, Here):
        facts = book.kept_at.facts
        how = {
            **{each: facts[each] for each in ("user", "via") if facts.get(each)},
            **_reach(c, given),
        }
        found = Journal(ledger_on(str(facts["journal"]), **how), name, key, patience_s=0.0)
        found.read()
    return found


def _place(found: Journal) -> str:
    return "here" if found.where.host.is_local else f"on {found.where.host}"


def record_decision(found: Journal, what: str, told: str) -> str:
    """Write `skip` or `redo` of STEP or STEP@HOST into the journal, and return what that means.

    Without a host the decision covers the hosts on which the step hasn't ended well. A step that
    ended well on all of them is redone on all of them. Raises Misuse for an unknown step.
    """
    step, _, host = told.partition("@")
    book = found.book
    known = [each for name, each in book.parts if name == step]
    if host and host not in known:
        raise Misuse(f"{step} was never begun on {host}" + _on(known), fate="NOT DONE")
    if not known and (what == "redo" or not _may_come(book, step)):
        steps = ", ".join(book.steps) or "none yet"
        raise Misuse(f"no step {step!r}: begun are {steps}", fate="NOT DONE")
    undone = book.undone(step)
    hosts = [host] if host else undone or (known if what == "redo" else [])
    if what == "skip" and known and not hosts:
        raise Misuse(f"{step} is done; there is nothing to skip", fate="NOT DONE")
    found.write(what, step=step, hosts=hosts or ["*"])
    where = ", ".join(each for each in hosts if each != HERE)
    decided = "left out" if what == "skip" else "to be done anew"
    return f"{step}{f' on {where}' if where else ''}: {decided}"


def _on(known: list[str]) -> str:
    hosts = [each for each in known if each != HERE]
    return f" but on {', '.join(hosts)}" if hosts else ""


def _may_come(book: Book, step: str) -> bool:
    """Return whether the runbook stopped at a step that was never begun, which may be skipped."""
    stopped = str(book.stopped.facts.get("why", "")) if book.stopped is not None else ""
    return f" {step}:" in stopped or stopped.endswith(f" {step}")
