"""This machine's memory of runs: a cache that never stands in an operator's way."""

from __future__ import annotations

import logging
import os
import sqlite3
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import Cli
from hypothesis import given, strategies as st

from corra.model import ids
from corra.model.host import Host
from corra.model.state import State
from corra.runs import history
from corra.runs.history import Entry
from properties import PROPERTY, words

ROOT = Path(__file__).resolve().parents[2]


def made(tail: str, stamp: str = "20261123t014409z") -> str:
    return f"{stamp}-{tail}"


def remembered(prog_id: str, host: str = "db1", **facts: object) -> Entry:
    facts = {"started": 1.0, "state": "running", **facts}
    entry = Entry(prog_id, host, **facts)  # type: ignore[arg-type]
    history.remember_run(entry)
    return entry


def found(text: str) -> list[str]:
    return [entry.prog_id for entry in history.find_entries(text)]


def test_a_run_is_found_by_its_id_its_name_and_the_beginning_of_its_tail(home: Path) -> None:
    prog_id = made("k7m2qxwp")
    remembered(prog_id, name="migrate")
    for text in (prog_id, "migrate", "k7", "k7m2qx", "k7m2qxwp"):
        assert found(text) == [prog_id]
    for text in ("k", "7m", "2026", "migr", "", "k7m2qxwpp", "%", "k_", "k7*", "\udcff"):
        assert found(text) == []


def test_a_name_and_a_path_that_arent_utf_8_are_kept_as_they_are(home: Path) -> None:
    name, spool, argv = "caf\udce9", "/srv/\udcff", ("echo", "\udce9", "é")
    given = remembered(made("k7m2qxwp"), name=name, spool=spool, argv=argv)
    remembered(made("k7w4dnzz"), name="café")
    (entry,) = history.find_entries(name)
    assert (entry.name, entry.spool, entry.argv) == (name, spool, argv)
    assert found("café") == [made("k7w4dnzz")]
    (open_,) = history.open_under(name, Host("db1"), spool)
    assert open_.prog_id == given.prog_id
    history.note_list(Host("db1"), [], spool=spool)
    (gone,) = history.entries_of(name)
    assert not gone.open
    history.forget_entries([gone])
    assert found(name) == []


def test_an_id_that_somebody_gave_is_found_by_its_beginning(home: Path) -> None:
    remembered("pay-20261123")
    assert found("pay") == found("pay-20261123") == ["pay-20261123"]


def test_what_begins_several_tails_finds_them_all(home: Path) -> None:
    first, second = made("k7m2qxwp"), made("k7w4dnzz")
    remembered(first, started=1.0)
    remembered(second, started=2.0)
    assert found("k7") == [second, first]
    assert found("k7m") == [first]


def test_a_full_id_goes_before_a_name_and_a_name_before_a_tail(home: Path) -> None:
    tail, name, full = made("k7m2qxwp"), made("zzzzzzzz"), "k7"
    remembered(tail)
    assert found("k7") == [tail]
    remembered(name, name="k7")
    assert found("k7") == [name]
    remembered(full)
    assert found("k7") == [full]


def test_a_name_means_its_open_run_else_its_newest(home: Path) -> None:
    old, new = made("22222222"), made("33333333")
    remembered(old, name="n", started=1.0, state="exited")
    remembered(new, name="n", started=2.0, state="exited")
    assert found("n") == [new]
    history.note_state(Host("db1"), old, "running")
    assert found("n") == [old]


def test_a_name_that_runs_on_two_hosts_is_ambiguous(home: Path) -> None:
    one, two = made("22222222"), made("33333333")
    remembered(one, "db1", name="n")
    remembered(two, "db2", name="n", started=2.0)
    assert set(found("n")) == {one, two}
    history.note_state(Host("db1"), one, "exited")
    assert found("n") == [two]


def test_a_run_that_is_known_on_one_host_never_moves_to_another(home: Path) -> None:
    remembered("pay", "good", name="n", argv=("./pay",))
    known = history.find_entries("pay")
    lie = State("pay", "exited", name="other", host="good")
    for host in (Host("evil"), Host("good", user="mallory")):
        history.saw_run(host, lie)
        history.note_state(host, "pay", "exited")
        history.note_list(host, [lie])
    assert history.find_entries("pay") == known and history.find_entries("other") == []
    history.note_state(Host("good"), "pay", "exited")
    assert history.find_entries("pay")[0].state == "exited"


def test_a_start_under_an_id_that_is_known_on_another_host_says_that_it_isnt_kept(
    home: Path, cli: Cli
) -> None:
    words = ("run", "--host", "local", "--id", "pay-1", "--", "true")
    assert cli(*words).stderr == b""
    assert cli(*words).stderr == b"", "the same run on the same host"
    remembered("pay-2", "db1")
    done = cli("run", "--host", "local", "--id", "pay-2", "--", "true")
    assert done.stderr == (
        b"corra: pay-2: known here as a run on db1; name --host to reach the one on local\n"
    )
    assert (done.returncode, history.find_entries("pay-2")[0].host) == (0, "db1")


