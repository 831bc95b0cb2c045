"""Receipts and their outbox: each waits until it is in one batch, and never in two."""

import pytest
from sqlalchemy import Engine
from sqlalchemy.exc import IntegrityError

from attribution.errors import Rejected
from attribution.types import Receipt
from cluster.charges import capture
from cluster.database import reading, writing
from cluster.receipts import (
    Outbox,
    outbox,
    pending_evidence,
    receipt_of,
    receipts_of_account,
    receipts_of_batch,
    set_evidence,
    set_feedback,
    usage_of,
    waiting,
)
from cluster.tables import BatchReceiptRow, BatchRow
from tests.cluster.money import NOW, draft, funded_account, hold


def captured(engine: Engine, count: int, start: int = 1) -> tuple[str, list[Receipt]]:
    with writing(engine) as session:
        account = funded_account(session, 100_000)
        receipts = []
        for number in range(start, start + count):
            hold(session, account, bytes([number]) * 32, 1000)
            receipts.append(capture(session, bytes([number]) * 32, draft(10 + number), NOW + number))
    return account, receipts


def batch(engine: Engine, batch_id: int, receipts: list[Receipt]) -> None:
    with writing(engine) as session:
        fee = sum(receipt.fee_gwei for receipt in receipts)
        counts = {"num_receipts": len(receipts), "fee_gwei": fee, "sealed_at": NOW, "term": 1}
        session.add(
            BatchRow(batch_id=batch_id, state="sealed", root="0" * 64, payload_hash="0" * 64, **counts)
        )
        session.flush()
        session.add_all(BatchReceiptRow(receipt_id=r.receipt_id.hex(), batch_id=batch_id) for r in receipts)


def test_the_outbox_holds_what_is_in_no_batch_oldest_first(engine: Engine) -> None:
    _, receipts = captured(engine, 5)
    with reading(engine) as session:
        assert waiting(session, 100) == tuple(receipts)
        assert waiting(session, 2) == tuple(receipts[:2])
        assert outbox(session) == Outbox(5, sum(r.fee_gwei for r in receipts), NOW + 1)
    batch(engine, 1, receipts[:3])
    with reading(engine) as session:
        assert waiting(session, 100) == tuple(receipts[3:])
        assert receipts_of_batch(session, 1) == tuple(sorted(receipts[:3], key=lambda r: r.receipt_id))
        assert receipt_of(session, receipts[0].receipt_id).batch_state == "sealed"
        assert receipt_of(session, receipts[4].receipt_id).batch_state == "waiting"
    batch(engine, 2, receipts[3:])
    with reading(engine) as session:
        assert outbox(session) == Outbox(0, 0, 0)


def test_no_receipt_enters_two_batches(engine: Engine) -> None:
    _, receipts = captured(engine, 2)
    batch(engine, 1, receipts)
    with pytest.raises(IntegrityError):
        batch(engine, 2, receipts[1:])
    with reading(engine) as session:
        assert receipts_of_batch(session, 2) == ()


def test_an_account_lists_its_own_newest_first(engine: Engine) -> None:
    mine, receipts = captured(engine, 4)
    captured(engine, 2, start=100)
    with reading(engine) as session:
        page = receipts_of_account(session, mine, 3)
        assert [found.receipt for found in page] == receipts[:0:-1]
        rest = receipts_of_account(session, mine, 3, before_seq=page[-1].receipt.payer_seq)
        assert [found.receipt for found in rest] == receipts[:1]
        (usage,) = usage_of(session, mine)
        assert (usage.num_receipts, usage.fee_gwei) == (4, sum(r.fee_gwei for r in receipts))


def test_evidence_is_stored_once(engine: Engine) -> None:
    _, (first, second) = captured(engine, 2)
    with writing(engine) as session:
        assert pending_evidence(session, 10) == (first, second)
        assert set_evidence(session, first.receipt_id, '{"spans": []}')
        assert not set_evidence(session, first.receipt_id, '{"spans": [1]}')
        assert pending_evidence(session, 10) == (second,)
    with reading(engine) as session:
        found = receipt_of(session, first.receipt_id)
    assert (found.evidence_state, found.evidence_json) == ("ready", '{"spans": []}')


def test_feedback_is_the_payers_own(engine: Engine) -> None:
    account, (receipt,) = captured(engine, 1)
    with writing(engine) as session:
        set_feedback(session, receipt.receipt_id, account, 1)
        set_feedback(session, receipt.receipt_id, account, -1)
        with pytest.raises(Rejected) as refusal:
            set_feedback(session, receipt.receipt_id, "somebody else", 1)
        assert refusal.value.http_status == 404
        with pytest.raises(Rejected, match="given 2"):
            set_feedback(session, receipt.receipt_id, account, 2)
        assert receipt_of(session, receipt.receipt_id).feedback == -1


def test_an_unknown_receipt_is_not_found(engine: Engine) -> None:
    with reading(engine) as session, pytest.raises(Rejected) as refusal:
        receipt_of(session, b"\0" * 32)
    assert (refusal.value.code, refusal.value.http_status) == ("receipt_not_found", 404)
