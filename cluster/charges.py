"""Charging as a state machine: ``reserved(max) → captured(receipt) | released``, one row per request id.

The reservation commits before the first token, the capture before the last event. Every step is a conditional
update, so it does not matter how many gateways race: ``spent + reserved`` never passes what the payer has
deposited and signed for, nor the account's budget. All functions run inside the caller's transaction and
leave no trace when they refuse, so that a gateway may commit many requests at once."""

from dataclasses import dataclass

from sqlalchemy import ColumnElement, select, update
from sqlalchemy.orm import Session

from attribution.errors import Rejected
from attribution.types import Receipt
from cluster.database import insert_new
from cluster.ledger import FEES, Entry, payer_free, payer_reserved, post
from cluster.tables import AccountRow, ChargeRow, PayerRow, ReceiptRow, TranscriptRow

CEILING_MARGIN_S = 3600
"""A receipt is captured on chain a batch later, when its ceiling must still hold."""
_MAX_GWEI = 2**62


@dataclass(frozen=True, slots=True)
class Charge:
    """One request's money. ``is_new`` is False for what a repeated request id or Idempotency-Key found."""

    request_id: bytes
    account_id: str
    payer: bytes
    state: str
    max_gwei: int
    fee_gwei: int
    lease_until: int
    response_json: str  # what a repeated Idempotency-Key gets; empty until captured
    is_new: bool


@dataclass(frozen=True, slots=True)
class SealedTranscript:
    """Prompt and answer as ``cluster.transcripts.seal`` encrypts them, and the salt of their commitment."""

    salt: bytes
    ciphertext: bytes


@dataclass(frozen=True, slots=True)
class ReceiptDraft:
    """All of a receipt that the gateway knows; the payer's sequence number is the capture's to give."""

    base_id: bytes
    adapter_id: bytes  # zero for the base model
    prompt_tokens: int
    completion_tokens: int
    fee_gwei: int
    commitment: bytes
    response_json: str
    transcript: SealedTranscript | None  # None with ``store: false``
    evidence_state: str  # pending, or none


def reserve(
    session: Session,
    account_id: str,
    request_id: bytes,
    max_gwei: int,
    idempotency_key: str | None,
    request_sha256: bytes,
    lease_s: int,
    now: int,
) -> Charge:
    """Set aside the most that a request can cost. The same request id or key again finds the first charge.

    Raises:
        Rejected: 402 ``insufficient_credit`` beyond deposit, ceiling or budget; 422
            ``idempotency_key_reused`` for the same key with another body; 404 ``account_not_found``.
    """
    assert max_gwei >= 0
    payer = session.scalar(select(AccountRow.payer).where(AccountRow.account_id == account_id))
    if payer is None:
        raise Rejected("account_not_found", f"no account {account_id!r}", field="account", http_status=404)
    with session.begin_nested():
        values = {
            "request_id": request_id.hex(),
            "account_id": account_id,
            "payer": payer,
            "idempotency_key": idempotency_key,
            "request_sha256": request_sha256.hex(),
            "state": "reserved",
            "max_gwei": min(max_gwei, _MAX_GWEI),
            "lease_until": now + lease_s,
            "created_at": now,
        }
        if not insert_new(session, ChargeRow, values):
            return _repeated(session, account_id, request_id, idempotency_key, request_sha256)
        _take(session, account_id, payer, max_gwei, now)
        entries = (
            Entry(payer_free(bytes.fromhex(payer)), -max_gwei),
            Entry(payer_reserved(bytes.fromhex(payer)), max_gwei),
        )
        post(session, f"reserve:{request_id.hex()}", entries, f"request:{request_id.hex()}", now)
    return _charge(_row(session, request_id), is_new=True)


def renew(session: Session, request_id: bytes, lease_s: int, now: int) -> None:
    """Keep a reservation while tokens flow.

    Raises:
        Rejected: 409 ``reservation_lost``: it was released, so nothing more may be sent on it.
    """
    held = update(ChargeRow).where(ChargeRow.request_id == request_id.hex(), ChargeRow.state == "reserved")
    renewed = held.values(lease_until=now + lease_s).returning(ChargeRow.request_id)
    if session.execute(renewed).first() is None:
        raise _lost(session, request_id)


