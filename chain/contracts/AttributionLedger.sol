// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {AccessControl} from "@openzeppelin/contracts/access/AccessControl.sol";

import {BatchHeader, IAttributionLedger} from "./IAttributionLedger.sol";
import {Capture, IEscrow} from "./IEscrow.sol";

contract AttributionLedger is IAttributionLedger, AccessControl {
    bytes32 public constant SETTLER = keccak256("SETTLER");

    IEscrow public immutable escrow;

    uint64 public nextBatchId = 1;
    mapping(uint64 batchId => bytes32 head) public headOf;

    constructor(IEscrow escrow_, address admin, address settler) {
        escrow = escrow_;
        _grantRole(DEFAULT_ADMIN_ROLE, admin);
        _grantRole(SETTLER, settler);
    }

    function commitBatch(BatchHeader calldata header, bytes calldata daCommitment, Capture[] calldata captures)
        external
        onlyRole(SETTLER)
    {
        uint64 batchId = header.batchId;
        if (batchId != nextBatchId) revert UnexpectedBatch(nextBatchId, batchId);
        if (header.numReceipts == 0) revert EmptyBatch(batchId);
        bytes32 newHead = keccak256(
            abi.encode(
                headOf[batchId - 1],
                batchId,
                header.root,
                header.payloadHash,
                header.numReceipts,
                header.feeWei,
                keccak256(daCommitment)
            )
        );
        headOf[batchId] = newHead;
        nextBatchId = batchId + 1;
        emit BatchCommitted(
            batchId, header.root, header.payloadHash, header.numReceipts, header.feeWei, newHead, daCommitment
        );
        uint256 capturedWei = escrow.capture(batchId, captures);
        if (capturedWei != header.feeWei) revert FeesNotCaptured(batchId, header.feeWei, capturedWei);
    }

    function head() external view returns (bytes32) {
        return headOf[nextBatchId - 1];
    }
}
