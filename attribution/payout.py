"""The payout rule: one pure-integer function from credits to money, which close_period runs and the auditor
repeats.

An adapter's fees of a period are cut by the published split. The contributors' line goes to contributors in
proportion to what their records did beyond noise: credits are summed per contributor first (so clipping
cannot pay junk), the noise floor comes from records that were never trained on, and what is not above the
floor goes to the pool. Rounding is by largest remainder, ties by position, so lines sum to the fee exactly.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from enum import StrEnum
from math import isqrt

from attribution.errors import Corrupted
from attribution.types import PPM, ZERO_ID, Blend, Credit, Receipt, Share


class Role(StrEnum):
    """Why somebody is paid."""

    PLATFORM = "platform"
    OWNER = "owner"
    HOST = "host"
    STAKERS = "stakers"
    CONTRIBUTOR = "contributor"
    RETRIEVAL = "retrieval"
    POOL = "pool"


@dataclass(frozen=True, slots=True)
class Split:
    """The published split of every fee, in parts per million. Sums to one million."""

    platform_ppm: int
    owner_ppm: int
    host_ppm: int
    stakers_ppm: int
    contributors_ppm: int
    retrieval_ppm: int

    def __post_init__(self) -> None:
        parts = [getattr(self, f.name) for f in fields(self)]
        if sum(parts) != PPM or min(parts) < 0:
            raise Corrupted("split", f"parts {parts} sum to {sum(parts)}, not {PPM}", field="split_ppm")


@dataclass(frozen=True, slots=True)
class Beneficiaries:
    """Who stands behind the fixed lines. A zero id means nobody does: that line goes to the contributors."""

    platform: bytes
    host: bytes
    stakers: bytes
    retrieval: bytes
    pool: bytes


@dataclass(frozen=True, slots=True)
class AdapterClose:
    """What decides one adapter's payout in one period. The base model is the adapter of id zero, with no
    credits.
    """

    adapter_id: bytes
    owner_id: bytes
    fee_gwei: int
    method: str  # how the credits were made, with its parameters: printed on the statement
    gradient_sum_sha256: bytes  # the period's integer gradient sum; zero if it was not published
    credits: tuple[Credit, ...]  # sorted by group id
    controls: tuple[int, ...]  # credits of never-trained records, sorted


@dataclass(frozen=True, slots=True)
class Payout:
    """One line of a statement."""

    contributor_id: bytes
    role: Role
    amount_gwei: int


@dataclass(frozen=True, slots=True)
class Payouts:
    """Who earned one adapter's fees of one period, in gwei: whoever holds the same credits computes the same
    lines.
    """

    adapter_id: bytes
    fee_gwei: int
    lines: tuple[Payout, ...]

    def __post_init__(self) -> None:
        paid = sum(line.amount_gwei for line in self.lines)
        if paid != self.fee_gwei:
            raise Corrupted(
                "payouts", f"adapter {self.adapter_id.hex()}: pays {paid} gwei of {self.fee_gwei}"
            )


def pay(close: AdapterClose, split: Split, who: Beneficiaries) -> Payouts:
    """Split one adapter's fees. Lines of nothing are left out; contributors are largest first, ties by id."""
    stakers_ppm = 0 if who.stakers == ZERO_ID else split.stakers_ppm
    retrieval_ppm = 0 if who.retrieval == ZERO_ID else split.retrieval_ppm
    contributors_ppm = (
        PPM - split.platform_ppm - split.owner_ppm - split.host_ppm - stakers_ppm - retrieval_ppm
    )
    platform, owner, host, stakers, retrieval, contributors = largest_remainder(
        [split.platform_ppm, split.owner_ppm, split.host_ppm, stakers_ppm, retrieval_ppm, contributors_ppm],
        close.fee_gwei,
    )
    shares, pool_gwei = share_out(close.credits, close.controls, contributors)
    lines = [
        Payout(who.platform, Role.PLATFORM, platform),
        Payout(close.owner_id, Role.OWNER, owner),
        Payout(who.host, Role.HOST, host),
        Payout(who.stakers, Role.STAKERS, stakers),
        Payout(who.retrieval, Role.RETRIEVAL, retrieval),
        *(Payout(share.contributor_id, Role.CONTRIBUTOR, share.amount_gwei) for share in shares),
        Payout(who.pool, Role.POOL, pool_gwei),
    ]
    return Payouts(close.adapter_id, close.fee_gwei, tuple(line for line in lines if line.amount_gwei))


def fee_shares(receipt: Receipt, blends: Mapping[bytes, Blend]) -> list[tuple[bytes, int]]:
    """Adapter ids and the gwei of a receipt's fee that each has earned: all of it, or, of a blend, by weight.
    Shares of nothing are left out. ``blends`` is by id and holds at least the receipt's."""
    blend = blends.get(receipt.adapter_id)
    if blend is None:
        return [(receipt.adapter_id, receipt.fee_gwei)]
    amounts = largest_remainder([part.weight_ppm for part in blend.parts], receipt.fee_gwei)
    shares = zip((part.adapter_id for part in blend.parts), amounts, strict=True)
    return [(adapter_id, gwei) for adapter_id, gwei in shares if gwei]


def share_out(
    credits: Sequence[Credit], controls: Sequence[int], amount_gwei: int
) -> tuple[tuple[Share, ...], int]:
    """Contributors' shares (largest first, ties by id) and what the pool keeps; together exactly
    ``amount_gwei``.

    A contributor with ``n`` groups earns what its net credit has above ``floor * ceil(sqrt(n))``: the net of
    ``n`` records that did nothing grows like that. The part below the floor belongs to nobody and goes to the
    pool, so splitting one identity into several only raises the sum of the floors.
    """
    net: dict[bytes, int] = defaultdict(int)
    num_groups: dict[bytes, int] = defaultdict(int)
    for credit in credits:
        net[credit.contributor_id] += credit.value
        num_groups[credit.contributor_id] += 1
    floor = noise_floor(controls)
    contributors = sorted(net)
    above = [max(0, net[c] - floor * (isqrt(num_groups[c] - 1) + 1)) for c in contributors]
    below = sum(max(0, net[c]) for c in contributors) - sum(above)
    if not any(above):
        return (), amount_gwei
    *amounts, pool_gwei = largest_remainder([*above, below], amount_gwei)
    shares = [Share(c, amount) for c, amount in zip(contributors, amounts, strict=True) if amount]
    return tuple(sorted(shares, key=lambda share: (-share.amount_gwei, share.contributor_id))), pool_gwei


def noise_floor(controls: Sequence[int]) -> int:
    """The 99th percentile (nearest rank) of the controls' absolute credits; 0 without controls."""
    if not controls:
        return 0
    ordered = sorted(abs(value) for value in controls)
    return ordered[(99 * len(ordered) + 99) // 100 - 1]


def largest_remainder(weights: Sequence[int], amount: int) -> list[int]:
    """Cut ``amount`` in proportion to non-negative ``weights``, exactly. Leftover units go to the largest
    remainders, ties to the earlier position. Hamilton's method.
    """
    total = sum(weights)
    assert total > 0 and min(weights) >= 0 and amount >= 0
    parts = [amount * weight // total for weight in weights]
    remainders = [amount * weight % total for weight in weights]
    by_remainder = sorted(range(len(weights)), key=lambda i: (-remainders[i], i))
    for i in by_remainder[: amount - sum(parts)]:
        parts[i] += 1
    return parts
