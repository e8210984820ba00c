"""PROG-IDs: `20261123t014409z-k7m2qxwp` names one run for ever.

The client makes the id before it sends a byte, so a start whose answer was lost can be repeated
safely. People see six characters of the tail, and may type any unique prefix of two or more.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import time

# No vowels (no words), no 0/1/l/o (no look-alikes).
ALPHABET = "23456789bcdfghjkmnpqrstvwxz"
TAIL_SHOWN = 6
_LETTERS = len(ALPHABET)
_FAIR = 256 // _LETTERS * _LETTERS

PATTERN = "[a-z0-9][a-z0-9._-]{0,63}"
_VALID = re.compile(PATTERN)
_MADE = re.compile(rf"\d{{8}}t\d{{6}}z-([{ALPHABET}]{{8}})")


def new_id(now_s: float | None = None) -> str:
    """Return a fresh PROG-ID for the moment `now_s` (seconds since the epoch; default: now)."""
    stamp = time.strftime("%Y%m%dt%H%M%Sz", time.gmtime(now_s))
    # The kernel's chance, without a module for it. A byte of 243 or more would favour some letters.
    letters: list[str] = []
    while len(letters) < 8:
        letters += [ALPHABET[byte % _LETTERS] for byte in os.urandom(16) if byte < _FAIR]
    return stamp + "-" + "".join(letters[:8])


def derived(*parts: str | int) -> str:
    """Return the PROG-ID that follows from `parts`, the same on every machine.

    By it a runbook's step finds its run again. It has the form of the others, so people see and
    type its tail too; its year is 0000, which no clock makes.
    """
    import hashlib

    number = int.from_bytes(hashlib.sha256(json.dumps(parts).encode()).digest(), "big")
    number, stamp = divmod(number, 10**10)
    tail = ""
    for _ in range(8):
        number, letter = divmod(number, len(ALPHABET))
        tail += ALPHABET[letter]
    digits = f"{stamp:010}"
    return f"0000{digits[:4]}t{digits[4:]}z-{tail}"


def is_valid(prog_id: str) -> bool:
    """Return whether `prog_id` is safe as a file name, a part of a URL and a shell word."""
    return _VALID.fullmatch(prog_id) is not None


def short(prog_id: str) -> str:
    """Return what people see of an id: six characters of its tail; all of an id given by --id."""
    return tail(prog_id)[:TAIL_SHOWN] if _MADE.fullmatch(prog_id) else prog_id


def tail(prog_id: str) -> str:
    """Return what people type the beginning of: an id's last eight characters.

    Of an id given by --id it is the whole.
    """
    made = _MADE.fullmatch(prog_id)
    return made.group(1) if made else prog_id


def typable(prog_id: str, name: str | None = None) -> str:
    """Return the word of a shell that means the run: its name, or its id where that can't be."""
    plain = name is not None and name.isprintable() and not name.startswith("-")
    return shlex.quote(name) if name and plain else short(prog_id)


def label(prog_id: str, name: str | None = None) -> str:
    """Return how a line names a run: `migrate (k7m2qx)`, or `k7m2qx` when it has no name."""
    return f"{name} ({short(prog_id)})" if name else short(prog_id)
