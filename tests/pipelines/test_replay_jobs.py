"""The training that DeepSpeed did is the training that the replay does: through the jobs' own shells."""

from typing import Any

import pytest

from attribution.payload import decode_period
from cluster.adapters import resolve
from cluster.database import reading, writing
from cluster.datanets import open_datanet
from cluster.tables import PeriodRow
from tests import toys
from tests.attributed import OWNER, World, pay_for, payers, settle
from tests.pipelines.test_attribution_jobs import SPEC, ray_dir, run
from tests.toy_trainings import CONFIG

__all__ = ["ray_dir"]  # a fixture
pytestmark = [pytest.mark.ray, pytest.mark.slow]


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
        "training": CONFIG.model_dump(),
        "num_workers": num_workers,
    }
    trained = run("finetune", spec, settings, ray_dir)
    index: dict[str, object] = {"run_id": "index-1", "adapter": trained["adapter"], "sketch_size": 1024}
    run("index", index, settings, ray_dir)
    with reading(world.ground.engine) as session:
        adapter_id = resolve(session, "toy/trained@1").adapter_id
    records = [entry.record for entry in world.manifest.entries]
    asked = [one for one in records if one.contributor_id == records[0].contributor_id]
    receipts = [
        pay_for(world, who, f"What is {one.subject}?", one.answer, fee_gwei=100_000, adapter_id=adapter_id)
        for who, one in zip(payers(world, len(asked)), asked, strict=True)
    ]
    settle(world)
    closed = run("close_period", SPEC.model_dump(), settings, ray_dir)
    assert closed["carried"] == {}
    (method,) = dict(closed["methods"]).values()  # type: ignore[call-overload]
    assert method.startswith(f"metagradient/1 {trained['trajectory']} ")
    assert " states=bitwise " in method
    with reading(world.ground.engine) as session:
        payload_hash = session.get_one(PeriodRow, 1).payload_hash
    (adapter,) = decode_period(world.ground.storage.get(f"blobs/{payload_hash}")).adapters
    assert {credit.group_id for credit in adapter.credits} == {one.record_id for one in records}
    assert [key.rpartition("/")[2] for key in world.ground.storage.list("replays/")] == ["done.json"]

    explained = run(
        "explain", {"run_id": "explain-1", "receipt_id": receipts[0].receipt_id.hex()}, settings, ray_dir
    )
    part: Any = explained[adapter_id.hex()]
    assert (part["period_id"], part["fee_gwei"]) == (1, 100_000)
    assert part["credits"].keys() == {one.record_id.hex() for one in records}
