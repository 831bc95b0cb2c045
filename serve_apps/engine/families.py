"""Where each supported Hugging Face family keeps the weights that the runner needs. A new family is a row.

The runner computes one shape of decoder: RMS norm, rotary positions, grouped-query attention, gated SiLU; a
family whose names or optional parts differ is described here, one that computes something else is refused."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attribution.errors import Rejected


@dataclass(frozen=True, slots=True)
class Family:
    """Module paths; ``layer`` holds ``{i}``. A missing head means that the embedding is the head too."""

    embed: str = "model.embed_tokens"
    layer: str = "model.layers.{i}."
    attn_norm: str = "input_layernorm"
    qkv: tuple[str, str, str] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    o: str = "self_attn.o_proj"
    mlp_norm: str = "post_attention_layernorm"
    gate_up: tuple[str, str] = ("mlp.gate_proj", "mlp.up_proj")
    down: str = "mlp.down_proj"
    final_norm: str = "model.norm"
    head: str = "lm_head"

    @property
    def projections(self) -> dict[str, tuple[str, ...]]:
        """What is computed as one product, by the name that LoRA factors are kept under."""
        return {"qkv": self.qkv, "o": (self.o,), "gate_up": self.gate_up, "down": (self.down,)}


FAMILIES = {"llama": Family(), "mistral": Family(), "qwen2": Family()}


@dataclass(frozen=True, slots=True)
class Linear:
    weight: Tensor  # [d_out, d_in]
    bias: Tensor | None


@dataclass(frozen=True, slots=True)
class Layer:
    attn_norm: Tensor
    mlp_norm: Tensor
    projections: Mapping[str, Linear]


@dataclass(frozen=True, slots=True)
class Shape:
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocabulary: int
    max_length: int
    norm_eps: float


@dataclass(frozen=True, slots=True)
class Decoder:
    """A causal language model with its projections fused, detached from the library that read it."""

    family: Family
    shape: Shape
    embed: Tensor
    layers: tuple[Layer, ...]
    final_norm: Tensor
    head: Tensor
    inv_freq: Tensor  # [head_dim / 2], fp32
    rope_scale: float

    @property
    def dtype(self) -> torch.dtype:
        return self.embed.dtype

    @property
    def device(self) -> torch.device:
        return self.embed.device


def fuse_decoder(model: Any) -> Decoder:
    """Take a transformers causal LM apart. The model should be dropped afterwards.

    Raises:
        Rejected: a family, or a feature of one, that the runner does not compute.
    """
    config = model.config
    family = FAMILIES.get(config.model_type)
    if family is None:
        known = ", ".join(sorted(FAMILIES))
        raise Rejected(
            "model_family", f"the engine runs {known}, not {config.model_type}", field="base_model"
        )
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        raise Rejected("model_family", "sliding-window attention is not supported", field="base_model")
    if config.hidden_act != "silu":
        raise Rejected("model_family", f"activation {config.hidden_act} is not supported", field="base_model")
    weights = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    embed = weights[f"{family.embed}.weight"]
    rotary = model.model.rotary_emb
    return Decoder(
        family=family,
        shape=_shape(config),
        embed=embed,
        layers=tuple(_layer(weights, family, i) for i in range(config.num_hidden_layers)),
        final_norm=weights[f"{family.final_norm}.weight"],
        head=embed if config.tie_word_embeddings else weights[f"{family.head}.weight"],
        inv_freq=rotary.inv_freq.detach().float(),
        rope_scale=float(rotary.attention_scaling),
    )


def part_sizes(model: Decoder) -> dict[str, tuple[int, ...]]:
    """``d_out`` of the parts of each fused projection."""
    shape, first = model.shape, model.layers[0].projections
    key_value = shape.num_kv_heads * shape.head_dim
    half = first["gate_up"].weight.shape[0] // 2
    return {
        "qkv": (shape.num_heads * shape.head_dim, key_value, key_value),
        "o": (first["o"].weight.shape[0],),
        "gate_up": (half, half),
        "down": (first["down"].weight.shape[0],),
    }


def _shape(config: Any) -> Shape:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Shape(
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        vocabulary=config.vocab_size,
        max_length=config.max_position_embeddings,
        norm_eps=config.rms_norm_eps,
    )


def _layer(weights: Mapping[str, Tensor], family: Family, index: int) -> Layer:
    prefix = family.layer.format(i=index)
    return Layer(
        attn_norm=weights[f"{prefix}{family.attn_norm}.weight"],
        mlp_norm=weights[f"{prefix}{family.mlp_norm}.weight"],
        projections={
            name: _fuse_linear(weights, [prefix + part for part in parts])
            for name, parts in family.projections.items()
        },
    )


def _fuse_linear(weights: Mapping[str, Tensor], paths: list[str]) -> Linear:
    biases = [weights[f"{path}.bias"] for path in paths if f"{path}.bias" in weights]
    weight = torch.cat([weights[f"{path}.weight"] for path in paths])
    return Linear(weight.contiguous(), torch.cat(biases) if biases else None)
