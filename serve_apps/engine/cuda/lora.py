"""LoRA for all adapters of a batch in two launches a projection: ``y = x @ a``, then ``out += y @ b``.

The tokens of one adapter are cut into tiles of at most 16 rows; a tile has one adapter, so a row never meets
another adapter's weights, and rows of the base model are in no tile. Adapters lie at their true ranks: what
is beyond a rank is neither stored nor read (only the registers of a tile are 16 wide).

A row's bits depend on that row and its adapter alone: prompts and decoding have the same tiles, and ``x @
a`` is summed in pieces of ``SPLIT`` inputs whatever the batch, the pieces in order. Wider tiles would read a
factor from the L2 cache less often in a prompt, and would be another order of sums.

Sources: segments and shrink/expand, Punica, arXiv:2310.18547; ranks unpadded in one pool, S-LoRA,
arXiv:2311.03285 (its MBGMM kernel)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from cluster.adapters import MAX_RANK, Factors
from serve_apps.engine.cuda.launch import ROWS, operand

SPLIT = 1024  # inputs summed by one program
STEP = 128  # of which it takes so many at a time
COLUMNS = 128  # outputs of one program
RANKS = 16  # of an adapter, taken at a time
HEAD, PART = 2, 5  # numbers of a table entry: before its parts, in each
ALIGNED = 8  # numbers: factors, and rows of b, begin at multiples, so that many are loaded at once


@dataclass(frozen=True, slots=True)
class DeviceAdapter:
    """An adapter in one piece of device memory: a table of where its factors are, then the factors.

    An entry of the table, int64, per layer and projection: its rank (the sum over its parts; 0: not touched)
    and where ``a [rank, d_in]`` is, then per part the rank, the first of its ranks, where ``b [rank,
    d_out]`` is, the first column of the fused output and how many. Places count elements from the beginning
    of ``data``."""

    data: Tensor

    @property
    def address(self) -> int:
        return self.data.data_ptr()

    @property
    def size_bytes(self) -> int:
        return self.data.nbytes


@dataclass(frozen=True, slots=True)
class Layout:
    """Where in a model adapters apply: to the parts of each projection, of so many columns each."""

    num_layers: int
    sizes: Mapping[str, tuple[int, ...]]

    @property
    def width(self) -> int:
        """Numbers of an entry."""
        return HEAD + PART * max(len(sizes) for sizes in self.sizes.values())

    def entry(self, layer: int, projection: str) -> int:
        """Where the entry begins in the table."""
        return (layer * len(self.sizes) + list(self.sizes).index(projection)) * self.width

    def pack(self, factors_of: Callable[[int, str], Sequence[Factors | None]], dtype: torch.dtype) -> Tensor:
        """An adapter as the kernels read it, in host memory: uint8, to be copied as it is.

        Args:
            factors_of: for a layer and a projection, those of each part.
        """
        length = self.num_layers * len(self.sizes) * self.width
        table = torch.zeros(length + -length % ALIGNED, dtype=torch.int64)
        pieces, place = [], table.nbytes // dtype.itemsize

        def put(piece: Tensor) -> int:
            nonlocal place
            pieces.append(F.pad(piece.to(dtype).flatten(), (0, -piece.numel() % ALIGNED)))
            place += pieces[-1].numel()
            return place - pieces[-1].numel()

        for layer in range(self.num_layers):
            for name, sizes in self.sizes.items():
                given = factors_of(layer, name)
                if all(part is None for part in given):
                    continue
                entry = table[self.entry(layer, name) :][: self.width]
                entry[1] = put(torch.cat([part.a for part in given if part is not None]))
                column = 0
                for index, (part, size) in enumerate(zip(given, sizes, strict=True)):
                    if part is not None:
                        rank = part.a.shape[0]
                        place_of_b = put(F.pad(part.b.t(), (0, -size % ALIGNED)))
                        numbers = (rank, int(entry[0]), place_of_b, column, size)
                        entry[HEAD + PART * index :][:PART] = torch.tensor(numbers)
                        entry[0] += rank
                    column += size
        return torch.cat([table.view(torch.uint8), *(piece.view(torch.uint8) for piece in pieces)])


@dataclass(frozen=True, slots=True)
class Tiles:
    """Tokens ``first`` to ``first + count`` of the step belong to the adapter at ``address``; int64
    ``[tiles]``. A count of 0 is no tile."""

    first: Tensor
    count: Tensor
    address: Tensor


def cut(segments: Sequence[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """Segments ``(first token, end, address)`` as tiles ``(first token, count, address)``."""
    return [
        (first, min(ROWS, end - first), address)
        for start, end, address in segments
        for first in range(start, end, ROWS)
    ]


def add_lora_tiles(out: Tensor, x: Tensor, tiles: Tiles, entry: int, sizes: tuple[int, ...]) -> None:
    """Add to each token of a tile the update of its adapter, in place: ``lora.add_lora`` by our kernels.

    Args:
        out: base projection, ``[tokens, d_out]``.
        x: input of the projection, ``[tokens, d_in]``, in the type of ``out`` and of the factors.
        entry: of this layer and projection, by ``Layout.entry``.
        sizes: columns of the parts.
    """
    num_tokens, d_in = x.shape
    num_tiles = len(tiles.count)
    if not num_tiles:
        return
    num_splits, most = triton.cdiv(d_in, SPLIT), MAX_RANK * len(sizes)
    y = torch.empty(num_splits, num_tokens, most, dtype=torch.float32, device=x.device)
    shared = {"ROWS": ROWS, "RANKS": RANKS, "ALIGNED": ALIGNED, "OPERAND": operand(x.dtype)}
    shrink[(num_tiles, num_splits)](
        x, y, tiles.first, tiles.count, tiles.address, entry, num_tokens,
        D_IN=d_in, MOST=most, SPLIT=SPLIT, STEP=STEP, **shared,
    )  # fmt: skip
    expand[(num_tiles, triton.cdiv(max(sizes), COLUMNS), len(sizes))](
        y, out, tiles.first, tiles.count, tiles.address, entry, num_tokens,
        D_OUT=out.shape[1], MOST=most, SPLITS=num_splits, COLUMNS=COLUMNS, HEAD=HEAD, PART=PART, **shared,
    )  # fmt: skip


@triton.jit(do_not_specialize=["entry", "num_tokens"])
def shrink(
    x, y, firsts, counts, addresses, entry, num_tokens,
    D_IN: tl.constexpr, MOST: tl.constexpr, SPLIT: tl.constexpr, STEP: tl.constexpr,
    ALIGNED: tl.constexpr, ROWS: tl.constexpr, RANKS: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """``y[split, tokens of a tile, ranks] = x[:, inputs of the split] @ a``; one program per tile and
    split."""
    tile, split = tl.program_id(0), tl.program_id(1)
    count = tl.load(counts + tile)
    if count == 0:
        return
    address = tl.load(addresses + tile)
    table = address.to(tl.pointer_type(tl.int64)) + entry
    rank = tl.load(table)
    a = address.to(tl.pointer_type(x.dtype.element_ty)) + tl.load(table + 1)
    rows, inputs, ranks = tl.arange(0, ROWS), tl.arange(0, STEP), tl.arange(0, RANKS)
    tokens = tl.load(firsts + tile) + rows
    is_row = (rows < count)[:, None]
    x += tokens[:, None] * D_IN
    y += (split.to(tl.int64) * num_tokens + tokens)[:, None] * MOST
    for first_rank in range(0, rank, RANKS):
        r = first_rank + ranks
        total = tl.zeros((ROWS, RANKS), tl.float32)
        for done in range(0, SPLIT, STEP):
            k = split * SPLIT + done + inputs
            left = tl.load(x + k[None, :], mask=is_row & (k < D_IN)[None, :], other=0.0)
            of_rank = (r < rank)[None, :] & (k < D_IN)[:, None]
            factors = a + r[None, :] * D_IN + k[:, None]
            if D_IN % ALIGNED == 0:
                factors = tl.max_contiguous(tl.multiple_of(factors, (16, 1)), (ALIGNED, 1))
            right = tl.load(factors, mask=of_rank, other=0.0)
            total = tl.dot(left.to(OPERAND), right.to(OPERAND), total, input_precision="ieee")
        tl.store(y + r[None, :], total, mask=is_row & (r < rank)[None, :])


@triton.jit(do_not_specialize=["entry", "num_tokens"])
def expand(
    y, out, firsts, counts, addresses, entry, num_tokens,
    D_OUT: tl.constexpr, MOST: tl.constexpr, SPLITS: tl.constexpr, COLUMNS: tl.constexpr,
    HEAD: tl.constexpr, PART: tl.constexpr,
    ALIGNED: tl.constexpr, ROWS: tl.constexpr, RANKS: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """``out[tokens of a tile, columns of a part] += sum of y over splits @ b``; one program per tile, block
    of columns and part."""
    tile = tl.program_id(0)
    count = tl.load(counts + tile)
    if count == 0:
        return
    address = tl.load(addresses + tile)
    part = address.to(tl.pointer_type(tl.int64)) + entry + HEAD + PART * tl.program_id(2)
    rank, first_rank = tl.load(part), tl.load(part + 1)
    first_column, num_columns = tl.load(part + 3), tl.load(part + 4)
    rows, columns = tl.arange(0, ROWS), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    if (rank == 0) | (tl.program_id(1) * COLUMNS >= num_columns):
        return
    element: tl.constexpr = out.dtype.element_ty
    b = address.to(tl.pointer_type(element)) + tl.load(part + 2)
    stride = tl.cdiv(num_columns, ALIGNED) * ALIGNED
    tokens = tl.load(firsts + tile) + rows
    is_row, is_column = (rows < count)[:, None], (columns < num_columns)[None, :]
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for done in range(0, rank, RANKS):
        r = done + tl.arange(0, RANKS)
        of_row = y + tokens[:, None] * MOST + first_rank + r[None, :]
        left = tl.zeros((ROWS, RANKS), tl.float32)
        for split in range(SPLITS):
            piece = of_row + split * num_tokens.to(tl.int64) * MOST
            left += tl.load(piece, mask=is_row & (r < rank)[None, :], other=0.0)
        of_rank = (r < rank)[:, None] & (columns < stride)[None, :]
        factors = b + r[:, None] * stride + columns[None, :]
        factors = tl.max_contiguous(tl.multiple_of(factors, (1, 16)), (1, ALIGNED))
        right = tl.load(factors, mask=of_rank, other=0.0)
        total = tl.dot(left.to(element).to(OPERAND), right.to(OPERAND), total, input_precision="ieee")
    places = out + tokens[:, None] * D_OUT + first_column + columns[None, :]
    before = tl.load(places, mask=is_row & is_column)
    tl.store(places, (before.to(tl.float32) + total).to(element), mask=is_row & is_column)
