"""Both fast forms of LoRA equal the obvious one, and no row meets another adapter's weights."""

import pytest
import torch

from serve_apps.engine.lora import (
    Factors,
    LoraWeights,
    Segment,
    Stack,
    StackedRows,
    add_lora,
    add_lora_segments,
    add_lora_stacked,
    fuse,
)

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.06}
RANKS = (1, 4, 4, 8, 16)
POPULARITY = {
    "base only": [0] * 8,
    "one adapter": [2] * 8,
    "all different": [1, 2, 3, 4, 5],
    "skewed": [0, 1, 1, 1, 1, 1, 1, 2, 3, 4, 5],
}


def adapters(dtype: torch.dtype) -> list[LoraWeights]:
    random = torch.Generator().manual_seed(1)
    return [
        LoraWeights(({"o": Factors(_normal(24, rank, random, dtype), _normal(rank, 12, random, dtype))}, {}))
        for rank in RANKS
    ]


def _normal(rows: int, columns: int, random: torch.Generator, dtype: torch.dtype) -> torch.Tensor:
    return (0.3 * torch.randn(rows, columns, generator=random)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("popularity", POPULARITY)
def test_fast_forms_equal_the_obvious_one(popularity: str, dtype: torch.dtype) -> None:
    slots, loaded = POPULARITY[popularity], adapters(dtype)
    x = torch.randn(len(slots), 24, generator=torch.Generator().manual_seed(2)).to(dtype)
    expected, segmented, stacked = (torch.ones(len(slots), 12, dtype=dtype) for _ in range(3))
    factors = [None, *(adapter.layers[0]["o"] for adapter in loaded)]
    add_lora(expected, x, factors, torch.tensor(slots))
    used = sorted(set(slots) - {0})
    rows = [[i for i, s in enumerate(slots) if s == slot] for slot in used]
    segments = [Segment(loaded[slot - 1], r[0], r[-1] + 1) for slot, r in zip(used, rows, strict=True)]
    add_lora_segments(segmented, x, segments, 0, "o")
    torch.testing.assert_close(segmented, expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    if used:
        stack = Stack.of([loaded[slot - 1] for slot in used])
        add_lora_stacked(stacked, x, StackedRows.of(stack, rows), 0, "o")
        torch.testing.assert_close(stacked, expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def test_a_projection_that_no_adapter_touches_is_left_alone() -> None:
    loaded = adapters(torch.float32)[:2]
    out = torch.ones(2, 12)
    add_lora_segments(out, torch.ones(2, 24), [Segment(loaded[0], 0, 2)], 1, "o")
    add_lora_stacked(out, torch.ones(2, 24), StackedRows.of(Stack.of(loaded), [[0], [1]]), 1, "o")
    assert torch.equal(out, torch.ones(2, 12))


def test_fused_factors_equal_their_parts_side_by_side() -> None:
    random = torch.Generator().manual_seed(3)
    q, v = (
        Factors(_normal(24, rank, random, torch.float32), _normal(rank, d_out, random, torch.float32))
        for rank, d_out in ((4, 8), (2, 4))
    )
    fused = fuse([(q, 8), (None, 4), (v, 4)])
    x = torch.randn(5, 24, generator=random)
    parts = torch.cat([x @ q.a @ q.b, torch.zeros(5, 4), x @ v.a @ v.b], dim=1)
    assert fused is not None and fuse([(None, 8)]) is None
    torch.testing.assert_close(x @ fused.a @ fused.b, parts)


@pytest.mark.parametrize("form", ["segments", "stacked"])
def test_a_poisoned_adapter_spoils_its_own_rows_only(form: str) -> None:
    """Bitwise: every other adapter, and every other row, set to NaN changes nothing."""
    loaded = adapters(torch.float32)
    rows = [[0, 1], [2], [3, 4], [5], [6]]
    x = torch.randn(7, 24, generator=torch.Generator().manual_seed(4))

    def update(adapters: list[LoraWeights], x: torch.Tensor) -> torch.Tensor:
        out = torch.ones(7, 12)
        if form == "stacked":
            add_lora_stacked(out, x, StackedRows.of(Stack.of(adapters), rows), 0, "o")
        else:
            segments = [Segment(a, r[0], r[-1] + 1) for a, r in zip(adapters, rows, strict=True)]
            add_lora_segments(out, x, segments, 0, "o")
        return out

    poison = Factors(torch.full((24, 4), float("nan")), torch.full((4, 12), float("nan")))
    poisoned = [a if i == 1 else LoraWeights(({"o": poison}, {})) for i, a in enumerate(loaded)]
    padded = [
        a if i == 1 else LoraWeights(({"o": Factors(p, q)}, {}))
        for i, a in enumerate(loaded)
        for p, q in [
            (
                torch.full_like(a.layers[0]["o"].a, float("nan")),
                torch.full_like(a.layers[0]["o"].b, float("nan")),
            )
        ]
    ]
    x_poisoned = torch.full_like(x, float("nan"))
    x_poisoned[2] = x[2]
    clean = update(loaded, x)[2]
    assert torch.equal(update(padded, x_poisoned)[2], clean)
    assert update(poisoned, x_poisoned)[[0, 1, 3, 4, 5, 6]].isnan().all()
