"""The rows: everything the platform knows that is not a file. One schema for SQLite and PostgreSQL.

Ids, addresses and hashes are lower-case hex text without ``0x``. Money is BIGINT ``*_gwei``, wei is text.
Times are UTC epoch seconds, integers. States are words from the docstring of their table. Alembic's
migrations build what this module declares; a test compares the two."""

from sqlalchemy import (
    BigInteger,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    String,
    Table,
    Text,
    UniqueConstraint,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

Hex32 = String(64)
Hex20 = String(40)


class Row(DeclarativeBase):
    type_annotation_map = {int: BigInteger, str: Text, bytes: LargeBinary}  # noqa: RUF012  (SQLAlchemy's own shape)


def table_of(row: type[Row]) -> Table:
    """For statements that are built once and run often, past the session."""
    table = row.__table__
    assert isinstance(table, Table)
    return table


class ContributorRow(Row):
    """Anyone who can be paid: contributors, model owners, the host, the platform, the pool."""

    __tablename__ = "contributors"
    contributor_id: Mapped[str] = mapped_column(Hex32, primary_key=True)
    wallet: Mapped[str] = mapped_column(Hex20, unique=True)
    label: Mapped[str]


class PayerRow(Row):
    """One escrow account. ``spent + reserved <= min(deposited - withdrawing, ceiling)`` holds by conditional
    update whenever something is reserved."""

    __tablename__ = "payers"
    payer: Mapped[str] = mapped_column(Hex20, primary_key=True)
    deposited_gwei: Mapped[int] = mapped_column(default=0)  # finalised on chain, less what was withdrawn
    withdrawing_gwei: Mapped[int] = mapped_column(default=0)  # asked back on chain: no longer spendable
    ceiling_gwei: Mapped[int] = mapped_column(default=0)  # cumulative maximum signed by the payer
    ceiling_expiry: Mapped[int] = mapped_column(default=0)
    ceiling_signature: Mapped[bytes] = mapped_column(default=b"")
    spent_gwei: Mapped[int] = mapped_column(default=0)  # captured by receipts, cumulative
    reserved_gwei: Mapped[int] = mapped_column(default=0)
    next_seq: Mapped[int] = mapped_column(default=1)


class AccountRow(Row):
    """Who holds API keys. ``budget_gwei`` caps what the account may spend of its payer's money: trial
    accounts share the platform's own payer, each within its trial credit."""

    __tablename__ = "accounts"
    account_id: Mapped[str] = mapped_column(primary_key=True)
    payer: Mapped[str] = mapped_column(ForeignKey("payers.payer"))
    label: Mapped[str]
    budget_gwei: Mapped[int]
    spent_gwei: Mapped[int] = mapped_column(default=0)
    reserved_gwei: Mapped[int] = mapped_column(default=0)
    created_at: Mapped[int]


class ApiKeyRow(Row):
    """``ol_<key_id>_<secret>``; only the secret's SHA-256 is kept."""

    __tablename__ = "api_keys"
    key_id: Mapped[str] = mapped_column(primary_key=True)
    account_id: Mapped[str] = mapped_column(ForeignKey("accounts.account_id"))
    secret_sha256: Mapped[str] = mapped_column(Hex32)
    created_at: Mapped[int]
    revoked_at: Mapped[int | None]


class DatanetRow(Row):
    __tablename__ = "datanets"
    name: Mapped[str] = mapped_column(primary_key=True)
    title: Mapped[str]
    owner_id: Mapped[str] = mapped_column(Hex32)
    licence: Mapped[str]
    rules_json: Mapped[str]
    wordings_json: Mapped[str]  # {"train": [...], "heldout": [...]}
    is_open: Mapped[int] = mapped_column(Integer, default=1)  # may models be trained on it


class ShardRow(Row):
    """``committed → revealed → ingested``, or ``quarantined`` with its reason."""

    __tablename__ = "shards"
    committed_seq: Mapped[int] = mapped_column(
        BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True
    )
    commitment: Mapped[str] = mapped_column(Hex32, unique=True)
    shard_id: Mapped[str | None] = mapped_column(Hex32, unique=True)
    datanet: Mapped[str] = mapped_column(ForeignKey("datanets.name"))
    contributor_id: Mapped[str] = mapped_column(Hex32)
    content_sha256: Mapped[str | None] = mapped_column(Hex32)
    salt: Mapped[bytes] = mapped_column(default=b"")  # with the bytes it opens the commitment, for anyone
    signature: Mapped[bytes] = mapped_column(default=b"")  # of the contributor's wallet, over the reveal
    num_rows: Mapped[int | None]
    state: Mapped[str]
    reason: Mapped[str] = mapped_column(default="")
    committed_at: Mapped[int]
    revealed_at: Mapped[int | None]


class RecordRow(Row):
    """``kept`` (trained on), ``duplicate`` (of its group's first), ``conflict`` (for review), ``control``,
    ``withdrawn``."""

    __tablename__ = "records"
    record_id: Mapped[str] = mapped_column(Hex32, primary_key=True)
    datanet: Mapped[str] = mapped_column(ForeignKey("datanets.name"))
    shard_seq: Mapped[int] = mapped_column(ForeignKey("shards.committed_seq"))
    row: Mapped[int]
    contributor_id: Mapped[str] = mapped_column(Hex32)
    group_id: Mapped[str] = mapped_column(Hex32)
    state: Mapped[str]
    canonical: Mapped[bytes]
    __table_args__ = (Index("ix_records_group", "group_id"), Index("ix_records_datanet", "datanet"))


class RejectionRow(Row):
    __tablename__ = "rejections"
    shard_seq: Mapped[int] = mapped_column(ForeignKey("shards.committed_seq"), primary_key=True)
    row: Mapped[int] = mapped_column(primary_key=True)
    code: Mapped[str]
    field: Mapped[str]
    detail: Mapped[str]


class ManifestRow(Row):
    __tablename__ = "manifests"
    manifest_id: Mapped[str] = mapped_column(Hex32, primary_key=True)
    datanet: Mapped[str] = mapped_column(ForeignKey("datanets.name"))
    num_groups: Mapped[int]
    created_at: Mapped[int]


class RunRow(Row):
    """A job of ``pipelines/``: ``submitted → running → succeeded | failed``. ``run_id`` is the submission
    id."""

    __tablename__ = "runs"
    run_id: Mapped[str] = mapped_column(primary_key=True)
    kind: Mapped[str]  # ingest, finetune, evaluate, index, close_period
    spec_json: Mapped[str]
    state: Mapped[str]
    outcome_json: Mapped[str] = mapped_column(default="")
    created_at: Mapped[int]


class AdapterRow(Row):
    __tablename__ = "adapters"
    adapter_id: Mapped[str] = mapped_column(Hex32, primary_key=True)
    name: Mapped[str]  # owner/model
    version: Mapped[int]
    base_id: Mapped[str] = mapped_column(Hex32)
    manifest_ids: Mapped[str]  # hex, comma-separated, in training order
    owner_id: Mapped[str] = mapped_column(Hex32)
    trajectory: Mapped[str]  # storage prefix
    index_id: Mapped[str | None] = mapped_column(Hex32)  # evidence index, once built
    prefix_id: Mapped[str | None] = mapped_column(Hex32)  # how its prompts begin, where that is public
    price_gwei_per_token: Mapped[int]
    is_promoted: Mapped[int] = mapped_column(Integer, default=0)  # a bare name is this version
    withdrawn_at: Mapped[int | None]
    created_at: Mapped[int]
    __table_args__ = (UniqueConstraint("name", "version"),)


class ChargeRow(Row):
    """``reserved → captured | released``. One row per request id; the reservation's lease is renewed while
    tokens flow."""

    __tablename__ = "charges"
    request_id: Mapped[str] = mapped_column(Hex32, primary_key=True)
    account_id: Mapped[str] = mapped_column(ForeignKey("accounts.account_id"))
    payer: Mapped[str] = mapped_column(Hex20)
    idempotency_key: Mapped[str | None]
    request_sha256: Mapped[str] = mapped_column(
        Hex32
    )  # of the body: the same key with another body is refused
    state: Mapped[str]
    max_gwei: Mapped[int]
    fee_gwei: Mapped[int] = mapped_column(default=0)
    lease_until: Mapped[int]
    response_json: Mapped[str] = mapped_column(default="")  # what a repeated Idempotency-Key gets
    created_at: Mapped[int]
    __table_args__ = (
        UniqueConstraint("account_id", "idempotency_key"),
        Index("ix_charges_state", "state", "lease_until"),
    )


class ReceiptRow(Row):
    """Immutable but for ``evidence_state`` (``pending → ready``, or ``none``) and ``feedback`` (-1, 0, 1 by
    its payer)."""

    __tablename__ = "receipts"
    receipt_id: Mapped[str] = mapped_column(Hex32, primary_key=True)
    request_id: Mapped[str] = mapped_column(Hex32, unique=True)
    account_id: Mapped[str]
    payer: Mapped[str] = mapped_column(Hex20)
    payer_seq: Mapped[int]
    adapter_id: Mapped[str] = mapped_column(Hex32)
    fee_gwei: Mapped[int]
    canonical: Mapped[bytes]
    evidence_state: Mapped[str]
    evidence_json: Mapped[str] = mapped_column(default="")
    feedback: Mapped[int] = mapped_column(Integer, default=0)
    created_at: Mapped[int]
    __table_args__ = (
        UniqueConstraint("payer", "payer_seq"),
        Index("ix_receipts_adapter", "adapter_id"),
        Index("ix_receipts_evidence", "evidence_state"),
    )


class TranscriptRow(Row):
    """Prompt and answer, encrypted, kept until the adapter's period is closed and its challenge delay is
    over."""

    __tablename__ = "transcripts"
    receipt_id: Mapped[str] = mapped_column(Hex32, primary_key=True)
    salt: Mapped[bytes]
    ciphertext: Mapped[bytes]


class LedgerEntryRow(Row):
    """Double entry: the entries of one ``posting`` sum to zero, and so do all. ``ref`` says why
    (``receipt:…``)."""

    __tablename__ = "ledger_entries"
    posting: Mapped[str] = mapped_column(primary_key=True)
    ledger_account: Mapped[str] = mapped_column(
        primary_key=True
    )  # payer:<hex>, fees, escrow, adapter:<hex>, …
    amount_gwei: Mapped[int]
    ref: Mapped[str]
    created_at: Mapped[int]


class LeaseRow(Row):
    """Who may write for ``name`` until when. ``term`` grows with every new holder and fences every write of
    an older one."""

    __tablename__ = "leases"
    name: Mapped[str] = mapped_column(primary_key=True)
    holder: Mapped[str]
    term: Mapped[int]
    expires_at: Mapped[int]


class BatchRow(Row):
    """``sealed`` (receipts fixed, payload built) → ``dispersed`` (certificate journalled) → ``sent`` →
    ``mined`` → ``final``."""

    __tablename__ = "batches"
    batch_id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    state: Mapped[str]
    term: Mapped[int]
    root: Mapped[str] = mapped_column(Hex32)
    payload_hash: Mapped[str] = mapped_column(Hex32)  # payload bytes: storage key blobs/<payload_hash>
    num_receipts: Mapped[int]
    fee_gwei: Mapped[int]
    da_commitment: Mapped[bytes] = mapped_column(default=b"")
    tx_hash: Mapped[str] = mapped_column(default="")
    block: Mapped[int] = mapped_column(default=0)
    gas_used: Mapped[int] = mapped_column(default=0)
    sealed_at: Mapped[int]


class BatchReceiptRow(Row):
    """The outbox's other half: a receipt without a row here is waiting; the key makes a second batch
    impossible."""

    __tablename__ = "batch_receipts"
    receipt_id: Mapped[str] = mapped_column(ForeignKey("receipts.receipt_id"), primary_key=True)
    batch_id: Mapped[int] = mapped_column(ForeignKey("batches.batch_id"))
    __table_args__ = (Index("ix_batch_receipts_batch", "batch_id"),)


class TransactionRow(Row):
    """Write-ahead journal of signed transactions: stored before they are sent, re-sent byte for byte."""

    __tablename__ = "transactions"
    tx_hash: Mapped[str] = mapped_column(Hex32, primary_key=True)
    purpose: Mapped[str]  # batch:<id>, period:<id>, ceiling:<payer>:<gwei>
    nonce: Mapped[int]
    raw: Mapped[bytes]
    term: Mapped[int]
    state: Mapped[str]  # signed, sent, mined, final, replaced, reverted: see chain/journal.py
    block: Mapped[int] = mapped_column(default=0)
    gas_used: Mapped[int] = mapped_column(default=0)
    created_at: Mapped[int]
    __table_args__ = (Index("ix_transactions_purpose", "purpose"), Index("ix_transactions_nonce", "nonce"))


class PeriodRow(Row):
    """``closed`` (payload and root computed by the job) → ``dispersed`` → ``sent`` → ``mined`` →
    ``final``."""

    __tablename__ = "periods"
    period_id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    state: Mapped[str]
    first_batch: Mapped[int]
    last_batch: Mapped[int]
    root: Mapped[str] = mapped_column(Hex32)
    total_gwei: Mapped[int]  # cumulative, all periods
    payload_hash: Mapped[str] = mapped_column(Hex32)
    da_commitment: Mapped[bytes] = mapped_column(default=b"")
    tx_hash: Mapped[str] = mapped_column(default="")
    closed_at: Mapped[int]


class BlendRow(Row):
    """What a receipt's blend id stands for; kept for good, as the receipt is."""

    __tablename__ = "blends"
    blend_id: Mapped[str] = mapped_column(Hex32, primary_key=True)
    canonical: Mapped[bytes]


class PayoutRow(Row):
    """What one beneficiary earned of one adapter in one period. The pool is a beneficiary like any other."""

    __tablename__ = "payouts"
    period_id: Mapped[int] = mapped_column(ForeignKey("periods.period_id"), primary_key=True)
    adapter_id: Mapped[str] = mapped_column(Hex32, primary_key=True)
    contributor_id: Mapped[str] = mapped_column(Hex32, primary_key=True)
    role: Mapped[str] = mapped_column(
        primary_key=True
    )  # contributor, owner, host, platform, stakers, retrieval, pool
    amount_gwei: Mapped[int]


class ClaimRow(Row):
    __tablename__ = "claims"
    tx_hash: Mapped[str] = mapped_column(Hex32, primary_key=True)
    contributor_id: Mapped[str] = mapped_column(Hex32)
    period_id: Mapped[int]
    cumulative_gwei: Mapped[int]
    paid_gwei: Mapped[int]
    created_at: Mapped[int]


class DepositRow(Row):
    """A deposit (or, negative, a withdrawal) seen on chain, counted into its payer once it is final."""

    __tablename__ = "deposits"
    tx_hash: Mapped[str] = mapped_column(Hex32, primary_key=True)
    log_index: Mapped[int] = mapped_column(primary_key=True)
    payer: Mapped[str] = mapped_column(Hex20)
    amount_gwei: Mapped[int]
    block: Mapped[int]
