"""The Triton kernels equal the obvious torch form, and a row's bits depend on that row alone.

On a device they run as compiled; elsewhere Triton's interpreter runs the same source (tests/conftest.py)."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton", reason="no Triton: its kernels are for CUDA devices")

from cluster.adapters import Factors as FileFactors
from serve_apps.engine import lora
from serve_apps.engine.cuda.attention import KEYS, SPLIT, QueryTiles, attend, tokens_per_tile
from serve_apps.engine.cuda.launch import IS_INTERPRETED
from serve_apps.engine.cuda.lora import DeviceAdapter, Layout, Tiles, add_lora_tiles, cut

# What numpy says of NaN, in the interpreter.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(not IS_INTERPRETED, reason="the kernels are compiled")),
    pytest.param("cuda", marks=pytest.mark.gpu),
]
# Sums in another order; in bf16 also another rounding, the interpreter's being towards zero.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
DTYPES = [torch.float32, torch.bfloat16]
NAN = float("nan")


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return str(request.param)


def normal(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def assert_same(device: str, found: Tensor, expected: Tensor) -> None:
    """The same bits on a device. In the interpreter a product is numpy's, whose sum of a row depends on its
    place in the matrix."""
    if device == "cuda":
        assert torch.equal(found, expected)
    tolerance = TOLERANCE[found.dtype]
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


SIZES = (200, 24, 130)  # columns of three parts: over a block of columns, under it, just over it
RANKS = [(1, 1, 1), (7, 0, 3), (64, 16, 17), (0, 0, 0), (0, 33, 0), (256, 1, 0)]
LAYOUT = Layout(2, {"o": (40,), "qkv": SIZES})


def adapters(d_in: int, dtype: torch.dtype) -> list[dict[str, FileFactors]]:
    """Of the second layer's "qkv" only."""
    return [
        {
            name: FileFactors(
                (0.2 * normal(rank, d_in, seed=10 * i + j)).to(dtype),
                (0.2 * normal(size, rank, seed=10 * i + j + 5)).to(dtype),
            )
            for j, (name, rank, size) in enumerate(zip("qkv", ranks, SIZES, strict=True))
            if rank
        }
        for i, ranks in enumerate(RANKS)
    ]


def packed(factors: dict[str, FileFactors], dtype: torch.dtype) -> Tensor:
    def factors_of(layer: int, projection: str) -> list[FileFactors | None]:
        return [factors.get(name) if (layer, projection) == (1, "qkv") else None for name in projection]

    return LAYOUT.pack(factors_of, dtype)


def update(given: list[dict[str, FileFactors]], slots: list[int], x: Tensor, device: str) -> Tensor:
    """``1 + x @ a @ b`` by the kernels; slot 0 is the base model, equal slots lie together."""
    loaded = [DeviceAdapter(packed(factors, x.dtype).to(device)) for factors in given]
    ends = [i for i in range(1, len(slots) + 1) if i == len(slots) or slots[i] != slots[i - 1]]
    runs = [(slots[end - 1], start, end) for start, end in zip([0, *ends], ends, strict=False)]
    segments = [(start, end, loaded[slot - 1].address) for slot, start, end in runs if slot]
    numbers = torch.tensor([*cut(segments), (0, 0, 0)], device=device)  # and one that is none
    out = torch.ones(len(slots), sum(SIZES), dtype=x.dtype, device=device)
    tiles = Tiles(*(column.contiguous() for column in numbers.t()))
    add_lora_tiles(out, x.to(device), tiles, LAYOUT.entry(1, "qkv"), SIZES)
    return out.cpu()


BATCHES = {
    "one row": [2],
    "base only": [0] * 3,
    "65 rows": [3] * 65,
    "all different": [1, 2, 3, 4, 5, 6],
    "skewed": [0, 1, 1, 1, 2, 3, *[5] * 20, 6, 0],
}


