"""By which method an adapter's outstanding fees become credits: the replay, if they are worth it."""

from dataclasses import dataclass
from enum import StrEnum

from cluster.config import PeriodSettings
from cluster.storage import Storage
from pipelines.trajectory import read_metrics, recorded_training

REPLAY_PER_TRAINING = 3.2  # seconds a second of the training's steps; tests/bench/attribution/replay.py


class Means(StrEnum):
    REPLAY = "replay"
    CHEAP = "cheap"  # damped Fisher, attribution/influence.py
    WAIT = "wait"


@dataclass(frozen=True, slots=True)
class Choice:
    """``reason`` stands on the statement behind the method, or beside the adapter that is carried."""

    means: Means
    reason: str


def method_for(fees_gwei: int, replay_s: float, age_s: int, rule: PeriodSettings) -> Choice:
    """For an adapter whose training can be replayed in about ``replay_s`` and whose oldest unpaid answer is
    ``age_s`` old."""
    worth_gwei = round(replay_s * rule.replay_gwei_per_s)
    if replay_s > rule.max_replay_s:
        return Choice(
            Means.CHEAP, f"a replay would take about {replay_s:.0f} s, allowed are {rule.max_replay_s}"
        )
    if fees_gwei >= worth_gwei:
        return Choice(Means.REPLAY, f"fees of {fees_gwei} gwei, a replay is worth {worth_gwei}")
    if age_s >= rule.max_age_s:
        return Choice(
            Means.CHEAP, f"at maximum age with fees of {fees_gwei} gwei, a replay is worth {worth_gwei}"
        )
    return Choice(
        Means.WAIT,
        f"fees of {fees_gwei} gwei after {age_s} s; a replay is worth {worth_gwei}, "
        f"without one they are paid after {rule.max_age_s} s",
    )


def expected_replay_s(storage: Storage, trajectory: str) -> float:
    """From what the training took.

    Raises:
        Rejected: this trajectory cannot be replayed, or was never recorded.
    """
    recorded_training(storage, trajectory)
    return REPLAY_PER_TRAINING * sum(metric.seconds for metric in read_metrics(storage, trajectory))
