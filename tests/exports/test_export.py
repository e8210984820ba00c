"""`export` and `diff` as an operator types them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shlex
import shutil
import stat
import subprocess
import tarfile
import threading
from pathlib import Path
from typing import Any

import pytest
from conftest import Cli

from agent_door import Mount

LOCAL = ("--host", "local")
PROGRAM = (
    "echo hi; printf 'export DB_PASSWORD=hun'; sleep 0.2; echo ter2; "
    "printf '\\033[31mred\\033[0m 10%%\\r\\033[K20%%\\n'; echo '<b>' >&2; exit 3"
)


@pytest.fixture
def one(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cli:
    monkeypatch.chdir(tmp_path)
    assert cli("run", *LOCAL, "--name", "one", "--", "sh", "-c", PROGRAM).returncode == 3
    return cli


def exported(cli: Cli, path: Path, *words: str) -> bytes:
    done = cli("export", "-o", str(path), *words, "one")
    assert done.returncode == 0, done.stderr
    assert "cut out" in done.stderr.decode()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    return path.read_bytes()


def read_v3(data: bytes) -> tuple[dict[str, Any], list[tuple[float, str, str]]]:
    """Read an asciicast of version 3 as strictly as its specification allows."""
    lines = data.decode().splitlines()
    header = json.loads(lines[0])
    assert header["version"] == 3
    assert isinstance(header["term"]["cols"], int) and isinstance(header["term"]["rows"], int)
    assert isinstance(header["timestamp"], int)
    events = [json.loads(line) for line in lines[1:]]
    for interval, code, text in events:
        assert isinstance(interval, (int, float)) and interval >= 0
        assert code in ("o", "i", "m", "r", "x") and isinstance(text, str)
    return header, [(interval, code, text) for interval, code, text in events]


def test_a_recording_has_the_output_in_its_time_and_no_secret(one: Cli, tmp_path: Path) -> None:
    header, events = read_v3(exported(one, tmp_path / "one.cast"))
    assert "hunter2" not in json.dumps([header, events], ensure_ascii=False)
    shown = "".join(text for _, code, text in events if code == "o")
    assert shown.replace("<b>\r\n", "") == (
        "hi\r\nexport DB_PASSWORD=[REDACTED]\r\n\x1b[31mred\x1b[0m 10%\r\x1b[K20%\r\n"
    )
    assert 0.15 < sum(interval for interval, _, _ in events) < 5
    assert events[-1][1:] == ("x", "3")


def test_a_recording_of_version_2_is_played(one: Cli, tmp_path: Path) -> None:
    data = exported(one, tmp_path / "two.cast", "--v2")
    times = [json.loads(line)[0] for line in data.splitlines()[1:]]
    assert times == sorted(times)
    player = shutil.which("asciinema")
    if player is None:
        pytest.skip("there is no asciinema to play it")
    # It plays on a terminal alone; script(1) gives it one.
    play = shlex.join([player, "play", "-s", "100", str(tmp_path / "two.cast")])
    played = subprocess.run(
        ["script", "-qec", play, "/dev/null"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        env={**os.environ, "LANG": "C.UTF-8", "TERM": "xterm"},
        timeout=30,
        check=False,
    )
    assert b"hi\r\n" in played.stdout and b"[REDACTED]" in played.stdout, played


def test_a_page_has_colours_and_lines_as_they_look_in_the_end(one: Cli, tmp_path: Path) -> None:
    page = exported(one, tmp_path / "one.html").decode()
    assert "hunter2" not in page and "10%" not in page.split("</h1>")[1].split("<pre>")[2]
    assert "<b>&lt;b&gt;</b>\n" in page
    assert "20%" in page and "<script" not in page


def test_an_archive_has_the_state_the_streams_and_their_sums(one: Cli, tmp_path: Path) -> None:
    exported(one, tmp_path / "one.tar.gz")
    with tarfile.open(tmp_path / "one.tar.gz") as tar:
        files = {
            member.name.partition("/")[2]: reader.read()
            for member in tar
            if (reader := tar.extractfile(member))
        }
    assert files["stderr"] == b"<b>\n" and b"hunter2" not in b"".join(files.values())
    assert json.loads(files["state.json"])["return_code"] == 3
    assert json.loads(files["export.json"])["redacted"] == {"named secret": 2}
    lines = files["SHA256SUMS"].decode().splitlines()
    sums = {name: sha for sha, _, name in (line.partition("  ") for line in lines)}
    assert sums.keys() == files.keys() - {"SHA256SUMS"}
    assert all(hashlib.sha256(files[name]).hexdigest() == sums[name] for name in sums)


def test_a_file_that_is_there_is_replaced_only_by_force(one: Cli, tmp_path: Path) -> None:
    path = tmp_path / "one.cast"
    path.write_text("mine")
    done = one("export", "-o", str(path), "one")
    assert done.returncode == 125
    assert done.stderr.decode().startswith(f"corra: NOT EXPORTED: {path} is there already")
    assert path.read_text() == "mine"
    exported(one, path, "--force")
    assert [each.name for each in tmp_path.iterdir() if "cast" in each.name] == ["one.cast"]


def test_a_file_that_cant_be_made_is_said(one: Cli) -> None:
    done = one("export", "-o", "/dev/full/x.cast", "one")
    assert done.returncode == 121
    assert "/dev/full/x.cast can't be written here: not a directory" in done.stderr.decode()


def test_a_disk_here_that_is_full_leaves_nothing(as_root: None, one: Cli, tmp_path: Path) -> None:
    assert one("run", *LOCAL, "--name", "long", "--", "seq", "100000").returncode == 0
    with contextlib.closing(Mount(tmp_path / "small", "size=64k")) as small:
        done = one("export", "-o", str(small.at / "x.cast"), "long")
        assert done.returncode == 121
        assert "x.cast can't be written here: disk full (ENOSPC)" in done.stderr.decode()
        assert list(small.at.iterdir()) == []


def test_rules_that_come_through_a_pipe_are_read_once_and_hold(one: Cli, tmp_path: Path) -> None:
    """As a shell's `--redact <(pass show rules)` gives them."""
    os.mkfifo(tmp_path / "rules")
    writer = threading.Thread(target=(tmp_path / "rules").write_text, args=("hi$\n",))
    writer.start()
    data = exported(one, tmp_path / "a.cast", "--no-redact", "--redact", str(tmp_path / "rules"))
    writer.join()
    assert b'"hi' not in data


