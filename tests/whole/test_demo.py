"""scripts/demo: its hosts, its terminal and its recording, for the first step of the tour."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import islands

ROOT = Path(__file__).resolve().parents[2]
DEMO = [sys.executable, str(ROOT / "scripts" / "demo")]


def demo(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*DEMO, *words],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )


def test_a_demo_that_cant_be_says_what_it_wants():
    done = demo()
    assert (done.returncode, done.stdout) == (125, "")
    wanted = "only root" if os.geteuid() else "no t"  # no terminal here, or no tmux
    assert done.stderr.startswith("scripts/demo: ") and wanted in done.stderr


def test_the_tour_in_pictures_has_the_commands_of_the_demo():
    tour = (ROOT / "docs" / "tour.md").read_text()
    typed = re.findall(r"^(corra .*)$|`(corra .*?)`", tour, re.MULTILINE)
    source = (ROOT / "scripts" / "demo").read_text()
    assert len(typed) == 5
    assert [block or inline for block, inline in typed if (block or inline) not in source] == []


@pytest.mark.timeout(180)
@pytest.mark.storm  # three sshds and seven seconds
def test_a_recording_shows_a_run_and_leaves_nothing_behind(tmp_path):
    if why := islands.missing() or ("" if shutil.which("tmux") else "no tmux here"):
        pytest.skip(why)
    mounts, cast = Path("/proc/mounts").read_text(), tmp_path / "cast"
    done = demo("--record", str(cast), "--screens", str(tmp_path), "--steps", "1")
    assert (done.returncode, done.stderr) == (0, "")
    head, *events = map(json.loads, cast.read_text().splitlines())
    assert head["version"] == 2
    times = [at for at, _, _ in events]
    assert times == sorted(times)
    assert "corra: migrate (" in "".join(text for _, _, text in events)
    picture = (tmp_path / "start.svg").read_text()
    assert "STARTED" in picture.upper() and "@font-face" not in picture
    assert "@keyframes film" in (tmp_path / "demo.svg").read_text()
    assert Path("/proc/mounts").read_text() == mounts
    ours = [path for path in Path("/proc").glob("[0-9]*/environ") if b"CORRA_DEMO" in read(path)]
    assert ours == []


def read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # it has ended
        return b""
