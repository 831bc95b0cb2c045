"""Trainings of the tiny base, recorded as the job records them but in a plain loop, and with any weights."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from attribution.types import Manifest
from cluster.models import base_id, load_base, load_tokenizer
from cluster.storage import Storage
from pipelines.course import ChatAsker, Course, plan_of, recorded_course
from pipelines.row_derivatives import Pulled, RowWorker, ThisProcess, Workers
from pipelines.training import (
    Adam,
    AdamState,
    TrainingConfig,
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
    write_beginning,
    write_metrics,
    write_state,
)

CONFIG = TrainingConfig(
    rank=4, alpha=8, adapted_blocks=2, row_tokens=160, rows_per_step=2, epochs=3, learning_rate=5e-3
)


def record_training(
    storage: Storage, base: Path, manifest: Manifest, *, num_workers: int = 1, seconds: float = 0.1
) -> TrainingSpec:
    """Train and leave a trajectory in storage, whole but for what it made. Every step is said to have taken
    so many seconds."""
    spec = TrainingSpec(base_id(base), (manifest.manifest_id,), CONFIG, 0, num_workers)
    plan = plan_of([manifest], ChatAsker(load_tokenizer(base)), CONFIG, spec.seed)
    write_beginning(storage, spec, plan)
    course = Course(
        CONFIG, plan.rows, len(plan.rows), plan.steps, ((),) * len(plan.steps), plan.normaliser, num_workers
    )
    states = train(base, course, {})
    for step in kept_steps(len(plan.steps)):
        write_state(storage, spec.trajectory, step, states[step])
    metrics = [Metric(step + 1, 1.0, 1e-3, 100, seconds) for step in range(len(plan.steps))]
    write_metrics(storage, spec.trajectory, metrics)
    return spec


def course_of(storage: Storage, base: Path, spec: TrainingSpec, manifest: Manifest) -> Course:
    return recorded_course(storage, spec, [manifest], ChatAsker(load_tokenizer(base)))


def this_process(base: Path, course: Course) -> ThisProcess:
    return ThisProcess(RowWorker(load_base(base, torch.float32, course.config.attention), course))


class Dying:
    """Workers that are killed at the n-th gradient they are asked for."""

    def __init__(self, workers: Workers, calls: int) -> None:
        self._workers, self.left = workers, calls

    def gradients(self, values: Tensor, shares: Sequence[Sequence[int]]) -> list[Tensor]:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return self._workers.gradients(values, shares)

    def pull_back(self, values: Tensor, direction: Tensor, shares: Sequence[Sequence[int]]) -> list[Pulled]:
        return self._workers.pull_back(values, direction, shares)


def train(base: Path, course: Course, weights: Mapping[bytes, float]) -> list[Mapping[str, AdamState]]:
    """States from the beginning on. Records weigh what ``weights`` says, else 1, or 0 if they are
    controls."""
    model = load_base(base, torch.float32, course.config.attention)
    first = len(model.model.layers) - course.config.adapted_blocks
    trained = insert_lora(model, course.config, seed=0)
    optimizer = Adam(trained.values(), course.config)
    optimizer.prepare_moments()

    def add_gradient(rows: Sequence[int]) -> list[Tensor]:
        total = [torch.zeros_like(parameter) for parameter in trained.values()]
        for index in rows:
            packed, default = course.rows[index], 1.0 if index < course.num_trained else 0.0
            row = row_tensors(packed, torch.float32)
            weight = torch.tensor([weights.get(span.record_id, default) for span in packed.spans])
            if weight.any():
                of_spans = losses(model, first, lower(model, first, row), row)
                loss = step_loss(of_spans, weight, course.normaliser)
                for sum_, part in zip(total, torch.autograd.grad(loss, list(trained.values())), strict=True):
                    sum_ += part
        return total

    states = [_state(trained, optimizer)]
    for number, (rows, controls) in enumerate(zip(course.steps, course.control_steps, strict=True), 1):
        shares = [share(rows, rank, course.num_workers) for rank in range(course.num_workers)]
        parts = [add_gradient(one) for one in (*shares, controls)]
        for parameter, *gradients in zip(trained.values(), *parts, strict=True):
            parameter.grad = sum(gradients[1:], start=gradients[0])
        optimizer.prepare_step(number, learning_rate(course.config, number, len(course.steps)))
        optimizer.step()
        states.append(_state(trained, optimizer))
    return states


def _state(trained: Mapping[str, torch.nn.Parameter], optimizer: Adam) -> Mapping[str, AdamState]:
    return {
        name: AdamState(
            parameter.detach().clone(),
            optimizer.state[parameter]["exp_avg"].clone(),
            optimizer.state[parameter]["exp_avg_sq"].clone(),
        )
        for name, parameter in trained.items()
    }
