"""From revealed shards to a sealed manifest: rows, groups, quarantine, and running it again."""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from sqlalchemy import Engine, select

from attribution.errors import Rejected, Unavailable
from attribution.types import Manifest, contributor_id
from cluster.config import Settings
from cluster.contributions import Reveal, claim_of, commit, register_contributor, reveal
from cluster.database import connect, migrate, reading, writing
from cluster.datanets import open_datanet
from cluster.signatures import datanets_domain, digest, sign
from cluster.storage import Storage, get_content
from cluster.tables import ManifestRow, RecordRow, RejectionRow, RunRow, ShardRow
from cluster.wallets import of_key
from pipelines.ingest import IngestSpec, ingest, one_by_one
from pipelines.job import Ground, Outcome, run
from pipelines.manifests import SealPolicy
from pipelines.sources.drafts import jsonl
from tests import toys

NET = toys.datanet().name
DOMAIN = datanets_domain(31337)
NOW = 1_800_000_000
TOYS = [toys.row(record) for record in toys.records()]
POLICY = SealPolicy(control_ppm=350_000)


@dataclass(frozen=True)
class Person:
    name: str
    number: int

    @property
    def key(self) -> bytes:
        return bytes([self.number]) * 32

    @property
    def address(self) -> bytes:
        return of_key(self.name, self.key).address


ALICE, BOB = Person("alice", 1), Person("bob", 2)


@pytest.fixture(params=["sqlite", "postgres"])
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    url: str = request.getfixturevalue(f"{request.param}_url")
    migrate(url)
    engine = connect(url)
    yield engine
    engine.dispose()


@pytest.fixture
def ground(settings: Settings, engine: Engine, storage: Storage) -> Ground:
    with writing(engine) as session:
        open_datanet(session, toys.datanet(), bytes(32))
    return Ground(settings, engine, storage)


def promise(ground: Ground, who: Person, data: bytes) -> Reveal:
    """Commit now, reveal later."""
    claim = claim_of(data, NET, contributor_id(who.address), bytes(32))
    with writing(ground.engine) as session:
        register_contributor(session, who.address, who.name)
        commit(session, NET, claim.contributor_id, claim.commitment, NOW)
    return Reveal(claim, bytes(32), sign(who.key, digest(claim, DOMAIN)))


def contribute(ground: Ground, who: Person, data: bytes) -> int:
    return reveal(ground.engine, ground.storage, promise(ground, who, data), data, DOMAIN, NOW).committed_seq


def work(ground: Ground, spec: IngestSpec) -> Outcome:
    return ingest(ground, spec, one_by_one)


def take_in(ground: Ground, run_id: str = "r1") -> Outcome:
    return run("ingest", ground, IngestSpec(run_id=run_id, datanet=NET, seal=POLICY), work)


def states(ground: Ground) -> Counter[str]:
    with reading(ground.engine) as session:
        return Counter(session.scalars(select(RecordRow.state)))


def shard_states(ground: Ground) -> list[str]:
    with reading(ground.engine) as session:
        return list(session.scalars(select(ShardRow.state).order_by(ShardRow.committed_seq)))


def tables(ground: Ground) -> list[object]:
    """Everything an ingest writes but the time of day."""
    with reading(ground.engine) as session:
        records = session.scalars(select(RecordRow).order_by(RecordRow.record_id))
        rejections = session.scalars(select(RejectionRow).order_by(RejectionRow.shard_seq, RejectionRow.row))
        return [
            [(r.record_id, r.shard_seq, r.row, r.group_id, r.state, r.canonical) for r in records],
            [(r.shard_seq, r.row, r.code, r.detail) for r in rejections],
            sorted(session.scalars(select(ManifestRow.manifest_id))),
            [(s.state, s.reason) for s in session.scalars(select(ShardRow).order_by(ShardRow.committed_seq))],
        ]


def test_good_shards_become_records_and_a_manifest(ground: Ground) -> None:
    contribute(ground, ALICE, jsonl(TOYS[:7]))
    contribute(ground, BOB, jsonl(TOYS[7:]))
    outcome = take_in(ground)
    assert (outcome["rows_read"], outcome["records"], outcome["groups"]) == (12, 12, 12)
    assert states(ground) == {"kept": outcome["groups_trained_on"], "control": outcome["controls"]}
    assert shard_states(ground) == ["ingested", "ingested"]
    manifest_id = str(outcome["manifest_id"])
    manifest = Manifest.from_canonical(get_content(ground.storage, "manifests", manifest_id))
    assert manifest.manifest_id.hex() == manifest_id
    with reading(ground.engine) as session:
        assert session.scalars(select(ManifestRow.num_groups)).all() == [len(manifest.entries)]
        kept = set(session.scalars(select(RecordRow.record_id).where(RecordRow.state == "kept")))
        assert json.loads(session.get_one(RunRow, "r1").outcome_json) == outcome
    assert {entry.group.group_id.hex() for entry in manifest.entries} == kept


