"""What the engine asks of who computes: ``ModelRunner`` in torch, ``NativeRunner`` by our own kernels."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from cluster.adapters import Factors
from serve_apps.engine.decoder import Shape
from serve_apps.engine.scheduler import StepPlan


@dataclass(frozen=True, slots=True)
class Outputs:
    """Of the rows that sample, in the order of the plan."""

    hidden: Tensor  # [rows, width], after the last norm
    logits: Tensor  # [rows, vocabulary]
    highest: Tensor  # [rows], the greatest logit; NaN where any is
    best: Tensor  # [rows], its token

    @classmethod
    def of(cls, hidden: Tensor, logits: Tensor) -> "Outputs":
        """By torch."""
        highest, best = logits.max(dim=-1)
        return cls(hidden, logits, highest, best)


class FittedAdapter(Protocol):
    """An adapter as one kind of runner reads it; the engine only carries it."""

    @property
    def size_bytes(self) -> int: ...


class Runner(Protocol):
    @property
    def shape(self) -> Shape: ...

    @property
    def num_blocks(self) -> int: ...

    def fit(self, factors: Mapping[str, Factors]) -> FittedAdapter:
        """Called on a thread of the adapter cache, with factors whose values nobody has looked at.

        Raises:
            Rejected: ``adapter_values``, where one is not finite.
        """

    def run(self, plan: StepPlan, adapters: Mapping[bytes, Any]) -> Outputs:
        """Compute every row of ``plan``."""
