"""What attribution reads of a recorded training: the fp32 factors after a step."""

import json
import re

from safetensors import safe_open

from attribution.errors import Corrupted, Rejected
from attribution.gradients import Factors, Lora
from cluster.storage import Storage

_STEP = re.compile(r"step_(\d+)\.safetensors")


def recorded_steps(storage: Storage, trajectory: str) -> list[int]:
    """Steps whose state the trajectory keeps, ascending. ``Rejected`` if there is none."""
    names = [key.rpartition("/")[2] for key in storage.list(f"{trajectory}/step_")]
    steps = sorted(int(match[1]) for match in map(_STEP.fullmatch, names) if match)
    if not steps:
        raise Rejected("no_trajectory", f"{trajectory} keeps no state", field="trajectory")
    return steps


def recorded_lora(storage: Storage, trajectory: str, step: int, scale: float) -> Lora:
    """The factors after ``step``, without Adam's moments."""
    with safe_open(storage.fetch(f"{trajectory}/step_{step}.safetensors"), framework="pt") as state:
        modules = sorted(name[:-2] for name in state.keys() if name.endswith(".a"))  # noqa: SIM118
        return {
            module: Factors(state.get_tensor(f"{module}.a"), state.get_tensor(f"{module}.b"), scale)
            for module in modules
        }


def lora_scale(storage: Storage, trajectory: str) -> float:
    """``alpha / rank`` of the training's configuration."""
    spec = json.loads(storage.get(f"{trajectory}/spec.json"))
    try:
        return float(spec["config"]["alpha"] / spec["config"]["rank"])
    except (KeyError, TypeError) as error:
        raise Corrupted("trajectory_spec", f"{trajectory}/spec.json names no alpha and rank") from error
