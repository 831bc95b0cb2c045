"""Fencing: of several holders that each believe to be the one, only the last to acquire can write.

Acquiring raises the *term*. Every write of a holder checks its term in the same transaction; a holder that
lost the lease while it slept is refused there, whatever its clock says."""

from dataclasses import dataclass

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from attribution.errors import Rejected, Unavailable
from cluster.database import insert_new
from cluster.tables import LeaseRow


@dataclass(frozen=True, slots=True)
class Lease:
    """``holder`` may write for ``name`` under ``term`` until ``expires_at`` (UTC seconds)."""

    name: str
    holder: str
    term: int
    expires_at: int


def acquire(session: Session, name: str, holder: str, lease_s: int, now: int) -> Lease:
    """Take a lease that is free, has ended, or is this very holder's; the term grows each time.

    Raises:
        Unavailable: ``lease_held`` by somebody else; retry when it ends.
    """
    insert_new(session, LeaseRow, {"name": name, "holder": "", "term": 0, "expires_at": 0})
    free = (LeaseRow.expires_at <= now) | (LeaseRow.holder == holder)
    taken = (
        update(LeaseRow)
        .where(LeaseRow.name == name, free)
        .values(holder=holder, term=LeaseRow.term + 1, expires_at=now + lease_s)
        .returning(LeaseRow.term)
    )
    term = session.scalar(taken)
    if term is None:
        other = lease_of(session, name)
        wait = float(max(1, other.expires_at - now))
        raise Unavailable(
            "lease_held", f"{name}: held by {other.holder} (term {other.term})", retry_after_s=wait
        )
    return Lease(name, holder, term, now + lease_s)


def renew(session: Session, lease: Lease, lease_s: int, now: int) -> Lease:
    """Hold on to a lease, even one that has ended, as long as nobody else took it.

    Raises:
        Rejected: 409 ``fenced``: somebody else did.
    """
    own = update(LeaseRow).where(LeaseRow.name == lease.name, LeaseRow.term == lease.term)
    renewed = own.values(expires_at=now + lease_s).returning(LeaseRow.term)
    if session.scalar(renewed) is None:
        raise _fenced(session, lease.name, lease.term)
    return Lease(lease.name, lease.holder, lease.term, now + lease_s)


def check(session: Session, name: str, term: int) -> None:
    """Refuse this transaction unless ``term`` is current; nobody can take over before it has ended.

    Raises:
        Rejected: 409 ``fenced``.
    """
    row = select(LeaseRow.term).where(LeaseRow.name == name).with_for_update(read=True)
    if session.scalar(row) != term:
        raise _fenced(session, name, term)


def release(session: Session, lease: Lease) -> None:
    """Let go, so that the next holder need not wait for the end; a lease lost before is left alone."""
    own = update(LeaseRow).where(LeaseRow.name == lease.name, LeaseRow.term == lease.term)
    session.execute(own.values(expires_at=0))


def lease_of(session: Session, name: str) -> Lease:
    """The lease as it stands; term 0 if nobody ever held it."""
    row = session.get(LeaseRow, name, populate_existing=True)
    return Lease(name, row.holder, row.term, row.expires_at) if row else Lease(name, "", 0, 0)


def _fenced(session: Session, name: str, term: int) -> Rejected:
    current = lease_of(session, name)
    message = f"{name}: term {term} is over, term {current.term} belongs to {current.holder}"
    return Rejected("fenced", message, field="term", http_status=409)
