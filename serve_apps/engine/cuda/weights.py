"""Projections of the base model, quantised or not: ``x @ weight.T + bias``.

Quantised ones are multiplied as they lie: a program takes a block of outputs through a piece of the inputs,
brings the integers of a tile to the type of ``x`` in registers, where they are exact, multiplies, and applies
the scale to the sum in fp32, once per group of inputs. So a step of few rows reads integers from memory and
nothing else; for prompts the same tiles are wider in rows.

Few rows of a small projection would leave most of a device idle, so the inputs are cut into as many pieces
as give ``PROGRAMS`` programs, and the pieces are summed in order. Sizes follow the projection and the number
of rows alone; with as many rows, a row's bits do not depend on the others."""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from serve_apps.engine.cuda.launch import ROWS, operand
from serve_apps.engine.decoder import Linear
from serve_apps.engine.quantization import GROUP, Quantized

MOST_ROWS = 64  # of a tile
COLUMNS = 64  # outputs of one program
PROGRAMS = 264  # two for each multiprocessor of an H100


def project(x: Tensor, linear: Linear) -> Tensor:
    """``x`` is ``[tokens, d_in]``, the result ``[tokens, d_out]`` in its type."""
    if isinstance(linear.stored, Quantized):
        return project_quantized(x, linear.stored, linear.bias)
    return F.linear(x, linear.weight, linear.bias)


def project_quantized(x: Tensor, weight: Quantized, bias: Tensor | None) -> Tensor:
    num_tokens, d_in = x.shape
    d_out = len(weight.scales)
    rows = min(MOST_ROWS, max(ROWS, triton.next_power_of_2(num_tokens)))
    num_steps, num_blocks = triton.cdiv(d_in, GROUP), triton.cdiv(d_out, COLUMNS)
    num_splits = 1 if num_tokens > MOST_ROWS else min(num_steps, triton.cdiv(PROGRAMS, num_blocks))
    steps = triton.cdiv(num_steps, num_splits)
    num_splits = triton.cdiv(num_steps, steps)
    out = x.new_empty(num_tokens, d_out)
    parts = out if num_splits == 1 else x.new_empty(num_splits, num_tokens, d_out, dtype=torch.float32)
    added = x if bias is None else bias
    multiply_tile[(triton.cdiv(num_tokens, rows), num_blocks, num_splits)](
        x, weight.values, weight.scales, added, parts, num_tokens, steps,
        D_IN=d_in, D_OUT=d_out, IS_FOUR_BIT=weight.bits == 4, ADDS=bias is not None and num_splits == 1,
        GROUP=GROUP, COLUMNS=COLUMNS, ROWS=rows, OPERAND=operand(x.dtype),
        **options(rows),
    )  # fmt: skip
    if num_splits > 1:
        sum_parts[(num_tokens, triton.cdiv(d_out, 4 * COLUMNS))](
            parts, added, out, num_tokens, num_splits,
            D_OUT=d_out, ADDS=bias is not None, COLUMNS=4 * COLUMNS,
        )  # fmt: skip
    return out


def options(rows: int) -> dict[str, int]:
    """Of ``multiply_tile``: so many tiles under way that four programs fit into a multiprocessor."""
    return {"num_stages": 2 if rows == MOST_ROWS else 3}


@triton.jit(do_not_specialize=["num_tokens", "steps"])
def multiply_tile(
    x, integers, scales, bias, parts, num_tokens, steps,
    D_IN: tl.constexpr, D_OUT: tl.constexpr, IS_FOUR_BIT: tl.constexpr, ADDS: tl.constexpr,
    GROUP: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """``parts[piece, rows, columns] = x[rows, inputs of the piece] @ weight[columns, those inputs].T``."""
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    piece = tl.program_id(2)
    half: tl.constexpr = GROUP // 2
    num_groups: tl.constexpr = (D_IN + GROUP - 1) // GROUP
    bytes_of_group: tl.constexpr = half if IS_FOUR_BIT else GROUP
    is_row, is_column = (token < num_tokens)[:, None], column < D_OUT
    of_row = x + token.to(tl.int64)[:, None] * D_IN
    of_column = integers + column.to(tl.int64)[None, :] * (num_groups * bytes_of_group)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for group in range(piece * steps, tl.minimum((piece + 1) * steps, num_groups)):
        place = group * bytes_of_group + tl.arange(0, bytes_of_group)
        stored = tl.load(of_column + place[:, None], mask=is_column[None, :], other=0)
        if IS_FOUR_BIT:
            low, high = group * GROUP + tl.arange(0, half), group * GROUP + half + tl.arange(0, half)
            low_x = tl.load(of_row + low[None, :], mask=is_row & (low < D_IN)[None, :], other=0.0)
            high_x = tl.load(of_row + high[None, :], mask=is_row & (high < D_IN)[None, :], other=0.0)
            low_w, high_w = (stored & 15).to(tl.int8) - 8, (stored >> 4).to(tl.int8) - 8
            scale = tl.load(scales + column * num_groups + group, mask=is_column, other=0.0)
            of_group = tl.dot(low_x.to(OPERAND), low_w.to(OPERAND), input_precision="ieee")
            of_group = tl.dot(high_x.to(OPERAND), high_w.to(OPERAND), of_group, input_precision="ieee")
            total += of_group * scale[None, :]
        else:
            of_x = tl.load(of_row + place[None, :], mask=is_row & (place < D_IN)[None, :], other=0.0)
            total = tl.dot(of_x.to(OPERAND), stored.to(OPERAND), total, input_precision="ieee")
    if not IS_FOUR_BIT:
        total *= tl.load(scales + column, mask=is_column, other=0.0)[None, :]
    if ADDS:
        total += tl.load(bias + column, mask=is_column, other=0.0).to(tl.float32)[None, :]
    row = piece.to(tl.int64) * num_tokens + token
    places = parts + row[:, None] * D_OUT + column[None, :]
    tl.store(places, total.to(parts.dtype.element_ty), mask=is_row & is_column[None, :])


@triton.jit(do_not_specialize=["num_tokens", "num_splits"])
def sum_parts(
    parts, bias, out, num_tokens, num_splits, D_OUT: tl.constexpr, ADDS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """The pieces of one row, in order."""
    token, columns = tl.program_id(0).to(tl.int64), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_column = columns < D_OUT
    total = tl.zeros((COLUMNS,), tl.float32)
    row = parts + token * D_OUT + columns
    for split in range(num_splits):
        piece = row + split * num_tokens.to(tl.int64) * D_OUT
        total += tl.load(piece, mask=is_column, other=0.0)
    if ADDS:
        total += tl.load(bias + columns, mask=is_column, other=0.0).to(tl.float32)
    tl.store(out + token * D_OUT + columns, total.to(out.dtype.element_ty), mask=is_column)