def test_a_bad_row_leaves_a_row_that_says_why_and_the_rest_goes_on(ground: Ground) -> None:
    bad = [b"{oops", b'{"subject": 3}', b"", json.dumps({**TOYS[1], "licence": "?"}).encode()]
    contribute(ground, ALICE, b"\n".join([jsonl(TOYS[:1])[:-1], *bad, jsonl(TOYS[1:])[:-1]]))
    outcome = take_in(ground)
    assert outcome["rows_rejected"] == {"licence": 1, "missing_field": 1, "not_json": 2}
    assert outcome["rows_read"] == 16 and outcome["records"] == 12
    with reading(ground.engine) as session:
        rows = session.scalars(select(RejectionRow).order_by(RejectionRow.row)).all()
    assert [(row.row, row.code) for row in rows] == [
        (1, "not_json"),
        (2, "missing_field"),
        (3, "not_json"),
        (4, "licence"),
    ]


def damage(ground: Ground, how: str) -> None:
    """Spoil the stored bytes of the first shard."""
    with reading(ground.engine) as session:
        key = f"shards/{session.get_one(ShardRow, 1).content_sha256}"
    data = ground.storage.get(key)
    if how == "gone":
        ground.storage.delete(key)
    else:
        ground.storage.put(key, data[:-30] if how == "truncated" else data.replace(b"lead", b"tin!"))


@pytest.mark.parametrize(
    ("how", "code"), [("truncated", "content_hash"), ("edited", "content_hash"), ("gone", "not_found")]
)
def test_a_bad_shard_is_quarantined_and_the_rest_goes_on(ground: Ground, how: str, code: str) -> None:
    contribute(ground, ALICE, jsonl(TOYS[:7]))
    contribute(ground, BOB, jsonl(TOYS[7:]))
    damage(ground, how)
    outcome = take_in(ground)
    assert shard_states(ground) == ["quarantined", "ingested"]
    assert code in outcome["shards_quarantined"]["1"]
    assert (outcome["shards_ingested"], outcome["records"], outcome["rows_read"]) == (1, 5, 5)
    with reading(ground.engine) as session:
        assert code in session.get_one(ShardRow, 1).reason


def test_a_shard_with_fewer_rows_than_signed_for_is_quarantined(ground: Ground) -> None:
    seq = contribute(ground, ALICE, jsonl(TOYS))
    with writing(ground.engine) as session:
        session.get_one(ShardRow, seq).num_rows = 13
    assert "signed for 13 rows, holds 12" in take_in(ground)["shards_quarantined"][str(seq)]


def test_nothing_but_bad_rows_seals_nothing(ground: Ground) -> None:
    contribute(ground, ALICE, b"?\n" * 5)
    outcome = take_in(ground)
    assert (outcome["manifest_id"], outcome["records"], outcome["rows_rejected"]) == ("", 0, {"not_json": 5})


def test_storage_that_is_away_is_no_verdict(ground: Ground, tmp_path: Path) -> None:
    """A shard is quarantined for what it is, never for a bad day of the network."""
    contribute(ground, ALICE, jsonl(TOYS))

    class Away:
        def __getattr__(self, name: str) -> object:
            raise Unavailable("storage_unavailable", "no route")

    with pytest.raises(Unavailable):
        run(
            "ingest", replace(ground, storage=Away()), IngestSpec(run_id="r1", datanet=NET, seal=POLICY), work
        )
    assert shard_states(ground) == ["revealed"]
    assert take_in(ground)["records"] == 12


def test_a_second_uploader_of_the_same_rows_earns_nothing(ground: Ground) -> None:
    contribute(ground, ALICE, jsonl(TOYS))
    contribute(ground, BOB, jsonl([{**row, "source_key": "mine"} for row in TOYS]))
    outcome = take_in(ground)
    assert (outcome["records"], outcome["groups"], outcome["duplicates"]) == (24, 12, 12)
    manifest = Manifest.from_canonical(get_content(ground.storage, "manifests", str(outcome["manifest_id"])))
    alice = contributor_id(ALICE.address)
    assert {entry.group.contributor_id for entry in manifest.entries} == {alice}
    assert all(len(entry.group.members) == 2 for entry in manifest.entries)


def test_a_conflict_is_kept_for_review_and_not_trained_on(ground: Ground) -> None:
    contribute(ground, ALICE, jsonl(TOYS))
    contribute(ground, BOB, jsonl([{**TOYS[0], "answer": "gallium", "text": "Gallium melts in the hand."}]))
    outcome = take_in(ground)
    assert (outcome["conflicts"], states(ground)["conflict"]) == (1, 1)
    manifest = Manifest.from_canonical(get_content(ground.storage, "manifests", str(outcome["manifest_id"])))
    assert "gallium" not in {entry.record.answer for entry in manifest.entries}


def test_the_same_row_in_two_shards_of_one_contributor_counts_once(ground: Ground) -> None:
    contribute(ground, ALICE, jsonl(TOYS))
    contribute(ground, ALICE, jsonl(TOYS[:4]))
    outcome = take_in(ground)
    assert outcome["records"] == 12
    assert outcome["rows_rejected"] == {"duplicate_record": 4}


