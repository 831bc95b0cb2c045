"""The training that DeepSpeed did is the training that the replay does: through the jobs' own shells."""

import pytest

from attribution.payload import decode_period
from cluster.adapters import resolve
from cluster.database import reading, writing
from cluster.datanets import open_datanet
from cluster.tables import PeriodRow
from tests import toys
from tests.attributed import OWNER, World, pay_for, payers, settle
from tests.pipelines.test_attribution_jobs import SPEC, ray_dir, run

__all__ = ["ray_dir"]  # a fixture
pytestmark = [pytest.mark.ray, pytest.mark.slow]

TRAINING = {"rank": 4, "alpha": 8, "adapted_blocks": 2, "row_tokens": 160, "rows_per_step": 2, "epochs": 3}


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_recorded_training_is_replayed_to_the_bit_and_pays_the_period(
    world: World, ray_dir: str, num_workers: int
) -> None:
    settings = world.ground.settings
    with writing(world.ground.engine) as session:
        open_datanet(session, toys.datanet(), OWNER)
    spec: dict[str, object] = {
        "run_id": "finetune-1",
        "name": "toy/trained",
        "owner_id": OWNER.hex(),
        "manifest_ids": [world.manifest.manifest_id.hex()],
        "training": TRAINING,
        "num_workers": num_workers,
    }
    trained = run("finetune", spec, settings, ray_dir)
    index: dict[str, object] = {"run_id": "index-1", "adapter": trained["adapter"], "sketch_size": 1024}
    run("index", index, settings, ray_dir)
    with reading(world.ground.engine) as session:
        adapter_id = resolve(session, "toy/trained@1").adapter_id
    asked = [entry.record for entry in world.manifest.entries]
    for account, record in zip(payers(world, len(asked)), asked, strict=True):
        question = f"Which one is {record.subject}?"
        pay_for(world, account, question, record.answer, fee_gwei=100_000, adapter_id=adapter_id)
    settle(world)
    closed = run("close_period", SPEC.model_dump(), settings, ray_dir)
    assert closed["carried"] == {}
    (method,) = dict(closed["methods"]).values()  # type: ignore[call-overload]
    assert method.startswith(f"metagradient/1 {trained['trajectory']} ")
    assert " states=bitwise " in method
    with reading(world.ground.engine) as session:
        payload_hash = session.get_one(PeriodRow, 1).payload_hash
    (adapter,) = decode_period(world.ground.storage.get(f"blobs/{payload_hash}")).adapters
    assert {credit.group_id for credit in adapter.credits} == {record.record_id for record in asked}
    assert sum(credit.value for credit in adapter.credits) > 0, "what was asked about is what was trained on"
    assert [key.rpartition("/")[2] for key in world.ground.storage.list("replays/")] == ["done.json"]
