"""Deterministic mode for runners whose sums depend on the shape of the batch: each token in its own step.

What is computed for a token then depends on its position, its past and its adapter, never on who shares the
step, how its prompt was cut or what was found in the cache. It costs a pass over the weights per token; our
own kernels give the same promise at full speed and are not wrapped."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from cluster.adapters import Factors
from serve_apps.engine.decoder import Shape
from serve_apps.engine.runner import FittedAdapter, Outputs, Runner
from serve_apps.engine.scheduler import Row, StepPlan


@dataclass(frozen=True, slots=True)
class OneByOne:
    """A ``Runner`` around another one."""

    runner: Runner

    @property
    def shape(self) -> Shape:
        return self.runner.shape

    @property
    def num_blocks(self) -> int:
        return self.runner.num_blocks

    def fit(self, factors: Mapping[str, Factors]) -> FittedAdapter:
        return self.runner.fit(factors)

    def run(self, plan: StepPlan, adapters: Mapping[bytes, Any]) -> Outputs:
        """In order of position: a row may begin after blocks that another one of the step fills."""
        tokens = sorted((token for row in plan.rows for token in _tokens(row)), key=lambda token: token.start)
        found = {token: self.runner.run(StepPlan((token,)), adapters) for token in tokens}
        of_row = {token.request_id: outputs for token, outputs in found.items() if token.samples}
        # Where no row samples, any token's outputs are the empty ones.
        wanted = [of_row[row.request_id] for row in plan.rows if row.samples] or [*found.values()]
        return Outputs.of(
            torch.cat([outputs.hidden for outputs in wanted]),
            torch.cat([outputs.logits for outputs in wanted]),
        )


def _tokens(row: Row) -> list[Row]:
    last = len(row.token_ids) - 1
    return [
        replace(
            row,
            token_ids=(token_id,),
            start=row.start + index,
            new_blocks=() if index else row.new_blocks,
            samples=row.samples and index == last,
        )
        for index, token_id in enumerate(row.token_ids)
    ]
