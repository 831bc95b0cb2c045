"""The forward pass on a CPU by our own kernels: one call for a whole step, over packed weights.

``ModelRunner`` is the oracle and runs wherever this does not. Weights that are exact in bf16 stay in bf16 and
are multiplied in fp32, which halves what a small batch reads; a bf16 model, where the processor multiplies
bf16, has its inputs rounded as in torch. All else is fp32. Every number is summed in one order whatever
else is in the batch, so answers, to the bit, depend on the request alone: how it is batched, chunked or
preempted changes nothing (tests/serve_apps/engine/test_native.py).

Measured on two AVX2 cores with SmolLM2-135M in fp32. tests/bench/serving/engine_speed.py: 168 tokens/s over
16 adapters and 193 on the base model, 73% and 82% of what torch's own rate of multiplying matrices allows;
on a busy machine, step by step in turn with torch, 125 against 53 with the same answers. Steps alone: 4 to 5
times faster at 1 and 8 rows, 2 to 3 at 32 and 64, 1.1 for prompts. With a second busy process on every core
4.4 times slower, not ten. What did it: packed weights, the cache in place, adapters at true ranks."""

import ctypes
import math
import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cluster.adapters import Factors
from serve_apps.engine.decoder import Decoder, Linear, Shape, is_llama, part_sizes
from serve_apps.engine.native import library
from serve_apps.engine.native.library import MAX_HEAD_DIM, PANEL, SLIM_PANEL, address
from serve_apps.engine.scheduler import StepPlan


@dataclass(frozen=True, slots=True)
class PackedAdapter:
    """An adapter's factors in panels of bf16, at their true ranks; ``updates`` is ``[layer][projection]``."""

    updates: Any
    tensors: tuple[Tensor, ...]

    @property
    def size_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)


def runs(model: Decoder, block_size: int) -> bool:
    """Whether the kernels compute this model: what they do not, ``ModelRunner`` does."""
    shape = model.shape
    return (
        model.device.type == "cpu"
        and (model.dtype == torch.float32 or (model.dtype == torch.bfloat16 and library.multiplies_bf16()))
        and block_size == PANEL
        and shape.head_dim % PANEL == 0
        and shape.head_dim <= MAX_HEAD_DIM
        and is_llama(model)
    )


class NativeRunner:
    """Holds the packed weights and the cache. One thread at a time may call it."""

    def __init__(self, model: Decoder, num_blocks: int, kernels: ctypes.CDLL, num_threads: int) -> None:
        assert runs(model, PANEL)
        self._shape = model.shape
        self.num_blocks = num_blocks
        self._part_factors = model.part_factors
        self._sizes = part_sizes(model)
        self._kernels = kernels
        self._embed = _exact_half(model.embed)
        self._rounds_inputs = model.dtype == torch.bfloat16
        self._kept: list[Any] = []  # what only the kernels refer to
        self._team = ctypes.c_void_p(kernels.openledger_team(ctypes.c_int64(num_threads)))
        self._decoder = self._pack(model, num_blocks)

    @property
    def shape(self) -> Shape:
        return self._shape

    def __del__(self) -> None:
        if hasattr(self, "_decoder"):
            self._kernels.openledger_disband(self._team)

    @staticmethod
    def block_bytes(model: Decoder) -> int:
        shape = model.shape
        return 2 * 4 * shape.num_layers * shape.num_kv_heads * PANEL * shape.head_dim

    def fit(self, factors: Mapping[str, Factors]) -> PackedAdapter:
        """Factors per module (``a [rank, d_in]``, ``b [d_out, rank]``) as the kernels read them."""
        updates = (library.Update * (self.shape.num_layers * len(self._sizes)))()
        kept: list[Tensor] = []
        for index in range(self.shape.num_layers):
            for number, name in enumerate(self._sizes):
                given = self._part_factors(factors, index, name)
                if any(part is not None for part in given):
                    update = updates[index * len(self._sizes) + number]
                    kept += pack_update(update, given, self._sizes[name])
        return PackedAdapter(updates, tuple(kept))

    def run(self, plan: StepPlan, adapters: Mapping[bytes, PackedAdapter]) -> Tensor:
        """Compute every row of ``plan``.

        Returns:
            Logits ``[rows that sample, vocabulary]``, in the order of the plan.
        """
        token_ids = torch.tensor([t for row in plan.rows for t in row.token_ids])
        hidden = F.embedding(token_ids, self._embed).float()
        spans, blocks = _spans(plan)
        pieces = [
            library.Segment(ctypes.addressof(adapters[key].updates), start, end)
            for key, start, end in plan.segments
        ]
        segments = (library.Segment * len(pieces))(*pieces)
        last = [span.first + span.num_tokens - 1 for span in spans]
        sampled = torch.tensor(
            [i for i, row in zip(last, plan.rows, strict=True) if row.samples], dtype=torch.int64
        )
        logits = torch.empty(len(sampled), self.shape.vocabulary)
        buffer = torch.empty(len(token_ids), self._buffer_width)
        step = library.Step(
            num_tokens=len(token_ids),
            num_spans=len(spans),
            num_segments=len(pieces),
            num_sampled=len(sampled),
            spans=ctypes.addressof(spans),
            segments=ctypes.addressof(segments),
            sampled=address(sampled),
            hidden=address(hidden),
            logits=address(logits),
            buffer=address(buffer),
        )
        self._kernels.openledger_step(self._team, ctypes.byref(self._decoder), ctypes.byref(step))
        del blocks  # which the spans point into
        return logits

    def _pack(self, model: Decoder, num_blocks: int) -> Any:
        shape = model.shape
        size = (shape.num_layers, shape.num_kv_heads, num_blocks, PANEL * shape.head_dim)
        keys, values = _zeros(size), _zeros(size)
        layers = (library.Layer * shape.num_layers)()
        for index, (layer, source) in enumerate(zip(layers, model.layers, strict=True)):
            layer.attn_norm = self._keep(source.attn_norm.weight)
            layer.mlp_norm = self._keep(source.mlp_norm.weight)
            for name, linear in source.projections.items():
                setattr(layer, name, self._pack_linear(linear))
            layer.cache = library.Cache(address(keys[index]), address(values[index]))
        inner = model.layers[0].projections["gate_up"].weight.shape[0] // 2
        hidden = model.embed.shape[1]
        heads = shape.num_heads * shape.head_dim
        self._buffer_width = hidden + 2 * heads + 2 * shape.num_kv_heads * shape.head_dim + 3 * inner
        rotary = model.layers[0].attention.rotary
        assert rotary is not None
        angles = torch.outer(torch.arange(shape.max_length).float(), rotary.inv_freq)
        self._kept += [keys, values, layers]
        return library.Decoder(
            shape=library.Shape(
                num_layers=shape.num_layers,
                num_heads=shape.num_heads,
                num_kv_heads=shape.num_kv_heads,
                head_dim=shape.head_dim,
                hidden=hidden,
                inner=inner,
                vocabulary=shape.vocabulary,
                num_blocks=num_blocks,
                cos=self._keep(angles.cos() * rotary.scale),
                sin=self._keep(angles.sin() * rotary.scale),
                norm_eps=model.final_norm.eps,
            ),
            layers=ctypes.addressof(layers),
            final_norm=self._keep(model.final_norm.weight),
            head=self._pack_linear(Linear(model.head, None)),
        )

    def _pack_linear(self, linear: Linear) -> Any:
        packed, tensors = pack_linear(linear, self._rounds_inputs)
        self._kept += tensors
        return packed

    def _keep(self, tensor: Tensor) -> int | None:
        self._kept.append(tensor.float())
        return address(self._kept[-1])


