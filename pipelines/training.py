"""The mathematics of a fine-tuning, and nothing else: no Ray, no DeepSpeed, no files.

A frozen base, LoRA factors in fp32 beside its last blocks, a loss that is a sum over examples divided by a
constant, and an Adam without a kink. The shell hands these very functions to DeepSpeed, and a replay
differentiates them: every function of a state is pure, there is no dropout and no clipping, and the update is
smooth everywhere, its first step included (``B`` starts at zero, so ``A`` has no gradient at step 1, where
the usual Adam divides 0 by 0; with eps inside the root the update is 0 / sqrt(eps)).

The blocks below the first adapted one never change, so a packed row passes through them once: ``lower``
returns what the first adapted block receives, and the caller may keep it for the next epoch. It is the same
number either way. Families trained: those of ``FAMILIES``; the engine serves more."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn import functional
from transformers.modeling_utils import PreTrainedModel

from attribution.errors import Rejected
from attribution.hashing import sha256
from cluster.adapters import AdapterWeights, Factors
from pipelines.packing import PackedRow

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")  # whose blocks ``_blocks`` computes as they themselves do
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class TrainingConfig(BaseModel):
    """How an adapter is trained. Part of the training's identity: another value, another adapter."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rank: int = Field(default=16, ge=1, le=256)
    alpha: int = Field(default=32, ge=1)
    adapted_blocks: int = Field(default=8, ge=1)  # the last ones
    linears: tuple[str, ...] = LINEARS
    wordings_per_record: int = Field(default=0, ge=0)  # 0: all of the manifest's
    epochs: int = Field(default=2, ge=1)
    row_tokens: int = Field(default=256, ge=16)
    rows_per_step: int = Field(default=2, ge=1)  # the number of workers must divide it
    learning_rate: float = Field(default=2e-3, gt=0)
    warmup_steps: int = Field(default=4, ge=0)
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.95, ge=0, lt=1)
    epsilon: float = Field(default=1e-8, gt=0)  # inside the root: compare with the square of a gradient
    compute_dtype: Literal["float32", "bfloat16"] = "float32"  # of the base; bf16 weights are exact in both
    attention: Literal["sdpa", "eager"] = "sdpa"


class LoraLinear(nn.Module):
    """``y = W x + scale * b (a x)``: the base in its own type, the update computed in fp32. ``a``
    ``[rank, d_in]``, ``b`` ``[d_out, rank]``.

    Source: LoRA, arXiv:2106.09685 §4.1."""

    def __init__(self, base: nn.Module, a: Tensor, b: Tensor, scale: float) -> None:
        super().__init__()
        self.base = base
        self.a = nn.Parameter(a)
        self.b = nn.Parameter(b)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        out = self.base(x)
        update = functional.linear(functional.linear(x.to(self.a.dtype), self.a), self.b)
        return out + (self.scale * update).to(out.dtype)


@dataclass(frozen=True, slots=True)
class RowTensors:
    """One packed row, ready to be computed with; a batch of one.

    ``ids``, ``positions``: int64 ``[1, tokens]``. ``mask``: ``[1, 1, tokens, tokens]``, 0 where a token may
    look and the type's least value elsewhere. ``sources``, ``labels``, ``owners``: int64 ``[answer tokens]``:
    where an answer token is predicted from, what it is, and the index of its span."""

    ids: Tensor
    positions: Tensor
    mask: Tensor
    sources: Tensor
    labels: Tensor
    owners: Tensor
    num_spans: int


def row_tensors(row: PackedRow, dtype: torch.dtype, device: str = "cpu") -> RowTensors:
    num_tokens = len(row.ids)
    ids = torch.tensor(row.ids)
    place = torch.arange(num_tokens)
    owner = torch.full((num_tokens,), -1)  # -1: the opening, which all may see
    positions = place.clone()
    for index, span in enumerate(row.spans):
        owner[span.start : span.end] = index
        positions[span.start : span.end] = torch.arange(row.opening, row.opening + span.end - span.start)
    visible = (place[:, None] >= place) & ((owner[:, None] == owner) | (owner == -1))
    mask = torch.zeros(num_tokens, num_tokens, dtype=dtype).masked_fill_(~visible, torch.finfo(dtype).min)
    answers = torch.cat([torch.arange(span.answer_start, span.end) for span in row.spans])
    # An answer begins at least one token after its span does, so the token before it is its span's own.
    return RowTensors(
        ids=ids[None].to(device),
        positions=positions[None].to(device),
        mask=mask[None, None].to(device),
        sources=(answers - 1).to(device),
        labels=ids[answers].to(device),
        owners=owner[answers].to(device),
        num_spans=len(row.spans),
    )


