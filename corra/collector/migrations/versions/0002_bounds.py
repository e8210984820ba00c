"""The cost of a document, the end of a run in the words of `ps`, and an index of gaps."""

from __future__ import annotations

import json

import sqlalchemy as sa
from alembic import op

from corra.collector.documents import word

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    word_column = sa.Column("word", sa.String(32), nullable=False, server_default="")
    op.add_column("runs", word_column)
    # Documents of before this migration weren't counted: 0.
    size_column = sa.Column("doc_bytes", sa.BigInteger, nullable=False, server_default="0")
    op.add_column("runs", size_column)
    op.create_index("runs_by_word", "runs", ["word"])
    has_no_data = sa.text("data IS NULL")
    op.create_index(
        "chunks_gaps",
        "chunks",
        ["stream", "id"],
        sqlite_where=has_no_data,
        postgresql_where=has_no_data,
    )
    table = sa.table(
        "runs", sa.column("id"), sa.column("doc"), sa.column("state"), sa.column("word")
    )
    connection = op.get_bind()
    last = -1
    while True:
        query = sa.select(table.c.id, table.c.doc, table.c.state).where(table.c.id > last)
        found = connection.execute(query.order_by(table.c.id).limit(100)).all()
        if not found:
            break
        for number, doc, state in found:
            try:
                told = word(json.loads(doc))
            except (ValueError, TypeError, KeyError, AttributeError, OverflowError):
                told = state
            connection.execute(sa.update(table).where(table.c.id == number).values(word=told[:32]))
        last = found[-1][0]


def downgrade() -> None:
    op.drop_index("chunks_gaps", "chunks")
    op.drop_index("runs_by_word", "runs")
    op.drop_column("runs", "doc_bytes")
    op.drop_column("runs", "word")
