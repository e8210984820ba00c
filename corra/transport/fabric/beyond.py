"""What Fabric's connection can't do, and the ssh program can."""

from __future__ import annotations

from collections.abc import Sequence

from corra.errors import CorraError


class BeyondFabric(Exception):
    """The host is one for the ssh program, for `reasons`.

    `error` is what is wrong if there is no ssh program. If not `certain`, the ssh program may do no
    better; then Fabric says what is wrong.
    """

    def __init__(self, reasons: Sequence[str], error: CorraError, *, certain: bool = True) -> None:
        self.reasons = tuple(reasons)
        self.error = error
        self.certain = certain
        super().__init__(", ".join(reasons))