def capture(session: Session, request_id: bytes, draft: ReceiptDraft, now: int) -> Receipt:
    """Turn a reservation into a receipt: number, receipt, ledger, balances and transcript, or none of them.

    Capturing again returns the first receipt.

    Raises:
        Rejected: 409 ``reservation_lost``: the reservation was released before.
    """
    captured = (
        update(ChargeRow)
        .where(ChargeRow.request_id == request_id.hex(), ChargeRow.state == "reserved")
        .values(state="captured", fee_gwei=draft.fee_gwei, response_json=draft.response_json)
        .returning(ChargeRow.account_id, ChargeRow.payer, ChargeRow.max_gwei)
    )
    with session.begin_nested():
        charge = session.execute(captured).first()
        if charge is None:
            return _first_receipt(session, request_id)
        account_id, payer, max_gwei = charge
        assert 0 <= draft.fee_gwei <= max_gwei, f"{request_id.hex()}: fee {draft.fee_gwei} of {max_gwei}"
        payer_seq = _give_back(session, account_id, payer, max_gwei, draft.fee_gwei)
        receipt = _receipt(request_id, bytes.fromhex(payer), payer_seq, draft, now)
        _store(session, receipt, account_id, draft, now)
        entries = (
            Entry(payer_reserved(receipt.payer), -max_gwei),
            Entry(payer_free(receipt.payer), max_gwei - draft.fee_gwei),
            Entry(FEES, draft.fee_gwei),
        )
        post(session, f"capture:{request_id.hex()}", entries, f"receipt:{receipt.receipt_id.hex()}", now)
    return receipt


def release(session: Session, request_id: bytes, now: int) -> bool:
    """Give a reservation back; False if it was captured or released before.

    Its Idempotency-Key is free again: a request that came to nothing has no result to repeat."""
    held = (ChargeRow.request_id == request_id.hex(), ChargeRow.state == "reserved")
    return _release(session, request_id, held, now)


def release_orphans(session: Session, now: int, limit: int = 1000) -> int:
    """Give back the reservations whose lease has ended: their gateway is dead. Returns how many."""
    ended = (ChargeRow.state == "reserved", ChargeRow.lease_until < now)
    found = session.scalars(
        select(ChargeRow.request_id).where(*ended).order_by(ChargeRow.lease_until).limit(limit)
    )
    return sum(
        _release(session, bytes.fromhex(request_id), (ChargeRow.request_id == request_id, *ended), now)
        for request_id in found.all()
    )


def charge_of(session: Session, request_id: bytes) -> Charge:
    return _charge(_row(session, request_id), is_new=False)


def _release(
    session: Session, request_id: bytes, condition: tuple[ColumnElement[bool], ...], now: int
) -> bool:
    released = (
        update(ChargeRow)
        .where(*condition)
        .values(state="released", idempotency_key=None)
        .returning(ChargeRow.account_id, ChargeRow.payer, ChargeRow.max_gwei)
    )
    with session.begin_nested():
        charge = session.execute(released).first()
        if charge is None:
            return False
        account_id, payer, max_gwei = charge
        _give_back(session, account_id, payer, max_gwei, None)
        holder = bytes.fromhex(payer)
        entries = (Entry(payer_reserved(holder), -max_gwei), Entry(payer_free(holder), max_gwei))
        post(session, f"release:{request_id.hex()}", entries, f"request:{request_id.hex()}", now)
    return True


def _take(session: Session, account_id: str, payer: str, max_gwei: int, now: int) -> None:
    """The two conditional updates, always payer before account, so that racing requests cannot deadlock."""
    promised = PayerRow.spent_gwei + PayerRow.reserved_gwei + max_gwei
    from_payer = update(PayerRow).where(
        PayerRow.payer == payer,
        promised <= PayerRow.deposited_gwei - PayerRow.withdrawing_gwei,
        promised <= PayerRow.ceiling_gwei,
        PayerRow.ceiling_expiry >= now + CEILING_MARGIN_S,
    )
    taken = from_payer.values(reserved_gwei=PayerRow.reserved_gwei + max_gwei).returning(PayerRow.payer)
    if max_gwei >= _MAX_GWEI or session.execute(taken).first() is None:
        raise _no_credit(
            f"payer 0x{payer}: {_room(session, payer, now)}, the request may cost {max_gwei} gwei"
        )
    from_account = update(AccountRow).where(
        AccountRow.account_id == account_id,
        AccountRow.spent_gwei + AccountRow.reserved_gwei + max_gwei <= AccountRow.budget_gwei,
    )
    taken = from_account.values(reserved_gwei=AccountRow.reserved_gwei + max_gwei).returning(
        AccountRow.account_id
    )
    if session.execute(taken).first() is None:
        row = session.get_one(AccountRow, account_id, populate_existing=True)
        left = row.budget_gwei - row.spent_gwei - row.reserved_gwei
        raise _no_credit(f"account {account_id}: {left} gwei left, the request may cost {max_gwei} gwei")


