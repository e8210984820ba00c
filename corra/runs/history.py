"""The runs started or watched from this machine: a run can be named without its host.

The history is a cache: the hosts know the truth, and each answer of a host corrects it. Any row may
be lost and the file may be deleted; only the convenience goes. So nothing here fails a caller: a
file that is no database is renamed, a file that can't be written is left alone, and a line on
stderr says so.
"""

from __future__ import annotations

import contextlib
import errno
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
from corra.on_host.agent.contract import FINAL, TRANSITIONS

# A host keeps a record for 400 days.
FORGET_AFTER_S = 400 * 86400.0
# Many processes write for a few ms each. After this wait the caller goes on without the history.
_BUSY_S = 2.0
# The state of a run that its host no longer knows.
GONE = "gone"
# The state of a run that isn't among its host's open runs any more.
ENDED = "ended"

_TABLE = """
CREATE TABLE IF NOT EXISTS runs (
    prog_id TEXT PRIMARY KEY, tail TEXT NOT NULL, name TEXT, host TEXT NOT NULL, as_user TEXT,
    via TEXT, spool TEXT, argv TEXT NOT NULL, started REAL NOT NULL, state TEXT NOT NULL,
    seen REAL NOT NULL, inventory TEXT
);
CREATE INDEX IF NOT EXISTS by_tail ON runs (tail);
CREATE INDEX IF NOT EXISTS by_started ON runs (started);
"""
# 1 had fewer indexes, 2 no inventory. A later layout's file is used as it is.
_LAYOUT = 3
_ALL = "prog_id, tail, name, host, as_user, via, spool, argv, started, state, seen, inventory"
_COLUMNS = "prog_id, name, host, as_user, via, spool, argv, started, state, seen, inventory"
# The states of a run that was going on when it was last seen.
_OPEN_STATES = tuple(state for state in TRANSITIONS if state not in FINAL)
_OPEN = "state IN ({})".format(", ".join(f"'{state}'" for state in _OPEN_STATES))
# A year has 100,000 runs of one name on one host: whoever is looked for must be found by an index.
_INDEXES = f"""
DROP INDEX IF EXISTS by_name;
CREATE INDEX IF NOT EXISTS by_name_and_start ON runs (name, started, prog_id);
CREATE INDEX IF NOT EXISTS by_host ON runs (host, started, prog_id);
CREATE INDEX IF NOT EXISTS open_by_name ON runs (name, started, prog_id) WHERE {_OPEN};
CREATE INDEX IF NOT EXISTS open_by_host ON runs (host) WHERE {_OPEN};
"""
# A host has a say in its own runs only.
_ON_HOST = "prog_id = ? AND host = ? AND as_user IS ?"
_WORD = r"[a-z0-9._-]{2,64}"

_log = logging.getLogger("corra")


class Entry(NamedTuple):
    """One run as this machine last saw it, at `seen`: its `state` may have changed since.

    `started` and `seen` are seconds since the epoch. `inventory` is the path of the inventory that
    says where the host is.
    """

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
    inventory: str | None = None

    @property
    def open(self) -> bool:
        """Whether the run was still going on when it was last seen."""
        return self.state in _OPEN_STATES

    @property
    def begun(self) -> bool:
        """Whether its host has confirmed the start."""
        return self.state not in ("starting", "not_started")

    @property
    def label(self) -> str:
        return ids.label(self.prog_id, self.name)

    def as_state(self) -> State:
        """Return a State with the few facts that the history has, for a table."""
        return State(self.prog_id, self.state, name=self.name, host=self.host, argv=self.argv)


def path() -> Path:
    """Return the history's file, which may not exist yet."""
    state = os.environ.get("XDG_STATE_HOME", "")
    # The XDG specification: a relative path is to be ignored.
    root = Path(state) if os.path.isabs(state) else Path.home() / ".local" / "state"
    return root / "corra" / "history.sqlite3"


def begin_entry(entry: Entry) -> bool:
    """Add a run that is about to be started. Return False, and change nothing, for a known run."""
    return _insert([entry], "DO NOTHING") > 0


def remember_run(entry: Entry) -> None:
    """Add `entry`, or replace what is known of its run; only `started` stays.

    A run that is known on one host never moves to another, whatever that host says: `kill` by its
    name would go there, and the run go on.
    """
    remember_runs([entry])


def remember_runs(entries: Sequence[Entry]) -> None:
    """Remember several runs in one transaction."""
    columns = ("name", "via", "spool", "argv", "state", "seen", "inventory")
    same = "runs.host = excluded.host AND runs.as_user IS excluded.as_user"
    changed = ", ".join(f"{name} = excluded.{name}" for name in columns)
    _insert(entries, f"DO UPDATE SET {changed} WHERE {same}")


def _insert(entries: Sequence[Entry], otherwise: str) -> int:
    """Insert entries, and return how many rows that has changed."""
    now = time.time()
    marks = ", ".join("?" * len(_ALL.split(",")))
    query = (
        f"INSERT INTO runs ({_ALL}) VALUES ({marks})"  # noqa: S608 - our own text
        f" ON CONFLICT (prog_id) {otherwise}"
    )
    with _opened(write=True) as database:
        if database is not None:
            _forget_daily(database)
            return database.executemany(query, [_values(each, now) for each in entries]).rowcount
    return 0


