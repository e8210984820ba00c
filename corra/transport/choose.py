"""Decides which transport reaches a host."""

from __future__ import annotations

from typing import Any

from corra.errors import Misuse
from corra.model.host import Host

from .channel import CONNECT_S, Runner


def choose_runner(
    target: Host | Any,
    *,
    via: str = "fabric",
    config: Any = None,
    connect_timeout_s: float | None = CONNECT_S,
    accept_new_key: bool = False,
    password: str | None = None,
) -> Runner:
    """Return the Runner for a Host, or for a fabric.Connection, which is used while it is open.

    `config` is an Invoke config. Where `connect_timeout_s` is None, ssh_config decides. `password`
    is for the sudo on the way. If sudo makes us another user here first, that user can only call
    the ssh program, so the Runner is OpenSSH. Nothing is connected yet. Raises Misuse.
    """
    if isinstance(target, Host) and target.is_local:
        from .local import Local

        return Local(target, password=password)
    # Each way has modules of its own, and a verb needs those of one.
    from .default import DefaultLink

    if not isinstance(target, Host):
        from .fabric.connection import host_of

        return DefaultLink(
            host_of(target),
            config=target.config,
            connection=target,
            connect_timeout_s=connect_timeout_s,
            accept_new_key=accept_new_key,
            password=password,
        )
    how: dict[str, Any] = {
        "config": config,
        "connect_timeout_s": connect_timeout_s,
        "accept_new_key": accept_new_key,
        "password": password,
    }
    match via:
        case "fabric" if target.caller is None:
            return DefaultLink(target, **how)
        case "fabric" | "openssh":
            from .openssh import OpenSSH

            return OpenSSH(target, **how)
    raise Misuse(f"no transport {via!r}: there are fabric and openssh")
