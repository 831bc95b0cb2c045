"""How a shard comes in: committed to before anybody can see it, then revealed, signed and stored.

The commitment fixes who was first; it binds the contributor, so nobody can reveal under another's. It gives
priority for 24 hours: later the bytes must be committed to anew, behind whoever came in between."""

from dataclasses import dataclass

from sqlalchemy import Engine, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from attribution.errors import Rejected, Unavailable
from attribution.hashing import sha256
from attribution.types import Shard, contributor_id
from cluster.database import reading, writing
from cluster.datanets import load_datanet
from cluster.shards import SHARDS, commitment_to, split_lines
from cluster.signatures import Domain, ShardReveal, verify
from cluster.storage import Storage, put_content
from cluster.tables import ContributorRow, ShardRow

REVEAL_WITHIN_S = 86_400
MAX_SHARD_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class Reveal:
    """What a contributor sends with the bytes. ``salt`` is 32 bytes that were secret until now."""

    claim: ShardReveal
    salt: bytes
    signature: bytes


def claim_of(data: bytes, datanet: str, contributor: bytes, salt: bytes) -> ShardReveal:
    """What the owner of ``data`` commits to now and signs later."""
    commitment = commitment_to(data, contributor, salt)
    return ShardReveal(datanet, contributor, commitment, sha256(data), len(split_lines(data)))


def register_contributor(session: Session, wallet: bytes, label: str) -> bytes:
    """The id of whoever holds ``wallet``; known wallets keep the label they have."""
    known = session.scalar(select(ContributorRow).where(ContributorRow.wallet == wallet.hex()))
    if known is None:
        known = ContributorRow(contributor_id=contributor_id(wallet).hex(), wallet=wallet.hex(), label=label)
        session.add(known)
        session.flush()
    return bytes.fromhex(known.contributor_id)


def commit(session: Session, datanet: str, contributor: bytes, commitment: bytes, now: int) -> int:
    """Take a place in the order of commitments. The same commitment again returns the place it has.

    Raises:
        Rejected: unknown Datanet or contributor, not 32 bytes, or taken by somebody else.
    """
    load_datanet(session, datanet)
    _wallet(session, contributor)
    if len(commitment) != 32:
        raise Rejected("bad_commitment", f"expected 32 bytes, given {len(commitment)}", field="commitment")
    row = session.scalar(select(ShardRow).where(ShardRow.commitment == commitment.hex()))
    if row is None:
        row = ShardRow(
            commitment=commitment.hex(),
            datanet=datanet,
            contributor_id=contributor.hex(),
            state="committed",
            committed_at=now,
        )
        session.add(row)
        try:
            session.flush()
        except IntegrityError as error:  # PostgreSQL: the same commitment in two transactions at once
            raise Unavailable("commitment_race", f"{commitment.hex()} is being taken right now") from error
    elif (row.datanet, row.contributor_id) != (datanet, contributor.hex()):
        raise Rejected(
            "commitment_taken",
            f"{commitment.hex()} is another's: draw a new salt",
            field="commitment",
            http_status=409,
        )
    return row.committed_seq


def reveal(engine: Engine, storage: Storage, sent: Reveal, data: bytes, domain: Domain, now: int) -> Shard:
    """Check everything, store the bytes, then say so in one row. Sending the same again changes nothing.

    Raises:
        Rejected: with a code for each thing that does not match; nothing is stored then.
    """
    claim = sent.claim
    with reading(engine) as session:
        seq, wallet = _check_row(session, claim, now)
    check_reveal(sent, data, wallet, domain)
    shard = Shard(
        claim.datanet, claim.contributor_id, claim.commitment, claim.content_sha256, claim.num_rows, seq
    )
    put_content(storage, SHARDS, data)
    with writing(engine) as session:
        _check_row(session, claim, now)  # somebody may have been quicker since
        session.execute(
            update(ShardRow)
            .where(ShardRow.committed_seq == seq, ShardRow.state == "committed")
            .values(
                state="revealed",
                shard_id=shard.shard_id.hex(),
                content_sha256=claim.content_sha256.hex(),
                num_rows=claim.num_rows,
                salt=sent.salt,
                signature=sent.signature,
                revealed_at=now,
            )
        )
    return shard


def check_reveal(sent: Reveal, data: bytes, wallet: bytes, domain: Domain) -> None:
    """Whether these bytes are what ``wallet`` committed to and signs for. Pure."""
    claim = sent.claim
    if len(data) > MAX_SHARD_BYTES:
        raise Rejected("shard_too_big", f"{len(data)} bytes, at most {MAX_SHARD_BYTES}", http_status=413)
    if not data:
        raise Rejected("empty_shard", "a shard holds at least one line", field="data")
    if len(sent.salt) != 32:
        raise Rejected("bad_salt", f"expected 32 bytes, given {len(sent.salt)}", field="salt")
    found = claim_of(data, claim.datanet, claim.contributor_id, sent.salt)
    for field in ("num_rows", "content_sha256", "commitment"):
        sent_value, found_value = getattr(claim, field), getattr(found, field)
        if sent_value != found_value:
            raise Rejected(
                "reveal_mismatch",
                f"{field}: claimed {_printed(sent_value)}, the bytes give {_printed(found_value)}",
                field=field,
            )
    verify(claim, domain, sent.signature, wallet)


def refuse_duplicate(session: Session, claim: ShardReveal) -> None:
    """``Rejected("duplicate_shard")`` if this contributor has revealed the same bytes under another
    commitment.

    Worth asking before committing: a commitment that can never be revealed helps nobody.
    """
    same_bytes = select(ShardRow.committed_seq).where(
        ShardRow.datanet == claim.datanet,
        ShardRow.contributor_id == claim.contributor_id.hex(),
        ShardRow.content_sha256 == claim.content_sha256.hex(),
        ShardRow.commitment != claim.commitment.hex(),
    )
    earlier = session.scalar(same_bytes)
    if earlier is not None:
        raise Rejected(
            "duplicate_shard",
            f"these bytes are shard {earlier} already",
            field="content_sha256",
            http_status=409,
        )


def _check_row(session: Session, claim: ShardReveal, now: int) -> tuple[int, bytes]:
    """Sequence number and wallet of a commitment that may be revealed as ``claim``."""
    row = session.scalar(select(ShardRow).where(ShardRow.commitment == claim.commitment.hex()))
    if row is None or (row.datanet, row.contributor_id) != (claim.datanet, claim.contributor_id.hex()):
        raise Rejected(
            "unknown_commitment",
            f"{claim.contributor_id.hex()} has not committed to {claim.commitment.hex()} in {claim.datanet}",
            field="commitment",
            http_status=404,
        )
    refuse_duplicate(session, claim)
    if row.state == "committed" and now > row.committed_at + REVEAL_WITHIN_S:
        raise Rejected(
            "reveal_late",
            f"committed at {row.committed_at}, revealed at {now}, allowed {REVEAL_WITHIN_S} s: commit anew",
            field="commitment",
            http_status=409,
        )
    return row.committed_seq, _wallet(session, claim.contributor_id)


def _wallet(session: Session, contributor: bytes) -> bytes:
    row = session.get(ContributorRow, contributor.hex())
    if row is None:
        raise Rejected(
            "unknown_contributor", f"{contributor.hex()} is not registered", field="contributor_id"
        )
    return bytes.fromhex(row.wallet)


def _printed(value: object) -> str:
    return value.hex() if isinstance(value, bytes) else str(value)