def _values(entry: Entry, now: float) -> tuple[object, ...]:
    """Return the columns of an entry, in the order of _ALL."""
    values = (
        entry.prog_id,
        ids.tail(entry.prog_id),
        entry.name,
        entry.host,
        entry.as_user,
        entry.via,
        entry.spool,
        json.dumps(entry.argv),
        entry.started or now,
        entry.state,
        entry.seen or now,
        entry.inventory,
    )
    return tuple(map(_kept, values))


def saw_run(host: Host, state: State, *, via: str | None = None, spool: str | None = None) -> None:
    """Remember `state`, which `host` has just answered."""
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
            inventory=host.address.source if host.address else None,
        )
    )


def note_state(host: Host, prog_id: str, state: str) -> None:
    """Remember the state of a run that is known already on that host."""
    _execute(
        f"UPDATE runs SET state = ?, seen = ? WHERE {_ON_HOST}",  # noqa: S608 - our own text
        (state, time.time(), prog_id, str(host), host.as_user),
    )


def note_gone(prog_id: str, host: Host, *, spool: str | None = None) -> None:
    """Remember that `host` no longer knows a run that it had in this spool."""
    _execute(
        "UPDATE runs SET state = ?, seen = ?"
        " WHERE prog_id = ? AND host = ? AND as_user IS ? AND spool IS ?",
        (GONE, time.time(), prog_id, str(host), host.as_user, spool),
    )


def note_list(
    host: Host,
    states: Sequence[State],
    *,
    via: str | None = None,
    spool: str | None = None,
    all_listed: bool = True,
    open_listed: bool = True,
) -> None:
    """Correct the known runs by a list that `host` has just answered. No run is added.

    `all_listed`: it lists every run there, so a run that was open and isn't in it is gone.
    `open_listed`: it lists every open run, so such a run has ended, and nobody said how.
    """
    if not path().exists():
        return
    now = time.time()
    with _opened(write=True) as database:
        if database is None:
            return
        database.executemany(
            f"UPDATE runs SET state = ?, seen = ? WHERE {_ON_HOST}",  # noqa: S608 - our own text
            [(state.state, now, state.prog_id, str(host), host.as_user) for state in states],
        )
        if not (all_listed or open_listed):
            return
        # A chaperone keeps the runs of its hosts elsewhere.
        condition = (
            f"host = ? AND as_user IS ? AND spool IS ? AND {_OPEN} AND state <> 'starting'"
            " AND CASE WHEN via LIKE 'chaperone%' THEN via END IS ?"
        )
        there = database.execute(
            f"SELECT prog_id FROM runs WHERE {condition}",  # noqa: S608 - our own text
            (
                *(str(host), host.as_user, _kept(spool)),
                via if (via or "").startswith("chaperone") else None,
            ),
        ).fetchall()
        listed = {state.prog_id for state in states}
        database.executemany(
            "UPDATE runs SET state = ?, seen = ? WHERE prog_id = ?",
            [
                (GONE if all_listed else ENDED, now, prog_id)
                for (prog_id,) in there
                if prog_id not in listed
            ],
        )


def forget_run(prog_id: str) -> None:
    """Remove one run, such as one that was never started."""
    _execute("DELETE FROM runs WHERE prog_id = ?", (prog_id,))


def forget_entries(entries: Sequence[Entry]) -> None:
    """Remove these runs from the history; the hosts keep them."""
    with _opened(write=True) as database:
        if database is not None:
            database.executemany(
                "DELETE FROM runs WHERE prog_id = ?", [(entry.prog_id,) for entry in entries]
            )


