"""One worker of a fine-tuning: DeepSpeed ZeRO around the mathematics of ``pipelines/training.py``.

Ray Train calls ``work`` in every worker, again in all of them after one has died. State comes from and goes
to the trajectory, whole: a kept step does not say how many workers made it."""

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import PreTrainedModel

from cluster.config import Settings
from cluster.models import base_model, load_base
from cluster.storage import Storage, open_storage
from pipelines.packing import Plan
from pipelines.training import (
    Adam,
    AdamState,
    LowerCache,
    RowTensors,
    insert_lora,
    learning_rate,
    losses,
    lower,
    row_tensors,
    share,
    step_loss,
)
from pipelines.trajectory import (
    Metric,
    TrainingSpec,
    kept_steps,
    read_metrics,
    read_state,
    recorded_steps,
    write_metrics,
    write_state,
)

KEPT_BYTES = 2**30  # of what the frozen blocks returned
METRICS_EVERY_S = 1.0


@dataclass(frozen=True, slots=True)
class Task:
    """What every worker is told. ``threads`` 0: what the machine has, divided among its workers."""

    settings: Settings
    spec: TrainingSpec
    plan: Plan
    threads: int
    deepspeed: Mapping[str, Any]


class Upper(nn.Module):
    """What DeepSpeed wraps: from the first adapted block to the loss of each example."""

    def __init__(self, model: PreTrainedModel, first_adapted: int) -> None:
        super().__init__()
        self.model = model
        self.first_adapted = first_adapted

    def forward(self, hidden: Tensor, row: RowTensors) -> Tensor:
        return losses(self.model, self.first_adapted, hidden, row)


@dataclass(frozen=True, slots=True)
class Worker:
    """One of ``world_size``, at work on its share of every step."""

    task: Task
    rank: int
    world_size: int
    device: str
    dtype: torch.dtype
    engine: Any
    optimizer: Adam
    trained: Mapping[str, nn.Parameter]
    lower: LowerCache

    def step(self, step: int) -> float:
        """Train on one step's rows, ours among them; the loss of all of it."""
        plan = self.task.plan
        self.optimizer.prepare_step(step, learning_rate(self.task.spec.config, step, len(plan.steps)))
        total = torch.zeros((), device=self.device)
        for index in share(plan.steps[step - 1], self.rank, self.world_size):
            row = row_tensors(plan.rows[index], self.dtype, self.device)
            weights = torch.ones(row.num_spans, device=self.device)
            loss = step_loss(self.engine(self.lower(index), row), weights, plan.normaliser)
            total += loss.detach()
            # DeepSpeed averages over workers; the step is a sum over rows, wherever they are.
            self.engine.backward(loss * self.world_size, scale_wrt_gas=False)
            self.engine.step()
        if self.world_size > 1:
            torch.distributed.all_reduce(total)
        return float(total)

    def state(self) -> dict[str, AdamState]:
        """The whole state, gathered from all workers; all must call it."""
        return {name: self._whole(parameter) for name, parameter in self.trained.items()}

    def _whole(self, parameter: nn.Parameter) -> AdamState:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if self.engine.zero_optimization_stage() == 0:
            moments = self.optimizer.state[parameter]
            return AdamState(parameter.detach().cpu(), moments["exp_avg"].cpu(), moments["exp_avg_sq"].cpu())
        return AdamState(
            safe_get_full_fp32_param(parameter).cpu(),
            safe_get_full_optimizer_state(parameter, "exp_avg").cpu(),
            safe_get_full_optimizer_state(parameter, "exp_avg_sq").cpu(),
        )


