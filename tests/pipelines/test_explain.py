"""An answer's part is its own: all parts of a period are the period's credits, before anything is netted."""

import pytest
import torch
from sqlalchemy import delete, select

from attribution.errors import Rejected
from cluster.database import reading, writing
from cluster.models import load_base
from cluster.receipts import receipts_of_batch
from cluster.tables import TranscriptRow
from pipelines.answer_sums import store_sums
from pipelines.course import Course
from pipelines.explain import Part, explain
from pipelines.replayed import ROUNDING_PPM
from pipelines.row_derivatives import Workers
from pipelines.trajectory import TrainingSpec
from tests.attributed import World, index, pay_for, payers, settle
from tests.pipelines.test_close_period import QUESTIONS, close, trained_and_asked
from tests.toy_trainings import this_process


def parts_of(world: World, receipt_id: bytes) -> tuple[Part, ...]:
    model, storage = load_base(world.base_path, torch.float32), world.ground.storage

    def open_workers(_: TrainingSpec, course: Course) -> Workers:
        return this_process(world.base_path, course)

    def sum_answers(opened, chunks) -> None:  # type: ignore[no-untyped-def]
        store_sums(model, opened, storage, chunks)

    return explain(world.ground, receipt_id, sum_answers, open_workers)


def test_parts_add_up_to_the_period_s_credits(world: World) -> None:
    adapter = trained_and_asked(world)
    (paid,) = close(world).payload.adapters
    with reading(world.ground.engine) as session:
        receipts = receipts_of_batch(session, 1)
    parts = [part for one in receipts for part in parts_of(world, one.receipt_id)]
    assert {(part.adapter_id, part.fee_gwei, part.period_id) for part in parts} == {
        (adapter.adapter_id, 100_000, 1)
    }
    bound = max(abs(credit.value) for credit in paid.credits) * ROUNDING_PPM // 1_000_000
    for place, credit in enumerate(paid.credits):
        assert {part.credits[place].group_id for part in parts} == {credit.group_id}
        assert abs(sum(part.credits[place].value for part in parts) - credit.value) <= bound
    assert len({part.credits for part in parts}) == len(parts) == 2
    assert list(world.ground.storage.list("answer_sums/")) == [], "one answer's gradient is not kept"


def test_an_answer_not_paid_yet_has_a_part_too(world: World) -> None:
    trained_and_asked(world)
    with reading(world.ground.engine) as session:
        first = receipts_of_batch(session, 1)[0]
    (part,) = parts_of(world, first.receipt_id)
    assert (part.period_id, part.bits) == (0, 24)


def test_what_cannot_be_explained_is_refused_by_name(world: World) -> None:
    trained_and_asked(world)
    index(world)
    (account,) = payers(world, 1)
    empty = pay_for(world, account, "Nothing?", "")
    fake = pay_for(world, account, *QUESTIONS[0])  # by an adapter whose trajectory is not a training's
    settle(world)
    for receipt_id, code in (
        (bytes(32), "receipt_not_found"),
        (empty.receipt_id, "empty_answer"),
        (fake.receipt_id, "no_training"),
    ):
        with pytest.raises(Rejected) as refusal:
            parts_of(world, receipt_id)
        assert refusal.value.code == code
    with writing(world.ground.engine) as session:
        receipt_id = session.scalars(select(TranscriptRow.receipt_id)).first()
        session.execute(delete(TranscriptRow))
    with pytest.raises(Rejected) as refusal:
        parts_of(world, bytes.fromhex(str(receipt_id)))
    assert refusal.value.code == "no_transcript"