def _give_back(session: Session, account_id: str, payer: str, max_gwei: int, fee_gwei: int | None) -> int:
    """Undo a reservation, keeping the fee if there is one; returns the payer's sequence number for it."""
    fee, numbers = (0, 0) if fee_gwei is None else (fee_gwei, 1)
    next_seq = session.execute(
        update(PayerRow)
        .where(PayerRow.payer == payer)
        .values(
            reserved_gwei=PayerRow.reserved_gwei - max_gwei,
            spent_gwei=PayerRow.spent_gwei + fee,
            next_seq=PayerRow.next_seq + numbers,
        )
        .returning(PayerRow.next_seq)
    ).scalar_one()
    session.execute(
        update(AccountRow)
        .where(AccountRow.account_id == account_id)
        .values(reserved_gwei=AccountRow.reserved_gwei - max_gwei, spent_gwei=AccountRow.spent_gwei + fee)
    )
    return next_seq - 1


def _receipt(request_id: bytes, payer: bytes, payer_seq: int, draft: ReceiptDraft, now: int) -> Receipt:
    return Receipt(
        request_id=request_id,
        payer=payer,
        payer_seq=payer_seq,
        base_id=draft.base_id,
        adapter_id=draft.adapter_id,
        prompt_tokens=draft.prompt_tokens,
        completion_tokens=draft.completion_tokens,
        fee_gwei=draft.fee_gwei,
        commitment=draft.commitment,
        hour=now // 3600,
    )


def _store(session: Session, receipt: Receipt, account_id: str, draft: ReceiptDraft, now: int) -> None:
    receipt_id = receipt.receipt_id.hex()
    session.add(
        ReceiptRow(
            receipt_id=receipt_id,
            request_id=receipt.request_id.hex(),
            account_id=account_id,
            payer=receipt.payer.hex(),
            payer_seq=receipt.payer_seq,
            adapter_id=receipt.adapter_id.hex(),
            fee_gwei=receipt.fee_gwei,
            canonical=receipt.canonical(),
            evidence_state=draft.evidence_state,
            created_at=now,
        )
    )
    if draft.transcript is not None:
        sealed = draft.transcript
        session.add(TranscriptRow(receipt_id=receipt_id, salt=sealed.salt, ciphertext=sealed.ciphertext))
    session.flush()


def _repeated(
    session: Session, account_id: str, request_id: bytes, idempotency_key: str | None, request_sha256: bytes
) -> Charge:
    """The charge that was there first, by request id or by key; the body must be the same."""
    row = session.get(ChargeRow, request_id.hex(), populate_existing=True)
    if row is None:
        by_key = select(ChargeRow).where(
            ChargeRow.account_id == account_id, ChargeRow.idempotency_key == idempotency_key
        )
        row = session.scalars(by_key.execution_options(populate_existing=True)).one()
    if row.request_sha256 != request_sha256.hex() or row.account_id != account_id:
        raise Rejected(
            "idempotency_key_reused",
            f"{idempotency_key!r} was used for body {row.request_sha256}, given {request_sha256.hex()}",
            field="idempotency-key",
            http_status=422,
        )
    return _charge(row, is_new=False)


def _first_receipt(session: Session, request_id: bytes) -> Receipt:
    query = select(ReceiptRow.canonical).where(ReceiptRow.request_id == request_id.hex())
    canonical = session.scalar(query)
    if canonical is None:
        raise _lost(session, request_id)
    return Receipt.from_canonical(canonical)


def _row(session: Session, request_id: bytes) -> ChargeRow:
    row = session.get(ChargeRow, request_id.hex(), populate_existing=True)
    if row is None:
        raise Rejected(
            "charge_not_found", f"no request {request_id.hex()}", field="request_id", http_status=404
        )
    return row


def _charge(row: ChargeRow, *, is_new: bool) -> Charge:
    return Charge(
        request_id=bytes.fromhex(row.request_id),
        account_id=row.account_id,
        payer=bytes.fromhex(row.payer),
        state=row.state,
        max_gwei=row.max_gwei,
        fee_gwei=row.fee_gwei,
        lease_until=row.lease_until,
        response_json=row.response_json,
        is_new=is_new,
    )


def _lost(session: Session, request_id: bytes) -> Rejected:
    state = _row(session, request_id).state
    return Rejected(
        "reservation_lost", f"request {request_id.hex()} is {state}", field="request_id", http_status=409
    )


def _room(session: Session, payer: str, now: int) -> str:
    row = session.get_one(PayerRow, payer, populate_existing=True)
    if row.ceiling_expiry < now + CEILING_MARGIN_S:
        return f"the ceiling ends at {row.ceiling_expiry}, too soon at {now}"
    limit = min(row.deposited_gwei - row.withdrawing_gwei, row.ceiling_gwei)
    return f"{limit - row.spent_gwei - row.reserved_gwei} gwei left of {limit}"


def _no_credit(message: str) -> Rejected:
    return Rejected("insufficient_credit", message, field="max_tokens", http_status=402)
