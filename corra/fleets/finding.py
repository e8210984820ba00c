"""Fleets that exist: found in a journal, or on any one host that has a run of them."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Any

from corra.errors import NoRoom, NotFound
from corra.model.units import in_seconds
from corra.on_host import ledger
from corra.remote.targets import Reach
from corra.runbooks.journal import Journal
from corra.runbooks.ledgers import Here, ledger_on
from corra.runs.patience import Patience

from . import gather
from .events import plans_of, way_of
from .fleet import Fleet
from .plan import BOOK

if TYPE_CHECKING:
    from typing_extensions import Unpack


def attach_fleet(
    id: str,  # noqa: A002 - attach's own word
    host: Any = None,
    *,
    journal: Any = None,
    spool: str | None = None,
    reconnect_timeout: float | str | None = None,
    **reach: Unpack[Reach],
) -> Fleet:
    """Return the fleet that `id` means: its id, the beginning of its tail, or its name.

    Without a host this machine's journal, or the host `journal`, tells it; with one, any host that
    has a run of it. Raises NotFound, Ambiguous, Unreachable.
    """
    patience = Patience(reconnect_timeout_s=in_seconds(reconnect_timeout))
    found = find_fleet(id, host=host, journal=journal, spool=spool, patience=patience, **reach)
    if found is None:
        raise NotFound("no fleet of that name is known here: say on which host", label=id)
    return found


def find_fleet(
    text: str,
    *,
    host: Any = None,
    journal: Any = None,
    spool: str | None = None,
    patience: Patience | None = None,
    **reach: Unpack[Reach],
) -> Fleet | None:
    """Return the fleet that `text` means: an id, the beginning of its tail, or a name.

    It is found in the journal, here or on the host `journal`, and else on a `host` that has a run
    of it; then all of its hosts are asked. None where the journal doesn't have it and no `host` is
    given. Raises NotFound, Ambiguous, Unreachable.
    """
    way: dict[str, Any] = {name: each for name, each in reach.items() if each is not None}
    there = {name: value for name, value in way.items() if name != "as_user"}
    where, found = ledger_on(journal, **there), None
    if journal is not None or journals_here():
        found = gather.find_journal(text, where, **there)
    if found is not None and (plans := plans_of(found.book.events)):
        known_way = {**way_of(found.book.events), **way}
        return Fleet(plans, reach=known_way, journal=found, patience=patience)
    if host is None:
        return None
    plan = gather.find_on_host(text, host, spool=spool, **way)
    kept = Journal(where, BOOK, plan.id)
    kept.read()
    fleet = Fleet([plan], reach=way, journal=kept, patience=patience)
    answers = fleet.ask()
    fleet.learn(answers)
    if isinstance(where, Here):
        # From now on this machine knows it by its id.
        with contextlib.suppress(NoRoom):
            fleet.begin()
            fleet.note_known()
    return fleet


def journals_here() -> bool:
    """Return whether this machine has any fleet's journal. Costs next to nothing."""
    roots = ledger.roots()  # type: ignore[no-untyped-call] # it runs on 3.6 as well
    return any(os.path.isdir(os.path.join(root, BOOK)) for root in roots)
