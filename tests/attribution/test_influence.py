import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attribution.errors import Corrupted, Rejected
from attribution.fixed_point import MAX_TOTAL_GWEI, add_weighted, fraction_bits, to_fixed_point
from attribution.gradients import Example, Factors, num_parameters
from attribution.influence import (
    FEATURE_BITS,
    Snapshot,
    averaged_features,
    float_scores,
    integer_credits,
    preconditioned,
    quantised,
    sketched_gradients,
    unit_rows,
    weighted_query_sum,
)
from attribution.sketch import exact_dots, make_sketch


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("damping", [0.1, 1.0, 10.0])
def test_dual_form_equals_the_inverse_of_the_whole_fisher(damping: float) -> None:
    """The same as inverting the full matrix; for a control, that of all records and itself."""
    snapshot = Snapshot(random(6, 20), random(3, 20, seed=1))
    g, controls = unit_rows(snapshot.trained).double(), unit_rows(snapshot.controls).double()
    damped = g.T @ g + damping * torch.eye(20, dtype=torch.float64)
    expected = damping * torch.cat(
        [
            g @ torch.linalg.inv(damped),
            *(c[None] @ torch.linalg.inv(damped + c[:, None] * c) for c in controls),
        ]
    )
    torch.testing.assert_close(preconditioned(snapshot, damping).double(), expected, rtol=1e-5, atol=1e-6)


def test_controls_score_like_records_that_no_answer_is_about() -> None:
    """The null is neither louder nor quieter than what it stands for."""
    everything = random(400, 2000) + 0.5 * random(2000, seed=1)
    features = preconditioned(Snapshot(everything[:200], everything[200:300]), 0.3)
    scores = (features @ unit_rows(everything[300:]).T).abs().mean(dim=1)
    assert 0.9 < scores[200:].mean() / scores[:200].mean() < 1.1


def test_great_damping_is_a_plain_dot_product() -> None:
    snapshot = Snapshot(random(6, 20), random(3, 20, seed=1))
    both = unit_rows(torch.cat([snapshot.trained, snapshot.controls]))
    torch.testing.assert_close(preconditioned(snapshot, 1e7), both, rtol=1e-4, atol=1e-5)


def test_a_loud_record_has_the_features_of_a_quiet_one() -> None:
    rows, controls = random(5, 30), random(2, 30, seed=1)
    loud = rows.clone()
    loud[2] *= 1000
    quiet = averaged_features([Snapshot(rows, controls)], 1.0)
    assert np.abs(quiet - averaged_features([Snapshot(loud, controls)], 1.0)).max() <= 1


def test_the_record_that_an_answer_repeats_scores_highest() -> None:
    rows = random(20, 500)
    features = averaged_features([Snapshot(rows, random(4, 500, seed=1))], 1.0)
    for record in range(20):
        query = unit_rows((rows[record] + 0.5 * random(500, seed=9))[None])[0]
        assert float_scores(query, features).argmax() == record


def test_features_that_are_not_finite_are_refused() -> None:
    with pytest.raises(Corrupted, match="1 feature entries"):
        quantised(torch.tensor([[0.1, float("nan")]]))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.lists(st.integers(1, 10**12), min_size=1, max_size=6))
def test_sums_and_credits_are_exact_and_additive(seed: int, fees: list[int]) -> None:
    """The int64 sum equals Python's, in any order; the credit of a sum is the sum of the credits."""
    num_parameters, rows = 300, 4
    bits = fraction_bits(sum(fees))
    answers = [to_fixed_point(random(num_parameters, seed=seed + i), bits) for i in range(len(fees))]
    total, reverse = (torch.zeros(num_parameters, dtype=torch.int64) for _ in range(2))
    for answer, fee in zip(answers, fees, strict=True):
        add_weighted(total, answer, fee)
    for answer, fee in reversed(list(zip(answers, fees, strict=True))):
        add_weighted(reverse, answer, fee)
    by_hand = [
        sum(fee * int(a[i]) for a, fee in zip(answers, fees, strict=True)) for i in range(num_parameters)
    ]
    assert total.tolist() == reverse.tolist() == by_hand
    sketch = make_sketch(num_parameters, 64, seed=7)
    features = quantised(unit_rows(random(rows, 64, seed=seed)))
    parts = [0] * rows
    for answer, fee in zip(answers, fees, strict=True):
        dots = exact_dots(sketch, answer * fee, features)
        parts = [part + dot for part, dot in zip(parts, dots, strict=True)]
    assert exact_dots(sketch, total, features) == parts
    assert integer_credits(sketch, total, features) == [part >> FEATURE_BITS for part in parts]


