"""The late parts of the agent's one file: no start loads them before it has forked its guards, and
whatever became of what was kept of them, each verb works.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_join import join

import machine
from agent_door import LOADER, Door, Refused
from corra import agent

MADE = Path(agent.__file__)


def asked(at: Path, python: str, verb: str, request: Any) -> dict[str, Any]:
    """Ask a copy of the agent in `at`."""
    words = [python, "-ISE", "-c", LOADER.format(str(at), ""), verb]
    text = json.dumps({"spool": str(at / "spool"), **request}).encode()
    said = subprocess.run(words, input=text, stdout=subprocess.PIPE, check=True, cwd="/").stdout
    found: dict[str, Any] = json.loads(said.splitlines()[0])
    return found


@pytest.fixture
def at(tmp_path: Path) -> Path:
    shutil.copy(MADE, tmp_path)
    return tmp_path


def torn(kept: Path) -> None:
    kept.write_bytes(kept.read_bytes()[:1000])


def of_another_source(kept: Path) -> None:
    kept.write_bytes(b"1 2 3\n" + kept.read_bytes())


@machine.EVERYWHERE
@pytest.mark.parametrize(
    "harm", [Path.unlink, torn, of_another_source, lambda kept: kept.write_bytes(b"")],
    ids=["gone", "torn", "of another source", "empty"],
)  # fmt: skip
def test_what_is_kept_of_the_late_parts_is_made_anew_where_it_is_no_good(
    at: Path, python: str, harm: Callable[[Path], None]
) -> None:
    assert asked(at, python, "list", {})["total"] == 0
    (kept,) = (at / "__pycache__").glob("*.late")
    good = kept.read_bytes()
    harm(kept)
    assert asked(at, python, "list", {})["total"] == 0
    assert kept.read_bytes() == good


@machine.EVERYWHERE
def test_where_nothing_can_be_kept_it_is_compiled_each_time(at: Path, python: str) -> None:
    (at / "__pycache__").write_text("somebody's file")
    assert asked(at, python, "list", {})["total"] == 0


@machine.EVERYWHERE
def test_a_start_loads_none_of_it(at: Path, python: str) -> None:
    """Its guards would keep that for weeks."""
    (at / "spool").mkdir()
    (at / "spool" / "gc").touch()
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); import agent; "
        "code = agent.main(['start'], agent.Input(0), sys.stdout.buffer); "
        "sys.exit(code or 3 * ('verb_list' in vars(agent)))"
    )
    request = json.dumps({"spool": str(at / "spool"), "program": {"argv": ["true"]}})
    words = [python, "-ISE", "-c", script, str(at)]
    subprocess.run(words, input=request.encode(), stdout=subprocess.PIPE, check=True, cwd="/")


def test_a_traceback_names_the_lines_of_the_one_file(door: Door) -> None:
    door.constants = "agent.Page = None; "
    with pytest.raises((Refused, AssertionError, ValueError, json.JSONDecodeError)):
        door.call("list", {})
    process = door.popen("list")
    _, said = process.communicate(door.encode({}))
    lines = [int(line.split("line ")[1].split(",")[0]) for line in said.decode().splitlines()
             if "agent.py" in line and "in verb_list" in line]  # fmt: skip
    made = join.joined(join.parts(Path(join.ROOT)))
    assert [join.where(made, line).startswith("corra/on_host/agent/verbs/listing.py:")
            for line in lines] == [True]  # fmt: skip


def test_it_is_there_without_a_file_as_well(tmp_path: Path) -> None:
    """As the doctor's visit has it."""
    script = (
        "import sys; n = {'__name__': 'agent'}; n['AGENT_SOURCE'] = sys.stdin.read(); "
        "exec(compile(n['AGENT_SOURCE'], 'agent.py', 'exec'), n); print(n['late']('family'))"
    )
    done = subprocess.run(
        [sys.executable, "-ISE", "-c", script], input=MADE.read_text(), capture_output=True,
        text=True, check=True, cwd=tmp_path, env={"PATH": os.environ["PATH"]},
    )  # fmt: skip
    assert "function family" in done.stdout
