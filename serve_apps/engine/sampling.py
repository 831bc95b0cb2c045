"""From logits to the next token, row by row: what one row draws depends on that row alone."""

import hashlib
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from serve_apps.engine.types import SamplingParams, TokenLogprob, TokenScore


def sample(
    logits: Tensor,
    params: SamplingParams,
    generated: Sequence[int],
    prompt: Sequence[int] = (),
    allowed: Tensor | None = None,
) -> int:
    """The next token of one row.

    Args:
        logits: ``[vocabulary]``.
        generated: tokens generated so far; their number is the index of the draw.
        allowed: bool ``[vocabulary]``, at least one of them true; None allows all.
    """
    logits = _bias(_penalise(_repel(logits.float(), params, prompt, generated), params, generated), params)
    if allowed is not None:
        logits = logits.masked_fill(~allowed.to(logits.device), float("-inf"))
    if params.temperature == 0:
        return int(logits.argmax())
    return _draw(logits / params.temperature, params, _uniform(params.seed, len(generated)))


def logprob_of(logits: Tensor, token_id: int, num_top: int, text_offset: int) -> TokenLogprob:
    """What the model itself thought of ``token_id`` and of the ``num_top`` likeliest."""
    scores = logits.float().log_softmax(0)
    top = scores.topk(num_top)
    likeliest = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    chosen = TokenScore(token_id, float(scores[token_id]))
    return TokenLogprob(chosen, tuple(TokenScore(*pair) for pair in likeliest), text_offset)


def _repel(logits: Tensor, params: SamplingParams, prompt: Sequence[int], generated: Sequence[int]) -> Tensor:
    """Repetition penalty of CTRL, arXiv:1909.05858 §4.1: every token seen, in prompt or answer, once."""
    seen = {*prompt, *generated}
    if params.repetition_penalty == 1 or not seen:
        return logits
    ids = torch.tensor(sorted(seen), device=logits.device)
    before = logits[ids]
    factor = params.repetition_penalty
    return logits.index_copy(0, ids, torch.where(before > 0, before / factor, before * factor))


def _penalise(logits: Tensor, params: SamplingParams, generated: Sequence[int]) -> Tensor:
    """Presence and frequency penalties as the OpenAI reference defines them."""
    if not generated or not (params.presence_penalty or params.frequency_penalty):
        return logits
    counts = Counter(generated)
    ids = torch.tensor(list(counts), device=logits.device)
    times = torch.tensor(list(counts.values()), dtype=logits.dtype, device=logits.device)
    return logits.index_add(0, ids, -(params.presence_penalty + params.frequency_penalty * times))


def _bias(logits: Tensor, params: SamplingParams) -> Tensor:
    if not params.logit_bias:
        return logits
    ids = torch.tensor([bias.token_id for bias in params.logit_bias], device=logits.device)
    scores = torch.tensor(
        [bias.score for bias in params.logit_bias], dtype=logits.dtype, device=logits.device
    )
    return logits.index_add(0, ids, scores)


def _draw(logits: Tensor, params: SamplingParams, uniform: float) -> int:
    """Inverse CDF over the tokens that top-k, top-p and min-p leave, most likely first."""
    cuts = params.top_k or params.top_p < 1 or params.min_p
    if not cuts:
        return _invert(logits.softmax(0), uniform)
    probabilities, ids = logits.softmax(0).sort(descending=True, stable=True)
    keep = len(ids)
    if params.top_k:
        keep = min(keep, params.top_k)
    if params.top_p < 1:
        keep = min(keep, int((probabilities.cumsum(0) < params.top_p).sum()) + 1)
    if params.min_p:
        keep = min(keep, int((probabilities >= params.min_p * probabilities[0]).sum()))
    return int(ids[_invert(probabilities[:keep], uniform)])


def _invert(weights: Tensor, uniform: float) -> int:
    """Index into ``weights`` at the fraction ``uniform`` of their sum."""
    sums = weights.double().cumsum(0)
    return min(int(torch.searchsorted(sums, uniform * sums[-1].item(), right=True)), len(weights) - 1)


def _uniform(seed: int, index: int) -> float:
    """Draw ``index`` of ``seed`` in [0, 1): 53 bits of a hash."""
    preimage = b"openledger/draw/1" + seed.to_bytes(16, "big", signed=True) + index.to_bytes(8, "big")
    return (int.from_bytes(hashlib.sha256(preimage).digest()[:7], "big") >> 3) / 2**53
