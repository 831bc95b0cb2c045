// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {Capture} from "./IEscrow.sol";

/// @notice Receipts settled by one transaction. The receipts themselves are in the DA payload.
struct BatchHeader {
    uint64 batchId; // counts from 1, no gaps
    bytes32 root; // Merkle root over the receipts
    bytes32 payloadHash; // keccak-256 of the payload
    uint32 numReceipts;
    uint256 feeWei; // sum of the receipts' fees = sum of what this batch captures
}

/// @title Which receipts were settled: a hash chain of batch headers, and the fees captured with each.
interface IAttributionLedger {
    /// @notice Batches come in order. One that is settled already is not settled again.
    error UnexpectedBatch(uint64 nextBatchId, uint64 givenBatchId);
    /// @notice A batch without receipts says nothing.
    error EmptyBatch(uint64 batchId);
    /// @notice What is captured is exactly what the receipts cost.
    error FeesNotCaptured(uint64 batchId, uint256 feeWei, uint256 capturedWei);

    /// @notice Batch `batchId` is settled; `head` is the chain's head behind it.
    event BatchCommitted(
        uint64 indexed batchId,
        bytes32 indexed root,
        bytes32 indexed payloadHash,
        uint32 numReceipts,
        uint256 feeWei,
        bytes32 head,
        bytes daCommitment
    );

    /// @notice Settle one batch and capture its fees, both or neither. SETTLER only.
    /// @param daCommitment where the payload is, opaque; bound by its hash, kept in the event.
    /// @param captures sorted by payer
    function commitBatch(BatchHeader calldata header, bytes calldata daCommitment, Capture[] calldata captures)
        external;

    function nextBatchId() external view returns (uint64);

    /// @notice keccak256(abi.encode(head, batchId, root, payloadHash, numReceipts, feeWei,
    /// keccak256(daCommitment))), from zero.
    function head() external view returns (bytes32);

    /// @notice The head behind `batchId`, or zero if that batch is not settled.
    function headOf(uint64 batchId) external view returns (bytes32);
}
