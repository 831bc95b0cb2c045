"""Blends: what a receipt of several adapters names."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "blends",
        sa.Column("blend_id", sa.String(length=64), nullable=False),
        sa.Column("canonical", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("blend_id"),
    )


def downgrade() -> None:
    op.drop_table("blends")
