"""What one token may cost, and the refusals."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from corra.errors import Misuse
from corra.model.units import parse_size


class RequestRefusal(Exception):
    """An answer that isn't 2xx: `kind` is for programs, the message for people."""

    def __init__(
        self,
        status: int,
        kind: str,
        message: str,
        *,
        headers: Mapping[str, str] | None = None,
        **facts: Any,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = dict(headers or {})
        self.body = {"error": kind, "message": message, **facts}


@dataclass(frozen=True)
class Limits:
    """`body`: bytes of one request. `rate`: requests a second. `runs`: open runs of one token.

    `disk`: bytes that are kept for all runs of one token.
    """

    body: int = 4 << 20
    rate: int = 1000
    runs: int = 10_000
    disk: int = 64 << 30

    @classmethod
    def parse(cls, text: str) -> Limits:
        """Read any of `body=4M,rate=1000,runs=10000,disk=64G`. Raises Misuse."""
        found = {}
        for part in filter(None, text.split(",")):
            name, _, value = part.partition("=")
            if name not in {each.name for each in fields(cls)}:
                raise Misuse(f"not a limit: {part!r} (body=4M, rate=1000, runs=10000, disk=64G)")
            found[name] = parse_size(value)
        return replace(cls(), **found)


class Rates:
    """How often each token has asked lately.

    Each token has a bucket that fills at `rate` a second and holds two seconds' worth.
    """

    def __init__(self, rate: int) -> None:
        self._rate = rate
        self._left: dict[int, tuple[float, float]] = {}

    def take(self, token_id: int) -> None:
        """Count one request. Raises RequestRefusal with the seconds to wait."""
        now = time.monotonic()
        left, at = self._left.get(token_id, (2.0 * self._rate, now))
        left = min(2.0 * self._rate, left + (now - at) * self._rate)
        if left < 1:
            wait_s = max(1, round((1 - left) / self._rate))
            raise RequestRefusal(
                429,
                "too_fast",
                f"more than {self._rate} requests a second",
                headers={"Retry-After": str(wait_s)},
            )
        self._left[token_id] = (left - 1, now)
        if len(self._left) > 100_000:
            self._left.clear()
