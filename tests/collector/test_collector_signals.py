"""TERM at each system call of a server, of any of its threads: it ends, however early it comes.

CORRA_SWEEP_POINTS says at how many calls; the seed, at which.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from conftest import COLD, ROOT

from tracing import Signalled, signalled

POINTS = int(os.environ.get("CORRA_SWEEP_POINTS") or 3)
SEED = int(os.environ.get("CORRA_SEED") or int.from_bytes(os.urandom(3), "big"))


@pytest.mark.storm
@pytest.mark.timeout(600)
def test_no_term_to_a_server_is_swallowed_however_early_it_comes(home: Path) -> None:
    def served(point: int, deadline_s: float) -> Signalled:
        words = ["serve", "--listen", "127.0.0.1:0", "--database", str(home / f"{point}.sqlite3")]
        return signalled(
            [*COLD, *words],
            signal.SIGTERM,
            point,
            threads=True,
            deadline_s=deadline_s,
            PYTHONPATH=str(ROOT),
        )

    untouched = served(1 << 30, 8)
    assert b"listening at" in untouched.err
    # The last fifth begins while it imports, and ends with the server at rest.
    begin = untouched.stops * 4 // 5
    stride = max(1, (untouched.stops - begin) // POINTS)
    wrong = []
    for point in range(begin + SEED % stride, untouched.stops, stride):
        found = served(point, 25)
        orderly = found.code == 0 and b'"stopped"' in found.err
        if found.was_sent and not (orderly or found.code == -signal.SIGTERM):
            wrong.append((point, found))
    assert wrong == [], SEED
