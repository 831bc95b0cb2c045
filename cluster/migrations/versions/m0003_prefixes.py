"""Prefixes: how the prompts for an adapter begin, where its owner published that."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("adapters", sa.Column("prefix_id", sa.String(length=64), nullable=True))


def downgrade() -> None:
    op.drop_column("adapters", "prefix_id")
