"""A trajectory names its training, keeps what a replay and a resumed worker need, and notices what is
missing."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load, save

from attribution.errors import Corrupted
from attribution.hashing import sha256
from cluster.storage import Storage
from pipelines.packing import Example, plan
from pipelines.training import AdamState, TrainingConfig
from pipelines.trajectory import (
    Metric,
    TrainingSpec,
    done_adapter,
    kept_steps,
    read_metrics,
    read_state,
    recorded_config,
    recorded_steps,
    write_beginning,
    write_done,
    write_metrics,
    write_state,
)

SPEC = TrainingSpec(sha256(b"base"), (sha256(b"manifest"),), TrainingConfig(rank=8), seed=3, num_workers=1)


@pytest.mark.parametrize(
    "other",
    [
        replace(SPEC, base_id=sha256(b"other")),
        replace(SPEC, manifest_ids=(sha256(b"manifest"), sha256(b"more"))),
        replace(SPEC, config=TrainingConfig(rank=9)),
        replace(SPEC, config=TrainingConfig(rank=8, learning_rate=1e-3)),
        replace(SPEC, seed=4),
        replace(SPEC, num_workers=2),
    ],
)
def test_whatever_determines_a_training_names_it(other: TrainingSpec) -> None:
    assert other.training_id != SPEC.training_id
    assert replace(SPEC, config=TrainingConfig(rank=8)).training_id == SPEC.training_id


@pytest.mark.parametrize("num_steps", [1, 2, 3, 10, 97, 100, 101, 5000])
def test_kept_steps_hold_both_ends_and_are_a_root_apart(num_steps: int) -> None:
    kept = sorted(kept_steps(num_steps))
    assert (kept[0], kept[-1]) == (0, num_steps)
    gaps = [after - before for before, after in pairwise(kept)]
    assert max(gaps) ** 2 < num_steps + 2 * num_steps**0.5 + 1
    assert len(kept) <= num_steps**0.5 + 2


def some_state(seed: int) -> dict[str, AdamState]:
    random = torch.Generator().manual_seed(seed)
    return {
        name: AdamState(*(torch.randn(2, 3, generator=random) for _ in range(3)))
        for name in ("model.layers.1.x.a", "model.layers.1.x.b")
    }


def test_a_state_is_read_as_it_was_written(storage: Storage) -> None:
    state = some_state(0)
    for step in (0, 5, 10):
        write_state(storage, SPEC.trajectory, step, state)
    assert recorded_steps(storage, SPEC.trajectory) == [0, 5, 10]
    found = read_state(storage, SPEC.trajectory, 5)
    assert found.keys() == state.keys()
    for name, one in state.items():
        assert torch.equal(found[name].value, one.value)
        assert torch.equal(found[name].exp_avg, one.exp_avg)
        assert torch.equal(found[name].exp_avg_sq, one.exp_avg_sq)


def test_a_state_without_its_moments_is_corrupted(storage: Storage) -> None:
    write_state(storage, SPEC.trajectory, 1, some_state(0))
    key = f"{SPEC.trajectory}/step_1.safetensors"
    tensors = load(storage.get(key))
    del tensors["model.layers.1.x.a.exp_avg_sq"]
    storage.put(key, save(tensors))
    with pytest.raises(Corrupted, match="step 1"):
        read_state(storage, SPEC.trajectory, 1)


def test_the_beginning_gives_the_configuration_back(storage: Storage) -> None:
    given = [Example(sha256(bytes([n])), 0, (1, 2, n), (9, 0)) for n in range(6)]
    write_beginning(storage, SPEC, plan(given, row_tokens=16, rows_per_step=1, epochs=2, seed=3))
    assert recorded_config(storage, SPEC.trajectory) == SPEC.config


def test_metrics_and_the_end_are_absent_until_they_are_written(storage: Storage) -> None:
    assert read_metrics(storage, SPEC.trajectory) == []
    assert done_adapter(storage, SPEC.trajectory) is None
    metrics = [Metric(1, 2.5, 1e-3, 256, 0.5), Metric(2, 1.5, 1e-3, 256, 0.25)]
    write_metrics(storage, SPEC.trajectory, metrics)
    write_done(storage, SPEC.trajectory, sha256(b"adapter"), 12.3)
    assert read_metrics(storage, SPEC.trajectory) == metrics
    assert done_adapter(storage, SPEC.trajectory) == sha256(b"adapter")
