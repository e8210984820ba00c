"""New fleets: which hosts, which program, and how it is rolled out. Nothing is started here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, cast

from corra.errors import Misuse
from corra.inventory.groups import each_host
from corra.model.host import Host
from corra.model.program import OPEN
from corra.model.units import in_seconds
from corra.remote.bootstrap import agent_digest
from corra.remote.targets import Reach
from corra.runbooks.journal import Journal
from corra.runbooks.ledgers import ledger_on
from corra.runs import request
from corra.runs.asking import asked_by
from corra.runs.patience import Patience
from corra.runs.request import Launch
from corra.runs.stdin_file import shared_descriptor

from .board import today
from .fleet import Fleet
from .plan import AT_ONCE, BOOK, START_S, host_of, members_of, new_plan, program_digest

if TYPE_CHECKING:
    from typing_extensions import Unpack

_REACH = frozenset(Reach.__annotations__)
_OF_START = frozenset(request.StartOptions.__annotations__) - _REACH


class FleetOptions(request.StartOptions, total=False):
    """What may be said of a fleet: how it is rolled out, and the options of a start.

    `batch` are sizes of waves: 5, "10%", or several.
    """

    batch: int | str | Sequence[int | str] | None
    at_once: int | None
    max_fail: int | str | None
    max_unreached: int | str | None
    pause: float | str | None
    confirm: bool
    order: str | None
    canary: Sequence[str]
    kill_on_fail: bool
    start_timeout: float | str | None
    journal: Any


def fleet(
    hosts: str | Iterable[str | Host],
    argv: Sequence[str],
    *,
    each: bool = False,
    reconnect_timeout: float | str | None = None,
    **how: Unpack[FleetOptions],
) -> Fleet:
    """Return a new Fleet of `argv` on all hosts; nothing is started before its `roll`.

    `hosts` is a set (`web[1-50]`) or names; with `each`, a host that comes twice has two runs.
    `batch` are sizes of waves: 5, "10%", or several. Raises Misuse.
    """
    names = each_host(
        hosts if isinstance(hosts, str) else [str(host) for host in hosts],
        how.get("config"),
        how.get("inventory"),
    )
    members = members_of(names if each else dict.fromkeys(names))
    patience = Patience(reconnect_timeout_s=in_seconds(reconnect_timeout))
    return new_fleet(members, argv, patience=patience, **how)


def new_fleet(
    members: Sequence[str],
    argv: Sequence[str],
    *,
    patience: Patience | None = None,
    prepare: Callable[[Launch], Launch] | None = None,
    **how: Unpack[FleetOptions],
) -> Fleet:
    """Return a new Fleet; nothing is started and nobody is asked.

    `prepare` changes each Launch before its start. Raises Misuse.
    """
    request.refuse_unknown("fleet", how, FleetOptions)
    if how.get("stdin") is OPEN:
        raise Misuse("a fleet's stdin can't be held open: give it whole, with --stdin")
    if not members:
        raise Misuse("no hosts")
    fleet_id = request.new_run_id(how.get("id"))
    of_start = {name: value for name, value in how.items() if name in _OF_START}
    reach = {name: value for name, value in how.items() if name in _REACH}
    # A host that is none: the template is for all of them, and `local` would fill in a directory.
    start = cast("request.StartOptions", {**of_start, "id": fleet_id})
    launch = request.launch(Host("fleet"), argv, **start)
    batch = how.get("batch")
    plan = new_plan(
        members,
        id=fleet_id,
        batch=[batch] if isinstance(batch, (int, str)) else list(batch or ()),
        at_once=how.get("at_once") or AT_ONCE,
        max_fail=how.get("max_fail"),
        max_unreached=how.get("max_unreached"),
        pause_s=in_seconds(how.get("pause")) or 0.0,
        confirm=how.get("confirm", False),
        order=how.get("order") or "given",
        canary=how.get("canary", ()),
        kill_on_fail=how.get("kill_on_fail", False),
        start_s=in_seconds(how.get("start_timeout")) or START_S,
        name=how.get("name"),
        program=program_digest(launch.request),
        agent=agent_digest(),
        as_user=how.get("as_user"),
        spool=how.get("spool"),
        inventory=_inventory_of(members, how.get("inventory")),
        by=asked_by(),
        at=today(),
    )
    plan.to_text()  # too large a plan is refused here
    where = ledger_on(how.get("journal"), **{k: v for k, v in reach.items() if k != "as_user"})
    payload = None if launch.payload is None else shared_descriptor(launch.payload)
    return Fleet(
        [plan],
        reach=reach,
        journal=Journal(where, BOOK, fleet_id),
        template=launch.request,
        payload=payload,
        patience=patience,
        prepare=prepare,
    )


def _inventory_of(members: Iterable[str], inventory: str | None) -> str | None:
    """Return the inventory's path if it says where any of the members is. Raises Misuse."""
    if inventory is None:
        return None
    from corra.inventory.reading import inventory_at

    found = inventory_at(inventory)
    addresses = [found.address(host_of(member)) for member in members]
    return found.source if any(addresses) else None
