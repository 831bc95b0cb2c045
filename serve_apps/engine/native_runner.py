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
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cluster.adapters import Factors
from serve_apps.engine.decoder import Decoder, Linear, Shape, is_llama, named_parts, part_sizes
from serve_apps.engine.native import library
from serve_apps.engine.native.library import MAX_HEAD_DIM, PANEL, address
from serve_apps.engine.packed_adapter import PackedAdapter, pack_adapter, zeroed
from serve_apps.engine.runner import Outputs
from serve_apps.engine.scheduler import StepPlan


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
        self._layer_path, self._parts = model.layer_path, model.parts
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
        """Factors per module (``a [rank, d_in]``, ``b [d_out, rank]``) as the kernels read them.

        Raises:
            Rejected: ``adapter_values``, where one is not finite.
        """
        updates = [
            named_parts(parts, self._layer_path.format(i=index), factors)
            for index in range(self.shape.num_layers)
            for parts in self._parts.values()
        ]
        return pack_adapter(self._kernels, updates, [*self._sizes.values()] * self.shape.num_layers)

    def run(self, plan: StepPlan, adapters: Mapping[bytes, PackedAdapter]) -> Outputs:
        """Compute every row of ``plan``."""
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
        width = hidden.shape[1]
        last = buffer.view(-1)[: len(sampled) * width].view(-1, width)
        return Outputs(last, logits)

    def _pack(self, model: Decoder, num_blocks: int) -> Any:
        shape = model.shape
        size = (shape.num_layers, shape.num_kv_heads, num_blocks, PANEL * shape.head_dim)
        num_bytes = 4 * math.prod(size)
        keys, values = (zeroed(num_bytes).view(torch.float32).view(size) for _ in range(2))
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


def _exact_half(weight: Tensor) -> Tensor:
    """In bf16 if nothing is lost."""
    half = weight.bfloat16()
    return half if torch.equal(half.to(weight.dtype), weight) else weight
