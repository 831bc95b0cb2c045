"""A step of fixed sizes, captured once as a CUDA graph and replayed: a decode step of a large model is some
500 launches, which take longer to send one by one than to run. On a CPU the same step is simply called."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from serve_apps.engine.cuda.step import Numbers, Sizes, Step
from serve_apps.engine.runner import Outputs

Forward = Callable[[Step], Outputs]


class CapturedStep:
    """``forward`` over integers that lie where they lay when it was captured.

    Steps share one pool of memory, so what a call gives is valid until the next call of any of them."""

    def __init__(
        self, forward: Forward, sizes: Sizes, block_size: int, device: torch.device, pool: Any
    ) -> None:
        """``pool``: of ``memory_pool``."""
        self._forward = forward
        self._sizes = sizes
        self._numbers = torch.zeros(sum(sizes.parts), dtype=torch.int64, device=device)
        self._step = Step.of(self._numbers, sizes, block_size)
        self._graph: torch.cuda.CUDAGraph | None = None
        if device.type == "cuda":
            self._send(Numbers([], [], [], [], [], [], []).padded(sizes.num_rows))
            self._capture(pool)

    def __call__(self, numbers: Numbers) -> Outputs:
        self._send(numbers)
        if self._graph is None:
            return self._forward(self._step)
        self._graph.replay()
        return self._result

    def _send(self, numbers: Numbers) -> None:
        self._numbers.copy_(host_numbers(numbers, self._sizes, self._numbers.device), non_blocking=True)

    def _capture(self, pool: Any) -> None:
        """After a run that compiles the kernels and lets cuBLAS make its workspace, on a stream of its own as
        PyTorch asks."""
        stream = torch.cuda.Stream(self._numbers.device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._forward(self._step)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool):
            self._result = self._forward(self._step)


def memory_pool(device: torch.device) -> Any:
    """Where the intermediate results of captured steps lie."""
    return torch.cuda.graph_pool_handle() if device.type == "cuda" else None


def host_numbers(numbers: Numbers, sizes: Sizes, device: torch.device) -> Tensor:
    """In host memory, pinned where a device will read it: torch keeps such memory until the copy is over."""
    host = torch.zeros(sum(sizes.parts), dtype=torch.int64, pin_memory=device.type == "cuda")
    numbers.write(host, sizes)
    return host
