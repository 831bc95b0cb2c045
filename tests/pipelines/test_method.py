"""A replay is made where fees are worth it; what is not worth one waits, but not for ever."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attribution.errors import Rejected
from attribution.hashing import sha256
from cluster.config import PeriodSettings
from cluster.storage import Storage
from pipelines.method import REPLAY_PER_TRAINING, Means, expected_replay_s, method_for
from pipelines.packing import Example, plan
from pipelines.training import TrainingConfig
from pipelines.trajectory import Metric, TrainingSpec, write_beginning, write_metrics

RULE = PeriodSettings(replay_gwei_per_s=100, max_replay_s=1000, max_age_s=86_400)


@pytest.mark.parametrize(
    ("fees_gwei", "replay_s", "age_s", "means"),
    [
        (50_000, 500.0, 0, Means.REPLAY),
        (49_999, 500.0, 0, Means.WAIT),
        (49_999, 500.0, 86_399, Means.WAIT),
        (49_999, 500.0, 86_400, Means.CHEAP),
        (50_000, 500.0, 86_400, Means.REPLAY),
        (10**9, 1000.0, 0, Means.REPLAY),
        (10**9, 1001.0, 0, Means.CHEAP),
        (0, 1001.0, 0, Means.CHEAP),
    ],
)
def test_the_edges(fees_gwei: int, replay_s: float, age_s: int, means: Means) -> None:
    assert method_for(fees_gwei, replay_s, age_s, RULE).means is means


amounts = st.integers(0, 10**12)


@given(amounts, amounts, st.floats(0, 10**6), st.integers(0, 10**7))
def test_more_fees_never_lose_a_replay_and_nothing_waits_beyond_its_age(
    fees_gwei: int, more_gwei: int, replay_s: float, age_s: int
) -> None:
    before = method_for(fees_gwei, replay_s, age_s, RULE).means
    after = method_for(fees_gwei + more_gwei, replay_s, age_s, RULE).means
    assert before is not Means.REPLAY or after is Means.REPLAY
    assert before is not Means.WAIT or age_s < RULE.max_age_s


def test_a_choice_names_both_numbers() -> None:
    assert method_for(7, 1.0, 0, RULE).reason.startswith("fees of 7 gwei after 0 s; a replay is worth 100")
    assert method_for(7, 2000.0, 0, RULE).reason == "a replay would take about 2000 s, allowed are 1000"


def test_what_a_replay_takes_follows_from_what_the_training_took(storage: Storage) -> None:
    spec = TrainingSpec(sha256(b"base"), (sha256(b"manifest"),), TrainingConfig(), seed=0, num_workers=1)
    with pytest.raises(Rejected):
        expected_replay_s(storage, spec.trajectory)
    examples = [Example(sha256(bytes([n])), 0, (1, 2, n), (9, 0)) for n in range(6)]
    write_beginning(storage, spec, plan(examples, row_tokens=16, rows_per_step=1, epochs=2, seed=0))
    write_metrics(storage, spec.trajectory, [Metric(n, 1.0, 1e-3, 9, 2.0) for n in (1, 2, 3)])
    assert expected_replay_s(storage, spec.trajectory) == 6 * REPLAY_PER_TRAINING
