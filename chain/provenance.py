"""The provenance audit: from record bytes to what was paid for them, by hashes alone.

Record bytes → commitment (salted, signed, in the order of committing) → manifest → trajectory → adapter file
→ the receipts and credits that the chain bound. Needs what a Datanet shows to those it is open to:
``shards/``, ``manifests/``, ``trajectories/`` and ``adapters/`` of a storage, and the openings of the
commitments. As light as the arithmetic audit, which hands over what the chain says."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from attribution.errors import Corrupted, Refusal, Rejected
from attribution.hashing import sha256
from attribution.payout import AdapterClose
from attribution.types import ZERO_ID, Manifest, Record, contributor_id
from chain.findings import Finding, Report
from cluster.shards import SHARDS, commitment_to, split_lines
from cluster.signatures import ShardReveal, datanets_domain, verify
from cluster.storage import Storage, get_content


@dataclass(frozen=True, slots=True)
class ShardOpening:
    """What opens one commitment. ``wallet`` is the contributor's first, which fixes its id."""

    committed_seq: int
    reveal: ShardReveal
    salt: bytes
    signature: bytes
    wallet: bytes


@dataclass(frozen=True, slots=True)
class Provenance:
    """What the chain bound: adapters that receipts name, and the credits that periods paid by."""

    chain_id: int
    adapter_ids: frozenset[bytes]
    closes: tuple[tuple[int, AdapterClose], ...]  # with their period's id


def audit_provenance(storage: Storage, openings: Iterable[ShardOpening], bound: Provenance) -> Report:
    """Follow every paid adapter back to bytes that somebody committed to."""
    audit = _Audit(storage)
    records = audit.opened_records(openings, bound.chain_id)
    for adapter_id in sorted(bound.adapter_ids - {ZERO_ID}):
        manifests = audit.manifests_of(adapter_id)
        if manifests is not None:
            audit.check_manifests(adapter_id, manifests, records)
            audit.check_credits(adapter_id, manifests, bound.closes)
    return Report("provenance", audit.checked, (), (), tuple(audit.findings))


def read_openings(path: Path) -> tuple[ShardOpening, ...]:
    """A JSON object a line, as ``write_openings`` writes them. ``Rejected`` names the line that is none."""
    return tuple(_opening(number, line) for number, line in enumerate(path.read_bytes().splitlines(), 1))


def write_openings(path: Path, openings: Sequence[ShardOpening]) -> None:
    lines = []
    for opening in openings:
        reveal = opening.reveal
        fields = {
            "committed_seq": opening.committed_seq,
            "datanet": reveal.datanet,
            "contributor_id": reveal.contributor_id.hex(),
            "commitment": reveal.commitment.hex(),
            "content_sha256": reveal.content_sha256.hex(),
            "num_rows": reveal.num_rows,
            "salt": opening.salt.hex(),
            "signature": opening.signature.hex(),
            "wallet": opening.wallet.hex(),
        }
        lines.append(json.dumps(fields, sort_keys=True))
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _opening(number: int, line: bytes) -> ShardOpening:
    try:
        found = json.loads(line)
        names = ("contributor_id", "commitment", "content_sha256", "salt", "signature", "wallet")
        who, commitment, content, salt, signature, wallet = (bytes.fromhex(found[name]) for name in names)
        reveal = ShardReveal(str(found["datanet"]), who, commitment, content, int(found["num_rows"]))
        return ShardOpening(int(found["committed_seq"]), reveal, salt, signature, wallet)
    except (ValueError, KeyError, TypeError) as error:
        message = f"line {number} opens no commitment: {error!r}"
        raise Rejected("bad_opening", message, field="openings") from error


