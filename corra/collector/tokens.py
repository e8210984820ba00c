"""Who may do what.

A token is `corra_KEY_SECRET`. The key finds its row, and the secret opens it. The database has only
the secret's hash.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from corra.errors import Misuse

from .limits import RequestRefusal

RUN, WRITE, READ = "run", "write", "read"
# The fields that a reader's scope may be narrowed by. A `*` at the end of a value is any ending.
NARROWED = ("host", "user", "by", "fleet", "name")

_TOKEN = re.compile(r"corra_([0-9a-z]{12})_([0-9A-Za-z_-]{43})")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")


@dataclass(frozen=True)
class Token:
    """A token that was accepted. With `run` set it is a run's own and may only report that run."""

    id: int
    name: str
    scopes: tuple[str, ...]
    run: str | None
    owner: int
    expires: float | None

    def may_report(self, prog_id: str) -> None:
        """Raise RequestRefusal unless this token may report `prog_id`."""
        if self.run is not None and self.run != prog_id:
            raise RequestRefusal(403, "other_run", "this token opens another run")
        if self.run is None and WRITE not in self.scopes:
            raise RequestRefusal(403, "not_allowed", "this token may not write")

    def may_register(self) -> None:
        """Raise RequestRefusal unless this token may register runs."""
        if self.run is not None or WRITE not in self.scopes:
            raise RequestRefusal(403, "not_allowed", "this token may not register runs")

    def may_read(self) -> list[Mapping[str, str]]:
        """Return the filters of this token: it sees each run that matches at least one of them.

        Raises RequestRefusal when it sees none.
        """
        seen: list[Mapping[str, str]] = []
        for scope in self.scopes:
            word, _, rest = scope.partition(":")
            if word == READ:
                seen.append(dict(part.split("=", 1) for part in rest.split("&")) if rest else {})
        if not seen or self.run is not None:
            raise RequestRefusal(403, "not_allowed", "this token may not read")
        return [{}] if {} in seen else seen


def made_token() -> tuple[str, str, bytes]:
    """Make a token: return (its text for the owner, its key, the hash to keep)."""
    key, secret = (
        "".join(secrets.choice("0123456789abcdefghijklmnopqrstuvwxyz") for _ in range(12)),
        secrets.token_urlsafe(32),
    )
    return f"corra_{key}_{secret}", key, _digest(secret)


def _digest(secret: str) -> bytes:
    # 256 random bits can't be guessed, so they need no salt and no slow hash.
    return hashlib.sha256(secret.encode()).digest()


def split_header(header: str | None) -> tuple[str, str]:
    """Return (key, secret) of an Authorization header. Raises RequestRefusal."""
    scheme, _, text = (header or "").partition(" ")
    match = _TOKEN.fullmatch(text.strip()) if scheme.lower() == "bearer" else None
    if not match:
        raise RequestRefusal(
            401,
            "no_token",
            "no token: Authorization: Bearer TOKEN",
            headers={"WWW-Authenticate": "Bearer"},
        )
    return match[1], match[2]


def checked_token(row: Mapping[str, Any] | None, secret: str) -> Token:
    """Return the Token of `row` if `secret` opens it.

    Raises RequestRefusal, the same one for an unknown key and for a wrong secret.
    """
    kept = row["hash"] if row else bytes(32)
    if not hmac.compare_digest(bytes(kept), _digest(secret)) or row is None:
        raise RequestRefusal(
            401,
            "bad_token",
            "not a token of this collector",
            headers={"WWW-Authenticate": "Bearer"},
        )
    if row["revoked"] is not None or (row["expires"] is not None and row["expires"] < time.time()):
        raise RequestRefusal(
            401,
            "old_token",
            "this token has expired or was taken back",
            headers={"WWW-Authenticate": "Bearer"},
        )
    return Token(
        row["id"],
        row["name"],
        tuple(json.loads(row["scopes"])),
        row["run"],
        row["owner"] or row["id"],
        row["expires"],
    )


def parse_token_spec(text: str) -> tuple[str, list[str]]:
    """Read `NAME=read,write` or `NAME=read:host=db*&by=ops`. Raises Misuse."""
    name, equals, rest = text.partition("=")
    scopes = [scope for scope in rest.split(",") if scope]
    if not equals or not _NAME.fullmatch(name) or not scopes:
        raise Misuse(
            f"not NAME=SCOPES: {text!r} (say laptop=read,write or team=read:host=db*)",
            fate="NOT MADE",
        )
    for scope in scopes:
        if scope not in (READ, WRITE) and not _is_narrowed(scope):
            raise Misuse(
                f"not a scope: {scope!r} "
                f"(read, write, or read:host=db* with {', '.join(NARROWED)})",
                fate="NOT MADE",
            )
    return name, scopes


def _is_narrowed(scope: str) -> bool:
    word, colon, rest = scope.partition(":")
    parts: Sequence[str] = rest.split("&")
    return (
        word == READ
        and bool(colon)
        and all(part.partition("=")[0] in NARROWED and part.partition("=")[2] for part in parts)
    )
