"""Who may spend whose money: payers (escrow accounts), accounts (budgets within them), API keys (hashed).

What a payer has on chain is mirrored here by the settler, once final. A trial account is an account of the
platform's own payer, the sponsor, whose deposit and ceiling bound all trials together."""

import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Row, bindparam, select, update
from sqlalchemy.orm import Session

from attribution.errors import Rejected
from cluster.database import insert_new
from cluster.ledger import ESCROW, Entry, payer_free, post
from cluster.tables import AccountRow, ApiKeyRow, DepositRow, PayerRow, table_of

_KEY = re.compile(r"ol_([0-9a-f]{16})_([A-Za-z0-9_-]{43})")
_KEYS, _ACCOUNTS = table_of(ApiKeyRow), table_of(AccountRow)
_KEY_AND_ACCOUNT = (  # built once: building costs more than running
    select(_KEYS.c.secret_sha256, _KEYS.c.revoked_at, _ACCOUNTS)
    .join(_ACCOUNTS, _ACCOUNTS.c.account_id == _KEYS.c.account_id)
    .where(_KEYS.c.key_id == bindparam("the_key"))
)


@dataclass(frozen=True, slots=True)
class Account:
    """Who a request speaks for."""

    account_id: str
    payer: bytes
    label: str
    budget_gwei: int
    spent_gwei: int
    reserved_gwei: int


@dataclass(frozen=True, slots=True)
class Payer:
    """An escrow account as mirrored from the chain, and what was promised of it since."""

    payer: bytes
    deposited_gwei: int
    withdrawing_gwei: int
    ceiling_gwei: int
    ceiling_expiry: int
    spent_gwei: int
    reserved_gwei: int


@dataclass(frozen=True, slots=True)
class Trial:
    """A new trial account and its key, which is shown this once."""

    account_id: str
    key: str


def open_account(session: Session, payer: bytes, label: str, budget_gwei: int, now: int) -> str:
    """A new account that may spend at most ``budget_gwei`` of ``payer``'s money."""
    assert budget_gwei >= 0
    account_id = f"acc_{secrets.token_hex(8)}"
    insert_new(session, PayerRow, {"payer": payer.hex()})
    session.add(
        AccountRow(
            account_id=account_id, payer=payer.hex(), label=label, budget_gwei=budget_gwei, created_at=now
        )
    )
    session.flush()
    return account_id


def issue_key(session: Session, account_id: str, now: int) -> str:
    """A new API key, ``ol_<id>_<secret>``. It cannot be shown again: only its hash is kept."""
    key_id, secret = secrets.token_hex(8), secrets.token_urlsafe(32)
    hashed = hashlib.sha256(secret.encode()).hexdigest()
    session.add(ApiKeyRow(key_id=key_id, account_id=account_id, secret_sha256=hashed, created_at=now))
    session.flush()
    return f"ol_{key_id}_{secret}"


def revoke_key(session: Session, key_id: str, now: int) -> None:
    revoked = update(ApiKeyRow).where(ApiKeyRow.key_id == key_id, ApiKeyRow.revoked_at.is_(None))
    session.execute(revoked.values(revoked_at=now))


def sign_up_trial(session: Session, sponsor: bytes, label: str, credit_gwei: int, now: int) -> Trial:
    """An account with ``credit_gwei`` of the sponsor's money and its first key."""
    account_id = open_account(session, sponsor, label, credit_gwei, now)
    return Trial(account_id, issue_key(session, account_id, now))


def authenticate(session: Session, key: str) -> Account:
    """Whose key this is.

    Raises:
        Rejected: 401 ``invalid_api_key``, the same words for an unknown, a wrong and a revoked key.
    """
    refusal = Rejected("invalid_api_key", "no such API key", field="authorization", http_status=401)
    match = _KEY.fullmatch(key)
    if match is None:
        raise refusal
    key_id, secret = match.groups()
    row = session.execute(_KEY_AND_ACCOUNT, {"the_key": key_id}).first()
    stored = row.secret_sha256 if row else "0" * 64
    if not hmac.compare_digest(stored, hashlib.sha256(secret.encode()).hexdigest()):
        raise refusal
    if row is None or row.revoked_at is not None:
        raise refusal
    return _account(row)


