"""Questions about receipts: whose, what evidence, settled where; and the outbox that waits for a batch.

A receipt waits until it has a row in ``batch_receipts``; that table's key puts it in one batch for ever."""

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import ColumnElement, Select, bindparam, exists, func, select, update
from sqlalchemy.orm import Session

from attribution.errors import Rejected
from attribution.types import Receipt
from cluster.tables import BatchReceiptRow, BatchRow, ReceiptRow, TranscriptRow, table_of

_RECEIPTS, _TRANSCRIPTS = table_of(ReceiptRow), table_of(TranscriptRow)
_ANSWER_OF = (  # built once: building costs more than running
    select(_RECEIPTS.c.canonical, _TRANSCRIPTS.c.ciphertext)
    .outerjoin(_TRANSCRIPTS, _TRANSCRIPTS.c.receipt_id == _RECEIPTS.c.receipt_id)
    .where(_RECEIPTS.c.request_id == bindparam("the_request"))
)


@dataclass(frozen=True, slots=True)
class StoredReceipt:
    """A receipt and what is known beside it. In the outbox ``batch_id`` is 0, the state ``waiting``."""

    receipt: Receipt
    account_id: str
    evidence_state: str
    evidence_json: str
    feedback: int
    created_at: int
    batch_id: int
    batch_state: str


@dataclass(frozen=True, slots=True)
class Outbox:
    """What waits to be settled: how many receipts, how much, and since when (0 if none)."""

    num_receipts: int
    fee_gwei: int
    oldest_at: int


@dataclass(frozen=True, slots=True)
class Usage:
    """What one account asked for and paid with one adapter (zero: the base model)."""

    adapter_id: bytes
    num_receipts: int
    fee_gwei: int


@dataclass(frozen=True, slots=True)
class StoredTranscript:
    """A receipt's encrypted texts and the salt of its commitment."""

    receipt: Receipt
    salt: bytes
    ciphertext: bytes


def receipt_of(session: Session, receipt_id: bytes) -> StoredReceipt:
    return _one(session, ReceiptRow.receipt_id == receipt_id.hex(), f"receipt {receipt_id.hex()}")


def answer_of_request(session: Session, request_id: bytes) -> tuple[Receipt, bytes | None]:
    """A request's receipt, and its sealed transcript while that is kept."""
    row = session.execute(_ANSWER_OF, {"the_request": request_id.hex()}).first()
    if row is None:
        raise _missing(f"receipt of request {request_id.hex()}")
    return Receipt.from_canonical(row.canonical), row.ciphertext


def receipts_of_account(
    session: Session, account_id: str, limit: int, before_seq: int | None = None
) -> tuple[StoredReceipt, ...]:
    """Newest first; ``before_seq`` (a payer sequence number) continues a listing."""
    query = _stored().where(ReceiptRow.account_id == account_id)
    if before_seq is not None:
        query = query.where(ReceiptRow.payer_seq < before_seq)
    rows = session.execute(query.order_by(ReceiptRow.payer_seq.desc()).limit(limit))
    return tuple(_value(*row) for row in rows)


def receipts_of_batch(session: Session, batch_id: int) -> tuple[Receipt, ...]:
    """Sorted by receipt id, as the batch's root has them."""
    joined = select(ReceiptRow.canonical).join(
        BatchReceiptRow, BatchReceiptRow.receipt_id == ReceiptRow.receipt_id
    )
    rows = session.scalars(joined.where(BatchReceiptRow.batch_id == batch_id).order_by(ReceiptRow.receipt_id))
    return tuple(Receipt.from_canonical(canonical) for canonical in rows)


def waiting(session: Session, limit: int) -> tuple[Receipt, ...]:
    """The outbox, oldest first."""
    query = select(ReceiptRow.canonical).where(_unbatched())
    rows = session.scalars(query.order_by(ReceiptRow.created_at, ReceiptRow.receipt_id).limit(limit))
    return tuple(Receipt.from_canonical(canonical) for canonical in rows)


def outbox(session: Session) -> Outbox:
    totals = select(func.count(), func.sum(ReceiptRow.fee_gwei), func.min(ReceiptRow.created_at))
    count, fee, oldest = session.execute(totals.where(_unbatched())).one()
    return Outbox(count, int(fee or 0), oldest or 0)


