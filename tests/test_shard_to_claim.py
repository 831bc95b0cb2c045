"""The whole path on a toy model, with everything that can be lost lost between the stages: each time the
whole Ray head is killed, and with it the settler, the gateway, the engine and the jobs' records. What matters
is in rows, files and on the chain, so the path completes, every receipt is paid once, and the audit finds
nothing.
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import func, select

from attribution.types import contributor_id
from chain.audit import audit_arithmetic, bound_by_chain
from chain.openings import openings
from chain.payload_source import PayloadSource
from chain.provenance import audit_provenance
from chain.rollup import Rollup
from cluster.cli import data, laptop, money, people, stack
from cluster.config import Settings, child_environment
from cluster.contributions import register_contributor
from cluster.database import connect, reading, writing
from cluster.datanets import open_datanet
from cluster.storage import open_storage
from cluster.tables import AdapterRow, ReceiptRow
from cluster.wallets import Wallet
from tests import toy_models, toys
from tests.whole_path import ask, job, kill_head, own_platform

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.evm, pytest.mark.timeout(1200)]

TRAINING = {"rank": 2, "alpha": 4, "adapted_blocks": 1, "epochs": 1, "row_tokens": 128, "rows_per_step": 1}
DEPOSIT_GWEI = 10**9
NUM_QUESTIONS = 6


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Settings]:
    base = toy_models.tiny_base(tmp_path / "base")
    with own_platform(tmp_path, monkeypatch, str(base)) as found:
        yield found


def test_the_path_completes_whatever_dies_between_its_stages(settings: Settings) -> None:
    deployment = stack.start_ground(settings)
    engine = connect(settings.database_url)
    contribute(settings)

    stack.start_ray(settings)
    manifest_id = job(settings, "ingest", {"datanet": "toy-metals", "seal": {"control_ppm": 350_000}})[
        "manifest_id"
    ]

    kill_head(settings)
    stack.start_ray(settings)
    owner = contributor_id(laptop.own_wallet(settings, "model-owner").address).hex()
    spec = {"name": "toy/metals", "owner_id": owner, "manifest_ids": [manifest_id], "training": TRAINING}
    ref = job(settings, "finetune", spec)["adapter"]

    kill_head(settings)
    stack.start_ray(settings)
    job(settings, "index", {"adapter": ref, "sketch_size": 256})

    kill_head(settings)
    stack.start_services(settings)
    payer = laptop.own_wallet(settings, "payer")
    people.fund_payer(settings, engine, deployment, payer, DEPOSIT_GWEI)
    key = people.open_key(settings, engine, payer, "payer", DEPOSIT_GWEI)
    money.wait_until(lambda: people.deposits_are_seen(engine, [payer], DEPOSIT_GWEI), "the deposit", 60)
    ask(settings, key, str(ref), [f"Name {one.subject}." for one in toys.records()[:NUM_QUESTIONS]])

    kill_head(settings)
    stack.start_services(settings)
    money.wait_until(lambda: money.is_settled(engine), "settlement after the kill", 120)

    kill_head(settings)
    stack.start_ray(settings)
    period_id = money.close_period(settings, print)
    paid = money.print_payouts(settings, period_id)
    assert paid == money.captured_gwei(engine, period_id) > 0
    assert money.claim_for(settings, engine, money.everyone(settings, engine))

    check(settings, engine_receipts(settings), payer)
    stack.start_services(settings)
    say_everything(settings, str(ref))


def contribute(settings: Settings) -> None:
    engine = connect(settings.database_url)
    platform = laptop.own_wallet(settings, "platform")
    with writing(engine) as session:
        open_datanet(session, toys.datanet(), register_contributor(session, platform.address, "platform"))
    lines = toys.shard_data().splitlines(keepends=True)
    for n in range(3):
        owner = laptop.own_wallet(settings, f"contributor-{n}")
        part = b"".join(lines[n::3])
        data.contribute_shard(settings, engine, "toy-metals", owner.name, owner.address, owner.key, part)


def engine_receipts(settings: Settings) -> int:
    with reading(connect(settings.database_url)) as session:
        return int(session.scalar(select(func.count()).select_from(ReceiptRow)) or 0)


def check(settings: Settings, num_receipts: int, payer: Wallet) -> None:
    """Every receipt once, and both audits clean."""
    assert num_receipts == NUM_QUESTIONS
    rollup = Rollup(settings.chain.rpc_url, money.deployment_of(settings))
    storage = open_storage(settings.storage_url)
    source = PayloadSource(None, storage)
    arithmetic = audit_arithmetic(rollup, source)
    assert arithmetic.is_clean, arithmetic.to_text()
    assert sum(batch.num_receipts for batch in arithmetic.batches) == NUM_QUESTIONS
    with reading(connect(settings.database_url)) as session:
        provenance = audit_provenance(storage, openings(session), bound_by_chain(rollup, source))
        assert session.scalar(select(func.count()).select_from(AdapterRow)) == 1
    assert provenance.is_clean, provenance.to_text()
    captured = rollup.payer_state(payer.address).captured_wei
    assert captured == sum(batch.fee_gwei for batch in arithmetic.batches) * 10**9


def say_everything(settings: Settings, ref: str) -> None:
    """Every command that only looks, or may be repeated, on what the path has left."""

    def say(*argv: str) -> str:
        command = [sys.executable, "-m", "cluster.cli.main", *argv]
        environment = {**os.environ, **child_environment(settings), "COLUMNS": "200"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{argv}: {done.stdout}{done.stderr}"
        return done.stdout

    assert "toy-metals" in say("datanet", "list")
    assert "manifest_ids" in say("datanet", "spec", "toy-metals", "--name", "toy/again")
    assert ref in say("deploy", ref)
    receipt = re.search("receipt ([0-9a-f]{64})", say("chat", ref, "Name a metal.", "--key-of", "payer"))
    assert receipt and receipt[1] in say("evidence", receipt[1], "--key-of", "payer")
    assert ref in say("usage", "--key-of", "payer")
    assert "settler" in say("status") and "http" in say("jobs-url")
    assert "ok" in say("chain", "verify")
    audited = say("audit", "--provenance", "--influence")
    for name in ("arithmetic", "provenance", "influence"):
        assert re.search(f"^{name} audit: [^\n]*[1-9]", audited, re.MULTILINE)
    assert audited.count("\nholds") == 3
    assert "not paid yet" in say("explain", receipt[1])
    assert "Wallets" in say("claim", "all")
