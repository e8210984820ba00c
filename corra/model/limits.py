"""What a program may use: the values of `--ulimit`, as the agent reads them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from corra.errors import Misuse

from .units import parse_seconds, parse_size


def _number(text: str) -> int:
    if not re.fullmatch(r"-?[0-9]{1,18}", text):
        raise Misuse(f"not a whole number: {text!r}")
    return int(text)


def _percent(text: str) -> int:
    if not text.endswith("%"):
        raise Misuse(f"not a percentage: {text!r} (150% is one CPU and a half)")
    return _number(text[:-1])


def _cpu(text: str) -> int:
    found = parse_seconds(text)
    if found != int(found):
        raise Misuse(f"not whole seconds: {text!r}")
    return int(found)


_UNLIMITED = ("unlimited", "infinity")
# name: reader of its value, least, most, meaning
LIMITS: dict[str, tuple[Callable[[str], int], int, int, str]] = {
    "files": (_number, 0, 1 << 62, "open files"),
    "core": (parse_size, 0, 1 << 62, "size of a core dump"),
    "cpu": (_cpu, 0, 1 << 62, "seconds of CPU"),
    "memory": (parse_size, 0, 1 << 62, "address space of each process"),
    "nice": (_number, -20, 19, "from -20 (first) to 19 (last)"),
    "oom_score_adj": (
        _number,
        -1000,
        1000,
        "-1000 (never) to 1000: whom the kernel takes when memory runs out",
    ),
    "memory_max": (parse_size, 1, 1 << 62, "memory of all its processes, by systemd"),
    "cpu_quota": (_percent, 1, 10**6, "CPU of all its processes, by systemd, such as 150%"),
}


def parse_limits(given: Mapping[str, int | str | Sequence[int]]) -> dict[str, int | list[int]]:
    """Return limits as the agent reads them.

    A value is a number, its text (`4096`, `2G`, `1h`, `150%`, `unlimited`), or soft and hard:
    `1024:4096`. Raises Misuse for an unknown name or a bad value.
    """
    return {_limit_name(name): _limit(_limit_name(name), value) for name, value in given.items()}


def _limit_name(text: str) -> str:
    name = text.strip().lower().replace("-", "_")
    if name not in LIMITS:
        raise Misuse(f"no such limit: {text!r} (there are {', '.join(LIMITS)})")
    return name


def _limit(name: str, value: int | str | Sequence[int]) -> int | list[int]:
    read, least, most, _ = LIMITS[name]
    from corra.on_host.agent.contract import RLIMITS

    pairs = name in RLIMITS
    parts: list[Any] = (
        list(value.split(":"))
        if isinstance(value, str)
        else list(value)
        if isinstance(value, Sequence)
        else [value]
    )
    found: list[int] = []
    for part in parts:
        try:
            number = (
                -1
                if pairs and part in (-1, *_UNLIMITED)
                else read(part.strip())
                if isinstance(part, str)
                else part
            )
        except Misuse as error:
            raise Misuse(f"limit {name}: {error.why}") from None
        if type(number) is not int or not (least <= number <= most or (number == -1 and pairs)):
            raise Misuse(
                f"limit {name}: not from {least} to {most}: {part!r}"
                if most < 1 << 62
                else f"limit {name}: not a number: {part!r}"
            )
        found.append(number)
    if len(found) > (2 if pairs else 1) or not found:
        raise Misuse(
            f"limit {name}: " + ("SOFT:HARD at most" if pairs else "one number") + f": {value!r}"
        )
    if len(found) == 2 and found[0] % (1 << 64) > found[1] % (1 << 64):
        raise Misuse(f"limit {name}: its soft limit is above its hard one: {value!r}")
    return found[0] if len(found) == 1 else found
