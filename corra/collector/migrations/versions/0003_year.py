"""Indexes for lists of a year's runs: those of one name or host in their order, the open ones."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    for column in ("name", "host"):
        op.drop_index(f"runs_by_{column}", "runs")
        op.create_index(f"runs_by_{column}", "runs", [column, "made", "id"])
    is_open = sa.text("ended IS NULL")
    op.create_index(
        "runs_open_by_name",
        "runs",
        ["name", "made"],
        sqlite_where=is_open,
        postgresql_where=is_open,
    )


def downgrade() -> None:
    op.drop_index("runs_open_by_name", "runs")
    for column in ("name", "host"):
        op.drop_index(f"runs_by_{column}", "runs")
        op.create_index(f"runs_by_{column}", "runs", [column])
