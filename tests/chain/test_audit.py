"""A stranger's audit of a settled chain, and what it says when a byte is changed."""

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from attribution.hashing import keccak256
from attribution.payload import PeriodPayload, decode_period, encode_period
from attribution.types import Share
from chain.audit import audit_arithmetic
from chain.da_blob import decode_payload, encode_payload
from chain.findings import Finding, Report
from chain.payload_source import PayloadSource
from chain.structs import ClaimCall, PeriodHeader
from chain.world import World
from cluster.database import reading
from cluster.tables import BatchRow, PeriodRow
from tests.chain.settling import Books, Site, paid_site, rewound, settle
from tests.chain.stage import Stage, address, set_stage

pytestmark = pytest.mark.evm


@dataclass(frozen=True)
class Settled:
    """A batch and a period, final, and Carol has been paid."""

    site: Site
    world: World
    batch_hash: str
    period_hash: str

    def audit(self, *, da: bool = True, archive: bool = True) -> Report:
        source = PayloadSource(self.world.da if da else None, self.world.storage if archive else None)
        return audit_arithmetic(self.world.rollup, source)

    def findings(self) -> tuple[Finding, ...]:
        return self.audit().findings

    def period(self) -> PeriodPayload:
        return decode_period(self.archived(self.period_hash))

    def archived(self, payload_hash: str) -> bytes:
        return self.world.storage.get(f"blobs/{payload_hash}")

    def blob(self, payload_hash: str) -> Path:
        """The stand-in's file."""
        files = [path for path in (self.site.folder / "da").iterdir() if path.is_file()]
        return next(f for f in files if keccak256(decode_payload(f.read_bytes())).hex() == payload_hash)


@pytest.fixture(scope="module")
def settled_site(rpc_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("audited")
    with paid_site(set_stage(rpc_url), folder) as site:
        settle(site.settler(), site.open(), Books(site))
        stage = site.stage
        with reading(site.open().rows) as session:
            period_hash = session.get_one(PeriodRow, 1).payload_hash
        period = decode_period(site.open().storage.get(f"blobs/{period_hash}"))
        stage.do("stranger", stage.rollup.encode_register([address("carol")]))
        stage.do("stranger", stage.rollup.encode_claim(claim_of(stage, period, "carol")))
        site.save_rows(folder / "settled.db")
        yield site


@pytest.fixture
def settled(settled_site: Site) -> Iterator[Settled]:
    with rewound(settled_site, settled_site.folder / "settled.db"):
        world = settled_site.open()
        with reading(world.rows) as session:
            hashes = session.get_one(BatchRow, 1).payload_hash, session.get_one(PeriodRow, 1).payload_hash
        yield Settled(settled_site, world, *hashes)


def claim_of(stage: Stage, period: PeriodPayload, name: str) -> ClaimCall:
    share = next(s for s in period.rewards if s.contributor_id == stage.id_of(name))
    proof = period.tree().proof(period.leaf(share))
    return ClaimCall(share.contributor_id, share.amount_gwei * 10**9, proof)


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)


def test_a_settled_chain_is_clean_from_either_place_and_to_the_same_integers(settled: Settled) -> None:
    """Six receipts, two captures, one period that pays out the 75 gwei captured; a claim."""
    both, da, archive = settled.audit(), settled.audit(archive=False), settled.audit(da=False)
    assert both.is_clean and da.is_clean and archive.is_clean, both.to_text()
    assert both.periods == da.periods == archive.periods
    assert both.batches[0].sources == ("da", "archive")
    counts = ("batches", "receipts", "captures", "periods", "claims")
    assert [both.checked[name] for name in counts] == [1, 6, 2, 1, 1]
    (payouts,) = both.periods[0].payouts
    assert sum(line.amount_gwei for line in payouts.lines) == both.batches[0].fee_gwei == 75
    assert json.loads(both.to_json())["batches"][0]["payload_hash"] == settled.batch_hash
    assert both.to_text().endswith("\nholds")


def test_a_changed_da_byte_names_the_batch_and_both_hashes(settled: Settled) -> None:
    path = settled.blob(settled.batch_hash)
    before = path.read_bytes()
    flip(path, 32 + 10)
    found = keccak256(decode_payload(path.read_bytes())).hex()
    assert settled.findings() == (Finding("da_payload", "batch 1", settled.batch_hash, found),)
    path.write_bytes(before)
    assert settled.findings() == ()


def test_a_changed_archive_byte_names_the_batch_and_both_hashes(settled: Settled) -> None:
    payload = settled.archived(settled.batch_hash)
    settled.world.storage.put(f"blobs/{settled.batch_hash}", payload[:-1] + b"\0")
    found = keccak256(payload[:-1] + b"\0").hex()
    assert settled.findings() == (Finding("archive_payload", "batch 1", settled.batch_hash, found),)
    settled.world.storage.put(f"blobs/{settled.batch_hash}", payload)


@pytest.mark.parametrize("place", ["da", "archive"])
def test_a_reencoded_credit_names_the_adapter_and_the_group(settled: Settled, place: str) -> None:
    """A payload that decodes as well as the true one, in either place."""
    period = settled.period()
    close = period.adapters[0]
    raised = replace(close.credits[0], value=close.credits[0].value + 1)
    altered = replace(period, adapters=(replace(close, credits=(raised, *close.credits[1:])),))
    payload = encode_period(altered)
    path, honest = settled.blob(settled.period_hash), settled.archived(settled.period_hash)
    blob = path.read_bytes()
    if place == "da":
        path.write_bytes(encode_payload(payload))
    else:
        settled.world.storage.put(f"blobs/{settled.period_hash}", payload)
    subject = f"period 1, adapter {close.adapter_id.hex()}, group {raised.group_id.hex()} in {place}"
    assert settled.findings() == (
        Finding(f"{place}_payload", "period 1", settled.period_hash, keccak256(payload).hex()),
        Finding("credit", subject, str(close.credits[0].value), str(raised.value)),
    )
    path.write_bytes(blob)
    settled.world.storage.put(f"blobs/{settled.period_hash}", honest)


