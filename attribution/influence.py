"""What each record did to a period's answers: a damped-Fisher influence, averaged over checkpoints.

The influence of record ``t`` on an answer with gradient ``q`` is ``q^T (F + lambda)^-1 g_t``: how much less
loss the answer would have after a little more weight on the record, with directions that all records share
(the Fisher matrix ``F``) discounted. ``F`` has far more columns than there are records, so the inverse is
taken in dual form over the records' Gram matrix ``K = G G^T``, exactly. Everything is linear in ``q``: one
preconditioned feature per record, quantised once, serves every answer and every period, and the credit of a
sum of answers is the sum of their credits. From the integer query sum on, nothing is a float.

Source: Koh and Liang arXiv:1703.04730; dual form and checkpoint averaging as measured for this project
(damping matters: it is recorded with the index)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from attribution.errors import Corrupted
from attribution.fixed_point import add_weighted, to_fixed_point
from attribution.gradients import Example, Lora, answer_gradients, batches, num_parameters
from attribution.sketch import Sketch, exact_dots

FEATURE_BITS = 14  # features are at most of unit length: int16 multiples of 2^-14


MAX_BATCH_TOKENS = 256  # measured on two cores: a quarter less time than 768, which leaves the caches


def sketched_gradients(model: nn.Module, lora: Lora, examples: Sequence[Example], sketch: Sketch) -> Tensor:
    """Each example's gradient, sketched, in the order given: ``[examples, size]``. Batched by length, so for
    features only; money takes its answers one at a time."""
    rows = torch.empty(len(examples), sketch.size)
    for batch in batches(examples, MAX_BATCH_TOKENS):
        rows[batch] = sketch.floats(answer_gradients(model, lora, [examples[i] for i in batch]))
    return rows


def weighted_query_sum(
    model: nn.Module, loras: Sequence[Lora], weighted: Sequence[tuple[Example, int]], bits: int
) -> Tensor:
    """Integer sum of the directions of answers, each times its fee in gwei: int64 ``[snapshots *
    parameters]``.

    One answer at a time, so that no answer's rounding depends on which others were paid for."""
    total = torch.zeros(num_entries(loras), dtype=torch.int64)
    for example, fee_gwei in weighted:
        add_weighted(total, to_fixed_point(direction(model, loras, example), bits), fee_gwei)
    return total


def direction(model: nn.Module, loras: Sequence[Lora], example: Example) -> Tensor:
    """An answer's gradients at all snapshots, each scaled to unit length, one after the other: one vector,
    whose dot product with a record's is the sum over snapshots."""
    return torch.cat([unit_rows(answer_gradients(model, lora, [example]))[0] for lora in loras])


def num_entries(loras: Sequence[Lora]) -> int:
    return sum(num_parameters(lora) for lora in loras)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Gradients at one checkpoint: ``trained [records, size]`` and ``controls [records, size]``, float32.

    A record's row is the mean over the wordings that it was asked in."""

    trained: Tensor
    controls: Tensor


def preconditioned(snapshot: Snapshot, damping: float) -> Tensor:
    """``lambda (F + lambda)^-1 g`` for every trained record, then for every control, at one checkpoint.

    Rows are scaled to unit length first, so a loud record is not worth more than a quiet one and trained
    and never-trained records are comparable; ``lambda = damping`` in units of a row's squared length. In dual
    form, trained rows are ``lambda (K + lambda)^-1 G``. A control is scored as if it had been trained on,
    each on its own, or the null would be louder than what it is compared with: with
    ``n = c - c G^T (K + lambda)^-1 G``, Sherman and Morrison give ``n / (1 + n c / lambda)``."""
    trained, controls = unit_rows(snapshot.trained), unit_rows(snapshot.controls)
    gram = (trained @ trained.T).double()
    damped = gram + damping * torch.eye(len(gram), dtype=torch.float64)
    own = damping * torch.linalg.solve(damped, trained.double())
    cross = (controls @ trained.T).double()
    null = controls.double() - torch.linalg.solve(damped, cross.T).T @ trained.double()
    alike = null / (1 + (null * controls.double()).sum(dim=1, keepdim=True) / damping)
    return torch.cat([own, alike]).float()


def averaged_features(snapshots: Sequence[Snapshot], damping: float) -> NDArray[np.int16]:
    """Preconditioned rows of every snapshot, sketched each by its own part, averaged and quantised: int16
    ``[trained + controls, size]``."""
    assert snapshots and damping > 0
    return quantised(torch.stack([preconditioned(one, damping) for one in snapshots]).mean(dim=0))


def quantised(rows: Tensor) -> NDArray[np.int16]:
    """Rows of at most unit length to int16 multiples of ``2**-FEATURE_BITS``."""
    if not bool(torch.isfinite(rows).all()):
        raise Corrupted(
            "feature_not_finite", f"{int((~torch.isfinite(rows)).sum())} feature entries are not finite"
        )
    features: NDArray[np.int16] = (rows.double() * 2**FEATURE_BITS).round().to(torch.int16).numpy()
    return features


def unit_rows(rows: Tensor) -> Tensor:
    """Each row divided by its length; a zero row stays zero."""
    return rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp_min(1e-30)


def float_scores(query: Tensor, features: NDArray[np.int16]) -> NDArray[np.float64]:
    """Scores of one sketched unit query ``[size]``, for evidence: not for money."""
    return features.astype(np.float64) @ query.double().numpy() / 2**FEATURE_BITS


def integer_credits(sketch: Sketch, total: Tensor, features: NDArray[np.int16]) -> list[int]:
    """Signed credit of every row for a weighted query sum: exact, then divided by ``2**FEATURE_BITS``.

    The unit is that of the sum: gwei times ``2**-bits``. Bounded by the fees' total as the sum itself is."""
    credits_ = [dot >> FEATURE_BITS for dot in exact_dots(sketch, total, features)]
    for row, value in enumerate(credits_):
        if not -(2**63) <= value < 2**63:
            raise Corrupted("credit_overflow", f"row {row} earns {value}, beyond 64 bits")
    return credits_
