"""Alembic's way in: the connection is handed over by `store.migrate`."""

from __future__ import annotations

from alembic import context

from corra.collector.schema import metadata

connection = context.config.attributes["connection"]
# SQLite can't alter most of a table in place.
context.configure(connection=connection, target_metadata=metadata, render_as_batch=True)
with context.begin_transaction():
    context.run_migrations()