def _forget_daily(database: sqlite3.Connection) -> None:
    """Remove the runs that were last seen longer ago than FORGET_AFTER_S, at most once a day."""
    now = time.time()
    today = int(now // 86400)
    # The day is kept in a number of the file's header that SQLite leaves to applications.
    if database.execute("PRAGMA application_id").fetchone()[0] != today:
        database.execute("DELETE FROM runs WHERE seen < ?", (now - FORGET_AFTER_S,))
        database.execute(f"PRAGMA application_id = {today}")


def _execute(query: str, values: Sequence[object]) -> None:
    with _opened(write=True) as database:
        if database is not None:
            database.execute(query, list(map(_kept, values)))


def find_entries(text: str) -> list[Entry]:
    """Return the runs that `text` means: a full id, a name, or the beginning of a tail.

    A name means its open run, else its newest run, of each place. Several entries are an ambiguity,
    and the caller's to report.
    """
    if exact := _select("prog_id = ?", text):
        return exact
    if running := _select(f"name = ? AND {_OPEN}", text):
        return _one_per_place(running)
    if newest := _select("name = ? LIMIT 1", text):
        return newest
    if not re.fullmatch(_WORD, text):
        return []
    # What begins with it lies between it and it with the last of all characters behind.
    return _select("tail >= ? AND tail < ?", text, f"{text}\U0010ffff")


def _one_per_place(running: Sequence[Entry]) -> list[Entry]:
    """Return the newest open run of each place.

    It stands for all of them: the host will be asked by name and knows better which still run.
    """
    best: dict[tuple[str, str | None, str | None], Entry] = {}
    for entry in running:  # newest first
        best.setdefault((entry.host, entry.as_user, entry.spool), entry)
    return list(best.values())


def newest_entry() -> Entry | None:
    """Return the run that was started last."""
    found = recent_entries(1)
    return found[0] if found else None


def open_under(name: str, host: Host, spool: str | None = None) -> list[Entry]:
    """Return the runs of that name that were open on `host` when they were last seen."""
    return _select(
        f"name = ? AND {_OPEN} AND host = ? AND as_user IS ? AND spool IS ?",
        name,
        str(host),
        host.as_user,
        spool,
    )


def entries_of(text: str) -> list[Entry]:
    """Return the runs of an id, else of a name, else of a host, else of the beginning of a tail."""
    for column in ("prog_id", "name", "host"):
        if found := _select(f"{column} = ?", text):
            return found
    return find_entries(text)


def entries_on(host: str) -> list[Entry]:
    """Return what is known of one host, as the operator spells it: its open and its latest runs."""
    latest = _select("host = ? LIMIT 100", host)
    known = {entry.prog_id for entry in latest}
    return [
        *latest,
        *(each for each in _select(f"host = ? AND {_OPEN}", host) if each.prog_id not in known),
    ]


def recent_entries(limit: int = 1000) -> list[Entry]:
    """Return the runs that were started last, the newest first."""
    return _select("1 LIMIT ?", limit)


def hosts_used() -> list[str]:
    """Return the hosts that runs were started on, the latest first."""
    return list(dict.fromkeys(entry.host for entry in recent_entries()))


def _select(condition: str, *values: object) -> list[Entry]:
    where, limit, rest = condition.partition(" LIMIT")
    query = (
        f"SELECT {_COLUMNS} FROM runs WHERE {where}"  # noqa: S608 - our own text
        f" ORDER BY started DESC, prog_id DESC{limit}{rest}"
    )
    entries: list[Entry] = []
    with _opened(write=False) as database:
        if database is not None:
            entries = [_entry(row) for row in database.execute(query, list(map(_kept, values)))]
    return entries


def _kept(value: object) -> object:
    """Return what the database keeps of `value`: bytes of a text that isn't UTF-8, which it is."""
    if not isinstance(value, str) or value.isascii():
        return value
    try:
        value.encode()
    except UnicodeEncodeError:
        return value.encode("utf-8", "surrogateescape")
    return value


def _given(value: object) -> str:
    """Return the text that `_kept` was given."""
    return value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else str(value)


def _entry(row: Sequence[object]) -> Entry:
    prog_id, name, host, as_user, via, spool, argv, started, state, seen, inventory = row
    words = tuple(json.loads(str(argv)))
    texts = (name, as_user, via, spool, inventory)
    fields = (None if each is None else _given(each) for each in texts)
    name_, as_user_, via_, spool_, inventory_ = fields
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
        inventory_,
    )


def _seconds(iso: str | None) -> float:
    from datetime import datetime

    try:
        return datetime.fromisoformat(iso).timestamp() if iso else 0.0
    except ValueError:
        return 0.0


@contextlib.contextmanager
def _opened(*, write: bool) -> Iterator[sqlite3.Connection | None]:
    """Yield the open database, or None without one. A failure is a line on stderr, never raised."""
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
        # A lock of another process is an OperationalError too; the file is sound then.
        if not isinstance(error, sqlite3.OperationalError):
            with contextlib.suppress(OSError):
                os.replace(file, file.with_name(f"{file.name}.damaged"))
        _log.warning("corra: history %s: not used: %s", file, error)
    except (OSError, ValueError) as error:
        _log.warning("corra: history %s: not used: %s", file, error)


def _open(file: Path) -> sqlite3.Connection:
    home = Path.home()
    if home in file.parents and not home.is_dir():
        # An account without a home has one that doesn't exist, such as Debian's /nonexistent; root
        # could create it.
        raise FileNotFoundError(errno.ENOENT, "no such directory", str(home))
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        # sqlite3 would create the file by the umask, and other users shouldn't read an argv.
        os.close(os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW, 0o600))
    database = sqlite3.connect(file, timeout=_BUSY_S)
    try:
        # A cache needs no fsync: a power cut may lose the last rows.
        database.execute("PRAGMA synchronous = OFF")
        version = database.execute("PRAGMA user_version").fetchone()[0]
        if version < _LAYOUT:
            database.executescript(_TABLE)
            columns = [each[1] for each in database.execute("PRAGMA table_info(runs)")]
            if "inventory" not in columns:
                with contextlib.suppress(sqlite3.OperationalError):  # another process was first
                    database.execute("ALTER TABLE runs ADD COLUMN inventory TEXT")
            database.executescript(f"{_INDEXES}PRAGMA user_version = {_LAYOUT};")
    except sqlite3.Error:
        database.close()
        raise
    return database