def _spans(plan: StepPlan) -> tuple[Any, Tensor]:
    """The rows as the kernels read them, and the block tables that they point into."""
    blocks = torch.tensor([block for row in plan.rows for block in row.blocks], dtype=torch.int32)
    spans, first, num_blocks = (library.Span * len(plan.rows))(), 0, 0
    for span, row in zip(spans, plan.rows, strict=True):
        span.first, span.num_tokens, span.start = first, len(row.token_ids), row.start
        span.blocks = blocks.data_ptr() + blocks.itemsize * num_blocks
        first += len(row.token_ids)
        num_blocks += len(row.blocks)
    return spans, blocks


def _zeros(size: tuple[int, ...]) -> Tensor:
    """Zeros in huge pages where the system gives them: blocks lie anywhere, and each would cost a walk of the
    page table (10% of decode attention)."""
    memory = mmap.mmap(-1, 4 * math.prod(size), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.float32).view(size)


def pack_linear(linear: Linear, rounds_inputs: bool = False) -> tuple[Any, list[Tensor]]:
    """A linear map as the kernels read it, and the tensors to keep while they do."""
    d_out, d_in = linear.weight.shape
    panels = in_panels(_exact_half(linear.weight), PANEL)
    tensors = [panels] if linear.bias is None else [panels, F.pad(linear.bias.float(), (0, -d_out % PANEL))]
    bias = None if linear.bias is None else address(tensors[1])
    kind = 0 if panels.dtype == torch.float32 else 2 if rounds_inputs else 1
    return library.Linear(address(panels), bias, d_in, d_out, kind), tensors


def in_panels(weight: Tensor, width: int) -> Tensor:
    """``[d_out, d_in]`` as ``[panel, d_in, width]``: ``width`` outputs lie together, the last are zeros. In
    bf16 two neighbours of ``d_in`` lie in one word: ``[panel, pair, width, 2]``."""
    d_out, d_in = weight.shape
    if weight.dtype == torch.bfloat16:
        pairs = F.pad(weight, (0, d_in % 2, 0, -d_out % width)).view(-1, width, (d_in + 1) // 2, 2)
        return pairs.transpose(1, 2).contiguous()
    return F.pad(weight, (0, 0, 0, -d_out % width)).view(-1, width, d_in).transpose(1, 2).contiguous()


def pack_update(update: Any, given: list[Factors | None], sizes: tuple[int, ...]) -> list[Tensor]:
    """Fill ``update`` with the parts of one fused projection that are ``given``; the tensors to keep."""
    present = [part for part in given if part is not None]
    a = in_panels(torch.cat([part.a.bfloat16() for part in present]), SLIM_PANEL)
    tensors, first_rank, first_column = [a], 0, 0
    parts: list[Any] = []
    for part, num_columns in zip(given, sizes, strict=True):
        if part is not None:
            rank = part.a.shape[0]
            tensors.append(in_panels(part.b.bfloat16(), PANEL))
            parts.append(library.Part(address(tensors[-1]), first_rank, rank, first_column, num_columns))
            first_rank += rank
        first_column += num_columns
    update.a, update.rank, update.num_parts = address(a), first_rank, len(parts)
    for index, packed in enumerate(parts):
        update.parts[index] = packed
    return tensors


def _exact_half(weight: Tensor) -> Tensor:
    """In bf16 if nothing is lost."""
    half = weight.bfloat16()
    return half if torch.equal(half.to(weight.dtype), weight) else weight
