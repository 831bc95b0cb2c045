"""The recorded training in storage: what a replay follows, an index reads, and a killed worker resumes from.

``<trajectory>/spec.json`` what determines the training, and the versions it ran with; ``order.json`` rows,
spans, steps, learning rates; ``step_<n>.safetensors`` the whole fp32 state after step ``n`` (0 is the
beginning): ``<param>``, ``<param>.exp_avg``, ``<param>.exp_avg_sq``, for ``<param>`` such as
``model.layers.14.self_attn.q_proj.a``; ``metrics.jsonl`` a line per step; ``done.json`` last, so a trajectory
that has it has everything.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version

from safetensors.torch import load_file, save
from torch import Tensor

from attribution.codec import Encoder
from attribution.errors import Corrupted, Rejected
from attribution.hashing import sha256
from cluster.storage import Storage
from pipelines.packing import Plan
from pipelines.training import AdamState, TrainingConfig, learning_rate

VERSIONS = ("torch", "transformers", "deepspeed")
_STEP = re.compile(r"step_(\d+)\.safetensors")


@dataclass(frozen=True, slots=True)
class TrainingSpec:
    """All that a training follows from. ``num_workers`` is part of it: sums round differently."""

    base_id: bytes
    manifest_ids: tuple[bytes, ...]
    config: TrainingConfig
    seed: int
    num_workers: int

    @property
    def training_id(self) -> bytes:
        encoder = Encoder("openledger/training/1").id32(self.base_id).each(self.manifest_ids, Encoder.id32)
        encoder.u64(self.seed).u64(self.num_workers)
        fields = sorted(self.config.model_dump().items())
        encoder.each(fields, lambda e, field: e.text(field[0]).text(repr(field[1])))
        return sha256(encoder.finish())

    @property
    def trajectory(self) -> str:
        return f"trajectories/{self.training_id.hex()}"


@dataclass(frozen=True, slots=True)
class Metric:
    """One step as it was: loss and tokens of all workers, the first one's wall time."""

    step: int
    loss: float
    learning_rate: float
    tokens: int
    seconds: float


def kept_steps(num_steps: int) -> frozenset[int]:
    """The first, the last, and every ceil(sqrt(T))-th between: a replay holds that many at a time."""
    return frozenset({*range(0, num_steps, math.isqrt(max(0, num_steps - 1)) + 1), num_steps})


def write_beginning(storage: Storage, spec: TrainingSpec, plan: Plan) -> None:
    """``spec.json`` and ``order.json``; a resumed training writes the same again."""
    document = {
        "base_id": spec.base_id.hex(),
        "manifest_ids": [one.hex() for one in spec.manifest_ids],
        "config": spec.config.model_dump(),
        "seed": spec.seed,
        "num_workers": spec.num_workers,
        "versions": {name: version(name) for name in VERSIONS},
    }
    storage.put(f"{spec.trajectory}/spec.json", _json(document))
    storage.put(f"{spec.trajectory}/order.json", _order(spec, plan))


def _order(spec: TrainingSpec, plan: Plan) -> bytes:
    num_steps = len(plan.steps)
    order = {
        "normaliser": plan.normaliser,
        "rows": [
            [(s.record_id.hex(), s.wording, s.start, s.answer_start, s.end) for s in row.spans]
            for row in plan.rows
        ],
        "openings": [row.opening for row in plan.rows],
        "steps": plan.steps,
        "learning_rates": [learning_rate(spec.config, step, num_steps) for step in range(1, num_steps + 1)],
    }
    return _json(order)


def check_order(storage: Storage, spec: TrainingSpec, plan: Plan) -> None:
    """``Corrupted`` if the order on record is not this plan's."""
    if storage.get(f"{spec.trajectory}/order.json") != _order(spec, plan):
        raise Corrupted(
            "trajectory_order", f"{spec.trajectory}: its order.json is not what spec.json and manifests make"
        )


