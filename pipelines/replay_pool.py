"""A replay's workers on a Ray cluster: as many as the training had, each with the threads it had.

Delete Ray and ``row_derivatives.ThisProcess`` replaces this module. A worker remembers nothing that matters,
so one that dies is started anew and asked again."""

from collections.abc import Sequence
from typing import Any

import ray
from torch import Tensor

from attribution.errors import Unavailable
from cluster.config import Settings
from pipelines.course import Course
from pipelines.fan_out import num_workers
from pipelines.row_derivatives import Pulled, open_worker, threads_of
from pipelines.trajectory import TrainingSpec

RETRIES = 3  # of a call whose worker died


class _Worker:
    def __init__(self, settings: Settings, base_id: bytes, course: Course, threads: int) -> None:
        self._worker = open_worker(settings, base_id, course, threads)

    def gradient(self, values: Tensor, rows: Sequence[int]) -> Tensor:
        return self._worker.gradient(values, rows)

    def pull_back(self, values: Tensor, direction: Tensor, rows: Sequence[int]) -> Pulled:
        return self._worker.pull_back(values, direction, rows)


class ReplayPool:
    """``Workers`` of many processes; shares go to them in turn."""

    def __init__(self, settings: Settings, base_id: bytes, course: Course) -> None:
        cpus = num_workers()
        count = min(course.num_workers, cpus)
        threads = threads_of(course)
        free = float(ray.available_resources().get("CPU", 0))
        gpus = float(ray.available_resources().get("GPU", 0))  # an engine may have them
        actor = ray.remote(
            num_cpus=min(1.0, int(100 * free / count) / 100),
            num_gpus=1 if gpus >= count else 0,
            max_restarts=RETRIES,
            max_task_retries=RETRIES,
            runtime_env={"env_vars": {"TOKENIZERS_PARALLELISM": "false", "OMP_WAIT_POLICY": "PASSIVE"}},
        )(_Worker)
        self._actors = [actor.remote(settings, base_id, course, threads) for _ in range(count)]

    def gradients(self, values: Tensor, shares: Sequence[Sequence[int]]) -> list[Tensor]:
        given = ray.put(values)
        return self._all([self._of(i).gradient.remote(given, rows) for i, rows in enumerate(shares)])

    def pull_back(self, values: Tensor, direction: Tensor, shares: Sequence[Sequence[int]]) -> list[Pulled]:
        given = ray.put(values), ray.put(direction)
        return self._all([self._of(i).pull_back.remote(*given, rows) for i, rows in enumerate(shares)])

    def _of(self, share: int) -> Any:
        return self._actors[share % len(self._actors)]

    def _all(self, asked: list[Any]) -> list[Any]:
        """A refusal is raised here as what it is."""
        try:
            found: list[Any] = ray.get(asked)
        except ray.exceptions.RayTaskError as error:
            raise error.cause if isinstance(error.cause, Exception) else error from error
        except ray.exceptions.RayActorError as error:
            raise Unavailable("replay_worker", f"a worker died again and again: {error}"[:500]) from error
        return found


def open_pool(settings: Settings, training: TrainingSpec, course: Course) -> ReplayPool:
    return ReplayPool(settings, training.base_id, course)