def insert_lora(model: PreTrainedModel, config: TrainingConfig, seed: int) -> dict[str, nn.Parameter]:
    """Put LoRA beside the chosen linears of the last blocks; returns what is trained, by name, sorted.

    Names are ``model.layers.14.self_attn.q_proj.a`` and ``.b``: those of the base, whatever wraps it. ``A``
    is drawn per module from the seed and the name, uniform as a fresh ``nn.Linear``'s; ``B`` is zero."""
    if model.config.model_type not in FAMILIES:
        raise Rejected(
            "model_family",
            f"{', '.join(FAMILIES)} are trained, not {model.config.model_type}",
            field="base_model",
        )
    blocks = len(model.model.layers)
    if config.adapted_blocks > blocks:
        raise Rejected(
            "adapted_blocks", f"{config.adapted_blocks} of {blocks} blocks", field="adapted_blocks"
        )
    trained: dict[str, nn.Parameter] = {}
    for block in range(blocks - config.adapted_blocks, blocks):
        path = f"model.layers.{block}"
        for name, module in list(model.get_submodule(path).named_modules()):
            if isinstance(module, nn.Linear) and name.rpartition(".")[2] in config.linears:
                a = _initial_a(f"{path}.{name}", module, config.rank, seed)
                b = torch.zeros(module.out_features, config.rank)
                adapted = LoraLinear(module, a, b, scale=config.alpha / config.rank)
                model.set_submodule(f"{path}.{name}", adapted.to(module.weight.device))
                trained |= {f"{path}.{name}.a": adapted.a, f"{path}.{name}.b": adapted.b}
    if not trained:
        raise Rejected("linears", f"no linear is called {' or '.join(config.linears)}", field="linears")
    return dict(sorted(trained.items()))


def _initial_a(path: str, linear: nn.Linear, rank: int, seed: int) -> Tensor:
    bound = 1 / math.sqrt(linear.in_features)
    generator = torch.Generator().manual_seed(
        int.from_bytes(sha256(f"{seed} {path}".encode())[:8], "big") >> 1
    )
    return torch.empty(rank, linear.in_features).uniform_(-bound, bound, generator=generator)


def lower(model: PreTrainedModel, first_adapted: int, row: RowTensors) -> Tensor:
    """What the first adapted block receives, ``[1, tokens, hidden]``: frozen, so the same in every epoch."""
    with torch.no_grad():
        return _blocks(model, model.model.embed_tokens(row.ids), row, 0, first_adapted)


def losses(model: PreTrainedModel, first_adapted: int, hidden: Tensor, row: RowTensors) -> Tensor:
    """Negative log-likelihood of each span's answer, summed over its tokens: fp32 ``[spans]``."""
    hidden = _blocks(model, hidden, row, first_adapted, len(model.model.layers))
    logits = model.lm_head(model.model.norm(hidden[0, row.sources])).float()
    tokens = functional.cross_entropy(logits, row.labels, reduction="none")
    return torch.zeros(row.num_spans, device=tokens.device).index_add(0, row.owners, tokens)


def step_loss(row_losses: Tensor, weights: Tensor, normaliser: int) -> Tensor:
    """A row's part of its step's loss: ``sum_i weight_i * loss_i / normaliser``. All weights are 1 in
    training; a replay asks for the derivative with respect to them. Rows of a step, and workers, only add."""
    return (row_losses * weights).sum() / normaliser