def recorded_training(storage: Storage, trajectory: str) -> TrainingSpec:
    """All that a trajectory followed from.

    Raises:
        Rejected: ``not_found``; ``no_training``, it has a configuration only and cannot be made again.
        Corrupted: it is named by something else.
    """
    document = json.loads(storage.get(f"{trajectory}/spec.json"))
    try:
        spec = TrainingSpec(
            bytes.fromhex(document["base_id"]),
            tuple(bytes.fromhex(one) for one in document["manifest_ids"]),
            TrainingConfig.model_validate(document["config"]),
            document["seed"],
            document["num_workers"],
        )
    except (KeyError, ValueError) as error:
        raise Rejected("no_training", f"{trajectory}/spec.json lacks {error}", field="trajectory") from error
    if spec.trajectory != trajectory:
        raise Corrupted("trajectory_name", f"{trajectory} holds the spec of {spec.trajectory}")
    return spec


def recorded_config(storage: Storage, trajectory: str) -> TrainingConfig:
    """The configuration that a trajectory was made with."""
    document = json.loads(storage.get(f"{trajectory}/spec.json"))
    return TrainingConfig.model_validate(document["config"])


def recorded_steps(storage: Storage, trajectory: str) -> list[int]:
    """Steps whose state is kept, ascending; empty if nothing has been trained yet."""
    names = (key.rpartition("/")[2] for key in storage.list(f"{trajectory}/step_"))
    return sorted(int(match[1]) for name in names if (match := _STEP.fullmatch(name)))


def write_state(storage: Storage, trajectory: str, step: int, state: Mapping[str, AdamState]) -> None:
    tensors: dict[str, Tensor] = {}
    for name, one in state.items():
        tensors[name] = one.value.contiguous()
        tensors[f"{name}.exp_avg"] = one.exp_avg.contiguous()
        tensors[f"{name}.exp_avg_sq"] = one.exp_avg_sq.contiguous()
    storage.put(f"{trajectory}/step_{step}.safetensors", save(tensors))


def read_state(storage: Storage, trajectory: str, step: int) -> dict[str, AdamState]:
    """Every parameter's state after a kept step."""
    tensors = load_file(storage.fetch(f"{trajectory}/step_{step}.safetensors"))
    names = [name for name in tensors if f"{name}.exp_avg" in tensors]
    if 3 * len(names) != len(tensors):
        raise Corrupted(
            "trajectory_state", f"{trajectory} step {step}: {len(tensors)} tensors of {len(names)}"
        )
    return {
        n: AdamState(tensors[n], tensors[f"{n}.exp_avg"], tensors[f"{n}.exp_avg_sq"]) for n in sorted(names)
    }


def write_metrics(storage: Storage, trajectory: str, metrics: Sequence[Metric]) -> None:
    lines = [
        {
            "step": one.step,
            "loss": one.loss,
            "learning_rate": one.learning_rate,
            "tokens": one.tokens,
            "seconds": round(one.seconds, 3),
        }
        for one in metrics
    ]
    storage.put(f"{trajectory}/metrics.jsonl", b"".join(_json(line) for line in lines))


def read_metrics(storage: Storage, trajectory: str) -> list[Metric]:
    """The steps so far; empty before the first."""
    try:
        lines = storage.get(f"{trajectory}/metrics.jsonl").splitlines()
    except Rejected:
        return []
    return [Metric(**json.loads(line)) for line in lines]


def write_done(storage: Storage, trajectory: str, adapter_id: bytes, seconds: float) -> None:
    storage.put(
        f"{trajectory}/done.json", _json({"adapter_id": adapter_id.hex(), "seconds": round(seconds, 1)})
    )


def done_adapter(storage: Storage, trajectory: str) -> bytes | None:
    """The adapter that this training made, if it has ended."""
    try:
        return bytes.fromhex(json.loads(storage.get(f"{trajectory}/done.json"))["adapter_id"])
    except Rejected:
        return None


def _json(value: object) -> bytes:
    return json.dumps(value, sort_keys=True).encode() + b"\n"
