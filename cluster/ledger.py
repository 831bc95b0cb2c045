"""Double entry: every posting's entries sum to zero, hence so do all; nothing is ever changed or deleted.

A positive balance is money that stands to an account's name. The accounts: ``payer:<address>`` (free),
``payer:<address>:reserved``, ``fees`` (of receipts, not yet paid out by a period), ``earned:<contributor>``;
and, negative, where the money lies: ``escrow`` and ``distributor``, each minus what that contract holds of
it as of the last final batch."""

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import func, insert, select
from sqlalchemy.orm import Session

from attribution.errors import Corrupted
from cluster.database import insert_new
from cluster.tables import LedgerEntryRow, table_of

ESCROW = "escrow"
DISTRIBUTOR = "distributor"
FEES = "fees"


@dataclass(frozen=True, slots=True)
class Entry:
    """Gwei to the name of one account; negative takes away."""

    ledger_account: str
    amount_gwei: int


def payer_free(payer: bytes) -> str:
    return f"payer:{payer.hex()}"


def payer_reserved(payer: bytes) -> str:
    return f"payer:{payer.hex()}:reserved"


def post(session: Session, posting: str, entries: Sequence[Entry], ref: str, now: int) -> None:
    """Write one posting; the same posting again changes nothing. Zero amounts are left out.

    Raises:
        Corrupted: ``posting`` exists with other entries.
    """
    rows = _rows(posting, entries, ref, now)
    if rows:
        insert_new(session, LedgerEntryRow, *rows)
    amounts = {row["ledger_account"]: row["amount_gwei"] for row in rows}
    query = select(LedgerEntryRow.ledger_account, LedgerEntryRow.amount_gwei)
    found = {
        entry.ledger_account: entry.amount_gwei
        for entry in session.execute(query.where(LedgerEntryRow.posting == posting))
    }
    if found != amounts:
        raise Corrupted("posting_differs", f"{posting} holds {found}, given {amounts}", field="posting")


def post_first(session: Session, posting: str, entries: Sequence[Entry], ref: str, now: int) -> None:
    """As ``post``, for callers whose own state says that this is the first time; twice is a bug."""
    rows = _rows(posting, entries, ref, now)
    if rows:
        session.connection().execute(_INSERT, rows)


def balance(session: Session, ledger_account: str) -> int:
    """Gwei to the name of ``ledger_account``; one that nothing was posted to has none."""
    total = select(func.sum(LedgerEntryRow.amount_gwei)).where(
        LedgerEntryRow.ledger_account == ledger_account
    )
    return int(session.scalar(total) or 0)


def imbalance(session: Session) -> dict[str, int]:
    """Postings that do not sum to zero: always empty, unless somebody wrote past ``post``."""
    total = func.sum(LedgerEntryRow.amount_gwei)
    rows = session.execute(
        select(LedgerEntryRow.posting, total).group_by(LedgerEntryRow.posting).having(total != 0)
    )
    return {posting: int(amount) for posting, amount in rows}


_INSERT = insert(table_of(LedgerEntryRow))  # built once: building costs more than running


def _rows(posting: str, entries: Sequence[Entry], ref: str, now: int) -> list[dict[str, object]]:
    assert sum(entry.amount_gwei for entry in entries) == 0, (posting, entries)
    moved = [entry for entry in entries if entry.amount_gwei]
    assert len({entry.ledger_account for entry in moved}) == len(moved), f"{posting}: an account twice"
    same = {"posting": posting, "ref": ref, "created_at": now}
    return [{"ledger_account": e.ledger_account, "amount_gwei": e.amount_gwei, **same} for e in moved]
