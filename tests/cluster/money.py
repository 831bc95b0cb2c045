"""Payers with money, drafts of receipts, and the sums that must hold whatever happened."""

import secrets

from sqlalchemy import ColumnElement, Engine, func, select
from sqlalchemy.orm import Session

from attribution.hashing import sha256
from cluster.accounts import open_account, record_ceiling, record_deposit
from cluster.charges import Charge, ReceiptDraft, SealedTranscript, reserve
from cluster.database import reading
from cluster.ledger import ESCROW, FEES, balance, imbalance, payer_free, payer_reserved
from cluster.tables import AccountRow, ChargeRow, LedgerEntryRow, PayerRow, ReceiptRow

NOW = 1_800_000_000
YEAR_S = 365 * 86_400


def fund(session: Session, deposit_gwei: int, ceiling_gwei: int | None = None) -> bytes:
    """A new payer with a final deposit and a ceiling that lasts a year."""
    payer = secrets.token_bytes(20)
    record_deposit(session, payer, deposit_gwei, secrets.token_bytes(32), 0, block=1, now=NOW)
    ceiling = deposit_gwei if ceiling_gwei is None else ceiling_gwei
    record_ceiling(session, payer, ceiling, NOW + YEAR_S, b"\1" * 65)
    return payer


def funded_account(session: Session, deposit_gwei: int = 1000, budget_gwei: int | None = None) -> str:
    budget = deposit_gwei if budget_gwei is None else budget_gwei
    return open_account(session, fund(session, deposit_gwei), "test", budget, NOW)


def hold(
    session: Session, account_id: str, request_id: bytes, max_gwei: int = 100, key: str | None = None
) -> Charge:
    return reserve(session, account_id, request_id, max_gwei, key, sha256(b"body"), 60, NOW)


def draft(fee_gwei: int = 10, response_json: str = "{}") -> ReceiptDraft:
    return ReceiptDraft(
        base_id=b"\1" * 32,
        adapter_id=b"\2" * 32,
        prompt_tokens=3,
        completion_tokens=4,
        fee_gwei=fee_gwei,
        commitment=b"\3" * 32,
        response_json=response_json,
        transcript=SealedTranscript(b"salt", b"sealed"),
        evidence_state="pending",
    )


def assert_money_adds_up(engine: Engine) -> None:
    """Promise 3 and the invariants of payers and accounts, recomputed from the rows themselves."""
    with reading(engine) as session:
        assert imbalance(session) == {}
        assert (session.scalar(select(func.sum(LedgerEntryRow.amount_gwei))) or 0) == 0
        assert balance(session, FEES) == (session.scalar(select(func.sum(ReceiptRow.fee_gwei))) or 0)
        assert balance(session, ESCROW) == -(session.scalar(select(func.sum(PayerRow.deposited_gwei))) or 0)
        for payer in session.scalars(select(PayerRow)):
            _check_payer(session, payer)
        for account in session.scalars(select(AccountRow)):
            own = ChargeRow.account_id == account.account_id
            assert (account.spent_gwei, account.reserved_gwei) == _spent_and_reserved(session, own)
            assert account.spent_gwei + account.reserved_gwei <= account.budget_gwei


def _check_payer(session: Session, payer: PayerRow) -> None:
    address = bytes.fromhex(payer.payer)
    assert (payer.spent_gwei, payer.reserved_gwei) == _spent_and_reserved(
        session, ChargeRow.payer == payer.payer
    )
    assert payer.spent_gwei + payer.reserved_gwei <= min(payer.deposited_gwei, payer.ceiling_gwei)
    assert balance(session, payer_reserved(address)) == payer.reserved_gwei
    assert (
        balance(session, payer_free(address)) == payer.deposited_gwei - payer.spent_gwei - payer.reserved_gwei
    )
    own = select(ReceiptRow.payer_seq).where(ReceiptRow.payer == payer.payer).order_by(ReceiptRow.payer_seq)
    numbers = session.scalars(own).all()
    assert list(numbers) == list(range(1, len(numbers) + 1))
    assert payer.next_seq == len(numbers) + 1


def _spent_and_reserved(session: Session, own: ColumnElement[bool]) -> tuple[int, int]:
    captured = select(func.sum(ChargeRow.fee_gwei)).where(own, ChargeRow.state == "captured")
    reserved = select(func.sum(ChargeRow.max_gwei)).where(own, ChargeRow.state == "reserved")
    return int(session.scalar(captured) or 0), int(session.scalar(reserved) or 0)
