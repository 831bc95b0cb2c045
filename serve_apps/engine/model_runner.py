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
from serve_apps.engine.attention import (
    Chunk,
    Singles,
    View,
    attend_chunk,
    attend_singles,
    chunk_mask,
    gather,
    hidden_keys,
    rotate,
)
from serve_apps.engine.decoder import ACTIVATIONS, Attention, Decoder, Norm, Shape, part_sizes
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
from serve_apps.engine.peers import ALONE, Peers
from serve_apps.engine.runner import Outputs
from serve_apps.engine.scheduler import Row, StepPlan
from serve_apps.engine.sharding import TAKES_A_PART

# Measured on two AVX-512 cores: below four adapters a loop of small products beats the batched one, beyond
# sixteen the padded copies of the factors outgrow the cache.
STACK_ADAPTERS = range(4, 17)


@dataclass(frozen=True, slots=True)
class _Step:
    """The plan as tensors. Rows of one token come first, ``num_single`` of them."""

    token_ids: Tensor
    positions: Tensor
    slots: Tensor
    sampled: Tensor
    num_single: int
    singles: Singles
    chunks: tuple[Chunk, ...]
    views: Mapping[Attention, View]
    segments: tuple[Segment, ...]
    stacked: StackedRows | None


@dataclass(slots=True, eq=False)
class ModelRunner:
    """Holds the weights and the cache tensors. One thread at a time may call it. With ``peers``, ``model`` is
    this rank's part of one."""

    model: Decoder
    num_blocks: int
    block_size: int
    peers: Peers = ALONE
    _keys: Tensor = field(init=False)  # [layers, kv_heads, num_blocks, block_size, head_dim]
    _values: Tensor = field(init=False)
    _rotary: Mapping[Attention, tuple[Tensor, Tensor] | None] = field(init=False)
    _stack: tuple[tuple[bytes, ...], Stack] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        shape, model = self.model.shape, self.model
        size = (shape.num_layers, shape.num_kv_heads, self.num_blocks, self.block_size, shape.head_dim)
        self._keys = torch.zeros(size, dtype=model.dtype, device=model.device)
        self._values = torch.zeros_like(self._keys)
        kinds = dict.fromkeys(layer.attention for layer in model.layers)
        self._rotary = {attention: _rotary_tables(attention, model) for attention in kinds}

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
        layers = []
        for index in range(self.shape.num_layers):
            layer = {}
            for name, sizes in part_sizes(self.model).items():
                given = [self._turned(part) for part in self.model.part_factors(factors, index, name)]
                fused = fuse(list(zip(given, sizes, strict=True)))
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
        hidden = self._embed(step)
        for index in range(self.shape.num_layers):
            hidden = self._block(hidden, index, step)
        last = norm(hidden[step.sampled], self.model.final_norm)
        return Outputs.of(last, self._head(last))

    def _clear(self, blocks: list[int]) -> None:
        if blocks:
            self._keys[:, :, blocks] = 0
            self._values[:, :, blocks] = 0

    def _embed(self, step: _Step) -> Tensor:
        model = self.model
        hidden = F.embedding(step.token_ids, model.embed)
        if model.embed_scale != 1:
            hidden = hidden * model.embed_scale
        if model.positions is not None:
            hidden = hidden + model.positions[step.positions]
        return _maybe_norm(hidden, model.embed_norm)

    def _block(self, hidden: Tensor, index: int, step: _Step) -> Tensor:
        layer = self.model.layers[index]
        attended = self._attend(norm(hidden, layer.attn_norm), index, step)
        after = hidden + _maybe_norm(attended, layer.attn_post_norm)
        seen_by_mlp = hidden if self.model.is_parallel else after
        inner = self._mlp(norm(seen_by_mlp, layer.mlp_norm), index, step)
        return after + _maybe_norm(inner, layer.mlp_post_norm)

    def _mlp(self, x: Tensor, index: int, step: _Step) -> Tensor:
        activate = ACTIVATIONS[self.model.activation]
        if "gate_up" in self.model.parts:
            gate, up = self._project(x, index, "gate_up", step).chunk(2, dim=-1)
            return self._project(activate(gate) * up, index, "down", step)
        return self._project(activate(self._project(x, index, "up", step)), index, "down", step)

    def _head(self, last: Tensor) -> Tensor:
        logits = self.peers.side_by_side(F.linear(last, self.model.head), self.shape.vocabulary)
        cap = self.model.head_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def _project(self, x: Tensor, layer: int, name: str, step: _Step) -> Tensor:
        linear = self.model.layers[layer].projections[name]
        out = F.linear(x, linear.weight, linear.bias)
        if step.stacked is not None:
            add_lora_stacked(out, x, step.stacked, layer, name)
        add_lora_segments(out, x, step.segments, layer, name)
        if name in TAKES_A_PART:
            self.peers.add_up(out)
        return out

    def _attend(self, x: Tensor, index: int, step: _Step) -> Tensor:
        shape, layer = self.model.shape, self.model.layers[index]
        heads, kv_heads, head_dim = shape.num_heads, shape.num_kv_heads, shape.head_dim
        qkv = self._project(x, index, "qkv", step).view(-1, heads + 2 * kv_heads, head_dim)
        value = qkv[:, heads + kv_heads :]
        turned = qkv[:, : heads + kv_heads]
        if layer.query_norm is not None and layer.key_norm is not None:
            turned = torch.cat(
                (norm(turned[:, :heads], layer.query_norm), norm(turned[:, heads:], layer.key_norm)), dim=1
            )
        view = step.views[layer.attention]
        if view.cos is not None and view.sin is not None:
            turned = rotate(turned, view.cos, view.sin)
        query, key = turned[:, :heads], turned[:, heads:]
        keys, values = self._keys[index], self._values[index]
        keys.view(kv_heads, -1, head_dim).index_copy_(1, step.slots, key.transpose(0, 1))
        values.view(kv_heads, -1, head_dim).index_copy_(1, step.slots, value.transpose(0, 1))
        out = torch.empty_like(query)
        if step.num_single:
            single = query[: step.num_single]
            out[: step.num_single] = attend_singles(single, keys, values, step.singles, view)
        for chunk, mask in zip(step.chunks, view.masks, strict=True):
            tokens = chunk.tokens
            if chunk.start == 0:
                past, past_values = key[tokens], value[tokens]
            else:
                past, past_values = (
                    gather(cache, chunk.blocks)[:, : chunk.end].transpose(0, 1) for cache in (keys, values)
                )
            out[tokens] = attend_chunk(query[tokens], past, past_values, mask, layer.attention)
        return self._project(out.reshape(-1, heads * head_dim), index, "o", step)

    def _prepare(self, plan: StepPlan, adapters: Mapping[bytes, LoraWeights]) -> _Step:
        rows, num_single, device = plan.rows, plan.num_single, self.model.device
        ends = torch.tensor([0, *(len(row.token_ids) for row in rows)]).cumsum(0).tolist()
        positions = torch.tensor([t for row in rows for t in range(row.start, row.end)], device=device)
        places = [s for row in rows for s in slots(row.blocks, row.start, row.end, self.block_size)]
        singles = self._singles([row for row in rows if len(row.token_ids) == 1])
        chunks = tuple(
            Chunk(slice(ends[i], ends[i + 1]), row.start, row.end, torch.tensor(row.blocks, device=device))
            for i, row in enumerate(rows)
            if i >= num_single
        )
        stacked, segments = self._adapters(rows, ends, adapters)
        return _Step(
            token_ids=torch.tensor([t for row in rows for t in row.token_ids], device=device),
            positions=positions,
            slots=torch.tensor(places, device=device),
            sampled=torch.tensor(
                [ends[i + 1] - 1 for i, row in enumerate(rows) if row.samples],
                dtype=torch.int64,
                device=device,
            ),
            num_single=num_single,
            singles=singles,
            chunks=chunks,
            views={each: self._view(each, positions, singles, chunks) for each in self._rotary},
            segments=segments,
            stacked=stacked,
        )

    def _singles(self, rows: list[Row]) -> Singles:
        needed = [-(-row.end // self.block_size) for row in rows]
        most = max(needed, default=0)
        padded = [[*row.blocks[:n], *[NULL_BLOCK] * (most - n)] for row, n in zip(rows, needed, strict=True)]
        return Singles(
            tables=torch.tensor(padded, dtype=torch.int64, device=self.model.device).view(len(rows), most),
            ends=torch.tensor([row.end for row in rows], dtype=torch.int64, device=self.model.device),
        )

    def _view(
        self, attention: Attention, positions: Tensor, singles: Singles, chunks: tuple[Chunk, ...]
    ) -> View:
        rotary, bias = self._rotary[attention], attention.key_bias
        if bias is not None:
            num_keys = singles.tables.shape[1] * self.block_size
            bias = F.pad(bias[:, :num_keys], (0, max(0, num_keys - bias.shape[1])))
            bias = bias.unflatten(0, (self.shape.num_kv_heads, 1, -1))
        return View(
            attention=attention,
            cos=None if rotary is None else rotary[0][positions],
            sin=None if rotary is None else rotary[1][positions],
            is_hidden=hidden_keys(attention, singles, self.block_size),
            bias=bias,
            masks=tuple(chunk_mask(attention, chunk) for chunk in chunks),
        )

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


def norm(x: Tensor, by: Norm) -> Tensor:
    """Computed in fp32, whatever the model's type."""
    x32 = x.float()
    if by.bias is not None:
        return F.layer_norm(x32, x.shape[-1:], by.weight.float(), by.bias.float(), by.eps).to(x.dtype)
    scaled = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + by.eps)
    return (by.weight * scaled.to(by.weight.dtype)).to(x.dtype)


def _maybe_norm(x: Tensor, by: Norm | None) -> Tensor:
    return x if by is None else norm(x, by)


def _rotary_tables(attention: Attention, model: Decoder) -> tuple[Tensor, Tensor] | None:
    """Cosines and sines of every position, ``[max_length, 1, head_dim]``."""
    if attention.rotary is None:
        return None
    places = torch.arange(model.shape.max_length, device=model.device).float()
    angles = torch.outer(places, attention.rotary.inv_freq)
    angles = torch.cat((angles, angles), dim=-1).unsqueeze(1)
    cos, sin = (turn * attention.rotary.scale for turn in (angles.cos(), angles.sin()))
    return cos.to(model.dtype), sin.to(model.dtype)
