"""LoRA for rows of many adapters at once, grouped by adapter: three forms of one sum.

``add_lora`` is the obvious form and the oracle of the others. ``add_lora_segments`` suits prompts: tokens
lie together by adapter, one pair of products each. ``add_lora_stacked`` suits decoding, where an adapter has
a row or two: one batched product for all. In no form does a row meet another adapter's weights, so an adapter
full of NaN spoils its own rows only. Sources: arXiv:2106.09685 §4.1, arXiv:2310.18547."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Factors:
    """The update of one fused projection: ``x @ a @ b``, scaling folded into ``b``.

    ``a`` is ``[d_in, rank]``, ``b`` is ``[rank, d_out]``; ``rank`` is the sum over the projections that were
    fused, ``b`` being block-diagonal then."""

    a: Tensor
    b: Tensor

    @property
    def size_bytes(self) -> int:
        return self.a.nbytes + self.b.nbytes


@dataclass(frozen=True, slots=True)
class LoraWeights:
    """An adapter as the runner uses it: per layer, the fused projections it touches."""

    layers: tuple[Mapping[str, Factors], ...]

    @property
    def size_bytes(self) -> int:
        return sum(factors.size_bytes for layer in self.layers for factors in layer.values())


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens ``start`` to ``end`` of the step belong to one adapter."""

    weights: LoraWeights
    start: int
    end: int


def fuse(parts: Sequence[tuple[Factors | None, int]]) -> Factors | None:
    """Updates of projections that are computed as one, side by side; ``None`` leaves its ``d_out`` columns
    alone."""
    present = [factors for factors, _ in parts if factors is not None]
    if not present:
        return None
    a = torch.cat([factors.a for factors in present], dim=1)
    b = torch.zeros(a.shape[1], sum(d_out for _, d_out in parts), dtype=a.dtype, device=a.device)
    row = column = 0
    for factors, d_out in parts:
        if factors is not None:
            rank = factors.b.shape[0]
            b[row : row + rank, column : column + d_out] = factors.b
            row += rank
        column += d_out
    return Factors(a.contiguous(), b)


def add_lora(out: Tensor, x: Tensor, factors: Sequence[Factors | None], slot: Tensor) -> None:
    """Add to each token the update of its own adapter, in place.

    Args:
        out: base projection, ``[tokens, d_out]``.
        x: input of the projection, ``[tokens, d_in]``.
        factors: per slot; ``None`` (as in slot 0) means base model.
        slot: adapter of each token, int64 ``[tokens]``.
    """
    for token, s in enumerate(slot.tolist()):
        update = factors[s]
        if update is not None:
            out[token] += x[token] @ update.a @ update.b


def add_lora_segments(
    out: Tensor, x: Tensor, segments: Sequence[Segment], layer: int, projection: str
) -> None:
    """The same for tokens that lie together by adapter."""
    for segment in segments:
        update = segment.weights.layers[layer].get(projection)
        if update is not None:
            rows = slice(segment.start, segment.end)
            out[rows].addmm_(x[rows] @ update.a, update.b)


@dataclass(frozen=True, slots=True)
class Stack:
    """Adapters of one step, ranks padded to the largest: per layer and projection ``a [n, d_in, rank]``,
    ``b [n, rank, d_out]``."""

    layers: tuple[Mapping[str, Factors], ...]

    @staticmethod
    def of(adapters: Sequence[LoraWeights]) -> "Stack":
        layers = []
        for index in range(len(adapters[0].layers)):
            names = {name for adapter in adapters for name in adapter.layers[index]}
            per_name = {name: [adapter.layers[index].get(name) for adapter in adapters] for name in names}
            layers.append({name: _pad(factors) for name, factors in per_name.items()})
        return Stack(tuple(layers))


def _pad(factors: Sequence[Factors | None]) -> Factors:
    some = [f for f in factors if f is not None]
    rank = max(f.a.shape[1] for f in some)
    a = some[0].a.new_zeros(len(factors), some[0].a.shape[0], rank)
    b = some[0].b.new_zeros(len(factors), rank, some[0].b.shape[1])
    for index, f in enumerate(factors):
        if f is not None:
            a[index, :, : f.a.shape[1]] = f.a
            b[index, : f.b.shape[0]] = f.b
    return Factors(a, b)


@dataclass(frozen=True, slots=True)
class StackedRows:
    """Which rows each adapter of a stack has. ``gather`` is ``[n, most]``, padded with any row; ``rows`` and
    ``places`` pair each real row with its place in the flattened gather."""

    stack: Stack
    gather: Tensor
    rows: Tensor
    places: Tensor

    @staticmethod
    def of(stack: Stack, rows_by_adapter: Sequence[Sequence[int]]) -> "StackedRows":
        most = max(len(rows) for rows in rows_by_adapter)
        padded = [[*rows, *[rows[0]] * (most - len(rows))] for rows in rows_by_adapter]
        places = [i * most + j for i, rows in enumerate(rows_by_adapter) for j in range(len(rows))]
        real = [row for rows in rows_by_adapter for row in rows]
        device = next(factors.a.device for layer in stack.layers for factors in layer.values())
        gather, rows, targets = (torch.tensor(index, device=device) for index in (padded, real, places))
        return StackedRows(stack, gather, rows, targets)


def add_lora_stacked(out: Tensor, x: Tensor, stacked: StackedRows, layer: int, projection: str) -> None:
    """The same for few rows of many adapters."""
    update = stacked.stack.layers[layer].get(projection)
    if update is not None:
        y = torch.bmm(torch.bmm(x[stacked.gather], update.a), update.b)
        out.index_add_(0, stacked.rows, y.flatten(0, 1)[stacked.places])
