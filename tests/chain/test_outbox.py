"""Which receipts a batch takes, on both databases; and that only the current term writes."""

from collections.abc import Iterator

import pytest
from sqlalchemy import Engine, func, select
from sqlalchemy.exc import IntegrityError

from attribution.errors import Rejected
from attribution.hashing import keccak256
from attribution.payload import decode_batch, encode_batch
from attribution.types import Batch, Receipt
from chain.outbox import BatchRules, is_due, next_batch, num_waiting, record
from chain.term import Term
from cluster.accounts import open_account, record_ceiling, record_deposit
from cluster.charges import ReceiptDraft, capture, reserve
from cluster.database import connect, migrate, reading, writing
from cluster.receipts import Outbox, outbox
from cluster.tables import BatchReceiptRow, BatchRow

PAYERS = (b"\xaa" * 20, b"\xbb" * 20)
FAR = 2**40


@pytest.fixture(params=["sqlite", "postgres"])
def rows(request: pytest.FixtureRequest) -> Iterator[Engine]:
    url: str = request.getfixturevalue(f"{request.param}_url")
    migrate(url)
    engine = connect(url)
    with writing(engine) as session:
        for payer in PAYERS:
            record_deposit(session, payer, 1000, payer + bytes(12), 0, 1, 1)
            record_ceiling(session, payer, 1000, FAR, b"")
            open_account(session, payer, "", 1000, 1)
    yield engine
    engine.dispose()


def serve(rows: Engine, payer: bytes, fee_gwei: int, now: int, label: str) -> Receipt:
    request_id = keccak256(label.encode())
    draft = ReceiptDraft(bytes(32), bytes(32), 1, 1, fee_gwei, request_id, "", None, "none")
    with writing(rows) as session:
        account = open_account(session, payer, label, fee_gwei, now)
        reserve(session, account, request_id, fee_gwei, None, request_id, 60, now)
        return capture(session, request_id, draft, now)


def seal(rows: Engine, max_receipts: int) -> Batch:
    with reading(rows) as session:
        batch = next_batch(session, BatchRules(max_receipts))
    with writing(rows) as session:
        record(session, batch, keccak256(encode_batch(batch)), 1, 1)
    return batch


def test_every_batch_takes_a_prefix_of_every_payer_though_clocks_disagree(rows: Engine) -> None:
    """Gateways wrote Alice's second receipt with an earlier time than her first: the order of ``payer_seq``
    wins, whatever the batch's size; captures are sums of prefixes; together the batches take everything."""
    served = [serve(rows, PAYERS[i % 2], 10 + i, 1000 - 7 * i, f"{i}") for i in range(11)]
    last, spent = dict.fromkeys(PAYERS, 0), dict.fromkeys(PAYERS, 0)
    settled: list[bytes] = []
    for _ in range(4):
        batch = seal(rows, max_receipts=3)
        assert decode_batch(encode_batch(batch)) == batch
        for receipt in sorted(batch.receipts, key=lambda receipt: receipt.payer_seq):
            assert receipt.payer_seq == last[receipt.payer] + 1
            last[receipt.payer] += 1
            spent[receipt.payer] += receipt.fee_gwei
        assert all(c.cumulative_gwei == spent[c.payer] for c in batch.captures)
        settled += [receipt.receipt_id for receipt in batch.receipts]
        with reading(rows) as session:
            assert num_waiting(session) == outbox(session).num_receipts == 11 - len(settled)
    assert sorted(settled) == sorted(receipt.receipt_id for receipt in served)


def test_the_same_rows_give_the_same_bytes(rows: Engine) -> None:
    for i in range(4):
        serve(rows, PAYERS[i % 2], 10, 5, f"{i}")
    with reading(rows) as session:
        payloads = {encode_batch(next_batch(session, BatchRules())) for _ in range(2)}
    assert len(payloads) == 1


def test_a_receipt_in_two_batches_is_refused_by_the_database(rows: Engine) -> None:
    serve(rows, PAYERS[0], 10, 5, "one")
    with reading(rows) as session:
        batch = next_batch(session, BatchRules())
    seal(rows, 10)
    with pytest.raises(IntegrityError), writing(rows) as session:
        record(session, Batch(2, batch.receipts, batch.captures), bytes(32), 1, 1)
    with reading(rows) as session:
        assert session.scalar(select(func.count(BatchReceiptRow.receipt_id))) == 1
        assert session.scalar(select(func.count(BatchRow.batch_id))) == 1


@pytest.mark.parametrize(
    ("waiting", "is_expected"),
    [
        (Outbox(0, 0, 0), False),
        (Outbox(1, 5, 900), False),
        (Outbox(10, 5, 900), True),
        (Outbox(1, 50, 900), True),
        (Outbox(1, 5, 700), True),
    ],
)
def test_a_batch_closes_by_size_by_cost_or_by_age(waiting: Outbox, is_expected: bool) -> None:
    rules = BatchRules(max_receipts=10, max_age_s=300, max_fee_gwei=50)
    assert is_due(waiting, rules, now=1000) == is_expected


def test_a_term_that_has_ended_writes_nothing(rows: Engine) -> None:
    """The older holder still believes that it leads; its transaction is refused and leaves no trace."""
    clock = [1000.0]
    early, late = (Term(rows, name, 10, lambda: clock[0]) for name in ("early", "late"))
    assert early.hold() == ["leads with term 1"]
    assert "lease_held" in late.hold()[0]
    clock[0] += 11
    assert late.hold() == ["leads with term 2"]
    with pytest.raises(Rejected) as refused, early.writing() as session:
        session.add(BatchRow(batch_id=1, state="sealed", term=1, root="", payload_hash="", num_receipts=1))
    assert refused.value.code == "fenced"
    assert "fenced" in early.hold()[0] and not early.is_held
    with reading(rows) as session:
        assert session.scalar(select(func.count(BatchRow.batch_id))) == 0