def test_a_period_whose_rewards_do_not_follow_names_the_contributor_and_both_amounts(
    settled: Settled,
) -> None:
    """The operator serves more, moves a reward in the next period, and posts the root of that."""
    site = settled.site
    books = Books(site)
    books.serve("alice", 100, "one more")
    settler = site.settler()
    for _ in range(6):
        settler.tick()
    honest = books.next_period({"alice": 5, "carol": 7})
    assert honest is not None
    stolen = {s.contributor_id: s.amount_gwei for s in honest.rewards}
    victim, thief = site.stage.id_of("carol"), site.stage.id_of("alice")
    moved = {**stolen, victim: stolen[victim] - 9, thief: stolen[thief] + 9}
    rewards = tuple(Share(who, gwei) for who, gwei in sorted(moved.items()))
    books.post(replace(honest, rewards=rewards))
    for _ in range(6):
        settler.tick()
    found = {(f.code, f.subject, f.expected, f.found) for f in settled.findings()}
    for who in (victim, thief):
        subject = f"period 2, contributor {who.hex()}"
        assert ("reward", subject, f"{stolen[who]} gwei", f"{moved[who]} gwei") in found
    assert {code for code, *_ in found} == {"reward", "period_root"}


def test_a_root_posted_past_the_payload_names_the_contributor_who_drew_on_it(settled: Settled) -> None:
    """The settler's key posts a root of its own making under an honest payload's hash; Alice claims."""
    site, stage = settled.site, settled.site.stage
    books = Books(site)
    books.serve("alice", 100, "one more")
    settler = site.settler()
    for _ in range(6):
        settler.tick()
    honest = books.next_period({"alice": 5, "carol": 7})
    assert honest is not None
    payload = encode_period(honest)
    settled.world.storage.put(f"blobs/{keccak256(payload).hex()}", payload)
    alice = stage.id_of("alice")
    due = next(s.amount_gwei for s in honest.rewards if s.contributor_id == alice)
    left_gwei = honest.total_gwei - stage.rollup.total_claimed_wei() // 10**9
    forged = replace(honest, rewards=(Share(alice, left_gwei),))
    header = PeriodHeader(
        2,
        forged.tree().root,
        honest.total_gwei,
        honest.first_batch,
        honest.last_batch,
        honest.ledger_head,
        keccak256(payload),
    )
    certificate = settled.world.da.put(payload)
    stage.do("settler", stage.rollup.encode_post_period(header, certificate))
    stage.do("stranger", stage.rollup.encode_register([address("alice")]))
    stage.do("stranger", stage.rollup.encode_claim(claim_of(stage, forged, "alice")))
    found = {f.code: f for f in settled.findings()}
    assert set(found) == {"period_root", "claim"}
    assert found["period_root"].expected == honest.tree().root.hex()
    assert found["claim"].subject == f"contributor {alice.hex()}"
    assert found["claim"].expected == f"at most {due * 10**9} wei"
    assert found["claim"].found == f"{left_gwei * 10**9} wei"


def test_what_the_da_layer_forgot_the_archive_has(settled: Settled) -> None:
    """And what nobody has is a finding."""
    path = settled.blob(settled.batch_hash)
    kept = path.read_bytes()
    path.unlink()
    report = settled.audit()
    assert report.is_clean and report.batches[0].sources == ("archive",)
    (finding,) = settled.audit(archive=False).findings
    assert (finding.code, finding.subject) == ("payload_missing", "batch 1")
    path.write_bytes(kept)


def test_the_command_prints_and_exits_by_what_it_found(settled: Settled, tmp_path: Path) -> None:
    addresses = tmp_path / "deployment.json"
    settled.site.stage.deployment.save(addresses)
    places = ["--da", settled.site.da_url, "--archive", f"file:{settled.site.folder}/storage"]
    flags = ["--rpc", settled.site.stage.rpc_url, "--addresses", str(addresses)]

    def command(*arguments: str) -> "subprocess.CompletedProcess[str]":
        argv = [sys.executable, "-m", "chain.audit", *arguments]
        return subprocess.run(argv, capture_output=True, text=True)

    clean = command(*flags, *places)
    assert (clean.returncode, clean.stdout.splitlines()[-1]) == (0, "holds"), clean.stderr
    path = settled.blob(settled.batch_hash)
    kept = path.read_bytes()
    flip(path, 32 + 10)
    altered = command(*flags, *places, "--json")
    assert altered.returncode == 1 and json.loads(altered.stdout)["findings"][0]["subject"] == "batch 1"
    path.write_bytes(kept)
    refused = command("--rpc", "http://127.0.0.1:9", *flags[2:], *places)
    assert (
        refused.returncode == 1 and refused.stderr.startswith("audit: ") and "Traceback" not in refused.stderr
    )


def test_the_auditor_loads_neither_torch_nor_ray_nor_sqlalchemy() -> None:
    heavy = "{'torch', 'ray', 'sqlalchemy', 'numpy'} & set(sys.modules)"
    code = f"import sys, chain.audit; print(sorted({heavy}))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
