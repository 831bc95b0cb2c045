"""Fine-tune an adapter: Ray Train places the workers, DeepSpeed ZeRO shards the optimizer, the mathematics is
``pipelines/training.py``'s.

    python -m pipelines.finetune --spec FILE_OR_URI

The trajectory, ``trajectories/<training_id>/`` in storage, is at once the record that a replay follows and
the checkpoint that a killed worker resumes from: ``spec.json``, ``order.json``, ``metrics.jsonl``, the whole
fp32 state after about every sqrt(T)-th step, and ``done.json`` at the end. A training is named by what
determines it (base, manifests, configuration, seed): a second run of a finished one publishes what is there
and trains nothing. At one worker a resumed training ends with the same bits as one that was never killed.
"""

import json
import os
import secrets
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import Field

from attribution.errors import Rejected, Unavailable
from attribution.types import Adapter, Manifest
from cluster.adapters import check_name, pack, publish, store_adapter
from cluster.database import reading, writing
from cluster.models import base_model, load_tokenizer
from cluster.storage import Storage, get_content
from cluster.tables import DatanetRow
from pipelines.course import ChatAsker, plan_of
from pipelines.finetune_worker import METRICS_EVERY_S, Task, work
from pipelines.job import Ground, Outcome, main
from pipelines.spec import Spec
from pipelines.training import TrainingConfig, adapter_weights
from pipelines.trajectory import (
    TrainingSpec,
    done_adapter,
    read_metrics,
    read_state,
    recorded_steps,
    write_beginning,
    write_done,
)


class FinetuneSpec(Spec):
    """What to train on what, and whose the result is."""

    name: str  # owner/model
    owner_id: str = Field(pattern="^[0-9a-f]{64}$")
    manifest_ids: tuple[str, ...] = Field(min_length=1)
    training: TrainingConfig = TrainingConfig()
    seed: int = Field(default=0, ge=0)
    price_gwei_per_token: int = Field(default=2_000, ge=0)
    num_workers: int = Field(default=0, ge=0)  # 0: one per row of a step, as far as this machine has cores
    threads_per_worker: int = Field(default=0, ge=0)  # 0: what the machine has, divided among its workers
    max_failures: int = Field(default=3, ge=0)  # of workers; each resumes from the last kept step
    deepspeed_config: Path = Path("configs/deepspeed_zero2.json")


def finetune(ground: Ground, spec: FinetuneSpec) -> Outcome:
    """Train, or find trained, and publish."""
    check_name(spec.name)
    manifests = [opened_manifest(ground, bytes.fromhex(one)) for one in spec.manifest_ids]
    base = base_model(ground.settings)
    num_workers = workers_for(spec.training.rows_per_step, spec.num_workers)
    training = TrainingSpec(
        base.base_id, tuple(m.manifest_id for m in manifests), spec.training, spec.seed, num_workers
    )
    adapter_id = done_adapter(ground.storage, training.trajectory)
    is_reused = adapter_id is not None
    if adapter_id is None:
        adapter_id = _train(ground, spec, training, manifests, base.path)
    else:
        print(f"reused: {training.trajectory} is complete; nothing is trained", flush=True)
    adapter = _publish(ground, spec, training, adapter_id)
    return {**_summary(ground.storage, training.trajectory), **_named(adapter), "reused": is_reused}


def workers_for(rows_per_step: int, wanted: int) -> int:
    """Workers that share a step's rows evenly. The demo's matrices are too small for two threads to share
    well: on two cores a step of two rows took one worker 2.1 s and two workers 1.3 s.

    Raises:
        Rejected: ``num_workers``: the wanted number does not divide the rows.
    """
    if wanted and rows_per_step % wanted:
        raise Rejected(
            "num_workers", f"{wanted} workers cannot share {rows_per_step} rows per step", field="num_workers"
        )
    cores = len(os.sched_getaffinity(0))
    return wanted or max(
        n for n in range(1, rows_per_step + 1) if rows_per_step % n == 0 and n <= max(1, cores)
    )


def opened_manifest(ground: Ground, manifest_id: bytes) -> Manifest:
    """A sealed manifest of a Datanet that its owner has opened to training.

    Raises:
        Rejected: ``not_found``; 403 ``datanet_closed``.
    """
    manifest = Manifest.from_canonical(get_content(ground.storage, "manifests", manifest_id.hex()))
    with reading(ground.engine) as session:
        row = session.get(DatanetRow, manifest.datanet)
        if row is None or not row.is_open:
            raise Rejected(
                "datanet_closed",
                f"{manifest.datanet} is not open to training",
                field="manifest_ids",
                http_status=403,
            )
    return manifest


def _train(
    ground: Ground, spec: FinetuneSpec, training: TrainingSpec, manifests: list[Manifest], base_path: Path
) -> bytes:
    started = time.monotonic()
    asker = ChatAsker(load_tokenizer(base_path))
    config = training.config
    planned = plan_of(manifests, asker, config, training.seed)
    write_beginning(ground.storage, training, planned)
    kept = recorded_steps(ground.storage, training.trajectory)
    num_examples = sum(len(row.spans) for row in planned.rows)
    print(f"{num_examples} examples in {len(planned.rows)} rows, {len(planned.steps)} steps", flush=True)
    if kept:
        print(f"resumed after step {kept[-1]} of {training.trajectory}", flush=True)
    task = Task(ground.settings, training, planned, spec.threads_per_worker, _deepspeed(spec, training))
    with _printed(ground.storage, training.trajectory, len(planned.steps)):
        _run_workers(task, spec)
    trained = {
        n: s.value for n, s in read_state(ground.storage, training.trajectory, len(planned.steps)).items()
    }
    adapter_id = store_adapter(ground.storage, pack(adapter_weights(training.base_id, trained, config)))
    write_done(ground.storage, training.trajectory, adapter_id, time.monotonic() - started)
    return adapter_id


