"""Who may do what. A token is `corra_KEY_SECRET`: the key finds it, the secret opens, and only the secret's hash is kept."""

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
# What a reader's scope may be narrowed by; `*` at the end of a value stands for anything.
NARROWED = ("host", "user", "by", "fleet", "name")

_TOKEN = re.compile(r"corra_([0-9a-z]{12})_([0-9A-Za-z_-]{43})")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")


@dataclass(frozen=True)
class Token:
    """A token that was accepted. `run` is set for a run's own, which may only report that run."""

    id: int
    name: str
    scopes: tuple[str, ...]
    run: str | None
    owner: int
    expires: float | None

    def may_report(self, prog_id: str) -> None:
        """Raise Refusal unless this token may report `prog_id`."""
        if self.run is not None and self.run != prog_id:
            raise RequestRefusal(403, "other_run", "this token opens another run")
        if self.run is None and WRITE not in self.scopes:
            raise RequestRefusal(403, "not_allowed", "this token may not write")

    def may_register(self) -> None:
        if self.run is not None or WRITE not in self.scopes:
            raise RequestRefusal(403, "not_allowed", "this token may not register runs")

    def may_read(self) -> list[Mapping[str, str]]:
        """Return what the token may see: any run that has all that one of these says. Raises Refusal when that is none."""
        seen: list[Mapping[str, str]] = []
        for scope in self.scopes:
            word, _, rest = scope.partition(":")
            if word == READ:
                seen.append(dict(part.split("=", 1) for part in rest.split("&")) if rest else {})
        if not seen or self.run is not None:
            raise RequestRefusal(403, "not_allowed", "this token may not read")
        return [{}] if {} in seen else seen


def new() -> tuple[str, str, bytes]:
    """Return (the token as its owner gets it, its key, the hash to keep)."""
    key, secret = (
        "".join(secrets.choice("0123456789abcdefghijklmnopqrstuvwxyz") for _ in range(12)),
        secrets.token_urlsafe(32),
    )
    return f"corra_{key}_{secret}", key, digest(secret)


def digest(secret: str) -> bytes:
    # 256 bits of chance need no salt and no slow hash: there is nothing to guess.
    return hashlib.sha256(secret.encode()).digest()


def split(header: str | None) -> tuple[str, str]:
    """Return (key, secret) of an Authorization header. Raises Refusal."""
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


def checked(row: Mapping[str, Any] | None, secret: str) -> Token:
    """Return the Token of `row` if `secret` opens it. Raises Refusal, the same for an unknown key as for a wrong secret."""
    kept = row["hash"] if row else bytes(32)
    if not hmac.compare_digest(bytes(kept), digest(secret)) or row is None:
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
                f"not a scope: {scope!r} (read, write, or read:host=db* with {', '.join(NARROWED)})",
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