def test_a_start_changes_nothing_that_is_known_already(home: Path) -> None:
    entry = remembered("pay", name="n", state="exited", argv=("./pay",))
    assert not history.begin_entry(Entry("pay", "db2", argv=("other",)))
    assert history.begin_entry(Entry("new", "db2"))
    (kept,) = history.find_entries("pay")
    assert (kept.host, kept.name, kept.argv, kept.state) == ("db1", "n", entry.argv, "exited")


def test_what_is_seen_later_goes_over_what_was_known_but_for_the_start(home: Path) -> None:
    remembered("pay", state="starting", started=5.0, as_user="root")
    history.saw_run(
        Host("db1", user="root"),
        State("pay", "exited", name="n", argv=("a",), start_time="2026-11-23T01:44:09+00:00"),
        via="openssh",
    )
    (entry,) = history.find_entries("pay")
    assert (entry.state, entry.name, entry.as_user, entry.via, entry.started) == (
        "exited",
        "n",
        "root",
        "openssh",
        5.0,
    )
    assert not entry.open and entry.label == "n (pay)" and entry.as_state().argv == ("a",)


def test_the_newest_the_hosts_and_forgetting(home: Path) -> None:
    assert (
        history.newest_entry() is None
        and history.hosts_used() == []
        and history.recent_entries() == []
    )
    for n, host in enumerate(["db1", "db2", "db1"]):
        remembered(f"run{n}", host, started=n + 1.0, name=f"n{n}")
    newest = history.newest_entry()
    assert newest is not None and newest.prog_id == "run2"
    assert history.hosts_used() == ["db1", "db2"]
    history.forget_run("run2")
    assert [entry.prog_id for entry in history.recent_entries()] == ["run1", "run0"]
    assert [entry.prog_id for entry in history.recent_entries(1)] == ["run1"]


def test_what_was_last_seen_400_days_ago_is_forgotten_by_the_first_start_of_a_day(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remembered("old", seen=time.time() - 401 * 86400)
    remembered("new", seen=time.time() - 398 * 86400)
    assert [entry.prog_id for entry in history.recent_entries()] == ["old", "new"]
    tomorrow = time.time() + 86400
    monkeypatch.setattr("corra.runs.history.time.time", lambda: tomorrow)
    assert history.begin_entry(Entry("next", "db1", started=2.0))
    assert [entry.prog_id for entry in history.recent_entries()] == ["next", "new"]
    remembered("older", seen=1.0)
    assert history.begin_entry(Entry("second", "db1", started=3.0))
    assert "older" in [entry.prog_id for entry in history.recent_entries()]


def test_a_hosts_list_corrects_what_is_known_and_adds_nothing(home: Path) -> None:
    for prog_id in ("runs", "ended", "went", "begun"):
        remembered(prog_id, state="starting" if prog_id == "begun" else "running")
    remembered("of-root", as_user="root")
    remembered("elsewhere", "db2")
    remembered("in-a-spool", spool="/srv/spool")
    remembered("kept", via="chaperone")
    states = [State("runs", "running"), State("ended", "exited"), State("others", "running")]
    history.note_list(Host("db1"), states)
    assert {entry.prog_id: entry.state for entry in history.recent_entries()} == {
        "runs": "running",
        "ended": "exited",
        "went": "gone",
        "begun": "starting",
        **dict.fromkeys(("of-root", "elsewhere", "in-a-spool", "kept"), "running"),
    }
    (gone,) = history.find_entries("went")
    assert not gone.open


def test_what_a_look_up_reads_doesnt_grow_with_what_has_ended(home: Path) -> None:
    """A job of one name every five minutes: 100,000 runs a year."""

    def bytes_read(look: Callable[[], object]) -> int:
        """Return how many bytes of files `look` reads, and this question after them."""
        counted = [Path("/proc/self/io").read_text()]
        look()
        counted.append(Path("/proc/self/io").read_text())
        before, after = (int(text.split()[1]) for text in counted)
        return after - before

    looks: dict[str, Callable[[], object]] = {
        "by name": lambda: history.find_entries("job"),
        "by tail": lambda: history.find_entries("zz"),
        "by id": lambda: history.find_entries("of-another-name"),
        "the newest": history.newest_entry,
        "open ones": lambda: history.open_under("job", Host("db1")),
        "a host's list": lambda: history.note_list(Host("db1"), [State("more0", "exited")]),
    }
    remembered(made("zzzzzzzz"), name="another", started=3.0)
    remembered("of-another-name", started=3.0)
    history.newest_entry()  # what is imported for the first time is read, too
    found = []
    for count in (20, 5000):
        with sqlite3.connect(history.path()) as database:
            database.executemany(
                "INSERT OR IGNORE INTO runs"
                " VALUES (?, ?, 'job', 'db1', NULL, NULL, NULL, '[]', ?, 'exited', ?, NULL)",
                [(f"more{n}", f"more{n}", float(n), float(n)) for n in range(count)],
            )
        database.close()
        found.append({name: bytes_read(look) for name, look in looks.items()})
    assert all(found[1][name] <= found[0][name] + (64 << 10) for name in looks), found


def test_a_history_of_an_older_layout_is_read_and_gets_what_is_new(home: Path) -> None:
    remembered("old", name="n")
    with sqlite3.connect(history.path()) as database:
        for (index,) in database.execute(
            "SELECT name FROM sqlite_master WHERE type = 'index' AND sql IS NOT NULL"
        ).fetchall():
            database.execute(f"DROP INDEX {index}")
        database.execute("ALTER TABLE runs DROP COLUMN inventory")
        database.execute("PRAGMA user_version = 1")
    database.close()
    assert found("n") == ["old"]
    remembered("new", name="of-the-site", inventory="/site.ini")
    assert history.find_entries("of-the-site")[0].inventory == "/site.ini"
    with sqlite3.connect(history.path()) as database:
        assert database.execute("PRAGMA user_version").fetchone()[0] == 3
        assert database.execute("PRAGMA index_info(open_by_name)").fetchall()
    database.close()


def test_a_run_that_its_host_doesnt_find_is_gone_only_where_it_was(home: Path) -> None:
    remembered("pay")
    history.note_gone("pay", Host("db1", user="root"))
    assert history.find_entries("pay")[0].open
    history.note_gone("pay", Host("db1"))
    assert not history.find_entries("pay")[0].open


def test_what_is_forgotten_is_named_by_id_name_or_host(home: Path) -> None:
    for number, host in enumerate(("db1", "db1", "db2")):
        remembered(f"run{number}", host, name=f"n{number % 2}")
    assert [entry.prog_id for entry in history.entries_of("n0")] == ["run2", "run0"]
    assert {entry.prog_id for entry in history.entries_of("db1")} == {"run0", "run1"}
    history.forget_entries(history.entries_of("run1"))
    assert {entry.prog_id for entry in history.recent_entries()} == {"run0", "run2"}
    assert history.entries_of("run1") == []


@given(argv=st.lists(words, min_size=1, max_size=4))
@PROPERTY
def test_any_words_come_back_as_they_were(
    tmp_path_factory: pytest.TempPathFactory, argv: list[str]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.getbasetemp() / "words"))
        remembered("run", argv=tuple(argv))
        assert history.find_entries("run")[0].argv == tuple(argv)


