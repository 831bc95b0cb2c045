"""From waiting receipts to a sealed batch: when it is due, which receipts it takes, and its rows.

A receipt without a row in ``batch_receipts`` waits (cluster/receipts.py). A batch takes, of every payer, a
prefix of what waits in the order of ``payer_seq``, so after each batch a payer's cumulative capture is the
sum of its first k fees."""

from dataclasses import dataclass

from sqlalchemy import Select, exists, func, select
from sqlalchemy.orm import Session

from attribution.payload import batch_tree
from attribution.types import Batch, Capture, Receipt
from cluster.blends import blends_among
from cluster.receipts import Outbox
from cluster.tables import BatchReceiptRow, BatchRow, PayerRow, ReceiptRow


@dataclass(frozen=True, slots=True)
class BatchRules:
    """A batch closes when any of these is reached. 50 000 receipts of 200 bytes stay below EigenDA's
    limit."""

    max_receipts: int = 500
    max_age_s: int = 300
    max_fee_gwei: int = 10**10

    def __post_init__(self) -> None:
        assert 0 < self.max_receipts <= 50_000, self.max_receipts


def num_waiting(session: Session) -> int:
    """From the payers' gapless numbers and the batches' counts, so that an idle tick reads no receipt."""
    served = session.scalar(select(func.coalesce(func.sum(PayerRow.next_seq - 1), 0))) or 0
    settled = session.scalar(select(func.coalesce(func.sum(BatchRow.num_receipts), 0))) or 0
    return int(served) - int(settled)


def is_due(outbox: Outbox, rules: BatchRules, now: int) -> bool:
    is_full = outbox.num_receipts >= rules.max_receipts or outbox.fee_gwei >= rules.max_fee_gwei
    return outbox.num_receipts > 0 and (is_full or now - outbox.oldest_at >= rules.max_age_s)


def next_batch(session: Session, rules: BatchRules) -> Batch:
    """The batch that would be sealed now: the same rows give the same bytes."""
    rows = session.scalars(_oldest_first().limit(rules.max_receipts))
    receipts = sorted((Receipt.from_canonical(row) for row in rows), key=lambda receipt: receipt.receipt_id)
    payers = sorted({receipt.payer for receipt in receipts})
    captures = [Capture(payer, _settled_gwei(session, payer) + _spent(receipts, payer)) for payer in payers]
    last = session.scalar(select(func.max(BatchRow.batch_id))) or 0
    blends = blends_among(session, (receipt.adapter_id for receipt in receipts))
    named = tuple(blend for _, blend in sorted(blends.items()))
    return Batch(last + 1, tuple(receipts), tuple(captures), named)


def record(session: Session, batch: Batch, payload_hash: bytes, term: int, now: int) -> None:
    """Bind the receipts to the batch: a second batch for any of them violates a key."""
    session.add(
        BatchRow(
            batch_id=batch.batch_id,
            state="sealed",
            term=term,
            root=batch_tree(batch).root.hex(),
            payload_hash=payload_hash.hex(),
            num_receipts=len(batch.receipts),
            fee_gwei=batch.fee_gwei,
            sealed_at=now,
        )
    )
    session.flush()
    ids = [receipt.receipt_id.hex() for receipt in batch.receipts]
    session.add_all(BatchReceiptRow(receipt_id=receipt_id, batch_id=batch.batch_id) for receipt_id in ids)


def _oldest_first() -> Select[bytes]:
    """By the newest time among a payer's receipts up to this one: gateways' clocks may disagree, a prefix may
    not have gaps."""
    age = func.max(ReceiptRow.created_at).over(partition_by=ReceiptRow.payer, order_by=ReceiptRow.payer_seq)
    in_batch = exists().where(BatchReceiptRow.receipt_id == ReceiptRow.receipt_id)
    waits = select(ReceiptRow.canonical, ReceiptRow.payer, ReceiptRow.payer_seq, age.label("age"))
    found = waits.where(~in_batch).subquery()
    return select(found.c.canonical).order_by(found.c.age, found.c.payer, found.c.payer_seq)


def _settled_gwei(session: Session, payer: bytes) -> int:
    settled = select(func.coalesce(func.sum(ReceiptRow.fee_gwei), 0)).join(
        BatchReceiptRow, BatchReceiptRow.receipt_id == ReceiptRow.receipt_id
    )
    return int(session.scalar(settled.where(ReceiptRow.payer == payer.hex())) or 0)


def _spent(receipts: list[Receipt], payer: bytes) -> int:
    return sum(receipt.fee_gwei for receipt in receipts if receipt.payer == payer)
