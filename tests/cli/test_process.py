"""Settings of a whole process: corra changes them in its own process only."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Python calls the first registered exit function last: it sees what the verb has left.
SEEN = """
import atexit, gc, json, sys
import invoke.main
before = gc.get_threshold(), sys.getswitchinterval()
def show():
    found = {
        "thresholds": gc.get_threshold(),
        "interval": sys.getswitchinterval(),
        "frozen": gc.get_freeze_count() > 0,
    }
    print(json.dumps({**found, "before": before}), file=sys.stderr)
atexit.register(show)
"""
CORRA = "import corra.__main__ as program; program.main()"
INV = "invoke.main.program.run()"
VERB = ("run", "-R", "--host", "local", "--", "true")


def seen(program: str, words: Sequence[str], cwd: Path) -> dict[str, Any]:
    """Return the settings of a program at its end."""
    done = subprocess.run(
        [sys.executable, "-c", SEEN + program, *words],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stderr.splitlines()[-1]))


@pytest.mark.parametrize(
    ("program", "words"), [(CORRA, VERB), (INV, ("--search-root", str(ROOT), *VERB))]
)
def test_in_its_own_process_corra_collects_rarely_and_not_at_the_end(
    home: Path, program: str, words: Sequence[str]
) -> None:
    found = seen(program, words, home)
    assert found["thresholds"][0] > 10 * found["before"][0][0]
    assert found["interval"] < found["before"][1] / 5
    assert found["frozen"]


def test_in_somebodys_own_tasks_corra_sets_nothing_for_the_process(home: Path) -> None:
    (home / "tasks.py").write_text("from corra.tasks import ps, run\n")
    found = seen(INV, VERB, home)
    assert [found["thresholds"], found["interval"]] == found["before"]
    assert not found["frozen"]
