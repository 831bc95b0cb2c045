"""Each supported Hugging Face family: where its weights are, and what it computes. A new family is a row.

Llama, Mistral, Qwen2 and 3, Gemma 1 to 3, Falcon, BLOOM, GLM-4 and GPT-2, and whatever has one of their
configurations (the dense DeepSeek distillations are Llama and Qwen2). The truth is transformers' modelling
code; rotary frequencies and ALiBi come from it. What differs only in how rows lie is put in the runner's
order here: queries, keys and values that are fused per head (Falcon, BLOOM), rotary pairs that are neighbours
or do not fill the head (GLM). Anything that would be computed otherwise is refused."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers.models.bloom import modeling_bloom
from transformers.models.falcon import modeling_falcon

from attribution.errors import Rejected
from serve_apps.engine.decoder import (
    ACTIVATIONS,
    Attention,
    Decoder,
    Layer,
    Linear,
    Norm,
    Part,
    Rotary,
    Shape,
)


@dataclass(frozen=True, slots=True)
class Family:
    """Module paths (``layer`` holds ``{i}``, the next ones lie below it), and what no configuration says."""

    layer: str = "model.layers.{i}."
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    o: str = "self_attn.o_proj"
    gate_up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    up: str | None = None  # instead of ``gate_up``: the MLP has no gate
    down: str = "mlp.down_proj"
    attn_norm: str = "input_layernorm"
    mlp_norm: str = "post_attention_layernorm"
    attn_post_norm: str | None = None
    mlp_post_norm: str | None = None
    query_norm: str | None = None
    key_norm: str | None = None

    embed: str = "model.embed_tokens"
    embed_norm: str | None = None
    positions: str | None = None
    final_norm: str = "model.norm"
    head: str = "lm_head"

    activation: str = "hidden_act"  # the configuration's key, or where it has none the activation itself
    is_transposed: bool = False  # linears are Conv1D, [d_in, d_out]
    is_grouped: bool = False  # the one qkv module holds, for each key head, its queries, its key, its value
    is_interleaved: bool = False  # rotary pairs are neighbours
    is_parallel: bool = False
    is_gemma: bool = False  # norms multiply by 1 + weight, embeddings by the root of the width
    has_window: bool = False


LLAMA = Family()
GEMMA = Family(is_gemma=True)
GEMMA2 = replace(
    GEMMA,
    activation="hidden_activation",
    attn_post_norm="post_attention_layernorm",
    mlp_norm="pre_feedforward_layernorm",
    mlp_post_norm="post_feedforward_layernorm",
    has_window=True,
)
QUERY_NORM, KEY_NORM = "self_attn.q_norm", "self_attn.k_norm"
GLM = Family(gate_up=("mlp.gate_up_proj",), is_interleaved=True)
BLOOM = Family(
    layer="transformer.h.{i}.",
    qkv=("self_attention.query_key_value",),
    o="self_attention.dense",
    up="mlp.dense_h_to_4h",
    down="mlp.dense_4h_to_h",
    embed="transformer.word_embeddings",
    embed_norm="transformer.word_embeddings_layernorm",
    final_norm="transformer.ln_f",
    activation="gelu_pytorch_tanh",
    is_grouped=True,
)
GPT2 = Family(
    layer="transformer.h.{i}.",
    qkv=("attn.c_attn",),
    o="attn.c_proj",
    up="mlp.c_fc",
    down="mlp.c_proj",
    attn_norm="ln_1",
    mlp_norm="ln_2",
    embed="transformer.wte",
    positions="transformer.wpe",
    final_norm="transformer.ln_f",
    activation="activation_function",
    is_transposed=True,
)
FAMILIES = {
    "llama": LLAMA,
    "mistral": replace(LLAMA, has_window=True),
    "qwen2": replace(LLAMA, has_window=True),
    "qwen3": replace(LLAMA, has_window=True, query_norm=QUERY_NORM, key_norm=KEY_NORM),
    "gemma": GEMMA,
    "gemma2": GEMMA2,
    "gemma3_text": replace(GEMMA2, query_norm=QUERY_NORM, key_norm=KEY_NORM),
    "falcon": replace(BLOOM, embed_norm=None, activation="activation"),  # completed by _falcon
    "bloom": BLOOM,
    "glm": GLM,
    "glm4": replace(GLM, attn_post_norm="post_self_attn_layernorm", mlp_post_norm="post_mlp_layernorm"),
    "gpt2": GPT2,
}
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
NOT_COMPUTED = (
    "add_cross_attention",
    "apply_residual_connection_post_layernorm",
    "quantization_config",
    "use_bidirectional_attention",
)


def fuse_decoder(model: Any, max_length: int | None = None) -> Decoder:
    """Take a transformers causal LM apart. The model should be dropped afterwards.

    Args:
        max_length: the most tokens any request may have, where that is fewer than the model takes.

    Raises:
        Rejected: a family, or a feature of one, that the runner does not compute.
    """
    config = model.config
    family = _family(config)
    shape = _shape(config, max_length)
    weights = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    reader = _Reader(family, config, shape, weights)
    parts = reader.parts()
    attentions = _attentions(model, family, shape)
    embed = weights[f"{family.embed}.weight"]
    return Decoder(
        shape=shape,
        layer_path=family.layer,
        parts=parts,
        layers=tuple(reader.layer(i, parts, attention) for i, attention in enumerate(attentions)),
        embed=embed,
        final_norm=reader.norm(family.final_norm),
        head=embed if config.tie_word_embeddings else weights[f"{family.head}.weight"],
        activation=_activation(config, family),
        is_parallel=family.is_parallel,
        # Rounded to the model's type, as its authors do.
        embed_scale=float(torch.tensor(embed.shape[1] ** 0.5).to(embed.dtype)) if family.is_gemma else 1.0,
        embed_norm=None if family.embed_norm is None else reader.norm(family.embed_norm),
        positions=None if family.positions is None else weights[f"{family.positions}.weight"],
        head_softcap=getattr(config, "final_logit_softcapping", None),
    )


def _refused(reason: str) -> Rejected:
    return Rejected("model_family", reason, field="base_model")


def _family(config: Any) -> Family:
    if any(getattr(config, key, None) for key in EXPERTS):
        raise _refused(f"{config.model_type} is a mixture of experts, which the engine does not run")
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise _refused(f"the engine runs {', '.join(sorted(FAMILIES))}, not {config.model_type}")
    for key in NOT_COMPUTED:
        if getattr(config, key, None):
            raise _refused(f"{config.model_type} with {key} is not supported")
    return _falcon(config, family) if config.model_type == "falcon" else family


def _falcon(config: Any, family: Family) -> Family:
    """Sequential (Falcon-RW), or parallel with one norm (7B, 11B) or two (40B, 180B)."""
    if not (config.new_decoder_architecture or config.parallel_attn):
        return family
    if config.new_decoder_architecture and config.num_ln_in_parallel_attn != 1:
        return replace(family, is_parallel=True, attn_norm="ln_attn", mlp_norm="ln_mlp")
    return replace(family, is_parallel=True, mlp_norm="input_layernorm")


def _shape(config: Any, max_length: int | None) -> Shape:
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    if config.model_type == "falcon" and (config.new_decoder_architecture or config.multi_query):
        kv_heads = config.num_kv_heads if config.new_decoder_architecture else 1
    # ALiBi has no last position: BLOOM's files give the length of its training, its configuration has none.
    longest: int = getattr(config, "max_position_embeddings", getattr(config, "seq_length", 2048))
    return Shape(
        num_layers=config.num_hidden_layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        vocabulary=config.vocab_size,
        max_length=min(longest, max_length or longest),
    )


def _activation(config: Any, family: Family) -> str:
    name = str(getattr(config, family.activation, family.activation))
    if name not in ACTIVATIONS:
        raise _refused(f"activation {name} is not supported")
    return name


def _attentions(model: Any, family: Family, shape: Shape) -> list[Attention]:
    """One for each layer, the same object where they are the same."""
    config = model.config
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * shape.num_layers
    window = getattr(config, "sliding_window", None) if family.has_window else None
    always = window is not None and not hasattr(config, "layer_types")
    key_bias = _alibi(model, shape)
    scale = (getattr(config, "query_pre_attn_scalar", None) or shape.head_dim) ** -0.5
    if not getattr(config, "scale_attn_weights", True):
        scale = 1.0
    made: dict[str, Attention] = {}
    for kind in kinds:
        slides = window is not None and window < shape.max_length and (always or kind == "sliding_attention")
        made[kind] = Attention(
            scale=scale,
            rotary=None if family.positions or key_bias is not None else _rotary(model, family, shape, kind),
            window=window if slides else None,
            softcap=getattr(config, "attn_logit_softcapping", None),
            key_bias=key_bias,
        )
    if getattr(config, "scale_attn_by_inverse_layer_idx", False):
        return [replace(made[kind], scale=scale / (i + 1)) for i, kind in enumerate(kinds)]
    return [made[kind] for kind in kinds]


def _rotary(model: Any, family: Family, shape: Shape, kind: str) -> Rotary:
    """As the library computed it; ``kind`` matters where layers differ (Gemma 3)."""
    module = model.base_model.rotary_emb
    per_kind = isinstance(module.rope_type, dict)
    rope_type = module.rope_type[kind] if per_kind else module.rope_type
    if rope_type == "longrope" or "dynamic" in rope_type:
        raise _refused(f"rotary scaling {rope_type!r}, whose frequencies follow the length, is not supported")
    prefix = f"{kind}_" if per_kind else ""
    inv_freq = getattr(module, f"{prefix}inv_freq").detach().float()
    scale = float(getattr(module, f"{prefix}attention_scaling"))
    still = shape.head_dim // 2 - len(inv_freq)  # pairs that do not turn
    if still and (scale != 1 or not family.is_interleaved):
        raise _refused(f"rotary scaling {rope_type!r} of a part of each head is not supported")
    return Rotary(torch.cat((inv_freq, inv_freq.new_zeros(still))), scale)


def _alibi(model: Any, shape: Shape) -> Tensor | None:
    """A bias that grows with the key's position; softmax takes no notice of where the query is."""
    config = model.config
    ones = torch.ones(1, shape.max_length, dtype=torch.long, device=model.device)
    if config.model_type == "bloom":
        alibi = modeling_bloom.build_alibi_tensor(ones, shape.num_heads, model.dtype)
    elif getattr(config, "alibi", False):
        alibi = modeling_falcon.build_alibi_tensor(ones, shape.num_heads, model.dtype) / shape.head_dim**0.5
    else:
        return None
    return alibi.view(shape.num_heads, shape.max_length)


