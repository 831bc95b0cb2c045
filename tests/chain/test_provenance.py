"""From a credit back to bytes that somebody committed to; each link that is cut is named."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from sqlalchemy import Engine

from attribution.errors import Rejected
from attribution.hashing import sha256
from attribution.payout import AdapterClose
from attribution.types import ZERO_ID, Credit, Group, Manifest, ManifestEntry, Record, contributor_id
from chain.findings import Report
from chain.openings import openings
from chain.provenance import Provenance, ShardOpening, audit_provenance, read_openings, write_openings
from chain.transactions import address_of
from cluster.contributions import Reveal, claim_of, commit, register_contributor, reveal
from cluster.database import reading, writing
from cluster.datanets import open_datanet
from cluster.shards import commitment_to
from cluster.signatures import ShardReveal, datanets_domain, digest, sign
from cluster.storage import Storage, open_storage, put_content
from tests import toys

CHAIN_ID = 31337
DATANET = "toys"
ADAPTER_FILE = b"weights"
ADAPTER = sha256(ADAPTER_FILE)
TRAJECTORY = "trajectories/one"
KEYS = {name: sha256(name.encode()) for name in ("ann", "ben")}


def who(name: str) -> bytes:
    return contributor_id(address_of(KEYS[name]))


def row(subject: str) -> dict[str, str]:
    about = {"source": "toys", "source_version": "1", "source_key": subject, "licence": "MIT"}
    return {"subject": f"What is {subject}?", "answer": subject, **about}


def record(name: str, subject: str) -> Record:
    fields = row(subject)
    return Record(datanet=DATANET, contributor_id=who(name), text=fields["subject"], **fields)


def entry(name: str, subject: str, *others: Record) -> ManifestEntry:
    first = record(name, subject)
    members = tuple(sorted([first.record_id, *(other.record_id for other in others)]))
    return ManifestEntry(Group(first.record_id, first.contributor_id, members), first)


@dataclass
class World:
    """Ann committed to a cup and a lamp, then Ben to the same lamp and a pen; the pen is a control."""

    storage: Storage
    openings: list[ShardOpening]
    credits: list[Credit]

    def commit(self, name: str, subjects: list[str], seq: int) -> None:
        data = "".join(f"{json.dumps(row(subject))}\n" for subject in subjects).encode() + b"no row\n"
        salt = sha256(bytes([seq]))
        content = bytes.fromhex(put_content(self.storage, "shards", data))
        reveal = ShardReveal(
            DATANET, who(name), commitment_to(data, who(name), salt), content, len(subjects) + 1
        )
        signature = sign(KEYS[name], digest(reveal, datanets_domain(CHAIN_ID)))
        self.openings.append(ShardOpening(seq, reveal, salt, signature, address_of(KEYS[name])))

    def train(self, entries: list[ManifestEntry], controls: list[Record], trained: list[Record]) -> None:
        ordered = tuple(sorted(entries, key=lambda e: e.group.group_id))
        manifest = Manifest(DATANET, "MIT", ordered, tuple(controls), ("{subject}",), ())
        manifest_id = put_content(self.storage, "manifests", manifest.canonical())
        spans = [[[one.record_id.hex(), 0, 0, 1, 2] for one in trained]]
        self.put("spec.json", {"manifest_ids": [manifest_id]})
        self.put("order.json", {"rows": spans})
        self.put("done.json", {"adapter_id": ADAPTER.hex()})
        self.storage.put(f"adapters/{ADAPTER.hex()}.safetensors", ADAPTER_FILE)

    def put(self, name: str, document: object) -> None:
        self.storage.put(f"{TRAJECTORY}/{name}", json.dumps(document).encode())

    def audit(self) -> Report:
        close = AdapterClose(ADAPTER, ZERO_ID, 10, "made up", ZERO_ID, tuple(self.credits), ())
        return audit_provenance(
            self.storage, self.openings, Provenance(CHAIN_ID, frozenset({ADAPTER, ZERO_ID}), ((1, close),))
        )


@pytest.fixture
def world(tmp_path: Path) -> World:
    cup, lamp, pen = record("ann", "cup"), record("ann", "lamp"), record("ben", "pen")
    made = World(open_storage(f"file:{tmp_path}/storage"), [], [Credit(cup.record_id, who("ann"), 5)])
    made.commit("ann", ["cup", "lamp"], 1)
    made.commit("ben", ["lamp", "pen"], 2)
    made.train([entry("ann", "cup"), entry("ann", "lamp", record("ben", "lamp"))], [pen], [cup, lamp])
    return made


def test_an_honest_adapter_leads_back_to_what_was_committed_to(world: World) -> None:
    report = world.audit()
    assert report.is_clean, report.to_text()
    assert list(report.checked.values()) == [2, 4, 1, 1, 2, 1]


def changes_a_shard(world: World) -> None:
    key = f"shards/{world.openings[0].reveal.content_sha256.hex()}"
    world.storage.put(key, world.storage.get(key) + b" ")


def opens_with_another_salt(world: World) -> None:
    world.openings[0] = replace(world.openings[0], salt=bytes(32))


def signs_with_another_key(world: World) -> None:
    opening = world.openings[0]
    signature = sign(KEYS["ben"], digest(opening.reveal, datanets_domain(CHAIN_ID)))
    world.openings[0] = replace(opening, signature=signature)


def reveals_under_anothers_id(world: World) -> None:
    reveal = replace(world.openings[0].reveal, contributor_id=who("ben"))
    data = world.storage.get(f"shards/{reveal.content_sha256.hex()}")
    salt = world.openings[0].salt
    reveal = replace(reveal, commitment=commitment_to(data, who("ben"), salt))
    signature = sign(KEYS["ann"], digest(reveal, datanets_domain(CHAIN_ID)))
    world.openings[0] = ShardOpening(1, reveal, salt, signature, address_of(KEYS["ann"]))


def seals_what_nobody_committed_to(world: World) -> None:
    cup, hat = record("ann", "cup"), record("ann", "hat")
    world.train([entry("ann", "cup"), entry("ann", "hat")], [], [cup, hat])


def trains_on_a_control(world: World) -> None:
    cup, pen = record("ann", "cup"), record("ben", "pen")
    world.train([entry("ann", "cup")], [pen], [cup, pen])


def leaves_out_what_was_sealed(world: World) -> None:
    cup = record("ann", "cup")
    world.train([entry("ann", "cup"), entry("ann", "lamp")], [], [cup])


def groups_under_the_copier(world: World) -> None:
    cup, lamp = record("ann", "cup"), record("ben", "lamp")
    world.train([entry("ann", "cup"), entry("ben", "lamp", record("ann", "lamp"))], [], [cup, lamp])


def pays_somebody_else(world: World) -> None:
    world.credits[0] = replace(world.credits[0], contributor_id=who("ben"))


def serves_another_file(world: World) -> None:
    world.storage.put(f"adapters/{ADAPTER.hex()}.safetensors", b"other weights")


def changes_the_manifest(world: World) -> None:
    (key,) = world.storage.list("manifests/")
    world.storage.put(key, world.storage.get(key) + b" ")


def forgets_the_trajectory(world: World) -> None:
    world.storage.delete(f"{TRAJECTORY}/done.json")


@pytest.mark.parametrize(
    ("lie", "expected"),
    [
        (changes_a_shard, {"content_hash", "uncommitted"}),
        (opens_with_another_salt, {"commitment", "uncommitted"}),
        (signs_with_another_key, {"bad_signature", "uncommitted"}),
        (reveals_under_anothers_id, {"contributor", "uncommitted"}),
        (seals_what_nobody_committed_to, {"uncommitted"}),
        (trains_on_a_control, {"trained_unsealed"}),
        (leaves_out_what_was_sealed, {"sealed_untrained"}),
        (groups_under_the_copier, {"not_the_first"}),
        (pays_somebody_else, {"credit_owner"}),
        (serves_another_file, {"adapter_file"}),
        (changes_the_manifest, {"adapter_origin"}),
        (forgets_the_trajectory, {"adapter_origin"}),
    ],
)
def test_a_link_that_is_cut_is_named(world: World, lie: Callable[[World], None], expected: set[str]) -> None:
    lie(world)
    assert {finding.code for finding in world.audit().findings} == expected


def test_openings_are_read_back_as_written(world: World, tmp_path: Path) -> None:
    write_openings(tmp_path / "openings", world.openings)
    assert read_openings(tmp_path / "openings") == tuple(world.openings)


@pytest.mark.parametrize("line", ["", "no json", "{}", '{"datanet": 1}'])
def test_a_line_that_opens_nothing_is_refused_by_its_number(world: World, tmp_path: Path, line: str) -> None:
    write_openings(tmp_path / "openings", world.openings[:1])
    with (tmp_path / "openings").open("a") as file:
        file.write(f"{line}\n")
    with pytest.raises(Rejected, match="line 2") as refused:
        read_openings(tmp_path / "openings")
    assert refused.value.code == "bad_opening"


def test_rows_give_the_openings_of_what_was_revealed(engine: Engine, storage: Storage) -> None:
    """Committed and revealed through the gateway's functions, they open for a stranger; what is only
    committed to is not told."""
    domain = datanets_domain(CHAIN_ID)
    ann = address_of(KEYS["ann"])
    data = toys.shard_data()
    claim = claim_of(data, toys.datanet().name, who("ann"), bytes(32))
    with writing(engine) as session:
        open_datanet(session, toys.datanet(), bytes(32))
        register_contributor(session, ann, "ann")
        commit(session, claim.datanet, who("ann"), claim.commitment, 1)
        commit(session, claim.datanet, who("ann"), sha256(b"not revealed"), 1)
    reveal(
        engine, storage, Reveal(claim, bytes(32), sign(KEYS["ann"], digest(claim, domain))), data, domain, 2
    )
    with reading(engine) as session:
        found = openings(session)
    assert [opening.reveal for opening in found] == [claim]
    report = audit_provenance(storage, found, Provenance(CHAIN_ID, frozenset(), ()))
    assert report.is_clean and report.checked["commitments"] == 1 and report.checked["records"] > 0
