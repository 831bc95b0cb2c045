"""A causal language model as data: all that a runner needs to know of it, and no family by name.

``families.py`` makes one out of what transformers loaded. A block adds ``post(attend(norm(hidden)))`` and
``post(mlp(norm(hidden)))``, one after the other or side by side; what a family does not have is ``None``."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from cluster.adapters import Factors

_gelu_tanh = partial(F.gelu, approximate="tanh")
ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "relu": F.relu,
}


class Stored(Protocol):
    """A weight that does not lie there as a tensor of the model's type."""

    def dense(self) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Linear:
    stored: Tensor | Stored
    bias: Tensor | None

    @property
    def weight(self) -> Tensor:
        """``[d_out, d_in]``; what is not stored so is made anew by every call."""
        return self.stored if isinstance(self.stored, Tensor) else self.stored.dense()


@dataclass(frozen=True, slots=True)
class Norm:
    """RMS norm, or with a ``bias`` LayerNorm. A weight in fp32 multiplies before the result is rounded to the
    model's type, one in the model's type after."""

    weight: Tensor
    bias: Tensor | None
    eps: float


@dataclass(frozen=True, slots=True, eq=False)
class Rotary:
    """Rotary positions in the half-split layout: dimensions ``i`` and ``i + head_dim / 2`` are one pair.
    ``inv_freq`` is fp32 ``[head_dim / 2]``; 0 leaves a pair as it is."""

    inv_freq: Tensor
    scale: float


@dataclass(frozen=True, slots=True, eq=False)
class Attention:
    """How queries meet keys. Layers that do so alike share one object."""

    scale: float
    rotary: Rotary | None = None
    window: int | None = None  # how many tokens a query sees, itself included
    softcap: float | None = None  # scores become cap * tanh(score / cap)
    key_bias: Tensor | None = None  # [heads, max_length], added to the scores of the key at each position


@dataclass(frozen=True, slots=True)
class Layer:
    """``projections``: ``qkv``, ``o``, ``down``, and ``gate_up`` (gated) or ``up`` (plain)."""

    attention: Attention
    projections: Mapping[str, Linear]
    attn_norm: Norm
    mlp_norm: Norm
    attn_post_norm: Norm | None = None
    mlp_post_norm: Norm | None = None
    query_norm: Norm | None = None  # over head_dim
    key_norm: Norm | None = None


@dataclass(frozen=True, slots=True)
class Part:
    """One module of the library inside a projection. ``order`` are its rows as the projection has them, and
    ``inputs`` those it takes; ``None``: as they were."""

    module: str  # its path in the block
    d_out: int
    order: Tensor | None = None
    inputs: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Shape:
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocabulary: int
    max_length: int


@dataclass(frozen=True, slots=True)
class Decoder:
    """A causal language model with its projections fused, detached from the library that read it."""

    shape: Shape
    layer_path: str  # of a block in the library, holding {i}
    parts: Mapping[str, tuple[Part, ...]]  # of every projection
    layers: tuple[Layer, ...]
    embed: Tensor  # [vocabulary, width]
    final_norm: Norm
    head: Tensor  # [vocabulary, width]
    activation: str  # one of ACTIVATIONS
    is_parallel: bool = False  # attention and MLP side by side, both over the block's input
    embed_scale: float = 1.0
    embed_norm: Norm | None = None
    positions: Tensor | None = None  # learned, [max_length, width]
    head_softcap: float | None = None  # logits become cap * tanh(logit / cap)

    @property
    def dtype(self) -> torch.dtype:
        return self.embed.dtype

    @property
    def device(self) -> torch.device:
        return self.embed.device

    def part_factors(self, factors: Mapping[str, Factors], layer: int, name: str) -> list[Factors | None]:
        """An adapter's factors for the parts of one projection, as the projection has inputs and outputs."""
        named = named_parts(self.parts[name], self.layer_path.format(i=layer), factors)
        return [update for _, update in named]


def named_parts(
    parts: Sequence[Part], path: str, factors: Mapping[str, Factors]
) -> list[tuple[str, Factors | None]]:
    """The modules of one projection in the block at ``path``, and an adapter's factors for them, as the
    projection has inputs and outputs."""
    modules = [path + part.module for part in parts]
    return [(m, _ordered(factors.get(m), part)) for m, part in zip(modules, parts, strict=True)]


def _ordered(factors: Factors | None, part: Part) -> Factors | None:
    if factors is None or (part.order is None and part.inputs is None):
        return factors
    a, b = factors.a, factors.b
    return Factors(
        a if part.inputs is None else a[:, part.inputs.to(a.device)],
        b if part.order is None else b[part.order.to(b.device)],
    )


def on_device(model: Decoder, device: torch.device) -> Decoder:
    """The same decoder there. What two layers share they share afterwards, too."""
    moved = _turned(model, lambda tensor: tensor.to(device), {})
    assert isinstance(moved, Decoder)
    return replace(moved, parts=model.parts)  # which adapters are cut by, in host memory


def _turned(value: Any, turn: Callable[[Tensor], Tensor], known: dict[int, Any]) -> Any:
    if id(value) in known:
        return known[id(value)]
    if isinstance(value, Tensor):
        turned: Any = turn(value)
    elif is_dataclass(value) and not isinstance(value, type):
        new = {field.name: _turned(getattr(value, field.name), turn, known) for field in fields(value)}
        turned = replace(value, **new)
    elif isinstance(value, tuple):
        turned = tuple(_turned(each, turn, known) for each in value)
    elif isinstance(value, Mapping):
        turned = {key: _turned(each, turn, known) for key, each in value.items()}
    else:
        turned = value
    known[id(value)] = turned
    return turned


def part_sizes(model: Decoder) -> dict[str, tuple[int, ...]]:
    """``d_out`` of the parts of each projection."""
    return {name: tuple(part.d_out for part in parts) for name, parts in model.parts.items()}


def is_llama(model: Decoder) -> bool:
    """RMS norms, rotary positions in every head, grouped-query attention to all that came before, gated SiLU,
    and nothing else."""
    extras = (model.embed_norm, model.positions, model.head_softcap, model.final_norm.bias)
    first = model.layers[0].attention
    return (
        model.activation == "silu"
        and "gate_up" in model.parts
        and not model.is_parallel
        and model.embed_scale == 1
        and all(extra is None for extra in extras)
        and first.rotary is not None
        and first.scale == model.shape.head_dim**-0.5
        and all(extra is None for extra in (first.window, first.softcap, first.key_bias))
        and all(
            layer.attention is first
            and layer.attn_norm.eps == layer.mlp_norm.eps == model.final_norm.eps
            and (layer.attn_post_norm or layer.mlp_post_norm or layer.query_norm or layer.key_norm) is None
            for layer in model.layers
        )
    )
