"""What lies between the projections of a decoder, each in one launch: sum and norm, rotary positions into the
cache, the gate of the MLP. One program per token: no number depends on another row.

Rounding is that of ``ModelRunner``: fp32 inside, the model's type between."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from serve_apps.engine.decoder import Norm

COLUMNS = 1024


def add_and_norm(hidden: Tensor, update: Tensor | None, norm: Norm) -> Tensor:
    """Add ``update`` to ``hidden`` in place, if there is one; its RMS norm. All are ``[tokens, width]``."""
    num_tokens, width = hidden.shape
    out = torch.empty_like(hidden)
    add_and_norm_row[(num_tokens,)](
        hidden, hidden if update is None else update, norm.weight, out, norm.eps,
        ADDS=update is not None, WIDTH=width, COLUMNS=triton.next_power_of_2(width),
    )  # fmt: skip
    return out


@triton.jit
def add_and_norm_row(
    hidden, update, weight, out, eps, ADDS: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    columns = tl.arange(0, COLUMNS)
    is_column = columns < WIDTH
    place = tl.program_id(0).to(tl.int64) * WIDTH + columns
    element: tl.constexpr = out.dtype.element_ty
    x = tl.load(hidden + place, mask=is_column, other=0.0).to(tl.float32)
    if ADDS:
        x = (x + tl.load(update + place, mask=is_column, other=0.0).to(tl.float32)).to(element).to(tl.float32)
        tl.store(hidden + place, x.to(element), mask=is_column)
    scaled = x * tl.rsqrt(tl.sum(x * x, 0) / WIDTH + eps)
    factor = tl.load(weight + columns, mask=is_column, other=0.0).to(tl.float32)
    tl.store(out + place, (scaled.to(element).to(tl.float32) * factor).to(element), mask=is_column)


def rotate_and_store(
    qkv: Tensor, rotary: tuple[Tensor, Tensor], positions: Tensor, slots: Tensor, keys: Tensor, values: Tensor
) -> Tensor:
    """Turn queries and keys to their positions; keys and values go into the cache.

    Args:
        qkv: ``[tokens, heads + 2 * kv_heads, head_dim]``; its queries are turned in place. rotary: cosines
        and sines of every position, ``[max_length, head_dim / 2]``; pairs are half a head apart. slots:
        place of each token in the cache: block * block_size + offset. keys, values: of one layer,
        ``[kv_heads, num_blocks, block_size, head_dim]``.

    Returns:
        The queries, a view ``[tokens, heads, head_dim]`` of ``qkv``.
    """
    num_tokens, rows, head_dim = qkv.shape
    num_kv_heads, num_blocks, block_size, _ = keys.shape
    num_heads = rows - 2 * num_kv_heads
    rotate_and_store_token[(num_tokens,)](
        qkv, *rotary, positions, slots, keys, values, num_blocks * block_size,
        HEADS=num_heads, KV_HEADS=num_kv_heads, HALF=head_dim // 2,
        ROWS=triton.next_power_of_2(rows), COLUMNS=triton.next_power_of_2(head_dim // 2),
    )  # fmt: skip
    return qkv[:, :num_heads]


@triton.jit
def rotate_and_store_token(
    qkv, cos, sin, positions, slots, keys, values, cache_rows,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    token, row, columns = tl.program_id(0).to(tl.int64), tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    is_column = columns < HALF
    is_query, is_turned, is_row = row < HEADS, row < HEADS + KV_HEADS, row < HEADS + 2 * KV_HEADS
    source = qkv + ((token * (HEADS + 2 * KV_HEADS) + row) * 2 * HALF)[:, None] + columns[None, :]
    loaded = is_row[:, None] & is_column[None, :]
    first = tl.load(source, mask=loaded, other=0.0).to(tl.float32)
    second = tl.load(source + HALF, mask=loaded, other=0.0).to(tl.float32)
    angle = tl.load(positions + token) * HALF + columns
    c = tl.load(cos + angle, mask=is_column, other=0.0).to(tl.float32)[None, :]
    s = tl.load(sin + angle, mask=is_column, other=0.0).to(tl.float32)[None, :]
    element: tl.constexpr = qkv.dtype.element_ty
    left = tl.where(is_turned[:, None], first * c - second * s, first).to(element)
    right = tl.where(is_turned[:, None], second * c + first * s, second).to(element)
    tl.store(source, left, mask=is_query[:, None] & is_column[None, :])
    tl.store(source + HALF, right, mask=is_query[:, None] & is_column[None, :])
    kv_head = tl.where(is_query, 0, row - HEADS) % KV_HEADS
    place = ((kv_head.to(tl.int64) * cache_rows + tl.load(slots + token)) * 2 * HALF)[:, None] + columns[
        None, :
    ]
    is_key = (is_turned & ~is_query)[:, None] & is_column[None, :]
    tl.store(keys + place, left, mask=is_key)
    tl.store(keys + place + HALF, right, mask=is_key)
    is_value = (is_row & ~is_turned)[:, None] & is_column[None, :]
    tl.store(values + place, left, mask=is_value)
    tl.store(values + place + HALF, right, mask=is_value)


def gate(gate_up: Tensor) -> Tensor:
    """``silu(gate) * up`` of ``[tokens, gate and up]``."""
    num_tokens, both = gate_up.shape
    out = gate_up.new_empty(num_tokens, both // 2)
    gate_row[(num_tokens, triton.cdiv(both // 2, COLUMNS))](gate_up, out, WIDTH=both // 2, COLUMNS=COLUMNS)
    return out


@triton.jit
def gate_row(gate_up, out, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    token, columns = tl.program_id(0).to(tl.int64), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_column = columns < WIDTH
    element: tl.constexpr = out.dtype.element_ty
    x = tl.load(gate_up + token * 2 * WIDTH + columns, mask=is_column).to(tl.float32)
    up = tl.load(gate_up + token * 2 * WIDTH + WIDTH + columns, mask=is_column).to(tl.float32)
    silu = (x / (1.0 + tl.exp(-x))).to(element).to(tl.float32)
    tl.store(out + token * WIDTH + columns, (silu * up).to(element), mask=is_column)
