"""Charging as a state machine: ``reserved(max) → captured(receipt) | released``, one row per request id.

The reservation commits before the first token, the capture before the last event. Every step is a conditional
update, so it does not matter how many gateways race: ``spent + reserved`` never passes what the payer has
deposited and signed for, nor the account's budget. All functions run inside the caller's transaction and
leave no trace when they refuse, so that a gateway may commit many requests at once."""

from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Row, and_, bindparam, insert, or_, select, update
from sqlalchemy.orm import Session

from attribution.errors import Rejected
from attribution.types import Blend, Receipt
from cluster.balances import MAX_GWEI, give_back, take
from cluster.blends import keep_blend
from cluster.database import insert_new
from cluster.ledger import FEES, Entry, payer_free, payer_reserved, post_first
from cluster.tables import AccountRow, ChargeRow, ReceiptRow, TranscriptRow, table_of

_NEVER = 2**62  # later than any lease ends

# Statements are built once, because building costs several times what running does.
_ACCOUNTS, _CHARGES = table_of(AccountRow), table_of(ChargeRow)
_HELD = and_(_CHARGES.c.request_id == bindparam("the_request"), _CHARGES.c.state == "reserved")
_HOLDER = (_CHARGES.c.account_id, _CHARGES.c.payer, _CHARGES.c.max_gwei)

_PAYER_OF = select(_ACCOUNTS.c.payer).where(_ACCOUNTS.c.account_id == bindparam("the_account"))
_CAPTURE = (
    update(_CHARGES)
    .where(_HELD)
    .values(state="captured", fee_gwei=bindparam("the_fee"), response_json=bindparam("the_response"))
    .returning(*_HOLDER)
)
_RELEASE = (
    update(_CHARGES)
    .where(_HELD, _CHARGES.c.lease_until < bindparam("lease_before"))
    .values(state="released", idempotency_key=None)
    .returning(*_HOLDER)
)
_EARLIER = (
    select(_CHARGES)
    .where(
        or_(
            _CHARGES.c.request_id == bindparam("the_request"),
            and_(
                _CHARGES.c.account_id == bindparam("the_account"),
                _CHARGES.c.idempotency_key == bindparam("the_key"),
            ),
        )
    )
    .order_by(_CHARGES.c.request_id != bindparam("the_request"))
)
_INSERT_RECEIPT, _INSERT_TRANSCRIPT = insert(table_of(ReceiptRow)), insert(table_of(TranscriptRow))


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
    adapter_id: bytes  # zero for the base model, a blend's id for a blend
    prompt_tokens: int
    completion_tokens: int
    fee_gwei: int
    commitment: bytes
    response_json: str
    transcript: SealedTranscript | None  # None with ``store: false``
    evidence_state: str  # pending, or none
    blend: Blend | None = None  # that ``adapter_id`` stands for


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
    connection = session.connection()
    payer = connection.scalar(_PAYER_OF, {"the_account": account_id})
    if payer is None:
        raise Rejected("account_not_found", f"no account {account_id!r}", field="account", http_status=404)
    with connection.begin_nested():
        values = {
            "request_id": request_id.hex(),
            "account_id": account_id,
            "payer": payer,
            "idempotency_key": idempotency_key,
            "request_sha256": request_sha256.hex(),
            "state": "reserved",
            "max_gwei": min(max_gwei, MAX_GWEI),
            "lease_until": now + lease_s,
            "created_at": now,
        }
        if not insert_new(session, ChargeRow, values):
            return _repeated(session, account_id, request_id, idempotency_key, request_sha256)
        take(connection, account_id, payer, max_gwei, now)
        entries = (
            Entry(payer_free(bytes.fromhex(payer)), -max_gwei),
            Entry(payer_reserved(bytes.fromhex(payer)), max_gwei),
        )
        post_first(session, f"reserve:{request_id.hex()}", entries, f"request:{request_id.hex()}", now)
    owner = bytes.fromhex(payer)
    return Charge(request_id, account_id, owner, "reserved", max_gwei, 0, now + lease_s, "", is_new=True)


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
    connection = session.connection()
    outcome = {"the_fee": draft.fee_gwei, "the_response": draft.response_json}
    with connection.begin_nested():
        charge = connection.execute(_CAPTURE, {"the_request": request_id.hex(), **outcome}).first()
        if charge is None:
            return _first_receipt(session, request_id)
        account_id, payer, max_gwei = charge
        assert 0 <= draft.fee_gwei <= max_gwei, f"{request_id.hex()}: fee {draft.fee_gwei} of {max_gwei}"
        payer_seq = give_back(connection, account_id, payer, max_gwei, draft.fee_gwei)
        receipt = _receipt(request_id, bytes.fromhex(payer), payer_seq, draft, now)
        _store(connection, receipt, account_id, draft, now)
        if draft.blend is not None:
            keep_blend(session, draft.blend)
        entries = (
            Entry(payer_reserved(receipt.payer), -max_gwei),
            Entry(payer_free(receipt.payer), max_gwei - draft.fee_gwei),
            Entry(FEES, draft.fee_gwei),
        )
        post_first(
            session, f"capture:{request_id.hex()}", entries, f"receipt:{receipt.receipt_id.hex()}", now
        )
    return receipt


