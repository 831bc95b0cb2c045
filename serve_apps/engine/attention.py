"""Attention of one step over the paged cache, in plain torch: of rows of one token, and of longer chunks.

What a step needs for each kind of ``Attention`` is computed once, as a ``View``, and used by every layer of
that kind. Whatever a row must not see is masked out of its scores; it reads only its own blocks and the null
block."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from serve_apps.engine.decoder import Attention


@dataclass(frozen=True, slots=True)
class Chunk:
    """A row of several tokens: its place in the step and its keys in the cache."""

    tokens: slice
    start: int
    end: int
    blocks: Tensor


@dataclass(frozen=True, slots=True)
class Singles:
    """Rows of one token: ``tables``, padded with the null block to ``[rows, most]``, and their lengths."""

    tables: Tensor
    ends: Tensor


@dataclass(frozen=True, slots=True)
class View:
    """What the layers of one kind see of a step.

    ``cos`` and ``sin``: ``[tokens, 1, head_dim]``, none without rotary positions. ``is_hidden``: bool
    ``[rows, 1, keys]``, of rows of one token. ``bias``: ``[kv_heads, 1, group, keys]``. ``masks``: of each
    chunk, ``[tokens, keys]`` true where seen, or ``[heads or 1, tokens, keys]`` to be added to the scores;
    ``None``: each token sees all up to itself, from the first on."""

    attention: Attention
    cos: Tensor | None
    sin: Tensor | None
    is_hidden: Tensor
    bias: Tensor | None
    masks: tuple[Tensor | None, ...]


def hidden_keys(attention: Attention, singles: Singles, block_size: int) -> Tensor:
    places = torch.arange(singles.tables.shape[1] * block_size, device=singles.tables.device)
    ends = singles.ends.unsqueeze(1)
    is_hidden = places >= ends
    if attention.window is not None:
        is_hidden |= places < ends - attention.window
    return is_hidden.unsqueeze(1)


def chunk_mask(attention: Attention, chunk: Chunk) -> Tensor | None:
    """See ``View.masks``."""
    window, bias = attention.window, attention.key_bias
    is_added = bias is not None or attention.softcap is not None
    if chunk.start == 0 and not is_added and (window is None or chunk.end <= window):
        return None
    places = torch.arange(chunk.end, device=chunk.blocks.device)
    own = places[chunk.start :].unsqueeze(1)
    is_seen = places <= own
    if window is not None:
        is_seen &= places > own - window
    if not is_added:
        return is_seen
    added = torch.zeros(1, 1, 1, device=places.device) if bias is None else bias[:, None, : chunk.end]
    return torch.where(is_seen, added, float("-inf"))


def attend_singles(query: Tensor, keys: Tensor, values: Tensor, singles: Singles, view: View) -> Tensor:
    """One new token per row against its whole past; the query heads of a group are the rows of one product.

    ``query`` is ``[rows, heads, head_dim]``; so is the result. The cache is ``[kv_heads, blocks, block_size,
    head_dim]``."""
    num_rows, heads, head_dim = query.shape
    kv_heads = keys.shape[0]
    blocks = singles.tables.flatten()
    past = gather(keys, blocks).view(kv_heads, num_rows, -1, head_dim)
    past_values = gather(values, blocks).view(kv_heads, num_rows, -1, head_dim)
    grouped = query.view(num_rows, kv_heads, heads // kv_heads, head_dim).transpose(0, 1)
    scores = _capped(grouped @ past.transpose(2, 3) * view.attention.scale, view.attention.softcap)
    if view.bias is not None:
        scores = scores + view.bias
    weights = scores.masked_fill(view.is_hidden, float("-inf")).float().softmax(-1).to(query.dtype)
    return (weights @ past_values).transpose(0, 1).reshape(num_rows, heads, head_dim)


def attend_chunk(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, attention: Attention
) -> Tensor:
    """The last tokens of one row against all its tokens so far, ``[tokens, heads, head_dim]``."""
    q, k, v = (t.transpose(0, 1).unsqueeze(0) for t in (query, keys, values))
    if attention.softcap is None:
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=attention.scale, enable_gqa=True
        )
    else:
        assert mask is not None  # caps come with masks to be added
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
        scores = _capped(q @ k.transpose(2, 3) * attention.scale, attention.softcap)
        out = (scores + mask).float().softmax(-1).to(query.dtype) @ v
    return out.squeeze(0).transpose(0, 1)


def gather(cache: Tensor, blocks: Tensor) -> Tensor:
    """Blocks of every head, in order: ``[kv_heads, len(blocks) * block_size, head_dim]``."""
    kv_heads, num_blocks, block_size, head_dim = cache.shape
    heads = torch.arange(kv_heads, device=blocks.device).unsqueeze(1) * num_blocks
    flat = cache.view(kv_heads * num_blocks, block_size * head_dim)
    return flat.index_select(0, (heads + blocks).flatten()).view(kv_heads, -1, head_dim)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions in the half-split layout of Hugging Face; ``x`` is ``[tokens, heads, head_dim]``."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def _capped(scores: Tensor, cap: float | None) -> Tensor:
    return scores if cap is None else cap * torch.tanh(scores / cap)