def test_nobody_else_may_read_it(home: Path) -> None:
    before = os.umask(0)
    try:
        remembered("run")
    finally:
        os.umask(before)
    assert stat.S_IMODE(history.path().stat().st_mode) == 0o600
    assert stat.S_IMODE(history.path().parent.stat().st_mode) == 0o700


def test_looking_makes_no_file(home: Path) -> None:
    assert history.find_entries("x") == []
    assert not history.path().exists()


def test_a_damaged_file_is_set_aside_and_said(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    history.path().parent.mkdir(parents=True)
    history.path().write_bytes(b"no database, but as long as a page of one" * 200)
    with caplog.at_level(logging.WARNING):
        assert history.find_entries("x") == []
    assert len(caplog.records) == 1 and "history" in caplog.text
    remembered("run")
    assert found("run") == ["run"]
    assert history.path().with_name("history.sqlite3.damaged").exists()


def test_a_place_that_cant_be_written_is_no_error(
    home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    history.path().parent.parent.mkdir(parents=True, exist_ok=True)
    history.path().parent.write_text("a file where the directory should be")
    with caplog.at_level(logging.WARNING):
        remembered("run")
        assert history.find_entries("run") == []
        history.note_list(Host("db1"), [])
    assert "not used" in caplog.text


def test_a_file_of_a_table_we_dont_know_is_no_error(
    home: Path, caplog: pytest.LogCaptureFixture
) -> None:

    history.path().parent.mkdir(parents=True)
    with sqlite3.connect(history.path()) as database:
        database.executescript("CREATE TABLE runs (x); PRAGMA user_version = 9;")
    database.close()
    with caplog.at_level(logging.WARNING):
        remembered("run")
        assert history.find_entries("run") == []
    assert "not used" in caplog.text


WRITER = """
import sys
from corra.model.host import Host
from corra.runs import history
for n in range(25):
    history.remember_run(history.Entry(f"{sys.argv[1]}-{n}", "db1"))
    history.note_state(Host("db1"), f"{sys.argv[1]}-{n}", "exited")
    history.find_entries(f"{sys.argv[1]}-{n}")
"""


@pytest.mark.storm
def test_many_processes_write_at_once_and_none_loses_a_row(home: Path) -> None:
    def write(name: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", WRITER, name],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )

    with ThreadPoolExecutor(6) as pool:
        said = list(pool.map(write, [f"p{n}" for n in range(6)]))
    assert [each.stderr for each in said] == [""] * 6
    entries = history.recent_entries()
    assert len(entries) == 150 and {entry.state for entry in entries} == {"exited"}


def test_a_relative_state_home_is_ignored_as_xdg_says(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", "relative")
    assert history.path() == home / ".local/state/corra/history.sqlite3"


def test_ids_made_here_are_found_by_what_is_shown_of_them(home: Path) -> None:
    prog_id = ids.new_id()
    remembered(prog_id)
    assert found(ids.short(prog_id)) == [prog_id]
