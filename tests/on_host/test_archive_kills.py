"""A process that folds away, forgets or starts is killed at each of its system calls. Whatever is
left behind, each run is found as it was, and none is started twice.
"""

from __future__ import annotations

import io
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import long_ago
from corra import agent
from long_ago import DAY_NS
from tracing import killed_at

NOW = time.time_ns()
OUTPUT = b"a line of output\n" * 100
OLD, BOOK, OWN = "20250301t000000z-22222222", "20250302t000000z-22222223", "own-name"


pytestmark = pytest.mark.storm

# CORRA_SWEEP_STEP=1 takes every stop, and a minute.
STEP = int(os.environ.get("CORRA_SWEEP_STEP", "3"))


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """An index is written for each line, so that its writing is killed as well."""
    monkeypatch.setattr(agent, "UNCOVERED_MAX", 0)


def state(root: Path, prog_id: str) -> dict[str, Any]:
    run = agent.find({"spool": str(root), "prog_id": prog_id})
    try:
        found: dict[str, Any] = run.state()
    finally:
        run.close()
    for name in ("archived_time", "streams", "keep_until"):
        found.pop(name, None)
    return found


def collect(root: Path, **how: Any) -> dict[str, Any]:
    request = {"spool": str(root), "older": 0, "records": 0, **how}
    found: dict[str, Any] = agent.collect(request, time.time_ns(), lambda: False)
    return found


def archived(root: Path) -> list[str]:
    """Return the ids of all lines of the archive, the newest first."""
    archive = agent.Archive(str(root))
    try:
        return [line.prog_id for month in archive.months() for line in month.newest_first()]
    finally:
        archive.close()


def rerun(root: Path, prog_id: str) -> dict[str, Any]:
    """Start an id that was started before; return the State of the run that has it."""
    request = {
        "spool": str(root),
        "prog_id": prog_id,
        "program": {"argv": ["true"], "cwd": "/", "host": "db1"},
    }
    run = agent.new_run(request, agent.Input(0), agent.Reply(io.BytesIO(), None))
    try:
        launched = agent.exists(run.directory, "launched") or isinstance(run, agent.ArchivedRun)
        assert launched, f"{prog_id} would be started again"
    finally:
        run.close()
    return state(root, prog_id)


def spools(
    tmp_path: Path, make: Callable[[Path], None], work: Callable[[Path], object]
) -> Iterator[Path]:
    """Yield a spool for each system call at which `work` on it was killed."""
    point, killed = -STEP, True
    while killed:
        point += STEP
        root = tmp_path / str(point)
        make(root)
        killed = killed_at(point + 1, lambda root=root: work(root))  # type: ignore[misc]
        if killed:
            yield root
    assert point > 50


def test_a_fold_that_is_killed_anywhere_loses_no_run_and_starts_none_again(tmp_path: Path) -> None:
    runs = {"one": OUTPUT, OWN: b"", long_ago.id_at(NOW - 3 * DAY_NS, 5): OUTPUT}

    def make(root: Path) -> None:
        for number, (prog_id, output) in enumerate(runs.items()):
            at = NOW - (3 + number) * DAY_NS
            long_ago.ended(root, prog_id, at_ns=at, output=output, status=number << 8)
        before.update({prog_id: state(root, prog_id) for prog_id in runs})

    before: dict[str, dict[str, Any]] = {}
    for root in spools(tmp_path, make, collect):
        for prog_id in runs:
            assert state(root, prog_id) == before[prog_id], root.name
        request = {"spool": str(root), "limit": 10}
        out = io.BytesIO()
        agent.verb_list(request, None, agent.Reply(out, None), False)
        listed = agent.from_json(out.getvalue())["runs"]
        assert {each["prog_id"] for each in listed} == set(runs) and len(listed) == len(runs)
        for prog_id in runs:
            assert rerun(root, prog_id) == before[prog_id], root.name
        collect(root)
        assert sorted(archived(root)) == sorted(runs), root.name
        assert os.listdir(root / "runs") == [], root.name
        for prog_id in runs:
            assert state(root, prog_id) == before[prog_id], root.name


def test_forgetting_that_is_killed_anywhere_keeps_what_is_a_runbooks(tmp_path: Path) -> None:
    def make(root: Path) -> None:
        for prog_id, origin in ((OLD, {"user": "ops"}), (BOOK, {"runbook": "kernel"})):
            long_ago.ended(root, prog_id, at_ns=NOW - 420 * DAY_NS, origin=origin)
        agent.fold(
            str(root), [known for spool in agent.spools({"spool": str(root)})
                        for known in agent.ended_runs(spool, lambda: False)[0]], lambda: False,
        )  # fmt: skip

    for root in spools(tmp_path, make, collect):
        assert state(root, BOOK)["return_code"] == 0, root.name
        assert set(archived(root)) in ({BOOK}, {BOOK, OLD}), root.name
        collect(root)
        assert archived(root) == [BOOK], root.name
        assert state(root, BOOK)["return_code"] == 0, root.name


@pytest.mark.parametrize("prog_id", [OLD, OWN])
def test_a_start_that_meets_the_archive_and_is_killed_anywhere_leaves_the_run_as_it_was(
    tmp_path: Path, prog_id: str
) -> None:
    """A claim is there as well, of a starter that was stopped for long."""

    def make(root: Path) -> None:
        long_ago.ended(root, prog_id, at_ns=NOW - 90 * DAY_NS, status=3 << 8)
        collect(root)
        long_ago.abandoned(root, prog_id, at_ns=NOW - DAY_NS)

    for root in spools(tmp_path, make, lambda root: rerun(root, prog_id)):
        assert state(root, prog_id)["return_code"] == 3, root.name
        assert rerun(root, prog_id)["return_code"] == 3, root.name
        collect(root)
        assert archived(root) == [prog_id] and os.listdir(root / "runs") == [], root.name