def release(session: Session, request_id: bytes, now: int) -> bool:
    """Give a reservation back; False if it was captured or released before.

    Its Idempotency-Key is free again: a request that came to nothing has no result to repeat."""
    return _release(session, request_id, _NEVER, now)


def release_orphans(session: Session, now: int, limit: int = 1000) -> int:
    """Give back the reservations whose lease has ended: their gateway is dead. Returns how many."""
    ended = select(ChargeRow.request_id).where(ChargeRow.state == "reserved", ChargeRow.lease_until < now)
    found = session.scalars(ended.order_by(ChargeRow.lease_until).limit(limit)).all()
    return sum(_release(session, bytes.fromhex(request_id), now, now) for request_id in found)


def charge_of(session: Session, request_id: bytes) -> Charge:
    return _charge(_row(session, request_id), is_new=False)


def _release(session: Session, request_id: bytes, lease_before: int, now: int) -> bool:
    connection = session.connection()
    with connection.begin_nested():
        which = {"the_request": request_id.hex(), "lease_before": lease_before}
        charge = connection.execute(_RELEASE, which).first()
        if charge is None:
            return False
        account_id, payer, max_gwei = charge
        give_back(connection, account_id, payer, max_gwei, None)
        holder = bytes.fromhex(payer)
        entries = (Entry(payer_reserved(holder), -max_gwei), Entry(payer_free(holder), max_gwei))
        post_first(session, f"release:{request_id.hex()}", entries, f"request:{request_id.hex()}", now)
    return True


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


def _store(connection: Connection, receipt: Receipt, account_id: str, draft: ReceiptDraft, now: int) -> None:
    receipt_id = receipt.receipt_id.hex()
    row = {
        "receipt_id": receipt_id,
        "request_id": receipt.request_id.hex(),
        "account_id": account_id,
        "payer": receipt.payer.hex(),
        "payer_seq": receipt.payer_seq,
        "adapter_id": receipt.adapter_id.hex(),
        "fee_gwei": receipt.fee_gwei,
        "canonical": receipt.canonical(),
        "evidence_state": draft.evidence_state,
        "created_at": now,
    }
    connection.execute(_INSERT_RECEIPT, row)
    if draft.transcript is not None:
        texts = {"salt": draft.transcript.salt, "ciphertext": draft.transcript.ciphertext}
        connection.execute(_INSERT_TRANSCRIPT, {"receipt_id": receipt_id, **texts})


def _repeated(
    session: Session, account_id: str, request_id: bytes, idempotency_key: str | None, request_sha256: bytes
) -> Charge:
    """The charge that was there first, by request id or by key; the body must be the same."""
    asked = {"the_request": request_id.hex(), "the_account": account_id, "the_key": idempotency_key}
    row = session.execute(_EARLIER, asked).first()
    assert row is not None
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


def _charge(row: ChargeRow | Row[Any], *, is_new: bool) -> Charge:
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
