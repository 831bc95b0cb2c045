"""Runs one step of the plan: embeds, attends over the paged cache, and gives the logits of the rows that
sample.

All tokens of a step go through the projections together; attention is one batched product for the rows of one
token and one call per row of a longer chunk. Nothing a row reads was written by another request: fresh blocks
are cleared, and keys beyond a row's end are masked out."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from attribution.types import ZERO_ID
from cluster import adapters as adapter_files
from serve_apps.engine.families import Decoder, Shape, part_sizes
from serve_apps.engine.kv_cache import NULL_BLOCK, slots
from serve_apps.engine.lora import (
    Factors,
    LoraWeights,
    Segment,
    Stack,
    StackedRows,
    add_lora_segments,
    add_lora_stacked,
    fuse,
)
from serve_apps.engine.runner import Outputs
from serve_apps.engine.scheduler import Row, StepPlan

# Measured on two AVX-512 cores: below four adapters a loop of small products beats the batched one, beyond
# sixteen the padded copies of the factors outgrow the cache.
STACK_ADAPTERS = range(4, 17)


@dataclass(frozen=True, slots=True)
class _Chunk:
    """A row of several tokens: its place in the step and its keys in the cache."""

    tokens: slice
    start: int
    end: int
    blocks: Tensor


@dataclass(frozen=True, slots=True)
class _Step:
    """The plan as tensors. Rows of one token come first: ``num_single`` of them, their tables padded with the
    null block to ``[num_single, most]``."""

    token_ids: Tensor
    cos: Tensor  # [tokens, 1, head_dim]
    sin: Tensor
    slots: Tensor
    sampled: Tensor
    num_single: int
    tables: Tensor
    is_beyond: Tensor  # [num_single, 1, most * block_size]: keys that are not the row's
    chunks: tuple[_Chunk, ...]
    segments: tuple[Segment, ...]
    stacked: StackedRows | None


@dataclass(slots=True, eq=False)
class ModelRunner:
    """Holds the weights and the cache tensors. One thread at a time may call it."""

    model: Decoder
    num_blocks: int
    block_size: int
    _keys: Tensor = field(init=False)  # [layers, kv_heads, num_blocks, block_size, head_dim]
    _values: Tensor = field(init=False)
    _rotary: tuple[Tensor, Tensor] = field(init=False)
    _stack: tuple[tuple[bytes, ...], Stack] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        shape, model = self.model.shape, self.model
        size = (shape.num_layers, shape.num_kv_heads, self.num_blocks, self.block_size, shape.head_dim)
        self._keys = torch.zeros(size, dtype=model.dtype, device=model.device)
        self._values = torch.zeros_like(self._keys)
        angles = torch.outer(torch.arange(shape.max_length, device=model.device).float(), model.inv_freq)
        angles = torch.cat((angles, angles), dim=-1).unsqueeze(1)
        self._rotary = (
            (angles.cos() * model.rope_scale).to(model.dtype),
            (angles.sin() * model.rope_scale).to(model.dtype),
        )

    @staticmethod
    def block_bytes(model: Decoder, block_size: int) -> int:
        shape = model.shape
        return 2 * shape.num_layers * shape.num_kv_heads * block_size * shape.head_dim * model.embed.itemsize

    @property
    def shape(self) -> Shape:
        return self.model.shape

    def fit(self, factors: Mapping[str, adapter_files.Factors]) -> LoraWeights:
        """Factors per module (``a [rank, d_in]``, ``b [d_out, rank]``) as this runner wants them: per fused
        projection, transposed, in the model's own type and place.

        Raises:
            Rejected: ``adapter_values``, where one is not finite.
        """
        adapter_files.check_finite(factors)
        sizes = part_sizes(self.model)
        layers = []
        for index in range(self.shape.num_layers):
            prefix = self.model.family.layer.format(i=index)
            layer = {}
            for name, parts in self.model.family.projections.items():
                given = [self._turned(factors.get(prefix + part)) for part in parts]
                fused = fuse(list(zip(given, sizes[name], strict=True)))
                if fused is not None:
                    layer[name] = fused
            layers.append(layer)
        return LoraWeights(tuple(layers))

    def _turned(self, factors: adapter_files.Factors | None) -> Factors | None:
        if factors is None:
            return None
        # Copied even where nothing changes: the file that they point into is let go.
        a, b = (
            t.t().to(self.model.device, self.model.dtype, copy=True).contiguous()
            for t in (factors.a, factors.b)
        )
        return Factors(a, b)

    @torch.inference_mode()
    def run(self, plan: StepPlan, adapters: Mapping[bytes, LoraWeights]) -> Outputs:
        """Compute every row of ``plan``."""
        self._clear([block for row in plan.rows for block in row.new_blocks])
        step = self._prepare(plan, adapters)
        model = self.model
        hidden = F.embedding(step.token_ids, model.embed)
        for index, layer in enumerate(model.layers):
            x = self._norm(hidden, layer.attn_norm)
            hidden = hidden + self._project(self._attend(x, index, step), index, "o", step)
            x = self._norm(hidden, layer.mlp_norm)
            gate, up = self._project(x, index, "gate_up", step).chunk(2, dim=-1)
            hidden = hidden + self._project(F.silu(gate) * up, index, "down", step)
        last = self._norm(hidden[step.sampled], model.final_norm)
        return Outputs(last, F.linear(last, model.head))

    def _clear(self, blocks: list[int]) -> None:
        if blocks:
            self._keys[:, :, blocks] = 0
            self._values[:, :, blocks] = 0

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        x32 = x.float()
        scaled = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.model.shape.norm_eps)
        return weight * scaled.to(x.dtype)

    def _project(self, x: Tensor, layer: int, name: str, step: _Step) -> Tensor:
        linear = self.model.layers[layer].projections[name]
        out = F.linear(x, linear.weight, linear.bias)
        if step.stacked is not None:
            add_lora_stacked(out, x, step.stacked, layer, name)
        add_lora_segments(out, x, step.segments, layer, name)
        return out

    def _attend(self, x: Tensor, layer: int, step: _Step) -> Tensor:
        shape = self.model.shape
        heads, kv_heads, head_dim = shape.num_heads, shape.num_kv_heads, shape.head_dim
        qkv = self._project(x, layer, "qkv", step).view(-1, heads + 2 * kv_heads, head_dim)
        rotated = _rotate(qkv[:, : heads + kv_heads], step.cos, step.sin)
        query, key, value = rotated[:, :heads], rotated[:, heads:], qkv[:, heads + kv_heads :]
        keys, values = self._keys[layer], self._values[layer]
        keys.view(kv_heads, -1, head_dim).index_copy_(1, step.slots, key.transpose(0, 1))
        values.view(kv_heads, -1, head_dim).index_copy_(1, step.slots, value.transpose(0, 1))
        out = torch.empty_like(query)
        if step.num_single:
            out[: step.num_single] = _attend_single(query[: step.num_single], keys, values, step)
        for chunk in step.chunks:
            tokens = chunk.tokens
            if chunk.start == 0:
                out[tokens] = _attend_causal(query[tokens], key[tokens], value[tokens], 0)
            else:
                past = _gather(keys, chunk.blocks)[:, : chunk.end].transpose(0, 1)
                past_values = _gather(values, chunk.blocks)[:, : chunk.end].transpose(0, 1)
                out[tokens] = _attend_causal(query[tokens], past, past_values, chunk.start)
        return out.view(-1, heads * head_dim)

    def _prepare(self, plan: StepPlan, adapters: Mapping[bytes, LoraWeights]) -> _Step:
        rows, num_single, device = plan.rows, plan.num_single, self.model.device
        ends = torch.tensor([0, *(len(row.token_ids) for row in rows)]).cumsum(0).tolist()
        positions = torch.tensor([t for row in rows for t in range(row.start, row.end)], device=device)
        places = [s for row in rows for s in slots(row.blocks, row.start, row.end, self.block_size)]
        singles = [row for row in rows if len(row.token_ids) == 1]
        tables, is_beyond = self._tables(singles)
        stacked, segments = self._adapters(rows, ends, adapters)
        return _Step(
            token_ids=torch.tensor([t for row in rows for t in row.token_ids], device=device),
            cos=self._rotary[0][positions],
            sin=self._rotary[1][positions],
            slots=torch.tensor(places, device=device),
            sampled=torch.tensor(
                [ends[i + 1] - 1 for i, row in enumerate(rows) if row.samples],
                dtype=torch.int64,
                device=device,
            ),
            num_single=num_single,
            tables=tables,
            is_beyond=is_beyond,
            chunks=tuple(
                _Chunk(
                    slice(ends[i], ends[i + 1]), row.start, row.end, torch.tensor(row.blocks, device=device)
                )
                for i, row in enumerate(rows)
                if i >= num_single
            ),
            segments=segments,
            stacked=stacked,
        )

    def _tables(self, singles: list[Row]) -> tuple[Tensor, Tensor]:
        needed = [-(-row.end // self.block_size) for row in singles]
        most = max(needed, default=0)
        padded = [
            [*row.blocks[:n], *[NULL_BLOCK] * (most - n)] for row, n in zip(singles, needed, strict=True)
        ]
        lengths = torch.tensor([row.end for row in singles], device=self.model.device)
        places = torch.arange(most * self.block_size, device=self.model.device)
        tables = torch.tensor(padded, dtype=torch.int64, device=self.model.device)
        return tables, (places >= lengths.unsqueeze(1)).unsqueeze(1)

    def _adapters(
        self, rows: tuple[Row, ...], ends: list[int], adapters: Mapping[bytes, LoraWeights]
    ) -> tuple[StackedRows | None, tuple[Segment, ...]]:
        singles: dict[bytes, list[int]] = {}
        segments: list[tuple[bytes, int, int]] = []
        for index, row in enumerate(rows):
            if row.adapter_id == ZERO_ID:
                continue
            if len(row.token_ids) == 1:
                singles.setdefault(row.adapter_id, []).append(index)
            else:
                segments.append((row.adapter_id, ends[index], ends[index + 1]))
        stacked = None
        if len(singles) in STACK_ADAPTERS:
            stacked = StackedRows.of(self._stack_of(tuple(singles), adapters), list(singles.values()))
        else:
            segments = [(adapter_id, i[0], i[-1] + 1) for adapter_id, i in singles.items()] + segments
        return stacked, tuple(Segment(adapters[key], start, end) for key, start, end in _merge(segments))

    def _stack_of(self, adapter_ids: tuple[bytes, ...], adapters: Mapping[bytes, LoraWeights]) -> Stack:
        """Factors of one set of adapters side by side; kept until the set changes."""
        if self._stack is None or self._stack[0] != adapter_ids:
            self._stack = (adapter_ids, Stack.of([adapters[key] for key in adapter_ids]))
        return self._stack[1]


def _merge(segments: list[tuple[bytes, int, int]]) -> list[tuple[bytes, int, int]]:
    """Neighbours of one adapter as one."""
    merged: list[tuple[bytes, int, int]] = []
    for key, start, end in segments:
        if merged and merged[-1][0] == key and merged[-1][2] == start:
            merged[-1] = (key, merged[-1][1], end)
        else:
            merged.append((key, start, end))
    return merged


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions in the half-split layout of Hugging Face; ``x`` is ``[tokens, heads, head_dim]``."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def _gather(cache: Tensor, blocks: Tensor) -> Tensor:
    """Blocks of every head, in order: ``[kv_heads, len(blocks) * block_size, head_dim]``."""
    kv_heads, num_blocks, block_size, head_dim = cache.shape
    heads = torch.arange(kv_heads, device=blocks.device).unsqueeze(1) * num_blocks
    flat = cache.view(kv_heads * num_blocks, block_size * head_dim)
    return flat.index_select(0, (heads + blocks).flatten()).view(kv_heads, -1, head_dim)


def _attend_single(query: Tensor, keys: Tensor, values: Tensor, step: _Step) -> Tensor:
    """One new token per row against its whole past; the query heads of a group are the rows of one product.

    ``query`` is ``[rows, heads, head_dim]``; so is the result."""
    num_rows, heads, head_dim = query.shape
    kv_heads = keys.shape[0]
    blocks = step.tables.flatten()
    past = _gather(keys, blocks).view(kv_heads, num_rows, -1, head_dim)
    past_values = _gather(values, blocks).view(kv_heads, num_rows, -1, head_dim)
    grouped = query.view(num_rows, kv_heads, heads // kv_heads, head_dim).transpose(0, 1)
    scores = grouped @ past.transpose(2, 3) * head_dim**-0.5
    weights = scores.masked_fill(step.is_beyond, float("-inf")).float().softmax(-1).to(query.dtype)
    return (weights @ past_values).transpose(0, 1).reshape(num_rows, heads, head_dim)


def _attend_causal(query: Tensor, keys: Tensor, values: Tensor, start: int) -> Tensor:
    """Tokens ``start`` onward of one row against all its tokens so far, ``[tokens, heads, head_dim]``."""
    mask = None
    if start:
        places = torch.arange(keys.shape[0], device=query.device)
        mask = places <= places[start:].unsqueeze(1)
    q, k, v = (t.transpose(0, 1).unsqueeze(0) for t in (query, keys, values))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
    return out.squeeze(0).transpose(0, 1)
