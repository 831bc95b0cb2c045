"""Sampling follows its distribution, its cuts and its seed."""

from collections import Counter

import pytest
import torch

from attribution.errors import Rejected
from serve_apps.engine.sampling import logprob_of, sample
from serve_apps.engine.types import SamplingParams, TokenScore

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


def test_repetition_penalty_weighs_on_prompt_and_answer_once() -> None:
    logits = torch.tensor([2.0, 1.5, -1.0, -1.4])
    greedy = SamplingParams(1, temperature=0, repetition_penalty=1.5)
    assert sample(logits, greedy, []) == 0
    assert sample(logits, greedy, [0]) == sample(logits, greedy, [], prompt=[0]) == 1
    assert sample(logits, greedy, [0, 0, 0], prompt=[0]) == 1  # 2 / 1.5, however often it was said
    only_negative = torch.tensor([True, False, True, True]) & (logits < 0)
    assert sample(logits, greedy, [2], allowed=only_negative) == 3  # -1 * 1.5: pushed down, not up


def test_a_bias_moves_a_token_and_can_forbid_or_force_it() -> None:
    def biased(token: int, score: float) -> SamplingParams:
        return SamplingParams(1, temperature=0, logit_bias=(TokenScore(token, score),))

    assert sample(LOGITS, biased(3, 100.0), []) == 3
    assert sample(LOGITS, biased(0, -100.0), []) == 1
    assert sample(LOGITS, biased(0, -0.1), []) == 0
    assert not biased(0, 1.0).is_plain_greedy


@pytest.mark.parametrize("params", [{}, {"temperature": 0}, {"top_k": 1}, {"top_p": 0.1}, {"min_p": 0.9}])
def test_what_is_not_allowed_is_never_drawn(params: dict[str, float]) -> None:
    allowed = torch.tensor([False, False, True, True])
    drawn = {
        sample(LOGITS, SamplingParams(1, seed=seed, **params), [], allowed=allowed)  # type: ignore[arg-type]
        for seed in range(200)
    }
    assert drawn == ({2, 3} if not params else {2})


def test_logprobs_are_those_of_the_model_alone() -> None:
    told = logprob_of(LOGITS, 2, 2, text_offset=7)
    assert (told.chosen.token_id, told.text_offset) == (2, 7)
    assert told.chosen.score == pytest.approx(float(LOGITS[2]), abs=1e-6)
    assert [score.token_id for score in told.top] == [0, 1]
    assert [score.score for score in told.top] == pytest.approx(LOGITS[:2].tolist(), abs=1e-6)
    assert logprob_of(LOGITS, 0, 0, 0).top == ()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("repetition_penalty", 0.0),
        ("repetition_penalty", float("inf")),
        ("logit_bias", (TokenScore(1, 100.5),)),
        ("logit_bias", (TokenScore(1, float("nan")),)),
        ("logit_bias", (TokenScore(1, 0.0),) * 1025),
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
