"""The tables. They use nothing that PostgreSQL hasn't got, though only SQLite is tried.

The output is in the database, too, so that one commit covers a byte and the length that
acknowledges it.
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    text,
)

# SQLite numbers rows by itself only in a column that it calls INTEGER.
_KEY = BigInteger().with_variant(Integer, "sqlite")

metadata = MetaData()

tokens = Table(
    "tokens",
    metadata,
    Column("id", _KEY, primary_key=True),
    Column(
        "key", String(16), nullable=False, unique=True
    ),  # the part of a token that finds its row
    Column("hash", LargeBinary(32), nullable=False),  # SHA-256 of the part that opens
    Column("name", String(64), nullable=False),
    Column("scopes", Text, nullable=False),  # JSON: ["write", "read", "read:host=db*"]
    Column("run", String(64)),  # set for a run's own token, which opens that run only
    Column("owner", BigInteger),  # the token whose allowance it uses; null: its own
    Column("made", Float, nullable=False),
    Column("expires", Float),
    Column("revoked", Float),
    Column("bytes", BigInteger, nullable=False, default=0),  # kept for it: output, documents, gaps
    Index("tokens_by_name", "name"),
    Index("tokens_by_run", "run"),
)

runs = Table(
    "runs",
    metadata,
    Column("id", _KEY, primary_key=True),
    Column("prog_id", String(64), nullable=False, unique=True),
    Column("tail", String(64), nullable=False),
    Column("owner", BigInteger, nullable=False),
    Column("name", Text),
    Column("host", Text, nullable=False, default=""),
    Column("user", Text, nullable=False, default=""),  # the user that it runs as
    Column("by", Text, nullable=False, default=""),  # USER@HOST that started it
    Column("fleet", Text),
    Column("command", Text, nullable=False, default=""),
    Column("state", String(16), nullable=False),
    Column("word", String(32), nullable=False, server_default=""),  # `state` as `ps` says it
    Column("made", Float, nullable=False),  # seconds since the epoch, as all times here
    Column("heard", Float, nullable=False),
    Column("ended", Float),  # when its end was acknowledged
    Column("doc", Text, nullable=False),  # the last State, as JSON
    Column("doc_bytes", BigInteger, nullable=False, server_default="0"),  # counted in tokens.bytes
    Column("version", Integer, nullable=False, default=0),  # of `doc`
    Index("runs_by_made", "made", "id"),
    Index("runs_by_tail", "tail"),
    # A year has 100,000 runs of one name on one host: each list is read in its order.
    Index("runs_by_name", "name", "made", "id"),
    Index("runs_by_host", "host", "made", "id"),
    Index(
        "runs_open_by_name",
        "name",
        "made",
        sqlite_where=text("ended IS NULL"),
        postgresql_where=text("ended IS NULL"),
    ),
    Index("runs_by_word", "word"),
    Index("runs_by_owner", "owner", "ended"),
    Index("runs_by_ended", "ended"),
)

streams = Table(
    "streams",
    metadata,
    Column("id", _KEY, primary_key=True),
    Column("run", BigInteger, ForeignKey(runs.c.id), nullable=False),
    Column("name", String(16), nullable=False),
    Column("length", BigInteger, nullable=False, default=0),
    UniqueConstraint("run", "name"),
)

# `data` null is a gap: those bytes were gone from the host before they could be sent.
chunks = Table(
    "chunks",
    metadata,
    Column("id", _KEY, primary_key=True),  # in the order of arrival, over all streams
    Column("stream", BigInteger, ForeignKey(streams.c.id), nullable=False),
    Column("start", BigInteger, nullable=False),
    Column("stop", BigInteger, nullable=False),
    Column("at", Float, nullable=False),
    Column("data", LargeBinary),
    Index("chunks_by_start", "stream", "start"),
    Index(
        "chunks_gaps",
        "stream",
        "id",
        sqlite_where=text("data IS NULL"),
        postgresql_where=text("data IS NULL"),
    ),
)

# A notice is written in the commit of a run's end, so that a crash can't lose it.
notices = Table(
    "notices",
    metadata,
    Column("id", _KEY, primary_key=True),
    Column("run", String(64), nullable=False),
    Column("hook", Text, nullable=False),
    Column("body", Text, nullable=False),
    Column("due", Float, nullable=False),
    Column("tries", Integer, nullable=False, default=0),
    Column("made", Float, nullable=False),
    Index("notices_by_due", "due"),
)