def usage_of(session: Session, account_id: str) -> tuple[Usage, ...]:
    """Per adapter, dearest first."""
    fee = func.sum(ReceiptRow.fee_gwei)
    rows = session.execute(
        select(ReceiptRow.adapter_id, func.count(), fee)
        .where(ReceiptRow.account_id == account_id)
        .group_by(ReceiptRow.adapter_id)
        .order_by(fee.desc(), ReceiptRow.adapter_id)
    )
    return tuple(Usage(bytes.fromhex(adapter), count, int(total)) for adapter, count, total in rows)


def pending_evidence(session: Session, limit: int) -> tuple[Receipt, ...]:
    """Receipts whose evidence nobody has worked out yet, oldest first."""
    query = select(ReceiptRow.canonical).where(ReceiptRow.evidence_state == "pending")
    rows = session.scalars(query.order_by(ReceiptRow.created_at, ReceiptRow.receipt_id).limit(limit))
    return tuple(Receipt.from_canonical(canonical) for canonical in rows)


def set_evidence(session: Session, receipt_id: bytes, evidence_json: str) -> bool:
    """Store evidence once; False if it was stored before. It follows from receipt and index, so who was first
    does not matter."""
    pending = update(ReceiptRow).where(
        ReceiptRow.receipt_id == receipt_id.hex(), ReceiptRow.evidence_state == "pending"
    )
    stored = pending.values(evidence_state="ready", evidence_json=evidence_json)
    return session.execute(stored.returning(ReceiptRow.receipt_id)).first() is not None


def set_feedback(session: Session, receipt_id: bytes, account_id: str, feedback: int) -> None:
    """What the payer thinks of an answer: -1, 0 or 1; a later word replaces an earlier one.

    Raises:
        Rejected: another value, or somebody else's receipt (which, to others, does not exist).
    """
    if feedback not in (-1, 0, 1):
        raise Rejected("bad_feedback", f"expected -1, 0 or 1, given {feedback}", field="feedback")
    own = update(ReceiptRow).where(
        ReceiptRow.receipt_id == receipt_id.hex(), ReceiptRow.account_id == account_id
    )
    if session.execute(own.values(feedback=feedback).returning(ReceiptRow.receipt_id)).first() is None:
        raise _missing(f"receipt {receipt_id.hex()}")


def transcripts_of(session: Session, receipt_ids: Sequence[bytes]) -> tuple[StoredTranscript, ...]:
    """Those of ``receipt_ids`` whose texts are still kept, sorted by receipt id. Ask for some hundreds."""
    query = (
        select(ReceiptRow.canonical, TranscriptRow.salt, TranscriptRow.ciphertext)
        .join(TranscriptRow, TranscriptRow.receipt_id == ReceiptRow.receipt_id)
        .where(ReceiptRow.receipt_id.in_([receipt_id.hex() for receipt_id in receipt_ids]))
        .order_by(ReceiptRow.receipt_id)
    )
    rows = session.execute(query)
    return tuple(StoredTranscript(Receipt.from_canonical(data), salt, sealed) for data, salt, sealed in rows)


def _unbatched() -> ColumnElement[bool]:
    return ~exists().where(BatchReceiptRow.receipt_id == ReceiptRow.receipt_id)


def _stored() -> Select[ReceiptRow, int | None, str | None]:
    columns: Select[ReceiptRow, int | None, str | None] = select(
        ReceiptRow, BatchReceiptRow.batch_id, BatchRow.state
    )
    batched = columns.outerjoin(BatchReceiptRow, BatchReceiptRow.receipt_id == ReceiptRow.receipt_id)
    return batched.outerjoin(BatchRow, BatchRow.batch_id == BatchReceiptRow.batch_id)


def _one(session: Session, condition: ColumnElement[bool], what: str) -> StoredReceipt:
    row = session.execute(_stored().where(condition)).first()
    if row is None:
        raise _missing(what)
    return _value(*row)


def _value(row: ReceiptRow, batch_id: int | None, batch_state: str | None) -> StoredReceipt:
    return StoredReceipt(
        receipt=Receipt.from_canonical(row.canonical),
        account_id=row.account_id,
        evidence_state=row.evidence_state,
        evidence_json=row.evidence_json,
        feedback=row.feedback,
        created_at=row.created_at,
        batch_id=batch_id or 0,
        batch_state=batch_state or "waiting",
    )


def _missing(what: str) -> Rejected:
    return Rejected("receipt_not_found", f"no {what}", field="receipt_id", http_status=404)
