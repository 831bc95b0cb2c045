"""What a source gives: shards that nobody has committed to yet, each with a demo contributor's key."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from attribution.groups import Committed, group
from attribution.hashing import keccak256, sha256
from attribution.types import Manifest, Shard, contributor_id
from cluster.datanets import Datanet
from cluster.wallets import of_key
from pipelines.manifests import SealPolicy, seal
from pipelines.validation import Accepted, validate_shard


@dataclass(frozen=True, slots=True)
class ShardDraft:
    datanet: str
    contributor: str
    data: bytes  # JSON Lines

    @property
    def demo_key(self) -> bytes:
        """Private key of a demo contributor. ANYBODY can compute it: never send it anything of worth."""
        return keccak256(f"openledger demo key, worth nothing: {self.datanet}/{self.contributor}".encode())

    @property
    def wallet(self) -> bytes:
        return of_key(self.contributor, self.demo_key).address

    @property
    def contributor_id(self) -> bytes:
        return contributor_id(self.wallet)


def jsonl(rows: Iterable[Mapping[str, str]]) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def manifest_of(datanet: Datanet, drafts: Sequence[ShardDraft], policy: SealPolicy) -> Manifest:
    """What ingesting these drafts, committed in this order, would seal: no database, no Ray."""
    accepted = []
    for seq, draft in enumerate(drafts, start=1):
        shard = Shard(datanet.name, draft.contributor_id, bytes(32), sha256(draft.data), 0, seq)
        for verdict in validate_shard(shard, draft.data, datanet.rules):
            if isinstance(verdict, Accepted):
                accepted.append(Committed(verdict.record, verdict.record.record_id, seq, verdict.row))
    return seal(datanet, group(accepted), {one.record_id: one.record for one in accepted}, policy)