def _blocks(model: PreTrainedModel, hidden: Tensor, row: RowTensors, start: int, end: int) -> Tensor:
    rotary = model.model.rotary_emb(hidden, row.positions)
    for block in model.model.layers[start:end]:
        hidden = block(
            hidden, attention_mask=row.mask, position_ids=row.positions, position_embeddings=rotary
        )
    return hidden


def learning_rate(config: TrainingConfig, step: int, num_steps: int) -> float:
    """Of step 1 to ``num_steps``: up in a line over the warm-up, down in a line to a twentieth at the
    last."""
    warm = min(1.0, step / (config.warmup_steps + 1))
    left = 1 - (step - 1) / max(1, num_steps - 1)
    return config.learning_rate * min(warm, 0.05 + 0.95 * left)


@dataclass(frozen=True, slots=True)
class AdamState:
    """One tensor on its way: value and running moments, all of one shape, fp32."""

    value: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor


def adam(state: AdamState, gradient: Tensor, step: int, rate: float, config: TrainingConfig) -> AdamState:
    """One update, differentiable in everything: ``v - rate * m / sqrt(s + epsilon)``, bias-corrected, with
    epsilon inside the root. ``step`` counts from 1. Source: arXiv:1412.6980, smoothed as arXiv:2503.13751
    advises."""
    exp_avg = config.beta1 * state.exp_avg + (1 - config.beta1) * gradient
    exp_avg_sq = config.beta2 * state.exp_avg_sq + (1 - config.beta2) * gradient * gradient
    mean = exp_avg / (1 - config.beta1**step)
    root = torch.sqrt(exp_avg_sq / (1 - config.beta2**step) + config.epsilon)
    return AdamState(state.value - rate * mean / root, exp_avg, exp_avg_sq)


class Adam(torch.optim.Optimizer):
    """``adam`` as an optimizer, which DeepSpeed asks for; it may hand us flattened partitions, and the
    update, being element-wise, does not mind. ``prepare_step`` is called before every step.
    """

    def __init__(self, parameters: Iterable[Tensor], config: TrainingConfig) -> None:
        super().__init__(parameters, {"lr": config.learning_rate, "step": 0})
        self.config = config

    def prepare_moments(self) -> None:
        """Zero moments for whatever is optimised now; a resumed training fills them."""
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter] = {
                    name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")
                }

    def prepare_step(self, step: int, rate: float) -> None:
        for group in self.param_groups:
            group["step"], group["lr"] = step, rate

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                before = AdamState(parameter, state["exp_avg"], state["exp_avg_sq"])
                after = adam(before, parameter.grad, group["step"], group["lr"], self.config)
                parameter.copy_(after.value)
                state["exp_avg"].copy_(after.exp_avg)
                state["exp_avg_sq"].copy_(after.exp_avg_sq)


def adapter_weights(base_id: bytes, trained: Mapping[str, Tensor], config: TrainingConfig) -> AdapterWeights:
    """What is published: bf16 factors with ``alpha / rank`` folded into ``b``."""
    modules = sorted({name.rpartition(".")[0] for name in trained})
    scale = config.alpha / config.rank
    return AdapterWeights(
        base_id,
        {
            module: Factors(
                trained[f"{module}.a"].detach().to(torch.bfloat16),
                (trained[f"{module}.b"].detach() * scale).to(torch.bfloat16),
            )
            for module in modules
        },
    )


class LowerCache:
    """Keeps what ``lower`` returned for each row of a plan, up to ``max_bytes``; beyond that it is
    recomputed."""

    def __init__(self, compute: Callable[[int], Tensor], max_bytes: int) -> None:
        self._compute = compute
        self._left = max_bytes
        self._kept: dict[int, Tensor] = {}

    def __call__(self, row: int) -> Tensor:
        if row in self._kept:
            return self._kept[row]
        hidden = self._compute(row)
        size = hidden.numel() * hidden.element_size()
        if size <= self._left:
            self._left -= size
            self._kept[row] = hidden
        return hidden


def share(rows: Sequence[int], rank: int, world_size: int) -> Sequence[int]:
    """The rows of a step that fall to one worker."""
    return rows[rank::world_size]
