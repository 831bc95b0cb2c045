"""What our contracts say: one frozen value per event, named and spelt as in the interfaces.

Replayed in chain order from the deployment's block they rebuild all state; that is what the auditor does.
Addresses are 20 bytes, ids and hashes 32, amounts wei."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, order=True)
class Position:
    """Where an event stands; events are ordered by block and log index."""

    block: int
    log_index: int
    tx_hash: bytes


@dataclass(frozen=True, slots=True)
class Registered:
    at: Position
    contributor_id: bytes
    wallet: bytes


@dataclass(frozen=True, slots=True)
class Rotated:
    at: Position
    contributor_id: bytes
    old_wallet: bytes
    new_wallet: bytes


@dataclass(frozen=True, slots=True)
class Deposited:
    at: Position
    payer: bytes
    funder: bytes
    amount_wei: int
    deposited_wei: int  # all deposits of the payer less all withdrawals


@dataclass(frozen=True, slots=True)
class CeilingAuthorized:
    at: Position
    payer: bytes
    operator: bytes
    cumulative_max_wei: int
    expiry: int


@dataclass(frozen=True, slots=True)
class Captured:
    at: Position
    payer: bytes
    batch_id: int
    amount_wei: int
    cumulative_wei: int


@dataclass(frozen=True, slots=True)
class WithdrawalRequested:
    """``amount_wei`` 0 takes an earlier wish back."""

    at: Position
    payer: bytes
    amount_wei: int
    withdrawable_at: int


@dataclass(frozen=True, slots=True)
class Withdrawn:
    at: Position
    payer: bytes
    amount_wei: int
    deposited_wei: int


@dataclass(frozen=True, slots=True)
class BatchCommitted:
    at: Position
    batch_id: int
    root: bytes
    payload_hash: bytes
    num_receipts: int
    fee_wei: int
    head: bytes
    da_commitment: bytes


@dataclass(frozen=True, slots=True)
class PeriodPosted:
    at: Position
    period_id: int
    root: bytes
    payload_hash: bytes
    total_wei: int
    first_batch: int
    last_batch: int
    ledger_head: bytes
    active_at: int
    da_commitment: bytes


@dataclass(frozen=True, slots=True)
class PeriodDisabled:
    at: Position
    period_id: int
    root: bytes
    guardian: bytes


@dataclass(frozen=True, slots=True)
class Claimed:
    at: Position
    contributor_id: bytes
    wallet: bytes
    paid_wei: int
    cumulative_wei: int


Event = (
    Registered
    | Rotated
    | Deposited
    | CeilingAuthorized
    | Captured
    | WithdrawalRequested
    | Withdrawn
    | BatchCommitted
    | PeriodPosted
    | PeriodDisabled
    | Claimed
)
