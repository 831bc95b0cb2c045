"""The first rows."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "adapters",
        sa.Column("adapter_id", sa.String(length=64), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("version", sa.BigInteger(), nullable=False),
        sa.Column("base_id", sa.String(length=64), nullable=False),
        sa.Column("manifest_ids", sa.Text(), nullable=False),
        sa.Column("owner_id", sa.String(length=64), nullable=False),
        sa.Column("trajectory", sa.Text(), nullable=False),
        sa.Column("index_id", sa.String(length=64), nullable=True),
        sa.Column("price_gwei_per_token", sa.BigInteger(), nullable=False),
        sa.Column("is_promoted", sa.Integer(), nullable=False),
        sa.Column("withdrawn_at", sa.BigInteger(), nullable=True),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("adapter_id"),
        sa.UniqueConstraint("name", "version"),
    )
    op.create_table(
        "batches",
        sa.Column("batch_id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("term", sa.BigInteger(), nullable=False),
        sa.Column("root", sa.String(length=64), nullable=False),
        sa.Column("payload_hash", sa.String(length=64), nullable=False),
        sa.Column("num_receipts", sa.BigInteger(), nullable=False),
        sa.Column("fee_gwei", sa.BigInteger(), nullable=False),
        sa.Column("da_commitment", sa.LargeBinary(), nullable=False),
        sa.Column("tx_hash", sa.Text(), nullable=False),
        sa.Column("block", sa.BigInteger(), nullable=False),
        sa.Column("gas_used", sa.BigInteger(), nullable=False),
        sa.Column("sealed_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("batch_id"),
    )
    op.create_table(
        "claims",
        sa.Column("tx_hash", sa.String(length=64), nullable=False),
        sa.Column("contributor_id", sa.String(length=64), nullable=False),
        sa.Column("period_id", sa.BigInteger(), nullable=False),
        sa.Column("cumulative_gwei", sa.BigInteger(), nullable=False),
        sa.Column("paid_gwei", sa.BigInteger(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("tx_hash"),
    )
    op.create_table(
        "contributors",
        sa.Column("contributor_id", sa.String(length=64), nullable=False),
        sa.Column("wallet", sa.String(length=40), nullable=False),
        sa.Column("label", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("contributor_id"),
        sa.UniqueConstraint("wallet"),
    )
    op.create_table(
        "datanets",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("title", sa.Text(), nullable=False),
        sa.Column("owner_id", sa.String(length=64), nullable=False),
        sa.Column("licence", sa.Text(), nullable=False),
        sa.Column("rules_json", sa.Text(), nullable=False),
        sa.Column("wordings_json", sa.Text(), nullable=False),
        sa.Column("is_open", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("name"),
    )
    op.create_table(
        "deposits",
        sa.Column("tx_hash", sa.String(length=64), nullable=False),
        sa.Column("log_index", sa.BigInteger(), nullable=False),
        sa.Column("payer", sa.String(length=40), nullable=False),
        sa.Column("amount_gwei", sa.BigInteger(), nullable=False),
        sa.Column("block", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("tx_hash", "log_index"),
    )
    op.create_table(
        "leases",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("holder", sa.Text(), nullable=False),
        sa.Column("term", sa.BigInteger(), nullable=False),
        sa.Column("expires_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("name"),
    )
    op.create_table(
        "ledger_entries",
        sa.Column("posting", sa.Text(), nullable=False),
        sa.Column("ledger_account", sa.Text(), nullable=False),
        sa.Column("amount_gwei", sa.BigInteger(), nullable=False),
        sa.Column("ref", sa.Text(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("posting", "ledger_account"),
    )
    op.create_table(
        "payers",
        sa.Column("payer", sa.String(length=40), nullable=False),
        sa.Column("deposited_gwei", sa.BigInteger(), nullable=False),
        sa.Column("withdrawing_gwei", sa.BigInteger(), nullable=False),
        sa.Column("ceiling_gwei", sa.BigInteger(), nullable=False),
        sa.Column("ceiling_expiry", sa.BigInteger(), nullable=False),
        sa.Column("ceiling_signature", sa.LargeBinary(), nullable=False),
        sa.Column("spent_gwei", sa.BigInteger(), nullable=False),
        sa.Column("reserved_gwei", sa.BigInteger(), nullable=False),
        sa.Column("next_seq", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("payer"),
    )
    op.create_table(
        "periods",
        sa.Column("period_id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("first_batch", sa.BigInteger(), nullable=False),
        sa.Column("last_batch", sa.BigInteger(), nullable=False),
        sa.Column("root", sa.String(length=64), nullable=False),
        sa.Column("total_gwei", sa.BigInteger(), nullable=False),
        sa.Column("payload_hash", sa.String(length=64), nullable=False),
        sa.Column("da_commitment", sa.LargeBinary(), nullable=False),
        sa.Column("tx_hash", sa.Text(), nullable=False),
        sa.Column("closed_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("period_id"),
    )
    op.create_table(
        "receipts",
        sa.Column("receipt_id", sa.String(length=64), nullable=False),
        sa.Column("request_id", sa.String(length=64), nullable=False),
        sa.Column("account_id", sa.Text(), nullable=False),
        sa.Column("payer", sa.String(length=40), nullable=False),
        sa.Column("payer_seq", sa.BigInteger(), nullable=False),
        sa.Column("adapter_id", sa.String(length=64), nullable=False),
        sa.Column("fee_gwei", sa.BigInteger(), nullable=False),
        sa.Column("canonical", sa.LargeBinary(), nullable=False),
        sa.Column("evidence_state", sa.Text(), nullable=False),
        sa.Column("evidence_json", sa.Text(), nullable=False),
        sa.Column("feedback", sa.Integer(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("receipt_id"),
        sa.UniqueConstraint("payer", "payer_seq"),
        sa.UniqueConstraint("request_id"),
    )
    op.create_index("ix_receipts_adapter", "receipts", ["adapter_id"], unique=False)
    op.create_index("ix_receipts_evidence", "receipts", ["evidence_state"], unique=False)
    op.create_table(
        "runs",
        sa.Column("run_id", sa.Text(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("spec_json", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("outcome_json", sa.Text(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("run_id"),
    )
    op.create_table(
        "transactions",
        sa.Column("tx_hash", sa.String(length=64), nullable=False),
        sa.Column("purpose", sa.Text(), nullable=False),
        sa.Column("nonce", sa.BigInteger(), nullable=False),
        sa.Column("raw", sa.LargeBinary(), nullable=False),
        sa.Column("term", sa.BigInteger(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("block", sa.BigInteger(), nullable=False),
        sa.Column("gas_used", sa.BigInteger(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("tx_hash"),
    )
    op.create_index("ix_transactions_nonce", "transactions", ["nonce"], unique=False)
    op.create_index("ix_transactions_purpose", "transactions", ["purpose"], unique=False)
    op.create_table(
        "transcripts",
        sa.Column("receipt_id", sa.String(length=64), nullable=False),
        sa.Column("salt", sa.LargeBinary(), nullable=False),
        sa.Column("ciphertext", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("receipt_id"),
    )
    op.create_table(
        "accounts",
        sa.Column("account_id", sa.Text(), nullable=False),
        sa.Column("payer", sa.String(length=40), nullable=False),
        sa.Column("label", sa.Text(), nullable=False),
        sa.Column("budget_gwei", sa.BigInteger(), nullable=False),
        sa.Column("spent_gwei", sa.BigInteger(), nullable=False),
        sa.Column("reserved_gwei", sa.BigInteger(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(
            ["payer"],
            ["payers.payer"],
        ),
        sa.PrimaryKeyConstraint("account_id"),
    )
    op.create_table(
        "batch_receipts",
        sa.Column("receipt_id", sa.String(length=64), nullable=False),
        sa.Column("batch_id", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(
            ["batch_id"],
            ["batches.batch_id"],
        ),
        sa.ForeignKeyConstraint(
            ["receipt_id"],
            ["receipts.receipt_id"],
        ),
        sa.PrimaryKeyConstraint("receipt_id"),
    )
    op.create_index("ix_batch_receipts_batch", "batch_receipts", ["batch_id"], unique=False)
    op.create_table(
        "manifests",
        sa.Column("manifest_id", sa.String(length=64), nullable=False),
        sa.Column("datanet", sa.Text(), nullable=False),
        sa.Column("num_groups", sa.BigInteger(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(
            ["datanet"],
            ["datanets.name"],
        ),
        sa.PrimaryKeyConstraint("manifest_id"),
    )
    op.create_table(
        "payouts",
        sa.Column("period_id", sa.BigInteger(), nullable=False),
        sa.Column("adapter_id", sa.String(length=64), nullable=False),
        sa.Column("contributor_id", sa.String(length=64), nullable=False),
        sa.Column("role", sa.Text(), nullable=False),
        sa.Column("amount_gwei", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(
            ["period_id"],
            ["periods.period_id"],
        ),
        sa.PrimaryKeyConstraint("period_id", "adapter_id", "contributor_id", "role"),
    )
    op.create_table(
        "shards",
        sa.Column(
            "committed_seq",
            sa.BigInteger().with_variant(sa.Integer(), "sqlite"),
            autoincrement=True,
            nullable=False,
        ),
        sa.Column("commitment", sa.String(length=64), nullable=False),
        sa.Column("shard_id", sa.String(length=64), nullable=True),
        sa.Column("datanet", sa.Text(), nullable=False),
        sa.Column("contributor_id", sa.String(length=64), nullable=False),
        sa.Column("content_sha256", sa.String(length=64), nullable=True),
        sa.Column("salt", sa.LargeBinary(), nullable=False),
        sa.Column("signature", sa.LargeBinary(), nullable=False),
        sa.Column("num_rows", sa.BigInteger(), nullable=True),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("committed_at", sa.BigInteger(), nullable=False),
        sa.Column("revealed_at", sa.BigInteger(), nullable=True),
        sa.ForeignKeyConstraint(
            ["datanet"],
            ["datanets.name"],
        ),
        sa.PrimaryKeyConstraint("committed_seq"),
        sa.UniqueConstraint("commitment"),
        sa.UniqueConstraint("shard_id"),
    )
    op.create_table(
        "api_keys",
        sa.Column("key_id", sa.Text(), nullable=False),
        sa.Column("account_id", sa.Text(), nullable=False),
        sa.Column("secret_sha256", sa.String(length=64), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("revoked_at", sa.BigInteger(), nullable=True),
        sa.ForeignKeyConstraint(
            ["account_id"],
            ["accounts.account_id"],
        ),
        sa.PrimaryKeyConstraint("key_id"),
    )
    op.create_table(
        "charges",
        sa.Column("request_id", sa.String(length=64), nullable=False),
        sa.Column("account_id", sa.Text(), nullable=False),
        sa.Column("payer", sa.String(length=40), nullable=False),
        sa.Column("idempotency_key", sa.Text(), nullable=True),
        sa.Column("request_sha256", sa.String(length=64), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("max_gwei", sa.BigInteger(), nullable=False),
        sa.Column("fee_gwei", sa.BigInteger(), nullable=False),
        sa.Column("lease_until", sa.BigInteger(), nullable=False),
        sa.Column("response_json", sa.Text(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(
            ["account_id"],
            ["accounts.account_id"],
        ),
        sa.PrimaryKeyConstraint("request_id"),
        sa.UniqueConstraint("account_id", "idempotency_key"),
    )
    op.create_index("ix_charges_state", "charges", ["state", "lease_until"], unique=False)
    op.create_table(
        "records",
        sa.Column("record_id", sa.String(length=64), nullable=False),
        sa.Column("datanet", sa.Text(), nullable=False),
        sa.Column("shard_seq", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("row", sa.BigInteger(), nullable=False),
        sa.Column("contributor_id", sa.String(length=64), nullable=False),
        sa.Column("group_id", sa.String(length=64), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("canonical", sa.LargeBinary(), nullable=False),
        sa.ForeignKeyConstraint(
            ["datanet"],
            ["datanets.name"],
        ),
        sa.ForeignKeyConstraint(
            ["shard_seq"],
            ["shards.committed_seq"],
        ),
        sa.PrimaryKeyConstraint("record_id"),
    )
    op.create_index("ix_records_datanet", "records", ["datanet"], unique=False)
    op.create_index("ix_records_group", "records", ["group_id"], unique=False)
    op.create_table(
        "rejections",
        sa.Column("shard_seq", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("row", sa.BigInteger(), nullable=False),
        sa.Column("code", sa.Text(), nullable=False),
        sa.Column("field", sa.Text(), nullable=False),
        sa.Column("detail", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(
            ["shard_seq"],
            ["shards.committed_seq"],
        ),
        sa.PrimaryKeyConstraint("shard_seq", "row"),
    )


def downgrade() -> None:
    op.drop_table("rejections")
    op.drop_index("ix_records_group", table_name="records")
    op.drop_index("ix_records_datanet", table_name="records")
    op.drop_table("records")
    op.drop_index("ix_charges_state", table_name="charges")
    op.drop_table("charges")
    op.drop_table("api_keys")
    op.drop_table("shards")
    op.drop_table("payouts")
    op.drop_table("manifests")
    op.drop_index("ix_batch_receipts_batch", table_name="batch_receipts")
    op.drop_table("batch_receipts")
    op.drop_table("accounts")
    op.drop_table("transcripts")
    op.drop_index("ix_transactions_purpose", table_name="transactions")
    op.drop_index("ix_transactions_nonce", table_name="transactions")
    op.drop_table("transactions")
    op.drop_table("runs")
    op.drop_index("ix_receipts_evidence", table_name="receipts")
    op.drop_index("ix_receipts_adapter", table_name="receipts")
    op.drop_table("receipts")
    op.drop_table("periods")
    op.drop_table("payers")
    op.drop_table("ledger_entries")
    op.drop_table("leases")
    op.drop_table("deposits")
    op.drop_table("datanets")
    op.drop_table("contributors")
    op.drop_table("claims")
    op.drop_table("batches")
    op.drop_table("adapters")
