"""What a period has to pay: final batches that no period covers yet, and receipts that earlier ones carried.

Nothing remembers which receipts are paid: it follows. A period pays all that an adapter has outstanding, so a
receipt is paid exactly if its batch lies at or before the last batch of the newest period with a payout of
its adapter. A blend's fee is due to its adapters by weight, and each part is paid when its adapter is."""

from collections import defaultdict
from dataclasses import dataclass

from sqlalchemy import ColumnElement, func, select
from sqlalchemy.orm import Session

from attribution.errors import Corrupted, Rejected
from attribution.payload import next_head
from attribution.payout import fee_shares
from attribution.types import Blend, Receipt, Share
from cluster.blends import blends_among
from cluster.tables import BatchReceiptRow, BatchRow, PayoutRow, PeriodRow, ReceiptRow, TranscriptRow


@dataclass(frozen=True, slots=True)
class Due:
    """What one receipt owes to one adapter: its fee, or a part of it where a blend answered."""

    receipt: Receipt
    fee_gwei: int
    blend: Blend | None


@dataclass(frozen=True, slots=True)
class Outstanding:
    """What is due to one adapter, sorted by receipt. The base model is the adapter of id zero."""

    adapter_id: bytes
    dues: tuple[Due, ...]

    @property
    def fee_gwei(self) -> int:
        return sum(due.fee_gwei for due in self.dues)

    @property
    def oldest_s(self) -> int:
        """When the oldest of its answers was given, in seconds since 1970, to the hour."""
        return 3600 * min(due.receipt.hour for due in self.dues)

    @property
    def num_payers(self) -> int:
        return len({due.receipt.payer for due in self.dues})


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
    settled = [(Receipt.from_canonical(canonical), batch_id) for canonical, batch_id in rows]
    blends = blends_among(session, (receipt.adapter_id for receipt, _ in settled))
    unpaid: dict[bytes, list[Due]] = defaultdict(list)
    for receipt, batch_id in settled:
        for adapter_id, fee_gwei in fee_shares(receipt, blends):
            if batch_id > paid_through.get(adapter_id, 0):
                unpaid[adapter_id].append(Due(receipt, fee_gwei, blends.get(receipt.adapter_id)))
    found = (Outstanding(adapter_id, tuple(unpaid[adapter_id])) for adapter_id in sorted(unpaid))
    return tuple(one for one in found if one.fee_gwei)


def unchallengeable(session: Session, challenge_delay_s: int, now: int) -> list[bytes]:
    """Receipts with a transcript that a final period has paid, and whose challenge delay is over."""
    is_over = (PeriodRow.state == "final") & (PeriodRow.closed_at + challenge_delay_s <= now)
    paid_through = paid_batches(session, is_over)
    rows = session.execute(
        select(ReceiptRow.canonical, BatchReceiptRow.batch_id)
        .join(TranscriptRow, TranscriptRow.receipt_id == ReceiptRow.receipt_id)
        .join(BatchReceiptRow, BatchReceiptRow.receipt_id == ReceiptRow.receipt_id)
        .order_by(ReceiptRow.receipt_id)
    )
    kept = [(Receipt.from_canonical(canonical), batch_id) for canonical, batch_id in rows]
    blends = blends_among(session, (receipt.adapter_id for receipt, _ in kept))
    return [
        receipt.receipt_id
        for receipt, batch_id in kept
        if all(batch_id <= paid_through.get(adapter_id, 0) for adapter_id, _ in fee_shares(receipt, blends))
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


def paying_period(session: Session, adapter_id: bytes, batch_id: int) -> tuple[int, str] | None:
    """The period that paid an adapter its receipts of a batch, and the hash of its payload; the first with a
    payout of it that reaches so far."""
    found = session.execute(
        select(PeriodRow.period_id, PeriodRow.payload_hash)
        .join(PayoutRow, PayoutRow.period_id == PeriodRow.period_id)
        .where(PayoutRow.adapter_id == adapter_id.hex(), PeriodRow.last_batch >= batch_id)
        .order_by(PeriodRow.period_id)
        .limit(1)
    ).first()
    return (found.period_id, found.payload_hash) if found else None


def _earned(session: Session) -> tuple[Share, ...]:
    rows = session.execute(
        select(PayoutRow.contributor_id, func.sum(PayoutRow.amount_gwei))
        .group_by(PayoutRow.contributor_id)
        .order_by(PayoutRow.contributor_id)
    )
    return tuple(Share(bytes.fromhex(contributor), int(amount)) for contributor, amount in rows)
