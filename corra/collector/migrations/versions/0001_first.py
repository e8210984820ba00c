"""Tokens, runs, their streams, what came of them, and who is to be told."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

_KEY = sa.BigInteger().with_variant(sa.Integer, "sqlite")


def upgrade() -> None:
    op.create_table(
        "tokens",
        sa.Column("id", _KEY, primary_key=True),
        sa.Column("key", sa.String(16), nullable=False, unique=True),
        sa.Column("hash", sa.LargeBinary(32), nullable=False),
        sa.Column("name", sa.String(64), nullable=False),
        sa.Column("scopes", sa.Text, nullable=False),
        sa.Column("run", sa.String(64)),
        sa.Column("owner", sa.BigInteger),
        sa.Column("made", sa.Float, nullable=False),
        sa.Column("expires", sa.Float),
        sa.Column("revoked", sa.Float),
        sa.Column("bytes", sa.BigInteger, nullable=False),
    )
    op.create_index("tokens_by_name", "tokens", ["name"])
    op.create_index("tokens_by_run", "tokens", ["run"])
    op.create_table(
        "runs",
        sa.Column("id", _KEY, primary_key=True),
        sa.Column("prog_id", sa.String(64), nullable=False, unique=True),
        sa.Column("tail", sa.String(64), nullable=False),
        sa.Column("owner", sa.BigInteger, nullable=False),
        sa.Column("name", sa.Text),
        sa.Column("host", sa.Text, nullable=False),
        sa.Column("user", sa.Text, nullable=False),
        sa.Column("by", sa.Text, nullable=False),
        sa.Column("fleet", sa.Text),
        sa.Column("command", sa.Text, nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("made", sa.Float, nullable=False),
        sa.Column("heard", sa.Float, nullable=False),
        sa.Column("ended", sa.Float),
        sa.Column("doc", sa.Text, nullable=False),
        sa.Column("version", sa.Integer, nullable=False),
    )
    op.create_index("runs_by_made", "runs", ["made", "id"])
    op.create_index("runs_by_tail", "runs", ["tail"])
    op.create_index("runs_by_name", "runs", ["name"])
    op.create_index("runs_by_host", "runs", ["host"])
    op.create_index("runs_by_owner", "runs", ["owner", "ended"])
    op.create_index("runs_by_ended", "runs", ["ended"])
    op.create_table(
        "streams",
        sa.Column("id", _KEY, primary_key=True),
        sa.Column("run", sa.BigInteger, sa.ForeignKey("runs.id"), nullable=False),
        sa.Column("name", sa.String(16), nullable=False),
        sa.Column("length", sa.BigInteger, nullable=False),
        sa.UniqueConstraint("run", "name"),
    )
    op.create_table(
        "chunks",
        sa.Column("id", _KEY, primary_key=True),
        sa.Column("stream", sa.BigInteger, sa.ForeignKey("streams.id"), nullable=False),
        sa.Column("start", sa.BigInteger, nullable=False),
        sa.Column("stop", sa.BigInteger, nullable=False),
        sa.Column("at", sa.Float, nullable=False),
        sa.Column("data", sa.LargeBinary),
    )
    op.create_index("chunks_by_start", "chunks", ["stream", "start"])
    op.create_table(
        "notices",
        sa.Column("id", _KEY, primary_key=True),
        sa.Column("run", sa.String(64), nullable=False),
        sa.Column("hook", sa.Text, nullable=False),
        sa.Column("body", sa.Text, nullable=False),
        sa.Column("due", sa.Float, nullable=False),
        sa.Column("tries", sa.Integer, nullable=False),
        sa.Column("made", sa.Float, nullable=False),
    )
    op.create_index("notices_by_due", "notices", ["due"])


def downgrade() -> None:
    for name in ("notices", "chunks", "streams", "runs", "tokens"):
        op.drop_table(name)
