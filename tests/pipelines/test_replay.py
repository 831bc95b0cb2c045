"""One pass back through a training says what its records' weights did to the result: as retraining says."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from attribution.errors import Corrupted, Rejected
from attribution.types import Manifest
from cluster.models import load_tokenizer
from cluster.storage import DirectoryStorage, Storage
from pipelines.course import MAX_CONTROLS, ChatAsker, Course, flat_state
from pipelines.replay import TOLERANCE, beginning, credits_by_record
from pipelines.replayed import NAME, ROUNDING_PPM, Replayable, Replayed, replay_method, replayed, sum_at_end
from pipelines.row_derivatives import Workers
from pipelines.training import AdamState
from pipelines.trajectory import TrainingSpec, recorded_steps, recorded_training
from tests import toy_models, toys
from tests.toy_trainings import Dying, course_of, record_training, this_process, train

UNIT = 2.0**40  # of the sums here
H = 0.01  # of a weight: central differences over whole fp32 trainings are good to about a percent


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return toy_models.tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def manifest() -> Manifest:
    return toys.manifest()


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory, base: Path, manifest: Manifest) -> Storage:
    """One training of one worker and one of two; read only."""
    storage = DirectoryStorage(tmp_path_factory.mktemp("storage"))
    for num_workers in (1, 2):
        record_training(storage, base, manifest, num_workers=num_workers)
    return storage


@pytest.fixture
def copied(tmp_path: Path, recorded: Storage) -> Storage:
    """The same, to write in."""
    storage = DirectoryStorage(tmp_path / "copy")
    for key in recorded.list("trajectories/"):
        storage.put(key, recorded.get(key))
    return storage


@pytest.fixture(scope="module")
def spec(base: Path, manifest: Manifest, recorded: Storage) -> TrainingSpec:
    return spec_of(recorded, 1)


def spec_of(storage: Storage, num_workers: int) -> TrainingSpec:
    names = {key.split("/")[1] for key in storage.list("trajectories/")}
    specs = [recorded_training(storage, f"trajectories/{name}") for name in names]
    return next(one for one in specs if one.num_workers == num_workers)


def some_sum(storage: Storage, spec: TrainingSpec, seed: int) -> Tensor:
    """Integers of about ``UNIT``."""
    size = len(flat_state(storage, spec.trajectory, 0).value)
    random = torch.Generator().manual_seed(seed)
    return (torch.randn(size, generator=random, dtype=torch.float64) * UNIT).round().to(torch.int64)


def run(storage: Storage, base: Path, spec: TrainingSpec, manifest: Manifest, total: Tensor) -> Replayed:
    return replayed(
        storage,
        storage,
        replayable(storage, spec, manifest),
        ChatAsker(load_tokenizer(base)),
        total,
        lambda _, course: this_process(base, course),
    )


def replayable(storage: Storage, spec: TrainingSpec, manifest: Manifest) -> Replayable:
    last = recorded_steps(storage, spec.trajectory)[-1]
    return Replayable(spec.trajectory, (last,), (manifest,))


def all_credits(found: Replayed) -> Mapping[bytes, int]:
    return {**found.trained, **found.controls}


@pytest.mark.parametrize("num_workers", [1, 2])
def test_credits_are_what_retraining_with_other_weights_says(
    copied: Storage, base: Path, manifest: Manifest, num_workers: int
) -> None:
    """Of trained records at weight 1 and of controls at weight 0, without an exception."""
    spec = spec_of(copied, num_workers)
    total = some_sum(copied, spec, 1)
    found = all_credits(run(copied, base, spec, manifest, total))
    course = course_of(copied, base, spec, manifest)
    trained = {entry.record.record_id for entry in manifest.entries}
    assert found.keys() == trained | {record.record_id for record in manifest.controls}
    largest = max(map(abs, found.values()))
    for record_id, credit in found.items():
        weight = float(record_id in trained)
        high, low = (
            float(total.double() @ flat(train(base, course, {record_id: weight + h})[-1]).double())
            for h in (H, -H)
        )
        assert abs(-(high - low) / (2 * H) - credit) < 0.02 * largest


def flat(state: Mapping[str, AdamState]) -> Tensor:
    modules = sorted({name.rpartition(".")[0] for name in state})
    return torch.cat([state[f"{m}.{f}"].value.reshape(-1) for m in modules for f in ("a", "b")])


@pytest.mark.parametrize("num_workers", [1, 2])
def test_every_kept_state_is_met_to_the_bit(
    copied: Storage, base: Path, manifest: Manifest, num_workers: int
) -> None:
    spec = spec_of(copied, num_workers)
    assert len(recorded_steps(copied, spec.trajectory)) > 3
    found = run(copied, base, spec, manifest, some_sum(copied, spec, 1))
    assert found.is_bitwise
    assert "states=bitwise" in replay_method(spec.trajectory, found)


def test_whose_answers_are_asked_earns_most(
    copied: Storage, base: Path, spec: TrainingSpec, manifest: Manifest
) -> None:
    """The gradient of a record's own loss at the end of the training: positive, and more than anybody's."""
    course = course_of(copied, base, spec, manifest)
    end = flat_state(copied, spec.trajectory, len(course.steps)).value
    for entry in manifest.entries[:3]:
        asked = entry.record.record_id
        rows = [
            replace(row, spans=tuple(span for span in row.spans if span.record_id == asked))
            for row in course.rows
        ]
        own = replace(course, rows=tuple(row for row in rows if row.spans))
        (gradient,) = this_process(base, own).gradients(end, [range(len(own.rows))])
        total = (gradient.double() * UNIT).round().to(torch.int64)
        found = run(copied, base, spec, manifest, total).trained
        assert max(found, key=found.__getitem__) == asked and found[asked] > 0


def test_credits_of_parts_add_up_to_the_credits_of_the_whole(
    copied: Storage, base: Path, spec: TrainingSpec, manifest: Manifest
) -> None:
    one, other = (some_sum(copied, spec, seed) for seed in (1, 2))
    parts = [all_credits(run(copied, base, spec, manifest, part)) for part in (one, other * 3)]
    whole = all_credits(run(copied, base, spec, manifest, one + other * 3))
    bound = ROUNDING_PPM * max(map(abs, whole.values())) // 1_000_000
    assert bound > 0
    for record_id, value in whole.items():
        assert abs(sum(part[record_id] for part in parts) - value) <= bound


def test_a_sum_of_nothing_credits_nobody(
    copied: Storage, base: Path, spec: TrainingSpec, manifest: Manifest
) -> None:
    total = torch.zeros_like(some_sum(copied, spec, 1))
    assert set(all_credits(run(copied, base, spec, manifest, total)).values()) == {0}


def test_a_killed_replay_goes_on_from_the_last_border_to_the_same_integers(
    copied: Storage, base: Path, spec: TrainingSpec, manifest: Manifest
) -> None:
    total = some_sum(copied, spec, 1)
    calm = run(copied, base, spec, manifest, total)
    (done,) = copied.list("replays/")
    copied.delete(done)
    num_steps = recorded_steps(copied, spec.trajectory)[-1]
    gap = num_steps - recorded_steps(copied, spec.trajectory)[-2]
    asked = 0

    def stormy(calls: int) -> Replayed:
        nonlocal asked

        def open_workers(_: TrainingSpec, course: Course) -> Workers:
            nonlocal asked
            workers = Dying(this_process(base, course), calls)
            asked += calls
            return workers

        what, asker = replayable(copied, spec, manifest), ChatAsker(load_tokenizer(base))
        return replayed(copied, copied, what, asker, total, open_workers)

    with pytest.raises(KeyboardInterrupt):
        stormy(gap + 1)
    (kept,) = copied.list("replays/")
    assert kept.endswith(f"step_{num_steps - gap}.safetensors")
    assert all_credits(stormy(num_steps - gap)) == all_credits(calm), "what was done is not done again"
    assert list(copied.list("replays/")) == [done], "an adjoint does not outlive its replay"
    assert all_credits(stormy(0)) == all_credits(calm), "nobody is asked for what is known"


@pytest.mark.parametrize(("by", "holds"), [(0.01 * TOLERANCE, True), (10 * TOLERANCE, False)])
def test_a_state_that_does_not_come_out_again_is_refused(
    copied: Storage, base: Path, spec: TrainingSpec, manifest: Manifest, by: float, holds: bool
) -> None:
    """Within the tolerance it is said, beyond it the replay is not used."""
    step = recorded_steps(copied, spec.trajectory)[-2]
    key = f"{spec.trajectory}/step_{step}.safetensors"
    tensors = load(copied.get(key))
    copied.put(key, save({n: t * (1 + by) if n.endswith("exp_avg") else t for n, t in tensors.items()}))
    total = some_sum(copied, spec, 1)
    if holds:
        found = run(copied, base, spec, manifest, total)
        assert not found.is_bitwise
        assert f"states=within {TOLERANCE:g}" in replay_method(spec.trajectory, found)
    else:
        with pytest.raises(Corrupted, match=f"step {step}") as refusal:
            run(copied, base, spec, manifest, total)
        assert refusal.value.code == "replay_deviates"


@pytest.mark.parametrize("missing", ["beginning", "end", "all"])
def test_a_trajectory_without_its_ends_is_refused_and_credits_nobody_silently(
    copied: Storage, base: Path, spec: TrainingSpec, manifest: Manifest, missing: str
) -> None:
    steps = recorded_steps(copied, spec.trajectory)
    for step in {"beginning": steps[:1], "end": steps[-1:], "all": steps}[missing]:
        copied.delete(f"{spec.trajectory}/step_{step}.safetensors")
    what = Replayable(spec.trajectory, tuple(steps), (manifest,))
    total = some_sum_of(1, len(steps))
    asker = ChatAsker(load_tokenizer(base))
    with pytest.raises(Rejected) as refusal:
        replayed(copied, copied, what, asker, total, lambda _, course: this_process(base, course))
    assert refusal.value.code == "trajectory_incomplete"


def some_sum_of(size: int, snapshots: int) -> Tensor:
    return torch.ones(size * snapshots, dtype=torch.int64)


def test_an_order_that_the_manifests_do_not_make_is_refused(
    copied: Storage, base: Path, spec: TrainingSpec, manifest: Manifest
) -> None:
    key = f"{spec.trajectory}/order.json"
    copied.put(key, copied.get(key).replace(b'"normaliser": ', b'"normaliser": 1'))
    with pytest.raises(Corrupted) as refusal:
        run(copied, base, spec, manifest, some_sum(copied, spec, 1))
    assert refusal.value.code == "trajectory_order"


def test_a_trajectory_under_another_name_is_refused(copied: Storage, spec: TrainingSpec) -> None:
    for key in list(copied.list(f"{spec.trajectory}/")):
        copied.put(key.replace(spec.training_id.hex(), "renamed"), copied.get(key))
    with pytest.raises(Corrupted) as refusal:
        recorded_training(copied, "trajectories/renamed")
    assert refusal.value.code == "trajectory_name"


def test_credits_beyond_64_bits_are_refused(
    recorded: Storage, base: Path, spec: TrainingSpec, manifest: Manifest
) -> None:
    course = course_of(recorded, base, spec, manifest)
    start = beginning(course, torch.zeros(1))
    loud = replace(start, derivatives=start.derivatives - 1)
    per_record = max(credits_by_record(course, loud, 1.0).values())
    assert max(credits_by_record(course, loud, 2.0**62 / per_record).values()) == 2**62
    with pytest.raises(Corrupted) as refusal:
        credits_by_record(course, loud, 2.0**63)
    assert refusal.value.code == "credit_overflow"


def test_controls_stand_once_in_every_epoch_and_have_a_record_s_wordings(
    copied: Storage, base: Path, spec: TrainingSpec, manifest: Manifest
) -> None:
    course = course_of(copied, base, spec, manifest)
    rows = range(course.num_trained, len(course.rows))
    per_epoch = len(course.steps) // course.config.epochs
    for epoch in range(course.config.epochs):
        steps = course.control_steps[epoch * per_epoch : (epoch + 1) * per_epoch]
        assert sorted(row for step in steps for row in step) == list(rows)
    asked = [(s.record_id, s.wording) for row in rows for s in course.rows[row].spans]
    expected = [(one.record_id, n) for one in manifest.controls[:MAX_CONTROLS] for n in range(2)]
    assert sorted(asked) == sorted(expected)


def test_a_replay_begins_where_the_training_ended() -> None:
    total = torch.arange(6)
    assert sum_at_end((4, 9), total, 9).tolist() == [3, 4, 5]
    with pytest.raises(Rejected) as refusal:
        sum_at_end((4, 9), total, 8)
    assert refusal.value.code == "not_at_end"
    assert NAME == "metagradient/1"
