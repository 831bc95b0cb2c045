"""Sampling follows its distribution, its cuts and its seed."""

from collections import Counter

import pytest
import torch

from attribution.errors import Rejected
from serve_apps.engine.sampling import sample
from serve_apps.engine.types import SamplingParams

LOGITS = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]))


def draws(num: int, **sampling: float) -> Counter[int]:
    params = [SamplingParams(1, seed=seed, **sampling) for seed in range(num)]  # type: ignore[arg-type]
    return Counter(sample(LOGITS, p, []) for p in params)


def test_draws_follow_the_distribution() -> None:
    counts = draws(4000)
    for token, probability in enumerate((0.5, 0.3, 0.15, 0.05)):
        assert abs(counts[token] / 4000 - probability) < 0.03


def test_temperature_zero_takes_the_best_and_low_temperature_nearly_always() -> None:
    assert draws(20, temperature=0.0) == {0: 20}
    assert draws(200, temperature=0.05)[0] == 200


@pytest.mark.parametrize(
    ("cut", "left"),
    [({"top_k": 2}, {0, 1}), ({"top_p": 0.75}, {0, 1}), ({"top_p": 0.4}, {0}), ({"min_p": 0.29}, {0, 1, 2})],
)
def test_cuts_leave_the_most_likely(cut: dict[str, float], left: set[int]) -> None:
    assert set(draws(400, **cut)) == left


def test_the_same_seed_draws_the_same_and_the_position_matters() -> None:
    params = SamplingParams(1, seed=11)
    first = [sample(LOGITS, params, [0] * i) for i in range(40)]
    assert first == [sample(LOGITS, params, [0] * i) for i in range(40)]
    assert len(set(first)) > 1


def test_penalties_subtract_from_what_was_said() -> None:
    presence = SamplingParams(1, temperature=0, presence_penalty=1.0)
    frequency = SamplingParams(1, temperature=0, frequency_penalty=0.3)
    assert sample(LOGITS, presence, [0]) == 1
    assert sample(LOGITS, frequency, [0]) == 0
    assert sample(LOGITS, frequency, [0, 0]) == 1


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("temperature", 2.1),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_k", -1),
        ("min_p", 1.5),
        ("presence_penalty", 3.0),
        ("frequency_penalty", -3.0),
        ("stop", ("",)),
        ("stop", ("a",) * 5),
    ],
)
def test_values_out_of_range_are_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(Rejected) as refused:
        SamplingParams(**{"max_tokens": 1, field: value})  # type: ignore[arg-type]
    assert refused.value.field == field
