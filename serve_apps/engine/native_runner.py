"""The forward pass on a CPU by our own kernels: one call for a whole step, over packed weights.

``ModelRunner`` is the oracle and runs wherever this does not. Of a model in fp32, weights that are exact in
bf16 stay in bf16 and are multiplied in fp32, which halves what a small batch reads. Of one in bf16, where the
processor multiplies that, all that enters a product is rounded to it, the cache included; sums and the
residual stream are fp32, so its logits lie nearer to fp32's than torch's do. Every number is summed in one
order whatever else is in the batch, so answers, to the bit, depend on the request alone: how it is batched,
chunked or preempted changes nothing (tests/serve_apps/engine/test_native.py).

Measured with SmolLM2-135M by tests/bench/serving/engine_speed.py, W1, beside torch on the same cores. Two
that multiply bf16 (Zen 5), bf16: 742 tokens/s, two thirds of what torch's own rate of multiplying allows,
torch 166. Two with AVX2 only, fp32: 168, torch 53 (busy, step by step in turn). With a second busy process on
every core 4.4 times slower, not ten. What did it: packed weights, the cache in place, adapters at true ranks,
what comes next fetched while the last is multiplied (native/kernels.cpp)."""

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
from serve_apps.engine.packed_adapter import PackedAdapter, Projection, pack_adapter, zeroed
from serve_apps.engine.runner import Outputs
from serve_apps.engine.scheduler import StepPlan


def runs(model: Decoder, block_size: int) -> bool:
    """Whether the kernels are the fastest way to compute this model here: what they do not, ``ModelRunner``
    does."""
    is_fast = model.dtype == torch.float32 or library.multiplies_bf16()
    return model.device.type == "cpu" and is_fast and block_size == PANEL and can_run(model)


def can_run(model: Decoder) -> bool:
    """Whether the kernels know everything that this model does; bf16 slowly where it is not multiplied."""
    shape = model.shape
    return (
        is_llama(model)
        and model.dtype in (torch.float32, torch.bfloat16)
        and shape.head_dim % PANEL == 0
        and shape.head_dim <= MAX_HEAD_DIM
        and model.layers[0].projections["down"].weight.shape[1] % PANEL == 0
        and all(linear.weight.shape[1] % 2 == 0 for linear in model.layers[0].projections.values())
    )


GATED = "gate_up"


class NativeRunner:
    """Holds the packed weights and the cache. One thread at a time may call it."""

    def __init__(self, model: Decoder, num_blocks: int, kernels: ctypes.CDLL, num_threads: int) -> None:
        assert can_run(model)
        self._shape = model.shape
        self.num_blocks = num_blocks
        self._layer_path, self._parts = model.layer_path, model.parts
        self._projections = [Projection(sizes, name == GATED) for name, sizes in part_sizes(model).items()]
        self._kernels = kernels
        self._is_half = model.dtype == torch.bfloat16
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
        return 2 * model.dtype.itemsize * shape.num_layers * shape.num_kv_heads * PANEL * shape.head_dim

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
        return pack_adapter(self._kernels, updates, self._projections * self.shape.num_layers)

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
        best, highest = torch.empty(len(sampled), dtype=torch.int64), torch.empty(len(sampled))
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
            best=address(best),
            highest=address(highest),
            buffer=address(buffer),
        )
        self._kernels.openledger_step(self._team, ctypes.byref(self._decoder), ctypes.byref(step))
        del blocks  # which the spans point into
        width = hidden.shape[1]
        last = buffer.view(-1)[: len(sampled) * width].view(-1, width)
        return Outputs(last, logits, highest, best)

    def _pack(self, model: Decoder, num_blocks: int) -> Any:
        shape = model.shape
        size = (shape.num_layers, shape.num_kv_heads, num_blocks, PANEL * shape.head_dim)
        num_bytes = model.dtype.itemsize * math.prod(size)
        keys, values = (zeroed(num_bytes).view(model.dtype).view(size) for _ in range(2))
        memory = Memory(_most_bytes(model))
        self._embed = memory.keep(_exact_half(model.embed))  # a view would keep the whole file in memory
        layers = (library.Layer * shape.num_layers)()
        for index, (layer, source) in enumerate(zip(layers, model.layers, strict=True)):
            layer.attn_norm = self._keep(source.attn_norm.weight)
            layer.mlp_norm = self._keep(source.mlp_norm.weight)
            for name, linear in source.projections.items():
                setattr(layer, name, pack_linear(linear, self._is_half, memory, name == GATED))
            layer.cache = library.Cache(address(keys[index]), address(values[index]))
        inner = model.layers[0].projections["gate_up"].weight.shape[0] // 2
        hidden = model.embed.shape[1]
        heads = shape.num_heads * shape.head_dim
        self._buffer_width = (
            hidden + heads + 2 * shape.num_kv_heads * shape.head_dim + max(heads, hidden) + inner
        )
        rotary = model.layers[0].attention.rotary
        assert rotary is not None
        angles = torch.outer(torch.arange(shape.max_length).float(), rotary.inv_freq)
        self._kept += [keys, values, layers, memory]
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
                is_half=int(self._is_half),
                cos=self._keep(angles.cos() * rotary.scale),
                sin=self._keep(angles.sin() * rotary.scale),
                norm_eps=model.final_norm.eps,
            ),
            layers=ctypes.addressof(layers),
            final_norm=self._keep(model.final_norm.weight),
            head=pack_linear(Linear(model.head, None), self._is_half, memory),
        )

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


