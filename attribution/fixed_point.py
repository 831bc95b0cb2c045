"""From float gradients to integers that anybody can add up in any order and get the same bits.

An answer's gradient is scaled to unit length, so a loud answer counts no more than a quiet one, and
rounded to ``bits`` fractional bits. Weighted by its fee in gwei and summed in int64 it cannot overflow: an
entry is at most ``2**bits``, and ``bits`` is chosen such that ``total fee * 2**bits < 2**62``."""

import torch
from torch import Tensor

from attribution.errors import Corrupted, Rejected

MAX_BITS = 24
MIN_BITS = 16  # below this, rounding moves a unit vector of 10^6 entries by more than one percent
MAX_TOTAL_GWEI = 2 ** (62 - MIN_BITS) - 1  # about 70,000 tokens per adapter and period


def fraction_bits(total_gwei: int) -> int:
    """Fractional bits for a sum whose weights add up to ``total_gwei``; ``Rejected`` if too few are left."""
    bits = min(MAX_BITS, 62 - total_gwei.bit_length())
    if bits < MIN_BITS:
        raise Rejected(
            "period_too_large",
            f"fees of {total_gwei} gwei exceed {MAX_TOTAL_GWEI}: close fewer batches at once",
            field="fee_gwei",
        )
    return bits


def to_fixed_point(gradient: Tensor, bits: int) -> Tensor:
    """Round ``gradient / |gradient|`` to int64 multiples of ``2**-bits``.

    A gradient of exactly zero points nowhere and stays zero. ``Corrupted`` if it is not finite."""
    norm = torch.linalg.vector_norm(gradient.double())
    if not torch.isfinite(norm):
        raise Corrupted("gradient_not_finite", f"a gradient has norm {norm.item()}")
    if norm == 0:
        return torch.zeros_like(gradient, dtype=torch.int64)
    one = float(2**bits)
    return (gradient.double() / norm * one).round().clamp(-one, one).to(torch.int64)


def add_weighted(total: Tensor, fixed: Tensor, weight_gwei: int) -> None:
    """``total += weight_gwei * fixed``, in place, in int64. The caller has bounded the sum of all weights."""
    assert total.dtype == fixed.dtype == torch.int64 and weight_gwei >= 0
    total.add_(fixed, alpha=weight_gwei)
