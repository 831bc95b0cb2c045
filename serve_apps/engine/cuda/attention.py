"""Attention over the paged cache, for decoding and for chunks of prompts alike.

A tile is up to 16 rows: neighbouring tokens of one sequence times the query heads that share a key head. The
keys of a sequence are cut into splits of ``SPLIT`` whatever the batch; one program takes a tile through one
split with an online softmax, and the pieces of a token are merged in their order. So a token's bits depend
on its sequence alone: not on the batch, the chunks its prompt came in, or whether it was decoded or computed
again after a preemption. Keys beyond a tile's last token are not read and those beyond a token weigh
nothing, so blocks need not be cleared.

One kernel instead of FlexAttention or SDPA on gathered keys: both choose other tiles, hence another order of
sums, for prompts than for single tokens, and gathering writes every past key once more per layer and chunk.
The price is that a long chunk reads its keys once per 16 rows from the L2 cache.

Sources: online softmax, arXiv:1805.02867; FlashAttention-2, arXiv:2307.08691; splits over keys,
"Flash-Decoding" (Dao et al., 2023); pages, arXiv:2309.06180."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from serve_apps.engine.cuda.launch import ROWS, operand

SPLIT = 512  # keys of one program
KEYS = 64  # of which it takes so many at a time


@dataclass(frozen=True, slots=True)
class QueryTiles:
    """Tokens ``first`` to ``first + count`` of the step are at ``start`` and after in the sequence whose
    blocks are ``tables[row]``; int64 ``[tiles]``. ``tables`` is int64 ``[rows, most]``, padded with any
    block."""

    first: Tensor
    count: Tensor
    start: Tensor
    row: Tensor
    tables: Tensor


def tokens_per_tile(num_heads: int, num_kv_heads: int) -> int:
    group = num_heads // num_kv_heads
    return max(1, ROWS // group)


def attend(
    query: Tensor, keys: Tensor, values: Tensor, tiles: QueryTiles, positions: Tensor, longest: int
) -> Tensor:
    """Each token against its sequence so far, itself included, whose keys are in the cache already.

    Args:
        query: ``[tokens, heads, head_dim]``; so is the result.
        keys, values: of one layer, ``[kv_heads, num_blocks, block_size, head_dim]``.
        positions: of each token in its sequence, int64 ``[tokens]``.
        longest: no sequence of the step has more tokens.
    """
    num_tokens, num_heads, head_dim = query.shape
    num_kv_heads, num_blocks, block_size, _ = keys.shape
    num_splits = triton.cdiv(longest, SPLIT)
    parts = torch.empty(num_splits, num_tokens, num_heads, head_dim, dtype=torch.float32, device=query.device)
    sums = torch.empty(2, num_splits, num_tokens, num_heads, dtype=torch.float32, device=query.device)
    out = query.new_empty(query.shape)
    group = num_heads // num_kv_heads
    width = max(16, triton.next_power_of_2(head_dim))
    attend_split[(len(tiles.count), num_kv_heads, num_splits)](
        query, keys, values, parts, sums, tiles.first, tiles.count, tiles.start, tiles.row, tiles.tables,
        head_dim**-0.5, num_tokens, num_splits, num_blocks, tiles.tables.shape[1], query.stride(0),
        HEADS=num_heads, GROUP=group, DIM=head_dim, WIDTH=width, BLOCK=block_size,
        SPLIT=SPLIT, KEYS=KEYS, ROWS=max(ROWS, triton.next_power_of_2(group)), OPERAND=operand(query.dtype),
    )  # fmt: skip
    merge_splits[(num_tokens,)](
        parts, sums, out, positions, num_tokens, num_splits,
        HEADS=num_heads, ROWS=triton.next_power_of_2(num_heads), DIM=head_dim, WIDTH=width, SPLIT=SPLIT,
        num_warps=8,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["num_tokens", "num_splits", "num_blocks", "table_width"])
def attend_split(
    query, keys, values, parts, sums, firsts, counts, starts, table_rows, tables,
    scale, num_tokens, num_splits, num_blocks, table_width, query_stride,
    HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    SPLIT: tl.constexpr, KEYS: tl.constexpr, ROWS: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """One tile through one split: its weighted values, the weights' sum and the largest score."""
    tile, kv_head, split = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    count, start = tl.load(counts + tile), tl.load(starts + tile)
    end = tl.minimum(start + count, (split + 1) * SPLIT)
    if split * SPLIT >= end:
        return
    rows, columns = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    offset, head = rows // GROUP, kv_head * GROUP + rows % GROUP
    token, position = tl.load(firsts + tile) + offset, start + offset
    is_row, is_column = (offset < count)[:, None], (columns < DIM)[None, :]
    places = token[:, None] * query_stride + head[:, None] * DIM + columns[None, :]
    q = tl.load(query + places, mask=is_row & is_column, other=0.0).to(OPERAND)
    table = tables + tl.load(table_rows + tile) * table_width
    element: tl.constexpr = keys.dtype.element_ty
    highest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    seen = tl.zeros((ROWS, WIDTH), tl.float32)
    for first_key in range(split * SPLIT, end, KEYS):
        key = first_key + tl.arange(0, KEYS)
        is_key = key < end
        block = tl.load(table + key // BLOCK, mask=is_key, other=0)
        place = ((kv_head * num_blocks + block) * BLOCK + key % BLOCK)[:, None] * DIM + columns[None, :]
        k = tl.load(keys + place, mask=is_key[:, None] & is_column, other=0.0).to(OPERAND)
        v = tl.load(values + place, mask=is_key[:, None] & is_column, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        scores = tl.where(is_row & (key[None, :] <= position[:, None]), scores, float("-inf"))
        # A row that has seen no key yet keeps -inf; subtracting 0 instead gives it weights of 0, not NaN.
        now = tl.maximum(highest, tl.max(scores, 1))
        base = tl.where(now == float("-inf"), 0.0, now)
        weights = tl.exp(scores - base[:, None])
        kept = tl.exp(highest - base)
        total = total * kept + tl.sum(weights, 1)
        seen = seen * kept[:, None]
        seen = tl.dot(weights.to(element).to(OPERAND), v.to(OPERAND), seen, input_precision="ieee")
        highest = now
    piece = (split.to(tl.int64) * num_tokens + token) * HEADS + head
    tl.store(parts + piece[:, None] * DIM + columns[None, :], seen, mask=is_row & is_column)
    tl.store(sums + piece, highest, mask=offset < count)
    tl.store(sums + num_splits.to(tl.int64) * num_tokens * HEADS + piece, total, mask=offset < count)


@triton.jit(do_not_specialize=["num_tokens", "num_splits"])
def merge_splits(
    parts, sums, out, positions, num_tokens, num_splits,
    HEADS: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """The pieces of one token, in order."""
    token, head, columns = tl.program_id(0).to(tl.int64), tl.arange(0, ROWS), tl.arange(0, WIDTH)
    is_head, is_number = head < HEADS, (head < HEADS)[:, None] & (columns < DIM)[None, :]
    highest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    seen = tl.zeros((ROWS, WIDTH), tl.float32)
    for split in range(0, tl.load(positions + token) // SPLIT + 1):
        piece = (split * num_tokens + token) * HEADS + head
        here = tl.load(sums + piece, mask=is_head, other=0.0)
        now = tl.maximum(highest, here)
        kept, added = tl.exp(highest - now), tl.exp(here - now)
        weights = tl.load(
            sums + num_splits.to(tl.int64) * num_tokens * HEADS + piece, mask=is_head, other=1.0
        )
        values = tl.load(parts + piece[:, None] * DIM + columns[None, :], mask=is_number, other=0.0)
        total = total * kept + weights * added
        seen = seen * kept[:, None] + values * added[:, None]
        highest = now
    place = (token * HEADS + head)[:, None] * DIM + columns[None, :]
    tl.store(out + place, (seen / total[:, None]).to(out.dtype.element_ty), mask=is_number)
