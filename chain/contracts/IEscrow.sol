// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

/// @notice What a payer has spent in all, as of a batch: cumulative, so only the last one matters.
struct Capture {
    address payer;
    uint256 cumulativeWei;
}

/// @notice A payer's signed limit: `operator` (the ledger) may have captured at most `cumulativeMaxWei` of
/// the payer's deposits in all, until `expiry` (UTC seconds, inclusive).
struct SpendCeiling {
    address payer;
    address operator;
    uint256 cumulativeMaxWei;
    uint64 expiry;
}

/// @notice All the escrow knows of a payer. A withdrawal that was asked for stays capturable until it is paid.
struct PayerState {
    uint128 depositedWei; // all deposits less all withdrawals
    uint128 capturedWei; // cumulative; never above min(depositedWei, ceilingWei)
    uint128 ceilingWei;
    uint64 expiry;
    uint64 withdrawableAt; // 0 when nothing was asked for
    uint128 withdrawingWei;
}

/// @title Prepaid fees: payers deposit and sign ceilings, the ledger captures what receipts cost.
/// @dev EIP-712 domain: name "OpenLedger Escrow", version "1", chain id, this contract.
interface IEscrow {
    /// @notice Amounts are whole gwei, so that a signed 64-bit ledger holds them exactly.
    error NotWholeGwei(uint256 amountWei);
    /// @notice Only the ledger may capture, and a ceiling must name the ledger.
    error NotTheLedger(address ledger, address given);
    /// @notice The payer did not sign this ceiling.
    error BadSignature(address payer);
    /// @notice A ceiling that has expired allows nothing.
    error CeilingExpired(address payer, uint64 expiry, uint256 timestamp);
    /// @notice A later ceiling may neither lower the maximum nor shorten the term of an earlier one: what was
    /// served under the earlier one must stay capturable.
    error CeilingLowered(address payer, uint256 currentWei, uint64 currentExpiry, uint256 givenWei, uint64 givenExpiry);
    /// @notice Captures are sorted by payer, each payer once.
    error CapturesNotSorted(address previous, address payer);
    /// @notice What was captured is not given back.
    error CaptureBelowPrevious(address payer, uint256 cumulativeWei, uint256 capturedWei);
    /// @notice A payer never pays more than it signed for.
    error CeilingExceeded(address payer, uint256 cumulativeWei, uint256 ceilingWei);
    /// @notice A payer never pays more than it deposited.
    error DepositExceeded(address payer, uint256 cumulativeWei, uint256 depositedWei);
    /// @notice There is not that much left to withdraw.
    error WithdrawalExceedsBalance(address payer, uint256 amountWei, uint256 balanceWei);
    /// @notice Nothing was asked for, or not long enough ago.
    error WithdrawalNotReady(address payer, uint64 withdrawableAt, uint256 timestamp);

    /// @notice `payer` may spend `amountWei` more, `depositedWei` in all.
    event Deposited(address indexed payer, address indexed funder, uint256 amountWei, uint256 depositedWei);
    /// @notice `payer` signed that the ledger may capture up to `cumulativeMaxWei` in all until `expiry`.
    event CeilingAuthorized(address indexed payer, address indexed operator, uint256 cumulativeMaxWei, uint64 expiry);
    /// @notice Batch `batchId` took `amountWei` from `payer`, `cumulativeWei` in all.
    event Captured(address indexed payer, uint64 indexed batchId, uint256 amountWei, uint256 cumulativeWei);
    /// @notice `payer` wants `amountWei` back and may have it from `withdrawableAt`. Replaces an earlier wish.
    event WithdrawalRequested(address indexed payer, uint256 amountWei, uint64 withdrawableAt);
    /// @notice `payer` got `amountWei` back; `depositedWei` remain counted as deposited.
    event Withdrawn(address indexed payer, uint256 amountWei, uint256 depositedWei);

    /// @notice Pay in for `payer`, from the caller's allowance.
    function deposit(address payer, uint256 amountWei) external;

    /// @notice Pay in for `payer` with the payer's own EIP-2612 permit. Anyone may carry it.
    function depositWithPermit(address payer, uint256 amountWei, uint256 deadline, uint8 v, bytes32 r, bytes32 s)
        external;

    /// @notice Record a ceiling signed by the payer's key, or by its contract (ERC-1271). Anyone may carry it; the
    /// one on record does nothing.
    function authorize(SpendCeiling calldata ceiling, bytes calldata signature) external;

    /// @notice Move what each payer has newly spent to the distributor. Ledger only.
    /// @return totalWei the sum of what was newly captured
    function capture(uint64 batchId, Capture[] calldata captures) external returns (uint256 totalWei);

    /// @notice Ask for `amountWei` of the caller's own balance back; 0 takes the wish back. A new wish starts
    /// the wait anew. Operators stop serving against what is asked for at once.
    function requestWithdrawal(uint256 amountWei) external;

    /// @notice Pay out the caller's own wish, less what captures have taken of it meanwhile.
    function withdraw() external;

    function payerState(address payer) external view returns (PayerState memory);

    /// @notice The digest a payer signs.
    function ceilingDigest(SpendCeiling calldata ceiling) external view returns (bytes32);

    /// @notice Seconds a withdrawal waits: longer than a batch may age, so what was served is captured first.
    function withdrawalDelay() external view returns (uint64);
}
