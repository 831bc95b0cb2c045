"""What the kernels of this folder share: the types they multiply in, and tiles.

Without a device the tests run the same kernels in Triton's interpreter, which multiplies bf16 as integers:
there operands are widened first. A product of two bf16 numbers is exact in fp32, so only the order of sums
differs."""

from typing import Any

import torch
import triton
import triton.language as tl

IS_INTERPRETED = bool(triton.knobs.runtime.interpret)
ROWS = 16  # of a tile: the least that a tensor core multiplies


def operand(dtype: torch.dtype) -> Any:
    """The type in which a kernel multiplies numbers of ``dtype``; sums are always fp32."""
    return tl.bfloat16 if dtype == torch.bfloat16 and not IS_INTERPRETED else tl.float32
