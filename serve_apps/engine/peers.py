"""The ranks of one runner, each with its part of every layer: what they tell each other within a step.

Two exchanges make a model of parts whole. Projections that take a part of their inputs (``o``, ``down``) give
partial sums, which are added up; the head gives a part of the vocabulary, and the parts are put side by
side."""

from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

# Longer than any step, its kernels' first compilation included. A rank that dies is noticed at once.
TIMEOUT = timedelta(minutes=5)


class Peers(Protocol):
    @property
    def rank(self) -> int: ...

    @property
    def num_ranks(self) -> int: ...

    def add_up(self, partial: Tensor) -> None:
        """The sum over all ranks, in place, on each."""

    def side_by_side(self, columns: Tensor, width: int) -> Tensor:
        """The columns of all ranks in order, the first ``width`` of them, on each."""


@dataclass(frozen=True, slots=True)
class Alone:
    """One runner that has everything."""

    rank: int = 0
    num_ranks: int = 1

    def add_up(self, partial: Tensor) -> None:
        pass

    def side_by_side(self, columns: Tensor, width: int) -> Tensor:
        return columns


ALONE = Alone()


class Group:
    """Ranks of processes on this machine, by NCCL between devices and by gloo on CPUs, there over loopback.

    A group of its own and not the process's default one, so that whoever ends a runner can begin another."""

    def __init__(self, store: dist.Store, rank: int, num_ranks: int, device: torch.device) -> None:
        """Returns when all have come.

        Args:
            store: the same for all ranks, and used by nobody before.
        """
        self.rank, self.num_ranks = rank, num_ranks
        self._group: dist.ProcessGroupNCCL | dist.ProcessGroupGloo
        if device.type == "cuda":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = TIMEOUT
            self._group = dist.ProcessGroupNCCL(store, rank, num_ranks, options)
        else:
            here = dist.ProcessGroupGloo._Options()
            here._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
            here._timeout = TIMEOUT
            self._group = dist.ProcessGroupGloo(store, rank, num_ranks, here)

    def add_up(self, partial: Tensor) -> None:
        self._group.allreduce([partial]).wait()

    def side_by_side(self, columns: Tensor, width: int) -> Tensor:
        if not len(columns):
            return columns.new_empty(0, width)
        parts = [torch.empty_like(columns) for _ in range(self.num_ranks)]
        self._group.allgather([parts], [columns]).wait()
        return torch.cat(parts, dim=1)[:, :width]

    def abort(self) -> None:
        """Wake whoever waits for a rank that will not come; what they then have means nothing."""
        self._group.abort()


def meeting_point(folder: Path, num_ranks: int) -> dist.Store:
    """Where ranks find each other: a file, so nobody else on the network can."""
    return dist.FileStore(str(folder / "ranks"), num_ranks)
