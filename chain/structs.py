"""The contracts' structs as frozen values, and what they hold of one payer or one period."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class BatchHeader:
    """What ``commitBatch`` binds. The fee is what the batch's captures take."""

    batch_id: int
    root: bytes
    payload_hash: bytes
    num_receipts: int
    fee_gwei: int


@dataclass(frozen=True, slots=True)
class PeriodHeader:
    """What ``postPeriod`` binds. ``total_gwei`` is all that is owed since genesis."""

    period_id: int
    root: bytes
    total_gwei: int
    first_batch: int
    last_batch: int
    ledger_head: bytes
    payload_hash: bytes


@dataclass(frozen=True, slots=True)
class PayerState:
    """One payer's escrow. Cumulative captures never exceed ``min(deposited_wei, ceiling_wei)``."""

    deposited_wei: int  # all deposits less all withdrawals
    captured_wei: int
    ceiling_wei: int
    expiry: int
    withdrawable_at: int
    withdrawing_wei: int  # asked back: still capturable, but not to be served against

    @property
    def limit_wei(self) -> int:
        """The cumulative spend up to which an operator may serve, as long as the ceiling runs."""
        return min(self.deposited_wei - self.withdrawing_wei, self.ceiling_wei)


@dataclass(frozen=True, slots=True)
class PeriodState:
    """A posted period. All zero where there is none."""

    period_id: int
    root: bytes
    total_wei: int
    last_batch: int
    active_at: int = 0  # of a pending one


@dataclass(frozen=True, slots=True)
class ClaimCall:
    """One leaf of the active reward root, and its proof."""

    contributor_id: bytes
    cumulative_wei: int
    proof: tuple[bytes, ...]
