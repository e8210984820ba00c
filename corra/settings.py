"""What the configuration says under `corra`: in invoke.yaml and its kin, in ns.configure, and as INVOKE_CORRA_NAME.

Invoke itself takes a variable of the environment only for a key that a collection has configured, so a plain `from corra.tasks import run` would
never see it: it is read here. A key that means nothing is said, not passed over: whoever wrote `hots: db1` has to hear of it.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Mapping
from typing import Any

from corra.model.units import output_kept, parse_seconds, parse_size

from .errors import Misuse

_YES = {
    "1": True,
    "true": True,
    "yes": True,
    "on": True,
    "0": False,
    "false": False,
    "no": False,
    "off": False,
}


def _seconds(value: Any) -> float:
    return parse_seconds(str(value))


def _patience(value: Any) -> float:
    found = _seconds(value)
    if found < 1:
        raise Misuse(f"too short to hear from anybody: {value} (1s or more)")
    return found


def _flag(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if str(value).lower() not in _YES:
        raise Misuse(f"not yes or no: {value!r}")
    return _YES[str(value).lower()]


def _size(value: Any) -> int:
    return parse_size(str(value))


def _collectors(value: Any) -> dict[str, dict[str, Any]]:
    known = {"url", "token", "token_file", "ca"}
    if not isinstance(value, Mapping) or not all(
        isinstance(each, Mapping) and each.get("url") and set(each) <= known
        for each in value.values()
    ):
        raise Misuse("not {NAME: {url: URL, token: TOKEN or token_file: FILE, ca: FILE}}")
    return {str(name): dict(each) for name, each in value.items()}


# name: (how its value is read, what it is the default of)
SETTINGS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "host": (str, "--host of run"),
    "user": (str, "--user"),
    "as_user": (str, "--as"),
    "via": (str, "--via"),
    "connect_timeout": (_seconds, "--connect-timeout"),
    "accept_new_key": (_flag, "--accept-new-key"),
    "spool": (str, "--spool"),
    "reconnect_timeout": (_seconds, "--reconnect-timeout, and how long a Durable run tries"),
    "dead_after": (_patience, "--dead-after"),
    "grace": (_seconds, "--grace of run, and of a Durable run's timeout"),
    "keep": (_seconds, "--keep of run"),
    "keep_output": (lambda value: output_kept(str(value)), "--keep-output of run"),
    "journal": (str, "the host that keeps runbooks' journals"),
    "collectors": (_collectors, "what --collector NAME means"),
    "output_limit": (_size, "how much of each stream a Durable run's Result keeps"),
}


def setting(config: Any, name: str) -> Any:
    """Return what `config` (an Invoke Config, or None) or the environment says of `name`, None for nothing. Raises Misuse."""
    read, _ = SETTINGS[name]
    section: Mapping[str, Any] = (config.get("corra") if config is not None else None) or {}
    for key in section:
        if key not in SETTINGS:
            near = difflib.get_close_matches(str(key), SETTINGS, 1)
            raise Misuse(
                f"corra.{key} in the configuration means nothing"
                + (f": {near[0]}?" if near else ""),
                hint=[_known()],
            )
    value = section.get(name)
    where = f"corra.{name} in the configuration"
    if value is None:
        variable = next(
            (
                each
                for each in (f"INVOKE_CORRA_{name.upper()}", f"FABRIC_CORRA_{name.upper()}")
                if os.environ.get(each)
            ),
            "",
        )
        value, where = os.environ.get(variable), f"${variable}"
    if value is None or value == "":
        return None
    try:
        return read(value)
    except (Misuse, ValueError) as error:
        raise Misuse(f"{where}: {error.why if isinstance(error, Misuse) else error}") from error


def _known() -> str:
    return "there are " + ", ".join(SETTINGS)