@pytest.mark.parametrize(
    ("d_in", "dtype"), [(40, torch.float32), (1030, torch.float32), (1030, torch.bfloat16)], ids=str
)
@pytest.mark.parametrize("batch", BATCHES)
def test_lora_is_the_obvious_sum(device: str, batch: str, d_in: int, dtype: torch.dtype) -> None:
    slots, given = BATCHES[batch], adapters(d_in, dtype)
    x = (normal(len(slots), d_in, seed=99) / d_in**0.5).to(dtype)
    turned = [
        lora.fuse(
            [
                (part and lora.Factors(part.a.float().t(), part.b.float().t()), size)
                for part, size in zip((factors.get(name) for name in "qkv"), SIZES, strict=True)
            ]
        )
        for factors in given
    ]
    expected = torch.ones(len(slots), sum(SIZES))
    lora.add_lora(expected, x.float(), [None, *turned], torch.tensor(slots))
    found = update(given, slots, x, device).float()
    torch.testing.assert_close(found, expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    base = torch.tensor(slots) == 0
    assert torch.equal(found[base], torch.ones_like(found[base]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_of_lora_meets_no_other_row_and_no_other_adapter(device: str, dtype: torch.dtype) -> None:
    """Bitwise, with NaN in every other row and every other adapter; and whether it is alone or in company."""
    row, given = normal(1030).to(dtype) / 16, adapters(1030, dtype)
    poisoned = [
        factors if i == 2 else {k: FileFactors(f.a * NAN, f.b * NAN) for k, f in factors.items()}
        for i, factors in enumerate(given)
    ]
    alone = update(given, [3], row.unsqueeze(0), device)[0]
    slots = [1, 2, *[3] * 20, 5, 6, 0]
    for place in (2, 9, 21):
        clean = normal(len(slots), 1030, seed=1).to(dtype) / 16
        clean[place] = row
        spoiled = torch.full_like(clean, NAN)
        spoiled[[place, -1]] = clean[[place, -1]]
        found = update(poisoned, slots, spoiled, device)
        assert torch.equal(found[place], update(given, slots, clean, device)[place])
        assert torch.equal(found[-1], torch.ones(sum(SIZES), dtype=dtype))
        assert_same(device, found[place], alone)


def test_an_adapter_takes_what_its_ranks_take() -> None:
    """No padding to the largest: beside the table only what aligns the factors."""
    table = packed({}, torch.bfloat16).nbytes
    for ranks, factors in zip(RANKS, adapters(40, torch.bfloat16), strict=True):
        numbers = sum(rank * (40 + size) for rank, size in zip(ranks, SIZES, strict=True))
        alignment = packed(factors, torch.bfloat16).nbytes - table - 2 * numbers
        assert 0 <= alignment <= 2 * 8 * (1 + sum(ranks))


HEADS, KV_HEADS, DIM, BLOCK, NUM_BLOCKS = 6, 2, 24, 16, 80


def attend_plainly(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """All tokens of one sequence, ``[tokens, heads, head_dim]``."""
    q, k, v = (t.double().transpose(0, 1).unsqueeze(0) for t in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1).float()


def attend_paged(
    device: str, chunks: list[tuple[Tensor, int, Tensor, Tensor, list[int]]], heads: int = HEADS
) -> list[Tensor]:
    """Each chunk: its queries, where they start, all keys and values so far, and the blocks, in holes. What
    is not a row's own is NaN in the cache."""
    dtype, kv_heads, dim = chunks[0][0].dtype, chunks[0][2].shape[1], chunks[0][0].shape[2]
    keys, values = (torch.full((kv_heads, NUM_BLOCKS, BLOCK, dim), NAN, dtype=dtype) for _ in range(2))
    tiles, positions, first, longest = [], [], 0, 0
    most = max(len(blocks) for *_, blocks in chunks)
    tables = torch.zeros(len(chunks), most, dtype=torch.int64)
    for row, (query, start, key, value, blocks) in enumerate(chunks):
        end = start + len(query)
        for position in range(end):
            place = blocks[position // BLOCK], position % BLOCK
            keys[:, place[0], place[1]], values[:, place[0], place[1]] = key[position], value[position]
        size = tokens_per_tile(heads, kv_heads)
        tiles += [(first + i, min(size, len(query) - i), start + i, row) for i in range(0, len(query), size)]
        positions += range(start, end)
        tables[row, : len(blocks)] = torch.tensor(blocks)
        first, longest = first + len(query), max(longest, end)
    columns = torch.tensor(tiles, device=device).t().contiguous()
    out = attend(
        torch.cat([query for query, *_ in chunks]).to(device),
        keys.to(device),
        values.to(device),
        QueryTiles(*columns, tables.to(device)),
        torch.tensor(positions, device=device),
        longest,
    )
    return list(out.cpu().split([len(query) for query, *_ in chunks]))


BLOCKS = [7, 3, 30, 12, 1, 79, *range(31, 78)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim"),
    [(6, 2, 24), (5, 5, 16), (20, 1, 16)],
    ids=["groups", "alone", "one key head"],
)
def test_attention_is_that_of_torch_however_it_is_cut(
    device: str, heads: int, kv_heads: int, dim: int, dtype: torch.dtype
) -> None:
    """The same in one piece, in chunks, and token by token."""
    start, end = KEYS - 6, KEYS + 3
    query, key, value = (
        normal(end, n, dim, seed=i).to(dtype) for i, n in enumerate((heads, kv_heads, kv_heads))
    )
    whole = attend_paged(device, [(query[start:], start, key, value, BLOCKS)], heads)[0]
    expected = attend_plainly(query, key, value)[start:]
    torch.testing.assert_close(whole.float(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    cuts = [start, start + 4, KEYS, KEYS + 1, end]
    pieces = [
        attend_paged(device, [(query[a:b], a, key, value, BLOCKS)], heads)[0] for a, b in pairwise(cuts)
    ]
    assert_same(device, torch.cat(pieces), whole)


def test_splits_over_a_long_past_are_one_sum(device: str) -> None:
    total = 2 * SPLIT + 3 - SPLIT // 2
    query, key, value = (normal(total, n, DIM, seed=i) for i, n in enumerate((HEADS, KV_HEADS, KV_HEADS)))
    expected = attend_plainly(query, key, value)
    for a, b in ((total - 1, total), (SPLIT - 3, SPLIT + 4), (SPLIT, SPLIT + 1)):
        found = attend_paged(device, [(query[a:b], a, key, value, BLOCKS)])[0]
        torch.testing.assert_close(found, expected[a:b], atol=2e-5, rtol=2e-5)


def test_attention_reads_no_sequence_but_its_own(device: str) -> None:
    """Bitwise; rows of one token beside longer ones, NaN in the other sequences."""
    own = tuple(normal(40, n, DIM, seed=i) for i, n in enumerate((HEADS, KV_HEADS, KV_HEADS)))
    other = tuple(torch.full_like(t, NAN) for t in own)
    alone = attend_paged(device, [(own[0][30:31], 30, own[1], own[2], [4, 5, 6])])[0]
    row = (own[0][30:31], 30, own[1], own[2], [4, 5, 6])
    long = (other[0], 0, other[1], other[2], [9, 8, 7])
    single = (other[0][39:], 39, other[1], other[2], [1, 2, 3])
    before, found, after = attend_paged(device, [single, row, long])
    assert torch.equal(found, alone) and before.isnan().all() and after.isnan().all()