def test_the_largest_period_does_not_overflow() -> None:
    """All fees on answers that point the same way: the sum stays within int64, the credit is right."""
    bits = fraction_bits(MAX_TOTAL_GWEI)
    total = torch.zeros(64, dtype=torch.int64)
    direction = torch.zeros(64)
    direction[5] = -3.0
    add_weighted(total, to_fixed_point(direction, bits), MAX_TOTAL_GWEI)
    assert total[5] == -MAX_TOTAL_GWEI * 2**bits
    sketch = make_sketch(64, 8, seed=0)
    unit = torch.zeros(1, 8)
    unit[0, sketch.bucket[5]] = float(sketch.sign[5])
    assert integer_credits(sketch, total, quantised(unit)) == [-MAX_TOTAL_GWEI * 2**bits]


def test_a_period_beyond_the_bound_is_refused() -> None:
    with pytest.raises(Rejected, match="close fewer batches"):
        fraction_bits(MAX_TOTAL_GWEI + 1)


def test_an_answer_counts_by_its_fee_and_not_by_its_loudness() -> None:
    gradient = random(50)
    assert torch.equal(to_fixed_point(gradient, 20), to_fixed_point(gradient * 4096, 20))
    assert torch.equal(to_fixed_point(torch.zeros(3), 20), torch.zeros(3, dtype=torch.int64))


def test_a_gradient_that_is_not_finite_is_refused() -> None:
    with pytest.raises(Corrupted, match="norm inf"):
        to_fixed_point(torch.tensor([1.0, float("inf")]), 20)


def test_an_answer_points_the_same_way_at_every_snapshot_it_is_summed_over(
    toy_model: torch.nn.Module, toy_lora: dict[str, Factors]
) -> None:
    """Two snapshots are one long vector; its parts have equal length, and sketches of parts add up."""
    other = {path: Factors(factors.a, -factors.b, factors.scale) for path, factors in toy_lora.items()}
    example, bits = Example((1, 2, 3), (4, 5)), 20
    total = weighted_query_sum(toy_model, [toy_lora, other], [(example, 7)], bits)
    size = len(total) // 2
    assert total[:size].double().norm().item() == pytest.approx(7 * 2**bits / 2**0.5, rel=1e-3)
    assert total[size:].double().norm().item() == pytest.approx(7 * 2**bits / 2**0.5, rel=1e-3)
    sketch = make_sketch(2 * size, 64, seed=0)
    parts = sketch.part(0, size).integers(total[:size]) + sketch.part(size, 2 * size).integers(total[size:])
    assert torch.equal(sketch.integers(total), parts)


def test_batched_features_equal_those_taken_one_at_a_time(
    toy_model: torch.nn.Module, toy_lora: dict[str, Factors]
) -> None:
    examples = [Example((1, 2, 3), (4, 5)), Example((9,), (8, 7, 6)), Example((5, 5, 5, 5), (1,))]
    sketch = make_sketch(num_parameters(toy_lora), 128, seed=0)
    together = sketched_gradients(toy_model, toy_lora, examples, sketch)
    alone = torch.cat([sketched_gradients(toy_model, toy_lora, [one], sketch) for one in examples])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_sketch_keeps_dot_products_and_is_linear() -> None:
    rows = unit_rows(random(12, 20_000))
    rows[1] = unit_rows((rows[0] + 0.1 * rows[1])[None])[0]
    sketch = make_sketch(20_000, 4096, seed=3)
    short = sketch.floats(rows)
    assert ((short @ short.T) - (rows @ rows.T)).abs().max() < 5 / 4096**0.5
    integers = (rows[0] * 2**20).long()
    assert torch.equal(
        sketch.integers(integers), sketch.integers(integers // 2) + sketch.integers(integers - integers // 2)
    )


def test_sketch_is_the_published_one() -> None:
    """Buckets and signs are part of the format: splitmix64's published first outputs, taken apart."""
    outputs = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    sketch = make_sketch(3, 16, seed=0)
    assert sketch.bucket.tolist() == [word % 16 for word in outputs]
    assert sketch.sign.tolist() == [-1 if word >> 63 else 1 for word in outputs]
    assert make_sketch(3, 16, seed=1).bucket.tolist() != sketch.bucket.tolist()