def work(given: Mapping[str, Any]) -> None:
    """One worker's training, from the last kept step to the end."""
    import ray.train

    task: Task = given["task"]
    context = ray.train.get_context()
    threads = task.threads or max(1, (os.cpu_count() or 1) // context.get_local_world_size())
    torch.set_num_threads(threads)
    storage = open_storage(task.settings.storage_url, s3_endpoint=task.settings.s3_endpoint)
    kept = recorded_steps(storage, task.spec.trajectory)
    before = read_state(storage, task.spec.trajectory, kept[-1]) if kept else {}
    device = str(ray.train.torch.get_device())
    worker = _begin(task, context.get_world_rank(), context.get_world_size(), device, before)
    if not kept:
        _keep(storage, worker, 0)
    _run(storage, worker, start=kept[-1] if kept else 0)


def _begin(task: Task, rank: int, world_size: int, device: str, before: Mapping[str, AdamState]) -> Worker:
    """Base, factors and moments as they are before the next step, in DeepSpeed's hands."""
    import deepspeed

    # Its communication back end would compile a shared-memory op with g++ for minutes; gloo does without.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    config = task.spec.config
    dtype = getattr(torch, config.compute_dtype)
    base = base_model(task.settings)
    assert base.base_id == task.spec.base_id, "workers and driver read one base"
    model = load_base(base.path, dtype, config.attention).to(device)
    first_adapted = len(model.model.layers) - config.adapted_blocks
    trained = insert_lora(model, config, task.spec.seed)
    for name, state in before.items():
        trained[name].data.copy_(state.value)
    optimizer = Adam(trained.values(), config)
    engine, *_ = deepspeed.initialize(
        model=Upper(model, first_adapted),
        model_parameters=list(trained.values()),
        optimizer=optimizer,
        config=dict(task.deepspeed),
        dist_init_required=False,
    )
    _set_moments(engine, optimizer, trained, before)
    rows = task.plan.rows
    kept = LowerCache(lambda i: lower(model, first_adapted, row_tensors(rows[i], dtype, device)), KEPT_BYTES)
    return Worker(task, rank, world_size, device, dtype, engine, optimizer, trained, kept)


def _set_moments(
    engine: Any, optimizer: Adam, trained: Mapping[str, nn.Parameter], before: Mapping[str, AdamState]
) -> None:
    """Zero moments, or those of a kept step, wherever ZeRO keeps its part of them."""
    from deepspeed.utils import safe_set_full_optimizer_state

    optimizer.prepare_moments()
    is_sharded = engine.zero_optimization_stage() > 0
    if is_sharded:  # ZeRO links moments to parameters after the first step; we read and write them before it
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    for name, state in before.items():
        for key, value in (("exp_avg", state.exp_avg), ("exp_avg_sq", state.exp_avg_sq)):
            if is_sharded:
                safe_set_full_optimizer_state(trained[name], value.to(trained[name].device), key)
            else:
                optimizer.state[trained[name]][key].copy_(value)


def _run(storage: Storage, worker: Worker, start: int) -> None:
    """Every step after ``start``; states and metrics as they come."""
    plan, trajectory = worker.task.plan, worker.task.spec.trajectory
    num_steps = len(plan.steps)
    metrics = [one for one in read_metrics(storage, trajectory) if one.step <= start]
    written = time.monotonic()
    for step in range(start + 1, num_steps + 1):
        begun = time.monotonic()
        loss = worker.step(step)
        tokens = sum(len(plan.rows[index].ids) for index in plan.steps[step - 1])
        rate = learning_rate(worker.task.spec.config, step, num_steps)
        metrics.append(Metric(step, loss, rate, tokens, time.monotonic() - begun))
        is_kept = step in kept_steps(num_steps)
        if worker.rank == 0 and (is_kept or time.monotonic() - written > METRICS_EVERY_S):
            write_metrics(storage, trajectory, metrics)
            written = time.monotonic()
        if is_kept:
            _keep(storage, worker, step)


def _keep(storage: Storage, worker: Worker, step: int) -> None:
    """Every worker takes part in gathering the state, the first one writes it."""
    state = worker.state()
    if worker.rank == 0:
        write_state(storage, worker.task.spec.trajectory, step, state)
