"""A recorded training as a replay follows it: its rows and steps, made again from the manifests and compared
with the order on record, and beside them the rows of controls, which it never saw.

A control gets what a trained record got: as many wordings, drawn in the same way, packed into rows, and in
every epoch one step, drawn by a hash of the seed. It stands there at weight zero, so it changes nothing; what
it would change at a little more is the yardstick for those that were trained on."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from attribution.types import Manifest
from cluster.models import ask
from cluster.storage import Storage
from pipelines.packing import (
    Asker,
    Example,
    PackedRow,
    Plan,
    control_examples,
    examples,
    order_lot,
    pack,
    plan,
)
from pipelines.training import AdamState, TrainingConfig
from pipelines.trajectory import TrainingSpec, check_order, read_state

MAX_CONTROLS = 24  # of each manifest, the first by id; each costs the replay about a training record's time


@dataclass(frozen=True, slots=True)
class Course:
    """The first ``num_trained`` rows stand in ``steps``, the others, at weight zero, in ``control_steps``,
    which has as many entries."""

    config: TrainingConfig
    rows: tuple[PackedRow, ...]
    num_trained: int
    steps: tuple[tuple[int, ...], ...]
    control_steps: tuple[tuple[int, ...], ...]
    normaliser: int
    num_workers: int  # of the training: its sums were added in that many parts


@dataclass(frozen=True, slots=True)
class ChatAsker:
    """Examples as the model will be asked: its own chat template and end token."""

    tokenizer: PreTrainedTokenizerBase

    def prompt(self, question: str) -> list[int]:
        return ask(self.tokenizer, question)

    def answer(self, text: str) -> list[int]:
        return [*self.tokenizer.encode(text, add_special_tokens=False), self.tokenizer.eos_token_id]


def plan_of(manifests: Sequence[Manifest], asker: Asker, config: TrainingConfig, seed: int) -> Plan:
    """All of a training's input: what it follows, and what a replay finds again."""
    given = [
        example
        for manifest in manifests
        for example in examples(manifest, asker, config.wordings_per_record, seed)
    ]
    return plan(
        given,
        row_tokens=config.row_tokens,
        rows_per_step=config.rows_per_step,
        epochs=config.epochs,
        seed=seed,
    )


def recorded_course(
    storage: Storage, training: TrainingSpec, manifests: Sequence[Manifest], asker: Asker
) -> Course:
    """``Corrupted`` if these manifests do not make the order that the trajectory has on record."""
    planned = plan_of(manifests, asker, training.config, training.seed)
    check_order(storage, training, planned)
    controls = [
        example
        for manifest in manifests
        for example in control_examples(
            manifest, asker, training.config.wordings_per_record, training.seed, MAX_CONTROLS
        )
    ]
    return with_controls(planned, controls, training)


def with_controls(planned: Plan, controls: Sequence[Example], training: TrainingSpec) -> Course:
    """Controls of which a wording would not fit into a row are left out."""
    config = training.config
    long = {one.record_id for one in controls if len(one.prompt) + len(one.answer) > config.row_tokens}
    fitting = [one for one in controls if one.record_id not in long]
    rows = pack(fitting, row_tokens=config.row_tokens, rows_per_step=1, seed=training.seed) if fitting else ()
    return Course(
        config,
        (*planned.rows, *rows),
        len(planned.rows),
        planned.steps,
        _control_steps(planned, len(rows), config.epochs, training.seed),
        planned.normaliser,
        training.num_workers,
    )


def _control_steps(planned: Plan, num_rows: int, epochs: int, seed: int) -> tuple[tuple[int, ...], ...]:
    """The control rows of each step: every row once in every epoch."""
    at: list[list[int]] = [[] for _ in planned.steps]
    per_epoch = len(planned.steps) // epochs
    for epoch in range(epochs):
        for row in range(num_rows):
            drawn = int.from_bytes(order_lot(seed, "control", epoch, row)[:8], "big") % per_epoch
            at[epoch * per_epoch + drawn].append(len(planned.rows) + row)
    return tuple(map(tuple, at))


def flat_state(storage: Storage, trajectory: str, step: int) -> AdamState:
    """A kept state in the order of ``attribution.gradients.gradient_order``, each field one fp32 vector."""
    state = read_state(storage, trajectory, step)
    modules = sorted({name.rpartition(".")[0] for name in state})
    names = [f"{module}.{factor}" for module in modules for factor in ("a", "b")]

    def flat(field: str) -> Tensor:
        return torch.cat([getattr(state[name], field).reshape(-1) for name in names])

    return AdamState(flat("value"), flat("exp_avg"), flat("exp_avg_sq"))