def pack_linear(linear: Linear, is_half: bool, memory: "Memory", is_gated: bool = False) -> Any:
    """A linear map as the kernels read it while ``memory`` is kept. With ``is_half`` its inputs are in bf16.
    Of a gated one, gate before up, the panels of both lie in turn."""
    d_out, d_in = linear.weight.shape
    weight, bias = (_in_turn(t) if is_gated and t is not None else t for t in (linear.weight, linear.bias))
    panels = memory.keep(in_panels(_exact_half(weight), PANEL))
    bias = None if bias is None else memory.keep(F.pad(bias.float(), (0, -d_out % PANEL)))
    kind = 0 if panels.dtype == torch.float32 else 2 if is_half else 1
    return library.Linear(address(panels), address(bias), d_in, d_out, kind)


def _in_turn(rows: Tensor) -> Tensor:
    return rows.view(2, -1, PANEL, *rows.shape[1:]).transpose(0, 1).reshape(rows.shape)


class Memory:
    """Tensors one after the other in one piece, so that what runs next is fetched by adding to an address."""

    def __init__(self, max_bytes: int) -> None:
        self._whole, self._end = zeroed(max_bytes), 0

    def keep(self, tensor: Tensor) -> Tensor:
        start = self._end
        self._end += -(-tensor.nbytes // 64) * 64
        kept = self._whole[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        return kept.copy_(tensor)


def in_panels(weight: Tensor, width: int) -> Tensor:
    """``[d_out, d_in]`` as ``[panel, d_in, width]``: ``width`` outputs lie together, the last are zeros. In
    bf16 two neighbours of ``d_in`` lie in one word: ``[panel, pair, width, 2]``."""
    d_out, d_in = weight.shape
    if weight.dtype == torch.bfloat16:
        pairs = F.pad(weight, (0, d_in % 2, 0, -d_out % width)).view(-1, width, (d_in + 1) // 2, 2)
        return pairs.transpose(1, 2).contiguous()
    return F.pad(weight, (0, 0, 0, -d_out % width)).view(-1, width, d_in).transpose(1, 2).contiguous()


def _most_bytes(model: Decoder) -> int:
    """Of all that is kept, were nothing exact in bf16; what is never written takes no memory."""
    maps = [linear for layer in model.layers for linear in layer.projections.values()]
    shapes = [linear.weight.shape for linear in maps] + [model.head.shape, model.embed.shape]
    return sum(4 * (d_out + PANEL) * (d_in + 2) + 128 for d_out, d_in in shapes)  # 2: an odd one's, a bias


def _exact_half(weight: Tensor) -> Tensor:
    """In bf16 if nothing is lost."""
    half = weight.bfloat16()
    return half if torch.equal(half.to(weight.dtype), weight) else weight
