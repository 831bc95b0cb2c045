"""What a replay found, kept: from a published gradient sum to integer credits, done once and taken up again
where it was killed.

``replays/<replay_id>/step_<n>.safetensors`` is the position behind step ``n`` of a replay under way, the
newest alone; ``done.json`` its end, which replaces them. The id follows from the training and the sum, so
whoever asks for the same credits finds them, with what they cost.

A credit is ``-(q . d theta_T / d w)`` in the unit of the sum (gwei times ``2**-bits``), rounded to an
integer once, after a record's wordings and epochs are added in fp64. It is linear in the sum but for that
rounding and fp32: credits of parts add up to the credit of the whole within ``ROUNDING_PPM`` of the largest,
which is also what two machines may differ by."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from attribution.codec import Encoder
from attribution.errors import Rejected
from attribution.hashing import sha256
from attribution.types import Manifest
from cluster.storage import Storage
from pipelines.course import Course, flat_state, recorded_course
from pipelines.packing import Asker
from pipelines.replay import TOLERANCE, Position, beginning, credits_by_record, replay
from pipelines.row_derivatives import Workers
from pipelines.training import AdamState
from pipelines.trajectory import TrainingSpec, recorded_steps, recorded_training

ROUNDING_PPM = 1000
NAME = "metagradient/1"


@dataclass(frozen=True, slots=True)
class Replayed:
    """Signed credits by record id, of everything trained and of every control; both sum over wordings and
    epochs. ``seconds`` are those of all sessions that worked on it, ``is_bitwise`` whether every kept state
    was met to the bit."""

    trained: Mapping[bytes, int]
    controls: Mapping[bytes, int]
    is_bitwise: bool
    seconds: int


@dataclass(frozen=True, slots=True)
class Replayable:
    """A training on record; ``snapshots`` are the steps after which the gradients in a sum were taken."""

    trajectory: str
    snapshots: tuple[int, ...]
    manifests: tuple[Manifest, ...]


OpenWorkers = Callable[[TrainingSpec, Course], Workers]
"""Called only if there is work."""


def replayed(
    storage: Storage,
    results: Storage,
    what: Replayable,
    asker: Asker,
    total: Tensor,
    open_workers: OpenWorkers,
) -> Replayed:
    """Credits of a gradient sum: found among ``results``, or worked out from where an earlier replay of it
    ended.

    Raises:
        Rejected: ``trajectory_incomplete``; it is not one that can be replayed; the sum is not of its end.
        Corrupted: ``replay_deviates``, the training does not come out as it is on record;
            ``trajectory_order``, ``trajectory_name``.
    """
    training = recorded_training(storage, what.trajectory)
    kept = recorded_steps(storage, what.trajectory)
    if not kept or kept[0] != 0:
        raise Rejected("trajectory_incomplete", f"{what.trajectory} keeps states after {kept}, none at 0")
    part = sum_at_end(what.snapshots, total, kept[-1])
    folder = f"replays/{replay_id(training, part).hex()}"
    if f"{folder}/done.json" in results.list(folder):
        return _decode(results.get(f"{folder}/done.json"))
    course = recorded_course(storage, training, what.manifests, asker)
    if kept[-1] != len(course.steps):
        raise Rejected(
            "trajectory_incomplete", f"{what.trajectory} ends after {kept[-1]} of {len(course.steps)} steps"
        )
    positions = _Positions(results, folder)

    def state_after(step: int) -> AdamState:
        return flat_state(storage, training.trajectory, step)

    found = _work_out(course, part, positions, lambda: open_workers(training, course), state_after, kept)
    results.put(f"{folder}/done.json", _encode(found))
    positions.forget()
    return found


def replay_method(trajectory: str, found: Replayed) -> str:
    """One line for the statement: how credits follow from the sum, how well the training came out again, and
    what it took."""
    states = "bitwise" if found.is_bitwise else f"within {TOLERANCE:g}"
    return (
        f"{NAME} {trajectory} controls={len(found.controls)} rounding_ppm={ROUNDING_PPM} states={states} "
        f"seconds={found.seconds}"
    )


def replay_id(training: TrainingSpec, total: Tensor) -> bytes:
    data = total.numpy().astype("<i8").tobytes()
    return sha256(Encoder(f"openledger/{NAME}").id32(training.training_id).id32(sha256(data)).finish())


def sum_at_end(snapshots: Sequence[int], total: Tensor, last_step: int) -> Tensor:
    """The part of a period's sum that was taken at the end of the training, where the replay begins.

    Raises:
        Rejected: ``not_at_end``, it has no gradients from there.
    """
    if last_step not in snapshots:
        raise Rejected(
            "not_at_end", f"gradients were taken after steps {list(snapshots)}, the training has {last_step}"
        )
    return total.chunk(len(snapshots))[snapshots.index(last_step)]


def _work_out(
    course: Course,
    total: Tensor,
    positions: "_Positions",
    workers: Callable[[], Workers],
    state_after: Callable[[int], AdamState],
    kept: Sequence[int],
) -> Replayed:
    began = time.monotonic()
    norm = float(torch.linalg.vector_norm(total.double()))
    direction = (total.double() / max(norm, 1.0)).float()
    position, spent_s = positions.newest() or (beginning(course, direction), 0.0)

    def keep(reached: Position) -> None:
        print(f"replayed back to step {reached.step} of {len(course.steps)}", flush=True)
        positions.keep(reached, spent_s + time.monotonic() - began)

    if norm:  # a sum of nothing moves nothing
        position = replay(course, workers(), state_after, kept, position, keep)
    values = credits_by_record(course, position, norm)
    trained = {span.record_id for row in course.rows[: course.num_trained] for span in row.spans}
    return Replayed(
        {record_id: value for record_id, value in values.items() if record_id in trained},
        {record_id: value for record_id, value in values.items() if record_id not in trained},
        position.deviation == 0,
        round(spent_s + time.monotonic() - began),
    )


@dataclass(frozen=True, slots=True)
class _Positions:
    """Where a replay under way stands, and the seconds spent on it: the newest alone is kept."""

    storage: Storage
    folder: str

    def newest(self) -> tuple[Position, float] | None:
        steps = [int(key.rpartition("_")[2].partition(".")[0]) for key in self._keys()]
        if not steps:
            return None
        print(f"replay taken up behind step {min(steps)}", flush=True)
        tensors = load(self.storage.get(self._key(min(steps))))
        adjoint = AdamState(tensors["value"], tensors["exp_avg"], tensors["exp_avg_sq"])
        deviation, spent_s = tensors["figures"].tolist()
        return Position(min(steps), adjoint, tensors["derivatives"], deviation), spent_s

    def keep(self, position: Position, spent_s: float) -> None:
        older = self._keys()
        self.storage.put(self._key(position.step), _encode_position(position, spent_s))
        for key in older:
            self.storage.delete(key)

    def forget(self) -> None:
        for key in self._keys():
            self.storage.delete(key)

    def _keys(self) -> list[str]:
        return list(self.storage.list(f"{self.folder}/step_"))

    def _key(self, step: int) -> str:
        return f"{self.folder}/step_{step}.safetensors"


def _encode_position(position: Position, spent_s: float) -> bytes:
    tensors = {name: getattr(position.adjoint, name) for name in ("value", "exp_avg", "exp_avg_sq")}
    figures = torch.tensor([position.deviation, spent_s], dtype=torch.float64)
    return save({**tensors, "derivatives": position.derivatives, "figures": figures})


def _encode(found: Replayed) -> bytes:
    document = {
        "trained": {record_id.hex(): value for record_id, value in sorted(found.trained.items())},
        "controls": {record_id.hex(): value for record_id, value in sorted(found.controls.items())},
        "is_bitwise": found.is_bitwise,
        "seconds": found.seconds,
    }
    return json.dumps(document, indent=1).encode()


def _decode(data: bytes) -> Replayed:
    document: dict[str, Any] = json.loads(data)
    trained, controls = (
        {bytes.fromhex(record_id): int(value) for record_id, value in document[name].items()}
        for name in ("trained", "controls")
    )
    return Replayed(trained, controls, document["is_bitwise"], document["seconds"])
