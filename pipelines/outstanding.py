"""What a period has to pay: final batches that no period covers yet, and receipts that earlier ones carried.

Nothing remembers which receipts are paid: it follows. A period pays all that an adapter has outstanding, so a
receipt is paid exactly if its batch lies at or before the last batch of the newest period with a payout of
its adapter."""

from collections import defaultdict
from dataclasses import dataclass

from sqlalchemy import ColumnElement, func, select
from sqlalchemy.orm import Session

from attribution.errors import Corrupted, Rejected
from attribution.payload import next_head
from attribution.types import Receipt, Share
from cluster.tables import BatchReceiptRow, BatchRow, PayoutRow, PeriodRow, ReceiptRow, TranscriptRow


@dataclass(frozen=True, slots=True)
class Outstanding:
    """One adapter's unpaid receipts, sorted by id. The base model is the adapter of id zero."""

    adapter_id: bytes
    receipts: tuple[Receipt, ...]

    @property
    def fee_gwei(self) -> int:
        return sum(receipt.fee_gwei for receipt in self.receipts)

    @property
    def num_payers(self) -> int:
        return len({receipt.payer for receipt in self.receipts})


@dataclass(frozen=True, slots=True)
class NextPeriod:
    """The period that can be closed now. ``earlier`` is what everybody earned before it, sorted by id."""

    period_id: int
    first_batch: int
    last_batch: int
    ledger_head: bytes
    adapters: tuple[Outstanding, ...]  # sorted by adapter id
    earlier: tuple[Share, ...]


def next_period(session: Session) -> NextPeriod:
    """``Rejected`` if no final batch waits for a period."""
    newest = session.execute(
        select(PeriodRow.period_id, PeriodRow.last_batch).order_by(PeriodRow.period_id.desc()).limit(1)
    ).first()
    period_id, first = (newest.period_id + 1, newest.last_batch + 1) if newest else (1, 1)
    last, head = _final_run(session, first)
    if last < first:
        raise Rejected("nothing_to_close", f"period {period_id} waits for batch {first} to be final")
    return NextPeriod(period_id, first, last, head, _outstanding(session, last), _earned(session))


def _final_run(session: Session, first: int) -> tuple[int, bytes]:
    """Last batch of the unbroken run of final batches from ``first`` on, and the ledger's head as of it."""
    last, head = first - 1, bytes(32)
    for batch in session.scalars(select(BatchRow).order_by(BatchRow.batch_id)):
        if batch.batch_id >= first and batch.state != "final":
            break
        if batch.batch_id >= first and batch.batch_id != last + 1:
            raise Corrupted("batch_gap", f"batch {last + 1} is missing before batch {batch.batch_id}")
        head = next_head(
            head,
            batch.batch_id,
            bytes.fromhex(batch.root),
            bytes.fromhex(batch.payload_hash),
            batch.num_receipts,
            batch.fee_gwei,
            batch.da_commitment,
        )
        last = max(last, batch.batch_id)
    return last, head


def _outstanding(session: Session, last_batch: int) -> tuple[Outstanding, ...]:
    paid_through = paid_batches(session)
    rows = session.execute(
        select(ReceiptRow.canonical, BatchReceiptRow.batch_id)
        .join(BatchReceiptRow, BatchReceiptRow.receipt_id == ReceiptRow.receipt_id)
        .where(BatchReceiptRow.batch_id <= last_batch)
        .order_by(ReceiptRow.receipt_id)
    )
    unpaid: dict[bytes, list[Receipt]] = defaultdict(list)
    for canonical, batch_id in rows:
        receipt = Receipt.from_canonical(canonical)
        if batch_id > paid_through.get(receipt.adapter_id, 0):
            unpaid[receipt.adapter_id].append(receipt)
    found = (Outstanding(adapter_id, tuple(unpaid[adapter_id])) for adapter_id in sorted(unpaid))
    return tuple(one for one in found if one.fee_gwei)


def unchallengeable(session: Session, challenge_delay_s: int, now: int) -> list[bytes]:
    """Receipts with a transcript that a final period has paid, and whose challenge delay is over."""
    is_over = (PeriodRow.state == "final") & (PeriodRow.closed_at + challenge_delay_s <= now)
    paid_through = paid_batches(session, is_over)
    kept = session.execute(
        select(TranscriptRow.receipt_id, ReceiptRow.adapter_id, BatchReceiptRow.batch_id)
        .join(ReceiptRow, ReceiptRow.receipt_id == TranscriptRow.receipt_id)
        .join(BatchReceiptRow, BatchReceiptRow.receipt_id == TranscriptRow.receipt_id)
        .order_by(TranscriptRow.receipt_id)
    )
    return [
        bytes.fromhex(receipt_id)
        for receipt_id, adapter_id, batch_id in kept
        if batch_id <= paid_through.get(bytes.fromhex(adapter_id), 0)
    ]


def paid_batches(session: Session, *conditions: ColumnElement[bool]) -> dict[bytes, int]:
    """For every adapter that was paid (by periods that meet the conditions), the last batch so covered."""
    rows = session.execute(
        select(PayoutRow.adapter_id, func.max(PeriodRow.last_batch))
        .join(PeriodRow, PeriodRow.period_id == PayoutRow.period_id)
        .where(*conditions)
        .group_by(PayoutRow.adapter_id)
    )
    return {bytes.fromhex(adapter_id): last for adapter_id, last in rows}


def _earned(session: Session) -> tuple[Share, ...]:
    rows = session.execute(
        select(PayoutRow.contributor_id, func.sum(PayoutRow.amount_gwei))
        .group_by(PayoutRow.contributor_id)
        .order_by(PayoutRow.contributor_id)
    )
    return tuple(Share(bytes.fromhex(contributor), int(amount)) for contributor, amount in rows)
