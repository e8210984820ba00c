"""From a target, as people and their tasks name it, to its agent. Nothing connects here."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypedDict

from corra.errors import Misuse
from corra.model.host import LOCAL, Host
from corra.transport.channel import CONNECT_S
from corra.transport.choose import choose_runner

from .agent_client import Agent, place

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Reach(TypedDict, total=False):
    """How a host is reached: the login, the user of sudo, the transport, the patience."""

    user: str | None
    as_user: str | None
    via: str | None
    config: Any
    connect_timeout: float | None
    accept_new_key: bool
    inventory: str | None


def agent_for(
    target: Any,
    *,
    user: str | None = None,
    as_user: str | None = None,
    via: str | None = None,
    config: Any = None,
    connect_timeout: float | None = CONNECT_S,
    accept_new_key: bool = False,
    inventory: str | None = None,
) -> Agent:
    """Return the agent of `target`; its first verb connects.

    `inventory` is the path of an Ansible inventory, in which a name is looked up.

    Raises TypeError for a value that is no target, Misuse for a target that makes no sense.
    """
    if isinstance(target, Agent):
        return target
    limits: dict[str, Any] = {
        "connect_timeout_s": connect_timeout,
        "accept_new_key": accept_new_key,
    }
    if is_a(target, "fabric.connection", "Connection"):
        from corra.transport.default import DefaultLink
        from corra.transport.fabric.connection import host_of

        config = config or target.config
        host = host_of(target).run_as(as_user)
        if host.caller:
            raise Misuse(
                f"an open connection is nobody's to call anew: {host.caller} needs the host's name"
                " as target",
                host=host.name,
            )
        return place(
            DefaultLink(
                host, config=config, connection=target, password=_sudo_password(config), **limits
            )
        )
    if is_a(target, "invoke.context", "Context"):
        raise TypeError(
            "a Context is no target: it means this machine under inv and the other one under fab; "
            'say which: "local", a host name, or a fabric Connection'
        )
    if isinstance(target, str):
        host = Host.parse(target, login=user, user=as_user)
    elif isinstance(target, Host):
        host = replace(target, login=target.login or user).run_as(as_user)
    else:
        raise TypeError(
            f"not a target: {target!r} (a host name, a corra.Host or a fabric Connection)"
        )
    if inventory is not None:
        host = host_in_inventory(host, inventory)
    limits["password"] = _sudo_password(config)
    by, _, keeper = (via or "fabric").partition("@")
    if by == "chaperone":
        from .chaperone import Chaperone

        return Chaperone(host, keeper or LOCAL, config=config, **limits)
    return place(choose_runner(host, via=via or "fabric", config=config, **limits))


def host_in_inventory(host: Host, inventory: str) -> Host:
    """Return a host with the address that the inventory has for its name. Raises Misuse."""
    from corra.inventory.reading import inventory_at

    try:
        address = inventory_at(inventory).address(host.name)
    except Misuse as error:
        raise error.but(host=host.name) from error
    if address is None or host.is_local:
        return host
    if address.name == LOCAL:
        return Host(LOCAL, user=host.user)
    return replace(host, address=address)


def _sudo_password(config: Any) -> str | None:
    """Return sudo's password from Invoke's configuration or --prompt-for-sudo-password."""
    password = None if config is None else (config.get("sudo") or {}).get("password")
    return None if password is None else str(password)


def agent_to_ask(target: Any, **reach: Unpack[Reach]) -> Agent:
    """Return the agent of `target` for a verb that starts nothing.

    The fate of its errors is NOT DONE, not NOT STARTED.
    """
    try:
        return agent_for(target, **reach)
    except Misuse as error:
        raise error.but(fate="NOT DONE") from error


def is_one(target: object) -> bool:
    """Return whether `target` is one host and not several.

    A Connection is iterable too: over the keys of its configuration.
    """
    return (
        isinstance(target, (str, Host, Agent))
        or is_a(target, "invoke.context", "Context")
        or not isinstance(target, Iterable)
    )


def is_a(value: object, module: str, name: str) -> bool:
    """Return whether `value` is an instance of that class, without importing its module.

    Whoever has an instance has imported the module.
    """
    kind = getattr(sys.modules.get(module), name, None)
    return kind is not None and isinstance(value, kind)
