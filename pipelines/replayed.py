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
from attribution.index import IndexCard
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


OpenWorkers = Callable[[TrainingSpec, Course], Workers]
"""Called only if there is work."""


def replayed(
    storage: Storage,
    trajectory: str,
    manifests: Sequence[Manifest],
    asker: Asker,
    total: Tensor,
    open_workers: OpenWorkers,
) -> Replayed:
    """Credits of a gradient sum over the last state (``sum_at_end``): found, or worked out from where an
    earlier replay of it ended.

    Raises:
        Rejected: the trajectory is not one that can be replayed.
        Corrupted: ``replay_deviates``, the training does not come out as it is on record;
            ``trajectory_order``, ``trajectory_name``.
    """
    training = recorded_training(storage, trajectory)
    folder = f"replays/{replay_id(training, total).hex()}"
    if f"{folder}/done.json" in storage.list(folder):
        return _decode(storage.get(f"{folder}/done.json"))
    course = recorded_course(storage, training, manifests, asker)
    found = _work_out(storage, training, course, total, open_workers, folder)
    storage.put(f"{folder}/done.json", _encode(found))
    for key in list(storage.list(f"{folder}/step_")):
        storage.delete(key)
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


def sum_at_end(card: IndexCard, total: Tensor, last_step: int) -> Tensor:
    """The part of a period's sum that was taken at the end of the training, where the replay begins.

    Raises:
        Rejected: ``not_at_end``, the index takes no gradients there.
    """
    if last_step not in card.snapshots:
        raise Rejected(
            "not_at_end", f"gradients are taken after steps {card.snapshots}, the training has {last_step}"
        )
    return total.chunk(len(card.snapshots))[card.snapshots.index(last_step)]


def _work_out(
    storage: Storage,
    training: TrainingSpec,
    course: Course,
    total: Tensor,
    open_workers: OpenWorkers,
    folder: str,
) -> Replayed:
    began = time.monotonic()
    norm = float(torch.linalg.vector_norm(total.double()))
    direction = (total.double() / max(norm, 1.0)).float()
    position, spent_s = _taken_up(storage, folder) or (beginning(course, direction), 0.0)

    def keep(reached: Position) -> None:
        print(f"replayed back to step {reached.step} of {len(course.steps)}", flush=True)
        storage.put(
            f"{folder}/step_{reached.step}.safetensors",
            _encode_position(reached, spent_s + time.monotonic() - began),
        )
        for key in list(storage.list(f"{folder}/step_")):
            if key != f"{folder}/step_{reached.step}.safetensors":
                storage.delete(key)

    if norm:  # a sum of nothing moves nothing
        position = replay(
            course,
            open_workers(training, course),
            lambda step: flat_state(storage, training.trajectory, step),
            recorded_steps(storage, training.trajectory),
            position,
            keep,
        )
    values = credits_by_record(course, position, norm)
    trained = {span.record_id for row in course.rows[: course.num_trained] for span in row.spans}
    return Replayed(
        {record_id: value for record_id, value in values.items() if record_id in trained},
        {record_id: value for record_id, value in values.items() if record_id not in trained},
        position.deviation == 0,
        round(spent_s + time.monotonic() - began),
    )


def _taken_up(storage: Storage, folder: str) -> tuple[Position, float] | None:
    """The newest position of an earlier session, and the seconds spent on it."""
    kept = {int(key.rpartition("_")[2].partition(".")[0]): key for key in storage.list(f"{folder}/step_")}
    if not kept:
        return None
    step = min(kept)
    tensors = load(storage.get(kept[step]))
    adjoint = AdamState(tensors["value"], tensors["exp_avg"], tensors["exp_avg_sq"])
    deviation, spent_s = tensors["figures"].tolist()
    print(f"replay taken up behind step {step}", flush=True)
    return Position(step, adjoint, tensors["derivatives"], deviation), spent_s


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