class _Audit:
    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self.findings: list[Finding] = []
        names = ("commitments", "records", "adapters", "manifests", "trained records", "credits")
        self.checked: dict[str, int] = dict.fromkeys(names, 0)

    def _find(self, code: str, subject: str, expected: str, found: str) -> None:
        self.findings.append(Finding(code, subject, expected, found))

    def opened_records(self, openings: Iterable[ShardOpening], chain_id: int) -> Mapping[bytes, int]:
        """Ids of all records in shards whose commitments open, with the earliest place in the order."""
        records: dict[bytes, int] = {}
        for opening in sorted(openings, key=lambda opening: opening.committed_seq):
            self.checked["commitments"] += 1
            for record_id in self._open(opening, chain_id):
                self.checked["records"] += 1
                records.setdefault(record_id, opening.committed_seq)
        return records

    def _open(self, opening: ShardOpening, chain_id: int) -> Iterator[bytes]:
        reveal = opening.reveal
        subject = f"shard {reveal.content_sha256.hex()}"
        try:
            data = get_content(self._storage, SHARDS, reveal.content_sha256.hex())
            verify(reveal, datanets_domain(chain_id), opening.signature, opening.wallet)
        except Refusal as refusal:
            return self._find(
                refusal.code, subject, "the bytes that were revealed and signed", refusal.message
            )
        commitment = commitment_to(data, reveal.contributor_id, opening.salt)
        if commitment != reveal.commitment:
            return self._find("commitment", subject, reveal.commitment.hex(), commitment.hex())
        if contributor_id(opening.wallet) != reveal.contributor_id:
            found = contributor_id(opening.wallet).hex()
            return self._find("contributor", subject, reveal.contributor_id.hex(), found)
        for line in split_lines(data):
            record = _record(reveal, line)
            if record is not None:
                yield record.record_id

    def manifests_of(self, adapter_id: bytes) -> list[Manifest] | None:
        """The adapter's bytes are its name; the trajectory that ended in it names its manifests."""
        self.checked["adapters"] += 1
        subject = f"adapter {adapter_id.hex()}"
        try:
            found = sha256(self._storage.get(f"adapters/{adapter_id.hex()}.safetensors"))
            if found != adapter_id:
                self._find("adapter_file", subject, adapter_id.hex(), found.hex())
            trajectory = self._trajectory(adapter_id)
            named = json.loads(self._storage.get(f"{trajectory}/spec.json"))["manifest_ids"]
            order = json.loads(self._storage.get(f"{trajectory}/order.json"))
            trained = {str(span[0]) for row in order["rows"] for span in row}
            manifests = [self._manifest(manifest_id) for manifest_id in named]
        except (Refusal, ValueError, KeyError) as error:
            self._find("adapter_origin", subject, "file, trajectory and manifests", str(error))
            return None
        self._check_order(subject, trained, manifests)
        return manifests

    def _trajectory(self, adapter_id: bytes) -> str:
        for key in self._storage.list("trajectories/"):
            if key.endswith("/done.json"):
                done = json.loads(self._storage.get(key))
                if done["adapter_id"] == adapter_id.hex():
                    return key.removesuffix("/done.json")
        raise Rejected("not_found", "no trajectory ends in this adapter", http_status=404)

    def _manifest(self, manifest_id: str) -> Manifest:
        self.checked["manifests"] += 1
        return Manifest.from_canonical(get_content(self._storage, "manifests", manifest_id))

    def _check_order(self, subject: str, trained: set[str], manifests: list[Manifest]) -> None:
        """What was trained on are first records of groups, and never a control."""
        sealed = {entry.record.record_id.hex() for manifest in manifests for entry in manifest.entries}
        self.checked["trained records"] += len(trained)
        for record_id in sorted(trained - sealed):
            self._find(
                "trained_unsealed", f"{subject}, record {record_id}", "a record of its manifests", "none"
            )
        for record_id in sorted(sealed - trained):
            self._find("sealed_untrained", f"{subject}, record {record_id}", "a place in the order", "none")

    def check_manifests(
        self, adapter_id: bytes, manifests: Sequence[Manifest], records: Mapping[bytes, int]
    ) -> None:
        """Every record stands in a shard that was committed to, and nobody in its group came earlier."""
        for manifest in manifests:
            subject = f"adapter {adapter_id.hex()}, manifest {manifest.manifest_id.hex()}"
            for control in manifest.controls:
                self._committed(f"{subject}, control {control.record_id.hex()}", control.record_id, records)
            for entry in manifest.entries:
                of_group = f"{subject}, group {entry.group.group_id.hex()}"
                if not self._committed(of_group, entry.record.record_id, records):
                    continue
                if entry.record.contributor_id != entry.group.contributor_id:
                    ids = entry.record.contributor_id.hex(), entry.group.contributor_id.hex()
                    self._find("group_contributor", of_group, *ids)
                first = records[entry.record.record_id]
                earlier = [r for r in entry.group.members if records.get(r, first) < first]
                for record_id in earlier:
                    self._find("not_the_first", of_group, record_id.hex(), entry.record.record_id.hex())

    def _committed(self, subject: str, record_id: bytes, records: Mapping[bytes, int]) -> bool:
        if record_id not in records:
            self._find("uncommitted", subject, "a record of an opened commitment", "none")
        return record_id in records

    def check_credits(
        self,
        adapter_id: bytes,
        manifests: Sequence[Manifest],
        closes: Iterable[tuple[int, AdapterClose]],
    ) -> None:
        """Credits are of sealed groups, and to their contributors."""
        owners = {e.group.group_id: e.group.contributor_id for m in manifests for e in m.entries}
        for period_id, close in closes:
            if close.adapter_id != adapter_id:
                continue
            for credit in close.credits:
                self.checked["credits"] += 1
                owner = owners.get(credit.group_id)
                if owner != credit.contributor_id:
                    subject = f"period {period_id}, adapter {adapter_id.hex()}, group {credit.group_id.hex()}"
                    expected = owner.hex() if owner else "a sealed group"
                    self._find("credit_owner", subject, expected, credit.contributor_id.hex())


def _record(reveal: ShardReveal, line: bytes) -> Record | None:
    """The record that a row makes if it is accepted; a row that makes none was refused and is in no
    manifest."""
    try:
        fields = {key: value.strip() for key, value in json.loads(line).items()}
        fields["text"] = fields.get("text") or fields["subject"]
        return Record(datanet=reveal.datanet, contributor_id=reveal.contributor_id, **fields)
    except (ValueError, KeyError, TypeError, AttributeError, Corrupted):
        return None