def account_of(session: Session, account_id: str) -> Account:
    row = session.get(AccountRow, account_id, populate_existing=True)
    if row is None:
        raise Rejected("account_not_found", f"no account {account_id!r}", field="account", http_status=404)
    return _account(row)


def _account(row: AccountRow | Row[Any]) -> Account:
    return Account(
        row.account_id,
        bytes.fromhex(row.payer),
        row.label,
        row.budget_gwei,
        row.spent_gwei,
        row.reserved_gwei,
    )


def payer_of(session: Session, payer: bytes) -> Payer:
    row = session.get(PayerRow, payer.hex(), populate_existing=True)
    if row is None:
        raise Rejected("payer_not_found", f"no payer 0x{payer.hex()}", field="payer", http_status=404)
    return Payer(
        payer,
        row.deposited_gwei,
        row.withdrawing_gwei,
        row.ceiling_gwei,
        row.ceiling_expiry,
        row.spent_gwei,
        row.reserved_gwei,
    )


def record_deposit(
    session: Session, payer: bytes, amount_gwei: int, tx_hash: bytes, log_index: int, block: int, now: int
) -> bool:
    """Count a final deposit (or, negative, a final withdrawal) once; False if it was counted before."""
    event = {"tx_hash": tx_hash.hex(), "log_index": log_index}
    seen = {"payer": payer.hex(), "amount_gwei": amount_gwei, "block": block}
    if not insert_new(session, DepositRow, {**event, **seen}):
        return False
    insert_new(session, PayerRow, {"payer": payer.hex()})
    deposited = PayerRow.deposited_gwei + amount_gwei
    session.execute(update(PayerRow).where(PayerRow.payer == payer.hex()).values(deposited_gwei=deposited))
    entries = (Entry(ESCROW, -amount_gwei), Entry(payer_free(payer), amount_gwei))
    post(session, f"deposit:{tx_hash.hex()}:{log_index}", entries, f"block:{block}", now)
    return True


def record_withdrawing(session: Session, payer: bytes, amount_gwei: int) -> None:
    """What the payer has asked back and not yet drawn, as the chain now says: it can no longer be spent."""
    insert_new(session, PayerRow, {"payer": payer.hex()})
    session.execute(
        update(PayerRow).where(PayerRow.payer == payer.hex()).values(withdrawing_gwei=amount_gwei)
    )


def record_ceiling(session: Session, payer: bytes, ceiling_gwei: int, expiry: int, signature: bytes) -> None:
    """Keep a spend ceiling whose signature the caller has verified. The contract only takes a ceiling that
    lowers neither maximum nor expiry, so neither does this.

    Raises:
        Rejected: 409 ``ceiling_lowered``.
    """
    insert_new(session, PayerRow, {"payer": payer.hex()})
    raised = update(PayerRow).where(
        PayerRow.payer == payer.hex(),
        PayerRow.ceiling_gwei <= ceiling_gwei,
        PayerRow.ceiling_expiry <= expiry,
    )
    values = {"ceiling_gwei": ceiling_gwei, "ceiling_expiry": expiry, "ceiling_signature": signature}
    if session.execute(raised.values(values).returning(PayerRow.payer)).first() is None:
        kept = payer_of(session, payer)
        raise Rejected(
            "ceiling_lowered",
            f"{ceiling_gwei} gwei until {expiry} lowers {kept.ceiling_gwei} gwei until {kept.ceiling_expiry}",
            field="ceiling",
            http_status=409,
        )


def accounts_of(session: Session, payer: bytes) -> tuple[Account, ...]:
    ids = session.scalars(
        select(AccountRow.account_id).where(AccountRow.payer == payer.hex()).order_by(AccountRow.created_at)
    )
    return tuple(account_of(session, account_id) for account_id in ids.all())
