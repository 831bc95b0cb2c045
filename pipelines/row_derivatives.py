"""What a replay asks of the model: the gradient of some packed rows, and how that gradient turns.

Rows are those of a ``Course``: the training's own, with weight 1 and after them rows of records that were
never trained on, with weight 0. The first derivative is computed by the very functions of the training, in
its own attention, so that a replayed state can have the training's bits; the second one needs attention that
can be differentiated twice and is the same number but for rounding.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers.modeling_utils import PreTrainedModel

from attribution.errors import Rejected
from cluster.config import Settings
from cluster.models import base_model, load_base
from pipelines.course import Course
from pipelines.training import (
    LowerCache,
    RowTensors,
    insert_lora,
    losses,
    lower,
    row_tensors,
    step_loss,
)
from pipelines.trajectory import TrainingSpec

KEPT_BYTES = 2**30  # of what the frozen blocks returned


@dataclass(frozen=True, slots=True)
class Pulled:
    """A direction in the space of a gradient, seen from what the gradient depends on.

    ``values`` is the derivative of ``gradient . direction`` by the parameters, ``[parameters]``; ``weights``
    has, for each row, its derivative by the weight of each span."""

    values: Tensor
    weights: Mapping[int, tuple[float, ...]]


class Workers(Protocol):
    """Whoever computes a step's rows: this process, or many. ``values`` and ``direction`` are flat, as
    ``attribution.gradients.gradient_order`` has them; an answer a share, in the order of the shares."""

    def gradients(self, values: Tensor, shares: Sequence[Sequence[int]]) -> list[Tensor]: ...

    def pull_back(
        self, values: Tensor, direction: Tensor, shares: Sequence[Sequence[int]]
    ) -> list[Pulled]: ...


class RowWorker:
    """One process with the model. It remembers nothing between calls but what the frozen blocks made of each
    row."""

    def __init__(self, model: PreTrainedModel, course: Course) -> None:
        self._model = model
        self._course = course
        self._device = str(model.device)
        self._dtype = getattr(torch, course.config.compute_dtype)
        self._first = len(model.model.layers) - course.config.adapted_blocks
        trained = insert_lora(model, course.config, seed=0)
        modules = sorted({name.rpartition(".")[0] for name in trained})
        self._parameters = [trained[f"{module}.{factor}"] for module in modules for factor in ("a", "b")]
        self._lower = LowerCache(lambda index: lower(model, self._first, self._row(index)), KEPT_BYTES)

    def gradient(self, values: Tensor, rows: Sequence[int]) -> Tensor:
        """Of the rows' part of a step's loss, all weights being 1: ``[parameters]``."""
        self._set(values)
        self._model.set_attn_implementation(self._course.config.attention)
        total = torch.zeros_like(values, device=self._device)
        for index in rows:
            loss, _ = self._loss(index)
            total += _flat(torch.autograd.grad(loss, self._parameters))
        return total.to(values.device)

    def pull_back(self, values: Tensor, direction: Tensor, rows: Sequence[int]) -> Pulled:
        """Rows of controls turn no gradient, having no weight, but the gradient turns with their weights."""
        self._set(values)
        self._model.set_attn_implementation("eager")
        along = _split(direction.to(self._device), self._parameters)
        total = torch.zeros_like(values, device=self._device)
        weights: dict[int, tuple[float, ...]] = {}
        for index in rows:
            loss, weight = self._loss(index)
            gradient = torch.autograd.grad(loss, self._parameters, create_graph=True)
            slope = torch.stack([(g * d).sum() for g, d in zip(gradient, along, strict=True)]).sum()
            is_trained = index < self._course.num_trained
            turned, by_weight = _second(slope, self._parameters if is_trained else [], weight)
            weights[index] = tuple(by_weight.tolist())
            if is_trained:
                total += turned
        return Pulled(total.to(values.device), weights)

    def _loss(self, index: int) -> tuple[Tensor, Tensor]:
        row = self._row(index)
        weights = torch.ones(row.num_spans, device=self._device, requires_grad=True)
        of_spans = losses(self._model, self._first, self._lower(index), row)
        return step_loss(of_spans, weights, self._course.normaliser), weights

    def _row(self, index: int) -> RowTensors:
        return row_tensors(self._course.rows[index], self._dtype, self._device)

    @torch.no_grad()
    def _set(self, values: Tensor) -> None:
        for parameter, value in zip(self._parameters, _split(values, self._parameters), strict=True):
            parameter.copy_(value)


class ThisProcess:
    """``Workers`` of one process: a plain loop."""

    def __init__(self, worker: RowWorker) -> None:
        self._worker = worker

    def gradients(self, values: Tensor, shares: Sequence[Sequence[int]]) -> list[Tensor]:
        return [self._worker.gradient(values, rows) for rows in shares]

    def pull_back(self, values: Tensor, direction: Tensor, shares: Sequence[Sequence[int]]) -> list[Pulled]:
        return [self._worker.pull_back(values, direction, rows) for rows in shares]


def open_worker(settings: Settings, base_id: bytes, course: Course, threads: int) -> RowWorker:
    """The model that was trained, in the type it was trained in.

    Raises:
        Rejected: ``wrong_base``.
    """
    torch.set_num_threads(threads)
    base = base_model(settings)
    if base.base_id != base_id:
        raise Rejected(
            "wrong_base", f"the training is over base {base_id.hex()}, configured is {base.base_id.hex()}"
        )
    config = course.config
    model = load_base(base.path, getattr(torch, config.compute_dtype), config.attention)
    return RowWorker(model.to("cuda" if torch.cuda.is_available() else "cpu"), course)


def open_here(settings: Settings, training: TrainingSpec, course: Course) -> ThisProcess:
    """Workers without a cluster."""
    return ThisProcess(open_worker(settings, training.base_id, course, threads_of(course)))


def threads_of(course: Course) -> int:
    """What a worker of the training had on a machine like this one: with as many, sums have the same bits."""
    return max(1, (os.cpu_count() or 1) // course.num_workers)


def _second(slope: Tensor, parameters: Sequence[nn.Parameter], weight: Tensor) -> tuple[Tensor, Tensor]:
    """Derivatives of a slope: flat by the parameters, and by the weights."""
    *by_value, by_weight = torch.autograd.grad(slope, [*parameters, weight], materialize_grads=True)
    return (_flat(by_value) if by_value else torch.empty(0)), by_weight


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def _split(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    parts = flat.split([tensor.numel() for tensor in like])
    return [part.view_as(tensor) for part, tensor in zip(parts, like, strict=True)]
