"""Short stand-ins for long gradients: a count sketch that is linear, seeded, and exact on integers.

Entry ``i`` is added with a sign to one of ``size`` buckets, both drawn from a published integer hash, so dot
products are kept on average (standard error about ``1 / sqrt(size)`` between unit vectors) and anybody
recomputes the sketch of an integer vector bit for bit.

Source: Charikar, Chen, Farach-Colton 2002; the hash is splitmix64 started at ``seed``."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_LIMB_BITS = 31


@dataclass(frozen=True, slots=True)
class Sketch:
    """``bucket`` and ``sign`` of every parameter, int64 ``[parameters]``, ``sign`` in {-1, +1}."""

    size: int
    bucket: Tensor
    sign: Tensor

    def part(self, start: int, end: int) -> "Sketch":
        """The sketch of parameters ``[start, end)`` alone: sketches of parts add up to that of the whole."""
        return Sketch(self.size, self.bucket[start:end], self.sign[start:end])

    def floats(self, rows: Tensor) -> Tensor:
        """``[rows, parameters]`` to ``[rows, size]``, float32."""
        out = torch.zeros(len(rows), self.size)
        return out.index_add_(1, self.bucket, rows * self.sign.float())

    def integers(self, values: Tensor) -> Tensor:
        """Exact int64 ``[parameters]`` to ``[size]``. The caller bounds what one bucket may hold."""
        assert values.dtype == torch.int64
        return torch.zeros(self.size, dtype=torch.int64).index_add_(0, self.bucket, values * self.sign)


def make_sketch(num_parameters: int, size: int, seed: int) -> Sketch:
    """``size`` must be a power of two."""
    assert size & (size - 1) == 0, size
    with np.errstate(over="ignore"):
        z = np.uint64(seed) + np.arange(1, num_parameters + 1, dtype=np.uint64) * np.uint64(
            0x9E3779B97F4A7C15
        )
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    sign = 1 - 2 * (z >> np.uint64(63)).astype(np.int64)
    bucket = (z & np.uint64(size - 1)).astype(np.int64)
    return Sketch(size, torch.from_numpy(bucket), torch.from_numpy(sign))


def exact_dots(sketch: Sketch, total: Tensor, features: NDArray[np.int16]) -> list[int]:
    """``features @ sketch(total)`` as Python integers: no rounding, no overflow, the same on any machine.

    ``total`` (int64, below ``2**62``) is cut into a high and a low limb of 31 bits. By Cauchy-Schwarz a
    limb's dot product stays below ``2**63`` for up to ``2**24`` parameters and unit features of 14
    fractional bits."""
    high = total >> _LIMB_BITS
    low = total - (high << _LIMB_BITS)
    wide = features.astype(np.int64)
    dots = [(wide @ sketch.integers(limb).numpy()).tolist() for limb in (high, low)]
    return [(h << _LIMB_BITS) + low_dot for h, low_dot in zip(*dots, strict=True)]