def test_ones_own_rules_stand_beside_corras_or_alone(one: Cli, tmp_path: Path) -> None:
    rules = tmp_path / "rules"
    rules.write_text("hi$\n")
    exported(one, tmp_path / "a.cast", "--redact", str(rules))
    alone = exported(one, tmp_path / "b.cast", "--redact", str(rules), "--no-redact")
    assert b"hunter2" not in (tmp_path / "a.cast").read_bytes()
    assert b'"hi' not in alone and b"hun" in alone
    done = one("export", "-o", "c.cast", "--redact", str(tmp_path / "none"), "one")
    assert done.returncode == 2 and "none can't be read" in done.stderr.decode()


def test_diff_exits_as_diff_does(one: Cli) -> None:
    for name, program in {
        "two": "echo hi; echo at 12:01; printf '\\0'>&2",
        "three": "echo hi; echo at 12:02; printf '\\0\\1'>&2",
    }.items():
        assert one("run", *LOCAL, "--name", name, "--", "sh", "-c", program).returncode == 0
    same = one("diff", "two", "two")
    assert (same.returncode, same.stdout.decode(), same.stderr.decode()) == (0, "", "")
    other = one("diff", "two", "three")
    assert other.returncode == 1
    assert other.stdout.decode().splitlines()[2:5] == ["@@ -1,2 +1,2 @@", " hi", "-at 12:01"]
    assert other.stdout.decode().splitlines()[-1].startswith("Binary outputs ")
    ignored = one("diff", "--stream", "stdout", "--ignore", "[0-9:]+", "two", "three")
    assert (ignored.returncode, ignored.stdout.decode()) == (0, "")
    assert json.loads(one("diff", "--json", "two", "three").stdout.decode())["equal"] is False
    assert one("diff", "two").returncode == 2
