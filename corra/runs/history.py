"""What this machine remembers of the runs started or watched from it, so that a run can be named without its host.

A cache of what the hosts know: any row may be lost, the file may be deleted, and nothing but that convenience goes with it. So nothing
here ever fails a caller: a file that is no database is set aside, one that can't be written is left alone, and a line says so.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import sqlite3
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from corra.model import ids
from corra.model.host import Host
from corra.model.state import State
from corra.on_host.agent.contract import FINAL

# Longer than a host keeps a record (400 days), nobody can ask about it any more.
FORGET_AFTER_S = 400 * 86400.0
# Many processes write for a few ms each; whoever waits longer than this meets a machine in trouble and goes on without.
_BUSY_S = 2.0

_TABLE = """
CREATE TABLE IF NOT EXISTS runs (
    prog_id TEXT PRIMARY KEY, tail TEXT NOT NULL, name TEXT, host TEXT NOT NULL, as_user TEXT, via TEXT, spool TEXT,
    argv TEXT NOT NULL, started REAL NOT NULL, state TEXT NOT NULL, seen REAL NOT NULL
);
CREATE INDEX IF NOT EXISTS by_tail ON runs (tail);
CREATE INDEX IF NOT EXISTS by_name ON runs (name);
CREATE INDEX IF NOT EXISTS by_started ON runs (started);
"""
_ALL = "prog_id, tail, name, host, as_user, via, spool, argv, started, state, seen"
_COLUMNS = "prog_id, name, host, as_user, via, spool, argv, started, state, seen"
_WORD = re.compile(r"[a-z0-9._-]{2,64}")

_log = logging.getLogger("corra")


class Entry(NamedTuple):
    """One run as this machine last saw it. `started` and `seen` are seconds since the epoch; `state` may be long out of date."""

    prog_id: str
    host: str
    name: str | None = None
    as_user: str | None = None
    via: str | None = None
    spool: str | None = None
    argv: tuple[str, ...] = ()
    started: float = 0.0
    state: str = "starting"
    seen: float = 0.0

    @property
    def open(self) -> bool:
        """Whether it was still going on when it was last seen."""
        return self.state not in FINAL

    @property
    def begun(self) -> bool:
        """Whether its host has said that it was started; until then it is only what somebody meant to start."""
        return self.state not in ("starting", "not_started")

    @property
    def label(self) -> str:
        return ids.label(self.prog_id, self.name)

    def as_state(self) -> State:
        """Return the little that is known as a State, for a table."""
        return State(self.prog_id, self.state, name=self.name, host=self.host, argv=self.argv)


def path() -> Path:
    """Return where the history lies, whether it is there or not."""
    state = os.environ.get("XDG_STATE_HOME", "")
    # The XDG specification: a relative path is to be ignored.
    root = Path(state) if os.path.isabs(state) else Path.home() / ".local" / "state"
    return root / "corra" / "history.sqlite3"


def begin_entry(entry: Entry) -> bool:
    """Write down a run that is about to be started; return False, and change nothing, where it is known already."""
    return _insert(entry, "DO NOTHING")


def remember_run(entry: Entry) -> None:
    """Write `entry` down, over whatever was known of that run but when it was started."""
    columns = ("name", "host", "as_user", "via", "spool", "argv", "state", "seen")
    _insert(entry, "DO UPDATE SET " + ", ".join(f"{name} = excluded.{name}" for name in columns))


def _insert(entry: Entry, otherwise: str) -> bool:
    now = time.time()
    values = (
        *(
            entry.prog_id,
            ids.tail(entry.prog_id),
            entry.name,
            entry.host,
            entry.as_user,
            entry.via,
            entry.spool,
        ),
        *(json.dumps(entry.argv), entry.started or now, entry.state, entry.seen or now),
    )
    marks = ", ".join("?" * len(values))
    query = f"INSERT INTO runs ({_ALL}) VALUES ({marks}) ON CONFLICT (prog_id) {otherwise}"  # noqa: S608 - our own text
    with _opened(write=True) as database:
        if database is not None:
            return database.execute(query, values).rowcount > 0
    return False


def saw_run(host: Host, state: State, *, via: str | None = None, spool: str | None = None) -> None:
    """Remember `state`, which `host` has just told."""
    remember_run(
        Entry(
            state.prog_id,
            str(host),
            state.name,
            host.as_user,
            via,
            spool,
            state.argv,
            _seconds(state.start_time),
            state.state,
        )
    )


def note_state(prog_id: str, state: str) -> None:
    """Remember the state of a run that is known already."""
    with _opened(write=True) as database:
        if database is not None:
            database.execute(
                "UPDATE runs SET state = ?, seen = ? WHERE prog_id = ?",
                (state, time.time(), prog_id),
            )


def forget_run(prog_id: str) -> None:
    """Remove one run, such as one that was never started."""
    with _opened(write=True) as database:
        if database is not None:
            database.execute("DELETE FROM runs WHERE prog_id = ?", (prog_id,))


def forget_older(seconds: float = FORGET_AFTER_S) -> int:
    """Remove what was last seen longer ago than that; return how many."""
    with _opened(write=True) as database:
        if database is None:
            return 0
        return database.execute(
            "DELETE FROM runs WHERE seen < ?", (time.time() - seconds,)
        ).rowcount


def find_entries(text: str) -> list[Entry]:
    """Return the runs that `text` means: a full id, a name (its open run, else its newest, of each host), or the beginning of a tail.

    More than one entry is an ambiguity, for the caller to say so.
    """
    if exact := _select("prog_id = ?", text):
        return exact
    if named := _select("name = ?", text):
        return _one_per_host(named)
    if not _WORD.fullmatch(text):
        return []
    return _select("substr(tail, 1, ?) = ?", len(text), text)


def _one_per_host(named: Sequence[Entry]) -> list[Entry]:
    """Keep what a name means on each host, and of several hosts those where it seems to be running, if there are any."""
    best: dict[tuple[str, str | None], Entry] = {}
    for entry in named:  # newest first
        known = best.setdefault((entry.host, entry.as_user), entry)
        if entry.open and not known.open:
            best[entry.host, entry.as_user] = entry
    running = [entry for entry in best.values() if entry.open]
    return running or list(best.values())[:1]


def newest_entry(*, host: str | None = None, name: str | None = None) -> Entry | None:
    """Return the run that was started last, of one host or name where given."""
    found = _select(
        "(? IS NULL OR host = ?) AND (? IS NULL OR name = ?) LIMIT 1", host, host, name, name
    )
    return found[0] if found else None


def recent_entries(limit: int = 1000) -> list[Entry]:
    """Return the runs started last, newest first."""
    return _select("1 LIMIT ?", limit)


def hosts_used() -> list[str]:
    """Return the hosts that runs were started on, the latest first."""
    return list(dict.fromkeys(entry.host for entry in recent_entries()))


def _select(condition: str, *values: object) -> list[Entry]:
    where, limit, rest = condition.partition(" LIMIT")
    query = f"SELECT {_COLUMNS} FROM runs WHERE {where} ORDER BY started DESC, prog_id DESC{limit}{rest}"  # noqa: S608 - our own text
    entries: list[Entry] = []
    with _opened(write=False) as database:
        if database is not None:
            entries = [_entry(row) for row in database.execute(query, values)]
    return entries


def _entry(row: Sequence[object]) -> Entry:
    prog_id, name, host, as_user, via, spool, argv, started, state, seen = row
    words = tuple(json.loads(str(argv)))
    fields = (None if each is None else str(each) for each in (name, as_user, via, spool))
    name_, as_user_, via_, spool_ = fields
    return Entry(
        str(prog_id),
        str(host),
        name_,
        as_user_,
        via_,
        spool_,
        words,
        float(str(started)),
        str(state),
        float(str(seen)),
    )


def _seconds(iso: str | None) -> float:
    from datetime import datetime

    try:
        return datetime.fromisoformat(iso).timestamp() if iso else 0.0
    except ValueError:
        return 0.0


@contextlib.contextmanager
def _opened(*, write: bool) -> Iterator[sqlite3.Connection | None]:
    """Yield the open database, None where there is none to be had; what goes wrong meanwhile is said, never raised."""
    file = path()
    database: sqlite3.Connection | None = None
    with _complaining(file):
        if write or file.exists():
            database = _open(file)
    try:
        with _complaining(file):
            yield database
            if database is not None:
                database.commit()
    finally:
        if database is not None:
            database.close()


@contextlib.contextmanager
def _complaining(file: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.DatabaseError as error:
        # A lock that another process holds is an OperationalError too, and no reason to throw the file away.
        if not isinstance(error, sqlite3.OperationalError):
            with contextlib.suppress(OSError):
                os.replace(file, file.with_name(f"{file.name}.damaged"))
        _log.warning("corra: history %s: not used: %s", file, error)
    except (OSError, ValueError) as error:
        _log.warning("corra: history %s: not used: %s", file, error)


def _open(file: Path) -> sqlite3.Connection:
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        # sqlite3 would create it with the umask's rights, and argv may hold what others shouldn't read.
        os.close(os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW, 0o600))
    database = sqlite3.connect(file, timeout=_BUSY_S)
    try:
        # A cache needs no fsync: a power cut may cost the last rows.
        database.execute("PRAGMA synchronous = OFF")
        if database.execute("PRAGMA user_version").fetchone()[0] == 0:
            database.executescript(_TABLE + "PRAGMA user_version = 1;")
    except sqlite3.Error:
        database.close()
        raise
    return database
