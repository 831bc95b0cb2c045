"""Exact gradients of single answers with respect to LoRA factors.

A LoRA linear computes ``y = W x + scale * B A x``. With the input ``x`` and the gradient ``dy`` captured at
each of them, every example's own gradient is two small products, so a batch costs one forward and one
backward pass and no weight gradient is ever built:

    dA = scale * (dy B)^T x        dB = scale * dy^T (x A^T)

The module knows no training code: it adds the low-rank update to the base model's own linears by hooks, from
factors alone, and takes them off again. Loss: mean negative log-likelihood of an example's answer tokens
given all before them (the prompt carries no loss). Canonical runtime for money: batch of one, base and
factors in float32, one thread."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from attribution.errors import Corrupted


@dataclass(frozen=True, slots=True)
class Factors:
    """LoRA of one linear: ``a`` is ``[rank, d_in]``, ``b`` is ``[d_out, rank]``, both float32."""

    a: Tensor
    b: Tensor
    scale: float


@dataclass(frozen=True, slots=True)
class Example:
    """Token ids of one question and its answer. The answer holds whatever ends it, and is never empty."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]

    def __post_init__(self) -> None:
        assert self.prompt and self.answer, "an example needs at least one prompt and one answer token"

    @property
    def num_tokens(self) -> int:
        return len(self.prompt) + len(self.answer)


Lora = Mapping[str, Factors]  # by the path of the linear inside the model


@dataclass(frozen=True, slots=True)
class _Tap:
    """What one linear saw in the last forward pass: ``x [batch, tokens, d_in]``, ``y [batch, tokens,
    d_out]``."""

    x: Tensor
    y: Tensor


def num_parameters(lora: Lora) -> int:
    return sum(factors.a.numel() + factors.b.numel() for factors in lora.values())


def gradient_order(lora: Lora) -> list[str]:
    """The order of linears in a flat gradient; of each, ``a`` comes before ``b``, both row by row."""
    return sorted(lora)


@contextmanager
def updated(model: nn.Module, loras: Sequence[Lora]) -> Iterator[None]:
    """Add adapters to the model's linears whose gradient nobody asks for, as a blend does."""
    handles = [
        _linear(model, path, factors).register_forward_hook(
            lambda _module, inputs, out, factors=factors: out + _update(factors, inputs[0]).to(out.dtype)
        )
        for lora in loras
        for path, factors in lora.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _linear(model: nn.Module, path: str, factors: Factors) -> nn.Module:
    linear = model.get_submodule(path)
    shape = (factors.b.shape[0], factors.a.shape[1])
    if tuple(linear.weight.shape) != shape:
        raise Corrupted("lora_shape", f"{path} is {tuple(linear.weight.shape)}, factors make {shape}")
    return linear


def _update(factors: Factors, x: Tensor) -> Tensor:
    low = functional.linear(x.to(factors.a.dtype), factors.a)
    return factors.scale * functional.linear(low, factors.b)


@contextmanager
def _attached(model: nn.Module, lora: Lora) -> Iterator[dict[str, _Tap]]:
    """Add the factors' update to the model's linears and record what passes through them."""
    taps: dict[str, _Tap] = {}

    def hook_for(path: str, factors: Factors):  # type: ignore[no-untyped-def]
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> Tensor:
            x = inputs[0]
            y = out + _update(factors, x).to(out.dtype)
            if not y.requires_grad:  # the first adapted layer: nothing below it needs a graph
                y = y.detach().requires_grad_()
            taps[path] = _Tap(x.detach(), y)
            return y

        return hook

    handles = [
        _linear(model, path, factors).register_forward_hook(hook_for(path, factors))
        for path, factors in lora.items()
    ]
    try:
        yield taps
    finally:
        for handle in handles:
            handle.remove()


def answer_losses(model: nn.Module, examples: Sequence[Example]) -> Tensor:
    """Mean negative log-likelihood of each example's answer, ``[examples]``.

    Padding is on the right, where a causal model cannot see it; only positions that predict an answer token
    of some example reach the output layer."""
    longest = max(example.num_tokens for example in examples)
    first = min(len(example.prompt) for example in examples) - 1
    device = next(model.parameters()).device
    ids = torch.zeros(len(examples), longest, dtype=torch.long)
    labels = torch.full((len(examples), longest), -100)
    for row, example in enumerate(examples):
        ids[row, : example.num_tokens] = torch.tensor(example.prompt + example.answer)
        labels[row, len(example.prompt) : example.num_tokens] = torch.tensor(example.answer)
    labels = labels[:, first + 1 :].to(device)
    keep = torch.arange(first, longest - 1, device=device)
    logits = model(input_ids=ids.to(device), use_cache=False, logits_to_keep=keep).logits.float()
    losses = functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    return losses.sum(dim=1) / (labels != -100).sum(dim=1)


def answer_gradients(model: nn.Module, lora: Lora, examples: Sequence[Example]) -> Tensor:
    """Each example's own gradient of its answer loss, flat in ``gradient_order``: ``[examples, parameters]``.

    The model must be frozen and in evaluation mode; it is left as it was found."""
    assert not model.training and not any(p.requires_grad for p in model.parameters()), "freeze the model"
    with torch.enable_grad(), _attached(model, lora) as taps:
        losses = answer_losses(model, examples)
        order = gradient_order(lora)
        flows = torch.autograd.grad(losses.sum(), [taps[path].y for path in order])
    gradients = torch.empty(len(examples), num_parameters(lora), dtype=torch.float32)
    at = 0
    for path, flow in zip(order, flows, strict=True):
        factors, x = lora[path], taps[path].x.float()
        dy = flow.float() * factors.scale
        for part in (
            torch.einsum("ntr,nti->nri", dy @ factors.b, x),
            torch.einsum("nto,ntr->nor", dy, x @ factors.a.T),
        ):
            size = part[0].numel()
            gradients[:, at : at + size] = part.reshape(len(examples), size)
            at += size
    return gradients


def batches(examples: Sequence[Example], max_tokens: int) -> Iterator[list[int]]:
    """Indexes of examples, longest first, such that a batch padded to its longest holds ``max_tokens`` at
    most."""
    order = sorted(range(len(examples)), key=lambda i: (-examples[i].num_tokens, i))
    batch: list[int] = []
    for index in order:
        if batch and examples[batch[0]].num_tokens * (len(batch) + 1) > max_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
