"""The write-ahead journal of signed transactions: rows first, the network after.

The versions of one transaction share a nonce and a purpose and differ in fees; at most one of them is ever
mined. ``signed → sent → mined → final``; the versions that lost are ``replaced``, one that failed on chain
``reverted``. A version with an empty ``raw`` was sent by somebody else and adopted."""

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from cluster import ledger
from cluster.tables import BatchRow, PeriodRow, TransactionRow

IN_FLIGHT = ("signed", "sent")
LIVE = ("signed", "sent", "mined")
ADOPTED_NONCE = -1


@dataclass(frozen=True, slots=True)
class Version:
    """One signed form of a transaction."""

    tx_hash: bytes
    purpose: str
    nonce: int
    raw: bytes
    state: str
    block: int
    created_at: int


def live(session: Session) -> list[tuple[Version, ...]]:
    """Transactions whose fate is open, by nonce; the versions of each, oldest first."""
    rows = session.scalars(
        select(TransactionRow)
        .where(TransactionRow.state.in_(LIVE))
        .order_by(TransactionRow.nonce, TransactionRow.created_at)
    )
    groups: dict[tuple[int, str], list[Version]] = {}
    for row in rows:
        groups.setdefault((row.nonce, row.purpose), []).append(_version(row))
    return [tuple(versions) for versions in groups.values()]


def final_from(session: Session, nonce: int) -> list[Version]:
    """Final transactions with this nonce or a later one, in order."""
    is_ours = TransactionRow.nonce >= max(nonce, 0)
    rows = session.scalars(select(TransactionRow).where(TransactionRow.state == "final", is_ours))
    return sorted((_version(row) for row in rows), key=lambda version: version.nonce)


def add(session: Session, tx_hash: bytes, purpose: str, nonce: int, raw: bytes, term: int, now: int) -> None:
    """Journal a signed version; what it is for is on its way from now on."""
    session.merge(
        TransactionRow(
            tx_hash=tx_hash.hex(),
            purpose=purpose,
            nonce=nonce,
            raw=raw,
            term=term,
            state="signed",
            created_at=now,
        )
    )
    move_target(session, purpose, "sent")


def mark_sent(session: Session, tx_hash: bytes) -> None:
    session.execute(
        update(TransactionRow)
        .where(TransactionRow.tx_hash == tx_hash.hex(), TransactionRow.state == "signed")
        .values(state="sent")
    )


def mark_mined(session: Session, winner: Version, block: int, gas_used: int) -> None:
    """One version is in a block. The others wait until that block is final: a reorganisation may pick
    them."""
    session.execute(
        update(TransactionRow)
        .where(TransactionRow.tx_hash == winner.tx_hash.hex())
        .values(state="mined", block=block, gas_used=gas_used)
    )
    kind, number = target(winner.purpose)
    if kind == "batch":
        settled = {"tx_hash": winner.tx_hash.hex(), "block": block, "gas_used": gas_used}
        session.execute(update(BatchRow).where(BatchRow.batch_id == number).values(state="mined", **settled))
    elif kind == "period":
        posted = {"state": "mined", "tx_hash": winner.tx_hash.hex()}
        session.execute(update(PeriodRow).where(PeriodRow.period_id == number).values(**posted))


def mark_final(session: Session, winner: Version, versions: Sequence[Version], now: int) -> None:
    """The end: nothing takes it back. A final batch has moved its fees from escrow to distributor."""
    _set_state(session, versions, "replaced")
    _set_state(session, [winner], "final")
    move_target(session, winner.purpose, "final")
    kind, number = target(winner.purpose)
    if kind == "batch":
        fee_gwei = session.get_one(BatchRow, number).fee_gwei
        entries = (ledger.Entry(ledger.ESCROW, fee_gwei), ledger.Entry(ledger.DISTRIBUTOR, -fee_gwei))
        ledger.post(session, f"settle:{number}", entries, winner.purpose, now)


def mark_unmined(session: Session, version: Version) -> None:
    """The block that held it is gone: on its way again. What somebody else had sent is forgotten."""
    _set_state(session, [version], "sent" if version.raw else "replaced")
    move_target(session, version.purpose, "sent")


def mark_dead(session: Session, versions: Sequence[Version], reverted: Version | None) -> None:
    """Failed on chain, or its nonce went to a transaction that is not in this journal: it needs a new one."""
    _set_state(session, versions, "replaced")
    if reverted is not None:
        _set_state(session, [reverted], "reverted")


def num_reverted(session: Session, purpose: str) -> int:
    failed = select(func.count()).where(TransactionRow.purpose == purpose, TransactionRow.state == "reverted")
    return session.scalar(failed) or 0


def target(purpose: str) -> tuple[str, int]:
    """``("batch", 7)`` of ``batch:7``; a ceiling has no row to move."""
    kind, _, number = purpose.partition(":")
    return (kind, int(number)) if kind in ("batch", "period") else (kind, 0)


def move_target(session: Session, purpose: str, state: str) -> None:
    kind, number = target(purpose)
    if kind == "batch":
        session.execute(update(BatchRow).where(BatchRow.batch_id == number).values(state=state))
    elif kind == "period":
        session.execute(update(PeriodRow).where(PeriodRow.period_id == number).values(state=state))


def _version(row: TransactionRow) -> Version:
    tx_hash = bytes.fromhex(row.tx_hash)
    return Version(tx_hash, row.purpose, row.nonce, row.raw, row.state, row.block, row.created_at)


def _set_state(session: Session, versions: Sequence[Version], state: str) -> None:
    hashes = [version.tx_hash.hex() for version in versions]
    session.execute(update(TransactionRow).where(TransactionRow.tx_hash.in_(hashes)).values(state=state))
