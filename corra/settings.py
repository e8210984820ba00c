"""What the configuration says under `corra`.

It is in invoke.yaml and its kin, in ns.configure, and in variables such as INVOKE_CORRA_HOST.
Invoke takes a variable only for a key that a collection has configured, and `from corra.tasks
import run` configures none; so the variables are read here. An unknown key is a misuse: whoever
wrote `hots: db1` must hear of it.
"""

from __future__ import annotations

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


def _groups(value: Any) -> dict[str, list[str]]:
    if not isinstance(value, Mapping):
        raise Misuse("not {NAME: SET of hosts, or a list of them}")
    found: dict[str, list[str]] = {}
    for name, hosts in value.items():
        texts = [hosts] if isinstance(hosts, str) else hosts
        if not isinstance(texts, (list, tuple)) or not all(isinstance(each, str) for each in texts):
            raise Misuse(f"@{name}: neither a set of hosts nor a list of them: {hosts!r}")
        found[str(name)] = list(texts)
    return found


# name: (how its value is read, what it is the default of)
SETTINGS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "host": (str, "--host of run"),
    "groups": (_groups, "what @NAME means to --host"),
    "inventory": (str, "--inventory, for the names in it"),
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


_PREFIXES = ("INVOKE_CORRA_", "FABRIC_CORRA_")


def setting(config: Any, name: str) -> Any:
    """Return the setting `name` of an Invoke Config, else of the environment, or None.

    Raises Misuse.
    """
    read, _ = SETTINGS[name]
    section: Mapping[str, Any] = (config.get("corra") if config is not None else None) or {}
    if not isinstance(section, Mapping):
        raise Misuse(f"corra in the configuration is {section!r}, not names with values")
    for key in section:
        if key not in SETTINGS:
            raise _unknown(f"corra.{key} in the configuration", str(key))
    for variable in os.environ:
        prefix = next((each for each in _PREFIXES if variable.startswith(each)), "")
        if prefix and (key := variable.removeprefix(prefix).lower()) not in SETTINGS:
            raise _unknown(f"${variable}", key)
    value = section.get(name)
    where = f"corra.{name} in the configuration"
    if value is None:
        variable = next(
            (
                each
                for each in (prefix + name.upper() for prefix in _PREFIXES)
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


def _unknown(where: str, key: str) -> Misuse:
    import difflib

    near = difflib.get_close_matches(key, SETTINGS, 1)
    why = f"{where} means nothing" + (f" (did you mean {near[0]}?)" if near else "")
    return Misuse(why, hint=["there are " + ", ".join(SETTINGS)])
