"""A training is done once, survives the death of its worker at any step with the same bits, and is
published."""

import json
import os
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import ray
import torch
from sqlalchemy import Engine

from attribution.errors import Rejected
from attribution.hashing import sha256
from cluster.adapters import load_adapter, resolve
from cluster.config import Settings
from cluster.database import reading, writing
from cluster.datanets import open_datanet
from cluster.models import base_model, linear_shapes
from cluster.storage import Storage, open_storage, put_content
from cluster.tables import DatanetRow
from pipelines.finetune import FinetuneSpec, finetune, workers_for
from pipelines.job import Ground, run
from pipelines.training import TrainingConfig
from pipelines.trajectory import Metric, kept_steps, read_metrics, read_state, recorded_steps
from tests import toy_models, toys

CONFIG = TrainingConfig(
    rank=4, alpha=8, adapted_blocks=2, row_tokens=160, rows_per_step=1, epochs=4, learning_rate=1e-2
)
OWNER = sha256(b"owner")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_models.tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def ground(tmp_path: Path, base: Path, engine: Engine) -> Ground:
    settings = Settings(home=tmp_path / "home", run_dir=tmp_path / "run", base_model=str(base))
    with writing(engine) as session:
        open_datanet(session, toys.datanet(), OWNER)
    storage = open_storage(settings.storage_url)
    put_content(storage, "manifests", toys.manifest().canonical())
    return Ground(settings, engine, storage)


def spec(run_id: str = "train-1", **changes: object) -> FinetuneSpec:
    given = {
        "run_id": run_id,
        "name": "ada/metals",
        "owner_id": OWNER.hex(),
        "manifest_ids": (toys.manifest().manifest_id.hex(),),
        "training": CONFIG,
        "threads_per_worker": 1,
    }
    return FinetuneSpec.model_validate({**given, **changes})


@pytest.fixture(scope="module")
def workers() -> Iterator[None]:
    """A Ray of our own for the tests that train."""
    with tempfile.TemporaryDirectory(prefix="ol", dir="/tmp", ignore_cleanup_errors=True) as folder:
        ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            object_store_memory=100_000_000,
            _temp_dir=folder,
        )
        yield
        ray.shutdown()


def state_of(ground: Ground, trajectory: str) -> dict[str, torch.Tensor]:
    """Everything that training changes, after the last step."""
    state = read_state(ground.storage, trajectory, recorded_steps(ground.storage, trajectory)[-1])
    return {
        f"{name} {field}": getattr(one, field)
        for name, one in state.items()
        for field in ("value", "exp_avg", "exp_avg_sq")
    }


@pytest.mark.ray
@pytest.mark.slow
def test_a_training_is_recorded_published_and_done_once(ground: Ground, workers: None) -> None:
    outcome = run("finetune", ground, spec(), finetune)
    trajectory = str(outcome["trajectory"])
    metrics = read_metrics(ground.storage, trajectory)
    assert [one.step for one in metrics] == list(range(1, len(metrics) + 1))
    assert outcome["steps"] == len(metrics)
    assert recorded_steps(ground.storage, trajectory) == sorted(kept_steps(len(metrics)))
    order = json.loads(ground.storage.get(f"{trajectory}/order.json"))
    manifest = toys.manifest()
    spans = [span for row in order["rows"] for span in row]
    assert sorted(span[0] for span in spans) == sorted(
        entry.group.group_id.hex() for entry in manifest.entries for _ in manifest.wordings
    )

    with reading(ground.engine) as session:
        adapter = resolve(session, "ada/metals")
    weights = load_adapter(ground.storage, adapter, linear_shapes(base_model(ground.settings).path))
    last = state_of(ground, trajectory)
    for module, factors in weights.factors.items():
        assert torch.equal(factors.a, last[f"{module}.a value"].bfloat16())
        assert torch.equal(factors.b, (2 * last[f"{module}.b value"]).bfloat16())

    again = run("finetune", ground, spec("train-2"), finetune)
    assert again["reused"] is True
    assert again["adapter_id"] == outcome["adapter_id"]
    assert again["adapter"] == "ada/metals@1"


