// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

/// @notice A contiguous range of settled batches that is paid out together.
struct Period {
    uint64 periodId; // counts from 1, no gaps
    bytes32 root; // Merkle root over (chain id, this contract, contributor id, cumulative wei)
    uint256 totalWei; // what the root owes in all, everything paid before included
    uint64 firstBatch;
    uint64 lastBatch;
    bytes32 ledgerHead; // the ledger's head behind lastBatch
    bytes32 payloadHash; // keccak-256 of the payload from which the root follows
}

/// @notice One leaf of the active root, and its way to it.
struct Claim {
    bytes32 contributorId;
    uint256 cumulativeWei;
    bytes32[] proof;
}

/// @title Who is owed what: one cumulative reward root, funded before it counts, paid to wallets on record.
interface IDistributor {
    /// @notice Periods come in order.
    error UnexpectedPeriod(uint64 nextPeriodId, uint64 givenPeriodId);
    /// @notice The period before can still be disabled; this one has to wait for it.
    error PreviousPeriodPending(uint64 periodId, uint64 activeAt, uint256 timestamp);
    /// @notice Periods neither skip a batch nor pay one twice.
    error BatchesNotContiguous(uint64 expectedFirstBatch, uint64 firstBatch, uint64 lastBatch);
    /// @notice The period was computed from other batches than those that were settled.
    error HeadMismatch(uint64 lastBatch, bytes32 settledHead, bytes32 givenHead);
    /// @notice What is owed in all never shrinks.
    error TotalBelowPrevious(uint256 totalWei, uint256 previousTotalWei);
    /// @notice Nothing is promised that was not paid in.
    error NotFunded(uint256 totalWei, uint256 fundedWei);
    /// @notice Amounts are whole gwei.
    error NotWholeGwei(uint256 amountWei);
    /// @notice Only the pending period can be disabled.
    error NotPending(uint64 periodId);
    /// @notice There is no active root yet.
    error NoActivePeriod();
    /// @notice The proof does not lead from this leaf to the active root.
    error BadProof(bytes32 contributorId, uint256 cumulativeWei);
    /// @notice No wallet is on record for this id.
    error NotRegistered(bytes32 contributorId);
    /// @notice Everything up to `cumulativeWei` was paid before.
    error NothingToClaim(bytes32 contributorId, uint256 cumulativeWei, uint256 claimedWei);
    /// @notice The leaves of the active root sum to more than its total.
    error TotalExceeded(uint256 claimedWei, uint256 totalWei);

    /// @notice Period `periodId` may be claimed from `activeAt`, unless it is disabled before.
    event PeriodPosted(
        uint64 indexed periodId,
        bytes32 indexed root,
        bytes32 indexed payloadHash,
        uint256 totalWei,
        uint64 firstBatch,
        uint64 lastBatch,
        bytes32 ledgerHead,
        uint64 activeAt,
        bytes daCommitment
    );
    /// @notice The pending period `periodId` will never be active; another one takes its number.
    event PeriodDisabled(uint64 indexed periodId, bytes32 indexed root, address indexed guardian);
    /// @notice `wallet` received what `contributorId` had earned and not yet drawn.
    event Claimed(bytes32 indexed contributorId, address indexed wallet, uint256 paidWei, uint256 cumulativeWei);

    /// @notice Post the reward root of the next period. SETTLER only.
    /// @param daCommitment where the payload is, opaque, kept in the event.
    function postPeriod(Period calldata period, bytes calldata daCommitment) external;

    /// @notice Refuse the pending period before it is active. GUARDIAN only.
    function disable(uint64 periodId) external;

    /// @notice Pay a contributor up to `cumulativeWei`. Anyone may call; only the wallet on record is paid.
    /// @dev Leaf layout and pair ordering: attribution/merkle.py.
    function claim(bytes32 contributorId, uint256 cumulativeWei, bytes32[] calldata proof) external;

    /// @notice Pay many. A leaf that was paid meanwhile is passed over, so nobody can spoil the others' claims.
    function claimMany(Claim[] calldata claims) external;

    /// @notice What has been paid to `contributorId` in all.
    function claimedWei(bytes32 contributorId) external view returns (uint256);

    /// @notice What has been paid in all.
    function totalClaimedWei() external view returns (uint256);

    /// @notice Everything ever paid in.
    function fundedWei() external view returns (uint256);

    /// @notice The period that claims are checked against; all zero if there is none.
    function activePeriod() external view returns (uint64 periodId, bytes32 root, uint256 totalWei, uint64 lastBatch);

    /// @notice The period that waits, and from when it counts; all zero if there is none.
    function pendingPeriod()
        external
        view
        returns (uint64 periodId, bytes32 root, uint256 totalWei, uint64 lastBatch, uint64 activeAt);

    /// @notice Seconds between posting and counting: the time to recompute a root and to disable it.
    function activationDelay() external view returns (uint64);
}
