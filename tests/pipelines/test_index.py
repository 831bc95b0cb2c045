import pytest
import torch

from attribution.errors import Rejected
from attribution.spans import find_spans
from cluster.indexes import indexed_records, stored_index
from cluster.models import load_tokenizer
from pipelines.index import mean_rows
from tests.attributed import STEPS, World, index


def test_an_index_holds_every_trained_record_then_every_control(world: World) -> None:
    found = stored_index(world.ground.storage, index(world))
    assert (found.card.num_trained, found.card.num_controls) == (
        len(world.manifest.entries),
        len(world.manifest.controls),
    )
    assert found.card.snapshots == (STEPS[-1],)
    records = indexed_records(found, [world.manifest])
    assert [record.record_id for record in records] == [e.group.group_id for e in world.manifest.entries]
    assert found.features.any(axis=1).all(), "no record and no control is silently zero"


def test_the_same_inputs_give_the_same_index(world: World) -> None:
    assert index(world) == index(world)
    assert index(world, damping=1.0) != index(world)


def test_passages_of_trained_records_are_found_and_those_of_controls_are_not(world: World) -> None:
    found = stored_index(world.ground.storage, index(world))
    tokenizer = load_tokenizer(world.base_path)
    for row, entry in enumerate(world.manifest.entries):
        ids = tokenizer.encode(entry.record.text, add_special_tokens=False)
        spans = find_spans(found.segment, ids, min_tokens=len(ids), min_bits=0.0)
        assert [span.records for span in spans] == [(row,)]
    for control in world.manifest.controls:
        ids = tokenizer.encode(control.text, add_special_tokens=False)
        assert find_spans(found.segment, ids, min_tokens=len(ids), min_bits=0.0) == []


def test_several_snapshots_are_averaged(world: World) -> None:
    found = stored_index(world.ground.storage, index(world, snapshots=STEPS))
    assert found.card.snapshots == STEPS and len(found.loras) == 3
    first, last = (next(iter(lora.values())).a for lora in (found.loras[0], found.loras[-1]))
    assert not torch.equal(first, last)


def test_a_step_that_was_not_kept_is_refused(world: World) -> None:
    with pytest.raises(Rejected, match=r"steps \[5\] are not among those kept, \[0, 4, 8\]"):
        index(world, snapshots=(4, 5))


def test_a_missing_trajectory_is_refused(world: World) -> None:
    for key in list(world.ground.storage.list("trajectories/")):
        world.ground.storage.delete(key)
    with pytest.raises(Rejected) as refusal:
        index(world)
    assert refusal.value.code == "no_trajectory"


def test_a_records_row_is_the_mean_of_its_wordings_not_of_their_loudness() -> None:
    sketches = torch.tensor([[3.0, 0.0], [0.0, 500.0], [0.0, 2.0]])
    torch.testing.assert_close(mean_rows(sketches, [0, 0, 1]), torch.tensor([[0.5, 0.5], [0.0, 1.0]]))