def _publish(ground: Ground, spec: FinetuneSpec, training: TrainingSpec, adapter_id: bytes) -> Adapter:
    with writing(ground.engine) as session:
        return publish(
            session,
            adapter_id=adapter_id,
            name=spec.name,
            base_id=training.base_id,
            manifest_ids=training.manifest_ids,
            owner_id=bytes.fromhex(spec.owner_id),
            trajectory=training.trajectory,
            price_gwei_per_token=spec.price_gwei_per_token,
            now=int(time.time()),
        )


def _named(adapter: Adapter) -> dict[str, object]:
    return {"adapter": adapter.ref, "adapter_id": adapter.adapter_id.hex()}


def _summary(storage: Storage, trajectory: str) -> dict[str, object]:
    metrics = read_metrics(storage, trajectory)
    seconds = sum(one.seconds for one in metrics)
    return {
        "trajectory": trajectory,
        "steps": len(metrics),
        "first_loss": metrics[0].loss,
        "last_loss": metrics[-1].loss,
        "tokens_per_s": round(sum(one.tokens for one in metrics) / seconds, 1),
        "step_seconds": round(seconds, 1),
    }


def _deepspeed(spec: FinetuneSpec, training: TrainingSpec) -> dict[str, Any]:
    """ZeRO 0, 1 or 2: no ``bf16`` or ``fp16`` section, which would take the factors' fp32 away."""
    try:
        document = json.loads(spec.deepspeed_config.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Rejected(
            "deepspeed_config", f"{spec.deepspeed_config}: {error}", field="deepspeed_config"
        ) from error
    stage = document.get("zero_optimization", {}).get("stage", 0)
    wrong = {"bf16", "fp16", "gradient_clipping", "optimizer", "scheduler"} & set(document)
    if stage not in (0, 1, 2) or wrong:
        raise Rejected(
            "deepspeed_config",
            f"{spec.deepspeed_config}: ZeRO stage {stage} (0 to 2 can be replayed), sections {sorted(wrong)}",
            field="deepspeed_config",
        )
    return {
        **document,
        "gradient_clipping": 0.0,  # left out, DeepSpeed clips at 1: a kink, and not the step that is replayed
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": training.config.rows_per_step // training.num_workers,
    }


@contextmanager
def _printed(storage: Storage, trajectory: str, num_steps: int) -> Iterator[None]:
    """Print every step while the workers work: the loss curve, in the job's log."""
    ended = threading.Event()
    shown = read_metrics(storage, trajectory)[-1:]

    def follow() -> None:
        last = shown[0].step if shown else 0
        is_last = False
        while not is_last:
            is_last = ended.wait(METRICS_EVERY_S)
            for one in read_metrics(storage, trajectory):
                if one.step > last:
                    last = one.step
                    rate = one.tokens / one.seconds
                    print(f"step {one.step}/{num_steps} loss {one.loss:.4f} {rate:.0f} tokens/s", flush=True)

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _run_workers(task: Task, spec: FinetuneSpec) -> None:
    """Ray Train: places the workers, restarts all of them when one dies. Joins the job's cluster, or starts
    one.
    """
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError

    if not ray.is_initialized():
        ray.init(log_to_driver=False)
    is_gpu = ray.cluster_resources().get("GPU", 0) >= task.spec.num_workers
    # Sleeping threads: a step of 188 tokens on two busy cores took 3.7 s with them and 27 s with spinning
    # ones.
    environment = {"TOKENIZERS_PARALLELISM": "false", "OMP_WAIT_POLICY": "PASSIVE"} | (
        {} if is_gpu else {"DS_ACCELERATOR": "cpu"}
    )
    trainer = TorchTrainer(
        work,
        train_loop_config={"task": task},
        torch_config=TorchConfig(backend="nccl" if is_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=task.spec.num_workers,
            use_gpu=is_gpu,
            resources_per_worker={"CPU": _cpus_each(task.spec.num_workers)} | ({"GPU": 1} if is_gpu else {}),
        ),
        run_config=RunConfig(
            name=f"{spec.run_id}-{secrets.token_hex(4)}",  # what Ray would remember, the trajectory knows
            storage_path=str(task.settings.home / "ray-train"),
            failure_config=FailureConfig(max_failures=spec.max_failures),
            worker_runtime_env={"env_vars": environment},
        ),
    )
    try:
        trainer.fit()
    except TrainingFailedError as error:
        raise Unavailable("training_failed", f"{spec.run_id}: {error}"[:1000], retry_after_s=10) from error


def _cpus_each(num_workers: int) -> float:
    """One, or what serving has left free on a small machine: training then waits for nobody and shares."""
    import ray

    free = float(ray.available_resources().get("CPU", 0))
    return min(1.0, int(100 * free / num_workers) / 100)


if __name__ == "__main__":
    from pipelines import finetune as by_name  # Ray cannot send to workers what is of __main__

    sys.exit(main("finetune", by_name.FinetuneSpec, by_name.finetune))