@pytest.mark.ray
@pytest.mark.slow
def test_a_killed_rank_resumes_to_the_same_bits(ground: Ground, workers: None, tmp_path: Path) -> None:
    """SIGKILL between kept steps; the work since the last kept one is done again, and nothing shows."""
    calm = run("finetune", ground, spec("calm"), finetune)
    url = f"file:{tmp_path}/other"
    other = Ground(ground.settings.model_copy(update={"storage_url": url}), ground.engine, open_storage(url))
    put_content(other.storage, "manifests", toys.manifest().canonical())
    killed: list[int] = []
    killer = threading.Thread(target=kill_once_past, args=(other.storage, str(calm["trajectory"]), killed))
    killer.start()
    stormy = run("finetune", other, spec("stormy"), finetune)
    killer.join()
    assert killed
    assert stormy["trajectory"] == calm["trajectory"]
    assert stormy["adapter_id"] == calm["adapter_id"]
    expected, found = state_of(ground, str(calm["trajectory"])), state_of(other, str(calm["trajectory"]))
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def kill_once_past(storage: Storage, trajectory: str, killed: list[int]) -> None:
    """SIGKILL every training worker of ours as soon as a state after the beginning is kept."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if len(recorded_steps(storage, trajectory)) > 2:
            for process in psutil.Process().children(recursive=True):
                if "TrainWorker" in " ".join(process.cmdline() or [process.name()]):
                    os.kill(process.pid, signal.SIGKILL)
                    killed.append(process.pid)
            return
        time.sleep(0.01)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_workers_and_zero_stages_change_nothing_but_rounding(
    ground: Ground, workers: None, tmp_path: Path
) -> None:
    """A step is a sum over rows, wherever they are and whatever ZeRO shards."""
    alone, metrics = sharded(ground, tmp_path, stage=0, num_workers=1)
    again, _ = sharded(ground, tmp_path, stage=1, num_workers=1)
    assert all(torch.equal(again[name], tensor) for name, tensor in alone.items())
    together, shared_metrics = sharded(ground, tmp_path, stage=2, num_workers=2)
    assert [one.loss for one in shared_metrics] == pytest.approx([one.loss for one in metrics], rel=1e-4)
    for name, tensor in alone.items():
        assert torch.allclose(together[name], tensor, rtol=1e-2, atol=1e-4), name


def sharded(
    ground: Ground, tmp_path: Path, stage: int, num_workers: int
) -> tuple[dict[str, torch.Tensor], list[Metric]]:
    """Train with this ZeRO stage in a storage of its own, where nothing is found done."""
    url = f"file:{tmp_path}/stage-{stage}"
    ground = Ground(ground.settings.model_copy(update={"storage_url": url}), ground.engine, open_storage(url))
    put_content(ground.storage, "manifests", toys.manifest().canonical())
    document = {
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    path = tmp_path / f"deepspeed-{stage}.json"
    path.write_text(json.dumps(document))
    given = spec(
        f"stage-{stage}",
        training=CONFIG.model_copy(update={"rows_per_step": 2, "epochs": 2}),
        num_workers=num_workers,
        deepspeed_config=path,
    )
    trajectory = str(run("finetune", ground, given, finetune)["trajectory"])
    return state_of(ground, trajectory), read_metrics(ground.storage, trajectory)


def close(ground: Ground) -> None:
    with writing(ground.engine) as session:
        session.get_one(DatanetRow, toys.datanet().name).is_open = 0


def refused(ground: Ground, given: FinetuneSpec) -> str:
    with pytest.raises(Rejected) as refusal:
        run("finetune", ground, given, finetune)
    return refusal.value.code


def test_a_closed_datanet_is_not_trained_on(ground: Ground) -> None:
    close(ground)
    assert refused(ground, spec()) == "datanet_closed"


def test_an_unknown_manifest_is_refused(ground: Ground) -> None:
    assert refused(ground, spec(manifest_ids=(sha256(b"none").hex(),))) == "not_found"


def test_a_step_s_rows_are_shared_evenly_by_as_many_workers_as_there_are_cores() -> None:
    cores = len(os.sched_getaffinity(0))
    assert workers_for(rows_per_step=1, wanted=0) == 1
    assert workers_for(rows_per_step=2, wanted=0) == min(2, cores)
    assert workers_for(rows_per_step=6, wanted=3) == 3


def test_workers_that_cannot_share_a_step_are_refused(ground: Ground) -> None:
    assert refused(ground, spec(num_workers=2)) == "num_workers"


@pytest.mark.parametrize(
    "document",
    [
        None,
        "not json",
        '{"zero_optimization": {"stage": 3}}',
        '{"bf16": {"enabled": true}}',
        '{"gradient_clipping": 1}',
    ],
)
def test_a_deepspeed_configuration_that_no_replay_could_follow_is_refused(
    ground: Ground, tmp_path: Path, document: str | None
) -> None:
    path = tmp_path / "deepspeed.json"
    if document is not None:
        path.write_text(document)
    assert refused(ground, spec(deepspeed_config=path)) == "deepspeed_config"


def test_a_name_that_cannot_be_published_is_refused_before_training(ground: Ground) -> None:
    assert refused(ground, spec(name="Not A Name")) == "model_name"
