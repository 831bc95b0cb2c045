"""Play the demo's contributors: commit to every draft in order, then reveal and sign each, as anybody would.

Everything is derived from the draft, salts included, so doing it again changes nothing. Real contributors
draw their salts and keep their keys; they use the gateway's doors to the same functions."""

from collections.abc import Sequence

from sqlalchemy import Engine

from attribution.hashing import keccak256, sha256
from attribution.types import Shard
from cluster.contributions import Reveal, claim_of, commit, register_contributor, reveal
from cluster.database import writing
from cluster.datanets import Datanet, open_datanet
from cluster.signatures import Domain, datanets_domain, digest, sign
from cluster.storage import Storage
from pipelines.sources.drafts import ShardDraft


def contribute(
    engine: Engine,
    storage: Storage,
    datanet: Datanet,
    owner_id: bytes,
    drafts: Sequence[ShardDraft],
    chain_id: int,
    now: int,
) -> tuple[Shard, ...]:
    """Open ``datanet`` if need be. The order of ``drafts`` is the order of commitments."""
    domain = datanets_domain(chain_id)
    sent = [_reveal(draft, domain) for draft in drafts]
    with writing(engine) as session:
        open_datanet(session, datanet, owner_id)
        for draft, one in zip(drafts, sent, strict=True):
            register_contributor(session, draft.wallet, draft.contributor)
            commit(session, datanet.name, draft.contributor_id, one.claim.commitment, now)
    return tuple(
        reveal(engine, storage, one, draft.data, domain, now) for draft, one in zip(drafts, sent, strict=True)
    )


def _reveal(draft: ShardDraft, domain: Domain) -> Reveal:
    salt = keccak256(draft.demo_key + sha256(draft.data))
    claim = claim_of(draft.data, draft.datanet, draft.contributor_id, salt)
    return Reveal(claim, salt, sign(draft.demo_key, digest(claim, domain)))
