"""Many parts at once on a Ray cluster: delete Ray and a ``for`` loop replaces it."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import ray

T = TypeVar("T")
R = TypeVar("R")


def num_workers() -> int:
    """How many parts run at the same time. Joins the cluster of the job, or starts one of this machine."""
    if not ray.is_initialized():
        ray.init(log_to_driver=False)
    return max(1, int(ray.cluster_resources().get("CPU", 1)))


def fan_out(work: Callable[[T], R], parts: Sequence[T]) -> list[R]:
    """``[work(part) for part in parts]``. A part whose worker dies is done again; a refusal is raised here as
    what it is. Parts share what serving has left free, however little: they wait for nobody."""

    def run(part: T) -> R:
        return work(part)

    num_workers()
    free = float(ray.available_resources().get("CPU", 0))
    task = ray.remote(num_cpus=min(1.0, int(100 * free / max(1, len(parts))) / 100), max_retries=3)(run)
    try:
        found: list[R] = ray.get([task.remote(part) for part in parts])
    except ray.exceptions.RayTaskError as error:
        raise error.cause if isinstance(error.cause, Exception) else error from error
    return found
