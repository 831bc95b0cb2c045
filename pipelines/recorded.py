"""What attribution reads of a recorded training: the fp32 factors after a step."""

from collections.abc import Sequence

from safetensors import safe_open

from attribution.errors import Rejected
from attribution.gradients import Factors, Lora
from cluster.storage import Storage
from pipelines.trajectory import recorded_config, recorded_steps


def recorded_loras(
    storage: Storage, trajectory: str, wanted: Sequence[int]
) -> tuple[tuple[int, ...], list[Lora]]:
    """The steps asked for (none: the last one) and the factors after each.

    Raises:
        Rejected: ``no_trajectory``, or ``no_such_step`` naming what is kept.
    """
    kept = recorded_steps(storage, trajectory)
    if not kept:
        raise Rejected("no_trajectory", f"{trajectory} keeps no state", field="trajectory")
    missing = sorted(set(wanted) - set(kept))
    if missing:
        raise Rejected("no_such_step", f"steps {missing} are not among those kept, {kept}", field="snapshots")
    steps = tuple(wanted) or (kept[-1],)
    config = recorded_config(storage, trajectory)
    return steps, [_lora(storage, trajectory, step, config.alpha / config.rank) for step in steps]


def _lora(storage: Storage, trajectory: str, step: int, scale: float) -> Lora:
    """Adam's moments, two thirds of the file, are not read."""
    with safe_open(storage.fetch(f"{trajectory}/step_{step}.safetensors"), framework="pt") as state:
        modules = sorted(name[:-2] for name in state.keys() if name.endswith(".a"))  # noqa: SIM118
        return {
            module: Factors(state.get_tensor(f"{module}.a"), state.get_tensor(f"{module}.b"), scale)
            for module in modules
        }