def test_who_committed_first_is_first_however_late_the_bytes_come(ground: Ground) -> None:
    """Bob saw the commitment and hurried; Alice reveals within her day and gets her records back."""
    data = jsonl(TOYS)
    early = promise(ground, ALICE, data)
    contribute(ground, BOB, data)
    first = take_in(ground, "r1")
    reveal(ground.engine, ground.storage, early, data, DOMAIN, NOW + 3600)
    second = take_in(ground, "r2")
    alice = contributor_id(ALICE.address)
    manifest = Manifest.from_canonical(get_content(ground.storage, "manifests", str(second["manifest_id"])))
    assert {entry.group.contributor_id for entry in manifest.entries} == {alice}
    assert states(ground)["duplicate"] == 12
    old = Manifest.from_canonical(get_content(ground.storage, "manifests", str(first["manifest_id"])))
    assert old.manifest_id.hex() == first["manifest_id"]  # what is sealed is sealed


def test_a_record_moves_to_the_earliest_place_its_contributor_sent_it(ground: Ground) -> None:
    """Alice's first shard comes last; between her two, Bob copied."""
    data = jsonl(TOYS)
    early = promise(ground, ALICE, data)
    contribute(ground, BOB, jsonl([{**row, "source_key": "mine"} for row in TOYS]))
    contribute(ground, ALICE, jsonl(reversed(TOYS)))
    take_in(ground, "r1")
    reveal(ground.engine, ground.storage, early, data, DOMAIN, NOW + 3600)
    outcome = take_in(ground, "r2")
    alice = contributor_id(ALICE.address)
    manifest = Manifest.from_canonical(get_content(ground.storage, "manifests", str(outcome["manifest_id"])))
    assert {entry.group.contributor_id for entry in manifest.entries} == {alice}
    with reading(ground.engine) as session:
        assert set(session.scalars(select(RecordRow.shard_seq))) == {1, 2}


def test_running_again_changes_no_row(ground: Ground) -> None:
    contribute(ground, ALICE, jsonl(TOYS) + b"bad\n")
    outcome = take_in(ground)
    before = tables(ground)
    assert take_in(ground) == outcome  # the same run: its outcome is read back
    assert take_in(ground, "another")["rows_read"] == 0  # another run: nothing is waiting
    assert tables(ground) == before


def test_a_run_that_died_half_way_leaves_nothing_that_the_next_does_not_set_right(
    ground: Ground, settings: Settings, storage: Storage, tmp_path: Path
) -> None:
    """Rows were inserted, the shards still wait; then an earlier shard arrives and changes the groups."""
    data = jsonl(TOYS)
    early = promise(ground, ALICE, data)
    contribute(ground, BOB, data)
    take_in(ground)
    with writing(ground.engine) as session:  # as if the last transaction had not happened
        session.get_one(ShardRow, 2).state = "revealed"
        session.delete(session.scalars(select(ManifestRow)).one())
    reveal(ground.engine, ground.storage, early, data, DOMAIN, NOW + 60)
    outcome = take_in(ground, "r2")
    assert (outcome["rows_read"], outcome["groups"], outcome["duplicates"]) == (24, 12, 12)
    with reading(ground.engine) as session:
        owners = set(
            session.scalars(select(RecordRow.contributor_id).where(RecordRow.state.in_(("kept", "control"))))
        )
    assert owners == {contributor_id(ALICE.address).hex()}


def test_of_two_runs_at_once_one_has_to_start_again(ground: Ground) -> None:
    contribute(ground, ALICE, jsonl(TOYS[:6]))

    def interrupted(shards: object, storage: object, rules: object) -> object:
        verdicts = list(one_by_one(shards, storage, rules))
        take_in(ground, "quicker")
        return verdicts

    with pytest.raises(Unavailable, match="another run"):
        ingest(ground, IngestSpec(run_id="r1", datanet=NET, seal=POLICY), interrupted)
    assert states(ground).total() == 6


def test_withdrawn_records_keep_their_place_and_are_not_sealed_again(ground: Ground) -> None:
    contribute(ground, ALICE, jsonl(TOYS))
    take_in(ground)
    with writing(ground.engine) as session:
        row = session.scalars(select(RecordRow).where(RecordRow.state == "kept")).first()
        row.state = "withdrawn"
        gone = row.record_id
    contribute(ground, BOB, jsonl([{**one, "source_key": "mine"} for one in TOYS]))
    outcome = take_in(ground, "r2")
    manifest = Manifest.from_canonical(get_content(ground.storage, "manifests", str(outcome["manifest_id"])))
    assert gone not in {member.hex() for entry in manifest.entries for member in entry.group.members}
    assert states(ground)["withdrawn"] == 1


def test_an_unknown_datanet_is_refused(ground: Ground) -> None:
    with pytest.raises(Rejected) as refusal:
        ingest(ground, IngestSpec(run_id="r1", datanet="nowhere"), one_by_one)
    assert refusal.value.code == "unknown_datanet"


def test_a_huge_shard_of_one_repeated_row_is_one_record(ground: Ground) -> None:
    contribute(ground, ALICE, jsonl([TOYS[0]] * 5_000))
    outcome = take_in(ground)
    assert outcome["records"] == 1
    assert outcome["rows_rejected"] == {"duplicate_row": 4_999}
