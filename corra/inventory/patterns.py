"""Ansible's names of several hosts: `web[01:20].example.com`, `db-[a:f]`, `web1:2222`."""

from __future__ import annotations

import itertools
import re
import string

from corra.errors import Misuse
from corra.model.host import Host
from corra.model.host_sets import HOSTS_MOST

from .tree import Said

_RANGE = re.compile(r"\[(\w+):(\w+)(?::([1-9][0-9]*))?\]")


def host_names(pattern: str, where: str) -> tuple[list[str], Said | None]:
    """Return the names of a pattern and the port behind it. Raises Misuse, with file and line."""
    text, port = pattern, None
    if match := re.fullmatch(r"([^:\[\]]*(?:\[[^\]]*\][^:\[\]]*)*):([0-9]+)", pattern):
        text, port = match.group(1), Said(match.group(2), where)
    pieces = re.split(r"(\[[^\]]*\])", text)
    choices: list[list[str]] = []
    total = 1
    for piece in pieces:
        choices.append(_spread(piece, where) if piece.startswith("[") else [piece])
        total *= len(choices[-1])
        if total > HOSTS_MOST:
            raise Misuse(f"{where}: {pattern}: at most {HOSTS_MOST} hosts")
    names = ["".join(each) for each in itertools.product(*choices)]
    try:
        Host.parse(names[0])
    except Misuse as error:
        raise Misuse(f"{where}: {error.why}") from error
    return names, port


def _spread(piece: str, where: str) -> list[str]:
    match = _RANGE.fullmatch(piece)
    if match is None:
        raise Misuse(f"{where}: not a range: {piece} (say [1:20], [01:20] or [a:f])")
    low, high, step = match.group(1), match.group(2), int(match.group(3) or 1)
    if low.isdecimal() and high.isdecimal():
        if len(low) > 1 and low.startswith("0") and len(low) != len(high):
            raise Misuse(f"{where}: not a range: {piece}: it is padded in two ways")
        width = len(low) if low.startswith("0") else 0
        numbers = range(int(low), int(high) + 1, step)
        if len(numbers) > HOSTS_MOST:
            raise Misuse(f"{where}: {piece}: at most {HOSTS_MOST} hosts")
        found = [f"{number:0{width}}" for number in numbers]
    else:
        letters = string.ascii_letters
        if len(low) != 1 or len(high) != 1 or low not in letters or high not in letters:
            raise Misuse(f"{where}: not a range: {piece} (say [1:20], [01:20] or [a:f])")
        found = list(letters[letters.index(low) : letters.index(high) + 1 : step])
    if not found:
        raise Misuse(f"{where}: not a range: {piece} ends before it begins")
    return found
