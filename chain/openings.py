"""From rows to what opens the commitments, for those to whom the records are open."""

from sqlalchemy import select
from sqlalchemy.orm import Session

from chain.provenance import ShardOpening
from cluster.signatures import ShardReveal
from cluster.tables import ContributorRow, ShardRow


def openings(session: Session) -> tuple[ShardOpening, ...]:
    """Of all revealed shards, in the order of committing."""
    rows = session.execute(
        select(ShardRow, ContributorRow.wallet)
        .join(ContributorRow, ContributorRow.contributor_id == ShardRow.contributor_id)
        .where(ShardRow.content_sha256.is_not(None))
        .order_by(ShardRow.committed_seq)
    )
    return tuple(_opening(row, wallet) for row, wallet in rows)


def _opening(row: ShardRow, wallet: str) -> ShardOpening:
    assert row.content_sha256 is not None and row.num_rows is not None
    reveal = ShardReveal(
        row.datanet,
        bytes.fromhex(row.contributor_id),
        bytes.fromhex(row.commitment),
        bytes.fromhex(row.content_sha256),
        row.num_rows,
    )
    return ShardOpening(row.committed_seq, reveal, row.salt, row.signature, bytes.fromhex(wallet))
