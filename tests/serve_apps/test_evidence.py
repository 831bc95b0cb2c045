import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import update

from attribution.types import Receipt
from cluster.database import reading, writing
from cluster.models import load_tokenizer
from cluster.receipts import receipt_of, set_evidence
from cluster.tables import TranscriptRow
from serve_apps.evidence import EvidenceWorker, pending
from tests import attributed
from tests.attributed import World, index, pay_for, payers, publish_another


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return attributed.toy_base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture
def world(tmp_path: Path, tiny: Path) -> Iterator[World]:
    world = attributed.build(tmp_path / "home", tiny)
    yield world
    world.ground.engine.dispose()


def shown(world: World, receipt: Receipt) -> tuple[str, dict[str, Any]]:
    with reading(world.ground.engine) as session:
        stored = receipt_of(session, receipt.receipt_id)
    return stored.evidence_state, json.loads(stored.evidence_json or "{}")


def test_evidence_names_the_record_that_was_asked_and_says_what_it_is(world: World) -> None:
    index_id = index(world)
    (account,) = payers(world, 1)
    for entry in world.manifest.entries[:3]:
        record = entry.record
        receipt = pay_for(world, account, f"Which one is {record.subject}?", record.answer)
        assert EvidenceWorker(world.ground.settings).work_once() == 1
        state, evidence = shown(world, receipt)
        assert (state, evidence["status"], evidence["index_id"]) == ("ready", "evidence only", index_id.hex())
        best = evidence["records"][0]
        assert best["record_id"] == record.record_id.hex()
        assert best["contributor_id"] == record.contributor_id.hex()
        assert best["source_key"] == record.source_key
        assert set(best["parts"]) == {"gradient", "lexical", "span"}


def test_a_passage_is_shown_with_its_place_and_not_if_the_prompt_said_it(world: World) -> None:
    index(world)
    (account,) = payers(world, 1)
    record = world.manifest.entries[0].record
    said = pay_for(world, account, "Tell me something.", f"Well: {record.text} So it is.")
    quoted = pay_for(world, account, f"Repeat: {record.text}", record.text)
    while EvidenceWorker(world.ground.settings).work_once():
        pass
    spans = shown(world, said)[1]["spans"]
    (span,) = [one for one in spans if record.text in one["text"]]
    assert span["record_ids"] == [record.record_id.hex()]
    tokenizer = load_tokenizer(world.base_path)
    ids = tokenizer.encode(f"Well: {record.text} So it is.", add_special_tokens=False)
    assert tokenizer.decode(ids[span["start_token"] : span["end_token"]]) == span["text"]
    assert shown(world, quoted)[1]["spans"] == []


def test_workers_divide_the_receipts_and_together_leave_none(world: World) -> None:
    index(world)
    (account,) = payers(world, 1)
    receipts = [pay_for(world, account, f"Question {n}?", "iron") for n in range(6)]
    with reading(world.ground.engine) as session:
        parts = [{r.receipt_id for r, _ in pending(session, worker, 3)} for worker in range(3)]
    assert sum(map(len, parts)) == 6
    assert set.union(*parts) == {receipt.receipt_id for receipt in receipts}


def test_a_worker_that_dies_between_two_receipts_loses_and_repeats_nothing(world: World) -> None:
    index(world)
    (account,) = payers(world, 1)
    first, second = (pay_for(world, account, question, "iron") for question in ("One?", "Two?"))
    worker = EvidenceWorker(world.ground.settings)
    with writing(world.ground.engine) as session:  # as if it had been killed after the first
        set_evidence(session, first.receipt_id, '{"kept": true}')
    assert worker.work_once() == 1 and worker.work_once() == 0
    assert shown(world, first)[1] == {"kept": True}
    assert shown(world, second)[0] == "ready"


def test_what_cannot_be_explained_holds_up_nobody_and_is_listed(world: World) -> None:
    index(world)
    (account,) = payers(world, 1)
    broken, whole = (pay_for(world, account, question, "iron") for question in ("One?", "Two?"))
    with writing(world.ground.engine) as session:
        this = TranscriptRow.receipt_id == broken.receipt_id.hex()
        session.execute(update(TranscriptRow).where(this).values(ciphertext=b"\0" * 64))
    worker = EvidenceWorker(world.ground.settings)
    while worker.work_once():
        pass
    assert shown(world, whole)[0] == "ready"
    assert shown(world, broken)[0] == "pending"
    assert list(worker.refused) == [broken.receipt_id]
    assert "does not open" in worker.refused[broken.receipt_id]


def test_no_transcript_and_no_answer_are_said_plainly(world: World) -> None:
    index(world)
    (account,) = payers(world, 1)
    unkept = pay_for(world, account, "One?", "iron", keeps_transcript=False)
    empty = pay_for(world, account, "Two?", "")
    EvidenceWorker(world.ground.settings).work_once()
    assert shown(world, unkept)[1]["reason"] == "the transcript was not kept"
    assert shown(world, empty)[1]["reason"] == "the answer is empty"


def test_an_adapter_without_an_index_waits_for_one(world: World) -> None:
    late = publish_another(world, "toy/late", seed=5)
    receipt = pay_for(world, payers(world, 1)[0], "One?", "iron", adapter_id=late.adapter_id)
    worker = EvidenceWorker(world.ground.settings)
    assert worker.work_once() == 0 and shown(world, receipt)[0] == "pending"
    index(world, late)
    assert worker.work_once() == 1 and shown(world, receipt)[0] == "ready"
