"""Settings of a whole process, which corra changes in its own process only, and its death by
Ctrl-C.
"""

from __future__ import annotations

import json
import shutil
import signal
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


# -- Ctrl-C


POINTS = 16


def test_ctrl_c_ends_corra_by_sigint_and_without_a_word_at_every_moment(home: Path) -> None:
    """strace sends SIGINT at one of the files that corra opens, from its main module on.

    Before that there is only Python itself, and pip's script of three lines.
    """
    if shutil.which("strace") is None:
        pytest.skip("no strace here, which sends a signal at a system call")
    corra_there = [sys.executable, "-m", "corra", "ps", "--host", "local"]
    log = home / "calls"
    trace = ["strace", "-qq", "-s", "256", "-o", str(log), "-e", "trace=openat"]
    for _ in range(2):  # the first call places the agent
        subprocess.run([*trace, *corra_there], cwd=home, capture_output=True, check=True)
    calls = log.read_text().splitlines()
    first = 1 + next(n for n, call in enumerate(calls) if "/corra/__pycache__/main." in call)
    codes, said = [], []
    for n in range(POINTS):
        at = first + (len(calls) - first) * n // POINTS
        done = subprocess.run(
            [*trace, "-e", f"inject=openat:signal=INT:when={at}", *corra_there],
            cwd=home,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        codes.append(done.returncode)
        said.append(done.stderr)
    assert codes == [-signal.SIGINT] * POINTS, list(zip(codes, said, strict=True))
    assert set(said) == {""}