@dataclass(frozen=True, slots=True)
class _Reader:
    """Finds a family's weights by name."""

    family: Family
    config: Any
    shape: Shape
    weights: Mapping[str, Tensor]

    def norm(self, path: str) -> Norm:
        config, weight = self.config, self.weights[f"{path}.weight"]
        eps = config.rms_norm_eps if hasattr(config, "rms_norm_eps") else config.layer_norm_epsilon
        bias = self.weights.get(f"{path}.bias")
        return Norm(1.0 + weight.float() if self.family.is_gemma else weight, bias, eps)

    def layer(self, index: int, parts: Mapping[str, tuple[Part, ...]], attention: Attention) -> Layer:
        family, prefix = self.family, self.family.layer.format(i=index)

        def norm(path: str | None) -> Norm | None:
            return None if path is None else self.norm(prefix + path)

        return Layer(
            attention=attention,
            projections={
                name: _fuse_linear([self._linear(prefix, part) for part in fused])
                for name, fused in parts.items()
            },
            attn_norm=self.norm(prefix + family.attn_norm),
            mlp_norm=self.norm(prefix + family.mlp_norm),
            attn_post_norm=norm(family.attn_post_norm),
            mlp_post_norm=norm(family.mlp_post_norm),
            query_norm=norm(family.query_norm),
            key_norm=norm(family.key_norm),
        )

    def parts(self) -> dict[str, tuple[Part, ...]]:
        family = self.family
        mlp = {"gate_up": family.gate_up} if family.up is None else {"up": (family.up,)}
        named = {"qkv": family.qkv, "o": (family.o,), **mlp, "down": (family.down,)}
        parts = {name: tuple(self._part(module) for module in modules) for name, modules in named.items()}
        if family.is_grouped:
            (fused,) = parts["qkv"]
            parts["qkv"] = (replace(fused, order=_grouped_order(self.shape)),)
        if family.is_interleaved:
            query, key, value = parts["qkv"]
            parts["qkv"] = (
                replace(query, order=self._pair_order(self.shape.num_heads)),
                replace(key, order=self._pair_order(self.shape.num_kv_heads)),
                value,
            )
        return parts

    def _part(self, module: str) -> Part:
        weight = self.weights[f"{self.family.layer.format(i=0)}{module}.weight"]
        return Part(module, weight.shape[1 if self.family.is_transposed else 0])

    def _linear(self, prefix: str, part: Part) -> Linear:
        weight, bias = (self.weights.get(f"{prefix}{part.module}.{name}") for name in ("weight", "bias"))
        assert weight is not None, part.module
        weight = weight.t() if self.family.is_transposed else weight
        if part.order is None:
            return Linear(weight, bias)
        order = part.order.to(weight.device)
        return Linear(weight[order], None if bias is None else bias[order])

    def _pair_order(self, num_heads: int) -> Tensor:
        """Neighbours ``2i`` and ``2i + 1`` become ``i`` and ``i + head_dim / 2``. Scores do not notice:
        queries and keys are put in one order."""
        head_dim = self.shape.head_dim
        within = torch.arange(head_dim).view(-1, 2).t().flatten()
        return (torch.arange(0, num_heads * head_dim, head_dim).unsqueeze(1) + within).flatten()


def _grouped_order(shape: Shape) -> Tensor:
    """All queries, then all keys, then all values."""
    per_group = shape.num_heads // shape.num_kv_heads
    rows = torch.arange(shape.num_kv_heads * (per_group + 2) * shape.head_dim)
    rows = rows.view(shape.num_kv_heads, per_group + 2, shape.head_dim)
    return torch.cat([part.flatten() for part in rows.split([per_group, 1, 1], dim=1)])


def _fuse_linear(linears: list[Linear]) -> Linear:
    biases = [linear.bias for linear in linears if linear.bias is not None]
    assert len(biases) in (0, len(linears))
    weight = torch.cat([linear.weight for linear in linears])
    return Linear(weight.contiguous(), torch.cat(biases) if biases else None)
