"""One run whose record is damaged on its host costs nobody the others: ps, gc, status and names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import Cli

import corra


@pytest.mark.parametrize("text", ["", '{"prog_id": "x', "null"], ids=["empty", "cut", "null"])
def test_a_damaged_record_costs_no_verb_the_other_runs(home: Path, cli: Cli, text: str) -> None:
    for name in ("good", "bad"):
        corra.start("local", ["true"], id=name, name=f"{name}-name").wait(timeout=30)
    (record,) = home.rglob("runs/bad/program.json")
    record.write_text(text)
    listed = cli("ps", "--host", "local", "-a", "--json")
    assert b"Traceback" not in listed.stderr
    assert b"bad" in listed.stdout + listed.stderr
    assert "good" in {json.loads(line).get("prog_id") for line in listed.stdout.splitlines()}
    status = cli("status", "--host", "local", "good-name")
    assert (status.returncode, b"done: exit 0" in status.stdout) == (0, True), status.stderr
    freed = cli("gc", "--host", "local", "-y", "--older", "0s")
    assert freed.returncode == 0, freed.stderr
